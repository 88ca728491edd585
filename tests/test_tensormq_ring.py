"""Rings: what was written comes out, in order and whole, whatever the other side does."""

from __future__ import annotations

import contextlib
import os
import select
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormq import Carrier, Doorbell, Loop, Peer, PeerLost, Pull, Push, ring, wire
from tensormq.errors import NegotiationError, RingBroken
from tensormq.loop import Lookout
from tensormq.process import this_process
from tensormq.ring import HEADER_BYTES, Reader, Writer

PEER = Path(__file__).with_name("ring_peer.py")
CAPACITY = 4096
HEAD, TAIL, PARKED = 0, 64, 128


@pytest.fixture
def bell() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for end in ends:
        os.close(end)


def memory() -> memoryview:
    return memoryview(bytearray(HEADER_BYTES + CAPACITY))


steps = st.lists(
    st.one_of(
        st.binary(max_size=200),
        st.integers(0, 2000).map(bytes),
        st.just("read"),
        st.just("socket"),
    ),
    max_size=300,
)


@given(steps)
def test_what_goes_in_comes_out_in_order(steps: list[bytes | str]) -> None:
    """Frames of every size, round and round; now and then one that takes the socket."""
    shared = memory()
    writer, reader = Writer(shared, bell=-1), Reader(shared)
    on_the_way: deque[bytes] = deque()
    through_socket: deque[bytes] = deque()
    expected: deque[bytes] = deque()
    received: list[bytes] = []

    def take_all() -> None:
        while (frame := reader.read()) is not None:
            received.append(frame)

    for number, step in enumerate(steps):
        if step == "read":
            take_all()
        elif step == "socket" and through_socket:
            take_all()
            reader.arrive()
            received.append(through_socket.popleft())
            take_all()
        elif isinstance(step, bytes):
            frame = number.to_bytes(4, "little") + step
            expected.append(frame)
            if writer.write(frame):
                on_the_way.append(frame)
            else:
                through_socket.append(frame)
    while through_socket:
        take_all()
        reader.arrive()
        received.append(through_socket.popleft())
    take_all()
    assert received == list(expected)
    assert not reader.ready


@settings(max_examples=500)
@given(
    head=st.integers(0, (1 << 64) - 1) | st.integers(0, 3 * CAPACITY),
    tail=st.integers(0, (1 << 64) - 1) | st.integers(0, 3 * CAPACITY),
    content=st.binary(max_size=64),
    at=st.integers(0, CAPACITY - 64),
    frames=st.lists(st.binary(max_size=900), max_size=6),
)
def test_hostile_memory_is_refused_or_read_within_bounds(
    head: int, tail: int, content: bytes, at: int, frames: list[bytes]
) -> None:
    shared = memory()
    writer, reader = Writer(shared, bell=-1), Reader(shared)
    for frame in frames:
        writer.write(frame)
        reader.read()
    struct.pack_into("<Q", shared, HEAD, head)
    struct.pack_into("<Q", shared, TAIL, tail)
    shared[HEADER_BYTES + at : HEADER_BYTES + at + len(content)] = content
    try:
        for _ in range(2 * CAPACITY // 8):  # a frame takes at least eight bytes: it must end
            frame = reader.read()
            if frame is None:
                break
            assert len(frame) <= CAPACITY
        else:
            pytest.fail("read for ever")
    except RingBroken:
        pass
    try:
        while writer.write(bytes(500)):
            pass
    except RingBroken:
        pass
    assert len(shared) == HEADER_BYTES + CAPACITY


def test_a_frame_that_was_not_published_is_not_there() -> None:
    """What a writer that is killed in the middle of a frame leaves behind."""
    shared = memory()
    writer, reader = Writer(shared, bell=-1), Reader(shared)
    writer.write(b"whole")
    published = bytes(shared[HEAD : HEAD + 8])
    writer.write(b"the second")
    shared[HEAD : HEAD + 8] = published
    assert reader.read() == b"whole"
    assert not reader.ready
    assert reader.read() is None


def test_the_bell_rings_once_for_a_sleeper(bell: tuple[int, int]) -> None:
    shared = memory()
    writer, reader = Writer(shared, bell[1]), Reader(shared)
    writer.write(b"nobody sleeps")
    assert select.select([bell[0]], [], [], 0)[0] == []
    reader.park()
    writer.write(b"wake up")
    writer.write(b"you are awake")
    assert os.read(bell[0], 100) == b"\0"


def test_a_sleeper_is_roused_once_and_finds_nothing(bell: tuple[int, int]) -> None:
    shared = memory()
    writer, reader = Writer(shared, bell[1]), Reader(shared)
    writer.rouse()
    assert select.select([bell[0]], [], [], 0)[0] == []
    reader.park()
    writer.rouse()
    writer.rouse()
    assert os.read(bell[0], 100) == b"\0"
    assert not reader.ready


@pytest.mark.parametrize("spin", [0.0, 0.001])
def test_a_consumer_is_roused_where_loops_look_out_before_they_sleep(
    run_dir: Path, spin: float
) -> None:
    endpoint = f"ipc://{run_dir}/pull.sock"
    with Loop(spin=spin) as loop, Pull(endpoint, loop=loop):
        push = Push(slots=1, slot_bytes=256, loop=loop)
        peer = push.connect(endpoint)
        assert peer._line is not None
        words = peer._line.outgoing._words
        words[PARKED // 8] = 1  # as a loop that sleeps says of itself
        push.rouse([peer])
        assert words[PARKED // 8] == (spin == 0.0)
        push.close()


@pytest.mark.parametrize("spin", [0.0, 0.001])
def test_what_nothing_tells_of_is_asked_for_until_it_says_that_all_is_known(spin: float) -> None:
    answers = deque([*[False] * 20, True, False, None])
    heard: list[bool | None] = []

    def question() -> bool | None:
        heard.append(answers.popleft())
        return heard[-1]

    with Loop(spin=spin) as loop:
        loop.ask(question)
        loop.run_once(30)
        assert heard == [False] * 20 + [True]
        loop.run_once(30)
        assert heard[-2:] == [False, None]
        loop.run_once(0.01)
        assert not answers


@pytest.mark.parametrize("spin", [0.0, 0.001])
def test_who_does_not_wait_is_told_of_what_is_there(spin: float) -> None:
    called: list[int] = []
    with Loop(spin=spin) as loop:
        assert not loop.run_until(lambda: bool(called), 0)
        loop.call_soon(lambda: called.append(1))
        assert loop.run_until(lambda: bool(called), 0)


def test_a_loop_that_asks_is_woken_at_once() -> None:
    called = threading.Event()
    with Loop(spin=0) as loop:
        loop.ask(lambda: False)
        sleeper = threading.Thread(target=lambda: loop.run_until(called.is_set, 30))
        sleeper.start()
        loop.call_soon(called.set)
        sleeper.join(10)
        assert not sleeper.is_alive()


def test_a_bell_that_nobody_hears_is_no_error(bell: tuple[int, int]) -> None:
    while True:
        try:
            os.write(bell[1], bytes(4096))
        except BlockingIOError:
            break
    ring.ring_bell(bell[1])
    deaf, lonely = os.pipe2(os.O_NONBLOCK)
    os.close(deaf)
    ring.ring_bell(lonely)
    os.close(lonely)


def test_rings_are_joined_only_where_they_are_what_was_offered() -> None:
    mine = this_process()
    with Loop() as loop:
        rings = ring.Rings(77, 4, loop.bell)
        offer = rings.offer
        for wrong in (
            wire.Rings(offer.fd, offer.inode + 1, offer.down, offer.up, offer.bell),
            wire.Rings(offer.fd, offer.inode, offer.down * 2, offer.up, offer.bell),
            wire.Rings(offer.fd, offer.inode, offer.down, 100, offer.bell),
            wire.Rings(offer.fd, offer.inode, offer.down, 1 << 40, offer.bell),
            wire.Rings(999_999, offer.inode, offer.down, offer.up, offer.bell),
            wire.Rings(offer.fd, offer.inode, offer.down, offer.up, wire.Bell(offer.bell.fd, 1)),
            wire.Rings(offer.fd, offer.inode, offer.down, offer.up, wire.Bell(999_999, 1)),
        ):
            with pytest.raises(NegotiationError):
                ring.join(mine, 77, wrong)
        with pytest.raises(NegotiationError, match="nonce"):
            ring.join(mine, 78, offer)
        theirs = ring.join(mine, 77, offer)
        ours = rings.line(mine, loop.bell)
        rings.close()
        assert ours.outgoing.write(b"down")
        assert theirs.incoming.read() == b"down"
        assert theirs.outgoing.write(b"up")
        assert ours.incoming.read() == b"up"
        ours.close()
        theirs.close()
        assert not ours.incoming.ready


# Between processes


@contextlib.contextmanager
def other_process(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`ring_peer.py` in a role; it must end well."""
    process = subprocess.Popen(
        [sys.executable, PEER, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
        process.communicate(timeout=20)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def _stress(directory: Path, count: int, spin: float, doorbell: Doorbell) -> None:
    with (
        Loop(spin=spin) as loop,
        Pull(f"ipc://{directory}/x.sock", loop=loop, doorbell=doorbell) as pull,
        other_process("write", pull.endpoint, count, spin, doorbell) as process,
    ):
        for number in range(count):
            with pull.recv(timeout=60) as message:
                assert message.route == number
                if message.tensors:
                    assert message.tensors["n"][0] == number
        while process.poll() is None:
            loop.run_once(0.05)
        assert pull.rejected == 0


@pytest.mark.slow
@pytest.mark.parametrize("spin", [0.0, 0.001], ids=["parked", "spinning"])
def test_a_hundred_thousand_messages_without_loss(run_dir: Path, spin: float) -> None:
    _stress(run_dir, 100_000, spin, Doorbell.RING)


@pytest.mark.slow
def test_the_same_through_the_socket(run_dir: Path) -> None:
    _stress(run_dir, 10_000, 0.0, Doorbell.ZEROMQ)


@pytest.mark.slow
def test_no_wake_up_is_lost(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends sleep before each of many messages; one lost wake-up and the test hangs.

    Without the backstop, which would hide it.
    """
    monkeypatch.setattr("tensormq.loop._BACKSTOP", 60.0)
    there, back = f"ipc://{run_dir}/there.sock", f"ipc://{run_dir}/back.sock"
    with (
        Loop(spin=0) as loop,
        Pull(back, loop=loop) as pull,
        other_process("echo", there, back, 60.0) as process,
    ):
        push = Push(slot_bytes=256, loop=loop)
        peer = push.connect(there)
        for number in range(30_000):
            push.send({}, to=peer, route=number)
            assert pull.recv(timeout=30).route == number
        push.send({}, to=peer, route=-1)
        while process.poll() is None:
            loop.run_once(0.05)
        push.close()


@pytest.mark.slow
def test_an_idle_end_costs_no_processor(run_dir: Path) -> None:
    endpoint = f"ipc://{run_dir}/x.sock"
    with Push(slot_bytes=256) as push, other_process("idle", endpoint) as process:
        peer = push.connect(endpoint)
        assert peer.statistics.doorbell is Doorbell.RING
        push.send({}, to=peer)
        assert process.stdout is not None
        assert float(process.stdout.readline()) < 0.05
        push.send({}, to=peer)
        assert push._loop.run_until(lambda: peer.lost is not None, timeout=20)


# In one process


@pytest.fixture
def ends(run_dir: Path) -> Iterator[tuple[Pull, Push, Peer]]:
    with Loop() as loop:
        pull = Pull(f"ipc://{run_dir}/pull.sock", loop=loop)
        push = Push(slots=2, slot_bytes=4096, loop=loop)
        yield pull, push, push.connect(pull.endpoint)
        pull.close()
        push.close()


@pytest.mark.parametrize("who", ["push", "pull"])
def test_either_end_can_keep_to_the_socket(run_dir: Path, who: str) -> None:
    asked = {who: Doorbell.ZEROMQ}
    with (
        Loop() as loop,
        Pull(
            f"ipc://{run_dir}/x.sock", loop=loop, doorbell=asked.get("pull", Doorbell.RING)
        ) as pull,
        Push(slot_bytes=256, loop=loop, doorbell=asked.get("push", Doorbell.RING)) as push,
    ):
        peer = push.connect(pull.endpoint)
        assert peer.statistics.doorbell is Doorbell.ZEROMQ
        push.send({"x": np.ones(2)}, to=peer)
        pull.recv(timeout=1).release()


def test_tensors_that_travel_inline_keep_to_the_socket(run_dir: Path) -> None:
    with Loop() as loop, Pull(f"ipc://{run_dir}/x.sock", loop=loop) as pull:
        push = Push(slot_bytes=256, loop=loop, carriers=[Carrier.INLINE])
        assert push.connect(pull.endpoint).statistics.doorbell is Doorbell.ZEROMQ
        push.close()


def test_a_full_ring_changes_no_order(ends: tuple[Pull, Push, Peer]) -> None:
    pull, push, peer = ends
    for number in range(300):  # more than the ring holds, and nobody reads
        push.send({}, to=peer, route=number, note=bytes(1000))
    routes = [pull.recv(timeout=1).route for _ in range(150)]
    for number in range(300, 400):
        push.send({}, to=peer, route=number)
    routes += [pull.recv(timeout=1).route for _ in range(250)]
    assert routes == list(range(400))


def test_a_goodbye_does_not_overtake_the_ring(ends: tuple[Pull, Push, Peer]) -> None:
    pull, push, peer = ends
    for number in range(20):
        push.send({}, to=peer, route=number)
    push.disconnect(peer)
    assert [message.route for message in iter(pull.poll, None)] == list(range(20))


@pytest.mark.parametrize("damage", ["bye", "another version"])
def test_what_may_not_be_in_a_ring_is_rejected_and_the_rest_goes_on(
    ends: tuple[Pull, Push, Peer], damage: str
) -> None:
    pull, push, peer = ends
    (channel,) = pull._channels.values()
    assert peer._line is not None
    assert channel.line is not None
    frame = wire.encode(wire.Bye(peer.epoch))
    if damage == "another version":
        frame = b"TMQ\x09" + frame[4:]
    assert peer._line.outgoing.write(frame)
    assert channel.line.outgoing.write(frame)
    push.send({"x": np.ones(2)}, to=peer)
    pull.recv(timeout=1).release()
    assert push._loop.run_until(lambda: push.free_slots == 2, timeout=1)
    assert (pull.rejected, push.rejected) == (1, 1)
    assert peer.lost is None


def test_a_producer_that_breaks_its_ring_loses_its_channel(
    ends: tuple[Pull, Push, Peer], caplog: pytest.LogCaptureFixture
) -> None:
    pull, push, peer = ends
    push.send({"x": np.ones(2)}, to=peer)
    held = pull.recv(timeout=1)
    assert peer._line is not None
    peer._line.outgoing._words[0] += 12
    pull._loop.run_once(0)
    assert "its ring is broken" in caplog.text
    assert peer.lost is None  # nobody may write to what is still being read
    assert held.tensors["x"].tolist() == [1.0, 1.0]
    held.release()
    assert push._loop.run_until(lambda: peer.lost is not None, timeout=1)
    assert push.free_slots == 2
    with pytest.raises(PeerLost):
        push.send({}, to=peer)
    again = push.connect(pull.endpoint)
    push.send({"x": np.ones(2)}, to=again)
    pull.recv(timeout=1).release()


@pytest.mark.parametrize("word", [HEAD, TAIL])
def test_a_consumer_that_breaks_its_ring_is_left(
    ends: tuple[Pull, Push, Peer], caplog: pytest.LogCaptureFixture, word: int
) -> None:
    pull, push, peer = ends
    push.send({"x": np.ones(2)}, to=peer)
    held = pull.recv(timeout=1)
    (channel,) = pull._channels.values()
    assert channel.line is not None
    if word == HEAD:
        channel.line.outgoing._words[0] = 12345
        push._loop.run_once(0)
    else:
        channel.line.incoming._words[8] = 1 << 60
        for _ in range(100):
            if peer.lost is None:
                push.send({}, to=peer, note=bytes(10_000))
    assert peer.lost is not None
    assert "its ring is broken" in caplog.text
    assert push.free_slots == 1  # what it may still be reading is not written again
    held.release()
    assert pull._loop.run_until(lambda: not pull._channels, timeout=1)


def test_an_end_hears_of_a_loss_after_the_send_that_noticed_it_and_may_close(run_dir: Path) -> None:
    with Loop() as loop, Pull(f"ipc://{run_dir}/x.sock", device="cpu", loop=loop) as pull:
        push = Push(slot_bytes=256, device="cpu", loop=loop)
        push.on_lost = lambda _: push.close()
        peer = push.connect(pull.endpoint)
        filling = push.allocate({"x": ("float32", (2,))}, to=peer)
        for _ in range(6):  # the seventh does not fit: only then the reader's position is read
            push.send({}, to=peer, note=bytes(10_000))
        (channel,) = pull._channels.values()
        assert channel.line is not None
        channel.line.incoming._words[8] = 1 << 60
        push.send(filling, to=peer, note=bytes(10_000))
        assert peer.lost is not None
        assert push._lanes
        assert loop.run_until(lambda: not push._lanes, timeout=1)
        filling.tensors.clear()  # the log's record of the error keeps its frames, and them the slab


def test_a_loop_that_spins_lets_other_threads_in() -> None:
    calls: list[int] = []
    with Loop(spin=5.0) as loop:
        thread = threading.Thread(
            target=lambda: [loop.call_soon(_appender(calls, n)) for n in range(100)]
        )
        thread.start()
        assert loop.run_until(lambda: len(calls) == 100, timeout=4.0)
        thread.join()
    assert calls == list(range(100))


def _appender(calls: list[int], number: int) -> Callable[[], None]:
    return lambda: calls.append(number)


@pytest.mark.parametrize(
    ("quiet", "seconds"),
    [
        ([], 1.0),
        ([0.5, 0.9], 1.0),
        ([1.2], 2.4),  # a longer look would have spared this sleep
        ([1.2, 2.0, 0.1], 2.4),
        ([1.2, 3.0], 4.0),  # no more than is allowed
        ([1.2, 5.0], 1.0),  # no allowed look would have spared this one
    ],
)
def test_how_long_to_look_out_is_learned(quiet: list[float], seconds: float) -> None:
    lookout = Lookout(1.0, 4.0)
    for each in quiet:
        lookout.learn(each)
    assert lookout.seconds == seconds


@given(st.lists(st.floats(0, 100)))
def test_nobody_who_does_not_want_to_looks_out(quiet: list[float]) -> None:
    lookout = Lookout(0.0, 0.0)
    for each in quiet:
        lookout.learn(each)
    assert lookout.seconds == 0.0
