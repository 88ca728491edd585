"""What requests bring to a block, and where their outputs go: values of the block runtime.

Tensors arrive together with the rows of one or more requests (`Arrival`). What one block sent of a
request is a `Part`; a request with all its parts is an `Item` of a block's queue. A `Way` is what a
block knows of a route, with a `Leg` for each place that outputs go to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from blockflow.batching import Waiting
from blockflow.ledger import Entry
from blockflow.protocol import Hop, RouteId
from blockflow.runner import Loan
from blockflow.topology import BlockName, PipelineName
from blockflow.wiring import Source
from tensormq import Loop, Peer, Request

_MAX_HOPS = 256
"""In one message: of 100 bytes at most, so that what all requests asked about fits beside them."""


class _Value(msgspec.Struct, frozen=True, eq=False):
    """Made for every request: a struct is made several times faster than a frozen dataclass."""


class Arrival(msgspec.Struct, eq=False):
    """Tensors that came together, with the rows of one or more requests.

    `release` is called when the last of the requests needs them no more. `ready` is recorded on the
    stream of another block of this process that computed them; `loan` says that they lie where
    that block will write again, `in_slot` that they lie where another process may be waiting to.
    `time` is when they arrived and `sent` when they set out, by the host's monotonic clock.
    """

    tensors: Mapping[str, Tensor]
    release: Callable[[], None]
    requests: int
    in_slot: bool = False
    ready: torch.cuda.Event | None = None
    loan: Loan | None = None
    sent: float = 0.0
    time: float = 0.0
    total: int = 0

    def __post_init__(self) -> None:
        self.total = self.requests
        self.time = time.monotonic()
        self.sent = self.sent or self.time

    def drop(self) -> None:
        """One of its requests is done with."""
        self.requests -= 1
        if not self.requests:
            self.release()

    def move_to(self, device: torch.device) -> None:
        """Move the tensors out of their slot and give it back."""
        self.tensors = {
            name: tensor.to(device, copy=True, non_blocking=True)
            for name, tensor in self.tensors.items()
        }
        self.release()
        self.release = nothing
        self.in_slot = False


def nothing() -> None:
    """Tensors that were handed over in the process need no release."""


class Part(_Value, frozen=True, eq=False):
    """What one block sent of a request: its rows are `arrival.tensors[...][rows]`.

    `hops` is None unless somebody asked for the request's times.
    """

    request: Request
    hops: tuple[Hop, ...] | None
    arrival: Arrival
    rows: slice


class Neighbour(Protocol):
    """A block of the same worker, which is handed tensors in the process."""

    @property
    def name(self) -> BlockName: ...

    def submit(
        self,
        route: RouteId,
        source: BlockName,
        requests: Sequence[Request],
        hops: Sequence[tuple[Hop, ...] | None],
        arrival: Arrival,
        loop: Loop,
    ) -> None:
        """Take requests from a block which is served by `loop`."""

    def lose(self, route: RouteId, source: BlockName, requests: Sequence[Request]) -> None:
        """Hear that requests failed at a block that feeds this one."""


class Leg(_Value, frozen=True, eq=False):
    """Where some outputs go: to a block of this worker, or in one message to others.

    `warned` are those of them that must be told of a request that fails here, because they, or
    blocks after them, put its parts together.
    """

    to: Neighbour | tuple[Peer, ...]
    outputs: tuple[str, ...]
    warned: tuple[Neighbour | Peer, ...] = ()


class Way(_Value, frozen=True, eq=False):
    """What a block knows of a route: where its inputs come from, where its outputs go.

    `rows` is the most that one message from it may carry. `results` hears of failures. `followers`
    are all to whom tensors go.
    """

    pipeline: PipelineName
    feeds: Mapping[str, Source]
    sources: frozenset[BlockName | None]
    legs: tuple[Leg, ...]
    rows: int
    results: Peer
    followers: tuple[Peer, ...]


class Item(_Value, frozen=True, eq=False):
    """A request in the queue, with a part from each block that feeds this one.

    `waiting` is what is decided by: its time is when the request was complete. `sent` is when its
    last part set out, by the host's monotonic clock; `hop` is what of the time since then is the
    way's, in seconds.
    """

    request: Request
    route: RouteId
    way: Way
    hops: tuple[Hop, ...] | None
    parts: Mapping[BlockName | None, Part]
    waiting: Waiting
    sent: float
    hop: float

    def queued(self, until: float) -> float:
        """Seconds that it has waited here."""
        return max(0.0, until - self.sent - self.hop)

    def drop(self) -> None:
        for part in self.parts.values():
            part.arrival.drop()


class Parcel(_Value, frozen=True, eq=False):
    """Outputs of requests that share a route, on their way over `leg` to other processes."""

    items: Sequence[Item]
    requests: tuple[Request, ...]
    leg: Leg
    to: tuple[Peer, ...]
    tensors: Mapping[str, Tensor]
    note: bytes

    @property
    def deadline(self) -> float:
        """Until when somebody waits for them, by the host's monotonic clock; 0 is for ever."""
        deadlines = [request.deadline for request in self.requests]
        return 0.0 if 0 in deadlines else max(deadlines)


def entries(batch: Iterable[Item]) -> list[Entry]:
    return [Entry(item.request.id, item.request.deadline) for item in batch]


def messages(batch: Sequence[Item]) -> Iterator[tuple[int, int, int, int]]:
    """Cut a batch, sorted by route, into what can travel together.

    Gives (first item, item after the last, first row, rows): one route each, no more rows than
    the block that follows takes in one message, and no more times than a descriptor has room for.
    """
    first = start = rows = hops = 0
    for index, item in enumerate(batch):
        mine = item.request.rows
        times = 0 if item.hops is None else len(item.hops) + 1  # with that of this block
        if index > first and (
            item.route != batch[first].route
            or rows + mine > item.way.rows
            or hops + times > _MAX_HOPS
        ):
            yield first, index, start, rows
            first, start, rows, hops = index, start + rows, 0, 0
        rows += mine
        hops += times
    yield first, len(batch), start, rows


def runs(batch: Sequence[Item], port: str) -> Iterator[tuple[Arrival, str, slice | None, int]]:
    """What feeds `port`: stretches of rows that lie together, None for all that arrived, and how
    many rows there should be."""
    run: list[Part] = []
    name = ""
    for item in batch:
        source = item.way.feeds[port]
        part = item.parts[source.block]
        if run and not (
            part.arrival is run[0].arrival
            and source.port == name
            and part.rows.start == run[-1].rows.stop
        ):
            yield _stretch(run, name)
            run = []
        name = source.port
        run.append(part)
    yield _stretch(run, name)


def _stretch(run: Sequence[Part], name: str) -> tuple[Arrival, str, slice | None, int]:
    arrival = run[0].arrival
    # All that arrived may have no dimension to cut.
    whole = len(run) == arrival.total
    start, stop = run[0].rows.start, run[-1].rows.stop
    return arrival, name, None if whole else slice(start, stop), stop - start
