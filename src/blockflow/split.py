"""Splitting: from a model to blocks in the store.

`split` builds every block as a program of its own and proves that together they still are the
model, bit for bit, before anything is written. Where a model may be cut, and where it had better
be, is decided in `cuts`.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, assert_never

import msgspec
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from blockflow.archive import first_line, read_archive
from blockflow.artifact import PROGRAM_FILE, Digest, Manifest, Origin, Port, Store
from blockflow.cuts import (
    BANDWIDTH,
    HIDDEN,
    MAX_TENSORS,
    Analysis,
    Cost,
    CutPoint,
    choose,
    cut_points,
)
from blockflow.errors import ModelRefused
from blockflow.export import as_served, example, export, has_rows
from blockflow.graph import copy_graph, input_ports, output_ports, plain_module, weight_nodes
from blockflow.identity import digest_of, script_digest
from blockflow.measure import ROWS, Measure
from blockflow.models import ModuleSource, ProgramFile, ScriptFile, SourceModel
from blockflow.program import flatten_outputs, read_script
from blockflow.topology import Topology
from blockflow.topology import parse as parse_topology
from blockflow.torchscript import (
    Interface,
    Stage,
    interface_of,
    joined,
    read_file,
    stages,
    weight_bytes,
)
from blockflow.weights import write_program
from blockflow.wiring import by_rule

__all__ = [
    "AtModules",
    "BlockSource",
    "Cost",
    "CutPoint",
    "Everywhere",
    "Piece",
    "Progress",
    "SplitResult",
    "StoredBlock",
    "Where",
    "build",
    "chain_of",
    "cut_points",
    "example",
    "export",
    "shared_prefix",
    "split",
    "split_at",
    "split_model",
    "store_blocks",
    "topology_for",
]

Progress = Callable[[str], None]

SLACK = 0.02
"""How much slower than the best the slowest block may be if fewer bytes cross then.

Models of cost, and even clocks, are wrong by more; without it, a cut would go into the middle of
a residual block, carrying twice the bytes, for a thousandth of balance.
"""


@dataclass(frozen=True)
class AtModules:
    """Cut before the first operator of each of these submodules ("layer2", "encoder.layer.3")."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Everywhere:
    """Cut at every cut point where at most `tensors` cross."""

    tensors: int = MAX_TENSORS


Where = int | AtModules | Everywhere
"""How to cut: into so many blocks of equal cost, at modules, or everywhere."""


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

    `seconds` is its time by `Cost.seconds` (0 for one TorchScript block). `shared` says that an
    equal block was there before; then `manifest` is that one's.
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
    """What `split_model` did: the blocks of `model`, first to last, in the store at `store`.

    `inputs` and `outputs` are the model's own names for what it takes and gives, by position in
    the first and the last block. A block that was stored before keeps the names of its first time.
    """

    model: str
    store: Path
    blocks: tuple[StoredBlock, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


# ------------------------------------------------------------------------------------ into blocks


def split(
    program: ExportedProgram,
    blocks: Where,
    name: str,
    *,
    model: Callable[..., Any] | None = None,
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> list[BlockSource]:
    """Cut a program: into a number of blocks of equal cost, before modules, or everywhere.

    The blocks are compared with `model`, which takes and returns what the program does, or else
    with the program. With `measure`, costs are measured as it says; they are modelled otherwise.
    Raises ModelRefused.
    """
    if isinstance(blocks, int) and blocks < 1:
        raise ModelRefused(f"{name} cannot be split into {blocks} blocks: 1 is the least")
    if measure is not None and progress is not None:
        progress(f"{name}: measuring operators on {measure}")
    analysis = Analysis(program, measure)
    match blocks:
        case int():
            places = balanced_places(analysis, blocks, name)
        case AtModules(names=names):
            places = _before(analysis, names, name)
        case Everywhere(tensors=tensors):
            places = [cut.place for cut in analysis.cuts(tensors)]
        case _:
            assert_never(blocks)
    return build(analysis, chain_of(analysis, places), name, model=model, progress=progress)


def split_at(
    program: ExportedProgram,
    cuts: Sequence[CutPoint],
    name: str,
    *,
    model: Callable[..., Any] | None = None,
    progress: Progress | None = None,
) -> list[BlockSource]:
    """Cut a program at given cut points of its own, for example those of `shared_prefix`."""
    analysis = Analysis(program)
    places = sorted({cut.place for cut in cuts})
    for cut in cuts:
        if not (
            0 < cut.place < len(analysis.body)
            and analysis.body[cut.place - 1].name == cut.after
            and analysis.obstacle(cut.place) is None
            and analysis.ports(cut.place) == cut.tensors
        ):
            raise ModelRefused(f"{name} has no cut point behind {cut.after!r}")
    return build(analysis, chain_of(analysis, places), name, model=model, progress=progress)


def shared_prefix(programs: Sequence[ExportedProgram]) -> tuple[CutPoint, ...] | None:
    """The deepest cut before which all programs compute the same with the same weights.

    Returns that cut point of each program, in their order, or None if they share no prefix.
    Splitting each program there with `split_at` gives equal first blocks: one artifact.
    """
    tables: list[dict[tuple[bytes, ...], CutPoint]] = []
    for program in programs:
        analysis = Analysis(program)
        keys = analysis.keys()
        tables.append({keys[cut.place]: cut for cut in analysis.cuts()})
    if not tables:
        return None
    common = [key for key in tables[0] if all(key in table for table in tables)]
    return tuple(table[common[-1]] for table in tables) if common else None


def balanced_places(analysis: Analysis, blocks: int, name: str) -> list[int]:
    """Where to cut into `blocks` blocks of about equal cost. Raises ModelRefused naming `name`."""
    cuts = analysis.cuts()
    if blocks > len(cuts) + 1:
        raise ModelRefused(
            f"{name} cannot be split into {blocks} blocks, {len(cuts) + 1} is the most: "
            f"{_why_so_few(analysis, len(cuts))}"
        )
    rows = ROWS if analysis.measure is None else analysis.measure.rows
    whole = sum(analysis.costs, Cost())
    rest = sum(analysis.costs[cuts[-1].place if cuts else 0 :], Cost())
    chosen = choose(
        [*(cut.cost.seconds for cut in cuts), rest.seconds],
        [cut.row_bytes for cut in cuts],
        blocks,
        # For as many rows as the costs are for, and in their unit, be they modelled or measured.
        byte_seconds=rows / BANDWIDTH * whole.seconds / (whole.modelled(rows) or 1),
        slack=SLACK,
    )
    return [cuts[index].place for index in chosen]


def _why_so_few(analysis: Analysis, cuts: int) -> str:
    """Where a program can be cut, with the first place where it cannot."""
    places = range(1, len(analysis.body))
    if not places:
        return "it is a single operator"
    said = f"between its {len(analysis.body)} operators it can be cut at {cuts} places"
    for place in places:
        crossing = len(analysis.live(place))
        reason = analysis.obstacle(place)
        if reason is None and crossing > MAX_TENSORS:
            reason = f"{crossing} tensors are alive there, more than {MAX_TENSORS}"
        if reason is not None:
            return f"{said}; it cannot behind {analysis.body[place - 1].name}, for one: {reason}"
    return said


def _before(analysis: Analysis, modules: Sequence[str], name: str) -> list[int]:
    places: dict[int, str] = {}
    for module in modules:
        place = analysis.place_of(module)
        if place == 0:
            raise ModelRefused(f"{name} begins with {module}: there is nothing to cut before it")
        reason = analysis.obstacle(place)
        if reason is not None:
            raise ModelRefused(f"{name} cannot be cut before {module}: {reason}")
        if place in places:
            raise ModelRefused(f"{module} and {places[place]} begin at the same operator of {name}")
        places[place] = module
    return sorted(places)


# -------------------------------------------------------------------------------------- building


@dataclass(frozen=True)
class Piece:
    """A stretch `body[first:last]` of a program that becomes a block.

    `takes` are inputs of the model and what the piece before gives; `gives` are results of its own
    and what it passes on. Their ports are in the same order.
    """

    first: int
    last: int
    takes: tuple[fx.Node, ...]
    inputs: tuple[Port, ...]
    gives: tuple[fx.Node, ...]
    outputs: tuple[Port, ...]


def chain_of(analysis: Analysis, places: Sequence[int]) -> list[Piece]:
    """The pieces between places: each takes all that the one before gives."""
    nodes = [tuple(analysis.inputs), *map(analysis.live, places), tuple(analysis.outputs)]
    ports = [analysis.input_ports, *map(analysis.ports, places), output_ports(analysis.program)]
    edges = [0, *places, len(analysis.body)]
    return [
        Piece(edges[i], edges[i + 1], nodes[i], tuple(ports[i]), nodes[i + 1], tuple(ports[i + 1]))
        for i in range(len(edges) - 1)
    ]


def build(
    analysis: Analysis,
    pieces: Sequence[Piece],
    name: str,
    *,
    model: Callable[..., Any] | None = None,
    progress: Progress | None = None,
) -> list[BlockSource]:
    """Make each piece a program of its own, and prove that together they are the model.

    They are compared with `model`, or else with the program. Raises ModelRefused.
    """
    say = progress or (lambda _: None)
    program = analysis.program
    count = len(pieces)
    for port in output_ports(program):
        if analysis.batch is not None and not has_rows(port):
            raise ModelRefused(
                f"the output {port.name!r} has no batch dimension though the inputs have one: "
                "rows of different requests could not be told apart"
            )
    blocks: list[BlockSource] = []
    for index, piece in enumerate(pieces):
        say(f"{name}: building block {index + 1} of {count}")
        # Traced again, the piece becomes a program that knows nothing of the rest.
        copied = copy_graph(
            program,
            body=analysis.needed(piece.first, piece.last),
            inputs=dict(zip(piece.takes, (port.name for port in piece.inputs), strict=True)),
            outputs=piece.gives,
            weights=analysis.weights,
        )
        exported = export(copied, piece.inputs)
        weights = weight_nodes(exported).values()
        cost = sum(analysis.costs[piece.first : piece.last], Cost())
        blocks.append(
            BlockSource(
                program=exported,
                digest=digest_of(exported),
                inputs=piece.inputs,
                outputs=piece.outputs,
                cost=replace(cost, parameter_bytes=sum(w.nbytes for _, w in weights)),
                mutates_inputs=analysis.writes(
                    piece.first, piece.last, (n for n in piece.takes if n in analysis.inputs)
                ),
                origin=Origin(
                    model=name,
                    index=index,
                    count=count,
                    first=analysis.body[piece.first].name,
                    last=analysis.body[piece.last - 1].name,
                ),
            )
        )
    say(f"{name}: comparing {count} blocks with the model")
    _prove(
        name,
        [
            _Step(plain_module(block.program), block.mutates_inputs, piece.takes, piece.gives)
            for block, piece in zip(blocks, pieces, strict=True)
        ],
        dict(zip(analysis.inputs, analysis.input_ports, strict=True)),
        analysis.outputs,
        model or plain_module(program),
    )
    return blocks


@dataclass(frozen=True)
class _Step:
    """A block in a proof: it takes values by their keys, and gives values under keys."""

    call: Callable[..., Sequence[Tensor]]
    mutates: bool
    takes: Sequence[Hashable]
    gives: Sequence[Hashable]


def _prove(
    name: str,
    steps: Sequence[_Step],
    ports: Mapping[Hashable, Port],
    outputs: Sequence[Hashable],
    model: Callable[..., Any],
) -> None:
    """Compare the blocks with the model on CPU, bit for bit, at sizes export never saw.

    `ports` are the model's inputs by their keys, `outputs` the keys of its results. Also changes
    one row and looks at the others: batching puts rows of strangers side by side.
    """

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        values = dict(zip(ports, (tensor.clone() for tensor in inputs), strict=True))
        with torch.no_grad():
            for index, step in enumerate(steps):
                given = [values[key] for key in step.takes]
                if step.mutates:  # as whoever serves it does
                    given = [value.clone() for value in given]
                before = [value._version for value in given]
                found = list(step.call(*given))
                if [v._version for v in given] != before and not step.mutates:
                    raise ModelRefused(
                        f"{name}: block {index + 1} writes to its input, which no operator of it "
                        "declares; remove in-place operations from the model"
                    )
                values.update(zip(step.gives, found, strict=True))
        return [values[key] for key in outputs]

    batched = any(map(has_rows, ports.values()))
    for rows in (1, 3) if batched else (1,):
        inputs = [example(port, rows, seed) for seed, port in enumerate(ports.values())]
        expected = run_model(name, model, inputs)
        found = run(inputs)
        if len(found) != len(expected) or not all(map(same_bits, found, expected)):
            raise ModelRefused(
                f"{name}: the blocks do not give the model's results at {rows} rows; the model "
                "may draw random numbers, or depend on values in a way that export does not record"
            )
    if batched:
        changed = [
            torch.cat([example(port, 1, seed + 100), tensor[1:]]) if has_rows(port) else tensor
            for seed, (port, tensor) in enumerate(zip(ports.values(), inputs, strict=True))
        ]
        if not all(same_bits(a[1:], b[1:]) for a, b in zip(run(changed), found, strict=True)):
            raise ModelRefused(
                f"{name} mixes the rows of a batch: changing one row changes the others' results, "
                "so requests could not be batched together"
            )


def run_model(name: str, model: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a model gives for copies of `inputs`. Raises ModelRefused naming `name`."""
    served = as_served(model) if isinstance(model, nn.Module) else contextlib.nullcontext()
    with served, torch.no_grad():
        try:
            value = model(*[tensor.clone() for tensor in inputs])
        except Exception as error:  # somebody else's code, on inputs that somebody described
            raise ModelRefused(
                f"{name} does not run on the inputs that it is said to take: {first_line(error)}"
            ) from error
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit (0.0 is not -0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)


# --------------------------------------------------------------------------------- into the store


def split_model(
    source: SourceModel,
    blocks: Where,
    store: Store,
    *,
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> SplitResult:
    """Split a model and put its blocks into the store, after they are proven equal to it.

    With `measure`, costs are measured as it says; they are modelled otherwise, as those of
    TorchScript only can be. `progress` gets a line at every step. Raises ModelRefused, and then
    nothing was stored, or BlockFlowError where the disk is full, and then what is in the store is
    whole.
    """
    say = progress or (lambda _: None)
    match source:
        case ModuleSource():
            say(f"{source.name}: exporting")
            program = export(source.module, source.inputs)
            names = [port.name for port in input_ports(program)]
            module = source.module

            def model(*tensors: Tensor) -> Any:
                with as_served(module):
                    if set(names) == {port.name for port in source.inputs}:
                        return module(**dict(zip(names, tensors, strict=True)))
                    return module(*tensors)

            made = split(
                program, blocks, source.name, model=model, measure=measure, progress=progress
            )
        case ProgramFile():
            say(f"{source.name}: reading {source.path}")
            program = read_archive(source.path)
            made = split(program, blocks, source.name, measure=measure, progress=progress)
        case ScriptFile():
            if measure is not None:
                raise ModelRefused(f"{source.path} is TorchScript, whose costs are modelled only")
            say(f"{source.name}: reading {source.path}")
            return _store_script(source, blocks, store, progress)
        case _:
            assert_never(source)
    return store_blocks(made, store, progress=progress)


def store_blocks(
    blocks: Sequence[BlockSource], store: Store, *, progress: Progress | None = None
) -> SplitResult:
    """Put the blocks of one model into the store; those that are there already stay as they are.

    Raises BlockFlowError where the disk is full. Blocks that were stored until then are whole and
    stay; the others are not there.
    """
    say = progress or (lambda _: None)
    stored = []
    model = blocks[0].origin.model
    for block in blocks:
        name = _block_name(model, block.origin.index, len(blocks))
        say(f"{model}: storing {name}")
        shared = block.digest in store
        manifest = store.put(block.manifest(), partial(_write_block, block, store))
        stored.append(StoredBlock(name, manifest, block.cost.seconds, shared))
    return SplitResult(
        model,
        store.root,
        tuple(stored),
        tuple(port.name for port in blocks[0].inputs),
        tuple(port.name for port in blocks[-1].outputs),
    )


def _block_name(model: str, index: int, count: int) -> str:
    return f"{model}-{index + 1}of{count}" if count > 1 else model


def _write_block(block: BlockSource, store: Store, folder: Path) -> None:
    write_program(block.program, folder, store)


def topology_for(result: SplitResult, pipeline: str, *, device: str = "cpu") -> Topology:
    """A topology of one pipeline through the blocks of a split model, all on one device.

    Clients see the model's own names. Raises TopologyInvalid for a pipeline name or device that no
    topology can have, and ModelRefused where blocks that were stored earlier, under other names,
    would be connected the wrong way round.
    """
    for before, after in pairwise(block.manifest for block in result.blocks):
        gives, takes = ([p.name for p in ports] for ports in (before.outputs, after.inputs))
        if by_rule(before.outputs, after.inputs) != dict(zip(takes, gives, strict=True)):
            raise ModelRefused(
                f"{result.model}: the blocks {before.digest} and {after.digest} were stored "
                f"earlier, by other models, and name what they hand over ({', '.join(gives)}) in "
                "two orders; split this model into a store of its own"
            )
    return parse_topology(
        {
            "store": str(result.store),
            "blocks": {b.name: {"artifact": b.digest, "device": device} for b in result.blocks},
            "pipelines": {
                pipeline: {
                    "blocks": [b.name for b in result.blocks],
                    "inputs": list(result.inputs),
                    "outputs": list(result.outputs),
                }
            },
        }
    )


# ------------------------------------------------------------------------------------ TorchScript


def _store_script(
    source: ScriptFile, blocks: Where, store: Store, progress: Progress | None
) -> SplitResult:
    say = progress or (lambda _: None)
    script = read_file(source.path)
    if blocks == 1:
        whole = interface_of(script, source.inputs, str(source.path))
        parts = [(whole, Cost(parameter_bytes=weight_bytes(script)), "forward", "forward")]
        contents: list[bytes | Path] = [source.path]
    else:
        every = stages(script, source.inputs, source.path)
        edges = [0, *script_places(source, every, blocks), len(every)]
        groups = [every[first:end] for first, end in pairwise(edges)]
        say(f"{source.name}: building {len(groups)} blocks")
        parts = []
        for group in groups:
            first, last = group[0], group[-1]
            outputs = last.interface.outputs
            if group is not groups[-1]:
                outputs = (msgspec.structs.replace(outputs[0], name=HIDDEN),)
            mutates = any(stage.interface.mutates_inputs for stage in group)
            interface = Interface(first.interface.inputs, outputs, mutates)
            cost = sum((stage.cost for stage in group), Cost())
            parts.append((interface, cost, first.name, last.name))
        contents = [joined(group) for group in groups]
    say(f"{source.name}: comparing {len(parts)} blocks with the model")
    chain = [read_script(each if isinstance(each, Path) else io.BytesIO(each)) for each in contents]
    taken = [f"input {index}" for index in range(len(source.inputs))]
    handed = [[f"{i} {port.name}" for port in part[0].outputs] for i, part in enumerate(parts)]
    _prove(
        source.name,
        [
            _Step(_flat(script, part[0]), part[0].mutates_inputs, takes, gives)
            for script, part, takes, gives in zip(
                chain, parts, [taken, *handed[:-1]], handed, strict=True
            )
        ],
        dict(zip(taken, source.inputs, strict=True)),
        handed[-1],
        script,
    )
    stored = []
    for index, ((interface, cost, first_name, last_name), content) in enumerate(
        zip(parts, contents, strict=True)
    ):
        digest = script_digest(content, interface.inputs)
        shared = digest in store
        manifest = Manifest(
            format="torchscript",
            digest=digest,
            inputs=interface.inputs,
            outputs=interface.outputs,
            parameter_bytes=cost.parameter_bytes,
            flops=cost.flops,
            mutates_inputs=interface.mutates_inputs,
            origin=Origin(
                model=source.name,
                index=index,
                count=len(parts),
                first=first_name,
                last=last_name,
            ),
            files={},
        )
        name = _block_name(source.name, index, len(parts))
        say(f"{source.name}: storing {name}")
        manifest = store.put(manifest, partial(_write_script, content))
        stored.append(StoredBlock(name, manifest, cost.seconds if cost.flops else 0.0, shared))
    return SplitResult(
        source.name,
        store.root,
        tuple(stored),
        tuple(port.name for port in parts[0][0].inputs),
        tuple(port.name for port in parts[-1][0].outputs),
    )


def script_stages(source: ScriptFile) -> list[Stage]:
    """What a TorchScript file is a sequence of. Raises ModelRefused where it is none."""
    return stages(read_file(source.path), source.inputs, source.path)


def script_places(source: ScriptFile, every: Sequence[Stage], blocks: Where) -> list[int]:
    """Before which stages of a TorchScript file to cut it. Raises ModelRefused."""
    names = [stage.name for stage in every]
    match blocks:
        case int() if not 1 <= blocks <= len(every):
            raise ModelRefused(
                f"{source.path} is TorchScript of {len(every)} submodules: it can be split into 1 "
                f"to {len(every)} blocks, not {blocks}"
            )
        case int():
            chosen = choose(
                [stage.cost.seconds for stage in every],
                [stage.row_bytes for stage in every[:-1]],
                blocks,
                byte_seconds=ROWS / BANDWIDTH,
                slack=SLACK,
            )
            return [cut + 1 for cut in chosen]
        case AtModules(names=wanted):
            for name in wanted:
                if name not in names[1:]:
                    raise ModelRefused(
                        f"{source.path} cannot be cut before {name!r}: it can be before "
                        f"{', '.join(names[1:]) or 'nothing'}"
                    )
            return sorted({names.index(name) for name in wanted})
        case Everywhere():
            return [*range(1, len(every))]
        case _:
            assert_never(blocks)


def _flat(script: torch.jit.ScriptModule, interface: Interface) -> Callable[..., Sequence[Tensor]]:
    names = [port.name for port in interface.outputs]
    return lambda *tensors: flatten_outputs(script(*tensors), names)


def _write_script(content: bytes | Path, folder: Path) -> None:
    path = folder / PROGRAM_FILE["torchscript"]
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content)
