"""Started engines that tests share: vLLM in this process, so that tests can drive it step by step, and in processes of
its own, as a replica has it."""

import os

# vLLM reads these when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_harness import PagedEngine, Reference
from predictor_logs import encoder_folder, requests, write_log
from served_engine import ServedEngine, paged_engine

from chameleon_ray.demo import DemoPaths
from chameleon_ray.predictor.train import TrainOptions, train


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


@pytest.fixture(scope="session")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained one: yes-or-no questions get short answers, stories long ones."""
    folder = tmp_path_factory.mktemp("predictor")
    train([write_log(folder / "log", requests(400))], encoder_folder(), folder / "out", TrainOptions(buckets=4))
    return folder / "out"


@pytest.fixture(scope="session")
def request_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``served`` puts requests on record."""
    return tmp_path_factory.mktemp("request-log")


@pytest.fixture(scope="session")
def served(demo: DemoPaths, predictor: Path, request_log: Path) -> Iterator[ServedEngine]:
    """An engine with adapters in KV memory, behind vLLM's application."""
    served = paged_engine(demo, predictor, request_log)
    yield served
    served.close()
