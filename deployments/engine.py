"""What a replica needs of its engine: ``EngineServer`` is the real one, ``deployments/instant.py`` has another."""

from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import Protocol

from chameleon_ray.adapters.checkpoint import AdapterShape
from chameleon_ray.adapters.errors import AdapterError
from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.engine.asgi import AsgiCall
from chameleon_ray.engine.report import Activity, PolicyEvents, PolicyReport
from chameleon_ray.policy.adapter import Tier
from chameleon_ray.progress import Progress
from chameleon_ray.routing.replica_load import ReplicaLoad


class EngineReports(Protocol):
    """What an engine reports of itself; see ``EngineServer`` for each."""

    @property
    def adapter_memory(self) -> str: ...

    def load(self) -> ReplicaLoad: ...

    def activity(self) -> Activity: ...

    def policy_report(self) -> tuple[PolicyReport, float] | None: ...

    def take_policy_events(self) -> PolicyEvents: ...

    def length_predictions(self) -> Mapping[str, int]: ...


class Engine(EngineReports, Protocol):
    """A whole engine; see ``EngineServer`` for each."""

    module_table: ModuleTable

    @property
    def tiers(self) -> Mapping[str, Tier]: ...

    @property
    def known(self) -> Set[str]: ...

    @property
    def is_dead(self) -> bool: ...

    def call(
        self,
        path: str,
        body: bytes,
        model: str,
        record: AdapterRecord | None,
        folder: Path | None,
        request_id: str | None,
        earlier: Progress,
    ) -> AsgiCall: ...

    async def accept(self, record: AdapterRecord, folder: Path, *, whole: bool = False) -> None: ...

    def take_uses(self) -> Mapping[str, int]: ...

    async def measure(self, shapes: Sequence[AdapterShape]) -> list[AdapterError | None]: ...

    async def retire(self, digests: Collection[str]) -> None: ...

    async def check_effect(self, record: AdapterRecord, folder: Path) -> None: ...

    async def refresh_residency(self) -> None: ...

    async def check_health(self) -> None: ...

    def shutdown(self) -> None: ...
