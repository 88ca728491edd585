"""What serves: one generation with its workers and the roads through them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from blockflow import protocol, reconcile
from blockflow.artifact import Digest, Manifest
from blockflow.errors import NotFound
from blockflow.oip import ModelMetadata
from blockflow.protocol import Route
from blockflow.reconcile import WorkerSpec
from blockflow.status import BlockState
from blockflow.supervisor import Child, Patience
from blockflow.topology import BlockName, Generation, PipelineName, Topology, WorkerName

_NOT_READY_WHEN_SILENT = 2.5
"""Seconds. Reports come every half second; what misses five of them is not called ready."""


@dataclass(eq=False)
class Worker:
    """A worker that should serve, and the process that does, if there is one now."""

    spec: WorkerSpec
    state: BlockState = BlockState.STARTING
    reason: str | None = None
    returning: bool = False
    """It failed, and there is good hope that its successor will be ready soon."""
    restarts: int = 0
    child: Child | None = None
    endpoints: dict[BlockName, str] = field(default_factory=dict)
    computations: dict[BlockName, Patience] = field(default_factory=dict)
    overdue: str | None = None
    """What it computes although the deadline passed long ago."""
    condemned: bool = False
    parted: bool = False
    """Under MPS: its work was taken off the GPU, so that its death is its own."""

    @property
    def doubt(self) -> str | None:
        """Why it is not certain that it works, or None."""
        return self.overdue or (None if self.child is None else silence(self.child))


@dataclass(frozen=True)
class Road:
    """A route and the workers that it leads through."""

    route: Route
    workers: tuple[Worker, ...]

    @property
    def broken(self) -> str | None:
        """Why nothing can travel here, or None."""
        for step, worker in zip(self.route.steps, self.workers, strict=True):
            if worker.state is BlockState.FAILED:
                return f"block {step.block} failed: {worker.reason}"
        return None

    @property
    def doubt(self) -> str | None:
        """Why it is not certain that anything arrives that travels here, or None."""
        return next(filter(None, (worker.doubt for worker in self.workers)), None)


@dataclass(frozen=True)
class Deployed:
    """One generation: what serves."""

    generation: Generation
    topology: Topology
    store: Path | None
    """Where its artifacts are, and those of its successor if that names no store."""
    manifests: Mapping[Digest, Manifest]
    workers: Mapping[WorkerName, Worker]
    roads: Mapping[PipelineName, Road]
    """They lead through `workers` alone. A pipeline has none until all of its workers are ready."""

    def home(self, block: BlockName) -> Worker:
        """The worker of a block. Raises NotFound."""
        for worker in self.workers.values():
            if any(spec.name == block for spec in worker.spec.blocks):
                return worker
        known = ", ".join(self.topology.blocks) or "none"
        raise NotFound(f"there is no block {block}; there are: {known}")

    def with_workers(self, workers: Mapping[WorkerName, Worker]) -> Deployed:
        """The same with other workers, and without the roads that lead through any that left."""
        stay = set(workers.values())
        roads = {name: road for name, road in self.roads.items() if stay.issuperset(road.workers)}
        return replace(self, workers=workers, roads=roads)

    def needs_mps(self, device: str) -> bool:
        """Whether MPS is on for a GPU, so that no worker there may do without."""
        return reconcile.mps_wanted(self.topology).get(device, False)

    def models(self) -> list[protocol.Model]:
        """Every pipeline as clients may see it now."""
        models = []
        for name in map(PipelineName, self.topology.pipelines):
            wired = reconcile.wiring_of(self.topology, self.manifests, name)
            rows = reconcile.rows_of(self.topology, name)
            metadata = ModelMetadata(name, wired.inputs, wired.outputs, rows)
            road = self.roads.get(name)
            broken = self._missing(name) if road is None else road.broken
            route = road.route.id if road is not None and broken is None else None
            # Requests still go to a worker in doubt: it may only be slow.
            reason = road.doubt if road is not None and broken is None else broken
            returning = all(
                worker.state is BlockState.READY or worker.returning
                for worker, _ in self._homes(name)
            )
            models.append(protocol.Model(metadata, route, reason, returning))
        return models

    def _missing(self, name: PipelineName) -> str:
        """Why a pipeline has no route."""
        for worker, block in self._homes(name):
            if worker.state is not BlockState.READY:
                return f"block {block} is {worker.state}: {worker.reason or 'it loads'}"
        return "it is being connected"

    def _homes(self, name: PipelineName) -> Iterator[tuple[Worker, BlockName]]:
        """The workers of a pipeline, with each of its blocks there."""
        members = self.topology.pipelines[name].members
        for worker in self.workers.values():
            for block in worker.spec.blocks:
                if block.name in members:
                    yield worker, block.name


def silence(child: Child) -> str | None:
    """What to say of a process that says nothing itself, or None."""
    if child.silent <= _NOT_READY_WHEN_SILENT:
        return None
    return f"{child.name} has said nothing for more than {_NOT_READY_WHEN_SILENT:g} s"
