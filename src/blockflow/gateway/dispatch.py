"""Brings requests to the blocks and their answers back: admits them, keeps them until they are
answered, and sends them again when a route breaks down under them. For one event loop.

A request is answered when what each block gives of its outputs is there, or at the first failure.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from blockflow import oip
from blockflow.counting import LATENCY_SECONDS, Buckets
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
from blockflow.gateway.tensors import Outcome, Part, Stranded, TensorThread, Way
from blockflow.protocol import (
    ChannelReport,
    Histogram,
    Incarnation,
    Model,
    Note,
    PipelineCount,
    Route,
    RouteId,
    encode,
)
from blockflow.topology import BlockName, PipelineName
from tensormq import Request

log = logging.getLogger(__name__)

_TRIES = 3
"""How often a request is sent before the gateway gives up on it."""
_DEATHS = 2
"""After how many deaths of workers that computed it a request is taken for their cause."""

_TIMED = encode(Note(hops=((),)))
"""What travels with a request of which the times are wanted."""


@dataclass(frozen=True)
class _Place:
    """The leave to go a way, with a ticket for each of its entries."""

    way: Way
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

    def add(self, part: Part) -> oip.InferResult | None:
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
    before others are refused. timeout: the most seconds that a request may take; it can name fewer.
    on_fatal: called, in another thread, with the reason when no request can be answered any more.
    """

    def __init__(
        self,
        results: str,
        *,
        incarnation: Incarnation,
        queue_depth: int,
        slowdown: float,
        timeout: float,
        on_fatal: Callable[[str], None],
    ) -> None:
        self._timeout = timeout
        self._asyncio = asyncio.get_running_loop()
        self._models: dict[str, ModelStatus] | None = None
        self._routes: dict[str, RouteId] = {}
        self._ways: dict[RouteId, Way] = {}
        self._pending: dict[int, _Pending] = {}
        # Unique over gateways, because a ledger may name requests of one that is gone.
        self._ids = itertools.count((incarnation << 40) + 1)
        # Of models that have requests waiting.
        self._lines: dict[str, Line[_Turn]] = {}
        self._counts: dict[PipelineName, _Counts] = defaultdict(_Counts)
        self._settled = asyncio.Event()
        self._tensors = TensorThread(
            results, queue_depth, lambda: Admission(queue_depth, slowdown), self._settle, on_fatal
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
            except Stranded as stranded:
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

    def _admit(self, way: Way, rows: int, now: float, left: float) -> _Place:
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

    def _readmit(self, way: Way, rows: int, now: float, teaches: bool) -> _Place:
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
        self._pending[number] = pending
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
                for number in self._under_way((route,)):
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
        ids = frozenset(routes)
        end = self._asyncio.time() + seconds
        # What nobody waits for any more is no reason to wait.
        while any(not self._pending[number].given_up for number in self._under_way(ids)):
            self._settled.clear()
            try:
                async with asyncio.timeout_at(end):
                    await self._settled.wait()
            except TimeoutError:
                left = self._under_way(ids)
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
        for number in self._under_way(frozenset(routes)):
            self._settle(number, Stranded(reason, suspected=number in suspects))

    def _under_way(self, routes: Collection[RouteId]) -> list[int]:
        """The requests in the blocks on these routes."""
        return [
            number
            for number, pending in self._pending.items()
            if pending.place.way.route.id in routes
        ]

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

    def _settle(self, number: int, outcome: Outcome) -> None:
        """The blocks are done with a request, or with a part of it: answer who still waits."""
        pending = self._pending.get(number)
        if pending is None:
            return
        answer = pending.add(outcome) if isinstance(outcome, Part) else outcome
        if answer is None:
            return
        del self._pending[number]
        answered = isinstance(answer, oip.InferResult)
        if not pending.given_up:
            if isinstance(answer, oip.InferResult):
                pending.answer.set_result(answer)
            else:
                pending.answer.set_exception(answer)
        self._settled.set()
        self._give_back(pending.place, answered=answered)
