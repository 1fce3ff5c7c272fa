"""``chameleon fit`` tells from config.json what the engine finds once the model is loaded."""

from engine_harness import PagedEngine

from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.paged.checkpoint import summarise
from chameleon_ray.fit import fit
from chameleon_ray.model_shape import ModelShape, read_config


def test_blocks_and_bytes_are_those_of_the_engine(engine: PagedEngine, demo: DemoPaths) -> None:
    config = read_config(demo.model)
    layout = engine.memory.storage.layout
    assert list(layout.parts.values()) == list(ModelShape.of(config, "demo").parts().values())
    block_size = engine.scheduler.block_size
    found = {rank.rank: rank for rank in fit(config | {"dtype": "float32"}, "demo", block_size=block_size).ranks}
    for name in demo.adapter_names()[:5]:
        summary = summarise(demo.adapters / name, layout, max_rank=128)
        assert (summary.num_blocks, summary.size_bytes) == (found[summary.rank].blocks, found[summary.rank].bytes)
