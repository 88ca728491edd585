from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blockflow.batching import Decision, Limits, Waiting, decide

NEVER = float("-inf")


def test_an_idle_block_starts_at_once() -> None:
    queue = [Waiting(1, arrived=10.0)]
    assert decide(queue, Limits(8, max_delay=0.5), 10.0, NEVER) == Decision((), (0,))


def test_a_busy_block_waits_for_more_but_not_longer_than_allowed() -> None:
    queue = [Waiting(1, arrived=10.0), Waiting(2, arrived=10.1)]
    limits = Limits(8, max_delay=0.5)
    assert decide(queue, limits, 10.1, busy_until=10.05) == Decision((), (), wake=10.5)
    assert decide(queue, limits, 10.5, busy_until=10.05) == Decision((), (0, 1))
    full = [*queue, Waiting(5, arrived=10.1)]
    assert decide(full, limits, 10.1, busy_until=10.05) == Decision((), (0, 1, 2))
    over = [*queue, Waiting(6, arrived=10.1)]
    assert decide(over, limits, 10.1, busy_until=10.05) == Decision((), (0, 1))


def test_nobody_waits_for_others_until_its_deadline() -> None:
    queue = [Waiting(1, arrived=10.0), Waiting(1, arrived=10.0, deadline=10.5)]
    limits = Limits(8, max_delay=1.0)
    assert decide(queue, limits, 10.1, busy_until=10.0) == Decision((), (), wake=10.25)
    assert decide(queue, limits, 10.25, busy_until=10.0) == Decision((), (0, 1))


def test_what_is_too_late_is_dropped_before_it_is_computed() -> None:
    queue = [Waiting(1, 10.0, deadline=10.2), Waiting(1, 10.1), Waiting(1, 10.1, deadline=11.0)]
    assert decide(queue, Limits(8), 10.5, NEVER) == Decision((0,), (1, 2))
    assert decide(queue[:1], Limits(8), 10.5, NEVER) == Decision((0,), ())


def test_a_fixed_batch_is_computed_alone() -> None:
    queue = [Waiting(4, 1.0), Waiting(4, 1.0)]
    assert decide(queue, Limits(8, max_delay=1.0, alone=True), 1.0, 1.0) == Decision((), (0,))


def waiting_of(rows: int, arrived: float, left: float | None) -> Waiting:
    return Waiting(rows, arrived, 0.0 if left is None else arrived + left)


waiting = st.builds(
    waiting_of, st.integers(1, 8), st.floats(0, 10), st.none() | st.floats(0.001, 12)
)


@given(
    st.lists(waiting, max_size=12),
    st.builds(Limits, max_rows=st.integers(8, 16), max_delay=st.floats(0, 2), alone=st.booleans()),
    st.floats(0, 12),
    st.floats(0, 12),
)
def test_any_queue_gets_a_sound_decision(
    queue: list[Waiting], limits: Limits, now: float, busy_until: float
) -> None:
    decision = decide(queue, limits, now, min(busy_until, now))
    assert not set(decision.expired) & set(decision.batch)
    assert sorted(decision.batch) == list(decision.batch)
    assert sum(queue[i].rows for i in decision.batch) <= limits.max_rows
    alive = [i for i in range(len(queue)) if i not in decision.expired]
    assert list(decision.batch) == alive[: len(decision.batch)]  # nobody overtakes
    if alive and not decision.batch:
        assert decision.wake is not None
        assert now < decision.wake <= max(item.arrived for item in queue) + limits.max_delay
        assert decide(queue, limits, decision.wake, min(busy_until, now)).batch
