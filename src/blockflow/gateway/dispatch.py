"""Brings requests to the blocks and their answers back: asyncio on one side, TensorMQ on the other.

A thread owns the gateway's TensorMQ ends. A request crosses to it once with its tensors' bytes,
which are written into slots that the first blocks read from. The answer's cross back from each
block that gives some of them: the request is answered when all are there, or at the first failure.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np

from blockflow import oip
from blockflow.counting import LATENCY_SECONDS, Buckets, Hops
from blockflow.errors import (
    BlockFailed,
    BlockFlowError,
    DeadlineExceeded,
    Overloaded,
    Poisonous,
    Unavailable,
)
from blockflow.gateway.admission import Admission, Ticket
from blockflow.gateway.http import ModelStatus
from blockflow.gateway.line import Line
from blockflow.protocol import (
    ChannelReport,
    Histogram,
    Hop,
    Incarnation,
    Model,
    Note,
    PipelineCount,
    Route,
    RouteId,
    Step,
    decode_note,
    encode,
)
from blockflow.topology import BlockName, PipelineName
from tensormq import Filling, Loop, Message, Peer, Pull, Push, Request, TensorMQError, slot_size

log = logging.getLogger(__name__)

_TRIES = 3
"""How often a request is sent before the gateway gives up on it."""
_DEATHS = 2
"""After how many deaths of workers that computed it a request is taken for their cause."""

_TIMED = encode(Note(hops=((),)))
"""What travels with a request of which the times are wanted."""

_T = TypeVar("_T")


class _Stranded(Exception):
    """The route broke down under a request, which is not known to be at fault."""

    def __init__(self, reason: str, *, suspected: bool = False) -> None:
        super().__init__(reason)
        self.suspected = suspected


@dataclass(frozen=True)
class _Part:
    """Outputs that came from one block, by the names that clients use, and times on the way there.

    Without outputs, times that became known later.
    """

    outputs: Mapping[str, oip.TensorValue]
    hops: tuple[Hop, ...] | None


_Outcome: TypeAlias = _Part | BlockFlowError | _Stranded

_FAILURES: Mapping[int, type[BlockFlowError]] = {
    cls.status: cls for cls in (BlockFailed, DeadlineExceeded, Overloaded)
}


@dataclass
class _Entry:
    """A first block of one or more routes: a channel of its own, so that its queue is its own."""

    push: Push
    peer: Peer
    admission: Admission


@dataclass
class _Way:
    """`entries` are where a request goes first; `takes` says for each of them which inputs, by the
    names that clients use. `max_rows` is the most rows of one request."""

    route: Route
    entries: tuple[_Entry, ...]
    takes: tuple[tuple[str, ...], ...]
    max_rows: int
    under_way: dict[int, _Pending] = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    """The leave to go a way, with a ticket for each of its entries."""

    way: _Way
    tickets: tuple[Ticket, ...]

    def give_back(self, *, answered: bool) -> None:
        now = time.monotonic()
        for entry, ticket in zip(self.way.entries, self.tickets, strict=True):
            entry.admission.release(ticket, now, answered=answered)


@dataclass(eq=False)
class _Turn:
    """A request in a line: it takes no route that is `broken`."""

    rows: int
    broken: RouteId | None
    place: asyncio.Future[_Place]


@dataclass
class _Counts:
    requests: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    latency: Buckets = field(default_factory=lambda: Buckets(LATENCY_SECONDS))


@dataclass
class _Pending:
    """A request in the blocks. It holds its place until they are done with it, wanted or not.

    `began`: when its client's request was there, if the times are wanted.
    """

    place: _Place
    answer: asyncio.Future[oip.InferResult]
    began: float | None
    outputs: dict[str, oip.TensorValue] = field(default_factory=dict)
    times: dict[BlockName, oip.BlockTiming] = field(default_factory=dict)

    @property
    def given_up(self) -> bool:
        """The client left, or the request's time ran out."""
        return self.answer.cancelled()

    def add(self, part: _Part) -> oip.InferResult | None:
        """Take what one block gave, and give the answer if that was the last part of it."""
        self.outputs.update(part.outputs)
        for hop in part.hops or ():
            if hop.compute_ms is not None:
                self.times[hop.block] = oip.BlockTiming(
                    hop.block, hop.hop_ms, hop.queue_ms, hop.compute_ms
                )
        route = self.place.way.route
        if len(self.outputs) < len(route.outputs):
            return None
        timings = None
        if self.began is not None:
            if len(self.times) < len(route.steps):
                return None
            took = (time.monotonic() - self.began) * 1e3
            timings = oip.Timings(took, tuple(self.times[step.block] for step in route.steps))
        return oip.InferResult([self.outputs[port.name] for port in route.outputs], timings)


class BlockDispatcher:
    """Implements `http.Dispatcher` over deployed blocks. All methods belong to the event loop.

    results: endpoint for answers. incarnation: of this gateway. queue_depth: requests that may be
    under way through one first block. slowdown: how many times its unloaded time a request may take
    before others are refused. timeout: seconds that a request may take which names no time of its
    own.
    """

    def __init__(
        self,
        results: str,
        *,
        incarnation: Incarnation,
        queue_depth: int,
        slowdown: float,
        timeout: float,
    ) -> None:
        self._timeout = timeout
        self._asyncio = asyncio.get_running_loop()
        self._models: dict[str, ModelStatus] | None = None
        self._routes: dict[str, RouteId] = {}
        self._ways: dict[RouteId, _Way] = {}
        self._pending: dict[int, _Pending] = {}
        # Unique over gateways, because a ledger may name requests of one that is gone.
        self._ids = itertools.count((incarnation << 40) + 1)
        # Of models that have requests waiting.
        self._lines: dict[str, Line[_Turn]] = {}
        self._counts: dict[PipelineName, _Counts] = defaultdict(_Counts)
        self._settled = asyncio.Event()
        self._tensors = _TensorThread(
            results, queue_depth, lambda: Admission(queue_depth, slowdown), self._settle
        )

    # What the HTTP side asks

    def models(self) -> Mapping[str, ModelStatus]:
        if self._models is None:
            raise Unavailable("BlockFlow is starting: nothing is deployed yet")
        return self._models

    def check(self, model: str) -> None:
        """Raises Overloaded when a request to `model` would be refused whatever it holds."""
        self._has_to_wait(model, time.monotonic())

    def _has_to_wait(self, model: str, now: float) -> bool:
        """Whether a newcomer has to stand in line. Raises Overloaded when it may not even that."""
        route = self._routes.get(model)
        gates = () if route is None else tuple(e.admission for e in self._ways[route].entries)
        line = self._lines.get(model)
        if line is not None:
            if not line.takes(now, overloaded=any(gate.overloaded for gate in gates)):
                gates[0].overflow(PipelineName(model), now, len(line))
            return True
        if route is None or any(gate.full for gate in gates):
            return True
        for gate in gates:
            gate.check(PipelineName(model), now)
        return False

    async def infer(self, model: oip.ModelMetadata, request: oip.InferRequest) -> oip.InferResult:
        """Compute the answer, on another route if one breaks down under the request.

        Inference is pure and the request's bytes stay here until it is answered, so it can be sent
        again: at most `_TRIES` times, and not when it may be what workers die of.
        """
        counts = self._counts[PipelineName(model.name)]
        counts.requests += 1
        seconds = min(request.timeout or self._timeout, self._timeout)
        start = time.monotonic()
        try:
            try:
                async with asyncio.timeout(seconds):
                    result = await self._persist(model, request, start, start + seconds)
            except TimeoutError:
                status = self.models().get(model.name)
                why = f": {status.reason}" if status is not None and status.reason else ""
                raise DeadlineExceeded(
                    f"model {model.name!r} did not answer within {seconds:g} s{why}"
                ) from None
        except BlockFlowError as error:
            counts.errors[type(error).__name__] += 1
            raise
        counts.latency.add(time.monotonic() - start)
        return result

    async def _persist(
        self, model: oip.ModelMetadata, request: oip.InferRequest, start: float, deadline: float
    ) -> oip.InferResult:
        broken: RouteId | None = None
        deaths = 0
        for attempt in itertools.count(1):
            place = await self._enter(model.name, request.rows, deadline, broken)
            try:
                return await self._attempt(place, model, request, start, deadline)
            except _Stranded as stranded:
                broken = place.way.route.id
                deaths += stranded.suspected
                if deaths >= _DEATHS:
                    raise Poisonous(
                        f"{deaths} workers died while they computed this request: {stranded}"
                    ) from None
                if attempt >= _TRIES:
                    raise Unavailable(f"{stranded} (tried {attempt} times)") from None
        raise AssertionError("unreachable")

    async def _enter(
        self, model: str, rows: int, deadline: float, broken: RouteId | None
    ) -> _Place:
        """A place on the model's route, or on the one that replaces the `broken` one.

        Waits in line where it has to. Raises Overloaded, Unavailable.
        """
        now = time.monotonic()
        if broken is None and not self._has_to_wait(model, now):
            return self._admit(self._ways[self._routes[model]], rows, now, deadline - now)
        line = self._lines.get(model)
        if line is None:
            line = self._lines[model] = Line()
        if self._routes.get(model) in (None, broken):
            line.suspend(now)
        turn = _Turn(rows, broken, self._asyncio.create_future())
        line.join(turn, now)
        self._advance(model)
        try:
            return await turn.place
        except asyncio.CancelledError:
            if turn.place.cancelled():
                line.leave(turn)
                self._advance(model)
            elif turn.place.exception() is None:
                self._give_back(turn.place.result(), answered=False)
            raise

    def _advance(self, model: str) -> None:
        """Let those in a model's line go for whom there is a route and room."""
        line = self._lines.get(model)
        if line is None:
            return
        now = time.monotonic()
        status = self.models().get(model)
        if status is None or not (status.ready or status.returning):
            why = status.reason if status is not None else "it was just removed"
            for each in line:
                if not each.place.done():
                    each.place.set_exception(Unavailable(f"model {model!r} is not ready: {why}"))
            del self._lines[model]
            return
        route = self._routes.get(model)
        if route is None:
            return
        way = self._ways[route]
        while True:
            # Those for whom this is the broken route let the others pass.
            able = (each for each in line if each.broken != route and not each.place.done())
            turn = next(able, None)
            if turn is None:
                break
            line.resume(now)
            if not all(e.admission.has_room(way.route.pipeline, now) for e in way.entries):
                return
            line.leave(turn)
            turn.place.set_result(self._readmit(way, turn.rows, now, not line.recovers(now)))
        if not line:
            del self._lines[model]

    def _admit(self, way: _Way, rows: int, now: float, left: float) -> _Place:
        """Raises Overloaded when an answer is wanted within `left` seconds and there is no hope."""
        tickets: list[Ticket] = []
        try:
            pipeline = way.route.pipeline
            tickets.extend(e.admission.admit(pipeline, rows, now, left) for e in way.entries)
        except Overloaded:
            for entry, ticket in zip(way.entries, tickets, strict=False):
                entry.admission.release(ticket, now, answered=False)
            raise
        return _Place(way, tuple(tickets))

    def _readmit(self, way: _Way, rows: int, now: float, teaches: bool) -> _Place:
        pipeline = way.route.pipeline
        readmit = (each.admission.readmit(pipeline, rows, now, teaches) for each in way.entries)
        return _Place(way, tuple(readmit))

    def _give_back(self, place: _Place, *, answered: bool) -> None:
        place.give_back(answered=answered)
        for model in tuple(self._lines):
            self._advance(model)

    async def _attempt(
        self,
        place: _Place,
        model: oip.ModelMetadata,
        request: oip.InferRequest,
        start: float,
        deadline: float,
    ) -> oip.InferResult:
        route = place.way.route
        ours = (route.inputs, route.outputs) == (model.inputs, model.outputs)
        if not ours or request.rows > place.way.max_rows:
            self._give_back(place, answered=False)
            # What the tensors mean was decided by a generation that is no more.
            raise Unavailable(
                f"model {model.name!r} was replaced by one with other tensors or limits while "
                "the request was on its way; send it again"
            )
        number = next(self._ids)
        began = start if request.timing else None
        pending = _Pending(place, self._asyncio.create_future(), began)
        self._pending[number] = place.way.under_way[number] = pending
        envelope = Request(number, request.rows, deadline)
        self._tensors.submit(
            place.way,
            request.inputs,
            envelope,
            _TIMED if request.timing else b"",
            lambda: not pending.given_up,
        )
        try:
            return await pending.answer
        except BlockFailed:
            # Blocks know requests by these numbers alone; here the client's id is logged with it.
            log.warning("a block failed at request %d; its log says more", number)
            raise
        finally:
            self._settled.set()

    # What the server orders

    async def connect(self, routes: Iterable[Route]) -> None:
        """Open channels to the first blocks of each route. Raises TensorMQError."""
        for route in routes:
            self._ways[route.id] = await asyncio.wrap_future(self._tensors.open(route))

    async def retire(self, routes: Iterable[RouteId]) -> None:
        """Forget routes, and close the channels that no route needs any more."""
        for route in routes:
            way = self._ways.pop(route, None)
            if way is not None:
                for number in tuple(way.under_way):
                    self._settle(number, Unavailable("its route was retired"))
                used = {id(entry) for other in self._ways.values() for entry in other.entries}
                unused = tuple(entry for entry in way.entries if id(entry) not in used)
                await asyncio.wrap_future(self._tensors.retire(way.route, unused))

    def publish(self, models: Iterable[Model]) -> None:
        """Serve exactly these models; takes effect for the next request, and those that wait."""
        models = tuple(models)
        # A gateway that has just begun may hear of routes that it was not told to open yet.
        self._routes = {
            m.metadata.name: m.route
            for m in models
            if m.route is not None and m.route in self._ways
        }
        self._models = {
            m.metadata.name: ModelStatus(
                m.metadata,
                m.reason is None and m.metadata.name in self._routes,
                m.reason,
                returning=m.returning,
            )
            for m in models
        }
        now = time.monotonic()
        for model, line in tuple(self._lines.items()):
            if model in self._routes:
                line.resume(now)
            else:
                line.suspend(now)
            self._advance(model)

    async def drain(self, routes: Iterable[RouteId], seconds: float) -> None:
        """Wait until nothing is under way on these routes; end what is after `seconds`."""
        ways = [self._ways[route] for route in routes if route in self._ways]
        end = self._asyncio.time() + seconds
        # What nobody waits for any more is no reason to wait.
        while any(not each.given_up for way in ways for each in way.under_way.values()):
            self._settled.clear()
            try:
                async with asyncio.timeout_at(end):
                    await self._settled.wait()
            except TimeoutError:
                left = [number for way in ways for number in way.under_way]
                log.warning("%d requests are ended after %g s of draining", len(left), seconds)
                late = Unavailable(
                    f"the request was still under way {seconds:g} s after its pipeline was updated "
                    "(--drain-timeout), so it was ended; send it again"
                )
                for number in left:
                    self._settle(number, late)
                return

    def abort(self, routes: Iterable[RouteId], reason: str, suspects: Collection[int] = ()) -> None:
        """Give up what is under way on these routes; a worker died, perhaps of a suspect."""
        for route in routes:
            if (way := self._ways.get(route)) is not None:
                for number in tuple(way.under_way):
                    self._settle(number, _Stranded(reason, suspected=number in suspects))

    def counts(self) -> dict[PipelineName, PipelineCount]:
        return {
            name: PipelineCount(c.requests, dict(c.errors), c.latency.snapshot())
            for name, c in self._counts.items()
        }

    def channels(self) -> tuple[ChannelReport, ...]:
        """What went to each first block."""
        return self._tensors.channels()

    def hops(self) -> dict[str, Histogram]:
        """How long answers took from their announcement until they were taken, by carrier."""
        return self._tensors.hops.snapshot()

    async def close(self) -> None:
        for number in tuple(self._pending):
            self._settle(number, Unavailable("the server is shutting down"))
        await asyncio.to_thread(self._tensors.close)

    # What comes back

    def _settle(self, number: int, outcome: _Outcome) -> None:
        """The blocks are done with a request, or with a part of it: answer who still waits."""
        pending = self._pending.get(number)
        if pending is None:
            return
        answer = pending.add(outcome) if isinstance(outcome, _Part) else outcome
        if answer is None:
            return
        del self._pending[number], pending.place.way.under_way[number]
        answered = isinstance(answer, oip.InferResult)
        if not pending.given_up:
            if isinstance(answer, oip.InferResult):
                pending.answer.set_result(answer)
            else:
                pending.answer.set_exception(answer)
        self._settled.set()
        self._give_back(pending.place, answered=answered)


@dataclass(frozen=True)
class _Outgoing:
    """What is to be sent as soon as there are slots for it, if it is still `wanted`."""

    way: _Way
    inputs: Mapping[str, oip.TensorValue]
    request: Request
    note: bytes
    wanted: Callable[[], bool]

    @property
    def fits(self) -> bool:
        """Whether all slots are free, or it will be found that a channel is lost."""
        return all(entry.push.has_room(entry.peer) for entry in self.way.entries)


class _TensorThread:
    """The thread that owns the gateway's Push and Pull ends.

    admission: makes the gate before a first block. settle: called in the event loop with a
    request's id and a part of its answer, or its failure.
    """

    def __init__(
        self,
        results: str,
        depth: int,
        admission: Callable[[], Admission],
        settle: Callable[[int, _Outcome], None],
    ) -> None:
        self._depth = depth
        self._admission = admission
        self._settle = settle
        self._asyncio = asyncio.get_running_loop()
        self._loop = Loop()
        self._pull = Pull(results, loop=self._loop)
        self._entries: dict[str, _Entry] = {}
        self._routes: dict[RouteId, Route] = {}
        self._jobs: deque[Callable[[], None]] = deque()
        self._outgoing: deque[_Outgoing] = deque()
        self._stopping = False
        self.hops = Hops()
        self._thread = threading.Thread(target=self._run, name="gateway tensors")
        self._thread.start()

    # Called from the event loop

    def submit(
        self,
        way: _Way,
        inputs: Iterable[oip.TensorValue],
        request: Request,
        note: bytes,
        wanted: Callable[[], bool],
    ) -> None:
        """Write `inputs` into slots of the first blocks' channels and send them."""
        outgoing = _Outgoing(way, {tensor.name: tensor for tensor in inputs}, request, note, wanted)
        self._loop.call_soon(lambda: self._outgoing.append(outgoing))

    def open(self, route: Route) -> Future[_Way]:
        """Open the channels to a route's first blocks, or find those that are open."""
        return self._perform(lambda: self._open(route))

    def retire(self, route: Route, unused: Collection[_Entry]) -> Future[None]:
        """Forget a route and close the channels that no other needs."""
        return self._perform(lambda: self._retire(route, unused))

    def channels(self) -> tuple[ChannelReport, ...]:
        return tuple(
            ChannelReport(s.endpoint, str(s.carrier), s.messages, s.bytes, s.host_bytes)
            for entry in tuple(self._entries.values())
            for s in entry.push.statistics()
        )

    def close(self) -> None:
        def stop() -> None:
            self._stopping = True

        self._loop.call_soon(stop)
        self._thread.join()

    def _perform(self, job: Callable[[], _T]) -> Future[_T]:
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except TensorMQError as error:
                future.set_exception(error)

        # Not in the callback itself: a job may wait for a peer, and a callback must not.
        self._loop.call_soon(lambda: self._jobs.append(run))
        return future

    # The thread

    def _run(self) -> None:
        while not self._stopping:
            self._loop.run_once()
            while self._jobs:
                self._jobs.popleft()()
            self._send_what_fits()
            while (message := self._pull.poll()) is not None:
                with message:
                    self._deliver(message)
        for entry in self._entries.values():
            entry.push.close()
        self._pull.close()
        self._loop.close()

    def _open(self, route: Route) -> _Way:
        self._routes[route.id] = route
        first = [step for step in route.steps if None in step.sources]
        return _Way(
            route,
            entries=tuple(map(self._entry, first)),
            # Once each, though one tensor may feed two ports of a block.
            takes=tuple(
                tuple(dict.fromkeys(s.port for s in step.feeds.values() if s.block is None))
                for step in first
            ),
            max_rows=min(step.max_batch for step in route.steps),
        )

    def _entry(self, step: Step) -> _Entry:
        entry = self._entries.get(step.endpoint)
        if entry is None:
            # Room for all of its inputs, though on some routes other blocks feed it as well.
            size = slot_size(
                {port.name: (port.dtype, port.sized(step.max_batch)) for port in step.takes}
            )
            push = Push(slots=self._depth, slot_bytes=size, loop=self._loop)
            try:
                entry = _Entry(push, push.connect(step.endpoint), self._admission())
            except BaseException:
                push.close()
                raise
            self._entries[step.endpoint] = entry
        return entry

    def _retire(self, route: Route, unused: Collection[_Entry]) -> None:
        self._routes.pop(route.id, None)
        for entry in unused:
            del self._entries[entry.peer.endpoint]
            entry.push.close()

    def _send_what_fits(self) -> None:
        # Slots may be taken although fewer requests are under way than there are slots: an answer
        # can overtake the release of its input, and what a broken route held is released late.
        for _ in range(len(self._outgoing)):
            outgoing = self._outgoing.popleft()
            number = outgoing.request.id
            if not outgoing.wanted():
                self._answer(number, Unavailable("nobody waits for it any more"))
            elif not outgoing.fits:
                self._outgoing.append(outgoing)
            else:
                try:
                    self._send(outgoing)
                except TensorMQError as error:
                    reason = f"the first block cannot be reached: {error}"
                    self._answer(number, _Stranded(reason))

    def _send(self, outgoing: _Outgoing) -> None:
        """Send all that is needed or nothing. Raises TensorMQError."""
        way, inputs = outgoing.way, outgoing.inputs
        fillings: list[Filling] = []
        try:
            for entry, names in zip(way.entries, way.takes, strict=True):
                filling = entry.push.allocate(
                    {name: (inputs[name].dtype, inputs[name].shape) for name in names},
                    to=entry.peer,
                    timeout=0,
                )
                fillings.append(filling)
                for name in names:
                    raw: np.ndarray[Any, Any] = filling.tensors[name].reshape(-1).view(np.uint8)
                    raw[:] = np.frombuffer(inputs[name].data, np.uint8)
            for entry, filling in zip(way.entries, fillings, strict=True):
                entry.push.send(
                    filling,
                    to=entry.peer,
                    requests=(outgoing.request,),
                    route=way.route.id,
                    note=outgoing.note,
                )
        finally:
            for filling in fillings:
                filling.abandon()

    def _deliver(self, message: Message) -> None:
        note = decode_note(message.note)
        if note.error is not None:
            failure: BlockFlowError | _Stranded
            if note.status == Unavailable.status:
                failure = _Stranded(note.error)
            else:
                failure = _FAILURES.get(note.status, BlockFailed)(note.error)
            for request in message.requests:
                self._answer(request.id, failure)
            return
        if message.hop is not None:
            self.hops.add(str(message.carrier), message.hop)
        route = self._routes.get(RouteId(message.route))
        if route is None:
            return  # it was retired: nobody waits for this any more
        # A message without tensors tells of times only.
        given = [
            (port, source.port)
            for port in route.outputs
            if message.tensors and (source := route.gives[port.name]).block == note.block
        ]
        start = 0
        every = note.hops or (None,) * len(message.requests)
        for request, hops in zip(message.requests, every, strict=True):
            rows = slice(start, start + request.rows)
            start += request.rows
            outputs = {}
            for port, theirs in given:
                array = message.tensors[theirs]
                mine = array[rows] if len(message.requests) > 1 else array
                # Copied, for the slot goes back to the block now and a client may be slow.
                data = memoryview(mine.tobytes())
                outputs[port.name] = oip.TensorValue(port.name, port.dtype, mine.shape, data)
            self._answer(request.id, _Part(outputs, hops))

    def _answer(self, number: int, outcome: _Outcome) -> None:
        self._asyncio.call_soon_threadsafe(self._settle, number, outcome)
