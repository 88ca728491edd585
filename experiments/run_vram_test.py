"""Memory of many tasks of which most have most of their layers in common.

    python experiments/run_vram_test.py --model resnet152 --tasks 20 --device cuda:0 --out DIR

60, 90 and 95 % of the tasks share 75 % of their bytes. Device memory is the growth of what NVML
says is used on the whole GPU (so nobody else may use it meanwhile), with everything loaded
(with CUDA graphs for --runner graph) and every task asked once, of:

    one monolith process for each task (--processes of them are measured; more is extrapolated)
    all monoliths in one process
    BlockFlow, one worker for each block
    BlockFlow, one worker for all blocks

beside the arithmetic bound of what sharing weights can save, f s (1 - 1 / (f N)). On a CPU, host
memory instead (proportional set size), under its own name. Writes vram.json and vram.png.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import context
import families
import figures
import networks
import numpy as np
import torch
from deployed import House
from families import Family, Task
from lab import MIB, Lab, Memory, arguments, at_least, at_most

from blockflow.artifact import Store
from blockflow.child import die_with_parent
from blockflow.client import InferenceClient
from blockflow.topology import Precision

ROWS = 1


def _monoliths(
    store: Path,
    tasks: Sequence[Task],
    device: str,
    how: str,
    precision: Precision,
    inputs: Mapping[str, Any],
    parent: int,
    control: Connection,
) -> None:
    """A process with these tasks, each loaded by itself and asked once; ends when told."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    context.warm(device, precision)
    loaded = [families.monolith(Store(store), task, ROWS, device, how, precision) for task in tasks]
    answers = []
    for chain in loaded:
        here = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
        answers.append(next(iter(chain(here).values())).cpu().numpy())
    control.send(answers)
    control.recv()


@contextmanager
def monoliths(
    lab: Lab, groups: Sequence[Sequence[Task]], inputs: Mapping[str, Any]
) -> Iterator[tuple[list[int], list[Any]]]:
    """A process for each group; gives their pids and all answers."""
    spawn = mp.get_context("spawn")
    running = []
    for group in groups:
        mine, theirs = spawn.Pipe()
        process = spawn.Process(
            target=_monoliths,
            args=(
                lab.store.root,
                group,
                lab.device,
                lab.options.runner,
                lab.precision,
                inputs,
                os.getpid(),
                theirs,
            ),
            daemon=True,
        )
        process.start()
        theirs.close()
        running.append((process, mine))
    try:
        answers = [answer for _, control in running for answer in control.recv()]
        yield [int(process.pid or 0) for process, _ in running], answers
    finally:
        for process, control in running:
            control.send(None)
            process.join(20)
            process.kill()


def deployed(
    lab: Lab,
    family: Family,
    tasks: Sequence[Task],
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> tuple[int, list[Any]]:
    """Bytes that a server with these tasks takes, and every task's answer, through the gateway."""
    memory = Memory(lab)
    # The least that a server needs: one row at a time, few requests under way.
    settings = {
        "max_batch": ROWS,
        "precision": lab.precision,
        "cuda_graph": lab.options.runner == "graph",
        **settings,
    }
    wanted = families.topology(lab.store, tasks, lab.device, settings, lab.devices())
    house = House(wanted, lab.new_folder() / "house")
    try:
        house.wait_ready()
        with InferenceClient(house.url) as client:
            answers = [next(iter(client.infer(task.name, inputs).values())) for task in tasks]
        taken = memory.taken(house.pid)
    finally:
        house.close()
    memory.settle()
    return taken, answers


def difference(found: Sequence[Any], expected: Sequence[Any]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


def distribution(
    lab: Lab, family: Family, fraction: float, inputs: Mapping[str, Any], apart: Mapping[str, Any]
) -> dict[str, Any]:
    """All that is measured of one distribution of shared trunks."""
    tasks = family.distribution(fraction)
    bare = apart["context_bytes"]
    lab.say(f"{fraction:.0%} share: all monoliths in one process")
    memory = Memory(lab)
    with monoliths(lab, [tasks], inputs) as (pids, expected):
        one_process = memory.taken(pids[0])
    memory.settle()
    found: dict[str, Any] = {}
    variants: dict[str, dict[str, Any]] = {
        "one worker for each block": {},
        "one worker for all blocks": {"worker": "all"},
    }
    for name, settings in variants.items():
        lab.say(f"{fraction:.0%} share: {name}")
        taken, answers = deployed(lab, family, tasks, inputs, settings)
        found[name] = {
            "bytes": taken,
            "saved": 1 - taken / one_process,
            "saved_beyond_context": 1 - (taken - bare) / (one_process - bare),
            "saved_against_processes": 1 - taken / apart["bytes"],
            "max_difference": difference(answers, expected),
        }
    bound = family.bound(fraction)
    weights = len(tasks) * family.task_bytes
    return {
        "fraction": fraction,
        "sharing": sum(task.trunk == tasks[0].trunk for task in tasks),
        "share": family.share,
        "bound": bound,
        "weights_apart_bytes": weights,
        "weights_shared_bytes": family.unique_bytes(tasks),
        "weights_saved": 1 - family.unique_bytes(tasks) / weights,
        "one_process_bytes": one_process,
        "blockflow": found,
    }


def processes(lab: Lab, family: Family, inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """One monolith process for each task, `count` of them measured."""
    bare = context.measured(lab)
    lab.say(f"{count} monolith processes")
    memory = Memory(lab)
    with monoliths(lab, [[task] for task in family.tasks[:count]], inputs) as (pids, _):
        taken = memory.taken(0) if lab.gpu else sum(memory.taken(pid) for pid in pids)
    memory.settle()
    every = len(family.tasks)
    return {
        "context_bytes": bare,
        "measured": count,
        "measured_bytes": taken,
        "bytes": taken / count * every,
        "extrapolated": count < every,
    }


def targets(lab: Lab, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for row in rows:
        one = row["blockflow"]["one worker for all blocks"]
        each = row["blockflow"]["one worker for each block"]
        title = f"{row['fraction']:.0%} share"
        for key, what in (("saved", ""), ("saved_beyond_context", ", beyond one context")):
            part = one[key] / row["bound"] if lab.gpu else None
            made.append(at_least(f"{title}: one worker saves, of the bound{what}", 0.9, part))
        made.append(
            at_most(
                f"{title}: one worker for each block / all monoliths in one process",
                1,
                each["bytes"] / row["one_process_bytes"] if lab.gpu else None,
            )
        )
    return made


def report(lab: Lab, results: Mapping[str, Any]) -> None:
    apart = results["processes"]
    how = "extrapolated" if apart["extrapolated"] else "measured"
    table = []
    for row in results["rows"]:
        title = f"{row['sharing']} of {results['tasks']} share {row['share']:.1%}"

        def line(name: str, size: float, *cells: str, title: str = title) -> None:
            table.append([f"{title}: {name}", f"{size / MIB:.0f}", *cells])

        line(
            f"a process for each task ({how} from {apart['measured']})", apart["bytes"], "", "", ""
        )
        line("all monoliths in one process", row["one_process_bytes"], "", "", "")
        for name, found in row["blockflow"].items():
            saved = f"{found['saved']:.2%}", f"{found['saved_beyond_context']:.2%}"
            line(name, found["bytes"], *saved, f"{found['max_difference']:.1e}")
        line("weights alone", row["weights_shared_bytes"], f"{row['weights_saved']:.2%}", "", "")
        table.append([f"{title}: bound", "", f"{row['bound']:.2%}", "", ""])
    columns = [f"{results['tasks']} {results['model']} tasks", f"{results['memory']}, MiB"]
    columns += ["saved of one process", "beyond one context", "max diff"]
    lab.table(f"memory; one context takes {apart['context_bytes'] / MIB:.0f} MiB", columns, table)
    lab.target_table(results["targets"])


def main() -> None:
    parser = arguments(__doc__, model="resnet152")
    parser.add_argument("--tasks", type=int, help="20, or 8 in a quick run")
    parser.add_argument(
        "--runner", default="eager", choices=("eager", "graph"), help="of blocks and monoliths"
    )
    parser.add_argument("--share", type=float, default=0.75, help="of a network's bytes")
    parser.add_argument("--fractions", help="of the tasks that share, such as 0.6,0.9,0.95")
    parser.add_argument("--processes", type=int, help="monolith processes to measure")
    options = parser.parse_args()
    options.tasks = options.tasks or (8 if options.quick else 20)
    wanted = options.fractions or ("0.95" if options.quick else "0.6,0.9,0.95")
    fractions = [float(each) for each in wanted.split(",")]
    count = options.processes or (2 if options.quick else options.tasks)
    with Lab("vram", options) as lab:
        if not lab.gpu:
            lab.leave_out("device memory", "there is no GPU; host memory is measured instead")
        own = options.tasks - round(min(fractions) * options.tasks)
        lab.say(f"building {options.tasks} tasks, {own} of them with trunks of their own")
        source = lab.source()
        family = families.build(source, lab.store, options.tasks, options.share, own)
        inputs = networks.arrays(source.inputs, ROWS, 0)
        apart = processes(lab, family, inputs, min(count, options.tasks))
        rows: list[dict[str, Any]] = []
        for fraction in fractions:
            rows.append(distribution(lab, family, fraction, inputs, apart))
            rows.sort(key=lambda row: row["fraction"])
            # Each takes minutes: what is known is kept, whatever becomes of the next.
            results = {
                "model": options.model,
                "tasks": options.tasks,
                "runner": options.runner,
                "memory": "device memory by NVML" if lab.gpu else "host memory (PSS)",
                "processes": apart,
                "rows": rows,
                "targets": lab.judged(targets(lab, rows)),
            }
            figures.vram(lab.figure, results)
            lab.write(results)
        report(lab, results)


if __name__ == "__main__":
    main()
