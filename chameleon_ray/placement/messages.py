"""What is written to Redis and announced on the change channel, as JSON."""

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, Json, TypeAdapter, ValidationError

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.placement.view import ReplicaReport
from chameleon_ray.policy.adapter import Tier
from chameleon_ray.routing.replica_load import ReplicaLoad

_TIERS = {str(int(tier)): tier for tier in Tier}


class GarbageError(ValueError):
    """Something in Redis is not what this package writes."""


class _Message(BaseModel):
    # Fields that a newer version of the application adds are no garbage to this one.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Beat(_Message):
    """A replica's report without its tiers. seq counts the reports of one ``run`` (one publisher object)."""

    replica_id: str
    node_id: str
    run: str
    seq: int
    load: ReplicaLoad
    failed: dict[str, str]
    catalog_version: int

    @classmethod
    def of(cls, report: ReplicaReport, run: str, seq: int) -> "Beat":
        """The report as number ``seq`` of ``run``."""
        return cls(
            replica_id=report.replica_id,
            node_id=report.node_id,
            run=run,
            seq=seq,
            load=report.load,
            failed=dict(report.failed),
            catalog_version=report.catalog_version,
        )


class ReplicaChange(_Message):
    """changed: digest -> Tier (ABSENT: gone) since the report before; None: too much changed, read it all."""

    kind: Literal["replica"] = "replica"
    beat: Beat
    changed: dict[str, Tier] | None


class Withdrawal(_Message):
    """The replica stopped."""

    kind: Literal["withdrawn"] = "withdrawn"
    replica_id: str
    run: str


class CatalogChange(_Message):
    """records: the new values, each as the JSON text that the catalog holds. epoch, seq: see ``Keys.catalog_head``."""

    kind: Literal["catalog"] = "catalog"
    epoch: str
    seq: int
    records: list[Json[AdapterRecord]]


_any_message: TypeAdapter[ReplicaChange | Withdrawal | CatalogChange] = TypeAdapter(
    Annotated[ReplicaChange | Withdrawal | CatalogChange, Field(discriminator="kind")]
)


def decode_message(data: bytes) -> ReplicaChange | Withdrawal | CatalogChange:
    """A message of the change channel. GarbageError."""
    try:
        return _any_message.validate_json(data)
    except ValidationError as error:
        raise GarbageError(f"message on the change channel: {error}") from None


def decode_record(name: bytes, data: bytes) -> AdapterRecord:
    """The catalog's entry ``name``. GarbageError."""
    try:
        record = AdapterRecord.model_validate_json(data)
    except ValidationError as error:
        raise GarbageError(f"catalog entry {name!r}: {error}") from None
    if record.name.encode() != name:
        raise GarbageError(f"catalog entry {name!r} is about {record.name!r}")
    return record


def decode_report(replica_id: str, beat: bytes, tiers: bytes) -> tuple[Beat, dict[str, Tier]]:
    """A replica's heartbeat key and its tiers hash as a JSON list [digest, tier, digest, ...]. GarbageError."""
    try:
        decoded = Beat.model_validate_json(beat)
        words = list(json.loads(tiers))
        held = {str(digest): _TIERS[tier] for digest, tier in zip(words[::2], words[1::2], strict=True)}
    except (ValueError, KeyError) as error:  # ValidationError and UnicodeDecodeError are ValueErrors, too
        raise GarbageError(f"report of replica {replica_id!r}: {error}") from None
    if decoded.replica_id != replica_id:
        raise GarbageError(f"report of replica {replica_id!r} is about {decoded.replica_id!r}")
    return decoded, held
