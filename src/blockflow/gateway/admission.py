"""Which requests are let in, so that those that are stay fast when more come than can be served.

Pure: times come in, decisions go out. One `Admission` stands before each first block.

The method is a bound on the requests under way that follows the latency, as TCP bounds what it has
under way: the signal is a request's time against the time of one that had the block to itself (TCP
Vegas, Brakmo and Peterson 1995; Netflix's concurrency-limits does the same for servers), the rule
is additive increase and multiplicative decrease (Chiu and Jain 1989), and the bound that overload
begins with is the bandwidth-delay product by Little's law, times the slowdown that is accepted, as
in BBR (Cardwell et al. 2016). Overload is what lasts: a queue that stands for a whole interval, as
in CoDel (Nichols and Jacobson 2012). A burst that drains meets no bound but the queue's depth.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NoReturn

from blockflow.errors import Overloaded
from blockflow.topology import PipelineName

FLOOR = 2.0
"""The least bound: one request is computed while the next one is brought."""
_STANDING = 8
"""Requests under way that are no queue worth a refusal, however slow they are."""
_INTERVAL = 0.2
_INTERVAL_TIMES = 4.0
"""A queue stands when it has for so many seconds, and for so many times an unloaded request."""
_CALM_SECONDS = 0.1
_CALM_TIMES = 10.0
"""Overload is over after so many seconds, and so many unloaded requests, without a refusal."""
_MEMORY = 2.0
"""Seconds after which what was seen of latencies and of pipelines' shares counts no more."""
_WINDOW = 16
"""Answers after which the bound is moved."""
_LONGEST_WINDOW = 64
"""Answers from which the first bound is concluded, for a queue may stand for ever."""
_NEARLY = 0.9
"""The mean must stay below the accepted slowdown for the slowest to be near it."""
_NO_WORSE = 1.1
"""More under way are good if they are hardly slower than those under the least bound: batches."""
_MOST = 1.15
_DECREASE = 0.8
_FIRST_PATIENCE = 1.0
_LAST_PATIENCE = 60.0


@dataclass(eq=False)
class Ticket:
    """A request that was let in; give it back with `Admission.release`."""

    pipeline: PipelineName
    rows: int
    admitted: float
    under_way: int
    """Requests under way when it came, itself included."""
    sequence: int
    teaches: bool = True
    """Its time says how long requests take; not so when many were let in that had waited."""


@dataclass
class _Unloaded:
    """What a request takes that has the block to itself, in seconds."""

    seconds: float
    certain: bool = False
    """It was seen, rather than concluded from requests that were not alone."""

    def learn(self, seconds: float, *, alone: bool) -> None:
        if alone and not self.certain:
            self.seconds = seconds
            self.certain = True
        elif seconds < self.seconds:
            self.seconds += 0.25 * (seconds - self.seconds)
        elif alone:
            self.seconds += 0.1 * (seconds - self.seconds)


class Admission:
    """The gate before one first block. Times are in seconds of one monotonic clock.

    depth: the most requests under way, whatever they take. slowdown: how many times its unloaded
    time a request may take before others are refused for it; infinity leaves `depth` alone.
    """

    def __init__(self, depth: int, slowdown: float) -> None:
        self._depth = depth
        self._slowdown = slowdown
        self._limit: float | None = None
        self.under_way = 0
        self._admissions = 0
        self._unloaded: dict[tuple[PipelineName, int], _Unloaded] = {}
        # By the magnitude of how many were under way: the slowdown, and when it was last seen.
        self._slowdowns: dict[int, tuple[float, float]] = {}
        self._standing_since: float | None = None
        self._overflowed = False
        self._last_refusal = -math.inf
        self._window: deque[tuple[float, int]] = deque(maxlen=_LONGEST_WINDOW)
        self._reached = False
        self._ceiling = math.inf
        self._patience = _FIRST_PATIENCE
        self._not_before = -math.inf
        self._at_floor = 0.0
        self._raised = False
        # Pipelines that came lately: what they were let in, decaying, and when they last came.
        self._shares: dict[PipelineName, tuple[float, float]] = {}

    @property
    def limit(self) -> float:
        """The bound on requests under way that holds now."""
        return self._depth if self._limit is None else min(self._limit, self._depth)

    @property
    def overloaded(self) -> bool:
        return self._limit is not None

    @property
    def full(self) -> bool:
        """As many are under way as may be, and not because of overload."""
        return self._limit is None and self.under_way >= self._depth

    def check(self, pipeline: PipelineName, now: float) -> None:
        """Raises Overloaded when a request to `pipeline` would be refused, whatever it holds."""
        if self.under_way < self._depth:
            self._calm_down(now)
            if self.under_way < self.limit or self._is_light(pipeline, now):
                return
        else:
            self._overflowed = True
        self._refuse(
            pipeline,
            now,
            f"{self.under_way} requests are under way through the first block of {pipeline}, as "
            "many as can be answered in good time",
        )

    def admit(
        self, pipeline: PipelineName, rows: int, now: float, left: float = math.inf
    ) -> Ticket:
        """Let a request in that is wanted within `left` seconds, or raise Overloaded."""
        self.check(pipeline, now)
        expected = self.expected(pipeline, rows, now)
        if expected > left:
            self._refuse(
                pipeline,
                now,
                f"an answer would take {expected:.3g} s now, and this request has {left:.3g} s",
            )
        return self._let_in(pipeline, rows, now, teaches=True)

    def overflow(self, pipeline: PipelineName, now: float, waiting: int) -> NoReturn:
        """Refuse a request that cannot even wait any more. Raises Overloaded."""
        self._overflowed = True
        self._refuse(
            pipeline,
            now,
            f"{self.under_way} requests are under way through the first block of {pipeline}, and "
            f"{waiting} wait before it",
        )

    def has_room(self, pipeline: PipelineName, now: float) -> bool:
        """Whether one may go that has waited. Half of the room is left to other pipelines."""
        if self.under_way >= self.limit:
            return False
        shares = self._lately(now)
        alone = not shares.keys() - {pipeline}
        return alone or self.under_way < max(1.0, self.limit / 2) or self._is_light(pipeline, now)

    def readmit(
        self, pipeline: PipelineName, rows: int, now: float, teaches: bool = False
    ) -> Ticket:
        """Let a request in that has waited: it is not refused any more."""
        return self._let_in(pipeline, rows, now, teaches=teaches)

    def _let_in(self, pipeline: PipelineName, rows: int, now: float, *, teaches: bool) -> Ticket:
        self.under_way += 1
        self._admissions += 1
        self._reached = self._reached or self.under_way >= math.floor(self.limit)
        share, seen = self._shares.get(pipeline, (0.0, now))
        self._shares[pipeline] = share * math.exp((seen - now) / _MEMORY) + 1, now
        return Ticket(pipeline, rows, now, self.under_way, self._admissions, teaches)

    def release(self, ticket: Ticket, now: float, *, answered: bool) -> None:
        """A request is no longer under way; only an answer teaches how long requests take."""
        self.under_way -= 1
        if answered and ticket.teaches:
            self._learn(ticket, now)
        if self.under_way < min(_STANDING, self._depth) - 1:
            self._standing_since = None
            self._overflowed = False
        self._calm_down(now)

    def expected(self, pipeline: PipelineName, rows: int, now: float) -> float:
        """Seconds that one more request is likely to take; too few rather than too many."""
        unloaded = self._unloaded.get((pipeline, rows.bit_length()))
        if unloaded is None:
            return 0.0
        for magnitude in range((self.under_way + 1).bit_length(), 1, -1):
            slowdown, seen = self._slowdowns.get(magnitude, (1.0, -math.inf))
            if seen > now - _MEMORY:
                return unloaded.seconds * slowdown
        return unloaded.seconds

    # How it learns

    def _learn(self, ticket: Ticket, now: float) -> None:
        seconds = max(now - ticket.admitted, 1e-9)
        key = ticket.pipeline, ticket.rows.bit_length()
        # Rather too little by Little's law than a loaded one's time: `_adapt` makes it more.
        unloaded = self._unloaded.setdefault(key, _Unloaded(seconds / ticket.under_way))
        alone = ticket.under_way == 1 and self._admissions == ticket.sequence
        unloaded.learn(seconds, alone=alone)
        slowdown = seconds / unloaded.seconds
        magnitude = ticket.under_way.bit_length()
        before, seen = self._slowdowns.get(magnitude, (slowdown, now))
        fresh = seen > now - _MEMORY
        lately = before + 0.1 * (slowdown - before) if fresh else slowdown
        self._slowdowns[magnitude] = lately, now
        if self._limit is None:
            self._look_for_overload(slowdown, ticket, unloaded, now)
        else:
            self._adapt(slowdown, ticket, unloaded, now)

    def _look_for_overload(
        self, slowdown: float, ticket: Ticket, unloaded: _Unloaded, now: float
    ) -> None:
        if slowdown <= self._slowdown or ticket.under_way < min(_STANDING, self._depth):
            self._standing_since = None
            self._window.clear()
            return
        if self._standing_since is None:
            self._standing_since = now
        self._window.append((slowdown, ticket.under_way))
        interval = max(_INTERVAL, _INTERVAL_TIMES * unloaded.seconds)
        if self._overflowed and now - self._standing_since >= interval:
            rate = sum(under_way / slower for slower, under_way in self._window)
            self._limit = max(FLOOR, self._slowdown * rate / len(self._window))
            self._ceiling = math.inf
            self._patience = _FIRST_PATIENCE
            self._raised = False
            self._last_refusal = now
            self._begin_window()

    def _adapt(self, slowdown: float, ticket: Ticket, unloaded: _Unloaded, now: float) -> None:
        limit = self.limit
        if ticket.under_way > math.ceil(limit) + 1:
            return  # it was let in under another bound
        self._window.append((slowdown, ticket.under_way))
        if len(self._window) < _WINDOW:
            return
        mean = sum(slower for slower, _ in self._window) / len(self._window)
        if limit <= FLOOR:
            if not self._at_floor:
                self._ceiling = math.inf  # what is too much can only be judged from here
            self._at_floor += (0.3 if self._at_floor else 1.0) * (mean - self._at_floor)
            if mean > _NO_WORSE * self._slowdown:
                # It is slow by itself: what is known of an unloaded one holds no more.
                unloaded.seconds *= 1.05
        good = max(_NEARLY * self._slowdown, _NO_WORSE * self._at_floor)
        if limit > FLOOR and mean > min(good, _MOST * self._slowdown):
            if self._raised:
                # What was too much is tried again, but ever more rarely.
                self._not_before = now + self._patience
                self._patience = min(2 * self._patience, _LAST_PATIENCE)
            self._ceiling = math.floor(limit)
            self._limit = max(FLOOR, min(math.floor(limit) - 1, _DECREASE * limit))
            self._raised = False
        elif self._reached:
            higher = math.floor(limit) + 1
            if higher < self._ceiling or now >= self._not_before:
                self._limit = float(min(higher, self._depth))
                self._raised = True
        self._begin_window()

    def _begin_window(self) -> None:
        self._window.clear()
        self._reached = False

    def _calm_down(self, now: float) -> None:
        """Overload is over when nobody had to be refused for a while."""
        if self._limit is None:
            return
        slowest = max((each.seconds for each in self._unloaded.values()), default=0.0)
        if now - self._last_refusal > max(_CALM_SECONDS, _CALM_TIMES * slowest):
            self._limit = None
            self._standing_since = None
            self._overflowed = False
            self._window.clear()

    def _refuse(self, pipeline: PipelineName, now: float, why: str) -> NoReturn:
        self._last_refusal = now
        self._reached = True
        share, seen = self._shares.get(pipeline, (0.0, now))
        self._shares[pipeline] = share * math.exp((seen - now) / _MEMORY), now
        raise Overloaded(f"{why}; try again later", retry_after=self._seconds_to_drain())

    def _seconds_to_drain(self) -> float:
        slowest = max((each.seconds for each in self._unloaded.values()), default=0.0)
        return self._slowdown * slowest if math.isfinite(self._slowdown) else slowest

    def _is_light(self, pipeline: PipelineName, now: float) -> bool:
        """Whether a pipeline got less than its share lately; then it may come once more.

        Without this, one that sends little would be refused as often as one that sends too much.
        """
        if self.under_way > self.limit:
            return False
        lately = self._lately(now)
        others = len({*lately, pipeline})
        return others > 1 and lately.get(pipeline, 0.0) * others < sum(lately.values())

    def _lately(self, now: float) -> dict[PipelineName, float]:
        """What pipelines that came lately were let in."""
        lately = {
            name: share * math.exp((seen - now) / _MEMORY)
            for name, (share, seen) in self._shares.items()
            if seen > now - _MEMORY
        }
        self._shares = {name: self._shares[name] for name in lately}
        return lately
