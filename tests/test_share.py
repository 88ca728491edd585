"""Sharing: what models have in common becomes blocks that are stored and deployed once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blockflow.artifact import Digest, Manifest, Port, Store
from blockflow.errors import ModelRefused
from blockflow.export import example
from blockflow.models import ModuleSource, ScriptFile, built_in
from blockflow.program import load
from blockflow.reconcile import validate
from blockflow.share import Family, family_topology, split_shared
from blockflow.wiring import by_rule

ROW = Port("x", "float32", ("batch", 16))
IMAGE = Port("x", "float32", ("batch", 3, 64, 64))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", create=True)


def linear(seed: int, inputs: int = 16, outputs: int = 16) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(inputs, outputs)


class Chain(nn.Module):
    """Linear layers with a ReLU behind each; equal seeds make equal layers."""

    def __init__(self, *seeds: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(seed) for seed in seeds)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def source(name: str, module: nn.Module, *inputs: Port) -> ModuleSource:
    return ModuleSource(name, module.eval(), inputs or (ROW,))


def share(store: Store, *modules: nn.Module, blocks: int = 1) -> Family:
    """Share models named a, b, c, ... and check that every pipeline still is its model."""
    sources = [source("abcdefghij"[i], copy.deepcopy(each)) for i, each in enumerate(modules)]
    family = split_shared(sources, store, blocks=blocks)
    for model, module in zip(family.models, modules, strict=True):
        assert_equal(store, family, model.blocks, module)
    assert_deployable(store, family)
    return family


def assert_equal(
    store: Store, family: Family, blocks: Sequence[str], module: nn.Module, *ports: Port
) -> None:
    programs = [load(store, family.blocks[name].digest, "cpu") for name in blocks]
    for rows in (1, 5):
        inputs = [example(port, rows, seed) for seed, port in enumerate(ports or (ROW,))]
        takes = programs[0].manifest.inputs
        values = {port.name: each for port, each in zip(takes, inputs, strict=True)}
        for index, program in enumerate(programs):
            if index:
                names = by_rule(programs[index - 1].manifest.outputs, program.manifest.inputs)
                values = {name: values[gives] for name, gives in names.items()}
            values = program(values)
        with torch.inference_mode():
            expected = module.eval()(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        gives = programs[-1].manifest.outputs
        for port, tensor in zip(gives, expected, strict=True):
            assert torch.equal(values[port.name], tensor)


def assert_deployable(store: Store, family: Family) -> None:
    topology = family_topology(family)
    assert set(topology.pipelines) == {model.name for model in family.models}
    manifests: dict[Digest, Manifest | str] = {
        Digest(block.artifact): store.verify(block.artifact) for block in topology.blocks.values()
    }
    assert len(manifests) == len(topology.blocks)
    assert validate(topology, manifests, ["cpu"]) == []


def chains(family: Family) -> list[tuple[str, ...]]:
    return [model.blocks for model in family.models]


# ------------------------------------------------------------------------------ what is shared


def test_a_common_trunk_is_one_block(store: Store) -> None:
    family = share(store, Chain(1, 2, 3, 4), Chain(1, 2, 5, 6))
    assert chains(family) == [("trunk", "a-2of2"), ("trunk", "b-2of2")]
    assert family.blocks["trunk"].models == ("a", "b")
    layer = (16 * 16 + 16) * 4
    assert family.parameter_bytes == 6 * layer
    assert family.parameter_bytes_apart == 8 * layer
    assert family.flops == 6 * 2 * 16 * 16
    assert family.flops_apart == 8 * 2 * 16 * 16
    assert len(store.digests()) == 3


def test_identical_models_share_everything(store: Store) -> None:
    family = share(store, Chain(1, 2), Chain(1, 2))
    assert chains(family) == [("trunk",), ("trunk",)]
    assert len(store.digests()) == 1


def test_models_with_nothing_in_common_stay_apart(store: Store) -> None:
    family = share(store, Chain(1, 2), Chain(3, 4))
    assert chains(family) == [("a",), ("b",)]
    assert family.parameter_bytes == family.parameter_bytes_apart


def test_equal_weights_on_other_inputs_are_stored_once_but_computed_apart(store: Store) -> None:
    family = share(store, Chain(1, 2, 3), Chain(9, 2, 3))
    assert chains(family) == [("a",), ("b",)]
    weights = [store.weights(block.manifest) for block in family.blocks.values()]
    shared = set.intersection(*({w.sha256 for w in each.values()} for each in weights))
    assert len(shared) == 4
    assert len(store.tensors()) == 8


def test_one_bit_of_one_weight_ends_the_trunk(store: Store) -> None:
    other = Chain(1, 2, 3)
    with torch.no_grad():
        bits = other.layers[1].weight.view(torch.int32)
        bits[7, 7] ^= 1
    family = share(store, Chain(1, 2, 3), other)
    assert chains(family) == [("trunk", "a-2of2"), ("trunk", "b-2of2")]
    assert family.blocks["trunk"].manifest.flops == 2 * 16 * 16


def test_trunks_lie_within_trunks(store: Store) -> None:
    family = share(
        store, Chain(1, 2, 3, 4), Chain(1, 2, 3, 5), Chain(1, 2, 6, 7), Chain(1, 8, 9, 9)
    )
    assert chains(family) == [
        ("trunk-1", "trunk-2", "trunk-3", "a-4of4"),
        ("trunk-1", "trunk-2", "trunk-3", "b-4of4"),
        ("trunk-1", "trunk-2", "c-3of3"),
        ("trunk-1", "d-2of2"),
    ]
    assert family.blocks["trunk-2"].models == ("a", "b", "c")


def test_one_model_can_be_the_beginning_of_another(store: Store) -> None:
    family = share(store, Chain(1, 2), Chain(1, 2, 3))
    assert chains(family) == [("trunk",), ("trunk", "b-2of2")]


def test_a_model_alone_and_no_model(store: Store) -> None:
    assert chains(share(store, Chain(1, 2, 3, 4), blocks=2)) == [("a-1of2", "a-2of2")]
    with pytest.raises(ModelRefused, match="there is no model"):
        split_shared([], store)


# ---------------------------------------------------------- names, order, and where it lies


class TwoBranches(nn.Module):
    """Two branches of one input, traced in either order, added."""

    def __init__(self, left: int, right: int, *, right_first: bool = False) -> None:
        super().__init__()
        self.left, self.right = linear(left), linear(right)
        self.right_first = right_first

    def forward(self, x: Tensor) -> Tensor:
        if self.right_first:
            right = torch.relu(self.right(x))
            left = torch.tanh(self.left(x))
        else:
            left = torch.tanh(self.left(x))
            right = torch.relu(self.right(x))
        return left + right


class Renamed(nn.Module):
    """`Chain(1, 2, 3)` with other names, other classes, and an input of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = linear(1)
        self.body = nn.Sequential(nn.ReLU(), linear(2), nn.ReLU())
        self.unused = linear(77)
        self.head = linear(3)

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(self.head(self.body(self.stem(image))))


def test_names_do_not_matter(store: Store) -> None:
    family = split_shared(
        [
            source("a", Chain(1, 2, 3)),
            source("b", Renamed(), Port("image", "float32", ("batch", 16))),
        ],
        store,
    )
    assert chains(family) == [("trunk",), ("trunk",)]
    topology = family_topology(family)
    assert topology.pipelines["b"].inputs == ("image",)
    assert_deployable(store, family)


def test_the_order_of_the_trace_does_not_matter(store: Store) -> None:
    family = share(store, TwoBranches(1, 2), TwoBranches(1, 2, right_first=True))
    assert chains(family) == [("trunk",), ("trunk",)]


def test_what_is_shared_need_not_come_first(store: Store) -> None:
    """The right branch is traced last, and is what the models have in common."""
    family = share(store, TwoBranches(1, 3), TwoBranches(2, 3))
    assert [len(chain) for chain in chains(family)] == [2, 2]
    trunk = family.blocks["trunk"]
    assert trunk.models == ("a", "b")
    assert trunk.manifest.flops == 2 * 16 * 16
    # The input passes through, as the other branch needs it.
    assert len(trunk.manifest.outputs) == 2


class InPlace(nn.Module):
    """Reads a tensor, then overwrites it: what reads it must stay before."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.shared, self.own, self.last = linear(1), linear(first), linear(last)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(x)
        before = self.own(y)
        y.add_(1.0)
        y = torch.relu_(y)
        return before + self.last(y)


def test_writes_in_place_stay_in_their_order(store: Store) -> None:
    share(store, InPlace(2, 3), InPlace(4, 3))
    share(store, InPlace(2, 3), InPlace(2, 5), InPlace(6, 5))


class Rows(nn.Module):
    """Takes the number of rows from a tensor that only this model has."""

    def __init__(self, own: int) -> None:
        super().__init__()
        self.own, self.shared, self.last = linear(own), linear(1), linear(2)

    def forward(self, x: Tensor) -> Tensor:
        own = self.own(x)
        shared = self.shared(x).view(own.size(0), 4, 4).transpose(1, 2)
        return own + self.last(shared.reshape(own.size(0), 16))


def test_the_number_of_rows_is_everybodys(store: Store) -> None:
    family = share(store, Rows(3), Rows(4))
    assert family.blocks["trunk"].models == ("a", "b")
    assert family.blocks["trunk"].manifest.flops == 2 * 2 * 16 * 16


class ThreeBranches(nn.Module):
    def __init__(self, *seeds: int, wide: int = 16) -> None:
        super().__init__()
        self.first = nn.Sequential(linear(seeds[0], 16, wide), linear(99, wide, 16))
        self.others = nn.ModuleList(linear(seed) for seed in seeds[1:])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.relu(self.first(x))
        for each in self.others:
            result = result + torch.relu(each(x))
        return result


def test_of_overlapping_sets_the_one_that_saves_more_is_kept(store: Store) -> None:
    # a and b share the wide branch, b and c a narrow one.
    family = share(
        store,
        ThreeBranches(1, 10, wide=64),
        ThreeBranches(1, 20, wide=64),
        ThreeBranches(3, 20, wide=64),
    )
    trunks = [block for block in family.blocks.values() if len(block.models) > 1]
    assert [block.models for block in trunks] == [("a", "b")]
    # Its weights, which are equal in b and c, lie in the store once all the same.
    names = {w.sha256 for b in family.blocks.values() for w in store.weights(b.manifest).values()}
    assert len(store.tensors()) == len(names)


class TwoHeads(nn.Module):
    def __init__(self, *heads: int) -> None:
        super().__init__()
        self.trunk = Chain(1, 2)
        self.heads = nn.ModuleList(linear(seed, outputs=3) for seed in heads)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.trunk(x)
        return tuple(head(y) for head in self.heads)


def test_models_with_several_outputs(store: Store) -> None:
    family = share(store, TwoHeads(3, 4), TwoHeads(3, 5))
    assert family.blocks["trunk"].manifest.flops >= 2 * 2 * 16 * 16
    assert family.models[0].outputs == ("output_0", "output_1")


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = linear(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + torch.rand_like(x)


def test_what_draws_random_numbers_is_refused(store: Store) -> None:
    with pytest.raises(ModelRefused, match="a: its export does not give the model's results"):
        split_shared([source("a", Noisy()), source("b", Noisy())], store)
    assert store.digests() == []


def test_torchscript_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="is TorchScript, whose operators cannot be compared"):
        split_shared([ScriptFile("old", tmp_path / "old.pt", (ROW,))], store)


# -------------------------------------------------------------------------------- more blocks


def test_parts_that_take_long_are_cut_further_and_alike_for_all(store: Store) -> None:
    family = share(store, Chain(1, 2, 3, 4, 5, 6, 7, 8), Chain(1, 2, 3, 4, 5, 6, 9, 9), blocks=4)
    assert chains(family) == [
        ("trunk-1", "trunk-2", "trunk-3", "a-4of4"),
        ("trunk-1", "trunk-2", "trunk-3", "b-4of4"),
    ]
    layers = [block.manifest.flops // (2 * 16 * 16) for block in family.blocks.values()]
    assert layers == [2, 2, 2, 2, 2]


def test_models_of_one_name_get_names_of_their_own(store: Store) -> None:
    family = split_shared([source("m", Chain(1, 2)), source("m", Chain(1, 3))], store)
    assert [model.name for model in family.models] == ["m", "m-2"]
    assert_deployable(store, family)


def test_a_second_run_stores_nothing_new(store: Store) -> None:
    first = share(store, Chain(1, 2, 3), Chain(1, 2, 4))
    before = store.digests(), store.tensors()
    again = share(store, Chain(1, 2, 4), Chain(1, 2, 3))
    assert (store.digests(), store.tensors()) == before
    assert all(block.stored_before for block in again.blocks.values())
    assert not any(block.stored_before for block in first.blocks.values())


# ------------------------------------------------------------------------------------ families


def fine_tuned(name: str, layer: str) -> Callable[[int], nn.Module]:
    """Variants of a built-in model that differ from `layer` on, as fine-tuning leaves them."""
    base = built_in(name)
    children = [child for child, _ in base.named_children()]
    own = children[children.index(layer) :]

    def variant(seed: int) -> nn.Module:
        module = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for child in own:
                for parameter in getattr(module, child).parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise, alpha=0.01)
        return module

    return variant


def bytes_of(module: nn.Module) -> int:
    # What no operator uses is not stored: batch norm's count of batches.
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return sum(t.nbytes for name, t in tensors if not name.endswith("num_batches_tracked"))


@pytest.mark.slow
def test_a_family_takes_the_bytes_that_arithmetic_says(store: Store) -> None:
    """20 variants, 95 % of which share a part s of their bytes: of the bytes of 20 models,
    f s (1 - 1 / (f N)) are saved.
    """
    count, sharing = 20, 19
    variant = fine_tuned("resnet18", "layer4")
    other = built_in("resnet18", seed=1)
    modules = [*(variant(seed) for seed in range(1, sharing + 1)), other]
    total = bytes_of(other)
    own = sum(bytes_of(getattr(other, child)) for child in ("layer4", "fc"))
    part, fraction = (total - own) / total, sharing / count
    family = split_shared(
        (source(f"v{index}", each, IMAGE) for index, each in enumerate(modules)), store
    )
    bound = count * total * (1 - fraction * part * (1 - 1 / (fraction * count)))
    stored = sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file())
    assert family.parameter_bytes == pytest.approx(bound, rel=0.01)
    assert stored == pytest.approx(bound, rel=0.01)
    assert family.parameter_bytes_apart == pytest.approx(count * total, rel=0.01)
    assert len(family.blocks) == 1 + count
    assert family.blocks["trunk"].models == tuple(f"v{index}" for index in range(sharing))
    assert_deployable(store, family)
    for index in (0, sharing - 1, sharing):
        assert_equal(store, family, family.models[index].blocks, modules[index], IMAGE)
