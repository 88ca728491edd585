"""Cuts: where a program can be cut, what lies between, and which cuts balance the blocks.

Nothing here builds or writes anything. `Analysis` reads a program once; `choose` is arithmetic.

Note [Where a graph may be cut]
    A cut behind an operator separates what is computed so far from the rest; what is alive there
    (made before, needed after) has to cross. Any place will do where few tensors are alive and
    each of them can travel:
    - Weights, the batch size, and what is computed from these alone are no obstacle: each block
      gets its own copy (`graph.input_independent`).
    - A tensor must have the batch in front and numbers behind, and lie in memory row after row, as
      it will in the slot that carries it. An input of the model may lack the batch, as the model
      said so itself.
    - No later operator may write to its memory. `torch.export` keeps in-place operators: cutting
      between a batch norm and the `relu_` that overwrites its result would make the later block
      change a tensor that other blocks may be reading.
    - What has no memory of its own, such as the tuple that an LSTM returns before it is taken
      apart, cannot travel.
    A long skip connection, or a mask that every layer reads, is alive in all the places between:
    it becomes a port of each block that it passes, and its bytes count at each.
    Which tensors share memory is taken from the operators' schemas and from the shadow run.

Note [Why six tensors]
    Another tensor costs a cut nothing but its bytes, and these are part of the price by which cuts
    are chosen: about 60 bytes of a message and one copy. The limit is there for readers of
    manifests, and because a place with many live tensors is the inside of something. Six let the
    deepest part of a four-level U-Net be cut (its stream and four skips) beside a mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from blockflow.artifact import Port
from blockflow.errors import ModelRefused
from blockflow.export import has_rows
from blockflow.graph import (
    batch_symbol,
    input_independent,
    input_nodes,
    input_ports,
    is_batch_size,
    mutated_arguments,
    output_nodes,
    port_of,
    weight_nodes,
)
from blockflow.identity import Values
from blockflow.measure import ROWS, Measure
from blockflow.shadow import Shadow
from blockflow.timing import operator_seconds

HIDDEN = "hidden"
"""Name of the tensor between two blocks; `hidden_0`, `hidden_1`, ... where there are several."""

MAX_TENSORS = 6
"""Most tensors that cross a cut, unless said otherwise; see Note [Why six tensors]."""

# The cost model. A stretch's time is what its arithmetic takes plus what its memory traffic takes:
# ROWS * flops / FLOPS + (parameter bytes + ROWS * moved bytes) / BANDWIDTH. Only the ratio of the
# two rates matters for where a model is cut. 65 operations per byte balance ResNet-50 best on two
# CPU cores (docs/results/split-cpu.md), and current inference cards are near it. One model for all
# devices, and none measured unless asked for: the same model then gives the same blocks, which
# others can share, on every machine.
FLOPS = 39e12
BANDWIDTH = 600e9


@dataclass(frozen=True)
class Cost:
    """What a stretch of a model takes.

    flops: for one row, by torch's flop counter. activation_bytes: written, for one row.
    moved_bytes: read and written, without weights, for one row. measured: seconds on the device,
    for the number of rows and in the precision that were asked for (see `Measure`); None if none
    were.
    """

    parameter_bytes: int = 0
    flops: int = 0
    activation_bytes: int = 0
    moved_bytes: int = 0
    measured: float | None = None

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameter_bytes + other.parameter_bytes,
            self.flops + other.flops,
            self.activation_bytes + other.activation_bytes,
            self.moved_bytes + other.moved_bytes,
            # What nothing was measured of is here a sum's beginning.
            self.measured if other.measured is None else other.measured + (self.measured or 0.0),
        )

    @property
    def seconds(self) -> float:
        """Measured; or else modelled for `ROWS` rows, and then good for comparing only."""
        return self.modelled() if self.measured is None else self.measured

    def modelled(self, rows: int = ROWS) -> float:
        """Seconds for so many rows by the model of cost."""
        traffic = self.parameter_bytes + rows * self.moved_bytes
        return rows * self.flops / FLOPS + traffic / BANDWIDTH


@dataclass(frozen=True)
class CutPoint:
    """A place where a program can be cut: behind its `place`-th operator, called `after`.

    `tensors` are what crosses, in the order of their making, the model's inputs first. `cost` is
    what lies between the cut point before, in the list that this one is from, and this one.
    """

    place: int
    after: str
    tensors: tuple[Port, ...]
    cost: Cost

    @property
    def row_bytes(self) -> int:
        """How many bytes cross for one row."""
        return sum(map(port_bytes, self.tensors))


def port_bytes(port: Port) -> int:
    """Bytes of one row of a port, or of all of it where it has no rows."""
    dtype: torch.dtype = getattr(torch, port.dtype)
    return math.prod(port.sized(1)) * dtype.itemsize


def cut_points(
    program: ExportedProgram,
    *,
    tensors: int = MAX_TENSORS,
    measure: Measure | None = None,
) -> list[CutPoint]:
    """Every place where the program can be cut and at most `tensors` cross, first to last.

    With `measure`, costs are measured as it says as well. Raises ModelRefused.
    """
    return Analysis(program, measure).cuts(tensors)


# -------------------------------------------------------------------------------------- analysis


class Analysis:
    """What a program does, operator by operator, and where it may be cut.

    `body` are the operators that depend on the inputs' data, in order. Places are counted in it: a
    cut at place p has body[:p] before it. `costs` are theirs, measured as `measure` says, or
    modelled.
    """

    def __init__(self, program: ExportedProgram, measure: Measure | None = None) -> None:
        _refuse_training(program)
        self.program = program
        self.measure = measure
        self.batch = batch_symbol(program)
        self.weights = weight_nodes(program)
        self.inputs = input_nodes(program)
        self.input_ports = input_ports(program)
        self.outputs = output_nodes(program)
        self.free = input_independent(program)
        self.body = [
            node
            for node in program.graph.nodes
            if node.op == "call_function" and node not in self.free
        ]
        if not self.body:
            raise ModelRefused("the model computes nothing from its inputs")
        self.shadow = Shadow(program)
        self._place = {node: index for index, node in enumerate(self.body)}
        self._refuse_memory()
        self._last_use = {node: self._uses(node) for node in (*self.inputs, *self.body)}
        self._last_write: dict[int, int] = {}
        for index, node in enumerate(self.body):
            for written in mutated_arguments(node):
                self._last_write[self.shadow.memory(written)] = index
        self.costs = self._cost_per_operator()
        self._live = self._live_sets()

    def cuts(self, tensors: int = MAX_TENSORS) -> list[CutPoint]:
        """The cut points at which at most `tensors` cross."""
        places = []
        known: set[tuple[fx.Node, ...]] = {self._live[0]}
        for place in range(1, len(self.body)):
            live = self._live[place]
            if len(live) <= tensors and live not in known and self.obstacle(place) is None:
                known.add(live)  # later places with the same would be the same cut
                places.append(place)
        return self.cut_points_at(places)

    def cut_points_at(self, places: Sequence[int]) -> list[CutPoint]:
        """The cut points at given places, none of which has an obstacle."""
        edges = [0, *places]
        return [
            CutPoint(
                place=place,
                after=self.body[place - 1].name,
                tensors=self.ports(place),
                cost=sum(self.costs[before:place], Cost()),
            )
            for before, place in zip(edges, places, strict=False)
        ]

    def live(self, place: int) -> tuple[fx.Node, ...]:
        """What is made before a place and needed behind it."""
        return self._live[place]

    def ports(self, place: int) -> tuple[Port, ...]:
        """What crosses at a place, named by position alone: equal blocks get equal manifests."""
        return self.named(self._live[place])

    def named(self, nodes: Sequence[fx.Node]) -> tuple[Port, ...]:
        """Ports for what blocks hand over."""
        names = [HIDDEN] if len(nodes) == 1 else [f"{HIDDEN}_{i}" for i in range(len(nodes))]
        return tuple(
            port_of(name, node.meta["val"], self.batch)
            for name, node in zip(names, nodes, strict=True)
        )

    def obstacle(self, place: int) -> str | None:
        """Why the program cannot be cut at a place, however many tensors cross, or None."""
        live = self._live[place]
        if not any(n.op != "output" and self._reads(n, place) for v in live for n in v.users):
            return "nothing is left to compute behind it"
        for node in live:
            reason = self.misfit(node)
            if reason is not None:
                return reason
            last = self._last_write.get(self.shadow.memory(node), -1)
            if last >= place:
                return (
                    f"the tensor of {node.name} is alive there and overwritten in place later, by "
                    f"{self.body[last].name}"
                )
        return None

    def keys(self) -> list[tuple[bytes, ...]]:
        """For each place, the hashes of what is alive there.

        Programs with equal keys have computed the same with the same weights up to there, as far
        as the rest of them can tell.
        """
        values = Values(self.program, self.shadow)
        return [tuple(map(values.of, live)) for live in self._live]

    def place_of(self, module: str) -> int:
        """The place before the first operator of a submodule, named by its path from the root.

        Raises ModelRefused listing the names there are.
        """
        known = self.modules
        if module not in known:
            if not known:
                raise ModelRefused(
                    "the program does not tell which operator is of which module: it was saved by "
                    "something that leaves that out; export the model from its module"
                )
            depth = module.count(".") + 1
            alike = [name for name in known if name.count(".") < depth]
            raise ModelRefused(
                f"the model has no module {module!r} that computes; there are: {', '.join(alike)}"
            )
        return known[module]

    @cached_property
    def modules(self) -> dict[str, int]:
        """Submodules that compute, by path, in the order of their first operators' places."""
        found: dict[str, int] = {}
        for place, node in enumerate(self.body):
            for path in module_paths(node):
                found.setdefault(path, place)
        return found

    def needed(self, first: int, last: int) -> list[fx.Node]:
        """The nodes of `body[first:last]` with the input-independent ones that they use."""
        wanted = set(self.body[first:last])
        if last == len(self.body):
            wanted.update(node for node in self.outputs if node in self.free)
        queue = list(wanted)
        while queue:
            node = queue.pop()
            if is_batch_size(node, self.batch):
                continue  # asked of the block's own input
            for source in node.all_input_nodes:
                if source in self.free and source not in wanted:
                    wanted.add(source)
                    queue.append(source)
        return [n for n in self.program.graph.nodes if n in wanted and n not in self.weights]

    def used(self, first: int, last: int) -> set[fx.Node]:
        """What `body[first:last]` takes of what is made before it, and of the model's inputs."""
        own = set(self.body[first:last])
        return {
            source
            for node in self.needed(first, last)
            if not is_batch_size(node, self.batch)
            for source in node.all_input_nodes
            if source not in own and source not in self.free and source not in self.weights
        }

    def writes(self, first: int, last: int, nodes: Iterable[fx.Node]) -> bool:
        """Whether `body[first:last]` writes to memory of any of these nodes."""
        memory = {self.shadow.memory(node) for node in nodes}
        return any(
            self.shadow.memory(written) in memory
            for node in self.body[first:last]
            for written in mutated_arguments(node)
        )

    def place(self, node: fx.Node) -> int | None:
        """Where in `body` a node is; None for what is made without the inputs' data, and inputs."""
        return self._place.get(node)

    def _refuse_memory(self) -> None:
        weights = {self.shadow.memory(node): name for node, (name, _) in self.weights.items()}
        for node in self.body:
            for written in mutated_arguments(node):
                name = weights.get(self.shadow.memory(written))
                if name is not None:
                    raise ModelRefused(
                        f"the model writes to its own {name!r} as it runs ({node.name}): a block "
                        "has no memory between requests; put the model in eval mode, or take that "
                        "state out of it"
                    )

    def _uses(self, node: fx.Node) -> int:
        """Index in `body` of the last operator that needs `node`; len(body) for an output."""
        last = -1
        for user in node.users:
            if user.op == "output":
                last = len(self.body)
            elif not is_batch_size(user, self.batch):
                last = max(last, self._place[user])
        return last

    def _reads(self, user: fx.Node, place: int) -> bool:
        return self._place.get(user, -1) >= place

    def _live_sets(self) -> list[tuple[fx.Node, ...]]:
        alive = [node for node in self.inputs if self._last_use[node] >= 0]
        sets = [tuple(alive)]
        for index, node in enumerate(self.body):
            alive = [n for n in (*alive, node) if self._last_use[n] > index]
            sets.append(tuple(alive))
        return sets

    def misfit(self, node: fx.Node) -> str | None:
        """Why a node's value cannot travel."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return f"{node.name} is alive there, which is no single tensor"
        if not self.shadow.in_rows(node):
            return (
                f"the tensor of {node.name} is alive there and does not lie row after row, as "
                "after a transpose or with channels last"
            )
        try:
            port = port_of(node.name, value, self.batch)
        except ModelRefused as refusal:
            return str(refusal)
        if not has_rows(port) and self.batch is not None and node not in self.inputs:
            return f"the tensor of {node.name} is alive there and has no batch dimension in front"
        return None

    def _cost_per_operator(self) -> list[Cost]:
        seconds = {} if self.measure is None else operator_seconds(self.program, self.measure)
        seen: set[fx.Node] = set()
        costs = []
        for index, node in enumerate(self.body):
            new = {n for n in self._weights_of(index) if n not in seen}
            seen |= new
            costs.append(
                Cost(
                    parameter_bytes=sum(self.weights[n][1].nbytes for n in new),
                    flops=self.shadow.flops[node],
                    activation_bytes=self.shadow.written[node],
                    moved_bytes=self.shadow.moved[node],
                    measured=seconds.get(node),
                )
            )
        return costs

    def _weights_of(self, index: int) -> Iterable[fx.Node]:
        node = self.body[index]
        direct = [source for source in node.all_input_nodes if source in self.weights]
        if all(
            source in self.weights or source not in self.free for source in node.all_input_nodes
        ):
            return direct
        return {
            source
            for user in self.needed(index, index + 1)
            for source in user.all_input_nodes
            if source in self.weights
        }


def module_paths(node: fx.Node) -> list[str]:
    """The submodules that an operator was traced in, outermost first, without the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if isinstance(entry, tuple) and entry]
    # A module that is called several times is numbered behind an @ from the second time on.
    plain = [str(path).partition("@")[0] for path in paths]
    return [path for path in plain if path and path.replace(".", "").replace("_", "").isalnum()]


_TRAINING_FLAG = {  # operator: position of its "I am training" argument
    "aten.batch_norm.default": 5,
    "aten.dropout.default": 2,
    "aten.alpha_dropout.default": 2,
    "aten.feature_dropout.default": 2,
    "aten.feature_alpha_dropout.default": 2,
}


def _refuse_training(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        flag = _TRAINING_FLAG.get(str(node.target))
        if flag is not None and len(node.args) > flag and node.args[flag] is True:
            raise ModelRefused(
                f"{node.name} runs in training mode, so answers would depend on chance or on "
                "other requests: call eval() before the export; if its code trains whatever the "
                "mode, change that"
            )


# -------------------------------------------------------------------------------- where to cut


def choose(
    seconds: Sequence[float],
    row_bytes: Sequence[int],
    blocks: int,
    *,
    byte_seconds: float = 0.0,
    slack: float = 0.0,
) -> list[int]:
    """Choose `blocks - 1` cut points, exactly: first the least time of the slowest block, then,
    among the choices whose slowest block takes at most `slack` more than that, the fewest bytes
    that cross. Returns their indices, ascending.

    seconds: `seconds[i]` lies before cut point i and behind the one before it, the last one behind
    them all. row_bytes: what crosses at cut point i. byte_seconds: what one of these bytes costs
    each of the two blocks. By dynamic programming, O(blocks n^2) for n cut points.

    Raises ValueError where there are too few cut points.
    """
    count = len(row_bytes)
    if not 1 <= blocks <= count + 1:
        raise ValueError(f"{count} cut points make 1 to {count + 1} blocks, not {blocks}")
    # Edge 0 is the beginning, edge i + 1 is cut point i, the last edge is the end.
    total = np.fromiter(accumulate(seconds, initial=0.0), float)
    size = np.array([0, *row_bytes, 0], dtype=float)
    price = size * byte_seconds

    def solve(limit: float | None) -> tuple[float, list[int]]:
        """The least time of the slowest block; or, with a limit to that, the fewest bytes."""
        best = np.full(count + 2, np.inf)  # of the blocks so far, by the edge they end at
        best[0] = 0.0
        begins = []  # of each block, by the edge it ends at: the edge it had better begin at
        for done in range(blocks):
            following = np.full(count + 2, np.inf)
            begin = np.zeros(count + 2, dtype=int)
            for end in [count + 1] if done == blocks - 1 else range(done + 1, count + 1):
                time = total[end] - total[done:end] + price[done:end] + price[end]
                if limit is None:
                    value = np.maximum(best[done:end], time)
                else:
                    value = np.where(time <= limit, best[done:end] + size[end], np.inf)
                least = int(value.argmin())
                following[end], begin[end] = value[least], done + least
            best = following
            begins.append(begin)
        edges = [count + 1]
        for begin in reversed(begins[1:]):
            edges.append(int(begin[edges[-1]]))
        return float(best[-1]), [edge - 1 for edge in reversed(edges[1:])]

    slowest, _ = solve(None)
    return solve(slowest * (1 + slack + 1e-9))[1]
