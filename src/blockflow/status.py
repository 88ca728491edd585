"""What is: blocks, pipelines and connections as the controller reports them to people.

These are the answers of the REST API, and what `blockflow status` prints.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from blockflow.topology import Topology


class BlockState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    CRASH_LOOPING = "crash_looping"
    """It failed so often that its successor starts only after a pause."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Histogram(_Frozen):
    """`counts[i]` values were at most `bounds[i]` and above the bound before; one more count
    is for what is above every bound."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


class ChannelStatus(_Frozen):
    """One connection from a block, or from the gateway; the counts are since it was made."""

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
    reason: str | None = Field(None, description="why the block is not ready, or may hang")
    restarts: int = Field(0, description="how often its worker was replaced by another process")
    device_memory_bytes: int | None = Field(
        None, description="device memory of the whole worker; null where the driver does not say"
    )
    host_memory_bytes: int | None = Field(
        None, description="resident host memory of the whole worker"
    )
    requests: int = 0
    requests_by_pipeline: dict[str, int] = Field(default_factory=dict)
    queued: int = Field(0, description="requests that wait at the block now")
    incomplete: int = Field(0, description="requests of which a part is still to come")
    batch_sizes: Histogram | None = Field(None, description="requests computed together")
    compute_seconds: Histogram | None = Field(
        None, description="seconds of each computation, on a GPU by the device's own events"
    )
    queue_seconds: Histogram | None = Field(
        None, description="seconds that each computed request waited at the block"
    )
    hop_seconds: Histogram | None = Field(
        None, description="seconds that each computed request was on its way to the block"
    )
    compute_ms_mean: float | None = Field(
        None, description="mean time of one computation, in milliseconds"
    )
    queue_ms_mean: float | None = Field(
        None, description="mean time that a request waited at the block, in milliseconds"
    )
    runner: str | None = Field(
        None,
        description="how it is run: eager, compiled, cuda graph, or both; null until it is loaded",
    )
    runner_reason: str | None = Field(
        None, description="why it is not compiled, or on a GPU not run from CUDA graphs"
    )
    fused_into: str | None = Field(
        None, description="the first of the blocks with which it is run in one go, and timed"
    )
    channels: tuple[ChannelStatus, ...] = ()


class GatewayStatus(_Frozen):
    """The process that answers clients."""

    pid: int | None = None
    url: str | None = Field(None, description="where the inference API listens")
    ready: bool = Field(description="whether it knows what is deployed")
    host_memory_bytes: int | None = Field(None, description="resident host memory")
    hops: dict[str, Histogram] = Field(
        default_factory=dict,
        description="seconds from the announcement of answers until they were taken, by carrier",
    )
    channels: tuple[ChannelStatus, ...] = Field((), description="those to first blocks")


class PortStatus(_Frozen):
    """A named input or output; the first dimension is `batch` where any number of rows fits."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class PipelineStatus(_Frozen):
    name: str
    blocks: tuple[str, ...] = Field(description="each after those that feed it")
    edges: tuple[tuple[str, str], ...] = Field(
        description="pairs of blocks of which the first feeds the second"
    )
    entries: tuple[str, ...] = Field(description="the blocks that take what clients send")
    exits: tuple[str, ...] = Field(description="the blocks of which clients get outputs")
    path: str = Field(description="the way through the blocks in one line, for people")
    ready: bool
    reason: str | None = Field(None, description="why the pipeline is not ready")
    inputs: tuple[PortStatus, ...] = ()
    outputs: tuple[PortStatus, ...] = ()
    max_batch: int = Field(description="most rows of one request")
    requests: int = 0
    errors: int = 0
    errors_by_kind: dict[str, int] = Field(default_factory=dict)
    latency: Histogram | None = Field(
        None, description="seconds from a request's arrival to its answer, failures left out"
    )


class ApplyResult(_Frozen):
    """What applying a topology did, or in a dry run would do, to the workers.

    A worker that is replaced is in both `start` and `stop`.
    """

    generation: int = Field(description="the generation that serves from now on")
    dry_run: bool = False
    keep: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    actions: tuple[str, ...] = Field((), description="everything that changes, in words")


class Outcome(StrEnum):
    APPLIED = "applied"
    FAILED = "failed"


class GenerationRecord(_Frozen):
    """A generation as the history remembers it."""

    generation: int
    verb: str = Field(description="what was asked for")
    at: float = Field(description="when its outcome was known, in seconds of Unix time")
    outcome: Outcome
    reason: str | None = Field(None, description="why it failed")
    store: str | None = Field(None, description="the artifact store that it was deployed from")
    topology: Topology


class EventKind(StrEnum):
    GENERATION_APPLIED = "generation_applied"
    GENERATION_FAILED = "generation_failed"
    WORKER_STARTED = "worker_started"
    WORKER_READY = "worker_ready"
    WORKER_FAILED = "worker_failed"
    WORKER_OVERDUE = "worker_overdue"
    """It computes a request whose deadline passed long ago: it may hang."""
    WORKER_STOPPED = "worker_stopped"
    GATEWAY_STARTED = "gateway_started"
    GATEWAY_FAILED = "gateway_failed"


class Event(_Frozen):
    """Something that happened; numbers rise by one for as long as the server lives."""

    number: int
    at: float = Field(description="seconds of Unix time")
    kind: EventKind
    subject: str = Field(description="the worker, the gateway, or the generation's number")
    reason: str | None = None
