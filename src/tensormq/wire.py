"""The wire format: what two ends say to each other, as values and as bytes. Pure.

A frame is the four bytes `TMQ` + version, followed by one MessagePack array whose first element
names the message. Payload bytes never pass through here: a descriptor says where tensors lie
(carriers `cuda_ipc` and `shm`), or that they follow in a second ZeroMQ frame (`inline`).

A channel is opened by the producer:

    producer                          consumer
    Hello(abilities)      ──────▶
                          ◀──────     Card(abilities)
    Offer(slab)           ──────▶                         the best carrier both can do
                          ◀──────     Welcome | Decline   mapped and verified, or why not
    Deliver(descriptor)   ──────▶                         as often as slots are free
                          ◀──────     Release(slot)       the credit comes back
    Bye                   ◀─────▶
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import TypeAlias, TypeVar

import msgspec

from .errors import ProtocolError, TensorTooLarge, UnsupportedTensor

VERSION = 3
MAGIC = b"TMQ" + bytes([VERSION])
_MAGIC_BYTES = len(MAGIC)
MAX_FRAME = 128 * 1024
"""Bytes of the longest frame that may be parsed; descriptors take a few hundred."""

MAX_SLOTS = 1024
"""Slots of one slab."""

LET_GO = 1 << 62
"""The bit of a word that lets go what waits for it, for nobody will write it any more: it is more
than any message's number, and what had been written stays to be seen beside it."""

MAX_DIMENSIONS = 32
"""Of a tensor: as many as every NumPy that is supported can have."""

CONSUMERS = 64
"""Consumers that one slab on a GPU has words for."""

ALIGNMENT = 256
"""Bytes at whose multiples tensors start in a slot: what cudaMalloc and vector loads like."""

LONGEST_HOP = 1 << 62
"""Nanoseconds beyond which nobody believes a `Release.hop`."""

NONCE_BYTES = 8
HEADER_BYTES = 4096
"""A slab begins with a page that holds a nonce, so that a mapping can be verified."""

ITEMSIZE: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}


class Carrier(StrEnum):
    """How a tensor gets across, best first."""

    CUDA_IPC = "cuda_ipc"
    SHM = "shm"
    INLINE = "inline"


class Doorbell(StrEnum):
    """How a consumer learns of a message, and a producer of a release."""

    RING = "ring"
    ZEROMQ = "zeromq"


class _Frozen(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class TensorSpec(_Frozen, frozen=True):
    """A tensor in a slot: C-contiguous, `offset` bytes after the slot's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class Request(_Frozen, frozen=True):
    """One of the requests whose rows a message carries.

    `deadline` is seconds of CLOCK_MONOTONIC, which all processes of a host share; 0 is none.
    """

    id: int
    rows: int
    deadline: float = 0.0


class Host(_Frozen, frozen=True):
    """Which memory a process can reach: equal for two processes that may share host memory."""

    boot_id: str
    pid_namespace: str
    uid: int


class Process(_Frozen, frozen=True):
    """A process beyond doubt: `started` (clock ticks after boot) tells a reused pid apart."""

    host: Host
    pid: int
    started: int


class Abilities(_Frozen, frozen=True):
    """What one end can do.

    `gpu` is the UUID of the device its tensors live on, if any; `reaches` are those of other GPUs
    whose memory that device can read and write.
    """

    process: Process
    carriers: tuple[Carrier, ...]
    gpu: str | None = None
    reaches: tuple[str, ...] = ()

    def over_tcp(self) -> Abilities:
        """What is left of them where nothing that a peer says of its process can be believed."""
        inline = tuple(carrier for carrier in self.carriers if carrier is Carrier.INLINE)
        return Abilities(self.process, inline)


class Hello(_Frozen, frozen=True, tag="hello"):
    epoch: int
    abilities: Abilities


class Card(_Frozen, frozen=True, tag="card"):
    epoch: int
    abilities: Abilities


class HostSlab(_Frozen, frozen=True, tag="host"):
    """A memfd of the producer, reached through /proc/<pid>/fd/<fd> and known by its inode."""

    fd: int
    inode: int
    size: int


class DeviceSlab(_Frozen, frozen=True, tag="device"):
    """A CUDA allocation, and its words: a memfd with a header page.

    `consumer`, below CONSUMERS, says which of them this consumer writes.
    """

    handle: bytes
    size: int
    consumer: int
    words: HostSlab


class NoSlab(_Frozen, frozen=True, tag="none"):
    """Tensors follow in a frame; slots are only counted."""


Slab: TypeAlias = HostSlab | DeviceSlab | NoSlab


class Bell(_Frozen, frozen=True):
    """The pipe that wakes a loop, reached through /proc/<pid>/fd/<fd> and known by its inode."""

    fd: int
    inode: int


class Rings(_Frozen, frozen=True):
    """A memfd with the rings to the consumer (`down` bytes) and back (`up`); powers of two.

    `bell` is that of the producer's loop.
    """

    fd: int
    inode: int
    down: int
    up: int
    bell: Bell


class Offer(_Frozen, frozen=True, tag="offer"):
    """Memory to map; `nonce` stands at its start, so that a mapping can be verified."""

    nonce: int
    carrier: Carrier
    slots: int
    slot_bytes: int
    slab: Slab
    rings: Rings | None = None


class Welcome(_Frozen, frozen=True, tag="welcome"):
    """The offer is mapped.

    `bell`: that of the consumer's loop, if it has mapped the rings too and they are in use.
    """

    epoch: int
    bell: Bell | None = None


class Decline(_Frozen, frozen=True, tag="decline"):
    epoch: int
    reason: str


class Deliver(_Frozen, frozen=True, tag="deliver"):
    """The descriptor: which slot, which tensors, which requests, which route.

    `tensors` is a `Layout`, encoded: most messages of a channel have the same, and are spared its
    decoding and checking. `route` and `note` belong to the application; TensorMQ carries them
    unread. `sent` is nanoseconds of CLOCK_MONOTONIC.
    """

    epoch: int
    sequence: int
    slot: int
    tensors: msgspec.Raw
    requests: tuple[Request, ...] = ()
    route: int = 0
    note: bytes = b""
    sent: int = 0


class Release(_Frozen, frozen=True, tag="release"):
    """`hop`: nanoseconds from `Deliver.sent` until the message was taken; 0 where unknown."""

    epoch: int
    sequence: int
    slot: int
    hop: int = 0


class Bye(_Frozen, frozen=True, tag="bye"):
    epoch: int


ToConsumer: TypeAlias = Hello | Offer | Deliver | Bye
ToProducer: TypeAlias = Card | Welcome | Decline | Release | Bye
_Said = TypeVar("_Said")

_encode = msgspec.msgpack.Encoder().encode
_layouts: msgspec.msgpack.Decoder[tuple[TensorSpec, ...]]
_layouts = msgspec.msgpack.Decoder(tuple[TensorSpec, ...])
_to_consumer: msgspec.msgpack.Decoder[ToConsumer] = msgspec.msgpack.Decoder(ToConsumer)
_to_producer: msgspec.msgpack.Decoder[ToProducer] = msgspec.msgpack.Decoder(ToProducer)


def encode(message: ToConsumer | ToProducer) -> bytes:
    """The frame that says `message`."""
    return MAGIC + _encode(message)


def _foreign(frame: bytes) -> ProtocolError:
    if len(frame) > MAX_FRAME:
        return ProtocolError(f"a frame of {len(frame)} bytes; at most {MAX_FRAME} are allowed")
    if not frame.startswith(MAGIC[:3]):
        return ProtocolError("the frame does not start with TMQ: the peer does not speak TensorMQ")
    return ProtocolError(
        f"the peer speaks version {frame[3] if len(frame) > 3 else '?'} of the wire format, "
        f"this end version {VERSION}"
    )


def _decoder(decode: Callable[[bytes], _Said]) -> Callable[[bytes], _Said]:
    def from_frame(frame: bytes) -> _Said:
        if len(frame) > MAX_FRAME or not frame.startswith(MAGIC):
            raise _foreign(frame)
        try:
            return decode(frame[_MAGIC_BYTES:])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"not a message of this protocol: {error}") from None

    return from_frame


decode_to_consumer = _decoder(_to_consumer.decode)
"""Parse what a producer sent. Raises ProtocolError, and nothing else, for any other bytes."""

decode_to_producer = _decoder(_to_producer.decode)
"""Parse what a consumer sent, in the same way."""

decode_deliver = _decoder(msgspec.msgpack.Decoder(Deliver).decode)
"""Parse what a producer put into its ring, where nothing else may be."""

decode_release = _decoder(msgspec.msgpack.Decoder(Release).decode)
"""Parse what a consumer put into its ring, where nothing else may be."""


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], slot_bytes: int
) -> tuple[TensorSpec, ...]:
    """Place tensors, given as name → (dtype, shape), one after the other in a slot.

    Raises UnsupportedTensor for a dtype without a wire name and for too many dimensions,
    TensorTooLarge when the slot is smaller than all of them.
    """
    specs = []
    end = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in ITEMSIZE:
            raise UnsupportedTensor(f"tensor {name!r} has dtype {dtype}, which cannot be carried")
        if len(shape) > MAX_DIMENSIONS:
            raise UnsupportedTensor(
                f"tensor {name!r} has {len(shape)} dimensions and may have {MAX_DIMENSIONS}"
            )
        spec = TensorSpec(name, dtype, shape, offset=-(-end // ALIGNMENT) * ALIGNMENT)
        specs.append(spec)
        end = spec.offset + spec.nbytes
    if end > slot_bytes:
        sizes = ", ".join(f"{s.name} {s.dtype}{list(s.shape)}" for s in specs)
        raise TensorTooLarge(
            f"the tensors ({sizes}) take {end} bytes and a slot holds {slot_bytes}; "
            "make the slots larger or send fewer rows"
        )
    return tuple(specs)


def slot_size(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes that a slot needs to hold these tensors, given as name → (dtype, shape)."""
    specs = lay_out(tensors, slot_bytes=1 << 62)
    return max((spec.offset + spec.nbytes for spec in specs), default=0) or ALIGNMENT


def device_slab_size(slots: int, slot_bytes: int) -> int:
    """Bytes of a slab on a GPU: a header page, then the slots."""
    return HEADER_BYTES + slots * slot_bytes


def words_size(slots: int) -> int:
    """Bytes of the words that go with a slab on a GPU: one for each slot and end."""
    return 8 * slots * (1 + CONSUMERS)


class Layout:
    """Which tensors lie where in a slot; equal to no other, so that views can be kept by it."""

    __slots__ = ("encoded", "end", "nbytes", "specs")

    def __init__(self, specs: tuple[TensorSpec, ...]) -> None:
        self.specs = specs
        self.encoded = msgspec.Raw(_encode(specs))
        self.nbytes = sum(spec.nbytes for spec in specs)
        self.end = max((spec.offset + spec.nbytes for spec in specs), default=0)


NO_TENSORS = Layout(())


def parse_layout(encoded: bytes, slot_bytes: int) -> Layout:
    """The tensors of a descriptor. Raises ProtocolError when they are not all in their slot."""
    try:
        specs = _layouts.decode(encoded)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a list of tensors: {error}") from None
    for spec in specs:
        if spec.dtype not in ITEMSIZE:
            raise ProtocolError(f"tensor {spec.name!r} has an unknown dtype {spec.dtype!r}")
        if len(spec.shape) > MAX_DIMENSIONS or not _can_be(spec):
            raise ProtocolError(f"tensor {spec.name!r} has an impossible shape {spec.shape}")
        if spec.offset < 0 or spec.offset % ALIGNMENT:
            raise ProtocolError(f"tensor {spec.name!r} starts at {spec.offset}, not aligned")
        if spec.offset + spec.nbytes > slot_bytes:
            raise ProtocolError(f"tensor {spec.name!r} reaches beyond its slot")
    return Layout(specs)


def _can_be(spec: TensorSpec) -> bool:
    """Whether there can be such a tensor, be it empty: the other sizes count all the same."""
    extent = math.prod(max(1, size) for size in spec.shape) * ITEMSIZE[spec.dtype]
    return min(spec.shape, default=0) >= 0 and extent < 1 << 63


def check_descriptor(message: Deliver, slots: int) -> None:
    """Refuse a slot or a sequence number that cannot be. Raises ProtocolError."""
    if not 0 <= message.slot < slots:
        raise ProtocolError(f"slot {message.slot} does not exist: the slab has {slots}")
    if not 0 < message.sequence < LET_GO:
        raise ProtocolError(f"the sequence number {message.sequence} does not exist")


def candidates(
    producer: Abilities, consumer: Abilities
) -> tuple[tuple[Carrier, ...], dict[Carrier, str]]:
    """Carriers to try, best first, and for each that is ruled out the reason."""
    obstacles = {carrier: _obstacle(carrier, producer, consumer) for carrier in Carrier}
    possible = tuple(carrier for carrier, reason in obstacles.items() if reason is None)
    return possible, {carrier: reason for carrier, reason in obstacles.items() if reason}


def _obstacle(carrier: Carrier, producer: Abilities, consumer: Abilities) -> str | None:
    for end, abilities in (("producer", producer), ("consumer", consumer)):
        if carrier not in abilities.carriers:
            return f"the {end} does not do it"
    if carrier is Carrier.INLINE:
        return None
    if producer.process.host != consumer.process.host:
        return "the ends are on different hosts, in different containers or of different users"
    if carrier is Carrier.CUDA_IPC:
        if producer.gpu != consumer.gpu and producer.gpu not in consumer.reaches:
            return (
                f"the consumer's GPU ({consumer.gpu}) cannot reach the producer's ({producer.gpu})"
            )
        if producer.process == consumer.process:
            return "CUDA cannot open a handle in the process that exported it"
    return None
