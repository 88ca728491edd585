"""Which blocks are run in one go: pure, from the topology alone.

Two blocks of one worker are fused where the second takes all that the first gives, in every
pipeline that passes either: no request enters or leaves between them, or goes another way. Fused
blocks share a thread, a queue and, on a GPU, the CUDA graphs.
"""

from __future__ import annotations

from collections import defaultdict

from blockflow.topology import Block, BlockName, Topology
from blockflow.wiring import edges, entries, exits


def chains(topology: Topology) -> tuple[tuple[BlockName, ...], ...]:
    """The blocks that are fused, first to last, in the order of their first blocks' names."""
    # None stands for clients, and for what keeps a block from being the second of two.
    after: defaultdict[BlockName, set[BlockName | None]] = defaultdict(set)
    before: defaultdict[BlockName, set[BlockName | None]] = defaultdict(set)
    for pipeline in topology.pipelines.values():
        for first, second in edges(pipeline):
            after[first].add(second)
            before[second].add(first)
        for block in exits(pipeline):
            after[block].add(None)
        for block in entries(pipeline):
            before[block].add(None)
        for block, feed in pipeline.feeds.items():
            if not isinstance(feed, str) or pipeline.reference(feed).port is not None:
                before[block].add(None)  # a chain is put together by the rule alone
    joined: dict[BlockName, BlockName] = {}
    for block, followers in after.items():
        (following, *others) = followers
        if (
            following is not None
            and not others
            and before[following] == {block}
            and _agree(topology.blocks[block], topology.blocks[following])
        ):
            joined[block] = following
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
        and first.compile == second.compile
        and first.threads == second.threads
        and first.cpus == second.cpus
    )


def _follow(joined: dict[BlockName, BlockName], block: BlockName) -> list[BlockName]:
    found = [block]
    while (following := joined.get(found[-1])) is not None:
        found.append(following)
    return found
