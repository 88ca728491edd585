"""What a block is computing now, in a file that can be read after its process died.

A page mapped from a file: writing costs two stores and no system call, and the kernel keeps what
was written whatever becomes of the process. Layout: a count, then so many request ids, all
little-endian uint64.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path

_SIZE = mmap.PAGESIZE
_MOST = _SIZE // 8 - 1


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

    def write(self, requests: Sequence[int]) -> None:
        """From now on, exactly these requests are being computed."""
        ids = requests[:_MOST]
        # The count last: a reader never sees ids that were not written yet.
        struct.pack_into(f"<{len(ids)}Q", self._page, 8, *ids)
        struct.pack_into("<Q", self._page, 0, len(ids))

    def close(self) -> None:
        self._page.close()
        self.path.unlink(missing_ok=True)


def read(path: Path) -> tuple[int, ...]:
    """The requests that were being computed; none where there is no such file."""
    try:
        page = path.read_bytes()
    except FileNotFoundError:
        return ()
    if len(page) != _SIZE:
        return ()
    (count,) = struct.unpack_from("<Q", page)
    return struct.unpack_from(f"<{min(count, _MOST)}Q", page, 8)
