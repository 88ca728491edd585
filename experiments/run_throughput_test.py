"""Throughput of a network in blocks, beside the whole network.

    python experiments/run_throughput_test.py --model resnet50 --blocks 4 --device cuda:0 --out DIR

Three loads, host tensors in and out:

    clients   1 to 10 synchronous clients, each sending when it has its answer; also through the
              gateway, over HTTP
    arrivals  Poisson arrivals at rates from a tenth to one and a half times what 16 synchronous
              clients get; the knee is the highest rate of which 95 % was answered in time with a
              p99 of at most 5 times the p50 at the lowest rate
    batches   requests of 1 to 256 rows, 4 synchronous clients

Blocks compute one request at a time or, where it says batching, as many together as wait.
Writes throughput.json and throughput.png.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import figures
import networks
import numpy as np
from client import ANSWERED, Requests, Run, closed_loop, poisson
from lab import Lab, arguments, at_least, shuffled
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

from blockflow.client import InferenceClient

_SATURATING = 16
_WARM = 4
_PATIENCE = 5.0


def summary(run: Run, rows: int) -> dict[str, float]:
    times = np.asarray(run.ms)
    p50, p99 = np.percentile(times, [50, 99])
    return {
        "per_second": len(run.ms) * rows / run.seconds,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "requests": len(run.ms),
        "max_difference": run.difference,
    }


def for_seconds(
    variants: Variants, name: str, requests: Requests, clients: int, seconds: float
) -> Run:
    """So many synchronous clients for about so many seconds."""
    variant = variants.all[name]
    trial = closed_loop(variant, requests, "host", 4 * clients, clients)
    count = max(8 * clients, round(seconds / trial.seconds * len(trial.ms)))
    return closed_loop(variant, requests, "host", count, clients)


def over_http(url: str, pipeline: str, requests: Requests, clients: int, seconds: float) -> Run:
    """Synchronous clients of the gateway, each in a thread of this process, with connections and
    everything behind them warm."""
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(clients))
        open_clients = [stack.enter_context(InferenceClient(url)) for _ in range(clients)]

        def ask(client: InferenceClient, end: float, fewest: int) -> list[float]:
            mine: list[float] = []
            while len(mine) < fewest or time.monotonic() < end:
                start = time.monotonic()
                client.infer(pipeline, requests.host[len(mine) % len(requests.host)])
                mine.append((time.monotonic() - start) * 1e3)
            return mine

        def all_ask(end: float, fewest: int) -> list[float]:
            asking = [pool.submit(ask, client, end, fewest) for client in open_clients]
            return [ms for each in asking for ms in each.result()]

        all_ask(0, _WARM)
        begin = time.monotonic()
        times = all_ask(begin + seconds, 1)
        return Run(time.monotonic() - begin, times, 0.0)


def knee(arrivals: Sequence[Mapping[str, Any]]) -> float | None:
    """The highest rate that is answered in time, in requests a second."""
    usual = arrivals[0]["p50_ms"]
    held = [
        each["offered"]
        for each in arrivals
        if each["kept_up"] >= ANSWERED and each["p99_ms"] <= _PATIENCE * usual
    ]
    return max(held, default=None)


def loads(
    lab: Lab, variants: Variants, *, clients: Sequence[int], rates: Sequence[float], seconds: float
) -> dict[str, dict[str, Any]]:
    """Clients and arrivals, for every variant."""
    rows = 1
    inputs = [networks.arrays(variants.source.inputs, rows, seed) for seed in range(4)]
    requests = Requests(inputs, variants.whole, lab.device)
    found: dict[str, dict[str, Any]] = {
        name: {"clients": {}, "gateway": {}, "arrivals": []} for name in variants.all
    }
    names = list(variants.all)
    for count in clients:
        for name in shuffled(names, 1, count):
            run = for_seconds(variants, name, requests, count, seconds)
            found[name]["clients"][count] = summary(run, rows)
            if name in variants.pipelines:
                served = over_http(
                    variants.house.url, variants.pipelines[name], requests, count, seconds
                )
                found[name]["gateway"][count] = summary(served, rows)
        lab.say(f"{count} clients: done")
    for name in shuffled(names, 1, _SATURATING):
        run = for_seconds(variants, name, requests, _SATURATING, seconds)
        found[name]["saturated"] = summary(run, rows)
    for turn, rate in enumerate(rates):
        for name in shuffled(names, 1, turn):
            variant = variants.all[name]
            offered = rate * found[name]["saturated"]["per_second"]
            run = poisson(
                lambda number, variant=variant: variant.send(
                    number, requests.inputs(number, "host")
                ),
                variant.poll,
                offered,
                seconds,
                requests.difference,
            )
            found[name]["arrivals"].append(
                {"offered": offered, "kept_up": run.kept_up, **summary(run, rows)}
            )
        lab.say(f"arrivals at {rate:g} of what saturates: done")
    for each in found.values():
        each["knee"] = knee(each["arrivals"])
        each["peak"] = max(
            each["saturated"]["per_second"], *(a["per_second"] for a in each["arrivals"])
        )
    return found


def batches(
    lab: Lab, variants: Variants, sizes: Sequence[int], seconds: float
) -> dict[str, dict[int, dict[str, float]]]:
    # Of BlockFlow's variants those whose blocks take so many rows; the others take any number.
    names = [PICKLED, *(name for name, kind in variants.kinds.items() if kind.rows > 1)]
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    for rows in sizes:
        inputs = [networks.arrays(variants.source.inputs, rows, seed) for seed in range(2)]
        requests = Requests(inputs, variants.whole, lab.device)
        for name in shuffled(names, 1, rows):
            run = for_seconds(variants, name, requests, 4, seconds)
            found[name][rows] = summary(run, rows)
        lab.say(f"batches of {rows}: done")
    return found


def targets(lab: Lab, found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    def peak(name: str) -> float | None:
        return found[name]["peak"] if name in found else None

    slow, whole = peak(PICKLED), peak(best(MONOLITH, lab.gpu))
    made = []
    for base in (FOUR, FUSED):
        for suffix in ("", BATCHING):
            name = best(base, lab.gpu) + suffix
            mine = peak(name)
            if mine is not None and slow is not None and whole is not None:
                made.append(at_least(f"peak: {name} / pickled", 4, mine / slow))
                made.append(at_least(f"peak: {name} / monolith", 1, mine / whole))
    return made


def report(lab: Lab, results: Mapping[str, Any]) -> None:
    def number(value: float | None) -> str:
        return "none" if value is None else f"{value:.1f}"

    counts = list(next(iter(results["loads"].values()))["clients"])
    table = [
        [
            name,
            *(f"{each['clients'][c]['per_second']:.1f}" for c in counts),
            f"{each['saturated']['per_second']:.1f}",
            f"{each['saturated']['p99_ms']:.1f}",
            number(each["knee"]),
            number(each["peak"]),
        ]
        for name, each in results["loads"].items()
    ]
    columns = [*(f"{c} clients" for c in counts), f"{_SATURATING} clients", "p99 ms"]
    lab.table("inferences/s, one row each", ["variant", *columns, "knee", "peak"], table)
    served = [
        [name, *(f"{each['gateway'][c]['per_second']:.1f}" for c in counts)]
        for name, each in results["loads"].items()
        if each["gateway"]
    ]
    lab.table(
        "inferences/s through the gateway, over HTTP",
        ["variant", *(f"{c} clients" for c in counts)],
        served,
    )
    sizes = list(next(iter(results["batches"].values()), {}))
    table = [
        [name, *(f"{each[rows]['per_second']:.1f}" for rows in sizes)]
        for name, each in results["batches"].items()
    ]
    lab.table("rows/s by rows of a request", ["variant", *map(str, sizes)], table)
    lab.target_table(results["targets"])


def main() -> None:
    parser = arguments(__doc__, model="resnet50")
    parser.add_argument("--batches", help="rows of a request, such as 1,4,16,64,256")
    parser.add_argument("--clients", help="how many synchronous clients, such as 1,2,4,10")
    parser.add_argument("--rates", help="of what saturates, such as 0.1,0.5,0.9,1.2")
    parser.add_argument("--seconds", type=float, help="of one measurement")
    options = parser.parse_args()
    quick = options.quick

    def numbers(text: str | None, short: str, full: str) -> list[float]:
        return [float(each) for each in (text or (short if quick else full)).split(",")]

    sizes = [int(n) for n in numbers(options.batches, "1,8", "1,2,4,8,16,32,64,128,256")]
    clients = [int(n) for n in numbers(options.clients, "1,4", "1,2,3,4,6,8,10")]
    rates = numbers(options.rates, "0.1,0.7,1.1", "0.1,0.3,0.5,0.6,0.7,0.8,0.9,1,1.1,1.3,1.5")
    seconds = options.seconds or (0.7 if quick else 3.0)
    with Lab("throughput", options) as lab:
        blocks = {best(FOUR, lab.gpu), best(FUSED, lab.gpu)}
        whole = {best(MONOLITH, lab.gpu)}
        others = {PICKLED} if quick else {PICKLED, RAW, HANDLE, FOUR, ONE, MONOLITH}
        most = max(_SATURATING, *sizes)
        batched = batching(kinds(lab, blocks), most)
        chosen = [*kinds(lab, (others | blocks) - whole), *kinds(lab, whole, most), *batched]
        with Variants(lab, chosen) as variants:
            found = loads(lab, variants, clients=clients, rates=rates, seconds=seconds)
            large = batches(lab, variants, sizes, seconds)
        results = {
            "model": options.model,
            "blocks": options.blocks,
            "loads": found,
            "batches": large,
            "targets": lab.judged(targets(lab, found)),
        }
        report(lab, results)
        figures.throughput(lab.figure, results)
        lab.write(results)


if __name__ == "__main__":
    main()
