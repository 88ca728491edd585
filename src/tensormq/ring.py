"""Rings: frames between two processes of one host through shared memory, without a system call.

A ring has one writer and one reader. Its header holds three words, each in a cache line of its own
because different processors write them:

    head      bytes ever written; stored by the writer, last of all, when a frame is whole
    tail      bytes ever read; stored by the reader when it has copied a frame out
    parked    1 while the reader sleeps, or is about to: then the writer rings its bell, a pipe

After it lie `capacity` bytes, a power of two, in which frames go round: four bytes length, four
bytes `after`, the frame, and padding to a multiple of eight. `after` says how many messages of the
same direction were sent through the socket before this frame, for what does not fit a ring goes
there: a reader that has not seen that many yet waits for them.

Danger: this relies on the memory order of x86-64, where stores become visible in the order in
which they were made. Python has no fence. `supported` says no on every other machine, and the
channel then keeps to its socket. One reordering x86 does make: a load may pass an earlier store
to another place. Two places need protection from that, and take an uncontended lock for it, whose
locked instruction is a full fence:

    writer: store head, FENCE, load parked        reader: store parked, FENCE, load head

Whichever fence comes second, its owner sees the other's store: either the writer finds the reader
parked and rings, or the reader finds the frame and does not sleep.

What the other process wrote is not trusted: positions and lengths are checked before they are
used, and nothing outside the ring is touched whatever they are.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import sys
import threading

from . import wire
from .errors import NegotiationError, RingBroken

_LINE_WORDS = 8
_HEAD, _TAIL, _PARKED = 0, _LINE_WORDS, 2 * _LINE_WORDS
HEADER_BYTES = 256
_FIRST = HEADER_BYTES // 8  # the word after the header
_PREFIX_BYTES = 8
_HALF = 32  # bits of a frame's prefix: length below, `after` above
_MASK = 0xFFFF_FFFF

DOWN_BYTES = 1 << 16
"""Capacity of the ring from a producer to a consumer: more than a hundred usual descriptors."""

_RELEASE_BYTES = 96  # a release in a ring, generously
_LARGEST = 1 << 20


def supported() -> bool:
    """Whether this machine keeps the order of stores that rings rely on."""
    return platform.machine() == "x86_64" and sys.byteorder == "little"


def up_bytes(slots: int) -> int:
    """Capacity of the ring back to the producer: the releases of all its slots fit."""
    return max(4096, 1 << (slots * _RELEASE_BYTES - 1).bit_length())


class Writer:
    """The writing end. `bell` is the pipe of the reader's loop, open for writing."""

    def __init__(self, memory: memoryview, bell: int) -> None:
        self._words = memory.cast("Q")
        self._data = memory[HEADER_BYTES:]
        self._capacity = len(self._data)
        self._bell = bell
        self._head = 0
        self._detoured = 0
        self._limit = self._capacity  # up to here there was room when the tail was last read
        self._fence = threading.Lock()

    def write(self, frame: bytes) -> bool:
        """Put `frame` in and wake a sleeping reader.

        False when there is no room for it now: then it has to be sent through the socket, before
        anything else is sent. A process that is killed in here leaves a frame that was not
        published, and so is not there. Raises RingBroken when the reader's position cannot be.
        """
        length = len(frame)
        head = self._head
        following = head + _PREFIX_BYTES + (length + 7 & -8)
        if following > self._limit:
            tail = self._words[_TAIL]
            if not 0 <= head - tail <= self._capacity:
                raise RingBroken(f"its reader is said to be at {tail} and its writer at {head}")
            self._limit = tail + self._capacity
            if following > self._limit:
                self._detoured = self._detoured + 1 & _MASK
                return False
        start = head & (self._capacity - 1)
        self._words[_FIRST + (start >> 3)] = self._detoured << _HALF | length
        start += _PREFIX_BYTES
        end = start + length
        if end <= self._capacity:
            self._data[start:end] = frame
        else:
            split = self._capacity - start
            self._data[start:] = frame[:split]
            self._data[: length - split] = frame[split:]
        self._head = following
        self._words[_HEAD] = following
        self._fence.acquire()
        self._fence.release()
        if self._words[_PARKED]:
            self.rouse()
        return True

    def rouse(self) -> None:
        """Wake the reader if it sleeps, be it for a frame that is still to follow."""
        if self._words[_PARKED]:
            self._words[_PARKED] = 0  # one byte is enough for all that follows
            ring_bell(self._bell)

    def close(self) -> None:
        self._words.release()
        self._data.release()
        os.close(self._bell)


class Reader:
    """The reading end."""

    def __init__(self, memory: memoryview) -> None:
        self._words = memory.cast("Q")
        self._data = memory[HEADER_BYTES:]
        self._capacity = len(self._data)
        self._tail = 0
        self._arrived = 0
        self._held = False  # the next frame comes after one that the socket has not brought yet

    def arrive(self) -> None:
        """A message of this direction has come through the socket."""
        self._arrived = self._arrived + 1 & _MASK
        self._held = False

    @property
    def ready(self) -> bool:
        """Whether `read` has something to say."""
        return not self._held and self._words[_HEAD] != self._tail

    def park(self) -> None:
        """From now on a writer rings; the caller passes a fence and looks once more."""
        self._words[_PARKED] = 1

    def unpark(self) -> None:
        self._words[_PARKED] = 0

    def read(self) -> bytes | None:
        """Take the next frame; None when there is none, or one of the socket comes before it.

        Raises RingBroken when what the writer says cannot be.
        """
        tail = self._tail
        if self._held or (head := self._words[_HEAD]) == tail:
            return None
        there = head - tail
        if not _PREFIX_BYTES <= there <= self._capacity or there & 7:
            raise RingBroken(f"its writer is said to be at {head} and its reader is at {tail}")
        start = tail & (self._capacity - 1)
        prefix = self._words[_FIRST + (start >> 3)]
        length = prefix & _MASK
        taken = _PREFIX_BYTES + (length + 7 & -8)
        if taken > there:
            raise RingBroken(f"a frame of {length} bytes where {there} were written")
        if prefix >> _HALF != self._arrived:
            self._held = True
            return None
        start += _PREFIX_BYTES
        end = start + length
        if end <= self._capacity:
            frame = self._data[start:end].tobytes()
        else:
            frame = bytes(self._data[start:]) + bytes(self._data[: end - self._capacity])
        self._tail = self._words[_TAIL] = tail + taken
        return frame

    def close(self) -> None:
        """Never be ready again, for a loop may be about to ask."""
        self._held = True
        self._words.release()
        self._data.release()


def ring_bell(bell: int) -> None:
    """Wake the loop that sleeps at the other end of the pipe `bell`."""
    try:
        os.write(bell, b"\0")
    except BlockingIOError:
        pass  # the pipe is full of bytes that will wake it
    except BrokenPipeError:
        pass  # its process ended, which is noticed elsewhere


class Line:
    """One end of a channel's two rings: frames out, frames in."""

    def __init__(self, memory: mmap.mmap, outgoing: Writer, incoming: Reader) -> None:
        self.outgoing = outgoing
        self.incoming = incoming
        self._memory = memory

    def close(self) -> None:
        """Unmap the memory and give up the bell."""
        self.outgoing.close()
        self.incoming.close()
        self._memory.close()


class Rings:
    """The memory of a channel's two rings, made by the producer and offered to the consumer."""

    def __init__(self, nonce: int, slots: int, bell: wire.Bell) -> None:
        self._down, self._up = DOWN_BYTES, up_bytes(slots)
        size = _size(self._down, self._up)
        fd = os.memfd_create("tensormq", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            self._memory = mmap.mmap(fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            inode = os.fstat(fd).st_ino
        except BaseException:
            os.close(fd)
            raise
        self._memory[: wire.NONCE_BYTES] = nonce.to_bytes(wire.NONCE_BYTES, "little")
        self._fd = fd
        self.offer = wire.Rings(fd, inode, self._down, self._up, bell)

    def line(self, process: wire.Process, bell: wire.Bell) -> Line:
        """The producer's end, once the consumer in `process` has told its bell."""
        down, up = _split(self._memory, self._down, self._up)
        return Line(self._memory, Writer(down, open_bell(process, bell)), Reader(up))

    def close(self) -> None:
        """Close the descriptor, which nobody needs once both ends have mapped the memory."""
        os.close(self._fd)


def join(process: wire.Process, nonce: int, offer: wire.Rings) -> Line:
    """The consumer's end of rings that `process` offers. Raises NegotiationError."""
    for capacity in (offer.down, offer.up):
        if not 4096 <= capacity <= _LARGEST or capacity & (capacity - 1):
            raise NegotiationError(f"a ring of {capacity} bytes")
    size = _size(offer.down, offer.up)
    path = f"/proc/{process.pid}/fd/{offer.fd}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise NegotiationError(f"cannot open the producer's rings {path}: {error}") from None
    try:
        stat = os.fstat(fd)
        if stat.st_ino != offer.inode or stat.st_size != size:
            raise NegotiationError(f"{path} is not the memory that was offered")
        memory = mmap.mmap(fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(fd)
    if memory[: wire.NONCE_BYTES] != nonce.to_bytes(wire.NONCE_BYTES, "little"):
        raise NegotiationError(f"{path} does not hold this channel's nonce")
    down, up = _split(memory, offer.down, offer.up)
    return Line(memory, Writer(up, open_bell(process, offer.bell)), Reader(down))


def open_bell(process: wire.Process, bell: wire.Bell) -> int:
    """A loop's pipe in `process`, open for writing. Raises NegotiationError."""
    path = f"/proc/{process.pid}/fd/{bell.fd}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise NegotiationError(f"cannot open the peer's bell {path}: {error}") from None
    if os.fstat(fd).st_ino != bell.inode:
        os.close(fd)
        raise NegotiationError(f"{path} is not the bell that was told")
    return fd


def _size(down: int, up: int) -> int:
    return wire.HEADER_BYTES + 2 * HEADER_BYTES + down + up


def _split(memory: mmap.mmap, down: int, up: int) -> tuple[memoryview, memoryview]:
    middle = wire.HEADER_BYTES + HEADER_BYTES + down
    with memoryview(memory) as whole:
        return whole[wire.HEADER_BYTES : middle], whole[middle : middle + HEADER_BYTES + up]
