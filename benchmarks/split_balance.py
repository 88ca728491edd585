"""How even the blocks of a split are, and what splitting takes.

    python benchmarks/split_balance.py                   # docs/results/split-cpu.{md,json}: minutes
    python benchmarks/split_balance.py --device cuda:0 --rows 1 --precision tf32 \\
        --output /tmp/split-cuda

Balance: ResNet-50 in four blocks, cut once by modelled costs and once by costs measured on this
device with these rows and this precision, loaded from the store and timed block by block: the
slowest against the average. On a CPU each block is called, again and again, and the host's clock is
read. On a GPU each is prepared by `blockflow.runner` and takes turns with the others, so that it
finds the caches as they leave them; device events stand around the copy of its inputs and the
replay of its CUDA graph, on a stream that is held back until all four are enqueued, so that no
launch is waited for. Every block's times are in the JSON.

Cost: ResNet-152 in eight blocks, in a process of its own; seconds by the host's clock, and how far
the peak of resident memory lies above what the process held with everything imported and no model
made. So it counts the model, and whatever torch loads when it exports for the first time.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import measured
import torch
from torch import Tensor

from blockflow.artifact import Store
from blockflow.cuts import port_bytes
from blockflow.export import example
from blockflow.measure import ROWS, Measure
from blockflow.models import resolve
from blockflow.program import Program, load
from blockflow.runner import prepare
from blockflow.split import split_model
from blockflow.topology import Precision
from blockflow.wiring import by_rule

_WARM = 3
_AHEAD_CYCLES = 20_000_000  # about ten milliseconds on current GPUs


def balance(run: Measure, runs: int, by: Measure | None, folder: Path) -> dict[str, Any]:
    """Milliseconds of each of four ResNet-50 blocks, run as `run` says, cut by costs of `by`."""
    source = resolve("resnet50")
    store = Store(folder, create=True)
    result = split_model(source, 4, store, measure=by)
    programs = [
        load(store, block.digest, run.device, precision=run.precision) for block in result.blocks
    ]
    x = {"x": example(source.inputs[0], run.rows).to(run.device)}  # type: ignore[union-attr]
    inputs = taken(programs, x)
    if run.device == "cpu":
        times = [
            called(program, given, runs) for program, given in zip(programs, inputs, strict=True)
        ]
        runners = ["called"] * 4
    else:
        times, runners = replayed(programs, inputs, run.rows, runs)
    each = [statistics.median(those) for those in times]
    return {
        "costs": f"measured on {by}" if by else "modelled",
        "rows": run.rows,
        "precision": run.precision,
        "blocks": [
            {
                "last": block.manifest.origin.last,
                "ms": median,
                "times_ms": those,
                "runner": runner,
                "tensors": len(block.manifest.outputs),
                "row_bytes": sum(map(port_bytes, block.manifest.outputs)),
            }
            for block, median, those, runner in zip(
                result.blocks, each, times, runners, strict=True
            )
        ],
        "slowest_over_average": max(each) / statistics.mean(each),
    }


def taken(programs: Sequence[Program], first: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What each program of a chain takes, where the first takes `first`."""
    found = [first]
    for before, after in itertools.pairwise(programs):
        outputs = before(found[-1])
        wires = by_rule(before.manifest.outputs, after.manifest.inputs)
        found.append({mine: outputs[theirs].clone() for mine, theirs in wires.items()})
    return found


def called(program: Program, inputs: dict[str, Tensor], runs: int) -> list[float]:
    """Milliseconds of each call on a CPU."""
    for _ in range(_WARM):
        program(inputs)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        program(inputs)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def replayed(
    programs: Sequence[Program], inputs: Sequence[dict[str, Tensor]], rows: int, runs: int
) -> tuple[list[list[float]], list[str]]:
    """Milliseconds of the GPU that each program takes in each of `runs` rounds, and how it is run:
    by its runner, on one stream."""
    device = programs[0].device
    times: list[list[float]] = [[] for _ in programs]
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        runners = [prepare(program, rows) for program in programs]
        for number in range(_WARM + runs):
            torch.cuda.synchronize()
            torch.cuda._sleep(_AHEAD_CYCLES)
            events = []
            for runner, given in zip(runners, inputs, strict=True):
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                began.record()
                runner.take({name: [tensor] for name, tensor in given.items()})
                runner.run()
                ended.record()
                events.append((began, ended))
            torch.cuda.synchronize()
            if number >= _WARM:
                for those, (began, ended) in zip(times, events, strict=True):
                    those.append(began.elapsed_time(ended))
    return times, [f"{runner.kind} ({runner.reason})" for runner in runners]


def splitting(folder: Path) -> dict[str, float]:
    """What splitting ResNet-152 into eight takes; to be called in a fresh process."""
    gc.collect()
    # Not getrusage: its peak is that of the parent where that was higher, even after exec.
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until here
    before = resident("VmRSS")
    source = resolve("resnet152")
    model = sum(t.nbytes for t in source.module.state_dict().values())  # type: ignore[union-attr]
    start = time.perf_counter()
    split_model(source, 8, Store(folder / "store", create=True))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak_bytes": resident("VmHWM") - before,
        "before_bytes": before,
        "model_bytes": model,
    }


def resident(key: str) -> int:
    """Bytes of this process's resident memory: now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def report(found: dict[str, Any]) -> str:
    where = found["conditions"]
    hardware = where.get("gpu", where["cpu"])
    lines = [
        "# Splitting: balance, time and memory",
        "",
        f"{hardware}; torch {where['torch']}; commit {where['commit']}; {where['date']}.",
        "Made by `benchmarks/split_balance.py`.",
        "",
        (
            f"ResNet-50 in four blocks, batches of {found['rows']} in {found['precision']}, "
            f"medians of {found['runs']} times in milliseconds:"
        ),
        "",
        "| costs | block 1 | block 2 | block 3 | block 4 | slowest / average |",
        "|---|---|---|---|---|---|",
    ]
    for each in found["balance"]:
        times = " | ".join(f"{block['ms']:.3g}" for block in each["blocks"])
        lines.append(f"| {each['costs']} | {times} | {each['slowest_over_average']:.2f} |")
    if any(
        block["runner"].startswith("eager") for each in found["balance"] for block in each["blocks"]
    ):
        lines += ["", "Some blocks could not be captured and were called: the JSON says why."]
    if "splitting" in found:
        took = found["splitting"]
        ratio = took["peak_bytes"] / took["model_bytes"]
        model = f"{took['model_bytes'] / 1e6:.0f} MB"
        lines += [
            "",
            (
                f"ResNet-152 in eight blocks: {took['seconds']:.1f} s; at the peak {ratio:.2f} "
                f"times the model's {model} more memory than before the model was made, when the "
                f"process held {took['before_bytes'] / 1e6:.0f} MB."
            ),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=ROWS, help="of a batch")
    parser.add_argument("--precision", default="fp32", choices=get_args(Precision))
    parser.add_argument("--runs", type=int, help="times of each block (15; on a GPU 200)")
    parser.add_argument("--output", type=Path, default=Path("docs/results/split-cpu"))
    parser.add_argument("--splitting", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.splitting is not None:
        print(json.dumps(splitting(options.splitting)))
        return
    runs = options.runs or (15 if options.device == "cpu" else 200)
    run = Measure(options.device, options.rows, options.precision)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {
            "conditions": measured.conditions(options.device),
            "rows": run.rows,
            "precision": run.precision,
            "runs": runs,
            "balance": [
                balance(run, runs, by, Path(folder) / name)
                for name, by in (("modelled", None), ("measured", run))
            ],
        }
        if options.device == "cpu":
            own = [sys.executable, __file__, "--splitting", folder]
            done = subprocess.run(own, capture_output=True, text=True, check=True)
            found["splitting"] = json.loads(done.stdout.splitlines()[-1])
    print(report(found))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(report(found), encoding="utf-8")
    measured.write(options.output.with_suffix(".json"), found)


if __name__ == "__main__":
    main()
