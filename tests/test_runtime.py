"""Threads that serve blocks, in this process: what a worker does, without its process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from blockflow.artifact import Digest
from blockflow.block import Block
from blockflow.cores import available
from blockflow.errors import StartFailed
from blockflow.protocol import Hop, Note, Route, RouteId, Step, decode_note, encode
from blockflow.reconcile import BlockSpec
from blockflow.runtime import BlockThread, threads_for
from blockflow.topology import BlockName, PipelineName
from blockflow.wiring import Source
from tensormq import Loop, Message, Pull, Push, Request, TensorTooLarge, slot_size
from tensormq.wire import MAX_FRAME
from test_runner import X, program

DIGEST = Digest("sha256-" + "0" * 64)


class House:
    """Blocks `b0`, `b1`, ... in a chain, `groups` of which share a thread; and their client.

    On a GPU those of `replayed` have CUDA graphs.
    """

    def __init__(
        self,
        folder: Path,
        calls: Sequence[Callable[[Tensor], Tensor]],
        *groups: Sequence[int],
        device: str = "cpu",
        replayed: Collection[int] = (),
    ) -> None:
        self.fatal: list[str] = []
        specs = [
            BlockSpec(
                BlockName(f"b{index}"),
                DIGEST,
                device,
                max_batch=4,
                threads=1,
                cuda_graph=index in replayed,
            )
            for index in range(len(calls))
        ]
        endpoints = [f"ipc://{folder}/{index}.sock" for index in range(len(calls))]
        self.blocks: dict[int, Block] = {}
        self.threads: list[BlockThread] = []
        for group in groups:
            together: dict[str, Block] = {}
            for index in group:
                together[endpoints[index]] = self.blocks[index] = Block(
                    specs[index],
                    program(calls[index], output=X, device=device),
                    endpoints[index],
                    together,
                    slots=1,
                )
            self.threads.append(BlockThread(list(together.values()), self.fatal.append))
        self._loop = Loop()
        results = f"ipc://{folder}/results.sock"
        self._pull = Pull(results, device="cpu", loop=self._loop)
        before = [None, *(spec.name for spec in specs)]
        self.route = Route(
            RouteId(1),
            PipelineName("p"),
            tuple(
                Step(spec.name, endpoint, {"x": Source(source, "x")}, 4, (X,))
                for spec, endpoint, source in zip(specs, endpoints, before, strict=False)
            ),
            results,
            inputs=(X,),
            outputs=(X,),
            gives={"x": Source(specs[-1].name, "x")},
        )
        for thread in self.threads:
            thread.start().result(60)
        done = [thread.connect([self.route]) for thread in self.threads]
        while not all(future.done() for future in done):
            self._loop.run_once(0.02)  # the channels to us are opened from here, too
        for future in done:
            future.result()
        size = slot_size({"x": ("float32", (4, 3))})
        self._push = Push(slots=256, slot_bytes=size, device="cpu", loop=self._loop)
        self._peer = self._push.connect(endpoints[0])

    def send(self, number: int, x: Tensor, deadline: float = 0.0, note: bytes = b"") -> None:
        requests = (Request(number, len(x), deadline),)
        self._push.send({"x": x}, to=self._peer, requests=requests, route=1, note=note, timeout=30)

    def answers(self, count: int, seconds: float = 60) -> dict[int, Tensor | str]:
        """The next answers: a tensor, or what went wrong."""
        found: dict[int, Tensor | str] = {}
        while len(found) < count:
            assert self._loop.run_until(lambda: self._pull.waiting > 0, seconds), found.keys()
            message = self._pull.poll()
            assert message is not None
            with message:
                found |= dict(_read(message))
        return found

    def answers_all(self, added: float) -> None:
        """Of 200 requests at once, each with other rows, each gets what the chain adds to it."""
        asked = {n: torch.full((1 + n % 4, 3), float(n)) for n in range(200)}
        for number, x in asked.items():
            self.send(number, x)
        found = self.answers(len(asked))
        for number, x in asked.items():
            assert torch.equal(torch.as_tensor(found[number]), x + added)
        assert self.fatal == []

    def all_inputs_are_given_back(self) -> bool:
        lane = self._peer._lane
        assert lane is not None
        return self._loop.run_until(lambda: lane.pool.free == 256, 10)

    def close(self) -> None:
        for thread in self.threads:
            thread.stop()
        while not all(thread.join(0.01) for thread in self.threads):
            self._loop.run_once(0.01)
        self._push.close()
        self._pull.close()
        self._loop.close()


def _read(message: Message) -> Iterator[tuple[int, Tensor | str]]:
    error = decode_note(message.note).error
    start = 0
    for request in message.requests:
        if error is not None:
            yield request.id, error
        else:
            yield request.id, message.tensors["x"][start : start + request.rows].clone()
            start += request.rows


def plus(value: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x + value


def busy_house(directory: Path) -> tuple[House, threading.Event]:
    """With one block, which adds 1 and is computing request 0 until the event is set."""
    began, gate = threading.Event(), threading.Event()
    gate.set()

    def held(x: Tensor) -> Tensor:
        began.set()
        assert gate.wait(30)
        return x + 1

    house = House(directory, [held], (0,))
    began.clear()
    gate.clear()
    house.send(0, torch.zeros(1, 3))
    assert began.wait(30)
    return house, gate


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.mark.parametrize(
    "groups", [[(0,), (1,), (2,), (3,)], [(0, 1, 2, 3)], [(3, 1, 0, 2)], [(0, 2), (1, 3)]], ids=str
)
def test_whoever_shares_a_thread_all_requests_are_answered(
    directory: Path, groups: list[Sequence[int]]
) -> None:
    """With one slot to the next block, and many more requests than that at once."""
    house = House(directory, [plus(1), plus(10), plus(100), plus(1000)], *groups)
    house.answers_all(1111)
    house.close()


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_blocks_that_are_called_share_a_stream(directory: Path) -> None:
    """And hand over to each other as to those that are replayed on streams of their own."""
    calls = [plus(1), plus(10), plus(100), plus(1000), plus(10000)]
    house = House(directory, calls, range(5), device="cuda:0", replayed={2, 4})
    streams = [house.blocks[index]._stream for index in range(5)]
    assert streams[0] is streams[1] is streams[3]
    assert len({id(each) for each in streams}) == 3
    house.answers_all(11111)
    house.close()


def test_a_block_that_waits_for_room_does_not_stop_those_of_its_thread(directory: Path) -> None:
    """b0 and b2 share a thread; b1, between them, computes only when it is told to."""
    gate = threading.Event()
    gate.set()  # it warms up

    def held(x: Tensor) -> Tensor:
        assert gate.wait(30)
        return x

    house = House(directory, [plus(1), held, plus(100)], (0, 2), (1,))
    house.send(0, torch.zeros(1, 3))
    house.answers(1)
    gate.clear()
    for number in range(1, 9):
        house.send(number, torch.zeros(4, 3))
    # b0 has handed on what there is room for, and sits on outputs that nobody takes yet.
    deadline = time.monotonic() + 30
    while not house.blocks[0]._outbox:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    done = threading.Event()
    house.threads[0]._loop.call_soon(done.set)
    assert done.wait(5)
    gate.set()
    assert set(house.answers(8)) == set(range(1, 9))
    house.close()


def test_what_waits_for_room_beyond_its_deadline_fails_and_the_rest_goes_on(
    directory: Path,
) -> None:
    gate = threading.Event()
    gate.set()

    def held(x: Tensor) -> Tensor:
        assert gate.wait(30)
        return x

    house = House(directory, [plus(1), held], (0,), (1,))
    house.send(0, torch.zeros(1, 3))
    house.answers(1)
    gate.clear()
    house.send(1, torch.zeros(4, 3))  # is being computed, in the one slot
    house.send(2, torch.zeros(4, 3), time.monotonic() + 0.3)  # waits for that slot
    house.send(3, torch.zeros(4, 3))
    house.send(4, torch.zeros(4, 3), time.monotonic() + 0.3)
    assert house.answers(2) == {
        2: "the deadline passed while block b0 waited for the next block",
        4: "the deadline passed before block b0 could begin",
    }
    gate.set()
    assert set(house.answers(2)) == {1, 3}
    house.close()


def test_a_batch_that_fails_is_computed_one_by_one(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()
    gate.set()

    def delicate(x: Tensor) -> Tensor:
        assert gate.wait(30)
        if (x == 13).any():
            raise ArithmeticError("thirteen")
        return x

    house = House(directory, [delicate], (0,))
    gate.clear()
    house.send(0, torch.zeros(1, 3))
    for number in range(1, 5):
        house.send(number, torch.full((1, 3), 13.0 if number == 3 else 1.0))
    gate.set()
    found = house.answers(5)
    assert found[3] == "block b0 failed: ArithmeticError: thirteen"
    assert all(isinstance(found[number], Tensor) for number in (0, 1, 2, 4))
    end = time.monotonic() + 10
    # Counted once they are on their way.
    while (report := house.blocks[0].reports()[0]).requests != {"p": 5}:
        assert time.monotonic() < end, report
    assert report.failures == 1
    house.close()
    caplog.clear()  # the traceback holds on to what it passed through


def test_outputs_of_another_dtype_or_shape_fail_their_request_alone(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A TorchScript model may decide by its data what it gives."""

    def moody(x: Tensor) -> Tensor:
        if (x > 19).any():
            return x.to_sparse()
        if (x > 9).any():
            return x.int()
        return x[:, :2] if (x < 0).any() else x

    house = House(directory, [moody], (0,))
    for number, value in enumerate((1.0, 10.0, -1.0, 2.0, 20.0)):
        house.send(number, torch.full((1, 3), value))
    found = house.answers(5)
    promised = "and should give torch.float32 [1, 3]"
    assert found.pop(1) == f"block b0 gave x as torch.int32 [1, 3] {promised}"
    assert found.pop(2) == f"block b0 gave x as torch.float32 [1, 2] {promised}"
    assert "as a torch.sparse_coo tensor" in str(found.pop(4))
    assert {n: torch.as_tensor(x).unique().tolist() for n, x in found.items()} == {0: [1], 3: [2]}
    house.close()
    caplog.clear()


def test_what_cannot_be_sent_fails_once_and_the_block_goes_on(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Times of requests that do not fit into one message: of two together, and of one with one hop
    more."""

    def timed(size: int) -> bytes:
        return encode(Note(hops=((Hop(BlockName("b" * size), 0.0, 0.0, 0.0),),)))

    house, gate = busy_house(directory)
    for number in (1, 2):
        house.send(number, torch.zeros(1, 3), note=timed(MAX_FRAME * 2 // 3))
    gate.set()
    found = house.answers(3)
    for size in range(MAX_FRAME, 0, -8):  # as much as one message carries
        with contextlib.suppress(TensorTooLarge):
            house.send(3, torch.zeros(1, 3), note=timed(size))
            break
    found |= house.answers(1)
    for number in (1, 2, 3):
        assert str(found.pop(number)).startswith(
            "block b0 failed: TensorTooLarge: the descriptor has "
        )
    house.send(4, torch.zeros(1, 3))
    found |= house.answers(1)  # of the others nothing more has come before it
    assert {n: torch.as_tensor(x).unique().tolist() for n, x in found.items()} == {0: [1], 4: [1]}
    assert house.all_inputs_are_given_back()
    assert house.fatal == []
    assert house.blocks[0].reports()[0].failures == 3
    house.close()
    caplog.clear()  # the traceback holds on to what it passed through


def test_times_of_more_requests_than_one_message_has_room_for(directory: Path) -> None:
    house, gate = busy_house(directory)
    past = encode(Note(hops=((Hop(BlockName("b" * 63), 0.1, 0.1, 0.1),) * 800,)))
    assert len(past) > MAX_FRAME / 2
    for number in (1, 2):
        house.send(number, torch.full((1, 3), float(number)), note=past)
    gate.set()
    found = house.answers(3)
    assert {n: torch.as_tensor(x).unique().tolist() for n, x in found.items()} == {
        n: [n + 1] for n in range(3)
    }
    house.close()


def test_a_block_that_cannot_start_is_named(directory: Path) -> None:
    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    first = BlockSpec(BlockName("good"), DIGEST, "cpu", max_batch=1)
    second = BlockSpec(BlockName("bad"), DIGEST, "cpu", max_batch=1)
    blocks = [
        Block(first, program(plus(1), output=X), f"ipc://{directory}/0.sock", {}),
        Block(second, program(broken, output=X), f"ipc://{directory}/1.sock", {}),
    ]
    thread = BlockThread(blocks, pytest.fail)
    with pytest.raises(StartFailed, match="block bad cannot start: no such kernel"):
        thread.start().result(60)
    assert thread.join(10)


def test_blocks_share_a_thread_unless_they_are_to_have_a_part_of_the_cores() -> None:
    def names(device: str, **settings: object) -> list[str]:
        specs = [
            BlockSpec(BlockName("b0"), DIGEST, device, max_batch=1),
            msgspec.structs.replace(
                BlockSpec(BlockName("b1"), DIGEST, device, max_batch=1), **settings
            ),
            BlockSpec(BlockName("b2"), DIGEST, device, max_batch=1, threads=available()),
        ]
        blocks = [Block(each, program(plus(1), output=X), "ipc:///nowhere", {}) for each in specs]
        return [thread.name for thread in threads_for(blocks, pytest.fail)]

    assert names("cuda:0") == ["b0, b1, b2"]
    assert names("cpu") == ["b0, b1, b2"]
    assert names("cpu", cpus=(0,)) == ["b0, b2", "b1"]
    if available() > 1:
        assert names("cpu", threads=1) == ["b0, b2", "b1"]
    assert threads_for([], pytest.fail) == []
