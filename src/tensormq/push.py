"""Push: the producing end. It owns the memory; consumers lease slots of it."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import zmq

from . import host, ring, tcp, wire
from .errors import (
    EndpointError,
    NegotiationError,
    PeerLost,
    ProtocolError,
    RingBroken,
    SecurityError,
    TensorMQError,
    TensorTooLarge,
    Timeout,
    UnsupportedTensor,
)
from .host import Tensor
from .keys import Keys
from .lane import DeviceLane, Filling, HostLane, Lane
from .loop import Loop
from .process import open_pidfd
from .ring import Line, Rings
from .statistics import ChannelStatistics
from .wire import Carrier, Doorbell, Request

if TYPE_CHECKING:
    from .cuda import Completions

log = logging.getLogger(__name__)

_MAX_LAYOUTS = 256
_DISCONNECTED = "this end disconnected"
_PATIENCE = 5.0
"""Seconds that closing waits for those who hold something of this end."""

_Extras: TypeAlias = tuple[tuple[Request, ...], int, bytes]
"""Requests, route and note: what a descriptor carries for the application."""


class Peer:
    """A consumer that a Push is connected to."""

    def __init__(self, endpoint: str, socket: zmq.Socket[bytes]) -> None:
        self.endpoint = endpoint
        self.epoch = secrets.randbits(63)
        self.lost: str | None = None
        self._leaving = False
        self._socket = socket
        self._answers: list[wire.ToProducer] = []
        self._lane: Lane | None = None
        self._line: Line | None = None
        self._connections: tcp.Connections | None = None
        self._refused = False
        self._pidfd: int | None = None
        self.statistics = ChannelStatistics(endpoint, Carrier.INLINE)

    def __repr__(self) -> str:
        return f"<Peer {self.endpoint} {self.statistics.carrier}>"

    @property
    def hears(self) -> bool:
        """Whether it is still sent to: it is neither lost nor left."""
        return self.lost is None and not self._leaving


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
        self._abilities = host.abilities(device, carriers)
        self._loop = loop or Loop()
        self._owns_loop = loop is None
        self._rings = doorbell is Doorbell.RING and ring.supported()
        self._lanes: dict[Carrier, Lane] = {}
        self._layouts: dict[object, wire.Layout] = {}
        self._peers: list[Peer] = []
        # Left while they may still have been reading.
        self._severed: list[Peer] = []
        self._sequence = 0
        self._finishing = False
        self._closed = False
        self._deferred = 0
        self._completions: Completions | None = None
        self.rejected = 0
        self.on_lost: Callable[[Peer], None] | None = None

    # Connecting

    def connect(
        self,
        endpoint: str,
        timeout: float = 10.0,
        carriers: Sequence[Carrier] | None = None,
        *,
        keys: Keys | None = None,
        server_key: str | None = None,
        insecure: bool = False,
    ) -> Peer:
        """Open a channel to the Pull end bound at `endpoint`, with the best carrier.

        `carriers` restricts what may be negotiated with this peer. For `tcp://` give the key pair
        of this end and the public key of the Pull end, or `insecure`.
        Raises EndpointError when nobody answers within `timeout` seconds, NegotiationError when
        no allowed carrier works, SecurityError when the ends do not accept each other's keys.
        """
        if self._closed or self._finishing:
            raise EndpointError(f"this end is closed: nothing connects to {endpoint}")
        tcp.require(endpoint, keys, () if server_key is None else (server_key,), insecure)
        end = time.monotonic() + timeout
        socket = self._loop.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 1000)
        # Not IMMEDIATE: it would throw away a Bye that arrives together with the disconnection.
        # What is queued for a dead peer is bounded by credits, and its death is noticed.
        socket.setsockopt(zmq.SNDHWM, 0)  # credits bound what is under way, not ZeroMQ
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME)
        peer = Peer(endpoint, socket)
        if tcp.is_tcp(endpoint):
            tcp.tune(socket)
            if keys is not None and server_key is not None:
                tcp.identify(socket, keys, server_key)
            peer._connections = tcp.Connections(
                self._loop,
                socket,
                on_end=lambda _: self._hear_of_end(peer),
                on_failure=lambda reason: self._hear_of_refusal(peer, reason),
            )
        self._loop.watch(socket, lambda: self._receive(peer))
        try:
            try:
                socket.connect(endpoint)
            except zmq.ZMQError as error:
                raise EndpointError(f"{endpoint!r} is no endpoint: {error}") from None
            try:
                self._handshake(peer, end, carriers)
            except BaseException:
                if peer.lost is None:
                    # The other end would keep what it has for this channel as long as this
                    # process lives.
                    self._say(peer, [wire.encode(wire.Bye(peer.epoch))])
                raise
        except BaseException:
            self._drop(peer)
            self._unwatch(peer)
            raise
        self._peers.append(peer)
        return peer

    def _handshake(self, peer: Peer, end: float, allowed: Sequence[Carrier] | None) -> None:
        remote = tcp.is_tcp(peer.endpoint)
        mine = self._abilities.over_tcp() if remote else self._abilities
        self._say(peer, [wire.encode(wire.Hello(peer.epoch, mine))])
        card = self._answer(peer, end)
        if not isinstance(card, wire.Card):
            raise NegotiationError(f"{peer.endpoint} answered Hello with {card}")
        if not remote and card.abilities.process.host == mine.process.host:
            peer._pidfd = open_pidfd(card.abilities.process)
            if peer._pidfd is None:
                raise EndpointError(f"the process behind {peer.endpoint} has ended")
            self._loop.watch(peer._pidfd, lambda: self._lose(peer, "its process ended"))
        carriers, obstacles = wire.candidates(mine, card.abilities)
        for carrier in carriers:
            if allowed is not None and carrier not in allowed:
                continue
            try:
                lane = self._lane(carrier)
            except TensorMQError as error:
                obstacles[carrier] = str(error)
                continue
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
                    lane.offer(),
                    rings.offer if rings else None,
                )
                self._say(peer, [wire.encode(offer)])
                answer = self._answer(peer, end)
                if rings and isinstance(answer, wire.Welcome) and answer.bell is not None:
                    self._open(peer, rings.line(card.abilities.process, answer.bell))
            if isinstance(answer, wire.Welcome):
                self._admit(peer, lane, offer)
                hoped = set(mine.carriers) & set(card.abilities.carriers) & set(allowed or Carrier)
                if better := _listed(obstacles, hoped):
                    log.info("%s is reached by %s (%s)", peer.endpoint, carrier, better)
                return
            if isinstance(answer, wire.Decline):
                obstacles[carrier] = answer.reason
        raise NegotiationError(
            f"no carrier to {peer.endpoint}: " + (_listed(obstacles) or "none is allowed")
        )

    def _open(self, peer: Peer, line: Line) -> None:
        peer._line = line
        peer.statistics.doorbell = Doorbell.RING
        self._loop.watch_ring(line.incoming, partial(self._drain, peer))

    def _admit(self, peer: Peer, lane: Lane, offer: wire.Offer) -> None:
        peer._lane = lane
        peer.statistics.carrier = offer.carrier
        lane.attach(peer, offer.slab, peer._pidfd)

    def _answer(self, peer: Peer, end: float) -> wire.ToProducer:
        if not self._loop.run_until(
            lambda: bool(peer._answers) or peer.lost is not None, max(0.0, end - time.monotonic())
        ):
            raise EndpointError(f"nobody answers at {peer.endpoint}")
        if peer._refused:
            raise SecurityError(f"no connection to {peer.endpoint}: {peer.lost}")
        if peer.lost is not None:
            raise EndpointError(f"{peer.endpoint} was lost in the handshake: {peer.lost}")
        return peer._answers.pop(0)

    def _lane(self, carrier: Carrier) -> Lane:
        lane = self._lanes.get(carrier)
        if lane is None:
            if carrier is Carrier.CUDA_IPC:
                lane = DeviceLane(self._slots, self._slot_bytes, str(self._device))
            else:
                lane = HostLane(carrier, self._slots, self._slot_bytes, self._device)
            self._lanes[carrier] = lane
        return lane

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
        peers = (to,) if isinstance(to, Peer) else _several(to)
        lane = self._live(peers[0])
        for peer in peers[1:]:
            if self._live(peer) is not lane:
                raise UnsupportedTensor("a slot can only be allocated for peers of one carrier")
        key = tuple([(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()])
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._learn(key, tensors)
        end = None if timeout is None else time.monotonic() + timeout
        slot = self._acquire(lane, peers, end)
        if slot is None:
            raise _gone(peers)
        try:
            lane.make_ready(slot)
            return Filling(lane.views.lend(slot, layout), layout, lane, slot)
        except BaseException:
            lane.pool.abandon(slot)
            raise

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
        `timeout` seconds (None: for ever) for a free slot. Raises TensorTooLarge, PeerLost and
        Timeout before anything is sent. Peers that are lost while it waits are left out, unless
        all are.
        """
        peers = (to,) if isinstance(to, Peer) else _several(to)
        extras = tuple(requests), route, note
        if isinstance(tensors, Filling):
            if tensors._done:
                raise ValueError("this Filling was sent or abandoned before; allocate another")
            lane = tensors._lane
            for peer in peers:
                if self._live(peer) is not lane:
                    raise ValueError("a Filling goes only to peers that it was allocated for")
            tensors._done = True
            self._send_slots([(lane, peers, tensors._slot)], tensors._layout, extras)
            lane.views.restock(tensors._slot, tensors._layout)
            return
        if not tensors:
            for peer in peers:
                self._live(peer)
            frames = self._descriptors(peers, 0, -1, wire.NO_TENSORS, extras)
            self._announce(None, -1, wire.NO_TENSORS, frames)
            return
        key = tuple([(name, t.dtype, t.shape) for name, t in tensors.items()])
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._learn(key, {n: host.describe(t) for n, t in tensors.items()})
        groups = {self._live(peers[0]): peers} if len(peers) == 1 else self._by_lane(peers)
        end = None if timeout is None else time.monotonic() + timeout
        taken: list[_Taken] = []
        try:
            for lane, members in groups.items():
                slot = self._acquire(lane, members, end)
                if slot is not None:
                    taken.append((lane, members, slot))
        except BaseException:
            _abandon(taken)
            raise
        if not taken:
            raise _gone(peers)
        self._send_slots(taken, layout, extras, tensors)

    def _send_slots(
        self,
        taken: Sequence[_Taken],
        layout: wire.Layout,
        extras: _Extras,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Send from slots that are filled, or that `tensors` are copied to: to all, or on an error
        to nobody."""
        messages: list[_Message] = []
        heard = False
        try:
            for lane, peers, slot in taken:
                later = tensors
                if tensors is not None and not lane.can_promise(tensors.values()):
                    lane.fill(slot, layout, tensors)
                    later = None
                sequence = self._sequence = self._sequence + 1
                frames = self._descriptors(peers, sequence, slot, layout, extras)
                messages.append((lane, slot, sequence, frames, later))
                heard = heard or bool(frames)
            if not heard:
                raise _gone([peer for _, peers, _ in taken for peer in peers])
        except BaseException:
            _abandon(taken)
            raise
        for lane, slot, sequence, frames, later in messages:
            if frames:
                self._post(lane, slot, layout, sequence, frames, later)
            else:
                lane.pool.abandon(slot)

    def _by_lane(self, peers: Sequence[Peer]) -> Mapping[Lane, Sequence[Peer]]:
        groups: dict[Lane, list[Peer]] = {}
        for peer in peers:
            groups.setdefault(self._live(peer), []).append(peer)
        return groups

    def _learn(
        self, key: object, tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    ) -> wire.Layout:
        """Lay out tensors that were never sent before."""
        if len(self._layouts) >= _MAX_LAYOUTS:
            self._layouts.clear()
        layout = self._layouts[key] = wire.Layout(wire.lay_out(tensors, self._slot_bytes))
        return layout

    def rouse(self, to: Iterable[Peer]) -> None:
        """Wake those of `to` that sleep, for something will be sent to them within a millisecond.

        A sleeping process takes up to hundreds of microseconds to wake; so it does while this end
        still makes what it will send. Does nothing where loops do not look out before they sleep
        again, nor for peers without a ring.
        """
        if self._loop.spins:
            for peer in to:
                if peer._line is not None:
                    peer._line.outgoing.rouse()

    def has_room(self, to: Peer | Sequence[Peer]) -> bool:
        """Whether tensors can be sent to all of `to` now, without waiting for a slot.

        A peer that is gone is not waited for: sending says so.
        """
        for peer in (to,) if isinstance(to, Peer) else to:
            lane = peer._lane
            if lane is not None and lane.pool.free == 0 and peer.hears:
                return False
        return True

    def _live(self, peer: Peer) -> Lane:
        if peer._lane is None or not peer.hears:
            raise _gone([peer])
        return peer._lane

    def _acquire(self, lane: Lane, peers: Sequence[Peer], end: float | None) -> int | None:
        """A free slot, waited for until `end`; None when all of `peers` were lost meanwhile.

        Raises Timeout.
        """
        slot = lane.pool.acquire()
        if slot is not None:
            return slot
        for peer in peers:
            peer.statistics.waits_for_credit += 1

        def lost() -> bool:
            return not any(peer.hears for peer in peers)

        timeout = None if end is None else max(0.0, end - time.monotonic())
        if not self._loop.run_until(lambda: lane.pool.free > 0 or lost(), timeout):
            raise Timeout(f"no free slot in time: all {self._slots} are held by consumers")
        # Whoever heard of a loss may have closed this end, and the lane with it.
        return None if lost() else lane.pool.acquire()

    def _descriptors(
        self,
        peers: Sequence[Peer],
        sequence: int,
        slot: int,
        layout: wire.Layout,
        extras: _Extras,
    ) -> dict[Peer, bytes]:
        """What to say to each of `peers` that is not lost. Raises TensorTooLarge."""
        requests, route, note = extras
        sent = time.monotonic_ns()
        frames = {}
        for peer in peers:
            if not peer.hears:
                continue  # since a free slot was waited for
            frame = frames[peer] = wire.encode(
                wire.Deliver(
                    peer.epoch, sequence, slot, layout.encoded, requests, route, note, sent
                )
            )
            if len(frame) > wire.MAX_FRAME:
                raise TensorTooLarge(
                    f"the descriptor has {len(frame)} bytes and may have {wire.MAX_FRAME}: "
                    f"shorten the note ({len(note)} bytes) or send fewer of the {len(requests)} "
                    "requests at once"
                )
        return frames

    def _post(
        self,
        lane: Lane,
        slot: int,
        layout: wire.Layout,
        sequence: int,
        frames: dict[Peer, bytes],
        later: Mapping[str, Tensor] | None,
    ) -> None:
        """Hand on a slot that is filled, or that `later` is copied to once it is announced."""
        lane.sequences[slot] = sequence
        lane.pool.lease(slot, frames)
        if lane.awaits_gpu:
            self._after_gpu(lambda: self._announce(lane, slot, layout, frames))
            return
        self._announce(lane, slot, layout, frames)
        # Not before: on a GPU the consumer's stream waits for the word anyway, and to hand a copy
        # and the word to the driver takes longer than all the rest.
        if later is not None:
            lane.fill(slot, layout, later)
        lane.hand_over(slot, sequence, frames)

    def _announce(
        self, lane: Lane | None, slot: int, layout: wire.Layout, frames: dict[Peer, bytes]
    ) -> None:
        """Send each peer its frame, the quickest way there is. No lane: there are no tensors."""
        for peer, frame in frames.items():
            if peer.lost is not None:
                continue  # its leases came back when it was lost
            try:
                if isinstance(lane, HostLane) and lane.carrier is Carrier.INLINE:
                    # The slot stays leased until the consumer has the bytes: no need to copy them.
                    self._say(peer, [frame, lane.payload(slot, layout)], copy=False)
                elif peer._line is None or not peer._line.outgoing.write(frame):
                    self._say(peer, [frame])
            except RingBroken as error:
                self._cut_off(peer, error)
            if lane is None:
                continue
            # Counted when the consumer is at work already.
            statistics = peer.statistics
            statistics.messages += 1
            statistics.bytes += layout.nbytes
            if lane.carrier is not Carrier.CUDA_IPC:
                statistics.host_bytes += layout.nbytes
        self._loop.stir()

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
                if peer._line is not None:  # or else it was broken, and nothing more is believed
                    peer._line.incoming.arrive()
            try:
                self._handle(peer, wire.decode_to_producer(frame))
            except ProtocolError as error:
                self.rejected += 1
                log.warning("rejected a frame of %s: %s", peer.endpoint, error)

    def _drain(self, peer: Peer) -> None:
        """Take back what the consumer has released through its ring."""
        if peer._line is None:
            return
        incoming = peer._line.incoming
        try:
            while (frame := incoming.read()) is not None:
                try:
                    self._take_back(peer, wire.decode_release(frame))
                except ProtocolError as error:
                    self.rejected += 1
                    log.warning("rejected a frame of %s: %s", peer.endpoint, error)
        except RingBroken as error:
            self._cut_off(peer, error)

    def _cut_off(self, peer: Peer, error: RingBroken) -> None:
        """Leave a consumer that writes where it must not."""
        log.error("the channel to %s is closed, for its ring is broken: %s", peer.endpoint, error)
        self._say(peer, [wire.encode(wire.Bye(peer.epoch))])
        self._sever(peer, f"its ring is broken: {error}")
        # Not now: this may be in the middle of a message to others, and who hears of it may close
        # this end.
        self._loop.call_soon(lambda: self._tell(peer))

    def _tell(self, peer: Peer) -> None:
        if self.on_lost is not None:
            self.on_lost(peer)

    def _sever(self, peer: Peer, why: str) -> None:
        """Close the channel to a consumer that may still be reading.

        The slots that it holds are not used again before its process has ended: better short of
        memory than wrong.
        """
        peer.lost = why
        self._drop(peer)
        if peer._pidfd is not None:
            self._severed.append(peer)
            self._loop.unwatch(peer._pidfd)
            self._loop.watch(peer._pidfd, lambda: self._bury(peer))

    def _bury(self, peer: Peer) -> None:
        """A consumer that was left has ended: it reads no more, and neither does its GPU."""
        self._severed.remove(peer)
        self._unwatch(peer)
        if peer._lane is not None:
            peer._lane.pool.forget(peer)
            peer._lane.detach(peer)

    def _handle(self, peer: Peer, message: wire.ToProducer) -> None:
        match message:
            case wire.Card() | wire.Welcome() | wire.Decline():
                if peer._lane is not None:
                    raise ProtocolError("a handshake message in the middle of a channel")
                peer._answers.append(message)
            case wire.Release():
                self._take_back(peer, message)
            case wire.Bye():
                self._lose(peer, "it closed its end")

    def _hear_of_end(self, peer: Peer) -> None:
        """The tcp connection ended, and with it the channel."""
        self._receive(peer)  # what it brought before
        self._lose(peer, "the connection to it ended")

    def _hear_of_refusal(self, peer: Peer, reason: str) -> None:
        peer._refused = True
        self._lose(peer, reason)

    def _take_back(self, peer: Peer, release: wire.Release) -> None:
        lane = peer._lane
        slot = release.slot
        if lane is None or release.epoch != peer.epoch:
            raise ProtocolError("a release of another epoch")
        if not 0 <= slot < self._slots or lane.sequences[slot] != release.sequence:
            raise ProtocolError(f"a release of slot {slot}, which holds something else")
        try:
            lane.pool.release(slot, peer)
        except KeyError as error:
            raise ProtocolError(str(error)) from None
        if 0 < release.hop < wire.LONGEST_HOP:
            peer.statistics.hops.add(release.hop)

    def _lose(self, peer: Peer, why: str) -> None:
        if peer.lost is not None:
            return
        peer.lost = _DISCONNECTED if peer._leaving else why
        lane = peer._lane
        if lane is not None:
            lane.pool.forget(peer)
            lane.detach(peer)
        if not peer._socket.closed:
            peer._socket.setsockopt(zmq.LINGER, 0)  # what was not sent yet is for nobody
        self._drop(peer)
        self._unwatch(peer)
        if lane is not None and not peer._leaving:
            self._tell(peer)

    def _drop(self, peer: Peer) -> None:
        if peer in self._peers:
            self._peers.remove(peer)
        if peer._line is not None:
            self._loop.unwatch_ring(peer._line.incoming)
            peer._line.close()
            peer._line = None
        if peer._connections is not None:
            peer._connections.close()
            peer._connections = None
        if not peer._socket.closed:
            self._loop.unwatch(peer._socket)
            peer._socket.close()
        if self._finishing and not self._peers:
            self._loop.call_soon(self.close)

    def _unwatch(self, peer: Peer) -> None:
        if peer._pidfd is not None:
            self._loop.unwatch(peer._pidfd)
            os.close(peer._pidfd)
            peer._pidfd = None

    def disconnect(self, peer: Peer, timeout: float = _PATIENCE) -> None:
        """Send nothing more to `peer`, and close the channel once it has released what it holds.

        Waits for that up to `timeout` seconds. A peer that takes longer releases its slots later,
        while the loop runs.
        """
        if peer.lost is not None:
            return
        if not peer._leaving:
            peer._leaving = True
            bye = partial(self._say, peer, [wire.encode(wire.Bye(peer.epoch))])
            if self._deferred:
                self._after_gpu(bye)  # behind what waits to be announced
            else:
                bye()
        if timeout and not self._loop.run_until(lambda: peer.lost is not None, timeout):
            log.warning("%s did not release what it holds within %s s", peer.endpoint, timeout)

    # Looking and leaving

    @property
    def peers(self) -> tuple[Peer, ...]:
        """Those that can be sent to."""
        return tuple(peer for peer in self._peers if peer.hears)

    @property
    def closed(self) -> bool:
        """Whether no peer is left, and the memory is free or will be when a GPU is done with it."""
        return self._closed

    @property
    def free_slots(self) -> int:
        """Slots that can be filled now, over all carriers in use."""
        return sum(lane.pool.free for lane in self._lanes.values())

    @property
    def leased_slots(self) -> int:
        return sum(lane.pool.leased for lane in self._lanes.values())

    def statistics(self) -> tuple[ChannelStatistics, ...]:
        return tuple(
            replace(peer.statistics, slots_free=lane.pool.free, slots_leased=lane.pool.held(peer))
            for peer in self._peers
            if (lane := peer._lane) is not None
        )

    def finish(self) -> None:
        """Disconnect every peer and close when the last has released what it holds; waits for
        none. For ends that share a loop, which goes on and in which that happens."""
        self.on_lost = None
        self._finishing = True
        for peer in tuple(self._peers):
            self.disconnect(peer, timeout=0)
        if not self._peers:
            self.close()

    def close(self) -> None:
        """Disconnect every peer, wait for them as `disconnect` does, and free the memory."""
        if self._closed:
            return
        self._closed = True
        self.on_lost = None
        for peer in tuple(self._peers):
            self.disconnect(peer)
            if peer.lost is None:
                self._sever(peer, _DISCONNECTED)
        for peer in tuple(self._severed):
            self._bury(peer)
        # What nobody waits for any more is announced to nobody; but the GPU still copies it.
        self._loop.run_until(lambda: self._deferred == 0, _PATIENCE)
        if self._completions is not None:
            self._completions.close()
            self._completions = None
        self._free()
        if self._owns_loop:
            self._loop.close()

    def _free(self) -> None:
        """Free the memory of all lanes, on a GPU when that is done with it."""
        lanes = tuple(self._lanes.values())
        self._lanes.clear()
        if not lanes or not host.on_gpu(self._device):
            for lane in lanes:
                lane.close()
            return
        from .cuda import aside  # noqa: PLC0415

        freed: list[bool] = []
        aside(self._loop, [lane.close for lane in lanes], lambda: freed.append(True))
        if self._finishing and not self._owns_loop:
            return
        if not self._loop.run_until(lambda: bool(freed), _PATIENCE):
            log.warning("an end is closed before a GPU is done with its memory")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_Taken: TypeAlias = tuple[Lane, Sequence[Peer], int]
"""A slot to send from: its lane, whom it is for, its number."""

_Message: TypeAlias = tuple[Lane, int, int, dict[Peer, bytes], Mapping[str, Tensor] | None]
"""A slot to be announced: its lane and number, the message's, what to say to whom, and what is
copied to it after that."""


def _abandon(taken: Iterable[_Taken]) -> None:
    for lane, _, slot in taken:
        lane.pool.abandon(slot)


def _gone(peers: Sequence[Peer]) -> PeerLost:
    return PeerLost("; ".join(f"{peer.endpoint} is gone: {_why(peer)}" for peer in peers))


def _why(peer: Peer) -> str:
    return peer.lost or (_DISCONNECTED if peer._leaving else "it was never connected")


def _several(to: Sequence[Peer]) -> tuple[Peer, ...]:
    peers = tuple(to)
    if not peers:
        raise ValueError("a message needs at least one peer to go to")
    return peers


def _listed(obstacles: Mapping[Carrier, str], among: Collection[Carrier] = tuple(Carrier)) -> str:
    return "; ".join(f"{each}: {reason}" for each, reason in obstacles.items() if each in among)
