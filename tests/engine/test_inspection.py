"""What the engine says of an adapter before any request uses it."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_harness import PagedEngine
from memory_driver import EngineFront, MemoryDriver
from safetensors.torch import load_file, save_file

from chameleon_ray.adapters.checkpoint import read_checkpoint
from chameleon_ray.adapters.errors import AdapterError, AdapterInvalidError, AdapterLoadError, AdapterTooLargeError
from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.inspection import Inspection, engine_error
from chameleon_ray.engine.paged import host
from chameleon_ray.engine.paged.options import PagedSettings
from chameleon_ray.engine.slots.messages import SlotLayout
from chameleon_ray.engine.slots.storage import SlotStorage

PROMPT = list(range(10, 40))


def inspect(engine: PagedEngine, folder: Path, whole: bool = True) -> Inspection:
    """The answer; steps are what vLLM's loop would do, which knows no requests."""
    answers: list[Inspection] = []
    engine.memory.inspect(folder.name, str(folder), whole, answers.append)
    while not answers:
        assert engine.scheduler.has_requests(), "the engine would sleep now"
        engine.step()
    engine.settle()
    [answer] = answers
    return answer


def test_what_an_adapter_takes_is_told_by_its_shape_alone(engine: PagedEngine, demo: DemoPaths) -> None:
    for name in demo.adapter_names()[:5]:  # one of each rank
        folder = demo.adapters / name
        measured = engine.memory.measure(read_checkpoint(folder).shape)
        assert measured == inspect(engine, folder, whole=False) and measured.num_blocks > 0
    huge = tuple((name, 1024) for name, _ in read_checkpoint(folder).shape)
    found = engine.memory.measure(huge)
    assert found.code == AdapterTooLargeError.code and "blocks of KV memory" in found.reason


def test_one_question_for_all_adapters_of_a_scan(tiny_table: ModuleTable) -> None:
    driver = MemoryDriver(tiny_table, lambda: 0.0)
    front = EngineFront(driver, tiny_table, lambda: 0.0)
    names = [module.name for module in tiny_table.modules.values()]
    shapes = [tuple((name, rank) for name in names) for rank in range(1, 200)]
    answers = asyncio.run(front.server.measure(shapes))
    assert [answer is None for answer in answers] == sorted((answer is None for answer in answers), reverse=True)
    assert answers[0] is None and isinstance(answers[-1], AdapterTooLargeError)
    assert "host memory" in str(answers[-1]) or "KV memory" in str(answers[-1])
    assert not driver.memory._known and driver.memory.num_inspection_failures == 0
    driver.close()


def test_slots_count_the_weights(tiny_table: ModuleTable, write_adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", rank=3)
    storage = SlotStorage(SlotLayout(tiny_table, frozenset(), num_slots=2, slot_bytes=1, element_bytes=2), 64)
    tensors = load_file(folder / "adapter_model.safetensors")
    summary = storage.summarise(folder, max_rank=8)
    assert (summary.rank, summary.num_blocks) == (3, 1)
    assert summary.size_bytes == sum(tensor.numel() * 2 for tensor in tensors.values())


@pytest.fixture
def not_finite(demo: DemoPaths, tmp_path: Path) -> Path:
    """Its headers are those of any adapter."""
    folder = Path(shutil.copytree(demo.adapters / demo.adapter_names()[0], tmp_path / "diverged"))
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.inf
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_that_fits_is_counted_and_nothing_of_it_is_kept(engine: PagedEngine, demo: DemoPaths) -> None:
    folder = Path(demo.adapters / demo.adapter_names()[4])
    before = engine.memory.cache.stats()
    assert inspect(engine, folder).code == inspect(engine, folder, whole=False).code == ""
    after = engine.memory.cache.stats()
    assert (after.fetches, after.loads, after.host_bytes_held) == (before.fetches, before.loads, before.host_bytes_held)
    found = inspect(engine, folder)
    engine.memory.evict_idle()
    engine.finish([engine.add(PROMPT, engine.adapter(folder), 1)])
    assert engine.memory.cache.stats().blocks_held == found.num_blocks > 0
    assert engine.memory.cache.stats().host_bytes_held >= found.size_bytes > 0


def test_only_a_trial_sees_the_weights(engine: PagedEngine, not_finite: Path) -> None:
    assert inspect(engine, not_finite, whole=False).code == ""
    found = inspect(engine, not_finite)
    assert found.code == AdapterInvalidError.code
    assert "'diverged'" in found.reason and "not all finite" in found.reason


def test_all_who_ask_meanwhile_get_the_answer_and_requests_are_served(
    engine: PagedEngine, demo: DemoPaths, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(demo.adapters / demo.adapter_names()[3], tmp_path / "asked for"))
    answers: list[Inspection] = []
    for whole in (True, False, True):
        engine.memory.inspect(folder.name, str(folder), whole, answers.append)
    request = engine.add(PROMPT, engine.adapter(folder), 4)
    engine.finish([request])
    engine.run(lambda: len(answers) == 3)
    assert len(set(answers)) == 1 and not answers[0].code


@pytest.mark.parametrize(
    ("harm", "error", "says"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), AdapterLoadError, "missing"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"?" * 99), AdapterInvalidError, "whole"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), AdapterInvalidError, "LORA"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(
    engine: PagedEngine,
    demo: DemoPaths,
    tmp_path: Path,
    harm: Callable[[Path], None],
    error: type[AdapterError],
    says: str,
) -> None:
    folder = Path(shutil.copytree(demo.adapters / demo.adapter_names()[2], tmp_path / "harmed"))
    harm(folder)
    known, numbers = dict(engine.memory._known), len(engine.memory._numbers)
    for whole in (True, False):
        found = inspect(engine, folder, whole)
        refusal = engine_error(found.code, found.reason)
        assert type(refusal) is error and says in str(refusal)
    assert engine.memory._known == known and len(engine.memory._numbers) == numbers
    [outcome] = engine.finish([engine.add(PROMPT, engine.adapter(folder, f"asked anyway, {says}"), 1)])
    assert outcome.finish_reason == "error" and says in outcome.stop_reason
    assert engine.memory._known == known and len(engine.memory._numbers) == numbers


def test_a_share_of_all_blocks_leaves_one_for_the_request() -> None:
    assert PagedSettings(adapter_memory_share=1.0).cache_config(10).max_blocks == 8  # and one is vLLM's null block
    assert PagedSettings(adapter_memory_share=0.5).cache_config(10).max_blocks == 5


def test_a_read_that_fails_because_of_the_moment_may_be_tried_again(
    engine: PagedEngine, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(demo.adapters / demo.adapter_names()[1])

    def no_memory(*_: object) -> None:
        raise MemoryError("no memory for this")

    with monkeypatch.context() as patched:
        patched.setattr(host, "read_pages", no_memory)
        found = inspect(engine, folder)
    assert found.code == AdapterLoadError.code and "no memory for this" in found.reason
    assert inspect(engine, folder).code == ""
