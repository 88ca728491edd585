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
import time
from collections import deque
from collections.abc import (
    AsyncIterator,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from blockflow import (
    cores,
    devices,
    edit,
    environment,
    ledger,
    protocol,
    reconcile,
    reporting,
    upload,
)
from blockflow.artifact import Digest, Manifest, Store
from blockflow.deployed import Deployed, Road, Worker, silence
from blockflow.edit import Terms, Verb
from blockflow.errors import (
    BlockFlowError,
    InvalidInput,
    NotFound,
    NotInTime,
    StartFailed,
    TopologyInvalid,
    UploadsOff,
)
from blockflow.events import Journal
from blockflow.mps import DEVICE as MPS_DEVICE
from blockflow.mps import Mps
from blockflow.options import ServeOptions
from blockflow.protocol import Route, RouteId
from blockflow.reconcile import WorkerSpec
from blockflow.routing import lay_route
from blockflow.state import State
from blockflow.status import (
    ApplyResult,
    BlockState,
    BlockStatus,
    Event,
    EventKind,
    GatewayStatus,
    GenerationRecord,
    Outcome,
    PipelineStatus,
)
from blockflow.supervisor import Child, Patience, Supervisor
from blockflow.topology import BlockName, Generation, PipelineName, Topology, WorkerName

log = logging.getLogger(__name__)

_STOP_SECONDS = 3.0
_LAST_SECONDS = 1.0
"""Of those for the workers, however long the gateway takes to stop."""
_FIRST_RETRY_SECONDS = 0.5
_LAST_RETRY_SECONDS = 30.0
_CRASH_LOOP = 5
"""So many deaths within `_MEMORY_SECONDS`, or starts in vain, are a crash loop: nobody waits."""
_MEMORY_SECONDS = 60.0
_LOOK_EVERY = 0.5
_ANY_TERMS = Terms()
_NO_GATEWAY = "the gateway is being started"


class Controller:
    """Implements `api.Controller` with real processes. Belongs to one event loop.

    gateway_fd: the listening socket of the inference API, which is handed to the gateway. state:
    where every generation is written down.
    """

    def __init__(self, options: ServeOptions, run_dir: Path, gateway_fd: int, state: State) -> None:
        self._options = options
        self._run_dir = run_dir
        self._gateway_fd = gateway_fd
        self._state = state
        self._journal = Journal()
        self._supervisor = Supervisor(run_dir, state.logs, options.log_level)
        self._mps = Mps(self._supervisor, run_dir, self._lose_gpu)
        self._sharing: set[Worker] = set()
        store = options.store and options.store.resolve()
        self._deployed = Deployed(Generation(0), Topology(store=None), store, {}, {}, {})
        self._passing: list[Worker] = []
        self._leaving: tuple[Road, ...] = ()
        self._gateway: Child | None = None
        self._results = ""
        self._route_ids = itertools.count(1)
        self._lock = asyncio.Lock()
        self._uploads = asyncio.Lock()
        self._deaths: dict[str, deque[float]] = {}
        self._repairs: set[asyncio.Task[None]] = set()
        self._eyes: asyncio.Task[None] | None = None
        self._begun = False
        self._serving = False
        self._closing = False

    # Life

    async def start(self) -> None:
        """Start the gateway and deploy the first topology, or the one that served last.

        Raises StartFailed, TopologyInvalid.
        """
        self._eyes = asyncio.get_running_loop().create_task(self._look())
        self._eyes.add_done_callback(self._repaired)
        async with self._lock:
            await self._start_gateway()
        if self._options.topology is not None:
            await self.update(edit.replace(self._options.topology), Verb.SERVE)
        elif (last := await asyncio.to_thread(self._state.last_applied)) is not None:
            await self._resume(last)
        else:
            await self._publish()
        self._begun = True

    async def close(self) -> None:
        """Stop every process, politely for three seconds in all and then for certain."""
        self._closing = True
        self._journal.close()
        tasks = {*self._repairs} | ({self._eyes} if self._eyes is not None else set())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        end = asyncio.get_running_loop().time() + _STOP_SECONDS
        if self._gateway is not None:
            await self._gateway.stop(_STOP_SECONDS - _LAST_SECONDS)
        left = max(_LAST_SECONDS, end - asyncio.get_running_loop().time())
        everyone = {*self._deployed.workers.values(), *self._passing, *self._sharing}
        await asyncio.gather(*(self._stop(worker, left) for worker in everyone))
        await self._mps.close()
        await self._supervisor.close()

    # What the API asks

    def topology(self) -> tuple[Generation, Topology]:
        return self._deployed.generation, self._deployed.topology

    async def update(
        self, change: edit.Change, verb: Verb, terms: Terms = _ANY_TERMS
    ) -> ApplyResult:
        """Make what `change` makes of the topology the one that serves.

        Raises whatever `change` and `terms` raise, and TopologyInvalid, before anything is touched;
        StartFailed when a block does not come up, in which case the old generation keeps serving.
        """
        async with self._lock:
            old = self._deployed
            terms.check(old.generation)
            topology = await asyncio.to_thread(change, old.topology)
            store, manifests = await self._examine(topology, old.store)
            number = old.generation
            if not terms.dry_run:
                number = await asyncio.to_thread(self._state.next_number)
            mps = await self._prepare_mps(topology, terms.dry_run)
            plan = reconcile.diff(
                self._running(reconcile.mps_wanted(topology)),
                reconcile.plan_workers(topology, mps),
            )
            result = ApplyResult(
                generation=number,
                dry_run=terms.dry_run,
                keep=tuple(spec.name for spec in plan.keep),
                start=tuple(spec.name for spec in plan.start),
                stop=tuple(spec.name for spec in plan.stop),
                actions=reconcile.actions(old.topology, topology, plan),
            )
            if terms.dry_run:
                return result
            kept = {spec.name: old.workers[spec.name] for spec in plan.keep}
            new = Deployed(number, topology, store, manifests, kept, roads={})
            try:
                new = await self._launch(new, plan.start, terms.timeout_s)
                # Written down before it serves: what was acknowledged is never forgotten, and a
                # disk that is full fails the update rather than the next start.
                await self._record(new, verb)
            except BaseException as error:
                await self._give_up(new)
                if not isinstance(error, StartFailed):
                    raise
                await self._fail(new, verb, str(error))
                raise type(error)(f"{error}; the old generation keeps serving") from error
            await self._supplant(new, [old.workers[spec.name] for spec in plan.stop])
            self._journal.write(EventKind.GENERATION_APPLIED, str(number), f"by {verb}")
            log.info("generation %d serves", number)
            return result

    async def rollback(
        self, to: Generation | None = None, terms: Terms = _ANY_TERMS
    ) -> ApplyResult:
        """Apply the topology of generation `to`, or of the one that served before, once more.

        Raises NotFound, Conflict, and what `update` raises.
        """

        def old(_: Topology) -> Topology:
            state = self._state
            record = state.before(self._deployed.generation) if to is None else state.get(to)
            if record.outcome is Outcome.FAILED:
                raise edit.Conflict(f"generation {to} never served: {record.reason}")
            return record.topology

        return await self.update(old, Verb.ROLLBACK, terms)

    async def restart(self, block: BlockName, terms: Terms = _ANY_TERMS) -> ApplyResult:
        """Replace the process of a block's worker, with no request lost.

        Raises NotFound, StaleGeneration; StartFailed, in which case the old process keeps serving.
        """
        async with self._lock:
            before = self._deployed
            terms.check(before.generation)
            old = self._deployed.home(block)
            name = old.spec.name
            result = ApplyResult(
                generation=before.generation,
                dry_run=terms.dry_run,
                keep=tuple(sorted(other for other in before.workers if other != name)),
                start=(name,),
                stop=(name,),
                actions=(f"replace the process of worker {name}",),
            )
            if terms.dry_run:
                return result
            others = {name: each for name, each in before.workers.items() if each is not old}
            new = before.with_workers(others)
            try:
                new = await self._launch(
                    new, (old.spec,), terms.timeout_s, restarts=old.restarts + 1
                )
            except BaseException as error:
                await self._give_up(new)
                if not isinstance(error, StartFailed):
                    raise
                raise type(error)(f"{error}; the old process keeps serving") from error
            self._deaths.pop(_fate(old.spec), None)
            await self._supplant(new, [old])
            log.info("worker %s was restarted", name)
            return result

    async def receive(self, digest: str, body: AsyncIterator[bytes]) -> Manifest:
        """Take an artifact into the store; see `upload.receive` for what it raises.

        Raises UploadsOff, and InvalidInput while no store is known.
        """
        if not self._options.allow_uploads:
            raise UploadsOff("this server takes no artifacts; start it with --allow-uploads")
        directory = self._deployed.store
        if directory is None:
            raise InvalidInput("this server has no store yet; start it with --store")
        async with self._uploads:
            store = await asyncio.to_thread(Store, directory, create=True)
            manifest = await upload.receive(store, digest, body, self._options.max_upload_bytes)
        log.info("artifact %s was uploaded", digest)
        return manifest

    async def history(self, limit: int) -> list[GenerationRecord]:
        return await asyncio.to_thread(self._state.history, limit)

    async def generation_of(self, number: Generation) -> GenerationRecord:
        """Raises NotFound."""
        return await asyncio.to_thread(self._state.get, number)

    def events(self, after: int) -> AsyncIterator[Event]:
        return self._journal.follow(after)

    async def logs(self, block: BlockName, lines: int) -> list[str]:
        """The last lines that a block's process wrote. Raises NotFound."""
        child = self._deployed.home(block).child
        return await asyncio.to_thread(child.log_lines, lines) if child is not None else []

    async def blocks(self) -> list[BlockStatus]:
        names = self._listeners()
        workers = self._everyone()
        children = [worker.child for worker in workers if worker.child is not None]
        memory = await self._memory(children)
        return [each for worker in workers for each in reporting.blocks_of(worker, names, memory)]

    async def gateway(self) -> GatewayStatus:
        child = self._gateway
        memory = await self._memory([child] if child is not None else [])
        taken = memory.get(child.pid) if child is not None else None
        return reporting.gateway(child, self._listeners(), taken, serving=self._serving)

    async def _memory(self, children: Iterable[Child]) -> dict[int, devices.ProcessMemory]:
        """What those of these processes take that live, by their pids."""
        pids = [child.pid for child in children if child.alive]
        # In a thread: a driver may take its time, and the events of this loop cannot wait.
        return await asyncio.to_thread(lambda: {pid: devices.process_memory(pid) for pid in pids})

    def _everyone(self) -> tuple[Worker, ...]:
        """The workers that serve, and those that come or go."""
        return (*self._deployed.workers.values(), *self._passing)

    def _listeners(self) -> dict[str, str]:
        """Who takes what is sent to an endpoint: the names of blocks, and the gateway."""
        names = {
            endpoint: str(name)
            for worker in self._everyone()
            for name, endpoint in worker.endpoints.items()
        }
        return {**names, self._results: "gateway"}

    def pipelines(self) -> list[PipelineStatus]:
        now = self._deployed
        return reporting.pipelines(now.topology, now.models(), self._gateway, self._no_gateway)

    def mps(self) -> Mapping[str, devices.Mps]:
        return self._mps.status(reconcile.mps_wanted(self._deployed.topology))

    def waiting(self) -> list[str]:
        """What should serve and does not, and why. An update that is under way is not counted."""
        if not self._begun:
            return ["the first topology is being deployed"]
        if self._no_gateway is not None:
            return [self._no_gateway]
        pipelines = [
            f"pipeline {model.metadata.name} is not ready: {model.reason}"
            for model in self._deployed.models()
            if model.reason is not None
        ]
        workers = [
            f"worker {name} failed: {worker.reason}"
            for name, worker in self._deployed.workers.items()
            if worker.state is BlockState.FAILED
        ]
        return pipelines + workers + self._doubts()

    @property
    def _no_gateway(self) -> str | None:
        """Why nobody can be answered, or None."""
        if not self._serving or self._gateway is None:
            return _NO_GATEWAY
        return silence(self._gateway)

    def _doubts(self) -> list[str]:
        """What may hang, and why."""
        silences = map(silence, self._watched())
        ready = (w for w in self._deployed.workers.values() if w.state is BlockState.READY)
        overdue = (worker.overdue for worker in ready)
        return [doubt for doubt in (*silences, *overdue) if doubt is not None]

    # Deciding

    async def _examine(
        self, topology: Topology, default: Path | None
    ) -> tuple[Path | None, dict[Digest, Manifest]]:
        """The topology's store, `default` if it names none, and what that says of its artifacts.

        Raises TopologyInvalid.
        """
        problems = []
        store = default
        if topology.store is not None:
            # Links are followed: one directory is one store, however it is written.
            store = await asyncio.to_thread(Path(topology.store).resolve)
            if self._options.store is not None and store != default:
                problems.append(
                    f"store: this server was told to work with {default}, not with {store}; "
                    "leave `store` out"
                )
        elif store is None and topology.blocks:
            problems.append("store: say in which directory the artifacts are")
        found = await asyncio.to_thread(_read_manifests, topology, store)
        present = [device.name for device in await asyncio.to_thread(devices.list_devices)]
        problems += reconcile.validate(topology, found, present, cores.present())
        if problems:
            raise TopologyInvalid(problems)
        return store, {d: m for d, m in found.items() if isinstance(m, Manifest)}

    # Acting

    async def _resume(self, last: GenerationRecord) -> None:
        """Serve what served last. A block that fails now is repaired as if it had failed later."""
        async with self._lock:
            store = self._deployed.store
            if store is None and last.store is not None:
                store = Path(last.store)
            try:
                store, manifests = await self._examine(last.topology, store)
            except TopologyInvalid as error:
                which = f"generation {last.generation}, which served last"
                raise TopologyInvalid([f"{which}: {each}" for each in error.problems]) from error
            mps = await self._prepare_mps(last.topology)
            specs = reconcile.plan_workers(last.topology, mps)
            workers = {name: Worker(spec) for name, spec in specs.items()}
            self._deployed = Deployed(
                Generation(last.generation), last.topology, store, manifests, workers, {}
            )
            await self._publish()
            await asyncio.gather(*(self._bring_up_or_mark(each) for each in workers.values()))
            try:
                self._deployed = await self._with_roads(self._deployed)
            except StartFailed as error:
                # Whoever replaces the worker that died meanwhile connects everything.
                if all(worker.state is not BlockState.FAILED for worker in workers.values()):
                    raise
                log.warning("generation %d cannot be connected yet: %s", last.generation, error)
            await self._publish()
            self._journal.write(EventKind.GENERATION_APPLIED, str(last.generation), "resumed")
            log.info("generation %d serves again", last.generation)

    async def _bring_up_or_mark(self, worker: Worker) -> None:
        try:
            await self._bring_up(worker, self._deployed, self._options.ready_timeout_s)
        except StartFailed as error:
            await self._stop(worker)
            log.warning("worker %s cannot be started: %s", worker.spec.name, error)
            worker.state = BlockState.FAILED
            worker.reason = str(error)
            worker.returning = True
            self._repair(self._replace([worker], deaths=2))

    async def _launch(
        self,
        target: Deployed,
        specs: Iterable[WorkerSpec],
        timeout_s: float | None,
        *,
        restarts: int | None = None,
    ) -> Deployed:
        """`target` with new workers, ready and connected. Raises StartFailed.

        The new workers are passing until they are part of what is deployed; after a failure they
        still are, for the caller to stop. `restarts` is for a worker that continues another.
        """
        seconds = min(timeout_s or self._options.ready_timeout_s, self._options.ready_timeout_s)
        before = self._deployed.workers
        workers = [
            Worker(
                spec,
                restarts=restarts
                if restarts is not None
                else before[spec.name].restarts + 1
                if spec.name in before
                else 0,
            )
            for spec in specs
        ]
        self._passing = workers
        outcomes = await self._bring_up_together(workers, target, seconds)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for failure in failures:
            if not isinstance(failure, StartFailed):
                raise failure
        if failures:
            # Only the caller's own limit is the caller's to answer for.
            late = timeout_s is not None and all(isinstance(each, NotInTime) for each in failures)
            error = NotInTime if late else StartFailed
            raise error("; ".join(str(failure) for failure in failures))
        started = {worker.spec.name: worker for worker in workers}
        target = replace(target, workers={**target.workers, **started})
        try:
            target = await self._with_roads(target)
        except StartFailed as error:
            raise StartFailed(f"the blocks cannot be connected: {error}") from error
        for worker in workers:
            if worker.state is BlockState.FAILED:
                await self._give_up(target)
                raise StartFailed(f"worker {worker.spec.name} failed: {worker.reason}")
        return target

    async def _give_up(self, new: Deployed) -> None:
        """Stop what was started for `new`, which will not serve, and forget its routes."""
        old = self._deployed.roads
        await self._forget(road for name, road in new.roads.items() if old.get(name) is not road)
        await asyncio.gather(*(self._stop(worker) for worker in self._passing))
        self._passing = []
        await self._keep_mps()

    async def _supplant(self, new: Deployed, stop: list[Worker]) -> None:
        """Swap the routes. From here on `new` is what should be, and failures are repaired."""
        old = self._deployed
        self._deployed = new
        self._passing = stop
        for worker in stop:
            if worker.state is BlockState.READY:
                worker.state = BlockState.DRAINING
        self._leaving = tuple(
            road for name, road in old.roads.items() if new.roads.get(name) is not road
        )
        await self._publish()
        await self._leave(self._leaving)
        self._leaving = ()
        await asyncio.gather(*(self._stop(worker) for worker in stop))
        self._passing = []
        await self._keep_mps()

    async def _prepare_mps(self, topology: Topology, dry_run: bool = False) -> frozenset[str]:
        """The GPUs whose workers are to run under MPS. Raises TopologyInvalid."""
        try:
            return await self._mps.prepare(reconcile.mps_wanted(topology), dry_run)
        except TopologyInvalid:
            await self._keep_mps()
            raise

    def _running(self, mps_wanted: Mapping[str, bool]) -> dict[WorkerName, WorkerSpec]:
        """What the workers that serve are; one that should have joined MPS and did not is without
        it where it must be had (true in `mps_wanted`), and so is replaced."""
        specs = {name: worker.spec for name, worker in self._deployed.workers.items()}
        for name, worker in self._deployed.workers.items():
            device, child = worker.spec.device, worker.child
            if (
                mps_wanted.get(device)
                and child is not None
                and self._mps.is_stray(device, child.pid)
            ):
                specs[name] = msgspec.structs.replace(worker.spec, mps=False)
        return specs

    async def _keep_mps(self) -> None:
        """End the MPS daemons that nobody needs any more."""
        specs = (worker.spec for worker in self._deployed.workers.values())
        await self._mps.keep({spec.device for spec in specs if spec.mps})

    async def _record(self, deployed: Deployed, verb: Verb, reason: str | None = None) -> None:
        def write() -> None:
            # A generation that failed uses nothing.
            topology = deployed.topology if reason is None else Topology(store=None)
            with _in_use(deployed.store, topology, self._state.file):
                self._state.record(
                    deployed.generation, deployed.topology, deployed.store, verb, reason
                )

        await asyncio.to_thread(write)

    async def _fail(self, deployed: Deployed, verb: Verb, reason: str) -> None:
        self._journal.write(EventKind.GENERATION_FAILED, str(deployed.generation), reason)
        # The state may be what failed.
        with contextlib.suppress(StartFailed):
            await self._record(deployed, verb, reason)

    async def _bring_up_together(
        self, workers: Sequence[Worker], target: Deployed, seconds: float
    ) -> list[BaseException | None]:
        """What became of each of them after `seconds` at most.

        A worker that starts keeps a core busy for seconds. While others serve, no more start at
        once than leave those half of the cores, or requests would wait and be refused.
        """
        at_once = max(1, cores.available() // 2 if self._deployed.roads else len(workers))
        starts = asyncio.Semaphore(at_once)
        end = asyncio.get_running_loop().time() + seconds

        async def bring_up(worker: Worker) -> None:
            async with starts:
                left = end - asyncio.get_running_loop().time()
                if left <= 0:
                    raise NotInTime(
                        f"worker {worker.spec.name} was not begun within {seconds:.3g} s: those "
                        "before it took all of them"
                    )
                await self._bring_up(worker, target, left)

        return await asyncio.gather(*map(bring_up, workers), return_exceptions=True)

    async def _environment(self, spec: WorkerSpec) -> dict[str, str]:
        """What a worker is started with beside what all processes are. Raises StartFailed."""
        found: dict[str, str] = {}
        if spec.mps:
            found |= await self._mps.environment(spec.device)
        elif spec.device != "cpu":
            found |= environment.without_mps()
        if any(block.compile for block in spec.blocks):
            found[protocol.MACHINE_CODE] = str(self._state.machine_code)
        return found

    async def _bring_up(self, worker: Worker, target: Deployed, seconds: float) -> None:
        """Start the process of a worker of `target`, and have it load and warm its blocks.

        Raises StartFailed.
        """
        spec = worker.spec
        end = asyncio.get_running_loop().time() + seconds
        incarnation = self._supervisor.next_incarnation()
        self._journal.write(EventKind.WORKER_STARTED, spec.name)
        try:
            worker.child = await self._supervisor.spawn(
                f"worker {spec.name}",
                "blockflow.worker",
                incarnation,
                ["--name", spec.name],
                seconds=seconds,
                extra_environment=await self._environment(spec),
            )
            # The socket's path must stay short, so it is numbered rather than named.
            worker.endpoints = {
                block.name: f"ipc://{self._run_dir}/{incarnation}.{number}.sock"
                for number, block in enumerate(spec.blocks)
            }
            blocks = spec.blocks
            if spec.mps:
                self._sharing.add(worker)
                blocks = tuple(msgspec.structs.replace(b, device=MPS_DEVICE) for b in blocks)
            load = protocol.Load(
                str(target.store), blocks, tuple(worker.endpoints.values()), spec.chains
            )
            left = max(0.0, end - asyncio.get_running_loop().time())
            await worker.child.command(load, left)
            if spec.mps:
                must = target.needs_mps(spec.device)
                await self._mps.admit(spec.device, spec.name, worker.child.pid, must=must)
        except StartFailed as error:
            self._journal.write(EventKind.WORKER_FAILED, spec.name, str(error))
            raise
        if not worker.child.alive or worker.child.condemned:
            raise StartFailed(f"worker {spec.name} ended as soon as it was ready")
        worker.state = BlockState.READY
        worker.child.on_exit = lambda reason: self._mourn(worker, reason)
        self._journal.write(EventKind.WORKER_READY, spec.name)

    async def _stop(self, worker: Worker, seconds: float = _STOP_SECONDS) -> None:
        if worker.child is not None:
            alive = worker.child.alive
            await worker.child.stop(seconds, lambda: self._part(worker))
            self._supervisor.forget(worker.child)
            self._sharing.discard(worker)
            self._mps.dismiss(worker.spec.device, worker.child.pid)
            if alive:
                self._journal.write(EventKind.WORKER_STOPPED, worker.spec.name)

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
                *("--max-slowdown", str(options.max_slowdown)),
                *("--request-timeout", str(options.request_timeout_s)),
                *("--max-body-bytes", str(options.max_body_bytes)),
                *_access(options),
            ],
            seconds=options.ready_timeout_s,
            pass_fds=[self._gateway_fd],
        )
        self._gateway.on_exit = self._mourn_gateway
        self._journal.write(EventKind.GATEWAY_STARTED, "gateway")

    async def _with_roads(self, deployed: Deployed) -> Deployed:
        """Lay a route for each pipeline that has none and whose workers are ready, and connect it.

        Raises StartFailed when a worker or the gateway cannot connect; the routes are forgotten.
        """
        roads = {
            name: road
            for name in map(PipelineName, deployed.topology.pipelines)
            if name not in deployed.roads and (road := self._plan_road(deployed, name)) is not None
        }
        try:
            await self._tell(roads.values(), protocol.Connect)
        except StartFailed:
            await self._forget(roads.values())
            raise
        return replace(deployed, roads={**deployed.roads, **roads})

    def _plan_road(self, deployed: Deployed, name: PipelineName) -> Road | None:
        wired = reconcile.wiring_of(deployed.topology, deployed.manifests, name)
        home = {
            block.name: worker
            for worker in deployed.workers.values()
            for block in worker.spec.blocks
        }
        workers = {home[block] for block in wired.blocks}
        if any(worker.state is not BlockState.READY for worker in workers):
            return None
        route = lay_route(
            RouteId(next(self._route_ids)),
            name,
            wired,
            {block.name: block for worker in workers for block in worker.spec.blocks},
            deployed.manifests,
            {block: endpoint for worker in workers for block, endpoint in worker.endpoints.items()},
            [chain for worker in workers for chain in worker.spec.chains],
            self._results,
        )
        return Road(route, tuple(home[step.block] for step in route.steps))

    async def _tell(
        self,
        roads: Iterable[Road],
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
        gateway = self._gateway
        if gateway is not None and gateway.alive:
            # A gateway that fails here is ending, and its successor is told again.
            with contextlib.suppress(StartFailed):
                await gateway.command(protocol.Publish(tuple(self._deployed.models())))
                self._serving = self._serving or gateway is self._gateway

    async def _leave(self, roads: Iterable[Road]) -> None:
        """Let what travels on `roads` arrive, then forget them."""
        roads = tuple(roads)
        ids = tuple(road.route.id for road in roads)
        seconds = self._options.drain_timeout_s
        if self._gateway is not None and self._gateway.alive and ids:
            with contextlib.suppress(StartFailed):
                await self._gateway.command(protocol.Drain(ids, seconds), seconds + 5)
        await self._forget(roads)

    async def _forget(self, roads: Iterable[Road]) -> None:
        roads = tuple(roads)
        try:
            await self._tell(
                roads, lambda routes: protocol.Retire(tuple(route.id for route in routes))
            )
        except StartFailed as error:
            log.warning("a route could not be retired: %s", error)

    # Mourning and repair

    def _mourn(self, worker: Worker, reason: str) -> None:
        """A worker died: stop sending there, answer what it held, and start a successor.

        Under MPS, whoever dies without having been parted from the others takes them along.
        """
        self._sharing.discard(worker)
        lost = {worker: reason}
        if worker.spec.mps and not worker.parted:
            others = f"worker {worker.spec.name}, with which it shared the GPU under MPS, failed"
            lost |= self._end_sharing(worker.spec.device, f"{others}: {reason}")
        suspects = tuple(
            request
            for endpoint in worker.endpoints.values()
            for request, _ in ledger.read(ledger.ledger_path(endpoint))
        )
        self._bury(lost, _fate(worker.spec), reason, suspects)

    def _lose_gpu(self, device: str, reason: str) -> None:
        """The MPS daemon of a GPU ended, and with it all work there."""
        log.error("%s", reason)
        if lost := self._end_sharing(device, reason):
            self._bury(lost, _fate(next(iter(lost)).spec), reason, ())

    def _end_sharing(self, device: str, reason: str) -> dict[Worker, str]:
        """End all that share a GPU under MPS, for what they hold there is lost.

        Gives those of them that were ready. One that still starts fails, and whoever started it
        hears of it.
        """
        ended: dict[Worker, str] = {}
        for other in tuple(self._sharing):
            if other.spec.device == device and other.child is not None:
                self._sharing.discard(other)
                if other.state in {BlockState.READY, BlockState.DRAINING}:
                    other.child.on_exit = None
                    ended[other] = reason
                other.child.condemn(reason)
        return ended

    def _bury(
        self, lost: Mapping[Worker, str], fate: str, reason: str, suspects: tuple[int, ...]
    ) -> None:
        """Note the deaths of workers that died together, and have them repaired.

        lost: why each of them died, and `reason` why the first did. fate: what their deaths are
        counted under. suspects: the requests that may be to blame.
        """
        now = asyncio.get_running_loop().time()
        deaths = self._deaths.setdefault(fate, deque())
        deaths.append(now)
        while deaths[0] < now - _MEMORY_SECONDS:
            deaths.popleft()
        for worker, why in lost.items():
            log.error("worker %s failed: %s", worker.spec.name, why)
            self._journal.write(EventKind.WORKER_FAILED, worker.spec.name, why)
            worker.state = BlockState.FAILED
            worker.reason = why
            worker.returning = len(deaths) < _CRASH_LOOP
        self._repair(self._abandon(tuple(lost), reason, suspects))
        self._repair(self._replace(tuple(lost), deaths=len(deaths)))

    def _mourn_gateway(self, reason: str) -> None:
        log.error("the gateway failed: %s", reason)
        self._journal.write(EventKind.GATEWAY_FAILED, "gateway", reason)
        if self._gateway is not None:
            self._supervisor.forget(self._gateway)
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

    async def _abandon(
        self, lost: Sequence[Worker], reason: str, suspects: tuple[int, ...]
    ) -> None:
        await self._publish()
        ids = tuple(
            road.route.id
            for road in (*self._deployed.roads.values(), *self._leaving)
            if any(worker in road.workers for worker in lost)
        )
        if ids and self._gateway is not None and self._gateway.alive:
            names = ", ".join(block.name for worker in lost for block in worker.spec.blocks)
            words = f"block {names} failed while it held this request: {reason}"
            with contextlib.suppress(StartFailed):
                await self._gateway.command(protocol.Abort(ids, words, suspects))

    async def _replace(self, dead: Sequence[Worker], deaths: int) -> None:
        """Start successors: at once after one death, ever later after several in a row.

        Those that died together come back together, after all of them are gone.
        """
        pause = 0.0 if deaths == 1 else _pause(deaths - 2)
        for attempt in itertools.count(deaths):
            await asyncio.sleep(pause)
            async with self._lock:
                # Of some, an update may have put something else in their place.
                dead = [d for d in dead if self._deployed.workers.get(d.spec.name) is d]
                dead = await self._succeed(dead, attempt)
            if not dead:
                return
            pause = _pause(attempt - 1)

    async def _succeed(self, dead: Sequence[Worker], attempt: int) -> list[Worker]:
        """Start successors and route around `dead` through them; gives those still without one."""
        for worker in dead:
            if worker.child is not None:
                await worker.child.ended()
        await self._renew_mps({worker.spec.device for worker in dead if worker.spec.mps})
        pairs: list[tuple[Worker, Worker]] = []
        failed: list[tuple[Worker, Worker, str]] = []
        successors = [Worker(worker.spec, restarts=worker.restarts + 1) for worker in dead]
        outcomes = await asyncio.gather(
            *(self._rise(successor) for successor in successors), return_exceptions=True
        )
        for worker, successor, outcome in zip(dead, successors, outcomes, strict=True):
            if isinstance(outcome, StartFailed):
                failed.append((worker, successor, str(outcome)))
            elif isinstance(outcome, BaseException):
                raise outcome
            elif successor.state is BlockState.FAILED:
                failed.append((worker, successor, str(successor.reason)))
            else:
                pairs.append((worker, successor))
        if pairs:
            try:
                await self._install(pairs)
            except StartFailed as error:
                failed += [(worker, successor, str(error)) for worker, successor in pairs]
        for worker, successor, reason in failed:
            await self._stop(successor)
            worker.reason = reason
            worker.returning = attempt < _CRASH_LOOP
            worker.restarts = successor.restarts
            log.warning("worker %s cannot be replaced yet: %s", worker.spec.name, reason)
        if failed:
            await self._publish()
        left = [worker for worker, _, _ in failed]
        for worker in dead:
            if worker not in left:
                log.info("worker %s is back", worker.spec.name)
        return left

    async def _rise(self, worker: Worker) -> None:
        """Bring up a successor, without MPS where it cannot be had any more. Raises StartFailed."""
        spec = worker.spec
        if spec.mps:
            problem = await self._mps.obtain(spec.device)
            if problem is not None and self._deployed.needs_mps(spec.device):
                raise StartFailed(f"MPS is on for {spec.device}, but cannot be had: {problem}")
            worker.spec = msgspec.structs.replace(spec, mps=problem is None)
        await self._bring_up(worker, self._deployed, self._options.ready_timeout_s)

    async def _renew_mps(self, gpus: Collection[str]) -> None:
        """Have MPS started anew where nobody uses it, for a fault may have left it unusable."""
        for device in set(gpus) - {worker.spec.device for worker in self._sharing}:
            await self._mps.renew(device)

    async def _part(self, worker: Worker) -> None:
        """Before a worker under MPS is killed, take its work off the GPU it shares."""
        if worker.spec.mps and worker.child is not None and worker.child.alive:
            worker.parted = True
            worker.parted = await self._mps.terminate(worker.spec.device, worker.child.pid)

    def _condemn(self, child: Child, reason: str) -> None:
        """Kill a hung process. What follows is what follows every death."""
        for worker in self._sharing:
            if worker.child is child:
                if not worker.condemned:
                    worker.condemned = True
                    self._repair(self._part_and_condemn(worker, child, reason))
                return
        child.condemn(reason)

    async def _part_and_condemn(self, worker: Worker, child: Child, reason: str) -> None:
        await self._part(worker)
        child.condemn(reason)

    async def _install(self, pairs: Sequence[tuple[Worker, Worker]]) -> None:
        """Route around the dead of `pairs` through their successors. Raises StartFailed."""
        now = self._deployed
        successors = {successor.spec.name: successor for _, successor in pairs}
        new = now.with_workers({**now.workers, **successors})
        self._deployed = await self._with_roads(new)
        await self._publish()
        await self._forget(road for name, road in now.roads.items() if name not in new.roads)
        await asyncio.gather(*(self._stop(worker) for worker, _ in pairs))

    async def _replace_gateway(self) -> None:
        for attempt in itertools.count():
            async with self._lock:
                try:
                    old = self._deployed
                    await self._start_gateway()
                    self._deployed = await self._with_roads(replace(old, roads={}))
                    await self._publish()
                    await self._forget(old.roads.values())
                except StartFailed as error:
                    log.warning("the gateway cannot be replaced yet: %s", error)
                    if self._gateway is not None:  # it lives, but cannot reach the blocks
                        await self._gateway.kill()
                        self._supervisor.forget(self._gateway)
                        self._gateway = None
                else:
                    log.info("the gateway is back")
                    return
            await asyncio.sleep(_pause(attempt))

    # Watching

    def _watched(self) -> list[Child]:
        """The processes that are expected to report."""
        workers = [
            worker.child
            for worker in self._everyone()
            if worker.child is not None
            and worker.child.alive
            and worker.state in {BlockState.READY, BlockState.DRAINING}
        ]
        return [*workers, *([self._gateway] if self._gateway is not None else ())]

    async def _look(self) -> None:
        """Kill what is hung; its death is then met like any other.

        Before that is certain, the gateway is told what is in doubt.
        """
        limit = self._options.heartbeat_timeout_s
        told: list[str] = []
        while True:
            for child in self._watched():
                if child.silent > limit:
                    self._condemn(child, f"it has said nothing for {limit:g} s")
            for worker in self._deployed.workers.values():
                if worker.state is BlockState.READY:
                    self._look_at_computations(worker)
            if (doubts := self._doubts()) != told:
                told = doubts
                # Not awaited: the gateway may be what is silent.
                self._repair(self._publish())
            await asyncio.sleep(_LOOK_EVERY)

    def _look_at_computations(self, worker: Worker) -> None:
        """Mark a worker that computes what was due long ago, and kill one that hangs.

        A client chooses its deadline, and must not be able to have workers killed by choosing too
        short a one. No request may take longer than the server's limit, so one that has been
        computed for longer is past its deadline, whatever that was.
        """
        grace = self._options.hang_grace_s
        limit = self._options.request_timeout_s + grace
        now = time.monotonic()
        overdue = None
        for block, endpoint in worker.endpoints.items():
            patience = worker.computations.setdefault(block, Patience(2 * _LOOK_EVERY))
            computed = ledger.read(ledger.ledger_path(endpoint))
            if any(each.deadline and now - each.deadline > grace for each in computed):
                overdue = f"block {block} computes a request that was due {grace:g} s ago or more"
            requests = [each.request for each in computed]
            if patience.look(now, requests) > limit and worker.child is not None:
                self._condemn(worker.child, f"block {block} computed one request for {limit:g} s")
        if overdue is not None and worker.overdue is None:
            log.warning("worker %s may hang: %s", worker.spec.name, overdue)
            self._journal.write(EventKind.WORKER_OVERDUE, worker.spec.name, overdue)
        worker.overdue = overdue


def _access(options: ServeOptions) -> list[str]:
    """The gateway's flags for tokens and TLS."""
    flags: list[str] = []
    for flag, path in (
        ("--token-file", options.inference_token_file),
        ("--tls-cert", options.tls_cert),
        ("--tls-key", options.tls_key),
    ):
        if path is not None:
            flags += [flag, str(path)]
    return flags


def _fate(spec: WorkerSpec) -> str:
    """What the deaths of a worker are counted under: under MPS, those of its whole GPU."""
    return f"MPS on {spec.device}" if spec.mps else spec.name


def _pause(attempt: int) -> float:
    """Seconds before another try: exponential, from half a second to half a minute."""
    return min(_FIRST_RETRY_SECONDS * 2.0 ** min(attempt, 16), _LAST_RETRY_SECONDS)


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


@contextlib.contextmanager
def _in_use(directory: Path | None, topology: Topology, history: Path) -> Iterator[None]:
    """Have the store know of the history, and keep collectors out until it tells of the topology.

    Raises StartFailed where an artifact was removed since the topology was examined.
    """
    with contextlib.ExitStack() as stack:
        if directory is not None and topology.blocks:
            used = {block.artifact for block in topology.blocks.values()}
            try:
                stack.enter_context(Store(directory).using(used, history))
            except NotFound as error:
                raise StartFailed(f"{error} (it was there when the update began)") from error
            except OSError as error:
                # Some stores are read-only. Nobody can collect garbage there either.
                log.debug("the store at %s cannot know of %s: %s", directory, history, error)
        yield
