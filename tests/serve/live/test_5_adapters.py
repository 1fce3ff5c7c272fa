"""Loading, replacing and unloading adapters while the application serves."""

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from adapter_files import scaled_adapter

from chameleon_ray.adapters.sources import CONFIG_FILE, WEIGHTS_FILE, LocalSource
from chameleon_ray.adapters.store import AdapterStore, content_digest
from live.calls import Stream, complete, completion, concurrently, error_of, stream, text_of
from live.reference import Reference
from live.service import OVERSIZED, Service, wait_for

NAME = "uploaded"
LONG_PROMPT = [10 + (7 * place) % 580 for place in range(300)]
"""More than two of the CPU engine's KV blocks, so that there is something to find in the prefix cache."""


@pytest.fixture(scope="module")
def reference(shared_service: Service) -> Reference:
    return Reference(shared_service.demo.model)


@pytest.fixture
def upload(service: Service) -> Iterator[Path]:
    """An adapter in a folder that run-time loads may read; nothing of that name is left loaded."""
    folder = scaled_adapter(service.demo.adapters / "demo-r32-02", service.uploads / NAME, 0.9)
    yield folder
    service.unload(NAME)
    shutil.rmtree(folder, ignore_errors=True)


def expect(reference: Reference, folder: Path, prompt: list[int], response: Any) -> None:
    """Fails unless ``response`` is the answer of the adapter in ``folder``."""
    choice = response.json()["choices"][0]
    expected = reference.answer(folder, prompt, len(choice["token_ids"]))
    expected.check(choice["token_ids"], choice["logprobs"]["token_logprobs"])


def ask(service: Service, prompt: list[int], num_tokens: int = 8) -> Any:
    return complete(service, NAME, prompt=prompt, max_tokens=num_tokens, logprobs=1, return_token_ids=True)


def test_a_loaded_adapter_is_served_by_every_replica_at_once(
    service: Service, upload: Path, reference: Reference
) -> None:
    error_of(complete(service, NAME), 404)
    loaded = service.load(NAME, upload)
    assert (loaded.status_code, loaded.text) == (200, f"Success: LoRA adapter '{NAME}' added successfully.")
    assert NAME in service.adapter_names()
    prompt = LONG_PROMPT[:10]
    for response in concurrently([partial(ask, service, prompt)] * 16, clients=16):
        assert response.status_code == 200, response.text
        assert response.json()["model"] == NAME
        expect(reference, upload, prompt, response)
    wait_for(lambda: all(NAME in replica["adapters"] for replica in service.placement()), "every replica holds it")
    card = service.http.get(f"/v1/models/{NAME}").json()
    assert (card["parent"], card["root"]) == (service.base, str(upload))


def test_disk_is_what_the_nodes_store_holds_and_memory_keeps_its_files(service: Service, upload: Path) -> None:
    """Another application on the node, whose store has room for a single adapter, evicts what it may."""
    scaled_adapter(service.demo.adapters / "demo-r32-02", upload, 0.77)  # Content that no engine has in memory.
    assert service.load(NAME, upload).status_code == 200
    digest, scales = content_digest(upload), count(0.5, 0.01)
    wait_for(lambda: {replica["adapters"].get(NAME) for replica in service.placement()} == {"disk"}, "on disk")

    def evicted() -> bool:
        newcomer = scaled_adapter(service.demo.adapters / "demo-r32-02", service.uploads / "newcomer", next(scales))
        size_bytes = sum((newcomer / file).stat().st_size for file in (CONFIG_FILE, WEIGHTS_FILE))
        other = AdapterStore(service.store, size_bytes)
        other.add(LocalSource([newcomer]), str(newcomer), lambda _: None, max_bytes=1 << 30)
        return not (service.store / digest).exists()

    wait_for(evicted, "no replica holds the files of an adapter that was tried and not used", 30.0)

    def shown() -> dict[str, set[str]]:
        tiers: dict[str, set[str]] = {}
        for replica in service.placement():
            for name, tier in replica["adapters"].items():
                tiers.setdefault(tier, set()).add(name)
        return tiers

    wait_for(lambda: NAME not in shown().get("disk", ()), "placement shows on disk nothing that is not there")
    assert shown().get("disk", set()) <= set(service.demo.adapter_names()), "what the catalog does not name is nobody's"
    for name in (shown().get("gpu", set()) | shown().get("host", set())) & set(service.demo.adapter_names()):
        stored = service.store / content_digest(service.demo.adapters / name)
        assert stored.exists(), f"{name} is in memory, and a request for it would have to fetch it"
    text_of(complete(service, NAME))  # fetched from its source again
    wait_for(lambda: all(NAME in replica["adapters"] for replica in service.placement()), "it is there again")


def test_what_is_replaced_and_unloaded_is_forgotten_by_every_replica(service: Service, upload: Path) -> None:
    for version in range(3):
        scaled_adapter(service.demo.adapters / "demo-r32-02", upload, 0.5 + 0.1 * version)
        assert service.load(NAME, upload, load_inplace=True).status_code == 200
        for response in concurrently([partial(complete, service, NAME)] * 8, clients=8):
            text_of(response)
    assert service.unload(NAME).status_code == 200
    names = set(service.adapter_names())

    def placed() -> set[str]:
        return {name for replica in service.placement() for name in replica["adapters"]}

    wait_for(lambda: placed() <= names, "placement has forgotten what no name stands for")

    def all_known() -> list[int]:
        replicas = service.http.get("/v1/chameleon/queues").json()["replicas"]
        return [replica["cache"]["adapters_known"] for replica in replicas if "cache" in replica]

    wait_for(lambda: max(all_known()) <= len(names), "the engines know no more adapters than the catalog names")


def test_an_adapter_too_large_for_the_engines_is_refused_and_harms_nothing(service: Service) -> None:
    """Host memory has no room for it, ever: neither at the start, nor at a load, nor for a request."""
    [preload] = service.adapters_config["preload"]
    assert preload["name"] == OVERSIZED
    engines = [service.engine_processes(replica) for replica in service.replica_processes()]
    error = error_of(complete(service, OVERSIZED), 413)
    assert error["type"] == "adapter_too_large" and "bytes of host memory" in error["message"]
    assert error_of(service.http.get(f"/v1/models/{OVERSIZED}"), 413)["message"] == error["message"]
    refused = service.http.get("/v1/chameleon/placement").json()["refused"]
    assert refused.keys() == {OVERSIZED} and refused[OVERSIZED] in error["message"]

    for name in (NAME, OVERSIZED):
        for _ in range(2):  # What was refused before is tried again, as somebody asked for just that.
            error = error_of(service.load(name, preload["uri"]), 413)
            assert error["type"] == "adapter_too_large" and "bytes of host memory" in error["message"]
    assert not {NAME, OVERSIZED} & set(service.adapter_names())
    error_of(complete(service, NAME), 404)
    error_of(service.unload(NAME), 404)
    for response in concurrently([partial(complete, service, "demo-r32-02")] * 8, clients=8):
        text_of(response)
    assert [service.engine_processes(replica) for replica in service.replica_processes()] == engines
    digest = content_digest(Path(preload["uri"]))
    wait_for(  # A report may have been made while it was being refused.
        lambda: not any(digest in replica["failed"] for replica in service.placement()),
        "nobody can ask for it: nothing of it is kept",
    )


def test_file_uri(service: Service, upload: Path) -> None:
    assert service.load(NAME, upload.as_uri()).status_code == 200
    text_of(complete(service, NAME))


def test_a_name_is_taken_until_it_is_unloaded(service: Service, upload: Path) -> None:
    responses = concurrently([partial(service.load, NAME, upload)] * 4, clients=4)
    assert sorted(response.status_code for response in responses) == [200, 400, 400, 400]
    error = error_of(service.load(NAME, upload), 400)
    assert error["type"] == "InvalidUserInput"
    assert error["message"] == (
        f"The lora adapter '{NAME}' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True."
    )

    unloaded = service.unload(NAME)
    assert (unloaded.status_code, unloaded.text) == (200, f"Success: LoRA adapter '{NAME}' removed successfully.")
    assert NAME not in service.adapter_names()
    for response in concurrently([partial(complete, service, NAME)] * 8, clients=8):
        assert error_of(response, 404)["type"] == "NotFoundError"
    error = error_of(service.unload(NAME), 404)
    assert (error["type"], error["message"]) == ("NotFoundError", f"The lora adapter '{NAME}' cannot be found.")
    assert service.load(NAME, upload).status_code == 200


def test_unloading_lets_running_requests_end(service: Service, upload: Path) -> None:
    body = completion(NAME, max_tokens=300)
    assert service.load(NAME, upload).status_code == 200
    whole = text_of(complete(service, NAME, max_tokens=300))
    with Background(service, body) as running:
        assert service.unload(NAME).status_code == 200
        assert running.seen.ended == "cut", "the stream ended before the adapter was unloaded"
        error_of(complete(service, NAME), 404)
    assert (running.seen.ended, running.seen.text) == ("done", whole)


def test_load_inplace_replaces_and_never_serves_the_old_kv(
    service: Service, upload: Path, reference: Reference
) -> None:
    assert service.load(NAME, upload).status_code == 200
    hits = service.metric("ray_vllm_prefix_cache_hits_total")
    old = [ask(service, LONG_PROMPT) for _ in range(4)]
    for response in old:
        expect(reference, upload, LONG_PROMPT, response)

    newer = scaled_adapter(service.demo.adapters / "demo-r128-04", service.uploads / "newer", 0.8)
    replaced = service.load(NAME, newer, load_inplace=True)
    assert (replaced.status_code, replaced.text) == (200, f"Success: LoRA adapter '{NAME}' added successfully.")
    responses = concurrently([partial(ask, service, LONG_PROMPT)] * 8, clients=8)
    for response in responses:
        expect(reference, newer, LONG_PROMPT, response)
    assert text_of(responses[0]) != text_of(old[0])
    wait_for(
        lambda: service.metric("ray_vllm_prefix_cache_hits_total") > hits, "the prefix cache was of use at all", 30.0
    )


def test_load_inplace_rereads_a_folder_whose_content_changed(
    service: Service, upload: Path, reference: Reference
) -> None:
    assert service.load(NAME, upload).status_code == 200
    expect(reference, upload, LONG_PROMPT, ask(service, LONG_PROMPT))
    scaled_adapter(service.demo.adapters / "demo-r8-05", upload, 0.9)
    assert service.load(NAME, upload, load_inplace=True).status_code == 200
    again = scaled_adapter(service.demo.adapters / "demo-r8-05", service.uploads / "again", 0.9)
    expect(reference, again, LONG_PROMPT, ask(service, LONG_PROMPT))


def test_a_stream_that_runs_during_a_replacement_ends_on_the_old_version(service: Service, upload: Path) -> None:
    body = completion(NAME, max_tokens=500)
    newer = service.demo.adapters / "demo-r64-03"
    assert service.load(NAME, upload).status_code == 200
    whole = text_of(complete(service, NAME, max_tokens=500))
    with Background(service, body) as running:
        assert service.load(NAME, newer, load_inplace=True).status_code == 200
        new = text_of(complete(service, NAME, max_tokens=8))
        assert running.seen.ended == "cut", "the stream ended before the adapter was replaced"
    assert (running.seen.ended, running.seen.text) == ("done", whole)
    assert new == text_of(complete(service, "demo-r64-03", max_tokens=8))
    assert not whole.startswith(new)


@pytest.mark.parametrize(
    ("headers", "status", "kind"),
    [
        ({"Host": "attacker.example"}, 403, "permission_error"),
        ({"X-Forwarded-For": "10.0.0.1"}, 403, "permission_error"),
        ({"Content-Type": "text/plain"}, 415, "invalid_request_error"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_adapter_management_is_closed_to_web_pages_and_other_machines(
    service: Service, upload: Path, path: str, headers: dict[str, str], status: int, kind: str
) -> None:
    body = f'{{"lora_name": "{NAME}", "lora_path": "{upload}"}}'
    response = service.http.post(path, content=body, headers={"Content-Type": "application/json"} | headers)
    assert error_of(response, status)["type"] == kind
    assert NAME not in service.adapter_names()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lora_name": NAME},
        {"lora_path": "/x"},
        {"lora_name": 5, "lora_path": "/x"},
        {"lora_name": "", "lora_path": "/x"},
        {"lora_name": "../etc", "lora_path": "/x"},
        {"lora_name": "a b", "lora_path": "/x"},
        {"lora_name": "chameleon-demo", "lora_path": "/x"},
    ],
)
def test_load_with_wrong_fields(service: Service, fields: dict[str, Any]) -> None:
    error_of(service.http.post("/v1/load_lora_adapter", json=fields), 400)


class Background:
    """A stream read in a thread: entered once its first text is here, left when it has ended."""

    def __init__(self, service: Service, body: Any):
        self.seen = Stream()
        self._thread = threading.Thread(target=stream, args=(service, body, self.seen))

    def __enter__(self) -> "Background":
        self._thread.start()
        wait_for(lambda: self.seen.texts, "the stream's first text", 60.0, 0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
