"""Lets go what waits for a process that died, where the loop is not run.

A loop hears of a death when it is next run. Its thread may itself be waiting for the GPU: for a
value that is copied to the host, or in a launch, for the driver takes about a thousand for a stream
that waits. If that stream waits for the process that died, neither would ever go on.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

GRACE = 0.2
"""Seconds from a death in which the loop may hear of it, and between two looks from then on."""


class _Watchdog:
    """One thread for the whole process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoll = select.epoll()
        self._watches: dict[int, Watch] = {}
        self._due: dict[Watch, float] = {}
        threading.Thread(target=self._run, name="tensormq watchdog", daemon=True).start()

    def add(self, watch: Watch) -> None:
        with self._lock:
            self._epoll.register(watch.fd, select.EPOLLIN | select.EPOLLONESHOT)
            self._watches[watch.fd] = watch

    def remove(self, watch: Watch) -> None:
        with self._lock:
            if self._watches.get(watch.fd) is watch:
                del self._watches[watch.fd]
                self._due.pop(watch, None)
                self._epoll.unregister(watch.fd)
                os.close(watch.fd)

    def _run(self) -> None:
        while True:
            events = self._epoll.poll(GRACE if self._due else None)
            with self._lock:
                now = time.monotonic()
                for fd, _ in events:
                    watch = self._watches.get(fd)
                    # The descriptor's number may have come to another since.
                    if watch is not None and watch.ended:
                        self._due[watch] = now + GRACE
                due = [watch for watch, when in self._due.items() if when <= now]
            for watch in due:
                watch.call()


_starting = threading.Lock()
_watchdog: _Watchdog | None = None


def _the_watchdog() -> _Watchdog:
    """Started when it is first needed: processes that import this may fork."""
    global _watchdog  # noqa: PLW0603
    with _starting:
        _watchdog = _watchdog or _Watchdog()
        return _watchdog


class Watch:
    """Calls `let_go` in another thread, again and again, when the process of `pidfd` has ended and
    nobody has cancelled that within `GRACE` seconds.

    Raises OSError when this process may have no more descriptors or threads.
    """

    def __init__(self, pidfd: int, let_go: Callable[[], None]) -> None:
        self._let_go = let_go
        self._cancelled = False
        # Held during a call: who cancels waits for that, but not from within.
        self._lock = threading.RLock()
        try:
            self._watchdog = _the_watchdog()
        except RuntimeError as error:
            raise OSError(f"no thread for a watchdog: {error}") from None
        self.fd = os.dup(pidfd)
        try:
            self._watchdog.add(self)
        except OSError:
            os.close(self.fd)
            raise

    def cancel(self) -> None:
        """When this returns `let_go` is not called any more. From any thread, and repeatedly."""
        with self._lock:
            self._cancelled = True
        self._watchdog.remove(self)

    @property
    def ended(self) -> bool:
        """Whether the process has; not to be asked after `cancel`."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    def call(self) -> None:
        with self._lock:
            if self._cancelled:
                return
            try:
                self._let_go()
            except Exception:  # others wait for this thread all the same
                log.exception("what waits for a dead process cannot be let go")
