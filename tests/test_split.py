"""Splitting: where models can be cut, that blocks equal the model, and that trunks are shared."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram

from blockflow.archive import write_archive
from blockflow.artifact import Port, Store
from blockflow.cuts import choose
from blockflow.errors import ModelRefused, TopologyInvalid
from blockflow.measure import Measure
from blockflow.models import ModuleSource, ProgramFile, ScriptFile, resolve
from blockflow.program import load, read_script
from blockflow.share import split_shared
from blockflow.split import (
    AtModules,
    Cost,
    Everywhere,
    Where,
    cut_points,
    example,
    export,
    shared_prefix,
    split,
    split_at,
    split_model,
    store_blocks,
    topology_for,
)

IMAGE = Port("x", "float32", ("batch", 3, 8, 8))
ROW = Port("x", "float32", ("batch", 6))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu(self.bn(self.conv1(x))))
        y += x
        result: Tensor = self.relu(y)
        return result


class Small(nn.Module):
    """A residual network with in-place operators and a view by the batch size."""

    def __init__(self, seed: int = 0, classes: int = 5) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 8, 3)
            self.trunk = nn.Sequential(Residual(8), Residual(8))
            torch.manual_seed(seed)
            self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.stem(x))
        y = self.trunk(y).mean((2, 3), keepdim=True)
        result: Tensor = self.head(y.view(x.size(0), -1))
        return result


def traced(module: nn.Module, *ports: Port) -> ExportedProgram:
    return export(module.eval(), ports or (IMAGE,))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", create=True)


def serve(store: Store, digests: list[str], **inputs: Tensor) -> dict[str, Tensor]:
    """What the stored blocks give one after the other, each loaded from its file."""
    values = inputs
    for digest in digests:
        values = load(store, digest, "cpu")(values)
    return values


def check_equal(store: Store, module: nn.Module, blocks: int, *ports: Port) -> list[str]:
    """Split, store, load and run at a batch size that neither export nor split has seen."""
    source = ModuleSource("model", module.eval(), ports or (IMAGE,))
    result = split_model(source, blocks, store)
    digests: list[str] = [block.digest for block in result.blocks]
    assert len(digests) == blocks
    for rows in (1, 5):
        inputs = {port.name: example(port, rows, seed=9) for port in source.inputs}
        with torch.no_grad():
            expected = module(**{name: tensor.clone() for name, tensor in inputs.items()})
        found = serve(store, digests, **inputs)
        assert torch.equal(found["output"], expected)
    return digests


# ------------------------------------------------------------------------------------ real models


@pytest.mark.parametrize("blocks", [2, 4])
def test_resnet18(store: Store, blocks: int) -> None:
    source = resolve("resnet18")
    assert isinstance(source, ModuleSource)
    check_equal(store, source.module, blocks, *source.inputs)


@pytest.mark.slow
def test_resnet50_in_four(store: Store) -> None:
    source = resolve("resnet50")
    assert isinstance(source, ModuleSource)
    lines: list[str] = []
    result = split_model(source, 4, store, progress=lines.append)
    x = torch.randn(5, 3, 224, 224)
    with torch.no_grad():
        expected = source.module(x)
    assert torch.equal(serve(store, [b.digest for b in result.blocks], x=x)["output"], expected)
    buffers = sum(b.numel() * b.element_size() for b in source.module.buffers() if b.dim())
    weights = sum(p.numel() * p.element_size() for p in source.module.parameters())
    assert sum(b.manifest.parameter_bytes for b in result.blocks) == weights + buffers
    assert sum(b.manifest.flops for b in result.blocks) == pytest.approx(2 * 4.09e9, rel=0.01)
    times = [block.seconds for block in result.blocks]
    assert max(times) < 1.25 * sum(times) / len(times)  # by the model, not by a clock
    assert [b.name for b in result.blocks] == [f"resnet50-{n}of4" for n in (1, 2, 3, 4)]
    assert lines[0] == "resnet50: exporting"
    assert "resnet50: comparing 4 blocks with the model" in lines


# -------------------------------------------------------------------------------------- cut points


def test_every_cut_of_a_residual_network_is_good(store: Store) -> None:
    module = Small().eval()
    assert len(cut_points(traced(module), tensors=1)) == 5  # stem, residual blocks, mean, its view
    count = len(cut_points(traced(module)))
    assert count == 9  # and two inside of each residual block, beside its shortcut
    check_equal(store, module, count + 1)


def test_a_cut_between_branches_carries_both() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = self.conv(y)
            return self.conv(z) + y  # type: ignore[no-any-return]

    assert [cut.after for cut in cut_points(traced(One()), tensors=1)] == ["conv2d"]
    after = {cut.after: [port.name for port in cut.tensors] for cut in cut_points(traced(One()))}
    assert after["conv2d_1"] == after["conv2d_2"] == ["hidden_0", "hidden_1"]


def test_no_cut_before_an_in_place_operator() -> None:
    class Places(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            z = y.view(-1, 6).view(-1, 6)
            z.relu_()
            return y + 1

    # After the multiplication, one tensor is alive at every place; but a view of it is
    # overwritten later, so the only cut is behind that.
    assert [cut.after for cut in cut_points(traced(Places(), ROW))] == ["relu_"]


def test_memory_shared_behind_the_schemas_back_counts(store: Store) -> None:
    class Idle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            z = torch.dropout(y, 0.5, train=False)  # returns y itself, and its schema says nothing
            return torch.relu_(z).add(1).mul(3)

    names = [cut.after for cut in cut_points(traced(Idle(), ROW))]
    assert names == ["relu_", "add"]
    check_equal(store, Idle(), 3, ROW)


def test_the_cost_of_a_cut_point() -> None:
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    (cut,) = cut_points(traced(module, Port("input", "float32", ("batch", 6))))
    assert cut.tensors == (Port("hidden", "float32", ("batch", 4)),)
    assert cut.row_bytes == 4 * 4
    assert cut.cost == Cost(
        parameter_bytes=4 * (6 * 4 + 4), flops=2 * 6 * 4, activation_bytes=16, moved_bytes=24 + 16
    )


def test_too_many_blocks_says_how_many_are_possible() -> None:
    with pytest.raises(
        ModelRefused, match="cannot be split into 11 blocks, 10 is the most: between its"
    ):
        split(traced(Small()), 11, "model")
    with pytest.raises(ModelRefused, match="1 is the least"):
        split(traced(Small()), 0, "model")


# ---------------------------------------------------------------------------------- at modules


def test_cuts_lie_before_the_modules_that_were_named(store: Store) -> None:
    module = Small().eval()
    source = ModuleSource("small", module, (IMAGE,))
    result = split_model(source, AtModules(("trunk.1", "trunk.0")), store)
    assert [b.manifest.origin.first for b in result.blocks] == ["conv2d", "conv2d_1", "conv2d_3"]
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        expected = module(x)
    assert torch.equal(serve(store, [b.digest for b in result.blocks], x=x)["output"], expected)


class NormThenRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.conv(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("layer9",), "has no module 'layer9' that computes; there are: conv, relu, last"),
        (("conv",), "small begins with conv"),
        (("relu",), "cannot be cut before relu: the tensor of conv2d .* overwritten .* by relu_"),
        (("last", "last"), "last and last begin at the same operator"),
    ],
)
def test_modules_where_nothing_can_be_cut(store: Store, names: tuple[str, ...], why: str) -> None:
    with pytest.raises(ModelRefused, match=why):
        split_model(ModuleSource("small", NormThenRelu(), (IMAGE,)), AtModules(names), store)
    assert store.digests() == []


def test_every_cut(store: Store) -> None:
    result = split_model(ModuleSource("small", Small().eval(), (IMAGE,)), Everywhere(1), store)
    assert len(result.blocks) == 6


def test_measured_costs_are_seconds_on_the_device(store: Store) -> None:
    source = ModuleSource("small", Small().eval(), (IMAGE,))
    result = split_model(source, 2, store, measure=Measure("cpu"))
    assert all(0 < block.seconds < 60 for block in result.blocks)
    cuts = cut_points(traced(Small()), measure=Measure("cpu"))
    assert all(cut.cost.measured is not None and cut.cost.measured > 0 for cut in cuts)
    assert all(cut.cost.measured is None for cut in cut_points(traced(Small())))
    with pytest.raises(ModelRefused, match=r"cannot be timed on cuda:99 \(1 row, tf32\)"):
        cut_points(traced(Small()), measure=Measure("cuda:99", 1, "tf32"))


# ------------------------------------------------------------------------ what blocks need to know


class Tied(nn.Module):
    """Embedding and output layer are one tensor, and lie in different blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 8)
        self.middle = nn.Linear(8, 8)
        self.logits = nn.Linear(8, 16, bias=False)
        self.logits.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.middle(self.words(x)).relu())  # type: ignore[no-any-return]


def test_tied_weights_are_in_each_block_that_uses_them(store: Store) -> None:
    digests = check_equal(store, Tied(), 2, Port("x", "int64", ("batch", 6)))
    assert all(store.manifest(d).parameter_bytes >= 16 * 8 * 4 for d in digests)
    files = [store.weights(store.manifest(digest)) for digest in digests]
    names = [{weight.sha256 for weight in each.values()} for each in files]
    assert len(names[0] & names[1]) == 1  # and stored once


class Unscaled(nn.Module):
    """An input without rows that every part needs, a tuple, and an output that leaves early."""

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, None, Tensor]:
        early = x * scale
        left, right = (early + 1).contiguous().chunk(2, dim=1)
        late = (left * right).relu() * scale.sum()
        return early, None, late.tanh() * scale.sum()


def test_inputs_tuples_and_early_outputs_pass_through_blocks(store: Store) -> None:
    ports = (Port("x", "float32", ("batch", 6)), Port("scale", "float32", (6,)))
    result = split_model(ModuleSource("unscaled", Unscaled(), ports), 3, store)
    assert result.inputs == ("x", "scale")
    assert result.outputs == ("output_0", "output_2")
    middle = result.blocks[1].manifest
    assert Port("hidden_0", "float32", (6,)) in middle.inputs
    x, scale = torch.randn(4, 6), torch.randn(6)
    expected = Unscaled()(x, scale)
    found = serve(store, [b.digest for b in result.blocks], x=x, scale=scale)
    assert torch.equal(found["output_0"], expected[0])
    assert torch.equal(found["output_2"], expected[2])


class Tokens(nn.Module):
    """A transformer whose layers all use a mask and positions made from no input's data."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 8)
        self.positions = nn.Embedding(6, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows, length = x.shape
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        place = self.positions(torch.arange(length, device=x.device))
        y = self.words(x) + place
        for layer in self.layers:
            z = layer(y).view(rows, length, 2, 4).transpose(1, 2)
            z = nn.functional.scaled_dot_product_attention(z, z, z, attn_mask=mask)
            y = y + z.transpose(1, 2).reshape(rows, length, 8) * place
        return y.mean(1)


def test_tables_and_the_batch_size_are_made_again_in_every_block(store: Store) -> None:
    digests = check_equal(store, Tokens(), 4, Port("x", "int64", ("batch", 6)))
    sizes = [store.manifest(digest).parameter_bytes for digest in digests]
    table = 4 * 6 * 8
    assert all(size >= table for size in sizes[1:])  # positions are needed everywhere,
    assert all(size < table + 4 * 16 * 8 for size in sizes[1:])  # words only at the beginning


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        result: Tensor = self.head(torch.relu(y[:, -1]))
        return result


class Modes(nn.Module):
    """Subgraphs under another gradient mode and another precision."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.ones(6))  # named like the tensor between blocks
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.linear(x) + self.hidden
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.linear(y * 2)
        return z.float() + self.hidden


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Recurrent(), ("batch", 4, 6)),
        (Modes(), ("batch", 6)),
        (nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), ("batch", 3, 8, 8)),  # type: ignore[call-overload]
    ],
)
@pytest.mark.parametrize("blocks", [1, 2])
def test_many_kinds_of_models(
    store: Store, module: nn.Module, shape: tuple[int, ...], blocks: int
) -> None:
    name = "input" if isinstance(module, nn.Conv2d) else "x"
    if name == "input":
        blocks = 1
    check_equal(store, module, blocks, Port(name, "float32", shape))


def test_attention_layers_are_compared_without_their_fused_path(store: Store) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    source = ModuleSource("encoder", layer.eval(), (Port("src", "float32", ("batch", 4, 8)),))
    result = split_model(source, 2, store)
    x = torch.randn(3, 4, 8)
    found = serve(store, [block.digest for block in result.blocks], src=x)["output"]
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(parameter.requires_grad for parameter in layer.parameters())
    with torch.no_grad():
        torch.testing.assert_close(found, layer(x))


def test_each_block_has_only_its_own_weights(store: Store) -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    digests = check_equal(store, module, 2, Port("input", "float32", ("batch", 6)))
    assert [store.manifest(d).parameter_bytes for d in digests] == [4 * 42, 4 * 42]
    for digest in digests:
        assert (store.path(digest) / "program.pt2").stat().st_size < 12_000


def test_ports_and_origin_are_recorded(store: Store) -> None:
    digests = check_equal(store, Small(), 2)
    first, last = (store.manifest(digest) for digest in digests)
    assert first.inputs == (IMAGE,)
    assert first.outputs == last.inputs
    assert first.outputs[0].name == "hidden"
    assert last.outputs == (Port("output", "float32", ("batch", 5)),)
    assert (first.origin.model, first.origin.index, first.origin.count) == ("model", 0, 2)
    assert first.origin.first == "conv2d"
    assert last.origin.last == "linear"
    assert not first.mutates_inputs


def test_a_model_that_overwrites_its_input_is_marked(store: Store) -> None:
    class Greedy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_() * 2 + 1

    digests = check_equal(store, Greedy(), 2, ROW)
    assert [store.manifest(digest).mutates_inputs for digest in digests] == [True, False]
    x = torch.randn(2, 6)
    kept = x.clone()
    serve(store, digests, x=x)
    assert torch.equal(x, kept)


def test_several_inputs_keep_their_names(store: Store) -> None:
    class Two(nn.Module):
        def forward(self, image: Tensor, scale: Tensor) -> Tensor:
            return (image - scale).relu() * 2

    ports = (Port("scale", "float32", ("batch", 1)), Port("image", "float32", ("batch", 6)))
    digests = check_equal(store, Two(), 2, *ports)
    assert [port.name for port in store.manifest(digests[0]).inputs] == ["image", "scale"]


def test_outputs_of_a_dict_keep_their_keys(store: Store) -> None:
    class Heads(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = x * 2
            return {"plus": y + 1, "minus": y - 1}

    result = split_model(ModuleSource("heads", Heads(), (ROW,)), 2, store)
    x = torch.randn(3, 6)
    found = serve(store, [b.digest for b in result.blocks], x=x)
    assert torch.equal(found["plus"], x * 2 + 1)
    assert torch.equal(found["minus"], x * 2 - 1)


@dataclasses.dataclass
class Scores:
    high: Tensor
    low: Tensor


def test_outputs_of_a_dataclass_keep_their_names(store: Store) -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Scores:
            y = x * 2
            return Scores(high=y + 1, low=y - 1)

    result = split_model(ModuleSource("both", Both(), (ROW,)), 2, store)
    x = torch.randn(3, 6)
    found = serve(store, [b.digest for b in result.blocks], x=x)
    assert torch.equal(found["high"], x * 2 + 1)
    assert torch.equal(found["low"], x * 2 - 1)


def test_a_place_that_cannot_be_cut_is_named_with_the_reason() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    module = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    port = Port("input", "float32", ("batch", 3, 8, 8))
    with pytest.raises(ModelRefused, match=r"behind conv2d, for one: .* or with channels last"):
        split(traced(module, port), 2, "model")


def test_a_fixed_batch_is_a_shape_like_any_other(store: Store) -> None:
    digests = check_equal(
        store, nn.Sequential(nn.ReLU(), nn.Tanh()), 2, Port("input", "float32", (4, 6))
    )
    assert store.manifest(digests[1]).inputs[0].shape == (4, 6)


# ----------------------------------------------------------------------------------- refused models


class Training(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True) * 2


class Counting(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x + self.seen


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0, keepdim=True)) * 2


class Summing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class OneSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 6) * 2


class Picking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class Mismatched(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.zeros(7, 7)


class Numbers(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x * 2, 3


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> object:
        class Result:
            value = x * 2

        return Result()


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Training(), "runs in training mode"),
        (Counting(), "writes to its own 'seen'"),
        (Random(), "do not give the model's results"),
        (Mixing(), "mixes the rows of a batch"),
        (Summing(), "no batch dimension"),
        (
            Branching(),
            (
                r"torch.export cannot trace Branching \(line \d+ of test_split.py, in forward: "
                r"`return x \* 2 if x.sum\(\) > 0 else x`\): the control flow depends on the data"
            ),
        ),
        (OneSize(), "torch.export cannot trace OneSize: it takes batches of 2 alone"),
        (Picking(), r"what aten.nonzero.default returns depends on the data of its input"),
        (Mismatched(), r"line \d+ of test_split.py, .*must have same reduction dim"),
        (Numbers(), "returns 3 beside tensors"),
        (Opaque(), "it returns a .*Result.*: return tensors, alone or in tuples"),
        (Nothing(), "computes nothing"),
    ],
)
def test_models_that_cannot_be_served_are_refused_in_one_line(
    store: Store, caplog: pytest.LogCaptureFixture, module: nn.Module, why: str
) -> None:
    with pytest.raises(ModelRefused, match=why) as caught:
        split_model(ModuleSource("model", module, (ROW,)), 1, store)
    assert "\n" not in str(caught.value)
    # torch would print tracebacks
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []
    assert store.digests() == []


def test_batch_norm_in_training_mode_is_refused() -> None:
    with pytest.raises(ModelRefused, match="training mode"):
        split(
            export(
                nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)),
                (Port("input", "float32", ("batch", 3, 8, 8)),),
            ),
            1,
            "model",
        )


def test_wrong_argument_names_are_refused() -> None:
    with pytest.raises(ModelRefused, match=r"Small.forward takes \(x\), no image"):
        export(Small(), (Port("image", "float32", ("batch", 3, 8, 8)),))


# ---------------------------------------------------------------------------------- where to cut


def brute_force(seconds: list[float], crossing: list[int], blocks: int) -> tuple[float, int]:
    def score(cuts: tuple[int, ...]) -> tuple[float, int]:
        edges = [0, *(cut + 1 for cut in cuts), len(seconds)]
        slowest = max(sum(seconds[a:b]) for a, b in itertools.pairwise(edges))
        return slowest, sum(crossing[cut] for cut in cuts)

    return min(score(cuts) for cuts in itertools.combinations(range(len(crossing)), blocks - 1))


@given(st.data())
def test_the_choice_of_cuts_is_optimal(data: st.DataObject) -> None:
    flops = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=8))
    crossing = data.draw(
        st.lists(st.integers(1, 5), min_size=len(flops) - 1, max_size=len(flops) - 1)
    )
    blocks = data.draw(st.integers(1, len(flops)))
    chosen = choose([float(n) for n in flops], crossing, blocks)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == blocks - 1
    edges = [0, *(cut + 1 for cut in chosen), len(flops)]
    slowest = max(sum(flops[a:b]) for a, b in itertools.pairwise(edges))
    assert (slowest, sum(crossing[cut] for cut in chosen)) == brute_force(
        [float(n) for n in flops], crossing, blocks
    )


def test_many_cut_points_are_no_problem() -> None:
    generator = random.Random(0)
    seconds = [generator.random() for _ in range(2000)]
    assert len(choose(seconds, [1] * 1999, 8)) == 7


# -------------------------------------------------------------------------------------- sharing


def test_models_on_one_trunk_share_it(store: Store) -> None:
    models = [Small(seed=seed, classes=4 + seed).eval() for seed in range(3)]
    programs = [traced(model) for model in models]
    cuts = shared_prefix(programs)
    assert cuts is not None
    assert {cut.place for cut in cuts} == {cut_points(programs[0])[-1].place}
    results = [
        store_blocks(split_at(program, [cut], f"task{n}", model=model), store)
        for n, (program, cut, model) in enumerate(zip(programs, cuts, models, strict=True))
    ]
    assert len({result.blocks[0].digest for result in results}) == 1
    assert len({result.blocks[1].digest for result in results}) == 3
    assert [result.blocks[0].shared for result in results] == [False, True, True]
    assert len(store.digests()) == 4
    x = torch.randn(5, 3, 8, 8)
    for model, result in zip(models, results, strict=True):
        with torch.no_grad():
            expected = model(x)
        found = serve(store, [block.digest for block in result.blocks], x=x)
        assert torch.equal(found["output"], expected)


def test_the_shared_prefix_ends_where_weights_differ() -> None:
    one, other = Small(), Small()
    with torch.no_grad():
        other.trunk[1].conv1.bias[0] += 1  # type: ignore[union-attr,operator,index]
    cuts = shared_prefix([traced(one), traced(other)])
    assert cuts is not None
    names = [cut.after for cut in cut_points(traced(one), tensors=1)]
    assert names.index(cuts[0].after) == 1  # behind the stem and the first residual block


def test_strangers_share_nothing() -> None:
    one, other = Small(), Small()
    with torch.no_grad():
        other.stem.bias[0] += 1  # type: ignore[index]
    assert shared_prefix([traced(one), traced(other)]) is None
    assert shared_prefix([]) is None


def test_a_cut_of_another_program_is_refused() -> None:
    cut = cut_points(
        traced(nn.Sequential(nn.ReLU(), nn.ReLU()), Port("input", "float32", ("batch", 6)))
    )[0]
    with pytest.raises(ModelRefused, match="has no cut point behind"):
        split_at(traced(Small()), [cut], "model")


def test_the_same_model_twice_is_stored_once(store: Store) -> None:
    first = check_equal(store, Small(), 3)
    assert check_equal(store, Small(), 3) == first
    assert len(store.digests()) == 3


# ----------------------------------------------------------------------------------- files


def test_a_program_file_gives_the_blocks_of_its_module(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "small.pt2"
    write_archive(traced(Small()), path)
    result = split_model(ProgramFile("small", path), 2, store)
    assert [block.digest for block in result.blocks] == check_equal(store, Small(), 2)


def scripted(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module.eval()), path)
    return path


def test_torchscript_becomes_one_block(store: Store, tmp_path: Path) -> None:
    module = Small().eval()
    path = scripted(module, tmp_path / "small.pt")
    port = Port("image", "float32", ("batch", 3, 8, 8))
    result = split_model(ScriptFile("small", path, (port,)), 1, store)
    (block,) = result.blocks
    assert block.name == "small"
    assert block.manifest.inputs == (port,)
    assert block.manifest.outputs == (Port("output", "float32", ("batch", 5)),)
    assert not block.manifest.mutates_inputs
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(serve(store, [block.digest], image=x)["output"], module(x))


def test_torchscript_is_cut_at_the_submodules_that_it_calls_in_order(
    store: Store, tmp_path: Path
) -> None:
    module = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)),
        nn.Flatten(),
        nn.Linear(128, 5),
    )
    path = scripted(module, tmp_path / "sequence.pt")
    port = Port("image", "float32", ("batch", 3, 8, 8))
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        expected = module(x)
    wheres: list[Where] = [2, 4, AtModules(("2", "1")), Everywhere()]
    for where, count in zip(wheres, (2, 4, 3, 4), strict=True):
        result = split_model(ScriptFile("sequence", path, (port,)), where, store)
        assert len(result.blocks) == count
        assert (result.inputs, result.outputs) == (("image",), ("output",))
        assert result.blocks[0].manifest.outputs[0].name == "hidden"
        found = serve(store, [block.digest for block in result.blocks], image=x)
        assert torch.equal(found["output"], expected)
    with pytest.raises(ModelRefused, match="1 to 4 blocks, not 5"):
        split_model(ScriptFile("sequence", path, (port,)), 5, store)
    with pytest.raises(ModelRefused, match="cannot be cut before '7': it can be before 1, 2, 3"):
        split_model(ScriptFile("sequence", path, (port,)), AtModules(("7",)), store)


class CallsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))  # type: ignore[no-any-return]


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.one(x)
        return self.two(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (CallsTwice(), "it calls layer twice"),
        (Shortcut(), "its two takes something else than the previous output"),
        (nn.ReLU(), "beside calling submodules it computes relu"),
    ],
)
def test_torchscript_that_is_no_sequence_says_why(
    store: Store, tmp_path: Path, module: nn.Module, why: str
) -> None:
    path = scripted(module, tmp_path / "model.pt")
    with pytest.raises(ModelRefused, match=why):
        split_model(ScriptFile("model", path, (ROW,)), 2, store)


class ScriptedTwo(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"b": x.relu_(), "a": x + 1}


def test_torchscript_with_a_damaged_weight_is_refused(store: Store, tmp_path: Path) -> None:
    """torch itself reads such a file without a word."""
    path = tmp_path / "old.pt"
    scripted(nn.Sequential(nn.Linear(32, 32)), path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (member,) = [each for each in archive.infolist() if each.file_size == 32 * 32 * 4]
        content[content.find(archive.read(member)) + 5] ^= 1
    path.write_bytes(content)
    read_script(path)
    port = Port("x", "float32", ("batch", 32))
    for blocks in (1, 2):
        with pytest.raises(ModelRefused, match=r"old\.pt is damaged: .*data/\d"):
            split_model(ScriptFile("old", path, (port,)), blocks, store)
    assert store.digests() == []


def test_a_model_that_does_not_run_on_its_inputs_is_refused(store: Store) -> None:
    """Export believes the dtype, and looks no further."""
    module = nn.Sequential(nn.Linear(4, 4)).eval()
    source = ModuleSource("net", module, (Port("input", "int64", ("batch", 4)),))
    message = r"net does not run on the inputs .*: mat1 and mat2 must have the same dtype"
    with pytest.raises(ModelRefused, match=message):
        split_model(source, 1, store)
    with pytest.raises(ModelRefused, match=message):
        split_shared([source], store)


def test_torchscript_outputs_and_writes_are_discovered(store: Store, tmp_path: Path) -> None:
    path = scripted(ScriptedTwo(), tmp_path / "two.pt")
    (block,) = split_model(ScriptFile("two", path, (ROW,)), 1, store).blocks
    assert [port.name for port in block.manifest.outputs] == ["b", "a"]
    assert block.manifest.mutates_inputs


@pytest.mark.parametrize(
    ("blocks", "port", "why"),
    [
        (2, IMAGE, "is TorchScript that cannot be cut: beside calling submodules it computes"),
        (1, ROW, "does not run on the inputs"),
    ],
)
def test_torchscript_refusals(
    store: Store, tmp_path: Path, blocks: int, port: Port, why: str
) -> None:
    path = scripted(Small(), tmp_path / "small.pt")
    with pytest.raises(ModelRefused, match=why):
        split_model(ScriptFile("small", path, (port,)), blocks, store)


def test_torchscript_that_loses_rows_is_refused(store: Store, tmp_path: Path) -> None:
    path = scripted(Summing(), tmp_path / "sum.pt")
    with pytest.raises(ModelRefused, match="no batch dimension"):
        split_model(ScriptFile("sum", path, (ROW,)), 1, store)


def test_clients_see_the_models_own_names(store: Store) -> None:
    class Renamed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, picture: Tensor) -> dict[str, Tensor]:
            return {"scores": self.inner(picture)}

    first = split_model(ModuleSource("one", Small().eval(), (IMAGE,)), 2, store)
    picture = Port("picture", "float32", IMAGE.shape)
    second = split_model(ModuleSource("two", Renamed(Small()).eval(), (picture,)), 2, store)
    assert [b.digest for b in first.blocks] == [b.digest for b in second.blocks]
    for result, names in ((first, ("x", "output")), (second, ("picture", "scores"))):
        pipeline = topology_for(result, "main").pipelines["main"]
        assert (pipeline.inputs, pipeline.outputs) == ((names[0],), (names[1],))


def test_a_topology_runs_the_blocks_in_order(store: Store) -> None:
    result = split_model(ModuleSource("small", Small().eval(), (IMAGE,)), 3, store)
    topology = topology_for(result, "main", device="cuda:1")
    assert topology.store == str(store.root)
    assert topology.pipelines["main"].blocks == ("small-1of3", "small-2of3", "small-3of3")
    assert [topology.blocks[b.name].artifact for b in result.blocks] == [
        b.digest for b in result.blocks
    ]
    assert {block.device for block in topology.blocks.values()} == {"cuda:1"}
    with pytest.raises(TopologyInvalid, match="gpu"):
        topology_for(result, "main", device="gpu")
