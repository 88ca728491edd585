"""MPS for the workers of one server: where it runs, who has joined it, and why it does not.

Each GPU has a daemon of its own that sees no other GPU, so that what dies together has nothing in
common with anything else: after a fault an MPS server takes no new clients on any of its GPUs until
all that were hurt have left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from blockflow import devices, mps_daemon
from blockflow.errors import StartFailed, TopologyInvalid
from blockflow.supervisor import Child, Supervisor

log = logging.getLogger(__name__)

SUFFIX = ".mps"
"""Of the pipe directories in a run directory: `<index>.mps`, short for the sockets in them."""
DEVICE = "cuda:0"
"""What a worker under MPS calls its GPU: it sees no other."""
_START_SECONDS = 45.0
"""More than a keeper takes to give up, so that it can say why."""
_STOP_SECONDS = 10.0


@dataclass
class _Daemon:
    keeper: Child
    directory: Path
    gpu: str
    # By pid: a worker and the one that is to replace it have the same name.
    clients: dict[int, str] = field(default_factory=dict)
    strays: dict[int, str] = field(default_factory=dict)
    """Why workers that should be clients are not."""


class Mps:
    """Starts and ends the daemons. Belongs to one event loop.

    on_lost: called with the device and the reason when a daemon has ended by itself, and with it
    the work of every client.
    """

    def __init__(
        self, supervisor: Supervisor, run_dir: Path, on_lost: Callable[[str, str], None]
    ) -> None:
        self._supervisor = supervisor
        self._run_dir = run_dir
        self._on_lost = on_lost
        self._daemons: dict[str, _Daemon] = {}
        self._problems: dict[str, str] = {}
        """Why MPS could not be had on a GPU, until `keep` hears that it is used there."""
        self._lock = asyncio.Lock()

    async def prepare(self, wanted: Mapping[str, bool], dry_run: bool = False) -> frozenset[str]:
        """Give those GPUs of `wanted` on which MPS runs; where it did not, it is started.

        A GPU that may do without (false in `wanted`) is left out when MPS cannot be had; `status`
        says why. A dry run starts nothing, and takes it for granted that what is there starts.

        Raises:
            TopologyInvalid: it cannot be had where it must, with every reason.
        """
        lacking: dict[str, str] = {}
        for device in wanted:
            problem = mps_daemon.missing() if dry_run else await self.obtain(device)
            if problem is not None:
                lacking[device] = problem
        if musts := [device for device in lacking if wanted[device]]:
            raise TopologyInvalid(
                [
                    f"devices.{device}.mps: it is on, but MPS cannot be had: {lacking[device]}; "
                    "write auto or off to do without"
                    for device in musts
                ]
            )
        return frozenset(wanted.keys() - lacking.keys())

    async def obtain(self, device: str) -> str | None:
        """Have MPS run on a GPU; why it cannot, or None when it does."""
        problem = mps_daemon.missing()
        if problem is None:
            try:
                await self._ensure(device)
            except StartFailed as error:
                problem = str(error)
        if problem is not None and self._problems.get(device) != problem:
            log.warning("%s is without MPS: %s", device, problem)
            self._problems[device] = problem
        return problem

    async def environment(self, device: str) -> dict[str, str]:
        """What a worker on `device` needs in its environment to join MPS. Raises StartFailed."""
        daemon = await self._ensure(device)
        return {mps_daemon.PIPES: str(daemon.directory), "CUDA_VISIBLE_DEVICES": daemon.gpu}

    async def admit(self, device: str, worker: str, pid: int, *, must: bool) -> None:
        """Check that the worker has joined: one that did not would silently take turns instead.

        Unless it `must`, it is only logged and told in `status`. Raises StartFailed.
        """
        daemon = self._daemons.get(device)
        if daemon is None:
            raise StartFailed(f"the MPS daemon of {device} has ended")
        try:
            joined = await asyncio.to_thread(mps_daemon.clients, daemon.directory)
            problem = None if pid in joined else f"worker {worker} did not join it"
        except StartFailed as error:
            problem = f"nobody knows whether worker {worker} joined it: {error}"
        if problem is None:
            daemon.clients[pid] = worker
        elif must:
            raise StartFailed(f"MPS is on for {device}, but {problem}")
        else:
            log.warning("MPS of %s: %s", device, problem)
            daemon.strays[pid] = problem

    def is_stray(self, device: str, pid: int) -> bool:
        """Whether a worker that should have joined is known not to have."""
        daemon = self._daemons.get(device)
        return daemon is not None and pid in daemon.strays

    def dismiss(self, device: str, pid: int) -> None:
        """Forget a worker whose process has ended."""
        daemon = self._daemons.get(device)
        if daemon is not None:
            daemon.clients.pop(pid, None)
            daemon.strays.pop(pid, None)

    async def terminate(self, device: str, pid: int) -> bool:
        """Take a worker's work off the GPU before it is killed; whether that was done."""
        daemon = self._daemons.get(device)
        if daemon is None:
            return False
        try:
            return await asyncio.to_thread(mps_daemon.terminate, daemon.directory, pid)
        except StartFailed as error:
            log.warning("the work of process %d cannot be ended on its own: %s", pid, error)
            return False

    async def keep(self, used: Collection[str]) -> None:
        """Stop the daemons of other GPUs than those in `used`."""
        for device in used:
            self._problems.pop(device, None)
        async with self._lock:
            for device in self._daemons.keys() - set(used):
                await self._stop(device)

    async def renew(self, device: str) -> None:
        """Stop a daemon whose clients have died and left, so that nobody meets what they left."""
        async with self._lock:
            await self._stop(device)

    async def close(self) -> None:
        await self.keep(())

    def status(self, wanted: Collection[str]) -> dict[str, devices.Mps]:
        """What is known of each GPU that has MPS, or should have it: those are `wanted`."""
        known = {
            device: devices.Mps(state="failed", reason=problem)
            for device, problem in self._problems.items()
            if device in wanted
        }
        for device, daemon in self._daemons.items():
            known[device] = devices.Mps(
                state="failed" if daemon.strays else "on",
                reason="; ".join(daemon.strays.values()) or None,
                clients={worker: pid for pid, worker in daemon.clients.items()},
            )
        return known

    async def _ensure(self, device: str) -> _Daemon:
        async with self._lock:
            daemon = self._daemons.get(device)
            if daemon is not None:
                return daemon
            directory = self._run_dir / f"{device.removeprefix('cuda:')}{SUFFIX}"
            gpu = await asyncio.to_thread(_uuid, device)
            keeper = await self._supervisor.spawn(
                f"the MPS daemon of {device}",
                mps_daemon.MODULE,
                self._supervisor.next_incarnation(),
                ["--directory", str(directory), "--gpu", gpu],
                seconds=_START_SECONDS,
                extra_environment={mps_daemon.PIPES: str(directory)},
            )
            daemon = self._daemons[device] = _Daemon(keeper, directory, gpu)
            keeper.on_exit = lambda reason: self._lose(device, reason)
            log.info("MPS runs on %s", device)
            return daemon

    async def _stop(self, device: str) -> None:
        daemon = self._daemons.pop(device, None)
        if daemon is None:
            return
        await daemon.keeper.stop(_STOP_SECONDS)
        self._supervisor.forget(daemon.keeper)
        await asyncio.to_thread(mps_daemon.clear, daemon.directory)

    def _lose(self, device: str, reason: str) -> None:
        daemon = self._daemons.pop(device)
        self._supervisor.forget(daemon.keeper)
        self._on_lost(device, f"the MPS daemon of {device} failed: {reason}")


def _uuid(device: str) -> str:
    """Raises StartFailed."""
    for each in devices.list_devices():
        if each.name == device and each.uuid is not None:
            return each.uuid
    raise StartFailed(f"the driver knows no {device}")
