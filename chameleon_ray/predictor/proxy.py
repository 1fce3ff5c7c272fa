"""The output length from the prompt's text (the paper's predictor: a BERT-style proxy model, about 80% accurate)."""

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from chameleon_ray.predictor.encoder import Encoder
from chameleon_ray.predictor.head import LengthHead
from chameleon_ray.predictor.lengths import HistoryPredictor, LengthFeatures, capped
from chameleon_ray.predictor.saved import Description, load_predictor

MAX_BATCH = 16
"""Most prompts in one forward pass; fewer where more could not be done within their time limits."""
MAX_WAITING = 256
"""Beyond, requests get the history's prediction at once."""


_SMOOTHING = 0.2
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request that wants a prediction. answer: None where there is no time for one. Times by the loop's clock."""

    features: LengthFeatures
    answer: "asyncio.Future[int | None]"
    deadline_s: float
    num_tokens: int


class ProxyPredictor:
    """A ``LengthPredictor`` that reads the prompt; requests without text get the history's prediction.

    ``predict`` runs the encoder in the caller's thread. Where that must not wait use ``predict_soon``.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: LengthHead,
        description: Description,
        max_model_len: int,
        num_threads: int = 0,
        s_per_token: float = 0.0,
    ) -> None:
        """num_threads: compute threads of ``predict_soon``; 0: as torch is set. s_per_token: first guess of its cost,
        which is measured from then on.
        """
        self.description = description
        self.history = HistoryPredictor(max_model_len)
        self.num_from_model = 0
        self.num_from_history = 0
        self._encoder = encoder
        self._head = head
        self._max_model_len = max_model_len
        setup = (lambda: torch.set_num_threads(num_threads)) if num_threads else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="length-predictor", initializer=setup)
        self._s_per_token = s_per_token
        self._waiting: deque[_Waiting] = deque()
        self._worker: asyncio.Task[None] | None = None

    @classmethod
    def load(cls, folder: Path, max_model_len: int, num_threads: int = 0) -> "ProxyPredictor":
        """A trained predictor's folder. Raises PredictorError."""
        return cls(*load_predictor(folder.expanduser()), max_model_len, num_threads)

    def predict(self, features: LengthFeatures) -> int:
        """See ``LengthPredictor.predict``."""
        if features.prompt_text is None:
            return self.history.predict(features)
        return self.predict_batch([features])[0]

    def predict_batch(self, batch: Sequence[LengthFeatures]) -> list[int]:
        """Predictions for requests that all have text, in one forward pass."""
        embeddings = self._encoder.embed([features.prompt_text or "" for features in batch])
        return self.from_embeddings(embeddings, batch)

    def from_embeddings(self, embeddings: torch.Tensor, batch: Sequence[LengthFeatures]) -> list[int]:
        """Predictions from the encoder's vectors: [len(batch), dimension]."""
        with torch.inference_mode():
            buckets = self._head(embeddings).argmax(-1).tolist()
        tokens = self.description.bucket_tokens
        return [
            capped(tokens[bucket], features, self._max_model_len)
            for bucket, features in zip(buckets, batch, strict=True)
        ]

    def observe(self, features: LengthFeatures, num_output_tokens: int) -> None:
        """See ``LengthPredictor.observe``: the history learns, the trained head does not."""
        self.history.observe(features, num_output_tokens)

    async def predict_soon(self, features: LengthFeatures, timeout_s: float) -> int:
        """``predict`` outside the event loop; the history's prediction when that is not there within ``timeout_s``.

        Requests that arrive while one batch runs form the next. Those that it could not serve in time go to the history
        as soon as that is known: an encoder that cannot keep up still serves as many as it can. Raises what it raised.
        """
        if features.prompt_text is None or len(self._waiting) >= MAX_WAITING:
            return self.from_history(features)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[int | None] = loop.create_future()
        num_tokens = min(self._encoder.window, 2 + len(features.prompt_text) // _CHARACTERS_PER_TOKEN)
        self._waiting.append(_Waiting(features, answer, loop.time() + timeout_s, num_tokens))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            async with asyncio.timeout(timeout_s):
                tokens = await answer
        except TimeoutError:
            tokens = None
        if tokens is None:
            return self.from_history(features)
        self.num_from_model += 1
        return tokens

    def from_history(self, features: LengthFeatures) -> int:
        """The history's prediction for a request that the model gives none for; counts it."""
        self.num_from_history += 1
        return self.history.predict(features)

    def close(self) -> None:
        """End the thread after the batch that it runs; later calls of ``predict_soon`` are errors."""
        if self._worker is not None:
            self._worker.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        """Run batches until nobody waits."""
        loop = asyncio.get_running_loop()
        # The first request is tried whatever the estimate says: so an estimate that was wrong is put right.
        batch = self._next_batch(loop.time(), always_one=True)
        while batch:
            began_s = loop.time()
            try:
                found = await loop.run_in_executor(self._thread, self.predict_batch, [one.features for one in batch])
            except Exception as error:
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
            else:
                self._learn_cost(loop.time() - began_s, _padded_tokens(batch))
                for one, tokens in zip(batch, found, strict=True):
                    if not one.answer.done():
                        one.answer.set_result(tokens)
            batch = self._next_batch(loop.time(), always_one=False)

    def _next_batch(self, now_s: float, always_one: bool) -> list[_Waiting]:
        """The oldest requests that can all be served in time; those that cannot even alone are sent to the history."""
        batch: list[_Waiting] = []
        while self._waiting and len(batch) < MAX_BATCH:
            one = self._waiting[0]
            if not one.answer.done():
                longer = [*batch, one]
                end_s = now_s + self._s_per_token * _padded_tokens(longer)
                if end_s <= min(each.deadline_s for each in longer) or (always_one and not batch):
                    batch = longer
                elif batch:
                    break
                else:
                    one.answer.set_result(None)
            self._waiting.popleft()
        return batch

    def _learn_cost(self, elapsed_s: float, num_tokens: int) -> None:
        measured = elapsed_s / num_tokens
        self._s_per_token += (_SMOOTHING if self._s_per_token else 1.0) * (measured - self._s_per_token)


def _padded_tokens(batch: Sequence[_Waiting]) -> int:
    return len(batch) * max(one.num_tokens for one in batch)
