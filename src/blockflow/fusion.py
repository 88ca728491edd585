"""Which blocks are run in one go: pure, from the topology alone.

Two blocks of one worker are fused where the second takes all that the first gives, in every
pipeline that passes either: no request enters or leaves between them, or goes another way. Fused
blocks share a thread, a queue and, on a GPU, the CUDA graphs.
"""

from __future__ import annotations

from collections import defaultdict

from blockflow.topology import Block, BlockName, Topology


def chains(topology: Topology) -> tuple[tuple[BlockName, ...], ...]:
    """The blocks that are fused, first to last, in the order of their first blocks' names."""
    after: defaultdict[str, set[str | None]] = defaultdict(set)
    before: defaultdict[str, set[str | None]] = defaultdict(set)
    for pipeline in topology.pipelines.values():
        given = pipeline.outputs.values() if isinstance(pipeline.outputs, dict) else ()
        sources: set[str | None] = {pipeline.reference(text).block for text in given}
        for name in sources - {None}:
            after[str(name)].add(None)
        for block, feed in pipeline.feeds.items():
            references = [
                pipeline.reference(text)
                for text in ((feed,) if isinstance(feed, str) else feed.values())
            ]
            before[block] |= {reference.block for reference in references}
            if not isinstance(feed, str) or references[0].port is not None:
                before[block].add(None)  # a chain is put together by the rule alone
            for reference in references:
                if reference.block is not None:
                    after[reference.block].add(block)
                    sources.add(reference.block)
        for block in pipeline.members:
            if block not in sources:
                after[block].add(None)
    joined: dict[str, str] = {}
    for first, followers in after.items():
        second = next(iter(followers))
        if (
            len(followers) == 1
            and second is not None
            and before[second] == {first}
            and _agree(topology.blocks[first], topology.blocks[second])
        ):
            joined[first] = second
    starts = sorted(joined.keys() - joined.values())
    return tuple(tuple(_follow(joined, start)) for start in starts)


def _agree(first: Block, second: Block) -> bool:
    """Whether two blocks may be run as one: the worker is theirs by name, not by chance."""
    return (
        first.worker is not None
        and first.worker == second.worker
        and first.fuse
        and second.fuse
        and first.max_batch == second.max_batch
        and first.cuda_graph == second.cuda_graph
        and first.threads == second.threads
    )


def _follow(joined: dict[str, str], block: str) -> list[BlockName]:
    found = [BlockName(block)]
    while (following := joined.get(found[-1])) is not None:
        found.append(BlockName(following))
    return found
