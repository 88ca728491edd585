from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text
from starlette.applications import Starlette

from blockflow import telemetry
from blockflow.devices import Device, Survey
from blockflow.status import (
    BlockState,
    BlockStatus,
    ChannelStatus,
    GatewayStatus,
    Histogram,
    PipelineStatus,
)
from blockflow.topology import Generation, Topology
from fake_controller import DIGEST, WANTED, FakeController

GIB = 1 << 30
CPU = Device(name="cpu", kind="cpu", model="x", memory_total=4 * GIB, memory_available=GIB)
GPU = Device(
    name="cuda:0",
    kind="cuda",
    model="NVIDIA",
    memory_total=80 * GIB,
    memory_available=60 * GIB,
    utilization=0.37,
    power_watts=123.5,
    energy_joules=7000.25,
    temperature_celsius=54.0,
)


def block(name: str = "trunk", **more: Any) -> BlockStatus:
    settings = {
        "name": name,
        "artifact": DIGEST,
        "device": "cpu",
        "worker": name,
        "pid": 42,
        "state": BlockState.READY,
        **more,
    }
    return BlockStatus.model_validate(settings)


def pipeline(name: str = "p", **more: Any) -> PipelineStatus:
    only = ("trunk",)
    settings = {"name": name, "blocks": only, "edges": (), "entries": only, "exits": only}
    return PipelineStatus.model_validate(
        {**settings, "path": "trunk", "ready": True, "max_batch": 8, **more}
    )


class Observed:
    """What a controller says, as the test wants it."""

    def __init__(
        self,
        pipelines: Iterable[PipelineStatus] = (),
        blocks: Iterable[BlockStatus] = (),
        gateway: GatewayStatus | None = None,
    ) -> None:
        self._pipelines, self._blocks = list(pipelines), list(blocks)
        self._gateway = gateway or GatewayStatus(ready=False)

    def topology(self) -> tuple[Generation, Topology]:
        return Generation(7), Topology()

    async def blocks(self) -> list[BlockStatus]:
        return self._blocks

    def pipelines(self) -> list[PipelineStatus]:
        return self._pipelines

    async def gateway(self) -> GatewayStatus:
        return self._gateway


def scrape(observed: Any, devices: tuple[Device, ...] = (CPU,), accept: str = "") -> httpx.Response:
    route = telemetry.metrics_route(observed, look=lambda: Survey(devices=devices))

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(Starlette(routes=[route]))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get("/metrics", headers={"accept": accept})

    response = asyncio.run(get())
    assert response.status_code == 200
    return response


Sample = tuple[str, frozenset[tuple[str, str]]]


def read(text: str, parse: Any = parse_text) -> dict[Sample, float]:
    """Samples by name and labels. A sample that is there twice is what Prometheus refuses."""
    samples: dict[Sample, float] = {}
    for family in parse(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples, key
            samples[key] = sample.value
    return samples


def value(samples: dict[Sample, float], name: str, **labels: str) -> float | None:
    return samples.get((f"blockflow_{name}", frozenset(labels.items())))


def test_pipelines_are_counted() -> None:
    latency = Histogram(bounds=(0.001, 0.01), counts=(1, 2, 4), sum=0.5)
    samples = read(
        scrape(
            Observed(
                [
                    pipeline(
                        requests=9,
                        errors=2,
                        errors_by_kind={"Overloaded": 1, "DeadlineExceeded": 1},
                        latency=latency,
                    ),
                    pipeline("q", ready=False),
                ]
            )
        ).text
    )
    assert value(samples, "topology_generation") == 7
    assert value(samples, "pipeline_requests_total", pipeline="p") == 9
    assert value(samples, "pipeline_errors_total", pipeline="p", kind="Overloaded") == 1
    assert value(samples, "pipeline_ready", pipeline="p") == 1
    assert value(samples, "pipeline_ready", pipeline="q") == 0
    seconds = "pipeline_request_duration_seconds"
    buckets = [
        value(samples, f"{seconds}_bucket", pipeline="p", le=le) for le in ("0.001", "0.01", "+Inf")
    ]
    assert buckets == [1, 3, 7]
    assert value(samples, f"{seconds}_count", pipeline="p") == 7
    assert value(samples, f"{seconds}_sum", pipeline="p") == 0.5
    assert value(samples, f"{seconds}_count", pipeline="q") is None


def test_blocks_are_counted() -> None:
    channel = ChannelStatus(peer="head", carrier="shm", messages=3, bytes=300, host_bytes=100)
    samples = read(
        scrape(
            Observed(
                blocks=[
                    block(
                        requests=5,
                        requests_by_pipeline={"p": 2, "q": 3},
                        queued=4,
                        batch_sizes=Histogram(bounds=(1.0, 2.0), counts=(1, 2, 0), sum=5),
                        compute_seconds=Histogram(bounds=(0.01, 0.1), counts=(1, 2, 0), sum=0.06),
                        queue_seconds=Histogram(bounds=(0.01, 0.1), counts=(5, 0, 0), sum=0.02),
                        hop_seconds=Histogram(bounds=(0.01, 0.1), counts=(3, 1, 1), sum=0.5),
                        channels=(channel, channel, channel.model_copy(update={"peer": "tail"})),
                    )
                ]
            )
        ).text
    )
    assert value(samples, "block_requests_total", block="trunk", pipeline="q") == 3
    assert value(samples, "block_queued_requests", block="trunk") == 4
    assert value(samples, "block_compute_seconds_count", block="trunk") == 3
    assert value(samples, "block_compute_seconds_sum", block="trunk") == 0.06
    assert value(samples, "block_compute_seconds_bucket", block="trunk", le="0.01") == 1
    assert value(samples, "block_queue_seconds_count", block="trunk") == 5
    assert value(samples, "block_queue_seconds_sum", block="trunk") == 0.02
    assert value(samples, "block_hop_seconds_bucket", block="trunk", le="0.1") == 4
    assert value(samples, "block_hop_seconds_count", block="trunk") == 5
    assert value(samples, "block_hop_seconds_sum", block="trunk") == 0.5
    assert value(samples, "block_batch_requests_bucket", block="trunk", le="2.0") == 3
    assert value(samples, "block_batch_requests_sum", block="trunk") == 5
    labels = {"block": "trunk", "peer": "head", "carrier": "shm"}
    assert value(samples, "channel_messages_total", **labels) == 6
    assert value(samples, "channel_bytes_total", **labels) == 600
    assert value(samples, "channel_host_bytes_total", **labels) == 200
    assert value(samples, "channel_bytes_total", **{**labels, "peer": "tail"}) == 300
    info = {"block": "trunk", "artifact": DIGEST, "device": "cpu", "worker": "trunk"}
    assert value(samples, "block_info", **info) == 1


def test_the_gateway_sends_and_counts_hops_by_carrier() -> None:
    found = Histogram(bounds=(0.001, 0.01), counts=(1, 2, 4), sum=0.5)
    to_trunk = ChannelStatus(peer="trunk", carrier="shm", messages=3, bytes=300, host_bytes=300)
    samples = read(
        scrape(
            Observed(
                blocks=[block()],
                gateway=GatewayStatus(
                    ready=True, host_memory_bytes=GIB, hops={"shm": found}, channels=(to_trunk,)
                ),
            )
        ).text
    )
    assert value(samples, "gateway_hop_seconds_bucket", carrier="shm", le="0.01") == 3
    assert value(samples, "gateway_hop_seconds_count", carrier="shm") == 7
    assert value(samples, "gateway_hop_seconds_sum", carrier="shm") == 0.5
    sent = {"block": "gateway", "peer": "trunk", "carrier": "shm"}
    assert value(samples, "channel_messages_total", **sent) == 3
    assert value(samples, "channel_host_bytes_total", **sent) == 300
    assert value(samples, "gateway_resident_memory_bytes") == GIB


@pytest.mark.parametrize("state", BlockState)
def test_a_block_is_in_one_state(state: BlockState) -> None:
    samples = read(scrape(Observed(blocks=[block(state=state)])).text)
    states = {s: value(samples, "block_state", block="trunk", state=s.value) for s in BlockState}
    assert states == {s: float(s is state) for s in BlockState}


def test_in_an_update_the_block_that_serves_counts_and_every_process_takes_memory() -> None:
    new = block(pid=2, requests_by_pipeline={"p": 1}, host_memory_bytes=100)
    old = block(
        pid=1,
        requests_by_pipeline={"p": 900},
        host_memory_bytes=70,
        state=BlockState.DRAINING,
    )
    samples = read(scrape(Observed(blocks=[new, old])).text)
    assert value(samples, "block_requests_total", block="trunk", pipeline="p") == 1
    assert value(samples, "worker_resident_memory_bytes", worker="trunk") == 170


def test_blocks_of_one_process_take_its_memory_once() -> None:
    shared = {
        "worker": "w",
        "device": "cuda:0",
        "host_memory_bytes": 100,
        "device_memory_bytes": 900,
    }
    gone = block("c", worker="v", pid=None)
    samples = read(scrape(Observed(blocks=[block("a", **shared), block("b", **shared), gone])).text)
    assert value(samples, "worker_resident_memory_bytes", worker="w") == 100
    assert value(samples, "worker_device_memory_bytes", worker="w", device="cuda:0") == 900
    assert value(samples, "worker_resident_memory_bytes", worker="v") is None


def test_gpus_are_read_and_what_they_cannot_say_is_left_out() -> None:
    silent = Device(name="cuda:1", kind="cuda", model="MIG", memory_total=GIB, memory_available=GIB)
    samples = read(scrape(Observed(), (CPU, GPU, silent)).text)
    assert value(samples, "gpu_memory_size_bytes", device="cuda:0") == 80 * GIB
    assert value(samples, "gpu_memory_used_bytes", device="cuda:0") == 20 * GIB
    assert value(samples, "gpu_utilization_ratio", device="cuda:0") == 0.37
    assert value(samples, "gpu_power_watts", device="cuda:0") == 123.5
    assert value(samples, "gpu_energy_joules_total", device="cuda:0") == 7000.25
    assert value(samples, "gpu_temperature_celsius", device="cuda:0") == 54
    assert value(samples, "gpu_memory_used_bytes", device="cuda:1") == 0
    assert value(samples, "gpu_power_watts", device="cuda:1") is None
    assert value(samples, "gpu_memory_used_bytes", device="cpu") is None


def everything() -> Observed:
    histogram = Histogram(bounds=(1.0,), counts=(1, 1), sum=3)
    channel = ChannelStatus(peer="head", carrier="shm", messages=3, bytes=300, host_bytes=100)
    return Observed(
        [pipeline(errors_by_kind={"Overloaded": 1}, latency=histogram)],
        [
            block(
                requests_by_pipeline={"p": 2},
                batch_sizes=histogram,
                compute_seconds=histogram,
                queue_seconds=histogram,
                hop_seconds=histogram,
                channels=(channel,),
                host_memory_bytes=1,
                device_memory_bytes=1,
            )
        ],
        GatewayStatus(ready=True, host_memory_bytes=1, hops={"shm": histogram}),
    )


def test_openmetrics_where_it_is_asked_for() -> None:
    plain = scrape(everything(), (GPU,))
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    modern = scrape(everything(), (GPU,), accept="application/openmetrics-text; version=1.0.0")
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    assert read(modern.text, parse_openmetrics) == read(plain.text)


def test_names_follow_the_conventions() -> None:
    """Counters end in `_total`, units are base units, and every metric says what it is."""
    families = list(parse_text(scrape(everything(), (GPU,)).text))
    assert len(families) == 28
    for family in families:
        assert re.fullmatch(r"blockflow_[a-z]+(_[a-z]+)+", family.name)
        assert family.documentation.endswith(".")
        assert family.samples, family.name
        assert ("_total" in family.samples[0].name) is (family.type == "counter")
        assert not re.search(r"_(ms|milliseconds|mib|percent|watt|joule)\b", family.name)


def test_a_scrape_asks_the_controller_each_time() -> None:
    controller = FakeController()
    assert value(read(scrape(controller).text), "pipeline_ready", pipeline="p") is None
    controller.generation, controller.current = 3, WANTED
    controller.states = {"b": (BlockState.FAILED, "exit code 1")}
    samples = read(scrape(controller).text)
    assert value(samples, "topology_generation") == 3
    assert value(samples, "pipeline_ready", pipeline="p") == 0
    assert value(samples, "block_state", block="b", state="failed") == 1


def test_the_devices_of_this_host_can_be_scraped() -> None:
    route = telemetry.metrics_route(Observed())
    transport = httpx.ASGITransport(Starlette(routes=[route]))

    async def get() -> str:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.get("/metrics")).text

    assert value(read(asyncio.run(get())), "topology_generation") == 7
