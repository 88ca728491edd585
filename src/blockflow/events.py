"""What happened, in order: the server's journal, which people and programs can follow."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator

from blockflow.status import Event, EventKind

_REMEMBERED = 200
_MOST_UNREAD = 500


class Journal:
    """Remembers the last 200 events and passes each on to whoever follows. One event loop's."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=_REMEMBERED)
        self._numbers = itertools.count(1)
        self._followers: set[asyncio.Queue[Event | None]] = set()
        self._closed = False

    def write(self, kind: EventKind, subject: str, reason: str | None = None) -> None:
        event = Event(
            number=next(self._numbers), at=time.time(), kind=kind, subject=subject, reason=reason
        )
        self._events.append(event)
        for queue in tuple(self._followers):
            if queue.qsize() < _MOST_UNREAD:
                queue.put_nowait(event)
            else:
                # A follower that does not read must not cost memory: its stream ends, and it may
                # come back and ask for what it missed.
                self._followers.discard(queue)
                queue.put_nowait(None)

    async def follow(self, after: int = 0) -> AsyncIterator[Event]:
        """The remembered events with numbers above `after`, then each one as it happens.

        Ends when the journal is closed, or when the follower is far behind.
        """
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        for event in self._events:
            if event.number > after:
                queue.put_nowait(event)
        if self._closed:
            queue.put_nowait(None)
        self._followers.add(queue)
        try:
            while (event_or_end := await queue.get()) is not None:
                yield event_or_end
        finally:
            self._followers.discard(queue)

    def close(self) -> None:
        """End every stream."""
        self._closed = True
        for queue in tuple(self._followers):
            queue.put_nowait(None)
