"""Sending on time and timing streams, against a server of known timing."""

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from stream_server import StreamServer, bounded, serving

from chameleon_ray.bench.load.client import UNFINISHED, Client, Outcome, Prepared, Window, prepare, session
from chameleon_ray.bench.load.figures import Slo, summarize
from chameleon_ray.bench.load.prompts import PLAIN_WORDS, Prompts
from chameleon_ray.bench.load.workload import PlannedRequest

PLAN = PlannedRequest(0.0, "m", 8, "small", 12, 5)


def prepared(*plans: PlannedRequest) -> list[Prepared]:
    return prepare(plans, Prompts(PLAIN_WORDS, 1.0, 0.0, nonce=1))


def ignore(_: Outcome) -> None:
    pass


def test_a_streams_times_are_those_of_its_tokens() -> None:
    async def test() -> None:
        server = StreamServer(first_token_s=0.2, gap_s=0.1)
        async with serving(server), session({}, 60.0) as opened:
            began_s = time.perf_counter()
            outcome = await Client(opened, server.url).send_one(prepared(PLAN)[0], ignore)
            ended_s = time.perf_counter()
        assert outcome.error is None
        # The server's pauses begin anew with each token: one hold-up of the machine does not take it to the last one
        # before the client has read the first.
        assert server.sent_s[0] - server.arrived_s[0] <= outcome.ttft_s <= server.sent_s[4] - began_s
        assert len(outcome.gaps_s) == 4
        assert outcome.ttft_s + sum(outcome.gaps_s) >= server.sent_s[4] - server.arrived_s[0]
        assert outcome.ttft_s + sum(outcome.gaps_s) <= outcome.e2e_s <= ended_s - began_s
        assert (outcome.num_prompt_tokens, outcome.num_output_tokens) == (12, 5)
        (body,) = server.requests
        assert (body["model"], body["max_tokens"], body["ignore_eos"], body["stream"]) == ("m", 5, True, True)

    bounded(test)


def test_without_usage_events_are_counted() -> None:
    async def test() -> None:
        server = StreamServer(usage=False, gap_s=0.0)
        async with serving(server), session({}, 60.0) as opened:
            outcome = await Client(opened, server.url).send_one(prepared(PLAN)[0], ignore)
        assert (outcome.error, outcome.num_output_tokens, len(outcome.gaps_s)) == (None, 5, 4)

    bounded(test)


def test_the_engines_own_queueing_delay_is_kept_where_it_tells_one() -> None:
    async def test() -> None:
        server = StreamServer(gap_s=0.0, queued_ms=70.0)
        async with serving(server), session({}, 60.0) as opened:
            client = Client(opened, server.url)
            told = await client.send_one(prepared(PLAN)[0], ignore)
            server.queued_ms = None
            silent = await client.send_one(prepared(PLAN)[0], ignore)
        assert (told.queued_s, silent.queued_s) == (0.07, None)
        figures = summarize([Window([told, silent], 1.0, 0.0)], None, 1.0)
        assert figures["by_class"]["small"]["queued"]["mean_ms"] == pytest.approx(70.0)

    bounded(test)


def test_requests_are_sent_when_due_however_slow_the_answers_are() -> None:
    async def test() -> None:
        server = StreamServer(hold_until=20, gap_s=0.0)  # who waits for an answer before sending the next hangs
        plans = [replace(PLAN, at_s=0.02 * number) for number in range(20)]
        async with serving(server), session({}, 60.0) as opened:
            began_s = time.perf_counter()
            window = await Client(opened, server.url).open_loop(prepared(*plans), 60.0, ignore)
        assert [outcome.plan for outcome in window.outcomes] == plans
        assert all(outcome.error is None for outcome in window.outcomes)
        waits = zip(server.arrived_s, plans, window.outcomes, strict=True)
        assert all(arrived_s - began_s >= plan.at_s + outcome.late_s for arrived_s, plan, outcome in waits)
        assert window.elapsed_s >= 19 * 0.02

    bounded(test)


class Blocking(list[Prepared]):
    """Hands out its second request late, with the event loop blocked: a client that is too slow."""

    def __iter__(self) -> Iterator[Prepared]:
        yield self[0]
        time.sleep(0.5)
        yield from self[1:]


def test_a_client_that_falls_behind_says_so_and_its_lateness_counts_as_latency() -> None:
    async def test() -> None:
        server = StreamServer(first_token_s=0.01, gap_s=0.0)
        requests = Blocking(prepared(PLAN, *(replace(PLAN, at_s=0.1) for _ in range(5))))
        async with serving(server), session({}, 60.0) as opened:
            window = await Client(opened, server.url).open_loop(requests, 60.0, ignore)
        late = [outcome for outcome in window.outcomes if outcome.plan.at_s]
        assert len(late) == 5
        assert all(outcome.late_s >= 0.4 and outcome.ttft_s >= outcome.late_s + 0.01 for outcome in late)
        assert summarize([window], None, max_late_s=0.3)["client_late"]
        assert not summarize([window], None, max_late_s=60.0)["client_late"]

    bounded(test)


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("busy", "http_503", "overloaded"),
        ("broken", "stream_error", "engine died"),
        ("cut", "truncated", ""),
        ("endless", "truncated", "without [DONE]"),
        ("empty", "empty", "no tokens"),
    ],
)
def test_failures_are_told_apart(model: str, kind: str, message: str) -> None:
    async def test() -> None:
        server = StreamServer(first_token_s=0.0)
        async with serving(server), session({}, 60.0) as opened:
            outcome = await Client(opened, server.url).send_one(prepared(replace(PLAN, model=model))[0], ignore)
        assert outcome.error == kind
        assert message in outcome.message
        assert outcome.e2e_s is None

    bounded(test)


def test_no_server_and_no_answer_in_time_are_failures() -> None:
    async def test() -> None:
        server = StreamServer()
        async with serving(server), session({}, 0.3) as opened:
            stuck = await Client(opened, server.url).send_one(prepared(replace(PLAN, model="stuck"))[0], ignore)
            nobody = await Client(opened, "http://127.0.0.1:9").send_one(prepared(PLAN)[0], ignore)
        assert (stuck.error, nobody.error) == ("timeout", "connection")

    bounded(test)


def test_what_does_not_end_in_time_is_cut_and_counted() -> None:
    async def test() -> None:
        server = StreamServer(first_token_s=0.01)
        ended: list[Outcome] = []
        async with serving(server), session({}, 60.0) as opened:
            requests = prepared(PLAN, replace(PLAN, model="stuck"))
            window = await Client(opened, server.url).open_loop(requests, 2.0, ended.append)
        complete, stuck = window.outcomes
        assert (complete.error, stuck.error) == (None, UNFINISHED)
        assert len(ended) == 2
        assert Slo("ttft", 5.0, 99.0).is_met_by(stuck)  # its first token did come
        assert not Slo("e2e", 5.0, 99.0).is_met_by(stuck)

    bounded(test)


def outcome(ttft_s: float, e2e_s: float, error: str | None = None, size_class: str = "small", rank: int = 8) -> Outcome:
    made = Outcome(replace(PLAN, size_class=size_class, rank=rank), 0.001, ttft_s, None if error else e2e_s)
    made.gaps_s.extend([(e2e_s - ttft_s) / 4] * 4)
    made.num_prompt_tokens, made.num_output_tokens, made.error = 12, 5, error
    return made


def test_figures_over_all_by_class_and_by_rank() -> None:
    first = Window([outcome(0.1, 0.5), outcome(0.3, 0.7, size_class="large", rank=128)], 2.0, 0.1)
    second = Window([outcome(0.2, 0.6), outcome(0.1, 0.2, error="http_503", rank=128)], 2.0, 0.3)
    figures = summarize([first, second], Slo("ttft", 0.25, 99.0), 0.05)
    assert (figures["requests"], figures["failed"], figures["errors"]) == (4, 1, {"http_503": 1})
    assert figures["ttft"]["mean_ms"] == pytest.approx(200)
    assert figures["ttft"]["p50_ms"] == pytest.approx(200)
    assert figures["ttft"]["max_ms"] == pytest.approx(300)
    assert figures["tbt"]["mean_ms"] == pytest.approx(100)
    assert figures["e2e"]["p50_ms"] == pytest.approx(600)
    assert figures["slo_share"] == pytest.approx(2 / 4)  # one is too slow, one failed though its token came in time
    assert figures["requests_per_s"] == pytest.approx(3 / 4)
    assert figures["client_cpu_share"] == pytest.approx(0.1)
    assert figures["by_class"]["small"]["requests"] == 3
    assert figures["by_class"]["large"]["ttft"]["p99_ms"] == pytest.approx(300)
    assert figures["by_class"]["medium"]["ttft"]["p99_ms"] is None
    assert figures["by_rank"]["8"]["e2e"]["mean_ms"] == pytest.approx(550)
    assert figures["by_rank"]["128"]["failed"] == 1


def test_an_event_with_several_tokens_counts_as_several_in_the_mean_gap() -> None:
    made = outcome(0.1, 0.5)
    made.num_output_tokens = 9
    assert summarize([Window([made], 1.0, 0.0)], None, 1.0)["tbt"]["mean_ms"] == pytest.approx(50)


def test_short_answers_and_prompts_of_other_lengths_show() -> None:
    made = outcome(0.1, 0.5)
    made.num_output_tokens, made.num_prompt_tokens = 3, 15
    figures = summarize([Window([made], 1.0, 0.0)], None, 1.0)
    assert (figures["short_answers"], figures["prompt_tokens_off_percent"]) == (1, 25)
