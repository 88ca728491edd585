"""One producer, one to eight consumers: what a message costs when it goes to several.

    python benchmarks/fanout.py --device cpu --sizes 4KB,3.2MB --consumers 1,2,4,8

Microseconds from the moment the producer begins to send a slot that it filled in place until the
last of the consumers has taken the message, and until the slot is free again because all have
released it. Every consumer is a process of its own; one message is under way at a time. The
numbers of consumers take turns, so that a slow moment of the machine meets all of them. With more
processes than cores the kernel's scheduler is measured as well.

    ring      descriptors through shared memory; consumers sleep between messages, or spin
    zeromq    descriptors through sockets, to consumers that sleep
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing as mp
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import measured
import torch
from rich.console import Console
from rich.table import Table

from tensormq import Doorbell, Loop, Peer, Pull, Push

WAYS = {
    "ring, spinning": (Doorbell.RING, 1.0),
    "ring, parked": (Doorbell.RING, 0.0),
    "zeromq": (Doorbell.ZEROMQ, 0.0),
}


def _consume(endpoints: dict[str, str], device: str, taken: Any, index: int) -> None:
    """Serve one way after the other, as the control message says, until the end."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    loops = {way: Loop(spin=WAYS[way][1]) for way in endpoints}
    pulls = {
        way: Pull(endpoint, device=device, loop=loops[way]) for way, endpoint in endpoints.items()
    }
    for way, pull in pulls.items():
        while True:
            with pull.recv() as message:
                if device.startswith("cuda"):
                    torch.cuda.current_stream(device).synchronize()
                taken[index] = time.monotonic()
                last = message.note == b"last"
            if last:
                break
        # The producer's goodbye is answered by a loop that runs.
        loops[way].run_until(lambda pull=pull: not pull._channels, timeout=20)
    for pull in pulls.values():
        pull.close()


def _measure(
    push: Push, peers: list[Peer], count: int, taken: Any, number: float
) -> tuple[float, float]:
    filling = push.allocate({"x": ("float32", (count,))}, to=peers, timeout=20)
    filling.tensors["x"].fill_(number)
    if filling.tensors["x"].is_cuda:
        torch.cuda.current_stream().synchronize()
    time.sleep(0.0005)  # the consumers are waiting by now
    begin = time.monotonic()
    push.send(filling, to=peers)
    push._loop.run_until(lambda: push.leased_slots == 0, timeout=20)
    free = time.monotonic()
    return max(taken[: len(peers)]) - begin, free - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", default="4KB,3.2MB")
    parser.add_argument("--consumers", default="1,2,4,8")
    parser.add_argument("--rounds", type=int, default=20, help="rounds in which all take turns")
    parser.add_argument("--messages", type=int, default=10, help="messages of one kind a round")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    device = options.device
    sizes = list(measured.sizes(options.sizes))
    numbers = [int(part) for part in options.consumers.split(",")]
    directory = Path(tempfile.mkdtemp(prefix="fanout-"))
    context = mp.get_context("spawn")
    taken = context.Array("d", max(numbers), lock=False)
    endpoints = [
        {way: f"ipc://{directory}/{i}-{j}" for j, way in enumerate(WAYS)}
        for i in range(max(numbers))
    ]
    processes = [
        context.Process(target=_consume, args=(mine, device, taken, index))
        for index, mine in enumerate(endpoints)
    ]
    for process in processes:
        process.start()
    results: dict[str, dict[str, dict[str, Any]]] = {}
    try:
        for way, (doorbell, spin) in WAYS.items():
            with (
                Loop(spin=spin) as loop,
                Push(
                    slots=2,
                    slot_bytes=max(size for _, size in sizes),
                    device=device,
                    doorbell=doorbell,
                    loop=loop,
                ) as push,
            ):
                peers = [push.connect(mine[way], timeout=60) for mine in endpoints]
                times: dict[tuple[str, int], list[tuple[float, float]]] = {}
                for number in range(-2, options.rounds):  # two rounds to warm up
                    for (label, size), consumers in itertools.product(sizes, numbers):
                        for _ in range(options.messages):
                            found = _measure(
                                push, peers[:consumers], size // 4, taken, float(number)
                            )
                            if number >= 0:
                                times.setdefault((label, consumers), []).append(found)
                push.send({}, to=peers, note=b"last")
                results[way] = {
                    f"{label} to {consumers}": {
                        "last taken": measured.percentiles([took * 1e6 for took, _ in found]),
                        "slot free": measured.percentiles([free * 1e6 for _, free in found]),
                    }
                    for (label, consumers), found in times.items()
                }
        for process in processes:
            process.join(20)
    finally:
        for process in processes:
            process.kill()
        shutil.rmtree(directory)
    where = measured.conditions(device)
    _print(where, results)
    measured.write(options.json, {"conditions": where, "unit": "µs", "results": results})


def _print(where: dict[str, Any], results: dict[str, dict[str, dict[str, Any]]]) -> None:
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    for moment in ("last taken", "slot free"):
        table = Table(title=f"until {moment}, µs: p50 (p95, p99)", box=None)
        table.add_column("message")
        for way in results:
            table.add_column(way, justify="right")
        for row in next(iter(results.values())):
            cells = []
            for found in results.values():
                mine = found[row][moment]
                cells.append(f"{mine['p50']:.0f} ({mine['p95']:.0f}, {mine['p99']:.0f})")
            table.add_row(row, *cells)
        console.print(table)


if __name__ == "__main__":
    main()
