"""Counting into buckets, as cheaply as a hot path needs it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from blockflow.protocol import Histogram

LATENCY_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BLOCK_SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, *LATENCY_SECONDS)
BATCH_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


class Buckets:
    """A histogram under construction; written by one thread, read by any."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def snapshot(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._sum)


class Hops:
    """How long tensors took from their announcement until they were taken, by carrier."""

    def __init__(self) -> None:
        self._found: dict[str, Buckets] = {}

    def add(self, carrier: str, seconds: float) -> None:
        if (buckets := self._found.get(carrier)) is None:
            buckets = self._found[carrier] = Buckets(BLOCK_SECONDS)
        buckets.add(seconds)

    def snapshot(self) -> dict[str, Histogram]:
        # A copy first: another thread may add a carrier meanwhile.
        return {carrier: found.snapshot() for carrier, found in self._found.copy().items()}
