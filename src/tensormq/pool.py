"""Who holds which slot. Pure: values in, values out; somebody else moves the bytes.

    FREE ──acquire──▶ FILLING ──lease──▶ LEASED ──last release──▶ FREE
                         └────abandon────────────────────────────▶ FREE

A slot that was sent to several consumers is leased once for each; it is free again when the
last of them released it or died.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from enum import Enum


class SlotState(Enum):
    FREE = "free"
    FILLING = "filling"
    LEASED = "leased"


# Python looks up a member in its class at every mention, which takes as long as a short call.
_FREE, _FILLING, _LEASED = SlotState


class SlotPool:
    """The slots of one slab. Slots are numbered from 0; `Holder` is anything hashable."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError("a pool needs at least one slot")
        self._states = [_FREE] * slots
        self._holders: list[set[Hashable]] = [set() for _ in range(slots)]
        # First in, first out: the slot that has rested longest is the likeliest whose last use
        # on the GPU is over.
        self._free = deque(range(slots))

    def __len__(self) -> int:
        return len(self._states)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def leased(self) -> int:
        return sum(state is _LEASED for state in self._states)

    def held(self, holder: Hashable) -> int:
        """How many slots are leased to `holder`."""
        return sum(holder in holders for holders in self._holders)

    def state(self, slot: int) -> SlotState:
        return self._states[slot]

    def acquire(self) -> int | None:
        """A free slot to fill, or None when every slot is taken."""
        if not self._free:
            return None
        slot = self._free.popleft()
        self._states[slot] = _FILLING
        return slot

    def abandon(self, slot: int) -> None:
        """Give back a slot that was never sent."""
        if self._states[slot] is not _FILLING:
            raise self._not_filling(slot)
        self._states[slot] = _FREE
        self._free.append(slot)

    def lease(self, slot: int, holders: Iterable[Hashable]) -> None:
        """The filled slot now belongs to `holders`, each of which must release it."""
        if self._states[slot] is not _FILLING:
            raise self._not_filling(slot)
        members = set(holders)
        if not members:
            raise ValueError(f"slot {slot} must be leased to somebody")
        self._states[slot] = _LEASED
        self._holders[slot] = members

    def release(self, slot: int, holder: Hashable) -> bool:
        """End one lease; True when the slot is free again, False when others still hold it.

        Raises KeyError when `holder` has no lease of `slot`: a release said twice, or a peer
        that releases what it was never given.
        """
        if not 0 <= slot < len(self._states) or holder not in self._holders[slot]:
            raise KeyError(f"slot {slot} is not leased to {holder!r}")
        holders = self._holders[slot]
        holders.discard(holder)
        if holders:
            return False
        self._states[slot] = _FREE
        self._free.append(slot)
        return True

    def forget(self, holder: Hashable) -> tuple[int, ...]:
        """End every lease of a holder that died; returns the slots it held."""
        held = tuple(slot for slot, holders in enumerate(self._holders) if holder in holders)
        for slot in held:
            self.release(slot, holder)
        return held

    def check(self) -> None:
        """Raise AssertionError when the books do not balance."""
        free = {slot for slot, state in enumerate(self._states) if state is _FREE}
        if free != set(self._free) or len(self._free) != len(free):
            raise AssertionError(f"free slots {sorted(free)} but the queue has {self._free}")
        for slot, (state, holders) in enumerate(zip(self._states, self._holders, strict=True)):
            if bool(holders) != (state is _LEASED):
                raise AssertionError(f"slot {slot} is {state.value} and held by {holders}")

    def _not_filling(self, slot: int) -> ValueError:
        return ValueError(f"slot {slot} is {self._states[slot].value}, not filling")
