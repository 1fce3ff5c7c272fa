"""Requests and adapters that are wrong: a clear 4xx each, and nobody else notices."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import scaled_adapter, widened_adapter
from safetensors.numpy import load_file, save_file

from chameleon_ray.adapters.sources import CONFIG_FILE, WEIGHTS_FILE
from live.calls import complete, completion, error_of, stream, text_of
from live.service import Service, wait_for

OTHER = "demo-r8-00"
NAME = "broken"


@pytest.fixture(autouse=True)
def engine_unharmed(service: Service) -> Iterator[None]:
    """After each test the same replicas answer as before."""
    before = [(process.pid, process.create_time()) for process in service.replica_processes()]
    yield
    text_of(complete(service, OTHER))
    text_of(complete(service, service.base))
    assert [(process.pid, process.create_time()) for process in service.replica_processes()] == before


@pytest.mark.parametrize("model", [OTHER, "chameleon-demo"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"prompt": {"text": "no"}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [10] * 5000}, "context length"),
        ({"stop": 5}, "stop"),
        ({"n": 0}, "n"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_wrong_fields(service: Service, model: str, fields: dict[str, Any], message: str, streamed: bool) -> None:
    response = service.http.post("/v1/completions", json=completion(model) | fields | {"stream": streamed})
    assert message in error_of(response, 400)["message"]


def test_token_that_does_not_exist(service: Service) -> None:
    body = completion(OTHER, prompt=[10**9])
    assert "vocabulary" in error_of(service.http.post("/v1/completions", json=body), 400)["message"]
    # vLLM begins a stream before it looks at the tokens: the error is in the stream.
    assert stream(service, body).error["code"] == 400


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"nonsense", b'{"model": "a\xff"}', b"[" * 100_000])
def test_malformed_json(service: Service, path: str, body: bytes) -> None:
    error_of(service.http.post(path, content=body, headers={"Content-Type": "application/json"}), 400)


@pytest.mark.parametrize("messages", [None, [], "hello", [{"content": "hello"}], [5]])
def test_wrong_messages(service: Service, messages: Any) -> None:
    body = {"model": OTHER, "messages": messages, "max_tokens": 4}
    error_of(service.http.post("/v1/chat/completions", json=body), 400)


@pytest.mark.parametrize("model", ["no-such-model", "chameleon-demo:no-such", "chameleon-demo:", ":", "../../etc", "ü"])
@pytest.mark.parametrize("streamed", [False, True])
def test_unknown_model(service: Service, model: str, streamed: bool) -> None:
    body = completion(model) | {"stream": streamed}
    error = error_of(service.http.post("/v1/completions", json=body), 404)
    assert error["type"] == "NotFoundError"
    assert model in error["message"]


@pytest.mark.parametrize("field", ["lora_path", "lora_name", "lora_request", "adapter_id"])
@pytest.mark.parametrize("streamed", [False, True])
def test_the_base_model_never_answers_for_an_adapter_named_elsewhere(
    service: Service, field: str, streamed: bool
) -> None:
    for given in (completion(service.base), {"prompt": "Hello", "max_tokens": 4}):
        error = error_of(service.http.post("/v1/completions", json=given | {field: OTHER, "stream": streamed}), 400)
        assert error["param"] == field and "'model'" in error["message"] and "the base model" in error["message"]
    chat = {"model": OTHER, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "stream": streamed}
    error = error_of(service.http.post("/v1/chat/completions", json=chat | {field: "demo-r16-01"}), 400)
    assert error["param"] == field and OTHER in error["message"]
    for harmless in (OTHER, None):
        assert service.http.post("/v1/chat/completions", json=chat | {field: harmless}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/embeddings", 404),
        ("GET", "/", 404),
        ("GET", "/nothing/here", 404),
        ("GET", "/v1/completions", 405),
    ],
)
def test_unknown_routes(service: Service, method: str, path: str, status: int) -> None:
    assert f"{method} {path}" in error_of(service.http.request(method, path), status)["message"]


@pytest.mark.parametrize("model", [5, ["a"], {"name": "a"}, True])
def test_model_of_a_wrong_type(service: Service, model: Any) -> None:
    error_of(service.http.post("/v1/completions", json=completion(model)), 400)


def test_body_that_is_too_large(service: Service) -> None:
    body = completion(OTHER, prompt="a" * (17 * 2**20))
    error_of(service.http.post("/v1/completions", json=body), 413)


def missing(folder: Path) -> Path:
    shutil.rmtree(folder)
    return folder


def without_config(folder: Path) -> Path:
    (folder / CONFIG_FILE).unlink()
    return folder


def truncated(folder: Path) -> Path:
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    return folder


def pickled(folder: Path) -> Path:
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    return folder


def of_another_base(folder: Path) -> Path:
    weights = load_file(folder / WEIGHTS_FILE)
    wider = {name: np.tile(array, (1, 2)) if "lora_A" in name else array for name, array in weights.items()}
    save_file(wider, folder / WEIGHTS_FILE)
    return folder


def with_other_modules(folder: Path) -> Path:
    weights = load_file(folder / WEIGHTS_FILE)
    save_file({name.replace("q_proj", "query"): array for name, array in weights.items()}, folder / WEIGHTS_FILE)
    return folder


def over_the_rank_bound(folder: Path) -> Path:
    return widened_adapter(folder, folder.parent / "wide", 65)


def not_finite(folder: Path) -> Path:
    weights = load_file(folder / WEIGHTS_FILE)
    next(iter(weights.values()))[0, 0] = np.nan
    save_file(weights, folder / WEIGHTS_FILE)
    return folder


def outside(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.parents[1] / "outside", dirs_exist_ok=True))


def by_dots(folder: Path) -> Path:
    return folder.parent / ".." / outside(folder).name


def by_symlink(folder: Path) -> Path:
    link = folder.parent / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(outside(folder))
    return link


def weights_by_symlink(folder: Path) -> Path:
    elsewhere = outside(folder) / WEIGHTS_FILE
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).symlink_to(elsewhere)
    return folder


def system_folder(_: Path) -> Path:
    return Path("/etc")


@pytest.mark.parametrize(
    ("broken", "status", "kind", "message"),
    [
        (missing, 404, "adapter_not_found", "no such folder"),
        (without_config, 400, "adapter_invalid", CONFIG_FILE),
        (truncated, 400, "adapter_invalid", "not a whole safetensors file"),
        (pickled, 400, "adapter_invalid", "only safetensors"),
        (of_another_base, 400, "adapter_invalid", "another base model"),
        (with_other_modules, 400, "adapter_invalid", "another base model"),
        (over_the_rank_bound, 413, "adapter_too_large", "adapters.max_rank = 512"),
        (not_finite, 400, "adapter_invalid", "NaN"),
        (outside, 403, "adapter_path_not_allowed", "outside"),
        (by_dots, 403, "adapter_path_not_allowed", "outside"),
        (by_symlink, 403, "adapter_path_not_allowed", "outside"),
        (weights_by_symlink, 403, "adapter_path_not_allowed", "outside"),
        (system_folder, 403, "adapter_path_not_allowed", "outside"),
    ],
)
def test_adapters_that_cannot_be_served(
    service: Service, broken: Callable[[Path], Path], status: int, kind: str, message: str
) -> None:
    folder = service.uploads / NAME
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(service.demo.adapters / OTHER, folder)
    names = service.adapter_names()
    path = broken(folder)
    error = error_of(service.load(NAME, path), status)
    assert error["type"] == kind
    assert message in error["message"]
    assert service.adapter_names() == names
    error_of(complete(service, NAME), 404)
    error_of(service.load(OTHER, path, load_inplace=True), status)
    assert service.http.get(f"/v1/models/{OTHER}").json()["root"] == str(service.demo.adapters / OTHER)


@pytest.mark.parametrize("path", ["ftp://host/adapter", "relative", "\0", "/" + "a" * 5000, "file://elsewhere/adapter"])
def test_paths_that_are_none(service: Service, path: str) -> None:
    response = service.load(NAME, path)
    error_of(response, response.status_code)
    assert response.status_code in (400, 403, 404)


def deleted(folder: Path) -> None:
    shutil.rmtree(folder)


def corrupted(folder: Path) -> None:
    truncated(folder)


@pytest.mark.parametrize(
    ("harm", "status", "kind"), [(deleted, 404, "adapter_not_found"), (corrupted, 409, "adapter_changed")]
)
def test_an_adapter_that_is_lost_after_its_registration_fails_alone(
    service: Service, harm: Callable[[Path], None], status: int, kind: str
) -> None:
    shutil.rmtree(service.uploads / NAME, ignore_errors=True)
    folder = scaled_adapter(service.demo.adapters / OTHER, service.uploads / NAME, 0.7 if harm is deleted else 0.6)
    stored = set(service.store.iterdir())
    assert service.load(NAME, folder).status_code == 200
    try:
        (copy,) = set(service.store.iterdir()) - stored
        harm(folder)
        shutil.rmtree(copy)
        # A replica still counts on its copy for a moment. An engine with the adapter in memory would serve it.
        wait_for(lambda: complete(service, NAME).status_code == status, "the loss shows", 60.0, 2.0)
        error = error_of(complete(service, NAME), status)
        assert error["type"] == kind
        streamed = stream(service, completion(NAME))
        assert (streamed.status, streamed.error["type"], streamed.texts) == (status, kind, [])
        text_of(complete(service, OTHER))

        scaled_adapter(service.demo.adapters / OTHER, folder, 0.7 if harm is deleted else 0.6)
        wait_for(lambda: complete(service, NAME).status_code == 200, "the restored adapter serves", 60.0, 0.5)
        whole = text_of(complete(service, NAME))
        harm(folder)
        assert text_of(complete(service, NAME)) == whole, "what is in memory, and the node's own copy, serve"
    finally:
        service.unload(NAME)


def test_an_adapter_that_breaks_behind_validation_says_why_and_when_to_come_back(service: Service) -> None:
    shutil.rmtree(service.uploads / NAME, ignore_errors=True)
    folder = scaled_adapter(service.demo.adapters / OTHER, service.uploads / NAME, 0.55)
    stored = set(service.store.iterdir())
    assert service.load(NAME, folder).status_code == 200
    try:
        (copy,) = set(service.store.iterdir()) - stored
        weights = copy / WEIGHTS_FILE
        os.truncate(weights, weights.stat().st_size // 2)  # found valid a moment ago; the engine has not read it yet
        chat = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        for path, body in (("/v1/completions", completion(NAME)), ("/v1/chat/completions", chat)):
            for streamed in (False, True):
                response = service.http.post(path, json=body | {"stream": streamed})
                error = error_of(response, 503)
                assert (error["type"], error["param"]) == ("adapter_load_failed", "model")
                assert NAME in error["message"] and "truncated or damaged" in error["message"], error
                assert 1 <= int(response.headers["Retry-After"]) <= 5
                text_of(complete(service, OTHER))
        wait_for(lambda: any(replica["failed"] for replica in service.placement()), "placement says so")
    finally:
        service.unload(NAME)
        shutil.rmtree(copy)
