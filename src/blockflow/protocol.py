"""What the server and its child processes say to each other, as values and as bytes.

The server sends commands to a child's DEALER socket; the child answers each with `Done` or
`Failed`, and sends `Hello` once and a report from time to time by itself. Everything is
MessagePack, decoded into exactly these types.

A route is one way through the blocks: it is made when a pipeline is deployed or one of its workers
is replaced, never changed, and retired when nothing travels on it any more. So requests that are
under way finish on the route on which they began.
"""

from __future__ import annotations

from typing import NewType, TypeAlias

import msgspec

from blockflow.artifact import Port
from blockflow.oip import ModelMetadata
from blockflow.reconcile import BlockSpec
from blockflow.topology import BlockName, PipelineName
from blockflow.wiring import Source

RouteId = NewType("RouteId", int)
Incarnation = NewType("Incarnation", int)
"""Counts every child process that a server starts, so that a successor is never mistaken."""


MACHINE_CODE = "TORCHINDUCTOR_CACHE_DIR"
"""The environment variable that says where a worker keeps the machine code that it makes."""


class Step(msgspec.Struct, frozen=True):
    """A block on a route. `feeds` says for each of its inputs where it comes from.

    `max_batch` is the most rows that one message to it may carry, `takes` its inputs as it names
    them.
    """

    block: BlockName
    endpoint: str
    feeds: dict[str, Source]
    max_batch: int
    takes: tuple[Port, ...]

    @property
    def sources(self) -> frozenset[BlockName | None]:
        """The blocks that each send it a part of a request; None for the gateway."""
        return frozenset(source.block for source in self.feeds.values())


class Route(msgspec.Struct, frozen=True):
    """`results` is the endpoint where answers and failures of this route are awaited.

    Each step comes after all that feed it. `inputs` and `outputs` are the pipeline's, as clients
    name them; `gives` says where each output comes from.
    """

    id: RouteId
    pipeline: PipelineName
    steps: tuple[Step, ...]
    results: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    gives: dict[str, Source]

    def following(self, block: BlockName) -> tuple[Step, ...]:
        """The steps to which `block` sends."""
        return tuple(step for step in self.steps if block in step.sources)

    @property
    def joining(self) -> frozenset[BlockName]:
        """The blocks that put parts of a request together, and those that lead to one."""
        found: set[BlockName] = set()
        for step in reversed(self.steps):
            if len(step.sources) > 1 or any(s.block in found for s in self.following(step.block)):
                found.add(step.block)
        return frozenset(found)


class Model(msgspec.Struct, frozen=True):
    """A pipeline as the gateway serves it; with a `reason` it is not ready.

    One that has a route all the same takes requests: something on it is silent, and may be slow.
    `returning`: a new route is being made, so requests may wait for it.
    """

    metadata: ModelMetadata
    route: RouteId | None
    reason: str | None = None
    returning: bool = False


# Commands to a worker.


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Load blocks from the store and get them ready; endpoints are one for each block.

    The blocks of a chain are run in one go, under the name and at the endpoint of the first.
    """

    store: str
    blocks: tuple[BlockSpec, ...]
    endpoints: tuple[str, ...]
    chains: tuple[tuple[BlockName, ...], ...] = ()


class Connect(msgspec.Struct, frozen=True, tag="connect"):
    """Open the channels that these routes need. To the gateway: those to their first blocks."""

    routes: tuple[Route, ...]


class Retire(msgspec.Struct, frozen=True, tag="retire"):
    """Forget routes on which nothing travels any more, and close channels without a route."""

    routes: tuple[RouteId, ...]


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Finish what is queued, close everything, exit."""


# Commands to a gateway.


class Publish(msgspec.Struct, frozen=True, tag="publish"):
    """From now on, exactly these models are served, each on its route."""

    models: tuple[Model, ...]


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Answer when nothing travels on these routes any more, or after `timeout` seconds."""

    routes: tuple[RouteId, ...]
    timeout: float


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Give up what travels on these routes, because of `reason`; it may be sent once more.

    `suspects` are the requests that were being computed when a worker died.
    """

    routes: tuple[RouteId, ...]
    reason: str
    suspects: tuple[int, ...] = ()


Body: TypeAlias = Load | Connect | Retire | Stop | Publish | Drain | Abort


class Command(msgspec.Struct, frozen=True):
    sequence: int
    body: Body


# What children say.


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    incarnation: Incarnation
    pid: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    sequence: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    sequence: int
    reason: str


class ChannelReport(msgspec.Struct, frozen=True):
    """One connection of a block; `endpoint` is "local:<block>" inside a worker."""

    endpoint: str
    carrier: str
    messages: int
    bytes: int
    host_bytes: int


class Histogram(msgspec.Struct, frozen=True):
    """`counts[i]` values were at most `bounds[i]` and above the bound before; one more count
    is for what is above every bound."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


class BlockReport(msgspec.Struct, frozen=True):
    """`compute` counts seconds of each batch; on a GPU as the device's own events measured it.

    `batch_sizes` counts requests per batch, `queued` the requests that wait now and `incomplete`
    those of which a part is still to come. `queue` and `hop` count seconds of each computed
    request, as `Hop` tells them apart. `runner` is "eager", "compiled", "cuda graph" or "compiled,
    cuda graph"; `runner_reason` says why it is not what was asked for. A block that is run in one
    go with the ones before it is `fused_into` the first of them: what can be told of all of them
    together is told there, and the last one has the channels.
    """

    block: BlockName
    requests: dict[PipelineName, int]
    failures: int
    queued: int
    incomplete: int
    batch_sizes: Histogram
    compute: Histogram
    queue: Histogram
    hop: Histogram
    channels: tuple[ChannelReport, ...]
    runner: str
    runner_reason: str | None = None
    fused_into: BlockName | None = None


class WorkerReport(msgspec.Struct, frozen=True, tag="worker"):
    blocks: tuple[BlockReport, ...]


class PipelineCount(msgspec.Struct, frozen=True):
    """`errors` by the name of the error's class; `latency` in seconds, of answered requests."""

    requests: int
    errors: dict[str, int]
    latency: Histogram


class GatewayReport(msgspec.Struct, frozen=True, tag="gateway"):
    """Per pipeline; `url` is where the inference API listens.

    `channels` lead to first blocks; `hops` count seconds from the
    announcement of an answer's tensors until they were taken, by carrier.
    """

    url: str
    pipelines: dict[PipelineName, PipelineCount]
    channels: tuple[ChannelReport, ...] = ()
    hops: dict[str, Histogram] = {}


FromChild: TypeAlias = Hello | Done | Failed | WorkerReport | GatewayReport


# What travels with tensors, in TensorMQ's `note`.


class Hop(msgspec.Struct, frozen=True, array_like=True):
    """A request's time on its way to a block and there, in milliseconds.

    `hop_ms` is from the moment it was sent (its last part, where several blocks feed this one)
    until the block took it, and 0 from another host. What of that the block was busy with others is
    in `queue_ms`, which ends when the request's batch begins. `compute_ms` is the batch's time: on
    a CPU by the host's clock, on a GPU by the device's events. There it is None at first, for
    nothing on the path waits for the GPU, and what the work waits for there is in no figure.
    """

    block: BlockName
    hop_ms: float
    queue_ms: float
    compute_ms: float | None


class Note(msgspec.Struct, frozen=True, array_like=True):
    """`hops` of each request of the message, in their order: None for one that is not timed.

    Where none is, `hops` is empty. A message to the results end without tensors and error tells of
    hops whose `compute_ms` was None before. `block` sends it; None is the gateway. `error` and the
    HTTP `status` it maps to, when the requests failed at a block.
    """

    hops: tuple[tuple[Hop, ...] | None, ...] = ()
    block: BlockName | None = None
    error: str | None = None
    status: int = 500


encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
_decode_from_child: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)
decode_from_child = _decode_from_child.decode
_decode_note = msgspec.msgpack.Decoder(Note)


def decode_note(note: bytes) -> Note:
    """The note of a message; an empty one for a message that has none."""
    return _decode_note.decode(note) if note else Note()
