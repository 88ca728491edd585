"""What becomes of slots, channels and callers when sending goes wrong. Both ends in one thread."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tensormq import (
    Carrier,
    EndpointError,
    Loop,
    NegotiationError,
    Peer,
    PeerLost,
    ProtocolError,
    Pull,
    Push,
    Request,
    TensorTooLarge,
    Timeout,
    UnsupportedTensor,
    wire,
)

X = {"x": np.ones(4, np.float32)}
TOO_LONG = bytes(wire.MAX_FRAME)
PEER = Path(__file__).with_name("tensormq_peer.py")


class Ends(NamedTuple):
    """A Push with one slot of each carrier, and a consumer by each."""

    loop: Loop
    push: Push
    near: Pull
    far: Pull
    by_shm: Peer
    inline: Peer

    def free(self) -> list[int]:
        return [lane.pool.free for lane in self.push._lanes.values()]


@pytest.fixture
def ends(run_dir: Path) -> Iterator[Ends]:
    with (
        Loop() as loop,
        Pull(f"ipc://{run_dir}/near.sock", loop=loop) as near,
        Pull(f"ipc://{run_dir}/far.sock", loop=loop) as far,
        Push(slots=1, slot_bytes=4096, loop=loop) as push,
    ):
        by_shm = push.connect(near.endpoint, carriers=[Carrier.SHM])
        inline = push.connect(far.endpoint, carriers=[Carrier.INLINE])
        yield Ends(loop, push, near, far, by_shm, inline)


def break_ring(pull: Pull) -> None:
    """Have the consumer say that it has written what it cannot have written."""
    (channel,) = pull._channels.values()
    assert channel.line is not None
    channel.line.outgoing._words[0] = 12345


# Connecting


def test_a_refused_producer_leaves_nothing_behind(run_dir: Path) -> None:
    with (
        Loop() as loop,
        Pull(f"ipc://{run_dir}/x.sock", loop=loop) as pull,
        Push(slot_bytes=1024, loop=loop) as push,
    ):
        for _ in range(3):
            with pytest.raises(NegotiationError):
                push.connect(pull.endpoint, carriers=[])
        assert loop.run_until(lambda: not pull._channels, timeout=1)
        assert pull.rejected == 0
        assert push.connect(pull.endpoint).lost is None


def test_a_producer_that_waited_too_briefly_leaves_nothing_behind(run_dir: Path) -> None:
    with Loop() as theirs, Pull(f"ipc://{run_dir}/x.sock", loop=theirs) as pull:
        with Push(slot_bytes=1024) as push, pytest.raises(EndpointError, match="nobody answers"):
            push.connect(pull.endpoint, timeout=0.05)
        # Its Hello and its Bye, which may come in one go.
        theirs.run_until(lambda: bool(pull._channels), timeout=0.1)
        assert theirs.run_until(lambda: not pull._channels, timeout=1)


def test_an_end_that_cannot_be_made_leaves_no_loop_behind(run_dir: Path) -> None:
    with Pull(f"ipc://{run_dir}/x.sock") as pull:
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(EndpointError, match="in use"):
            Pull(pull.endpoint)
        assert len(list(Path("/proc/self/fd").iterdir())) == before


# Sending to several


def test_what_cannot_be_said_to_all_is_said_to_nobody(ends: Ends) -> None:
    with pytest.raises(TensorTooLarge):
        ends.push.send(X, to=[ends.by_shm, ends.inline], note=TOO_LONG)
    assert ends.free() == [1, 1]
    assert (ends.near.waiting, ends.far.waiting) == (0, 0)
    ends.push.send(X, to=[ends.by_shm, ends.inline])
    for pull in (ends.near, ends.far):
        with pull.recv(timeout=1) as message:
            assert np.array_equal(message.tensors["x"], X["x"])


@pytest.mark.parametrize("leaves", ["near", "far"])
def test_who_leaves_while_a_slot_is_waited_for_is_left_out(ends: Ends, leaves: str) -> None:
    leaving = getattr(ends, leaves)
    staying = ends.far if leaves == "near" else ends.near
    slow = ends.inline if leaves == "near" else ends.by_shm
    ends.push.send(X, to=slow)
    held = staying.recv(timeout=1)

    def leave() -> None:
        leaving.close()
        ends.loop.call_soon(held.release)

    ends.loop.call_soon(leave)
    ends.push.send(X, to=[ends.by_shm, ends.inline], timeout=5)
    staying.recv(timeout=1).release()
    assert ends.loop.run_until(lambda: ends.free() == [1, 1], timeout=1)


def test_it_is_told_when_all_have_left(ends: Ends, run_dir: Path) -> None:
    with Pull(f"ipc://{run_dir}/third.sock", loop=ends.loop) as third:
        slow = [
            ends.push.connect(third.endpoint, carriers=[carrier])
            for carrier in (Carrier.SHM, Carrier.INLINE)
        ]
        ends.push.send(X, to=slow)
        held = third.recv(timeout=1), third.recv(timeout=1)

        def leave() -> None:
            ends.near.close()
            ends.far.close()

        ends.loop.call_soon(leave)
        with pytest.raises(PeerLost, match="is gone: it closed its end"):
            ends.push.send(X, to=[ends.by_shm, ends.inline], timeout=5)
        for message in held:
            message.release()
        assert ends.loop.run_until(lambda: ends.free() == [1, 1], timeout=1)


# Waiting


def test_a_send_does_not_wait_for_a_peer_that_left(ends: Ends, run_dir: Path) -> None:
    with Pull(f"ipc://{run_dir}/third.sock", loop=ends.loop) as third:
        slow = ends.push.connect(third.endpoint, carriers=[Carrier.SHM])
        ends.push.send(X, to=slow)
        held = third.recv(timeout=1)
        for wait in (ends.push.send, ends.push.allocate):
            what: Any = X if wait == ends.push.send else {"x": ("float32", (4,))}
            with pytest.raises(Timeout):
                wait(what, to=ends.by_shm, timeout=0.01)
        ends.loop.call_soon(ends.near.close)
        with pytest.raises(PeerLost, match="it closed its end"):
            ends.push.send(X, to=ends.by_shm, timeout=5)
        held.release()


def test_a_send_does_not_wait_for_a_peer_whose_ring_broke(ends: Ends) -> None:
    ends.push.send(X, to=ends.by_shm)
    held = ends.near.recv(timeout=1)
    ends.loop.call_soon(lambda: break_ring(ends.near))
    with pytest.raises(PeerLost, match="its ring is broken"):
        ends.push.send(X, to=ends.by_shm, timeout=5)
    held.release()


@pytest.mark.parametrize("how", ["disconnect", "finish"])
def test_a_send_does_not_wait_for_a_peer_that_is_left_meanwhile(ends: Ends, how: str) -> None:
    ends.push.send(X, to=ends.by_shm)
    held = ends.near.recv(timeout=1)

    def leave() -> None:
        if how == "finish":
            ends.push.finish()
        else:
            ends.push.disconnect(ends.by_shm, timeout=0)

    ends.loop.call_soon(leave)
    with pytest.raises(PeerLost, match="this end disconnected"):
        ends.push.send(X, to=ends.by_shm, timeout=5)
    assert ends.push.has_room(ends.by_shm)  # sending says that it is gone
    held.release()
    assert ends.loop.run_until(lambda: ends.by_shm.lost is not None, timeout=1)


def test_nothing_connects_from_an_end_that_is_closed(ends: Ends) -> None:
    ends.push.close()
    with pytest.raises(EndpointError, match="this end is closed"):
        ends.push.connect(ends.near.endpoint)


def test_who_hears_of_a_loss_may_close_the_end_that_waits(ends: Ends, run_dir: Path) -> None:
    with Pull(f"ipc://{run_dir}/third.sock", loop=ends.loop) as third:
        ends.push.send(X, to=ends.push.connect(third.endpoint, carriers=[Carrier.SHM]))
        held = third.recv(timeout=1)

        def close(_: Peer) -> None:
            held.release()
            ends.push.close()

        ends.push.on_lost = close
        ends.loop.call_soon(ends.near.close)
        with pytest.raises(PeerLost, match="it closed its end"):
            ends.push.send(X, to=ends.by_shm, timeout=5)


# What cannot be written down


@pytest.mark.parametrize(
    ("extras", "error"),
    [
        ({"requests": [Request(np.int64(1), 4)]}, TypeError),  # type: ignore[arg-type]
        ({"route": 1 << 64}, OverflowError),
        ({"note": TOO_LONG}, TensorTooLarge),
    ],
)
def test_a_message_that_cannot_be_written_takes_no_slot(
    ends: Ends, extras: dict[str, Any], error: type[Exception]
) -> None:
    for _ in range(3):  # of one slot
        with pytest.raises(error):
            ends.push.send(X, to=ends.by_shm, **extras)
        filling = ends.push.allocate({"x": ("float32", (4,))}, to=ends.by_shm, timeout=0)
        with pytest.raises(error):
            ends.push.send(filling, to=ends.by_shm, **extras)
        filling.tensors.clear()
    assert ends.free() == [1, 1]


def test_more_dimensions_than_an_array_can_have_take_no_slot(ends: Ends) -> None:
    with pytest.raises(UnsupportedTensor, match="70 dimensions"):
        ends.push.allocate({"x": ("float32", (1,) * 70)}, to=ends.by_shm)
    assert ends.free() == [1, 1]


@pytest.mark.parametrize(
    "shape", [(0, 1 << 62, 1 << 62), (0, (1 << 64) - 1), (1,) * 33, (0, 1 << 61)]
)
def test_a_tensor_that_cannot_be_made_is_refused(shape: tuple[int, ...]) -> None:
    encoded = wire._encode((wire.TensorSpec("x", "float32", shape, 0),))
    with pytest.raises(ProtocolError, match="impossible shape"):
        wire.parse_layout(encoded, 4096)


def test_an_array_without_dimensions_arrives_as_one(run_dir: Path) -> None:
    with (
        Loop() as loop,
        Pull(f"ipc://{run_dir}/x.sock", device="cpu", loop=loop) as pull,
        Push(slot_bytes=256, device="cpu", loop=loop) as push,
    ):
        push.send({"x": np.array(3.0)}, to=push.connect(pull.endpoint))
        with pull.recv(timeout=1) as message:
            assert (message.tensors["x"].shape, message.tensors["x"].item()) == ((), 3.0)


# Those that misbehave, and those that are left


def test_a_goodbye_over_a_broken_ring_is_a_loss_and_no_error(ends: Ends) -> None:
    (channel,) = ends.near._channels.values()
    # While the producer's loop does not run, so that it finds both at once.
    break_ring(ends.near)
    ends.near._answer(channel, wire.Bye(channel.epoch))
    ends.push._receive(ends.by_shm)
    assert ends.loop.run_until(lambda: ends.by_shm.lost is not None, timeout=1)


@pytest.mark.parametrize("pid", [-1, 0, 1 << 40])
def test_a_producer_without_a_process_is_not_let_in(run_dir: Path, pid: int) -> None:
    with Loop() as loop, Pull(f"ipc://{run_dir}/x.sock", loop=loop) as pull:
        mine = pull._abilities
        process = wire.Process(mine.process.host, pid, 1)
        with Push(slot_bytes=256, loop=loop) as push:
            push._abilities = wire.Abilities(process, mine.carriers, None, ())
            with pytest.raises(EndpointError, match="nobody answers"):
                push.connect(pull.endpoint, timeout=0.1)
        assert not pull._channels


def test_a_peer_that_is_left_ends_its_channel_when_it_has_released_everything(ends: Ends) -> None:
    heard: list[Peer] = []
    ends.push.on_lost = heard.append
    ends.push.send(X, to=ends.by_shm)
    held = ends.near.recv(timeout=1)
    for timeout in (0, 0.01):
        ends.push.disconnect(ends.by_shm, timeout=timeout)
        assert ends.push.peers == (ends.inline,)
        with pytest.raises(PeerLost, match="this end disconnected"):
            ends.push.send(X, to=ends.by_shm)
    assert ends.free() == [0, 1]
    again = ends.push.connect(ends.near.endpoint, carriers=[Carrier.SHM])
    held.release()
    assert ends.loop.run_until(lambda: ends.by_shm.lost is not None, timeout=1)
    assert ends.free() == [1, 1]
    ends.push.send(X, to=again, timeout=0)
    ends.near.recv(timeout=1).release()
    assert not heard


@pytest.mark.parametrize("held", [False, True])
def test_an_end_that_finishes_closes_when_the_last_slot_is_released(
    run_dir: Path, held: bool
) -> None:
    with Loop() as loop, Pull(f"ipc://{run_dir}/x.sock", loop=loop) as pull:
        push = Push(slot_bytes=256, loop=loop)
        push.send(X, to=push.connect(pull.endpoint))
        message = pull.recv(timeout=1)
        if not held:
            message.release()
        push.finish()
        assert loop.run_until(lambda: push.closed, timeout=0.05) is not held
        message.release()
        assert loop.run_until(lambda: push.closed, timeout=1)
        assert loop.run_until(lambda: not pull._channels, timeout=1)
        push.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "carrier"),
    [("cpu", Carrier.SHM), pytest.param("cuda:0", Carrier.CUDA_IPC, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("broken", [False, True])
def test_slots_of_a_consumer_that_was_left_come_back_when_it_dies(
    run_dir: Path, device: str, carrier: Carrier, broken: bool
) -> None:
    command = [sys.executable, str(PEER), "hold", f"ipc://{run_dir}/x.sock", "-", device, carrier]
    with (
        subprocess.Popen([*command, "ring", "-"], stdout=subprocess.PIPE, text=True) as process,
        Push(slots=2, slot_bytes=4096, device=device) as push,
    ):
        assert process.stdout is not None
        try:
            peer = push.connect(process.stdout.readline().split()[1])
            for _ in range(2):
                push.send({"x": torch.ones(4, device=device)}, to=peer)
            if broken:
                assert peer._line is not None
                peer._line.incoming._words[0] = 12345
                assert push._loop.run_until(lambda: peer.lost is not None, timeout=1)
            else:
                push.disconnect(peer, timeout=0.1)
            assert (push.peers, push.leased_slots) == ((), 2)
            assert not push._loop.run_until(lambda: push.leased_slots == 0, timeout=0.1)
        finally:
            process.kill()
        assert push._loop.run_until(lambda: push.leased_slots == 0, timeout=5)


def test_what_was_to_be_called_after_a_callback_that_raises_is_called() -> None:
    called: list[str] = []

    def fail() -> None:
        raise RuntimeError("on purpose")

    with Loop() as loop:
        loop.call_soon(fail)
        loop.call_soon(lambda: called.append("after"))
        with pytest.raises(RuntimeError, match="on purpose"):
            loop.run_once(1)
        assert loop.run_until(lambda: called == ["after"], timeout=1)
