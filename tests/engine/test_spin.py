"""How long engine processes poll for messages; that worker processes of both kinds get it: test_paged_reports.py,
test_slots.py."""

import gc
import threading
import time

import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

from chameleon_ray.config import AppConfig
from chameleon_ray.engine.options import server_args
from chameleon_ray.engine.spin import EXECUTOR, SETTINGS_KEY, BoundedSpinExecutor, bound_spin, spin_readers

SPIN_S = 0.004


@pytest.fixture
def queue() -> tuple[MessageQueue, MessageQueue]:
    """A message queue of vLLM's: the writing end and the reading end."""
    gc.collect()
    writer = MessageQueue(1, 1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    waiting = threading.Thread(target=reader.wait_until_ready)
    waiting.start()
    writer.wait_until_ready()
    waiting.join()
    return writer, reader


def test_readers_are_found_and_bounded(queue: tuple[MessageQueue, MessageQueue]) -> None:
    writer, reader = queue
    assert reader._spin_condition in spin_readers() and writer._spin_condition not in spin_readers()
    assert reader._spin_condition.busy_loop_s == 1, "vLLM's own time has changed: see whether engine/spin.py is needed"
    bound_spin(None, SPIN_S)
    assert reader._spin_condition.busy_loop_s == SPIN_S


def test_a_bounded_reader_sleeps_and_still_gets_every_message(queue: tuple[MessageQueue, MessageQueue]) -> None:
    writer, reader = queue
    bound_spin(None, SPIN_S)
    received: list[int] = []
    used_s: list[float] = []

    def read() -> None:
        for _ in range(4):
            received.append(reader.dequeue(indefinite=True))
        used_s.append(time.thread_time())

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(4):
        time.sleep(0.3)
        writer.enqueue(number)
    thread.join(120)
    assert received == [0, 1, 2, 3]
    # Polling for a second after each message, it would have used all of the 1.2 s that no other thread wanted.
    assert used_s[0] < 0.3


def arguments(**engine: object) -> object:
    return server_args(AppConfig.from_args({"model": {"source": "x"}, "engine": {"device": "cpu"} | engine}))


@pytest.mark.parametrize("adapter_memory", ["paged", "stock"])
def test_the_option_reaches_vllms_arguments(adapter_memory: str) -> None:
    given = arguments(adapter_memory=adapter_memory, worker_spin_s=SPIN_S)
    assert given.distributed_executor_backend == EXECUTOR  # type: ignore[attr-defined]
    assert f"{BoundedSpinExecutor.__module__}.{BoundedSpinExecutor.__qualname__}" == EXECUTOR
    assert given.additional_config[SETTINGS_KEY] == SPIN_S  # type: ignore[attr-defined]
    assert ("chameleon" in given.additional_config) == (adapter_memory == "paged")  # type: ignore[attr-defined]


def test_an_operators_additional_config_is_added_to_ours() -> None:
    given = arguments(worker_spin_s=SPIN_S, vllm_args={"additional_config": {"more": 1}})
    assert {SETTINGS_KEY, "chameleon", "more"} <= given.additional_config.keys()  # type: ignore[attr-defined]


def test_with_cores_to_spare_vllm_chooses_its_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chameleon_ray.engine.options.usable_cores", lambda: 64.0)
    given = arguments()
    assert given.distributed_executor_backend is None  # type: ignore[attr-defined]
    assert SETTINGS_KEY not in given.additional_config  # type: ignore[attr-defined]
