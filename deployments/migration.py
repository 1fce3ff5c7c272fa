"""A request that goes on on another replica when the one that serves it dies."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import replace
from hashlib import blake2b
from typing import Any, cast

from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from chameleon_ray import metrics
from chameleon_ray.config import RelayConfig
from chameleon_ray.openai_errors import ApiError
from chameleon_ray.progress import NO_PROGRESS, Progress, created_of, joined, with_created
from deployments.parts import Part, RelayedRequest

logger = logging.getLogger("ray.serve")

REPLICA_LOST = (RayActorError, ObjectLostError, TimeoutError)


class DifferentAnswerError(Exception):
    """Another replica's answer does not begin with what the client has."""


class MigratingRequest:
    """One request and all that its client has of the answer."""

    def __init__(self, answer: DeploymentHandle[Any], request: RelayedRequest, config: RelayConfig):
        """answer: the handle of ``Replica.answer`` with the request's affinity."""
        self._answer = answer
        self._request = request
        self._max_migrations, self._max_silence_s = config.max_migrations, config.max_silence_s
        self._num_deaths = 0
        self._progress: list[Progress] = []
        self._sent = SentContent()
        self._created: bytes | None = None

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The answer: a part with its head, then further content. Raises ApiError when no replica can go on."""
        while True:
            progress = joined(self._progress)
            earlier = NO_PROGRESS if progress.obstacle else progress
            parts = cast(DeploymentResponseGenerator[Part], self._answer.remote(self._request, earlier))
            try:
                async for part in _unless_silent(parts, self._max_silence_s):
                    self._progress.append(part.progress)
                    if (fresh := self._fresh(part)) is not None:
                        yield fresh
                self._sent.check_complete()
                return
            except (asyncio.CancelledError, GeneratorExit):  # the client has gone
                parts.cancel()  # type: ignore[no-untyped-call]
                raise
            except REPLICA_LOST as error:
                logger.warning("a replica died or fell silent under a request: %r", error)
                parts.cancel()  # type: ignore[no-untyped-call]
                if self._sent.num_bytes > 0 and not self._request.is_streamed:
                    return  # An answer that is no stream comes in one part.
                self._migrate(error)
            except DifferentAnswerError as error:
                logger.warning("another replica cannot go on with an answer: %s", error)
                parts.cancel()  # type: ignore[no-untyped-call]
                raise self._broken("failed") from error
            except (BackPressureError, DeploymentUnavailableError) as error:
                if self._sent.num_bytes == 0:
                    raise
                raise self._broken("failed") from error

    def _fresh(self, part: Part) -> Part | None:
        """What of the part the client does not have yet; None when it has all."""
        if self._sent.num_bytes == 0:
            if part.head is None:
                return None
            self._created = created_of(part.content) if self._request.is_streamed else None
            self._sent.add(part.content)
            return part
        if part.head is not None and part.head.status != 200:
            raise DifferentAnswerError(part.content.decode(errors="replace"))
        content = self._sent.add(with_created(part.content, self._created) if self._num_deaths else part.content)
        return Part(content) if content else None

    def _migrate(self, error: Exception) -> None:
        """Make ready for another replica. ApiError when none may go on."""
        self._num_deaths += 1
        progress, is_begun = joined(self._progress), self._sent.num_bytes > 0
        if is_begun and progress.obstacle:
            raise self._broken("unsupported") from error
        if self._num_deaths > (self._max_migrations if is_begun else max(1, self._max_migrations)):
            raise self._broken("limit") from error
        self._sent.begin_again()
        if progress.steps and not progress.obstacle:
            metrics.MIGRATIONS.counter().inc(tags={"outcome": "resumed"})
        elif progress.obstacle:
            metrics.MIGRATIONS.counter().inc(tags={"outcome": "restarted"})
        else:
            metrics.RETRIES.counter().inc()
        self._progress = [replace(progress, obstacle="")]

    def _broken(self, outcome: str) -> ApiError:
        if self._sent.num_bytes == 0:
            message = f"{self._num_deaths} replicas died while they served this request; try again."
            return ApiError(502, message, "replica_died", retry_after_s=1)
        metrics.MIGRATIONS.counter().inc(tags={"outcome": outcome})
        return ApiError(502, "The replica serving this request died; the answer is incomplete.", "replica_died")


async def _unless_silent(parts: DeploymentResponseGenerator[Part], max_silence_s: float) -> AsyncGenerator[Part, None]:
    """The parts. TimeoutError when, once a replica has taken the request, none comes for so long."""
    await parts._fetch_future_result_async()  # the request may wait as long as it must for a replica to take it
    iterator = aiter(parts)
    while True:
        try:
            async with asyncio.timeout(max_silence_s):
                part = await anext(iterator)
        except StopAsyncIteration:
            return
        yield part


class SentContent:
    """How much of an answer the client has, and its digest: enough to go on in a copy of the answer."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._digest, self._copy_digest = blake2b(), blake2b()
        self._num_to_skip = 0

    def begin_again(self) -> None:
        """What is added from now on is a copy of the whole answer."""
        self._num_to_skip, self._copy_digest = self.num_bytes, blake2b()

    def add(self, content: bytes) -> bytes:
        """What of ``content`` is new. Raises DifferentAnswerError when what is not new is not the same."""
        known, fresh = content[: self._num_to_skip], content[self._num_to_skip :]
        if known:
            self._copy_digest.update(known)
            self._num_to_skip -= len(known)
            if self._num_to_skip == 0 and self._copy_digest.digest() != self._digest.digest():
                raise DifferentAnswerError("its beginning is another one")
        self._digest.update(fresh)
        self.num_bytes += len(fresh)
        return fresh

    def check_complete(self) -> None:
        """Raises DifferentAnswerError when the copy has ended before what the client has."""
        if self._num_to_skip:
            raise DifferentAnswerError("it is shorter")
