"""Energy of an inference, as the GPU's own counter has it.

    python experiments/run_energy_test.py --model resnet50 --blocks 4 --device cuda:0 --out DIR

NVML's total energy counter is read before and after a fixed number of inferences, chosen so that
they take some seconds. It is behind by a fraction of a second, so before each measurement comes a
pause, and then a stretch of the very load that is measured: what the counter has not seen at the
end is as much as it still had to count at the beginning. The power of the idle GPU is measured the
same way, before any process uses it and again when all variants are loaded and wait; the latter,
times the duration, is subtracted for the net figure.

One synchronous client, and enough of them to saturate (--clients), each for every number of rows.
Blocks compute one request at a time, as the baselines do, which is measured for requests of one
row; or, where it says batching, as many together as wait. Tensors come from the host and go back
there. Writes energy.json and energy.png.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import figures
import networks
from client import Requests, Variant, closed_loop, how_many
from lab import Lab, arguments, at_least, at_most, shuffled
from variants import (
    BATCHING,
    FOUR,
    FUSED,
    HANDLE,
    MONOLITH,
    ONE,
    PICKLED,
    RAW,
    Variants,
    batching,
    best,
    kinds,
)

_FEWEST = 8
_PAUSE = 0.5
_LEAD_IN = 0.3


def idle(lab: Lab, seconds: float) -> float | None:
    """Watts that the GPU takes when nobody asks it to compute."""
    if not lab.gpu:
        return None
    time.sleep(_PAUSE)
    joules, start = lab.gpu_now().energy_joules, time.monotonic()
    time.sleep(seconds)
    after, end = lab.gpu_now().energy_joules, time.monotonic()
    if joules is None or after is None:
        lab.leave_out("energy", "this GPU has no energy counter")
        return None
    return (after - joules) / (end - start)


def one_run(
    lab: Lab,
    variant: Variant,
    requests: Requests,
    clients: int,
    seconds: float,
    idle_watts: float | None,
) -> dict[str, Any]:
    """Energy and time of a fixed number of requests that take about `seconds`."""
    rows = len(next(iter(requests.host[0].values())))
    if lab.gpu:
        time.sleep(
            _PAUSE
        )  # what the counter has yet to count of the variant before is none of ours
    trial = closed_loop(variant, requests, "host", _FEWEST * clients, clients)
    each = trial.seconds / len(trial.ms)
    if lab.gpu and trial.seconds < _LEAD_IN:
        more = math.ceil((_LEAD_IN - trial.seconds) / each)
        closed_loop(variant, requests, "host", max(more, clients), clients)
    count = how_many(seconds, each)
    before = lab.gpu_now().energy_joules if lab.gpu else None
    start = time.monotonic()
    run = closed_loop(variant, requests, "host", count, clients)
    took = time.monotonic() - start
    after = lab.gpu_now().energy_joules if lab.gpu else None
    inferences = count * rows
    gross = net = None
    if before is not None and after is not None and idle_watts is not None:
        gross = (after - before) / inferences * 1e3
        net = gross - idle_watts * took / inferences * 1e3
    return {
        "requests": count,
        "seconds": took,
        "per_second": inferences / run.seconds,
        "ms_p50": statistics.median(run.ms),
        "gross_mj": gross,
        "net_mj": net,
        "max_difference": run.difference,
    }


def merged(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of several runs of one variant, weighted by nothing: they take about as long."""

    def mean(key: str) -> float | None:
        values = [run[key] for run in runs if run[key] is not None]
        return statistics.fmean(values) if values else None

    found = {key: mean(key) for key in ("per_second", "ms_p50", "gross_mj", "net_mj")}
    return {
        **found,
        "requests": sum(run["requests"] for run in runs),
        "seconds": sum(run["seconds"] for run in runs),
        "max_difference": max(run["max_difference"] for run in runs),
    }


def targets(lab: Lab, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    def of(variant: str, load: str) -> float | None:
        for row in rows:
            if (row["variant"], row["load"], row["batch"]) == (variant, load, 1):
                found: float | None = row["gross_mj"]
                return found
        return None

    def ratio(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a / b

    whole = best(MONOLITH, lab.gpu)
    made = []
    for base in (FOUR, FUSED):
        alone = best(base, lab.gpu)
        made.append(
            at_least(
                f"one client: pickled / {alone}",
                2.43,
                ratio(of(PICKLED, "one client"), of(alone, "one client")),
            )
        )
        for name in (alone, alone + BATCHING):
            mine = of(name, "saturated")
            made += [
                at_least(f"saturated: pickled / {name}", 4, ratio(of(PICKLED, "saturated"), mine)),
                at_most(f"saturated: {name} / monolith", 1, ratio(mine, of(whole, "saturated"))),
            ]
    return made


def report(lab: Lab, results: Mapping[str, Any]) -> None:
    def number(value: float | None, form: str) -> str:
        return "left out" if value is None else format(value, form)

    table = [
        [
            row["variant"],
            row["load"],
            str(row["batch"]),
            number(row["gross_mj"], ".1f"),
            number(row["net_mj"], ".1f"),
            f"{row['per_second']:.1f}",
            f"{row['ms_p50']:.2f}",
            f"{row['max_difference']:.1e}",
        ]
        for row in results["rows"]
    ]
    columns = [
        "variant",
        "load",
        "rows",
        "mJ",
        "mJ net of idle",
        "inferences/s",
        "ms p50",
        "max diff",
    ]
    lab.table("energy of an inference", columns, table)
    watts = {name: number(value, ".1f") for name, value in results["idle_watts"].items()}
    lab.console.print(f"idle power, W: {watts}")
    lab.target_table(results["targets"])


def main() -> None:
    parser = arguments(__doc__, model="resnet50")
    parser.add_argument("--batches", help="rows of a request, such as 1,2,4,8,16,32")
    parser.add_argument("--seconds", type=float, help="of one measurement")
    parser.add_argument("--rounds", type=int, help="in which the variants take turns")
    parser.add_argument("--clients", type=int, default=16, help="that saturate")
    options = parser.parse_args()
    batches = options.batches or ("1,8" if options.quick else "1,2,4,8,16,32")
    sizes = [int(each) for each in batches.split(",")]
    seconds = options.seconds or (1.0 if options.quick else 4.0)
    rounds = options.rounds or (1 if options.quick else 3)
    with Lab("energy", options) as lab:
        measure(lab, sizes, seconds, rounds, options)


def measure(
    lab: Lab, sizes: Sequence[int], seconds: float, rounds: int, options: argparse.Namespace
) -> None:
    if not lab.gpu:
        lab.leave_out("energy, gross and net, and idle power", "there is no GPU with a counter")
    nobody = idle(lab, seconds)
    loads = {"one client": 1, "saturated": options.clients}
    blocks = {best(name, lab.gpu) for name in (FOUR, FUSED)}
    batched = blocks if options.quick else {*blocks, FOUR, ONE}
    whole = {best(MONOLITH, lab.gpu)}
    others = {PICKLED} if options.quick else {PICKLED, RAW, HANDLE, MONOLITH}
    chosen = [
        *kinds(lab, (others | blocks) - whole),
        *kinds(lab, whole, max(sizes)),
        *batching(kinds(lab, batched), max(options.clients, *sizes)),
    ]
    with Variants(lab, chosen) as variants:
        found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
        loaded = idle(lab, seconds)
        for rows in sizes:
            inputs = [networks.arrays(variants.source.inputs, rows, seed) for seed in range(4)]
            requests = Requests(inputs, variants.whole, lab.device)
            # One row is all that blocks take which do not batch: for more, see those that do.
            names = [
                name
                for name in variants.all
                if name not in variants.pipelines or variants.kinds[name].rows >= rows
            ]
            for name in names:  # warm, at this size
                closed_loop(variants.all[name], requests, "host", 2 * _FEWEST, 2)
                lab.say(f"{name}: warm with {rows} rows")
            for name in shuffled(names, rounds, seed=rows):
                for load, clients in loads.items():
                    run = one_run(lab, variants.all[name], requests, clients, seconds, loaded)
                    found.setdefault((name, load, rows), []).append(run)
        again = idle(lab, seconds)
    rows_found = [
        {"variant": name, "load": load, "batch": rows, **merged(found[name, load, rows])}
        for rows in sizes
        for name in variants.all
        for load in loads
        if (name, load, rows) in found
    ]
    results = {
        "model": options.model,
        "blocks": options.blocks,
        "clients": options.clients,
        "idle_watts": {"no process": nobody, "all loaded": loaded, "all loaded, after": again},
        "rows": rows_found,
        "targets": lab.judged(targets(lab, rows_found)),
    }
    report(lab, results)
    figures.energy(lab.figure, results)
    lab.write(results)


if __name__ == "__main__":
    main()
