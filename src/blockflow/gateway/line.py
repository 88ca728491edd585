"""Requests of one pipeline that wait: for a route in place of a broken one, and then for room.

Pure: times come in, decisions go out. While there is no route everybody waits; their deadlines and
the bound on the memory of bodies see to it that they are not too many. When there is one again,
they go as there is room, and those who come meanwhile wait behind them rather than be refused. That
has an end, or a pipeline that gets more than it can serve would keep its line for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Generic, TypeVar

from blockflow.errors import Overloaded

_LONGER = 4.0
"""Newcomers may wait for so many times as long as there was no route. At half the capacity a line
is gone after as long as it took to grow; a process that has just started is slower at first."""
_MORE = 2
"""So many times as many may wait as when the route came."""

T = TypeVar("T")


class Line(Generic[T]):
    """Who waits for a route of `model`, in the order of joining; the first joined at `since`."""

    def __init__(self, model: str, since: float) -> None:
        self._model = model
        self._since = since
        self._waiting: dict[T, None] = {}
        self._most = math.inf
        self._until = math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[T]:
        return iter(self._waiting)

    def check(self, now: float) -> None:
        """Raises Overloaded when a newcomer may not join."""
        if len(self._waiting) >= self._most or now >= self._until:
            raise Overloaded(
                f"{len(self._waiting)} requests to {self._model} still wait since it was not "
                "ready; try again later"
            )

    def join(self, who: T) -> None:
        self._waiting[who] = None

    def leave(self, who: T) -> None:
        """Does nothing when it has left before."""
        self._waiting.pop(who, None)

    def suspend(self, now: float) -> None:
        """The route is gone, once more."""
        self._since = now
        self._most = self._until = math.inf

    def resume(self, now: float) -> None:
        """There is a route."""
        self._most = _MORE * max(1, len(self._waiting))
        self._until = now + _LONGER * (now - self._since)
