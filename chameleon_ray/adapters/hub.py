"""``hf://org/name[@revision]``: the Hugging Face hub or a server that speaks its protocol."""

import os
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urljoin, urlsplit

import httpx
import huggingface_hub
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from chameleon_ray.adapters.errors import AdapterInvalidError, AdapterNotFoundError
from chameleon_ray.adapters.remote import FileMark, RemoteUri

_HUB_HOSTS = ("huggingface.co", "hf.co")
"""Where the public hub keeps large files: these hosts and those below them."""
_MAX_REDIRECTS = 3


@dataclass(frozen=True, slots=True)
class HubFiles:
    """``RemoteFiles`` of a model repository. Files in huggingface_hub's cache are read there, and only there while it
    is offline (``HF_HUB_OFFLINE``).

    token: None for huggingface_hub's own, False for none. endpoint: None for the configured hub.
    """

    tells_changes: ClassVar[bool] = False

    uri: RemoteUri
    token: str | bool | None
    endpoint: str | None
    timeout_s: float

    @property
    def _repo(self) -> str:
        return f"{self.uri.place}/{self.uri.path}"

    @property
    def _home(self) -> str:
        return self.endpoint or constants.ENDPOINT

    def stat(self, name: str) -> FileMark:
        """See RemoteFiles. The tag is the repository's commit: both files of one fetch are of the same one."""
        if constants.is_offline_mode():
            return self._cached(name, self.uri.revision or "main")
        url = hf_hub_url(self._repo, name, revision=self.uri.revision, endpoint=self._home)
        try:
            found = get_hf_file_metadata(url, token=self._token(), timeout=self.timeout_s, endpoint=self._home)
        except (EntryNotFoundError, RevisionNotFoundError) as error:
            raise FileNotFoundError(name) from error
        except GatedRepoError as error:
            raise PermissionError(name) from error
        except RepositoryNotFoundError as error:  # the hub says 401 for what it does not show
            raise FileNotFoundError(name) if error.response.status_code == 404 else PermissionError(name) from error
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise PermissionError(name) from error
            raise
        if found.size is None or found.etag is None:
            raise EOFError("a file without size or ETag")
        if found.commit_hash:
            cached = try_to_load_from_cache(self._repo, name, revision=found.commit_hash)
            if isinstance(cached, str) and os.path.getsize(cached) == found.size:
                return FileMark(found.size, f"{found.commit_hash}-{found.etag}", cached)
        return FileMark(found.size, f"{found.commit_hash}-{found.etag}", urljoin(url, found.location))

    def read(self, name: str, mark: FileMark, start: int, end: int) -> bytes:
        """See RemoteFiles."""
        if mark.link.startswith("/"):
            with open(mark.link, "rb") as file:
                file.seek(start)
                return file.read(end - start)
        home, link = self._home, mark.link
        with httpx.Client(timeout=self.timeout_s, follow_redirects=False) as client:
            for _ in range(_MAX_REDIRECTS):
                self._check_host(link, home)
                headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
                if (token := self._bearer()) and urlsplit(link).netloc == urlsplit(home).netloc:
                    headers["Authorization"] = f"Bearer {token}"
                with client.stream("GET", link, headers=headers) as answer:
                    if answer.is_redirect:
                        link = urljoin(link, answer.headers["Location"])
                        continue
                    _check_status(answer, start)
                    content = bytearray()
                    for chunk in answer.iter_raw():
                        content += chunk
                        if len(content) > end - start:
                            raise EOFError("more bytes than were asked for")
                    return bytes(content)
        raise AdapterInvalidError(f"hf://{self._repo} redirects without end")

    def stream(self, name: str, mark: FileMark, start: int, end: int) -> None:
        """See RemoteFiles."""

    def _cached(self, name: str, revision: str) -> FileMark:
        cached = try_to_load_from_cache(self._repo, name, revision=revision)
        if not isinstance(cached, str):
            raise AdapterNotFoundError(
                f"hf://{self._repo}: {name} is not in huggingface_hub's cache, and HF_HUB_OFFLINE is set"
            )
        return FileMark(os.path.getsize(cached), f"{os.path.basename(os.path.dirname(cached))}-cached", cached)

    def _check_host(self, link: str, home: str) -> None:
        """The hub may send to its own hosts only, and never from https to http."""
        here, there = urlsplit(home), urlsplit(link)
        allowed = there.netloc == here.netloc
        if _is_public(here.hostname):
            allowed = allowed or (_is_public(there.hostname) and there.scheme == "https")
        if not allowed or (here.scheme == "https" and there.scheme != "https"):
            raise AdapterInvalidError(f"hf://{self._repo} redirects to another host, {there.hostname}: refused")

    def _token(self) -> str | bool:
        return True if self.token is None and huggingface_hub.get_token() else self.token or False

    def _bearer(self) -> Any:
        return huggingface_hub.get_token() if self.token is None else self.token


def _is_public(host: str | None) -> bool:
    return host is not None and any(host == one or host.endswith(f".{one}") for one in _HUB_HOSTS)


def _check_status(answer: httpx.Response, start: int) -> None:
    if answer.status_code in (401, 403):
        raise PermissionError("the hub refused")
    if answer.status_code == 404:
        raise FileNotFoundError("gone")
    answer.raise_for_status()
    if answer.status_code != 206 and start:
        raise EOFError("the server sent the beginning again")
