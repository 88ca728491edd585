"""Energy of an inference, as the GPU's own counter has it.

    python experiments/run_energy_test.py --model resnet50 --blocks 4 --device cuda:0 --out DIR

NVML's total energy counter is read before and after a fixed number of inferences, chosen so that
they take some seconds. The power of the idle GPU is measured the same way, before any process uses
it and again when all variants are loaded and wait; the latter, times the duration, is subtracted
for the net figure. One synchronous client, and enough of them to saturate (--clients), each for
every batch. Tensors come from the host and go back there. Writes energy.json and energy.png.
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
from client import Requests, Variant, closed_loop
from lab import Lab, arguments, at_least, at_most, interleaved
from variants import FOUR, FUSED, HANDLE, MONOLITH, ONE, PICKLED, RAW, Variants, best, kinds

_FEWEST = 8


def idle(lab: Lab, seconds: float) -> float | None:
    """Watts that the GPU takes when nobody asks it to compute."""
    if not lab.gpu:
        return None
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
    trial = closed_loop(variant, requests, "host", _FEWEST * clients, clients)
    count = max(_FEWEST, math.ceil(seconds / trial.seconds * len(trial.ms)))
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
    """The mean of several runs of one variant, weighted by nothing: they have equal counts."""

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

    four, one, whole = (best(name, lab.gpu) for name in (FOUR, FUSED, MONOLITH))
    made = []
    for name in (four, one):
        made += [
            at_least(
                f"one client: pickled / {name}",
                2.43,
                ratio(of(PICKLED, "one client"), of(name, "one client")),
            ),
            at_least(
                f"saturated: pickled / {name}",
                4,
                ratio(of(PICKLED, "saturated"), of(name, "saturated")),
            ),
            at_most(
                f"saturated: {name} / monolith",
                1,
                ratio(of(name, "saturated"), of(whole, "saturated")),
            ),
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
        "batch",
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
    default = [best(name, lab.gpu) for name in (FOUR, FUSED, MONOLITH)]
    chosen = {PICKLED, RAW, HANDLE, FOUR, ONE, MONOLITH, *default}
    if options.quick:
        chosen = {PICKLED, *default}
    with Variants(lab, kinds(lab, chosen, max(sizes))) as variants:
        found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
        loaded = idle(lab, seconds)
        for rows in sizes:
            inputs = [networks.arrays(variants.source.inputs, rows, seed) for seed in range(4)]
            requests = Requests(inputs, variants.whole, lab.device)
            for name, variant in variants.all.items():  # warm, at this size
                closed_loop(variant, requests, "host", 2 * _FEWEST, 2)
                lab.say(f"{name}: warm at batch {rows}")
            for name in interleaved(list(variants.all), rounds):
                for load, clients in (("one client", 1), ("saturated", options.clients)):
                    run = one_run(lab, variants.all[name], requests, clients, seconds, loaded)
                    found.setdefault((name, load, rows), []).append(run)
        again = idle(lab, seconds)
    rows_found = [
        {"variant": name, "load": load, "batch": batch, **merged(runs)}
        for (name, load, batch), runs in found.items()
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
