"""Requests of one pipeline that wait, for a route in place of a broken one or for room before it.

Pure: times come in, decisions go out. A line is bounded by how long the first in it has waited (as
in CoDel, Nichols and Jacobson 2012) and not by a count: a stall of a tenth of a second is more
requests than a short queue has room for where each takes a millisecond. While there is no route
everybody waits; their deadlines and the bound on the memory of bodies see to it that they are not
too many. When there is one again, those who come meanwhile wait behind the others. That has an end,
or a pipeline that gets more than it can serve would keep its line for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Generic, TypeVar

_MOMENT = 0.5
"""Seconds that the first may have waited, and still others join, where nothing has broken."""
_LONGER = 4.0
"""After a break, others may join for so many times as long as it took. At half the capacity a line
is gone after as long as it took to grow; a process that has just started is slower at first."""
_MORE = 2
"""And until there are so many times as many as when it ended."""

T = TypeVar("T")


class Line(Generic[T]):
    """Who waits, in the order of joining. Times are in seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._waiting: dict[T, float] = {}
        self._broken_since: float | None = None
        self._most = 0
        self._until = -math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[T]:
        return iter(self._waiting)

    def recovers(self, now: float) -> bool:
        """Whether they wait because a route broke, be it back or not."""
        return self._broken_since is not None or now < self._until

    def takes(self, now: float, *, overloaded: bool) -> bool:
        """Whether a newcomer may join; before blocks that are `overloaded`, only after a break."""
        if self._broken_since is not None:
            return True
        if now < self._until:
            return len(self._waiting) < self._most
        first = next(iter(self._waiting.values()), now)
        return not overloaded and now - first <= _MOMENT

    def join(self, who: T, now: float) -> None:
        self._waiting[who] = now

    def leave(self, who: T) -> None:
        """Does nothing when it has left before."""
        self._waiting.pop(who, None)

    def suspend(self, now: float) -> None:
        """There is no route; does nothing when that is known."""
        if self._broken_since is None:
            self._broken_since = now

    def resume(self, now: float) -> None:
        """There is a route again; does nothing when there was one."""
        if self._broken_since is not None:
            self._most = _MORE * max(1, len(self._waiting))
            self._until = now + _LONGER * (now - self._broken_since)
            self._broken_since = None
