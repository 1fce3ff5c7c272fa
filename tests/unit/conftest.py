"""What takes long to make and needs one core only: it is made in another process while tests go on."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest
from forked import FORKED

OLDER_PROCESSORS = ("x86-64-v3", "x86-64")


def _build(arch: str, cache: Path) -> Path:
    from chameleon_kernels import cpu_build  # brings torch

    os.environ[cpu_build.CACHE_ENV] = str(cache)
    return cpu_build.build(arch)


@pytest.fixture(scope="session")
def older_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, "Future[Path]"]]:
    """The compiled CPU kernel by the kind of processor."""
    cache = tmp_path_factory.mktemp("older-kernels")
    with ProcessPoolExecutor(1, mp_context=FORKED) as process:
        yield {arch: process.submit(_build, arch, cache) for arch in OLDER_PROCESSORS}
