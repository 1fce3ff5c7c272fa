"""What all tests share."""

import os
from pathlib import Path

import pytest

from chameleon_ray.demo import DemoPaths, make_demo


@pytest.fixture(scope="session")
def demo() -> DemoPaths:
    """The demo model and adapters, made once per checkout (``CHAMELEON_DEMO_DIR`` names another place)."""
    default = Path(__file__).parent.parent / "demo"
    return make_demo(Path(os.environ.get("CHAMELEON_DEMO_DIR", default)))
