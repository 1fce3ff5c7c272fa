"""Requests that go on on another replica, as the ingress does it: replicas are scripts of what they send and die."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import RelayConfig
from chameleon_ray.openai_errors import ApiError
from chameleon_ray.progress import NO_PROGRESS, OutputStep, Progress, created_of, joined, with_created
from deployments.migration import DifferentAnswerError, MigratingRequest, SentContent
from deployments.parts import AnswerHead, Part, RelayedRequest

HEAD = AnswerHead(200, "text/event-stream")
DEATH = ActorDiedError()
RECORD = AdapterRecord(name="m", digest="5a" * 32, uri="/m", rank=8, size_bytes=1)


def event(text: str, created: int = 100) -> bytes:
    answer = {"id": "cmpl-1", "object": "text_completion", "created": created, "model": "m", "text": text}
    return b"data: " + json.dumps(answer, separators=(",", ":")).encode() + b"\n\n"


def step(*token_ids: int) -> Progress:
    return Progress(b"prompt", (OutputStep(token_ids),))


class Calls:
    """In the place of a Serve handle: each call plays the next script; errors are raised, None is silence for ever."""

    def __init__(self, *scripts: list[Part | Exception | None]) -> None:
        self._scripts = list(scripts)
        self.num_cancelled = 0
        self.earlier: list[Progress] = []

    def remote(self, request: RelayedRequest, earlier: Progress) -> "Calls":
        assert request.record is RECORD, "the version of the adapter that the ingress resolved"
        self.earlier.append(earlier)
        return self

    def cancel(self) -> None:
        self.num_cancelled += 1

    async def _fetch_future_result_async(self) -> None:
        """A replica takes the request at once."""

    async def __aiter__(self) -> AsyncIterator[Part]:
        for part in self._scripts.pop(0):
            if isinstance(part, Exception):
                raise part
            if part is None:
                await asyncio.Event().wait()
            else:
                yield part


def relayed(calls: Any, *, max_migrations: int = 3, is_streamed: bool = True, max_silence_s: float = 60.0) -> bytes:
    """What the client gets. Raises ApiError with it as a note when the answer cannot be completed."""
    request = RelayedRequest("/v1/completions", b"{}", "m", RECORD, "1", is_streamed)
    config = RelayConfig(max_migrations=max_migrations, max_silence_s=max_silence_s)
    got: list[bytes] = []

    async def read() -> None:
        async for part in MigratingRequest(calls, request, config).parts():
            got.append(part.content)

    try:
        asyncio.run(read())
    except ApiError as error:
        error.add_note(b"".join(got).decode())
        raise
    return b"".join(got)


def test_a_stream_goes_on_where_its_client_is() -> None:
    """Also where the second replica is asked in the middle of a chunk, one second later."""
    calls = Calls(
        [Part(), Part(event("a"), step(1), HEAD), Part(event("b"), step(2, 3)), Part(progress=step(4)), DEATH],
        [Part(event("a", 101) + event("b", 101) + event("c", 101), step(5), HEAD), DEATH],
        [Part(event("a", 102), head=HEAD), Part(event("b", 102) + event("c", 102)), Part(event("d", 102), step(6))],
    )
    assert relayed(calls) == event("a") + event("b") + event("c") + event("d")
    assert [earlier.token_ids for earlier in calls.earlier] == [[], [1, 2, 3, 4], [1, 2, 3, 4, 5]]
    assert {earlier.prompt_digest for earlier in calls.earlier[1:]} == {b"prompt"}


def test_a_replica_that_falls_silent_counts_as_dead() -> None:
    assert relayed(Calls([None], [Part(event("a"), head=HEAD)]), max_silence_s=0.05) == event("a")
    calls = Calls([Part(event("a"), step(1), HEAD), None], [Part(event("a"), head=HEAD), Part(event("b"))])
    assert relayed(calls, max_silence_s=0.05) == event("a") + event("b")
    assert [earlier.token_ids for earlier in calls.earlier] == [[], [1]]
    assert calls.num_cancelled == 1


def test_a_whole_answer_goes_on_from_its_tokens() -> None:
    answer = Part(b'{"created":101}', head=AnswerHead(200, "application/json"))
    calls = Calls([Part(progress=step(1, 2)), Part(progress=step(3)), DEATH], [answer])
    assert relayed(calls, is_streamed=False) == b'{"created":101}'
    assert [earlier.token_ids for earlier in calls.earlier] == [[], [1, 2, 3]]


def test_a_whole_answer_that_has_come_needs_its_replica_no_more() -> None:
    answer = Part(b'{"created":101}', step(2), AnswerHead(200, "application/json"))
    calls = Calls([Part(progress=step(1)), answer, DEATH])
    assert relayed(calls, is_streamed=False) == b'{"created":101}'
    assert len(calls.earlier) == 1


def test_what_cannot_go_on_begins_anew_only_before_its_first_part() -> None:
    obstacle = Progress(obstacle="log-probabilities")
    calls = Calls([Part(progress=obstacle), DEATH], [Part(event("a"), obstacle, HEAD)])
    assert relayed(calls) == event("a")
    assert calls.earlier == [NO_PROGRESS, NO_PROGRESS]
    with pytest.raises(ApiError, match="incomplete") as caught:
        relayed(Calls([Part(event("a"), obstacle, HEAD), DEATH]))
    assert (caught.value.status, caught.value.kind) == (502, "replica_died")
    assert caught.value.__notes__ == [event("a").decode()]


@pytest.mark.parametrize("max_migrations", [0, 2])
def test_a_request_moves_only_so_often(max_migrations: int) -> None:
    begun: list[Part | Exception | None] = [Part(event("a"), step(1), HEAD), DEATH]
    again: list[Part | Exception | None] = [Part(event("a"), head=HEAD), DEATH]
    calls = Calls(begun, *[again] * max_migrations)
    with pytest.raises(ApiError, match="incomplete"):
        relayed(calls, max_migrations=max_migrations)
    assert len(calls.earlier) == 1 + max_migrations
    calls = Calls(*[[DEATH]] * 4)
    with pytest.raises(ApiError, match="replicas died while they served") as caught:
        relayed(calls, max_migrations=max_migrations)
    assert (caught.value.status, caught.value.retry_after_s) == (502, 1)
    assert len(calls.earlier) == 1 + max(1, max_migrations)  # before it has begun, one more is always tried


@pytest.mark.parametrize(
    "other",
    [
        [Part(event("x"), head=HEAD), Part(event("b"))],
        [Part(event("a")[:10], head=HEAD)],
        [Part(b'{"error":{}}', head=AnswerHead(503, "application/json"))],
        [BackPressureError(num_queued_requests=1, max_queued_requests=1)],
    ],
)
def test_an_answer_that_is_not_the_same_ends_the_stream(other: list[Part | Exception | None]) -> None:
    with pytest.raises(ApiError, match="incomplete") as caught:
        relayed(Calls([Part(event("a"), step(1), HEAD), DEATH], other))
    assert caught.value.__notes__ == [event("a").decode()]


def test_a_refusal_before_anything_was_sent_is_the_answer() -> None:
    refusal = Part(b'{"error":{}}', head=AnswerHead(503, "application/json", retry_after_s=2))
    assert relayed(Calls([Part(progress=step(1)), DEATH], [refusal])) == b'{"error":{}}'


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_a_copy_is_skipped_up_to_what_is_new_in_pieces_of_any_size(size: int) -> None:
    sent = SentContent()
    sent.add(b"0123456789")
    for _ in range(2):
        sent.begin_again()
        with pytest.raises(DifferentAnswerError, match="shorter"):
            sent.check_complete()
        copy = b"0123456789" + b"ab"
        assert b"".join(sent.add(copy[at : at + size]) for at in range(0, len(copy), size)) in (b"ab", b"")
        sent.check_complete()
    assert sent.num_bytes == 12


def test_created_times_are_rewritten_and_nothing_that_looks_like_them() -> None:
    text = 'data: {"id":"x","object":"y","created":7'
    events = event("a", 101) + event(text, 102) + b"data: [DONE]\n\n"
    assert created_of(events) == b"101"
    assert with_created(events, b"5") == event("a", 5) + event(text, 5) + b"data: [DONE]\n\n"
    assert created_of(b"data: [DONE]\n\n") is None and with_created(events, None) == events


def test_reports_join_in_their_order() -> None:
    ended = Progress(steps=(OutputStep((3,), "stop", 3),))
    whole = joined([NO_PROGRESS, step(1, 2), NO_PROGRESS, ended])
    assert (whole.prompt_digest, whole.token_ids, whole.has_ended) == (b"prompt", [1, 2, 3], True)
    assert not step(1).has_ended and not NO_PROGRESS.has_ended
