"""Errors in the shape that OpenAI clients understand (and that vLLM answers with)."""

import json
from typing import Any

JSON = "application/json"


class ApiError(Exception):
    """A request that is answered with an error. ``status`` is the HTTP status; ``message`` says what to do."""

    def __init__(
        self, status: int, message: str, kind: str, *, param: str | None = None, retry_after_s: float | None = None
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self.status, self.message, self.kind, self.param, self.retry_after_s)

    @property
    def body(self) -> bytes:
        """The JSON body."""
        return json.dumps(error_object(self.status, self.message, self.kind, self.param)).encode()


def _rebuilt(status: int, message: str, kind: str, param: str | None, retry_after_s: float | None) -> ApiError:
    return ApiError(status, message, kind, param=param, retry_after_s=retry_after_s)


def error_object(status: int, message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """``{"error": {message, type, param, code}}``."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def sse_error(status: int, message: str, kind: str) -> bytes:
    """The error as the last event of a stream that has already begun."""
    return b"data: " + json.dumps(error_object(status, message, kind)).encode() + b"\n\n"


def unknown_model(model: str) -> ApiError:
    """No adapter and no base model of that name."""
    return ApiError(404, f"The model `{model}` does not exist.", "NotFoundError", param="model")
