"""LoRA layers without slots, without an engine: what is traced of them, and which launches a step asks for."""

from types import SimpleNamespace

import pytest
import torch
from chameleon_kernels import BatchSpec, LoraBatch
from chameleon_kernels.testing import make_batch, make_layer

from chameleon_ray.engine.paged import lora
from chameleon_ray.engine.paged.lora import PagedLinear, PagedWorkerLoRAManager
from chameleon_ray.engine.paged.worker import PagedWorker, PlatformWorker


def _add(linear: PagedLinear, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = y + 1
    linear.add_lora_linear(y, x, (), (), 1.0, ())
    return y


def test_layers_of_one_shape_are_one_graph_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the layer's name in the graph as a constant, each of a model's layers would be compiled for itself."""
    layer = make_layer([8])
    batch = make_batch(layer, [0, -1, 0], max_tokens=8)
    linears = {name: PagedLinear(name, batch) for name in ("model.layers.0.o_proj", "model.layers.1.o_proj")}
    monkeypatch.setattr(lora, "_linears", linears)
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: object) -> object:
        graphs.append(graph.code)
        return graph

    for linear in linears.values():
        linear.part, linear.kv = layer.parts["o_proj"], layer.kv
        x, y = torch.randn(3, 256), torch.randn(3, 256)
        torch._dynamo.reset()
        compiled = torch.compile(_add, backend=backend, fullgraph=True)(linear, y, x)
        torch.testing.assert_close(compiled, _add(linear, y, x))
        assert not torch.equal(compiled[0], y[0] + 1)
    assert len(graphs) == 2 and graphs[0] == graphs[1]


def test_warm_up_steps_ask_for_the_launches_of_any_step_and_steps_without_adapters_for_none() -> None:
    batch = LoraBatch(BatchSpec(max_tokens=8, max_adapters=2), "cpu")
    batch.update_for_capture(8)
    assert batch.for_capture and batch.num_tokens == 8 and batch.counts.tokens == 0
    batch.update([-1] * 4, ())
    assert not batch.for_capture and batch.num_segments == 0


@pytest.mark.parametrize(("tags", "restores"), [(None, True), (["weights"], True), (["kv_cache"], False)])
def test_a_worker_that_wakes_with_lost_memory_describes_the_next_step_anew(
    monkeypatch: pytest.MonkeyPatch, tags: list[str] | None, restores: bool
) -> None:
    """What vLLM gives back after a sleep of level 2 is the model's own buffers; the kernels' locks must be zeros."""
    layer = make_layer([8])
    manager = object.__new__(PagedWorkerLoRAManager)
    manager._batch, manager._seen = make_batch(layer, [0, -1, 0]), ((1, 0, 1), 7)
    manager._batch.meta.fill_(1 << 40)
    worker = object.__new__(PagedWorker)
    worker.model_runner = SimpleNamespace(lora_manager=manager)
    monkeypatch.setattr(PlatformWorker, "wake_up", lambda *_: None)
    worker.wake_up(tags)
    assert (manager._seen is None) == restores
    assert bool(manager._batch.meta.any()) != restores and (manager._batch.num_segments == 0) == restores
