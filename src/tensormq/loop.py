"""The loop of one thread: it owns that thread's sockets and waits for all of them at once."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

import zmq

Callback = Callable[[], None]


class Loop:
    """Waits on sockets and file descriptors and calls back; used from one thread.

    Push and Pull ends given the same loop share a thread. `call_soon` is the only method that
    other threads may use.
    """

    def __init__(self) -> None:
        # One context, with its one I/O thread, serves the whole process.
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._poller = zmq.Poller()
        self._callbacks: dict[object, Callback] = {}
        self._calls: deque[Callback] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False
        self._closing = threading.Lock()
        self.watch(self._wake, self._run_calls)

    def watch(self, source: zmq.Socket[bytes] | int, callback: Callback) -> None:
        """Call `callback` whenever `source` (a socket or a file descriptor) is readable."""
        self._poller.register(source, zmq.POLLIN)
        self._callbacks[source] = callback

    def unwatch(self, source: zmq.Socket[bytes] | int) -> None:
        if self._callbacks.pop(source, None) is not None:
            self._poller.unregister(source)

    def call_soon(self, callback: Callback) -> None:
        """Run `callback` in the loop's thread; may be called from any thread."""
        self._calls.append(callback)
        with self._closing:  # the descriptor's number may belong to somebody else after close
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def run_once(self, timeout: float | None = None) -> None:
        """Handle what is there, or what comes first within `timeout` seconds (None: for ever)."""
        wait = None if timeout is None else max(0, int(timeout * 1000 + 0.999))
        for source, _ in self._poller.poll(wait):
            callback = self._callbacks.get(source)
            if callback is not None:  # an earlier callback of this round may have unwatched it
                callback()

    def run_until(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Handle events until `done()` holds; False when `timeout` seconds passed before."""
        end = None if timeout is None else time.monotonic() + timeout
        while not done():
            left = None if end is None else end - time.monotonic()
            if left is not None and left < 0:
                return False
            self.run_once(left)
        return True

    def close(self) -> None:
        with self._closing:
            if not self._closed:
                self._closed = True
                self.unwatch(self._wake)
                os.close(self._wake)

    def _run_calls(self) -> None:
        os.eventfd_read(self._wake)
        # Only what was there: a callback that queues another must not starve the sockets. And one
        # that runs the loop itself may have taken some of these already.
        for _ in range(len(self._calls)):
            if self._calls:
                self._calls.popleft()()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
