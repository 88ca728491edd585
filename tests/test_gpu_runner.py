"""CUDA graphs: what they compute, and that nobody's tensors are overwritten."""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blockflow.artifact import Port, Store
from blockflow.backends import rounding_to_tf32
from blockflow.compilation import compiled
from blockflow.cuts import Analysis
from blockflow.export import export
from blockflow.measure import Measure
from blockflow.models import ModuleSource, resolve
from blockflow.program import Chain, Program, load
from blockflow.protocol import MACHINE_CODE
from blockflow.runner import GraphRunner, Loan, Runner, prepare
from blockflow.split import split_model
from blockflow.topology import Precision
from running import Server, four_blocks, store_model, wait_for
from test_runner import program

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

DEVICE = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def stream() -> Iterator[torch.cuda.Stream]:
    """A block's stream: graphs are not captured on the default one."""
    mine = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(mine):
        yield mine
    torch.cuda.synchronize(DEVICE)


class Net(nn.Module):
    """float32[batch, 3, 16, 16] → float32[batch, 5]; like a network's start and its end."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 16, 3)
            self.bn = nn.BatchNorm2d(16)
            self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))  # type: ignore[no-any-return]


IMAGE, SCORES = Port("x", "float32", ("batch", 3, 16, 16)), Port("y", "float32", ("batch", 5))


def on_gpu(call: Callable[..., Tensor], *inputs: Port, output: Port | None = None) -> Program:
    outputs = {} if output is None else {"output": output}
    return program(call, *inputs, device=str(DEVICE), **outputs)


def net() -> Program:
    return on_gpu(Net().eval().to(DEVICE), IMAGE, output=SCORES)


def run(runner: Runner, *parts: Tensor) -> Tensor:
    runner.take({"x": parts})
    return runner.run()["y"].clone()


def test_a_graph_gives_what_a_call_gives_for_every_number_of_rows() -> None:
    called = net()
    runner = prepare(called, 6)
    assert (runner.kind, runner.reason) == ("cuda graph", None)
    # Downwards as well: what larger batches leave behind must not matter to smaller ones.
    for rows in (*range(1, 7), *range(6, 0, -1)):
        x = torch.randn(rows, 3, 16, 16, device=DEVICE)
        if rows == 6:
            x[-1, 0, 0, 0] = float("nan")  # it stays in what will be the padding
        found, expected = run(runner, x), called({"x": x})["y"]
        assert found.shape == (rows, 5)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2, equal_nan=True)
        cut = rows // 2
        if cut:
            again = run(runner, x[:cut], x[cut:].cpu().pin_memory())
            torch.testing.assert_close(again, found, rtol=0, atol=0, equal_nan=True)


def test_what_does_not_fit_is_refused_and_the_next_batch_is_right() -> None:
    runner = prepare(net(), 4)
    x = torch.randn(4, 3, 16, 16, device=DEVICE)
    expected = run(runner, x)
    for wrong in (x[..., :1], x.double(), torch.cat([x, x]), x[:, :1]):
        with pytest.raises(ValueError, match=r"x is torch|a batch has 8 rows and may have 4"):
            runner.take({"x": [wrong]})
    assert torch.equal(run(runner, x), expected)


def test_a_program_without_a_batch_has_one_graph() -> None:
    fixed = Port("x", "float32", (2, 3))
    runner = prepare(on_gpu(lambda x: x.sum(0) * 2, fixed, output=Port("y", "float32", (3,))), 8)
    assert runner.kind == "cuda graph"
    assert run(runner, torch.ones(2, 3, device=DEVICE)).tolist() == [4.0, 4.0, 4.0]


def _waits(x: Tensor) -> Tensor:
    return x * (1 if x.sum().item() > 0 else 2)


def _normalizes_over_the_batch(x: Tensor) -> Tensor:
    return x - x.mean(0, keepdim=True)


def _draws(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (_waits, "it cannot be captured: RuntimeError: .*synchroniz"),
        (_normalizes_over_the_batch, "replayed, y is another than when it is called"),
        (_draws, "replayed, y is another than when it is called"),
    ],
)
def test_what_cannot_be_replayed_is_called_and_says_why(
    call: Callable[[Tensor], Tensor], why: str
) -> None:
    runner = prepare(on_gpu(call), 4)
    assert runner.kind == "eager"
    assert runner.reason is not None
    assert re.match(why, runner.reason)
    if call is not _draws:
        x = torch.randn(3, 3, device=DEVICE)
        assert torch.equal(run(runner, x), call(x))
    # Nothing of the failure stays behind.
    assert prepare(net(), 2).kind == "cuda graph"


def test_a_capture_that_fails_leaves_the_allocator_as_it_was() -> None:
    def fails_when_captured(x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(DEVICE)
        return x * 2

    runner = prepare(on_gpu(fails_when_captured), 2)
    assert runner.kind == "eager"
    assert "it cannot be captured" in str(runner.reason)
    assert run(runner, torch.ones(2, 3, device=DEVICE)).sum().item() == 12
    # Memory that two streams have used must come back: during a capture it would not.
    other = torch.cuda.Stream(DEVICE)
    torch.cuda.synchronize(DEVICE)
    before = torch.cuda.memory_reserved(DEVICE)
    for _ in range(50):
        block = torch.empty(8 << 20, dtype=torch.uint8, device=DEVICE)
        block.record_stream(other)
        del block
        torch.cuda.synchronize(DEVICE)
    assert torch.cuda.memory_reserved(DEVICE) - before <= 64 << 20
    assert prepare(net(), 2).kind == "cuda graph"


def test_graphs_can_be_turned_off() -> None:
    runner = prepare(net(), 2, graphs=False)
    assert (runner.kind, runner.reason) == ("eager", "cuda_graph is off")


def test_a_mere_view_is_captured_apart_from_its_input() -> None:
    runner = prepare(on_gpu(lambda x: x), 2)
    assert runner.kind == "cuda graph"
    runner.take({"x": [torch.ones(2, 3, device=DEVICE)]})
    kept = runner.run()["y"]
    runner.take({"x": [torch.zeros(2, 3, device=DEVICE)]})
    assert kept.sum().item() == 6


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("fp32", 1e-5), ("tf32", 1e-2), ("fp16", 1e-2), ("bf16", 5e-2)],
)
def test_every_precision_is_replayed_within_its_tolerance(
    tmp_path: Path, precision: Precision, tolerance: float, channels_last: bool
) -> None:
    model = Net().eval()
    store = Store(tmp_path / "store", create=True)
    (digest,) = store_model(store, model, 1, IMAGE)
    settings = {"precision": precision, "channels_last": channels_last}
    runner = prepare(load(store, digest, DEVICE, **settings), 4)
    assert (runner.kind, runner.reason) == ("cuda graph", None)
    for rows in (1, 3, 4):
        x = torch.randn(rows, 3, 16, 16)
        runner.take({"x": [x.to(DEVICE)]})
        (found,) = runner.run().values()
        with torch.inference_mode():
            expected = model(x)
        assert found.dtype == torch.float32
        bound = tolerance * float(expected.abs().max())
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=bound)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_what_is_compiled_is_replayed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: Precision,
    tolerance: float,
    channels_last: bool,
) -> None:
    monkeypatch.setenv(MACHINE_CODE, str(tmp_path / "compiled"))
    model = Net().eval()
    store = Store(tmp_path / "store", create=True)
    (digest,) = store_model(store, model, 1, IMAGE)
    settings = {"precision": precision, "channels_last": channels_last}
    fast = compiled(load(store, digest, DEVICE, **settings), 4)
    assert (fast.compiled, fast.uncompiled) == (True, None)
    runner = prepare(fast, 4)
    assert (runner.kind, runner.reason) == ("compiled, cuda graph", None)
    for rows in (1, 3, 4, 2):
        x = torch.randn(rows, 3, 16, 16)
        runner.take({"x": [x.to(DEVICE)]})
        (found,) = runner.run().values()
        with torch.inference_mode():
            expected = model(x)
        bound = tolerance * float(expected.abs().max())
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("lag", [0.0, 0.5, 1.0])
def test_what_is_lent_is_read_before_it_is_overwritten(lag: float) -> None:
    """Two streams under load; the reader lags in a part of the batches, on the host and the GPU."""
    # Large enough for a copy to take a while.
    wide = Port("x", "float32", ("batch", 1 << 20))
    out = Port("y", "float32", ("batch", 1 << 20))
    lender, reader = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)
    random_lag = random.Random(7)
    pending: deque[tuple[float, Loan]] = deque()
    found: list[tuple[float, Tensor]] = []
    with torch.cuda.stream(lender):
        lending = prepare(on_gpu(lambda x: x + 1, wide, output=out), 4)
    with torch.cuda.stream(reader):
        reading = prepare(on_gpu(lambda x: x * 2, wide, output=out), 4)

    def read() -> None:
        value, loan = pending.popleft()
        with torch.cuda.stream(reader):
            if random_lag.random() < lag:
                torch.cuda._sleep(2_000_000)  # about a millisecond
            with loan.reading(reader):
                reading.take({"x": [loan.tensors["y"]]})
            loan.end()
            found.append((value, torch.stack(torch.aminmax(reading.run()["y"]))))

    for number in range(300):
        with torch.cuda.stream(lender):
            x = torch.full((number % 4 + 1, 1 << 20), float(number), device=DEVICE)
            lending.take({"x": [x]})
            loan = lending.lend(lending.run())
        assert loan is not None
        pending.append((number + 1.0, loan))
        if random_lag.random() >= lag or len(pending) > 5:
            read()
    while pending:
        read()
    torch.cuda.synchronize(DEVICE)
    assert [ends.tolist() for _, ends in found] == [[2 * value] * 2 for value, _ in found]
    assert [value for value, _ in found] == [number + 1.0 for number in range(300)]


def test_nothing_is_kept_of_what_preparing_took() -> None:
    wide = Port("x", "float32", ("batch", 1 << 22))
    program = on_gpu(lambda x: (x + 1) * 2, wide, output=Port("y", "float32", wide.shape))
    runner = prepare(program, 4)
    kept = torch.cuda.memory_reserved(DEVICE)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(DEVICE) == kept
    assert isinstance(runner, GraphRunner)  # whose own memory was not given back meanwhile


def test_what_is_recalled_unread_moves_and_what_is_read_stays() -> None:
    runner = prepare(on_gpu(lambda x: x + 1), 2)
    assert isinstance(runner, GraphRunner)
    reader = torch.cuda.Stream(DEVICE)

    def lend(value: float) -> Loan:
        runner.take({"x": [torch.full((2, 3), value, device=DEVICE)]})
        loan = runner.lend(runner.run())
        assert loan is not None
        return loan

    first = lend(1.0)
    place = first.tensors["y"].data_ptr()
    second = lend(2.0)
    assert first.tensors["y"].data_ptr() != place == second.tensors["y"].data_ptr()
    for loan, value in ((first, 2.0), (second, 3.0)):
        with loan.reading(reader), torch.cuda.stream(reader):
            copy = loan.tensors["y"].clone()
        torch.cuda.synchronize(DEVICE)
        assert copy.unique().tolist() == [value]
    second.end()
    third = lend(3.0)
    assert third.tensors["y"].data_ptr() == place
    assert not second.tensors


def test_a_chain_is_one_graph(stream: torch.cuda.Stream) -> None:
    first, last = net(), on_gpu(lambda x: x * 2 + 1, SCORES, output=SCORES)
    runner = prepare(Chain([first, last]), 4)
    assert (runner.kind, runner.reason) == ("cuda graph", None)
    for rows in (3, 1, 4):
        x = torch.randn(rows, 3, 16, 16, device=DEVICE)
        expected = first({"x": x})["y"] * 2 + 1
        torch.testing.assert_close(run(runner, x), expected, rtol=0, atol=1e-2)


@pytest.mark.slow
def test_blocks_that_balance_this_gpu_are_the_model(tmp_path: Path) -> None:
    source = resolve("resnet50")
    assert isinstance(source, ModuleSource)
    measure = Measure("cuda:0", 1, "tf32")
    kept = Store(tmp_path / "store", create=True)

    def settings() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.benchmark

    with rounding_to_tf32(False):
        before = settings()
        costs = Analysis(export(source.module, source.inputs), measure).costs
        assert settings() == before
        # A view launches nothing and takes none; whatever computes takes some.
        assert all(cost.measured is not None and 0 <= cost.measured < 1 for cost in costs)
        assert all(cost.measured for cost in costs if cost.flops)
        blocks = split_model(source, 4, kept, measure=measure).blocks
        (whole,) = split_model(source, 1, kept).blocks
        assert len(blocks) == 4
        assert all(0 < block.seconds < 1 for block in blocks)
        x = torch.randn(1, 3, 224, 224, device=DEVICE)
        four = Chain([load(kept, b.digest, DEVICE, precision="tf32") for b in blocks])
        (found,) = four({"x": x}).values()
        (expected,) = load(kept, whole.digest, DEVICE, precision="tf32")({"x": x}).values()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [True, False])
def test_four_blocks_of_one_worker_are_replayed(tmp_path: Path, run_dir: Path, fuse: bool) -> None:
    wanted, x, expected = four_blocks(Store(tmp_path / "store", create=True), "cuda:0")
    for block in wanted["blocks"].values():
        block |= {"worker": "together", "fuse": fuse}
    with Server(run_dir, wanted) as server:
        server.wait_ready(240)
        for rows in (1, 2, 1, 2):
            got = server.inference.infer("resnet50", {"x": x[:rows]})["output"]
            np.testing.assert_allclose(got, expected[:rows], atol=1e-3)
        blocks = server.control.blocks()
        assert len({block["pid"] for block in blocks}) == 1
        assert {(block["runner"], block["runner_reason"]) for block in blocks} == {
            ("cuda graph", None)
        }

        def carriers() -> list[tuple[str, int]]:
            found = [c for block in server.control.blocks() for c in block["channels"]]
            return [(c["carrier"], c["messages"]) for c in found if c["peer"] != "gateway"]

        local = [] if fuse else [("local", 4)] * 3
        wait_for(lambda: carriers() == local, 5, "reports")
        heads = {block["fused_into"] for block in server.control.blocks()}
        assert heads == ({None, blocks[0]["name"]} if fuse else {None})
