"""One started engine for all engine tests: vLLM in this process, so that tests can drive it step by step."""

import os

# vLLM reads these when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from collections.abc import Iterator

import pytest
from engine_harness import PagedEngine, Reference

from chameleon_ray.demo import DemoPaths


@pytest.fixture(scope="session")
def started_engine(demo: DemoPaths) -> Iterator[PagedEngine]:
    engine = PagedEngine(demo.model)
    yield engine
    engine.close()


@pytest.fixture
def engine(started_engine: PagedEngine) -> Iterator[PagedEngine]:
    """The engine, idle and consistent before and after the test."""
    started_engine.settle()
    yield started_engine
    started_engine.abort_all()
    started_engine.settle()


@pytest.fixture(scope="session")
def reference(demo: DemoPaths) -> Reference:
    return Reference(demo)
