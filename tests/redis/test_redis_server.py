"""The bundled server starts, restarts and is gone afterwards, whatever happens to its owner."""

import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import redis

from chameleon_ray.redis_server import BundledRedis, BundledRedisError

OWNER = """
import sys, threading, time
from chameleon_ray.redis_server import BundledRedis
server = BundledRedis()
starter = threading.Thread(target=server.start)  # its end must not be the server's
starter.start()
starter.join()
print(server.pid, server.port, flush=True)
time.sleep(60)
"""


def wait_until_gone(process: psutil.Process) -> None:
    deadline_s = time.monotonic() + 30
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s, f"{process} is still there"
        time.sleep(0.01)


def test_start_and_stop_leave_nothing(tmp_path):
    server = BundledRedis(directory=tmp_path)
    assert (server.is_alive(), server.pid) == (False, None)
    with server:
        process = psutil.Process(server.pid)
        with redis.Redis.from_url(server.url) as client:
            assert client.set("key", "value")
            settings = client.config_get("*")
        assert settings["bind"] == "127.0.0.1"
        assert settings["protected-mode"] == "yes"
        assert (settings["save"], settings["appendonly"]) == ("", "no")
        assert server.start() is server
        assert server.pid == process.pid, "starting twice is starting once"
    assert not process.is_running()
    assert (server.is_alive(), server.pid) == (False, None)
    server.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["redis-server.log"]


def test_a_crashed_server_starts_again_empty_on_its_port(make_server, kill):
    server = make_server()
    first_pid, url = server.pid, server.url
    with redis.Redis.from_url(url) as client:
        client.set("key", "value")
        kill(server)
        assert server.pid is None
        server.start()
        assert server.url == url
        assert server.pid != first_pid
        assert client.get("key") is None


def test_a_taken_port_is_named(redis_server):
    second = BundledRedis(redis_server.port)
    with pytest.raises(BundledRedisError, match=rf"(?s)127\.0\.0\.1:{redis_server.port}.*Address already in use"):
        second.start()
    assert not second.is_alive()
    with redis.Redis.from_url(redis_server.url) as client:
        assert client.ping()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_dies_with_its_owner(how):
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        try:
            pid, port = map(int, owner.stdout.readline().split())
            process = psutil.Process(pid)
            with redis.Redis(port=port) as client:
                assert client.ping(), "alive although the thread that asked for it ended"
        finally:
            owner.send_signal(how)
    wait_until_gone(process)


def test_a_hanging_server_is_stopped(make_server, monkeypatch):
    monkeypatch.setattr("chameleon_ray.redis_server._STOP_LIMIT_S", 0.2)
    server = make_server()
    process = psutil.Process(server.pid)
    process.suspend()
    server.stop()
    assert not process.is_running()
    assert not any(thread.name.startswith(f"redis-server-{server.port}") for thread in threading.enumerate())
