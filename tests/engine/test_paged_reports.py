"""What a replica tells of its engine: reports of the policy, vLLM's metrics, why a request was refused."""

import asyncio
import json
import shutil
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_harness import PagedEngine
from safetensors.numpy import load_file, save_file
from spin_probe import PROBE
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.metrics.stats import SchedulerStats

from chameleon_ray.adapters.errors import AdapterLoadError, AdapterNoRoomError, AdapterRetryLaterError
from chameleon_ray.adapters.identity import AdapterId
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AppConfig
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.paged import host
from chameleon_ray.engine.paged.stats import StatsReporter
from chameleon_ray.engine.refusals import RETRY_AFTER_S, RequestRefusedError, raise_refused
from chameleon_ray.engine.report import WAITING_FOR, PolicyReport
from chameleon_ray.engine.server import EngineServer
from chameleon_ray.engine.stats import LoadStats
from chameleon_ray.engine.vllm_metrics import by_client_name
from chameleon_ray.policy.adapter import Tier

LIMIT_S = 300.0
PROMPT = list(range(10, 40))
RETRY_S = 7.0


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
    engine: PagedEngine, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
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
    request = engine.add(PROMPT, engine.adapter(demo.adapters / demo.adapter_names()[8], "read for the first time"), 4)
    while not engine.outcomes[request].tokens:
        engine.step()
        now_s += 1.0
    assert any(one["fetch"] for one in waiting), waiting
    assert waiting[-1] == dict.fromkeys(WAITING_FOR, 0)
    assert max(sum(one.values()) for one in waiting) == 1
    now_s += 3.5
    assert stats.report_age_s >= 3.5
    events = stats.take_events()
    assert [queue for queue, waited_s in events.waited if waited_s >= 0] == [0]
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
    assert kv_used_share() == pytest.approx(0.0, abs=0.001)


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
    assert PolicyReport.of(report.data).num_failures["inspection"] == before + 1


def test_a_stream_that_has_begun_ends_with_the_reason_not_with_internal_error() -> None:
    part = CompletionOutput(0, "", [], None, None, finish_reason="error", stop_reason="broken")
    output = RequestOutput("r", None, [1], None, [part], True, kv_transfer_params={RETRY_AFTER_S: 3.0})
    with pytest.raises(RequestRefusedError, match="broken") as caught:  # vLLM puts a GenerationError into the stream.
        raise_refused(output)
    assert (caught.value.status_code, caught.value.retry_after_s) == (503, 3.0)
    part.finish_reason, part.stop_reason = "stop", "a stop string"
    raise_refused(output)


def test_refusal_without_use_in_trying_again_is_the_requests_own_fault() -> None:
    error = RequestRefusedError("too large", None)
    assert error.status_code == 400
    assert isinstance(error.as_adapter_error(), AdapterNoRoomError)


class Served:
    """An ``EngineServer`` with adapters in KV memory."""

    def __init__(self, server: EngineServer, demo: DemoPaths) -> None:
        self.server = server
        self._demo = demo

    def record(self, name: str, folder: Path) -> AdapterRecord:
        digest = (name.encode().hex() + "0" * 64)[:64]
        size = (folder / "adapter_model.safetensors").stat().st_size
        return AdapterRecord(name=name, digest=digest, uri=str(folder), rank=8, size_bytes=size)

    def call(self, name: str | None, folder: Path | None = None, path: str = "/v1/completions", **fields: Any) -> Any:
        body = {"model": name or "demo", "max_tokens": 4, "temperature": 0} | fields
        body |= {} if "messages" in fields else {"prompt": "Once upon a time"}
        record = None if name is None else self.record(name, folder or self._demo.adapters / name)
        where = None if name is None else folder or self._demo.adapters / name
        return self.server.call(path, json.dumps(body).encode(), name or "demo", record, where)

    async def answer(self, *args: Any, **fields: Any) -> tuple[int, bytes]:
        async with self.call(*args, **fields) as call:
            return (await call.head()).status, await call.body()


def serve(demo: DemoPaths, test: Callable[[Served], Awaitable[None]]) -> None:
    small = {"device": "cpu", "dtype": "float32", "max_model_len": 512, "kv_cache_gib": 0.06, "enforce_eager": True}
    config = AppConfig.from_args(
        {
            "model": {"source": str(demo.model), "name": "demo"},
            "engine": small
            | {"adapter_memory": "paged", "adapter_host_gib": 0.1}
            | {"worker_spin_s": 0.003, "vllm_args": {"worker_extension_cls": PROBE}},
            "adapters": {"retry_after_s": RETRY_S},
        }
    )

    async def started() -> None:
        async with asyncio.timeout(LIMIT_S), AsyncExitStack() as stack:
            server = await EngineServer.start(config)
            stack.callback(server.shutdown)
            await test(Served(server, demo))

    asyncio.run(started())


def test_client_learns_why_its_adapter_cannot_be_used_and_nobody_else_is_harmed(
    demo: DemoPaths, tmp_path: Path
) -> None:
    good, name = demo.adapter_names()[0], "broken"
    folder = Path(shutil.copytree(demo.adapters / good, tmp_path / name))
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = np.nan
    save_file(weights, folder / "adapter_model.safetensors")
    messages = [{"role": "user", "content": "Hello"}]
    chat = {"path": "/v1/chat/completions", "messages": messages}

    async def refused(served: Served, **fields: Any) -> AdapterRetryLaterError:
        with pytest.raises(AdapterRetryLaterError) as caught:
            async with served.call(name, folder, **fields) as call:
                await call.head()
                await anext(call.chunks(lambda: 0.0))
        return caught.value

    async def test(served: Served) -> None:
        await served.server.accept(served.record(name, folder), folder)
        whole = await served.answer(good)
        assert whole[0] == 200
        failing = [refused(served, **fields) for fields in ({}, {"stream": True}, chat, chat | {"stream": True})]
        errors, others, base = await asyncio.gather(
            asyncio.gather(*failing),
            asyncio.gather(*(served.answer(good) for _ in range(4))),
            served.answer(None, stream=True),
        )
        for error in errors:
            assert isinstance(error.args[0], AdapterLoadError)
            assert "finite" in str(error) and name in str(error)
            assert (error.http_status, error.code) == (503, "adapter_load_failed")
            assert 0 < error.retry_after_s <= RETRY_S
        text = json.loads(whole[1])["choices"][0]["text"]
        assert [(status, json.loads(body)["choices"][0]["text"]) for status, body in others] == [(200, text)] * 4
        assert base[0] == 200 and base[1].endswith(b"data: [DONE]\n\n") and b"error" not in base[1]
        _check_reports(served.server, name)
        await _check_tiers(served, demo)
        assert await served.server._engine.collective_rpc("spin_times") == [[0.003]]

    serve(demo, test)


async def _check_tiers(served: Served, demo: DemoPaths) -> None:
    """The KV memory holds some of the demo's adapters, host memory all of them."""
    names = demo.adapter_names()
    for name in names:
        assert (await served.answer(name))[0] == 200
    await served.answer(None)  # its report says what the last adapter's step has done
    await served.server.refresh_residency()
    found = served.server.policy_report()
    assert found is not None
    counts = Counter(served.server.tiers.values())
    assert counts == {Tier.GPU: found[0].cache.adapters_resident, Tier.HOST: len(names) - counts[Tier.GPU]}
    assert min(counts.values()) > 0


def _check_reports(server: EngineServer, broken: str) -> None:
    assert server.adapter_memory == "paged"
    [(digest, reason)] = server.failures().items()
    assert bytes.fromhex(digest).startswith(broken.encode()) and "finite" in reason
    found = server.policy_report()
    assert found is not None
    report, age_s = found
    assert 0 <= age_s < LIMIT_S
    assert report.num_failures["fetch"] >= 1 and report.num_failures["inspection"] == 0
    assert report.cache.hits + report.cache.misses >= 5 and report.cache.adapters_resident == 1
    assert report.accuracy.num_requests == 6, asdict(report.accuracy)
    events = server.take_policy_events()
    assert len(events.waited) == report.queues.num_admissions
    assert {what for what, _ in events.seconds} == {"fetch", "load"}


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
    assert 0 < output.kv_transfer_params[RETRY_AFTER_S] <= 0.2
