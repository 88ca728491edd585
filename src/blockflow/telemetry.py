"""Prometheus metrics, made at the moment of a scrape from what the controller knows.

There is no second state: nothing counts here, so nothing can disagree with the status API. Every
counter belongs to a process and starts at 0 again when that process is replaced, which is what
Prometheus's `rate` and `increase` expect of counters.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from blockflow import __version__
from blockflow.devices import Device, Survey, survey
from blockflow.status import (
    BlockState,
    BlockStatus,
    ChannelStatus,
    GatewayStatus,
    Histogram,
    PipelineStatus,
)
from blockflow.topology import Generation, Topology


class Observed(Protocol):
    """What is asked of a controller, on its event loop."""

    def topology(self) -> tuple[Generation, Topology]: ...

    async def blocks(self) -> list[BlockStatus]: ...

    def pipelines(self) -> list[PipelineStatus]: ...

    async def gateway(self) -> GatewayStatus: ...


@dataclass(frozen=True)
class Snapshot(Collector):
    """Everything at one moment, as Prometheus's client library collects it."""

    generation: int
    pipelines: tuple[PipelineStatus, ...]
    blocks: tuple[BlockStatus, ...]
    gateway: GatewayStatus
    devices: tuple[Device, ...]

    def collect(self) -> Iterator[Metric]:
        yield _gauge("blockflow_build_info", "The version that runs.", version=__version__)
        yield GaugeMetricFamily(
            "blockflow_topology_generation",
            "Number of the topology that serves; it grows with every update.",
            value=self.generation,
        )
        yield from _of_pipelines(self.pipelines)
        serving = _serving(self.blocks)
        yield from _of_blocks(serving)
        senders = {block.name: block.channels for block in serving}
        yield from _of_channels({**senders, "gateway": self.gateway.channels})
        yield from _of_gateway(self.gateway)
        yield from _of_workers(self.blocks)
        yield from _of_gpus(self.devices)


def metrics_route(
    controller: Observed, path: str = "/metrics", *, look: Callable[[], Survey] = survey
) -> Route:
    """Build the route that Prometheus scrapes: the text format, or OpenMetrics where asked for.

    `look` surveys the devices; it runs in a thread, because a driver may take its time.
    """

    async def metrics(request: Request) -> Response:
        """Give everything that is counted, as Prometheus or OpenMetrics text."""
        surveyed = await asyncio.to_thread(look)
        snapshot = Snapshot(
            controller.topology()[0],
            tuple(controller.pipelines()),
            tuple(await controller.blocks()),
            await controller.gateway(),
            surveyed.devices,
        )
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(snapshot), headers={"content-type": content_type})

    return Route(path, metrics, include_in_schema=False)


def _of_pipelines(pipelines: Iterable[PipelineStatus]) -> Iterator[Metric]:
    ready = GaugeMetricFamily(
        "blockflow_pipeline_ready", "1 when the pipeline serves, or else 0.", labels=["pipeline"]
    )
    requests = CounterMetricFamily(
        "blockflow_pipeline_requests",
        "Requests that the gateway has answered, failed ones included.",
        labels=["pipeline"],
    )
    errors = CounterMetricFamily(
        "blockflow_pipeline_errors",
        "Requests that failed, by the name of the error.",
        labels=["pipeline", "kind"],
    )
    latency = HistogramMetricFamily(
        "blockflow_pipeline_request_duration_seconds",
        "Time from a request's arrival at the gateway to its answer; failures are left out.",
        labels=["pipeline"],
    )
    for pipeline in pipelines:
        ready.add_metric([pipeline.name], pipeline.ready)
        requests.add_metric([pipeline.name], pipeline.requests)
        for kind, count in pipeline.errors_by_kind.items():
            errors.add_metric([pipeline.name, kind], count)
        if pipeline.latency is not None:
            _add_histogram(latency, [pipeline.name], pipeline.latency)
    return iter((ready, requests, errors, latency))


def _serving(blocks: Iterable[BlockStatus]) -> list[BlockStatus]:
    """One status for each block: in an update a block may exist twice, and the first one serves.

    To add the two up would let a counter fall when the old one ends, which reads as a restart and
    counts everything once more.
    """
    first: dict[str, BlockStatus] = {}
    for block in blocks:
        first.setdefault(block.name, block)
    return list(first.values())


def _of_blocks(blocks: Iterable[BlockStatus]) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "blockflow_block_info",
        "Where a block lives; always 1.",
        labels=["block", "artifact", "device", "worker"],
    )
    state = GaugeMetricFamily(
        "blockflow_block_state",
        "1 for the state that the block is in, 0 for the others.",
        labels=["block", "state"],
    )
    requests = CounterMetricFamily(
        "blockflow_block_requests",
        "Requests that the block has computed, by the pipeline they belong to.",
        labels=["block", "pipeline"],
    )
    queued = GaugeMetricFamily(
        "blockflow_block_queued_requests",
        "Requests that wait at the block.",
        labels=["block"],
    )
    incomplete = GaugeMetricFamily(
        "blockflow_block_incomplete_requests",
        "Requests of which the block still awaits a part.",
        labels=["block"],
    )
    compute = HistogramMetricFamily(
        "blockflow_block_compute_seconds",
        "Time that a computation of the block took; on a GPU by the device's own events.",
        labels=["block"],
    )
    waiting = HistogramMetricFamily(
        "blockflow_block_queue_seconds",
        "Time that a computed request had waited at the block.",
        labels=["block"],
    )
    hop = HistogramMetricFamily(
        "blockflow_block_hop_seconds",
        "Time that a computed request was on its way from the block before, or the gateway.",
        labels=["block"],
    )
    batches = HistogramMetricFamily(
        "blockflow_block_batch_requests",
        "Requests that were computed together.",
        labels=["block"],
    )
    for block in blocks:
        info.add_metric([block.name, block.artifact, block.device, block.worker], 1)
        for known in BlockState:
            state.add_metric([block.name, known], block.state is known)
        for pipeline, count in block.requests_by_pipeline.items():
            requests.add_metric([block.name, pipeline], count)
        queued.add_metric([block.name], block.queued)
        incomplete.add_metric([block.name], block.incomplete)
        if block.batch_sizes is not None:
            _add_histogram(batches, [block.name], block.batch_sizes)
        if block.compute_seconds is not None:
            _add_histogram(compute, [block.name], block.compute_seconds)
        if block.queue_seconds is not None:
            _add_histogram(waiting, [block.name], block.queue_seconds)
        if block.hop_seconds is not None:
            _add_histogram(hop, [block.name], block.hop_seconds)
    yield from (info, state, requests, queued, incomplete, compute, waiting, hop, batches)


def _of_channels(senders: Mapping[str, Iterable[ChannelStatus]]) -> Iterator[Metric]:
    """The channels of blocks and of the gateway, which are listed by their names."""
    # A block may have several connections of one kind to the same peer.
    traffic: defaultdict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for sender, channels in senders.items():
        for channel in channels:
            sums = traffic[sender, channel.peer, channel.carrier]
            sums[0] += channel.messages
            sums[1] += channel.bytes
            sums[2] += channel.host_bytes
    labels = ["block", "peer", "carrier"]
    for place, (name, text) in enumerate(
        (
            ("messages", "Messages that went from a block, or the gateway, to its peer."),
            ("bytes", "Bytes of tensors that were handed over to the peer."),
            ("host_bytes", "Bytes of tensors that went through host memory on their way."),
        )
    ):
        metric = CounterMetricFamily(f"blockflow_channel_{name}", text, labels=labels)
        for channel_labels, sums in traffic.items():
            metric.add_metric(channel_labels, sums[place])
        yield metric


def _of_gateway(gateway: GatewayStatus) -> Iterator[Metric]:
    hops = HistogramMetricFamily(
        "blockflow_gateway_hop_seconds",
        "Time from the announcement of an answer until the gateway took it.",
        labels=["carrier"],
    )
    for carrier, found in gateway.hops.items():
        _add_histogram(hops, [carrier], found)
    resident = GaugeMetricFamily(
        "blockflow_gateway_resident_memory_bytes", "Resident host memory of the gateway's process."
    )
    if gateway.host_memory_bytes is not None:
        resident.add_metric([], gateway.host_memory_bytes)
    return iter((hops, resident))


def _of_workers(blocks: Iterable[BlockStatus]) -> Iterator[Metric]:
    """Memory by process. In an update, a worker's name may stand for two: both take memory."""
    resident: defaultdict[str, int] = defaultdict(int)
    on_device: defaultdict[tuple[str, str], int] = defaultdict(int)
    seen: set[tuple[int, str]] = set()
    for block in blocks:
        if block.pid is None:
            continue
        if block.host_memory_bytes is not None and (block.pid, "") not in seen:
            seen.add((block.pid, ""))
            resident[block.worker] += block.host_memory_bytes
        if block.device_memory_bytes is not None and (block.pid, block.device) not in seen:
            seen.add((block.pid, block.device))
            on_device[block.worker, block.device] += block.device_memory_bytes
    host = GaugeMetricFamily(
        "blockflow_worker_resident_memory_bytes",
        "Resident host memory of the worker's process.",
        labels=["worker"],
    )
    for worker, count in resident.items():
        host.add_metric([worker], count)
    device = GaugeMetricFamily(
        "blockflow_worker_device_memory_bytes",
        "GPU memory of the worker's process, as the driver reports it.",
        labels=["worker", "device"],
    )
    for labels, count in on_device.items():
        device.add_metric(labels, count)
    return iter((host, device))


def _of_gpus(devices: Iterable[Device]) -> Iterator[Metric]:
    gpus = [device for device in devices if device.kind == "cuda"]
    readings: tuple[tuple[str, str, Callable[[Device], float | None]], ...] = (
        ("memory_size_bytes", "Memory of the GPU.", lambda gpu: gpu.memory_total),
        (
            "memory_used_bytes",
            "Memory that is taken, by any process and by the driver.",
            lambda gpu: gpu.memory_total - gpu.memory_available,
        ),
        (
            "utilization_ratio",
            "Share of the last sample period in which a kernel ran, 0 to 1.",
            lambda gpu: gpu.utilization,
        ),
        ("power_watts", "Power that the board draws.", lambda gpu: gpu.power_watts),
        ("temperature_celsius", "Temperature of the GPU.", lambda gpu: gpu.temperature_celsius),
    )
    for name, text, read in readings:
        gauge = GaugeMetricFamily(f"blockflow_gpu_{name}", text, labels=["device"])
        for gpu in gpus:
            if (value := read(gpu)) is not None:
                gauge.add_metric([gpu.name], value)
        yield gauge
    energy = CounterMetricFamily(
        "blockflow_gpu_energy_joules",
        "Energy that the board has taken since its driver was loaded.",
        labels=["device"],
    )
    for gpu in gpus:
        if gpu.energy_joules is not None:
            energy.add_metric([gpu.name], gpu.energy_joules)
    yield energy


def _gauge(name: str, text: str, **labels: str) -> Metric:
    gauge = GaugeMetricFamily(name, text, labels=list(labels))
    gauge.add_metric(list(labels.values()), 1)
    return gauge


def _add_histogram(metric: HistogramMetricFamily, labels: list[str], found: Histogram) -> None:
    """Add `found`; Prometheus's buckets are cumulative, and the last one has no bound."""
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip((*found.bounds, float("inf")), found.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else repr(float(bound)), total))
    metric.add_metric(labels, buckets=buckets, sum_value=found.sum)
