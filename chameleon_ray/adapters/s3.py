"""``s3://``, through botocore: in threads like everything here, and without a copy more than the plainest download."""

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from botocore import UNSIGNED  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import ClientError  # type: ignore[import-untyped]
from botocore.session import Session  # type: ignore[import-untyped]

from chameleon_ray.adapters.errors import AdapterChangedError
from chameleon_ray.adapters.remote import FileMark

_CONNECT_TIMEOUT_S = 5.0
_CHUNK_BYTES = 1 << 20
_MAX_CONNECTIONS = 64
_ABSENT, _REFUSED = (404,), (400, 401, 403)
"""S3 says 400 for keys that it does not know as keys, and for expired tokens."""


def open_s3(options: dict[str, Any], timeout_s: float) -> Any:
    """A client for ``options``: key, secret, token, endpoint_url, region, anonymous; what is absent is for AWS's chain.

    Any thread may use it. Its own retries are off.
    """
    config = Config(
        connect_timeout=min(_CONNECT_TIMEOUT_S, timeout_s),
        read_timeout=timeout_s,
        retries={"total_max_attempts": 1},
        max_pool_connections=_MAX_CONNECTIONS,
        response_checksum_validation="when_required",  # The content's digest decides.
        signature_version=UNSIGNED if options.get("anonymous") else None,
    )
    return Session().create_client(
        "s3",
        region_name=options.get("region"),
        endpoint_url=options.get("endpoint_url"),
        aws_access_key_id=options.get("key"),
        aws_secret_access_key=options.get("secret"),
        aws_session_token=options.get("token"),
        config=config,
    )


@dataclass(frozen=True, slots=True)
class S3Files:
    """``RemoteFiles`` in a bucket. timeout_s: limit for one request and one part of a stream."""

    tells_changes: ClassVar[bool] = True

    client: Any
    bucket: str
    folder: str
    timeout_s: float

    def stat(self, name: str) -> FileMark:
        """See RemoteFiles."""
        try:
            found = self.client.head_object(Bucket=self.bucket, Key=f"{self.folder}/{name}")
        except ClientError as error:
            _raise(error)
        return FileMark(found["ContentLength"], found["ETag"].strip('"'))

    def read(self, name: str, mark: FileMark, start: int, end: int) -> bytes:
        """See RemoteFiles."""
        stream = self.stream(name, mark, start, end)
        try:
            return stream.read(end - start)
        finally:
            stream.close()

    def stream(self, name: str, mark: FileMark, start: int, end: int) -> "S3Stream":
        """See RemoteFiles."""
        span = {"Range": f"bytes={start}-{end - 1}"} if start or end < mark.size_bytes else {}
        try:
            answer = self.client.get_object(Bucket=self.bucket, Key=f"{self.folder}/{name}", **span)
        except ClientError as error:
            _raise(error)
        stream = S3Stream(answer["Body"], self.timeout_s)
        if answer["ETag"].strip('"') != mark.tag:
            stream.close()
            raise AdapterChangedError(f"{name} is another one now")
        if answer["ContentLength"] != end - start:
            stream.close()
            raise EOFError(f"{answer['ContentLength']} bytes instead of {end - start}")
        return stream


@dataclass(frozen=True, slots=True)
class S3Stream:
    """The body of one answer."""

    body: Any
    timeout_s: float

    def read(self, num_bytes: int) -> bytes:
        """The next bytes, all of them. TimeoutError when they do not come in time."""
        deadline_s = time.monotonic() + self.timeout_s
        chunks = []
        while num_bytes:
            # What has come, unlike the body's own ``read``, which waits for all: a server may send a byte at a time.
            chunk = self.body._raw_stream.read1(min(num_bytes, _CHUNK_BYTES))
            if not chunk:
                raise EOFError(f"{num_bytes} bytes are missing")
            if time.monotonic() > deadline_s:
                raise TimeoutError("the body comes too slowly")
            chunks.append(chunk)
            num_bytes -= len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def close(self) -> None:
        """Whatever has not been read is not wanted; a connection that has nothing left is used again."""
        with suppress(Exception):
            self.body.close()


def _raise(error: ClientError) -> NoReturn:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status in _ABSENT:
        raise FileNotFoundError("absent") from error
    if status in _REFUSED:
        raise PermissionError("refused") from error
    raise error
