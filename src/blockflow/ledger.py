"""What a block is computing now, in a file that can be read after its process died.

Pages mapped from a file: writing costs three stores and no system call, and the kernel keeps what
was written whatever becomes of the process. Layout, all little-endian: a count and so many request
ids (uint64), and from `_DEADLINES` on as many deadlines (float64).
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_SIZE = 2 * mmap.PAGESIZE
_MOST = _SIZE // 16 - 1
_DEADLINES = 8 + 8 * _MOST


class Entry(NamedTuple):
    """A request; `deadline` is in seconds of the monotonic clock, and 0 where there is none."""

    request: int
    deadline: float


def ledger_path(endpoint: str) -> Path:
    """Where the ledger of the block at `endpoint` (ipc://...) lies: beside its socket."""
    return Path(endpoint.removeprefix("ipc://")).with_suffix(".now")


class Ledger:
    """Written by the one thread that computes, whenever what it computes changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, _SIZE)
            self._page = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)
        # Views with items of their own: to store one is all that writing takes.
        self._ids = memoryview(self._page).cast("Q")
        self._deadlines = memoryview(self._page)[_DEADLINES:].cast("d")

    def write(self, entries: Sequence[Entry]) -> None:
        """From now on, exactly these requests are being computed."""
        count = min(len(entries), _MOST)
        for place in range(count):
            request, deadline = entries[place]
            self._deadlines[place] = deadline
            self._ids[1 + place] = request
        # The count last: a reader never sees ids that were not written yet.
        self._ids[0] = count

    def close(self) -> None:
        self._ids.release()
        self._deadlines.release()
        self._page.close()
        self.path.unlink(missing_ok=True)


def read(path: Path) -> tuple[Entry, ...]:
    """The requests that were being computed; none where there is no such file."""
    try:
        page = path.read_bytes()
    except FileNotFoundError:
        return ()
    if len(page) != _SIZE:
        return ()
    (count,) = struct.unpack_from("<Q", page)
    count = min(count, _MOST)
    ids = struct.unpack_from(f"<{count}Q", page, 8)
    deadlines = struct.unpack_from(f"<{count}d", page, _DEADLINES)
    return tuple(map(Entry, ids, deadlines))
