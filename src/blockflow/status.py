"""What is: blocks, pipelines and connections as the controller reports them to people.

These are the answers of the REST API, and what `blockflow status` prints.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class BlockState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ChannelStatus(_Frozen):
    """One connection from a block to the next; the counts are since it was made."""

    peer: str = Field(description="the block, or the gateway, at the other end")
    carrier: str = Field(description="how tensors travel: local, shm, cuda_ipc or inline")
    messages: int
    bytes: int = Field(description="bytes of tensors that were handed over")
    host_bytes: int = Field(description="bytes of them that went through host memory")


class BlockStatus(_Frozen):
    name: str
    artifact: str
    device: str
    worker: str
    pid: int | None = None
    state: BlockState
    reason: str | None = Field(None, description="why the block is not ready")
    device_memory_bytes: int | None = Field(
        None, description="device memory of the whole worker; null where the driver does not say"
    )
    host_memory_bytes: int | None = Field(
        None, description="resident host memory of the whole worker"
    )
    requests: int = 0
    requests_by_pipeline: dict[str, int] = Field(default_factory=dict)
    compute_ms_mean: float | None = Field(
        None, description="mean time of one computation, in milliseconds"
    )
    channels: tuple[ChannelStatus, ...] = ()


class PortStatus(_Frozen):
    """A named input or output; the first dimension is `batch` where any number of rows fits."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class PipelineStatus(_Frozen):
    name: str
    blocks: tuple[str, ...]
    ready: bool
    reason: str | None = Field(None, description="why the pipeline is not ready")
    inputs: tuple[PortStatus, ...] = ()
    outputs: tuple[PortStatus, ...] = ()
    max_batch: int = Field(description="most rows of one request")
    requests: int = 0
    errors: int = 0


class ApplyResult(_Frozen):
    """What applying a topology did, or in a dry run would do, to the workers.

    A worker that is replaced is in both `start` and `stop`.
    """

    generation: int = Field(description="the generation that serves from now on")
    dry_run: bool = False
    keep: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
