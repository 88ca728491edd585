"""What is compiled computes the same for every number of rows, and never while a request waits."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blockflow.artifact import Port, Store
from blockflow.compilation import compiled
from blockflow.program import Chain, Program, load
from blockflow.protocol import MACHINE_CODE
from blockflow.runner import prepare
from blockflow.topology import Precision
from running import DEVICE_PORT, Mlp, store_model
from test_runner import program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

IMAGE = Port("x", "float32", ("batch", 2, 2, 2))


class Net(nn.Module):
    """float32[batch, 2, 2, 2] → float32[batch, 2]: every size in it may be that of a batch."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(2, 2, 2)
            self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().flatten(1)) * 3  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kept between the tests, as a server keeps it."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def where_it_is_kept(machine_code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MACHINE_CODE, str(machine_code))


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Program]:
    store = Store(tmp_path / "store", create=True)

    def make(model: nn.Module, port: Port, precision: Precision = "fp32", **more: bool) -> Program:
        (digest,) = store_model(store, model, 1, port)
        return load(store, digest, "cpu", precision=precision, **more)

    return make


def check(plain: Program, fast: Program, rows: Sequence[int], tolerance: float) -> None:
    (port,) = plain.manifest.inputs
    for number in rows:
        x = torch.randn(port.sized(number))
        (expected,) = plain({"x": x}).values()
        (found,) = fast({"x": x}).values()
        assert (found.dtype, found.shape) == (torch.float32, expected.shape)
        bound = tolerance * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-2)])
def test_one_compilation_serves_every_number_of_rows_and_of_threads(
    made: Callable[..., Program], precision: Precision, tolerance: float, channels_last: bool
) -> None:
    plain = made(Net().eval(), IMAGE, precision, channels_last=channels_last)
    fast = compiled(plain, 8)
    assert (fast.compiled, fast.uncompiled) == (True, None)
    runner = prepare(fast, 8)
    assert (runner.kind, runner.reason) == ("compiled", None)
    check(plain, fast, (1, 2, 3, 4, 5, 8, 1), tolerance)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            check(plain, fast, (2, 7), tolerance)
        failures: list[BaseException] = []

        def elsewhere() -> None:
            try:
                check(plain, fast, (3, 1), tolerance)
            except BaseException as error:  # noqa: BLE001 - shown by the test
                failures.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert failures == []
    finally:
        torch.set_num_threads(before)


def test_a_chain_of_compiled_programs_is_compiled(made: Callable[..., Program]) -> None:
    plain = made(Net().eval(), IMAGE)
    last = program(lambda x: x * 2, Port("x", "float32", ("batch", 2)))
    assert Chain([compiled(plain, 2)]).compiled
    both = Chain([compiled(plain, 2), last.left_uncompiled("it is in a hurry")])
    assert (both.compiled, both.uncompiled) == (False, "not compiled: it is in a hurry")


def test_what_would_give_other_numbers_stays_as_it_is(made: Callable[..., Program]) -> None:
    plain = made(Net().eval(), IMAGE)
    assert plain.module is not None
    other = copy.deepcopy(plain.module)
    other.head_weight.mul_(1.1)
    left = compiled(Program(plain.manifest, plain.device, plain.module.forward, module=other), 4)
    assert not left.compiled
    assert left.uncompiled == "not compiled: compiled, output is another than when it is called"
    runner = prepare(left, 4)
    assert (runner.kind, runner.reason) == ("eager", left.uncompiled)
    check(plain, left, (1, 3), 0.0)


def test_a_compiler_that_fails_is_told_of(
    made: Callable[..., Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = made(Mlp(seed=5), DEVICE_PORT)
    occupied = tmp_path / "occupied"
    occupied.write_text("no directory")
    monkeypatch.setenv(MACHINE_CODE, str(occupied / "code"))
    left = compiled(plain, 4)
    assert not left.compiled
    assert left.uncompiled is not None
    assert left.uncompiled.startswith("not compiled: ")
    assert "NotADirectoryError" in left.uncompiled or "Not a directory" in left.uncompiled
    check(plain, left, (1, 3), 0.0)


def test_nothing_is_compiled_into_a_directory_that_nobody_named(
    made: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(MACHINE_CODE)
    assert "names no directory" in str(compiled(made(Mlp(), DEVICE_PORT), 4).uncompiled)


def test_torchscript_is_not_compiled() -> None:
    assert compiled(program(lambda x: x), 4).uncompiled == "not compiled: it is TorchScript"
