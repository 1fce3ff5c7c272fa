"""How far the answer to a request has come: what another replica needs in order to go on with it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_CREATED = re.compile(rb'^(data: \{"id":"(?:[^"\\]|\\.)*","object":"[^"]*","created":)(\d+)', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class OutputStep:
    """Tokens that the engine handed out together: of a stream, those of one event.

    finish_reason, stop_reason: the engine's, with the last tokens of an output that has ended; else None.
    """

    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What has been made of an answer: all of it, or what has come since the last report.

    prompt_digest: of the rendered prompt's token ids; empty before the engine has them.
    obstacle: why another replica cannot go on with such a request; empty when it can.
    """

    prompt_digest: bytes = b""
    steps: tuple[OutputStep, ...] = ()
    obstacle: str = ""

    @property
    def token_ids(self) -> list[int]:
        """The output tokens."""
        return [token_id for step in self.steps for token_id in step.token_ids]

    @property
    def has_ended(self) -> bool:
        """Whether the output is complete."""
        return bool(self.steps) and self.steps[-1].finish_reason is not None


NO_PROGRESS = Progress()


def joined(reports: Iterable[Progress]) -> Progress:
    """All reports of one request, in their order, as one."""
    digest, obstacle, steps = b"", "", []
    for report in reports:
        digest, obstacle = report.prompt_digest or digest, report.obstacle or obstacle
        steps.extend(report.steps)
    return Progress(digest, tuple(steps), obstacle)


def created_of(content: bytes) -> bytes | None:
    """The first ``created`` time in the events of a stream, as it is written there; None when there is none."""
    found = _CREATED.search(content)
    return None if found is None else found[2]


def with_created(content: bytes, created: bytes | None) -> bytes:
    """The same events with this ``created`` time in each; unchanged for None."""
    return content if created is None else _CREATED.sub(rb"\g<1>" + created, content)
