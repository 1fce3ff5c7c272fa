"""Driving a real vLLM engine step by step, and what Hugging Face transformers answers with the adapter merged in."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import EngineArgs, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.engine.llm_engine import LLMEngine

from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.options import RESIDENCY_EXTENSION
from chameleon_ray.engine.paged.memory import AdapterMemory
from chameleon_ray.engine.paged.options import PagedSettings, paged_arguments

DEADLINE_S = 600.0
MIB = 1 << 20
SETTINGS = PagedSettings(
    adapter_memory_share=0.5, adapter_host_bytes=48 * MIB, max_rank=256, retry_after_s=0.2, readers=2
)
"""Small on purpose: neither the share of the 128 blocks nor the host memory holds the demo's 24 adapters (78 MB)."""


@dataclass
class Outcome:
    """What has become of a request so far."""

    tokens: tuple[int, ...] = ()
    finish_reason: str | None = None
    stop_reason: Any = None


class PagedEngine:
    """vLLM's engine in this process; nothing happens but in ``step``."""

    def __init__(self, model: Path, **arguments: Any) -> None:
        given = dict(
            model=str(model),
            dtype="float32",
            enable_lora=True,
            max_num_seqs=32,
            max_model_len=512,
            max_num_batched_tokens=1024,
            kv_cache_memory_bytes=64 * MIB,
            enforce_eager=True,
            disable_log_stats=False,
            worker_extension_cls=RESIDENCY_EXTENSION,
            **paged_arguments(SETTINGS),
        )
        self.llm = LLMEngine.from_engine_args(EngineArgs(**(given | arguments)))
        self.outcomes: dict[str, Outcome] = {}
        self._ids = count()
        self._numbers = count(1)
        self._adapters: dict[str, LoRARequest] = {}

    @property
    def scheduler(self) -> Any:
        return self.llm.engine_core.engine_core.scheduler

    @property
    def memory(self) -> AdapterMemory:
        return self.scheduler.connector.memory

    def adapter(self, folder: Path, name: str | None = None) -> LoRARequest:
        """A request's adapter; the same folder under the same name has one number, as in vLLM's server."""
        name = name or folder.name
        if name not in self._adapters:
            self._adapters[name] = LoRARequest(name, next(self._numbers), str(folder))
        return self._adapters[name]

    def add(
        self,
        prompt: str | list[int],
        adapter: LoRARequest | None = None,
        max_tokens: int = 8,
        priority: int = 0,
        **sampling: Any,
    ) -> str:
        """Queue a greedy request; returns its id."""
        request_id = f"r{next(self._ids)}"
        given = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, **{"ignore_eos": True, **sampling})
        self.llm.add_request(request_id, given, params, lora_request=adapter, priority=priority)
        self.outcomes[request_id] = Outcome()
        return request_id

    def step(self) -> None:
        """One engine step, after which all books must balance."""
        for output in self.llm.step():
            completion = output.outputs[0]
            self.outcomes[output.request_id] = Outcome(
                tuple(completion.token_ids), completion.finish_reason, completion.stop_reason
            )
        self.memory.check()
        running = {request.request_id for request in self.scheduler.running}
        assert self.memory.running == running
        waiting = {request.request_id for request in self.scheduler.waiting}
        assert running | waiting == set(self.scheduler.requests) and not running & waiting
        assert self.memory.policy.num_waiting <= len(waiting)  # The policy does not know those being inspected yet.

    def run(self, until: Callable[[], bool]) -> None:
        """Step until the condition holds, or fail."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not until():
            assert time.monotonic() < deadline_s, f"not reached within {DEADLINE_S} s: {self.memory.cache.stats()}"
            self.step()

    def finish(self, request_ids: Sequence[str]) -> list[Outcome]:
        """Step until these requests have ended."""
        self.run(lambda: all(self.outcomes[request_id].finish_reason for request_id in request_ids))
        return [self.outcomes[request_id] for request_id in request_ids]

    def text(self, outcome: Outcome) -> str:
        """What its tokens say."""
        return str(self.llm.tokenizer.decode(outcome.tokens, skip_special_tokens=True))

    def abort(self, request_id: str) -> None:
        self.llm.abort_request([request_id])

    def abort_all(self) -> None:
        self.llm.abort_request([request_id for request_id, o in self.outcomes.items() if o.finish_reason is None])

    def settle(self) -> None:
        """Step until nothing is under way; then only idle adapters hold blocks."""
        self.outcomes.clear()
        self.run(lambda: not self.scheduler.has_requests())
        stats = self.memory.cache.stats()
        assert (stats.requests_running, stats.requests_queued, stats.loads_in_flight) == (0, 0, 0)
        lent = stats.blocks_held if self.memory.policy.config.shares_kv else 0
        assert self.free_blocks() + lent == self.num_blocks

    @property
    def num_blocks(self) -> int:
        """Blocks that can be lent (one is vLLM's null block)."""
        return self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1

    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def close(self) -> None:
        self.llm.engine_core.shutdown()


class Reference:
    """Greedy answers of transformers with one adapter merged into the weights."""

    def __init__(self, demo: DemoPaths) -> None:
        self._demo = demo
        self._tokenizer = AutoTokenizer.from_pretrained(demo.model)
        self.tokens = cache(self._tokens)

    def _tokens(self, prompt: str, adapter: str | None, max_tokens: int) -> tuple[int, ...]:
        ids = torch.tensor([self._tokenizer(prompt)["input_ids"]])
        model = self._model(adapter)
        with torch.inference_mode():
            for _ in range(max_tokens):
                best = model(ids).logits[0, -1].argmax()
                ids = torch.cat([ids, best.view(1, 1)], dim=1)
        return tuple(ids[0, -max_tokens:].tolist())

    @cache  # noqa: B019 (one object per session)
    def _model(self, adapter: str | None) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self._demo.model, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, self._demo.adapters / adapter).merge_and_unload()
        return model.eval()
