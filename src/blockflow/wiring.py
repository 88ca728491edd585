"""Which tensor feeds which input of a pipeline's blocks, and what is wrong with it. Pure.

A chain is wired as the graph that it is: each block takes all outputs of the one before.
"""

from __future__ import annotations

import graphlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from blockflow.artifact import BATCH, Manifest, Port
from blockflow.topology import INPUT, BlockName, Pipeline, Reference


class Source(msgspec.Struct, frozen=True, array_like=True):
    """Where a tensor comes from: an output of a block, or of no block: what clients send."""

    block: BlockName | None
    port: str


class Wiring(msgspec.Struct, frozen=True):
    """A pipeline whose every input is fed.

    `blocks` come after all that feed them. `feeds` has a source for each input of each block,
    `gives` one for each of the pipeline's outputs. `inputs` and `outputs` are as clients name them.
    """

    blocks: tuple[BlockName, ...]
    feeds: dict[BlockName, dict[str, Source]]
    gives: dict[str, Source]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


Edge = tuple[BlockName, BlockName]


def edges(pipeline: Pipeline) -> tuple[Edge, ...]:
    """Each pair of blocks of which the first feeds the second, once."""
    found: dict[Edge, None] = {}
    members = set(pipeline.members)
    for block, feed in pipeline.feeds.items():
        for text in (feed,) if isinstance(feed, str) else feed.values():
            source = pipeline.reference(text).block
            if source in members:
                found[BlockName(source), block] = None
    return tuple(found)


def entries(pipeline: Pipeline) -> tuple[BlockName, ...]:
    """The blocks that take some of what clients send."""
    return tuple(
        block
        for block, feed in pipeline.feeds.items()
        if any(
            pipeline.reference(text).block is None
            for text in ((feed,) if isinstance(feed, str) else feed.values())
        )
    )


def exits(pipeline: Pipeline) -> tuple[BlockName, ...]:
    """The blocks of which clients get some output."""
    if isinstance(pipeline.outputs, dict):
        given = {pipeline.reference(text).block for text in pipeline.outputs.values()}
        return tuple(block for block in pipeline.members if block in given)
    feeding = {before for before, _ in edges(pipeline)}
    return tuple(block for block in pipeline.members if block not in feeding)


def ordered(pipeline: Pipeline) -> tuple[BlockName, ...]:
    """The blocks, each after those that feed it, or else as they are written; so in a cycle."""
    left = dict.fromkeys(pipeline.members)
    waits = [edge for edge in edges(pipeline) if edge[0] != edge[1]]
    done: list[BlockName] = []
    while left:
        # One at a time, so that the written order is kept wherever it may be.
        free = (block for block in left if not any(a in left for a, b in waits if b == block))
        block = next(free, None)
        if block is None:
            return pipeline.members
        del left[block]
        done.append(block)
    return tuple(done)


def cycle(pairs: Collection[tuple[str, str]]) -> list[str]:
    """Blocks that lead back to the first, which is also the last; empty where none do."""
    before: dict[str, list[str]] = {}
    for a, b in pairs:
        before.setdefault(b, []).append(a)
    try:
        graphlib.TopologicalSorter(before).prepare()
    except graphlib.CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def path(pipeline: Pipeline) -> str:
    """The pipeline in one line: `a → b → c`, or `a → b, c; b → d; c → d`."""
    blocks, pairs = ordered(pipeline), edges(pipeline)
    after = {block: [b for a, b in pairs if a == block] for block in blocks}
    if list(after.values()) == [[following] for following in blocks[1:]] + [[]]:
        return " → ".join(blocks)
    fed = {b for _, b in pairs}
    return "; ".join(
        f"{block} → {', '.join(following)}" if following else block
        for block, following in after.items()
        if following or block not in fed
    )


def by_rule(previous: Sequence[Port], following: Sequence[Port]) -> dict[str, str]:
    """Map each port of `following` to the one of `previous` that feeds it.

    Blocks connect by name where both sides use the same names, and by position otherwise.

    Raises:
        ValueError: the two have different numbers of ports.
    """
    takes = [port.name for port in following]
    gives = [port.name for port in previous]
    if set(takes) == set(gives):
        return {name: name for name in takes}
    return dict(zip(takes, gives, strict=True))


def wire(
    pipeline: Pipeline, manifest_of: Callable[[BlockName], Manifest | None]
) -> tuple[Wiring | None, tuple[str, ...]]:
    """Wire a pipeline, or say everything that stands against it.

    `manifest_of` gives None for a block of which nothing is known: what depends on that is left
    unsaid, and there is no wiring.
    """
    manifests = {block: manifest_of(block) for block in pipeline.members}
    work = _Work(pipeline, {b: m for b, m in manifests.items() if m is not None})
    problems = tuple(dict.fromkeys(work.problems()))
    known = None not in manifests.values()
    return (work.result() if known and not problems else None), problems


@dataclass
class _Work:
    pipeline: Pipeline
    manifests: Mapping[BlockName, Manifest]
    feeds: dict[BlockName, dict[str, Source]] = field(default_factory=dict)
    gives: dict[str, Source] = field(default_factory=dict)
    takers: dict[str, list[tuple[BlockName, Port]]] = field(default_factory=dict)

    def problems(self) -> Iterator[str]:
        pipeline = self.pipeline
        repeated = [block for block, times in Counter(pipeline.members).items() if times > 1]
        for block in repeated:
            yield (
                f"block {block} comes twice; a pipeline passes each block once (deploy the "
                "artifact under a second name to run it again)"
            )
        if found := cycle(edges(pipeline)) if not repeated else []:
            yield f"its blocks feed each other in a cycle, {' → '.join(found)}"
        if pipeline.graph is not None:
            if INPUT in pipeline.graph:
                yield (
                    f"a block in a graph cannot be called `{INPUT}`, which stands for what clients "
                    "send; deploy it under another name"
                )
            unknown = tuple(self._unknown_references())
            yield from unknown
            if unknown and not isinstance(pipeline.outputs, dict):
                return  # where it ends depends on what was meant
        for block in dict.fromkeys(pipeline.members):
            if block in self.manifests:
                yield from self._feed(block, pipeline.feeds[block])
        yield from self._inputs()
        yield from self._outputs()
        yield from self._idle()
        yield from self._without_rows()

    def result(self) -> Wiring:
        return Wiring(
            blocks=ordered(self.pipeline),
            feeds={block: self.feeds[block] for block in ordered(self.pipeline)},
            gives=self.gives,
            inputs=self._clients_ports(),
            outputs=tuple(
                _named(name, self._port_of(source)) for name, source in self.gives.items()
            ),
        )

    # What feeds a block

    def _unknown_references(self) -> Iterator[str]:
        written = [
            (f"block {block}", text)
            for block, feed in self.pipeline.feeds.items()
            for text in ((feed,) if isinstance(feed, str) else feed.values())
        ]
        if isinstance(self.pipeline.outputs, dict):
            written += [(f"output {name}", text) for name, text in self.pipeline.outputs.items()]
        for what, text in written:
            block = self.pipeline.reference(text).block
            if block is not None and block not in self.pipeline.members:
                known = ", ".join((INPUT, *self.pipeline.members))
                yield f"{what} is fed by {text}, which is not in the graph; there are: {known}"

    def _feed(self, block: BlockName, feed: str | Mapping[str, str]) -> Iterator[str]:
        takes = self.manifests[block].inputs
        if isinstance(feed, str):
            reference = self.pipeline.reference(feed)
            if reference.port is None:
                yield from self._feed_by_rule(block, takes, reference)
                return
            if len(takes) != 1:
                yield f"block {block} takes {_ports(takes)}; say what feeds each: {{port: source}}"
                return
            feed = {takes[0].name: feed}
        by_name = {port.name: port for port in takes}
        for name in feed:
            if name not in by_name:
                yield f"block {block} has no input {name}; it takes {_ports(takes)}"
        for name, port in by_name.items():
            if name not in feed:
                yield f"nothing feeds input {port_text(port)} of block {block}"
            else:
                yield from self._feed_one(block, port, feed[name])

    def _feed_by_rule(
        self, block: BlockName, takes: tuple[Port, ...], reference: Reference
    ) -> Iterator[str]:
        if reference.block is None:
            names = self.pipeline.inputs
            if names is not None and len(names) != len(takes):
                yield (
                    f"it names {len(names)} inputs ({', '.join(names)}), but block {block} has "
                    f"{_ports(takes)}"
                )
                return
            for name, port in zip(names or [port.name for port in takes], takes, strict=True):
                self._take(block, port, name)
            return
        source = BlockName(reference.block)
        if source not in self.manifests:
            return
        gives = self.manifests[source].outputs
        if len(gives) != len(takes):
            yield f"block {source} gives {_ports(gives)} but block {block} takes {_ports(takes)}"
            return
        outputs = {port.name: port for port in gives}
        rule = by_rule(gives, takes)
        for port in takes:
            yield from self._connect(block, port, source, outputs[rule[port.name]])

    def _feed_one(self, block: BlockName, port: Port, text: str) -> Iterator[str]:
        reference = self.pipeline.reference(text)
        if reference.block is None:
            if reference.port is None:
                yield (
                    f"input {port.name} of block {block} is fed by all that clients send; say "
                    "which: input.NAME"
                )
            else:
                self._take(block, port, reference.port)
            return
        found, problem = self._output(reference)
        if problem is not None:
            yield f"input {port.name} of block {block}: {problem}"
        if found is not None:
            yield from self._connect(block, port, BlockName(reference.block), found)

    def _connect(
        self, block: BlockName, port: Port, source: BlockName, given: Port
    ) -> Iterator[str]:
        if _fits(given, port):
            self.feeds.setdefault(block, {})[port.name] = Source(source, given.name)
        else:
            yield (
                f"block {source} gives {port_text(given)} but block {block} takes {port_text(port)}"
            )

    def _take(self, block: BlockName, port: Port, name: str) -> None:
        self.feeds.setdefault(block, {})[port.name] = Source(None, name)
        self.takers.setdefault(name, []).append((block, port))

    def _output(self, reference: Reference) -> tuple[Port | None, str | None]:
        """The output of a block that is meant, or what is wrong with it."""
        manifest = self.manifests.get(BlockName(reference.block or ""))
        if manifest is None:
            return None, None  # said elsewhere
        if reference.port is None:
            if len(manifest.outputs) == 1:
                return manifest.outputs[0], None
            given = _ports(manifest.outputs)
            return None, f"block {reference.block} gives {given}; say which: BLOCK.PORT"
        for port in manifest.outputs:
            if port.name == reference.port:
                return port, None
        given = _ports(manifest.outputs)
        return None, f"block {reference.block} has no output {reference.port}; it gives {given}"

    # What clients send and get

    def _inputs(self) -> Iterator[str]:
        names = self.pipeline.inputs
        yield from _repeated("inputs", names or ())
        if names is not None and len(self.manifests) == len(self.pipeline.members):
            for name in dict.fromkeys(names):
                if name not in self.takers and self.pipeline.graph is not None:
                    yield f"no block takes the input {name}"
            for name, ((block, _), *_) in self.takers.items():
                if name not in names:
                    known = ", ".join(names)
                    yield f"block {block} takes the input {name}; the pipeline's are {known}"
        for name, ((first, port), *others) in self.takers.items():
            for block, other in others:
                if (port.dtype, port.shape) != (other.dtype, other.shape):
                    yield (
                        f"the input {name} goes to block {first} as {port_text(port)} and to block "
                        f"{block} as {port_text(other)}"
                    )

    def _clients_ports(self) -> tuple[Port, ...]:
        names = self.pipeline.inputs or tuple(self.takers)
        return tuple(_named(name, self.takers[name][0][1]) for name in names)

    def _outputs(self) -> Iterator[str]:
        wanted = self.pipeline.outputs
        if isinstance(wanted, dict):
            for name, text in wanted.items():
                reference = self.pipeline.reference(text)
                if reference.block is None:
                    yield f"output {name} is what clients send; it must come from a block"
                    continue
                found, problem = self._output(reference)
                if problem is not None:
                    yield f"output {name}: {problem}"
                if found is not None:
                    self.gives[name] = Source(BlockName(reference.block), found.name)
            if not wanted:
                yield "it has no outputs; say what clients get: {name: BLOCK.PORT}"
            return
        ends = exits(self.pipeline)
        if len(ends) > 1 and self.pipeline.graph is not None:
            yield (
                f"it ends in {_blocks(ends)}; say which of their tensors clients get: "
                f"`outputs: {{name: BLOCK.PORT}}`"
            )
            return
        if not ends or ends[-1] not in self.manifests:
            return
        ports = self.manifests[ends[-1]].outputs
        if wanted is not None and len(wanted) != len(ports):
            yield (
                f"it names {len(wanted)} outputs ({', '.join(wanted)}), but block {ends[-1]} has "
                f"{_ports(ports)}"
            )
        yield from _repeated("outputs", wanted or ())
        names = wanted if wanted is not None else [port.name for port in ports]
        self.gives = {
            name: Source(ends[-1], port.name) for name, port in zip(names, ports, strict=False)
        }

    # The whole

    def _idle(self) -> Iterator[str]:
        if not isinstance(self.pipeline.outputs, dict):
            return
        used = {*(before for before, _ in edges(self.pipeline)), *exits(self.pipeline)}
        for block in self.pipeline.members:
            if block not in used:
                yield f"block {block} feeds neither a block nor an output"

    def _without_rows(self) -> Iterator[str]:
        """Parts of a request are put together by rows, so beside a chain all must have them."""
        if self._is_line():
            return
        given = dict.fromkeys(
            source
            for sources in (*self.feeds.values(), self.gives)
            for source in sources.values()
            if source.block is not None
        )
        used = [
            *((f"block {b} takes", port) for b, m in self.manifests.items() for port in m.inputs),
            *((f"block {source.block} gives", self._port_of(source)) for source in given),
        ]
        for what, port in used:
            if not port.shape or port.shape[0] != BATCH:
                yield (
                    f"{what} {port_text(port)}, which has no batch dimension; where a pipeline "
                    "branches or joins, every tensor must have one"
                )

    def _is_line(self) -> bool:
        """Each block is fed by the one before alone; clients send to the first, get of the last."""
        line = ordered(self.pipeline)
        return (
            set(edges(self.pipeline)) == set(itertools.pairwise(line))
            and entries(self.pipeline) == line[:1]
            and exits(self.pipeline) == line[-1:]
        )

    def _port_of(self, source: Source) -> Port:
        if source.block is None:
            raise AssertionError("an output that comes from no block was refused")
        return next(p for p in self.manifests[source.block].outputs if p.name == source.port)


def _named(name: str, port: Port) -> Port:
    return Port(name, port.dtype, port.shape)


def _repeated(side: str, names: Iterable[str]) -> Iterator[str]:
    for name, times in Counter(names).items():
        if times > 1:
            yield f"{side} has the name {name} {times} times"


def _fits(given: Port, taken: Port) -> bool:
    if given.dtype != taken.dtype or len(given.shape) != len(taken.shape):
        return False
    # Only one way round: a block that takes any number of rows also takes a fixed number.
    return all(
        have == want or (axis == 0 and want == BATCH)
        for axis, (have, want) in enumerate(zip(given.shape, taken.shape, strict=True))
    )


def port_text(port: Port) -> str:
    """A port for people: `x float32[batch,16]`."""
    return f"{port.name} {port.dtype}[{','.join(map(str, port.shape))}]"


def _ports(ports: Sequence[Port]) -> str:
    count = "1 tensor" if len(ports) == 1 else f"{len(ports)} tensors"
    return f"{count} ({', '.join(map(port_text, ports))})" if ports else count


def _blocks(names: Sequence[str]) -> str:
    return f"{'block' if len(names) == 1 else 'blocks'} {', '.join(names)}"
