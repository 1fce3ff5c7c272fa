"""What ingress and replica say to each other about one request."""

from dataclasses import dataclass

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.progress import NO_PROGRESS, Progress


@dataclass(frozen=True, slots=True)
class RelayedRequest:
    """An OpenAI request: ``path`` and JSON ``body`` as the client sent them.

    model: the request's ``model``. record: its adapter's, as the ingress resolved it; None for the base model.
    request_id: the answer's ``id`` without its prefix; None when the body names it.
    """

    path: str
    body: bytes
    model: str
    record: AdapterRecord | None
    request_id: str | None
    is_streamed: bool


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """HTTP status and media type; seconds in the engine (of a stream: until its first part); seconds after which to try
    again (of an error that may pass)."""

    status: int
    media_type: str
    engine_s: float = 0.0
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer. The first with a ``head`` begins it; before it come parts without content.

    progress: what the engine has made since the last part; it covers all of ``content``.
    """

    content: bytes = b""
    progress: Progress = NO_PROGRESS
    head: AnswerHead | None = None
