"""The cores of this host, divided among the blocks that compute at the same moment.

A block that computes alone should have all cores, and blocks that compute side by side should not
each have as many threads as there are cores: their threads would wait at each other's barriers. So
every block on the CPU notes in a page that all workers of a server share since when it computes,
and takes its part of the cores, by the number of blocks that do, for as long as it computes. A
block that is pinned to cores divides them with nobody: who pins has divided already.

The page is a hint, written without locks. A block that died while it computed counts for a while.
"""

from __future__ import annotations

import mmap
import os
import time
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt

_PLACES = mmap.PAGESIZE // 8
_FORGOTTEN = 5.0
"""Seconds after which a block that computes no longer counts: it may be dead."""


def present() -> frozenset[int]:
    """The numbers of the cores that this thread, and what it starts, may run on."""
    return frozenset(os.sched_getaffinity(0))


def pin(cores: Collection[int]) -> None:
    """Have this thread, and the threads that it starts from now on, stay on `cores`."""
    os.sched_setaffinity(0, cores)


def available() -> int:
    """The cores that this thread may use: by affinity, and by the quota of its control group."""
    cores = len(present())
    quota = _quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def _quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Cores by the second version of control groups, as a container sees its own; None if any."""
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


class Cores:
    """One block's part of the cores. path: the page. block: a name that no other block has.

    most: threads that the block may have at all; every core by default. alone: the cores that
    this thread may use are this block's, whoever else computes.
    """

    def __init__(
        self, path: Path, block: str, most: int | None = None, *, alone: bool = False
    ) -> None:
        self._cores = available()
        self._most = min(most or self._cores, self._cores)
        self._alone = alone
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, _PLACES * 8)
            self._page = mmap.mmap(fd, _PLACES * 8)
        finally:
            os.close(fd)
        # Since when each block computes, by the monotonic clock; 0 where there is none.
        self._begun: npt.NDArray[np.float64] = np.frombuffer(self._page, np.float64)
        # Two blocks in one place are counted as one, which costs some time and breaks nothing.
        self._place = zlib.crc32(block.encode()) % _PLACES

    def take(self) -> int:
        """Begin to compute: how many threads to do it with."""
        now = time.monotonic()
        self._begun[self._place] = now
        if self._alone:
            return self._most
        busy = int(np.count_nonzero(self._begun > max(0.0, now - _FORGOTTEN)))
        return max(1, min(self._most, self._cores // max(1, busy)))

    def give_back(self) -> None:
        """The computation is over."""
        self._begun[self._place] = 0.0

    def close(self) -> None:
        self.give_back()
        self._begun = np.empty(0)  # a view of it would keep the page open
        self._page.close()
