"""Puts the parts of requests together where several blocks feed one. Pure.

Every block that feeds a join sends it, for each request, one part or the word that there will be
none. So an entry ends when all have spoken, and by its deadline at the latest.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Generic, TypeVar

_GRACE = 60.0
"""Seconds after its deadline for which a request is known to be lost: parts of it may come late."""

K = TypeVar("K", bound=Hashable)
S = TypeVar("S", bound=Hashable)
P = TypeVar("P")


class Verdict(Enum):
    WAITING = auto()
    """Others are still to come."""
    LOST = auto()
    """The request was given up before: nobody needs this part."""
    REFUSED = auto()
    """Too many requests wait already; this one is given up now."""


@dataclass
class _Entry(Generic[S, P]):
    missing: set[S]
    deadline: float
    parts: dict[S, P] = field(default_factory=dict)
    lost: bool = False


class Joins(Generic[K, S, P]):
    """The requests of which parts are missing, by key; at most `most` that can still be completed.

    Deadlines are in seconds of one clock; 0 is none.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: dict[K, _Entry[S, P]] = {}
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Requests that hold parts."""
        return self._waiting

    def add(
        self, key: K, sources: Collection[S], source: S, part: P, deadline: float
    ) -> Mapping[S, P] | Verdict:
        """Take the part that `source` sends; gives all of them once those of `sources` are there.

        A part that is not given back, now or by another method, is kept.
        """
        entry = self._entry(key, sources, deadline)
        entry.missing.discard(source)
        if entry.lost:
            self._end(key, entry)
            return Verdict.LOST
        if entry.missing and not entry.parts and self._waiting >= self._most:
            entry.lost = True
            return Verdict.REFUSED
        self._waiting += not entry.parts
        entry.parts[source] = part
        if entry.missing:
            return Verdict.WAITING
        self._waiting -= 1
        del self._entries[key]
        return entry.parts

    def lose(
        self, key: K, sources: Collection[S], source: S, deadline: float
    ) -> tuple[bool, tuple[P, ...]]:
        """`source` will send no part: whether this is news, and the parts that nobody needs now."""
        entry = self._entry(key, sources, deadline)
        entry.missing.discard(source)
        news = not entry.lost
        parts = self._give_up(entry)
        self._end(key, entry)
        return news, parts

    def expire(self, now: float) -> Iterator[tuple[K, tuple[P, ...]]]:
        """Give up the requests whose deadline is past; gives each once, with its parts."""
        late = [(key, e) for key, e in self._entries.items() if 0 < e.deadline < now]
        for key, entry in late:
            if entry.deadline + _GRACE < now:
                del self._entries[key]
            if not entry.lost:
                yield key, self._give_up(entry)

    def forget(self, keys: Collection[K]) -> tuple[P, ...]:
        """Drop requests of which nothing will come any more; gives their parts."""
        return tuple(part for key in keys for part in self._give_up(self._entries.pop(key)))

    def __iter__(self) -> Iterator[K]:
        return iter(tuple(self._entries))

    def _entry(self, key: K, sources: Collection[S], deadline: float) -> _Entry[S, P]:
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(set(sources), deadline)
        return entry

    def _give_up(self, entry: _Entry[S, P]) -> tuple[P, ...]:
        self._waiting -= bool(entry.parts)
        entry.lost = True
        parts = tuple(entry.parts.values())
        entry.parts.clear()
        return parts

    def _end(self, key: K, entry: _Entry[S, P]) -> None:
        if not entry.missing:
            del self._entries[key]
