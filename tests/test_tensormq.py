"""One conformance suite for every carrier, between two real processes; and what can go wrong."""

from __future__ import annotations

import logging
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
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
    load_keys,
    make_keys,
    wire,
)

PEER = Path(__file__).with_name("tensormq_peer.py")


class How(NamedTuple):
    """By which carrier, doorbell and transport tensors of which device go.

    `elsewhere` is the device of the other process, where it is another.
    """

    carrier: Carrier
    device: str = "cpu"
    doorbell: Doorbell = Doorbell.RING
    tcp: bool = False
    elsewhere: str | None = None

    def endpoint(self, run_dir: Path) -> str:
        return "tcp://127.0.0.1:*" if self.tcp else f"ipc://{run_dir}/{time.monotonic_ns()}"


PEER_GPU = pytest.param(
    How(Carrier.CUDA_IPC, "cuda:0", elsewhere="cuda:1"),
    id="cuda_ipc-of-a-peer-gpu",
    marks=[pytest.mark.gpu, pytest.mark.two_gpus],
)
HOWS = pytest.mark.parametrize(
    "how",
    [
        pytest.param(How(Carrier.SHM), id="shm"),
        pytest.param(How(Carrier.SHM, doorbell=Doorbell.ZEROMQ), id="shm-zeromq"),
        pytest.param(How(Carrier.INLINE), id="inline"),
        pytest.param(How(Carrier.INLINE, tcp=True), id="inline-tcp"),
        *(
            pytest.param(how, id=name, marks=pytest.mark.gpu)
            for name, how in {
                "cuda_ipc": How(Carrier.CUDA_IPC, "cuda:0"),
                "cuda_ipc-zeromq": How(Carrier.CUDA_IPC, "cuda:0", Doorbell.ZEROMQ),
                "shm-of-a-gpu": How(Carrier.SHM, "cuda:0"),
                "inline-of-a-gpu": How(Carrier.INLINE, "cuda:0"),
                "inline-tcp-of-a-gpu": How(Carrier.INLINE, "cuda:0", tcp=True),
            }.items()
        ),
        PEER_GPU,
    ],
)
DTYPES = ["float32", "float16", "bfloat16", "int64", "uint8", "bool", "complex64"]


class Other:
    """The other process, in one of its roles, and the ends of this one that go with it."""

    def __init__(self, how: How, run_dir: Path, keys: Path) -> None:
        self.how = how
        self.endpoint = ""
        self._run_dir = run_dir
        self._keys = keys
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, role: str, endpoint: str = "", reply: str = "-") -> subprocess.Popen[str]:
        """Start it, at `endpoint` or one of its own, and wait until it is ready."""
        process = subprocess.Popen(
            [
                *(sys.executable, PEER, role, endpoint or self.how.endpoint(self._run_dir), reply),
                self.how.elsewhere or self.how.device,
                *(self.how.carrier, self.how.doorbell),
                str(self._keys) if self.how.tcp else "-",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        assert process.stdout is not None
        ready, _, self.endpoint = process.stdout.readline().strip().partition(" ")
        assert ready == "ready"
        return process

    def pull(self, loop: Loop | None = None) -> Pull:
        """A Pull end that the other process may send to."""
        endpoint = self.how.endpoint(self._run_dir)
        device, doorbell = self.how.device, self.how.doorbell
        if not self.how.tcp:
            return Pull(endpoint, device=device, doorbell=doorbell, loop=loop)
        keys, theirs = load_keys(self._keys / "here"), load_keys(self._keys / "there").public
        return Pull(endpoint, device=device, loop=loop, keys=keys, allowed_keys=[theirs])

    def push(self, slots: int, slot_bytes: int, loop: Loop | None = None) -> Push:
        how = self.how
        return Push(
            slots=slots, slot_bytes=slot_bytes, device=how.device, doorbell=how.doorbell, loop=loop
        )

    def connect(self, push: Push) -> Peer:
        if not self.how.tcp:
            return push.connect(self.endpoint)
        keys, theirs = load_keys(self._keys / "here"), load_keys(self._keys / "there").public
        return push.connect(self.endpoint, keys=keys, server_key=theirs)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def other(how: How, run_dir: Path, tmp_path: Path) -> Iterator[Other]:
    for name in ("here", "there"):
        make_keys(tmp_path / name)
    other = Other(how, run_dir, tmp_path)
    yield other
    other.end()


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
@HOWS
def test_conformance(how: How, run_dir: Path, other: Other) -> None:
    """Every dtype, several tensors, odd shapes, metadata, back-pressure, to a process and back."""
    carrier, device, doorbell = how.carrier, how.device, how.doorbell
    with (
        Loop() as loop,
        other.pull(loop) as pull,
        other.push(slots=3, slot_bytes=32 << 20, loop=loop) as push,
    ):
        process = other.start("echo", reply=pull.endpoint)
        peer = other.connect(push)
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
        # Every slot is overwritten many times while messages are under way. No more of them than
        # both ends have slots: the other process does not read on while all of its own are held.
        sent = [torch.full((1 << 18,), float(i), device=device) for i in range(40)]
        received = 0

        def take() -> None:
            nonlocal received
            with pull.recv(timeout=20) as message:
                assert torch.equal(message.tensors["x"].to(device), sent[received] * 2)
            received += 1

        for number, x in enumerate(sent):
            while number - received > 5:
                take()
            push.send({"x": x}, to=peer)
        while received < len(sent):
            take()
        # A tensor that came through host memory is copied to the GPU behind the consumer's back.
        assert loop.run_until(lambda: not pull.statistics()[0].leases, timeout=5)
        (taken,) = pull.statistics()
        assert (taken.producer, taken.carrier) == (process.pid, carrier)
        assert taken.doorbell is peer.statistics.doorbell
        assert taken.messages == peer.statistics.messages == taken.hops.count
        assert taken.bytes == peer.statistics.bytes
        assert (taken.waiting, taken.leases, taken.oldest_lease) == (0, 0, 0.0)
        for counted in (taken, peer.statistics):
            assert counted.host_bytes == (0 if carrier is Carrier.CUDA_IPC else counted.bytes)
        push.send({}, to=peer, note=b"quit")
        while process.poll() is None:
            loop.run_once(0.05)
        assert process.returncode == 0
    assert list(run_dir.iterdir()) == []


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


def test_no_tensor_object_is_lent_twice(ends: tuple[Pull, Push, Peer]) -> None:
    """They are made ahead, and whoever was lent one may have changed what it says of itself."""
    pull, push, peer = ends
    lent: list[Any] = []
    for number in range(6):
        filling = push.allocate({"x": ("float32", (2,))}, to=peer, timeout=1)
        lent.append(filling.tensors["x"])
        filling.tensors["x"][:] = number
        push.send(filling, to=peer)
        with pull.recv(timeout=1) as message:
            lent.append(message.tensors["x"])
            assert message.tensors["x"].tolist() == [number, number]
    assert len({id(tensor) for tensor in lent}) == len(lent)


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
        (taken,) = pull.statistics()
        assert (taken.messages, taken.bytes, taken.host_bytes) == (6, 96, 96)
        assert taken.hops.count == 6


def test_a_message_knows_its_hop(ends: tuple[Pull, Push, Peer]) -> None:
    pull, push, peer = ends
    push.send({"x": np.ones(2)}, to=peer, timeout=1)
    time.sleep(0.002)
    with pull.recv(timeout=1) as message:
        assert message.hop is not None
        assert 0.0019 < message.hop < 10
    push.send({}, to=peer, note=b"nothing to wait for", timeout=1)
    with pull.recv(timeout=1) as message:
        assert message.hop is None


def test_a_consumer_that_keeps_a_message_shows_it(ends: tuple[Pull, Push, Peer]) -> None:
    pull, push, peer = ends
    for _ in range(2):
        push.send({"x": np.ones(2)}, to=peer, timeout=1)
    kept = pull.recv(timeout=1)
    time.sleep(0.02)
    (taken,) = pull.statistics()
    assert (taken.leases, taken.waiting) == (2, 1)
    assert taken.oldest_lease > 0.02
    pull.recv(timeout=1).release()
    (taken,) = pull.statistics()
    assert (taken.leases, taken.waiting, pull.leases) == (1, 0, 1)
    assert taken.oldest_lease > 0.02
    assert push._loop.run_until(lambda: push.free_slots == 1, timeout=1)
    (counted,) = push.statistics()
    assert counted.slots_leased == 1
    kept.release()
    (taken,) = pull.statistics()
    assert (taken.leases, taken.oldest_lease) == (0, 0.0)


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
@HOWS
def test_a_killed_consumer_gives_its_slots_back(how: How, other: Other) -> None:
    process = other.start("hold")
    lost: list[Peer] = []
    with other.push(slots=3, slot_bytes=4096) as push:
        push.on_lost = lost.append
        peer = other.connect(push)
        x = torch.ones(4, device=how.device)
        for _ in range(3):
            push.send({"x": x}, to=peer)
        killed = time.monotonic()
        process.send_signal(signal.SIGKILL)
        assert push._loop.run_until(lambda: bool(lost), timeout=5)
        why = "the connection to it ended" if how.tcp else "its process ended"
        with pytest.raises(PeerLost, match=why):
            push.send({"x": x}, to=peer, timeout=5)
        assert lost == [peer]
        assert time.monotonic() - killed < 1
        assert (push.leased_slots, push.free_slots) == (0, 3)
        process.wait()
        other.start("hold", other.endpoint)  # its successor joins at the same place
        push.send({"x": x}, to=other.connect(push))


@pytest.mark.slow
@HOWS
def test_what_a_killed_producer_sent_stays_whole(how: How, other: Other) -> None:
    with other.pull() as pull:
        process = other.start("flood", pull.endpoint)
        last = 0.0
        for _ in range(20):
            with pull.recv(timeout=10) as message:
                last = message.tensors["n"][0].item()
        (channel,) = pull._channels.values()
        process.send_signal(signal.SIGKILL)
        # What was announced and is not complete is dropped then.
        assert pull._loop.run_until(lambda: channel.ending, 5)
        try:
            while True:
                with pull.recv(timeout=0.5) as message:
                    value = message.tensors["n"]
                    assert value.min().item() == value.max().item() == last + 1
                    last += 1
        except Timeout:
            pass
        assert pull.leases == 0
        assert pull._loop.run_until(lambda: not pull._channels, 5)
        other.start("flood", pull.endpoint)  # its successor starts anew
        with pull.recv(timeout=10) as message:
            assert message.tensors["n"][0].item() == 1.0


ON_A_GPU = pytest.mark.parametrize(
    "how", [pytest.param(How(Carrier.CUDA_IPC, "cuda:0"), id="cuda_ipc"), PEER_GPU]
)


@pytest.mark.gpu
@ON_A_GPU
def test_what_a_killed_producer_did_not_complete_is_dropped(how: How, other: Other) -> None:
    with other.pull() as pull:
        process = other.start("tear", pull.endpoint)
        pull._loop.run_until(lambda: pull.waiting == 2, 10)
        process.kill()
        assert pull._loop.run_until(lambda: pull.torn == 1, 5)
        with pull.recv(timeout=0) as message:
            assert message.tensors["n"].tolist() == [1.0] * 4
        assert pull.waiting == pull.leases == 0
        assert pull._loop.run_until(lambda: not pull._channels, 5)


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("told", [False, True])
def test_streams_that_wait_for_a_killed_producer(how: How, other: Other, told: bool) -> None:
    """They are let go; where somebody wants to be told, they wait until he has decided."""
    calls: list[None] = []
    with other.pull() as pull:
        if told:
            pull.on_torn = lambda: calls.append(None)
        process = other.start("tear", pull.endpoint)
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
            channel._device.let_go()
        torch.cuda.synchronize()
        assert copy.shape == (4,)
        message.release()
        assert pull._loop.run_until(lambda: not pull._channels, 5)


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda x: x.tolist(), id="read"),
        # More than a stream that waits has room for.
        pytest.param(lambda x: [x + number for number in range(5000)], id="launch"),
    ],
)
def test_whose_thread_waits_for_a_killed_producer_goes_on(
    how: How, other: Other, use: Callable[[torch.Tensor], object]
) -> None:
    with other.pull() as pull:
        process = other.start("tear", pull.endpoint)
        pull.recv(timeout=10).release()
        with pull.recv(timeout=10) as message:
            process.kill()
            killed = time.monotonic()
            # In the loop's thread, which hears of nothing meanwhile.
            use(message.tensors["n"])
            torch.cuda.current_stream().synchronize()
            assert time.monotonic() - killed < 2
            assert (message.torn, pull.torn) == (True, 0)
            assert pull._loop.run_until(lambda: pull.torn == 1, 5)
        assert pull._loop.run_until(lambda: not pull._channels, 5)


@pytest.mark.gpu
@ON_A_GPU
def test_a_producer_that_dies_while_the_memory_of_another_is_given_up(
    how: How, other: Other
) -> None:
    """Far more is launched than a stream that waits has room for: launches wait, too."""
    with other.pull() as pull:
        first, second = (other.start(role, pull.endpoint) for role in ("flood", "labour"))

        def compute(seconds: float) -> None:
            """On whatever comes; content that is still to come keeps the stream waiting."""
            end = time.monotonic() + seconds
            while (left := end - time.monotonic()) > 0:
                try:
                    with pull.recv(timeout=left) as message:
                        message.tensors["n"].sum()
                except Timeout:
                    return

        assert pull._loop.run_until(lambda: len(pull._channels) == 2, 20)
        compute(0.5)
        first.kill()
        compute(0.08)
        second.kill()
        compute(1)
        assert pull._loop.run_until(lambda: not pull._channels, 5)
        torch.cuda.synchronize()
        assert pull.leases == 0


@pytest.mark.gpu
@ON_A_GPU
def test_a_slot_that_a_killed_consumer_was_using_can_be_written(how: How, other: Other) -> None:
    with other.push(slots=1, slot_bytes=1 << 10) as push:
        process = other.start("cling")
        peer = other.connect(push)
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


@pytest.mark.gpu
@pytest.mark.parametrize(
    "source",
    [
        lambda x: x,
        lambda x: x.T.contiguous().T,  # in one piece, and not in the order of its rows
        lambda x: x[:1].expand(6, -1),
        lambda x: x.conj(),
        lambda x: x.conj().imag.T.contiguous().T,
        lambda x: x.real.clone().requires_grad_(),
        lambda x: x.cpu(),
        lambda x: x.cpu().pin_memory(),
        lambda x: x.cpu().T.contiguous().T,
        lambda x: x.cpu().numpy(),
    ],
)
@pytest.mark.parametrize("stream", [None, torch.cuda.Stream])
@pytest.mark.parametrize("place", ["cuda:0", "cpu"])
def test_a_copy_is_equal_however_the_original_lies(
    source: Callable[[torch.Tensor], torch.Tensor | np.ndarray[Any, Any]],
    stream: Callable[[], torch.cuda.Stream] | None,
    place: str,
) -> None:
    from tensormq.cuda import copy

    original = source(torch.randn(6, 5, dtype=torch.complex64, device="cuda:0"))
    expected = torch.as_tensor(original).detach().cpu().resolve_conj().resolve_neg()
    found = torch.zeros(expected.shape, dtype=expected.dtype, device=place)
    with torch.cuda.stream(None if stream is None else stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        copy(found, original)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(found.cpu(), expected)
    assert not found.requires_grad


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
        Pull("ipc://a.sock")
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


def test_what_cannot_be_shared_falls_back_with_one_line_of_why(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tensormq")
    with (
        Loop() as loop,
        Pull(f"ipc://{run_dir}/a.sock", loop=loop) as pull,
        Push(slot_bytes=256, loop=loop) as push,
    ):
        push.connect(pull.endpoint)
        assert not caplog.messages  # nothing better than shm was in question
        process = push._abilities.process
        far = msgspec.structs.replace(process.host, pid_namespace="pid:[of another container]")
        push._abilities = msgspec.structs.replace(
            push._abilities, process=msgspec.structs.replace(process, host=far)
        )
        assert push.connect(pull.endpoint).statistics.carrier is Carrier.INLINE
        (line,) = caplog.messages
        assert line.startswith(f"{pull.endpoint} is reached by inline (shm: the ends are on")
        push.connect(pull.endpoint, carriers=[Carrier.INLINE])  # it gets what it asks for
        assert len(caplog.messages) == 1


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
        [wire.encode(wire.Deliver(1, 1, 0, spec)), bytes(257)],  # more than a slot holds
        [wire.encode(wire.Deliver(1, 1, 0, spec)), bytes(16)],
        [wire.encode(wire.Deliver(1, 2, 0, spec)), bytes(16)],  # into a slot that is leased
    ]
    honest = 3  # Hello, an offer and a message
    for frame in frames:
        stranger.send_multipart(frame)
    loop = pull._loop
    assert loop.run_until(lambda: pull.rejected == len(frames) - honest, timeout=2), pull.rejected
    pull.recv(timeout=1).release()
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
        assert pull._loop.run_until(lambda: not pull._channels, 5)


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
