"""What an engine's process does to logging."""

import subprocess
import sys

IMPORT_AND_WARN = """
import logging
import chameleon_ray.engine.server
logging.getLogger("chameleon_ray.adapters.store").warning("still heard")
"""


def test_warnings_are_heard_beside_vllm() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_AND_WARN], capture_output=True, text=True, check=True)
    assert "still heard" in done.stderr
