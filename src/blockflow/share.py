"""Sharing: several models into the fewest blocks, what they have in common cut out once.

Note [What is shared]
    Every value of a model has a hash of the whole computation that makes it (`identity.Values`):
    operators, arguments, weights bit for bit, inputs by position. An operator with the same hash
    in several models is the same computation on the same inputs, so with it everything that it
    depends on is shared too: what models have in common is closed under "depends on", wherever in
    the models it lies and in whatever order they were traced. A weight that differs in one bit is
    another weight; near is not equal.

Note [How sharing becomes blocks]
    A pipeline is a chain of blocks, so what models share must be the beginning of each of their
    chains, and sets of sharers must lie inside one another or apart, like folders:
    1. Each operator has the set of models that compute it, made smaller where an operator that
       must run before it, by data or by writes to the same memory, is in fewer.
    2. Of the sets that overlap without one holding the other, the one that saves more arithmetic
       is kept. Operators of the others count for the largest kept set inside theirs.
    3. Each model's operators are ordered by these sets, the largest first. Operators only change
       places with those that they do not depend on: nothing is computed differently.
    4. Each set's part ends at the last place where all its members can be cut and the same values
       are alive. What is left between there and the set's end falls to the members.
    The result is a tree: its root is what all models share, and each model is a path to a leaf.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

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
    plain_module,
)
from blockflow.identity import Values
from blockflow.models import ModuleSource, ProgramFile, ScriptFile, SourceModel
from blockflow.split import SLACK, Progress, SplitResult, same_bits, split_at, store_blocks
from blockflow.topology import Topology
from blockflow.topology import parse as parse_topology

Sharers = frozenset[int]
"""Models, by their position among those given."""

_Key = tuple[bytes, int]
# An operator wherever it is: the hash of its value, and which of the operators with this hash it
# is in its model.


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
    """One model of the family as a chain of blocks, by their names, first to last.

    `inputs` and `outputs` are its own names for what it takes and gives.
    """

    name: str
    blocks: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


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
    blocks: int = 1,
    progress: Progress | None = None,
) -> Family:
    """Cut models where what they share ends, and put every distinct block into the store once.

    A model is cut into about `blocks` blocks: parts, shared or not, that take more than that
    share of a model's time are cut further, by balanced cost. Each chain of blocks is proven
    equal to its model, bit for bit on CPU, before its blocks are stored. `sources` is read one by
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

    results: list[SplitResult] = []
    with store.writing():
        for member, cuts in zip(members, _places(members, trunks, blocks), strict=True):
            made = split_at(
                member.program,
                member.analysis.cut_points_at(cuts),
                member.name,
                model=member.reference,
                progress=progress,
            )
            results.append(store_blocks(made, store, progress=progress))
    return _family(store, names, results)


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
            "pipelines": {
                model.name: {
                    "blocks": list(model.blocks),
                    "inputs": list(model.inputs),
                    "outputs": list(model.outputs),
                }
                for model in family.models
            },
        }
    )


def _family(store: Store, names: Sequence[str], results: Sequence[SplitResult]) -> Family:
    chains = [[block.digest for block in result.blocks] for result in results]
    called = _name_blocks(names, chains)
    blocks: dict[str, SharedBlock] = {}
    for result in results:
        for block in result.blocks:
            name = called[block.digest]
            if name not in blocks:  # the first to store it tells whether it was there before
                users = [n for n, chain in zip(names, chains, strict=True) if block.digest in chain]
                blocks[name] = SharedBlock(name, block.manifest, tuple(users), block.shared)
    models = tuple(
        SharedModel(name, tuple(called[digest] for digest in chain), result.inputs, result.outputs)
        for name, chain, result in zip(names, chains, results, strict=True)
    )
    return Family(store.root, models, blocks)


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
    by_name = {port.name for port in ports} == {port.name for port in source.inputs}
    for rows in (1, 3) if any(map(has_rows, ports)) else (1,):
        inputs = [example(port, rows, seed) for seed, port in enumerate(ports)]
        given = [tensor.clone() for tensor in inputs]
        with as_served(source.module), torch.no_grad():
            if by_name:
                names = (port.name for port in ports)
                value = source.module(**dict(zip(names, given, strict=True)))
            else:
                value = source.module(*given)
            found = plain(*inputs)
        expected = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
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


def _unique(name: str, taken: Sequence[str]) -> str:
    count = 2
    unique = name
    while unique in taken:
        unique = f"{name}-{count}"
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
        values = Values(program, self.analysis.shadow)
        count: Counter[bytes] = Counter()
        self.keys: list[_Key] = []
        for node in self.analysis.body:
            made = values.declared(node)
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
        self.analysis = Analysis(self.program)

    def edges(self) -> dict[tuple[bytes, ...], int]:
        """Places where the model can be cut, and its end, by the hashes of what is alive there."""
        keys = self.analysis.keys()
        found = {keys[cut.place]: cut.place for cut in self.analysis.cuts(MAX_TENSORS)}
        values = Values(self.program, self.analysis.shadow)
        ending = tuple(map(values.of, self.analysis.outputs))
        return {**found, ending: len(self.analysis.body)}

    def cost(self, first: int, last: int) -> Cost:
        return sum(self.analysis.costs[first:last], Cost())


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


def _places(members: Sequence[_Member], trunks: Sequence[Sharers], blocks: int) -> list[list[int]]:
    """Where to cut each model: at the ends of its trunks, and in between; see step 4."""
    edges = [member.edges() for member in members]
    target = sum(member.cost(0, len(member.keys)).seconds for member in members) / (
        len(members) * blocks
    )
    reached = [0] * len(members)
    found: list[list[int]] = [[] for _ in members]

    def cut(group: Sequence[int], ending: tuple[bytes, ...]) -> None:
        """Cut the models of a group at an edge that they have in common, and in the part before."""
        first = group[0]
        start, end = reached[first], edges[first][ending]
        within = [
            (place, key)
            for key, place in edges[first].items()
            if start < place < end
            and all(reached[i] < edges[i].get(key, -1) < edges[i][ending] for i in group)
        ]
        within.sort()
        parts = round(members[first].cost(start, end).seconds / target)
        parts = min(max(parts, 1), len(within) + 1)
        analysis = members[first].analysis
        bounds = [start, *(place for place, _ in within), end]
        chosen = choose(
            [members[first].cost(a, b).seconds for a, b in pairwise(bounds)],
            [sum(map(port_bytes, analysis.ports(place))) for place, _ in within],
            parts,
            byte_seconds=ROWS / BANDWIDTH,
            slack=SLACK,
        )
        for key in [*(within[each][1] for each in chosen), ending]:
            for index in group:
                found[index].append(edges[index][key])
        for index in group:
            reached[index] = edges[index][ending]

    for trunk in trunks:
        group = sorted(trunk)
        common = [
            (place, key)
            for key, place in edges[group[0]].items()
            if all(reached[index] < edges[index].get(key, -1) for index in group)
        ]
        if common:
            cut(group, max(common)[1])
    for index, member in enumerate(members):
        end = len(member.analysis.body)
        if reached[index] < end:
            cut([index], next(key for key, place in edges[index].items() if place == end))
    return [places[:-1] for places in found]  # the last of each is the model's end


# ---------------------------------------------------------------------------------------- naming


def _name_blocks(names: Sequence[str], chains: Sequence[Sequence[Digest]]) -> dict[Digest, str]:
    """`trunk-1`, `trunk-2`, ... for what several models use, in the order of the tree; for what
    one model uses its name, and where in its chain it is if there are several blocks.
    """
    users = Counter(digest for chain in chains for digest in set(chain))
    found: dict[Digest, str] = {}
    taken: list[str] = []
    shared = sum(1 for count in users.values() if count > 1)
    for name, chain in zip(names, chains, strict=True):
        for index, digest in enumerate(chain):
            if digest in found:
                continue
            if users[digest] > 1:
                number = sum(1 for each in found if users[each] > 1) + 1
                wanted = f"trunk-{number}" if shared > 1 else "trunk"
            else:
                wanted = f"{name}-{index + 1}of{len(chain)}" if len(chain) > 1 else name
            found[digest] = _unique(wanted, taken)
            taken.append(found[digest])
    return found
