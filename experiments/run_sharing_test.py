"""Many tasks on one trunk against as many whole networks: throughput, latency and memory.

    python experiments/run_sharing_test.py --model resnet50 --tasks 1,2,4,8,12,20 --device cuda:0

Every task has a head of its own; 75 % of its bytes are a trunk that all share. Against it: as many
whole networks with the same weights, each one block. Both in one BlockFlow worker with the same
batching and, on a GPU, CUDA graphs; requests of one row for random tasks, host tensors in and out,
from one process through TensorMQ. Found are the latency of one request at a time, the throughput of
16 synchronous clients, and, by bisection, the highest rate of Poisson arrivals over all tasks with
a p99 within --p99 ms. Answers of both are compared. Writes sharing-tasks.json and .png.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import families
import figures
import networks
import numpy as np
from client import Answer, Inputs, closed_loop, one_by_one, poisson
from deployed import Entry, House
from families import Task
from lab import MIB, Lab, Memory, arguments, at_least, at_most

_CLIENTS = 16
_MAX_BATCH = 8
_STEPS = 5
_PATIENCE = 5.0


class Mixed:
    """A deployed family as one variant, whose requests are for random tasks; see `client`."""

    def __init__(self, entry: Entry, tasks: int) -> None:
        self._entry = entry
        choose = random.Random(0)  # noqa: S311 - repeatable, not secret
        self._order = [choose.randrange(tasks) for _ in range(4093)]

    def task(self, number: int) -> int:
        return self._order[number % len(self._order)]

    def use(self, side: str) -> None:
        self._entry.use(side)

    def send(self, number: int, inputs: Inputs) -> None:
        self._entry.send(number, inputs, self.task(number))

    def poll(self, seconds: float) -> list[Answer]:
        return self._entry.poll(seconds)

    def close(self) -> None:
        self._entry.close()


class Asked:
    """One input, and what each task answered to it when it was asked first."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self._inputs = inputs
        self.answers: list[Any] = []
        self._mixed: Mixed | None = None

    def expect(self, mixed: Mixed, answers: list[Any]) -> None:
        self._mixed, self.answers = mixed, answers

    def inputs(self, number: int, side: str) -> Inputs:
        return self._inputs

    def difference(self, answer: Answer) -> float:
        assert self._mixed is not None
        expected = self.answers[self._mixed.task(answer.number)]
        return float(np.abs(answer.output - expected).max())


def wholes(lab: Lab, tasks: Sequence[Task], settings: Mapping[str, Any]) -> dict[str, Any]:
    blocks = {
        f"whole-{task.name}": {"artifact": task.whole, "device": lab.device, **settings}
        for task in tasks
    }
    return {
        "store": str(lab.store.root),
        "devices": lab.devices(),
        "blocks": blocks,
        "pipelines": {task.name: {"blocks": [f"whole-{task.name}"]} for task in tasks},
    }


def deploy(
    lab: Lab, topology: Mapping[str, Any], tasks: Sequence[Task], asked: Asked
) -> tuple[House, Mixed, int]:
    """A server with these tasks, its client, and the bytes that it takes with every task warm."""
    memory = Memory(lab)
    folder = lab.new_folder()
    house = House(topology, folder / "house")
    house.wait_ready()
    assert not house.joining, "one worker needs no MPS"
    entry = Entry(house, folder, [task.name for task in tasks], lab.device)
    entry.use("host")
    answers = []
    for index in range(len(tasks)):
        entry.send(index, asked.inputs(index, "host"), index)
        while not (found := entry.poll(1.0)):
            pass
        answers.append(found[0].output)
    mixed = Mixed(entry, len(tasks))
    if not asked.answers:
        asked.expect(mixed, answers)
    return house, mixed, memory.taken(house.pid)


def highest_rate(
    mixed: Mixed, asked: Asked, saturated: float, limit: float, seconds: float
) -> dict[str, float]:
    """The highest rate whose p99 stays within `limit` ms, by bisection up to what saturates."""
    low, high, best = 0.0, 1.3 * saturated, {"offered": 0.0, "per_second": 0.0, "p99_ms": 0.0}
    for _ in range(_STEPS):
        rate = (low + high) / 2
        run = poisson(
            lambda number: mixed.send(number, asked.inputs(number, "host")),
            mixed.poll,
            rate,
            seconds,
            asked.difference,
        )
        p99 = float(np.percentile(run.ms, 99))
        answered = len(run.ms) / run.seconds
        if p99 <= limit and answered >= 0.9 * rate:
            low, best = rate, {"offered": rate, "per_second": answered, "p99_ms": p99}
        else:
            high = rate
    return best


def measure(
    lab: Lab, tasks: Sequence[Task], limit: float | None, seconds: float
) -> dict[str, dict[str, Any]]:
    """Both ways to serve these tasks, side by side and in turns."""
    settings = {"worker": "all", "max_batch": _MAX_BATCH, "precision": lab.precision}
    topologies = {
        "monoliths": wholes(lab, tasks, settings),
        "one trunk": families.topology(lab.store, tasks, lab.device, settings, lab.devices()),
    }
    asked = Asked(networks.arrays(lab.source().inputs, 1, 0))
    running: dict[str, tuple[House, Mixed, int]] = {}
    found: dict[str, dict[str, Any]] = {}
    try:
        for name, topology in topologies.items():
            running[name] = deploy(lab, topology, tasks, asked)
        for name, (_, mixed, taken) in running.items():
            samples = list(one_by_one(mixed, asked, "host", 4 * _CLIENTS))
            run = closed_loop(mixed, asked, "host", 8 * _CLIENTS, _CLIENTS)
            count = max(4 * _CLIENTS, round(seconds / run.seconds * len(run.ms)))
            run = closed_loop(mixed, asked, "host", count, _CLIENTS)
            found[name] = {
                "bytes": taken,
                "alone_p50_ms": statistics.median(sample.ms for sample in samples),
                "saturated_per_second": len(run.ms) / run.seconds,
                "saturated_p99_ms": float(np.percentile(run.ms, 99)),
                "max_difference": max(run.difference, *(s.difference for s in samples)),
            }
        allowed = limit or _PATIENCE * found["monoliths"]["alone_p50_ms"]
        for name, (_, mixed, _) in running.items():
            rate = found[name]["saturated_per_second"]
            found[name]["within"] = highest_rate(mixed, asked, rate, allowed, seconds)
            found[name]["p99_limit_ms"] = allowed
    finally:
        for house, mixed, _ in running.values():
            mixed.close()
            house.close()
    return found


def targets(rows: Sequence[Mapping[str, Any]], context: int) -> list[dict[str, Any]]:
    last = rows[-1]
    shared, apart = last["found"]["one trunk"], last["found"]["monoliths"]
    rate = apart["within"]["per_second"]
    many = f"{last['tasks']} tasks, one trunk / monoliths"
    return [
        at_least(
            f"throughput within the p99: {many}",
            3,
            shared["within"]["per_second"] / rate if rate else None,
        ),
        at_most(
            f"memory beyond one context: {many}",
            0.35,
            (shared["bytes"] - context) / (apart["bytes"] - context),
        ),
    ]


def report(lab: Lab, results: Mapping[str, Any]) -> None:
    table = []
    for row in results["rows"]:
        for name, each in row["found"].items():
            within = each["within"]
            table.append(
                [
                    f"{row['tasks']} tasks, {name}",
                    f"{each['alone_p50_ms']:.2f}",
                    f"{each['saturated_per_second']:.1f}",
                    f"{each['saturated_p99_ms']:.1f}",
                    f"{within['per_second']:.1f}",
                    f"{within['p99_ms']:.1f} of {each['p99_limit_ms']:.0f}",
                    f"{each['bytes'] / MIB:.0f}",
                    f"{each['max_difference']:.1e}",
                ]
            )
    columns = ["alone, ms p50", f"{_CLIENTS} clients, /s", "p99 ms", "within p99, /s", "p99 ms"]
    lab.table(
        f"{results['model']}, {results['share']:.1%} of the bytes shared",
        ["", *columns, f"{results['memory']}, MiB", "max diff"],
        table,
    )
    lab.target_table(results["targets"])


def main() -> None:
    parser = arguments(__doc__, model="resnet50")
    parser.add_argument("--tasks", help="how many, such as 1,2,4,8,12,20")
    parser.add_argument("--share", type=float, default=0.75, help="of a network's bytes")
    parser.add_argument("--p99", type=float, help="ms; default 20, on a CPU 5 times one request's")
    parser.add_argument("--seconds", type=float, help="of one measurement")
    options = parser.parse_args()
    wanted = options.tasks or ("1,8" if options.quick else "1,2,4,8,12,20")
    counts = [int(each) for each in wanted.split(",")]
    seconds = options.seconds or (1.0 if options.quick else 4.0)
    with Lab("sharing-tasks", options) as lab:
        limit = options.p99 or (20.0 if lab.gpu else None)
        lab.say(f"building {max(counts)} tasks")
        source = lab.source()
        family = families.build(source, lab.store, max(counts), options.share, 0, wholes=True)
        rows = []
        for count in counts:
            lab.say(f"{count} tasks")
            found = measure(lab, family.tasks[:count], limit, seconds)
            rows.append({"tasks": count, "found": found})
        # What one worker takes without weights: one task's, less its weights.
        context = rows[0]["found"]["monoliths"]["bytes"] - counts[0] * family.task_bytes
        results = {
            "model": options.model,
            "share": family.share,
            "memory": "device memory by NVML" if lab.gpu else "host memory (PSS)",
            "context_bytes": context,
            "rows": rows,
            "targets": lab.judged(targets(rows, context)),
        }
        report(lab, results)
        figures.sharing(lab.figure, results)
        lab.write(results)


if __name__ == "__main__":
    main()
