"""A vLLM engine with adapters in KV memory, in this process: driven step by step, every step timed."""

import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from vllm import RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.engine.llm_engine import LLMEngine

from chameleon_ray.adapters.identity import AdapterId
from chameleon_ray.calibrate.measured import CalibrationError
from chameleon_ray.engine.paged.memory import AdapterMemory
from chameleon_ray.sim.fit import Composition

_FIRST_NUMBER = 100_000
"""LoRA numbers from here on, so that those of somebody who drives the engine as well stay free."""


class WallClock:
    """Seconds as they pass."""

    def __call__(self) -> float:
        return time.perf_counter()

    def wait(self, seconds: float) -> None:
        """Nothing to do for so long."""
        time.sleep(max(0.0, seconds))


class CpuClock:
    """CPU seconds of this process, and the time that it chose to wait: what a machine of its own would show, as far as
    one thread computes. Other processes cannot stop this clock, only slow it through shared caches."""

    def __init__(self) -> None:
        self._waited_s = 0.0

    def __call__(self) -> float:
        return time.process_time() + self._waited_s

    def wait(self, seconds: float) -> None:
        """Nothing to do for so long: it has passed at once."""
        self._waited_s += max(0.0, seconds)


CLOCKS: dict[str, type[WallClock] | type[CpuClock]] = {"wall": WallClock, "cpu": CpuClock}


@dataclass(frozen=True, slots=True)
class LiveAdapter:
    """An adapter that the engine knows. rank, size_bytes: of its weights in memory, on one tensor-parallel rank."""

    lora: LoRARequest
    rank: int
    size_bytes: int


@dataclass(slots=True)
class Request:
    """One request and when (s) its tokens came; end_s: None until it ended."""

    adapter: LiveAdapter | None
    token_times_s: list[float] = field(default_factory=list)
    end_s: float | None = None


def in_process(llm: LLMEngine) -> EngineCore:
    """The core of an engine in this process. Raises ValueError for one in a process of its own."""
    if not isinstance(llm.engine_core, InprocClient):
        raise ValueError("the engine's core is in another process: set VLLM_ENABLE_V1_MULTIPROCESSING=0")
    return llm.engine_core.engine_core


class LiveEngine:
    """``step`` does one engine step and notes how long it took."""

    def __init__(self, llm: LLMEngine, seed: int = 0, clock: WallClock | CpuClock | None = None) -> None:
        """llm: in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), with ``paged_arguments``."""
        self.llm = llm
        self.steps: list[tuple[Composition, float]] = []
        self._core = in_process(llm)
        self._clock = clock or WallClock()
        self._rng = Random(seed)
        self._vocabulary = self.config.model_config.get_vocab_size()
        self._requests: dict[str, Request] = {}
        self._ids = count()
        self._numbers = count(_FIRST_NUMBER)
        self._scheduled: list[tuple[float, Composition]] = []
        self._computed: list[tuple[float, Composition]] = []
        self._last_end_s = 0.0
        self._schedule, self._update = self.scheduler.schedule, self.scheduler.update_from_output
        self.scheduler.schedule, self.scheduler.update_from_output = self._note_schedule, self._note_output

    def detach(self) -> None:
        """Leave the engine as it was."""
        self.scheduler.schedule, self.scheduler.update_from_output = self._schedule, self._update

    @property
    def config(self) -> Any:
        """vLLM's configuration."""
        return self.llm.vllm_config

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler, ours."""
        return self._core.scheduler

    @property
    def memory(self) -> AdapterMemory:
        """The engine's adapter memory."""
        memory: AdapterMemory = self.scheduler.connector.memory
        return memory

    def now_s(self) -> float:
        """Seconds on the clock that everything here is timed by."""
        return self._clock()

    def wait(self, seconds: float) -> None:
        """Nothing happens for so long."""
        self._clock.wait(seconds)

    def adapter(self, folder: Path) -> LiveAdapter:
        """An adapter with the weights in ``folder``, as content that the engine has not seen: on disk only.

        Raises CalibrationError.
        """
        try:
            summary = self.memory.storage.summarise(folder, self.memory._settings.max_rank)
        except (ValueError, OSError) as error:
            raise CalibrationError(f"the adapter in {folder} cannot be used: {error}") from None
        number = next(self._numbers)
        lora = LoRARequest(AdapterId(f"{number:064x}").lora_name(folder.name), number, str(folder))
        return LiveAdapter(lora, summary.rank, summary.size_bytes)

    def add(self, prompt_tokens: int, output_tokens: int, adapter: LiveAdapter | None = None) -> Request:
        """Queue a request of random tokens."""
        request_id, request = f"calibrate{next(self._ids)}", Request(adapter)
        self._requests[request_id] = request
        prompt = TokensPrompt(prompt_token_ids=[self._rng.randrange(self._vocabulary) for _ in range(prompt_tokens)])
        params = SamplingParams(
            temperature=0.0,
            max_tokens=output_tokens,
            ignore_eos=True,
            detokenize=False,  # A server does that in another process.
            output_kind=RequestOutputKind.DELTA,
        )
        self.llm.add_request(request_id, prompt, params, lora_request=adapter.lora if adapter else None)
        return request

    def step(self) -> None:
        """One engine step."""
        if not self._scheduled:
            self._last_end_s = 0.0
        outputs = self.llm.step()
        now_s = self._clock()
        for output in outputs:
            assert isinstance(output, RequestOutput)  # nothing is pooled here
            request = self._requests[output.request_id]
            request.token_times_s += [now_s] * len(output.outputs[0].token_ids)
            if output.finished:
                request.end_s = now_s
                del self._requests[output.request_id]
        for began_s, composition in self._computed:
            if composition.tokens:
                self.steps.append((composition, now_s - max(began_s, self._last_end_s)))
        if self._computed:
            self._last_end_s = now_s
        self._computed.clear()

    def run(self) -> None:
        """Step until nobody is left."""
        while self.llm.has_unfinished_requests():
            self.step()

    def _note_schedule(self, *args: Any, **kwargs: Any) -> Any:
        began_s = self._clock()
        output = self._schedule(*args, **kwargs)
        self._scheduled.append((began_s, self._composition(output.num_scheduled_tokens)))
        return output

    def _note_output(self, *args: Any, **kwargs: Any) -> Any:
        self._computed.append(self._scheduled.pop(0))
        return self._update(*args, **kwargs)

    def _composition(self, scheduled: dict[str, int]) -> Composition:
        context, ranks, attended = 0, 0, 0.0
        adapters: dict[int, int] = {}
        for request_id, tokens in scheduled.items():
            computed = self.scheduler.requests[request_id].num_computed_tokens - tokens
            context += computed
            attended += tokens * (computed + (tokens + 1) / 2)
            # vLLM makes its own id of the one that it is given.
            request = self._requests.get(request_id) or self._requests[request_id.rpartition("-")[0]]
            if request.adapter is not None:
                ranks += tokens * request.adapter.rank
                adapters[request.adapter.lora.lora_int_id] = request.adapter.size_bytes
        return Composition(
            sum(scheduled.values()), context, ranks, sum(adapters.values()), len(scheduled), round(attended, 1)
        )
