"""Variables that the processes of a server are started with, because they are read before anything
else runs. What the environment says already is left so."""

from __future__ import annotations

import os
from collections.abc import Mapping

_WAITING = {
    # The threads of a parallel region spin so often for the next one (some ten µs) and then sleep:
    # by default, of workers that take turns on the same cores, those that wait would keep the cores
    # busy, and not to spin at all costs a wake-up for every operation. GNU's library cuts the
    # number down to 100 where a process has more such threads than there are cores, as one with
    # several blocks has; with the policy `active` to 1000. Intel's would then spin for ever but for
    # a variable of its own, in milliseconds.
    "OMP_WAIT_POLICY": "active",
    "GOMP_SPINCOUNT": "10000",
    "KMP_BLOCKTIME": "1",
}
_KEEPING = {
    # glibc gives large memory back to the kernel as soon as it is free, and gets it anew, page by
    # page and zeroed, for the next batch or the next request's body: half of the time that a batch
    # of 32 takes to compute, and of what a gateway does for a request. So nothing is given back,
    # and all comes from one heap, for those of other threads are given back at once when empty.
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_ARENA_MAX": "1",
}
_QUEUES = {
    # A GPU takes work from so many queues at a time. With 8, as is the default, streams of a worker
    # with many blocks share them, and who waits holds up who could go on.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
}


def serving() -> dict[str, str]:
    """How OpenMP's threads of a process wait for each other, and that it keeps its memory."""
    return _unless_set(_WAITING | _KEEPING)


def without_mps() -> dict[str, str]:
    """What a worker on a GPU is started with beside that, unless it joins MPS.

    All processes that do share one pool of queues, and the first would leave none for the others.
    """
    return _unless_set(_QUEUES)


def _unless_set(wanted: Mapping[str, str]) -> dict[str, str]:
    return {name: os.environ.get(name, value) for name, value in wanted.items()}
