"""What runs around our LoRA layers on GPUs, as far as a CPU can show it: vLLM's V2 model runner with our kernels, the
whole model as one compiled graph. The tokens are the model's own, adapters merged.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runner_driver
from engine_harness import Reference

from chameleon_ray.demo import DemoPaths

NUM_TOKENS, PROMPTS = runner_driver.NUM_TOKENS, runner_driver.PROMPTS


@pytest.fixture(scope="module")
def adapters(demo: DemoPaths) -> list[str]:
    """One of each rank."""
    by_rank = {name.split("-")[1]: name for name in demo.adapter_names()}
    assert len(by_rank) > 3
    return list(by_rank.values())


@pytest.fixture(scope="module")
def expected(adapters: list[str], reference: Reference) -> list[tuple[int, ...]]:
    tokens = [reference.tokens(PROMPTS[i % 2], name, NUM_TOKENS) for i, name in enumerate([None, *adapters])]
    assert len(set(tokens)) >= len(adapters), "adapters must answer differently for these tests to say anything"
    return tokens


def _driven(what: str, demo: DemoPaths, adapters: list[str], folder: Path) -> dict[str, Any]:
    paths = [str(demo.model), str(demo.adapters), str(folder / "found.json")]
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), *sys.path])
    done = subprocess.run(
        [sys.executable, str(here / "runner_driver.py"), what, *paths, *adapters],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def test_v2_model_runner_with_our_triton_kernels(
    demo: DemoPaths, adapters: list[str], expected: list[tuple[int, ...]], tmp_path: Path
) -> None:
    """In Triton's interpreter, as vLLM's own kernels there."""
    found = _driven("v2", demo, adapters, tmp_path)
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert found["kernel_calls"] >= 4 * 4 * NUM_TOKENS, "of each of 4 layers' 4 parts, in each step"
    assert [tuple(answer) for answer in found["answers"]] == expected


def test_the_compiled_model_is_one_graph_in_which_layers_are_alike(
    demo: DemoPaths, adapters: list[str], expected: list[tuple[int, ...]], tmp_path: Path
) -> None:
    """A break in the graph would make several; a layer's name as a constant, a compilation for each layer."""
    found = _driven("compiled", demo, adapters, tmp_path)
    [graph] = found["graphs"]
    num_layers = 4
    assert graph["lora_calls"] == graph["names_are_inputs"] == 4 * num_layers
    # Cut at attention, as vLLM does: before the first, between any two, after the last.
    assert graph["pieces"] == num_layers + 1 and graph["different_pieces"] == 3
    assert [tuple(answer) for answer in found["answers"]] == expected
