"""Parts: what several models compute alike, as stretches of each of them.

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
       So do views where a set has nothing else: a message takes longer than they do.
    2. What has one set becomes one block, or several if more are asked for. Sets become only
       smaller along a model, so nothing feeds a block that feeds it. They need not lie inside one
       another: if a and b share one branch, b and c another, both are blocks.
    3. Each model's operators are ordered by these sets, the larger first. Operators only change
       places with those that they do not depend on: nothing is computed differently. A block is
       then a stretch of each of its models, and what a model has for itself is its last block.
"""

from __future__ import annotations

import heapq
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from blockflow.cuts import MAX_TENSORS, Analysis, Cost
from blockflow.export import has_rows
from blockflow.graph import (
    batch_symbol,
    input_nodes,
    is_batch_size,
    is_random,
    mutated_arguments,
    plain_module,
)
from blockflow.identity import Values
from blockflow.quantities import scaled

Sharers = frozenset[int]
"""Models, by their position among those given."""

Gives = dict[int, tuple[fx.Node, ...]]
# For each model of a part, the nodes that a block of it gives.

_Key = tuple[bytes, int]
# An operator wherever it is: the hash of its value, and which of the operators with this hash it
# is in its model.

_Word = tuple[str, int, bytes]
# A value that several models know: of an operator by its place, of an input by its number.


class Member:
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


def _compared(members: Sequence[Member]) -> _Groups:
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


def _grouped(members: Sequence[Member], compared: _Groups, apart: _Apart) -> _Groups:
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
    members: Sequence[Member], found: _Groups, narrow: Callable[[int, list[Sharers]], None]
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
class Part:
    """What the same models compute: a stretch of each one's body, `length` from `starts[model]` on.

    In a chain, it gives all that is needed behind it, and otherwise what it made of that.
    """

    group: Sharers
    starts: Mapping[int, int]
    length: int
    chained: bool


def common_parts(members: Sequence[Member]) -> tuple[list[Part], tuple[str, ...]]:
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


def _parts(members: Sequence[Member], groups: _Groups) -> list[Part]:
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
            chain = chain and crossing(members, here, length) is not None
        for index in group:
            chained[index] &= chain
        found.append(Part(group, here, length, chain))
    return found


def _overlap(group: Sharers, other: Sharers) -> bool:
    return bool(group & other) and not (group <= other or other <= group)


def _not_in_chains(members: Sequence[Member], parts: Sequence[Part]) -> _Apart:
    """Which models without rows are in parts of graphs, or what is in the way of a chain."""
    found: _Apart = set()

    def saved(part: Part) -> float:
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
    members: Sequence[Member], compared: _Groups, groups: _Groups, apart: _Apart
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


def crossing(members: Sequence[Member], starts: Mapping[int, int], offset: int) -> Gives | None:
    """All that is alive behind the same operators in models that begin alike; None if not in all.

    Of models that have to be chains, also what is alive in some of them.
    """
    alive = {}
    for index, start in starts.items():
        if not members[index].can_end(start + offset):
            return None
        alive[index] = members[index].crossing(start + offset)
    described = [members[index].described(nodes) for index, nodes in alive.items()]
    if len(set(described)) == 1:
        ends = all(starts[i] + offset == len(members[i].keys) for i in starts)
        if ends or len(described[0]) <= MAX_TENSORS:
            return alive
    if all(members[index].has_rows for index in starts):
        return None
    union = sorted({each for nodes in described for each in nodes})
    found: Gives = {}
    for index in starts:
        nodes = [members[index].meant(each) for each in union]
        present = tuple(node for node in nodes if node is not None)
        misfit = members[index].analysis.misfit
        if len(present) < len(union) or any(misfit(node) is not None for node in present):
            return None
        found[index] = present
    return found
