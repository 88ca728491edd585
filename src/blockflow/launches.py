"""What a GPU was given and is not known to have done, and how long what it did has taken.

By events, which are asked and never waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import msgspec
import torch

from blockflow.handover import Item
from blockflow.ledger import Entry
from blockflow.protocol import Hop


class Launch(msgspec.Struct, frozen=True, eq=False):
    """A batch. `asked` are those of its requests of which somebody awaits the times."""

    began: torch.cuda.Event
    ended: torch.cuda.Event
    entries: Sequence[Entry]
    asked: tuple[tuple[Item, Hop], ...]


class Launches:
    """The launches of one block, on `stream`, in the order in which the GPU does them."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._under_way: deque[Launch] = deque()
        # To make an event takes as long as to record it.
        self._spare: list[torch.cuda.Event] = []

    def __len__(self) -> int:
        return len(self._under_way)

    @property
    def asked(self) -> bool:
        """Whether somebody awaits the times of one of them."""
        return any(launch.asked for launch in self._under_way)

    @property
    def entries(self) -> list[Entry]:
        """The requests that the GPU may be computing."""
        return [entry for launch in self._under_way for entry in launch.entries]

    def mark(self) -> torch.cuda.Event:
        """An event behind what the stream was given so far."""
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def add(
        self,
        began: torch.cuda.Event,
        entries: Sequence[Entry],
        asked: tuple[tuple[Item, Hop], ...],
    ) -> None:
        """A batch, all of which was given to the stream since `began` was marked."""
        self._under_way.append(Launch(began, self.mark(), entries, asked))

    def ended(self) -> Iterator[tuple[Launch, float]]:
        """Those that have ended since the last time, each with the seconds that it took."""
        while self._under_way and self._under_way[0].ended.query():
            launch = self._under_way.popleft()
            yield launch, launch.began.elapsed_time(launch.ended) / 1e3
            self._spare += (launch.began, launch.ended)
