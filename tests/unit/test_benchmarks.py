"""Comparing real engines: their command lines and processes, what policies say at /metrics, and the tables."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from benchmarks import capacity, schedulers, servers
from benchmarks.load_plot import plot
from benchmarks.servers import Engine, Machine, command, running
from benchmarks.setting import MIB, make_setting
from benchmarks.state import PolicyState, parse_state
from chameleon_ray.bench.load.errors import LoadError
from chameleon_ray.engine.paged.options import PagedSettings
from chameleon_ray.random_demo import RANKS, link_adapters

if TYPE_CHECKING:
    from chameleon_ray.demo import DemoPaths

ROOT = Path(__file__).parents[2]
MACHINE = Machine(Path("m"), {"a-r8": Path("a"), "b-r16": Path("b")}, 64 * MIB, 16, 512, 128, 1)
FAKE_SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen(["sleep", "600"])
open(sys.argv[2], "w").write(str(child.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def options_of(words: list[str]) -> dict[str, str]:
    return {word: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}


def test_engines_differ_in_adapters_and_scheduler_alone() -> None:
    stock = options_of(command(Engine("stock", None), MACHINE, 1))
    ours = options_of(command(Engine("ours", PagedSettings(scheduler="sjf", adapter_policy="lru")), MACHINE, 1))
    assert stock["--max-loras"] == "2"  # no more slots than adapters
    assert json.loads(ours["--additional-config"])["chameleon"]["scheduler"] == "sjf"
    assert "--max-loras" not in ours and "--scheduler-cls" not in stock
    alike = stock.keys() & ours.keys()
    assert {"--kv-cache-memory-bytes", "--max-num-seqs", "--dtype", "--max-model-len", "--lora-modules"} <= alike
    assert all(stock[name] == ours[name] for name in alike)


@pytest.fixture
def fake_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Servers that answer, each with a child of its own whose pid is in a file here."""

    def fake(engine: Engine, _: Machine, port: int) -> list[str]:
        return [sys.executable, "-c", FAKE_SERVER, str(port), str(tmp_path / engine.name)]

    monkeypatch.setattr(servers, "command", fake)
    return tmp_path


def pids_in(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in folder.iterdir()]


def gone(pids: list[int]) -> bool:
    """Whether these processes have ended, within a deadline."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        states = [psutil.Process(pid).status() for pid in pids if psutil.pid_exists(pid)]
        if all(state == psutil.STATUS_ZOMBIE for state in states):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
def test_engines_end_with_all_their_processes(fake_servers: Path, failure: type[BaseException] | None) -> None:
    both = [Engine("x", None), Engine("y", None)]
    with ExitStack() as stack:
        if failure is not None:
            stack.enter_context(pytest.raises(failure))
        with running(both, MACHINE, lambda _: None) as targets:
            assert [target.name for target in targets] == ["x", "y"]
            assert len({target.url for target in targets}) == 2
            assert len(pids_in(fake_servers)) == 2 and not gone_now(pids_in(fake_servers))
            if failure is not None:
                raise failure
    assert gone(pids_in(fake_servers))


def gone_now(pids: list[int]) -> bool:
    return any(not psutil.pid_exists(pid) for pid in pids)


def test_engines_end_when_the_command_is_killed(fake_servers: Path) -> None:
    """Also where this process has no time to end them."""
    program = (
        "import sys, time; from pathlib import Path; from benchmarks import servers as s\n"
        f"fake, file = {FAKE_SERVER!r}, {str(fake_servers / 'x')!r}\n"
        "s.command = lambda e, m, port: [sys.executable, '-c', fake, str(port), file]\n"
        "m = s.Machine(Path('m'), {}, 1, 1, 1, 1, 1)\n"
        "with s.running([s.Engine('x', None)], m, print):\n    print('up', flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert any(line.strip() == "up" for line in parent.stdout)
    (server,) = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone([server.pid])
    os.kill(pids_in(fake_servers)[0], signal.SIGKILL)


def test_an_engine_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; sys.exit('no such model')"
    monkeypatch.setattr(servers, "command", lambda *_: [sys.executable, "-c", program])
    with (
        pytest.raises(LoadError, match=r"x did not start(.|\n)*no such model"),
        running([Engine("x", None)], MACHINE, lambda _: None),
    ):
        pass


def test_adapters_are_many_of_equal_numbers_of_each_rank(demo: "DemoPaths", tmp_path: Path) -> None:
    adapters = link_adapters(demo, tmp_path, 100)
    assert Counter(adapter.rank for adapter in adapters.values()) == dict.fromkeys(RANKS, 20)
    for name, adapter in adapters.items():
        assert f"-r{adapter.rank}-" in name
        assert json.loads((adapter.path / "adapter_config.json").read_text())["r"] == adapter.rank
        assert (adapter.path / "adapter_model.safetensors").is_file()


def parsed(add: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add(parser)
    return parser.parse_args(words)


def test_the_setting_is_the_same_for_every_engine(demo: "DemoPaths") -> None:
    arguments = parsed(
        schedulers.add_arguments, "--demo", str(demo.model.parent), "--adapters", "10", "--kv-cache-gib", "0.03125"
    )
    with ExitStack() as stack:
        setting = make_setting(arguments, stack)
        folders = [adapter.path for adapter in setting.adapters.values()]
        assert all(folder.is_dir() for folder in folders)
        assert setting.machine.kv_cache_bytes == 32 * MIB
        assert (setting.lengths.num_prompt_tokens + setting.lengths.num_output_tokens).max() <= 2048
        made = schedulers.engines(setting, ("chameleon", "fifo"))
        assert [engine.settings.scheduler for engine in made] == ["chameleon", "fifo"]
        assert {engine.settings.adapter_policy for engine in made} == {"chameleon"}
        stock, plain, ours = capacity.engines(setting, capacity.ENGINES)
        assert stock.settings is None
        assert (plain.settings.scheduler, plain.settings.adapter_policy) == ("fifo", "lru")
        assert (ours.settings.scheduler, ours.settings.adapter_policy) == ("chameleon", "chameleon")
    assert not any(folder.exists() for folder in folders)


def test_options_are_checked() -> None:
    with pytest.raises(SystemExit):
        parsed(schedulers.add_arguments, "--schedulers", "fifo,lifo")
    with pytest.raises(SystemExit):
        parsed(schedulers.add_arguments, "--loads", "0,1,2")
    assert parsed(capacity.add_arguments, "--engines", "fifo+lru,chameleon").engines == ("fifo+lru", "chameleon")


EXPOSITION = """
# TYPE chameleon_squashes_total counter
chameleon_squashes_total{engine="0",model_name="demo"} 3.0
# TYPE chameleon_admissions_total counter
chameleon_admissions_total{engine="0",model_name="demo"} 60.0
# TYPE chameleon_queue_cutoff gauge
chameleon_queue_cutoff{engine="0",model_name="demo",queue="1"} 0.0
chameleon_queue_cutoff{engine="0",model_name="demo",queue="0"} 0.25
# TYPE chameleon_queue_quota_tokens gauge
chameleon_queue_quota_tokens{engine="0",model_name="demo",queue="0"} 300.0
chameleon_queue_quota_tokens{engine="0",model_name="demo",queue="1"} 200.0
# TYPE chameleon_queue_max_running gauge
chameleon_queue_max_running{engine="0",model_name="demo",queue="0"} 5.0
chameleon_queue_max_running{engine="0",model_name="demo",queue="1"} 3.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 1.0
"""


def test_the_policys_state_is_read_from_metrics() -> None:
    state = parse_state(EXPOSITION)
    assert state == PolicyState((0.25,), (300, 200), (5, 3), Counter(squashes=3, admissions=60))
    assert "2 queues" in state.describe() and "up to 0.25: 300 tokens, 5 seats" in state.describe()
    later = parse_state(EXPOSITION.replace("60.0", "100.0").replace("} 3.0", "} 5.0", 1))
    assert later.since(state) == {"squashes": 2, "admissions": 40}
    with pytest.raises(LoadError, match="nothing of our queues"):
        parse_state("# TYPE x gauge\nx 1.0\n")


def figures(ms: float, late: bool = False) -> dict[str, Any]:
    statistics = {"mean_ms": ms, "p50_ms": ms, "p99_ms": 3 * ms}
    group = {"ttft": statistics, "queued": statistics}
    by_class = {name: group for name in ("small", "medium", "large")}
    doubt = {"client_late": late, "lateness": {"p99_ms": 70.0}}
    return {**group, "by_class": by_class, "failed": 0, "squash_share": 0.04, **doubt}


def test_the_table_has_a_row_for_each_scheduler() -> None:
    text = schedulers.table("low", 3.25, {"chameleon": figures(100), "fifo": figures(200, late=True)})
    row = next(line for line in text.splitlines() if line.startswith("  chameleon"))
    assert row.split() == ["chameleon", *["100", "300", "100"] * 4, "4.0%", "0"]
    assert "3.25 requests/s" in text and "CLIENT LATE by 70 ms" in text


def test_the_plot_of_schedulers_is_an_image(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    loads = [
        {"target": name, "level": level, **figures(100)} for name in ("fifo", "sjf") for level in ("low", "overload")
    ]
    schedulers.draw(tmp_path / "p.png", {"loads": loads})
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_of_loads_is_an_image(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    times = {"mean_ms": 5.0, "p50_ms": 4.0, "p99_ms": 9.0}
    group = {metric: times for metric in ("ttft", "tbt", "e2e")}
    by_class = {name: group for name in ("small", "medium", "large")}
    loads = [
        {**group, "target": target, "rate_per_s": rate, "client_late": rate > 1, "by_class": by_class}
        for target in ("x", "y")
        for rate in (2.0, 1.0)
    ]
    plot(tmp_path / "p.png", loads, {"metric": "ttft", "limit_s": 1.0, "percent": 99.0})
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_is_refused_before_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert schedulers.run(parsed(schedulers.add_arguments, "--plot", str(tmp_path / "x.png"))) == 1
    assert "pip install 'chameleon-ray[bench]'" in capsys.readouterr().err


def test_the_summary_tells_ratios() -> None:
    found = {name: {"held_per_s": rate} for name, rate in (("stock", 0.5), ("fifo+lru", None), ("chameleon", 10.0))}
    text = "\n".join(capacity.summary(found))
    assert "chameleon holds 20.00 times the load of stock" in text
    assert "none" in text and "times the load of fifo+lru" not in text
