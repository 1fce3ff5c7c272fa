"""``chameleon serve`` with a configuration that cannot start."""

import os
import subprocess
import sys
from pathlib import Path

import yaml
from live.service import REPO, START_LIMIT_S

from chameleon_ray.redis_server import free_port


def test_a_start_that_fails_ends_with_the_reason(tmp_path: Path) -> None:
    config = yaml.safe_load((REPO / "cluster_configs/local.yaml").read_text())
    config["http_options"]["port"] = free_port()
    config["applications"][0]["args"]["model"]["source"] = str(tmp_path / "nowhere")
    file = tmp_path / "local.yaml"
    file.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [str(Path(sys.executable).parent / "chameleon"), "serve", str(file)],
        env={name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OMP_"))},
        cwd=REPO,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_LIMIT_S,  # less than the launcher waits for an application that may still start
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: the application `chameleon` cannot start.\n" in done.stderr
    assert f"ConfigError: model.source: {tmp_path / 'nowhere'} has no config.json on this node\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.endswith("stopping\nstopped\n")
