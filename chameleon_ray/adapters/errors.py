"""What can be wrong with an adapter. Every message says what to do; the errors cross process borders by pickle."""

from typing import ClassVar


class AdapterError(Exception):
    """Base of all adapter errors.

    code: stable identifier for clients and metrics; http_status: what the API answers with. 4xx: the adapter or the
    request is at fault and trying again does not help; 5xx: a source or the store is unavailable and it may.
    """

    code: ClassVar[str] = "adapter_error"
    http_status: ClassVar[int] = 400


class AdapterNameError(AdapterError):
    """The name cannot be an adapter's name, or is taken."""

    code = "adapter_name_invalid"


class AdapterNotFoundError(AdapterError):
    """There is no adapter under this name or URI."""

    code = "adapter_not_found"
    http_status = 404


class AdapterPathNotAllowedError(AdapterError):
    """The path leads outside the folders that adapters may come from."""

    code = "adapter_path_not_allowed"
    http_status = 403


class AdapterInvalidError(AdapterError):
    """The files are not an adapter that this base model and engine can serve."""

    code = "adapter_invalid"


class AdapterTooLargeError(AdapterError):
    """Rank or size is over the configured bound."""

    code = "adapter_too_large"
    http_status = 413


class AdapterChangedError(AdapterError):
    """The files at the source are no longer those that were loaded under this name."""

    code = "adapter_changed"
    http_status = 409


class AdapterSourceError(AdapterError):
    """The source did not answer or could not be read."""

    code = "adapter_source_unavailable"
    http_status = 502


class AdapterStoreError(AdapterError):
    """The node's adapter store cannot be written or read."""

    code = "adapter_store_unavailable"
    http_status = 503


class AdapterLoadError(AdapterError):
    """The engine could not load the adapter for a request, although its files had been found valid."""

    code = "adapter_load_failed"
    http_status = 503


class AdapterNoRoomError(AdapterError):
    """The request and its adapter are together larger than the engine's memory."""

    code = "adapter_no_room"


class AdapterRetryLaterError(AdapterError):
    """The adapter failed a moment ago and is not tried again before ``retry_after_s`` have passed.

    Code and status are those of the failure.
    """

    def __init__(self, failure: AdapterError, retry_after_s: float) -> None:
        super().__init__(failure, retry_after_s)
        self.code = failure.code  # type: ignore[misc]
        self.http_status = failure.http_status  # type: ignore[misc]
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.args[0]} (tried again in {self.retry_after_s:.0f} s at the earliest)"
