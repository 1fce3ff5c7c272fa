"""An engine as a replica starts it, in processes of its own, for all tests that call it through vLLM's application."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spin_probe import PROBE

from chameleon_ray.config import AppConfig
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.server import EngineServer

LIMIT_S = 600.0
RETRY_S, SPIN_S = 7.0, 0.003
SMALL = {"dtype": "float32", "max_model_len": 512, "kv_cache_gib": 0.06, "enforce_eager": True, "device": "cpu"}
PROBED = {"worker_spin_s": SPIN_S, "vllm_args": {"worker_extension_cls": PROBE}}


class ServedEngine:
    """A started ``EngineServer`` with an event loop, which runs while a test does, and the requests that reach the
    engine (``sent``). It predicts lengths only within ``predicting``, as by default."""

    def __init__(self, demo: DemoPaths, engine: dict[str, Any], **sections: Any) -> None:
        model = {"source": str(demo.model), "name": "demo"}
        self._runner = asyncio.Runner()
        self.server = self._runner.run(
            EngineServer.start(AppConfig.from_args({"model": model, "engine": engine, **sections}))
        )
        self.sent: list[Any] = []
        self._estimator, self.server._engine.estimator = self.server._engine.estimator, None
        core = self.server._engine.engine_core
        send = core.add_request_async

        async def spied(request: Any) -> None:
            self.sent.append(request)
            await send(request)

        core.add_request_async = spied

    def run(self, test: Callable[[], Awaitable[None]]) -> None:
        """A coroutine function to its end or, after a time, to its failure."""

        async def bounded() -> None:
            async with asyncio.timeout(LIMIT_S):
                await test()

        self._runner.run(bounded())

    @contextmanager
    def predicting(self) -> Iterator[None]:
        """With the predictor and the request log of its configuration."""
        self.server._engine.estimator = self._estimator
        try:
            yield
        finally:
            self.server._engine.estimator = None

    async def forget_all(self) -> None:
        """Until the engine knows no adapter, also by its reports."""
        while self.server.known or self.server.tiers:
            await self.server.retire(list(self.server.known))
            await self.server._probe(None)  # a step, with which a report comes
            await self.server.refresh_residency()

    def close(self) -> None:
        """End the engine's processes."""
        self.server._engine.estimator = self._estimator
        self.server.shutdown()
        self._runner.close()


def paged_engine(demo: DemoPaths, predictor: Path, request_log: Path) -> ServedEngine:
    """Adapters in KV memory; a trained predictor, whose time limit no machine is too slow for."""
    engine = SMALL | PROBED | {"adapter_memory": "paged", "adapter_host_gib": 0.1}
    engine |= {"length_predictor": str(predictor), "length_predictor_timeout_s": LIMIT_S}
    return ServedEngine(
        demo,
        engine,
        adapters={"retry_after_s": RETRY_S, "max_rank": 512},
        replicas={"request_log": str(request_log)},
    )
