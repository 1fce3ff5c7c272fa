"""``s3://``, ``gs://`` and ``az://``; the last two through fsspec's file systems."""

import asyncio
import importlib.util
import json
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import fsspec  # type: ignore[import-untyped]

from chameleon_ray.adapters.credentials import read_secret
from chameleon_ray.adapters.errors import AdapterInvalidError
from chameleon_ray.adapters.remote import FileMark, RemoteFiles, RemoteUri
from chameleon_ray.config import AzureCredentials, Credentials, GcsCredentials, S3Credentials

_EXTRAS = {"s3": ("botocore", "s3"), "gs": ("gcsfs", "gcs"), "az": ("adlfs", "azure")}
"""scheme -> module, and the extra of ours that brings it."""
_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "RefreshError",
    "ClientAuthenticationError",
    "CredentialUnavailableError",
)
"""What botocore, google-auth and azure-core raise when their chain finds no credentials, or none that count."""
_TAGS = ("generation", "ETag", "etag", "last_modified")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class BucketFiles:
    """``RemoteFiles`` in a bucket."""

    tells_changes: ClassVar[bool] = False

    file_system: Any
    folder: str
    timeout_s: float

    def stat(self, name: str) -> FileMark:
        """See RemoteFiles."""
        info = self._wait(self.file_system._info(f"{self.folder}/{name}"))
        if info["type"] != "file":
            raise FileNotFoundError(name)
        return FileMark(info["size"], next(str(info[key]).strip('"') for key in _TAGS if info.get(key)))

    def read(self, name: str, mark: FileMark, start: int, end: int) -> bytes:
        """See RemoteFiles."""
        content: bytes = self._wait(self.file_system._cat_file(f"{self.folder}/{name}", start=start, end=end))
        return content

    def stream(self, name: str, mark: FileMark, start: int, end: int) -> None:
        """See RemoteFiles."""

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        bounded = asyncio.wait_for(work, self.timeout_s)
        try:
            return asyncio.run_coroutine_threadsafe(bounded, self.file_system.loop).result()
        except Exception as error:
            if type(error).__name__ in _NO_CREDENTIALS or _is_refusal(error):
                raise PermissionError from error
            raise


class Buckets:
    """One file system for each scheme and credentials, opened anew when a secret changes. Any thread may call."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._open: dict[tuple[str, str | None], tuple[dict[str, Any], Callable[[RemoteUri], RemoteFiles]]] = {}

    def files(self, uri: RemoteUri, name: str | None, credentials: Credentials | None) -> RemoteFiles:
        """The files below ``uri``. name: of the credentials; None: the cloud's own chain.

        AdapterInvalidError when the scheme's package is not installed; AdapterSourceError for a secret that cannot be
        read.
        """
        module, extra = _EXTRAS[uri.scheme]
        if importlib.util.find_spec(module) is None:
            raise AdapterInvalidError(f'{uri.scheme}:// needs {module}: pip install "chameleon-ray[{extra}]"')
        options = _OPTIONS[uri.scheme](credentials)
        with self._lock:
            known = self._open.get((uri.scheme, name))
            if known is None or known[0] != options:
                known = self._open[uri.scheme, name] = (options, self._opened(uri.scheme, options))
        return known[1](uri)

    def _opened(self, scheme: str, options: dict[str, Any]) -> Callable[[RemoteUri], RemoteFiles]:
        if scheme == "s3":
            from chameleon_ray.adapters.s3 import S3Files, open_s3  # What it imports is an extra.

            client = open_s3(options, self._timeout_s)
            return lambda uri: S3Files(client, uri.place, uri.path, self._timeout_s)
        opened = fsspec.filesystem(scheme, **options, skip_instance_cache=True, use_listings_cache=False)
        return lambda uri: BucketFiles(opened, f"{uri.place}/{uri.path}", self._timeout_s)


def _is_refusal(error: Exception) -> bool:
    """Azure's and gcsfs's ways to say 401 or 403."""
    status = getattr(error, "status_code", None) or getattr(error, "code", None)
    return status in (401, 403) or (isinstance(error, OSError) and str(error).startswith("Forbidden"))


def _s3(credentials: Credentials | None) -> dict[str, Any]:
    if credentials is None:
        return {}
    assert isinstance(credentials, S3Credentials)
    options = {
        "key": read_secret(credentials.key_id),
        "secret": read_secret(credentials.secret),
        "token": read_secret(credentials.session_token),
        "endpoint_url": credentials.endpoint_url,
        "anonymous": credentials.anonymous or None,
        "region": credentials.region,
    }
    return _given(options)


def _gs(credentials: Credentials | None) -> dict[str, Any]:
    if credentials is None:
        return {}
    assert isinstance(credentials, GcsCredentials)
    account = read_secret(credentials.service_account)
    token = "anon" if credentials.anonymous else None if account is None else json.loads(account)
    return _given({"token": token, "endpoint_url": credentials.endpoint_url})


def _az(credentials: Credentials | None) -> dict[str, Any]:
    if credentials is None:
        return {}
    assert isinstance(credentials, AzureCredentials)
    options = {
        "account_name": credentials.account,
        "account_key": read_secret(credentials.account_key),
        "sas_token": read_secret(credentials.sas_token),
        "connection_string": read_secret(credentials.connection_string),
    }
    return _given(options) | {"anon": credentials.anonymous}


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


_OPTIONS = {"s3": _s3, "gs": _gs, "az": _az}
