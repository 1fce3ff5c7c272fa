"""What a replica does with lengths: predict each request's, learn from its end, put it on record."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chameleon_ray.config import AppConfig, ConfigError
from chameleon_ray.predictor.errors import PredictorError
from chameleon_ray.predictor.lengths import LengthFeatures
from chameleon_ray.predictor.proxy import ProxyPredictor
from chameleon_ray.predictor.request_log import LoggedRequest, RequestLogWriter

logger = logging.getLogger("ray.serve")

HISTORY = "history"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class EndedOutput:
    """How one output of a request ended; finish_reason as vLLM names it."""

    num_tokens: int
    finish_reason: str | None


class LengthEstimator:
    """At least one of both: a proxy predictor, a request log."""

    def __init__(self, proxy: ProxyPredictor | None, log: RequestLogWriter | None, timeout_s: float) -> None:
        self.proxy = proxy
        self._log = log
        self._timeout_s = timeout_s
        self._failed = False

    async def estimate(self, features: LengthFeatures) -> int | None:
        """Expected output tokens; None where the scheduler's own history decides. Never raises but for cancellation."""
        if self.proxy is None:
            return None
        try:
            return await self.proxy.predict_soon(features, self._timeout_s)
        except Exception:
            if not self._failed:
                logger.exception("the length predictor failed; such requests get the history's prediction")
            self._failed = True
            return self.proxy.from_history(features)

    def observe(self, features: LengthFeatures, adapter: str | None, ended: EndedOutput) -> None:
        """An output has ended, in whatever way. adapter: as the log is to name it."""
        if self.proxy is not None and ended.finish_reason in ("stop", "length"):
            self.proxy.observe(features, ended.num_tokens)
        if self._log is not None:
            self._log.write(
                LoggedRequest(
                    time_s=time.time(),
                    adapter=adapter,
                    prompt=features.prompt_text or "",
                    prompt_tokens=features.num_prompt_tokens,
                    max_tokens=features.max_tokens,
                    output_tokens=ended.num_tokens,
                    finish_reason=ended.finish_reason,
                )
            )

    def counts(self) -> Mapping[str, int]:
        """Requests predicted so far by the trained ``model``, and by the ``history`` in its place."""
        if self.proxy is None:
            return {}
        return {"model": self.proxy.num_from_model, "history": self.proxy.num_from_history}

    def close(self) -> None:
        """End the threads; what is queued for the log is written."""
        if self.proxy is not None:
            self.proxy.close()
        if self._log is not None:
            self._log.close()


def make_estimator(config: AppConfig, max_model_len: int, replica: str) -> LengthEstimator | None:
    """What the configuration asks for; None: nothing. Raises ConfigError when it cannot be had.

    replica: distinguishes this process's log files from those of others.
    """
    engine, replicas = config.engine, config.replicas
    proxy, log = None, None
    if engine.length_predictor != HISTORY:
        try:
            proxy = ProxyPredictor.load(Path(engine.length_predictor), max_model_len, num_threads=1)
        except PredictorError as error:
            raise ConfigError(f"engine.length_predictor: {error}") from error
    if replicas.request_log is not None:
        try:
            log = RequestLogWriter(Path(replicas.request_log), replica, replicas.request_log_max_mib * MIB)
        except PredictorError as error:
            raise ConfigError(str(error)) from error
    return None if proxy is None and log is None else LengthEstimator(proxy, log, engine.length_predictor_timeout_s)
