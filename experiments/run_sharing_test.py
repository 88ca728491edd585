"""Many tasks on one trunk against as many whole networks: throughput, latency and memory.

    python experiments/run_sharing_test.py --model resnet50 --tasks 1,2,4,8,12,20 --device cuda:0

Every task has a head of its own; 75 % of its bytes are a trunk that all share. Against it: as many
whole networks with the same weights, each one block. Both in one BlockFlow worker with the same
batching and, on a GPU, CUDA graphs; requests of one row for random tasks, host tensors in and out,
from one process through TensorMQ. Found are the latency of one request at a time, the throughput of
twice --max-batch synchronous clients, and the highest rate of Poisson arrivals over all tasks with
a p99 within --p99 ms: both sides take turns, step by step, and every step is in the JSON. Answers
of both are compared. Memory is what a side took when it had answered for every task, and whatever
it took more under load; the client's own CUDA context is made before, and its ends are on the host.
Writes sharing-tasks.json and .png.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import context
import families
import figures
import networks
import numpy as np
from client import (
    ANSWERED,
    Answer,
    Inputs,
    Step,
    best_step,
    closed_loop,
    next_rate,
    one_by_one,
    poisson,
)
from deployed import Entry, House
from families import Task
from lab import MIB, Lab, Memory, arguments, at_least, at_most

_ALONE = 64
_PATIENCE = 5.0
_FOR_P99 = 1000
_LONGER = 5
"""A step with too few requests for a p99 may take so many times --seconds."""


@dataclass(frozen=True)
class Load:
    """How a family is asked. `batch`: the most rows that a block computes together; `limit`: of the
    p99, in ms, None for five times what one request takes by itself; `rates`: the most that are
    tried.

    As many synchronous clients as keep one batch waiting while another is computed, and room for
    as many again, so that the client is nobody's limit.
    """

    batch: int
    seconds: float
    limit: float | None
    rates: int

    @property
    def clients(self) -> int:
        return 2 * self.batch

    @property
    def under_way(self) -> int:
        return 4 * self.batch

    def step_seconds(self, rate: float) -> float:
        return max(self.seconds, min(_FOR_P99 / rate, _LONGER * self.seconds))


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


@dataclass
class Side:
    """One way to serve the tasks, running: `taken` are the bytes of its server so far."""

    house: House
    mixed: Mixed
    taken: int
    saturated: float = 0.0
    steps: list[Step] = field(default_factory=list)


def deploy(
    lab: Lab, topology: Mapping[str, Any], tasks: Sequence[Task], asked: Asked, load: Load
) -> Side:
    """A server with these tasks and its client, with every task warm."""
    memory = Memory(lab)
    folder = lab.new_folder()
    # The gateway has nothing to do here; each request under way from it takes pinned memory.
    house = House(topology, folder / "house", depth=1)
    house.wait_ready()
    entry = Entry(
        house,
        folder,
        [task.name for task in tasks],
        lab.device,
        sides=("host",),
        slots=load.under_way,
        rows=1,
    )
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
    return Side(house, mixed, memory.taken(house.pid))


def saturate(lab: Lab, side: Side, asked: Asked, load: Load) -> dict[str, Any]:
    """One request at a time, then as many synchronous clients as fill batches."""
    memory = Memory(lab)
    samples = list(one_by_one(side.mixed, asked, "host", _ALONE))
    trial = closed_loop(side.mixed, asked, "host", 8 * load.clients, load.clients)
    count = max(4 * load.clients, round(load.seconds / trial.seconds * len(trial.ms)))
    run = closed_loop(side.mixed, asked, "host", count, load.clients)
    side.taken = memory.grown(side.house.pid, side.taken)
    side.saturated = len(run.ms) / run.seconds
    return {
        "alone_p50_ms": statistics.median(sample.ms for sample in samples),
        "saturated_per_second": side.saturated,
        "saturated_p99_ms": float(np.percentile(run.ms, 99)),
        "max_difference": max(run.difference, *(s.difference for s in samples)),
    }


def one_step(lab: Lab, side: Side, asked: Asked, load: Load, *, rate: float, limit: float) -> Step:
    """A stretch of Poisson arrivals; both sides get the same one at the same number of steps."""
    memory = Memory(lab)
    run = poisson(
        lambda number: side.mixed.send(number, asked.inputs(number, "host")),
        side.mixed.poll,
        rate,
        load.step_seconds(rate),
        asked.difference,
        seed=len(side.steps),
        under_way=load.under_way,
    )
    side.taken = memory.grown(side.house.pid, side.taken)
    p50, p99 = (float(each) for each in np.percentile(run.ms, [50, 99]))
    met = p99 <= limit and run.kept_up >= ANSWERED
    return Step(rate, rate * run.kept_up, p50, p99, len(run.ms), run.difference, met)


def measure(lab: Lab, tasks: Sequence[Task], load: Load) -> dict[str, dict[str, Any]]:
    """Both ways to serve these tasks, side by side and in turns."""
    settings = {
        "worker": "all",
        "max_batch": load.batch,
        "precision": lab.precision,
        "channels_last": lab.options.channels_last,
    }
    topologies = {
        "monoliths": wholes(lab, tasks, settings),
        "one trunk": families.topology(lab.store, tasks, lab.device, settings, lab.devices()),
    }
    asked = Asked(networks.arrays(lab.source().inputs, 1, 0))
    empty = Memory(lab)
    sides: dict[str, Side] = {}
    found: dict[str, dict[str, Any]] = {}
    try:
        for name, topology in topologies.items():
            sides[name] = deploy(lab, topology, tasks, asked, load)
            lab.say(f"{len(tasks)} tasks, {name}: warm")
        for name, side in sides.items():
            found[name] = {"warm_bytes": side.taken, **saturate(lab, side, asked, load)}
        limit = load.limit or _PATIENCE * found["monoliths"]["alone_p50_ms"]
        searching = dict(sides)
        while searching:
            for name, side in list(searching.items()):
                rate = next_rate(side.steps, side.saturated, load.rates)
                if rate is None:
                    del searching[name]
                else:
                    side.steps.append(one_step(lab, side, asked, load, rate=rate, limit=limit))
        for name, side in sides.items():
            best = best_step(side.steps)
            worst = max(step.max_difference for step in side.steps)
            found[name] |= {
                "bytes": side.taken,
                "p99_limit_ms": limit,
                "steps": [asdict(step) for step in side.steps],
                "within": asdict(best) if best else {"per_second": 0.0, "p99_ms": 0.0},
                "max_difference": max(found[name]["max_difference"], worst),
            }
    finally:
        for side in sides.values():
            side.mixed.close()
            side.house.close()
    empty.settle()
    return found


def targets(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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
        at_most(f"memory beyond one context: {many}", 0.35, last["memory"]["beyond_context"]),
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
                    f"{within['p99_ms']:.1f} of {each['p99_limit_ms']:.3g}",
                    f"{each['bytes'] / MIB:.0f}",
                    f"{each['max_difference']:.1e}",
                ]
            )
    columns = [
        "alone, ms p50",
        f"{results['clients']} clients, /s",
        "p99 ms",
        "within p99, /s",
        "p99 ms",
    ]
    lab.table(
        f"{results['model']}, {results['share']:.1%} of the bytes shared, batches up to "
        f"{results['max_batch']}",
        ["", *columns, f"{results['memory']}, MiB", "max diff"],
        table,
    )
    table = []
    for row in results["rows"]:
        memory = row["memory"]
        ratio = memory["beyond_context"]
        table.append(
            [
                f"{row['tasks']} tasks",
                "" if ratio is None else f"{ratio:.3f}",
                f"{memory['bound_weights']:.3f}",
                f"{memory['in_all']:.3f}",
                f"{memory['bound_in_all']:.3f}",
                *(f"{each / MIB:.0f}" for each in memory["beyond_weights_bytes"].values()),
            ]
        )
    lab.table(
        f"memory, one trunk / monoliths; one context takes {results['context_bytes'] / MIB:.0f} "
        "MiB, and bounds are arithmetic",
        [
            "",
            "beyond one context",
            "bound: weights alone",
            "in all",
            "bound",
            "monoliths beyond weights, MiB",
            "one trunk, MiB",
        ],
        table,
    )
    lab.target_table(results["targets"])


def main() -> None:
    parser = arguments(__doc__, model="resnet50")
    parser.add_argument("--tasks", help="how many, such as 1,2,4,8,12,20")
    parser.add_argument("--share", type=float, default=0.75, help="of a network's bytes")
    parser.add_argument("--p99", type=float, help="ms; default 20, on a CPU 5 times one request's")
    parser.add_argument("--max-batch", type=int, help="of every block; default 32, on a CPU 8")
    parser.add_argument("--seconds", type=float, help="of one measurement")
    parser.add_argument("--channels-last", action="store_true", help="of every block")
    options = parser.parse_args()
    if options.mps == "on":
        parser.error("each side is one worker, which needs no MPS; leave --mps out")
    wanted = options.tasks or ("1,8" if options.quick else "1,2,4,8,12,20")
    counts = [int(each) for each in wanted.split(",")]
    with Lab("sharing-tasks", options) as lab:
        load = Load(
            options.max_batch or (32 if lab.gpu else 8),
            options.seconds or (1.0 if options.quick else 3.0),
            options.p99 or (20.0 if lab.gpu else None),
            8 if options.quick else 12,
        )
        lab.say(f"building {max(counts)} tasks")
        source = lab.source()
        family = families.build(source, lab.store, max(counts), options.share, 0, wholes=True)
        bare = context.measured(lab)
        # This process's own context, if anything of it should come to need one, is not a side's.
        context.warm(lab.device, lab.precision)
        rows = []
        for count in counts:
            tasks = family.tasks[:count]
            found = measure(lab, tasks, load)
            memory = families.memory(
                {name: each["bytes"] for name, each in found.items()}, bare, family, tasks
            )
            rows.append({"tasks": count, "found": found, "memory": memory})
        results = {
            "model": options.model,
            "share": family.share,
            "max_batch": load.batch,
            "clients": load.clients,
            "memory": "device memory by NVML" if lab.gpu else "host memory (PSS)",
            "context_bytes": bare,
            "rows": rows,
            "targets": lab.judged(targets(rows)),
        }
        report(lab, results)
        figures.sharing(lab.figure, results)
        lab.write(results)


if __name__ == "__main__":
    main()
