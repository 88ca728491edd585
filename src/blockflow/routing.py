"""The route that requests to a pipeline take: its blocks as steps, a fused chain as one; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from blockflow.artifact import Digest, Manifest
from blockflow.protocol import Route, RouteId, Step
from blockflow.reconcile import BlockSpec
from blockflow.topology import BlockName, PipelineName
from blockflow.wiring import Source, Wiring


def lay_route(
    number: RouteId,
    pipeline: PipelineName,
    wired: Wiring,
    blocks: Mapping[BlockName, BlockSpec],
    manifests: Mapping[Digest, Manifest],
    endpoints: Mapping[BlockName, str],
    chains: Iterable[Sequence[BlockName]],
    results: str,
) -> Route:
    """Lay a route through `blocks`, each of which receives at its endpoint.

    A chain is one step: it takes what its first block takes and gives what its last gives.
    """
    head: dict[BlockName | None, BlockName] = {}
    inner: set[BlockName] = set()
    for chain in chains:
        head |= dict.fromkeys(chain, chain[0])
        inner.update(chain[1:])

    def led(sources: Mapping[str, Source]) -> dict[str, Source]:
        return {
            port: msgspec.structs.replace(source, block=head.get(source.block, source.block))
            for port, source in sources.items()
        }

    return Route(
        id=number,
        pipeline=pipeline,
        steps=tuple(
            Step(
                block,
                endpoints[block],
                led(wired.feeds[block]),
                blocks[block].max_batch,
                manifests[blocks[block].digest].inputs,
            )
            for block in wired.blocks
            if block not in inner
        ),
        results=results,
        inputs=wired.inputs,
        outputs=wired.outputs,
        gives=led(wired.gives),
    )
