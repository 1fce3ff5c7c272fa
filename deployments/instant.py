"""The application with engines that generate at once: what is left is the cost of everything around the engine.

``serve run deployments.instant:build`` takes the same arguments as ``deployments.app:build``; ``chameleon bench local``
measures it. Only vLLM is replaced; ingress, router, replica, adapters and Redis are the real ones.
"""

import json
from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from ray.serve import Application

from chameleon_ray.adapters.checkpoint import AdapterShape
from chameleon_ray.adapters.errors import AdapterError
from chameleon_ray.adapters.modules import table_of_weights
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.engine.asgi import AsgiCall, Message, Receive, Send
from chameleon_ray.engine.launch import local_model_folder
from chameleon_ray.engine.report import Activity, PolicyEvents
from chameleon_ray.policy.adapter import Tier
from chameleon_ray.progress import NO_PROGRESS, Progress
from chameleon_ray.routing.replica_load import ReplicaLoad
from deployments.app import application
from deployments.replica import Replica


class InstantEngine:
    """Stands where ``EngineServer`` does and answers completions with ``max_tokens`` tokens that cost nothing."""

    is_dead = False
    adapter_memory = "stock"

    def __init__(self, model_folder: Path) -> None:
        self.module_table = table_of_weights(model_folder)
        self.tiers: dict[str, Tier] = {}

    def call(
        self,
        path: str,
        body: bytes,
        model: str,
        record: AdapterRecord | None,
        folder: Path | None,
        request_id: str | None = None,
        earlier: Progress = NO_PROGRESS,
    ) -> AsgiCall:
        return AsgiCall(self.generate, path, body)

    async def generate(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """vLLM's application as far as it is needed here."""
        request = json.loads((await receive())["body"])
        streamed, num_tokens = bool(request.get("stream")), int(request.get("max_tokens", 16))
        media_type = b"text/event-stream; charset=utf-8" if streamed else b"application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", media_type)]})
        if not streamed:
            await send(body_part(completion(request["model"], " a" * num_tokens, "length")))
            return
        for position in range(num_tokens):
            reason = "length" if position + 1 == num_tokens else None
            await send(body_part(b"data: " + completion(request["model"], " a", reason) + b"\n\n"))
        await send(body_part(b"data: [DONE]\n\n"))

    async def accept(self, record: AdapterRecord, folder: Path, *, whole: bool = False) -> None:
        self.tiers[record.digest] = Tier.GPU

    def take_uses(self) -> Mapping[str, int]:
        return {}

    async def measure(self, shapes: Sequence[AdapterShape]) -> list[AdapterError | None]:
        return [None] * len(shapes)

    @property
    def known(self) -> Set[str]:
        return self.tiers.keys()

    async def retire(self, digests: Collection[str]) -> None:
        for digest in digests:
            del self.tiers[digest]

    async def check_effect(self, record: AdapterRecord, folder: Path) -> None:
        pass

    async def refresh_residency(self) -> None:
        pass

    def policy_report(self) -> None:
        return None

    def activity(self) -> Activity:
        return Activity()

    def take_policy_events(self) -> PolicyEvents:
        return PolicyEvents()

    def length_predictions(self) -> Mapping[str, int]:
        return {}

    def load(self) -> ReplicaLoad:
        return ReplicaLoad(max_num_seqs=64)

    async def check_health(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


class InstantReplica(Replica):
    """The real replica around an ``InstantEngine``."""

    async def _start_engine(self) -> InstantEngine:
        return InstantEngine(local_model_folder(self._config.model))


def build(args: dict[str, Any]) -> Application:
    """Like ``deployments.app:build``, with instant engines."""
    return application(args, InstantReplica)


def completion(model: str, text: str, reason: str | None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
    answer = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": model, "choices": [choice]}
    return json.dumps(answer).encode()


def body_part(content: bytes) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": True}
