"""Push: the producing end. It owns the memory; consumers lease slots of it."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import zmq

from . import host, ring, wire
from .errors import (
    EndpointError,
    NegotiationError,
    PeerLost,
    ProtocolError,
    RingBroken,
    TensorTooLarge,
    Timeout,
    UnsupportedTensor,
)
from .host import Tensor
from .loop import Loop
from .pool import SlotPool
from .process import open_pidfd
from .ring import Line, Rings
from .wire import Carrier, Doorbell, Request

if TYPE_CHECKING:
    from .cuda import Completions, DeviceSlab, PinnedMemory

log = logging.getLogger(__name__)


@dataclass
class ChannelStatistics:
    """One channel, as its producer counts it. `host_bytes` went through host memory."""

    endpoint: str
    carrier: Carrier
    doorbell: Doorbell = Doorbell.ZEROMQ
    messages: int = 0
    bytes: int = 0
    host_bytes: int = 0
    waits_for_credit: int = 0


class Peer:
    """A consumer that a Push is connected to."""

    def __init__(self, endpoint: str, socket: zmq.Socket[bytes]) -> None:
        self.endpoint = endpoint
        self.epoch = secrets.randbits(63)
        self.lost: str | None = None
        self._socket = socket
        self._answers: list[wire.ToProducer] = []
        self._lane: _Lane | None = None
        self._line: Line | None = None
        self._pidfd: int | None = None
        self.statistics = ChannelStatistics(endpoint, Carrier.INLINE)

    def __repr__(self) -> str:
        return f"<Peer {self.endpoint} {self.statistics.carrier}>"


class _Lane:
    """The slots of one carrier, shared by all peers that use it."""

    def __init__(
        self,
        slab: host.HostSlab | host.InlineSlab | DeviceSlab,
        slots: int,
        nonce: int,
    ) -> None:
        self.slab = slab
        self.nonce = nonce
        self.pinned: PinnedMemory | None = None
        self.pool = SlotPool(slots)
        self.sequences = [0] * slots

    def close(self) -> None:
        if self.pinned is not None:
            self.pinned.close()
        self.slab.close()


@dataclass
class Filling:
    """A slot to write into: `tensors` are views of it. Send it, or abandon it."""

    tensors: dict[str, Any]
    _specs: tuple[wire.TensorSpec, ...]
    _lane: _Lane
    _slot: int
    _done: bool = False

    def abandon(self) -> None:
        """Give the slot back unsent; does nothing to a Filling that was sent."""
        if not self._done:
            self._done = True
            self._lane.pool.abandon(self._slot)


class Push:
    """Sends tensors to one or several Pull ends without moving them, where that can be done.

    slots, slot_bytes: how many messages may be under way, and the most bytes that one may take
    (each tensor starts at a multiple of 256). Memory is allocated when the first peer needs it.
    device: where tensors come from: None for NumPy arrays, "cpu" or "cuda:0" for torch tensors.
    carriers: restrict what may be negotiated; None allows all that the device can do.
    doorbell: ZEROMQ keeps every message to the socket; RING uses shared memory where that can be.
    loop: share a thread's loop with other ends; a private one by default.
    """

    def __init__(
        self,
        *,
        slots: int = 8,
        slot_bytes: int,
        device: str | None = None,
        carriers: Sequence[Carrier] | None = None,
        doorbell: Doorbell = Doorbell.RING,
        loop: Loop | None = None,
    ) -> None:
        if not 1 <= slots <= wire.MAX_SLOTS:
            raise ValueError(f"{slots} slots; a Push has 1 to {wire.MAX_SLOTS}")
        self._slots = slots
        self._slot_bytes = -(-slot_bytes // wire.ALIGNMENT) * wire.ALIGNMENT
        self._device = device
        self._loop = loop or Loop()
        self._owns_loop = loop is None
        self._rings = doorbell is Doorbell.RING and ring.supported()
        self._lanes: dict[Carrier, _Lane] = {}
        self._peers: list[Peer] = []
        self._sequence = 0
        self._deferred = 0
        self._completions: Completions | None = None
        self.rejected = 0
        self.on_lost: Callable[[Peer], None] | None = None
        self._gpu = device is not None and device.startswith("cuda")
        self._abilities = host.abilities(device, carriers)

    # Connecting

    def connect(
        self,
        endpoint: str,
        timeout: float = 10.0,
        carriers: Sequence[Carrier] | None = None,
    ) -> Peer:
        """Open a channel to the Pull end bound at `endpoint`, with the best carrier.

        `carriers` restricts what may be negotiated with this peer.
        Raises EndpointError when nobody answers within `timeout` seconds, NegotiationError when
        no allowed carrier works.
        """
        end = time.monotonic() + timeout
        socket = self._loop.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 1000)
        # Not IMMEDIATE: it would throw away a Bye that arrives together with the disconnection.
        # What is queued for a dead peer is bounded by credits, and its death is seen by pidfd.
        socket.setsockopt(zmq.SNDHWM, 0)  # credits bound what is under way, not ZeroMQ
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME)
        peer = Peer(endpoint, socket)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise EndpointError(f"{endpoint!r} is no endpoint: {error}") from None
        self._loop.watch(socket, lambda: self._receive(peer))
        try:
            self._handshake(peer, end, carriers)
        except BaseException:
            self._drop(peer)
            raise
        self._peers.append(peer)
        return peer

    def _handshake(self, peer: Peer, end: float, allowed: Sequence[Carrier] | None) -> None:
        self._say(peer, [wire.encode(wire.Hello(peer.epoch, self._abilities))])
        card = self._answer(peer, end)
        if not isinstance(card, wire.Card):
            raise NegotiationError(f"{peer.endpoint} answered Hello with {card}")
        if card.abilities.process.host == self._abilities.process.host:
            peer._pidfd = open_pidfd(card.abilities.process)
            if peer._pidfd is None:
                raise EndpointError(f"the process behind {peer.endpoint} has ended")
            self._loop.watch(peer._pidfd, lambda: self._lose(peer, "its process ended"))
        carriers, reasons = wire.candidates(self._abilities, card.abilities)
        obstacles = list(reasons)
        for carrier in carriers:
            if allowed is not None and carrier not in allowed:
                continue
            lane = self._lane(carrier)
            with contextlib.ExitStack() as stack:
                # Tensors that travel through the socket would have to be waited for.
                rings = None
                if self._rings and carrier is not Carrier.INLINE:
                    rings = Rings(lane.nonce, self._slots, self._loop.bell)
                    stack.callback(rings.close)
                offer = wire.Offer(
                    lane.nonce,
                    carrier,
                    self._slots,
                    self._slot_bytes,
                    lane.slab.offer(),
                    rings.offer if rings else None,
                )
                self._say(peer, [wire.encode(offer)])
                answer = self._answer(peer, end)
                if rings and isinstance(answer, wire.Welcome) and answer.bell is not None:
                    self._open(peer, rings.line(card.abilities.process, answer.bell))
            if isinstance(answer, wire.Welcome):
                self._admit(peer, lane, offer)
                if obstacles and carrier is Carrier.INLINE:
                    log.info("%s is reached inline (%s)", peer.endpoint, "; ".join(obstacles))
                return
            if isinstance(answer, wire.Decline):
                obstacles.append(f"{carrier}: {answer.reason}")
        raise NegotiationError(
            f"no carrier to {peer.endpoint}: " + ("; ".join(obstacles) or "none is allowed")
        )

    def _open(self, peer: Peer, line: Line) -> None:
        peer._line = line
        peer.statistics.doorbell = Doorbell.RING
        self._loop.watch_ring(line.incoming, lambda: self._drain(peer))

    def _admit(self, peer: Peer, lane: _Lane, offer: wire.Offer) -> None:
        peer._lane = lane
        peer.statistics.carrier = offer.carrier
        if isinstance(offer.slab, wire.DeviceSlab):
            _device_slab(lane).attach(peer, offer.slab.consumer)

    def _answer(self, peer: Peer, end: float) -> wire.ToProducer:
        if not self._loop.run_until(
            lambda: bool(peer._answers) or peer.lost is not None, max(0.0, end - time.monotonic())
        ):
            raise EndpointError(f"nobody answers at {peer.endpoint}")
        if peer.lost is not None:
            raise EndpointError(f"{peer.endpoint} was lost in the handshake: {peer.lost}")
        return peer._answers.pop(0)

    def _lane(self, carrier: Carrier) -> _Lane:
        lane = self._lanes.get(carrier)
        if lane is None:
            lane = self._lanes[carrier] = self._new_lane(carrier)
        return lane

    def _new_lane(self, carrier: Carrier) -> _Lane:
        nonce = secrets.randbits(63)
        slab: host.HostSlab | host.InlineSlab | DeviceSlab
        if carrier is Carrier.CUDA_IPC:
            from .cuda import DeviceSlab  # noqa: PLC0415

            slab = DeviceSlab(nonce, self._slots, self._slot_bytes, str(self._device))
            return _Lane(slab, self._slots, nonce)
        if carrier is Carrier.SHM:
            slab = host.HostSlab(nonce, self._slots, self._slot_bytes)
        else:
            slab = host.InlineSlab(self._slots, self._slot_bytes)
        return _Lane(slab, self._slots, nonce)

    # Sending

    def allocate(
        self,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        to: Peer | Sequence[Peer],
        timeout: float | None = None,
    ) -> Filling:
        """A slot to compute into: name → (dtype, shape) gives tensors that lie in it.

        Writing into it and sending it costs no copy. All of `to` must use one carrier. Waits up
        to `timeout` seconds (None: for ever) for a free slot. Raises TensorTooLarge, PeerLost,
        Timeout.
        """
        peers = _peers(to)
        lanes = {id(self._live(peer)): self._live(peer) for peer in peers}
        if len(lanes) != 1:
            raise UnsupportedTensor("a slot can only be allocated for peers of one carrier")
        (lane,) = lanes.values()
        specs = wire.lay_out(tensors, self._slot_bytes)
        slot = self._acquire(lane, peers, timeout)
        return Filling(self._writable(lane, slot, specs), specs, lane, slot)

    def send(
        self,
        tensors: Mapping[str, Tensor] | Filling,
        to: Peer | Sequence[Peer],
        *,
        requests: Iterable[Request] = (),
        route: int = 0,
        note: bytes = b"",
        timeout: float | None = None,
    ) -> None:
        """Hand `tensors` to every peer of `to`; the slot is reused when all have released it.

        A tensor is copied once into its slot (on a GPU by the current stream, without waiting);
        a Filling is not copied at all. A message without tensors takes no slot. Waits up to
        `timeout` seconds (None: for ever) for a free slot. Raises TensorTooLarge before anything
        is sent, PeerLost, Timeout.
        """
        peers = _peers(to)
        requests = tuple(requests)
        if isinstance(tensors, Filling):
            if tensors._done:
                raise ValueError("this Filling was sent or abandoned before; allocate another")
            if any(self._live(peer) is not tensors._lane for peer in peers):
                raise ValueError("a Filling can only be sent to peers that it was allocated for")
            tensors._done = True
            self._post(tensors._lane, tensors._slot, tensors._specs, peers, requests, route, note)
            return
        if not tensors:
            for peer in peers:
                self._live(peer)
            deliver = [wire.Deliver(p.epoch, 0, -1, (), requests, route, note) for p in peers]
            frames = [_descriptor(message) for message in deliver]
            for peer, frame in zip(peers, frames, strict=True):
                self._hand(peer, frame)
            return
        specs = wire.lay_out({n: host.describe(t) for n, t in tensors.items()}, self._slot_bytes)
        groups: dict[int, tuple[_Lane, list[Peer]]] = {}
        for peer in peers:
            lane = self._live(peer)
            groups.setdefault(id(lane), (lane, []))[1].append(peer)
        slots: list[tuple[_Lane, list[Peer], int]] = []
        try:
            for lane, members in groups.values():
                slots.append((lane, members, self._acquire(lane, members, timeout)))
            for lane, _, slot in slots:
                self._fill(self._writable(lane, slot, specs), tensors)
        except BaseException:
            for lane, _, slot in slots:
                lane.pool.abandon(slot)
            raise
        for lane, members, slot in slots:
            self._post(lane, slot, specs, members, requests, route, note)

    def _live(self, peer: Peer) -> _Lane:
        if peer.lost is not None or peer._lane is None:
            raise PeerLost(f"{peer.endpoint} is gone: {peer.lost or 'it was never connected'}")
        return peer._lane

    def _acquire(self, lane: _Lane, peers: Sequence[Peer], timeout: float | None) -> int:
        slot = lane.pool.acquire()
        if slot is None:
            for peer in peers:
                peer.statistics.waits_for_credit += 1
            if not self._loop.run_until(lambda: lane.pool.free > 0, timeout):
                raise Timeout(
                    f"no free slot within {timeout} s: all {self._slots} are held by consumers"
                )
            slot = lane.pool.acquire()
            if slot is None:
                raise AssertionError("a free slot vanished within one thread")
        return slot

    def _writable(
        self, lane: _Lane, slot: int, specs: tuple[wire.TensorSpec, ...]
    ) -> dict[str, Any]:
        slab = lane.slab
        if slab.carrier is Carrier.CUDA_IPC:
            return dict(_device_slab(lane).writable(slot, specs))
        view = host.numpy_view if self._device is None else host.torch_view
        memory, base = _host_slab(lane).memory, _host_slab(lane).base(slot)
        if self._gpu and lane.pinned is None:
            from .cuda import PinnedMemory  # noqa: PLC0415

            lane.pinned = PinnedMemory(memory)
        return {spec.name: view(memory, spec, base) for spec in specs}

    def _fill(self, views: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if self._gpu:
            for name, view in views.items():
                view.copy_(tensors[name], non_blocking=True)
        else:
            host.copy_bytes([(view, tensors[name]) for name, view in views.items()])

    def _post(
        self,
        lane: _Lane,
        slot: int,
        specs: tuple[wire.TensorSpec, ...],
        peers: Sequence[Peer],
        requests: tuple[Request, ...],
        route: int,
        note: bytes,
    ) -> None:
        alive = [peer for peer in peers if peer.lost is None]
        if not alive:
            lane.pool.abandon(slot)
            raise PeerLost(f"{peers[0].endpoint} is gone: {peers[0].lost}")
        self._sequence += 1
        sequence = self._sequence
        try:
            frames = [
                _descriptor(wire.Deliver(peer.epoch, sequence, slot, specs, requests, route, note))
                for peer in alive
            ]
        except TensorTooLarge:
            lane.pool.abandon(slot)
            raise
        lane.sequences[slot] = sequence
        lane.pool.lease(slot, alive)
        payload: list[memoryview] = []
        if lane.slab.carrier is Carrier.CUDA_IPC:
            _device_slab(lane).publish(slot, sequence, alive)
        elif lane.slab.carrier is Carrier.INLINE:
            base = _host_slab(lane).base(slot)
            end = base + max(spec.offset + spec.nbytes for spec in specs)
            payload = [_host_slab(lane).memory[base:end]]
        size = sum(spec.nbytes for spec in specs)

        def announce() -> None:
            for peer, frame in zip(alive, frames, strict=True):
                if peer.lost is not None:
                    continue  # its leases came back when it was lost
                peer.statistics.messages += 1
                peer.statistics.bytes += size
                if lane.slab.carrier is not Carrier.CUDA_IPC:
                    peer.statistics.host_bytes += size
                # The slot stays leased until the consumer has the bytes: no need to copy them.
                if payload:
                    self._say(peer, [frame, *payload], copy=False)
                else:
                    self._hand(peer, frame)

        if self._gpu and lane.slab.carrier is not Carrier.CUDA_IPC:
            self._after_gpu(announce)
        else:
            announce()

    def _after_gpu(self, announce: Callable[[], None]) -> None:
        """Announce tensors in host memory once the GPU has copied them there."""
        if self._completions is None:
            from .cuda import Completions  # noqa: PLC0415

            self._completions = Completions(self._loop, str(self._device))
        self._deferred += 1

        def done() -> None:
            self._deferred -= 1
            announce()

        self._completions.after_current_stream(done)

    def _say(self, peer: Peer, frames: list[Any], copy: bool = True) -> None:
        if not peer._socket.closed:
            peer._socket.send_multipart(frames, copy=copy)

    def _hand(self, peer: Peer, frame: bytes) -> None:
        """Send what is nothing but a frame the quickest way there is."""
        self._loop.stir()
        if peer._line is not None:
            try:
                if peer._line.send(frame):
                    return
            except RingBroken as error:
                self._cut_off(peer, error)
                return
        self._say(peer, [frame])

    # What comes back

    def _receive(self, peer: Peer) -> None:
        while peer.lost is None:
            try:
                frame = peer._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            if peer._line is not None:
                # What is in the ring was said before: a Bye must not overtake releases.
                self._drain(peer)
                peer._line.incoming.arrive()
            try:
                self._handle(peer, wire.decode_to_producer(frame))
            except ProtocolError as error:
                self.rejected += 1
                log.warning("rejected a frame of %s: %s", peer.endpoint, error)

    def _drain(self, peer: Peer) -> None:
        """Handle what the consumer has put into its ring."""
        try:
            while peer._line is not None and (frame := peer._line.incoming.read()) is not None:
                try:
                    self._handle(peer, wire.decode_to_producer(frame))
                except ProtocolError as error:
                    self.rejected += 1
                    log.warning("rejected a frame of %s: %s", peer.endpoint, error)
        except RingBroken as error:
            self._cut_off(peer, error)

    def _cut_off(self, peer: Peer, error: RingBroken) -> None:
        """Leave a consumer that writes where it must not.

        The slots that it may still be reading are never used again: better short of memory than
        wrong.
        """
        log.error("the channel to %s is closed, for its ring is broken: %s", peer.endpoint, error)
        self._say(peer, [wire.encode(wire.Bye(peer.epoch))])
        peer.lost = f"its ring is broken: {error}"
        self._drop(peer)
        if self.on_lost is not None:
            self.on_lost(peer)

    def _handle(self, peer: Peer, message: wire.ToProducer) -> None:
        match message:
            case wire.Card() | wire.Welcome() | wire.Decline():
                if peer._lane is not None:
                    raise ProtocolError("a handshake message in the middle of a channel")
                peer._answers.append(message)
            case wire.Release(epoch=epoch, sequence=sequence, slot=slot):
                lane = peer._lane
                if lane is None or epoch != peer.epoch:
                    raise ProtocolError("a release of another epoch")
                if not 0 <= slot < self._slots or lane.sequences[slot] != sequence:
                    raise ProtocolError(f"a release of slot {slot}, which holds something else")
                try:
                    lane.pool.release(slot, peer)
                except KeyError as error:
                    raise ProtocolError(str(error)) from None
            case wire.Bye():
                self._lose(peer, "it closed its end")

    def _lose(self, peer: Peer, why: str) -> None:
        if peer.lost is not None:
            return
        peer.lost = why
        lane = peer._lane
        if lane is not None:
            lane.pool.forget(peer)
            if lane.slab.carrier is Carrier.CUDA_IPC:
                _device_slab(lane).detach(peer)
        self._drop(peer)
        if lane is not None and self.on_lost is not None:
            self.on_lost(peer)

    def _drop(self, peer: Peer) -> None:
        if peer in self._peers:
            self._peers.remove(peer)
        if peer._line is not None:
            self._loop.unwatch_ring(peer._line.incoming)
            peer._line.close()
            peer._line = None
        if peer._pidfd is not None:
            self._loop.unwatch(peer._pidfd)
            os.close(peer._pidfd)
            peer._pidfd = None
        if not peer._socket.closed:
            self._loop.unwatch(peer._socket)
            peer._socket.close()

    def disconnect(self, peer: Peer, timeout: float = 5.0) -> None:
        """Close the channel to `peer` once it has released every slot it holds.

        A peer that does not within `timeout` seconds is cut off, and the slots it may still be
        reading are never used again: better short of memory than wrong.
        """
        if peer.lost is not None:
            return
        self._settle()
        self._say(peer, [wire.encode(wire.Bye(peer.epoch))])
        if not self._loop.run_until(lambda: peer.lost is not None, timeout):
            log.warning("%s did not release what it holds within %s s", peer.endpoint, timeout)
            peer.lost = "this end disconnected"
            self._drop(peer)

    # Looking and leaving

    @property
    def peers(self) -> tuple[Peer, ...]:
        return tuple(self._peers)

    @property
    def free_slots(self) -> int:
        """Slots that can be filled now, over all carriers in use."""
        return sum(lane.pool.free for lane in self._lanes.values())

    @property
    def leased_slots(self) -> int:
        return sum(lane.pool.leased for lane in self._lanes.values())

    def statistics(self) -> tuple[ChannelStatistics, ...]:
        return tuple(peer.statistics for peer in self._peers)

    def _settle(self) -> None:
        """Announce what waits for the GPU, so that a Bye does not overtake it."""
        self._loop.run_until(lambda: self._deferred == 0, timeout=5.0)

    def close(self) -> None:
        """Disconnect every peer, as `disconnect` does, and free the memory."""
        self.on_lost = None
        for peer in tuple(self._peers):
            self.disconnect(peer)
        self._settle()
        if self._completions is not None:
            self._completions.close()
            self._completions = None
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        if self._owns_loop:
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _peers(to: Peer | Sequence[Peer]) -> Sequence[Peer]:
    peers = (to,) if isinstance(to, Peer) else tuple(to)
    if not peers:
        raise ValueError("a message needs at least one peer to go to")
    return peers


def _descriptor(message: wire.Deliver) -> bytes:
    frame = wire.encode(message)
    if len(frame) > wire.MAX_FRAME:
        raise TensorTooLarge(
            f"the descriptor has {len(frame)} bytes and may have {wire.MAX_FRAME}: shorten the "
            f"note ({len(message.note)} bytes) or send fewer of the {len(message.requests)} "
            "requests at once"
        )
    return frame


def _device_slab(lane: _Lane) -> DeviceSlab:
    from .cuda import DeviceSlab  # noqa: PLC0415

    if not isinstance(lane.slab, DeviceSlab):
        raise TypeError("this lane's memory is not on a GPU")
    return lane.slab


def _host_slab(lane: _Lane) -> host.HostSlab | host.InlineSlab:
    if not isinstance(lane.slab, (host.HostSlab, host.InlineSlab)):
        raise TypeError("this lane's memory is not on the host")
    return lane.slab
