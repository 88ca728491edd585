"""How programs are run, as far as that can be seen without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blockflow.artifact import Digest, Manifest, Origin, Port
from blockflow.errors import BlockFailed
from blockflow.program import Chain, Program
from blockflow.runner import EagerRunner, NotCapturable, _compare, buckets, prepare

X, Y = Port("x", "float32", ("batch", 3)), Port("y", "float32", ("batch", 3))


def program(
    call: Callable[..., Tensor], *inputs: Port, output: Port = Y, device: str = "cpu"
) -> Program:
    manifest = Manifest(
        format="torch.export",
        digest=Digest("sha256-" + "0" * 64),
        inputs=inputs or (X,),
        outputs=(output,),
        parameter_bytes=0,
        flops=0,
        mutates_inputs=False,
        origin=Origin("net", 0, 1, "first", "last"),
        files={},
    )
    return Program(manifest, torch.device(device), lambda *given: (call(*given),))


def test_buckets_are_powers_of_two_and_the_limit() -> None:
    assert buckets(1) == (1,)
    assert buckets(8) == (1, 2, 4, 8)
    assert buckets(12) == (1, 2, 4, 8, 12)


@given(st.integers(1, 4096))
def test_every_batch_has_a_bucket_that_is_at_most_twice_its_size(largest: int) -> None:
    sizes = buckets(largest)
    assert list(sizes) == sorted(set(sizes))
    for rows in {1, largest, (largest + 1) // 2, largest // 3 + 1} & set(range(1, largest + 1)):
        assert rows <= min(size for size in sizes if size >= rows) < 2 * rows


def test_parts_are_put_together_in_their_order() -> None:
    runner = prepare(program(lambda x: x * 2), 4)
    assert (runner.kind, runner.reason) == ("eager", None)
    runner.take({"x": [torch.ones(1, 3), torch.zeros(2, 3)]})
    assert torch.equal(runner.run()["y"], torch.tensor([[2.0], [0.0], [0.0]]).expand(3, 3))


def test_what_is_taken_once_is_not_copied() -> None:
    x = torch.ones(2, 3)
    runner = EagerRunner(program(lambda x: x))
    runner.take({"x": [x]})
    assert runner.run()["y"].data_ptr() == x.data_ptr()


def test_a_program_that_does_not_keep_its_manifest_is_found_out_at_the_start() -> None:
    with pytest.raises(BlockFailed, match=r"it gives y as torch.float64 \[1, 3\]; .* float32"):
        prepare(program(lambda x: x.double()), 4)
    with pytest.raises(BlockFailed, match=r"it gives y as torch.float32 \[3\]"):
        prepare(program(lambda x: x.sum(0)), 4)


def test_rounding_is_not_a_difference_and_a_wrong_row_is() -> None:
    right = torch.tensor([[100.0, 1.0], [float("nan"), float("inf")]])
    _compare("y", right * (1 + 1e-6), right, {torch.float32})
    for wrong in (right.flip(0), right.nan_to_num(), right + 50):
        with pytest.raises(NotCapturable, match="replayed, y is another"):
            _compare("y", wrong, right, {torch.bfloat16})
    _compare("y", torch.tensor([1, 2]), torch.tensor([1, 2]), {torch.float32})
    with pytest.raises(NotCapturable):
        _compare("y", torch.tensor([1, 3]), torch.tensor([1, 2]), {torch.float32})


def test_a_chain_is_a_program_that_takes_what_its_first_takes() -> None:
    first = program(lambda x: x + 1)
    second = program(lambda x: x * 3, Port("whatever", "float32", ("batch", 3)))
    chain = Chain([first, second, first])
    assert [port.name for port in chain.manifest.inputs] == ["x"]
    assert chain({"x": torch.ones(2, 3)})["y"].unique().tolist() == [7.0]


def test_a_chain_is_computed_alone_if_any_part_must_be() -> None:
    fixed = program(lambda x: x, Port("x", "float32", (2, 3)), output=Port("y", "float32", (2, 3)))
    assert Port("y", "float32", (2, 3)) in Chain([program(lambda x: x), fixed]).ports
