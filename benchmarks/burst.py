"""KV memory over time while a burst of long prompts meets a cache full of idle adapters.

One engine in this process, driven step by step: every adapter of the demo is used once, then base-model requests ask
for more KV cache than there is beside one request whose adapter stays in use, then the adapters are used again. The
same burst meets a pool without idle adapters before, so that the preemptions of the two can be compared; and once
before that, because the scheduler learns from it how long such answers are, and then admits fewer at a time. Steps that
gave tokens are counted, not seconds: the machine's speed does not matter.
"""

import argparse
import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from benchmarks.engine import MIB, engine_environment
from benchmarks.load_plot import load_pyplot
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.paged.options import PagedSettings, paged_arguments
from chameleon_ray.random_demo import make_random_demo

KV_BYTES = 64 * MIB
NUM_BURST, BURST_PROMPT_TOKENS, BURST_OUTPUT_TOKENS = 32, 300, 200
"""32 x 500 tokens of KV cache: all that the pool holds, and some of it is the adapter's that is in use."""
_LEARNING = "burst to learn from"
_PHASES = ("burst without idle adapters", "adapters are used", "burst", "adapters are used again")


@dataclass(frozen=True, slots=True)
class Sample:
    """Blocks after an engine step. idle, in_use: of adapters, by whether a running request needs them. kv: of
    requests. The rest of the pool is free or holds cached prefixes."""

    phase: str
    idle: int
    in_use: int
    kv: int


class _Engine:
    """vLLM's engine in this process, watched after every step."""

    def __init__(self, demo: DemoPaths) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from chameleon_ray.calibrate.live import in_process

        self._llm = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(demo.model),
                dtype="float32",
                enable_lora=True,
                max_num_seqs=NUM_BURST + 1,
                max_model_len=512,
                kv_cache_memory_bytes=KV_BYTES,
                enforce_eager=True,
                **paged_arguments(PagedSettings()),
            )
        )
        self._scheduler = cast(Any, in_process(self._llm).scheduler)  # ours, one of whose methods is replaced below
        self._memory = self._scheduler.connector.memory
        self._pool = self._scheduler.kv_cache_manager.block_pool
        self.num_blocks: int = self._pool.num_gpu_blocks - 1  # One is vLLM's null block.
        self.samples: list[Sample] = []
        self.num_preemptions = 0
        self._num_requests = 0
        preempt = self._scheduler._preempt_request

        def counting(*args: Any, **kwargs: Any) -> None:
            self.num_preemptions += 1
            preempt(*args, **kwargs)

        self._scheduler._preempt_request = counting

    def add(self, prompt: list[int], max_tokens: int, adapter: Path | None = None) -> str:
        """Queue a request; its id."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        self._num_requests += 1
        request_id = f"r{self._num_requests}"
        lora = None if adapter is None else LoRARequest(adapter.name, 1 + int(adapter.name[-2:]), str(adapter))
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self._llm.add_request(request_id, {"prompt_token_ids": prompt}, params, lora_request=lora)
        return request_id

    def run(self, phase: str, until: Callable[[set[str]], bool]) -> None:
        """Step until the condition holds of the ids of ended requests; sample each step that gave tokens."""
        ended: set[str] = set()
        while not until(ended):
            if not (outputs := self._llm.step()):
                continue
            ended |= {output.request_id for output in outputs if output.finished}
            held, in_use = self._memory.cache.stats().blocks_held, self._memory.policy.room.pinned_blocks
            kv = self.num_blocks - self._pool.get_num_free_blocks() - held
            self.samples.append(Sample(phase, held - in_use, in_use, kv))

    def has_started(self, adapter: Path) -> bool:
        """Whether a request with this adapter runs."""
        return any(one.lora_request and adapter.name in one.lora_request.name for one in self._scheduler.running)

    def evict_idle(self) -> None:
        """Leave no idle adapter in KV memory."""
        self._memory.evict_idle()

    def close(self) -> None:
        """Stop the engine."""
        self._llm.engine_core.shutdown()


def run(json_path: Path | None = None, plot_path: Path | None = None) -> int:
    """Measure, print, draw; the exit status."""
    os.environ |= engine_environment(os.cpu_count() or 1) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if plot_path is not None:
        load_pyplot()  # Before minutes are spent: it may be missing.
    demo = make_random_demo()
    engine = _Engine(demo)
    try:
        preemptions = _phases(engine, sorted(demo.adapters.iterdir()))
    finally:
        engine.close()
    figures = _summary(engine.samples, engine.num_blocks, preemptions)
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):48}{value:>6}")
    if json_path is not None:
        content = {"figures": figures, "samples": [asdict(sample) for sample in engine.samples]}
        json_path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    if plot_path is not None:
        draw(plot_path, engine.samples, engine.num_blocks)
        print(f"drawn: {plot_path}")
    return 0


def _phases(engine: _Engine, adapters: list[Path]) -> dict[str, int]:
    """Run all phases; preemptions of each."""
    rng = random.Random(0)
    preemptions = {}
    for phase in tqdm((_LEARNING, *_PHASES), desc="phases", disable=None):
        before = engine.num_preemptions
        if "burst" in phase:
            if "without" in phase or phase == _LEARNING:
                engine.evict_idle()
            staying = engine.add(list(range(10, 40)), 400, adapters[0])
            engine.run(phase, lambda ended: engine.has_started(adapters[0]))
            burst = {
                engine.add([rng.randrange(10, 600) for _ in range(BURST_PROMPT_TOKENS)], BURST_OUTPUT_TOKENS)
                for _ in range(NUM_BURST)
            }
            engine.run(phase, (burst | {staying}).issubset)
        else:
            for adapter in adapters:
                request = {engine.add(list(range(10, 40)), 4, adapter)}
                engine.run(phase, request.issubset)
        preemptions[phase] = engine.num_preemptions - before
    return preemptions


def _summary(samples: list[Sample], num_blocks: int, preemptions: dict[str, int]) -> dict[str, int]:
    def adapters(phase: str) -> list[int]:
        return [sample.idle + sample.in_use for sample in samples if sample.phase == phase]

    return {
        "blocks_of_the_pool": num_blocks,
        "adapters'_blocks_before_the_burst": adapters(_PHASES[1])[-1],
        "fewest_in_the_burst": min(adapters(_PHASES[2])),
        "of_them_idle": min(sample.idle for sample in samples if sample.phase == _PHASES[2]),
        "adapters'_blocks_after_it": adapters(_PHASES[3])[-1],
        "preemptions_in_the_burst": preemptions[_PHASES[2]],
        "preemptions_in_it_without_idle_adapters": preemptions[_PHASES[0]],
        "preemptions_in_the_burst_to_learn_from": preemptions[_LEARNING],
    }


def draw(path: Path, samples: list[Sample], num_blocks: int) -> None:
    """Blocks over engine steps, stacked. Raises LoadError without matplotlib."""
    pyplot = load_pyplot()
    shown = [sample for sample in samples if sample.phase in _PHASES[1:]]
    figure, axis = pyplot.subplots(figsize=(10, 4.5))
    axis.stackplot(
        range(len(shown)),
        [sample.in_use for sample in shown],
        [sample.idle for sample in shown],
        [sample.kv for sample in shown],
        labels=["adapters in use", "idle adapters", "KV cache of requests"],
        colors=["#1b6ca8", "#8ec1e8", "#e6a15c"],
        step="post",
    )
    axis.axhline(num_blocks, color="grey", linestyle="--", linewidth=1)
    for phase in _PHASES[1:]:
        at = next(i for i, sample in enumerate(shown) if sample.phase == phase)
        axis.axvline(at, color="black", linewidth=0.6)
        axis.text(at, num_blocks * 1.03, f" {phase}", fontsize=9)
    axis.set(
        xlabel="engine step that gave tokens", ylabel="KV blocks", xlim=(0, len(shown)), ylim=(0, num_blocks * 1.12)
    )
    axis.legend(loc="upper left", bbox_to_anchor=(0, 0.92))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.burst", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it there (.png, .svg, .pdf)")
    given = parser.parse_args()
    run(given.json, given.plot)
