from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tensormq.pool import SlotPool, SlotState


def test_a_slot_goes_round() -> None:
    pool = SlotPool(1)
    slot = pool.acquire()
    assert slot == 0
    assert pool.acquire() is None
    pool.lease(slot, ["a", "b"])
    assert not pool.release(slot, "a")
    assert pool.release(slot, "b")
    assert pool.state(slot) is SlotState.FREE


def test_a_release_said_twice_is_refused() -> None:
    pool = SlotPool(2)
    slot = pool.acquire()
    assert slot is not None
    pool.lease(slot, ["a", "b"])
    pool.release(slot, "a")
    with pytest.raises(KeyError, match="not leased to 'a'"):
        pool.release(slot, "a")
    with pytest.raises(KeyError):
        pool.release(99, "a")


def test_only_a_filled_slot_is_leased() -> None:
    pool = SlotPool(2)
    with pytest.raises(ValueError, match="free, not filling"):
        pool.lease(0, ["a"])
    with pytest.raises(ValueError, match="leased to somebody"):
        pool.lease(pool.acquire() or 0, [])


class PoolMachine(RuleBasedStateMachine):
    """Any order of events keeps leased + free + filling = slots, against a plain model."""

    @initialize(slots=st.integers(1, 6))
    def start(self, slots: int) -> None:
        self.pool = SlotPool(slots)
        self.filling: list[int] = []
        self.leases: set[tuple[int, str]] = set()

    @rule()
    def acquire(self) -> None:
        slot = self.pool.acquire()
        if slot is None:
            assert len(self.filling) + len({s for s, _ in self.leases}) == len(self.pool)
        else:
            assert slot not in self.filling
            assert slot not in {s for s, _ in self.leases}
            self.filling.append(slot)

    @rule(holders=st.sets(st.sampled_from("abc"), min_size=1))
    def lease(self, holders: set[str]) -> None:
        if self.filling:
            slot = self.filling.pop()
            self.pool.lease(slot, holders)
            self.leases |= {(slot, holder) for holder in holders}

    @rule()
    def abandon(self) -> None:
        if self.filling:
            self.pool.abandon(self.filling.pop())

    @rule(slot=st.integers(-1, 7), holder=st.sampled_from("abc"))
    def release(self, slot: int, holder: str) -> None:
        if (slot, holder) in self.leases:
            self.leases.remove((slot, holder))
            assert self.pool.release(slot, holder) == (slot not in {s for s, _ in self.leases})
        else:
            with pytest.raises(KeyError):
                self.pool.release(slot, holder)

    @rule(holder=st.sampled_from("abc"))
    def forget(self, holder: str) -> None:
        expected = {slot for slot, name in self.leases if name == holder}
        assert set(self.pool.forget(holder)) == expected
        self.leases = {lease for lease in self.leases if lease[1] != holder}

    @invariant()
    def balanced(self) -> None:
        self.pool.check()
        assert self.pool.leased == len({slot for slot, _ in self.leases})
        assert self.pool.free + self.pool.leased + len(self.filling) == len(self.pool)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60)
