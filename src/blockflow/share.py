"""Sharing: several models into the fewest blocks, what they have in common cut out once.

Note [What is shared]
    Every value of a model has a hash of the whole computation that makes it (`identity.Values`):
    operators, arguments, weights bit for bit, inputs by position. An operator with the same hash
    in several models is the same computation on the same inputs, so with it everything that it
    depends on is shared too: what models have in common is closed under "depends on", wherever in
    the models it lies and in whatever order they were traced. A weight that differs in one bit is
    another weight; near is not equal.

Note [How sharing becomes blocks]
    1. Each operator of each model has the set of models that compute it. The set becomes smaller
       where something that must run before, by data or by writes to the same memory, is in fewer,
       and where what it gives cannot go from block to block: then it belongs to those who take it.
    2. What has one set becomes one block, or several if more are asked for. Sets become only
       smaller along a model, so nothing feeds a block that feeds it. They need not lie inside one
       another: if a and b share one branch, b and c another, both are blocks.
    3. Each model's operators are ordered by these sets, the larger first. Operators only change
       places with those that they do not depend on: nothing is computed differently. A block is
       then a stretch of each of its models, and what a model has for itself is its last block.

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
import heapq
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import assert_never

import msgspec
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from blockflow.archive import read_archive
from blockflow.artifact import Digest, Manifest, Store
from blockflow.cuts import BANDWIDTH, MAX_TENSORS, ROWS, Analysis, Cost, choose, port_bytes
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
from blockflow.models import ModuleSource, ProgramFile, ScriptFile, SourceModel
from blockflow.quantities import scaled
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

_Word = tuple[str, int, bytes]
# A value that several models know: of an operator by its place, of an input by its number.

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
    parts, kept_apart = _common_parts(members)
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

    member: _Member
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


# ------------------------------------------------------------------------------------- comparing


class _Member:
    """One model of the family: its program, and what is known of each operator of its body.

    keys: what tells an operator wherever it is. before, tied: see `_order` and `_tied`. users:
    places that take what an operator gives.
    """

    def __init__(self, name: str, program: ExportedProgram) -> None:
        self.name = name
        self.program = program
        self.reference = plain_module(program)  # a copy, which keeps the order of the trace
        _ask_inputs_for_rows(program)
        self._read()
        if _drop_unused(self.analysis) | _take_apart(self.analysis):
            self._read()

    def _read(self) -> None:
        self.analysis = analysis = Analysis(self.program)
        self.values = Values(self.program, analysis.shadow)
        self.before = _order(analysis)
        self.tied = _tied(analysis)
        self.users = [
            [place for user in node.users if (place := analysis.place(user)) is not None]
            for node in analysis.body
        ]
        count: Counter[bytes] = Counter()
        self.keys: list[_Key] = []
        for node in analysis.body:
            made = self.values.declared(node)
            self.keys.append((made, count[made]))
            count[made] += 1
        self._until = [*accumulate((cost.seconds for cost in analysis.costs), initial=0.0)]

    @property
    def has_rows(self) -> bool:
        """Whether all inputs have rows, as all must that a graph of blocks is fed."""
        return self.analysis.batch is not None and all(map(has_rows, self.analysis.input_ports))

    @cached_property
    def unused(self) -> tuple[fx.Node, ...]:
        """Inputs that no operator takes."""
        place = self.analysis.place
        return tuple(
            node for node in self.analysis.inputs if all(place(user) is None for user in node.users)
        )

    @cached_property
    def odds(self) -> tuple[object, ...]:
        """What of its inputs and outputs no operator takes and makes: its last block has to."""
        analysis = self.analysis
        if not self.unused and all(analysis.place(node) is not None for node in analysis.outputs):
            return ()
        return self.described(self.unused), [self.values.of(node) for node in analysis.outputs]

    def reorder(self, ranks: Sequence[tuple[object, ...]]) -> list[int]:
        """Bring the operators into the order of their ranks, as far as dependence allows.

        Returns where each was.
        """
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
        if order != sorted(order):
            end = self.program.graph.output_node()
            for place in order:
                end.prepend(self.analysis.body[place])
            self.program.graph.lint()
            self.program.graph_module.recompile()
            self._read()
        return order

    def can_end(self, place: int) -> bool:
        """Whether a block of a chain can end there, as far as this model goes."""
        analysis = self.analysis
        return place == len(analysis.body) or analysis.obstacle(place) is None

    def changes(self, place: int) -> bool:
        """Whether other values are alive than one operator before."""
        return self.analysis.live(place) != self.analysis.live(place - 1)

    def crossing(self, place: int) -> tuple[fx.Node, ...]:
        """What is needed behind a place; the outputs at the end."""
        analysis = self.analysis
        return tuple(analysis.live(place) if place < len(analysis.body) else analysis.outputs)

    def described(self, nodes: Iterable[fx.Node]) -> tuple[_Word, ...]:
        """Nodes in words that mean the same in all models that begin alike."""
        analysis = self.analysis
        return tuple(
            ("input", analysis.inputs.index(node), self.values.declared(node))
            if node in analysis.inputs
            else ("operator", place, b"")
            if (place := analysis.place(node)) is not None
            else ("weights", 0, self.values.of(node))
            for node in nodes
        )

    def meant(self, word: _Word) -> fx.Node | None:
        """The node that a word means; None if this model has none that could travel."""
        analysis = self.analysis
        kind, index, declared = word
        node: fx.Node | None = None
        if kind == "operator":
            node = analysis.body[index]
        elif kind == "input":
            known = (each for each in analysis.inputs if self.values.declared(each) == declared)
            node = next(known, None)
        return node

    def given(self, first: int, last: int) -> list[int]:
        """Which of `body[first:last]` something behind it or a client needs."""
        outputs = set(self.analysis.outputs)
        return [
            place
            for place in range(first, last)
            if self.analysis.body[place] in outputs
            or any(user >= last for user in self.users[place])
        ]

    def seconds(self, first: int, last: int) -> float:
        return self._until[last] - self._until[first]


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


def _drop_unused(analysis: Analysis) -> bool:
    """Drop operators that no output depends on: a block of such would feed nothing.

    Returns whether there were any.
    """
    memory = analysis.shadow.memory
    writers: dict[int, list[fx.Node]] = defaultdict(list)
    for node in analysis.body:
        for written in mutated_arguments(node):
            writers[memory(written)].append(node)
    used: set[fx.Node] = set()
    # Assertions give nothing, and a number that is not drawn changes those drawn later.
    kept = [n for n in analysis.body if n.meta.get("val") is None or is_random(n)]
    queue = [*analysis.outputs, *kept]
    while queue:
        node = queue.pop()
        if node not in used:
            used.add(node)
            queue += [*node.all_input_nodes, *writers[memory(node)]]
    unused = [node for node in analysis.body if node not in used]
    for node in reversed(unused):
        node.graph.erase_node(node)
    analysis.program.graph_module.recompile()
    return bool(unused)


def _take_apart(analysis: Analysis) -> bool:
    """Take each tensor out of the tuples that operators give: a tuple cannot travel, and models
    that share a block must all have what only some of them need of it.

    Returns whether there were any that was not taken out.
    """
    graph = analysis.program.graph
    found = False
    for node in [*graph.nodes]:
        value = node.meta.get("val")
        if analysis.place(node) is None or not isinstance(value, (tuple, list)):
            continue
        taken = {user.args[1] for user in node.users if user.target is operator.getitem}
        for index, each in enumerate(value):
            if index not in taken and isinstance(each, Tensor):
                with graph.inserting_after(node):
                    item = graph.call_function(operator.getitem, (node, index))
                item.meta["val"] = each
                found = True
    analysis.program.graph_module.recompile()
    return found


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


def _tied(analysis: Analysis) -> list[list[tuple[int, str]]]:
    """For each operator, the later ones that must be in one block with it, and why.

    They take what cannot travel, or write to its memory, or read an input that it wrote to.
    """
    memory = analysis.shadow.memory
    found: list[list[tuple[int, str]]] = [[] for _ in analysis.body]
    made: dict[int, list[int]] = defaultdict(list)
    wrote: dict[int, list[int]] = {memory(node): [] for node in analysis.inputs}
    last = len(analysis.body) - 1
    for place, node in enumerate(analysis.body):
        if node.meta.get("val") is not None and (reason := analysis.misfit(node)) is not None:
            users = map(analysis.place, node.users)
            found[place] += ((user, reason) for user in users if user is not None)
        for source in node.all_input_nodes:
            if source in analysis.inputs:
                for each in wrote[memory(source)]:
                    reason = f"{node.name} reads the input that {analysis.body[each].name} wrote to"
                    found[each].append((place, reason))
        for each in {memory(written) for written in mutated_arguments(node)}:
            for maker in made[each]:
                reason = f"{node.name} overwrites the tensor of {analysis.body[maker].name}"
                found[maker].append((place, reason))
            if each in wrote:
                wrote[each].append(place)
        made[memory(node)].append(place)
    for node in analysis.outputs:
        if node in analysis.inputs:
            for each in wrote[memory(node)]:
                found[each].append((last, f"the input {node.name} is an output, overwritten"))
    return found


_Groups = list[list[Sharers]]
# For each model and place of its body: the models that compute what is there in one block.

_Apart = set[tuple[int, Sharers]]
# Models with sets in which they cannot be.


def _compared(members: Sequence[_Member]) -> _Groups:
    """Which models compute each operator, after all that it depends on."""
    having: dict[_Key, set[int]] = defaultdict(set)
    for index, member in enumerate(members):
        for key in member.keys:
            having[key].add(index)
    found = [
        [
            # Two draws are two values, whatever draws them.
            frozenset([index] if is_random(node) else having[key])
            for key, node in zip(member.keys, member.analysis.body, strict=True)
        ]
        for index, member in enumerate(members)
    ]

    def narrow(index: int, mine: list[Sharers]) -> None:
        for place, before in enumerate(members[index].before):
            mine[place] = mine[place].intersection(*(mine[each] for each in before))

    return _settled(members, found, narrow)


def _grouped(members: Sequence[_Member], compared: _Groups, apart: _Apart) -> _Groups:
    """The same, of what can be blocks; see step 1 of the note."""
    alike = [
        frozenset(
            other
            for other, each in enumerate(members)
            if each.has_rows == member.has_rows
            and each.described(each.unused) == member.described(member.unused)
        )
        for member in members
    ]
    twins = [
        frozenset(
            other
            for other, each in enumerate(members)
            if each.odds == member.odds and set(each.keys) == set(member.keys)
        )
        for member in members
    ]

    def narrow(index: int, mine: list[Sharers]) -> None:
        member = members[index]
        alone = frozenset([index])
        if member.odds:
            mine[-1] &= twins[index]
        if member.unused and not member.has_rows:  # where a chain begins, it takes all inputs
            mine[:] = (each & alike[index] for each in mine)
        for place, before in enumerate(member.before):
            mine[place] = mine[place].intersection(*(mine[each] for each in before))
            if (index, mine[place]) in apart:
                mine[place] = alone
        for place in reversed(range(len(mine))):
            for other, _ in member.tied[place]:
                mine[place] &= mine[other]
        outputs = set(member.analysis.outputs)
        for group in set(mine) - {alone}:
            places = [place for place, each in enumerate(mine) if each == group]
            costs = [member.analysis.costs[place] for place in places]
            gives = any(
                member.analysis.body[place] in outputs
                or any(mine[user] != group for user in member.users[place])
                for place in places
            )
            takes = any(
                node in member.analysis.inputs
                or ((maker := member.analysis.place(node)) is not None and mine[maker] != group)
                for place in places
                for node in member.analysis.body[place].all_input_nodes
            )
            if not gives or not takes:
                mine[:] = (alone if each == group else each for each in mine)
            elif not any(cost.flops or cost.activation_bytes for cost in costs):
                for place in reversed(places):  # views, which take a block longer than no time
                    mine[place] = mine[place].intersection(*(mine[u] for u in member.users[place]))

    return _settled(members, [list(mine) for mine in compared], narrow)


def _settled(
    members: Sequence[_Member], found: _Groups, narrow: Callable[[int, list[Sharers]], None]
) -> _Groups:
    """Make the sets of each model smaller, and those of the others as well, until all agree."""
    while True:
        before = [list(mine) for mine in found]
        for index, mine in enumerate(found):
            narrow(index, mine)
        agreed: dict[tuple[_Key, Sharers], set[int]] = defaultdict(set)
        for index, (member, mine) in enumerate(zip(members, found, strict=True)):
            for key, group in zip(member.keys, mine, strict=True):
                agreed[key, group].add(index)
        for member, mine in zip(members, found, strict=True):
            for place, key in enumerate(member.keys):
                mine[place] = frozenset(agreed[key, mine[place]])
        if found == before:
            return found


@dataclass(frozen=True)
class _Part:
    """What the same models compute: a stretch of each one's body, `length` from `starts[model]` on.

    In a chain, it gives all that is needed behind it, and otherwise what it made of that.
    """

    group: Sharers
    starts: Mapping[int, int]
    length: int
    chained: bool


def _common_parts(members: Sequence[_Member]) -> tuple[list[_Part], tuple[str, ...]]:
    """The parts that models have in common or for themselves, each after those that it needs, and
    what is kept apart. Each model's operators come to lie in the order of its parts.
    """
    compared = _compared(members)
    apart: _Apart = set()
    while True:
        groups = _grouped(members, compared, apart)
        said = _kept_apart(members, compared, groups, apart)
        places = [{key: p for p, key in enumerate(member.keys)} for member in members]
        ranks = [
            [
                (-len(group), sorted(group), places[min(group)][key])
                for key, group in zip(member.keys, mine, strict=True)
            ]
            for member, mine in zip(members, groups, strict=True)
        ]
        for index, (member, rank) in enumerate(zip(members, ranks, strict=True)):
            order = member.reorder(rank)
            groups[index] = [groups[index][place] for place in order]
            compared[index] = [compared[index][place] for place in order]
        parts = _parts(members, groups)
        misfits = _not_in_chains(members, parts)
        if not misfits:
            return parts, said
        apart |= misfits


def _parts(members: Sequence[_Member], groups: _Groups) -> list[_Part]:
    starts: dict[Sharers, dict[int, int]] = defaultdict(dict)
    lengths: dict[Sharers, int] = {}
    for index, mine in enumerate(groups):
        for group, run in groupby(range(len(mine)), key=mine.__getitem__):
            places = [*run]
            if index in starts[group]:
                raise AssertionError("the operators of a part lie apart, though none is between")
            starts[group][index] = places[0]
            lengths[group] = len(places)
    found = []
    chained: dict[int, bool] = dict.fromkeys(range(len(members)), True)
    for group in sorted(starts, key=lambda each: (-len(each), sorted(each))):
        here, length = starts[group], lengths[group]
        if len(group) == 1:
            chain = chained[min(group)]
        else:
            nested = not any(_overlap(group, other) for other in starts)
            chain = nested and all(chained[index] for index in group)
            chain = chain and _passed(members, here, length) is not None
        for index in group:
            chained[index] &= chain
        found.append(_Part(group, here, length, chain))
    return found


def _overlap(group: Sharers, other: Sharers) -> bool:
    return bool(group & other) and not (group <= other or other <= group)


def _not_in_chains(members: Sequence[_Member], parts: Sequence[_Part]) -> _Apart:
    """Which models without rows are in parts of graphs, or what is in the way of a chain."""
    found: _Apart = set()

    def saved(part: _Part) -> float:
        index, start = min(part.starts.items())
        return (len(part.group) - 1) * members[index].seconds(start, start + part.length)

    for part in parts:
        rowless = [index for index in part.group if not members[index].has_rows]
        if len(part.group) == 1 or part.chained or not rowless:
            continue
        against = [other for other in parts if _overlap(part.group, other.group)]
        if against and all(saved(part) > saved(other) for other in against):
            found.update((i, other.group) for other in against for i in other.group & part.group)
        else:
            found.update((index, part.group) for index in rowless)
    return found


def _kept_apart(
    members: Sequence[_Member], compared: _Groups, groups: _Groups, apart: _Apart
) -> tuple[str, ...]:
    """What several models compute alike that is no block of them all, in words."""
    lost: dict[Sharers, dict[_Key, Cost]] = defaultdict(dict)
    reasons: dict[Sharers, str] = {}
    for member, before, after in zip(members, compared, groups, strict=True):
        for place, (key, group) in enumerate(zip(member.keys, before, strict=True)):
            cost = member.analysis.costs[place]
            if group != after[place] and (cost.flops or cost.parameter_bytes):
                lost[group][key] = cost
            for other, reason in member.tied[place]:
                if before[other] != group:
                    reasons.setdefault(group, reason)
    said = []
    for group, costs in lost.items():
        whole = sum(costs.values(), Cost())
        names = ", ".join(members[index].name for index in sorted(group))
        rowless = [
            members[index].name
            for index in sorted(group)
            if any(index == other and of <= group for other, of in apart)
        ]
        if rowless:
            why = (
                f"{', '.join(rowless)} would become a graph of blocks, through which tensors "
                "without rows cannot go, or is in the way of a chain of such a model"
            )
        else:
            of_more = [reason for other, reason in reasons.items() if group <= other]
            odd = [members[index].name for index in sorted(group) if members[index].odds]
            if odd and not of_more:
                why = (
                    "inputs that are not used, and outputs that are not computed, need a block "
                    f"that is a model's own, here of {', '.join(odd)}"
                )
            else:
                why = next(iter(of_more), "to some of them, such a block would give nothing")
        flops = scaled(whole.flops, ("FLOP", "kFLOP", "MFLOP", "GFLOP"))
        weights = scaled(whole.parameter_bytes, ("B", "kB", "MB", "GB"))
        said.append(
            f"{names} compute alike, but not in one block of them all, {flops} per row with "
            f"{weights} of weights: {why}"
        )
    return tuple(said)


# --------------------------------------------------------------------------------------- cutting


@dataclass(frozen=True)
class _Cut:
    """Where a block of a model ends, what it gives, and which block of which part it is."""

    place: int
    gives: tuple[fx.Node, ...]
    part: tuple[Sharers, int]


def _cuts(members: Sequence[_Member], parts: Sequence[_Part], blocks: Where) -> list[list[_Cut]]:
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
    members: Sequence[_Member], ends: Sequence[set[int]], modules: Sequence[str]
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


_Gives = dict[int, tuple[fx.Node, ...]]
# For each model of a part, the nodes that a block of it gives.


def _gives(members: Sequence[_Member], part: _Part, begin: int, end: int) -> _Gives:
    """What the block between two offsets in a part gives; see Note [What a shared block gives]."""
    if part.chained:
        passed = _passed(members, part.starts, end)
        if passed is None:
            raise AssertionError("what crosses in a chain was looked at before")
        return passed
    gives = _computed(members, part, begin, end)
    for index, start in part.starts.items():
        analysis = members[index].analysis
        if start + end == len(analysis.body):
            odd = [node for node in analysis.outputs if analysis.place(node) is None]
            # Where there are but assertions, what they guard waits for them.
            gives[index] = (*gives[index], *odd) or tuple(analysis.outputs)
    return gives


def _giving(members: Sequence[_Member], part: _Part, ends: Sequence[int]) -> list[int]:
    """Those of the ends within a part between which each of its models gets something."""
    found = [0]
    for end in ends:
        if all(members[i].given(s + found[-1], s + end) for i, s in part.starts.items()):
            found.append(end)
    # What comes last and gives nothing is of the block before it.
    return [*found[1:-1], part.length]


def _within(members: Sequence[_Member], part: _Part, offset: int) -> _Gives | None:
    """What is alive where a block may end inside a part; None where none can end."""
    if not all(members[index].changes(start + offset) for index, start in part.starts.items()):
        return None
    if part.chained:
        found = _passed(members, part.starts, offset)
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


def _passed(members: Sequence[_Member], starts: Mapping[int, int], offset: int) -> _Gives | None:
    """All that is alive behind the same operators in models that begin alike; None if not in all.

    Of models that have to be chains, also what is alive in some of them.
    """
    crossing = {}
    for index, start in starts.items():
        if not members[index].can_end(start + offset):
            return None
        crossing[index] = members[index].crossing(start + offset)
    described = [members[index].described(nodes) for index, nodes in crossing.items()]
    if len(set(described)) == 1:
        ends = all(starts[i] + offset == len(members[i].keys) for i in starts)
        if ends or len(described[0]) <= MAX_TENSORS:
            return crossing
    if all(members[index].has_rows for index in starts):
        return None
    union = sorted({each for nodes in described for each in nodes})
    found: _Gives = {}
    for index in starts:
        nodes = [members[index].meant(each) for each in union]
        present = tuple(node for node in nodes if node is not None)
        misfit = members[index].analysis.misfit
        if len(present) < len(union) or any(misfit(node) is not None for node in present):
            return None
        found[index] = present
    return found


def _computed(members: Sequence[_Member], part: _Part, first: int, last: int) -> _Gives:
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


def _pieces(member: _Member, cuts: Sequence[_Cut]) -> list[Piece]:
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
