"""How the server tells of what it runs: the statuses of blocks, pipelines and the gateway.

From what the processes reported last; nothing here asks them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from blockflow import devices, protocol, wiring
from blockflow.deployed import Worker
from blockflow.status import (
    BlockState,
    BlockStatus,
    ChannelStatus,
    GatewayStatus,
    Histogram,
    PipelineStatus,
    PortStatus,
)
from blockflow.supervisor import Child
from blockflow.topology import PipelineName, Topology


def blocks_of(
    worker: Worker, names: Mapping[str, str], memories: Mapping[int, devices.ProcessMemory]
) -> Iterable[BlockStatus]:
    """The blocks of one worker.

    `names` says which block listens at an endpoint, `memories` what processes take, by their pids.
    """
    child = worker.child
    alive = child is not None and child.alive
    memory = memories.get(child.pid) if child is not None and alive else None
    report = child.report if child is not None else None
    reports = (
        {block.block: block for block in report.blocks}
        if isinstance(report, protocol.WorkerReport)
        else {}
    )
    for spec in worker.spec.blocks:
        known = reports.get(spec.name)
        yield BlockStatus(
            name=spec.name,
            artifact=spec.digest,
            device=spec.device,
            worker=worker.spec.name,
            pid=child.pid if child is not None and alive else None,
            state=(
                BlockState.CRASH_LOOPING
                if worker.state is BlockState.FAILED and not worker.returning
                else worker.state
            ),
            reason=worker.reason or worker.doubt,
            restarts=worker.restarts,
            device_memory_bytes=memory.device_bytes.get(spec.device) if memory else None,
            host_memory_bytes=memory.host_bytes if memory else None,
            requests=sum(known.requests.values()) if known else 0,
            requests_by_pipeline={str(p): n for p, n in known.requests.items()} if known else {},
            queued=known.queued if known else 0,
            incomplete=known.incomplete if known else 0,
            batch_sizes=_histogram(known.batch_sizes) if known else None,
            compute_seconds=_histogram(known.compute) if known else None,
            queue_seconds=_histogram(known.queue) if known else None,
            hop_seconds=_histogram(known.hop) if known else None,
            compute_ms_mean=_mean_ms(known.compute) if known else None,
            queue_ms_mean=_mean_ms(known.queue) if known else None,
            runner=known.runner if known else None,
            runner_reason=known.runner_reason if known else None,
            fused_into=known.fused_into if known else None,
            channels=_channels(known.channels, names) if known else (),
        )


def gateway(
    child: Child | None,
    names: Mapping[str, str],
    memory: devices.ProcessMemory | None,
    *,
    serving: bool,
) -> GatewayStatus:
    """`names` says who listens at an endpoint; `memory` is what the process takes, if it lives."""
    if child is None or memory is None:
        return GatewayStatus(ready=False, url=None, host_memory_bytes=None, channels=())
    report = child.report
    known = report if isinstance(report, protocol.GatewayReport) else None
    hops = known.hops if known else {}
    return GatewayStatus(
        pid=child.pid,
        url=known.url if known else None,
        ready=serving,
        host_memory_bytes=memory.host_bytes,
        hops={carrier: _histogram(each) for carrier, each in hops.items()},
        channels=_channels(known.channels, names) if known else (),
    )


def pipelines(
    topology: Topology, models: Iterable[protocol.Model], child: Child | None, hindrance: str | None
) -> list[PipelineStatus]:
    """child: the gateway, which counts requests. hindrance: why none can be asked, or None."""
    report = child.report if child is not None else None
    counts = report.pipelines if isinstance(report, protocol.GatewayReport) else {}
    statuses = []
    for model in models:
        name = PipelineName(model.metadata.name)
        reason = hindrance or model.reason
        count = counts.get(name)
        pipeline = topology.pipelines[name]
        statuses.append(
            PipelineStatus(
                name=name,
                blocks=wiring.ordered(pipeline),
                edges=wiring.edges(pipeline),
                entries=wiring.entries(pipeline),
                exits=wiring.exits(pipeline),
                path=wiring.path(pipeline),
                ready=reason is None,
                reason=reason,
                inputs=_ports(model.metadata.inputs),
                outputs=_ports(model.metadata.outputs),
                max_batch=model.metadata.max_batch,
                requests=count.requests if count else 0,
                errors=sum(count.errors.values()) if count else 0,
                errors_by_kind=count.errors if count else {},
                latency=_histogram(count.latency) if count else None,
            )
        )
    return statuses


def _histogram(found: protocol.Histogram) -> Histogram:
    return Histogram(bounds=found.bounds, counts=found.counts, sum=found.sum)


def _mean_ms(found: protocol.Histogram) -> float | None:
    """Milliseconds of a histogram of seconds; None while it is empty."""
    count = sum(found.counts)
    return found.sum / count * 1e3 if count else None


def _channels(
    found: Iterable[protocol.ChannelReport], names: Mapping[str, str]
) -> tuple[ChannelStatus, ...]:
    """`names` says who listens at an endpoint."""
    return tuple(
        ChannelStatus(
            peer=names.get(c.endpoint, c.endpoint.removeprefix("local:")),
            carrier=c.carrier,
            messages=c.messages,
            bytes=c.bytes,
            host_bytes=c.host_bytes,
        )
        for c in found
    )


def _ports(ports: Iterable[Any]) -> tuple[PortStatus, ...]:
    return tuple(PortStatus(name=p.name, dtype=p.dtype, shape=p.shape) for p in ports)
