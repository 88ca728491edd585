"""Pipelines as people build them with ZeroMQ: a process for each block, PUSH to PULL over ipc.

Three ways for a tensor to get from one process to the next:

    pickled   device → host → pickle → ZeroMQ → unpickle → host → device
    raw       the same without pickle: the bytes of a host copy as a ZeroMQ frame
    handle    torch's reductions: a new handle to the tensor's memory in each message

Blocks come from the same store as BlockFlow's and are called by the same code. Each stage says when
its inputs were on its device and when it had computed, both after a synchronisation.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import signal
import struct
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol

import msgspec
import networks
import numpy as np
import torch
import torch.multiprocessing
import zmq
from client import Answer, Inputs

from blockflow.artifact import Store
from blockflow.child import die_with_parent
from blockflow.program import load
from blockflow.topology import Precision
from blockflow.wiring import by_rule

_HEAD = struct.Struct("<q")
_MARK = struct.Struct("<dd")
_END = b""
_KEPT = 64


class Transport(Protocol):
    """How tensors become frames and frames become tensors on `device` (None: NumPy arrays)."""

    def pack(self, tensors: Mapping[str, Any]) -> list[Any]: ...
    def unpack(self, frames: Sequence[zmq.Frame], device: str | None) -> dict[str, Any]: ...


def _host(tensor: Any) -> np.ndarray[Any, Any]:
    return tensor.cpu().numpy() if isinstance(tensor, torch.Tensor) else tensor


class Pickled:
    def pack(self, tensors: Mapping[str, Any]) -> list[Any]:
        return [pickle.dumps({name: _host(tensor) for name, tensor in tensors.items()})]

    def unpack(self, frames: Sequence[zmq.Frame], device: str | None) -> dict[str, Any]:
        found: dict[str, Any] = pickle.loads(frames[0].bytes)
        if device is None:
            return found
        return {name: torch.from_numpy(array).to(device) for name, array in found.items()}


class Raw:
    def pack(self, tensors: Mapping[str, Any]) -> list[Any]:
        hosts = {name: _host(tensor) for name, tensor in tensors.items()}
        head = [(name, array.dtype.str, array.shape) for name, array in hosts.items()]
        return [msgspec.msgpack.encode(head), *(np.ascontiguousarray(a) for a in hosts.values())]

    def unpack(self, frames: Sequence[zmq.Frame], device: str | None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for (name, dtype, shape), frame in zip(
            msgspec.msgpack.decode(frames[0].bytes), frames[1:], strict=True
        ):
            array = np.frombuffer(frame.buffer, dtype).reshape(shape)
            # A copy on a CPU too: the frame is read-only, and its owner is ZeroMQ.
            found[name] = array.copy() if device is None else torch.tensor(array, device=device)
        return found


class Handle:
    def __init__(self) -> None:
        # Of the whole process. The other strategy sends descriptors through a server thread.
        torch.multiprocessing.set_sharing_strategy("file_system")
        # The exporter must outlive the receiver's use.
        self._kept: deque[Any] = deque(maxlen=_KEPT)

    def pack(self, tensors: Mapping[str, Any]) -> list[Any]:
        # A clone where the tensor may be sent again: one export allows one rebuild.
        mine = {
            name: tensor.clone() if isinstance(tensor, torch.Tensor) else torch.tensor(tensor)
            for name, tensor in tensors.items()
        }
        self._kept.append(mine)
        return [bytes(ForkingPickler.dumps(mine))]

    def unpack(self, frames: Sequence[zmq.Frame], device: str | None) -> dict[str, Any]:
        found: dict[str, torch.Tensor] = pickle.loads(frames[0].bytes)
        if device is None:
            return {name: tensor.cpu().numpy().copy() for name, tensor in found.items()}
        return {name: tensor.to(device) for name, tensor in found.items()}


TRANSPORTS: dict[str, type[Transport]] = {"pickled": Pickled, "raw": Raw, "handle": Handle}


@dataclass(frozen=True)
class Stage:
    """What a stage's process is told. `wires`: its inputs by the names that arrive."""

    store: Path
    digest: str
    wires: Mapping[str, str]
    receive: str
    send: str
    transport: str
    how: str
    rows: int
    device: str
    precision: Precision
    parent: int


def _serve(stage: Stage, ready: Connection) -> None:
    die_with_parent(stage.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    context = zmq.Context.instance()
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    pull.bind(stage.receive)
    push.connect(stage.send)
    transport = TRANSPORTS[stage.transport]()
    networks.begin(stage.device, stage.precision)
    program = load(Store(stage.store), stage.digest, stage.device, precision=stage.precision)
    call = networks.run_by(program, stage.rows, stage.how)
    ready.send("ready")
    while True:
        head, *frames = pull.recv_multipart(copy=False)
        if not frames:
            push.send(_END)
            break
        arrived = transport.unpack(frames, stage.device)
        received = networks.synchronised(stage.device)
        outputs = call({mine: arrived[theirs] for mine, theirs in stage.wires.items()})
        computed = networks.synchronised(stage.device)
        marks = head.bytes + _MARK.pack(received, computed)
        push.send_multipart([marks, *transport.pack(outputs)], copy=False)


class Pipeline:
    """The stages of one variant and the client's end of them; see `client.Variant`.

    device: where requests come from and answers go; None for host memory.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        digests: Sequence[str],
        *,
        transport: str,
        how: str,
        device: str,
        rows: int,
        precision: Precision,
    ) -> None:
        self._transport = TRANSPORTS[transport]()
        self._device = device
        self._name = f"{transport}-{how}-{rows}"
        ends = [f"ipc://{folder}/{self._name}.{i}" for i in range(len(digests) + 1)]
        spawn = mp.get_context("spawn")
        self._processes = []
        self._ready = []
        before = None
        for index, digest in enumerate(digests):
            manifest = store.manifest(digest)
            wires = {port.name: port.name for port in manifest.inputs}
            if before is not None:
                wires = by_rule(before.outputs, manifest.inputs)
            before = manifest
            stage = Stage(
                store.root,
                digest,
                wires,
                ends[index],
                ends[index + 1],
                transport,
                how,
                rows,
                device,
                precision,
                os.getpid(),
            )
            mine, theirs = spawn.Pipe(duplex=False)
            process = spawn.Process(target=_serve, args=(stage, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._ready.append(mine)
        context = zmq.Context.instance()
        self._push, self._pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        self._pull.bind(ends[-1])
        self._push.connect(ends[0])
        self._side = "host"

    def wait_ready(self) -> None:
        """Raises EOFError when a stage has died."""
        for ready in self._ready:
            ready.recv()

    def use(self, side: str) -> None:
        self._side = side

    def send(self, number: int, inputs: Inputs) -> None:
        self._push.send_multipart([_HEAD.pack(number), *self._transport.pack(inputs)], copy=False)

    def poll(self, seconds: float) -> list[Answer]:
        answers: list[Answer] = []
        if self._pull.poll(max(0, int(seconds * 1000 + 0.999))):
            while True:
                try:
                    head, *frames = self._pull.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                device = None if self._side == "host" else self._device
                tensors = self._transport.unpack(frames, device)
                at = time.monotonic() if device is None else networks.synchronised(device)
                text = head.bytes
                (number,) = _HEAD.unpack_from(text)
                marks = _MARK.iter_unpack(text[_HEAD.size :])
                compute = tuple((computed - received) * 1e3 for received, computed in marks)
                answers.append(Answer(number, at, next(iter(tensors.values())), compute))
        return answers

    def close(self) -> None:
        """End the stages one after the other: under MPS, to be killed is to hurt the others."""
        self._push.send(_END)
        for process in self._processes:
            process.join(10)
            process.kill()
            process.join()
        self._push.close(linger=0)
        self._pull.close(linger=0)
