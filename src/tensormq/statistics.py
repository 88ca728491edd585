"""What a channel counts. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from .wire import Carrier, Doorbell

_SUB_BITS = 2  # each doubling of a duration has four buckets


class Histogram:
    """Durations in buckets, four to each doubling; a quantile is right within 12.5 %."""

    def __init__(self) -> None:
        self._buckets = [0] * (65 << _SUB_BITS)

    def add(self, nanoseconds: int) -> None:
        """Count one duration, 0 to 2^62 ns."""
        value = nanoseconds | 8  # so that it has enough bits to choose a bucket
        bits = value.bit_length()
        self._buckets[bits << _SUB_BITS | value >> (bits - 1 - _SUB_BITS) & 3] += 1

    @property
    def count(self) -> int:
        return sum(self._buckets)

    def quantile(self, share: float) -> float:
        """Seconds within which `share` (0 to 1) of the durations stayed; 0.0 when there is none."""
        rank = share * self.count
        passed = 0
        for index, count in enumerate(self._buckets):
            passed += count
            if count and passed >= rank:
                bits, part = index >> _SUB_BITS, index & 3
                middle = (4 + part + 0.5) * 2.0 ** (bits - 1 - _SUB_BITS)
                return middle / 1e9
        return 0.0


@dataclass(slots=True)
class ChannelStatistics:
    """One channel, as its producer counts it.

    host_bytes: those of `bytes` that went through host memory.
    waits_for_credit: how often a send or allocate found no free slot.
    slots_free, slots_leased: slots that this channel could be given, and that its consumer holds.
    hops: from the moment a message with tensors was announced until the consumer took it, as the
        consumer reports with its release. Only between processes of one host, which share a clock.
    """

    endpoint: str
    carrier: Carrier
    doorbell: Doorbell = Doorbell.ZEROMQ
    messages: int = 0
    bytes: int = 0
    host_bytes: int = 0
    waits_for_credit: int = 0
    slots_free: int = 0
    slots_leased: int = 0
    hops: Histogram = field(default_factory=Histogram)


@dataclass(slots=True)
class ConsumerStatistics:
    """One channel, as its consumer counts it.

    producer: the process at the other end, as it names itself.
    messages, bytes, host_bytes: of the messages that were taken; host_bytes is what went through
        host memory.
    waiting: messages that were received and not yet taken.
    leases, oldest_lease: slots of the producer that this end holds, taken or not, and for how many
        seconds the first of them. A message that nobody releases shows here.
    hops: as in ChannelStatistics.
    """

    producer: int
    carrier: Carrier
    doorbell: Doorbell = Doorbell.ZEROMQ
    messages: int = 0
    bytes: int = 0
    host_bytes: int = 0
    waiting: int = 0
    leases: int = 0
    oldest_lease: float = 0.0
    hops: Histogram = field(default_factory=Histogram)
