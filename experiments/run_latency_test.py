"""Latency and communication overhead of a network in blocks, beside the whole network.

    python experiments/run_latency_test.py --model resnet50 --blocks 4 --device cuda:0 --out DIR

Communication overhead of a request is its time from end to end less the time that the blocks
compute: the mean, over the same rounds, of each block run by itself in one process, the device
synchronised before and after, with the same runner (eager, or a CUDA graph). Where all variants can
tell how long their own blocks computed (on a CPU), that is used instead, request by request.
Writes latency.json and latency.png.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import figures
import networks
from client import Requests, Sample, one_by_one
from lab import Lab, arguments, at_least, at_most, shuffled, statistics
from variants import FOUR, FUSED, ONE, PICKLED, RAW, Variants, best, kinds

ROWS = 1
_LEAST_MS = 1e-3
"""An overhead below this counts as this: eager launches that overlap with computing have none."""


def measure(
    lab: Lab, variants: Variants, requests: Requests, sides: Sequence[str]
) -> dict[str, Any]:
    options = lab.options
    samples: dict[tuple[str, str], list[Sample]] = {
        (name, side): [] for name in variants.all for side in sides
    }
    chains = {how: variants.chain(how, ROWS) for how in lab.runners}
    alone: dict[str, list[list[float]]] = {how: [] for how in lab.runners}
    for name, variant in variants.all.items():  # warm: channels, allocators, caches
        for side in sides:
            warm = list(one_by_one(variant, requests, side, options.requests))
            lab.say(f"{name}, {side}: warm, {warm[-1].ms:.2f} ms")
    for name in shuffled([*variants.all, None], options.rounds):
        if name is None:
            for how, chain in chains.items():
                alone[how] += [chain.times(requests.tensors(n)) for n in range(options.requests)]
            continue
        for side in sides:
            samples[name, side] += one_by_one(variants.all[name], requests, side, options.requests)
    return {"samples": samples, "alone": alone}


def summarised(lab: Lab, variants: Variants, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each variant and side."""
    alone = {
        how: [statistics(block) for block in zip(*runs, strict=True)]
        for how, runs in found["alone"].items()
    }
    rows = []
    for (name, side), samples in found["samples"].items():
        how = variants.kinds[name].how
        reference = sum(block["mean"] for block in alone[how])
        by_reference = [s.ms - reference for s in samples]
        in_situ = [s.ms - sum(s.compute) for s in samples if s.compute]
        inside = [statistics(block) for block in zip(*(s.compute for s in samples), strict=True)]
        chosen = by_reference if lab.gpu else in_situ
        rows.append(
            {
                "variant": name,
                "side": side,
                "runner": how,
                "end_to_end_ms": statistics([s.ms for s in samples]),
                "overhead_ms": statistics(chosen),
                "overhead_in_situ_ms": statistics(in_situ) if in_situ else None,
                "overhead_against_reference_ms": statistics(by_reference),
                "compute_in_situ_ms": inside,
                "hop_ms": statistics(chosen)["mean"] / (lab.options.blocks + 1),
                "max_difference": max(s.difference for s in samples),
                "overheads": [round(value, 4) for value in chosen],
            }
        )
    return rows


def targets(lab: Lab, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    side = "device" if lab.gpu else "host"

    def of(variant: str, what: str, value: str = "mean") -> float | None:
        for row in rows:
            if row["variant"] == variant and row["side"] == side:
                return float(row[what][value])
        return None

    def ratio(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a / max(b, _LEAST_MS)

    four, one, fused = (best(name, lab.gpu) for name in (FOUR, ONE, FUSED))
    pickled, raw = of(PICKLED, "overhead_ms"), of(RAW, "overhead_ms")
    slow, same = of(PICKLED, "end_to_end_ms"), of(best(PICKLED, lab.gpu), "end_to_end_ms")
    return [
        at_least("overhead: pickled / four workers", 20, ratio(pickled, of(four, "overhead_ms"))),
        at_least("overhead: raw frames / four workers", 10, ratio(raw, of(four, "overhead_ms"))),
        at_most(
            "overhead of four workers: p99 / p50",
            1.5,
            ratio(of(four, "overhead_ms", "p99"), of(four, "overhead_ms", "p50")),
        ),
        at_least("overhead: pickled / one worker", 50, ratio(pickled, of(one, "overhead_ms"))),
        at_least("overhead: pickled / one fused", 50, ratio(pickled, of(fused, "overhead_ms"))),
        at_least(
            "end to end: pickled eager / four workers", 5, ratio(slow, of(four, "end_to_end_ms"))
        ),
        at_least(
            "end to end: pickled / four workers, same runner",
            3,
            ratio(same, of(four, "end_to_end_ms")),
        ),
    ]


def report(lab: Lab, results: Mapping[str, Any]) -> None:
    for side in dict.fromkeys(row["side"] for row in results["rows"]):
        table = []
        for row in results["rows"]:
            if row["side"] != side:
                continue
            end, over = row["end_to_end_ms"], row["overhead_ms"]
            table.append(
                [
                    row["variant"],
                    f"{end['mean']:.2f} ± {end['sigma']:.2f}",
                    f"{end['p50']:.2f}",
                    f"{end['p99']:.2f}",
                    f"{over['mean']:.3f} ± {over['sigma']:.3f}",
                    f"{over['p50']:.3f}",
                    f"{over['p99']:.3f}",
                    f"{row['hop_ms']:.3f}",
                    f"{row['max_difference']:.1e}",
                ]
            )
        columns = ["variant", "end to end", "p50", "p99", "overhead", "p50", "p99", "per hop"]
        lab.table(
            f"{lab.options.model} in {lab.options.blocks} blocks, {side} tensors in and out, ms",
            [*columns, "max diff"],
            table,
        )
    blocks = [
        [
            how,
            *(f"{b['mean']:.3f} ± {b['sigma']:.3f} ({b['p50']:.3f}, {b['p99']:.3f})" for b in each),
        ]
        for how, each in results["alone_ms"].items()
    ]
    names = [f"block {i + 1}" for i in range(lab.options.blocks)]
    lab.table("each block by itself, ms: mean ± σ (p50, p99)", ["runner", *names], blocks)
    lab.target_table(results["targets"])


def main() -> None:
    parser = arguments(__doc__, model="resnet50")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--requests", type=int, default=10, help="of one variant in a round")
    options = parser.parse_args()
    options.rounds = options.rounds or (10 if options.quick else 50)
    with Lab("latency", options) as lab:
        if not lab.gpu:
            lab.leave_out("CUDA graphs", "there is no GPU")
            lab.leave_out("tensors on the device in and out", "there is no GPU")
        sides = ("host", "device") if lab.gpu else ("host",)
        with Variants(lab, kinds(lab), sides) as variants:
            inputs = [networks.arrays(variants.source.inputs, ROWS, seed) for seed in range(4)]
            requests = Requests(inputs, variants.whole, lab.device)
            found = measure(lab, variants, requests, sides)
        rows = summarised(lab, variants, found)
        results = {
            "model": options.model,
            "blocks": options.blocks,
            "rows": rows,
            "largest_output": requests.largest,
            "alone_ms": {
                how: [statistics(block) for block in zip(*runs, strict=True)]
                for how, runs in found["alone"].items()
            },
            "targets": lab.judged(targets(lab, rows)),
        }
        report(lab, results)
        figures.overheads(lab.figure, results)
        lab.write(results)


if __name__ == "__main__":
    main()
