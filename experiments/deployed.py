"""BlockFlow itself: a server with its gateway and workers, and a client that skips only HTTP.

`House` runs BlockFlow's own controller in a process of its own. Beside the gateway's routes it lays
routes whose answers come to us: the same workers, blocks, queues and channels, and our `Entry` in
the place of the gateway, sending as it does. So what is measured can be told from what HTTP costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing as mp
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import networks
import numpy as np
from client import Answer, Inputs

from blockflow import protocol
from blockflow.child import die_with_parent, start_logging
from blockflow.controller import Controller
from blockflow.options import ServeOptions
from blockflow.protocol import Note, Route, decode_note, encode
from blockflow.state import State
from blockflow.topology import PipelineName, parse
from tensormq import Loop, Message, Peer, Pull, Push, Request, slot_size

SLOTS = 16
"""Requests under way in a first block's channel, the gateway's and ours alike. Their memory is
taken at once: slots, times rows of a request, times bytes of a row."""
_TIMED = encode(Note(hops=((),)))
"""What travels with a request of which the times are wanted."""


class _Controller(Controller):
    async def lay(self, pipeline: str, results: str) -> Route:
        """A second route through a pipeline's blocks, whose answers are awaited at `results`."""
        async with self._lock:
            road = self._plan_road(self._deployed, PipelineName(pipeline))
            assert road is not None, f"pipeline {pipeline} is not ready"
            route = msgspec.structs.replace(road.route, results=results)
            children = {worker.child for worker in road.workers}
            await asyncio.gather(
                *(child.command(protocol.Connect((route,))) for child in children if child)
            )
            return route

    async def joining(self) -> dict[str, str]:
        """The environment in which a process joins the workers' MPS; empty without MPS."""
        found: dict[str, str] = {}
        for device, status in self.mps().items():
            if status.state == "on":
                found |= await self._mps.environment(device)
        return found


def _serve(
    control: Connection, topology: Mapping[str, Any], folder: str, depth: int, parent: int
) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start_logging("server", "warning")
    asyncio.run(_run(control, topology, Path(folder), depth))


async def _run(control: Connection, topology: Mapping[str, Any], folder: Path, depth: int) -> None:
    options = ServeOptions(
        topology=parse(topology), log_level="warning", ready_timeout_s=300, queue_depth=depth
    )
    run_dir = folder / "run"
    run_dir.mkdir(mode=0o700)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        contextlib.closing(State(folder / "state")) as state,
    ):
        controller = _Controller(options, run_dir, listener.fileno(), state)
        try:
            await controller.start()
            control.send(f"http://127.0.0.1:{listener.getsockname()[1]}")
            control.send(await controller.joining())
            while (order := await asyncio.to_thread(control.recv)) is not None:
                match order:
                    case (str() as pipeline, str() as results):
                        control.send(await controller.lay(pipeline, results))
                    case "blocks":
                        control.send([b.model_dump(mode="json") for b in controller.blocks()])
        finally:
            await controller.close()


class House:
    """A running BlockFlow server.

    Once `wait_ready` has returned, `url` is its inference API, and `joining` the environment in
    which other processes share the GPU with its workers under MPS (empty where they do not): there
    the GPU is cuda:0. depth: requests under way from the gateway through a first block, for which
    it takes host memory that is pinned.
    """

    def __init__(self, topology: Mapping[str, Any], folder: Path, depth: int = SLOTS) -> None:
        folder.mkdir(mode=0o700)
        spawn = mp.get_context("spawn")
        self._control, theirs = spawn.Pipe()
        self._process = spawn.Process(
            # A daemon, so that it ends with an experiment that fails.
            target=_serve,
            args=(theirs, dict(topology), str(folder), depth, os.getpid()),
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self.pid = int(self._process.pid or 0)
        self.url = ""
        self.joining: dict[str, str] = {}

    def wait_ready(self) -> None:
        """Raises EOFError when the server has died; its last words are on standard error."""
        self.url = self._control.recv()
        self.joining = self._control.recv()

    def lay(self, pipeline: str, results: str, pump: Callable[[], None]) -> Route:
        """A route to `pipeline` that answers at `results`; `pump` lets the end there be greeted."""
        self._control.send((pipeline, results))
        while not self._control.poll():
            pump()
        route: Route = self._control.recv()
        return route

    def blocks(self) -> list[dict[str, Any]]:
        """The status of every block, as the management API gives it."""
        self._control.send("blocks")
        found: list[dict[str, Any]] = self._control.recv()
        return found

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._control.send(None)
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class Entry:
    """A client of a House in the place of its gateway; see `client.Variant`.

    It serves one pipeline or several. Each first block gets a Push end of its own, as the gateway
    gives it. sides: where tensors may be, "host" or "device". Ends on the device have memory there
    and make this process's CUDA context, so they are made only where they are asked for.
    slots, rows: requests under way in each channel, and the most rows of one (None: as many as the
    block takes).
    """

    def __init__(
        self,
        house: House,
        folder: Path,
        pipelines: Sequence[str],
        device: str,
        *,
        sides: Collection[str],
        slots: int = SLOTS,
        rows: int | None = None,
    ) -> None:
        self._device = device
        self._gpu = device.startswith("cuda")
        self._loop = Loop()
        self._pulls: dict[str, Pull] = {}
        self._ways: dict[tuple[str, int], tuple[Push, Peer, Route]] = {}
        self._side = "host"
        for side in sides:
            endpoint = f"ipc://{folder}/{pipelines[0]}.{side}.sock"
            place = None if side == "host" else device
            self._pulls[side] = Pull(endpoint, device=place, loop=self._loop)
            pushes: dict[str, tuple[Push, Peer]] = {}
            for index, pipeline in enumerate(pipelines):
                route = house.lay(pipeline, endpoint, lambda: self._loop.run_once(0.02))
                first = route.steps[0].endpoint
                if first not in pushes:
                    most = rows or route.steps[0].max_batch
                    size = slot_size({p.name: (p.dtype, p.sized(most)) for p in route.inputs})
                    push = Push(slots=slots, slot_bytes=size, device=place, loop=self._loop)
                    pushes[first] = push, push.connect(first)
                self._ways[side, index] = (*pushes[first], route)

    def use(self, side: str) -> None:
        if side not in self._pulls:
            raise ValueError(
                f"no ends for tensors on the {side}: made for {', '.join(self._pulls)}"
            )
        self._side = side

    def send(self, number: int, inputs: Inputs, pipeline: int = 0) -> None:
        push, peer, route = self._ways[self._side, pipeline]
        rows = len(next(iter(inputs.values())))
        # On a GPU a block cannot say in passing how long it computed.
        note = b"" if self._gpu else _TIMED
        requests = (Request(number, rows, 0.0),)
        push.send(inputs, to=peer, requests=requests, route=route.id, note=note)

    def poll(self, seconds: float) -> list[Answer]:
        pull = self._pulls[self._side]
        self._loop.run_until(lambda: bool(pull.waiting), seconds)
        answers: list[Answer] = []
        while (message := pull.poll()) is not None:
            with message:
                answers += self._read(message)
        return answers

    def _read(self, message: Message) -> list[Answer]:
        note = decode_note(message.note)
        if note.error is not None:
            raise RuntimeError(note.error)
        tensor = next(iter(message.tensors.values()))
        if self._side == "host":
            # Copied as the gateway copies: the slot goes back to the block now.
            whole: Any = np.array(tensor)
            at = time.monotonic()
        else:
            at = networks.synchronised(self._device)
            whole = tensor.clone()
        answers = []
        start = 0
        every = note.hops or ((),) * len(message.requests)
        for request, hops in zip(message.requests, every, strict=True):
            rows = slice(start, start + request.rows)
            start += request.rows
            compute = tuple(h.compute_ms for h in hops or () if h.compute_ms is not None)
            answers.append(Answer(request.id, at, whole[rows], compute))
        return answers

    def close(self) -> None:
        for push, _, _ in self._ways.values():
            push.close()
        for pull in self._pulls.values():
            pull.close()
        self._loop.close()


def blockflow_topology(
    store: Path,
    digests: Sequence[str],
    device: str,
    pipelines: Mapping[str, Mapping[str, Any]],
    devices: Mapping[str, Any],
) -> dict[str, Any]:
    """A topology of several pipelines through the same artifacts, each with blocks of its own.

    `pipelines` gives each one's settings of its blocks; `together` puts them into one worker.
    `devices` is the topology's section of that name.
    """
    blocks: dict[str, Any] = {}
    chains: dict[str, Any] = {}
    for name, settings in pipelines.items():
        mine = dict(settings)
        worker = {"worker": f"{name}-all"} if mine.pop("together", False) else {}
        names = [f"{name}-{index + 1}" for index in range(len(digests))]
        for block, digest in zip(names, digests, strict=True):
            blocks[block] = {"artifact": str(digest), "device": device, **mine, **worker}
        chains[name] = {"blocks": names}
    return {
        "store": str(store),
        "devices": dict(devices),
        "blocks": blocks,
        "pipelines": chains,
    }
