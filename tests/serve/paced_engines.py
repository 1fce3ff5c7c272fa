"""The application with engines that take their time: an application for Ray nodes that share one machine."""

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from chameleon_ray.engine.asgi import Receive, Send
from chameleon_ray.engine.launch import local_model_folder
from chameleon_ray.routing.replica_load import ReplicaLoad
from deployments.app import application
from deployments.instant import InstantEngine, body_part, completion
from deployments.replica import Replica

PAUSE_S = 0.02
"""Between two tokens."""
NODE_VARIABLE = "CHAMELEON_TEST_NODE"
"""What a node of the test is called: each has a store of its own."""


def answer_of(model: str, num_tokens: int) -> str:
    """What such an engine says: no two tokens are the same."""
    return "".join(f" {model}-{position}" for position in range(num_tokens))


class PacedEngine(InstantEngine):
    """Says one token after the other, each another one."""

    def __init__(self, model_folder: Path) -> None:
        super().__init__(model_folder)
        self._num_running = 0

    def load(self) -> ReplicaLoad:
        return ReplicaLoad(num_running=self._num_running, max_num_seqs=64)

    async def generate(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        self._num_running += 1
        try:
            await _answer(json.loads((await receive())["body"]), send)
        finally:
            self._num_running -= 1


class PacedReplica(Replica):
    """The real replica around a ``PacedEngine``, with its node's own store."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: dict[str, Any], redis: "DeploymentHandle[Any] | None" = None
    ):
        adapters = config["adapters"]
        own = {"store_dir": os.path.join(adapters["store_dir"], os.environ[NODE_VARIABLE])}
        await super().__init__(config | {"adapters": adapters | own}, redis)

    async def _start_engine(self) -> PacedEngine:
        return PacedEngine(local_model_folder(self._config.model))


def build(args: dict[str, Any]) -> Application:
    """Like ``deployments.app:build``, with paced engines."""
    return application(args, PacedReplica)


async def _answer(request: Mapping[str, Any], send: Send) -> None:
    streamed, model, num_tokens = bool(request.get("stream")), str(request["model"]), int(request["max_tokens"])
    media_type = b"text/event-stream; charset=utf-8" if streamed else b"application/json"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", media_type)]})
    for position in range(num_tokens):
        await asyncio.sleep(PAUSE_S)
        if streamed:
            reason = "length" if position + 1 == num_tokens else None
            await send(body_part(b"data: " + completion(model, f" {model}-{position}", reason) + b"\n\n"))
    await send(
        body_part(b"data: [DONE]\n\n" if streamed else completion(model, answer_of(model, num_tokens), "length"))
    )
    await send({"type": "http.response.body", "body": b"", "more_body": False})
