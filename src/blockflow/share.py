"""Sharing: several models into the fewest blocks, what they have in common cut out once.

Note [What is shared]
    Every value of a model has a hash of the whole computation that makes it (`identity.Values`):
    operators, arguments, weights bit for bit, inputs by position. An operator with the same hash
    in several models is the same computation on the same inputs, so with it everything that it
    depends on is shared too: what models have in common is closed under "depends on", wherever in
    the models it lies and in whatever order they were traced. A weight that differs in one bit is
    another weight; near is not equal.

Note [How sharing becomes blocks]
    What models share becomes the beginning of each of their pipelines, and sets of sharers must lie
    inside one another or apart, like folders:
    1. Each operator has the set of models that compute it, made smaller where an operator that
       must run before it, by data or by writes to the same memory, is in fewer.
    2. Of the sets that overlap without one holding the other, the one that saves more arithmetic
       is kept. Operators of the others count for the largest kept set inside theirs.
    3. Each model's operators are ordered by these sets, the largest first. Operators only change
       places with those that they do not depend on: nothing is computed differently.
    4. Each set's part ends where most is saved: at the last place where its members can be cut.
       What is left between there and the set's end, and a member that cannot be cut there, is by
       itself.
    The result is a tree: its root is what all models share, and each model is a path to a leaf.

Note [What a shared block gives]
    Where the same values are alive in all models that share a block, it gives these, each model's
    next block takes them all, and the pipeline is a chain. Where they are not, because one model
    still needs an input, or a value from the middle, that another is done with, the block gives
    all that any of them needs of what was computed. A model takes its part, and what it still
    needs of its inputs comes straight from the client: its pipeline is a graph.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import assert_never

import msgspec
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from blockflow.archive import read_archive
from blockflow.artifact import Digest, Manifest, Port, Store
from blockflow.cuts import BANDWIDTH, MAX_TENSORS, Analysis, choose, port_bytes
from blockflow.errors import ModelRefused
from blockflow.export import as_served, example, export, has_rows
from blockflow.graph import (
    batch_symbol,
    input_nodes,
    input_ports,
    is_batch_size,
    is_random,
    mutated_arguments,
    output_ports,
    plain_module,
)
from blockflow.identity import Values
from blockflow.measure import ROWS
from blockflow.models import ModuleSource, ProgramFile, ScriptFile, SourceModel
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

Sharers = frozenset[int]
"""Models, by their position among those given."""

_Key = tuple[bytes, int]
# An operator wherever it is: the hash of its value, and which of the operators with this hash it
# is in its model.

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
    """What `split_shared` made: models as paths through shared blocks, in the store at `store`."""

    store: Path
    models: tuple[SharedModel, ...]
    blocks: dict[str, SharedBlock]

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
    members: list[_Member] = []
    for source in sources:
        name = _unique(source.name, names)
        names.append(name)
        say(f"{name}: exporting")
        program = read_source(source)
        _intern(program, seen)
        members.append(_Member(name, program))
    if not members:
        raise ModelRefused("there is no model to split")
    say("comparing the models operator by operator")
    sharers = _sharers(members)
    trunks = _trunks(members, sharers)
    for member, ranks in zip(members, _ranks(members, sharers, trunks), strict=True):
        member.reorder(ranks)

    made: list[_Made] = []
    with store.writing():
        for member, cuts in zip(members, _cuts(members, trunks, blocks), strict=True):
            pieces = _pieces(member.analysis, cuts)
            built = build(
                member.analysis, pieces, member.name, model=member.reference, progress=progress
            )
            made.append(_Made(member, pieces, store_blocks(built, store, progress=progress)))
    return _family(store, made)


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

    member: _Member
    pieces: Sequence[Piece]
    result: SplitResult


def _family(store: Store, made: Sequence[_Made]) -> Family:
    names = [each.member.name for each in made]
    digests = [[block.digest for block in each.result.blocks] for each in made]
    chains = [_uses(each) for each in digests]
    if cycle([pair for chain in chains for pair in pairwise(map(str, chain))]):
        # Models that pass equal blocks in opposite orders could wait for each other for ever.
        chains = [[(d, tuple(each[:i])) for i, d in enumerate(each)] for each in digests]
    called = _name_blocks(names, chains)
    blocks: dict[str, SharedBlock] = {}
    for each, chain in zip(made, chains, strict=True):
        for block, use in zip(each.result.blocks, chain, strict=True):
            name = called[use]
            if name not in blocks:  # the first to store it tells whether it was there before
                users = [n for n, other in zip(names, chains, strict=True) if use in other]
                blocks[name] = SharedBlock(name, block.manifest, tuple(users), block.shared)
    models = tuple(
        _model(each, tuple(called[use] for use in chain))
        for each, chain in zip(made, chains, strict=True)
    )
    return Family(store.root, models, blocks)


def _model(made: _Made, blocks: tuple[str, ...]) -> SharedModel:
    """How a model's blocks are fed: by position, as a block may have been stored by another model,
    which called its ports otherwise.
    """
    analysis = made.member.analysis
    clients = {
        node: f"input.{port.name}"
        for node, port in zip(analysis.inputs, analysis.input_ports, strict=True)
    }
    inputs = tuple(port.name for port in analysis.input_ports)
    feeds: list[dict[str, str]] = []
    given: dict[fx.Node, str] = {}
    before: Sequence[Port] = ()
    chain = True
    for name, piece, block in zip(blocks, made.pieces, made.result.blocks, strict=True):
        takes, gives = block.manifest.inputs, block.manifest.outputs
        # What a block passes on is taken from it, be it an input of the model.
        sources = [given.get(node) or clients[node] for node in piece.takes]
        feeds.append(dict(zip((port.name for port in takes), sources, strict=True)))
        if not before:
            chain &= sources == [f"input.{each}" for each in inputs]
        elif len(before) == len(takes):
            rule = by_rule(before, takes)
            chain &= sources == [f"{blocks[len(feeds) - 2]}.{rule[port.name]}" for port in takes]
        else:
            chain = False
        before = gives
        given = {n: f"{name}.{port.name}" for n, port in zip(piece.gives, gives, strict=True)}
    outputs = [port.name for port in output_ports(analysis.program)]
    ending = [given[node] for node in analysis.outputs]
    if made.pieces[-1].gives == tuple(analysis.outputs):  # of which two may be one tensor
        ending = [f"{blocks[-1]}.{port.name}" for port in before]
    chain &= ending == [f"{blocks[-1]}.{port.name}" for port in before]
    return SharedModel(
        made.member.name,
        blocks,
        inputs,
        tuple(outputs),
        tuple(feeds),
        dict(zip(outputs, ending, strict=True)),
        chain,
    )


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


# ------------------------------------------------------------------------------------- comparing


class _Member:
    """One model of the family: its program, and the key and cost of each operator of its body."""

    def __init__(self, name: str, program: ExportedProgram) -> None:
        self.name = name
        self.program = program
        self.reference = plain_module(program)  # a copy, which keeps the order of the trace
        _ask_inputs_for_rows(program)
        self.analysis = Analysis(program)
        self.before = _order(self.analysis)
        self.values = Values(program, self.analysis.shadow)
        count: Counter[bytes] = Counter()
        self.keys: list[_Key] = []
        for node in self.analysis.body:
            made = self.values.declared(node)
            self.keys.append((made, count[made]))
            count[made] += 1

    def reorder(self, ranks: Sequence[tuple[int, int]]) -> None:
        """Bring the operators into the order of their ranks, as far as dependence allows."""
        after: dict[int, list[int]] = defaultdict(list)
        waiting = [len(before) for before in self.before]
        for place, before in enumerate(self.before):
            for each in before:
                after[each].append(place)
        ready = [(ranks[place], place) for place, count in enumerate(waiting) if not count]
        heapq.heapify(ready)
        order: list[int] = []
        while ready:
            _, place = heapq.heappop(ready)
            order.append(place)
            for each in after[place]:
                waiting[each] -= 1
                if not waiting[each]:
                    heapq.heappush(ready, (ranks[each], each))
        if order == sorted(order):
            return
        end = self.program.graph.output_node()
        for place in order:
            end.prepend(self.analysis.body[place])
        self.program.graph.lint()
        self.program.graph_module.recompile()
        self.keys = [self.keys[place] for place in order]
        self.analysis = Analysis(self.program)
        self.values = Values(self.program, self.analysis.shadow)

    def can_end(self, place: int) -> bool:
        """Whether a block can end there, as far as this model goes, and what is alive changes."""
        analysis = self.analysis
        if place >= len(analysis.body):
            return place == len(analysis.body)
        changes = place < 1 or analysis.live(place) != analysis.live(place - 1)
        return changes and analysis.obstacle(place) is None

    def crossing(self, place: int) -> tuple[fx.Node, ...]:
        """What is needed behind a place; the outputs at the end."""
        analysis = self.analysis
        return tuple(analysis.live(place) if place < len(analysis.body) else analysis.outputs)

    def described(self, nodes: Iterable[fx.Node]) -> tuple[tuple[object, ...], ...]:
        """Nodes in words that mean the same in all models that begin alike."""
        analysis = self.analysis
        return tuple(
            ("input", analysis.inputs.index(node), self.values.declared(node))
            if node in analysis.inputs
            else ("place", place)
            if (place := analysis.place(node)) is not None
            else ("free", self.values.of(node))
            for node in nodes
        )

    def computed(self, place: int) -> set[int] | None:
        """Places of what was computed before `place` and is needed behind it.

        None where that is nothing, or where the rest cannot come straight from the client: what a
        pipeline joins must have rows, and an input that a block has written to is another one.
        """
        analysis = self.analysis
        if analysis.batch is None or not all(map(has_rows, analysis.input_ports)):
            return None
        nodes = self.crossing(place)
        clients = [node for node in nodes if node in analysis.inputs]
        found = {analysis.place(node) for node in nodes if node not in analysis.inputs}
        if not found:
            return None
        if clients and analysis.writes(0, len(analysis.body), clients):
            return None
        if place == len(analysis.body) and (
            clients or any(analysis.misfit(node) is not None for node in nodes)
        ):
            return None  # what clients get comes from a block
        return {each for each in found if each is not None} if None not in found else None

    def seconds(self, first: int, last: int) -> float:
        return self._until[last] - self._until[first]

    @cached_property
    def _until(self) -> list[float]:
        return [*accumulate((cost.seconds for cost in self.analysis.costs), initial=0.0)]


def _ask_inputs_for_rows(program: ExportedProgram) -> None:
    """Take the number of rows from an input, wherever the trace took it from.

    An operator that every model has would otherwise depend on one that only its own model has.
    """
    batch = batch_symbol(program)
    batched = next(
        (
            node
            for node in input_nodes(program)
            if node.meta["val"].dim() and isinstance(node.meta["val"].shape[0], torch.SymInt)
        ),
        None,
    )
    if batched is not None:
        for node in program.graph.nodes:
            if is_batch_size(node, batch):
                node.args = (batched, 0)


def _order(analysis: Analysis) -> list[set[int]]:
    """For each operator of the body, those that must run before it: places in the body.

    They make what it takes, or touch memory that it writes, or wrote memory that it reads. Random
    operators keep their order among themselves.
    """
    place = {node: index for index, node in enumerate(analysis.body)}
    memory = analysis.shadow.memory
    wrote: dict[int, int] = {}
    reads: dict[int, list[int]] = defaultdict(list)
    random: int | None = None
    found: list[set[int]] = []
    for index, node in enumerate(analysis.body):
        before = {place[source] for source in node.all_input_nodes if source in place}
        writes = {memory(each) for each in mutated_arguments(node)}
        touches = {memory(each) for each in node.all_input_nodes}
        before.update(wrote[each] for each in touches if each in wrote)
        for each in writes:
            before.update(reads.pop(each, ()))
            wrote[each] = index
        for each in touches - writes:
            reads[each].append(index)
        if is_random(node):
            if random is not None:
                before.add(random)
            random = index
        found.append(before)
    return found


def _sharers(members: Sequence[_Member]) -> dict[_Key, Sharers]:
    """Which models compute each operator, after all that it depends on; see step 1 of the note."""
    found: dict[_Key, set[int]] = defaultdict(set)
    for index, member in enumerate(members):
        for key, node in zip(member.keys, member.analysis.body, strict=True):
            if not is_random(node):  # two draws are two values, whatever draws them
                found[key].add(index)
    changed = True
    while changed:  # what one model takes away, another one may need
        changed = False
        for index, member in enumerate(members):
            for key, before in zip(member.keys, member.before, strict=True):
                mine = found[key]
                if index not in mine:
                    continue
                size = len(mine)
                for place in before:
                    theirs = found[member.keys[place]]
                    if index in theirs:
                        mine &= theirs
                    else:
                        mine.discard(index)
                changed |= len(mine) != size
    return {key: frozenset(sharers) for key, sharers in found.items()}


def _trunks(members: Sequence[_Member], sharers: Mapping[_Key, Sharers]) -> list[Sharers]:
    """The sets of models whose common parts become blocks, the largest first; see step 2."""
    saved: dict[Sharers, tuple[int, int]] = {}
    counted = set()
    for member in members:
        for key, cost in zip(member.keys, member.analysis.costs, strict=True):
            group = sharers[key]
            if len(group) < 2 or key in counted:
                continue
            counted.add(key)
            flops, size = saved.get(group, (0, 0))
            others = len(group) - 1
            saved[group] = (flops + others * cost.flops, size + others * cost.parameter_bytes)
    kept: list[Sharers] = []
    for group in sorted(saved, key=lambda each: (saved[each], sorted(each)), reverse=True):
        if all(group <= other or other <= group or not group & other for other in kept):
            kept.append(group)
    return sorted(kept, key=len, reverse=True)


def _ranks(
    members: Sequence[_Member], sharers: Mapping[_Key, Sharers], trunks: Sequence[Sharers]
) -> list[list[tuple[int, int]]]:
    """For each model, where its operators belong: the larger trunk first; see step 3.

    Within a trunk, the order is that of the first model in it.
    """
    places = [{key: place for place, key in enumerate(member.keys)} for member in members]
    ranks = []
    for index, member in enumerate(members):
        mine = [trunk for trunk in trunks if index in trunk]
        own = []
        for place, key in enumerate(member.keys):
            trunk = next((each for each in mine if each <= sharers[key]), None)
            own.append((-1, place) if trunk is None else (-len(trunk), places[min(trunk)][key]))
        ranks.append(own)
    return ranks


# --------------------------------------------------------------------------------------- cutting


@dataclass(frozen=True)
class _Cut:
    """Where a block of a model ends, and what it gives."""

    place: int
    gives: tuple[fx.Node, ...]


def _cuts(members: Sequence[_Member], trunks: Sequence[Sharers], blocks: Where) -> list[list[_Cut]]:
    """Where to cut each model: at the ends of its trunks, and in between; see step 4.

    The last cut of each is its end.
    """
    average = sum(member.seconds(0, len(member.keys)) for member in members) / len(members)
    asked = _asked(members, blocks.names if isinstance(blocks, AtModules) else ())
    reached = [0] * len(members)
    found: list[list[_Cut]] = [[] for _ in members]

    def cut(group: Sequence[int], end: int, ending: Sequence[tuple[fx.Node, ...]]) -> None:
        """Cut the models of a group at an end that they have in common, and in the part before."""
        those = [members[index] for index in group]
        start = max(reached[index] for index in group)
        within = [
            (place, gives)
            for place in range(start + 1, end)
            if all(member.can_end(place) for member in those)
            and (gives := _given(those, place)) is not None
        ]
        bounds = [start, *(place for place, _ in within), end]
        match blocks:
            case int():
                parts = round(those[0].seconds(start, end) * blocks / average)
                chosen = choose(
                    [those[0].seconds(a, b) for a, b in pairwise(bounds)],
                    [
                        sum(map(port_bytes, those[0].analysis.named(gives[0])))
                        for _, gives in within
                    ],
                    min(max(parts, 1), len(within) + 1),
                    byte_seconds=ROWS / BANDWIDTH,
                    slack=SLACK,
                )
            case AtModules():
                places = set().union(*(asked[index] for index in group))
                chosen = [each for each, (place, _) in enumerate(within) if place in places]
            case Everywhere():
                chosen = [*range(len(within))]
            case _:
                assert_never(blocks)
        for place, everybody in [*(within[each] for each in chosen), (end, ending)]:
            for index, nodes in zip(group, everybody, strict=True):
                found[index].append(_Cut(place, nodes))
        for index in group:
            reached[index] = end

    waiting = deque(sorted(trunk) for trunk in trunks)
    while waiting:
        group = waiting.popleft()
        end = _end(members, group, reached)
        if end is None:
            continue
        cut(end.group, end.place, end.gives)
        left = [index for index in group if index not in end.group]
        if len(left) > 1:
            waiting.appendleft(left)
    for index, member in enumerate(members):
        if reached[index] < len(member.keys):
            cut([index], len(member.keys), [member.crossing(len(member.keys))])
    for member, cuts, wanted in zip(members, found, asked, strict=True):
        for place in wanted.keys() - {each.place for each in cuts}:
            raise ModelRefused(
                f"{member.name} cannot be cut before {wanted[place]} together with the models that "
                "it shares that part with: too much is alive there for all of them"
            )
    return found


def _asked(members: Sequence[_Member], modules: Sequence[str]) -> list[dict[int, str]]:
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
            if reason is not None:
                raise ModelRefused(f"{members[index].name} cannot be cut before {name}: {reason}")
            found[index][place] = name
    return found


@dataclass(frozen=True)
class _End:
    """Where what a group of models shares ends, and what each has to be given there."""

    group: tuple[int, ...]
    place: int
    gives: tuple[tuple[fx.Node, ...], ...]


def _end(members: Sequence[_Member], group: Sequence[int], reached: Sequence[int]) -> _End | None:
    """The end of a trunk that saves most, for all or some of its models.

    One where all are given the same is taken for as good if it saves nearly as much.
    """
    start = max(reached[index] for index in group)
    first = members[group[0]]
    length = _common([members[index].keys for index in group])
    alike: tuple[float, _End] | None = None
    best: tuple[float, _End] | None = None
    for place in range(start + 1, length + 1):
        able = [index for index in group if members[index].can_end(place)]
        kinds: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for index in able:
            kinds[members[index].described(members[index].crossing(place))].append(index)
        largest = max(kinds.values(), key=len, default=[])
        for chosen in (able, largest):
            if len(chosen) < 2:
                continue
            gives = _given([members[index] for index in chosen], place)
            if gives is None:
                continue
            saved = (len(chosen) - 1) * first.seconds(start, place)
            end = saved, _End(tuple(chosen), place, tuple(gives))
            if best is None or saved >= best[0]:
                best = end
            if len(kinds) == 1 and (alike is None or saved >= alike[0]):
                alike = end
    if alike is not None and best is not None and alike[0] >= (1 - SLACK) * best[0]:
        return alike[1]
    return None if best is None else best[1]


def _given(members: Sequence[_Member], place: int) -> list[tuple[fx.Node, ...]] | None:
    """What a block that ends there gives, as nodes of each model; None where that is no block.

    See Note [What a shared block gives].
    """
    crossing = [member.crossing(place) for member in members]
    ends = [place == len(member.keys) for member in members]
    if len({m.described(nodes) for m, nodes in zip(members, crossing, strict=True)}) == 1:
        fits = all(ends) or len(crossing[0]) <= MAX_TENSORS
        return crossing if fits else None
    computed = [member.computed(place) for member in members]
    known = [each for each in computed if each is not None]
    together = sorted(set().union(*known))
    if len(known) < len(computed) or not 0 < len(together) <= MAX_TENSORS:
        return None
    return [tuple(member.analysis.body[each] for each in together) for member in members]


def _common(sequences: Sequence[Sequence[_Key]]) -> int:
    """How many keys all sequences have in common at their beginning."""
    count = 0
    for keys in zip(*sequences, strict=False):
        if len(set(keys)) > 1:
            break
        count += 1
    return count


def _pieces(analysis: Analysis, cuts: Sequence[_Cut]) -> list[Piece]:
    """The blocks of a model between its cuts, with what each takes and gives."""
    named = dict(zip(analysis.inputs, analysis.input_ports, strict=True))
    order = {node: index for index, node in enumerate((*analysis.inputs, *analysis.body))}
    starts = [0, *(cut.place for cut in cuts[:-1])]
    needed = []
    for start, cut in zip(starts, cuts, strict=True):
        own = set(analysis.body[start : cut.place])
        passed = {node for node in cut.gives if node in order and node not in own}
        needed.append(analysis.used(start, cut.place) | passed)
    # An input that nothing needs is still an input, and the last block is most a model's own.
    needed[-1].update(node for node in analysis.inputs if not any(node in n for n in needed))
    pieces = []
    given: tuple[fx.Node, ...] = ()
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
        given = cut.gives
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
