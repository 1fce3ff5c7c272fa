"""Building the compiled CPU kernel: caching, processes that start together, and doing without."""

import logging
import os
import shutil
import stat
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from chameleon_kernels import apply_lora, cpu_implementation
from chameleon_kernels.testing import check_against_reference, make_batch, make_layer
from forked import FORKED

LIMIT_S = 900.0
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the compiled kernel needs g++")


def compute(pipe: Connection, environment: dict[str, str]) -> None:
    """What a process does at its first use of the kernel: it sends the implementation's name and what was logged."""
    os.environ |= environment
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("chameleon_kernels").addHandler(handler)
    layer = make_layer([8, 24])
    check_against_reference(apply_lora, layer, make_batch(layer, [0, 1, -1, 1]), torch.float32)
    pipe.send((cpu_implementation(), warnings))


def start(cache: Path, **environment: str) -> tuple[BaseProcess, Connection]:
    ours, theirs = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=compute, args=(theirs, {"CHAMELEON_KERNELS_CACHE": str(cache)} | environment))
    process.start()
    theirs.close()  # so that the pipe ends with the process
    return process, ours


def finish(started: tuple[BaseProcess, Connection]) -> tuple[str, list[str]]:
    """The name of the implementation that computed, and the warnings logged."""
    process, pipe = started
    assert pipe.poll(LIMIT_S)
    said: tuple[str, list[str]] = pipe.recv()
    process.join(LIMIT_S)
    assert process.exitcode == 0
    return said


def counting_compiler(folder: Path) -> tuple[Path, Path]:
    """A compiler that notes each compilation in a file, and that file."""
    log, compiler = folder / "compilations", folder / "counting-g++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo compiled >> {log};; esac\nexec g++ "$@"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    return compiler, log


@needs_compiler
@pytest.mark.usefixtures("older_kernels")  # for later tests, by the other core
def test_processes_that_start_together_build_once_and_later_ones_not_at_all(tmp_path: Path) -> None:
    compiler, log = counting_compiler(tmp_path)
    cache = tmp_path / "cache"
    together = [start(cache, CXX=str(compiler)) for _ in range(3)]
    assert [finish(process) for process in together] == [("compiled", [])] * 3
    assert finish(start(cache, CXX=str(compiler))) == ("compiled", [])
    assert log.read_text().splitlines() == ["compiled"]
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so"], "leftovers in the cache"


def test_without_a_compiler_results_are_right_and_one_warning_says_why(tmp_path: Path) -> None:
    printed, warnings = finish(start(tmp_path, CXX="/nonexistent/g++"))
    assert printed == "torch"
    assert len(warnings) == 1
    assert "no C++ compiler found (looked for /nonexistent/g++)" in warnings[0] and "Install g++" in warnings[0]


def test_a_compiler_that_fails_and_a_cache_that_cannot_be_written_are_said_aloud(tmp_path: Path) -> None:
    broken = tmp_path / "broken-g++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "error: no such instruction" >&2\nexit 1\n')
    broken.chmod(0o755)
    file_in_the_way = tmp_path / "file"
    file_in_the_way.write_text("")
    runs = [
        (start(tmp_path / "cache", CXX=str(broken)), "no such instruction"),
        (start(file_in_the_way / "cache", CXX=str(broken)), "Not a directory"),
    ]
    for process, reason in runs:
        printed, warnings = finish(process)
        assert printed == "torch" and len(warnings) == 1 and reason in warnings[0]


def test_a_library_that_does_not_load_is_said_aloud(tmp_path: Path) -> None:
    compiler = tmp_path / "careless-g++"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\n[ "$1" = --version ] || echo rubbish > "$last"\n')
    compiler.chmod(0o755)
    printed, warnings = finish(start(tmp_path / "cache", CXX=str(compiler)))
    assert printed == "torch" and len(warnings) == 1 and "cannot load" in warnings[0]
