"""Lanes: the slots from which a Push end sends, with their books. All peers of a carrier share one.

A slot is taken from `pool`, made ready, filled and handed on by one thread, and comes back to the
pool when everybody has released it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from . import host, wire
from .errors import TensorMQError
from .host import Tensor
from .pool import SlotPool
from .wire import Carrier

if TYPE_CHECKING:
    from .cuda import PinnedMemory


class _Slab(Protocol):
    def offer(self) -> wire.Slab: ...

    def close(self) -> None: ...


class Lane:
    """What lanes have in common. `memory` is the slab, which is closed with the lane."""

    def __init__(
        self, carrier: Carrier, slots: int, nonce: int, memory: _Slab, views: host.Views
    ) -> None:
        self.carrier = carrier
        self.nonce = nonce
        self._memory = memory
        self.views = views
        self.pool = SlotPool(slots)
        self.sequences = [0] * slots
        """The message that was last sent from each slot."""
        self.awaits_gpu = False
        """Whether a GPU copies to its slots, of which nobody may hear before it has."""
        self.copy: Callable[[Any, Tensor], None] = host.copy

    def offer(self) -> wire.Slab:
        """What one more consumer needs to know of the memory. Raises NegotiationError."""
        return self._memory.offer()

    def attach(self, peer: object, offered: wire.Slab, pidfd: int | None) -> None:
        """`peer` has accepted what it was offered; `pidfd`: its process, on this host."""

    def detach(self, peer: object) -> None:
        """`peer` is gone."""

    def make_ready(self, slot: int) -> None:
        """Make sure that what is written to `slot` from here on disturbs nobody."""

    def fill(self, slot: int, layout: wire.Layout, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors` to a slot; on a GPU the current stream does."""
        self.make_ready(slot)
        for name, view in self.views.own(slot, layout):
            self.copy(view, tensors[name])

    def can_promise(self, tensors: Iterable[Tensor]) -> bool:
        """Whether consumers may be told of these before they are copied here."""
        return False

    def hand_over(self, slot: int, sequence: int, holders: Iterable[object]) -> None:
        """What was written to `slot` so far is the content of message `sequence` for `holders`."""

    def close(self) -> None:
        self.views.close()
        self._memory.close()


class HostLane(Lane):
    """Slots in host memory, of carrier `shm` or `inline`.

    device: where the tensors come from that are sent, as for a Push.
    """

    def __init__(self, carrier: Carrier, slots: int, slot_bytes: int, device: str | None) -> None:
        nonce = secrets.randbits(63)
        slab: host.HostSlab | host.InlineSlab
        if carrier is Carrier.INLINE:
            slab = host.InlineSlab(slots, slot_bytes)
        else:
            slab = host.HostSlab(nonce, slots, slot_bytes)
        numpy = device is None
        view = host.numpy_view if numpy else host.torch_view
        views = host.Views(lambda slot, spec: view(slab.memory, spec, slab.base(slot)), numpy)
        super().__init__(carrier, slots, nonce, slab, views)
        self._slab = slab
        self._device = device
        self._pinned: PinnedMemory | None = None
        if host.on_gpu(device):
            from .cuda import copy  # noqa: PLC0415 - loads torch and CUDA

            self.copy = copy
            self.awaits_gpu = True

    def make_ready(self, slot: int) -> None:
        if self.awaits_gpu and self._pinned is None:
            from .cuda import PinnedMemory  # noqa: PLC0415

            self._pinned = PinnedMemory(self._slab.memory, str(self._device))

    def payload(self, slot: int, layout: wire.Layout) -> memoryview:
        """The bytes of a slot, for a message that carries them itself."""
        base = self._slab.base(slot)
        return self._slab.memory[base : base + layout.end]

    def close(self) -> None:
        if self._pinned is not None:
            self._pinned.close()
        super().close()


class DeviceLane(Lane):
    """Slots in the memory of a GPU, of carrier `cuda_ipc`."""

    def __init__(self, slots: int, slot_bytes: int, device: str) -> None:
        from .cuda import DeviceSlab, copy  # noqa: PLC0415 - loads torch and CUDA

        nonce = secrets.randbits(63)
        slab = DeviceSlab(nonce, slots, slot_bytes, device)
        views = host.Views(slab.view, numpy=False)
        super().__init__(Carrier.CUDA_IPC, slots, nonce, slab, views)
        self._slab = slab
        self.copy = copy

    def attach(self, peer: object, offered: wire.Slab, pidfd: int | None) -> None:
        if not isinstance(offered, wire.DeviceSlab) or pidfd is None:
            raise TensorMQError("memory of a GPU is shared only with a process that is watched")
        self._slab.attach(peer, offered.consumer, pidfd)

    def detach(self, peer: object) -> None:
        self._slab.detach(peer)

    def make_ready(self, slot: int) -> None:
        self._slab.reuse(slot)

    def can_promise(self, tensors: Iterable[Tensor]) -> bool:
        return self._slab.surely_takes(tensors)

    def hand_over(self, slot: int, sequence: int, holders: Iterable[object]) -> None:
        self._slab.publish(slot, sequence, holders)


@dataclass(slots=True)
class Filling:
    """A slot to write into: `tensors` are views of it. Send it, or abandon it."""

    tensors: dict[str, Any]
    _layout: wire.Layout
    _lane: Lane
    _slot: int
    _done: bool = False

    def abandon(self) -> None:
        """Give the slot back unsent; does nothing to a Filling that was sent."""
        if not self._done:
            self._done = True
            self._lane.pool.abandon(self._slot)
