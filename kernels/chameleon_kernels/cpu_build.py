"""Builds and loads the compiled CPU kernel at first use.

The library is cached per user, keyed by all that it depends on: source, compiler and its flags, the processor's
features (home directories are shared between machines), and torch (whose OpenMP runtime it uses). Processes that start
together build it once: one holds a file lock, the others wait and find the result, which appears by an atomic rename.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "paged_lora.cpp"
CACHE_ENV = "CHAMELEON_KERNELS_CACHE"
COMPILE_TIMEOUT_S = 300
# OpenMP is compiled in but not linked: its symbols must resolve to the one runtime that torch has already loaded.
COMPILE_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-fopenmp", "-w")


class KernelBuildError(RuntimeError):
    """The compiled kernel cannot be had on this machine; the message says why."""


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernel; None, after one logged warning, if it cannot be built or loaded. Decided once a process."""
    try:
        return load(build())
    except (KernelBuildError, OSError) as error:
        logger.warning(
            "The compiled CPU LoRA kernel is not available, so a slower torch path is used: %s. "
            "Install g++ (or set CXX) and make %s writable to have it.",
            error,
            cache_dir(),
        )
        return None


def cache_dir() -> Path:
    """$CHAMELEON_KERNELS_CACHE, or chameleon_kernels in the user's cache folder."""
    if os.environ.get(CACHE_ENV):
        return Path(os.environ[CACHE_ENV])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chameleon_kernels"


def build(arch: str = "native") -> Path:
    """Path of the library for this machine, compiling it if it is not cached. `arch`: the compiler's -march, an empty
    string for its default. Raises KernelBuildError, or OSError when the cache folder cannot be written.
    """
    compiler = _compiler()
    flags = [*COMPILE_FLAGS, *([f"-march={arch}"] if arch else [])]
    target = cache_dir() / f"paged_lora-{_key(compiler, flags)}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Released when the file closes, also if this process dies.
        if not target.exists():
            _compile(compiler, flags, target)
    return target


def load(path: Path) -> ctypes.CDLL:
    """Load a built library; raises KernelBuildError if a symbol (OpenMP's, say) is missing from this process."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelBuildError(f"cannot load {path}: {error}") from error
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.chameleon_paged_lora.restype = integer
    library.chameleon_paged_lora.argtypes = [
        *(integer, pointer, long, pointer, long, pointer),  # steps, x, x_stride, y, y_stride, kv
        *(pointer, long, long),  # meta, max_adapters, num_tokens
        *(long, long, long, long, long, pointer),  # first_slice .. num_pieces, widths
        *(pointer, long, long),  # h, h_slice_stride, h_token_stride
        *(integer, integer, integer),  # x_dtype, w_dtype, num_threads
    ]
    return library


def _compiler() -> str:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for name in wanted:
        if found := shutil.which(name):
            return found
    raise KernelBuildError(f"no C++ compiler found (looked for {', '.join(wanted)})")


def _key(compiler: str, flags: list[str]) -> str:
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelBuildError(f"{compiler} --version failed: {error}") from error
    parts = [SOURCE.read_text(), version, " ".join(flags), torch.__version__, platform.machine(), _cpu_flags()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _cpu_flags() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def _compile(compiler: str, flags: list[str], target: Path) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.stem, suffix=".tmp")
    os.close(handle)
    try:
        command = [compiler, *flags, "-c", str(SOURCE), "-o", name + ".o"]
        _run(command)
        _run([compiler, "-shared", name + ".o", "-o", name])
        os.replace(name, target)
    finally:
        for leftover in (name, name + ".o"):
            Path(leftover).unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelBuildError(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise KernelBuildError(f"{' '.join(command)} failed: {'; '.join(errors[:3])}")
