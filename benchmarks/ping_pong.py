"""A tensor that two processes hand to each other without a pause: what a hop costs when it is warm.

    python benchmarks/ping_pong.py --device cpu --sizes 4KB,600KB,3.2MB,12.8MB
    python benchmarks/ping_pong.py --device cuda:0

Half of a round trip in microseconds: allocate a slot, send it in place, and at the other end take
it, release it and answer in the same way. `hop.py` measures one hand-over by a process that has
just computed something else for half a millisecond, so that its code and its peer's have left the
caches; here nothing else is done. Nothing is computed either: every slot is filled once before, and
the content is compared after. Streams wait for content and for slots as they always do. Each
process has one half of the cores: on one core they would pass it to each other, message by message.
The two ways take turns, so that a slow moment of the machine meets both.

    ring      descriptors through shared memory; both ends look out for the next
    zeromq    descriptors through sockets; both ends sleep until the next
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import measured
import torch
from rich.console import Console
from rich.table import Table

from tensormq import Doorbell, Loop, Message, Peer, Pull, Push

WAYS = {"ring": (Doorbell.RING, 1.0), "zeromq": (Doorbell.ZEROMQ, 0.0)}
SLOTS = 4


class End:
    """One of the two: it sends and receives in one loop."""

    def __init__(
        self, folder: Path, way: str, side: int, device: str, sizes: dict[str, int]
    ) -> None:
        doorbell, spin = WAYS[way]
        self._device = device
        self._loop = Loop(spin=spin)
        self._mine, self._theirs = (f"ipc://{folder}/{way}-{each}" for each in (side, 1 - side))
        self._pull = Pull(self._mine, device=device, loop=self._loop)
        self._push = Push(
            slots=SLOTS,
            slot_bytes=max(sizes.values()),
            device=device,
            doorbell=doorbell,
            loop=self._loop,
        )
        self._shapes = {label: (size // 4,) for label, size in sizes.items()}
        self._peer: Peer | None = None

    def meet(self) -> None:
        """Connect to the other end, which does the same, and fill all slots."""
        self._peer = self._push.connect(self._theirs, timeout=60)
        self._loop.run_until(lambda: bool(self._pull.statistics()), 60)
        largest = max(self._shapes.values())
        fillings = [
            self._push.allocate({"x": ("float32", largest)}, to=self._peer, timeout=10)
            for _ in range(SLOTS)
        ]
        for filling in fillings:
            filling.tensors["x"].fill_(7.0)
            filling.abandon()
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)

    def send(self, label: str) -> None:
        assert self._peer is not None
        filling = self._push.allocate(
            {"x": ("float32", self._shapes[label])}, to=self._peer, timeout=10
        )
        self._push.send(filling, to=self._peer)

    def take(self) -> Message:
        return self._pull.recv(timeout=20)

    def close(self) -> None:
        self._push.close()
        # The other end's goodbye is answered by a loop that runs.
        self._loop.run_until(lambda: not self._pull.statistics(), 20)
        self._pull.close()
        self._loop.close()


def _start(device: str, side: int) -> None:
    """Use every other core, and the GPU if there is one."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[side::2] or cores)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)


def _answer(folder: Path, device: str, sizes: dict[str, int], orders: Any) -> None:
    """The other process: answer so many messages of such a size, as it is told."""
    _start(device, 1)
    ends = {way: End(folder, way, 1, device, sizes) for way in WAYS}
    orders.send("bound")
    for end in ends.values():
        end.meet()
    while (order := orders.recv()) is not None:
        way, label, count = order
        end = ends[way]
        for _ in range(count):
            end.take().release()
            end.send(label)
    for end in ends.values():
        end.close()


def _rounds(end: End, label: str, count: int) -> list[float]:
    """Half of each of `count` round trips, in µs."""
    times = []
    begin = time.monotonic()
    for _ in range(count):
        end.send(label)
        message = end.take()
        if not times:
            assert message.tensors["x"].unique().tolist() == [7.0], "something else arrived"
        message.release()
        now = time.monotonic()
        times.append((now - begin) / 2 * 1e6)
        begin = now
    return times[1:]  # the first waited until the other end had heard the order


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", default="4KB,600KB,3.2MB,12.8MB")
    parser.add_argument("--rounds", type=int, default=20, help="rounds in which both take turns")
    parser.add_argument("--messages", type=int, default=200, help="round trips of one way a round")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    sizes = dict(measured.sizes(options.sizes))
    where = measured.conditions(options.device)  # while this process may use all cores
    folder = Path(tempfile.mkdtemp(prefix="ping-"))
    context = mp.get_context("spawn")
    orders, theirs = context.Pipe()
    other = context.Process(target=_answer, args=(folder, options.device, sizes, theirs))
    other.start()
    try:
        _start(options.device, 0)
        ends = {way: End(folder, way, 0, options.device, sizes) for way in WAYS}
        assert orders.recv() == "bound"
        for end in ends.values():
            end.meet()
        times: dict[str, dict[str, list[float]]] = {
            way: {label: [] for label in sizes} for way in WAYS
        }
        for number in range(-2, options.rounds):  # two rounds to warm up
            for label in sizes:
                for way, end in ends.items():
                    orders.send((way, label, options.messages))
                    found = _rounds(end, label, options.messages)
                    if number >= 0:
                        times[way][label] += found
        orders.send(None)
        for end in ends.values():
            end.close()
        other.join(20)
    finally:
        other.kill()
        shutil.rmtree(folder)
    results = {
        way: {label: measured.percentiles(found) for label, found in mine.items()}
        for way, mine in times.items()
    }
    _print(where, results)
    measured.write(options.json, {"conditions": where, "unit": "µs", "results": results})


def _print(where: dict[str, Any], results: dict[str, dict[str, dict[str, float]]]) -> None:
    console = Console(width=140)
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    table = Table(title="half of a round trip, µs: p50 (p95, p99)", box=None)
    table.add_column("descriptors")
    for label in next(iter(results.values())):
        table.add_column(label, justify="right")
    for way, found in results.items():
        cells = [
            f"{each['p50']:.1f} ({each['p95']:.0f}, {each['p99']:.0f})" for each in found.values()
        ]
        table.add_row(way, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
