"""Tensors in GPU memory: carrier `cuda_ipc`, and host memory that a GPU copies from and to.

The order between two processes is kept on the GPU. The producer records `filled[slot]` after it
has written a slot and before it rings the doorbell; the consumer's stream waits for it. The
consumer records `emptied[slot]` after its last use and before it gives the credit back; the
producer's stream waits for it before it writes that slot again. No host waits for either.

Slabs are taken with cudaMalloc, outside torch's caching allocator: a handle names a whole
allocation, and torch's `expandable_segments` cannot be exported at all.

Streams are torch's current stream of the calling thread.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from cuda.bindings import runtime as rt

from . import wire
from .errors import NegotiationError, TensorMQError
from .loop import Loop

log = logging.getLogger(__name__)

_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess
_REGISTER_DEFAULT = 0  # cudaHostRegisterDefault


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA runtime call. Raises TensorMQError with CUDA's own name of the error."""
    code, *values = result
    if int(code) != 0:
        _, name = rt.cudaGetErrorName(code)
        _, text = rt.cudaGetErrorString(code)
        raise TensorMQError(f"CUDA: {name.decode()}: {text.decode()}")
    return values[0] if values else None


def gpu_uuid(device: str) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


class _Memory:
    """Device memory as torch sees it: any object with `__cuda_array_interface__`."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
            "strides": None,
        }


def _as_bytes(pointer: int, size: int, device: torch.device) -> torch.Tensor:
    """uint8[size] over device memory that this code does not own."""
    return torch.as_tensor(_Memory(pointer, size), device=device)


def _view(memory: torch.Tensor, spec: wire.TensorSpec, base: int) -> torch.Tensor:
    start = base + spec.offset
    flat = memory[start : start + spec.nbytes]
    return flat.view(getattr(torch, spec.dtype)).view(spec.shape)


class DeviceSlab:
    """The producer's memory on the GPU: a header page with the nonce, then the slots."""

    carrier = wire.Carrier.CUDA_IPC

    def __init__(self, nonce: int, slots: int, slot_bytes: int, device: str) -> None:
        self._device = torch.device(device)
        self._slot_bytes = slot_bytes
        size = wire.HEADER_BYTES + slots * slot_bytes
        with torch.cuda.device(self._device):
            torch.cuda.current_stream()  # makes sure that the primary context exists
            self._pointer = int(_checked(rt.cudaMalloc(size)))
            handle = _checked(rt.cudaIpcGetMemHandle(self._pointer))
            # Created once and kept as long as the slab: an exported event that is collected
            # dies under the peer that waits for it.
            self._filled = [
                torch.cuda.Event(enable_timing=False, interprocess=True) for _ in range(slots)
            ]
            self._memory = _as_bytes(self._pointer, size, self._device)
            mark = torch.frombuffer(
                bytearray(nonce.to_bytes(wire.NONCE_BYTES, "little")), dtype=torch.uint8
            )
            self._memory[: wire.NONCE_BYTES].copy_(mark)
            for event in self._filled:
                event.record()
            torch.cuda.synchronize(self._device)
            self._offer = wire.DeviceSlab(
                bytes(handle.reserved), size, tuple(e.ipc_handle() for e in self._filled)
            )
        self._emptied: dict[object, list[torch.cuda.Event]] = {}
        self._last_holders: list[tuple[object, ...]] = [()] * slots

    def offer(self) -> wire.DeviceSlab:
        return self._offer

    def attach(self, peer: object, emptied: Iterable[bytes]) -> None:
        """Learn a consumer's events, one for each slot."""
        self._emptied[peer] = [
            torch.cuda.Event.from_ipc_handle(self._device, handle) for handle in emptied
        ]

    def detach(self, peer: object) -> None:
        self._emptied.pop(peer, None)

    def writable(self, slot: int, specs: Iterable[wire.TensorSpec]) -> dict[str, torch.Tensor]:
        """Tensors of a slot; what the current stream writes to them waits for their last use."""
        stream = torch.cuda.current_stream(self._device)
        for peer in self._last_holders[slot]:
            events = self._emptied.get(peer)
            if events is not None:  # a peer that died uses nothing any more
                events[slot].wait(stream)
        base = wire.HEADER_BYTES + slot * self._slot_bytes
        return {spec.name: _view(self._memory, spec, base) for spec in specs}

    def publish(self, slot: int, holders: Iterable[object]) -> None:
        """All that the current stream has been given so far belongs to the slot's content."""
        self._filled[slot].record(torch.cuda.current_stream(self._device))
        self._last_holders[slot] = tuple(holders)

    def close(self) -> None:
        # Freeing exported memory synchronises the device, whatever we do: once, at the end.
        torch.cuda.synchronize(self._device)
        self._emptied.clear()
        del self._memory
        with torch.cuda.device(self._device):
            _checked(rt.cudaFree(self._pointer))


class DeviceMapping:
    """The consumer's view of a DeviceSlab. Raises NegotiationError when it cannot be had."""

    def __init__(
        self, nonce: int, offer: wire.DeviceSlab, slots: int, slot_bytes: int, device: str
    ) -> None:
        self._device = torch.device(device)
        self._slot_bytes = slot_bytes
        handle = rt.cudaIpcMemHandle_t()
        handle.reserved = offer.handle
        with torch.cuda.device(self._device):
            torch.cuda.current_stream()  # makes sure that the primary context exists
            try:
                self._pointer = int(_checked(rt.cudaIpcOpenMemHandle(handle, _LAZY_PEER_ACCESS)))
            except TensorMQError as error:
                raise NegotiationError(f"cannot open the producer's GPU memory: {error}") from None
            self._memory = _as_bytes(self._pointer, offer.size, self._device)
            found = bytes(self._memory[: wire.NONCE_BYTES].tolist())
            if found != nonce.to_bytes(wire.NONCE_BYTES, "little"):
                self.close()
                raise NegotiationError(
                    "the producer's GPU memory does not hold this channel's nonce"
                )
            self._filled = [torch.cuda.Event.from_ipc_handle(self._device, h) for h in offer.filled]
            self._emptied = [
                torch.cuda.Event(enable_timing=False, interprocess=True) for _ in range(slots)
            ]
            for event in self._emptied:
                event.record()
            self.emptied_handles = tuple(event.ipc_handle() for event in self._emptied)

    def readable(self, slot: int, specs: Iterable[wire.TensorSpec]) -> dict[str, torch.Tensor]:
        """Tensors of a slot; what the current stream reads from them waits for their content."""
        self._filled[slot].wait(torch.cuda.current_stream(self._device))
        base = wire.HEADER_BYTES + slot * self._slot_bytes
        return {spec.name: _view(self._memory, spec, base) for spec in specs}

    def release(self, slot: int) -> None:
        """The current stream's work so far was the last use of this slot."""
        self._emptied[slot].record(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        del self._memory
        with torch.cuda.device(self._device):
            _checked(rt.cudaIpcCloseMemHandle(self._pointer))


class PinnedMemory:
    """Host memory known to CUDA, so that copies from and to it do not stop the host."""

    def __init__(self, memory: memoryview) -> None:
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        _checked(rt.cudaHostRegister(self._address, memory.nbytes, _REGISTER_DEFAULT))

    def close(self) -> None:
        torch.cuda.synchronize()  # a copy under way still uses the pages
        _checked(rt.cudaHostUnregister(self._address))


class Completions:
    """Runs a callback in the loop's thread once the GPU has done what it was given so far.

    Only where a host must know: before it is told of tensors that were copied to host memory,
    and before host memory that a GPU copies from is given back. A thread waits, the loop does not.
    """

    def __init__(self, loop: Loop, device: str) -> None:
        self._loop = loop
        self._device = torch.device(device)
        self._waiting: queue.SimpleQueue[tuple[torch.cuda.Event, Callable[[], None]] | None]
        self._waiting = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tensormq-completions", daemon=True)
        self._thread.start()

    def after_current_stream(self, callback: Callable[[], None]) -> None:
        event = torch.cuda.Event(enable_timing=False, blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._waiting.put((event, callback))

    def close(self) -> None:
        """Wait for everything that was begun; its callbacks are queued when this returns."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            event, callback = item
            try:
                event.synchronize()
            except RuntimeError as error:
                # The context is poisoned; whoever launched the work gets the same error and
                # ends the process. Nothing computed may be announced from here on.
                log.critical("a GPU operation failed: %s", error)
                return
            self._loop.call_soon(callback)
