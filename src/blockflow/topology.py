"""The topology: every block and pipeline that should exist, as people write it.

Pure data, validated where it enters. What depends on artifacts and devices is checked by
`reconcile.validate`.
"""

from __future__ import annotations

from typing import Annotated, NewType

from pydantic import BaseModel, ConfigDict, Field

BlockName = NewType("BlockName", str)
PipelineName = NewType("PipelineName", str)
WorkerName = NewType("WorkerName", str)
Generation = NewType("Generation", int)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Block(_Frozen):
    """A deployed artifact."""

    artifact: str = Field(description="digest of the artifact: sha256-<64 hex digits>")
    device: str = Field("cpu", pattern=r"^(cpu|cuda:\d+)$", description="cpu, or cuda:<index>")
    worker: Name | None = Field(
        None, description="worker process to live in; blocks that name the same one share it"
    )
    max_batch: int = Field(8, ge=1, le=4096, description="most rows of one request")


class Pipeline(_Frozen):
    """A chain of blocks that clients see as one model."""

    blocks: tuple[Name, ...] = Field(min_length=1, description="block names, first to last")


class Topology(_Frozen):
    store: str | None = Field(None, description="the artifact store's directory")
    blocks: dict[Name, Block] = Field(default_factory=dict)
    pipelines: dict[Name, Pipeline] = Field(default_factory=dict)
