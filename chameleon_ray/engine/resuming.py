"""Requests that another engine began: vLLM's output state as it was there, and the rest from this engine.

``EngineCall`` sets a ``Recorder`` for its request. ``EstimatingLLM`` notes in it what the engine hands out. A request
with a beginning goes to the engine as a longer prompt with fewer tokens to make, while vLLM's own output state
(detokenizer, stop strings, counts) sees the client's prompt and all output tokens, one step after the other. So vLLM's
OpenAI layer makes the same events again, and the caller drops what its client has.
"""

import copy
from array import array
from collections.abc import Callable
from contextvars import ContextVar
from hashlib import blake2b

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import RequestState

from chameleon_ray.predictor.lengths import PREDICTED_TOKENS
from chameleon_ray.progress import OutputStep, Progress

_REASONS = {str(reason): reason for reason in FinishReason}
_COMPLETE = ("stop", "length", "repetition")
"""Ends that the model or the request's limits made."""


class ResumeError(ValueError):
    """The request is not the one that was begun elsewhere, or cannot be gone on with."""


class Recorder:
    """What the engine makes of one HTTP request, and what another engine had made of it before."""

    def __init__(self, earlier: Progress) -> None:
        self.earlier = earlier
        self.replay: list[RequestOutput] = []
        self._obstacle = ""
        self._prompt_digest = b""
        self._steps: list[OutputStep] = []
        self._is_delta = False
        self._num_prompts = 0
        self._num_taken = 0
        self._live: Callable[[], list[int]] | None = None

    def begin(self, params: SamplingParams) -> None:
        """The request, or a further part of it, is on its way to the engine."""
        self._num_prompts += 1
        self._is_delta = params.output_kind == RequestOutputKind.DELTA
        self._obstacle = "several prompts" if self._num_prompts > 1 else obstacle_to_resuming(params)

    @property
    def is_resumable(self) -> bool:
        """Whether another engine could go on with the request."""
        return not self._obstacle

    def watch(self, request: EngineCoreRequest, live: Callable[[], list[int]]) -> None:
        """The engine has taken the request. live: its output tokens so far, none once it has ended.

        Raises ResumeError when it is not the request that was begun elsewhere.
        """
        if request.prompt_token_ids is None or request.mm_features:
            self._obstacle = "a prompt that is not text"
        else:
            self._prompt_digest = blake2b(array("q", request.prompt_token_ids).tobytes(), digest_size=16).digest()
        if self.earlier.steps and (self._obstacle or self._prompt_digest != self.earlier.prompt_digest):
            raise ResumeError(f"cannot go on with what another engine began: {self._obstacle or 'another prompt'}")
        self._live, self._num_taken = live, len(self.earlier.token_ids)

    def record(self, output: RequestOutput) -> None:
        """What the engine has handed out."""
        if not self._is_delta or self._obstacle or self.earlier.has_ended:
            return
        (part,) = output.outputs
        if part.finish_reason is None or part.finish_reason in _COMPLETE:
            self._steps.append(OutputStep(tuple(part.token_ids), part.finish_reason, part.stop_reason))

    def take(self) -> Progress:
        """What is new since this was last called."""
        if not self._is_delta and self._live is not None and (tokens := self._live()[self._num_taken :]):
            self._num_taken += len(tokens)
            self._steps.append(OutputStep(tuple(tokens)))
        steps, self._steps = tuple(self._steps), []
        digest, self._prompt_digest = self._prompt_digest, b""
        return Progress(digest, () if self._obstacle else steps, self._obstacle)

    def take_replay(self) -> list[RequestOutput]:
        """The outputs of before, once."""
        replay, self.replay = self.replay, []
        return replay


recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)
"""Of the request at hand; None where nobody could go on with it."""


def obstacle_to_resuming(params: SamplingParams) -> str:
    """Why a request with these parameters cannot go on in another engine; empty when it can.

    There, its output so far counts as prompt: whatever looks at output tokens alone, or needs more than their ids,
    would not be the same.
    """
    obstacles = {
        "several choices": params.n > 1,
        "log-probabilities": params.logprobs is not None or params.prompt_logprobs is not None,
        "structured output": params.structured_outputs is not None,
        "presence or frequency penalty": bool(params.presence_penalty or params.frequency_penalty),
        "bad words": bool(params.bad_words),
        "a budget of thinking tokens": params.thinking_token_budget is not None,
        "repetition detection": params.repetition_detection is not None,
    }
    return next((obstacle for obstacle, applies in obstacles.items() if applies), "")


def replayed(state: RequestState, steps: tuple[OutputStep, ...]) -> list[RequestOutput]:
    """The outputs of ``steps``, made again from a new request's output state, which then is as after them."""
    assert state.detokenizer is not None
    outputs = []
    for step in steps:
        reason = None if step.finish_reason is None else _REASONS[step.finish_reason]
        token_ids = list(step.token_ids)
        state.detokenizer.update(token_ids, reason == FinishReason.STOP and not isinstance(step.stop_reason, str))
        output = state.make_request_output(token_ids, None, reason, step.stop_reason)
        if output is not None:
            assert isinstance(output, RequestOutput)
            outputs.append(output)
    return outputs


def continued(request: EngineCoreRequest, token_ids: list[int]) -> EngineCoreRequest:
    """The request for what is left of it after these output tokens. Raises ResumeError when nothing is."""
    assert request.prompt_token_ids is not None and request.sampling_params is not None
    num_tokens = len(token_ids)
    params = request.sampling_params.clone()
    if params.max_tokens is not None:
        params.max_tokens -= num_tokens
        if params.max_tokens < 1:
            raise ResumeError("all tokens of the request have been made")
    params.min_tokens = max(0, params.min_tokens - num_tokens)
    if params.extra_args and PREDICTED_TOKENS in params.extra_args:
        predicted = max(1, params.extra_args[PREDICTED_TOKENS] - num_tokens)
        params.extra_args = {**params.extra_args, PREDICTED_TOKENS: predicted}
    rest = copy.copy(request)
    rest.prompt_token_ids = [*request.prompt_token_ids, *token_ids]
    rest.sampling_params = params
    return rest
