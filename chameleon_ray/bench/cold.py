"""A cold start: from a request to the first token of an adapter in a bucket, which nobody has seen before.

Adapters of random weights for the random model are put into the bucket, and taken out again at the end. Each is fetched
as a replica does it, beside a plain sequential download of the same two files in the same run; then it is validated,
and a fresh CPU engine with adapters in KV memory answers one token with it, twice: cold, and with the adapter in place.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import load_file, save_file

from chameleon_ray.adapters.access import Sources
from chameleon_ray.adapters.modules import table_of_weights
from chameleon_ray.adapters.remote import RemoteUri
from chameleon_ray.adapters.s3 import open_s3
from chameleon_ray.adapters.sources import CONFIG_FILE, WEIGHTS_FILE, AdapterSource
from chameleon_ray.adapters.store import AdapterStore
from chameleon_ray.adapters.validate import Rules, validate_adapter
from chameleon_ray.config import AdaptersConfig
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.environment import cpu_environment
from chameleon_ray.engine.paged.options import PagedSettings, paged_arguments
from chameleon_ray.random_demo import make_random_demo

MIB = 1 << 20
_BYTES_PER_RANK = 64 << 10
"""Of an adapter of the random model in float32."""
_MAX_RANK = 1 << 13
_CHUNK_BYTES = 1 << 20
STAGES = ("fetch", "validate", "load", "first_step")

_Result = TypeVar("_Result")


@dataclass(slots=True)
class _Timed:
    """A source, and how long it took the last time."""

    source: AdapterSource
    seconds: float = 0.0

    @property
    def remembered_as(self) -> str | None:
        return self.source.remembered_as

    def fingerprint(self, uri: str) -> str:
        return self.source.fingerprint(uri)

    def fetch(self, uri: str, into: Path, *, max_bytes: int) -> str:
        self.seconds, mark = _timed(lambda: self.source.fetch(uri, into, max_bytes=max_bytes))
        return mark


def run(source: str, json_path: Path | None, *, sizes_mib: Sequence[int], repeats: int) -> int:
    """Measure, print and write; exit status 0. source: s3://bucket/path, which may be written. Medians of ``repeats``.

    Raises AdapterError or ValueError.
    """
    place = RemoteUri.parse(source.rstrip("/"))
    if (
        place.scheme != "s3"
        or repeats < 1
        or not all(1 <= size <= _MAX_RANK * _BYTES_PER_RANK // MIB for size in sizes_mib)
    ):
        raise ValueError("give --source s3://bucket/path, --repeats of 1 or more and sizes from 1 to 512 MiB")
    demo = make_random_demo()
    client = open_s3({}, 60.0)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        fetched = {}
        for size in sizes_mib:
            key = f"{place.path}/cold-{os.getpid()}-{size}"
            try:
                _put(client, place.place, key, write_adapter(demo, Path(name, f"made-{size}"), size))
                row, fetched[size] = _fetch(client, f"s3://{place.place}/{key}", demo, Path(name), size, repeats)
            finally:
                for file in (CONFIG_FILE, WEIGHTS_FILE):
                    client.delete_object(Bucket=place.place, Key=f"{key}/{file}")
            rows.append(row)
        for row, times in zip(rows, _answer(demo, fetched), strict=True):
            row |= times
            row["total_s"] = round(sum(row[f"{stage}_s"] for stage in STAGES), 3)
    print(f"\nSeconds from a request to the first token, medians of {repeats}, load {os.getloadavg()[0]:.1f}")
    print(f"{'MiB':>5}" + "".join(f"{name:>12}" for name in (*STAGES, "total", "plain GETs")) + "   fetch is")
    for row in rows:
        cells = [row[f"{name}_s"] for name in (*STAGES, "total", "plain")]
        print(
            f"{row['mib']:>5}" + "".join(f"{cell:>12.3f}" for cell in cells) + f"   {row['fetch_to_plain']:.2f}x plain"
        )
    if json_path is not None:
        json_path.write_text(json.dumps({"rows": rows, "repeats": repeats}, indent=2) + "\n")
    return 0


def write_adapter(demo: DemoPaths, folder: Path, size_mib: int) -> Path:
    """An adapter of about that size for the random model: one of the demo's, repeated to a rank that takes so much."""
    source = demo.adapters / demo.adapter_names()[0]
    config = json.loads((source / CONFIG_FILE).read_text())
    times = max(1, round(size_mib * MIB / _BYTES_PER_RANK / config["r"]))
    weights = load_file(source / WEIGHTS_FILE)
    wide = {name: np.tile(one, (times, 1) if "lora_A" in name else (1, times)) for name, one in weights.items()}
    folder.mkdir()
    save_file(wide, folder / WEIGHTS_FILE)
    rank = times * config["r"]
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"r": rank, "lora_alpha": rank}))
    return folder


def _put(client: Any, bucket: str, key: str, folder: Path) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with open(folder / name, "rb") as file:
            client.put_object(Bucket=bucket, Key=f"{key}/{name}", Body=file)


def _fetch(
    client: Any, uri: str, demo: DemoPaths, folder: Path, size_mib: int, repeats: int
) -> tuple[dict[str, Any], list[str]]:
    """Times of plain downloads and of fetches by turns, and where what was fetched lies."""
    rules = Rules(max_rank=_MAX_RANK, max_bytes=1 << 32)
    table = table_of_weights(demo.model)
    config = AdaptersConfig.model_validate({"sources": [{"uri": f"{uri}/"}, {"uri": uri}]})
    source = _Timed(Sources(config).find(uri))
    plain_s, fetch_s, validate_s, folders = [], [], [], []
    for number in range(repeats + 1):
        plain = _timed(lambda: _download(client, uri, folder / "plain"))[0]
        store = AdapterStore(folder / f"store-{size_mib}-{number}", 1 << 33)
        add = partial(store.add, source, uri, lambda path: validate_adapter(path, table, rules), max_bytes=1 << 32)
        seconds, stored = _timed(add)
        if number == 0:
            continue  # Connections are open from here on, in both.
        plain_s.append(plain)
        fetch_s.append(source.seconds)
        validate_s.append(seconds - source.seconds)
        folders.append(str(stored.folder))
    figures = {
        "mib": size_mib,
        "plain_s": round(statistics.median(plain_s), 3),
        "fetch_s": round(statistics.median(fetch_s), 3),
        "validate_s": round(statistics.median(validate_s), 3),
        "fetch_to_plain": round(statistics.median(map(float.__truediv__, fetch_s, plain_s)), 2),
    }
    return figures, folders


def _download(client: Any, uri: str, folder: Path) -> None:
    """As plain as it gets: each file in one request, written as it comes, and safe on the disk at the end."""
    place = RemoteUri.parse(uri)
    folder.mkdir(exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        body = client.get_object(Bucket=place.place, Key=f"{place.path}/{name}")["Body"]
        with open(folder / name, "wb") as out:
            for chunk in body.iter_chunks(_CHUNK_BYTES):
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())


def _answer(demo: DemoPaths, fetched: dict[int, list[str]]) -> list[dict[str, float]]:
    """``load_s`` and ``first_step_s`` for each size, from an engine in a process of its own."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        task = json.dumps([str(demo.model), list(fetched.values())])
        command = [sys.executable, "-m", "chameleon_ray.bench.cold", task, result.name]
        print("starting an engine ...", flush=True)
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        subprocess.run(command, env=os.environ | cpu_environment(os.cpu_count() or 1) | quiet, check=True)
        times: list[dict[str, float]] = json.load(result)
        return times


def _first_tokens(model: str, sizes: list[list[str]]) -> list[dict[str, float]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    largest = max(Path(folder, WEIGHTS_FILE).stat().st_size for folders in sizes for folder in folders)
    max_rank = 2 * largest // _BYTES_PER_RANK + 8
    settings = PagedSettings(adapter_memory_share=0.8, adapter_host_bytes=4 * largest, max_rank=max_rank)
    llm = LLM(
        model=model,
        dtype="float32",
        max_model_len=512,
        enable_lora=True,
        enforce_eager=True,
        kv_cache_memory_bytes=2 * largest + 64 * MIB,
        enable_prefix_caching=False,
        **paged_arguments(settings),
    )
    params = SamplingParams(temperature=0.0, max_tokens=1)

    def first_token_s(lora: LoRARequest | None) -> float:
        return _timed(lambda: llm.generate("Hello", params, lora_request=lora, use_tqdm=False))[0]

    first_token_s(None)
    found = []
    number = 0
    for folders in sizes:
        cold_s, warm_s = [], []
        for folder in folders:
            number += 1
            lora = LoRARequest(f"cold-{number}", number, folder)
            cold_s.append(first_token_s(lora))
            warm_s.append(first_token_s(lora))
        step_s = statistics.median(warm_s)
        load_s = max(0.0, statistics.median(cold_s) - step_s)
        found.append({"load_s": round(load_s, 3), "first_step_s": round(step_s, 3)})
    return found


def _timed(work: Callable[[], _Result]) -> tuple[float, _Result]:
    began_s = time.perf_counter()
    result = work()
    return time.perf_counter() - began_s, result


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_first_tokens(*json.loads(sys.argv[1]))))
