"""A block at work: it receives requests, batches, computes, and hands on.

A block is served by one thread (`runtime`), which may serve others too, and never waits here: what
cannot be sent yet is kept until there is room, and what a GPU is given is ordered there, by the
stream and by TensorMQ's words.

Requests of different pipelines that wait at a block are computed together and go their own ways
afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec
import torch
from torch import Tensor

from blockflow.artifact import BATCH, Port
from blockflow.batching import Limits, Waiting, decide
from blockflow.cores import Cores
from blockflow.counting import BATCH_SIZES, BLOCK_SECONDS, Buckets
from blockflow.errors import (
    BlockFailed,
    BlockFlowError,
    DeadlineExceeded,
    Overloaded,
    Unavailable,
)
from blockflow.handover import (
    Arrival,
    Item,
    Leg,
    Neighbour,
    Parcel,
    Part,
    Way,
    entries,
    messages,
    nothing,
    runs,
)
from blockflow.joining import Joins, Verdict
from blockflow.launches import Launches
from blockflow.ledger import Entry, Ledger, ledger_path
from blockflow.program import Program
from blockflow.protocol import (
    BlockReport,
    ChannelReport,
    Hop,
    Note,
    Route,
    RouteId,
    decode_note,
    encode,
)
from blockflow.reconcile import BlockSpec
from blockflow.runner import prepare
from blockflow.topology import BlockName, PipelineName
from blockflow.ways import Ways
from tensormq import (
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

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
"""How often a block looks for parts that are late and, while it waits, for device times."""
_ASKED_SECONDS = 0.001
"""How often it looks, while it has nothing else to do, for a device time that somebody awaits."""
_FREE_SECONDS = 5e-5
"""How often it looks whether a GPU that has enough to do has done some of it."""
_AHEAD = 2
"""Batches that a GPU has enough to do with: one that is computed, and one to follow at once."""
_MOST_NOTES = 64
"""Notes that say nothing but who sent them, and are read once: one for each block before."""
_MOST_JOINING = 1024
"""Requests that wait for a part of theirs: far more than credits let be under way."""
_LONGEST_ERROR = 2000
"""Characters of a model's error that clients get to see."""

_Forms: TypeAlias = Mapping[str, tuple[torch.dtype, torch.Size]]
"""The dtype and shape of a tensor, by the name of its port."""


@dataclass
class _Counts:
    requests: dict[PipelineName, int] = field(default_factory=dict)
    failures: int = 0
    sizes: Buckets = field(default_factory=lambda: Buckets(BATCH_SIZES))
    compute: Buckets = field(default_factory=lambda: Buckets(BLOCK_SECONDS))
    queue: Buckets = field(default_factory=lambda: Buckets(BLOCK_SECONDS))
    hop: Buckets = field(default_factory=lambda: Buckets(BLOCK_SECONDS))


class Block:
    """A loaded block.

    endpoint: where its inputs arrive. neighbours: the blocks of this worker by endpoint, to which
    tensors are handed in the process. slots: messages that may be under way to the blocks that
    follow. fused: the blocks that are run in one go with it, and are in `program`.

    All methods but `submit`, `lose` and `reports` are for the thread that serves it, after
    `enter`.
    """

    def __init__(
        self,
        spec: BlockSpec,
        program: Program,
        endpoint: str,
        neighbours: Mapping[str, Neighbour],
        slots: int = 4,
        fused: Sequence[BlockName] = (),
    ) -> None:
        self.spec = spec
        self.endpoint = endpoint
        self._program = program
        self._neighbours = neighbours
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
        self._can_batch = self._limits.max_rows > 1 and not self._limits.alone
        self._queue: deque[Item] = deque()
        # Of a batch that failed: computed one by one, before all others.
        self._suspects: deque[Item] = deque()
        # What there was no room for yet, and the batch whose outputs these are.
        self._outbox: deque[Parcel] = deque()
        self._held: Sequence[Item] = ()
        self._joins: Joins[tuple[RouteId, int], BlockName | None, Part] = Joins(_MOST_JOINING)
        self._local_counts: dict[BlockName, list[int]] = {}
        self._counts = _Counts()
        self._notes: dict[bytes, Note] = {}
        # What inputs and outputs must be, by the number of rows.
        self._takes: dict[int, _Forms] = {}
        self._gives: dict[int, _Forms] = {}
        self._busy_until = float("-inf")
        self._next_look = 0.0
        self._stream: torch.cuda.Stream | None = None
        self._launches: Launches | None = None
        self.fresh = False
        """Whether something came from a block of the same thread since the last turn."""
        self.due = math.inf
        """When it wants a turn even if nothing happens, by the monotonic clock."""

    # Called from any thread

    @property
    def name(self) -> BlockName:
        return self.spec.name

    def submit(
        self,
        route: RouteId,
        source: BlockName,
        requests: Sequence[Request],
        hops: Sequence[tuple[Hop, ...] | None],
        arrival: Arrival,
        loop: Loop,
    ) -> None:
        """Take requests from a block of the same worker, which is served by `loop`."""
        if loop is self._loop:
            self.fresh = True
            self._enqueue(route, source, requests, hops, arrival)
        else:
            self._loop.call_soon(lambda: self._enqueue(route, source, requests, hops, arrival))

    def lose(self, route: RouteId, source: BlockName, requests: Sequence[Request]) -> None:
        """Hear that requests failed at a block of the same worker that feeds this one."""
        self._loop.call_soon(lambda: self._lose(route, source, requests))

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
        channels = [
            ChannelReport(s.endpoint, str(s.carrier), s.messages, s.bytes, s.host_bytes)
            for s in self._push.statistics()
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

    # Life

    def open(
        self, loop: Loop, shared: torch.cuda.Stream | None, on_fatal: Callable[[str], None]
    ) -> None:
        """Warm up, and receive from now on.

        shared: on a GPU, a stream of the thread's blocks. on_fatal: called with the reason when
        nothing in this process can compute any more.
        """
        self._loop = loop
        if shared is not None:
            self._use(torch.cuda.Stream(self._device) if self.spec.cuda_graph else shared)
        self._runner = prepare(self._program, self.spec.max_batch, graphs=self.spec.cuda_graph)
        if shared is not None and not self._runner.static:
            # Graphs of several blocks run side by side. Kernels that are launched one by one hardly
            # do, and torch and cuBLAS keep memory for every stream that they have computed on.
            self._use(shared)
        if self._runner.reason is not None:
            log.info("block %s runs eagerly: %s", self.spec.name, self._runner.reason)
        largest = {
            port.name: (port.dtype, port.sized(self.spec.max_batch))
            for port in self._program.manifest.outputs
        }
        device = str(self._device)
        self._pull = Pull(self.endpoint, device=device, loop=loop)
        self._push = Push(
            slots=self._slots, slot_bytes=slot_size(largest), device=device, loop=loop
        )
        self._pull.on_torn = lambda: on_fatal(
            f"block {self.spec.name}: the block before it died in the middle of a tensor"
        )
        self._push.on_lost = lambda peer: log.info("lost %s: %s", peer.endpoint, peer.lost)
        self._ways = Ways(self.spec, self._push, self._neighbours)
        path = ledger_path(self.endpoint)
        self._ledger = Ledger(path)
        self._cores = Cores(
            path.with_name("all.cores"),
            path.name,
            self.spec.threads,
            alone=self.spec.cpus is not None,
        )

    def _use(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._launches = Launches(stream)
        self.enter()

    def enter(self) -> None:
        """What the thread gives its GPU from now on is this block's."""
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)

    def close(self) -> None:
        self._pull.close()
        self._push.close()
        self._ledger.close()
        self._cores.close()

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to compute or to send."""
        return not (self._queue or self._suspects or self._outbox)

    @property
    def busy(self) -> bool:
        """Whether a turn would find anything to do."""
        return bool(self._queue or self._pull.waiting or self._outbox or self._suspects)

    def turn(self) -> None:
        """Do what can be done now, and say when there may be more to do (`due`)."""
        self.fresh = False
        while (message := self._pull.poll()) is not None:
            self._take(message)
        self._flush()
        wait: float | None = None
        if self._outbox:
            # The outputs lie where the next run would write.
            wait = _LOOK_SECONDS
        elif self._suspects:
            self._compute([self._suspects.popleft()])
            wait = 0.0
        elif self._queue:
            wait = self._step()
        # Not before: a request that came waits for none of this.
        self._resolve_times()
        self._expire()
        if wait is None:
            # Of all else the loop will tell.
            if self._launches is not None and self._launches.asked:
                wait = _ASKED_SECONDS
            else:
                wait = _LOOK_SECONDS if self._launches or self._joins.waiting else math.inf
        self.due = time.monotonic() + wait

    # Taking

    def _take(self, message: Message) -> None:
        note = self._notes.get(message.note)
        if note is None:
            try:
                note = decode_note(message.note)
            except msgspec.MsgspecError as error:
                log.warning("block %s received an unreadable note: %s", self.spec.name, error)
                message.release()
                return
            if not note.hops and note.error is None and len(self._notes) < _MOST_NOTES:
                self._notes[message.note] = note
        route, requests = RouteId(message.route), message.requests
        if note.error is not None:
            message.release()
            self._lose(route, note.block, requests)
            return
        arrival = Arrival(message.tensors, message.release, len(requests), in_slot=True)
        arrival.sent = arrival.time - (message.hop or 0.0)
        self._enqueue(route, note.block, requests, note.hops or (None,) * len(requests), arrival)

    def _enqueue(
        self,
        route: RouteId,
        source: BlockName | None,
        requests: Sequence[Request],
        hops: Sequence[tuple[Hop, ...] | None],
        arrival: Arrival,
    ) -> None:
        way = self._ways.get(route)
        if way is None:
            log.error("block %s has no route %s any more", self.spec.name, route)
            for _ in requests:
                arrival.drop()
            return
        if self._gpu:
            # What a GPU computes is announced at once.
            self._push.rouse(way.followers)
        # While the block was busy with others, what came waited for it and not for the way.
        hop = max(0.0, time.monotonic() - max(arrival.sent, self._busy_until))
        start = 0
        wait = False
        alone = way.sources == {source}
        for request, past in zip(requests, hops, strict=True):
            part = Part(request, past, arrival, slice(start, start + request.rows))
            start += request.rows
            if alone:
                waiting = Waiting(request.rows, arrival.time, request.deadline)
                parts = {source: part}
                self._queue.append(
                    Item(request, route, way, past, parts, waiting, arrival.sent, hop)
                )
            else:
                wait |= self._join(route, way, source, part, hop)
        if wait and arrival.in_slot:
            # Or else blocks that feed this one could wait for slots that are held here until what
            # they have not sent yet arrives.
            arrival.move_to(self._device)

    def _join(
        self, route: RouteId, way: Way, source: BlockName | None, part: Part, hop: float
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
                waiting = Waiting(request.rows, since, request.deadline)
                self._queue.append(
                    Item(request, route, way, past, parts, waiting, part.arrival.sent, hop)
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
        """Give up requests whose deadline passed while a part, or room for the outputs of those
        before them, was missing."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        if self._outbox:
            late = {i for i, item in enumerate(self._queue) if 0 < item.request.deadline < now}
            self._take_out(late)
        for (route, _), parts in self._joins.expire(now):
            way = self._ways.get(route)
            if way is not None and parts:
                missing = DeadlineExceeded(
                    f"the deadline passed while block {self.spec.name} waited for a part of the "
                    "request"
                )
                self._fail([(route, way, parts[0].request)], missing)
            for part in parts:
                part.arrival.drop()

    # Computing

    def _step(self) -> float | None:
        """Compute what should be computed now; gives the seconds to wait for more before asking."""
        occupied = False
        if self._launches is not None and len(self._launches) >= _AHEAD and self._can_batch:
            self._resolve_times()
            occupied = len(self._launches) >= _AHEAD
        now = time.monotonic()
        queue = [item.waiting for item in self._queue]
        decision = decide(queue, self._limits, now, self._busy_until, occupied=occupied)
        batch = self._take_out(set(decision.expired), set(decision.batch))
        if batch:
            self._compute(batch)
            requests = self._counts.requests
            for item in batch:
                pipeline = item.way.pipeline
                requests[pipeline] = requests.get(pipeline, 0) + 1
            self._busy_until = time.monotonic()
            return 0.0 if self._queue or self._suspects else None
        if decision.wake is None:
            return _FREE_SECONDS if self._queue else None
        return max(0.0, decision.wake - now)

    def _take_out(self, late: Set[int], batch: Set[int] = frozenset()) -> list[Item]:
        """Take requests out of the queue, by their places in it: those at `late` fail, those at
        `batch` are returned."""
        if not late and len(batch) == len(self._queue):
            taken = list(self._queue)
            self._queue.clear()
            return taken
        items = list(enumerate(self._queue))
        self._queue = deque(item for i, item in items if i not in late and i not in batch)
        for item in [item for i, item in items if i in late]:
            error = DeadlineExceeded(
                f"the deadline passed before block {self.spec.name} could begin"
            )
            self._fail_items([item], error)
            item.drop()
        return [item for i, item in items if i in batch]

    def _compute(self, batch: list[Item]) -> None:
        # Requests of one route side by side, so that they can be handed on together.
        if len(batch) > 1:
            batch.sort(key=lambda item: item.route)
        mine = entries(batch)
        self._write_ledger(mine)
        try:
            self._forward(batch, mine)
        except torch.AcceleratorError as error:
            # The context is lost: every later call on this device would fail as well.
            self._write_ledger()
            self._fail_items(batch, error)
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model raises fails its own requests
            self._write_ledger()
            if len(batch) > 1:
                log.info("block %s: a batch failed (%s); one by one", self.spec.name, error)
                self._suspects.extend(batch)
                return
            self._fail_items(batch, error)
            for item in batch:
                item.drop()

    def _forward(self, batch: Sequence[Item], mine: Sequence[Entry]) -> None:
        started = time.monotonic()
        began = None
        with contextlib.ExitStack() as reading:
            if self._stream is not None:
                _wait_for(batch, self._stream, reading)
            inputs = self._gather(batch)
            if self._launches is not None:
                began = self._launches.mark()
            self._runner.take(inputs)
        if self._launches is None:
            with self._on_cores():
                outputs = self._runner.run()
            computed: float | None = time.monotonic() - started
            self._write_ledger()
        else:
            outputs = self._runner.run()
            computed = None
        if not self._runner.static:
            self._check(outputs, sum(item.request.rows for item in batch))
        hops = [self._hops(item, started, computed) for item in batch]
        if self._launches is not None and began is not None:
            pairs = zip(batch, hops, strict=True)
            asked = tuple((item, past[-1]) for item, past in pairs if past is not None)
            self._launches.add(began, mine, asked)
        # Outputs of a block that is a mere view lie in memory that is lent to it.
        lent = (
            set()
            if self._runner.static
            else {each.untyped_storage().data_ptr() for parts in inputs.values() for each in parts}
        )
        for first, last, start, count in messages(batch):
            cut = slice(start, start + count)
            # A batch of one message may have outputs without a dimension to cut.
            whole = last - first == len(batch)
            sent = outputs if whole else {name: each[cut] for name, each in outputs.items()}
            self._hand_on(batch[first:last], hops[first:last], sent, lent)
        self._held = batch
        self._flush()
        self._count(batch, started, computed)

    def _count(self, batch: Sequence[Item], started: float, computed: float | None) -> None:
        counts = self._counts
        counts.sizes.add(len(batch))
        if computed is not None:
            counts.compute.add(computed)
        for item in batch:
            counts.queue.add(item.queued(started))
            counts.hop.add(item.hop)

    def _hops(self, item: Item, started: float, computed: float | None) -> tuple[Hop, ...] | None:
        """A request's times so far, if somebody asked for them."""
        if item.hops is None:
            return None
        compute_ms = None if computed is None else computed * 1e3
        queued = item.queued(started)
        return (*item.hops, Hop(self.spec.name, item.hop * 1e3, queued * 1e3, compute_ms))

    @contextlib.contextmanager
    def _on_cores(self) -> Iterator[None]:
        """Compute with this block's part of the cores."""
        threads = self._cores.take()
        try:
            if threads != torch.get_num_threads():
                torch.set_num_threads(threads)  # of this thread alone
            yield
        finally:
            self._cores.give_back()

    def _gather(self, batch: Sequence[Item]) -> dict[str, list[Tensor]]:
        """The batch's inputs by port, in parts whose rows belong together."""
        return {
            port: [self._here(port, *run) for run in runs(batch, port)]
            for port in batch[0].way.feeds
        }

    def _here(
        self, port: str, arrival: Arrival, name: str, rows: slice | None, count: int
    ) -> Tensor:
        """A part of the input `port`, with `count` rows. Raises BlockFailed for what does not fit:
        beside others in a batch it would shift their rows, or change their dtype."""
        tensor = arrival.tensors[name]
        if rows is not None:
            tensor = tensor[rows]
        forms = self._takes.get(count)
        if forms is None:
            forms = self._takes[count] = _forms(self._program.manifest.inputs, count)
        wanted = forms[port]
        if (tensor.dtype, tensor.shape) != wanted:
            raise BlockFailed(
                f"block {self.spec.name} was given {port} as {tensor.dtype} {list(tensor.shape)} "
                f"and takes {wanted[0]} {list(wanted[1])}"
            )
        if self._runner.static:
            return tensor
        if arrival.loan is not None:
            return tensor.clone()
        return tensor.to(self._device, non_blocking=True)

    def _check(self, outputs: Mapping[str, Tensor], rows: int) -> None:
        """Raises BlockFailed for what does not fit the ports, as a TorchScript model may give that
        decides by its data: whoever reads it takes it for what the manifest says, and it could not
        be told which rows are whose."""
        forms = self._gives.get(rows)
        if forms is None:
            forms = self._gives[rows] = _forms(self._program.manifest.outputs, rows)
        for port, wanted in forms.items():
            tensor = outputs[port]
            if (tensor.dtype, tensor.shape) != wanted:
                raise BlockFailed(
                    f"block {self.spec.name} gave {port} as {tensor.dtype} {list(tensor.shape)} "
                    f"and should give {wanted[0]} {list(wanted[1])}"
                )
            if tensor.layout is not torch.strided:
                raise BlockFailed(
                    f"block {self.spec.name} gave {port} as a {tensor.layout} tensor, and should "
                    "give a dense one"
                )

    # Handing on

    def _hand_on(
        self,
        items: Sequence[Item],
        hops: Sequence[tuple[Hop, ...] | None],
        outputs: Mapping[str, Tensor],
        lent: set[int],
    ) -> None:
        """Give the outputs of `items`, which share a route, to where that route leads: at once
        within this worker, else by the outbox."""
        way, route = items[0].way, items[0].route
        requests = tuple(item.request for item in items)
        timed = any(each is not None for each in hops)
        note = encode(Note(tuple(hops), self.spec.name)) if timed else self._plain
        for leg in way.legs:
            mine = {name: outputs[name] for name in leg.outputs}
            if isinstance(leg.to, tuple):
                self._outbox.append(Parcel(items, requests, leg, leg.to, mine, note))
            else:
                arrival = self._lend(leg.to.name, mine, len(items), lent)
                leg.to.submit(route, self.spec.name, requests, hops, arrival, self._loop)

    def _flush(self) -> None:
        """Send what there is room for, in order. What is too late for that is given up."""
        while self._outbox:
            parcel = self._outbox[0]
            if not self._push.has_room(parcel.to):
                if not 0 < parcel.deadline < time.monotonic():
                    return
                late = DeadlineExceeded(
                    f"the deadline passed while block {self.spec.name} waited for the next block"
                )
                self._fail_items(parcel.items, late, (parcel.leg,))
            else:
                self._send(parcel)
            self._outbox.popleft()
        for item in self._held:
            item.drop()
        self._held = ()

    def _send(self, parcel: Parcel) -> None:
        try:
            self._push.send(
                parcel.tensors,
                to=parcel.to,
                requests=parcel.requests,
                route=parcel.items[0].route,
                note=parcel.note,
            )
        except TensorMQError as error:
            self._fail_items(parcel.items, error, (parcel.leg,))

    def _lend(
        self, neighbour: BlockName, outputs: Mapping[str, Tensor], requests: int, lent: set[int]
    ) -> Arrival:
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
            return Arrival(loan.tensors, loan.end, requests, loan=loan)
        ready = None if self._stream is None else self._stream.record_event()
        return Arrival(kept, nothing, requests, ready=ready)

    def _fail_items(
        self, items: Sequence[Item], error: Exception, legs: Sequence[Leg] | None = None
    ) -> None:
        self._fail([(item.route, item.way, item.request) for item in items], error, legs)

    def _fail(
        self,
        failed: Sequence[tuple[RouteId, Way, Request]],
        error: Exception,
        legs: Sequence[Leg] | None = None,
    ) -> None:
        """Tell the requests' gateways what happened, and those who would wait for parts of them.

        legs: where nothing was sent; all of a request's by default. The block goes on with the
        next request.
        """
        self._counts.failures += len(failed)
        match error:
            case BlockFlowError():
                known: BlockFlowError = error
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

    def _warn(self, route: RouteId, legs: Iterable[Leg], request: Request, note: bytes) -> None:
        """Tell those who put parts of a request together that there will be none from here."""
        for receiver in (each for leg in legs for each in leg.warned):
            if not isinstance(receiver, Peer):
                receiver.lose(route, self.spec.name, (request,))
                continue
            # Whoever is gone has nothing to wait for.
            with contextlib.suppress(PeerLost):
                self._push.send({}, to=receiver, requests=(request,), route=route, note=note)

    # Telling

    def _resolve_times(self) -> None:
        """Count device times that are known by now, and tell who asked; waits for none."""
        known = False
        for launch, seconds in self._launches.ended() if self._launches else ():
            self._counts.compute.add(seconds)
            for item, hop in launch.asked:
                self._tell(item, msgspec.structs.replace(hop, compute_ms=seconds * 1e3))
            known = True
        if known:
            self._write_ledger()

    def _tell(self, item: Item, hop: Hop) -> None:
        """Send a request's gateway a hop that was not known when the outputs were sent."""
        if self._ways.get(item.route) is not item.way:
            return  # it was retired: nobody waits for this any more
        note = encode(Note(((hop,),), self.spec.name))
        with contextlib.suppress(PeerLost):
            self._push.send(
                {}, to=item.way.results, requests=(item.request,), route=item.route, note=note
            )

    def _write_ledger(self, beginning: Sequence[Entry] = ()) -> None:
        """Say what is being computed: what begins now, and what a GPU has not finished."""
        launched = self._launches.entries if self._launches else []
        self._ledger.write([*launched, *beginning])

    # Routes

    def connect(self, routes: Iterable[Route]) -> None:
        """Learn those of `routes` that pass this block and open their channels."""
        for route in routes:
            if any(step.block == self.spec.name for step in route.steps):
                self._ways.learn(route)

    def retire(self, routes: Iterable[RouteId]) -> None:
        """Forget routes, and close the channels that no route needs any more."""
        gone = set(routes)
        for part in self._joins.forget([key for key in self._joins if key[0] in gone]):
            part.arrival.drop()
        self._ways.forget(gone)


def _forms(ports: Iterable[Port], rows: int) -> _Forms:
    return {port.name: (getattr(torch, port.dtype), torch.Size(port.sized(rows))) for port in ports}


def _wait_for(
    batch: Sequence[Item], stream: torch.cuda.Stream, reading: contextlib.ExitStack
) -> None:
    """Have `stream` wait for what other streams of this process compute for the batch.

    What was lent is read until `reading` ends.
    """
    arrivals = {id(part.arrival): part.arrival for item in batch for part in item.parts.values()}
    for arrival in arrivals.values():
        if arrival.loan is not None:
            reading.enter_context(arrival.loan.reading(stream))
        elif arrival.ready is not None:
            arrival.ready.wait(stream)
            for tensor in arrival.tensors.values():
                # Its own stream's allocator may not reuse it while this stream reads it.
                tensor.record_stream(stream)
