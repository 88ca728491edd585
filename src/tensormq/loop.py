"""The loop of one thread: it owns that thread's sockets and waits for all of them at once."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

import zmq

from . import wire
from .ring import Reader, ring_bell

Callback = Callable[[], None]

Question = Callable[[], bool | None]

_BACKSTOP = 0.1  # seconds; see Loop._park
_ASK = 2e-4
"""Seconds that a loop sleeps at a time while it asks for what nothing tells it of."""
_GLANCES = 16
"""How often the rings are looked at before the sockets are, which takes a system call each."""

_MANY_CORES = 8
_SPIN = 1e-3
_LONGEST_SPIN = 4e-3

# The threads of a process share one interpreter lock: a second one that spins gains nothing.
_spinning = threading.Lock()


class Lookout:
    """For how long to look out after something has happened: `seconds`, learned from how long it
    was quiet.

    As a hypervisor learns how long to poll before it lets a virtual processor sleep (Linux, KVM's
    halt polling): longer after a sleep that a longer look would have spared, up to `longest`
    seconds, and as at first after one that it would not.
    """

    def __init__(self, first: float, longest: float) -> None:
        self.seconds = first
        self._first = first
        self._longest = longest

    def learn(self, quiet: float) -> None:
        """Something happened after `quiet` seconds."""
        if quiet > self._longest:
            self.seconds = self._first
        elif quiet > self.seconds:
            self.seconds = min(2 * quiet, self._longest)


def default_lookout() -> Lookout:
    """What a loop does where nothing else is asked for.

    It does not look out on a machine of few cores: there the spinning takes the core from the very
    process that is waited for.
    """
    if len(os.sched_getaffinity(0)) < _MANY_CORES:
        return Lookout(0.0, 0.0)
    return Lookout(_SPIN, _LONGEST_SPIN)


class Loop:
    """Waits on rings, sockets and file descriptors and calls back; used from one thread.

    Push and Pull ends given the same loop share a thread. `call_soon` is the only method that
    other threads may use.

    spin: seconds for which the loop goes on looking after something has happened, before it
        sleeps; None learns how long that pays, unless there are few cores. A thread that sleeps is
        woken by the kernel, which takes microseconds on a machine of its own and up to hundreds in
        a virtual one.
    """

    def __init__(self, *, spin: float | None = None) -> None:
        # One context, with its one I/O thread, serves the whole process.
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._poller = zmq.Poller()
        self._callbacks: dict[object, Callback] = {}
        # Descriptors hardly ever have anything to say, and there is one for each peer's process:
        # the poller, which asks each of its sources every time, asks one for all of them.
        self._descriptors = select.epoll()
        self._rings: list[tuple[Reader, Callback]] = []
        self._questions: list[Question] = []
        self._calls: deque[Callback] = deque()
        self._lookout = default_lookout() if spin is None else Lookout(spin, spin)
        self._stirred = time.monotonic()
        self._glances = 0
        self._fence = threading.Lock()
        # A pipe, for a peer can open it through /proc, and an eventfd it cannot.
        self._wake, self._bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.bell = wire.Bell(self._bell, os.fstat(self._bell).st_ino)
        self._closed = False
        self._closing = threading.Lock()
        self._callbacks[self._wake] = self._woken
        self._callbacks[self._descriptors.fileno()] = self._heard
        for own in self._callbacks:
            self._poller.register(own, zmq.POLLIN)

    def watch(self, source: zmq.Socket[bytes] | int, callback: Callback) -> None:
        """Call `callback` whenever `source` (a socket or a file descriptor) is readable."""
        if isinstance(source, int):
            self._descriptors.register(source, select.EPOLLIN)
        else:
            self._poller.register(source, zmq.POLLIN)
        self._callbacks[source] = callback

    def unwatch(self, source: zmq.Socket[bytes] | int) -> None:
        """Does nothing for what is not watched; a descriptor must still be open."""
        if self._callbacks.pop(source, None) is None:
            return
        if isinstance(source, int):
            self._descriptors.unregister(source)
        else:
            self._poller.unregister(source)

    def watch_ring(self, ring: Reader, callback: Callback) -> None:
        """Call `callback` whenever `ring`, whose writer has this loop's bell, is ready."""
        self._rings = [*self._rings, (ring, callback)]

    def unwatch_ring(self, ring: Reader) -> None:
        self._rings = [entry for entry in self._rings if entry[0] is not ring]

    def ask(self, question: Question) -> None:
        """Call `question` again and again: True is that it has found something, None that it need
        not be asked any more.

        For what no descriptor tells of, such as a GPU. From the loop's thread.
        """
        self._questions = [*self._questions, question]

    @property
    def spins(self) -> bool:
        """Whether it looks out for a while before it sleeps."""
        return self._lookout.seconds > 0

    def stir(self) -> None:
        """Something happened: an answer may follow soon, so the loop does not sleep yet."""
        self._stirred = time.monotonic()

    def call_soon(self, callback: Callback) -> None:
        """Run `callback` in the loop's thread; may be called from any thread."""
        self._calls.append(callback)
        self._ring()

    def _ring(self) -> None:
        """Have the loop look at what it is to call."""
        with self._closing:  # the descriptor's number may belong to somebody else after close
            if not self._closed:
                ring_bell(self._bell)

    def run_once(self, timeout: float | None = None) -> None:
        """Handle what is there, or what comes first within `timeout` seconds (None: for ever)."""
        end = None if timeout is None else time.monotonic() + timeout
        if self.spins:
            if self._look():
                return
            # Not by whoever only wants to know what is there.
            if timeout != 0 and self._watch_closely(end):
                return
        while not self._park(end) and (end is None or time.monotonic() < end):
            pass

    def run_until(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Handle events until `done()` holds; False when `timeout` seconds passed before.

        Looks at least once for what is there already, be `timeout` 0.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not done():
            self.run_once(None if end is None else max(0.0, end - time.monotonic()))
            if end is not None and time.monotonic() >= end:
                return done()
        return True

    def _look(self) -> bool:
        """Handle what the rings hold, and now and then what the sockets do."""
        found = False
        for ring, callback in self._rings:
            if ring.ready:
                callback()
                found = True
        for question in self._questions:
            answer = question()
            if answer is None:
                self._questions = [each for each in self._questions if each is not question]
            found = found or answer is not False
        self._glances += 1
        if found:
            self._happened()
        if self._glances >= _GLANCES or not self._rings:
            found = self._poll(0) or found
        return found

    def _happened(self) -> None:
        now = time.monotonic()
        self._lookout.learn(now - self._stirred)
        self._stirred = now

    def _watch_closely(self, end: float | None) -> bool:
        """Spin until something happens (True), or nothing has for a while."""
        until = self._stirred + self._lookout.seconds
        if end is not None:
            until = min(until, end)
        if time.monotonic() >= until or not _spinning.acquire(blocking=False):
            return False
        try:
            while time.monotonic() < until:
                # Gives up the interpreter lock, so that this process' other threads go on, and
                # the core if somebody waits for it. `time.sleep(0)` takes tens of microseconds.
                os.sched_yield()
                if self._look():
                    return True
        finally:
            _spinning.release()
        return False

    def _park(self, end: float | None) -> bool:
        """Sleep until something happens or `end`; False when nothing did.

        The order is that of `ring`: say that this end sleeps, fence, look again. Should a frame
        be missed all the same, the sleep is cut short.
        """
        wait = None if end is None else max(0.0, end - time.monotonic())
        if not self._rings and not self._questions:
            return self._poll(wait)
        for ring, _ in self._rings:
            ring.park()
        self._fence.acquire()
        self._fence.release()
        found = False
        try:
            if not any(ring.ready for ring, _ in self._rings):
                found = self._doze(_BACKSTOP if wait is None else min(wait, _BACKSTOP))
        finally:
            for ring, _ in self._rings:  # others, perhaps: callbacks open and close channels
                ring.unpark()
        return self._look() or found

    def _doze(self, wait: float) -> bool:
        """As `_poll`, but for a moment only while there is something to ask for."""
        if not self._questions:
            return self._poll(wait)
        # ZeroMQ's poller counts in milliseconds. The bell is heard at once all the same.
        select.select([self._wake], [], [], min(wait, _ASK))
        return self._poll(0)

    def _poll(self, wait: float | None) -> bool:
        """Handle what sockets and descriptors have within `wait` seconds (None: for ever)."""
        self._glances = 0
        events = self._poller.poll(None if wait is None else int(wait * 1000 + 0.999))
        self._call(events)
        if events:
            self._happened()
        return bool(events)

    def _call(self, events: Iterable[tuple[object, int]]) -> None:
        for source, _ in events:
            callback = self._callbacks.get(source)
            if callback is not None:  # an earlier callback of this round may have unwatched it
                callback()

    def _heard(self) -> None:
        """Descriptors that are watched have something to say."""
        self._call(self._descriptors.poll(0))

    def close(self) -> None:
        with self._closing:
            if not self._closed:
                self._closed = True
                self._poller = zmq.Poller()
                self._descriptors.close()
                os.close(self._wake)
                os.close(self._bell)

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a callback before ran the loop itself
            os.read(self._wake, 4096)
        # Only what was there: a callback that queues another must not starve the sockets. And one
        # that runs the loop itself may have taken some of these already.
        try:
            for _ in range(len(self._calls)):
                if self._calls:
                    self._calls.popleft()()
        finally:
            if self._calls:  # queued meanwhile, or behind one that raised
                self._ring()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
