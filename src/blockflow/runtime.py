"""The block runtime: a thread for each block that receives, batches, computes and sends.

The thread owns the block's sockets and, on a GPU, its stream. It waits for nothing on the GPU: what
it launches is ordered there, by the stream and by TensorMQ's events.

Requests of different pipelines that wait at a block are computed together and go their own ways
afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor

from blockflow.artifact import BATCH
from blockflow.batching import Limits, Waiting, decide
from blockflow.cores import Cores, pin
from blockflow.counting import BATCH_SIZES, BLOCK_SECONDS, Buckets
from blockflow.errors import (
    BlockFailed,
    BlockFlowError,
    DeadlineExceeded,
    Overloaded,
    Unavailable,
)
from blockflow.export import has_rows
from blockflow.joining import Joins, Verdict
from blockflow.ledger import Entry, Ledger, ledger_path
from blockflow.program import Program
from blockflow.protocol import (
    BlockReport,
    ChannelReport,
    Hop,
    Note,
    Route,
    RouteId,
    Step,
    decode_note,
    encode,
)
from blockflow.reconcile import BlockSpec
from blockflow.runner import Loan, prepare
from blockflow.topology import BlockName, PipelineName
from blockflow.wiring import Source
from tensormq import (
    Carrier,
    Loop,
    Message,
    Peer,
    PeerLost,
    Pull,
    Push,
    Request,
    TensorMQError,
    slot_size,
)
from tensormq import Timeout as NoSlot

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
"""How often a block looks for parts that are late and, while it waits, for device times."""
_ASKED_SECONDS = 0.001
"""How often it looks, while it has nothing else to do, for a device time that somebody awaits."""
_MOST_JOINING = 1024
"""Requests that wait for a part of theirs: far more than credits let be under way."""
_LONGEST_ERROR = 2000
"""Characters of a model's error that clients get to see."""


@dataclass
class _Arrival:
    """Tensors that came together, with the rows of one or more requests.

    `release` is called when the last of the requests needs them no more. `ready` is recorded on the
    stream of another block of this process that computed them; `loan` says that they lie where
    that block will write again, `in_slot` that they lie where another process may be waiting to.
    `sent` is when they set out, by the host's monotonic clock.
    """

    tensors: Mapping[str, Tensor]
    release: Callable[[], None]
    requests: int
    in_slot: bool = False
    ready: torch.cuda.Event | None = None
    loan: Loan | None = None
    time: float = field(default_factory=time.monotonic)
    sent: float = 0.0

    def __post_init__(self) -> None:
        self.total = self.requests
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
        self.release = _nothing
        self.in_slot = False


@dataclass(frozen=True)
class _Part:
    """What one block sent of a request: its rows are `arrival.tensors[...][rows]`.

    `hops` is None unless somebody asked for the request's times.
    """

    request: Request
    hops: tuple[Hop, ...] | None
    arrival: _Arrival
    rows: slice


@dataclass(frozen=True)
class _Item:
    """A request in the queue, with a part from each block that feeds this one.

    `since` is when it was complete and `sent` when its last part set out, by the host's monotonic
    clock; `hop` is what of the time since then is the way's, in seconds.
    """

    request: Request
    route: RouteId
    way: _Way
    hops: tuple[Hop, ...] | None
    parts: Mapping[BlockName | None, _Part]
    since: float
    sent: float
    hop: float

    def drop(self) -> None:
        for part in self.parts.values():
            part.arrival.drop()


@dataclass(frozen=True)
class _Leg:
    """Where some outputs go: to a block of this worker, or in one message to others.

    `warned` are those of them that must be told of a request that fails here, because they, or
    blocks after them, put its parts together.
    """

    to: Block | tuple[Peer, ...]
    outputs: tuple[str, ...]
    warned: tuple[Block | Peer, ...] = ()


@dataclass(frozen=True)
class _Way:
    """What a block knows of a route: where its inputs come from, where its outputs go.

    `rows` is the most that one message from it may carry. `results` hears of failures.
    """

    pipeline: PipelineName
    feeds: Mapping[str, Source]
    sources: frozenset[BlockName | None]
    legs: tuple[_Leg, ...]
    rows: int
    results: Peer


@dataclass
class _Counts:
    requests: dict[PipelineName, int] = field(default_factory=dict)
    failures: int = 0
    sizes: Buckets = field(default_factory=lambda: Buckets(BATCH_SIZES))
    compute: Buckets = field(default_factory=lambda: Buckets(BLOCK_SECONDS))
    queue: Buckets = field(default_factory=lambda: Buckets(BLOCK_SECONDS))
    hop: Buckets = field(default_factory=lambda: Buckets(BLOCK_SECONDS))


@dataclass(frozen=True)
class _Launch:
    """A batch that a GPU was given and is not known to have done.

    `asked` are those of its requests of which somebody awaits the times.
    """

    began: torch.cuda.Event
    ended: torch.cuda.Event
    entries: Sequence[Entry]
    asked: tuple[tuple[RouteId, _Way, Request, Hop], ...]


class Block:
    """A loaded block and its thread.

    endpoint: where its inputs arrive. neighbours: the blocks of this worker by endpoint, to which
    tensors are handed in the process. on_fatal: called with the reason when the device's context is
    lost, after which nothing in this process can compute. slots: messages that may be under way to
    the blocks that follow. fused: the blocks that are run in one go with it, and are in `program`.
    """

    def __init__(
        self,
        spec: BlockSpec,
        program: Program,
        endpoint: str,
        neighbours: Mapping[str, Block],
        on_fatal: Callable[[str], None],
        slots: int = 4,
        fused: Sequence[BlockName] = (),
    ) -> None:
        self.spec = spec
        self.endpoint = endpoint
        self._program = program
        self._neighbours = neighbours
        self._on_fatal = on_fatal
        self._slots = slots
        self._fused = tuple(fused)
        self._plain = encode(Note(block=spec.name))
        self._lost = encode(Note(block=spec.name, error="the request failed at a block before"))
        self._device = torch.device(spec.device)
        self._gpu = self._device.type == "cuda"
        self._limits = Limits(
            max_rows=spec.max_batch,
            max_delay=spec.max_delay_ms / 1000,
            alone=any(not port.shape or port.shape[0] != BATCH for port in program.ports),
        )
        self._loop = Loop()
        self._queue: deque[_Item] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._ways: dict[RouteId, _Way] = {}
        self._joins: Joins[tuple[RouteId, int], BlockName | None, _Part] = Joins(_MOST_JOINING)
        self._peers: dict[tuple[str, bool], Peer] = {}
        self._local_counts: dict[BlockName, list[int]] = {}
        self._counts = _Counts()
        self._launched: deque[_Launch] = deque()  # always empty on a CPU
        # What an input must be, by its name and the number of rows.
        self._wanted: dict[tuple[str, int], tuple[torch.dtype, torch.Size]] = {}
        self._busy_until = float("-inf")
        self._next_look = 0.0
        self._threads = 0
        self._stopping = False
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=f"block {spec.name}")

    # Called from other threads

    def start(self) -> Future[None]:
        """Start the thread; the future is done when the block is warm and its endpoint bound."""
        self._thread.start()
        return self._started

    def connect(self, routes: Iterable[Route]) -> Future[None]:
        """Learn those of `routes` that pass this block and open their channels."""
        mine = [r for r in routes if any(step.block == self.spec.name for step in r.steps)]
        return self._perform(lambda: self._connect(mine))

    def retire(self, routes: Iterable[RouteId]) -> Future[None]:
        """Forget routes, and close the channels that no route needs any more."""
        ids = tuple(routes)
        return self._perform(lambda: self._retire(ids))

    def submit(
        self,
        route: RouteId,
        source: BlockName,
        requests: Sequence[Request],
        hops: Sequence[tuple[Hop, ...] | None],
        arrival: _Arrival,
    ) -> None:
        """Take requests from a block of the same process."""
        self._loop.call_soon(lambda: self._enqueue(route, source, requests, hops, arrival))

    def lose(self, route: RouteId, source: BlockName, requests: Sequence[Request]) -> None:
        """Hear that requests failed at a block of the same process that feeds this one."""
        self._loop.call_soon(lambda: self._lose(route, source, requests))

    def stop(self) -> None:
        """Let the thread finish what is queued and end; wait for it with `join`."""

        def end() -> None:
            self._stopping = True

        self._loop.call_soon(end)

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the thread's end; False when it goes on."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def reports(self) -> tuple[BlockReport, ...]:
        """What there is to say of this block and of those that are fused into it."""
        mine = self._report()
        if not self._fused:
            return (mine,)
        untimed = Buckets(BLOCK_SECONDS).snapshot()
        part = BlockReport(
            block=mine.block,
            requests=mine.requests,
            failures=0,
            queued=0,
            incomplete=0,
            batch_sizes=Buckets(BATCH_SIZES).snapshot(),
            compute=untimed,
            queue=untimed,
            hop=untimed,
            channels=(),
            runner=mine.runner,
            runner_reason=mine.runner_reason,
            fused_into=mine.block,
        )
        *between, last = self._fused
        return (
            msgspec.structs.replace(mine, channels=()),
            *(msgspec.structs.replace(part, block=name) for name in between),
            msgspec.structs.replace(part, block=last, channels=mine.channels),
        )

    def _report(self) -> BlockReport:
        counts = self._counts
        push = getattr(self, "_push", None)
        channels = [
            ChannelReport(s.endpoint, str(s.carrier), s.messages, s.bytes, s.host_bytes)
            for s in (push.statistics() if push is not None else ())
        ]
        channels += [
            ChannelReport(f"local:{name}", "local", messages, size, 0)
            for name, (messages, size) in self._local_counts.copy().items()
        ]
        return BlockReport(
            block=self.spec.name,
            requests=dict(counts.requests),
            failures=counts.failures,
            queued=len(self._queue),
            incomplete=self._joins.waiting,
            batch_sizes=counts.sizes.snapshot(),
            compute=counts.compute.snapshot(),
            queue=counts.queue.snapshot(),
            hop=counts.hop.snapshot(),
            channels=tuple(channels),
            runner=self._runner.kind,
            runner_reason=self._runner.reason,
        )

    def _perform(self, job: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()

        def run() -> None:
            try:
                job()
            except (BlockFlowError, TensorMQError) as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        # Not in the callback itself: it may run while a send waits for a slot, and a job changes
        # what that send is looking at.
        self._loop.call_soon(lambda: self._jobs.append(run))
        return future

    # The thread: life

    def _run(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                if self.spec.cpus is not None:
                    # Before anything is computed: torch's threads of this one come with its first
                    # computation, and start where it may run.
                    pin(self.spec.cpus)
                if self._gpu:
                    torch.cuda.set_device(self._device)
                    stack.enter_context(torch.cuda.stream(torch.cuda.Stream(self._device)))
                self._warm()
                self._open()
                stack.callback(self._close)
                self._started.set_result(None)
                self._serve()
        except Exception as error:
            if not self._started.done():
                self._started.set_exception(error)
            else:
                log.exception("block %s stopped", self.spec.name)
                self._on_fatal(f"block {self.spec.name}: {error}")

    def _warm(self) -> None:
        self._runner = prepare(self._program, self.spec.max_batch, graphs=self.spec.cuda_graph)
        if self._runner.reason is not None:
            log.info("block %s runs eagerly: %s", self.spec.name, self._runner.reason)

    def _open(self) -> None:
        largest = {
            port.name: (port.dtype, port.sized(self.spec.max_batch))
            for port in self._program.manifest.outputs
        }
        device = str(self._device)
        self._pull = Pull(self.endpoint, device=device, loop=self._loop)
        self._push = Push(
            slots=self._slots, slot_bytes=slot_size(largest), device=device, loop=self._loop
        )
        self._pull.on_torn = lambda: self._on_fatal(
            f"block {self.spec.name}: the block before it died in the middle of a tensor"
        )
        path = ledger_path(self.endpoint)
        self._ledger = Ledger(path)
        self._cores = Cores(
            path.with_name("all.cores"),
            path.name,
            self.spec.threads,
            alone=self.spec.cpus is not None,
        )
        self._push.on_lost = lambda peer: log.info("lost %s: %s", peer.endpoint, peer.lost)

    def _close(self) -> None:
        if self._gpu:
            torch.cuda.synchronize(self._device)
        self._pull.close()
        self._push.close()
        self._loop.close()
        self._ledger.close()
        self._cores.close()

    # The thread: taking, computing, handing on

    def _serve(self) -> None:
        while True:
            while self._jobs:
                self._jobs.popleft()()
            while (message := self._pull.poll()) is not None:
                self._take(message)
            if self._queue:
                wait: float | None = self._step()
            elif self._stopping:
                return
            elif any(launch.asked for launch in self._launched):
                wait = _ASKED_SECONDS
            else:
                wait = _LOOK_SECONDS if self._launched or self._joins.waiting else None
            self._loop.run_once(wait)
            self._resolve_times()
            self._expire()

    def _take(self, message: Message) -> None:
        try:
            note = decode_note(message.note)
        except msgspec.MsgspecError as error:
            log.warning("block %s received an unreadable note: %s", self.spec.name, error)
            message.release()
            return
        route, requests = RouteId(message.route), message.requests
        if note.error is not None:
            message.release()
            self._lose(route, note.block, requests)
            return
        arrival = _Arrival(message.tensors, message.release, len(requests), in_slot=True)
        arrival.sent = arrival.time - (message.hop or 0.0)
        self._enqueue(route, note.block, requests, note.hops or (None,) * len(requests), arrival)

    def _enqueue(
        self,
        route: RouteId,
        source: BlockName | None,
        requests: Sequence[Request],
        hops: Sequence[tuple[Hop, ...] | None],
        arrival: _Arrival,
    ) -> None:
        way = self._ways.get(route)
        if way is None:
            log.error("block %s has no route %s any more", self.spec.name, route)
            for _ in requests:
                arrival.drop()
            return
        # While the block was busy with others, what came waited for it and not for the way.
        hop = max(0.0, time.monotonic() - max(arrival.sent, self._busy_until))
        start = 0
        wait = False
        for request, past in zip(requests, hops, strict=True):
            part = _Part(request, past, arrival, slice(start, start + request.rows))
            start += request.rows
            if way.sources == {source}:
                parts = {source: part}
                self._queue.append(
                    _Item(request, route, way, past, parts, arrival.time, arrival.sent, hop)
                )
            else:
                wait |= self._join(route, way, source, part, hop)
        if wait and arrival.in_slot:
            # Or else blocks that feed this one could wait for slots that are held here until what
            # they have not sent yet arrives.
            arrival.move_to(self._device)

    def _join(
        self, route: RouteId, way: _Way, source: BlockName | None, part: _Part, hop: float
    ) -> bool:
        """Take a part of a request and queue the request if it is the last; whether it waits."""
        request = part.request
        found = self._joins.add((route, request.id), way.sources, source, part, request.deadline)
        match found:
            case Verdict.WAITING:
                return True
            case Verdict.LOST:
                part.arrival.drop()
            case Verdict.REFUSED:
                part.arrival.drop()
                many = Overloaded(
                    f"{self._joins.waiting} requests wait at block {self.spec.name} for a part of "
                    "theirs; try again later"
                )
                self._fail([(route, way, request)], many)
            case parts:
                past = None
                if part.hops is not None:
                    known = {h.block: h for each in parts.values() for h in each.hops or ()}
                    past = tuple(known.values())
                since = max(each.arrival.time for each in parts.values())
                self._queue.append(
                    _Item(request, route, way, past, parts, since, part.arrival.sent, hop)
                )
        return False

    def _lose(self, route: RouteId, source: BlockName | None, requests: Sequence[Request]) -> None:
        """Requests failed at a block that feeds this one: there is nothing to wait for."""
        way = self._ways.get(route)
        if way is None:
            return
        for request in requests:
            key = route, request.id
            news, parts = self._joins.lose(key, way.sources, source, request.deadline)
            for part in parts:
                part.arrival.drop()
            if news:
                self._warn(route, way.legs, request, self._lost)

    def _expire(self) -> None:
        """Give up requests whose deadline passed while a part was missing."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        for (route, _), parts in self._joins.expire(now):
            way = self._ways.get(route)
            late = DeadlineExceeded(
                f"the deadline passed while block {self.spec.name} waited for a part of the request"
            )
            if way is not None and parts:
                self._fail([(route, way, parts[0].request)], late)
            for part in parts:
                part.arrival.drop()

    def _step(self) -> float:
        """Compute what should be computed now; gives the seconds to wait for more before asking."""
        now = time.monotonic()
        waiting = [
            Waiting(item.request.rows, item.since, item.request.deadline) for item in self._queue
        ]
        decision = decide(waiting, self._limits, now, self._busy_until)
        taken = set(decision.expired) | set(decision.batch)
        if taken:
            items = list(self._queue)
            self._queue = deque(item for i, item in enumerate(items) if i not in taken)
            for index in decision.expired:
                late = DeadlineExceeded(
                    f"the deadline passed before block {self.spec.name} could begin"
                )
                self._fail_items([items[index]], late)
                items[index].drop()
            if decision.batch:
                self._compute([items[index] for index in decision.batch])
                self._busy_until = time.monotonic()
        return 0.0 if decision.wake is None else max(0.0, decision.wake - now)

    def _compute(self, batch: list[_Item]) -> None:
        # Requests of one route side by side, so that they can be handed on together.
        batch.sort(key=lambda item: item.route)
        counts = self._counts
        for item in batch:
            pipeline = item.way.pipeline
            counts.requests[pipeline] = counts.requests.get(pipeline, 0) + 1
        self._write_ledger(_entries(batch))
        try:
            self._forward(batch)
        except torch.AcceleratorError as error:
            # The context is lost: every later call on this device would fail as well.
            self._fail_items(batch, error)
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model raises fails its own requests
            if len(batch) == 1:
                self._fail_items(batch, error)
            else:
                log.info("block %s: a batch failed (%s); one by one", self.spec.name, error)
                self._compute_one_by_one(batch)
        finally:
            self._write_ledger([])
            for item in batch:
                item.drop()

    def _compute_one_by_one(self, batch: Sequence[_Item]) -> None:
        """Find out which requests of a batch are at fault; the others get their answer."""
        for item in batch:
            try:
                self._forward([item])
            except torch.AcceleratorError:
                raise
            except Exception as error:  # noqa: BLE001 - as in `_compute`
                self._fail_items([item], error)

    def _forward(self, batch: Sequence[_Item]) -> None:
        started = time.monotonic()
        with contextlib.ExitStack() as reading:
            inputs = self._gather(batch, reading)
            began = self._event(timing=True)
            self._runner.take(inputs)
        with self._on_cores():
            outputs = self._runner.run()
        self._check_rows(outputs, sum(item.request.rows for item in batch))
        ended = self._event(timing=True)
        self._counts.sizes.add(len(batch))
        computed = None if self._gpu else time.monotonic() - started
        hops = [self._hops(item, started, computed) for item in batch]
        if computed is not None:
            self._counts.compute.add(computed)
        elif began is not None and ended is not None:
            asked = tuple(
                (item.route, item.way, item.request, mine[-1])
                for item, mine in zip(batch, hops, strict=True)
                if mine is not None
            )
            self._launched.append(_Launch(began, ended, _entries(batch), asked))
        # Outputs of a block that is a mere view lie in memory that is lent to it.
        lent = {each.untyped_storage().data_ptr() for parts in inputs.values() for each in parts}
        for first, last, start, rows in _messages(batch):
            alone = last - first == len(batch)
            mine = {
                # A batch of one request may have outputs without a dimension to cut.
                name: tensor if alone else tensor[start : start + rows]
                for name, tensor in outputs.items()
            }
            self._hand_on(batch[first:last], hops[first:last], mine, lent)

    def _hops(self, item: _Item, started: float, computed: float | None) -> tuple[Hop, ...] | None:
        """Count a request's times; gives them with those from before if somebody asked for them."""
        queued = max(0.0, started - item.sent - item.hop)
        self._counts.queue.add(queued)
        self._counts.hop.add(item.hop)
        if item.hops is None:
            return None
        compute_ms = None if computed is None else computed * 1e3
        return (*item.hops, Hop(self.spec.name, item.hop * 1e3, queued * 1e3, compute_ms))

    @contextlib.contextmanager
    def _on_cores(self) -> Iterator[None]:
        """Compute with this block's part of the cores. A GPU has no use for them."""
        if self._gpu:
            yield
            return
        threads = self._cores.take()
        try:
            if threads != self._threads:
                torch.set_num_threads(threads)  # of this thread alone
                self._threads = threads
            yield
        finally:
            self._cores.give_back()

    def _gather(
        self, batch: Sequence[_Item], reading: contextlib.ExitStack
    ) -> dict[str, list[Tensor]]:
        """The batch's inputs by port, in parts whose rows belong together.

        What was lent to this block is read until `reading` ends.
        """
        stream = torch.cuda.current_stream(self._device) if self._gpu else None
        arrivals = {
            id(part.arrival): part.arrival for item in batch for part in item.parts.values()
        }
        for arrival in arrivals.values():
            if stream is None:
                continue
            if arrival.loan is not None:
                reading.enter_context(arrival.loan.reading(stream))
            elif arrival.ready is not None:
                arrival.ready.wait(stream)
                for tensor in arrival.tensors.values():
                    # Its own stream's allocator may not reuse it while this stream reads it.
                    tensor.record_stream(stream)
        return {
            port: [self._here(port, *run) for run in _runs(batch, port)]
            for port in batch[0].way.feeds
        }

    def _here(
        self, port: str, arrival: _Arrival, name: str, rows: slice | None, count: int
    ) -> Tensor:
        """A part of the input `port`, with `count` rows. Raises BlockFailed for what does not fit:
        beside others in a batch it would shift their rows, or change their dtype."""
        tensor = arrival.tensors[name]
        if rows is not None:
            tensor = tensor[rows]
        wanted = self._wanted.get((port, count))
        if wanted is None:
            wanted = self._wanted[port, count] = self._expect(port, count)
        if (tensor.dtype, tensor.shape) != wanted:
            raise BlockFailed(
                f"block {self.spec.name} was given {port} as {tensor.dtype} {list(tensor.shape)} "
                f"and takes {wanted[0]} {list(wanted[1])}"
            )
        if self._runner.copies:
            return tensor
        if arrival.loan is not None:
            return tensor.clone()
        return tensor.to(self._device, non_blocking=True)

    def _expect(self, port: str, count: int) -> tuple[torch.dtype, torch.Size]:
        known = next(each for each in self._program.manifest.inputs if each.name == port)
        return getattr(torch, known.dtype), torch.Size(known.sized(count))

    def _check_rows(self, outputs: Mapping[str, Tensor], rows: int) -> None:
        """Raises BlockFailed where it cannot be told which rows are whose."""
        for port in self._program.manifest.outputs:
            if has_rows(port) and outputs[port.name].shape[:1] != (rows,):
                raise BlockFailed(
                    f"block {self.spec.name} gave {port.name} as "
                    f"{list(outputs[port.name].shape)} for {rows} rows"
                )

    def _hand_on(
        self,
        items: Sequence[_Item],
        hops: Sequence[tuple[Hop, ...] | None],
        outputs: Mapping[str, Tensor],
        lent: set[int],
    ) -> None:
        """Send the outputs of `items`, which share a route, to where that route leads."""
        way, route = items[0].way, items[0].route
        requests = tuple(item.request for item in items)
        deadlines = [request.deadline for request in requests]
        timed = any(each is not None for each in hops)
        note = encode(Note(tuple(hops), self.spec.name)) if timed else self._plain
        for number, leg in enumerate(way.legs):
            mine = {name: outputs[name] for name in leg.outputs}
            if isinstance(leg.to, Block):
                arrival = self._lend(leg.to.spec.name, mine, len(items), lent)
                leg.to.submit(route, self.spec.name, requests, hops, arrival)
                continue
            left = None if 0 in deadlines else max(0.0, max(deadlines) - time.monotonic())
            try:
                self._push.send(
                    mine, to=leg.to, requests=requests, route=route, note=note, timeout=left
                )
            except (PeerLost, NoSlot) as error:
                # Those before have theirs, and hear of it no more.
                self._fail_items(items, error, way.legs[number:])
                return

    def _lend(
        self, neighbour: BlockName, outputs: Mapping[str, Tensor], requests: int, lent: set[int]
    ) -> _Arrival:
        """Outputs as a block of this worker receives them."""
        kept = {
            name: tensor.clone() if tensor.untyped_storage().data_ptr() in lent else tensor
            for name, tensor in outputs.items()
        }
        count = self._local_counts.setdefault(neighbour, [0, 0])
        count[0] += 1
        count[1] += sum(tensor.nbytes for tensor in kept.values())
        loan = self._runner.lend(kept)
        if loan is not None:
            return _Arrival(loan.tensors, loan.end, requests, loan=loan)
        return _Arrival(kept, _nothing, requests, ready=self._event(timing=False))

    def _fail_items(
        self, items: Sequence[_Item], error: Exception, legs: Sequence[_Leg] | None = None
    ) -> None:
        self._fail([(item.route, item.way, item.request) for item in items], error, legs)

    def _fail(
        self,
        failed: Sequence[tuple[RouteId, _Way, Request]],
        error: Exception,
        legs: Sequence[_Leg] | None = None,
    ) -> None:
        """Tell the requests' gateways what happened, and those who would wait for parts of them.

        legs: where nothing was sent yet; all of a request's by default. The block goes on with the
        next request.
        """
        self._counts.failures += len(failed)
        match error:
            case BlockFlowError():
                known: BlockFlowError = error
            case NoSlot():
                known = DeadlineExceeded(
                    f"the deadline passed while block {self.spec.name} waited for the next block"
                )
            case PeerLost():
                known = Unavailable(f"the block after {self.spec.name} is gone: {error}")
            case _:
                text = str(error)[:_LONGEST_ERROR]
                known = BlockFailed(
                    f"block {self.spec.name} failed: {type(error).__name__}: {text}"
                )
                numbers = ", ".join(str(request.id) for _, _, request in failed)
                log.error("block %s failed at request %s", self.spec.name, numbers, exc_info=error)
        note = encode(Note(block=self.spec.name, error=str(known), status=known.status))
        for route, way, request in failed:
            try:
                self._push.send({}, to=way.results, requests=(request,), route=route, note=note)
            except PeerLost:
                log.warning("nobody is left to be told: %s", known)
            self._warn(route, way.legs if legs is None else legs, request, note)

    def _warn(self, route: RouteId, legs: Iterable[_Leg], request: Request, note: bytes) -> None:
        """Tell those who put parts of a request together that there will be none from here."""
        for receiver in (each for leg in legs for each in leg.warned):
            if isinstance(receiver, Block):
                receiver.lose(route, self.spec.name, (request,))
                continue
            # Whoever is gone has nothing to wait for.
            with contextlib.suppress(PeerLost):
                self._push.send({}, to=receiver, requests=(request,), route=route, note=note)

    def _event(self, *, timing: bool) -> torch.cuda.Event | None:
        if not self._gpu:
            return None
        event = torch.cuda.Event(enable_timing=timing)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _resolve_times(self) -> None:
        """Count device times that are known by now, and tell who asked; waits for none."""
        known = False
        while self._launched and self._launched[0].ended.query():
            launch = self._launched.popleft()
            milliseconds = launch.began.elapsed_time(launch.ended)
            self._counts.compute.add(milliseconds / 1e3)
            for route, way, request, hop in launch.asked:
                known_hop = msgspec.structs.replace(hop, compute_ms=milliseconds)
                self._tell(route, way, request, known_hop)
            known = True
        if known:
            self._write_ledger([])

    def _tell(self, route: RouteId, way: _Way, request: Request, hop: Hop) -> None:
        """Send a request's gateway a hop that was not known when the outputs were sent."""
        if self._ways.get(route) is not way:
            return  # it was retired: nobody waits for this any more
        note = encode(Note(((hop,),), self.spec.name))
        with contextlib.suppress(PeerLost):
            self._push.send({}, to=way.results, requests=(request,), route=route, note=note)

    def _write_ledger(self, beginning: Iterable[Entry]) -> None:
        """Say what is being computed: what begins now, and what a GPU has not finished."""
        launched = (entry for launch in self._launched for entry in launch.entries)
        self._ledger.write([*launched, *beginning])

    # The thread: routes

    def _connect(self, routes: Iterable[Route]) -> None:
        for route in routes:
            name = self.spec.name
            step = next(step for step in route.steps if step.block == name)
            following = route.following(name)
            answers = tuple(
                dict.fromkeys(each.port for each in route.gives.values() if each.block == name)
            )
            results = self._peer(route.results, tensors=bool(answers))
            legs = self._legs(route, following)
            if answers:
                legs.append(_Leg((results,), answers))
            self._ways[route.id] = _Way(
                pipeline=route.pipeline,
                feeds=step.feeds,
                sources=step.sources,
                legs=tuple(legs),
                rows=min(self.spec.max_batch, *(each.max_batch for each in following))
                if following
                else self.spec.max_batch,
                results=results,
            )

    def _legs(self, route: Route, following: Sequence[Step]) -> list[_Leg]:
        """Where outputs go that other blocks need: all of other workers get the same message."""
        joining = route.joining
        peers: list[Peer] = []
        warned: list[Peer] = []
        wanted: dict[str, None] = {}
        legs = []
        for step in following:
            outputs = dict.fromkeys(
                each.port for each in step.feeds.values() if each.block == self.spec.name
            )
            neighbour = self._neighbours.get(step.endpoint)
            if neighbour is not None:
                warn = (neighbour,) if step.block in joining else ()
                legs.append(_Leg(neighbour, tuple(outputs), warn))
                continue
            peer = self._peer(step.endpoint, tensors=True)
            peers.append(peer)
            warned += [peer] if step.block in joining else []
            wanted |= outputs
        if peers:
            legs.insert(0, _Leg(tuple(peers), tuple(wanted), tuple(warned)))
        return legs

    def _peer(self, endpoint: str, *, tensors: bool) -> Peer:
        """A channel to `endpoint`; one that only tells of failures takes no shared memory."""
        key = endpoint, tensors
        peer = self._peers.get(key)
        if peer is None or peer.lost is not None:
            carriers = None if tensors else [Carrier.INLINE]
            peer = self._peers[key] = self._push.connect(endpoint, carriers=carriers)
        return peer

    def _retire(self, routes: Iterable[RouteId]) -> None:
        gone = set(routes)
        for route in gone:
            self._ways.pop(route, None)
        for part in self._joins.forget([key for key in self._joins if key[0] in gone]):
            part.arrival.drop()
        needed = {id(way.results) for way in self._ways.values()}
        needed |= {
            id(peer)
            for way in self._ways.values()
            for leg in way.legs
            if not isinstance(leg.to, Block)
            for peer in leg.to
        }
        for key, peer in tuple(self._peers.items()):
            if id(peer) not in needed:
                del self._peers[key]
                self._push.disconnect(peer)


def _entries(batch: Iterable[_Item]) -> list[Entry]:
    return [Entry(item.request.id, item.request.deadline) for item in batch]


def _messages(batch: Sequence[_Item]) -> Iterator[tuple[int, int, int, int]]:
    """Cut a batch, sorted by route, into what can travel together.

    Gives (first item, item after the last, first row, rows): one route each, and no more rows than
    the block that follows takes in one message.
    """
    first = start = rows = 0
    for index, item in enumerate(batch):
        mine = item.request.rows
        if index > first and (item.route != batch[first].route or rows + mine > item.way.rows):
            yield first, index, start, rows
            first, start, rows = index, start + rows, 0
        rows += mine
    yield first, len(batch), start, rows


def _runs(batch: Sequence[_Item], port: str) -> Iterator[tuple[_Arrival, str, slice | None, int]]:
    """What feeds `port`: stretches of rows that lie together, None for all that arrived, and how
    many rows there should be."""
    run: list[_Part] = []
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


def _stretch(run: Sequence[_Part], name: str) -> tuple[_Arrival, str, slice | None, int]:
    arrival = run[0].arrival
    # All that arrived may have no dimension to cut.
    whole = len(run) == arrival.total
    start, stop = run[0].rows.start, run[-1].rows.stop
    return arrival, name, None if whole else slice(start, stop), stop - start


def _nothing() -> None:
    """Tensors that were handed over in the process need no release."""
