"""The gateway's thread for tensors: asyncio on one side, TensorMQ on the other.

It owns the gateway's Push and Pull ends. A request crosses to it once with its tensors' bytes,
which are written into slots that the first blocks read from. The answer's cross back from each
block that gives some of them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import msgspec
import numpy as np

from blockflow import oip
from blockflow.counting import Hops
from blockflow.errors import (
    BlockFailed,
    BlockFlowError,
    DeadlineExceeded,
    Overloaded,
    Unavailable,
)
from blockflow.gateway.admission import Admission
from blockflow.protocol import ChannelReport, Hop, Route, RouteId, Step, decode_note
from tensormq import Filling, Loop, Message, Peer, Pull, Push, Request, TensorMQError, slot_size

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Stranded(Exception):
    """The route broke down under a request, which is not known to be at fault."""

    def __init__(self, reason: str, *, suspected: bool = False) -> None:
        super().__init__(reason)
        self.suspected = suspected


@dataclass(frozen=True)
class Part:
    """Outputs that came from one block, by the names that clients use, and times on the way there.

    Without outputs, times that became known later.
    """

    outputs: Mapping[str, oip.TensorValue]
    hops: tuple[Hop, ...] | None


Outcome: TypeAlias = Part | BlockFlowError | Stranded

_FAILURES: Mapping[int, type[BlockFlowError]] = {
    cls.status: cls for cls in (BlockFailed, DeadlineExceeded, Overloaded)
}


@dataclass(frozen=True)
class Entry:
    """A first block of one or more routes: a channel of its own, so that its queue is its own."""

    push: Push
    peer: Peer
    admission: Admission


@dataclass(frozen=True)
class Way:
    """`entries` are where a request goes first; `takes` says for each of them which inputs, by the
    names that clients use. `max_rows` is the most rows of one request."""

    route: Route
    entries: tuple[Entry, ...]
    takes: tuple[tuple[str, ...], ...]
    max_rows: int


@dataclass(frozen=True)
class _Outgoing:
    """What is to be sent as soon as there are slots for it, if it is still `wanted`."""

    way: Way
    inputs: Mapping[str, oip.TensorValue]
    request: Request
    note: bytes
    wanted: Callable[[], bool]

    @property
    def fits(self) -> bool:
        """Whether all slots are free, or it will be found that a channel is lost."""
        return all(entry.push.has_room(entry.peer) for entry in self.way.entries)


class TensorThread:
    """The thread that owns the gateway's Push and Pull ends.

    admission: makes the gate before a first block. settle: called in the event loop with a
    request's id and a part of its answer, or its failure. on_fatal: called with the reason when the
    thread cannot go on, after which no request is sent or answered.
    """

    def __init__(
        self,
        results: str,
        depth: int,
        admission: Callable[[], Admission],
        settle: Callable[[int, Outcome], None],
        on_fatal: Callable[[str], None],
    ) -> None:
        self._depth = depth
        self._admission = admission
        self._settle = settle
        self._on_fatal = on_fatal
        self._asyncio = asyncio.get_running_loop()
        self._loop = Loop()
        self._pull = Pull(results, loop=self._loop)
        self._entries: dict[str, Entry] = {}
        # Of routes that were retired while a block still held something of them.
        self._leaving: list[Push] = []
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
        way: Way,
        inputs: Iterable[oip.TensorValue],
        request: Request,
        note: bytes,
        wanted: Callable[[], bool],
    ) -> None:
        """Write `inputs` into slots of the first blocks' channels and send them."""
        outgoing = _Outgoing(way, {tensor.name: tensor for tensor in inputs}, request, note, wanted)
        self._loop.call_soon(lambda: self._outgoing.append(outgoing))

    def open(self, route: Route) -> Future[Way]:
        """Open the channels to a route's first blocks, or find those that are open."""
        return self._perform(lambda: self._open(route))

    def retire(self, route: Route, unused: Collection[Entry]) -> Future[None]:
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
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(job())
            except Exception as error:  # noqa: BLE001 - whoever waits for it judges it
                future.set_exception(error)

        # Not in the callback itself: a job may wait for a peer, and a callback must not.
        self._loop.call_soon(lambda: self._jobs.append(run))
        return future

    # The thread

    def _run(self) -> None:
        try:
            self._serve()
            for push in (*(entry.push for entry in self._entries.values()), *self._leaving):
                push.close()
            self._pull.close()
            self._loop.close()
        except Exception as error:
            log.exception("the tensor thread stopped")
            self._on_fatal(f"the tensor thread stopped: {type(error).__name__}: {error}")

    def _serve(self) -> None:
        while not self._stopping:
            self._loop.run_once()
            while self._jobs:
                self._jobs.popleft()()
            self._send_what_fits()
            while (message := self._pull.poll()) is not None:
                with message:
                    self._deliver(message)

    def _open(self, route: Route) -> Way:
        self._routes[route.id] = route
        first = [step for step in route.steps if None in step.sources]
        return Way(
            route,
            entries=tuple(map(self._entry, first)),
            # Once each, though one tensor may feed two ports of a block.
            takes=tuple(
                tuple(dict.fromkeys(s.port for s in step.feeds.values() if s.block is None))
                for step in first
            ),
            max_rows=min(step.max_batch for step in route.steps),
        )

    def _entry(self, step: Step) -> Entry:
        entry = self._entries.get(step.endpoint)
        if entry is None:
            # Room for all of its inputs, though on some routes other blocks feed it as well.
            size = slot_size(
                {port.name: (port.dtype, port.sized(step.max_batch)) for port in step.takes}
            )
            push = Push(slots=self._depth, slot_bytes=size, loop=self._loop)
            try:
                entry = Entry(push, push.connect(step.endpoint), self._admission())
            except BaseException:
                push.close()
                raise
            self._entries[step.endpoint] = entry
        return entry

    def _retire(self, route: Route, unused: Collection[Entry]) -> None:
        self._routes.pop(route.id, None)
        for entry in unused:
            del self._entries[entry.peer.endpoint]
            # Without waiting for a block that computes: all other requests wait here.
            entry.push.finish()
            self._leaving = [push for push in self._leaving if not push.closed]
            self._leaving.append(entry.push)

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
                    self._answer(number, Stranded(reason))

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
        try:
            note = decode_note(message.note)
        except msgspec.MsgspecError as error:
            log.warning("an answer has an unreadable note: %s", error)
            return
        if note.error is not None:
            failure: BlockFlowError | Stranded
            if note.status == Unavailable.status:
                failure = Stranded(note.error)
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
            self._answer(request.id, Part(outputs, hops))

    def _answer(self, number: int, outcome: Outcome) -> None:
        self._asyncio.call_soon_threadsafe(self._settle, number, outcome)
