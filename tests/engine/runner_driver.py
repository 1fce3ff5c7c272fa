"""A process of its own for what has to be arranged before vLLM is imported:

    runner_driver.py v2|compiled MODEL ADAPTERS OUT NAME...

Writes JSON: the base model's and each adapter's answer to ``PROMPTS[i % 2]``, and what was counted meanwhile.
"""

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
WHAT = sys.argv[1] if __name__ == "__main__" else ""
if WHAT == "v2":
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
if WHAT == "compiled":
    os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_DISABLE_COMPILE_CACHE": "1", "VLLM_USE_AOT_COMPILE": "0"}

PROMPTS = ("Hello, my name is", "What is the capital of France?")
NUM_TOKENS = 4
_GRAPHS: list[Any] = []


def triton_on_a_cpu() -> None:
    """vLLM's V2 runner has kernels of its own and asks Triton for a CPU backend; the interpreter needs none."""
    import triton.backends

    version = importlib.metadata.version
    # vllm-cpu's distribution has another name, and V2 asks for the version of "vllm".
    importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    triton.backends.backends["cpu"] = type("Backend", (), {"driver": driver, "compiler": None})


def count_triton_calls() -> list[int]:
    """From now on LoRA is computed by our Triton kernels, whose calls are counted: the tokens of each."""
    from chameleon_kernels import triton_ops

    from chameleon_ray.engine.paged import lora

    calls: list[int] = []

    def apply(y: Any, x: Any, kv: Any, batch: Any, part: Any) -> None:
        if batch.num_segments:
            calls.append(x.shape[0])
            triton_ops.paged_lora(y, x, kv, batch.meta, batch.spec, part, batch.counts)

    lora.apply_lora = apply
    return calls


def allow_compilation_with_lora() -> None:
    """vLLM turns compilation off on CPUs where there is LoRA, whose kernels there it does not trace; ours it can."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def checked(cls: Any, vllm_config: Any) -> None:
        vllm_config.lora_config, hidden = None, vllm_config.lora_config
        try:
            check(cls, vllm_config)
        finally:
            vllm_config.lora_config = hidden

    CpuPlatform.check_and_update_config = classmethod(checked)


def keep_graph(graph: Any, inputs: Any) -> Any:
    """A compiler that compiles nothing."""
    _GRAPHS.append(graph)
    return graph


def counted(graph: Any) -> dict[str, int]:
    """Of one traced graph: LoRA calls, those whose layer's name is an input, pieces between attentions, and how many
    different ones a compiler sees of them."""
    from vllm.compilation.backends import split_graph
    from vllm.config import CompilationConfig

    calls = [node for node in graph.graph.nodes if "chameleon_paged_lora" in str(node.target)]
    named = [node for node in calls if getattr([*node.args, *node.kwargs.values()][2], "op", "") == "placeholder"]
    _, pieces = split_graph(graph, CompilationConfig._attention_ops)
    compiled = [piece.graph for piece in pieces if not piece.is_splitting_graph]
    with_lora = [one for one in compiled if any("chameleon_paged_lora" in str(n.target) for n in one.graph.nodes)]
    return {
        "lora_calls": len(calls),
        "names_are_inputs": len(named),
        "pieces": len(with_lora),
        "different_pieces": len({shape_of(piece) for piece in with_lora}),
    }


def shape_of(piece: Any) -> tuple[Any, ...]:
    """A piece without the names of its nodes: what is called, on which earlier ones, with which shapes."""
    number = {node: i for i, node in enumerate(piece.graph.nodes)}

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(plain(one) for one in value)
        return number.get(value, repr(value)) if hasattr(value, "op") else repr(value)

    return tuple(
        (
            node.op,
            "" if node.op in ("placeholder", "output") else str(node.target),
            plain(node.args),
            tuple(sorted((key, plain(value)) for key, value in node.kwargs.items())),
            str(getattr(node.meta.get("example_value"), "shape", "")),
        )
        for node in piece.graph.nodes
    )


def main(what: str, model: Path, adapters: Path, out: Path, names: list[str]) -> None:
    calls: list[int] = []
    arguments: dict[str, Any] = {}
    if what == "v2":
        triton_on_a_cpu()
        calls = count_triton_calls()
    else:
        allow_compilation_with_lora()
        compilation = {"mode": "DYNAMO_TRACE_ONCE", "backend": "runner_driver.keep_graph"}
        arguments = {"enforce_eager": False, "compilation_config": compilation}
    from engine_harness import PagedEngine

    engine = PagedEngine(model, **arguments)
    worker = engine.llm.engine_core.engine_core.model_executor.driver_worker.worker
    requests = [
        engine.add(PROMPTS[i % 2], name and engine.adapter(adapters / name), NUM_TOKENS)
        for i, name in enumerate([None, *names])
    ]
    answers = [outcome.tokens for outcome in engine.finish(requests)]
    import runner_driver  # The module of that name, whose backend vLLM has called.

    graphs = runner_driver._GRAPHS
    found = {
        "answers": answers,
        "runner": type(worker.model_runner).__module__,
        "kernel_calls": len(calls),
        "graphs": [counted(graph) for graph in graphs],
    }
    out.write_text(json.dumps(found))
    engine.close()


if __name__ == "__main__":
    main(WHAT, *map(Path, sys.argv[2:5]), sys.argv[5:])
