"""The words that keep the order between two processes on a GPU, with a GPU that is pretended."""

from __future__ import annotations

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
from tensormq import Carrier, Loop, NegotiationError, Pull, Push, TensorMQError, host, wire
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
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    with pretended(monkeypatch) as (gpu, cuda):
        slab = cuda.DeviceSlab(NONCE, 4, 1024, DEVICE)
        mapping, consumer = mapping_of(cuda, slab)
        slab.attach("peer", consumer)
        gpu.given.clear()
        yield Ends(gpu, cuda, slab, mapping, gpu.stream())
        mapping.close()
        slab.close()
        assert (gpu.allocated, gpu.opened, gpu.registered) == ({}, [], set())
        assert gpu.held_up == 0


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
    ends.mapping.lift(1, 2)
    assert not ends.gpu.waits()
    assert ends.mapping.filled()[:2] == [3, 2]


def test_a_dead_producer_is_not_waited_for(ends: Ends) -> None:
    ends.mapping.expect(2, 5)
    assert ends.mapping.filled()[2] < 5  # it was announced and never completed
    ends.mapping.lift(2, 5)
    assert not ends.gpu.waits()


def test_a_dead_consumer_is_not_waited_for_and_its_successor_is(ends: Ends) -> None:
    ends.publish(0, 1)
    ends.publish(0, 2)
    assert ends.gpu.waits()
    ends.slab.detach("peer")
    assert not ends.gpu.waits()
    successor, consumer = mapping_of(ends.cuda, ends.slab)
    ends.slab.attach("peer", consumer)
    ends.publish(0, 3)
    ends.publish(0, 4)
    assert ends.gpu.waits()
    successor.release(0, 3)
    assert not ends.gpu.waits()
    successor.close()


def test_the_loop_goes_on_while_memory_waits_for_the_gpu(ends: Ends) -> None:
    other, _ = mapping_of(ends.cuda, ends.slab)
    ends.mapping.expect(0, 1)
    done: list[bool] = []
    with Loop() as loop:
        ends.cuda.aside(loop, [other.close], lambda: done.append(True))
        assert not loop.run_until(lambda: bool(done), timeout=0.05)
        # Its producer has died, of which the loop hears.
        loop.call_soon(lambda: ends.mapping.lift(0, 1))
        assert loop.run_until(lambda: bool(done), timeout=5)
    assert len(ends.gpu.opened) == 1


def test_no_stream_is_told_to_wait_while_memory_is_given_up(ends: Ends) -> None:
    began, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def job() -> None:
        began.set()
        go_on.wait(10)

    with Loop() as loop:
        ends.cuda.aside(loop, [job], done.set)
        assert began.wait(10)
        other = threading.Thread(target=ends.mapping.expect, args=(0, 1))
        other.start()
        other.join(0.05)
        assert ends.gpu.given == []
        go_on.set()
        other.join(10)
        assert ends.gpu.given == ["wait"]
        ends.publish(0, 1)
        assert loop.run_until(done.is_set, timeout=5)


def test_memory_is_given_up_under_a_load_that_never_ends(ends: Ends) -> None:
    other, _ = mapping_of(ends.cuda, ends.slab)
    done = threading.Event()
    with Loop() as loop:
        ends.mapping.expect(1, 1)
        ends.cuda.aside(loop, [other.close], done.set)
        sequence = 1
        end = time.monotonic() + 10
        while len(ends.gpu.opened) > 1:
            assert time.monotonic() < end
            # The stream is told to wait for the next before it has what it waits for.
            ends.mapping.release(sequence % 4, sequence)
            sequence += 1
            following = threading.Thread(target=ends.mapping.expect, args=(sequence % 4, sequence))
            following.start()
            following.join(0.002)
            ends.publish((sequence - 1) % 4, sequence - 1)
            following.join()
        ends.publish(sequence % 4, sequence)
        assert loop.run_until(done.is_set, timeout=5)


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


def test_a_channel_ends_when_the_gpu_is_done_with_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_is_done = threading.Event()
    with (
        pretended(monkeypatch) as (_, cuda),
        Loop() as loop,
        Pull(f"ipc://{run_dir}/x.sock", loop=loop) as pull,
        Push(slot_bytes=256, loop=loop) as push,
    ):
        monkeypatch.setitem(sys.modules, "tensormq.cuda", cuda)
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


def test_who_declines_gives_up_what_it_mapped_beside_the_loop(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
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
    with (
        pretended(monkeypatch) as (_, cuda),
        Loop() as loop,
        Pull(f"ipc://{run_dir}/x.sock", loop=loop) as pull,
        Push(slot_bytes=256, loop=loop) as push,
    ):
        monkeypatch.setitem(sys.modules, "tensormq.cuda", cuda)
        peer = push.connect(pull.endpoint)
        assert peer.statistics.carrier is Carrier.INLINE
        assert closed_by == ["tensormq aside"]
        push.send({"x": np.ones(4, np.float32)}, to=peer)
        with pull.recv(timeout=1) as message:
            assert message.tensors["x"].sum() == 4
