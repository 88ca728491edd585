"""Sharing: several models into the fewest blocks, what they have in common cut out once.

What is shared, and in which order, is decided in `parts`.

Note [What a shared block gives]
    Where no other set overlaps with that of a block, and the same values are alive behind it in all
    its models, it gives these, also those that it only passes on: the pipelines are chains.
    Otherwise a block gives what any of its models needs of that which it computed itself, and what
    else a model needs comes from where it is made, or from the client: its pipeline is a graph.
    Tensors without rows cannot go through a graph, where requests are put together row by row. A
    model that takes such is in none but chains, whose blocks pass on what any of their models
    needs. Of sets that overlap there, the one that saves more arithmetic is kept.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import assert_never

import msgspec
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from blockflow.archive import read_archive
from blockflow.artifact import Digest, Manifest, Store
from blockflow.cuts import BANDWIDTH, MAX_TENSORS, choose, port_bytes
from blockflow.errors import ModelRefused
from blockflow.export import as_served, example, export, has_rows
from blockflow.graph import (
    input_ports,
    output_ports,
    plain_module,
)
from blockflow.measure import ROWS
from blockflow.models import ModuleSource, ProgramFile, ScriptFile, SourceModel
from blockflow.parts import Gives, Member, Part, Sharers, common_parts, crossing
from blockflow.split import (
    SLACK,
    AtModules,
    Everywhere,
    Piece,
    Progress,
    SplitResult,
    Where,
    build,
    run_model,
    same_bits,
    store_blocks,
)
from blockflow.topology import Topology
from blockflow.topology import parse as parse_topology
from blockflow.wiring import by_rule, cycle

_Use = tuple[Digest, Hashable]
# A block of a pipeline: its artifact, and what tells it from others with the same artifact.


@dataclass(frozen=True)
class SharedBlock:
    """A block of the family: stored once, used by `models` (their names, in the order given).

    `stored_before` says that the store had it before.
    """

    name: str
    manifest: Manifest
    models: tuple[str, ...]
    stored_before: bool

    @property
    def digest(self) -> Digest:
        return self.manifest.digest


@dataclass(frozen=True)
class SharedModel:
    """One model of the family as a pipeline through blocks, by their names, first to last.

    `inputs` and `outputs` are its own names for what it takes and gives. `feeds` says for each
    block what each of its ports is fed by, `gives` for each output where it comes from: as
    `input.NAME` or `BLOCK.PORT`. Where `chain` is true, the order of the blocks says it all.
    """

    name: str
    blocks: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    feeds: tuple[dict[str, str], ...]
    gives: dict[str, str]
    chain: bool


@dataclass(frozen=True)
class Family:
    """What `split_shared` made: models as paths through shared blocks, in the store at `store`.

    `kept_apart` says what models compute alike and yet each for itself, and why.
    """

    store: Path
    models: tuple[SharedModel, ...]
    blocks: dict[str, SharedBlock]
    kept_apart: tuple[str, ...] = ()

    @property
    def parameter_bytes(self) -> int:
        """Bytes of weights with every block held once."""
        return sum(block.manifest.parameter_bytes for block in self.blocks.values())

    @property
    def parameter_bytes_apart(self) -> int:
        """Bytes of weights with every model in blocks of its own."""
        return sum(
            self.blocks[name].manifest.parameter_bytes
            for model in self.models
            for name in model.blocks
        )

    @property
    def flops(self) -> int:
        """Operations for one row that goes to every model, with every block computed once."""
        return sum(block.manifest.flops for block in self.blocks.values())

    @property
    def flops_apart(self) -> int:
        """Operations for one row that goes to every model, each computed by itself."""
        return sum(
            self.blocks[name].manifest.flops for model in self.models for name in model.blocks
        )


def split_shared(
    sources: Iterable[SourceModel],
    store: Store,
    *,
    blocks: Where = 1,
    progress: Progress | None = None,
) -> Family:
    """Cut models where what they share ends, and put every distinct block into the store once.

    `blocks` says how to cut further. With a number, a model is cut into about so many blocks:
    parts, shared or not, that take more than that share of a model's time are cut by balanced
    cost. Modules are those of every model that has them. Each model's blocks are proven equal to
    it, bit for bit on CPU, before they are stored. `sources` is read one by
    one: if it makes the models as it goes, equal weights are held in memory once.

    Raises ModelRefused for a model that cannot be cut or compared, and BlockFlowError for a full
    disk; what was stored until then is whole.
    """
    say = progress or (lambda _: None)
    seen: dict[bytes, Tensor] = {}
    names: list[str] = []
    members: list[Member] = []
    for source in sources:
        name = _unique(source.name, names)
        names.append(name)
        say(f"{name}: exporting")
        program = read_source(source)
        _intern(program, seen)
        members.append(Member(name, program))
    if not members:
        raise ModelRefused("there is no model to split")
    say("comparing the models operator by operator")
    parts, kept_apart = common_parts(members)
    made: list[_Made] = []
    cuts = _cuts(members, parts, blocks)
    with store.writing():
        for member, own in zip(members, cuts, strict=True):
            pieces = _pieces(member, own)
            built = build(
                member.analysis, pieces, member.name, model=member.reference, progress=progress
            )
            stored = store_blocks(built, store, progress=progress)
            made.append(_Made(member, own, pieces, stored))
    return _family(store, made, kept_apart)


def family_topology(family: Family, *, device: str = "cpu") -> Topology:
    """A topology with one pipeline for each model, and each block once, all on one device.

    Raises TopologyInvalid for a device or a name that no topology can have.
    """
    return parse_topology(
        {
            "store": str(family.store),
            "blocks": {
                name: {"artifact": block.digest, "device": device}
                for name, block in family.blocks.items()
            },
            "pipelines": {model.name: _pipeline(model) for model in family.models},
        }
    )


def _pipeline(model: SharedModel) -> dict[str, object]:
    if model.chain:
        return {
            "blocks": list(model.blocks),
            "inputs": list(model.inputs),
            "outputs": list(model.outputs),
        }
    return {
        "graph": dict(zip(model.blocks, model.feeds, strict=True)),
        "inputs": list(model.inputs),
        "outputs": model.gives,
    }


@dataclass(frozen=True)
class _Made:
    """A model, the pieces that it was cut into, and the stored block of each."""

    member: Member
    cuts: Sequence[_Cut]
    pieces: Sequence[Piece]
    result: SplitResult

    @cached_property
    def sources(self) -> list[list[tuple[int, int] | str]]:
        """For each block what feeds its ports, and last where the outputs come from: an earlier
        block and its port, by position, or the name of what clients send.

        By position, as a block may have been stored by another model, which called its ports
        otherwise.
        """
        analysis = self.member.analysis
        ports = zip(analysis.inputs, analysis.input_ports, strict=True)
        # What a block passes on is taken from it, be it an input of the model.
        known: dict[fx.Node, tuple[int, int] | str] = {node: port.name for node, port in ports}
        found = []
        for index, piece in enumerate(self.pieces):
            found.append([known[node] for node in piece.takes])
            known.update((node, (index, port)) for port, node in enumerate(piece.gives))
        last = len(self.pieces) - 1
        if self.pieces[last].gives == tuple(analysis.outputs):  # of which two may be one tensor
            found.append([(last, port) for port in range(len(analysis.outputs))])
        else:
            found.append([known[node] for node in analysis.outputs])
        return found

    def edges(self, uses: Sequence[_Use]) -> list[tuple[str, str]]:
        return [
            (str(uses[source[0]]), str(use))
            for use, sources in zip(uses, self.sources, strict=False)
            for source in sources
            if not isinstance(source, str)
        ]


def _family(store: Store, made: Sequence[_Made], kept_apart: tuple[str, ...]) -> Family:
    names = [each.member.name for each in made]
    digests = [[block.digest for block in each.result.blocks] for each in made]
    uses = [_uses(each) for each in digests]
    if cycle([edge for each, own in zip(made, uses, strict=True) for edge in each.edges(own)]):
        # Models that pass equal blocks in opposite orders could wait for each other for ever.
        uses = [
            [(digest, (*cut.part, index)) for digest, cut in zip(own, each.cuts, strict=True)]
            for index, (each, own) in enumerate(zip(made, digests, strict=True))
        ]
    called = _name_blocks(names, uses)
    blocks: dict[str, SharedBlock] = {}
    for each, own in zip(made, uses, strict=True):
        for block, use in zip(each.result.blocks, own, strict=True):
            name = called[use]
            if name not in blocks:  # the first to store it tells whether it was there before
                users = [n for n, other in zip(names, uses, strict=True) if use in other]
                blocks[name] = SharedBlock(name, block.manifest, tuple(users), block.shared)
    models = tuple(
        _model(each, tuple(called[use] for use in own))
        for each, own in zip(made, uses, strict=True)
    )
    return Family(store.root, models, blocks, kept_apart)


def _model(made: _Made, blocks: tuple[str, ...]) -> SharedModel:
    """A model as a pipeline through blocks of these names."""
    analysis = made.member.analysis
    manifests = [block.manifest for block in made.result.blocks]
    inputs = tuple(port.name for port in analysis.input_ports)
    outputs = tuple(port.name for port in output_ports(analysis.program))

    def called(source: tuple[int, int] | str) -> str:
        if isinstance(source, str):
            return f"input.{source}"
        block, port = source
        return f"{blocks[block]}.{manifests[block].outputs[port].name}"

    *fed, given = [[called(source) for source in sources] for sources in made.sources]
    feeds = [
        dict(zip((port.name for port in manifest.inputs), sources, strict=True))
        for manifest, sources in zip(manifests, fed, strict=True)
    ]
    chain = fed[0] == [f"input.{name}" for name in inputs]
    for index, (before, after) in enumerate(pairwise(manifests)):
        chain &= len(before.outputs) == len(after.inputs)
        if chain:
            rule = by_rule(before.outputs, after.inputs)
            chain &= fed[index + 1] == [f"{blocks[index]}.{rule[p.name]}" for p in after.inputs]
    chain &= given == [f"{blocks[-1]}.{port.name}" for port in manifests[-1].outputs]
    gives = dict(zip(outputs, given, strict=True))
    return SharedModel(made.member.name, blocks, inputs, outputs, tuple(feeds), gives, chain)


# --------------------------------------------------------------------------------------- reading


def read_source(source: SourceModel) -> ExportedProgram:
    """A model as a program that gives its results, bit for bit on CPU. Raises ModelRefused."""
    match source:
        case ModuleSource():
            program = export(source.module, source.inputs)
            _prove_export(source, program)
            return program
        case ProgramFile():
            return read_archive(source.path)
        case ScriptFile():
            raise ModelRefused(
                f"{source.path} is TorchScript, whose operators cannot be compared with others': "
                "export the model with torch.export"
            )


def _prove_export(source: ModuleSource, program: ExportedProgram) -> None:
    """Compare the program with its module, so that the module need not be kept for later."""
    plain = plain_module(program)
    ports = input_ports(program)
    names = [port.name for port in ports]
    by_name = set(names) == {port.name for port in source.inputs}

    def model(*tensors: Tensor) -> object:
        if by_name:
            return source.module(**dict(zip(names, tensors, strict=True)))
        return source.module(*tensors)

    for rows in (1, 3) if any(map(has_rows, ports)) else (1,):
        inputs = [example(port, rows, seed) for seed, port in enumerate(ports)]
        with as_served(source.module):
            expected = run_model(source.name, model, inputs)
        with torch.no_grad():
            found = plain(*inputs)
        if len(found) != len(expected) or not all(map(same_bits, found, expected)):
            raise ModelRefused(
                f"{source.name}: its export does not give the model's results at {rows} rows; the "
                "model may draw random numbers, or depend on values in a way that export does not "
                "record"
            )


def _intern(program: ExportedProgram, seen: dict[bytes, Tensor]) -> None:
    """Replace each weight by an equal one of a model before: a family fits where its parts do."""
    for table in (program.state_dict, program.constants):
        for name, value in table.items():
            if type(value) not in {Tensor, nn.Parameter} or value.layout is not torch.strided:
                continue  # refused, by name, by whoever reads the program next
            plain = value.detach().cpu()
            flat = plain.contiguous().reshape(-1).view(torch.uint8).numpy()
            digest = hashlib.sha256(repr((plain.dtype, plain.shape, plain.stride())).encode())
            digest.update(flat.data)
            known = seen.setdefault(digest.digest(), plain)
            table[name] = (
                nn.Parameter(known, requires_grad=False)
                if isinstance(value, nn.Parameter)
                else known
            )


def _unique(name: str, taken: Sequence[str], mark: str = "-") -> str:
    count = 2
    unique = name
    while unique in taken:
        unique = f"{name}{mark}{count}"
        count += 1
    return unique


# --------------------------------------------------------------------------------------- cutting


@dataclass(frozen=True)
class _Cut:
    """Where a block of a model ends, what it gives, and which block of which part it is."""

    place: int
    gives: tuple[fx.Node, ...]
    part: tuple[Sharers, int]


def _cuts(members: Sequence[Member], parts: Sequence[Part], blocks: Where) -> list[list[_Cut]]:
    """Where to cut each model: at the ends of its parts, and in between.

    The last cut of each is its end.
    """
    average = sum(member.seconds(0, len(member.keys)) for member in members) / len(members)
    bounds_of = [
        {part.starts[index] + part.length for part in parts if index in part.group}
        for index in range(len(members))
    ]
    names = blocks.names if isinstance(blocks, AtModules) else ()
    asked = _asked(members, bounds_of, names)
    found: list[list[_Cut]] = [[] for _ in members]
    for part in parts:
        index, start = min(part.starts.items())
        first = members[index]
        within = [
            (offset, gives)
            for offset in range(1, part.length)
            if (gives := _within(members, part, offset)) is not None
        ]
        bounds = [start, *(start + offset for offset, _ in within), start + part.length]
        match blocks:
            case int():
                count = round(first.seconds(bounds[0], bounds[-1]) * blocks / average)
                chosen = choose(
                    [first.seconds(a, b) for a, b in pairwise(bounds)],
                    [sum(map(port_bytes, first.analysis.named(each[index]))) for _, each in within],
                    min(max(count, 1), len(within) + 1),
                    byte_seconds=ROWS / BANDWIDTH,
                    slack=SLACK,
                )
            case AtModules():
                wanted = {p - s for i, s in part.starts.items() for p in asked[i]}
                chosen = [each for each, (offset, _) in enumerate(within) if offset in wanted]
            case Everywhere():
                chosen = [*range(len(within))]
            case _:
                assert_never(blocks)
        ends = [*(within[each][0] for each in chosen), part.length]
        if not part.chained:
            ends = _giving(members, part, ends)
        for number, (begin, end) in enumerate(pairwise([0, *ends])):
            gives = _gives(members, part, begin, end)
            for each, first_place in part.starts.items():
                found[each].append(_Cut(first_place + end, gives[each], (part.group, number)))
    for member, cuts, places in zip(members, found, asked, strict=True):
        for place in places.keys() - {each.place for each in cuts}:
            raise ModelRefused(
                f"{member.name} cannot be cut before {places[place]} together with the models that "
                "it shares that part with: too much is alive there for all of them"
            )
    return found


def _asked(
    members: Sequence[Member], ends: Sequence[set[int]], modules: Sequence[str]
) -> list[dict[int, str]]:
    """The places of each model before which modules begin, with their names. Raises ModelRefused.

    Every model that has a module of a name must be one that can be cut there.
    """
    found: list[dict[int, str]] = [{} for _ in members]
    for name in modules:
        having = [i for i, member in enumerate(members) if name in member.analysis.modules]
        if not having:
            members[0].analysis.place_of(name)  # says which there are
        for index in having:
            analysis = members[index].analysis
            place = analysis.place_of(name)
            reason = analysis.obstacle(place) if place else "it begins with it"
            if reason is not None and place not in ends[index]:
                raise ModelRefused(f"{members[index].name} cannot be cut before {name}: {reason}")
            found[index][place] = name
    return found


def _gives(members: Sequence[Member], part: Part, begin: int, end: int) -> Gives:
    """What the block between two offsets in a part gives; see Note [What a shared block gives]."""
    if part.chained:
        alive = crossing(members, part.starts, end)
        if alive is None:
            raise AssertionError("what crosses in a chain was looked at before")
        return alive
    gives = _computed(members, part, begin, end)
    for index, start in part.starts.items():
        analysis = members[index].analysis
        if start + end == len(analysis.body):
            odd = [node for node in analysis.outputs if analysis.place(node) is None]
            # Where there are but assertions, what they guard waits for them.
            gives[index] = (*gives[index], *odd) or tuple(analysis.outputs)
    return gives


def _giving(members: Sequence[Member], part: Part, ends: Sequence[int]) -> list[int]:
    """Those of the ends within a part between which each of its models gets something."""
    found = [0]
    for end in ends:
        if all(members[i].given(s + found[-1], s + end) for i, s in part.starts.items()):
            found.append(end)
    # What comes last and gives nothing is of the block before it.
    return [*found[1:-1], part.length]


def _within(members: Sequence[Member], part: Part, offset: int) -> Gives | None:
    """What is alive where a block may end inside a part; None where none can end."""
    if not all(members[index].changes(start + offset) for index, start in part.starts.items()):
        return None
    if part.chained:
        found = crossing(members, part.starts, offset)
    else:
        found = _computed(members, part, 0, offset)
        for index, start in part.starts.items():
            analysis, place = members[index].analysis, start + offset
            if (
                not members[index].given(start, place)
                or any(analysis.misfit(node) is not None for node in found[index])
                or analysis.writes(place, len(analysis.body), found[index])
                # What takes an input behind it would take it as the client sent it.
                or analysis.writes(start, start + part.length, analysis.inputs)
            ):
                return None
    if found is None or not 0 < len(found[min(part.group)]) <= MAX_TENSORS:
        return None
    return found


def _computed(members: Sequence[Member], part: Part, first: int, last: int) -> Gives:
    """What any of a part's models needs of what a stretch of it computes."""
    needed = sorted(
        {
            place - start
            for index, start in part.starts.items()
            for place in members[index].given(start + first, start + last)
        }
    )
    return {
        index: tuple(members[index].analysis.body[start + each] for each in needed)
        for index, start in part.starts.items()
    }


def _pieces(member: Member, cuts: Sequence[_Cut]) -> list[Piece]:
    """The blocks of a model between its cuts, with what each takes and gives."""
    analysis = member.analysis
    named = dict(zip(analysis.inputs, analysis.input_ports, strict=True))
    order = {node: index for index, node in enumerate((*analysis.inputs, *analysis.body))}
    starts = [0, *(cut.place for cut in cuts[:-1])]
    needed = []
    for start, cut in zip(starts, cuts, strict=True):
        own = set(analysis.body[start : cut.place])
        passed = {node for node in cut.gives if node in order and node not in own}
        needed.append(analysis.used(start, cut.place) | passed)
    # An input that nothing needs is still an input, and the last block is most a model's own.
    needed[-1 if member.has_rows else 0].update(member.unused)
    pieces = []
    given: set[fx.Node] = set()
    for index, (start, cut) in enumerate(zip(starts, cuts, strict=True)):
        takes = tuple(sorted(needed[index], key=order.__getitem__))
        handed = tuple(node for node in takes if node in given)
        ports = dict(zip(handed, analysis.named(handed), strict=True))
        taken = {port.name for port in ports.values()}
        for node in takes:
            if node not in ports:
                port = named[node]
                ports[node] = msgspec.structs.replace(port, name=_unique(port.name, [*taken], "_"))
                taken.add(ports[node].name)
        last = index == len(cuts) - 1 and cut.gives == tuple(analysis.outputs)
        outputs = output_ports(analysis.program) if last else analysis.named(cut.gives)
        inputs = tuple(ports[node] for node in takes)
        pieces.append(Piece(start, cut.place, takes, inputs, cut.gives, outputs))
        given.update(cut.gives)
    return pieces


# ---------------------------------------------------------------------------------------- naming


def _uses(digests: Iterable[Digest]) -> list[_Use]:
    """With each the number of those before it that are equal."""
    count: Counter[Digest] = Counter()
    found: list[_Use] = []
    for digest in digests:
        found.append((digest, count[digest]))
        count[digest] += 1
    return found


def _name_blocks(names: Sequence[str], chains: Sequence[Sequence[_Use]]) -> dict[_Use, str]:
    """`trunk-1`, `trunk-2`, ... for what several models use, in the order of the tree; for what
    one model uses its name, and where in its chain it is if there are several blocks.
    """
    users = Counter(use for chain in chains for use in chain)
    found: dict[_Use, str] = {}
    taken: list[str] = []
    shared = sum(1 for count in users.values() if count > 1)
    for name, chain in zip(names, chains, strict=True):
        for index, use in enumerate(chain):
            if use in found:
                continue
            if users[use] > 1:
                number = sum(1 for each in found if users[each] > 1) + 1
                wanted = f"trunk-{number}" if shared > 1 else "trunk"
            else:
                wanted = f"{name}-{index + 1}of{len(chain)}" if len(chain) > 1 else name
            found[use] = _unique(wanted, taken)
            taken.append(found[use])
    return found
