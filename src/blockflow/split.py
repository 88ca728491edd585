"""Splitting: from a model to blocks in the store.

A network can be cut where exactly one tensor is alive: everything after is a function of it.
`split` finds these places, chooses the ones that balance the blocks, builds every block as a
program of its own and proves that together they still are the model, bit for bit.

Note [Where a graph may be cut]
    - Weights, the batch size, and what is computed from these alone are no obstacle: each block
      gets its own copy (`program.input_independent`).
    - The live tensor must have the batch in front and numbers behind, and lie in memory row
      after row, as it will in the slot that carries it.
    - No later operator may write to its memory. `torch.export` keeps in-place operators: cutting
      between a batch norm and the `relu_` that overwrites its result would make the later block
      change a tensor that other blocks may be reading.
    Which tensors share memory is taken from the operators' schemas and from the storages seen
    in a run on fake tensors: schemas do not tell that an idle dropout returns its input.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from blockflow.artifact import BATCH, PROGRAM_FILE, Digest, Manifest, Origin, Port, Store
from blockflow.errors import ModelRefused
from blockflow.models import ModuleSource, ProgramFile, ScriptFile, SourceModel
from blockflow.program import (
    batch_symbol,
    copy_graph,
    digest_of,
    first_line,
    flatten_outputs,
    input_independent,
    input_nodes,
    input_ports,
    is_batch_size,
    log_captured,
    mutated_arguments,
    output_names,
    output_nodes,
    output_ports,
    plain_module,
    port_of,
    prefix_digests,
    read_archive,
    read_script,
    script_digest,
    viewed_arguments,
    weight_nodes,
    write_archive,
)
from blockflow.topology import Topology
from blockflow.topology import parse as parse_topology

HIDDEN = "hidden"
"""Name of the tensor between two blocks."""

Progress = Callable[[str], None]

# The cost model. A block's time is what its arithmetic takes plus what its memory traffic takes:
# ROWS * flops / FLOPS + (parameter bytes + 2 * ROWS * activation bytes) / BANDWIDTH, each
# activation being written once and read once. Only the ratio of the two rates matters for where
# a model is cut; about 50 operations per byte is a current inference card in single precision.
ROWS = 8
FLOPS = 30e12
BANDWIDTH = 600e9


@dataclass(frozen=True)
class Cost:
    """What a stretch of a model takes; flops and activation bytes are for one row."""

    parameter_bytes: int = 0
    flops: int = 0
    activation_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameter_bytes + other.parameter_bytes,
            self.flops + other.flops,
            self.activation_bytes + other.activation_bytes,
        )

    @property
    def seconds(self) -> float:
        """Modelled time of `ROWS` rows: good for comparing stretches, not for predicting."""
        traffic = self.parameter_bytes + 2 * ROWS * self.activation_bytes
        return ROWS * self.flops / FLOPS + traffic / BANDWIDTH


@dataclass(frozen=True)
class CutPoint:
    """A place where a program can be cut, behind the operator `after`.

    `tensor` is what crosses, `row_bytes` how much of it one row has, `cost` what lies between the
    previous cut point and this one.
    """

    index: int
    after: str
    tensor: Port
    row_bytes: int
    cost: Cost


@dataclass(frozen=True)
class BlockSource:
    """A block that is built but not stored."""

    program: ExportedProgram
    digest: Digest
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    cost: Cost
    mutates_inputs: bool
    origin: Origin

    def manifest(self) -> Manifest:
        return Manifest(
            format="torch.export",
            digest=self.digest,
            inputs=self.inputs,
            outputs=self.outputs,
            parameter_bytes=self.cost.parameter_bytes,
            flops=self.cost.flops,
            mutates_inputs=self.mutates_inputs,
            origin=self.origin,
            files={},
        )


@dataclass(frozen=True)
class StoredBlock:
    """A block in the store, under the name it gets in a topology.

    `seconds` is its modelled time, `Cost.seconds` (0 for TorchScript). `shared` says that an equal
    block was there before.
    """

    name: str
    manifest: Manifest
    seconds: float
    shared: bool

    @property
    def digest(self) -> Digest:
        return self.manifest.digest


@dataclass(frozen=True)
class SplitResult:
    """What `split_model` did: the blocks of `model`, first to last, in the store at `store`."""

    model: str
    store: Path
    blocks: tuple[StoredBlock, ...]


# ---------------------------------------------------------------------------------------- export


def export(module: nn.Module, inputs: Sequence[Port]) -> ExportedProgram:
    """Trace a module in eval mode with a symbolic batch, on CPU.

    `inputs` are under the argument names of `forward`, whose order the program keeps. Raises
    ModelRefused with torch's reason in one line.
    """
    names = _argument_names(module, inputs)
    examples = {port.name: example(port, rows=2) for port in inputs}
    rows = Dim("batch", min=1)
    shapes = {port.name: {0: rows} if _has_rows(port) else {} for port in inputs}
    if names is None:  # forward(*args)
        args, kwargs = tuple(examples.values()), {}
        dynamic: Any = (tuple(shapes.values()),)
    else:
        args, kwargs = (), {name: examples[name] for name in names}
        dynamic = {name: shapes[name] for name in names}
    said = io.StringIO()
    try:
        with (
            # torch prints the half-traced graph and logs its thoughts before it raises.
            contextlib.redirect_stderr(said),
            log_captured("torch.fx.experimental.symbolic_shapes"),
            warnings.catch_warnings(),
        ):
            # Said of recurrent layers, which keep their weights in a list as well.
            warnings.filterwarnings("ignore", ".* assigned during export", UserWarning)
            program = torch.export.export(
                module, args, kwargs, dynamic_shapes=dynamic, strict=False
            )
    except Exception as error:
        # torch.export reports what it cannot trace through a dozen unrelated types.
        raise ModelRefused(
            f"torch.export cannot trace {type(module).__name__}: {first_line(error)}"
        ) from error
    sys.stderr.write(said.getvalue())
    return program


def example(port: Port, rows: int, seed: int = 0) -> Tensor:
    """A random CPU tensor that fits a port; integers are 0 or 1, which every table has."""
    generator = torch.Generator().manual_seed(seed)
    shape = [rows if size == BATCH else int(size) for size in port.shape]
    dtype: torch.dtype = getattr(torch, port.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _has_rows(port: Port) -> bool:
    return port.shape[:1] == (BATCH,)


def _argument_names(module: nn.Module, inputs: Sequence[Port]) -> list[str] | None:
    """The names of `inputs` in the order of `forward`, or None where it takes any number."""
    if not inputs:
        raise ModelRefused(f"{type(module).__name__} takes no input: a block needs one")
    parameters = inspect.signature(module.forward).parameters
    kinds = {p.kind for p in parameters.values()}
    given = {port.name for port in inputs}
    if inspect.Parameter.VAR_POSITIONAL in kinds and not given <= set(parameters):
        return None
    unknown = given - set(parameters)
    if unknown:
        raise ModelRefused(
            f"{type(module).__name__}.forward takes ({', '.join(parameters)}), "
            f"no {', '.join(sorted(unknown))}"
        )
    return [name for name in parameters if name in given]


# ------------------------------------------------------------------------------------ cut points


class _Analysis:
    """What a program does, node by node, and where it may be cut."""

    def __init__(self, program: ExportedProgram) -> None:
        _refuse_training(program)
        self.program = program
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
        self._place = {node: index for index, node in enumerate(self.body)}
        if not self.body:
            raise ModelRefused("the model computes nothing from its inputs")
        self._fake = _FakeRun(self)
        self._refuse_memory()
        self.costs = self._cost_per_node()
        self.cuts: list[CutPoint] = []
        self.ends: list[int] = []  # of each cut point: how much of `body` lies before it
        self.live: list[fx.Node] = []  # and the node whose tensor crosses there
        self._find_cuts()

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

    def mutated_inputs(self, last: int) -> bool:
        """Whether `body[:last]` writes to memory of the model's inputs."""
        memory = {self._fake.memory(node) for node in self.inputs}
        return any(
            self._fake.memory(written) in memory
            for node in self.body[:last]
            for written in mutated_arguments(node)
        )

    def _refuse_memory(self) -> None:
        weights = {self._fake.memory(node): name for node, (name, _) in self.weights.items()}
        for node in self.body:
            for written in mutated_arguments(node):
                name = weights.get(self._fake.memory(written))
                if name is not None:
                    raise ModelRefused(
                        f"the model writes to its own {name!r} as it runs: a block has no memory "
                        "between requests; put the model in eval mode"
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

    def _find_cuts(self) -> None:
        last_use = {node: self._uses(node) for node in (*self.inputs, *self.body)}
        last_write: dict[int, int] = {}
        for index, node in enumerate(self.body):
            for written in mutated_arguments(node):
                last_write[self._fake.memory(written)] = index
        alive = {node for node in self.inputs if last_use[node] >= 0}
        cost = Cost()
        for index, node in enumerate(self.body[:-1]):
            cost += self.costs[index]
            alive = {n for n in (*alive, node) if last_use[n] > index}
            if len(alive) != 1:
                continue
            (value,) = alive
            port = self._crosses(value)
            if (
                port is None
                or value in self.live  # nothing happened since the place before
                or last_write.get(self._fake.memory(value), -1) > index
                or all(user.op == "output" for user in value.users)  # the rest would be empty
            ):
                continue
            size = math.prod(int(n) for n in port.shape if n != BATCH) * value.meta["val"].itemsize
            self.cuts.append(CutPoint(len(self.cuts), node.name, port, size, cost))
            self.ends.append(index + 1)
            self.live.append(value)
            cost = Cost()
        self.rest = cost + self.costs[-1]

    def _crosses(self, node: fx.Node) -> Port | None:
        value = node.meta.get("val")
        if node in self.inputs or not isinstance(value, Tensor) or not self._fake.in_rows(node):
            return None
        try:
            port = port_of(HIDDEN, value, self.batch)
        except ModelRefused:
            return None
        return port if _has_rows(port) or self.batch is None else None

    def _cost_per_node(self) -> list[Cost]:
        seen: set[fx.Node] = set()
        costs = []
        for index, node in enumerate(self.body):
            new = {n for n in self._weights_of(index) if n not in seen}
            seen |= new
            parameters = sum(_bytes(self.weights[n][1]) for n in new)
            costs.append(Cost(parameters, self._fake.flops[node], self._fake.written[node]))
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


class _FakeRun(fx.Interpreter):
    """One run over tensors without data, two rows each: flops, bytes and shared memory."""

    _ROWS = 2  # one row would let views pass for contiguous that are not

    def __init__(self, analysis: _Analysis) -> None:
        super().__init__(analysis.program.graph_module, garbage_collect_values=False)
        self._rows = self._ROWS if analysis.batch is not None else 1
        self.flops: dict[fx.Node, int] = {}
        self.written: dict[fx.Node, int] = {}
        self._memory: dict[fx.Node, int] = {}
        self._contiguous: dict[fx.Node, bool] = {}
        self._owner: dict[int, int] = {}
        self._mode = FakeTensorMode()
        self._counter = FlopCounterMode(display=False)
        with torch.no_grad(), self._mode, self._counter:
            placeholders = [n for n in analysis.program.graph.nodes if n.op == "placeholder"]
            try:
                self.run(*map(self._fake, placeholders), enable_io_processing=False)
            except Exception as error:
                raise ModelRefused(f"the model does not run: {first_line(error)}") from error

    def memory(self, node: fx.Node) -> int:
        """Equal for nodes whose tensors share memory."""
        return self._memory[node]

    def in_rows(self, node: fx.Node) -> bool:
        return self._contiguous[node]

    def _fake(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        sizes: list[Any] = list(value.shape)
        if not any(isinstance(size, torch.SymInt) for size in sizes):
            return torch.empty_strided(sizes, value.stride(), dtype=value.dtype)
        rows = [self._rows if isinstance(size, torch.SymInt) else size for size in sizes]
        return torch.empty(rows, dtype=value.dtype)

    def run_node(self, n: fx.Node) -> Any:
        before = self._counter.get_total_flops()
        result = super().run_node(n)
        self.flops[n] = (self._counter.get_total_flops() - before) // self._rows
        tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self._contiguous[n] = all(t.is_contiguous() for t in tensors)
        # A set of nodes sharing memory is named by the first of them.
        sources = [self._memory[source] for source in (*viewed_arguments(n), *mutated_arguments(n))]
        storages = [t.untyped_storage()._cdata for t in tensors]
        known = [self._owner[s] for s in storages if s in self._owner]
        group = min([*sources, *known], default=len(self._memory))
        for other in {*sources, *known} - {group}:
            self._merge(other, group)
        self._memory[n] = group
        fresh = [t for t, s in zip(tensors, storages, strict=True) if s not in self._owner]
        self._owner.update(dict.fromkeys(storages, group))
        self.written[n] = sum(_bytes(t) for t in fresh) // self._rows
        return result

    def _merge(self, old: int, new: int) -> None:
        self._memory.update((n, new) for n, group in self._memory.items() if group == old)
        self._owner.update((s, new) for s, group in self._owner.items() if group == old)


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


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
                "other requests: call eval() before the export"
            )


def cut_points(program: ExportedProgram) -> list[CutPoint]:
    """Every place where the program can be cut, first to last. Raises ModelRefused."""
    return _Analysis(program).cuts


# -------------------------------------------------------------------------------- where to cut


def choose_cuts(costs: Sequence[Cost], row_bytes: Sequence[int], blocks: int) -> list[int]:
    """Choose `blocks - 1` of the cut points, exactly: first the least time of the slowest block,
    then, among those, the fewest bytes that cross.

    `costs[i]` lies before cut point `i`, the last one behind them all; `row_bytes[i]` crosses at
    `i`. There must be enough cut points.
    """
    count = len(row_bytes)
    total = list(accumulate((cost.seconds for cost in costs), initial=0.0))

    def solve(value: Callable[[float, float, int], float]) -> tuple[float, list[int]]:
        """Least `value(best before, seconds of this block, cut it ends at)` over all choices."""
        # best[c]: the least value of the blocks so far if they end at cut c, and their cuts.
        best = {c: (value(0.0, total[c + 1], c), [c]) for c in range(count)}

        def extend(end: int, cut: int) -> tuple[float, list[int]]:
            """The best way to add a block that ends before segment `end`."""
            least, last = min(
                (value(best[p][0], total[end] - total[p + 1], cut), p) for p in best if p < end - 1
            )
            return least, [*best[last][1], cut]

        for done in range(1, blocks - 1):
            best = {c: extend(c + 1, c) for c in range(done, count)}
        least, cuts = extend(len(total) - 1, -1)
        return least, cuts[:-1]

    if blocks == 1:
        return []
    slowest, _ = solve(lambda before, seconds, _cut: max(before, seconds))
    limit = slowest * (1 + 1e-9)
    _, chosen = solve(
        lambda before, seconds, cut: (
            math.inf if seconds > limit else before + (row_bytes[cut] if cut >= 0 else 0)
        )
    )
    return chosen


def split(
    program: ExportedProgram,
    blocks: int,
    name: str,
    *,
    model: Callable[..., Any] | None = None,
    progress: Progress | None = None,
) -> list[BlockSource]:
    """Cut a program into `blocks` blocks of about equal time, proven equal to the model.

    `model` is what the blocks are compared with, called with the program's inputs in their order;
    the program itself if it is left out. Raises ModelRefused if there are too few cut points or
    the blocks do not give the model's results.
    """
    analysis = _Analysis(program)
    if blocks < 1:
        raise ModelRefused(f"{name} cannot be split into {blocks} blocks: 1 is the least")
    if blocks > len(analysis.cuts) + 1:
        raise ModelRefused(
            f"{name} can be split into at most {len(analysis.cuts) + 1} blocks, not {blocks}: it "
            f"has {len(analysis.cuts)} places where a single tensor is alive, contiguous, and not "
            "overwritten later"
        )
    chosen = choose_cuts(
        [*(cut.cost for cut in analysis.cuts), analysis.rest],
        [cut.row_bytes for cut in analysis.cuts],
        blocks,
    )
    return _build(analysis, [analysis.cuts[i] for i in chosen], name, model, progress)


def split_at(
    program: ExportedProgram,
    cuts: Sequence[CutPoint],
    name: str,
    *,
    model: Callable[..., Any] | None = None,
    progress: Progress | None = None,
) -> list[BlockSource]:
    """Cut a program at given cut points of its own, for example those of `shared_prefix`."""
    analysis = _Analysis(program)
    ordered = sorted(set(cuts), key=lambda cut: cut.index)
    for cut in ordered:
        if cut.index >= len(analysis.cuts) or analysis.cuts[cut.index] != cut:
            raise ModelRefused(f"{name} has no cut point behind {cut.after!r}")
    return _build(analysis, ordered, name, model, progress)


def shared_prefix(programs: Sequence[ExportedProgram]) -> tuple[CutPoint, ...] | None:
    """The deepest cut before which all programs compute the same with the same weights.

    Returns that cut point of each program, in their order, or None if they share no prefix.
    Splitting each program there with `split_at` gives equal first blocks: one artifact.
    """
    tables: list[dict[bytes, CutPoint]] = []
    for program in programs:
        analysis = _Analysis(program)
        digests = prefix_digests(program)
        tables.append(
            {
                digests[analysis.body[end - 1]]: cut
                for end, cut in zip(analysis.ends, analysis.cuts, strict=True)
                if analysis.body[end - 1] in digests
            }
        )
    if not tables:
        return None
    common = [digest for digest in tables[0] if all(digest in table for table in tables)]
    return tuple(table[common[-1]] for table in tables) if common else None


# -------------------------------------------------------------------------------------- building


def _build(
    analysis: _Analysis,
    cuts: Sequence[CutPoint],
    name: str,
    model: Callable[..., Any] | None,
    progress: Progress | None,
) -> list[BlockSource]:
    say = progress or (lambda _: None)
    program = analysis.program
    count = len(cuts) + 1
    bounds = [0, *(analysis.ends[cut.index] for cut in cuts), len(analysis.body)]
    model_outputs = output_ports(program)
    for port in model_outputs:
        if analysis.batch is not None and not _has_rows(port):
            raise ModelRefused(
                f"the output {port.name!r} has no batch dimension though the inputs have one: "
                "rows of different requests could not be told apart"
            )
    crossing = [analysis.live[cut.index] for cut in cuts]
    blocks: list[BlockSource] = []
    for index, (first, last) in enumerate(pairwise(bounds)):
        say(f"{name}: building block {index + 1} of {count}")
        takes = [crossing[index - 1]] if index else analysis.inputs
        gives = [crossing[index]] if index < count - 1 else analysis.outputs
        inputs = (cuts[index - 1].tensor,) if index else analysis.input_ports
        outputs = (cuts[index].tensor,) if index < count - 1 else model_outputs
        # Traced again, the piece becomes a program that knows nothing of the rest.
        piece = copy_graph(
            program,
            body=analysis.needed(first, last),
            inputs=dict(zip(takes, (port.name for port in inputs), strict=True)),
            outputs=gives,
            weights=analysis.weights,
        )
        exported = export(piece, inputs)
        weights = weight_nodes(exported).values()
        cost = sum(analysis.costs[first:last], Cost())
        blocks.append(
            BlockSource(
                program=exported,
                digest=digest_of(exported, inputs, outputs),
                inputs=inputs,
                outputs=outputs,
                cost=Cost(sum(_bytes(w) for _, w in weights), cost.flops, cost.activation_bytes),
                mutates_inputs=index == 0 and analysis.mutated_inputs(last),
                origin=Origin(
                    model=name,
                    index=index,
                    count=count,
                    first=analysis.body[first].name,
                    last=analysis.body[last - 1].name,
                ),
            )
        )
    say(f"{name}: comparing {count} blocks with the model")
    _prove(name, blocks, model or plain_module(program))
    return blocks


def _prove(name: str, blocks: Sequence[BlockSource], model: Callable[..., Any]) -> None:
    """Compare the chain of blocks with the model on CPU, bit for bit, at sizes export never saw.

    Also changes one row and looks at the others: batching puts rows of strangers side by side.
    """
    chain = [plain_module(block.program) for block in blocks]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        values = [tensor.clone() for tensor in inputs]
        with torch.no_grad():
            for index, module in enumerate(chain):
                before = [value._version for value in values]
                given = values
                values = list(module(*given))
                written = [v._version for v in given] != before
                if written and not blocks[index].mutates_inputs:
                    raise ModelRefused(
                        f"{name}: block {index + 1} writes to its input, which no operator of it "
                        "declares; remove in-place operations from the model"
                    )
        return values

    ports = blocks[0].inputs
    batched = any(_has_rows(port) for port in ports)
    for rows in (1, 3) if batched else (1,):
        inputs = [example(port, rows, seed) for seed, port in enumerate(ports)]
        found = run(inputs)
        expected = _run_model(model, inputs)
        if len(found) != len(expected) or not all(map(_same_bits, found, expected)):
            raise ModelRefused(
                f"{name}: the blocks do not give the model's results at {rows} rows; the model "
                "may draw random numbers, or depend on values in a way that export does not record"
            )
    if batched:
        changed = [
            torch.cat([example(port, 1, seed + 100), tensor[1:]]) if _has_rows(port) else tensor
            for seed, (port, tensor) in enumerate(zip(ports, inputs, strict=True))
        ]
        if not all(_same_bits(a[1:], b[1:]) for a, b in zip(run(changed), found, strict=True)):
            raise ModelRefused(
                f"{name} mixes the rows of a batch: changing one row changes the others' results, "
                "so requests could not be batched together"
            )


def _run_model(model: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    # torch's attention layers have a fused path for inference that export never takes and that
    # differs in the last bits.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    frozen = _frozen(model) if isinstance(model, nn.Module) else contextlib.nullcontext()
    try:
        with frozen, torch.no_grad():
            value = model(*[tensor.clone() for tensor in inputs])
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient here, as in a block: matmul takes another path for those that
    do, even where no gradient is recorded.
    """
    wanting = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)


# --------------------------------------------------------------------------------- into the store


def split_model(
    source: SourceModel, blocks: int, store: Store, *, progress: Progress | None = None
) -> SplitResult:
    """Split a model and put its blocks into the store, after they are proven equal to it.

    `progress` gets a line at every step. Raises ModelRefused, and then nothing was stored.
    """
    say = progress or (lambda _: None)
    match source:
        case ModuleSource():
            say(f"{source.name}: exporting")
            program = export(source.module, source.inputs)
            names = [port.name for port in input_ports(program)]
            module = source.module

            @_frozen(module)
            def model(*tensors: Tensor) -> Any:
                if set(names) == {port.name for port in source.inputs}:
                    return module(**dict(zip(names, tensors, strict=True)))
                return module(*tensors)

            made = split(program, blocks, source.name, model=model, progress=progress)
        case ProgramFile():
            say(f"{source.name}: reading {source.path}")
            made = split(read_archive(source.path), blocks, source.name, progress=progress)
        case ScriptFile():
            if blocks != 1:
                raise ModelRefused(
                    f"{source.path} is TorchScript, which cannot be cut into {blocks} blocks: "
                    "deploy it as one, or export the model with torch.export"
                )
            say(f"{source.name}: reading {source.path}")
            return _store_script(source, store)
        case _:
            assert_never(source)
    return store_blocks(made, store, progress=progress)


def store_blocks(
    blocks: Sequence[BlockSource], store: Store, *, progress: Progress | None = None
) -> SplitResult:
    """Put the blocks of one model into the store; those that are there already stay as they are."""
    say = progress or (lambda _: None)
    stored = []
    model = blocks[0].origin.model
    for block in blocks:
        name = _block_name(model, block.origin.index, len(blocks))
        say(f"{model}: storing {name}")
        shared = block.digest in store
        manifest = store.put(block.manifest(), partial(_write_block, block))
        stored.append(StoredBlock(name, manifest, block.cost.seconds, shared))
    return SplitResult(model, store.root, tuple(stored))


def _write_block(block: BlockSource, folder: Path) -> None:
    write_archive(block.program, folder / PROGRAM_FILE["torch.export"])


def _block_name(model: str, index: int, count: int) -> str:
    return f"{model}-{index + 1}of{count}" if count > 1 else model


def topology_for(result: SplitResult, pipeline: str, *, device: str = "cpu") -> Topology:
    """A topology of one pipeline through the blocks of a split model, all on one device.

    Raises TopologyInvalid for a pipeline name or device that no topology can have.
    """
    return parse_topology(
        {
            "store": str(result.store),
            "blocks": {b.name: {"artifact": b.digest, "device": device} for b in result.blocks},
            "pipelines": {pipeline: {"blocks": [b.name for b in result.blocks]}},
        }
    )


def _store_script(source: ScriptFile, store: Store) -> SplitResult:
    script = read_script(source.path)
    outputs, mutates = _discover(source, script)
    digest = script_digest(source.path, source.inputs)
    weights = {t.data_ptr(): t for t in (*script.parameters(), *script.buffers())}
    shared = digest in store

    def copy(folder: Path) -> None:
        shutil.copyfile(source.path, folder / PROGRAM_FILE["torchscript"])

    manifest = store.put(
        Manifest(
            format="torchscript",
            digest=digest,
            inputs=source.inputs,
            outputs=outputs,
            parameter_bytes=sum(_bytes(t) for t in weights.values()),
            flops=0,
            mutates_inputs=mutates,
            origin=Origin(model=source.name, index=0, count=1, first="forward", last="forward"),
            files={},
        ),
        copy,
    )
    return SplitResult(source.name, store.root, (StoredBlock(source.name, manifest, 0.0, shared),))


def _discover(source: ScriptFile, script: torch.jit.ScriptModule) -> tuple[tuple[Port, ...], bool]:
    """Learn a TorchScript model's outputs, and whether it writes its inputs, from two runs."""
    seen: list[tuple[list[str], list[Tensor]]] = []
    mutates = False
    sizes = (2, 3) if any(_has_rows(port) for port in source.inputs) else (1, 1)
    for rows in sizes:
        inputs = [example(port, rows, seed) for seed, port in enumerate(source.inputs)]
        before = [tensor._version for tensor in inputs]
        try:
            with torch.no_grad():
                value = script(*inputs)
        except Exception as error:
            raise ModelRefused(
                f"{source.path} does not run on the inputs that it is said to take: "
                f"{first_line(error)}"
            ) from error
        mutates = mutates or [tensor._version for tensor in inputs] != before
        paths, _ = pytree.tree_flatten_with_path(value)
        names = output_names([path for path, _ in paths])
        tensors = list(flatten_outputs(value, names))
        if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise ModelRefused(f"{source.path} returns nested values: return tensors only")
        seen.append((names, tensors))
    (names, small), (again, large) = seen
    if names != again:
        raise ModelRefused(f"{source.path} returns different outputs for different batch sizes")
    ports = []
    for name, one, other in zip(names, small, large, strict=True):
        shape: list[Any] = list(one.shape)
        if sizes[0] != sizes[1]:
            if tuple(one.shape[:1]) != sizes[:1] or tuple(other.shape[:1]) != sizes[1:]:
                raise ModelRefused(
                    f"the output {name!r} of {source.path} has no batch dimension in front though "
                    "the inputs have one"
                )
            shape[0] = BATCH
        if list(other.shape[1:]) != list(one.shape[1:]):
            raise ModelRefused(f"the output {name!r} of {source.path} changes shape with the batch")
        dtype = str(one.dtype).removeprefix("torch.")
        ports.append(Port(name=name, dtype=dtype, shape=tuple(shape)))
    return tuple(ports), mutates
