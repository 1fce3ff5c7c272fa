"""The catalog's record of one adapter name."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from chameleon_ray.adapters.identity import AdapterId


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
    deleted: bool = Field(default=False, description="a tombstone: unloaded at run time, kept so that it stays so")

    @property
    def id(self) -> AdapterId:
        """Which content the name stands for."""
        return AdapterId(self.digest)

    @field_validator("warnings", mode="before")
    @classmethod
    def _empty_list(cls, value: Any) -> Any:
        return () if value == {} else value  # As Redis's scripts write an empty list.
