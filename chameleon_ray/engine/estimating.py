"""vLLM's asynchronous engine, with output lengths predicted before requests go to the scheduler and refusals explained.

All of vLLM's OpenAI endpoints go through ``generate``, so this one seam serves chat and completions, streamed or not.
"""

import copy
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from chameleon_ray.adapters.identity import AdapterId
from chameleon_ray.engine.refusals import raise_refused
from chameleon_ray.engine.resuming import continued, recorder, replayed
from chameleon_ray.predictor.encoder import CLIP_CHARACTERS, clip_prompt
from chameleon_ray.predictor.estimator import EndedOutput, LengthEstimator
from chameleon_ray.predictor.lengths import PREDICTED_TOKENS, LengthFeatures


class EstimatingLLM(AsyncLLM):
    """``AsyncLLM`` that asks ``estimator``, where it is given one, before each request and tells it of each end."""

    estimator: LengthEstimator | None = None

    def shutdown(self, timeout: float | None = None) -> None:
        """See ``AsyncLLM.shutdown``; what is queued for the request log is written."""
        super().shutdown(timeout)
        if self.estimator is not None:
            self.estimator.close()

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """See ``AsyncLLM.generate``. Raises RequestRefusedError where the scheduler ends the request with a reason."""
        params = _with_prediction(sampling_params, None)
        if (recording := recorder.get()) is not None:
            recording.begin(params)
        # Beam search asks for one token at a time: there is nothing to predict.
        if self.estimator is None or params.max_tokens == 1 or not _has_tokens(prompt):
            return self._or_refused(self._recorded(super().generate(prompt, params, request_id, **options)))
        return self._or_refused(self._generate(self.estimator, prompt, params, request_id, **options))

    async def _add_request(
        self,
        request: EngineCoreRequest,
        prompt: str | None,
        parent_req: ParentRequest | None,
        index: int,
        queue: RequestOutputCollector,
    ) -> None:
        """See ``AsyncLLM._add_request``. A request with a beginning goes to the engine for its rest only."""
        recording, states = recorder.get(), self.output_processor.request_states
        if recording is None or not recording.is_resumable:
            await super()._add_request(request, prompt, parent_req, index, queue)
            return

        def live() -> list[int]:
            state = states.get(request.request_id)
            return [] if state is None or state.detokenizer is None else state.detokenizer.output_token_ids

        recording.watch(request, live)
        if not recording.earlier.steps:
            await super()._add_request(request, prompt, parent_req, index, queue)
            return
        rest = None if recording.earlier.has_ended else continued(request, recording.earlier.token_ids)
        self.check_admission(request_id=request.request_id)
        self.output_processor.add_request(request, prompt, parent_req, index, queue)
        state = states[request.request_id]
        recording.replay = replayed(state, recording.earlier.steps)
        if rest is None:
            self.output_processor._finish_request(state)
            queue.put(recording.replay.pop())
        else:
            await self.engine_core.add_request_async(rest)

    @staticmethod
    async def _recorded(outputs: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[RequestOutput, None]:
        """The outputs, those of another engine first, noted by the request's recorder."""
        recording = recorder.get()
        async with aclosing(outputs):
            async for output in outputs:
                if recording is not None:
                    for earlier in recording.take_replay():
                        yield earlier
                    recording.record(output)
                yield output

    @staticmethod
    async def _or_refused(outputs: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[RequestOutput, None]:
        async with aclosing(outputs):
            async for output in outputs:
                raise_refused(output)
                yield output

    async def _generate(
        self,
        estimator: LengthEstimator,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        lora_request: LoRARequest | None = None,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        features = self._features(prompt, params, lora_request)
        predicted = await estimator.estimate(features)
        outputs = self._recorded(
            super().generate(
                prompt, _with_prediction(params, predicted), request_id, lora_request=lora_request, **options
            )
        )
        progress = OutputProgress(params.n, params.output_kind)
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    progress.record(output)
                    yield output
        finally:
            adapter = None if lora_request is None else lora_request.lora_name
            for ended in progress.ends():
                estimator.observe(features, adapter, ended)

    def _features(self, prompt: dict[str, Any], params: SamplingParams, lora: LoRARequest | None) -> LengthFeatures:
        token_ids = prompt["prompt_token_ids"]
        text = prompt.get("prompt")
        return LengthFeatures(
            adapter_digest=None if lora is None else _digest(lora.lora_name),
            num_prompt_tokens=len(token_ids),
            max_tokens=params.max_tokens,
            prompt_text=clip_prompt(text) if text is not None else self._decoded(token_ids),
        )

    def _decoded(self, token_ids: list[int]) -> str | None:
        """The text of a prompt that came as tokens, of a long one its two ends; None without a tokenizer."""
        tokenizer = self.renderer.tokenizer
        if tokenizer is None:
            return None
        if len(token_ids) > 2 * CLIP_CHARACTERS:
            token_ids = token_ids[:CLIP_CHARACTERS] + token_ids[-CLIP_CHARACTERS:]
        return clip_prompt(tokenizer.decode(token_ids))


class OutputProgress:
    """How many tokens each of a request's ``n`` outputs has, whichever way vLLM hands them out."""

    def __init__(self, num_outputs: int, kind: RequestOutputKind) -> None:
        self._is_delta = kind == RequestOutputKind.DELTA
        self._num_tokens = [0] * num_outputs
        self._reasons: list[str | None] = [None] * num_outputs

    def record(self, output: RequestOutput) -> None:
        """What ``generate`` handed out."""
        for part in output.outputs:
            before = self._num_tokens[part.index] if self._is_delta else 0
            self._num_tokens[part.index] = before + len(part.token_ids)
            self._reasons[part.index] = part.finish_reason

    def ends(self) -> list[EndedOutput]:
        """All outputs, now that nothing more comes; those without an end of their own were aborted."""
        return [
            EndedOutput(num_tokens, reason or "abort")
            for num_tokens, reason in zip(self._num_tokens, self._reasons, strict=True)
        ]


def _digest(lora_name: str) -> str:
    _, adapter_id = AdapterId.parse(lora_name)
    return lora_name if adapter_id is None else adapter_id.digest


def _has_tokens(prompt: Any) -> bool:
    return isinstance(prompt, dict) and "prompt_token_ids" in prompt


def _with_prediction(params: SamplingParams, num_tokens: int | None) -> SamplingParams:
    """The same parameters with this prediction, or with none: what a client wrote there itself must not count.

    A copy where anything changes: vLLM shares parameters and ``extra_args`` between the parts of one HTTP request.
    """
    given = params.extra_args or {}
    if num_tokens is None and PREDICTED_TOKENS not in given:
        return params
    kept = {name: value for name, value in given.items() if name != PREDICTED_TOKENS}
    changed = copy.copy(params)
    changed.extra_args = (kept if num_tokens is None else {**kept, PREDICTED_TOKENS: num_tokens}) or None
    return changed
