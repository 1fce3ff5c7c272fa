"""What a replica tells of its engine: reports of the policy, vLLM's metrics, why a request was refused."""

import asyncio
import json
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from adapter_files import scaled_adapter
from engine_harness import PagedEngine
from safetensors.numpy import load_file, save_file
from served_engine import LIMIT_S, RETRY_S, SPIN_S, ServedEngine
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from chameleon_ray.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterLoadError,
    AdapterNoRoomError,
    AdapterRetryLaterError,
    AdapterTooLargeError,
)
from chameleon_ray.adapters.identity import AdapterId
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.paged import host
from chameleon_ray.engine.paged.stats import StatsReporter
from chameleon_ray.engine.refusals import CODE, RETRY_AFTER_S, RequestRefusedError, raise_refused
from chameleon_ray.engine.report import RECENT_S, WAITING_FOR, Activity, PolicyReport, RecentEviction
from chameleon_ray.engine.stats import LoadStats
from chameleon_ray.engine.vllm_metrics import by_client_name
from chameleon_ray.policy.adapter import Tier

PROMPT = list(range(10, 40))


def _vllms_logger(engine: PagedEngine) -> Any:
    """What fills vLLM's metrics from this engine; the registry forgets it when the process starts another engine."""
    [logger] = [one for one in engine.llm.logger_manager.stat_loggers if hasattr(one, "gauge_lora_info")]
    return logger


def _running_by_vllm(engine: PagedEngine) -> list[str]:
    """What ``vllm:lora_requests_info`` says to run, for every state that it has been in."""
    [info] = _vllms_logger(engine).gauge_lora_info.collect()
    assert info.name == "vllm:lora_requests_info"
    return [sample.labels["running_lora_adapters"] for sample in info.samples]


def test_vllms_metrics_name_running_adapters(engine: PagedEngine, demo: DemoPaths) -> None:
    names = ("named-in-metrics-1", "named-in-metrics-2")
    folders = [demo.adapters / name for name in demo.adapter_names()[5:7]]
    assert not any(name in states for name in names for states in _running_by_vllm(engine))
    requests = [engine.add(PROMPT, engine.adapter(*pair), 200) for pair in zip(folders, names, strict=True)]
    engine.run(lambda: all(len(engine.outcomes[request].tokens) > 2 for request in requests))
    assert any(all(name in states for name in names) for states in _running_by_vllm(engine))
    [running] = _vllms_logger(engine).gauge_scheduler_running[0].collect()
    assert (running.name, [sample.value for sample in running.samples]) == ("vllm:num_requests_running", [2.0])


def test_adapters_are_named_as_by_clients_and_only_where_they_have_requests() -> None:
    old, new = (AdapterId(digit * 64) for digit in "01")
    requests = {old.lora_name("b"): 2, new.lora_name("b"): 1, "a": 1, old.lora_name("gone"): 0}
    assert by_client_name(requests) == {"a": 1, "b": 3}


def test_report_arrives_as_the_policys_own_objects(
    engine: PagedEngine, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now_s = 100.0
    stats = LoadStats(engine.llm.vllm_config, clock=lambda: now_s)
    assert stats.report is None
    reporter = StatsReporter(engine.memory, lambda: now_s)
    reporter.take()  # what happened before
    waiting: list[dict[str, int]] = []
    reported = threading.Event()
    read_pages = host.read_pages

    def read_after_report(*args: Any, **kwargs: Any) -> Any:
        """The fetch lasts until a report has shown it, however slow the machine is."""
        assert reported.wait(LIMIT_S)
        return read_pages(*args, **kwargs)

    class Watched:
        """In the place of the engine's own reporter: durations are told once only."""

        def take(self) -> Any:
            if (report := reporter.take()) is not None:
                stats.record(SchedulerStats(kv_connector_stats=report.data), None)
                assert stats.report is not None
                waiting.append(dict(stats.report.waiting))
                if waiting[-1]["fetch"]:
                    reported.set()
                assert stats.report.cache == engine.memory.cache.stats()
                assert stats.report.queues == engine.memory.policy.queues.state()
                assert stats.report.limits.max_blocks == engine.memory.cache.config.max_blocks
            return report

    monkeypatch.setattr(engine.scheduler.connector, "_reporter", Watched())
    monkeypatch.setattr(host, "read_pages", read_after_report)
    engine.memory.evict_idle()
    unread = scaled_adapter(demo.adapters / demo.adapter_names()[8], tmp_path / "unread", 0.5)
    request = engine.add(PROMPT, engine.adapter(unread), 4)
    while not engine.outcomes[request].tokens:
        engine.step()
        now_s += 1.0
    assert any(one["fetch"] for one in waiting), waiting
    assert waiting[-1] == dict.fromkeys(WAITING_FOR, 0)
    assert max(sum(one.values()) for one in waiting) == 1
    now_s += 3.5
    assert stats.report_age_s >= 3.5
    events = stats.take_events()
    [(_, waited_s)] = events.waited  # in which queue depends on what came before
    assert waited_s >= 0
    assert [what for what, seconds in events.seconds if seconds > 0][-1] == "load"
    assert not stats.take_events().waited, "taken once"


def test_load_says_how_full_the_kv_pool_is_without_idle_adapters(engine: PagedEngine, demo: DemoPaths) -> None:
    stats = LoadStats(engine.llm.vllm_config)

    def kv_used_share() -> float:
        report = StatsReporter(engine.memory).take()
        assert report is not None
        usage = engine.scheduler.kv_cache_manager.usage
        stats.record(SchedulerStats(kv_connector_stats=report.data, kv_cache_usage=usage), None)
        return stats.load(0.0).kv_used_share

    engine.memory.evict_idle()
    request = engine.add(PROMPT, engine.adapter(demo.adapters / demo.adapter_names()[8], "counted"), 40)
    engine.run(lambda: len(engine.outcomes[request].tokens) > 2)
    in_use = engine.num_blocks - engine.free_blocks()
    assert in_use > engine.memory.cache.stats().blocks_held > 0
    assert kv_used_share() == pytest.approx(in_use / engine.num_blocks, rel=0.01)
    engine.settle()
    assert engine.free_blocks() < engine.num_blocks
    assert kv_used_share() == pytest.approx(0.0, abs=1e-9)


def test_activity_splits_the_pool_and_names_what_left(engine: PagedEngine, demo: DemoPaths) -> None:
    now_s = 50.0
    stats = LoadStats(engine.llm.vllm_config, clock=lambda: now_s)

    def activity() -> Activity:
        report = StatsReporter(engine.memory).take()
        assert report is not None
        usage = engine.scheduler.kv_cache_manager.usage
        stats.record(SchedulerStats(kv_connector_stats=report.data, kv_cache_usage=usage), None)
        return stats.activity()

    adapter = engine.adapter(demo.adapters / demo.adapter_names()[8], "shown")
    engine.memory.evict_idle()
    request = engine.add(PROMPT, adapter, 40)
    engine.run(lambda: len(engine.outcomes[request].tokens) > 2)
    running = activity()
    held = engine.memory.cache.stats().blocks_held / engine.num_blocks
    in_use = 1 - engine.free_blocks() / engine.num_blocks
    assert running.kv_adapters_share == pytest.approx(held, rel=0.01) and held > 0
    assert running.kv_requests_share == pytest.approx(in_use - held, rel=0.1) and in_use > held
    assert running.kv_free_share == pytest.approx(1 - in_use, rel=0.01)
    engine.settle()
    idle = activity()
    assert idle.kv_requests_share == pytest.approx(0.0, abs=1e-9) and idle.kv_adapters_share > 0
    engine.memory.evict_idle()
    assert activity().kv_adapters_share == 0
    now_s = 53.0
    assert stats.activity().evictions[0] == RecentEviction("shown", "kv_pressure", 3.0)


def test_rate_and_latency_are_of_the_latest_seconds(engine: PagedEngine) -> None:
    now_s = 0.0
    stats = LoadStats(engine.llm.vllm_config, clock=lambda: now_s)
    assert (stats.activity().requests_per_s, stats.activity().ttft_p50_s) == (0.0, None)
    for now_s in (1.0, 9.0):
        iteration = IterationStats()
        iteration.time_to_first_tokens_iter = [0.1 * now_s, 0.2, 0.3]
        stats.record(None, iteration)
    shown = stats.activity()
    assert (shown.requests_per_s, shown.ttft_p50_s, shown.ttft_p95_s) == (6 / RECENT_S, 0.2, 0.9)
    now_s = 1.0 + RECENT_S
    assert (stats.activity().requests_per_s, stats.activity().ttft_p95_s) == (3 / RECENT_S, 0.9)
    now_s = 9.0 + RECENT_S
    assert stats.activity().ttft_p50_s is None


def test_waiting_requests_are_counted_by_what_they_wait_for(
    engine: PagedEngine, demo: DemoPaths, tmp_path: Path
) -> None:
    # 32 seats and no room for one adapter: the rest waits for its turn.
    requests = [engine.add(PROMPT, max_tokens=40) for _ in range(40)]
    engine.run(lambda: len(engine.memory.running) == 32)
    engine.memory.evict_idle()
    folder = tmp_path / "seen for the first time"
    folder.symlink_to(demo.adapters / demo.adapter_names()[0])
    unknown = engine.add(PROMPT, engine.adapter(folder), 4)
    assert engine.memory.waiting() == {**dict.fromkeys(WAITING_FOR, 0), "turn": 8, "inspection": 1}
    assert engine.memory.oldest_waiting_s > 0
    engine.finish([*requests, unknown])
    assert engine.memory.waiting() == dict.fromkeys(WAITING_FOR, 0)
    assert engine.memory.oldest_waiting_s == 0


def test_headers_that_cannot_be_read_are_counted(engine: PagedEngine, tmp_path: Path) -> None:
    before = engine.memory.num_inspection_failures
    (refused,) = engine.finish([engine.add(PROMPT, engine.adapter(tmp_path, "empty folder"), 4)])
    assert refused.finish_reason == "error"
    assert engine.memory.num_inspection_failures == before + 1
    report = StatsReporter(engine.memory).take()
    assert report is not None
    assert PolicyReport.of(report.data).num_inspection_failures == before + 1


def test_a_stream_that_has_begun_ends_with_the_reason_not_with_internal_error() -> None:
    part = CompletionOutput(0, "", [], None, None, finish_reason="error", stop_reason="broken")
    output = RequestOutput("r", None, [1], None, [part], True, kv_transfer_params={RETRY_AFTER_S: 3.0})
    with pytest.raises(RequestRefusedError, match="broken") as caught:  # vLLM puts a GenerationError into the stream.
        raise_refused(output)
    assert (caught.value.status_code, caught.value.retry_after_s) == (503, 3.0)
    part.finish_reason, part.stop_reason = "stop", "a stop string"
    raise_refused(output)


def test_refusal_without_use_in_trying_again_is_the_requests_own_fault() -> None:
    error = RequestRefusedError(AdapterNoRoomError.code, "too large", None)
    assert error.status_code == 400
    assert isinstance(error.as_adapter_error(), AdapterNoRoomError)
    error = RequestRefusedError(AdapterTooLargeError.code, "too large", None)
    assert error.status_code == 413
    assert isinstance(error.as_adapter_error(), AdapterTooLargeError)


class Called:
    """Requests to the engine, as clients make them."""

    def __init__(self, served: ServedEngine, demo: DemoPaths) -> None:
        self.server = served.server
        self._demo = demo

    def record(self, name: str, folder: Path, size: int | None = None) -> AdapterRecord:
        digest = (name.encode().hex() + "0" * 64)[:64]
        size = size or (folder / "adapter_model.safetensors").stat().st_size
        return AdapterRecord(name=name, digest=digest, uri=str(folder), rank=8, size_bytes=size)

    def call(self, name: str | None, folder: Path | None = None, path: str = "/v1/completions", **fields: Any) -> Any:
        body = {"model": name or "demo", "max_tokens": 4, "temperature": 0} | fields
        body |= {} if "messages" in fields else {"prompt": "Once upon a time"}
        record = None if name is None else self.record(name, folder or self._demo.adapters / name)
        where = None if name is None else folder or self._demo.adapters / name
        return self.server.call(path, json.dumps(body).encode(), name or "demo", record, where)

    def report(self) -> PolicyReport:
        """The latest."""
        found = self.server.policy_report()
        assert found is not None
        return found[0]

    async def answer(self, *args: Any, **fields: Any) -> tuple[int, bytes]:
        async with self.call(*args, **fields) as call:
            return (await call.head()).status, await call.body()


def test_client_learns_why_its_adapter_cannot_be_used_and_nobody_else_is_harmed(
    demo: DemoPaths, served: ServedEngine, tmp_path: Path
) -> None:
    called = Called(served, demo)
    good, changed = demo.adapter_names()[0], "changed"
    messages = [{"role": "user", "content": "Hello"}]
    chat = {"path": "/v1/chat/completions", "messages": messages}
    ways = ({}, {"stream": True}, chat, chat | {"stream": True})

    async def refused(name: str, folder: Path, **fields: Any) -> AdapterError:
        with pytest.raises(AdapterError) as caught:
            async with called.call(name, folder, **fields) as call:
                await call.head()
                await anext(call.chunks(lambda: 0.0))
        return caught.value

    async def test() -> None:
        await called.answer(None)  # An engine that has made no step has reported nothing.
        await served.forget_all()
        called.server.take_policy_events()
        before = called.report()
        whole = await called.answer(good)
        assert whole[0] == 200
        await _check_inspections(called, demo, tmp_path)

        folder = Path(shutil.copytree(demo.adapters / good, tmp_path / changed))
        await called.server.accept(called.record(changed, folder), folder, whole=True)
        _truncate(folder)
        errors, others, base = await asyncio.gather(
            asyncio.gather(*(refused(changed, folder, **fields) for fields in ways)),
            asyncio.gather(*(called.answer(good) for _ in range(4))),
            called.answer(None, stream=True),
        )
        for error in errors:
            assert isinstance(error, AdapterRetryLaterError) and isinstance(error.args[0], AdapterLoadError)
            assert "truncated" in str(error) and changed in str(error)
            assert (error.http_status, error.code) == (503, "adapter_load_failed")
            assert 0 < error.retry_after_s <= RETRY_S
        text = json.loads(whole[1])["choices"][0]["text"]
        assert [(status, json.loads(body)["choices"][0]["text"]) for status, body in others] == [(200, text)] * 4
        assert base[0] == 200 and base[1].endswith(b"data: [DONE]\n\n") and b"error" not in base[1]

        # Nobody has inspected it before its requests.
        broken = Path(shutil.copytree(demo.adapters / good, tmp_path / "broken"))
        _truncate(broken)
        for fields in ways:
            error = await refused("broken", broken, **fields)
            assert isinstance(error, AdapterInvalidError) and error.http_status == 400
            assert "truncated" in str(error) and "tried again" not in str(error)
        _check_reports(called, before)
        await _check_tiers(called, demo)
        await _check_retirement(called, demo)
        assert await called.server._engine.collective_rpc("spin_times") == [[SPIN_S]]

    served.run(test)


def _truncate(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


async def _check_inspections(called: Called, demo: DemoPaths, tmp_path: Path) -> None:
    """An idle engine says of an adapter whether it can serve it; what it refuses leaves it as it was."""
    small, large = demo.adapter_names()[0], next(name for name in demo.adapter_names() if "-r128-" in name)
    tensors = load_file(demo.adapters / large / "adapter_model.safetensors")
    grown = Path(shutil.copytree(demo.adapters / large, tmp_path / "grown"))
    repeated = {name: array.repeat(4, axis=0 if "lora_A" in name else 1) for name, array in tensors.items()}
    save_file(repeated, grown / "adapter_model.safetensors")
    config = json.loads((grown / "adapter_config.json").read_text())
    (grown / "adapter_config.json").write_text(json.dumps(config | {"r": 4 * config["r"]}))
    broken = Path(shutil.copytree(demo.adapters / small, tmp_path / "truncated"))
    _truncate(broken)
    bound = called.report().limits.max_blocks
    for _ in range(2):
        with pytest.raises(AdapterTooLargeError, match=rf"takes \d+ blocks of KV memory, .* may hold {bound}"):
            await called.server.accept(called.record("grown", grown), grown, whole=True)
        with pytest.raises(AdapterInvalidError, match="truncated or damaged"):
            await called.server.accept(called.record("truncated", broken), broken)
        with pytest.raises(AdapterLoadError, match="missing"):
            await called.server.accept(called.record("gone", tmp_path / "gone", 1), tmp_path / "gone")
    # Weights that are not zero, and whose product is.
    faint = Path(shutil.copytree(demo.adapters / small, tmp_path / "faint"))
    tensors = load_file(faint / "adapter_model.safetensors")
    save_file({name: array * 1e-30 for name, array in tensors.items()}, faint / "adapter_model.safetensors")
    await called.server.accept(called.record("faint", faint), faint, whole=True)
    with pytest.raises(AdapterInvalidError, match=r"'faint' .* does not change the answer"):
        await called.server.check_effect(called.record("faint", faint), faint)
    await called.server.accept(called.record(large, demo.adapters / large), demo.adapters / large, whole=True)
    await called.server.check_effect(called.record(large, demo.adapters / large), demo.adapters / large)
    for name in (large, small):
        assert (await called.answer(name))[0] == 200, "what it has accepted is served by the next request"
    assert called.report().cache.adapters_known == 3


def _check_reports(called: Called, before: PolicyReport) -> None:
    assert called.server.adapter_memory == "paged"
    found = called.server.policy_report()
    assert found is not None
    report, age_s = found
    assert 0 <= age_s < LIMIT_S
    assert report.num_inspection_failures > before.num_inspection_failures
    assert report.cache.fetch_failures > before.cache.fetch_failures
    lookups = [cache.hits + cache.misses for cache in (before.cache, report.cache)]
    assert lookups[1] >= lookups[0] + 5 and report.cache.adapters_resident == 3
    events = called.server.take_policy_events()
    assert len(events.waited) == report.queues.num_admissions - before.queues.num_admissions
    assert {what for what, _ in events.seconds} == {"fetch", "load"}


async def _check_tiers(called: Called, demo: DemoPaths) -> None:
    """The KV memory holds some of the demo's adapters and of one more, host memory all of them."""
    names = demo.adapter_names()
    for name in names:
        assert (await called.answer(name))[0] == 200
    await called.answer(None)  # its report says what the last adapter's step has done
    await called.server.refresh_residency()
    counts, num_resident = Counter(called.server.tiers.values()), called.report().cache.adapters_resident
    assert counts == {Tier.GPU: num_resident, Tier.HOST: len(names) + 1 - num_resident}
    assert min(counts.values()) > 0


async def _check_retirement(called: Called, demo: DemoPaths) -> None:
    """The engine, which has no requests, forgets all adapters but one."""
    server, name = called.server, demo.adapter_names()[-1]
    kept = called.record(name, demo.adapters / name).digest
    async with asyncio.timeout(LIMIT_S):
        while not server.known == server.tiers.keys() == {kept}:  # The report comes with the step after.
            await server.retire(server.known - {kept})
    assert server.activity().evictions[0].reason == "retired"
    assert {eviction.adapter for eviction in server.activity().evictions} <= {*demo.adapter_names(), "faint"}


def test_the_key_of_the_retry_time_is_the_schedulers(engine: PagedEngine, tmp_path: Path) -> None:
    seen: list[Any] = []
    end = engine.scheduler._end_failed

    def watching(failed: Any, outputs: Any) -> None:
        end(failed, outputs)
        seen.extend(output for group in outputs.values() for output in group.outputs if output.stop_reason)

    engine.scheduler._end_failed = watching
    try:
        engine.finish([engine.add(PROMPT, engine.adapter(tmp_path, "another empty folder"), 4)])
    finally:
        del engine.scheduler._end_failed
    [output] = seen
    assert output.kv_transfer_params == {CODE: AdapterLoadError.code, RETRY_AFTER_S: 0.2}
