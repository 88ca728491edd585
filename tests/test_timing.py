"""Timing: that operators are run with the rows and in the precision that were asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from blockflow.artifact import Port
from blockflow.backends import rounding_to_tf32, trying_algorithms
from blockflow.cuts import BANDWIDTH, FLOPS, Analysis, Cost
from blockflow.errors import ModelRefused
from blockflow.export import export
from blockflow.identity import digest_of
from blockflow.measure import ROWS, Measure
from blockflow.timing import operator_seconds
from blockflow.topology import Precision

ROW = Port("x", "float32", ("batch", 6))
_seen: set[tuple[int, torch.dtype, torch.dtype]] = set()


@torch.library.custom_op("blockflow_tests::scaled", mutates_args=())
def scaled(x: Tensor, weight: Tensor) -> Tensor:
    """An operator that notes what it is given."""
    _seen.add((x.shape[0], x.dtype, weight.dtype))
    return x * weight


@scaled.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture
def seen() -> Iterator[set[tuple[int, torch.dtype, torch.dtype]]]:
    yield _seen
    _seen.clear()


class Net(nn.Module):
    """Weights, a tensor made of nothing, and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.blockflow_tests.scaled(x, self.weight)
        y = torch.cat([self.linear(y), torch.zeros(y.shape[0], 2)], 1)
        return y.view(y.shape[0], 3, 2).sum(2, dtype=torch.float32)


@pytest.mark.parametrize(
    ("rows", "precision", "dtype"),
    [
        (1, "fp32", torch.float32),
        (5, "tf32", torch.float32),
        (2, "fp16", torch.float16),
        (3, "bf16", torch.bfloat16),
    ],
)
def test_operators_get_the_rows_and_the_type_that_were_asked_for(
    seen: set[tuple[int, torch.dtype, torch.dtype]],
    rows: int,
    precision: Precision,
    dtype: torch.dtype,
) -> None:
    program = export(Net().eval(), (ROW,))
    before, graph = digest_of(program), str(program.graph)
    seen.clear()
    times = operator_seconds(program, Measure("cpu", rows, precision))
    assert seen == {(rows, dtype, dtype)}
    called = [node for node in program.graph.nodes if node.op == "call_function"]
    assert list(times) == called
    assert all(0 < seconds < 60 for seconds in times.values())
    # What was measured is a copy: the program is what it was.
    assert (digest_of(program), str(program.graph)) == (before, graph)


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).abs()


def test_what_a_precision_cannot_compute_is_refused() -> None:
    program = export(Spectrum(), (ROW,))
    assert operator_seconds(program, Measure("cpu", 2))
    with pytest.raises(ModelRefused, match=r"cannot be timed on cpu \(2 rows, bf16\): Runtime"):
        operator_seconds(program, Measure("cpu", 2, "bf16"))


def test_costs_are_measured_or_modelled_and_never_a_mixture() -> None:
    program = export(Net().eval(), (ROW,))
    measure = Measure("cpu", 1)
    measured, modelled = Analysis(program, measure), Analysis(program)
    assert measured.measure == measure
    assert all(cost.measured is not None for cost in measured.costs)
    assert all(cost.measured is None for cost in modelled.costs)
    # An operator that was too quick for the clock has no modelled time instead.
    quick = Cost(flops=10**9, measured=0.0)
    assert quick.seconds == 0.0
    assert sum([quick, Cost(measured=2.0)], Cost()).seconds == 2.0
    plain = Cost(parameter_bytes=7, flops=5, moved_bytes=3)
    assert plain.seconds == plain.modelled(ROWS) == sum([plain], Cost()).seconds
    assert plain.modelled(1) == 5 / FLOPS + (7 + 3) / BANDWIDTH


def test_settings_of_the_process_come_back() -> None:
    def settings() -> tuple[bool, bool, bool]:
        backends = torch.backends
        convolutions, products = backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32
        return convolutions, products, backends.cudnn.benchmark

    def fail(rounded: bool) -> None:
        with trying_algorithms(), rounding_to_tf32(rounded):
            assert settings() == (rounded, rounded, True)
            raise ZeroDivisionError

    before = settings()
    for rounded in (True, False):
        with pytest.raises(ZeroDivisionError):
            fail(rounded)
        assert settings() == before
