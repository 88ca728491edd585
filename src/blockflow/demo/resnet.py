"""ResNet-50: added to the server while that serves, compared with the whole network, timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from blockflow.artifact import Port
from blockflow.client import ControlClient, InferenceClient
from blockflow.demo.answers import blocks_after, call, counts_of, difference_of
from blockflow.errors import BlockFlowError
from blockflow.models import ModuleSource, built_in
from blockflow.split import SplitResult, topology_for
from blockflow.status import ApplyResult, BlockStatus
from blockflow.topology import Topology

RESNET_BLOCKS = 4
ROUNDS = 15
"""Requests to ResNet-50 whose latency is measured, each beside a call of the whole network."""
WARM_UP = 2
"""Rounds before those, which bring both sides to speed."""


def resnet_source() -> ModuleSource:
    """ResNet-50 with the same random weights every time."""
    image = Port(name="x", dtype="float32", shape=("batch", 3, 224, 224))
    return ModuleSource("resnet50", built_in("resnet50"), (image,))


def add_resnet(control: ControlClient, serving: Topology, result: SplitResult) -> None:
    """Add a split model to the topology that serves. Raises unless nothing else changes."""
    added = topology_for(result, result.model)
    wanted = serving.model_copy(
        update={
            "blocks": {**serving.blocks, **added.blocks},
            "pipelines": {**serving.pipelines, **added.pipelines},
        }
    )
    applied = ApplyResult.model_validate(control.put_topology(wanted.model_dump(mode="json")))
    if applied.stop or sorted(applied.start) != sorted(added.blocks):
        raise BlockFlowError(
            f"an update that adds {result.model} started {', '.join(applied.start) or 'nothing'} "
            f"and stopped {', '.join(applied.stop) or 'nothing'}"
        )


@dataclass(frozen=True)
class Measured:
    """Requests of `rows` images through the blocks beside calls of the whole network.

    Latencies are medians in milliseconds, on this process's clock: `served_ms` from the client's
    call to its return, `alone_ms` of the network called in this process, where the threads of
    torch may spin between operators. The workers' threads sleep then, as they share the cores.
    """

    rows: int
    difference: float
    served_ms: float
    alone_ms: float


@dataclass(frozen=True)
class Comparison:
    """What `compare_resnet` found.

    `compute_ms` is the mean time that a block computes, by name, in the rounds of one row, on the
    worker's clock. `blocks` are all blocks of the server, after the last round.
    """

    result: SplitResult
    measured: Sequence[Measured]
    compute_ms: Mapping[str, float]
    blocks: Mapping[str, BlockStatus]


def compare_resnet(
    client: InferenceClient, control: ControlClient, model: nn.Module, result: SplitResult
) -> Comparison:
    """Compare and time a served ResNet and the whole one. Raises BlockFlowError if they differ."""
    topology = topology_for(result, result.model)
    asked = 0

    def rounds(rows: int, count: int) -> Measured:
        nonlocal asked
        asked += count
        return _measure(client, result.model, model, rows, count)

    def blocks() -> dict[str, BlockStatus]:
        return blocks_after(control, counts_of(topology, {result.model: asked}))

    for rows in (1, 2):
        rounds(rows, WARM_UP)
    before = blocks()
    one = rounds(1, ROUNDS)
    after = blocks()
    two = rounds(2, ROUNDS)
    means = {name: _mean_compute_ms(before[name], after[name]) for name in topology.blocks}
    return Comparison(result, (one, two), means, blocks())


def _measure(
    client: InferenceClient, pipeline: str, model: nn.Module, rows: int, rounds: int
) -> Measured:
    generator = np.random.default_rng(0)
    differences, served, alone = [], [], []
    for _ in range(rounds):
        # One after the other, so that whatever else the machine does falls on both.
        images = generator.standard_normal((rows, 3, 224, 224), dtype=np.float32)
        start = time.perf_counter()
        answer = client.infer(pipeline, {"x": images})["output"]
        between = time.perf_counter()
        expected = call(model, images)
        end = time.perf_counter()
        differences.append(difference_of(pipeline, answer, expected))
        served.append((between - start) * 1e3)
        alone.append((end - between) * 1e3)
    return Measured(rows, max(differences), statistics.median(served), statistics.median(alone))


def _mean_compute_ms(before: BlockStatus, after: BlockStatus) -> float:
    """Mean compute time of the requests between, which came one by one: each was a computation."""
    total_before = (before.compute_ms_mean or 0.0) * before.requests
    total_after = (after.compute_ms_mean or 0.0) * after.requests
    return (total_after - total_before) / (after.requests - before.requests)
