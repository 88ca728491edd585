"""The words that keep the order between two processes on a GPU, with a GPU that is pretended."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pytest

from pretended_cuda import Gpu, pretended
from sleeping import sleeping
from tensormq import (
    Carrier,
    Loop,
    Message,
    NegotiationError,
    Pull,
    Push,
    TensorMQError,
    host,
    watchdog,
    wire,
)
from tensormq import pull as pull_module
from tensormq.process import this_process

NONCE = 0x1234567890
DEVICE = "cuda:0"


class Ends(NamedTuple):
    """The two ends of a slab with four slots, as if each was another process'."""

    gpu: Gpu
    cuda: Any
    slab: Any
    mapping: Any
    stream: int
    """The producer's; the consumer's is another."""

    def publish(self, slot: int, sequence: int) -> None:
        consumers, self.gpu.current = self.gpu.current, self.stream
        self.slab.reuse(slot)
        self.slab.publish(slot, sequence, ["peer"])
        self.gpu.current = consumers


def memfds() -> int:
    links = Path("/proc/self/fd").iterdir()
    return sum("memfd:" in str(link.readlink()) for link in links if link.is_symlink())


def mapping_of(cuda: Any, slab: Any, nonce: int = NONCE) -> tuple[Any, int]:
    offer = slab.offer()
    words = host.HostMapping(this_process(), NONCE, offer.words).memory
    mapping = cuda.DeviceMapping(offer, 1024, DEVICE, elsewhere=False)
    try:
        mapping.join(nonce, words, 4)
    except NegotiationError:
        mapping.close()
        raise
    return mapping, offer.consumer


@pytest.fixture
def process() -> Iterator[int]:
    """A pidfd, of this process."""
    pidfd = os.pidfd_open(os.getpid())
    yield pidfd
    os.close(pidfd)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, process: int) -> Iterator[Ends]:
    with pretended(monkeypatch) as (gpu, cuda):
        slab = cuda.DeviceSlab(NONCE, 4, 1024, DEVICE)
        mapping, consumer = mapping_of(cuda, slab)
        slab.attach("peer", consumer, process)
        gpu.given.clear()
        yield Ends(gpu, cuda, slab, mapping, gpu.stream())
        mapping.close()
        slab.detach("peer")
        slab.close()
        assert (gpu.allocated, gpu.opened, gpu.registered) == ({}, [], set())


class Pair(NamedTuple):
    """Two ends in one loop, which find a pretended GPU where they ask for one."""

    loop: Loop
    pull: Pull
    push: Push


@pytest.fixture
def pair(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    with (
        pretended(monkeypatch) as (_, cuda),
        Loop() as loop,
        Pull(f"ipc://{run_dir}/x.sock", loop=loop) as pull,
        Push(slot_bytes=256, loop=loop) as push,
    ):
        monkeypatch.setitem(sys.modules, "tensormq.cuda", cuda)
        yield Pair(loop, pull, push)


def test_what_is_there_is_not_waited_for(ends: Ends) -> None:
    for sequence in range(1, 9):
        slot = sequence % 4
        ends.publish(slot, sequence)
        ends.mapping.expect(slot, sequence)
        ends.mapping.release(slot, sequence)
    assert ends.gpu.given == ["write", "write"] * 8
    assert ends.mapping.filled() == [8, 5, 6, 7]


def test_the_consumers_stream_waits_for_the_content(ends: Ends) -> None:
    ends.mapping.expect(0, 1)
    assert ends.gpu.waits()
    ends.publish(0, 1)
    assert not ends.gpu.waits()


def test_the_producers_stream_waits_for_the_last_use(ends: Ends) -> None:
    ends.publish(0, 1)
    ends.mapping.expect(1, 2)  # the consumer's stream has something before it can be done with 0
    ends.mapping.release(0, 1)
    ends.publish(0, 3)
    assert ends.mapping.filled()[0] == 1
    ends.publish(1, 2)  # behind the other: both wait in a circle that only a third could open
    assert ends.gpu.waits()
    ends.mapping.let_go()
    assert not ends.gpu.waits()
    assert ends.mapping.filled()[:2] == [3, 2]


def test_a_dead_producer_is_not_waited_for(ends: Ends) -> None:
    ends.mapping.expect(2, 5)
    assert ends.mapping.filled()[2] < 5  # it was announced and never completed
    assert not ends.mapping.is_torn(2, 5)  # somebody may still complete it
    ends.mapping.let_go()
    assert not ends.gpu.waits()
    assert ends.mapping.is_torn(2, 5)


def test_a_dead_consumer_is_not_waited_for_and_its_successor_is(ends: Ends, process: int) -> None:
    ends.publish(0, 1)
    ends.publish(0, 2)
    assert ends.gpu.waits()
    ends.slab.detach("peer")
    assert not ends.gpu.waits()
    successor, consumer = mapping_of(ends.cuda, ends.slab)
    ends.slab.attach("peer", consumer, process)
    ends.publish(0, 3)
    ends.publish(0, 4)
    assert ends.gpu.waits()
    successor.release(0, 3)
    assert not ends.gpu.waits()
    successor.close()


def test_a_consumer_that_dies_is_not_waited_for_although_no_loop_runs(ends: Ends) -> None:
    other, consumer = mapping_of(ends.cuda, ends.slab)
    with sleeping() as sleeper:
        ends.slab.attach("sleeper", consumer, sleeper.pidfd)
        ends.gpu.current, consumers = ends.stream, ends.gpu.current
        ends.slab.publish(0, 1, ["sleeper"])
        ends.slab.reuse(0)
        time.sleep(2 * watchdog.GRACE)
        assert ends.gpu.waits()
        sleeper.kill()
        ends.gpu.synchronize()
        ends.gpu.current = consumers
        other.close()
        ends.slab.detach("sleeper")


def test_what_was_complete_at_a_death_is_known_after_streams_were_let_go(ends: Ends) -> None:
    another, _ = mapping_of(ends.cuda, ends.slab)
    ends.publish(1, 7)
    ends.mapping.expect(2, 8)
    for _ in range(2):
        ends.mapping.let_go()
        assert not ends.gpu.waits()
        assert ends.mapping.filled() == another.filled() == [0, 7, 0, 0]
        another.let_go()
    assert [ends.mapping.is_torn(slot, 7) for slot in range(4)] == [True, False, True, True]
    ends.mapping.expect(3, wire.LET_GO - 1)
    assert not ends.gpu.waits()
    another.close()


def test_the_loop_goes_on_while_memory_waits_for_the_gpu(ends: Ends) -> None:
    other, _ = mapping_of(ends.cuda, ends.slab)
    ends.mapping.expect(0, 1)
    done: list[bool] = []
    with Loop() as loop:
        ends.cuda.aside(loop, [other.close], lambda: done.append(True))
        assert not loop.run_until(lambda: bool(done), timeout=0.05)
        # Its producer has died, of which the loop hears.
        loop.call_soon(ends.mapping.let_go)
        assert loop.run_until(lambda: bool(done), timeout=5)
    assert len(ends.gpu.opened) == 1


def test_what_cannot_be_allocated_leaves_nothing(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(ends.gpu.allocated), len(ends.gpu.registered), memfds()
    for name in ("cudaIpcGetMemHandle", "cudaHostRegister", "cudaHostGetDevicePointer"):
        with monkeypatch.context() as patch:
            patch.setattr(ends.cuda.rt, name, lambda *_: (1, None))
            with pytest.raises(TensorMQError, match="CUDA: no: luck"):
                ends.cuda.DeviceSlab(NONCE, 4, 1024, DEVICE)
    assert (len(ends.gpu.allocated), len(ends.gpu.registered), memfds()) == before


def test_other_memory_is_declined_and_nothing_stays_of_it(ends: Ends) -> None:
    registered = len(ends.gpu.registered)
    with pytest.raises(NegotiationError, match="nonce"):
        mapping_of(ends.cuda, ends.slab, NONCE + 1)
    assert (len(ends.gpu.opened), len(ends.gpu.registered)) == (1, registered)


def test_a_channel_ends_when_the_gpu_is_done_with_it(pair: Pair) -> None:
    gpu_is_done = threading.Event()
    loop, pull, push = pair
    peer = push.connect(pull.endpoint)
    push.send({"x": np.ones(4, np.float32)}, to=peer)
    pull.recv(timeout=1).release()
    (channel,) = pull._channels.values()
    channel._pinned = cast(Any, SimpleNamespace(close=gpu_is_done.wait))
    push.disconnect(peer, timeout=0.05)
    assert (peer.lost, len(pull._channels)) == (None, 1)
    gpu_is_done.set()
    assert loop.run_until(lambda: peer.lost is not None, timeout=5)
    assert not pull._channels


class Torn:
    """The mapping of a producer that died before anything was complete."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def filled(self) -> list[int]:
        return [0] * 8

    def expect(self, slot: int, sequence: int) -> None:
        pass

    def release(self, slot: int, sequence: int) -> None:
        pass

    def let_go(self) -> None:
        self.calls.append("let go")

    def is_torn(self, slot: int, sequence: int) -> bool:
        return "let go" in self.calls

    def close(self) -> None:
        self.calls.append("close")


class Dead(NamedTuple):
    """A Pull end with two messages of a process that has died, which its loop has not heard."""

    pull: Pull
    torn: Torn
    taken: Message

    def watchdog_has_acted(self) -> None:
        end = time.monotonic() + 5
        while not self.torn.calls:
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.fixture
def dead(pair: Pair) -> Iterator[Dead]:
    loop, pull, push = pair
    torn = Torn()
    with sleeping() as sleeper:
        peer = push.connect(pull.endpoint)
        (channel,) = pull._channels.values()
        channel._device = cast(Any, torn)
        channel._watch = watchdog.Watch(sleeper.pidfd, channel._hear_beside_the_loop)
        for _ in range(2):
            push.send({"x": np.ones(4, np.float32)}, to=peer)
        loop.run_until(lambda: pull.waiting == 2, 1)
        dead = Dead(pull, torn, pull.recv())
        sleeper.kill()
        yield dead
        dead.taken.release()
        if not channel.ending:
            pull._lose(channel)
        assert loop.run_until(lambda: not pull._channels, timeout=5)
        assert torn.calls[-1] == "close"
        assert loop.run_until(lambda: peer.lost is not None, timeout=5)


def test_streams_are_let_go_although_nobody_runs_the_loop(dead: Dead) -> None:
    assert not dead.taken.torn
    dead.watchdog_has_acted()
    assert dead.taken.torn
    assert set(dead.torn.calls) == {"let go"}
    dead.taken.release()
    with pytest.raises(ValueError, match="released"):
        _ = dead.taken.torn
    assert dead.pull.poll() is None  # the other message, which waits for nothing any more
    assert dead.pull.torn == 2


def test_who_wants_to_be_told_is_told_once_and_nothing_is_let_go(dead: Dead) -> None:
    def tell() -> None:
        dead.torn.calls.append("told")
        if len(dead.torn.calls) < 3:
            raise RuntimeError("try again")

    dead.pull.on_torn = tell
    dead.watchdog_has_acted()
    time.sleep(4 * watchdog.GRACE)
    assert dead.torn.calls == ["told"] * 3
    assert dead.pull.poll() is None
    assert dead.torn.calls == ["told"] * 3


def test_who_hears_in_time_lets_go_itself(dead: Dead) -> None:
    (channel,) = dead.pull._channels.values()
    dead.pull._lose(channel)
    assert (dead.torn.calls, dead.pull.torn, dead.pull.waiting) == (["let go"], 2, 0)
    time.sleep(3 * watchdog.GRACE)
    assert dead.torn.calls == ["let go"]


@pytest.mark.parametrize("how", ["goodbye", "death", "close"])
def test_however_a_channel_ends_its_process_is_watched_no_more(pair: Pair, how: str) -> None:
    loop, pull, push = pair
    peer = push.connect(pull.endpoint)
    (channel,) = pull._channels.values()
    assert channel.pidfd is not None
    channel._watch = watched = watchdog.Watch(channel.pidfd, lambda: None)
    match how:
        case "goodbye":
            push.disconnect(peer)
        case "death":
            pull._lose(channel)
        case "close":
            pull.close()
    assert loop.run_until(lambda: not pull._channels, timeout=5)
    assert watched.fd not in watched._watchdog._watches


def test_who_declines_gives_up_what_it_mapped_beside_the_loop(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed_by: list[str] = []

    def close() -> None:
        time.sleep(0.1)
        closed_by.append(threading.current_thread().name)

    map_offer = pull_module._Channel.map

    def map_and_fail(channel: Any, offer: wire.Offer) -> None:
        if offer.carrier is not Carrier.SHM:
            return map_offer(channel, offer)
        channel._pinned = SimpleNamespace(close=close)
        raise TensorMQError("no pages")

    monkeypatch.setattr(pull_module._Channel, "map", map_and_fail)
    _, pull, push = pair
    peer = push.connect(pull.endpoint)
    assert peer.statistics.carrier is Carrier.INLINE
    assert closed_by == ["tensormq aside"]
    push.send({"x": np.ones(4, np.float32)}, to=peer)
    with pull.recv(timeout=1) as message:
        assert message.tensors["x"].sum() == 4
