"""One vLLM engine with vLLM's own OpenAI serving layer on top, driven in process.

Importing this module imports vLLM: only processes that run an engine should.
"""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.metrics.loggers import StatLoggerBase

from chameleon_ray.adapters.checkpoint import AdapterShape
from chameleon_ray.adapters.errors import AdapterError, AdapterInvalidError
from chameleon_ray.adapters.identity import AdapterId, AdapterNumbers
from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.config import AppConfig, no_effect
from chameleon_ray.engine.configured import first_with_experts
from chameleon_ray.engine.estimating import EstimatingLLM
from chameleon_ray.engine.inspection import Inspection, engine_error
from chameleon_ray.engine.modules import merge_tables
from chameleon_ray.engine.options import GIB, resolve_adapter_memory, server_args, with_adapter_memory
from chameleon_ray.engine.paged.messages import told_reason
from chameleon_ray.engine.paged.options import lift_slot_limits
from chameleon_ray.engine.paged.scheduler import check_supported
from chameleon_ray.engine.refusals import EngineCall, RequestRefusedError
from chameleon_ray.engine.report import Activity, PolicyEvents, PolicyReport
from chameleon_ray.engine.slots import scheduler as slots_scheduler
from chameleon_ray.engine.stats import LoadStats, RequestRates
from chameleon_ray.policy.adapter import Tier
from chameleon_ray.predictor.estimator import make_estimator
from chameleon_ray.progress import NO_PROGRESS, Progress
from chameleon_ray.routing.replica_load import ReplicaLoad

logger = logging.getLogger("ray.serve")

_PROBE_TOKENS, _PROBE_LOGPROBS = 32, 20
"""Length of the prompt that shows an adapter's effect, and how many log probabilities are compared."""
_SHAPES_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class _Served:
    """The adapter of the request being served: the name the client used, and what vLLM knows it by."""

    model: str
    adapter: str
    lora: LoRARequest


_INSTEAD = {"paged": "slots", "slots": "stock"}
"""Kind of ``engine.adapter_memory`` -> the one for models that it cannot serve."""
_served: ContextVar[_Served | None] = ContextVar("served_adapter", default=None)


class _RequestAdapters(Mapping[str, LoRARequest]):
    """What vLLM's serving layer takes for its table of adapters: the one of the request at hand.

    Each request carries the version of its adapter that the ingress resolved. A table shared by all requests would let
    a replacement under the same name change the weights of a request that has already begun.
    """

    def __getitem__(self, model: str) -> LoRARequest:
        served = _served.get()
        if served is None or served.model != model:
            raise KeyError(model)
        return served.lora

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class EngineServer:
    """Owns the engine of one replica. Create with ``await EngineServer.start(config)``."""

    def __init__(self, config: AppConfig, engine: EstimatingLLM, app: Any, stats: LoadStats, module_table: ModuleTable):
        self.module_table = module_table
        self._config = config
        self._engine = engine
        self._app = app
        self._stats = stats
        self._rates = RequestRates()
        self._numbers = AdapterNumbers()
        self._records: dict[str, AdapterRecord] = {}
        self._accepted: set[str] = set()
        self._tiers: dict[str, Tier] = {}
        self._gpu_order: list[AdapterRecord] = []

    @classmethod
    async def start(cls, config: AppConfig, stat_loggers: tuple[type[StatLoggerBase], ...] = ()) -> "EngineServer":
        """Start the engine and its serving layer; returns when it can take requests.

        Where adapters cannot live in this model's KV memory they go to slots, and where these cannot be under our
        policy vLLM is used as it comes; the log says why.
        """
        chosen, config = config.engine.adapter_memory, resolve_adapter_memory(config)
        look = chosen == "auto" and config.engine.adapter_memory == "paged"
        if look and (adapter := await asyncio.to_thread(first_with_experts, config)) is not None:
            logger.warning("engine.adapter_memory: slots, as KV memory takes no adapters of experts: %s", adapter)
            config = with_adapter_memory(config, "slots")
        while (where := config.engine.adapter_memory) in _INSTEAD:
            with told_reason() as reason:
                try:
                    return await cls._start(config, stat_loggers)
                except Exception:
                    if not (why := reason()):
                        raise
            logger.warning("engine.adapter_memory: %s instead of %s: %s", _INSTEAD[where], where, why)
            config = with_adapter_memory(config, _INSTEAD[where])
            if ignored := config.engine.ignored_options(_INSTEAD[where]):
                logger.warning(no_effect(ignored, _INSTEAD[where]))
        return await cls._start(config, stat_loggers)

    @classmethod
    async def _start(cls, config: AppConfig, stat_loggers: tuple[type[StatLoggerBase], ...]) -> "EngineServer":
        args = server_args(config)
        vllm_config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
        if config.engine.adapter_memory == "slots":
            slots_scheduler.check_supported(vllm_config)
        if config.engine.adapter_memory == "paged":
            check_supported(vllm_config)
            lift_slot_limits(vllm_config)  # The engine does so itself; here for what vLLM's metrics call ``max_lora``.
        estimator = await asyncio.to_thread(
            make_estimator, config, vllm_config.model_config.max_model_len, f"{os.getpid()}-{time.time_ns()}"
        )
        made: list[LoadStats] = []

        def load_stats(config: Any, engine_index: int = 0) -> LoadStats:
            made.append(LoadStats(config, engine_index))
            return made[-1]

        engine = EstimatingLLM.from_vllm_config(
            vllm_config, usage_context=UsageContext.OPENAI_API_SERVER, stat_loggers=[load_stats, *stat_loggers]
        )
        engine.estimator = estimator
        try:
            if config.engine.adapter_memory == "stock":
                await engine.collective_rpc("correct_slots")
            tasks = await engine.get_supported_tasks()
            app = build_app(args, tasks, engine.model_config)
            await init_app_state(engine, app.state, args, tasks)
            models = app.state.openai_serving_models
            models.lora_requests = _RequestAdapters()
            base_name = models.model_name
            models.model_name = lambda lora=None: base_name() if lora is None else _display_name(lora)
            return cls(config, engine, app, made[0], merge_tables(await engine.collective_rpc("module_table")))
        except BaseException:
            engine.shutdown()
            raise

    def call(
        self,
        path: str,
        body: bytes,
        model: str,
        record: AdapterRecord | None,
        folder: Path | None,
        request_id: str | None = None,
        earlier: Progress = NO_PROGRESS,
    ) -> EngineCall:
        """A whole OpenAI request: ``path`` and JSON ``body`` as the client sent them.

        request_id, earlier: see ``EngineCall``.

        model: the request's ``model``, as the client wrote it. record, folder: its adapter and where its files lie;
        None for the base model. The caller keeps the files in place until the call has ended.
        """
        if record is None or folder is None:
            _served.set(None)
        else:
            self._rates.record(record.digest, time.monotonic())
            _served.set(_Served(model, record.name, self._lora_request(record, folder)))
        return EngineCall(self._app, path, body, request_id, earlier)

    async def accept(self, record: AdapterRecord, folder: Path, *, whole: bool = False) -> None:
        """Have the engine inspect the adapter before any request uses it. Raises AdapterError with the engine's reason.

        It reads headers and counts blocks; ``whole``: it reads all the weights as well. Stock vLLM loads the adapter,
        once and by itself: a load that fails inside a batch would end its engine (vLLM 11702).
        """
        if record.digest in self._accepted and not whole:
            return
        lora = self._lora_request(record, folder)
        if self._config.engine.adapter_memory != "stock":
            core = self._engine.engine_core
            told = [await core.call_utility_async("inspect_adapter", lora.lora_name, lora.lora_path, whole)]
        else:
            told = await self._engine.collective_rpc(
                "load_adapter", args=(lora.lora_name, lora.lora_int_id, lora.lora_path)
            )
        for inspection in (Inspection(**fields) for fields in told):
            if inspection.code:
                raise engine_error(inspection.code, inspection.reason)
        self._accepted.add(record.digest)

    async def measure(self, shapes: Sequence[AdapterShape]) -> list[AdapterError | None]:
        """What the engine has against adapters of each of these shapes, told from that alone: thousands that are alike
        cost one question. Stock vLLM counts nothing and has nothing against any."""
        if self._config.engine.adapter_memory == "stock":
            return [None] * len(shapes)
        told: list[dict[str, Any]] = []
        for start in range(0, len(shapes), _SHAPES_AT_ONCE):  # The engine's loop waits for each answer.
            asked = list(shapes[start : start + _SHAPES_AT_ONCE])
            told += await self._engine.engine_core.call_utility_async("measure_adapters", asked)
        found = [Inspection(**fields) for fields in told]
        return [engine_error(one.code, one.reason) if one.code else None for one in found]

    def take_uses(self) -> Mapping[str, int]:
        """Requests by adapter digest since the last call."""
        return self._rates.take_uses()

    @property
    def known(self) -> Set[str]:
        """Digests of all adapters that the engine may know."""
        return self._records.keys()

    async def retire(self, digests: Collection[str]) -> None:
        """Have the engine forget these of the ``known`` adapters, those in use when their requests have ended.

        Those of which something is left in the engine stay known, as do those that new requests want: ask again.
        """
        retired = {digest: self._records.pop(digest) for digest in digests}
        self._accepted -= retired.keys()
        left: Collection[str] = retired
        try:
            left = await self._forget(list(retired))
        finally:
            self._records = {digest: retired[digest] for digest in left} | self._records
            for digest in retired.keys() - self._records.keys():
                self._numbers.release(digest)
                self._rates.forget(digest)

    async def _forget(self, digests: list[str]) -> list[str]:
        """The digests of which something is left in the engine."""
        if self._config.engine.adapter_memory != "stock":
            left: list[str] = await self._engine.engine_core.call_utility_async("retire_adapters", digests)
            return left
        for digest in digests:
            await self._engine.remove_lora(self._numbers.number(digest))
        return []

    async def check_effect(self, record: AdapterRecord, folder: Path) -> None:
        """Raises AdapterInvalidError when the engine gives the same logits for a short prompt with an adapter that it
        has accepted as without. Beside other requests small differences are noise: then it passes."""
        base = await self._probe(None)
        if await self._probe(self._lora_request(record, folder)) == base:
            raise AdapterInvalidError(
                f"adapter {record.name!r} ({record.id.short}) does not change the answer to a short prompt at all. Was "
                "it saved before training? To serve it all the same set adapters.check_effect: files"
            )

    async def _probe(self, lora: LoRARequest | None) -> dict[int, float]:
        """Log probabilities of the likeliest next tokens after a prompt of tokens from all over the vocabulary."""
        model = self._engine.model_config
        vocab_size, most = model.get_vocab_size(), model.max_logprobs
        length = min(_PROBE_TOKENS, model.max_model_len - 1)
        prompt = {"prompt_token_ids": [vocab_size * place // length for place in range(length)]}
        params = SamplingParams(
            temperature=0.0, max_tokens=1, logprobs=_PROBE_LOGPROBS if most < 0 else min(_PROBE_LOGPROBS, most)
        )
        found: dict[int, float] = {}
        try:
            async for output in self._engine.generate(prompt, params, f"probe-{uuid.uuid4().hex}", lora_request=lora):
                for position in output.outputs[0].logprobs or ():
                    found |= {token: entry.logprob for token, entry in position.items()}
        except RequestRefusedError as error:
            raise error.as_adapter_error() from error
        return found

    async def refresh_residency(self) -> None:
        """Ask the engine's worker what its slots hold; where our policy decides that, the engine reports by itself."""
        if self._config.engine.adapter_memory != "stock":
            return
        answers = await self._engine.collective_rpc("adapter_residency")
        in_gpu, in_host = ([self._numbers.digest(number) for number in numbers] for numbers in answers[0])
        self._gpu_order = [self._records[digest] for digest in in_gpu if digest in self._records]
        tiers = {digest: Tier.HOST for digest in in_host if digest is not None}
        tiers |= {record.digest: Tier.GPU for record in self._gpu_order}
        self._tiers = tiers

    @property
    def tiers(self) -> Mapping[str, Tier]:
        """Adapter digest -> ``Tier.GPU`` or ``Tier.HOST``; else not in here. Slots: as of ``refresh_residency``."""
        if self._config.engine.adapter_memory != "stock":
            return {digest: tier for digest, tier in self._stats.adapter_tiers.items() if tier > Tier.DISK}
        return self._tiers

    def load(self) -> ReplicaLoad:
        """The engine's current load."""
        return self._stats.load(self._eviction_cost_s())

    @property
    def num_requests(self) -> int:
        """Requests that the engine has and has not finished."""
        return self._engine.get_num_unfinished_requests()

    def length_predictions(self) -> Mapping[str, int]:
        """Requests whose output length was predicted here, by source; empty without a trained predictor."""
        return {} if self._engine.estimator is None else self._engine.estimator.counts()

    @property
    def adapter_memory(self) -> str:
        """``paged``, ``slots`` or ``stock``, also where that is not what the configuration asked for."""
        return self._config.engine.adapter_memory

    def policy_report(self) -> tuple[PolicyReport, float] | None:
        """The policy's state with its age in seconds; None in ``stock``, or before the first step."""
        return None if self._stats.report is None else (self._stats.report, self._stats.report_age_s)

    def activity(self) -> Activity:
        """What the engine does at present, adapters by name."""
        return self._stats.activity()

    def take_policy_events(self) -> PolicyEvents:
        """What has happened in the policy since the last call."""
        return self._stats.take_events()

    @property
    def is_dead(self) -> bool:
        """Whether the engine has failed for good."""
        return bool(self._engine.errored)

    async def check_health(self) -> None:
        """Raises when the engine is dead."""
        await self._engine.check_health()

    def shutdown(self) -> None:
        """Stop the engine's processes."""
        self._engine.shutdown()

    def _lora_request(self, record: AdapterRecord, folder: Path) -> LoRARequest:
        self._records[record.digest] = record
        return LoRARequest(
            lora_name=record.id.lora_name(record.name),
            lora_int_id=self._numbers.number(record.digest),
            lora_path=str(folder),
        )

    def _eviction_cost_s(self) -> float:
        """Seconds of reloading that taking the next slot costs per second of waiting customers: the victim's rate
        within the window times its load time; 0 while a slot is free."""
        if self._config.engine.adapter_memory != "stock":
            return self._stats.eviction_cost_s
        if len(self._gpu_order) < self._config.engine.max_loras:
            return 0.0
        router, now_s = self._config.router, time.monotonic()
        return min(
            min(1.0, self._rates.per_second(record.digest, now_s))
            * (router.load_overhead_s + record.size_bytes / (router.host_load_gib_s * GIB))
            for record in self._gpu_order
        )


def _display_name(lora: LoRARequest) -> str:
    served = _served.get()
    if served is not None and served.lora.lora_int_id == lora.lora_int_id:
        return served.adapter
    return AdapterId.parse(lora.lora_name)[0]
