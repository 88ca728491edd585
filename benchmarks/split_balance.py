"""How even the blocks of a split are, and what splitting takes.

    python benchmarks/split_balance.py                   # docs/results/split-cpu.{md,json}: minutes
    python benchmarks/split_balance.py --device cuda:0 --output /tmp/split-cuda

Balance: ResNet-50 in four blocks, cut once by modelled and once by measured costs, loaded from the
store and timed block by block: the slowest against the average. Cost: ResNet-152 in eight blocks,
in a process of its own; seconds by the host's clock, and how far the peak of resident memory lies
above what the process held with everything imported and no model made. So it counts the model, and
whatever torch loads when it exports for the first time.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measured
import torch
from torch import Tensor

from blockflow.artifact import Store
from blockflow.cuts import ROWS
from blockflow.export import example
from blockflow.models import resolve
from blockflow.program import Program, load
from blockflow.split import split_model


def balance(device: str, rows: int, runs: int, by: str | None, folder: Path) -> dict[str, Any]:
    """Median milliseconds of each of four ResNet-50 blocks for a batch of `rows`."""
    source = resolve("resnet50")
    store = Store(folder, create=True)
    result = split_model(source, 4, store, device=by)
    programs = [load(store, block.digest, device) for block in result.blocks]
    values = {"x": example(source.inputs[0], rows).to(device)}  # type: ignore[union-attr]
    blocks = []
    for program, block in zip(programs, result.blocks, strict=True):
        times, values = timed(program, values, device, runs)
        blocks.append(
            {
                "last": block.manifest.origin.last,
                "ms": statistics.median(times),
                "tensors": len(block.manifest.outputs),
                "row_bytes": sum(t.nbytes for t in values.values()) // rows,
            }
        )
        names = [port.name for port in program.manifest.outputs]
        values = {f"{i}": values[name] for i, name in enumerate(names)}
        following = programs[len(blocks)].manifest.inputs if len(blocks) < 4 else ()
        values = dict(zip((port.name for port in following), values.values(), strict=False))
    each = [block["ms"] for block in blocks]
    return {
        "costs": f"measured on {by}" if by else "modelled",
        "rows": rows,
        "blocks": blocks,
        "slowest_over_average": max(each) / statistics.mean(each),
    }


def timed(
    program: Program, inputs: dict[str, Tensor], device: str, runs: int
) -> tuple[list[float], dict[str, Tensor]]:
    """Milliseconds of each call. On a GPU, of its stream alone: a CUDA graph, replayed."""
    for _ in range(3):
        outputs = program(inputs)
    times = []
    if not device.startswith("cuda"):
        for _ in range(runs):
            start = time.perf_counter()
            outputs = program(inputs)
            times.append((time.perf_counter() - start) * 1e3)
        return times, outputs
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = program(inputs)
    for _ in range(runs):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended))
    return times, outputs


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
        f"ResNet-50 in four blocks, batches of {ROWS}, medians in milliseconds:",
        "",
        "| costs | block 1 | block 2 | block 3 | block 4 | slowest / average |",
        "|---|---|---|---|---|---|",
    ]
    for each in found["balance"]:
        times = " | ".join(f"{block['ms']:.2f}" for block in each["blocks"])
        lines.append(f"| {each['costs']} | {times} | {each['slowest_over_average']:.2f} |")
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
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("docs/results/split-cpu"))
    parser.add_argument("--splitting", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.splitting is not None:
        print(json.dumps(splitting(options.splitting)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {
            "conditions": measured.conditions(options.device),
            "balance": [
                balance(options.device, ROWS, options.runs, by, Path(folder) / str(by))
                for by in (None, options.device)
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
