"""The output length from the prompt's text (the paper's predictor: a BERT-style proxy model, about 80% accurate)."""

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from chameleon_ray.policy.lengths import HistoryPredictor, LengthFeatures, capped
from chameleon_ray.predictor.encoder import Encoder
from chameleon_ray.predictor.head import LengthHead
from chameleon_ray.predictor.saved import Description, load_predictor

MAX_BATCH = 16
"""Prompts in one forward pass: more would make the first of them wait for the last."""
MAX_WAITING = 256
"""Beyond, requests get the history's prediction at once."""


class ProxyPredictor:
    """A ``LengthPredictor`` that reads the prompt; requests without text get the history's prediction.

    ``predict`` runs the encoder in the caller's thread. Where that must not wait use ``predict_soon``.
    """

    def __init__(
        self, encoder: Encoder, head: LengthHead, description: Description, max_model_len: int, num_threads: int = 0
    ) -> None:
        """num_threads: compute threads of ``predict_soon``; 0: as torch is set."""
        self.description = description
        self.history = HistoryPredictor(max_model_len)
        self.num_from_model = 0
        self.num_from_history = 0
        self._encoder = encoder
        self._head = head
        self._max_model_len = max_model_len
        setup = (lambda: torch.set_num_threads(num_threads)) if num_threads else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="length-predictor", initializer=setup)
        self._waiting: deque[tuple[LengthFeatures, asyncio.Future[int]]] = deque()
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

        Requests that arrive while one batch runs form the next. Raises what the encoder raised.
        """
        if features.prompt_text is None or len(self._waiting) >= MAX_WAITING:
            return self.from_history(features)
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((features, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            async with asyncio.timeout(timeout_s):
                tokens = await answer
        except TimeoutError:
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
        """Run batches until nobody waits; requests that have given up or gone are left out."""
        loop = asyncio.get_running_loop()
        while batch := self._next_batch():
            try:
                found = await loop.run_in_executor(self._thread, self.predict_batch, [one for one, _ in batch])
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), tokens in zip(batch, found, strict=True):
                if not answer.done():
                    answer.set_result(tokens)

    def _next_batch(self) -> list[tuple[LengthFeatures, asyncio.Future[int]]]:
        batch: list[tuple[LengthFeatures, asyncio.Future[int]]] = []
        while self._waiting and len(batch) < MAX_BATCH:
            features, answer = self._waiting.popleft()
            if not answer.done():
                batch.append((features, answer))
        return batch
