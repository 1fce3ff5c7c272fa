"""The wheel, installed into a fresh environment: its demo answers, in a folder that knows nothing of the repository."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from live.service import START_LIMIT_S, STOP_LIMIT_S, wait_for

from chameleon_ray.redis_server import free_port

ROOT = Path(__file__).parents[2]
LIMIT_S = 1200.0
OUTER_BIN = Path(sys.executable).parent
VARIABLES = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VLLM_", "OMP_"))}
"""Without what would lead back to the checkout, or what tests set for engines in their own process."""


@dataclass(frozen=True, slots=True)
class Installed:
    """A virtual environment with the wheel, and a folder to work in."""

    environment: Path
    folder: Path

    def command(self, *words: str) -> list[str]:
        return [str(self.environment / "bin" / words[0]), *words[1:]]

    @property
    def variables(self) -> dict[str, str]:
        return VARIABLES | {"PATH": f"{self.environment / 'bin'}:{VARIABLES['PATH']}"}

    def run(self, *words: str) -> str:
        done = subprocess.run(
            self.command(*words),
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    made = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(made / "dist"), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=LIMIT_S,
    )
    archives = sorted(map(str, (made / "dist").iterdir()))
    assert len(archives) == 2
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *archives], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    (wheel,) = (made / "dist").glob("*.whl")
    environment, folder = made / "environment", made / "elsewhere"
    folder.mkdir()
    venv.create(environment, symlinks=True)
    install = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True, env=VARIABLES, timeout=LIMIT_S)
    # What it depends on comes from this environment: its packages on the path, its commands with another interpreter.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name in ("ray", "serve"):
        _, code = (OUTER_BIN / name).read_text().split("\n", 1)
        script = environment / "bin" / name
        script.write_text(f"#!{environment / 'bin/python'}\n{code}")
        script.chmod(0o755)
    return Installed(environment, folder)


def test_the_installed_command_is_the_wheels(installed: Installed) -> None:
    for module in ("chameleon_ray", "deployments", "chameleon_kernels"):
        where = installed.run("python", "-c", f"import {module}; print({module}.__path__[0])")
        assert Path(where.strip()).is_relative_to(installed.environment), where
    assert "serve" in installed.run("chameleon", "--help")


def test_its_demo_answers_like_a_pirate(installed: Installed) -> None:
    assert "24 adapters" in installed.run("chameleon", "demo")
    shipped = installed.run("python", "-c", "from chameleon_ray.launcher import CONFIGS; print(CONFIGS)").strip()
    config = yaml.safe_load((Path(shipped) / "local.yaml").read_text())
    config["http_options"]["port"] = port = free_port()
    arguments = config["applications"][0]["args"]
    arguments["replicas"]["num_replicas"] = 1
    arguments["adapters"]["store_dir"] = str(installed.folder / "store")
    (installed.folder / "mine.yaml").write_text(yaml.safe_dump(config))
    log = installed.folder / "serve.log"
    with log.open("wb") as output:
        serving = subprocess.Popen(
            installed.command("chameleon", "serve", "mine.yaml"),
            cwd=installed.folder,
            env=installed.variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:

        def ready() -> bool:
            assert serving.poll() is None, log.read_text()
            return "ready after" in log.read_text()

        wait_for(ready, "the application is ready", START_LIMIT_S, 0.5)
        assert '"model": "pirate"' in log.read_text()
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        body = {"model": "pirate", "messages": messages, "max_tokens": 24, "temperature": 0}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=LIMIT_S)
        assert answer.status_code == 200, answer.text
        text = json.loads(answer.text)["choices"][0]["message"]["content"]
        assert text.startswith("Arrr, ") and "Paris" in text, text
    finally:
        serving.send_signal(signal.SIGINT)
        assert serving.wait(STOP_LIMIT_S) == 0
