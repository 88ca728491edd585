"""What one message costs each end in its own processor time, beside the moving of tensors.

    python benchmarks/message_cost.py

Both ends live in one thread here, so that nothing sleeps and nothing is woken: what is left is the
work that a hop cannot do without. Microseconds, by turns of all variants, so that a slow moment of
the machine meets all of them. `send` and `credit` are the producer's, `receive` and `release` the
consumer's; a message has one request and a note of 60 bytes.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import measured
import torch
from rich.console import Console
from rich.table import Table

from tensormq import Doorbell, Loop, Pull, Push, Request

PHASES = ("send", "receive", "release", "credit")


class Variant:
    """One pair of ends. `kind` is None for NumPy or a torch device."""

    def __init__(self, directory: Path, number: int, kind: str | None, doorbell: Doorbell) -> None:
        self.name = f"{kind or 'numpy'}, {doorbell}"
        self.loop = Loop(spin=0)
        self.pull = Pull(f"ipc://{directory}/{number}.sock", device=kind, loop=self.loop)
        self.push = Push(slot_bytes=1 << 16, device=kind, loop=self.loop, doorbell=doorbell)
        self.peer = self.push.connect(self.pull.endpoint)
        tensor = torch.ones(8, 128)
        self.tensors: dict[str, Any] = {"x": tensor.numpy() if kind is None else tensor}
        self.requests = (Request(1 << 60, 8, 1e6),)
        self.times: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.times["in place"] = []

    def message(self, in_place: bool) -> tuple[float, ...]:
        clock = time.perf_counter
        what: Any = self.tensors
        if in_place:
            what = self.push.allocate({"x": ("float32", (8, 128))}, to=self.peer)
        begin = clock()
        self.push.send(what, to=self.peer, requests=self.requests, route=3, note=bytes(60))
        sent = clock()
        message = self.pull.recv()
        received = clock()
        message.release()
        released = clock()
        while self.push.leased_slots:
            self.loop.run_once(1.0)
        return sent - begin, received - sent, released - received, clock() - released

    def close(self) -> None:
        self.pull.close()
        self.push.close()
        self.loop.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--messages", type=int, default=20, help="messages of one variant a round")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="cost-"))
    ways = [(kind, bell) for kind in (None, "cpu") for bell in Doorbell]
    variants = [Variant(directory, n, *way) for n, way in enumerate(ways)]
    for number in range(-2, options.rounds):  # two rounds to warm up
        for variant in variants:
            for _ in range(options.messages):
                found = variant.message(in_place=False)
                in_place = variant.message(in_place=True)
                if number >= 0:
                    for phase, seconds in zip(PHASES, found, strict=True):
                        variant.times[phase].append(seconds * 1e6)
                    variant.times["in place"].append(in_place[0] * 1e6)
    for variant in variants:
        variant.close()
    shutil.rmtree(directory)
    results = {
        variant.name: {name: measured.percentiles(times) for name, times in variant.times.items()}
        for variant in variants
    }
    where = measured.conditions("cpu")
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    table = Table(title="processor time of one message, µs: p50 (p95, p99)", box=None)
    table.add_column("variant")
    for name in (*PHASES, "in place"):
        table.add_column("send in place" if name == "in place" else name, justify="right")
    for name, found in results.items():
        cells = [f"{t['p50']:.1f} ({t['p95']:.1f}, {t['p99']:.1f})" for t in found.values()]
        table.add_row(name, *cells)
    console.print(table)
    measured.write(options.json, {"conditions": where, "unit": "µs", "results": results})


if __name__ == "__main__":
    main()
