"""Pull: the consuming end. What it receives lies in the producers' memory until released."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import zmq

from . import host, ring, tcp, wire
from .errors import (
    NegotiationError,
    ProtocolError,
    RingBroken,
    TensorMQError,
    Timeout,
)
from .keys import Keys
from .listener import IpcListener, TcpListener
from .loop import Loop
from .process import open_pidfd
from .ring import Line
from .statistics import ConsumerStatistics
from .watchdog import Watch
from .wire import Carrier, Doorbell, Request

if TYPE_CHECKING:
    from .cuda import Completions, DeviceMapping, PinnedMemory

log = logging.getLogger(__name__)

_MAX_CHANNELS = 1024
_MAX_LAYOUTS = 256
_PATIENCE = 5.0
"""Seconds that closing waits for a GPU to be done with what producers have sent."""


class Message:
    """Tensors in the producer's memory, readable until `release` (or the end of the `with`).

    Not to be written to: other consumers may read the same slot. On a GPU, work that the current
    stream was given before the release still counts as use.
    """

    __slots__ = (
        "_channel",
        "_hop",
        "_layout",
        "_sequence",
        "_slot",
        "note",
        "requests",
        "route",
        "tensors",
    )

    def __init__(
        self,
        channel: _Channel,
        descriptor: wire.Deliver,
        layout: wire.Layout,
        tensors: Mapping[str, Any],
        hop: int,
    ) -> None:
        self.tensors = tensors
        self.requests: tuple[Request, ...] = descriptor.requests
        self.route = descriptor.route
        self.note = descriptor.note
        self._channel = channel
        self._slot = descriptor.slot
        self._sequence = descriptor.sequence
        self._layout = layout
        self._hop = hop

    @property
    def carrier(self) -> Carrier:
        return self._channel.statistics.carrier

    @property
    def hop(self) -> float | None:
        """Seconds from the announcement of its tensors until it was taken here.

        None where nobody knows: without tensors, or from a producer with another clock.
        """
        return self._hop / 1e9 if self._hop else None

    @property
    def torn(self) -> bool:
        """Whether the tensors are not what was sent, for the producer died before they were.

        Only on a GPU. Known when what reads them has gone on; until then False. With `on_torn` set
        nothing goes on. Raises ValueError after the release.
        """
        if self._layout.specs and self._slot < 0:
            raise ValueError("the message was released: ask before whether it is torn")
        return self._slot >= 0 and self._channel.is_torn(self._slot, self._sequence)

    def release(self) -> None:
        """Give the slot back; the second and later calls do nothing."""
        slot = self._slot
        if slot >= 0:
            self._slot = -1
            self.tensors = {}
            self._channel.release(slot, self._sequence, self._layout, self._hop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class _Channel:
    """One producer, as the consumer sees it."""

    def __init__(
        self, pull: Pull, identity: bytes, hello: wire.Hello, connection: int | None
    ) -> None:
        self.pull = pull
        self.identity = identity
        self.epoch = hello.epoch
        self.abilities = hello.abilities
        self.connection = connection  # where it came by tcp
        self.statistics = ConsumerStatistics(hello.abilities.process.pid, Carrier.INLINE)
        self.slots = 0
        self.slot_bytes = 0
        self.open = False
        self.inline = False
        self.declining = False  # what was mapped of its offer is being given up
        self.ending = False  # nothing more is accepted
        self.ended = False  # nothing is held, and the memory is being unmapped
        # Slots that are leased to this end, in the order of their arrival; when that was, in ns.
        self.leases: dict[int, int] = {}
        self.pidfd: int | None = None
        self.line: Line | None = None
        self._host: host.HostMapping | None = None
        self._device: DeviceMapping | None = None
        self._watch: Watch | None = None
        self._pinned: PinnedMemory | None = None
        # For each slot the last message that the application's streams wait for.
        self._taken: dict[int, int] = {}
        self._told = False  # on_torn was called
        self.unheard = False  # the watchdog has acted on its death, of which the loop has not heard
        self._views: host.Views | None = None
        self.layouts: dict[bytes, wire.Layout] = {}
        self._one_clock = hello.abilities.process.host == pull._abilities.process.host

    def map(self, offer: wire.Offer) -> None:
        """Map the producer's slab. Raises NegotiationError when that cannot be done."""
        match offer.slab:
            case wire.HostSlab() as slab if offer.carrier is Carrier.SHM:
                _expect(slab.size, wire.HEADER_BYTES + offer.slots * offer.slot_bytes)
                self._host = host.HostMapping(self.abilities.process, offer.nonce, slab)
                self._pinned = self.pull._pin(self._host.memory)
                self._views = self.pull._host_views(self._host.memory, offer.slot_bytes)
            case wire.DeviceSlab() as slab if offer.carrier is Carrier.CUDA_IPC:
                _expect(slab.size, wire.device_slab_size(offer.slots, offer.slot_bytes))
                if not 0 <= slab.consumer < wire.CONSUMERS:
                    raise NegotiationError(f"there is no consumer {slab.consumer} of a slab")
                _expect(slab.words.size, wire.HEADER_BYTES + wire.words_size(offer.slots))
                words = host.HostMapping(self.abilities.process, offer.nonce, slab.words)
                self._device = self.pull._open(slab, offer.slot_bytes, self.abilities.gpu)
                self._device.join(offer.nonce, words.memory, offer.slots)
                if self.pidfd is not None:
                    self._watch = Watch(self.pidfd, self._hear_beside_the_loop)
                self._views = host.Views(self._device.view, numpy=False)
            case wire.NoSlab() if offer.carrier is Carrier.INLINE:
                largest = self.pull._max_slot_bytes
                if offer.slot_bytes > largest:
                    raise NegotiationError(
                        f"slots of {offer.slot_bytes} bytes, and this end takes {largest} at most"
                    )
            case _:
                raise NegotiationError(f"carrier {offer.carrier} does not go with {offer.slab}")
        self.statistics.carrier = offer.carrier
        self.inline = offer.carrier is Carrier.INLINE
        self.slots = offer.slots
        self.slot_bytes = offer.slot_bytes
        self.open = True

    def learn(self, encoded: bytes) -> wire.Layout:
        """Check a layout that no descriptor had before. Raises ProtocolError."""
        layout = wire.parse_layout(encoded, self.slot_bytes)
        if len(self.layouts) >= _MAX_LAYOUTS:
            self.layouts.clear()
        self.layouts[encoded] = layout
        return layout

    def take(
        self, descriptor: wire.Deliver, layout: wire.Layout, payload: memoryview | None
    ) -> Message:
        statistics = self.statistics
        tensors: dict[str, Any] = {}
        hop = 0
        slot = descriptor.slot
        if slot >= 0:
            if self._device is not None:
                # Only now does the current stream wait for the content: work on earlier messages
                # must not.
                self._taken[slot] = descriptor.sequence
                self._device.expect(slot, descriptor.sequence)
            if self._views is not None:
                tensors = self._views.lend(slot, layout)
            else:
                tensors = self._parse(payload, layout)
            if self._one_clock and descriptor.sent:
                hop = time.monotonic_ns() - descriptor.sent
                if 0 < hop < wire.LONGEST_HOP:
                    statistics.hops.add(hop)
                else:
                    hop = 0  # the producer said what cannot be
        statistics.messages += 1
        statistics.bytes += layout.nbytes
        if self._device is None:
            statistics.host_bytes += layout.nbytes
        return Message(self, descriptor, layout, tensors, hop)

    def _parse(self, payload: memoryview | None, layout: wire.Layout) -> dict[str, Any]:
        """Tensors that came as bytes."""
        if payload is None:
            raise ProtocolError("a descriptor without the bytes it describes")
        return {spec.name: self.pull._view(payload, spec, 0) for spec in layout.specs}

    def release(self, slot: int, sequence: int, layout: wire.Layout, hop: int) -> None:
        if self._pinned is not None:
            # The GPU may still be copying from the slot.
            self.pull._after_gpu(lambda: self.pull._give_back(self, slot, sequence, hop))
        else:
            if self._device is not None:
                self._device.release(slot, sequence)
            self.pull._give_back(self, slot, sequence, hop)
        if self._views is not None:  # the channel may have ended with its last lease
            self._views.restock(slot, layout)

    def torn(self) -> tuple[set[int], dict[int, int]]:
        """What the dead producer announced and never completed: slots, and those taken.

        Only on a GPU, where a message is announced before its content is computed. Of those that
        the application took, slot → sequence: its streams wait for them. For the loop, which has
        heard of the death.
        """
        if self._watch is not None:
            self._watch.cancel()
        self.unheard = False
        if self._device is None:
            return set(), {}
        complete = self._device.filled()
        announced = [d for channel, d, _, _ in self.pull._inbox if channel is self and d.slot >= 0]
        untaken = {d.slot for d in announced if complete[d.slot] < d.sequence}
        return untaken, self._waited_for(complete)

    def is_torn(self, slot: int, sequence: int) -> bool:
        return self._device is not None and self._device.is_torn(slot, sequence)

    def _waited_for(self, complete: Sequence[int]) -> dict[int, int]:
        return {slot: last for slot, last in tuple(self._taken.items()) if complete[slot] < last}

    def give_up(self, taken: Mapping[int, int]) -> None:
        """Let the streams go that wait for what nobody will complete, or say so to `on_torn`."""
        if not taken or self._device is None:
            return
        if self.pull.on_torn is None:
            self._device.let_go()
        elif not self._told:
            self.pull.on_torn()
            self._told = True

    def _hear_beside_the_loop(self) -> None:
        """The producer died, and the loop has not heard of it: in the watchdog's thread."""
        device = self._device
        taken = {} if device is None else self._waited_for(device.filled())
        if taken and not self.unheard:
            log.warning(
                "the producer %s of %s died, and the loop has not been run since",
                self.abilities.process.pid, self.pull.endpoint,
            )  # fmt: skip
            self.unheard = True
        self.give_up(taken)

    def closers(self) -> list[Callable[[], None]]:
        """What gives up the memory that CUDA knows of, and waits for the GPU."""
        closers = [each.close for each in (self._pinned, self._device) if each is not None]
        # The watch goes last: what comes before may itself wait for a producer that dies.
        return closers if self._watch is None else [*closers, self._watch.cancel]

    def unmap(self) -> None:
        self._pinned = self._device = self._host = self._watch = None
        if self._views is not None:
            self._views.close()
            self._views = None
        self.open = False


class Pull:
    """Receives tensors from any number of Push ends.

    endpoint: `ipc://<path>`; the path's directory must belong to this user, with mode 0700. Or
        `tcp://<address>:<port>`, where tensors travel inline; port `*` takes a free one.
        `endpoint` says where this end can be reached.
    device: what tensors become: None for NumPy arrays, "cpu" for torch tensors, "cuda:0" for
        torch tensors that may lie on that GPU (those of a producer without one are in pinned
        host memory, to be uploaded with `non_blocking=True`).
    carriers: restrict what may be negotiated; None allows all that the device can do.
    doorbell: ZEROMQ keeps every message to the socket; RING uses shared memory where that can be.
    loop: share a thread's loop with other ends; a private one by default.
    max_slot_bytes: the largest slots that a producer may offer whose tensors travel inline. A
        longer frame ends its connection.
    keys, allowed_keys: for tcp, this end's key pair and the public keys of the producers that may
        connect. insecure: let anybody, and encrypt nothing.

    On a GPU a message is announced before its content is computed. `torn` counts those whose
    producer died in between. Such a message is dropped; if it was taken already, streams wait for
    content that will never come. They are let go and compute on what the slot happens to hold
    (`Message.torn`), unless `on_torn` is set: it is called, and the streams wait on, so that
    nothing that was computed from it gets out. The process can then only end. Either is done by
    the loop or, when that was not run for 0.2 s since the death, by another thread: the loop's may
    itself wait for that content. Of the consumers of one Push either all set `on_torn` or none, for
    they wait for the same words.

    Raises EndpointError when the endpoint is taken or its directory is open to others,
    SecurityError when a tcp endpoint has neither keys nor `insecure`.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        device: str | None = None,
        carriers: Sequence[Carrier] | None = None,
        doorbell: Doorbell = Doorbell.RING,
        loop: Loop | None = None,
        max_slot_bytes: int = 1 << 30,
        keys: Keys | None = None,
        allowed_keys: Collection[str] = (),
        insecure: bool = False,
    ) -> None:
        tcp.require(endpoint, keys, allowed_keys, insecure)
        self._device = device
        self._gpu = host.on_gpu(device)
        self._abilities = host.abilities(device, carriers)
        self._loop = loop or Loop()
        self._owns_loop = loop is None
        self._rings = doorbell is Doorbell.RING and ring.supported()
        self._channels: dict[bytes, _Channel] = {}
        self._inbox: deque[tuple[_Channel, wire.Deliver, wire.Layout, memoryview | None]] = deque()
        self._completions: Completions | None = None
        self._closed = False
        self.rejected = 0
        self.torn = 0
        self.on_torn: Callable[[], None] | None = None
        self._max_slot_bytes = max_slot_bytes
        try:
            self._listener = self._listen(endpoint, keys, allowed_keys)
        except BaseException:
            if self._owns_loop:
                self._loop.close()
            raise
        self.endpoint = self._listener.endpoint
        self._socket = self._listener.socket
        self._loop.watch(self._socket, self._receive)

    def _listen(
        self, endpoint: str, keys: Keys | None, allowed_keys: Collection[str]
    ) -> IpcListener | TcpListener:
        largest = max(wire.MAX_FRAME, self._max_slot_bytes)
        if not tcp.is_tcp(endpoint):
            return IpcListener(self._loop, endpoint, largest)
        self._abilities = self._abilities.over_tcp()
        return TcpListener(
            self._loop, endpoint, largest, keys, allowed_keys,
            on_end=self._hear_of_end, on_failure=self._refuse,
        )  # fmt: skip

    # Receiving

    def recv(self, timeout: float | None = None) -> Message:
        """The next message, in the order of arrival. Raises Timeout after `timeout` seconds."""
        while True:
            if not self._inbox and not self._loop.run_until(lambda: bool(self._inbox), timeout):
                raise Timeout(f"no message at {self.endpoint} within {timeout} s")
            message = self.poll()
            if message is not None:
                return message
            # All that there was is torn, and the time begins anew: that is once for each death.

    def poll(self) -> Message | None:
        """The next message if one is there already; for callers that run the loop themselves."""
        while self._inbox:
            channel, descriptor, layout, payload = item = self._inbox.popleft()
            if not channel.unheard:
                return channel.take(descriptor, layout, payload)
            self._inbox.appendleft(item)
            self._lose(channel)  # which drops what is torn
        return None

    @property
    def waiting(self) -> int:
        """Messages received and not yet taken."""
        return len(self._inbox)

    @property
    def leases(self) -> int:
        """Slots of producers that this end holds, taken or not."""
        return sum(len(channel.leases) for channel in self._channels.values())

    def statistics(self) -> tuple[ConsumerStatistics, ...]:
        """Of each producer that is connected, or that has left messages to be released."""
        now = time.monotonic_ns()
        waiting = Counter(channel for channel, _, _, _ in self._inbox)
        return tuple(
            replace(
                channel.statistics,
                waiting=waiting[channel],
                leases=len(channel.leases),
                oldest_lease=(now - next(iter(channel.leases.values()), now)) / 1e9,
            )
            for channel in self._channels.values()
            if channel.open
        )

    def _receive(self) -> None:
        while not self._closed:
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            sender = identity.bytes
            channel = self._channels.get(sender)
            if channel is not None and channel.line is not None:
                # What is in the ring was said before: a Bye must not overtake descriptors.
                self._drain(channel)
                if channel.line is not None:
                    channel.line.incoming.arrive()
            try:
                if not frames or len(frames) > 2 or len(frames[0]) > wire.MAX_FRAME:
                    raise ProtocolError("not one or two frames of allowed length")
                message = wire.decode_to_consumer(frames[0].bytes)
                if isinstance(message, wire.Hello) and channel is None:
                    self._greet(identity, message)
                else:
                    self._handle(sender, message, frames[1].buffer if len(frames) == 2 else None)
            except ProtocolError as error:
                self.rejected += 1
                log.warning("rejected a frame at %s: %s", self.endpoint, error)

    def _drain(self, channel: _Channel) -> None:
        """Accept what a producer has announced through its ring."""
        if channel.line is None:
            return
        incoming = channel.line.incoming
        try:
            while (frame := incoming.read()) is not None:
                try:
                    self._accept(channel, wire.decode_deliver(frame), None)
                except ProtocolError as error:
                    self.rejected += 1
                    log.warning("rejected a frame at %s: %s", self.endpoint, error)
        except RingBroken as error:
            self._cut_off(channel, error)

    def _cut_off(self, channel: _Channel, error: RingBroken) -> None:
        """Close a channel whose producer writes where it must not.

        The producer is told when the last lease has ended, so that it does not write to a slot
        that is being read.
        """
        log.error("a channel of %s is closed, for its ring is broken: %s", self.endpoint, error)
        self._unring(channel)
        channel.ending = True
        if not channel.leases:
            self._end(channel)

    def _handle(self, sender: bytes, message: wire.ToConsumer, payload: memoryview | None) -> None:
        channel = self._channels.get(sender)
        if channel is None:
            raise ProtocolError(f"{type(message).__name__} from somebody who never said Hello")
        match message:
            case wire.Hello():
                raise ProtocolError("a second Hello on one connection")
            case wire.Offer():
                self._consider(channel, message)
            case wire.Deliver():
                self._accept(channel, message, payload)
            case wire.Bye():
                channel.ending = True
                if not channel.leases:
                    self._end(channel)

    def _accept(self, channel: _Channel, message: wire.Deliver, payload: memoryview | None) -> None:
        if not channel.open or message.epoch != channel.epoch or channel.ending:
            raise ProtocolError("a descriptor of a channel that is not open")
        encoded = bytes(message.tensors)
        layout = channel.layouts.get(encoded) or channel.learn(encoded)
        if layout.specs:
            wire.check_descriptor(message, channel.slots)
            if message.slot in channel.leases:
                raise ProtocolError(f"slot {message.slot}, which was not released, once more")
            if channel.inline and (
                payload is None or not layout.end <= payload.nbytes <= channel.slot_bytes
            ):
                raise ProtocolError("a descriptor without the bytes it describes, or with more")
            channel.leases[message.slot] = time.monotonic_ns()
        elif message.slot != -1:
            raise ProtocolError("a slot without tensors")
        self._inbox.append((channel, message, layout, payload))

    def _greet(self, sender: zmq.Frame, hello: wire.Hello) -> None:
        if len(self._channels) >= _MAX_CHANNELS:
            raise ProtocolError(f"more than {_MAX_CHANNELS} producers")
        connection = None
        if isinstance(self._listener, TcpListener):
            connection = self._listener.connection_of(sender)
            if connection is None:
                return  # it ended while its Hello was under way
        channel = _Channel(self, sender.bytes, hello, connection)
        if connection is None and hello.abilities.process.host == self._abilities.process.host:
            try:
                channel.pidfd = open_pidfd(hello.abilities.process)
            except OSError as error:
                raise ProtocolError(f"its process cannot be watched: {error}") from None
            if channel.pidfd is None:
                return  # it died while its Hello was under way
            self._loop.watch(channel.pidfd, lambda: self._lose(channel))
        self._channels[channel.identity] = channel
        self._answer(channel, wire.Card(hello.epoch, self._abilities))

    def _hear_of_end(self, connection: int) -> None:
        """A tcp connection ended, and with it what it carried."""
        # Those of now: what is received next may come by a connection that was given its number.
        ended = [c for c in self._channels.values() if c.connection == connection]
        if ended:
            self._receive()  # what it brought before
        for channel in ended:
            self._lose(channel)

    def _refuse(self, reason: str) -> None:
        self.rejected += 1
        log.warning("refused a connection to %s: %s", self.endpoint, reason)

    def _consider(self, channel: _Channel, offer: wire.Offer) -> None:
        if channel.open:
            raise ProtocolError("an offer on a channel that is open")
        if channel.declining:
            raise ProtocolError("an offer before the one before it was answered")
        if not (0 < offer.slots <= wire.MAX_SLOTS and offer.slot_bytes > 0):
            raise ProtocolError(f"an offer of {offer.slots} slots of {offer.slot_bytes} bytes")
        if offer.carrier not in wire.candidates(channel.abilities, self._abilities)[0]:
            raise ProtocolError(f"an offer of {offer.carrier}, which these ends cannot share")
        try:
            channel.map(offer)
        except (TensorMQError, OSError, ValueError) as error:
            self._decline(channel, str(error))
            return
        bell = self._open_line(channel, offer)
        self._answer(channel, wire.Welcome(channel.epoch, bell))

    def _decline(self, channel: _Channel, why: str) -> None:
        """Give up what was mapped of an offer, then say so."""
        channel.declining = True
        jobs = channel.closers()
        channel.unmap()

        def answer() -> None:
            channel.declining = False
            self._answer(channel, wire.Decline(channel.epoch, why))

        self._aside(jobs, answer)

    def _open_line(self, channel: _Channel, offer: wire.Offer) -> wire.Bell | None:
        """Join the rings that were offered; without them the channel keeps to its socket."""
        if offer.rings is None or not self._rings:
            return None
        if offer.carrier is Carrier.INLINE:
            return None
        try:
            line = ring.join(channel.abilities.process, offer.nonce, offer.rings)
        except (TensorMQError, OSError, ValueError) as error:
            log.warning("a channel of %s keeps to its socket: %s", self.endpoint, error)
            return None
        channel.line = line
        channel.statistics.doorbell = Doorbell.RING
        self._loop.watch_ring(line.incoming, partial(self._drain, channel))
        return self._loop.bell

    def _lose(self, channel: _Channel) -> None:
        """The producer's process ended: what it sent whole stays readable until it is released."""
        self._drain(channel)
        channel.ending = True
        self._unwatch(channel)
        untaken, taken = channel.torn()
        if untaken:
            self._inbox = deque(
                item for item in self._inbox
                if item[0] is not channel or item[1].slot not in untaken
            )  # fmt: skip
            for slot in untaken:
                del channel.leases[slot]
        if untaken or taken:
            self.torn += len(untaken) + len(taken)
            log.warning(
                "the producer %s of %s died while it computed %d messages that it had announced",
                channel.abilities.process.pid, self.endpoint, len(untaken) + len(taken),
            )  # fmt: skip
        channel.give_up(taken)
        if not channel.leases:
            self._end(channel)

    def _end(self, *channels: _Channel) -> None:
        """Nothing of these channels is held any more."""
        ending = [channel for channel in channels if not channel.ended]
        jobs = [job for channel in ending for job in channel.closers()]

        def forget() -> None:
            for channel in ending:
                self._forget(channel)

        self._aside(jobs, forget)
        for channel in ending:
            channel.ended = True

    def _aside(self, jobs: Sequence[Callable[[], None]], then: Callable[[], None]) -> None:
        """Do what waits for the GPU beside the loop; `then` at once where there is nothing."""
        if jobs:
            from .cuda import aside  # noqa: PLC0415

            aside(self._loop, jobs, then)
        else:
            then()

    def _forget(self, channel: _Channel) -> None:
        if self._channels.pop(channel.identity, None) is None:
            return
        channel.unmap()
        self._unwatch(channel)
        self._unring(channel)
        self._answer(channel, wire.Bye(channel.epoch))

    def _unwatch(self, channel: _Channel) -> None:
        if channel.pidfd is not None:
            self._loop.unwatch(channel.pidfd)
            os.close(channel.pidfd)
            channel.pidfd = None

    def _unring(self, channel: _Channel) -> None:
        if channel.line is not None:
            self._loop.unwatch_ring(channel.line.incoming)
            channel.line.close()
            channel.line = None

    def _give_back(self, channel: _Channel, slot: int, sequence: int, hop: int) -> None:
        del channel.leases[slot]
        release = wire.Release(channel.epoch, sequence, slot, hop)
        try:
            through_ring = channel.line is not None and channel.line.outgoing.write(
                wire.encode(release)
            )
        except RingBroken as error:
            through_ring = False
            self._cut_off(channel, error)
        if not through_ring:
            self._answer(channel, release)
        self._loop.stir()
        if channel.ending and not channel.leases:
            self._end(channel)

    def _answer(self, channel: _Channel, message: wire.ToProducer) -> None:
        if not self._socket.closed:
            # To a peer that is gone, ROUTER drops the message, as it should.
            self._socket.send_multipart([channel.identity, wire.encode(message)])

    # Memory

    def _view(self, memory: memoryview, spec: wire.TensorSpec, base: int) -> Any:
        view = host.numpy_view if self._device is None else host.torch_view
        return view(memory, spec, base)

    def _host_views(self, memory: memoryview, slot_bytes: int) -> host.Views:
        def make(slot: int, spec: wire.TensorSpec) -> Any:
            return self._view(memory, spec, wire.HEADER_BYTES + slot * slot_bytes)

        return host.Views(make, numpy=self._device is None)

    def _pin(self, memory: memoryview) -> PinnedMemory | None:
        if not self._gpu:
            return None
        from .cuda import PinnedMemory  # noqa: PLC0415

        return PinnedMemory(memory, str(self._device))

    def _open(self, slab: wire.DeviceSlab, slot_bytes: int, gpu: str | None) -> DeviceMapping:
        from .cuda import DeviceMapping  # noqa: PLC0415

        elsewhere = gpu != self._abilities.gpu
        return DeviceMapping(slab, slot_bytes, str(self._device), elsewhere=elsewhere)

    def _after_gpu(self, callback: Callable[[], None]) -> None:
        if self._completions is None:
            from .cuda import Completions  # noqa: PLC0415

            self._completions = Completions(self._loop, str(self._device))
        self._completions.after_current_stream(callback)

    # Leaving

    def close(self) -> None:
        """Say goodbye to every producer, which releases what was not taken; remove the endpoint.

        Messages that were taken must have been released before. Waits up to 5 s for a GPU to be
        done with their memory; where it is not, it is unmapped later, and no goodbye is said.
        """
        if self._closed:
            return
        self._closed = True
        self._loop.unwatch(self._socket)
        # What was not taken need not be waited for: the goodbye releases it.
        self._inbox.clear()
        if self._completions is not None:
            self._completions.close()
            self._completions = None
        channels = tuple(self._channels.values())
        for channel in channels:
            self._unring(channel)  # nothing more is taken from it
        self._end(*channels)
        if not self._loop.run_until(lambda: not self._channels, _PATIENCE):
            # In a loop that goes on they end when the GPU is done, and hear of deaths until then.
            log.warning("%s is closed before a GPU is done with its memory", self.endpoint)
            if self._owns_loop:
                for channel in channels:
                    self._unwatch(channel)
        self._listener.close()
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


def _expect(size: int, expected: int) -> None:
    if size != expected:
        raise NegotiationError(f"a slab of {size} bytes does not hold the offered slots")
