"""One hand-over of a tensor between two processes: TensorMQ beside what people do without it.

    python benchmarks/hop.py --device cpu --sizes 4KB,600KB,3.2MB,12.8MB
    python benchmarks/hop.py --device cuda:0 --to cuda:1 --only tensormq,raw

Latency in microseconds from the moment the sender begins to hand over a tensor that it has to two
moments at the receiver: when it has the tensor and can give its device work on it (`taken`), and
when the device has the content too (`ready`: on a GPU after a stream synchronisation, which nobody
needs who goes on computing there). Both processes read CLOCK_MONOTONIC, which all processes of a
host share. One message is under way at a time. The variants take turns, so that a slow moment of
the machine meets all of them. Before it sends, the sender is busy for half a millisecond, as one
that has just computed is: one that slept would be slowed down by its own awakening.

    tensormq            push.send(tensor): one copy into a slot; ring, and the receiver spins
    tensormq, in place  the sender computed into push.allocate(): no copy
    ... parked          the same, to a receiver that sleeps until a byte comes through a pipe
    ... zeromq          through the socket, to a receiver that sleeps
    ... zeromq spinning through the socket, to a receiver that asks it again and again
    pickled             device → host → pickle → ZeroMQ → unpickle → host → device
    raw frames          the same without pickle
    handle per message  torch's reductions: a new handle for each tensor, over ZeroMQ
    torch queue         torch.multiprocessing.Queue
"""

from __future__ import annotations

import argparse
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import measured
import numpy as np
import torch
import torch.multiprocessing as mp
import zmq
from rich.console import Console
from rich.table import Table

from tensormq import Doorbell, Loop, Peer, Pull, Push

Received = tuple[torch.Tensor, Callable[[], None]]

_BUSY = 0.0005
"""Seconds for which the sender is busy before it sends; by then the receiver is waiting."""


def _wait_for(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.current_stream(device).synchronize()


class _ZmqPair:
    """A PUSH/PULL pair, and how a tensor becomes frames and back."""

    def __init__(self, directory: Path, to: str) -> None:
        self.endpoint = f"ipc://{directory}/{type(self).__name__}.sock"
        self.to = to

    def open_sender(self) -> None:
        self.socket = zmq.Context.instance().socket(zmq.PUSH)
        self.socket.connect(self.endpoint)

    def open_receiver(self) -> None:
        self.socket = zmq.Context.instance().socket(zmq.PULL)
        self.socket.bind(self.endpoint)

    def prepare(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def close(self) -> None:
        self.socket.close(linger=0)


class Pickled(_ZmqPair):
    name = "pickled"

    def send(self, tensor: torch.Tensor) -> None:
        self.socket.send(pickle.dumps(tensor.cpu().numpy()))

    def receive(self) -> Received:
        array = pickle.loads(self.socket.recv())
        tensor = torch.from_numpy(array).to(self.to)
        return tensor, lambda: None


class RawFrames(_ZmqPair):
    name = "raw frames"

    def send(self, tensor: torch.Tensor) -> None:
        self.socket.send(tensor.cpu().numpy().data, copy=False)

    def receive(self) -> Received:
        frame = self.socket.recv(copy=False)
        array = np.frombuffer(frame.buffer, np.float32)
        # A copy on a CPU too: the frame is read-only, and its owner is ZeroMQ.
        tensor = torch.tensor(array, device=self.to)
        return tensor, lambda: None


class HandlePerMessage(_ZmqPair):
    name = "handle per message"

    def prepare(self, tensor: torch.Tensor) -> torch.Tensor:
        # torch moves a CPU tensor into shared memory when it is first sent, and a CUDA tensor's
        # memory is exported as a whole: each message must be a new tensor to need a new handle.
        return tensor.clone()

    def send(self, tensor: torch.Tensor) -> None:
        self._kept = tensor  # the exporter must outlive the receiver's use
        self.socket.send(bytes(ForkingPickler.dumps(tensor)))

    def receive(self) -> Received:
        tensor = pickle.loads(self.socket.recv()).to(self.to)
        return tensor, lambda: None


class TorchQueue:
    name = "torch queue"

    def __init__(self, _directory: Path, to: str) -> None:
        self.to = to
        self.queue: Any = mp.get_context("spawn").Queue()

    def open_sender(self) -> None: ...

    def open_receiver(self) -> None: ...

    def prepare(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def send(self, tensor: torch.Tensor) -> None:
        self._kept = tensor
        self.queue.put(tensor)

    def receive(self) -> Received:
        tensor = self.queue.get().to(self.to)
        return tensor, lambda: None

    def close(self) -> None: ...


class TensorMq:
    kind = "tensormq"

    def __init__(
        self,
        directory: Path,
        devices: tuple[str, str],
        largest: int,
        how: str = "",
        doorbell: Doorbell = Doorbell.RING,
        spin: float = 1.0,
    ) -> None:
        self.name = f"{self.kind}, {how}" if how else self.kind
        self.endpoint = f"ipc://{directory}/{self.name.replace(', ', '-').replace(' ', '-')}"
        self.device, self.to = devices
        self.largest = largest
        self.doorbell = doorbell
        self.spin = spin

    def open_sender(self) -> None:
        self.push = Push(
            slots=4, slot_bytes=self.largest, device=self.device, doorbell=self.doorbell
        )
        self.peer: Peer = self.push.connect(self.endpoint, timeout=60)

    def open_receiver(self) -> None:
        self.loop = Loop(spin=self.spin)
        self.pull = Pull(self.endpoint, device=self.to, loop=self.loop)

    def prepare(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def send(self, tensor: Any) -> None:
        self.push.send({"x": tensor}, to=self.peer)

    def receive(self) -> Received:
        message = self.pull.recv()
        tensor = message.tensors["x"]
        return tensor, message.release

    def close(self) -> None:
        if hasattr(self, "push"):
            self.push.close()
        if hasattr(self, "pull"):
            self.pull.close()
            self.loop.close()


class TensorMqInPlace(TensorMq):
    kind = "tensormq, in place"

    def prepare(self, tensor: torch.Tensor) -> Any:
        filling = self.push.allocate(
            {"x": ("float32", tuple(tensor.shape))}, to=self.peer, timeout=10
        )
        filling.tensors["x"].copy_(tensor)  # stands for the computation that made it
        if self.device.startswith("cuda"):
            torch.cuda.current_stream(self.device).synchronize()
        return filling

    def send(self, tensor: Any) -> None:
        self.push.send(tensor, to=self.peer)


def _receive_all(variants: list[Any], device: str, control: Any) -> None:
    """The receiving process: for each order, receive and say when the tensor was there."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    for variant in variants:
        variant.open_receiver()
    control.send("ready")
    by_name = {variant.name: variant for variant in variants}
    while (name := control.recv()) is not None:
        if name.startswith("open "):
            # A handshake needs this end's loop to run.
            variant = by_name[name.removeprefix("open ")]
            while not variant.pull._channels or not all(
                channel.open for channel in variant.pull._channels.values()
            ):
                variant.loop.run_once(0.1)
            control.send("open")
            continue
        tensor, release = by_name[name].receive()
        taken = time.monotonic()
        _wait_for(device)
        ready = time.monotonic()
        first, last = tensor[0].item(), tensor[-1].item()
        del tensor
        release()
        control.send((taken, ready, first, last))
    for variant in variants:
        variant.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--to", help="the receiver's device, where it is another GPU")
    parser.add_argument("--only", default="", help="variants whose names begin so: tensormq,raw")
    parser.add_argument("--sizes", default="4KB,600KB,3.2MB,12.8MB")
    parser.add_argument("--rounds", type=int, default=30, help="rounds in which all take turns")
    parser.add_argument("--messages", type=int, default=10, help="messages of one variant a round")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    device = options.device
    sizes = list(measured.sizes(options.sizes))
    torch.multiprocessing.set_sharing_strategy("file_system")
    directory = Path(tempfile.mkdtemp(prefix="hop-"))
    largest = max(size for _, size in sizes)
    to = options.to or device
    devices = device, to
    every: list[Any] = [
        TensorMq(directory, devices, largest),
        TensorMqInPlace(directory, devices, largest),
        TensorMqInPlace(directory, devices, largest, "parked", spin=0),
        TensorMqInPlace(directory, devices, largest, "zeromq", Doorbell.ZEROMQ, spin=0),
        TensorMqInPlace(directory, devices, largest, "zeromq spinning", Doorbell.ZEROMQ),
        Pickled(directory, to),
        RawFrames(directory, to),
        HandlePerMessage(directory, to),
        TorchQueue(directory, to),
    ]
    variants = [v for v in every if v.name.startswith(tuple(options.only.split(",")))]
    control, theirs = mp.get_context("spawn").Pipe()
    receiver = mp.get_context("spawn").Process(target=_receive_all, args=(variants, to, theirs))
    receiver.start()
    try:
        assert control.recv() == "ready"
        for variant in variants:
            if isinstance(variant, TensorMq):
                control.send(f"open {variant.name}")
            variant.open_sender()
            if isinstance(variant, TensorMq):
                assert control.recv() == "open"
        results = {
            label: _measure(variants, size, device, control, options) for label, size in sizes
        }
        control.send(None)
        for variant in variants:
            variant.close()
        receiver.join(20)
    finally:
        receiver.kill()
        shutil.rmtree(directory)
    where = measured.conditions(device)
    where["to"] = to
    _print(where, variants, results)
    measured.write(options.json, {"conditions": where, "unit": "µs", "results": results})


def _measure(
    variants: list[Any], size: int, device: str, control: Any, options: argparse.Namespace
) -> dict[str, dict[str, dict[str, float]]]:
    """For each variant until when: `sent` is when the sender is free again."""
    count = size // 4
    times: dict[str, dict[str, list[float]]]
    times = {variant.name: {"sent": [], "taken": [], "ready": []} for variant in variants}
    for number in range(-3, options.rounds):  # three rounds to warm up
        source = torch.full((count,), float(number), device=device)
        for variant in variants:
            for _ in range(options.messages):
                prepared = variant.prepare(source)
                _wait_for(device)
                control.send(variant.name)
                busy = time.monotonic() + _BUSY
                while time.monotonic() < busy:
                    pass
                start = time.monotonic()
                variant.send(prepared)
                sent = time.monotonic()
                taken, ready, first, last = control.recv()
                assert first == last == float(number), f"{variant.name} delivered something else"
                if number >= 0:
                    for until, when in (("sent", sent), ("taken", taken), ("ready", ready)):
                        times[variant.name][until].append((when - start) * 1e6)
    return {
        name: {until: measured.percentiles(values) for until, values in mine.items()}
        for name, mine in times.items()
    }


def _print(
    where: dict[str, Any],
    variants: list[Any],
    results: dict[str, dict[str, dict[str, dict[str, float]]]],
) -> None:
    console = Console(width=140)
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    for until in ("taken", "ready"):
        table = Table(title=f"until a tensor is {until}, µs: p50 (p95, p99)", box=None)
        table.add_column("variant")
        for label in results:
            table.add_column(label, justify="right")
        for variant in variants:
            cells = []
            for found in results.values():
                mine = found[variant.name][until]
                cells.append(f"{mine['p50']:.0f} ({mine['p95']:.0f}, {mine['p99']:.0f})")
            table.add_row(variant.name, *cells)
        console.print(table)


if __name__ == "__main__":
    main()
