"""One conformance suite for every carrier, between two real processes; and what can go wrong."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq
from hypothesis import given
from hypothesis import strategies as st

from tensormq import (
    Carrier,
    Doorbell,
    EndpointError,
    Histogram,
    Loop,
    NegotiationError,
    Peer,
    PeerLost,
    Pull,
    Push,
    Request,
    TensorTooLarge,
    Timeout,
    wire,
)

PEER = Path(__file__).with_name("tensormq_peer.py")
CARRIERS = [
    pytest.param((Carrier.SHM, "cpu"), id="shm"),
    pytest.param((Carrier.INLINE, "cpu"), id="inline"),
    pytest.param((Carrier.CUDA_IPC, "cuda:0"), id="cuda_ipc", marks=pytest.mark.gpu),
    pytest.param((Carrier.SHM, "cuda:0"), id="shm-of-a-gpu", marks=pytest.mark.gpu),
    pytest.param((Carrier.INLINE, "cuda:0"), id="inline-of-a-gpu", marks=pytest.mark.gpu),
]
DOORBELLS = pytest.mark.parametrize("doorbell", list(Doorbell))
DTYPES = ["float32", "float16", "bfloat16", "int64", "uint8", "bool", "complex64"]

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `tensormq_peer.py` in a role and wait until it is ready."""
    processes = []

    def begin(
        role: str,
        endpoint: str,
        reply: str,
        device: str,
        carrier: str = "any",
        doorbell: str = "ring",
    ):  # type: ignore[no-untyped-def]
        process = subprocess.Popen(
            [sys.executable, PEER, role, endpoint, reply, device, carrier, doorbell],
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def ends(run_dir: Path) -> Iterator[tuple[Pull, Push, Peer]]:
    """A Push connected to a Pull in one process, NumPy on both sides."""
    with Loop() as loop:
        pull = Pull(f"ipc://{run_dir}/pull.sock", loop=loop)
        push = Push(slots=2, slot_bytes=4096, loop=loop)
        yield pull, push, push.connect(pull.endpoint)
        pull.close()
        push.close()


def tensor_of(dtype: str, device: str) -> torch.Tensor:
    torch.manual_seed(0)
    values = torch.randn(3, 5, 2, device=device) * 40
    return values > 0 if dtype == "bool" else values.abs().to(getattr(torch, dtype))


@pytest.mark.slow
@DOORBELLS
@pytest.mark.parametrize("how", CARRIERS)
def test_conformance(
    how: tuple[Carrier, str], doorbell: Doorbell, run_dir: Path, start: Start
) -> None:
    """Every dtype, several tensors, odd shapes, metadata, back-pressure, to a process and back."""
    carrier, device = how
    there, back = f"ipc://{run_dir}/there.sock", f"ipc://{run_dir}/back.sock"
    process = start("echo", there, back, device, str(carrier), str(doorbell))
    with (
        Loop() as loop,
        Pull(back, device=device, loop=loop, doorbell=doorbell) as pull,
        Push(slots=3, slot_bytes=32 << 20, device=device, loop=loop, doorbell=doorbell) as push,
    ):
        peer = push.connect(there)
        assert peer.statistics.carrier is carrier
        inline = carrier is Carrier.INLINE
        assert peer.statistics.doorbell is (Doorbell.ZEROMQ if inline else doorbell)
        requests = (Request(7, 1, 2.5), Request(8, 2))

        def answer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            push.send(tensors, to=peer, requests=requests, route=5)
            with pull.recv(timeout=20) as message:
                assert message.note.decode() == str(carrier)
                assert message.requests == requests
                assert message.route == 5
                return {name: t.clone() for name, t in message.tensors.items()}

        for dtype in DTYPES:
            x = tensor_of(dtype, device)
            got = answer({"x": x})["x"].to(device)
            assert got.dtype == x.dtype
            assert torch.equal(got, ~x if dtype == "bool" else x * 2)
        shapes = [(), (0, 4), (1,), (2, 3, 4, 5), (1 << 20,)]
        mixed = {f"t{i}": torch.rand(shape, device=device) for i, shape in enumerate(shapes)}
        got = answer(mixed)
        assert all(torch.equal(got[name].to(device), t * 2) for name, t in mixed.items())
        transposed = torch.rand(6, 4, device=device).t()
        assert torch.equal(answer({"x": transposed})["x"].to(device), transposed * 2)
        # Every slot is overwritten many times while messages are under way.
        sent = [torch.full((1 << 18,), float(i), device=device) for i in range(40)]
        received = 0
        for x in sent:
            push.send({"x": x}, to=peer)
            while (message := pull.poll()) is not None:
                with message:
                    assert torch.equal(message.tensors["x"].to(device), sent[received] * 2)
                received += 1
        while received < len(sent):
            with pull.recv(timeout=20) as message:
                assert torch.equal(message.tensors["x"].to(device), sent[received] * 2)
            received += 1
        through_host = peer.statistics.host_bytes
        assert through_host == (0 if carrier is Carrier.CUDA_IPC else peer.statistics.bytes)
        push.send({}, to=peer, note=b"quit")
        while process.poll() is None:
            loop.run_once(0.05)
        assert process.returncode == 0
    pull_left = list(run_dir.iterdir())
    assert pull_left == []


def test_tensors_are_not_copied_by_the_carrier(ends: tuple[Pull, Push, Peer]) -> None:
    pull, push, peer = ends
    filling = push.allocate({"x": ("float32", (4,))}, to=peer)
    filling.tensors["x"][:] = 1.0
    push.send(filling, to=peer)
    with pull.recv(timeout=1) as message:
        filling.tensors["x"][2] = 9.0  # seen by the consumer: it is the same memory
        assert message.tensors["x"].tolist() == [1.0, 1.0, 9.0, 1.0]


def test_a_slot_remembers_neither_gradients_nor_inference_mode(run_dir: Path) -> None:
    with (
        Loop() as loop,
        Pull(f"ipc://{run_dir}/x.sock", device="cpu", loop=loop) as pull,
        Push(slots=1, slot_bytes=256, device="cpu", loop=loop) as push,
    ):
        peer = push.connect(pull.endpoint)

        def there_and_back(x: torch.Tensor) -> None:
            push.send({"x": x}, to=peer, timeout=1)
            with pull.recv(timeout=1) as message:
                got = message.tensors["x"]
                assert torch.equal(got, x)
                assert not got.requires_grad
                got.unsqueeze_(0)  # an object of this message alone

        with torch.inference_mode():
            there_and_back(torch.ones(3))
        there_and_back(torch.zeros(3, requires_grad=True) * 2)
        there_and_back(torch.full((3,), 7.0))
        (lane,) = push._lanes.values()
        filling = push.allocate({"x": ("float32", (3,))}, to=peer, timeout=1)
        for _, view in lane.views.own(filling._slot, filling._layout):
            assert view.grad_fn is None
            assert not view.is_inference()
        filling.abandon()


def test_statistics_of_a_channel(ends: tuple[Pull, Push, Peer]) -> None:
    pull, push, peer = ends
    for _ in range(5):
        push.send({"x": np.ones(2)}, to=peer, timeout=1)
        time.sleep(0.002)
        pull.recv(timeout=1).release()
    push.send({"x": np.ones(2)}, to=peer, timeout=1)
    with pull.recv(timeout=1):
        (counted,) = push.statistics()
        assert (counted.messages, counted.bytes, counted.host_bytes) == (6, 96, 96)
        assert (counted.slots_free, counted.slots_leased) == (1, 1)
        assert counted.hops.count == 5
        assert 0.0017 < counted.hops.quantile(0.5) <= counted.hops.quantile(0.99)


@given(st.lists(st.integers(0, wire.LONGEST_HOP - 1), min_size=1), st.floats(0.01, 1))
def test_quantiles_are_nearly_right(durations: list[int], share: float) -> None:
    histogram = Histogram()
    for duration in durations:
        histogram.add(duration)
    rank = math.ceil(share * len(durations))
    exact = sorted(durations)[rank - 1]
    assert histogram.quantile(share) * 1e9 == pytest.approx(exact, rel=0.15, abs=12)
    assert Histogram().quantile(share) == 0.0


def test_no_credit_no_message(ends: tuple[Pull, Push, Peer]) -> None:
    pull, push, peer = ends
    x = np.arange(6, dtype=np.int32)
    push.send({"x": x}, to=peer)
    push.send({"x": x + 1}, to=peer)
    with pytest.raises(Timeout, match="all 2 are held"):
        push.send({"x": x + 2}, to=peer, timeout=0.05)
    assert peer.statistics.waits_for_credit == 1
    with pull.recv(timeout=1) as message:
        assert message.tensors["x"].tolist() == list(range(6))
    push.send({"x": x + 2}, to=peer, timeout=1)
    assert push.leased_slots == 2


def test_a_message_without_tensors_needs_no_credit(ends: tuple[Pull, Push, Peer]) -> None:
    pull, push, peer = ends
    for _ in range(5):
        push.send({}, to=peer, note=b"failed")
    assert pull.recv(timeout=1).note == b"failed"
    assert push.leased_slots == 0


def test_what_does_not_fit_is_refused_before_anything_is_sent(
    ends: tuple[Pull, Push, Peer],
) -> None:
    pull, push, peer = ends
    with pytest.raises(TensorTooLarge, match=r"x float32\[2000\].*8000 bytes.*holds 4096"):
        push.send({"x": np.zeros(2000, np.float32)}, to=peer)
    assert push.free_slots == 2
    with pytest.raises(Timeout):
        pull.recv(timeout=0.05)


def test_one_slot_goes_to_several_consumers(run_dir: Path) -> None:
    with Loop() as loop, Push(slots=1, slot_bytes=4096, loop=loop) as push:
        pulls = [Pull(f"ipc://{run_dir}/{i}.sock", loop=loop) for i in range(3)]
        peers = [push.connect(pull.endpoint) for pull in pulls]
        push.send({"x": np.full(3, 5.0)}, to=peers)
        assert push.leased_slots == 1
        for pull in pulls:
            assert push.free_slots == 0
            with pull.recv(timeout=1) as message:
                assert message.tensors["x"].tolist() == [5.0] * 3
        assert loop.run_until(lambda: push.free_slots == 1, timeout=1)
        for pull in pulls:
            pull.close()


def test_several_producers_into_one_consumer(run_dir: Path) -> None:
    with Loop() as loop, Pull(f"ipc://{run_dir}/x.sock", loop=loop) as pull:
        pushes = [Push(slots=2, slot_bytes=256, loop=loop) for _ in range(3)]
        for i, push in enumerate(pushes):
            push.send({"x": np.array([i])}, to=push.connect(pull.endpoint), route=i)
        routes = set()
        for _ in pushes:
            with pull.recv(timeout=1) as message:
                assert message.tensors["x"].tolist() == [message.route]
                routes.add(message.route)
        assert routes == {0, 1, 2}
        for push in pushes:
            push.close()


@pytest.mark.slow
@DOORBELLS
@pytest.mark.parametrize("how", CARRIERS)
def test_a_killed_consumer_gives_its_slots_back(
    how: tuple[Carrier, str], doorbell: Doorbell, run_dir: Path, start: Start
) -> None:
    carrier, device = how
    endpoint = f"ipc://{run_dir}/hold.sock"
    process = start("hold", endpoint, "-", device, str(carrier), str(doorbell))
    lost: list[Peer] = []
    with Push(slots=3, slot_bytes=4096, device=device, doorbell=doorbell) as push:
        push.on_lost = lost.append
        peer = push.connect(endpoint)
        for _ in range(3):
            push.send({"x": torch.ones(4, device=device)}, to=peer)
        killed = time.monotonic()
        process.send_signal(signal.SIGKILL)
        assert push._loop.run_until(lambda: bool(lost), timeout=5)
        with pytest.raises(PeerLost, match="its process ended"):
            push.send({"x": torch.ones(4, device=device)}, to=peer, timeout=5)
        assert lost == [peer]
        assert time.monotonic() - killed < 1
        assert (push.leased_slots, push.free_slots) == (0, 3)
        process.wait()
        start(
            "hold", endpoint, "-", device, str(carrier), str(doorbell)
        )  # its successor joins at the same place
        push.send({"x": torch.ones(4, device=device)}, to=push.connect(endpoint))


@pytest.mark.slow
@DOORBELLS
@pytest.mark.parametrize("how", CARRIERS)
def test_what_a_killed_producer_sent_stays_whole(
    how: tuple[Carrier, str], doorbell: Doorbell, run_dir: Path, start: Start
) -> None:
    carrier, device = how
    with Pull(f"ipc://{run_dir}/in.sock", device=device, doorbell=doorbell) as pull:
        process = start("flood", pull.endpoint, "-", device, str(carrier), str(doorbell))
        last = 0.0
        for _ in range(20):
            with pull.recv(timeout=10) as message:
                last = message.tensors["n"][0].item()
        process.send_signal(signal.SIGKILL)
        process.wait()
        try:
            while True:
                with pull.recv(timeout=0.5) as message:
                    value = message.tensors["n"]
                    assert value.min().item() == value.max().item() == last + 1
                    last += 1
        except Timeout:
            pass
        assert pull.leases == 0
        assert pull._channels == {}
        start(
            "flood", pull.endpoint, "-", device, str(carrier), str(doorbell)
        )  # its successor starts anew
        with pull.recv(timeout=10) as message:
            assert message.tensors["n"][0].item() == 1.0


@pytest.mark.gpu
def test_what_a_killed_producer_did_not_complete_is_dropped(run_dir: Path, start: Start) -> None:
    with Pull(f"ipc://{run_dir}/in.sock", device="cuda:0") as pull:
        process = start("tear", pull.endpoint, "-", "cuda:0", "cuda_ipc")
        pull._loop.run_until(lambda: pull.waiting == 2, 10)
        process.kill()
        assert pull._loop.run_until(lambda: pull.torn == 1, 5)
        with pull.recv(timeout=0) as message:
            assert message.tensors["n"].tolist() == [1.0] * 4
        assert pull.waiting == pull.leases == 0
        assert pull._channels == {}


@pytest.mark.gpu
@pytest.mark.parametrize("told", [False, True])
def test_streams_that_wait_for_a_killed_producer(run_dir: Path, start: Start, told: bool) -> None:
    """They are let go; where somebody wants to be told, they wait until he has decided."""
    calls: list[None] = []
    with Pull(f"ipc://{run_dir}/in.sock", device="cuda:0") as pull:
        if told:
            pull.on_torn = lambda: calls.append(None)
        process = start("tear", pull.endpoint, "-", "cuda:0", "cuda_ipc")
        pull.recv(timeout=10).release()
        message = pull.recv(timeout=10)
        copy = message.tensors["n"].clone()
        done = torch.cuda.Event()
        done.record()
        time.sleep(0.2)
        assert not done.query()
        process.kill()
        assert pull._loop.run_until(lambda: pull.torn == 1, 5)
        if told:
            time.sleep(0.2)
            assert calls == [None]
            assert not done.query()
            (channel,) = pull._channels.values()
            channel.lift({message._slot: message._sequence})
        torch.cuda.synchronize()
        assert copy.shape == (4,)
        message.release()
        assert pull._channels == {}


@pytest.mark.gpu
def test_a_slot_that_a_killed_consumer_was_using_can_be_written(
    run_dir: Path, start: Start
) -> None:
    with Push(slots=1, slot_bytes=1 << 10, device="cuda:0") as push:
        process = start("cling", f"ipc://{run_dir}/out.sock", "-", "cuda:0", "cuda_ipc")
        peer = push.connect(f"ipc://{run_dir}/out.sock")
        push.send({"n": torch.ones(4, device="cuda:0")}, to=peer)
        # The credit comes back at once, the use goes on: this one waits on the GPU.
        push.send({"n": torch.zeros(4, device="cuda:0")}, to=peer, timeout=10)
        done = torch.cuda.Event()
        done.record()
        time.sleep(0.2)
        assert not done.query()
        process.kill()
        assert push._loop.run_until(lambda: peer.lost is not None, 5)
        torch.cuda.synchronize()
        assert push.free_slots == 1


def test_an_endpoint_cannot_be_stolen(run_dir: Path) -> None:
    endpoint = f"ipc://{run_dir}/a.sock"
    with Pull(endpoint), pytest.raises(EndpointError, match="in use"):
        Pull(endpoint)
    Pull(endpoint).close()


def test_an_endpoint_others_could_reach_is_refused(run_dir: Path) -> None:
    run_dir.chmod(0o755)
    with pytest.raises(EndpointError, match="mode 0700"):
        Pull(f"ipc://{run_dir}/a.sock")
    run_dir.chmod(0o700)
    with pytest.raises(EndpointError, match="absolute"):
        Pull("tcp://127.0.0.1:5555")
    with pytest.raises(EndpointError, match="107 bytes"):
        Pull(f"ipc://{run_dir}/{'x' * 120}.sock")
    with Pull(f"ipc://{run_dir}/a.sock"):
        assert (run_dir / "a.sock").stat().st_mode & 0o777 == 0o600


def test_nobody_there(run_dir: Path) -> None:
    with Push(slot_bytes=256) as push, pytest.raises(EndpointError, match="nobody answers"):
        push.connect(f"ipc://{run_dir}/nobody.sock", timeout=0.1)


def test_no_common_carrier(run_dir: Path) -> None:
    with (
        Loop() as loop,
        Pull(f"ipc://{run_dir}/a.sock", carriers=[Carrier.SHM], loop=loop) as pull,
        Push(slot_bytes=256, carriers=[Carrier.INLINE], loop=loop) as push,
        pytest.raises(NegotiationError, match="shm: the producer does not do it"),
    ):
        push.connect(pull.endpoint)


def test_a_consumer_that_leaves_is_noticed(ends: tuple[Pull, Push, Peer]) -> None:
    pull, push, peer = ends
    push.send({"x": np.ones(2)}, to=peer)
    pull.close()
    assert push._loop.run_until(lambda: peer.lost is not None, timeout=1)
    with pytest.raises(PeerLost):
        push.send({"x": np.ones(2)}, to=peer)
    assert peer.lost == "it closed its end"
    assert push.free_slots == 2


def test_hostile_frames_are_counted_and_nothing_else(ends: tuple[Pull, Push, Peer]) -> None:
    pull, push, peer = ends
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect(pull.endpoint)
    hello = wire.encode(wire.Hello(1, wire.Abilities(peer_process(), (Carrier.INLINE,))))
    spec = wire.Layout((wire.TensorSpec("x", "float32", (4,), 0),)).encoded
    offer = wire.Offer(1, Carrier.INLINE, 2, 256, wire.NoSlab())
    frames: list[list[bytes]] = [
        [b""],
        [b"x" * 100_000],
        [wire.encode(wire.Deliver(1, 1, 0, spec))],  # before Hello
        [hello],
        [hello],  # twice
        [wire.encode(wire.Deliver(1, 1, 0, spec))],  # before an offer
        [wire.encode(wire.Offer(1, Carrier.CUDA_IPC, 2, 256, wire.NoSlab()))],
        [wire.encode(offer)],
        [wire.encode(offer)],  # twice
        [wire.encode(wire.Deliver(1, 1, 0, spec))],  # no payload
        [wire.encode(wire.Deliver(1, 1, 0, spec)), b"short"],
        [wire.encode(wire.Deliver(2, 1, 0, spec)), bytes(16)],  # another epoch
        [wire.encode(wire.Deliver(1, 1, 2, spec)), bytes(16)],  # no such slot
        [wire.encode(wire.Deliver(1, 1, 0, spec)), bytes(16), b"three"],
    ]
    for frame in frames:
        stranger.send_multipart(frame)
    loop = pull._loop
    assert loop.run_until(lambda: pull.rejected == len(frames) - 2, timeout=2), pull.rejected
    push.send({"x": np.ones(2)}, to=peer)
    with pull.recv(timeout=1) as message:
        assert message.tensors["x"].tolist() == [1.0, 1.0]
    stranger.close()


def peer_process() -> wire.Process:
    from tensormq.process import this_process

    return this_process()


def test_a_channel_leaves_no_descriptor(run_dir: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with Loop() as loop, Pull(f"ipc://{run_dir}/a.sock", loop=loop) as pull:

        def round_trip() -> None:
            with Push(slots=2, slot_bytes=4096, loop=loop) as push:
                push.send({"x": np.ones(3)}, to=push.connect(pull.endpoint))
                pull.recv(timeout=1).release()

        round_trip()
        time.sleep(0.1)
        before = descriptors()
        for _ in range(20):
            round_trip()
        time.sleep(0.1)
        assert descriptors() <= before
        assert pull._channels == {}


def test_a_filling_goes_once_and_only_where_it_was_meant_to(run_dir: Path) -> None:
    with Loop() as loop, Pull(f"ipc://{run_dir}/a.sock", loop=loop) as pull:
        mine = Push(slots=2, slot_bytes=4096, loop=loop)
        other = Push(slots=2, slot_bytes=4096, loop=loop)
        peer, stranger = mine.connect(pull.endpoint), other.connect(pull.endpoint)
        filling = mine.allocate({"x": ("float32", (2,))}, to=peer)
        with pytest.raises(ValueError, match="allocated for"):
            other.send(filling, to=stranger)
        mine.send(filling, to=peer)
        with pytest.raises(ValueError, match="before"):
            mine.send(filling, to=peer)
        pull.recv(timeout=1).release()
        assert loop.run_until(lambda: mine.free_slots == 2, timeout=1)
        mine.close()
        other.close()


def test_a_descriptor_that_no_peer_would_parse_is_not_sent(ends: tuple[Pull, Push, Peer]) -> None:
    _, push, peer = ends
    for tensors in ({}, {"x": np.ones(2)}):
        with pytest.raises(TensorTooLarge, match="shorten the note"):
            push.send(tensors, to=peer, note=bytes(wire.MAX_FRAME))
    assert push.free_slots == 2


def test_names_that_differ_after_the_dot_are_different_endpoints(run_dir: Path) -> None:
    with Pull(f"ipc://{run_dir}/camera.left"), Pull(f"ipc://{run_dir}/camera.right"):
        pass
    with Push(slot_bytes=1) as push, pytest.raises(EndpointError, match="no endpoint"):
        push.connect("nonsense")
    with pytest.raises(ValueError, match="1 to 1024"):
        Push(slots=70_000, slot_bytes=1)
