"""The catalog's record of one adapter name."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from chameleon_ray.adapters.errors import AdapterError, AdapterRefusedError
from chameleon_ray.adapters.identity import AdapterId


class Refusal(BaseModel):
    """Why a configured adapter is not served: an AdapterError as plain values (see there)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: int
    code: str
    reason: str
    is_permanent: bool

    @classmethod
    def of(cls, error: AdapterError) -> "Refusal":
        """The error as a refusal."""
        return cls(status=error.http_status, code=error.code, reason=str(error), is_permanent=error.is_permanent)

    def error(self) -> AdapterError:
        """The refusal as an error again."""
        return AdapterRefusedError(self.status, self.code, self.reason, self.is_permanent)


class AdapterRecord(BaseModel):
    """What the cluster knows about an adapter name: which content it stands for, and where that comes from.

    version grows with every change of the name (load, replace, unload) and never goes back, so that of two
    records of one name the one with the higher version is the newer, whoever wrote it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str = Field(description="SHA-256 of the adapter's content, lower-case hex")
    uri: str = Field(description="where the files come from, as given by the operator or the load request")
    credentials: str | None = Field(default=None, description="one of adapters.credentials, if the load named one")
    rank: int
    size_bytes: int = Field(description="bytes of the weights file")
    base_model: str = Field(default="", description="base_model_name_or_path of its PEFT configuration")
    warnings: tuple[str, ...] = Field(default=(), description="what is odd about it, and how it is served all the same")
    version: int = 0
    origin: Literal["config", "runtime"] = "config"
    fingerprint: str = Field(default="", description="cheap change mark of the source files (sizes and mtimes)")
    checked: str = Field(default="", description="mark of all that it was checked against: rules, base model, engine")
    deleted: bool = Field(
        default=False, description="a tombstone: unloaded at run time, kept so that it stays so; or refused"
    )
    refusal: Refusal | None = Field(
        default=None, description="why it is not served, although the configuration names it"
    )

    @property
    def id(self) -> AdapterId:
        """Which content the name stands for."""
        return AdapterId(self.digest)

    @field_validator("warnings", mode="before")
    @classmethod
    def _empty_list(cls, value: Any) -> Any:
        return () if value == {} else value  # As Redis's scripts write an empty list.
