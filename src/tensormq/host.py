"""Tensors in host memory: carriers `shm` (a memfd, mapped by both ends) and `inline` (bytes).

A memfd has no name: nothing is left in /dev/shm when a process is killed, and the kernel frees
the memory when the last mapping goes. The peer opens it through /proc/<pid>/fd, which the kernel
allows to processes of the same user alone.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from . import wire
from .errors import NegotiationError, UnsupportedTensor
from .process import this_process

if TYPE_CHECKING:
    import torch

Tensor: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor"
"""A NumPy array, or a torch tensor where torch is in use.

NumPy has no bfloat16 or float8: such tensors are arrays of their bits, uint16 or uint8.
"""

_MAX_VIEWS = 4096
_BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


def on_gpu(device: str | None) -> bool:
    """Whether the device of an end is a GPU."""
    return device is not None and device.startswith("cuda")


def abilities(device: str | None, carriers: Sequence[wire.Carrier] | None) -> wire.Abilities:
    """What an end of this process can do whose tensors live on `device`."""
    gpu: str | None = None
    reaches: tuple[str, ...] = ()
    possible: tuple[wire.Carrier, ...] = (wire.Carrier.SHM, wire.Carrier.INLINE)
    if device is not None and on_gpu(device):
        try:
            from .cuda import gpu_uuid, within_reach  # noqa: PLC0415 - loads torch and CUDA
        except ImportError as error:
            raise UnsupportedTensor(
                f"tensors on {device} need torch and cuda-bindings ({error}); "
                "install them with `pip install 'blockflow[cuda]'`"
            ) from None

        gpu, reaches = gpu_uuid(device), within_reach(device)
        possible = tuple(wire.Carrier)
    allowed = tuple(c for c in possible if carriers is None or c in carriers)
    return wire.Abilities(this_process(), allowed, gpu, reaches)


def numpy_view(memory: memoryview, spec: wire.TensorSpec, base: int) -> np.ndarray[Any, Any]:
    """`spec` in a slot that starts at byte `base` of `memory`, without a copy."""
    dtype = np.dtype(_BITS.get(spec.dtype, spec.dtype))
    start = base + spec.offset
    return np.frombuffer(memory[start : start + spec.nbytes], dtype).reshape(spec.shape)


def torch_view(memory: memoryview, spec: wire.TensorSpec, base: int) -> torch.Tensor:
    """`spec` in a slot that starts at byte `base` of `memory`, without a copy."""
    import torch  # noqa: PLC0415 - processes that never ask for torch tensors do not load it

    dtype = getattr(torch, spec.dtype)
    # Views are kept: one that was made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        if spec.nbytes == 0:
            return torch.empty(spec.shape, dtype=dtype)
        count = spec.nbytes // wire.ITEMSIZE[spec.dtype]
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=base + spec.offset)
        return flat.view(spec.shape)


def describe(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    """The dtype's wire name and the shape."""
    if isinstance(tensor, np.ndarray):
        if tensor.dtype.name not in wire.ITEMSIZE:
            raise UnsupportedTensor(f"a NumPy array of dtype {tensor.dtype} cannot be carried")
        return tensor.dtype.name, tensor.shape
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


class HostSlab:
    """The producer's memory: a header page with the nonce, then the slots."""

    carrier = wire.Carrier.SHM

    def __init__(self, nonce: int, slots: int, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        size = wire.HEADER_BYTES + slots * slot_bytes
        self._fd = os.memfd_create("tensormq", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, size)
        # Sealed, so that no end can shrink it under the other's feet (a read would be SIGBUS).
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)
        # Populated now: a page fault in the middle of a transfer costs more than the copy.
        self.memory = memoryview(mmap.mmap(self._fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE))
        self.memory[: wire.NONCE_BYTES] = nonce.to_bytes(wire.NONCE_BYTES, "little")
        self._offer = wire.HostSlab(self._fd, os.fstat(self._fd).st_ino, size)

    def offer(self) -> wire.HostSlab:
        return self._offer

    def base(self, slot: int) -> int:
        return wire.HEADER_BYTES + slot * self._slot_bytes

    def close(self) -> None:
        # The mapping itself goes with its last view: unmapping under a live tensor would crash.
        self.memory = memoryview(b"")
        os.close(self._fd)


class HostMapping:
    """The consumer's view of a HostSlab. Raises NegotiationError when it cannot be had."""

    def __init__(self, process: wire.Process, nonce: int, offer: wire.HostSlab) -> None:
        path = f"/proc/{process.pid}/fd/{offer.fd}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise NegotiationError(f"cannot open the producer's memory {path}: {error}") from None
        try:
            stat = os.fstat(fd)
            if stat.st_ino != offer.inode or stat.st_size != offer.size:
                raise NegotiationError(f"{path} is not the memory that was offered")
            self.memory = memoryview(mmap.mmap(fd, offer.size, mmap.MAP_SHARED | mmap.MAP_POPULATE))
        finally:
            os.close(fd)
        if self.memory[: wire.NONCE_BYTES] != nonce.to_bytes(wire.NONCE_BYTES, "little"):
            raise NegotiationError(f"{path} does not hold this channel's nonce")


class Views:
    """Tensors over the slots of one slab, made once for each slot and layout.

    Making one costs several times as much as all else that a message needs of Python, and a new
    object of the same tensor is not for nothing either: the next one is made ahead.
    """

    def __init__(self, make: Callable[[int, wire.TensorSpec], Any], numpy: bool) -> None:
        self._make = make
        self._numpy = numpy
        self._known: dict[tuple[int, wire.Layout], list[tuple[str, Any]]] = {}
        self._stock: dict[tuple[int, wire.Layout], dict[str, Any]] = {}

    def own(self, slot: int, layout: wire.Layout) -> list[tuple[str, Any]]:
        """Names and tensors, to be used and not to be given away."""
        views = self._known.get((slot, layout))
        if views is None:
            if len(self._known) >= _MAX_VIEWS:
                self.close()
            views = [(spec.name, self._make(slot, spec)) for spec in layout.specs]
            self._known[slot, layout] = views
        return views

    def lend(self, slot: int, layout: wire.Layout) -> dict[str, Any]:
        """The same for the application, which may change what a tensor object says of itself."""
        return self._stock.pop((slot, layout), None) or self._copies(self.own(slot, layout))

    def restock(self, slot: int, layout: wire.Layout) -> None:
        """Make what `lend` will give next, now that nobody waits for it.

        With cold caches torch takes longer for one than it takes to parse the descriptor. NumPy
        is quicker than the keeping of them.
        """
        views = self._known.get((slot, layout))
        if views and not self._numpy:  # none after `close`
            self._stock[slot, layout] = self._copies(views)

    def _copies(self, views: list[tuple[str, Any]]) -> dict[str, Any]:
        if self._numpy:
            return {name: view.view() for name, view in views}
        return {name: view.detach() for name, view in views}

    def close(self) -> None:
        """Forget the tensors, which keep the slab mapped."""
        self._known.clear()
        self._stock.clear()


def copy(destination: Tensor, source: Tensor) -> None:
    """Copy into a destination of the same shape and dtype, in host memory."""
    if isinstance(destination, np.ndarray):
        np.copyto(destination, np.asarray(source), casting="no")
    else:
        source = as_torch(source)
        # Without what autograd knows of it, which would stay with the destination.
        destination.copy_(source.detach() if source.requires_grad else source)


def as_torch(tensor: Tensor) -> torch.Tensor:
    """The same tensor as one of torch."""
    if not isinstance(tensor, np.ndarray):
        return tensor
    import torch  # noqa: PLC0415

    # Of an array without dimensions NumPy makes one with one.
    return torch.from_numpy(np.ascontiguousarray(tensor).reshape(tensor.shape))


class InlineSlab:
    """Staging memory for tensors that travel as bytes; private to the producer.

    Allocated when the first tensor is sent: a channel may carry none.
    """

    carrier = wire.Carrier.INLINE

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self._slots = slots
        self._slot_bytes = slot_bytes
        self._staging: memoryview | None = None

    @property
    def memory(self) -> memoryview:
        if self._staging is None:
            self._staging = memoryview(bytearray(self._slots * self._slot_bytes))
        return self._staging

    def offer(self) -> wire.NoSlab:
        return wire.NoSlab()

    def base(self, slot: int) -> int:
        return slot * self._slot_bytes

    def close(self) -> None:
        self._staging = None
