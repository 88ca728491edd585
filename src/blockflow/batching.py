"""Which waiting requests are computed together. Pure: a queue in, a decision out.

Requests are taken in the order of their arrival, whichever pipeline they belong to. A block that
has been idle starts at once with what is there; one that is busy may wait up to `max_delay` for
more, because its next batch would only be smaller for starting sooner. A GPU computes what it was
given long before; while that is enough, requests wait here, where they can still be put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Waiting(NamedTuple):
    """A request in a block's queue; times in seconds of one clock, a deadline of 0 is none."""

    rows: int
    arrived: float
    deadline: float = 0.0


@dataclass(frozen=True)
class Limits:
    """max_rows: rows of one batch. max_delay: seconds that a busy block may wait for more.

    alone: compute every request by itself, for a block whose batch dimension is fixed.
    """

    max_rows: int
    max_delay: float = 0.0
    alone: bool = False


class Decision(NamedTuple):
    """Drop the requests at `expired`, compute those at `batch` together (indices of the queue).

    With an empty `batch`, ask again when something arrives or the device has done something, at
    the latest at `wake`.
    """

    expired: tuple[int, ...]
    batch: tuple[int, ...]
    wake: float | None = None


def decide(
    queue: Sequence[Waiting],
    limits: Limits,
    now: float,
    busy_until: float,
    *,
    occupied: bool = False,
) -> Decision:
    """What to do with `queue`; `busy_until` is when the block last ended a computation.

    occupied: the device has enough to do, so that only a batch that cannot grow begins now.
    """
    expired: list[int] = []
    batch: list[int] = []
    rows = 0
    full = limits.alone
    for index, item in enumerate(queue):
        if 0 < item.deadline < now:
            expired.append(index)
        elif not batch or not (full or rows + item.rows > limits.max_rows):
            batch.append(index)
            rows += item.rows
        else:
            full = True
    late = tuple(expired)
    full = full or rows >= limits.max_rows
    if not batch or (occupied and not full):
        return Decision(late, ())
    if full or now - busy_until > limits.max_delay:
        return Decision(late, tuple(batch))
    start = min(_latest_start(queue[index], limits.max_delay) for index in batch)
    if now >= start:
        return Decision(late, tuple(batch))
    return Decision(late, (), wake=start)


def _latest_start(item: Waiting, max_delay: float) -> float:
    delay = min(max_delay, (item.deadline - item.arrived) / 2) if item.deadline else max_delay
    return item.arrived + delay
