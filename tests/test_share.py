"""Sharing: what models have in common becomes blocks that are stored and deployed once."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blockflow.artifact import Digest, Manifest, Port, Store
from blockflow.errors import ModelRefused
from blockflow.export import example, export
from blockflow.models import ModuleSource, ScriptFile, built_in
from blockflow.program import load
from blockflow.reconcile import validate
from blockflow.share import Family, family_topology, split_shared
from blockflow.split import AtModules, Everywhere, Where
from blockflow.topology import PipelineName
from blockflow.wiring import Source, Wiring, wire

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
        assert_equal(store, family, model.name, module)
    assert_deployable(store, family)
    return family


def assert_equal(
    store: Store, family: Family, name: str, module: nn.Module, *ports: Port
) -> Wiring:
    """Run a pipeline as its topology wires it, and compare with the model."""
    topology = family_topology(family)
    wiring, problems = wire(
        topology.pipelines[PipelineName(name)],
        lambda block: store.manifest(topology.blocks[block].artifact),
    )
    assert wiring is not None, problems
    programs = {b: load(store, topology.blocks[b].artifact, "cpu") for b in wiring.blocks}
    for rows in (1, 5):
        inputs = [example(port, rows, seed) for seed, port in enumerate(ports or (ROW,))]
        names = [port.name for port in wiring.inputs]
        assert names == [port.name for port in ports or (ROW,)]
        values = {Source(None, name): tensor for name, tensor in zip(names, inputs, strict=True)}
        for block, program in programs.items():
            feeds = wiring.feeds[block]
            found = program({port: values[source] for port, source in feeds.items()})
            values.update((Source(block, port), tensor) for port, tensor in found.items())
        with torch.inference_mode():
            expected = module.eval()(*[tensor.clone() for tensor in inputs])
        expected = expected if isinstance(expected, tuple) else (expected,)
        for source, tensor in zip(wiring.gives.values(), expected, strict=True):
            assert torch.equal(values[source], tensor)
    return wiring


def assert_deployable(store: Store, family: Family) -> None:
    topology = family_topology(family)
    assert set(topology.pipelines) == {model.name for model in family.models}
    manifests: dict[Digest, Manifest | str] = {
        Digest(block.artifact): store.verify(block.artifact) for block in topology.blocks.values()
    }
    assert set(manifests) == {block.digest for block in family.blocks.values()}
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


class Beside(nn.Module):
    """A trunk whose input, and whose first layer's result, something else needs as well."""

    def __init__(self, own: int, *, middle: bool = False) -> None:
        super().__init__()
        self.own, self.trunk, self.middle = linear(own), Chain(1, 2, 3), middle

    def forward(self, x: Tensor) -> Tensor:
        aside = self.own(x)
        if self.middle:
            aside = aside * torch.relu(self.trunk.layers[0](x))
        result: Tensor = self.trunk(x) + aside
        return result


class Headed(nn.Module):
    def __init__(self, head: int) -> None:
        super().__init__()
        self.trunk, self.head = Chain(1, 2, 3), linear(head, outputs=5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.trunk(x))
        return result


def test_what_only_one_model_still_needs_does_not_end_the_trunk(store: Store) -> None:
    """One model needs the input beside the trunk: it takes it from the client."""
    family = share(store, Headed(7), Headed(8), Beside(9))
    assert chains(family) == [("trunk", "a-2of2"), ("trunk", "b-2of2"), ("trunk", "c-2of2")]
    trunk = family.blocks["trunk"].manifest
    assert trunk.flops == 3 * 2 * 16 * 16
    assert len(trunk.outputs) == 1
    assert [model.chain for model in family.models] == [True, True, False]
    assert sorted(family.models[2].feeds[1].values()) == ["input.x", "trunk.hidden"]
    assert len(share(store, Headed(7), Beside(9), Headed(8), blocks=3).blocks) == 5


def test_a_trunk_gives_what_any_of_its_models_needs(store: Store) -> None:
    class Middle(nn.Module):
        def __init__(self, own: int) -> None:
            super().__init__()
            self.trunk, self.own = Chain(1, 2, 3), linear(own)

        def forward(self, x: Tensor) -> Tensor:
            first = torch.relu(self.trunk.layers[0](x))
            second = torch.relu(self.trunk.layers[1](first))
            third = torch.relu(self.trunk.layers[2](second))
            result: Tensor = self.own(third) + first
            return result

    family = share(store, Headed(7), Middle(9))
    trunk = family.blocks["trunk"]
    assert trunk.models == ("a", "b")
    assert trunk.manifest.flops == 3 * 2 * 16 * 16
    assert len(trunk.manifest.outputs) == 2
    assert len(family.models[0].feeds[1]) == 1
    assert len(family.models[1].feeds[1]) == 2


def test_models_that_take_different_inputs_share_a_trunk(store: Store) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = Chain(1, 2, 3)

        def forward(self, x: Tensor, scale: Tensor, unused: Tensor) -> Tensor:
            result: Tensor = self.trunk(x) * scale
            return result

    ports = [Port(name, "float32", ("batch", 16)) for name in ("x", "scale", "unused")]
    modules = Headed(7), Scaled()
    family = split_shared(
        [source("a", copy.deepcopy(modules[0])), source("b", copy.deepcopy(modules[1]), *ports)],
        store,
    )
    assert_deployable(store, family)
    assert_equal(store, family, "a", modules[0])
    wiring = assert_equal(store, family, "b", modules[1], *ports)
    assert family.blocks["trunk"].models == ("a", "b")
    assert family.blocks["trunk"].manifest.flops == 3 * 2 * 16 * 16
    assert [port.name for port in wiring.inputs] == ["x", "scale", "unused"]


class Overwrites(nn.Module):
    """Keeps the trunk's input alive, and overwrites it in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Chain(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.trunk(x)
        return result + x.mul_(2.0)


def test_a_model_that_overwrites_its_input_after_the_trunk_shares_the_trunk(store: Store) -> None:
    """It overwrites a copy: the input comes to it straight from the client."""
    family = share(store, Overwrites(), Headed(7), Headed(8))
    trunk = family.blocks["trunk"]
    assert trunk.models == ("a", "b", "c")
    assert trunk.manifest.flops == 3 * 2 * 16 * 16
    assert not trunk.manifest.mutates_inputs
    assert family.blocks["a-2of2"].manifest.mutates_inputs


class Between(nn.Module):
    """The trunk of `Headed` and, as a second output, what lies in its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Chain(1, 2, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.relu(self.trunk.layers[0](x))
        second = torch.relu(self.trunk.layers[1](first))
        return torch.relu(self.trunk.layers[2](second)), first


def test_a_model_that_ends_inside_another_gives_its_outputs_from_the_trunk(store: Store) -> None:
    family = share(store, Between(), Headed(7))
    assert chains(family) == [("trunk",), ("trunk", "b-2of2")]
    trunk = family.blocks["trunk"].manifest
    assert list(family.models[0].gives) == ["output_0", "output_1"]
    # In the order of their making: not that of the model, which the pipeline restores.
    assert [s.partition(".")[2] for s in family.models[0].gives.values()] == [
        port.name for port in reversed(trunk.outputs)
    ]


def test_what_a_model_computes_and_does_not_use_is_no_part_of_it(store: Store) -> None:
    """A block that feeds nothing is refused by every server."""

    class Idle(nn.Module):
        def __init__(self, *, writes: bool) -> None:
            super().__init__()
            self.trunk, self.own, self.writes = Chain(1, 2, 3), linear(9), writes

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            unused = self.trunk(x)
            if self.writes:
                unused.add_(1.0)
            result = self.own(x)
            return result, result

    family = share(store, Headed(7), Idle(writes=False), Idle(writes=True))
    assert family.blocks[family.models[0].blocks[0]].models == ("a",)
    own = family.blocks[family.models[1].blocks[-1]]
    assert own.manifest.flops == 2 * 16 * 16
    # Its outputs are one tensor.
    assert [s.partition(".")[2] for s in family.models[1].gives.values()] == [
        "output_0",
        "output_1",
    ]


class Repeats(nn.Module):
    """One layer again and again, as ALBERT's: its blocks are one artifact."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.layer, self.head = linear(1), linear(head)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = torch.relu(self.layer(x))
        result: Tensor = self.head(x)
        return result


def test_a_pipeline_may_pass_one_artifact_twice(store: Store) -> None:
    family = share(store, Repeats(2), Repeats(3), blocks=7)
    for model in family.models:
        assert len(set(model.blocks)) == len(model.blocks)
        digests = {family.blocks[name].digest for name in model.blocks}
        assert len(digests) < len(model.blocks)


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


# ---------------------------------------------------------------------- sets that overlap

LAYER = 2 * 16 * 16
PAIR = (Port("x", "float32", ("batch", 16)), Port("y", "float32", ("batch", 16)))


def share_on(
    store: Store, ports: tuple[Port, ...], *modules: nn.Module, blocks: Where = 1
) -> Family:
    """Share models of these inputs, called a, b, ..., and check every pipeline."""
    sources = [
        source("abcdefghij"[i], copy.deepcopy(each), *ports) for i, each in enumerate(modules)
    ]
    family = split_shared(sources, store, blocks=blocks)
    for model, module in zip(family.models, modules, strict=True):
        assert_equal(store, family, model.name, module, *ports)
    assert_deployable(store, family)
    return family


def sets(family: Family) -> list[tuple[str, ...]]:
    return [block.models for block in family.blocks.values() if len(block.models) > 1]


class Towers(nn.Module):
    """A tower on each of two inputs, and a head on both."""

    def __init__(self, left: Sequence[int], right: Sequence[int], head: int) -> None:
        super().__init__()
        self.left, self.right, self.head = Chain(*left), Chain(*right), linear(head)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.head(self.left(x) + self.right(y))
        return result


def test_sets_of_models_that_overlap_all_become_blocks(store: Store) -> None:
    """a and b share the first tower, b and c the second."""
    family = share_on(
        store,
        PAIR,
        Towers((1, 2), (10, 11, 12), 91),
        Towers((1, 2), (20, 21, 22), 92),
        Towers((3, 4), (20, 21, 22), 93),
    )
    assert sets(family) == [("a", "b"), ("b", "c")]
    assert chains(family) == [
        ("trunk-1", "a-2of2"),
        ("trunk-1", "trunk-2", "b-3of3"),
        ("trunk-2", "c-2of2"),
    ]
    assert [family.blocks[name].manifest.flops for name in ("trunk-1", "trunk-2")] == [
        2 * LAYER,
        3 * LAYER,
    ]
    assert family.models[1].feeds == (
        {"x": "input.x"},
        {"y": "input.y"},
        {"hidden_0": "trunk-1.hidden", "hidden_1": "trunk-2.hidden"},
    )
    # Three models of six layers; two of them and three of them are counted once too often.
    assert family.flops_apart == 3 * 6 * LAYER
    assert family.flops == (18 - 2 - 3) * LAYER
    weights = (16 * 16 + 16) * 4
    assert family.parameter_bytes_apart == 18 * weights
    assert family.parameter_bytes == 13 * weights
    assert family.kept_apart == ()


def test_branches_of_one_input_that_overlap_all_become_blocks(store: Store) -> None:
    # a and b share the wide branch, b and c a narrow one.
    family = share(
        store,
        ThreeBranches(1, 10, wide=64),
        ThreeBranches(1, 20, wide=64),
        ThreeBranches(3, 20, wide=64),
    )
    assert sets(family) == [("a", "b"), ("b", "c")]
    assert family.flops_apart == 3 * (2 * 2 * 16 * 64 + LAYER)
    assert family.flops == 2 * 2 * 2 * 16 * 64 + 2 * LAYER
    names = {w.sha256 for b in family.blocks.values() for w in store.weights(b.manifest).values()}
    assert len(store.tensors()) == len(names)


class Stemmed(nn.Module):
    """Branches of what a stem gives, traced in the order in which they are named."""

    def __init__(self, *branches: int) -> None:
        super().__init__()
        self.stem = Chain(1, 2)
        self.branches = nn.ModuleList(Chain(seed, seed + 1) for seed in branches)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        result: Tensor = torch.stack([branch(stem) for branch in self.branches]).sum(0)
        return result


@pytest.mark.parametrize("blocks", [1, 3, Everywhere(), AtModules(("stem.layers.1", "branches.1"))])
def test_every_two_of_three_models_share_a_branch_behind_what_all_share(
    store: Store, blocks: Where
) -> None:
    family = share_on(
        store, (ROW,), Stemmed(10, 20), Stemmed(30, 20), Stemmed(10, 30), blocks=blocks
    )
    assert set(sets(family)) == {("a", "b", "c"), ("a", "b"), ("a", "c"), ("b", "c")}
    assert family.flops == (2 + 3 * 2) * LAYER
    assert family.flops_apart == 3 * (2 + 2 * 2) * LAYER
    if blocks == 1:
        assert [len(chain) for chain in chains(family)] == [4, 4, 4]
        assert len(family.blocks["trunk-1"].manifest.outputs) == 1


class Turned(nn.Module):
    """Branches of which one gives a tensor that does not lie row after row."""

    def __init__(self, left: int, right: int, head: int) -> None:
        super().__init__()
        self.left, self.right, self.head = linear(left), linear(right), linear(head, 4, 4)
        self.requires_grad_(False)  # torch folds what lies otherwise only where gradients may come

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        left = torch.relu(self.left(x))
        right = torch.relu(self.right(y)).view(-1, 4, 4).transpose(1, 2)
        result: Tensor = self.head(right).reshape(-1, 16) + left
        return result


def test_what_cannot_travel_is_computed_by_those_who_take_it(store: Store) -> None:
    family = share_on(store, PAIR, Turned(1, 10, 5), Turned(1, 20, 6), Turned(2, 20, 7))
    assert sets(family) == [("a", "b"), ("b", "c")]
    assert family.kept_apart == ()  # views are no work


class WithState(nn.Module):
    """An LSTM of which one model needs the states as well, and all write in place."""

    def __init__(self, head: int, *, state: bool) -> None:
        super().__init__()
        self.stem, self.head, self.state = linear(1), linear(head), state
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.lstm = nn.LSTM(4, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        steps, (last, _) = self.lstm(self.stem(x).view(-1, 4, 4))
        result: Tensor = self.head(steps[:, -1].relu_())
        return result + last[0] if self.state else result


def test_an_operator_that_gives_several_tensors_is_shared_whichever_are_needed(
    store: Store,
) -> None:
    family = share(store, WithState(7, state=True), WithState(8, state=False))
    [shared] = [block for block in family.blocks.values() if len(block.models) > 1]
    assert shared.manifest.flops >= LAYER


class Spread(nn.Module):
    """Needs what every layer of the trunk gives."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(seed) for seed in range(10))
        self.heads = nn.ModuleList(linear(head + seed) for seed in range(10))

    def forward(self, x: Tensor) -> Tensor:
        heads = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = torch.relu(layer(x))
            heads.append(head(x))
        return torch.stack(heads).sum(0)


def test_a_shared_block_gives_as_many_tensors_as_its_models_need(store: Store) -> None:
    family = share(store, Spread(100), Spread(200))
    assert family.flops == 3 * 10 * LAYER
    [shared] = [block for block in family.blocks.values() if len(block.models) > 1]
    assert len(shared.manifest.outputs) == 10


class Cast(nn.Module):
    """Asserts of its input what export asserts of all that is cast."""

    def __init__(self, head: int | None) -> None:
        super().__init__()
        self.trunk, self.head = Chain(1, 2), None if head is None else linear(head)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.trunk(x.to(torch.float32))
        return result if self.head is None else self.head(result)


def test_assertions_are_no_block_of_their_own(store: Store) -> None:
    exported = export(Cast(None).eval(), (ROW,)).graph.nodes
    assert any("assert" in str(node.target) for node in exported)
    family = share(store, Cast(None), Cast(8), Cast(9))
    assert family.flops == 4 * LAYER
    for model in family.models:
        assert all(model.blocks)


class Tabled(nn.Module):
    """Two branches, the second of which adds a table, the same for all rows."""

    def __init__(self, left: Sequence[int], right: Sequence[int], head: int) -> None:
        super().__init__()
        self.left, self.right, self.head = Chain(*left), Chain(*right), linear(head)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        result: Tensor = self.head(self.left(x) + self.right(x)) + table
        return result


def test_where_tensors_without_rows_allow_chains_only_the_better_set_is_kept_and_it_is_said(
    store: Store,
) -> None:
    ports = ROW, Port("table", "float32", (1, 16))
    family = share_on(
        store,
        ports,
        Tabled((1, 2), (10, 11, 12), 91),
        Tabled((1, 2), (20, 21, 22), 92),
        Tabled((3, 4), (20, 21, 22), 93),
    )
    assert sets(family) == [("b", "c")]
    assert family.flops == (18 - 3) * LAYER
    [said] = family.kept_apart
    assert said.startswith(
        f"a, b compute alike, but not in one block of them all, {2 * LAYER / 1000:.1f} kFLOP per "
        "row with 2.2 kB of weights: "
    )
    assert "without rows cannot go" in said


class Wide(nn.Module):
    """A shared layer whose result only travels with its rows in front, which they are not."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.shared, self.head = linear(1), linear(head)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.mm(self.shared.weight, x.T).T.contiguous())
        return result


class Middle(nn.Module):
    """Ends in a product whose result does not lie row after row, and goes on with it."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.shared, self.head = linear(1), linear(head)

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.mm(self.shared.weight, x.T)
        result: Tensor = self.head(turned.T * 2.0)
        return result


def test_what_cannot_be_cut_out_is_named_with_the_reason(store: Store) -> None:
    assert sets(share(store, Wide(7), Wide(8))) == [("a", "b")]
    family = share(store, Middle(7), Middle(8))
    assert sets(family) == []
    [said] = family.kept_apart
    assert said.startswith("a, b compute alike, but not in one block of them all, 512 FLOP per row")
    assert (
        said.endswith("is alive there and has no batch dimension in front") or "row after" in said
    )


class Ignores(nn.Module):
    """Takes a second input and does nothing with it; ends in a layer that another goes on from."""

    def __init__(self, *seeds: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(linear(seed) for seed in seeds))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def test_an_input_that_is_not_used_goes_to_a_block_that_is_a_models_own(store: Store) -> None:
    family = share_on(store, PAIR, Ignores(1, 2), Ignores(1, 2, 3))
    assert chains(family) == [("trunk", "a-2of2"), ("trunk", "b-2of2")]
    assert family.blocks["trunk"].manifest.flops == LAYER
    [said] = family.kept_apart
    assert said.endswith("need a block that is a model's own, here of a, b")
    assert chains(share_on(store, PAIR, Ignores(1, 2), Ignores(1, 2))) == [("trunk",), ("trunk",)]


class Expression(nn.Module):
    """A network written down as steps: (layer, value, other value or None), each a new value."""

    def __init__(self, steps: Sequence[tuple[int, int, int | None]], ends: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(seed): linear(seed) for seed, *_ in steps})
        self.steps, self.ends = tuple(steps), tuple(ends)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        values = [x, y]
        for seed, first, second in self.steps:
            value = self.layers[str(seed)](values[first])
            values.append(torch.relu(value) if second is None else value + values[second])
        return tuple(values[end] for end in self.ends)

    def computed(self) -> Counter[object]:
        """The layers that its outputs depend on, in words equal for equal computations."""
        words: list[object] = ["x", "y"]
        needed = set(self.ends)
        for place, (_, first, second) in reversed([*enumerate(self.steps, 2)]):
            if place in needed:
                needed |= {first} if second is None else {first, second}
        for seed, first, second in self.steps:
            words.append((seed, words[first], None if second is None else words[second]))
        # A layer of a value is the same computation whatever is done with its result.
        steps = enumerate(self.steps, 2)
        return Counter((seed, words[f]) for place, (seed, f, _) in steps if place in needed)


@pytest.mark.parametrize("number", range(8))
def test_whatever_models_have_in_common_is_computed_once(store: Store, number: int) -> None:
    """Networks drawn at random: no layer is in two blocks, and each model is what it was."""
    draw = random.Random(number)
    modules = []
    for _ in range(draw.choice([2, 3, 4])):
        steps: list[tuple[int, int, int | None]] = []
        for count in range(draw.randint(2, 7)):
            other = draw.choice([None, None, draw.randrange(count + 2)])
            steps.append((draw.randrange(3), draw.randrange(max(0, count - 1), count + 2), other))
        ends = {len(steps) + 1, draw.randrange(2, len(steps) + 2)}
        modules.append(Expression(steps, sorted(ends)))
    blocks = draw.choice([1, 1, 2, Everywhere()])
    family = share_on(store, PAIR, *modules, blocks=blocks)
    computed = [module.computed() for module in modules]
    assert family.flops_apart == LAYER * sum(map(Counter.total, computed))
    if not isinstance(blocks, Everywhere):  # in small pieces, equal blocks have other inputs
        together: Counter[object] = Counter()
        for each in computed:
            together |= each
        assert family.flops == LAYER * together.total()
    assert family.kept_apart == ()


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


def test_shared_parts_are_cut_before_the_modules_that_were_named(store: Store) -> None:
    modules = [TwoHeads(3, 4), TwoHeads(3, 5), Headed(6)]
    sources = [source(name, copy.deepcopy(m)) for name, m in zip("abc", modules, strict=True)]
    where = AtModules(("trunk.layers.1", "head"))
    family = split_shared(sources, store, blocks=where)
    for model, module in zip(family.models, modules, strict=True):
        assert_equal(store, family, model.name, module)
    assert family.blocks["trunk-1"].models == ("a", "b", "c")
    assert family.blocks["trunk-1"].manifest.flops == 2 * 16 * 16
    assert family.blocks[family.models[2].blocks[-1]].manifest.origin.first == "linear_3"
    with pytest.raises(ModelRefused, match="has no module 'nosuch'"):
        split_shared(sources, store, blocks=AtModules(("nosuch",)))


def test_shared_parts_are_cut_everywhere(store: Store) -> None:
    chain = [Chain(1, 2, 3), Chain(1, 2, 4)]
    sources = [source(name, copy.deepcopy(m)) for name, m in zip("ab", chain, strict=True)]
    family = split_shared(sources, store, blocks=Everywhere())
    assert [len(blocks) for blocks in chains(family)] == [6, 6]
    # The last ReLU is an equal block of both, though of other inputs.
    assert len(family.blocks) == 7
    assert_equal(store, family, "b", chain[1])


def test_equal_blocks_in_opposite_orders_are_not_deployed_as_one(store: Store) -> None:
    """Requests of two pipelines through the same blocks in opposite orders could block both."""
    first = nn.Sequential(linear(1), nn.ReLU(), linear(2), nn.GELU(), linear(3))
    other = nn.Sequential(linear(4), nn.GELU(), linear(5), nn.ReLU(), linear(6))
    row = Port("input", "float32", ("batch", 16))
    sources = [source("a", first, row), source("b", other, row)]
    family = split_shared(sources, store, blocks=Everywhere())
    assert_deployable(store, family)
    assert len(family.blocks) == 10
    assert len(store.digests()) == 8


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
        assert_equal(store, family, family.models[index].name, modules[index], IMAGE)
