"""What can be wrong with an adapter. Every message says what to do; the errors cross process borders by pickle."""

from typing import ClassVar


class AdapterError(Exception):
    """Base of all adapter errors.

    code: stable identifier for clients and metrics; http_status: what the API answers with. 4xx: the adapter or the
    request is at fault; 5xx: a source, the store or the engine is, and the answer says when to try again.
    is_permanent: time cannot change it, so that the same content is not tried again.
    """

    code: ClassVar[str] = "adapter_error"
    http_status: ClassVar[int] = 400
    is_permanent: ClassVar[bool] = False


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


class AdapterDeniedError(AdapterError):
    """The source refuses the credentials, or asks for some."""

    code = "adapter_source_denied"
    http_status = 403


class AdapterInvalidError(AdapterError):
    """The files are not an adapter that this base model and engine can serve."""

    code = "adapter_invalid"
    is_permanent = True


class AdapterModulesUnknownError(AdapterError):
    """The engine cannot say which modules of its base model take LoRA, so that no adapter can be checked."""

    code = "adapter_modules_unknown"
    is_permanent = True


class AdapterTooLargeError(AdapterError):
    """Rank or size is over a bound of the configuration or of the engine's memory."""

    code = "adapter_too_large"
    http_status = 413
    is_permanent = True


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
    """The engine could not load the adapter this time, although its files had been found valid."""

    code = "adapter_load_failed"
    http_status = 503


class AdapterNoRoomError(AdapterError):
    """The request and its adapter are together larger than the engine's memory."""

    code = "adapter_no_room"
    is_permanent = True


class AdapterRefusedError(AdapterError):
    """A configured adapter that was found unusable before, and has not changed since: with that error's values."""

    def __init__(self, http_status: int, code: str, reason: str, is_permanent: bool) -> None:
        super().__init__(http_status, code, reason, is_permanent)
        self.http_status = http_status  # type: ignore[misc]
        self.code = code  # type: ignore[misc]
        self.is_permanent = is_permanent  # type: ignore[misc]

    def __str__(self) -> str:
        return str(self.args[2])


class AdapterRetryLaterError(AdapterError):
    """The adapter failed a moment ago and is not tried again before ``retry_after_s`` have passed.

    Code and status are those of the failure.
    """

    def __init__(self, failure: AdapterError, retry_after_s: float) -> None:
        super().__init__(failure, retry_after_s)
        self.failure = failure
        self.code = failure.code  # type: ignore[misc]
        self.http_status = failure.http_status  # type: ignore[misc]
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.args[0]} (tried again in {self.retry_after_s:.0f} s at the earliest)"
