"""Admission before a simulated queue: what it lets in stays fast, and what can be served is."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from blockflow.errors import Overloaded
from blockflow.gateway.admission import Admission, Ticket
from blockflow.topology import PipelineName

A, B = PipelineName("a"), PipelineName("b")

Batch = Callable[[int], float]
"""Seconds that a stage takes for so many requests at once."""


def one_by_one(seconds: float) -> Batch:
    return lambda requests: seconds * requests


def together(seconds: float) -> Batch:
    """Eight requests take hardly longer than one."""
    return lambda requests: seconds * (1 + 0.05 * (requests - 1))


@dataclass
class Outcome:
    latencies: dict[PipelineName, list[tuple[float, float]]] = field(default_factory=dict)
    """Of the answered: when they came, and how long they took."""
    came: Counter[PipelineName] = field(default_factory=Counter)
    refused: Counter[PipelineName] = field(default_factory=Counter)
    retry_after: list[float] = field(default_factory=list)

    def p99(self, pipeline: PipelineName = A, since: float = 0.0) -> float:
        taken = [seconds for at, seconds in self.latencies[pipeline] if at >= since]
        return float(np.percentile(taken, 99))

    def throughput(self, since: float, until: float) -> float:
        answered = (at for each in self.latencies.values() for at, _ in each)
        return sum(since <= at < until for at in answered) / (until - since)


def simulate(
    admission: Admission,
    arrivals: Iterable[tuple[float, PipelineName]],
    stages: list[Batch],
    *,
    max_batch: int = 8,
    overhead: float = 0.0005,
    left: float = math.inf,
) -> Outcome:
    """A chain of stages, each of which computes what waits before it together."""
    outcome = Outcome()
    order = itertools.count()
    events: list[tuple[float, int, str, object]] = []
    for at, pipeline in arrivals:
        heapq.heappush(events, (at, next(order), "come", pipeline))
    queues: list[deque[Ticket]] = [deque() for _ in stages]
    busy = [False] * len(stages)

    def start(stage: int, now: float) -> None:
        if busy[stage] or not queues[stage]:
            return
        batch = [queues[stage].popleft() for _ in range(min(max_batch, len(queues[stage])))]
        busy[stage] = True
        took = stages[stage](len(batch))
        heapq.heappush(events, (now + took, next(order), "done", (stage, batch)))

    while events:
        now, _, kind, what = heapq.heappop(events)
        if kind == "come":
            assert isinstance(what, str)
            pipeline = PipelineName(what)
            outcome.came[pipeline] += 1
            try:
                ticket = admission.admit(pipeline, 1, now, left)
            except Overloaded as error:
                outcome.refused[pipeline] += 1
                outcome.retry_after.append(error.retry_after)
                continue
            queues[0].append(ticket)
            start(0, now)
        else:
            assert isinstance(what, tuple)
            stage, batch = what
            busy[stage] = False
            for ticket in batch:
                if stage + 1 < len(stages):
                    queues[stage + 1].append(ticket)
                else:
                    taken = now + overhead - ticket.admitted
                    admission.release(ticket, now + overhead, answered=True)
                    outcome.latencies.setdefault(ticket.pipeline, []).append(
                        (ticket.admitted, taken)
                    )
            start(stage, now)
            if stage + 1 < len(stages):
                start(stage + 1, now)
    assert admission.under_way == 0
    return outcome


def poisson(
    rate: float, begin: float, end: float, pipeline: PipelineName = A, seed: int = 0
) -> Iterator[tuple[float, PipelineName]]:
    randomly = random.Random(seed)
    at = begin
    while (at := at + randomly.expovariate(rate)) < end:
        yield at, pipeline


def jittered(batch: Batch, seed: int = 1) -> Batch:
    """Times as they are measured: a little more, and at times a lot more."""
    randomly = random.Random(seed)
    return lambda requests: batch(requests) * (1 + randomly.expovariate(12))


SYSTEMS = {
    "one block": ([one_by_one(0.01)], 100.0),
    "a slow block": ([one_by_one(0.05)], 20.0),
    "three blocks": ([one_by_one(0.01)] * 3, 100.0),
    "batches": ([together(0.01)], 590.0),
}
"""Stages, and the requests a second that they can serve."""


@pytest.mark.parametrize("name", SYSTEMS)
def test_p99_of_the_admitted_stays_within_twice_the_unloaded(name: str) -> None:
    stages, capacity = SYSTEMS[name]
    stages = [jittered(stage) for stage in stages]
    idle = simulate(Admission(32, 2.0), poisson(capacity / 50, 0, 4000 / capacity), stages)
    seconds = 6000 / capacity
    loaded = simulate(Admission(32, 2.0), poisson(3 * capacity, 0, seconds), stages)
    since = 0.1 * seconds
    assert loaded.p99(since=since) <= 2 * idle.p99(), (loaded.p99(since=since), idle.p99())
    # Batches as large as the capacity asks for would each take longer than is accepted.
    share = 0.15 if name == "batches" else 0.6
    assert loaded.throughput(since, seconds) >= share * capacity
    assert min(loaded.retry_after) > 0


@pytest.mark.parametrize("name", SYSTEMS)
def test_half_the_capacity_is_served_whole(name: str) -> None:
    stages, capacity = SYSTEMS[name]
    outcome = simulate(Admission(32, 2.0), poisson(capacity / 2, 0, 3000 / capacity), stages)
    assert outcome.refused.total() == 0


@pytest.mark.parametrize("size", [8, 32])
def test_a_burst_on_an_idle_block_is_let_in(size: int) -> None:
    admission = Admission(32, 2.0)
    bursts = [(1.0 + second, A) for second in range(5) for _ in range(size)]
    outcome = simulate(admission, [(0.0, A), (0.5, A), *bursts], [one_by_one(0.002)])
    assert outcome.refused.total() == 0
    late = simulate(admission, [(10.0, A)] * (size + 40), [one_by_one(0.002)])
    assert late.refused[A] == size + 40 - 32


def test_after_overload_it_lets_everything_in_again_within_a_second() -> None:
    admission = Admission(32, 2.0)
    stages = [one_by_one(0.01)]
    overload = simulate(admission, poisson(300, 0, 10), stages)
    assert overload.refused[A] > 1000
    assert admission.overloaded
    after = simulate(admission, [(11.0, A)] * 20, stages)
    assert after.refused.total() == 0
    assert not admission.overloaded


def test_a_pipeline_that_sends_little_is_served_beside_one_that_sends_too_much() -> None:
    arrivals = [*poisson(300, 0, 30, A), *poisson(10, 0, 30, B, seed=5)]
    outcome = simulate(Admission(32, 2.0), arrivals, [one_by_one(0.01)])
    assert outcome.refused[A] > 0.5 * outcome.came[A]
    assert outcome.refused[B] < 0.1 * outcome.came[B]
    assert outcome.p99(B, since=3) < 0.035


def test_equal_pipelines_are_refused_alike() -> None:
    names = [PipelineName(f"p{number}") for number in range(10)]
    arrivals = [each for i, n in enumerate(names) for each in poisson(30, 0, 30, n, seed=i)]
    outcome = simulate(Admission(32, 2.0), arrivals, [one_by_one(0.01)])
    served = [len(outcome.latencies[name]) for name in names]
    assert max(served) < 1.3 * min(served)
    assert outcome.p99(names[0], since=3) < 0.035


def test_what_cannot_be_answered_in_time_is_refused_at_once() -> None:
    admission = Admission(32, 2.0)
    stages = [one_by_one(0.05)]
    simulate(admission, [(float(second), A) for second in range(10)], stages)
    assert admission.expected(A, 1, 10.0) == pytest.approx(0.0505, rel=0.05)
    with pytest.raises(
        Overloaded, match=r"would take 0\.05\d* s now, and this request has 0\.02 s"
    ):
        admission.admit(A, 1, 10.0, left=0.02)
    admission.release(admission.admit(A, 1, 10.0, left=0.2), 10.05, answered=True)
    # How long one waits in a queue is learned as well.
    simulate(admission, poisson(60, 20, 30), stages)
    first = admission.admit(A, 1, 30.0)
    rest = [admission.admit(A, 1, 30.0 + n / 1000) for n in range(1)]
    assert admission.expected(A, 1, 30.01) > 0.08
    for ticket in (first, *rest):
        admission.release(ticket, 30.2, answered=True)


def test_an_unknown_pipeline_is_no_reason_for_a_refusal() -> None:
    admission = Admission(32, 2.0)
    assert admission.expected(B, 4, 0.0) == 0.0
    admission.release(admission.admit(B, 4, 0.0, left=1e-6), 1.0, answered=False)
    assert admission.expected(B, 4, 1.0) == 0.0


def test_a_block_that_becomes_slower_is_not_taken_for_overloaded_for_ever() -> None:
    """As when a neighbour takes the cores: at half its new capacity all is served again."""
    admission = Admission(32, 2.0)
    simulate(admission, poisson(50, 0, 5), [one_by_one(0.01)])
    slower = simulate(admission, poisson(15, 5, 65), [one_by_one(0.033)])
    late = [at for at, _ in slower.latencies[A] if at > 15]
    assert len(late) > 0.97 * 15 * 50


def test_only_the_depth_counts_without_a_slowdown() -> None:
    outcome = simulate(Admission(4, math.inf), poisson(1000, 0, 3), [one_by_one(0.01)])
    assert outcome.p99(since=1) > 0.04
    admission = Admission(1, math.inf)
    admission.admit(A, 1, 0.0)
    with pytest.raises(Overloaded):
        admission.admit(A, 1, 0.0)
