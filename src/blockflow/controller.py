"""The controller: the single writer that drives what is towards what should be.

It holds the topology that serves, the workers that run it and the routes through them. `apply`
moves from one generation to the next: start what is new, connect, swap the routes, drain and stop
what is old. Until the swap nothing of the old generation is touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockflow import devices, ledger, protocol, reconcile
from blockflow.artifact import Digest, Manifest, Store
from blockflow.errors import BlockFlowError, NotFound, StartFailed, TopologyInvalid
from blockflow.oip import ModelMetadata
from blockflow.options import ServeOptions
from blockflow.protocol import Route, RouteId, Step
from blockflow.reconcile import WorkerSpec
from blockflow.status import (
    ApplyResult,
    BlockState,
    BlockStatus,
    ChannelStatus,
    PipelineStatus,
    PortStatus,
)
from blockflow.supervisor import Child, Supervisor
from blockflow.topology import BlockName, Generation, PipelineName, Topology, WorkerName

log = logging.getLogger(__name__)

_STOP_SECONDS = 3.0
_FIRST_RETRY_SECONDS = 0.5
_LAST_RETRY_SECONDS = 30.0
_CRASH_LOOP = 5
"""So many deaths within `_MEMORY_SECONDS`, or starts in vain, are a crash loop: nobody waits."""
_MEMORY_SECONDS = 60.0
_NO_GATEWAY = "the gateway is being started"


@dataclass(eq=False)
class _Worker:
    spec: WorkerSpec
    state: BlockState = BlockState.STARTING
    reason: str | None = None
    returning: bool = False
    """It failed, and there is good hope that its successor will be ready soon."""
    child: Child | None = None
    endpoints: dict[BlockName, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Road:
    """A route and the workers that it leads through."""

    route: Route
    workers: tuple[_Worker, ...]

    @property
    def broken(self) -> str | None:
        """Why nothing can travel here, or None."""
        for step, worker in zip(self.route.steps, self.workers, strict=True):
            if worker.state is BlockState.FAILED:
                return f"block {step.block} failed: {worker.reason}"
        return None


@dataclass(frozen=True)
class _Deployed:
    """One generation: what serves."""

    generation: Generation
    topology: Topology
    manifests: Mapping[Digest, Manifest]
    workers: Mapping[WorkerName, _Worker]
    roads: Mapping[PipelineName, _Road]


class Controller:
    """Implements `api.Controller` with real processes. Belongs to one event loop.

    gateway_fd: the listening socket of the inference API, which is handed to the gateway.
    """

    def __init__(self, options: ServeOptions, run_dir: Path, gateway_fd: int) -> None:
        self._options = options
        self._run_dir = run_dir
        self._gateway_fd = gateway_fd
        self._supervisor = Supervisor(run_dir, options.log_level)
        self._store = options.store
        self._deployed = _Deployed(Generation(0), Topology(store=None), {}, {}, {})
        self._passing: list[_Worker] = []
        self._gateway: Child | None = None
        self._results = ""
        self._route_ids = itertools.count(1)
        self._lock = asyncio.Lock()
        self._deaths: dict[WorkerName, deque[float]] = {}
        self._repairs: set[asyncio.Task[None]] = set()
        self._begun = False
        self._serving = False
        self._closing = False

    # Life

    async def start(self) -> None:
        """Start the gateway and deploy the first topology. Raises StartFailed, TopologyInvalid."""
        async with self._lock:
            await self._start_gateway()
        if self._options.topology is not None:
            await self.apply(self._options.topology)
        else:
            await self._publish()
        self._begun = True

    async def close(self) -> None:
        """Stop every process, politely for three seconds and then for certain."""
        self._closing = True
        for task in tuple(self._repairs):
            task.cancel()
        await asyncio.gather(*self._repairs, return_exceptions=True)
        if self._gateway is not None:
            await self._gateway.stop(_STOP_SECONDS)
        everyone = (*self._deployed.workers.values(), *self._passing)
        await asyncio.gather(*(self._stop(worker) for worker in everyone))
        await self._supervisor.close()

    # What the API asks

    def topology(self) -> tuple[Generation, Topology]:
        return self._deployed.generation, self._deployed.topology

    async def apply(self, topology: Topology, dry_run: bool = False) -> ApplyResult:
        """Make `topology` the one that serves.

        Raises TopologyInvalid before anything is touched; StartFailed when a block does not come
        up, in which case the old generation keeps serving.
        """
        async with self._lock:
            store, manifests = await self._examine(topology)
            old = self._deployed
            plan = reconcile.diff(
                {name: worker.spec for name, worker in old.workers.items()},
                reconcile.plan_workers(topology),
            )
            result = ApplyResult(
                generation=old.generation if dry_run else old.generation + 1,
                dry_run=dry_run,
                keep=tuple(spec.name for spec in plan.keep),
                start=tuple(spec.name for spec in plan.start),
                stop=tuple(spec.name for spec in plan.stop),
            )
            if dry_run:
                return result
            self._store = store
            workers = {spec.name: old.workers[spec.name] for spec in plan.keep}
            started = await self._start_all(plan.start)
            workers |= {worker.spec.name: worker for worker in started}
            new = _Deployed(Generation(old.generation + 1), topology, manifests, workers, roads={})
            try:
                new = await self._with_roads(new, topology.pipelines)
            except BlockFlowError as error:
                await asyncio.gather(*(self._stop(worker) for worker in started))
                self._passing = []
                raise StartFailed(
                    f"the blocks cannot be connected: {error}; the old generation keeps serving"
                ) from error
            # From here on the new generation is the one that should be; failures are repaired.
            self._deployed = new
            self._passing = [old.workers[spec.name] for spec in plan.stop]
            for worker in self._passing:
                worker.state = BlockState.DRAINING
            await self._publish()
            await self._leave(old.roads.values())
            await asyncio.gather(*(self._stop(worker) for worker in self._passing))
            self._passing = []
            log.info("generation %d serves", new.generation)
            return result

    def blocks(self) -> list[BlockStatus]:
        everyone = (*self._deployed.workers.values(), *self._passing)
        names = {
            endpoint: str(name)
            for worker in everyone
            for name, endpoint in worker.endpoints.items()
        }
        names[self._results] = "gateway"
        return [status for worker in everyone for status in _block_statuses(worker, names)]

    def pipelines(self) -> list[PipelineStatus]:
        report = self._gateway.report if self._gateway is not None else None
        counts = report.pipelines if isinstance(report, protocol.GatewayReport) else {}
        statuses = []
        for model in self._models():
            name = PipelineName(model.metadata.name)
            reason = model.reason if self._serving else _NO_GATEWAY
            count = counts.get(name, protocol.PipelineCount(0, 0))
            statuses.append(
                PipelineStatus(
                    name=name,
                    blocks=self._deployed.topology.pipelines[name].blocks,
                    ready=reason is None,
                    reason=reason,
                    inputs=_ports(model.metadata.inputs),
                    outputs=_ports(model.metadata.outputs),
                    max_batch=model.metadata.max_batch,
                    requests=count.requests,
                    errors=count.errors,
                )
            )
        return statuses

    def waiting(self) -> list[str]:
        """What should serve and does not, and why. An update that is under way is not counted."""
        if not self._begun:
            return ["the first topology is being deployed"]
        if not self._serving:
            return [_NO_GATEWAY]
        pipelines = [
            f"pipeline {model.metadata.name} is not ready: {model.reason}"
            for model in self._models()
            if model.route is None
        ]
        workers = [
            f"worker {name} failed: {worker.reason}"
            for name, worker in self._deployed.workers.items()
            if worker.state is BlockState.FAILED
        ]
        return pipelines + workers

    # Deciding

    async def _examine(self, topology: Topology) -> tuple[Path | None, dict[Digest, Manifest]]:
        """Read what the store says of the topology's artifacts. Raises TopologyInvalid."""
        problems = []
        store = Path(topology.store) if topology.store is not None else self._store
        if self._store is not None and store != self._store:
            problems.append(
                f"store: this server works with {self._store}, not with {store}; leave `store` out"
            )
        elif store is None and topology.blocks:
            problems.append("store: say in which directory the artifacts are")
        found = await asyncio.to_thread(_read_manifests, topology, store)
        present = [device.name for device in await asyncio.to_thread(devices.list_devices)]
        problems += reconcile.validate(topology, found, present)
        if problems:
            raise TopologyInvalid(problems)
        return store, {d: m for d, m in found.items() if isinstance(m, Manifest)}

    def _models(self) -> list[protocol.Model]:
        """Every pipeline as clients may see it now."""
        now = self._deployed
        models = []
        for name in map(PipelineName, now.topology.pipelines):
            signature = reconcile.pipeline_signature(now.topology, now.manifests, name)
            metadata = ModelMetadata(name, signature.inputs, signature.outputs, signature.max_batch)
            road = now.roads.get(name)
            reason = "it is being connected" if road is None else road.broken
            route = road.route.id if road is not None and reason is None else None
            returning = road is not None and all(
                worker.state is not BlockState.FAILED or worker.returning for worker in road.workers
            )
            models.append(protocol.Model(metadata, route, reason, returning))
        return models

    # Acting

    async def _start_all(self, specs: Iterable[WorkerSpec]) -> list[_Worker]:
        """Start workers side by side. Raises StartFailed, with none of them left.

        They are passing until they are part of what is deployed.
        """
        workers = [_Worker(spec) for spec in specs]
        self._passing = workers
        outcomes = await asyncio.gather(
            *(self._bring_up(worker) for worker in workers), return_exceptions=True
        )
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failures:
            await asyncio.gather(*(self._stop(worker) for worker in workers))
            self._passing = []
            for failure in failures:
                if not isinstance(failure, StartFailed):
                    raise failure
            reasons = "; ".join(str(failure) for failure in failures)
            raise StartFailed(f"{reasons}; the old generation keeps serving")
        return workers

    async def _bring_up(self, worker: _Worker) -> None:
        """Start a worker's process and have it load and warm its blocks. Raises StartFailed."""
        spec = worker.spec
        incarnation = self._supervisor.next_incarnation()
        worker.child = await self._supervisor.spawn(
            f"worker {spec.name}",
            "blockflow.worker",
            incarnation,
            ["--name", spec.name],
            seconds=self._options.ready_timeout_s,
        )
        # The socket's path must stay short, so it is numbered rather than named.
        worker.endpoints = {
            block.name: f"ipc://{self._run_dir}/{incarnation}.{number}.sock"
            for number, block in enumerate(spec.blocks)
        }
        load = protocol.Load(str(self._store), spec.blocks, tuple(worker.endpoints.values()))
        await worker.child.command(load, self._options.ready_timeout_s)
        worker.state = BlockState.READY
        worker.child.on_exit = lambda reason: self._mourn(worker, reason)

    async def _stop(self, worker: _Worker) -> None:
        if worker.child is not None:
            await worker.child.stop(_STOP_SECONDS)
            self._supervisor.forget(worker.child)

    async def _start_gateway(self) -> None:
        incarnation = self._supervisor.next_incarnation()
        self._results = f"ipc://{self._run_dir}/{incarnation}.results.sock"
        options = self._options
        self._gateway = await self._supervisor.spawn(
            "the gateway",
            "blockflow.gateway",
            incarnation,
            [
                *("--results", self._results),
                *("--fd", str(self._gateway_fd)),
                *("--queue-depth", str(options.queue_depth)),
                *("--request-timeout", str(options.request_timeout_s)),
                *("--max-body-bytes", str(options.max_body_bytes)),
            ],
            seconds=options.ready_timeout_s,
            pass_fds=[self._gateway_fd],
        )
        self._gateway.on_exit = self._mourn_gateway

    async def _with_roads(self, deployed: _Deployed, pipelines: Iterable[str]) -> _Deployed:
        """Lay a new route for each of `pipelines` whose workers are ready, and connect it.

        Raises StartFailed when a worker or the gateway cannot connect; the routes are forgotten.
        """
        roads = {
            name: road
            for name in map(PipelineName, pipelines)
            if (road := self._plan_road(deployed, name)) is not None
        }
        try:
            await self._tell(roads.values(), protocol.Connect)
        except StartFailed:
            await self._forget(roads.values())
            raise
        return _Deployed(
            deployed.generation,
            deployed.topology,
            deployed.manifests,
            deployed.workers,
            {**deployed.roads, **roads},
        )

    def _plan_road(self, deployed: _Deployed, name: PipelineName) -> _Road | None:
        blocks = [BlockName(block) for block in deployed.topology.pipelines[name].blocks]
        manifests = [
            deployed.manifests[Digest(deployed.topology.blocks[b].artifact)] for b in blocks
        ]
        home = {
            block.name: worker
            for worker in deployed.workers.values()
            for block in worker.spec.blocks
        }
        workers = tuple(home[block] for block in blocks)
        if any(worker.state is not BlockState.READY for worker in workers):
            return None
        signature = reconcile.pipeline_signature(deployed.topology, deployed.manifests, name)
        wirings = [
            signature.entry,
            *(reconcile.wiring(*pair) for pair in itertools.pairwise(manifests)),
        ]
        steps = tuple(
            Step(block, worker.endpoints[block], wiring)
            for block, worker, wiring in zip(blocks, workers, wirings, strict=True)
        )
        route = Route(
            id=RouteId(next(self._route_ids)),
            pipeline=name,
            steps=steps,
            results=self._results,
            inputs=signature.inputs,
            outputs=signature.outputs,
            gives=signature.results,
            max_batch=deployed.topology.blocks[blocks[0]].max_batch,
        )
        return _Road(route, workers)

    async def _tell(
        self,
        roads: Iterable[_Road],
        command: Any,
    ) -> None:
        """Send every worker of `roads`, and the gateway, a command about the routes it is on."""
        routes: dict[Child, list[Route]] = {}
        for road in roads:
            on_it = {worker.child for worker in road.workers} | {self._gateway}
            for child in on_it:
                if child is not None and child.alive:
                    routes.setdefault(child, []).append(road.route)
        outcomes = await asyncio.gather(
            *(child.command(command(tuple(mine))) for child, mine in routes.items()),
            return_exceptions=True,
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _publish(self) -> None:
        """Tell the gateway what serves from now on."""
        if self._gateway is not None and self._gateway.alive:
            # A gateway that fails here is ending, and its successor is told again.
            with contextlib.suppress(StartFailed):
                await self._gateway.command(protocol.Publish(tuple(self._models())))
                self._serving = True

    async def _leave(self, roads: Iterable[_Road]) -> None:
        """Let what travels on `roads` arrive, then forget them."""
        roads = tuple(roads)
        ids = tuple(road.route.id for road in roads)
        seconds = self._options.drain_timeout_s
        if self._gateway is not None and self._gateway.alive and ids:
            with contextlib.suppress(StartFailed):
                await self._gateway.command(protocol.Drain(ids, seconds), seconds + 5)
        await self._forget(roads)

    async def _forget(self, roads: Iterable[_Road]) -> None:
        try:
            await self._tell(
                roads, lambda routes: protocol.Retire(tuple(route.id for route in routes))
            )
        except StartFailed as error:
            log.warning("a route could not be retired: %s", error)

    # Mourning and repair

    def _mourn(self, worker: _Worker, reason: str) -> None:
        """A worker died: stop sending there, answer what it held, and start a successor."""
        log.error("worker %s failed: %s", worker.spec.name, reason)
        worker.state = BlockState.FAILED
        worker.reason = reason
        now = asyncio.get_running_loop().time()
        deaths = self._deaths.setdefault(worker.spec.name, deque())
        deaths.append(now)
        while deaths[0] < now - _MEMORY_SECONDS:
            deaths.popleft()
        worker.returning = len(deaths) < _CRASH_LOOP
        self._repair(self._abandon(worker))
        self._repair(self._replace(worker, deaths=len(deaths)))

    def _mourn_gateway(self, reason: str) -> None:
        log.error("the gateway failed: %s", reason)
        self._gateway = None
        self._serving = False
        self._repair(self._replace_gateway())

    def _repair(self, work: Coroutine[Any, Any, None]) -> None:
        if self._closing:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._repairs.add(task)
        task.add_done_callback(self._repaired)

    def _repaired(self, task: asyncio.Task[None]) -> None:
        self._repairs.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a repair failed", exc_info=error)

    async def _abandon(self, worker: _Worker) -> None:
        await self._publish()
        ids = tuple(
            road.route.id for road in self._deployed.roads.values() if worker in road.workers
        )
        if ids and self._gateway is not None and self._gateway.alive:
            names = ", ".join(block.name for block in worker.spec.blocks)
            reason = f"block {names} failed while it held this request: {worker.reason}"
            suspects = tuple(
                request
                for endpoint in worker.endpoints.values()
                for request in ledger.read(ledger.ledger_path(endpoint))
            )
            with contextlib.suppress(StartFailed):
                await self._gateway.command(protocol.Abort(ids, reason, suspects))

    async def _replace(self, dead: _Worker, deaths: int) -> None:
        """Start a successor: at once after one death, ever later after several in a row."""
        name = dead.spec.name
        pause = 0.0 if deaths == 1 else _pause(deaths - 2)
        for attempt in itertools.count(deaths):
            await asyncio.sleep(pause)
            async with self._lock:
                if self._deployed.workers.get(name) is not dead:
                    return  # an update has put something else in its place
                successor = _Worker(dead.spec)
                try:
                    await self._bring_up(successor)
                    await self._install(dead, successor)
                except StartFailed as error:
                    await self._stop(successor)
                    dead.reason = str(error)
                    dead.returning = attempt < _CRASH_LOOP
                    log.warning("worker %s cannot be replaced yet: %s", name, error)
                    await self._publish()
                else:
                    log.info("worker %s is back", name)
                    return
            pause = _pause(attempt - 1)

    async def _install(self, dead: _Worker, successor: _Worker) -> None:
        """Route around `dead` through `successor`. Raises StartFailed."""
        now = self._deployed
        affected = [name for name, road in now.roads.items() if dead in road.workers]
        affected += [
            name for name in map(PipelineName, now.topology.pipelines) if name not in now.roads
        ]
        new = _Deployed(
            now.generation,
            now.topology,
            now.manifests,
            {**now.workers, dead.spec.name: successor},
            now.roads,
        )
        self._deployed = await self._with_roads(new, affected)
        await self._publish()
        old = [road for name, road in now.roads.items() if self._deployed.roads[name] is not road]
        await self._forget(old)
        await self._stop(dead)

    async def _replace_gateway(self) -> None:
        for attempt in itertools.count():
            async with self._lock:
                try:
                    old = self._deployed
                    await self._start_gateway()
                    self._deployed = await self._with_roads(old, old.topology.pipelines)
                    await self._publish()
                    await self._forget(old.roads.values())
                except StartFailed as error:
                    log.warning("the gateway cannot be replaced yet: %s", error)
                else:
                    log.info("the gateway is back")
                    return
            await asyncio.sleep(_pause(attempt))


def _pause(attempt: int) -> float:
    """Seconds before another try: exponential, from half a second to half a minute."""
    return min(_FIRST_RETRY_SECONDS * 2.0**attempt, _LAST_RETRY_SECONDS)


def _read_manifests(topology: Topology, directory: Path | None) -> dict[Digest, Manifest | str]:
    """What the store says of each artifact; absent where it has none."""
    found: dict[Digest, Manifest | str] = {}
    if directory is None:
        return found
    try:
        store = Store(directory)
    except NotFound:
        return found
    for block in topology.blocks.values():
        digest = Digest(block.artifact)
        try:
            found[digest] = store.manifest(digest)
        except NotFound:
            continue
        except BlockFlowError as error:
            found[digest] = str(error)
    return found


def _ports(ports: Iterable[Any]) -> tuple[PortStatus, ...]:
    return tuple(PortStatus(name=p.name, dtype=p.dtype, shape=p.shape) for p in ports)


def _block_statuses(worker: _Worker, names: Mapping[str, str]) -> Iterable[BlockStatus]:
    """The blocks of one worker; `names` says which block listens at an endpoint."""
    child = worker.child
    alive = child is not None and child.alive
    memory = devices.process_memory(child.pid) if child is not None and alive else None
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
            state=worker.state,
            reason=worker.reason,
            device_memory_bytes=memory.device_bytes.get(spec.device) if memory else None,
            host_memory_bytes=memory.host_bytes if memory else None,
            requests=sum(known.requests.values()) if known else 0,
            requests_by_pipeline={str(p): n for p, n in known.requests.items()} if known else {},
            compute_ms_mean=known.compute_ms / known.batches if known and known.batches else None,
            channels=tuple(
                ChannelStatus(
                    peer=names.get(c.endpoint, c.endpoint.removeprefix("local:")),
                    carrier=c.carrier,
                    messages=c.messages,
                    bytes=c.bytes,
                    host_bytes=c.host_bytes,
                )
                for c in (known.channels if known else ())
            ),
        )
