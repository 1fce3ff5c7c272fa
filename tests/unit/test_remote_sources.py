"""Buckets and hubs: what is fetched through which troubles, with whose credentials, and what is refused."""

import json
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from object_store import BUCKET, FILES, S3, Hub, Proxy, running_s3, serving

from chameleon_ray.adapters import buckets, remote
from chameleon_ray.adapters.access import Sources
from chameleon_ray.adapters.catalog import AdapterLibrary, Changes
from chameleon_ray.adapters.errors import (
    AdapterChangedError,
    AdapterDeniedError,
    AdapterError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterPathNotAllowedError,
    AdapterSourceError,
    AdapterTooLargeError,
)
from chameleon_ray.adapters.remote import RemoteSource, RemoteUri
from chameleon_ray.config import AdaptersConfig, AppConfig, ConfigError, ModelConfig, ResolveRule

WriteAdapter = Callable[..., Path]
LIMIT = 1 << 26
KEYS = {"type": "s3", "key_id": "env:ACME_KEY", "secret": "env:ACME_SECRET", "region": "us-east-1"}
SECRET = "s3cr3t-of-acme"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture
def proxy(s3: S3) -> Iterator[Proxy]:
    proxy = Proxy(s3.address)
    proxy.start()
    yield proxy
    proxy.stop()


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_KEY", "acme-key")
    monkeypatch.setenv("ACME_SECRET", SECRET)
    monkeypatch.setattr(remote, "PART_BYTES", 50_000)
    monkeypatch.setattr(remote, "_FAST_BYTES_S", 1e30)


def settings(endpoint: str, **more: Any) -> AdaptersConfig:
    options: dict[str, Any] = {
        "credentials": {"acme": KEYS | {"endpoint_url": endpoint}},
        "sources": [{"uri": f"s3://{BUCKET}/", "credentials": "acme"}],
        "source_timeout_s": 60.0,
    }
    return AdaptersConfig.model_validate(options | more)


def source_of(uri: str, config: AdaptersConfig) -> RemoteSource:
    found = Sources(config).find(uri)
    assert isinstance(found, RemoteSource)
    found.sleep = lambda _: None
    return found


@pytest.fixture
def blob(tmp_path: Path, s3: S3, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """An "adapter" of seven parts; no download looks into it."""
    return _blob(s3, tmp_path / "blob", f"of/{request.node.name.partition('[')[0]}", seed=1)


def _blob(s3: S3, folder: Path, key: str, seed: int) -> tuple[str, Path]:
    folder.mkdir(exist_ok=True)
    (folder / FILES[0]).write_text("{}")
    (folder / FILES[1]).write_bytes(random.Random(seed).randbytes(333_333))
    return s3.put(folder, BUCKET, key), folder


def _same(into: Path, folder: Path) -> bool:
    assert sorted(path.name for path in into.iterdir()) == list(FILES), "nothing else"
    return all((into / name).read_bytes() == (folder / name).read_bytes() for name in FILES)


def _fetch(source: RemoteSource, into: Path, max_bytes: int = LIMIT) -> str:
    into.mkdir(exist_ok=True)
    return source.fetch(source.uri, into, max_bytes=max_bytes)


def test_both_files_come_in_parts(blob: tuple[str, Path], proxy: Proxy, tmp_path: Path) -> None:
    uri, folder = blob
    source = source_of(uri, settings(proxy.url))
    assert _fetch(source, tmp_path / "into") == source.fingerprint(uri)
    assert _same(tmp_path / "into", folder)
    assert len(proxy.parts()) == 6, "two from one answer"
    assert {path.rpartition("/")[2] for _, path, _ in proxy.seen} == set(FILES)


@pytest.mark.parametrize("fault", ["slow_down", "truncate", "drop", "flood"])
def test_a_request_that_fails_is_tried_again_alone(
    fault: str, blob: tuple[str, Path], proxy: Proxy, tmp_path: Path
) -> None:
    uri, folder = blob
    failed: set[tuple[str, str, str]] = set()

    def once_each(*what: str) -> str | None:
        if what in failed or (fault == "flood" and what[0] == "HEAD"):
            return None
        failed.add(what)  # type: ignore[arg-type]
        return fault

    proxy.fault = once_each
    _fetch(source_of(uri, settings(proxy.url)), tmp_path / "into")
    assert _same(tmp_path / "into", folder)
    # Half of the first answer, which is for all parts, is enough for the first two.
    assert len(proxy.parts()) == (11 if fault == "truncate" else 12), "all failed once, none was read again"


def test_one_answer_that_comes_fast_is_read_to_its_end(
    blob: tuple[str, Path], proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_FAST_BYTES_S", 0)
    uri, folder = blob
    _fetch(source_of(uri, settings(proxy.url)), tmp_path / "whole")
    assert _same(tmp_path / "whole", folder) and proxy.parts() == [""]

    proxy.seen.clear()
    proxy.fault = lambda method, path, span: (
        "truncate" if method == "GET" and path.endswith("rs") and span in ("", "bytes=150000-333332") else None
    )
    _fetch(source_of(uri, settings(proxy.url)), tmp_path / "cut")
    assert _same(tmp_path / "cut", folder)
    assert proxy.parts() == ["", "bytes=150000-333332", "bytes=200000-333332"], "each from where the last one ended"


def test_a_body_that_stalls_is_given_up(blob: tuple[str, Path], proxy: Proxy, tmp_path: Path) -> None:
    stalled: list[str] = []
    proxy.fault = lambda method, _, span: (
        "stall"
        if method == "GET" and span == "bytes=150000-199999" and not stalled and not stalled.append(span)
        else None
    )
    _fetch(source_of(blob[0], settings(proxy.url, source_timeout_s=4.0, source_attempts=20)), tmp_path / "into")
    assert stalled and _same(tmp_path / "into", blob[1]) and not proxy.release.is_set()


def test_pauses_grow_and_attempts_end(blob: tuple[str, Path], proxy: Proxy, tmp_path: Path) -> None:
    source = source_of(blob[0], settings(proxy.url, source_attempts=6))
    pauses: list[float] = []
    source.sleep, source.rng = pauses.append, lambda: 1.0
    proxy.fault = lambda method, path, _: "slow_down" if method == "GET" and path.endswith("rs") else None
    with pytest.raises(AdapterSourceError, match="after 6 attempts") as caught:
        _fetch(source, tmp_path / "into")
    assert caught.value.http_status == 502
    assert pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2])


def test_a_later_fetch_goes_on_where_the_server_died(
    s3: S3, proxy: Proxy, write_adapter: WriteAdapter, library: Callable[..., AdapterLibrary], tmp_path: Path
) -> None:
    uri = s3.put(write_adapter(tmp_path / "big", rank=128), BUCKET, "of/resume")
    shelf = library(settings(proxy.url, source_attempts=2, store_dir=str(tmp_path / "store")))
    proxy.fault = lambda _method, path, span: (
        "drop" if path.endswith("rs") and span.startswith("bytes=100000-") else None
    )
    with pytest.raises(AdapterSourceError):
        shelf.inspect("a", uri)
    proxy.stop()
    with pytest.raises(AdapterSourceError):
        shelf.inspect("a", uri)
    proxy.fault = lambda *_: None
    proxy.start()
    proxy.seen.clear()
    assert shelf.inspect("a", uri).size_bytes > 100_000
    assert len(proxy.parts()) == 1 and proxy.parts()[0].startswith("bytes=100000-"), "what had come is not read again"


def test_a_change_during_the_download_is_noticed(s3: S3, blob: tuple[str, Path], proxy: Proxy, tmp_path: Path) -> None:
    uri, folder = blob
    key = uri.partition(f"{BUCKET}/")[2]
    changes = [2]

    def change(method: str, path: str, _: str) -> None:
        if method == "GET" and path.endswith(".safetensors") and len(proxy.parts()) == 3 and changes:
            _blob(s3, folder, key, seed=changes.pop())

    proxy.fault = change
    source = source_of(uri, settings(proxy.url))
    mark = _fetch(source, tmp_path / "into")
    assert not changes and _same(tmp_path / "into", folder) and mark == source.fingerprint(uri)

    seeds = iter(range(100, 200))
    proxy.fault = lambda method, path, _: (
        _blob(s3, folder, key, next(seeds)) and None if method == "GET" and path.endswith("rs") else None
    )
    with pytest.raises(AdapterChangedError, match="keep changing"):
        _fetch(source, tmp_path / "never")


def test_the_size_is_bounded_before_anything_is_read(blob: tuple[str, Path], proxy: Proxy, tmp_path: Path) -> None:
    source = source_of(blob[0], settings(proxy.url))
    with pytest.raises(AdapterTooLargeError, match="max_adapter_mib"):
        _fetch(source, tmp_path / "into", max_bytes=333_332)
    assert not proxy.parts()
    _fetch(source, tmp_path / "into", max_bytes=333_333)


def test_missing_things_are_named(s3: S3, blob: tuple[str, Path], tmp_path: Path) -> None:
    config = settings(s3.url)
    with pytest.raises(AdapterNotFoundError, match=r"adapter_config\.json"):
        _fetch(source_of(f"s3://{BUCKET}/of/nothing", config), tmp_path / "into")
    s3.client.put_object(Bucket=BUCKET, Key="of/pickle/adapter_config.json", Body=b"{}")
    s3.client.put_object(Bucket=BUCKET, Key="of/pickle/adapter_model.bin", Body=b"x")
    with pytest.raises(AdapterInvalidError, match="only safetensors"):
        _fetch(source_of(f"s3://{BUCKET}/of/pickle", config), tmp_path / "into")
    with pytest.raises(AdapterNotFoundError):
        rule = [{"uri": "s3://absent/", "credentials": "acme"}]
        _fetch(source_of("s3://absent/a", settings(s3.url, sources=rule)), tmp_path / "into")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://b/../a", "s3://b/a/../c", "s3://b//a", "s3://b/./a", "s3://b//etc/passwd", "s3://b/%2e%2e/a", "s3://b/a%2Fc",
        "s3://KEY:hunter2@b/a", "s3://hunter2@b/a", "s3://b:9000/a", "s3://b/a?X-Amz-Signature=hunter2", "s3://b/a#x",
        "s3://b/a.zip", "s3://b/a.tar.gz", "zip://a::s3://b/a.zip", "s3://b/a b", "s3://b", "s3://b/", "s3://", "s3:///a",
        "s3://b/a@v1", "hf://org", "hf://org/name/sub", "hf://org/name@a/../b", "hf://u:hunter2@org/name", "gs://b/a\\c",
        "http://user:hunter2@host/a", "https://host/a?token=hunter2", "S3://b/a", "memory://b/a", "s3://b/a\n",
    ],
)  # fmt: skip
def test_uris_that_could_mean_something_else_are_refused(uri: str) -> None:
    opened = [{"uri": f"{scheme}://"} for scheme in ("s3", "gs", "az", "hf")]
    with pytest.raises(AdapterInvalidError) as caught:
        Sources(AdaptersConfig.model_validate({"sources": opened})).find(uri)
    assert caught.value.http_status == 400 and "hunter2" not in str(caught.value)


def test_uris() -> None:
    assert RemoteUri.parse("s3://b/a/c/") == RemoteUri("s3", "b", "a/c", None)
    assert RemoteUri.parse("hf://org/name@refs/pr/1") == RemoteUri("hf", "org", "name", "refs/pr/1")


def test_only_rules_open_places(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AdaptersConfig.model_validate(
        {
            "credentials": {"acme": KEYS, "other": KEYS},
            "preload": [{"name": "one", "uri": "s3://pre/one", "credentials": "other"}],
            "sources": [
                {"uri": "s3://b/acme/", "credentials": "acme"},
                {"uri": "s3://b/", "credentials": "other"},
                {"uri": "hf://org/name"},
            ],
            "resolve": [{"pattern": "x-*", "uri": "s3://lazy/x/{name}/v1", "credentials": "acme"}],
        }
    )
    sources = Sources(config)

    def credentials_of(uri: str, named: str | None = None) -> str:
        found = sources.find(uri, named)
        assert isinstance(found, RemoteSource)
        return found.place.partition("|")[0]

    assert credentials_of("s3://b/acme/a") == "acme"
    assert credentials_of("s3://b/acme/a", "other") == credentials_of("s3://b/a") == "other"
    assert credentials_of("s3://lazy/x/a/v1") == "acme" and credentials_of("s3://pre/one") == "other"
    assert credentials_of("hf://org/name@v2") == credentials_of("hf://org/name") == "None"
    refused = [("s3://b-not/a", None), ("s3://pre/two", None), ("s3://lazy/y/a/v1", None), ("s3://b/a", "acme")]
    refused += [("hf://org/name2", None), ("gs://b/a", None), ("s3://b/a", "absent")]
    for uri, named in refused:
        with pytest.raises(AdapterPathNotAllowedError, match="no rule") as caught:
            sources.find(uri, named)
        assert caught.value.http_status == 403


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gcs"), ("az", "azure"), ("s3", "s3")])
def test_a_missing_extra_is_named(scheme: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(buckets._EXTRAS, scheme, ("a_package_that_is_not_installed", extra))
    config = AdaptersConfig.model_validate({"sources": [{"uri": f"{scheme}://b/"}]})
    with pytest.raises(AdapterInvalidError, match=rf'pip install "chameleon-ray\[{extra}\]"'):
        _fetch(source_of(f"{scheme}://b/a", config), tmp_path / "into")


@pytest.fixture
def library(tiny_table: Any, as_future: Any, tmp_path: Path) -> Callable[..., AdapterLibrary]:
    def make(config: AdaptersConfig) -> AdapterLibrary:
        return AdapterLibrary(config, ModelConfig(source="tiny"), as_future(tiny_table))

    return make


def test_sixteen_clients_and_two_replicas_fetch_once(
    s3: S3, proxy: Proxy, library: Callable[..., AdapterLibrary], write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    uri = s3.put(write_adapter(tmp_path / "a"), BUCKET, "once/a")
    config = settings(proxy.url, store_dir=str(tmp_path / "store"))
    replicas = [library(config), library(config)]
    with ThreadPoolExecutor(16) as clients:
        records = list(clients.map(lambda number: replicas[number % 2].inspect("a", uri), range(16)))
    assert len({record.digest for record in records}) == 1 and len(proxy.parts()) == 1
    assert replicas[1].ensure(records[0]).is_dir() and len(proxy.parts()) == 1

    s3.put(write_adapter(tmp_path / "a", seed=1), BUCKET, "once/a")
    changed = replicas[0].inspect("a", uri)
    assert changed.digest != records[0].digest and len(proxy.parts()) == 2
    with pytest.raises(AdapterChangedError):
        library(settings(proxy.url, store_dir=str(tmp_path / "fresh"))).ensure(records[0])


def test_disk_stays_bounded_under_many_names(
    s3: S3, proxy: Proxy, library: Callable[..., AdapterLibrary], write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    names = [f"n{seed}" for seed in range(40)]
    for seed, name in enumerate(names):
        s3.put(write_adapter(tmp_path / name, seed=seed, rank=2), BUCKET, f"many/{name}")
    size = sum((tmp_path / "n0" / file).stat().st_size for file in FILES)
    bound_gib = 10 * size / 2**30
    config = settings(proxy.url, store_dir=str(tmp_path / "store"), store_max_gib=bound_gib, source_attempts=2)
    shelf = library(config)
    rng = random.Random(0)
    proxy.fault = lambda *_: rng.choice(["slow_down", "drop", "truncate"]) if rng.random() < 0.2 else None
    store = tmp_path / "store"

    def client(seed: int) -> int:
        served, choice = 0, random.Random(seed)
        for _ in range(8):
            name = choice.choice(names)
            try:
                with shelf.use(shelf.inspect(name, f"s3://{BUCKET}/many/{name}")) as folder:
                    served += _same(folder, tmp_path / name)
            except AdapterSourceError:
                pass
        return served

    with ThreadPoolExecutor(16) as clients:
        done = [clients.submit(client, seed) for seed in range(16)]
        most = 0
        while not all(future.done() for future in done):
            most = max(most, _used(store))
            time.sleep(0.01)
    assert sum(future.result() for future in done) > 40
    proxy.fault = lambda *_: None
    shelf.inspect("new", s3.put(write_adapter(tmp_path / "new", seed=99, rank=2), BUCKET, "many/new"))
    held = _used(store)
    notes = sum(path.stat().st_size for path in (store / ".known").iterdir())
    assert held - notes <= 11.25 * size, "the bound, and an eighth for what failed fetches have left"
    assert most - notes <= 43.25 * size, "sixteen clients may hold one each, and fetch another"


def _used(store: Path) -> int:
    """Bytes of everything in the store, while others work in it."""
    used = 0
    for folder, _, names in os.walk(store):
        for name in names:
            with suppress(FileNotFoundError):
                used += os.stat(os.path.join(folder, name)).st_size
    return used


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[S3], None]]:
    """Call it with a server: until the test ends it asks who somebody is, and the environment has the right keys."""
    asked = []

    def private(s3: S3) -> None:
        _make_reader(s3, monkeypatch)
        asked.append(s3)
        s3.ask_who_it_is(True)

    yield private
    for s3 in asked:
        s3.ask_who_it_is(False)


def _make_reader(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    iam = s3.boto("iam", "root-key", "root-secret")
    iam.create_user(UserName="reader")
    policy = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
    iam.put_user_policy(
        UserName="reader",
        PolicyName="read",
        PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [policy]}),
    )
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    monkeypatch.setenv("ACME_KEY", key["AccessKeyId"])
    monkeypatch.setenv("ACME_SECRET", key["SecretAccessKey"])


def test_private_buckets_and_changed_secrets(
    s3: S3, blob: tuple[str, Path], reader: Callable[[S3], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "chameleon_ray")
    uri, folder = blob
    secret = tmp_path / "secret"
    keys = KEYS | {"endpoint_url": s3.url, "secret": f"file:{secret}"}
    source = source_of(uri, settings(s3.url, credentials={"acme": keys}))
    reader(s3)
    right = os.environ["ACME_SECRET"]
    said = []
    with pytest.raises(AdapterSourceError, match="secret cannot be read") as missing:
        _fetch(source, tmp_path / "into")
    said.append(missing.value)
    secret.write_text("wrong-but-secret")
    with pytest.raises(AdapterDeniedError) as denied:
        _fetch(source, tmp_path / "into")
    said.append(denied.value)
    assert denied.value.http_status == 403
    secret.write_text(f"{right}\n")
    _fetch(source, tmp_path / "into")
    assert _same(tmp_path / "into", folder), "the changed file is picked up"
    anonymous = settings(s3.url, credentials={"acme": {"type": "s3", "anonymous": True, "endpoint_url": s3.url}})
    with pytest.raises(AdapterDeniedError) as denied:
        _fetch(source_of(uri, anonymous), tmp_path / "other")
    text = caplog.text + "".join(map(str, [*said, denied.value]))
    assert "wrong-but-secret" not in text and right not in text and os.environ["ACME_KEY"] not in text


def test_anonymous_buckets(s3: S3, blob: tuple[str, Path], tmp_path: Path) -> None:
    config = settings(s3.url, credentials={"acme": {"type": "s3", "anonymous": True, "endpoint_url": s3.url}})
    with pytest.raises(AdapterDeniedError):
        _fetch(source_of(blob[0], config), tmp_path / "private")
    s3.put(blob[1], BUCKET, "of/public", acl="public-read")
    _fetch(source_of(f"s3://{BUCKET}/of/public", config), tmp_path / "into")
    assert _same(tmp_path / "into", blob[1])


@pytest.mark.parametrize(
    "credentials",
    [
        {"acme": KEYS | {"secret": SECRET}},
        {"acme": {"type": "s3", "key_id": "env:A"}},
        {"acme": {"type": "hf", "token": SECRET}},
        {"acme": {"type": "ftp", "token": SECRET}},
        {"acme": KEYS | {"tokn": SECRET}},
        {"acme": {"type": "gs"}},
        {},
    ],
)
def test_a_wrong_configuration_is_an_error_without_the_secret(credentials: dict[str, Any]) -> None:
    adapters = {"credentials": credentials, "sources": [{"uri": "s3://b/", "credentials": "acme"}]}
    with pytest.raises(ConfigError, match="acme") as caught:
        AppConfig.from_args({"model": {"source": "m"}, "adapters": adapters})
    assert SECRET not in str(caught.value)


@pytest.fixture
def hub(write_adapter: WriteAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    hub.repositories["org/lora"] = write_adapter(tmp_path / "repo", rank=32)
    (tmp_path / "repo/optimizer.pt").write_bytes(b"x" * 1000)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", "")
    with serving(hub.handler()) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # as HF_ENDPOINT before the import
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def _hub_config(**credentials: Any) -> AdaptersConfig:
    options: dict[str, Any] = {"sources": [{"uri": "hf://org/"}], "source_attempts": 2}
    if credentials:
        options["credentials"] = {"hub": {"type": "hf"} | credentials}
        options["sources"][0]["credentials"] = "hub"
    return AdaptersConfig.model_validate(options)


def test_hub(hub: Hub, tmp_path: Path) -> None:
    for uri in ("hf://org/lora", "hf://org/lora@v1"):
        assert _fetch(source_of(uri, _hub_config()), tmp_path / uri[-2:])
        assert _same(tmp_path / uri[-2:], tmp_path / "repo")
    assert not any("optimizer" in path for _, path in hub.seen)
    for uri in ("hf://org/absent", "hf://org/lora@v9"):
        with pytest.raises(AdapterNotFoundError):
            _fetch(source_of(uri, _hub_config()), tmp_path / "x")


def test_hub_tokens(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_TOKEN", SECRET)
    hub.token = SECRET
    hub.redirect = hub.url
    _fetch(source_of("hf://org/lora", _hub_config(token="env:HUB_TOKEN")), tmp_path / "a")
    assert _same(tmp_path / "a", tmp_path / "repo")
    for config in (_hub_config(), _hub_config(anonymous=True)):
        with pytest.raises(AdapterDeniedError) as caught:
            _fetch(source_of("hf://org/lora", config), tmp_path / "b")
        assert SECRET not in str(caught.value)


def test_the_hub_may_not_send_elsewhere(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_TOKEN", SECRET)
    hub.redirect = hub.url.replace("127.0.0.1", "localhost")
    with pytest.raises(AdapterInvalidError, match="redirects to another host, localhost"):
        _fetch(source_of("hf://org/lora", _hub_config(token="env:HUB_TOKEN")), tmp_path / "a")
    assert hub.tokens_at_redirect == []


def test_hub_cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of("hf://org/lora", _hub_config())
    commit = source.fingerprint(source.uri).split("-")[1]
    snapshot = tmp_path / "hub-cache/models--org--lora/snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in FILES:
        (snapshot / name).write_bytes((tmp_path / "repo" / name).read_bytes())
    hub.seen.clear()
    _fetch(source, tmp_path / "a")
    assert {method for method, _ in hub.seen} == {"HEAD"}, "what is in the cache is not downloaded"

    hub.seen.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterNotFoundError, match="HF_HUB_OFFLINE"):
        _fetch(source, tmp_path / "b")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    _fetch(source, tmp_path / "b")
    assert _same(tmp_path / "b", tmp_path / "repo") and not hub.seen


def test_errors_cross_processes() -> None:
    import pickle

    for kind in (AdapterDeniedError, AdapterSourceError):
        assert str(pickle.loads(pickle.dumps(kind("why")))) == "why" and issubclass(kind, AdapterError)


def test_a_tenant_is_the_credentials_or_the_rule_that_opens_a_place() -> None:
    rules = {
        "credentials": {"acme": KEYS, "hub": {"type": "hf", "anonymous": True}},
        "preload": [{"name": "one", "uri": "s3://public/one"}],
        "sources": [{"uri": "s3://acme-models/", "credentials": "acme"}, {"uri": "s3://public/"}],
        "resolve": [
            {"pattern": "hub/*", "uri": "hf://org/{name}", "credentials": "hub"},
            {"pattern": "open/*", "uri": "s3://open/{name}"},
        ],
    }
    sources = Sources(AdaptersConfig.model_validate(rules))
    tenants = {
        "s3://acme-models/a/b": "acme",
        "s3://public/one": "preload",
        "s3://public/two": "s3://public/",
        "hf://org/x": "hub",
        "s3://open/x": "open/*",
        "/srv/adapters/a": "",
        "s3://other/a": "",
    }
    assert {uri: sources.tenant(uri) for uri in tenants} == tenants
    assert sources.tenant("s3://acme-models/a", "acme") == "acme"
    assert sources.tenant("s3://acme-models/a", "hub") == "", "find refuses it"


def test_refresh_follows_buckets_and_folders(
    s3: S3, library: Callable[..., AdapterLibrary], write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    write_adapter(folder / "old", seed=1)
    write_adapter(folder / "going", seed=2)
    remote_uri = s3.put(write_adapter(tmp_path / "r", seed=3), BUCKET, "refresh/r")
    shelf = library(settings(s3.url, folder=str(folder), store_dir=str(tmp_path / "store")))
    known = dict(shelf.scan({}).records)
    resolved = shelf.inspect("r", remote_uri, "acme").model_copy(update={"origin": "config"})
    known |= {"r": resolved, "loaded": resolved.model_copy(update={"name": "loaded", "origin": "runtime"})}
    known["unloaded"] = known["old"].model_copy(update={"name": "unloaded", "origin": "runtime", "deleted": True})
    write_adapter(folder / "unloaded", seed=4)
    assert shelf.refresh(known) == Changes([], [])

    write_adapter(folder / "new", seed=5)
    write_adapter(folder / "old", seed=6)
    shutil.rmtree(folder / "going")
    s3.put(write_adapter(tmp_path / "r", seed=7), BUCKET, "refresh/r")
    changes = shelf.refresh(known)
    assert sorted(one.name for one in changes.changed) == ["new", "old", "r"] and changes.gone == ["going"]
    known |= {one.name: one for one in changes.changed}
    assert known["r"].credentials == "acme" and known["r"].origin == "config"
    del known["going"]
    for name in FILES:
        s3.client.delete_object(Bucket=BUCKET, Key=f"refresh/r/{name}")
    assert shelf.refresh(known) == Changes([], ["r"])
    other_node = {"old": known["old"].model_copy(update={"fingerprint": "of other dates"})}
    assert "old" not in [one.name for one in shelf.refresh(other_node).changed]


def test_names_become_uris() -> None:
    rule = ResolveRule(pattern="acme/*-v1", uri="s3://b/x/{name}/lora")
    assert rule.uri_of("acme/sql-v1") == "s3://b/x/sql/lora" and rule.uri_of("acme/-v1") is None
    for name in ("acme/../other/x-v1", "acme//x-v1"):
        with pytest.raises(AdapterInvalidError):
            Sources(AdaptersConfig(resolve=[rule])).find(str(rule.uri_of(name)))
    for pattern, uri in [("acme", "s3://b/{name}"), ("*", "s3://b/a"), ("*", "s3://{name}/a"), ("*", "/srv/{name}")]:
        with pytest.raises(ValueError, match=r"pattern needs|must begin"):
            ResolveRule(pattern=pattern, uri=uri)
