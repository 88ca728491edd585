"""Tensors in GPU memory: carrier `cuda_ipc`, and host memory that a GPU copies from and to.

The order between two processes is kept on the GPU, by 64-bit words that streams write and wait for.
After the producer has filled a slot, its stream writes the message's sequence number to
`filled[slot]`; the consumer's stream waits until it stands there. After the consumer's last use
its stream writes the number to `emptied[consumer][slot]`; the producer's stream waits for that
before it writes the slot again. No host waits for either.

Words rather than interprocess events, for an event of a process that died before the GPU reached it
never completes, and whoever waits for it waits for ever; a word can be written by the survivor.

The words lie in host memory that both processes share and have registered with CUDA. So a host
sees what has happened on the GPU without asking the driver, has no stream wait for what is there
already, and writes the words of a peer that died by a store.

    on the GPU: header page with the nonce | slots
    on the host: header page with the nonce | filled[slots], emptied[CONSUMERS][slots]

Slabs are taken with cudaMalloc, outside torch's caching allocator: a handle names a whole
allocation, and torch's `expandable_segments` cannot be exported at all.

Streams are torch's current stream of the calling thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from cuda.bindings import driver
from cuda.bindings import runtime as rt

from . import host, wire
from .errors import NegotiationError, TensorMQError
from .loop import Loop
from .watchdog import Watch

log = logging.getLogger(__name__)

_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess
_REGISTER_MAPPED = 2  # cudaHostRegisterMapped
_NON_BLOCKING = 1  # cudaStreamNonBlocking
_ANY_WAY = rt.cudaMemcpyKind.cudaMemcpyDefault  # CUDA knows where addresses lie
_WORD = 8
_WAIT_GEQ = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)
# The default write is a barrier: what the stream did before is visible to whoever sees the word.
_WRITE = int(driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT)


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA call. Raises TensorMQError with CUDA's own name of the error."""
    code, *values = result
    if int(code) != 0:
        if isinstance(code, driver.CUresult):
            _, name = driver.cuGetErrorName(code)
            _, text = driver.cuGetErrorString(code)
        else:
            _, name = rt.cudaGetErrorName(code)
            _, text = rt.cudaGetErrorString(code)
        raise TensorMQError(f"CUDA: {name.decode()}: {text.decode()}")
    return values[0] if values else None


def _range(result: tuple[Any, ...]) -> tuple[int, int]:
    """Least and greatest priority of streams; the greatest is the lower number."""
    code, least, greatest = result
    _checked((code,))
    return int(least), int(greatest)


def gpu_uuid(device: str) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def within_reach(device: str) -> tuple[str, ...]:
    """UUIDs of the other GPUs that this process sees whose memory `device` can access."""
    mine = _index(torch.device(device))
    return tuple(
        gpu_uuid(f"cuda:{other}")
        for other in range(torch.cuda.device_count())
        if other != mine and torch.cuda.can_device_access_peer(mine, other)
    )


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _numbered(device: str) -> torch.device:
    """The device by its number: "cuda" is the current one, which threads have of their own."""
    return torch.device("cuda", _index(torch.device(device)))


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
    with torch.inference_mode(False):
        return torch.as_tensor(_Memory(pointer, size), device=device)


def _as_bytes_of_peer(pointer: int, size: int, device: torch.device) -> torch.Tensor:
    """uint8[size] over another GPU's memory, for kernels that run on `device`.

    `_as_bytes` would ask the driver where the memory lies, and make a copy of what lies elsewhere.
    """
    with torch.inference_mode(False):
        here = torch.device("cuda", _index(device))
        storage = torch._C._construct_storage_from_data_pointer(pointer, here, size)
        return torch.empty(0, dtype=torch.uint8, device=here).set_(storage)


def _view(memory: torch.Tensor, spec: wire.TensorSpec, base: int) -> torch.Tensor:
    start = base + spec.offset
    # Views are kept: one that was made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        flat = memory[start : start + spec.nbytes]
        return flat.view(getattr(torch, spec.dtype)).view(spec.shape)


_streams: dict[tuple[int, int], torch.cuda.Stream] = {}


def _current_stream(index: int) -> torch.cuda.Stream:
    """torch's object for the current stream of a device, which torch makes anew each time."""
    handle = torch._C._cuda_getCurrentRawStream(index)
    stream = _streams.get((index, handle))
    if stream is None:
        stream = _streams[index, handle] = torch.cuda.current_stream(index)
    return stream


def _give(index: int, call: Callable[[int], tuple[Any, ...]]) -> None:
    """Make a CUDA call that takes the current stream of the device `index`, by its handle.

    The handle, without the object that torch would make for it.
    """
    stream = torch._C._cuda_getCurrentRawStream(index)
    if stream or torch.cuda.current_device() == index:
        result = call(stream)
        if result[0]:
            _checked(result)
    else:
        # Every device calls its default stream 0: the driver takes that of the current one.
        with torch.cuda.device(index):
            _checked(call(stream))


def copy(destination: torch.Tensor, source: host.Tensor) -> None:
    """Have the current stream copy `source` to `destination`, of the same shape and dtype.

    What `copy_` does, and by itself: what lies in one piece on both sides, on one GPU or in host
    memory, is handed to CUDA as it is. On the way to the same call torch's dispatcher executes so
    much code, which is seldom in a cache, that it takes a third of what hosts add to a hop.
    """
    source = host.as_torch(source)
    here, there = destination.get_device(), source.get_device()
    index = max(here, there)
    if (
        index < 0
        or (here != there and min(here, there) >= 0)  # two GPUs
        or not (destination.is_contiguous() and source.is_contiguous())
        or source.is_conj()
        or source.is_neg()
    ):
        destination.copy_(source.detach(), non_blocking=True)
        return
    to, origin, size = destination.data_ptr(), source.data_ptr(), destination.nbytes
    _give(index, lambda stream: driver.cuMemcpyAsync(to, origin, size, stream))


@contextlib.contextmanager
def _stream_apart(device: torch.device) -> Iterator[Any]:
    """A stream beside the work, all of whose work is done in the end.

    Not one of torch's pool, whose other users may be waiting for another process; of another
    priority than theirs, so that it does not share a hardware queue with them.
    """
    with torch.cuda.device(device):
        _, highest = _range(rt.cudaDeviceGetStreamPriorityRange())
        stream = _checked(rt.cudaStreamCreateWithPriority(_NON_BLOCKING, highest))
        try:
            yield stream
            _checked(rt.cudaStreamSynchronize(stream))
        finally:
            _checked(rt.cudaStreamDestroy(stream))


_FILLED = 0
"""The row of words that the producer's stream writes."""


def _emptied(consumer: int) -> int:
    """The row of words that a consumer's stream writes."""
    return 1 + consumer


class _Words:
    """The words of one slab, in host memory that was registered: rows of one for each slot.

    The streams of `device` write them and wait for them, and so does this process.
    """

    def __init__(self, memory: memoryview, slots: int, device: torch.device) -> None:
        self._pinned = PinnedMemory(memory, str(device))
        self._values = memory[wire.HEADER_BYTES :].cast("Q")
        self._address = self._pinned.device_pointer + wire.HEADER_BYTES
        self._slots = slots
        self._index = _index(device)
        self._device = device

    def write(self, row: int, slot: int, value: int) -> None:
        """The current stream writes `value` after what it was given so far."""
        word = self._address + _WORD * (row * self._slots + slot)
        _give(self._index, lambda stream: driver.cuStreamWriteValue64(stream, word, value, _WRITE))

    def wait(self, row: int, slot: int, value: int) -> None:
        """What the current stream is given from here on begins when the word is `value` or more."""
        place = row * self._slots + slot
        # The GPU wrote it when all before it was done, and what it is given now comes after.
        if self._values[place] < value:
            word = self._address + _WORD * place
            _give(
                self._index,
                lambda stream: driver.cuStreamWaitValue64(stream, word, value, _WAIT_GEQ),
            )

    def fill(self, row: int, value: int) -> None:
        """Write all words of a row at once; streams that wait for as much go on."""
        for place in self._places(row):
            self._values[place] = value

    def let_go(self, row: int) -> None:
        """All that waits for words of this row goes on, and what will; their writer has died.

        Others may do the same at the same time, and ask later how far the writer had come.
        """
        for place in self._places(row):
            self._values[place] |= wire.LET_GO

    def read(self, row: int) -> list[int]:
        """What was written to the words of a row, let go or not."""
        return [self._values[place] & ~wire.LET_GO for place in self._places(row)]

    def is_torn(self, row: int, slot: int, value: int) -> bool:
        """Whether a stream that waited for this was let go instead."""
        word = self._values[row * self._slots + slot]
        return word >= wire.LET_GO and word - wire.LET_GO < value

    def _places(self, row: int) -> range:
        return range(row * self._slots, (row + 1) * self._slots)

    def probe(self, row: int) -> None:
        """Try whether a stream can write a word and wait for it. Raises TensorMQError."""
        place = row * self._slots
        word = self._address + _WORD * place
        with _stream_apart(self._device) as stream:
            _checked(driver.cuStreamWriteValue64(stream, word, 1, _WRITE))
            _checked(driver.cuStreamWaitValue64(stream, word, 1, _WAIT_GEQ))
        if self._values[place] != 1:
            raise TensorMQError("a word that a stream wrote is not to be seen in host memory")

    def close(self) -> None:
        """For when no stream uses them any more."""
        self._pinned.close()
        # The loop's thread may be looking at them, for the death of a producer.
        self._values = memoryview(bytearray(self._values)).cast("Q")


class DeviceSlab:
    """The producer's memory: on the GPU a header page with the nonce and the slots, on the host
    the words."""

    carrier = wire.Carrier.CUDA_IPC

    def __init__(self, nonce: int, slots: int, slot_bytes: int, device: str) -> None:
        self._device = _numbered(device)
        self._index = _index(self._device)
        self._slot_bytes = slot_bytes
        self._size = wire.device_slab_size(slots, slot_bytes)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.cuda.device(self._device))
            torch.cuda.current_stream()  # makes sure that the primary context exists
            self._pointer = int(_checked(rt.cudaMalloc(self._size)))
            stack.callback(rt.cudaFree, self._pointer)
            self._handle = bytes(_checked(rt.cudaIpcGetMemHandle(self._pointer)).reserved)
            mark = ctypes.create_string_buffer(nonce.to_bytes(wire.NONCE_BYTES, "little"))
            with _stream_apart(self._device) as stream:
                source, size = ctypes.addressof(mark), wire.NONCE_BYTES
                _checked(rt.cudaMemcpyAsync(self._pointer, source, size, _ANY_WAY, stream))
            self._page = host.HostSlab(nonce, 1, wire.words_size(slots))
            stack.callback(self._page.close)
            self._words = _Words(self._page.memory, slots, self._device)
            stack.callback(self._words.close)
            self._memory = _as_bytes(self._pointer, self._size, self._device)
            stack.pop_all()
        self._next = 0
        self._consumers: dict[object, int] = {}
        self._watches: dict[object, Watch] = {}
        self._last: list[tuple[int, tuple[object, ...]]] = [(0, ())] * slots
        self._sequence = 0

    def offer(self) -> wire.DeviceSlab:
        """What one more consumer needs; it is nobody's until `attach`.

        Raises NegotiationError when there are as many consumers as one slab has words for.
        """
        taken = set(self._consumers.values())
        for step in range(wire.CONSUMERS):
            index = (self._next + step) % wire.CONSUMERS
            if index not in taken:
                # Not the same one again soon: what a dead consumer's GPU work still writes there
                # must not meet its successor.
                self._next = index + 1
                return wire.DeviceSlab(self._handle, self._size, index, self._page.offer())
        raise NegotiationError(f"this Push has {wire.CONSUMERS} consumers on the GPU already")

    def attach(self, peer: object, consumer: int, pidfd: int) -> None:
        """`peer` is the consumer that was offered the words `consumer`; `pidfd`: its process."""
        row = _emptied(consumer)
        self._watches[peer] = Watch(pidfd, lambda: self._words.let_go(row))
        self._words.fill(row, self._sequence)
        self._consumers[peer] = consumer

    def detach(self, peer: object) -> None:
        """The consumer is gone; what waits for it on the GPU goes on."""
        consumer = self._consumers.pop(peer, None)
        if consumer is not None:
            self._watches.pop(peer).cancel()
            self._words.fill(_emptied(consumer), self._sequence)

    def reuse(self, slot: int) -> None:
        """What the current stream writes to `slot` from here on waits for its last use."""
        sequence, holders = self._last[slot]
        for peer in holders:
            consumer = self._consumers.get(peer)
            if consumer is not None:  # a peer that died uses nothing any more
                self._words.wait(_emptied(consumer), slot, sequence)

    def view(self, slot: int, spec: wire.TensorSpec) -> torch.Tensor:
        return _view(self._memory, spec, wire.HEADER_BYTES + slot * self._slot_bytes)

    def surely_takes(self, tensors: Iterable[host.Tensor]) -> bool:
        """Whether `copy` of these to a slot is nothing but work for this GPU.

        Which fails when nothing that the process has on the GPU can be used any more.
        """
        return all(
            isinstance(each, torch.Tensor)
            and each.get_device() == self._index
            and each.layout is torch.strided
            for each in tensors
        )

    def publish(self, slot: int, sequence: int, holders: Iterable[object]) -> None:
        """All that the current stream has been given so far belongs to the slot's content."""
        self._sequence = sequence
        self._words.write(_FILLED, slot, sequence)
        self._last[slot] = sequence, tuple(holders)

    def close(self) -> None:
        # Freeing exported memory synchronises the device, whatever we do: once, at the end.
        torch.cuda.synchronize(self._device)
        self._words.close()
        self._page.close()
        self._memory = torch.empty(0)  # nothing here sees it any more
        with torch.cuda.device(self._device):
            _checked(rt.cudaFree(self._pointer))


class DeviceMapping:
    """The consumer's view of a DeviceSlab, of use after `join`, to be closed `aside` in any case.

    elsewhere: the slab lies on another GPU than `device`, which reads it from there.
    Raises NegotiationError when it cannot be opened.
    """

    def __init__(
        self, offer: wire.DeviceSlab, slot_bytes: int, device: str, *, elsewhere: bool
    ) -> None:
        self._device = _numbered(device)
        self._size = offer.size
        self._slot_bytes = slot_bytes
        self._elsewhere = elsewhere
        self._emptied = _emptied(offer.consumer)
        self._cleanup = contextlib.ExitStack()
        handle = rt.cudaIpcMemHandle_t()
        handle.reserved = offer.handle
        with torch.cuda.device(self._device):
            torch.cuda.current_stream()  # makes sure that the primary context exists
            try:
                self._pointer = int(_checked(rt.cudaIpcOpenMemHandle(handle, _LAZY_PEER_ACCESS)))
            except TensorMQError as error:
                raise NegotiationError(f"cannot open the producer's GPU memory: {error}") from None
        self._cleanup.callback(self._unmap)

    def join(self, nonce: int, words: memoryview, slots: int) -> None:
        """Make sure that this is the memory the producer speaks of, and that streams can wait for
        its words, which are `words`, mapped. Raises NegotiationError; then the mapping is good for
        nothing but to be closed."""
        self._look(nonce)
        view = _as_bytes_of_peer if self._elsewhere else _as_bytes
        self._memory = view(self._pointer, self._size, self._device)
        try:
            self._words = _Words(words, slots, self._device)
            self._cleanup.callback(self._words.close)
            # Nobody waits for these words before this end has said welcome.
            self._words.probe(self._emptied)
        except TensorMQError as error:
            raise NegotiationError(
                f"streams cannot wait for words in the producer's memory: {error}"
            ) from None

    def _look(self, nonce: int) -> None:
        found = ctypes.create_string_buffer(wire.NONCE_BYTES)
        with _stream_apart(self._device) as stream:
            to, size = ctypes.addressof(found), wire.NONCE_BYTES
            _checked(rt.cudaMemcpyAsync(to, self._pointer, size, _ANY_WAY, stream))
        if found.raw != nonce.to_bytes(wire.NONCE_BYTES, "little"):
            raise NegotiationError("the producer's GPU memory does not hold this channel's nonce")

    def expect(self, slot: int, sequence: int) -> None:
        """What the current stream reads from `slot` from here on waits for its content."""
        self._words.wait(_FILLED, slot, sequence)

    def view(self, slot: int, spec: wire.TensorSpec) -> torch.Tensor:
        return _view(self._memory, spec, wire.HEADER_BYTES + slot * self._slot_bytes)

    def release(self, slot: int, sequence: int) -> None:
        """The current stream's work so far was the last use of this slot."""
        self._words.write(self._emptied, slot, sequence)

    def filled(self) -> list[int]:
        """For each slot the sequence number of the last message whose content is complete."""
        return self._words.read(_FILLED)

    def is_torn(self, slot: int, sequence: int) -> bool:
        """Whether the producer died before this was complete, and nothing waits for it any more."""
        return self._words.is_torn(_FILLED, slot, sequence)

    def let_go(self) -> None:
        """Nothing waits any more for content that the dead producer did not complete.

        From any thread. `filled` stays what it is, also for other consumers of the producer.
        """
        self._words.let_go(_FILLED)

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        self._memory = torch.empty(0)  # nothing here sees it any more
        self._cleanup.close()

    def _unmap(self) -> None:
        with torch.cuda.device(self._device):
            _checked(rt.cudaIpcCloseMemHandle(self._pointer))


class PinnedMemory:
    """Host memory known to CUDA: copies from and to it do not stop the host, and streams can use it
    at `device_pointer`. It stays mapped until `close`."""

    def __init__(self, memory: memoryview, device: str) -> None:
        self._device = _numbered(device)
        self._memory = memory
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with torch.cuda.device(self._device):
            _checked(rt.cudaHostRegister(self._address, memory.nbytes, _REGISTER_MAPPED))
            try:
                self.device_pointer = int(_checked(rt.cudaHostGetDevicePointer(self._address, 0)))
            except TensorMQError:
                rt.cudaHostUnregister(self._address)
                raise

    def close(self) -> None:
        torch.cuda.synchronize(self._device)  # a copy under way still uses the pages
        with torch.cuda.device(self._device):
            _checked(rt.cudaHostUnregister(self._address))
        self._memory = memoryview(b"")


def aside(loop: Loop, jobs: Iterable[Callable[[], None]], then: Callable[[], None]) -> None:
    """Have a thread of its own do `jobs`, and `loop` call `then` when they are done.

    To free or unmap what a GPU has used waits for all that its streams have to do. One of them may
    wait for a word of another process, and the loop goes on meanwhile. While one does, such a call
    holds up every launch of the process; if the other has died, `watchdog` ends that.
    """

    def work() -> None:
        for job in jobs:
            try:
                job()
            except Exception:  # the others' memory is to be released all the same
                log.exception("memory that a GPU has used cannot be released")
        loop.call_soon(then)

    threading.Thread(target=work, name="tensormq aside", daemon=True).start()


class Completions:
    """Runs a callback in the loop's thread once the GPU has done what it was given so far.

    Only where a host must know: before it is told of tensors that were copied to host memory,
    and before host memory that a GPU copies from is given back. The loop asks, and waits for
    nothing. For streams that each do their work in order: one at a time.
    """

    def __init__(self, loop: Loop, device: str) -> None:
        self._loop = loop
        self._index = _index(torch.device(device))
        self._waiting: deque[tuple[torch.cuda.Event, Callable[[], None]]] = deque()
        self._asked = False
        # To make an event takes as long as to record it.
        self._spare: list[torch.cuda.Event] = []

    def after_current_stream(self, callback: Callable[[], None]) -> None:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=False)
        event.record(_current_stream(self._index))
        self._waiting.append((event, callback))
        if not self._asked:
            self._asked = True
            self._loop.ask(self._done)

    def close(self) -> None:
        """Wait for everything that was begun; its callbacks were called when this returns."""
        # In the loop, which hears of it if a producer dies whose content the GPU waits for.
        self._loop.run_until(lambda: not self._waiting)

    def _done(self) -> bool | None:
        """Run the callbacks of what is done: whether there was any, None where none is left."""
        found = False
        while self._waiting:
            event, callback = self._waiting[0]
            try:
                if not event.query():
                    return found
            except RuntimeError as error:
                # The context is poisoned; whoever launched the work gets the same error and
                # ends the process. Nothing computed may be announced from here on.
                log.critical("a GPU operation failed: %s", error)
                self._waiting.clear()
                break
            self._waiting.popleft()
            self._spare.append(event)
            found = True
            callback()
        self._asked = False
        return None
