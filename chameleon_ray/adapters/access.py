"""Which source a URI is read from, and with whose credentials: what the operator's configuration opens."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from chameleon_ray.adapters.buckets import Buckets
from chameleon_ray.adapters.credentials import read_secret
from chameleon_ray.adapters.errors import AdapterError, AdapterInvalidError, AdapterPathNotAllowedError
from chameleon_ray.adapters.hub import HubFiles
from chameleon_ray.adapters.remote import RemoteFiles, RemoteSource, RemoteUri
from chameleon_ray.adapters.sources import AdapterSource, LocalSource, local_path, scheme_of, shown
from chameleon_ray.config import AdaptersConfig, HubCredentials

logger = logging.getLogger(__name__)

_LOCAL, _REMOTE = ("", "file"), ("s3", "gs", "az", "hf")


@dataclass(frozen=True, slots=True)
class _Rule:
    """One thing that the configuration says: URIs that ``covers`` are read with these credentials. name: the rule's."""

    covers: Callable[[str], bool]
    credentials: str | None
    name: str


class Sources:
    """All sources of one configuration. Any thread may call."""

    def __init__(self, config: AdaptersConfig):
        self._config = config
        self._rules = tuple(_rules(config))
        self._local = LocalSource(_roots(config))
        self._buckets = Buckets(config.source_timeout_s)

    def find(self, uri: str, credentials: str | None = None) -> AdapterSource:
        """The source of ``uri``. credentials: one of ``adapters.credentials`` that a rule gives to this place; None:
        those of the first rule about it.

        AdapterInvalidError for a URI that is none of ours, AdapterPathNotAllowedError for one that no rule opens.
        """
        scheme = scheme_of(uri)
        if scheme in _LOCAL and credentials is None:
            return self._local
        if scheme not in _REMOTE:
            known = ", ".join(f"{name}://" for name in ("file", *_REMOTE))
            raise AdapterInvalidError(f"{shown(uri)!r}: use a path or one of {known}; credentials are for remote ones")
        remote = RemoteUri.parse(uri)
        if (rule := self._rule(uri, credentials)) is not None:
            return self._remote(uri, remote, rule.credentials)
        named = "" if credentials is None else " with these credentials"
        raise AdapterPathNotAllowedError(f"no rule of adapters.sources or adapters.resolve opens {uri!r}{named}")

    def tenant(self, uri: str, credentials: str | None = None) -> str:
        """Whose adapters are there: the name of the credentials that ``find`` reads them with, else of the rule that
        opens the place. One name for all that is local, and for what ``find`` refuses."""
        rule = self._rule(uri, credentials)
        return "" if rule is None or scheme_of(uri) in _LOCAL else rule.credentials or rule.name

    def _rule(self, uri: str, credentials: str | None) -> _Rule | None:
        rules = (rule for rule in self._rules if rule.covers(uri) and credentials in (None, rule.credentials))
        return next(rules, None)

    def _remote(self, uri: str, remote: RemoteUri, name: str | None) -> AdapterSource:
        credentials = None if name is None else self._config.credentials[name]
        endpoint = getattr(credentials, "endpoint_url", None)
        account = getattr(credentials, "account", None)

        def open_files() -> RemoteFiles:
            if remote.scheme != "hf":
                return self._buckets.files(remote, name, credentials)
            token: str | bool | None = None
            if isinstance(credentials, HubCredentials):
                token = False if credentials.anonymous else read_secret(credentials.token)
            return HubFiles(remote, token, endpoint, self._config.source_timeout_s)

        return RemoteSource(uri, f"{name}|{endpoint}|{account}", open_files, self._config.source_attempts)


def _rules(config: AdaptersConfig) -> Iterator[_Rule]:
    for entry in config.preload:
        yield _Rule(entry.uri.__eq__, entry.credentials, "preload")
    for source in config.sources:
        yield _Rule(partial(_is_below, source.uri), source.credentials, source.uri)
    for rule in config.resolve:
        begin, _, end = rule.uri.partition("{name}")
        yield _Rule(partial(_is_between, begin, end), rule.credentials, rule.pattern)


def _is_below(place: str, uri: str) -> bool:
    """place: a folder that ends with a slash, or a repository, of which every revision is meant."""
    return f"{uri}@".startswith(place if place.endswith("/") else f"{place}@")


def _is_between(begin: str, end: str, uri: str) -> bool:
    return uri.startswith(begin) and uri.endswith(end)


def _roots(config: AdaptersConfig) -> list[Path]:
    """Folders that local adapters may be read from: what the operator configured, and the preloaded adapters' own."""
    folders = [*config.allowed_roots] if config.folder is None else [config.folder, *config.allowed_roots]
    roots = [Path(folder).expanduser().absolute() for folder in folders]
    for entry in config.preload:
        with suppress(AdapterError):  # the scan reports it
            if scheme_of(entry.uri) in _LOCAL and os.path.isabs(path := local_path(entry.uri)):
                roots.append(Path(path))
    return roots
