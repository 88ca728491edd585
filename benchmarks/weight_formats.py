"""Which way weights come onto a device faster: inside the program's file, or each in its own.

    python benchmarks/weight_formats.py                  # docs/results/weight-formats-cpu.{md,json}
    python benchmarks/weight_formats.py --device cuda:0 --output docs/results/weight-formats-gpu

Each model is stored as one block in two stores: with its weights inside `program.pt2`, and with
every weight in a safetensors file, as `blockflow split` stores them. Both are loaded by
`program.load`, as a worker loads them: every byte is checked, and the program stands ready on the
device. `torch.export.load` of the same file is shown beside them; it checks nothing and stops at
the CPU. The ways take turns; "cold" means that the kernel was told to drop the files' pages before
(posix_fadvise). Seconds by the host's clock, with the device synchronised at both ends.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measured
import torch
from torch import nn

from blockflow.archive import write_archive
from blockflow.artifact import PROGRAM_FILE, Port, Store
from blockflow.models import ModuleSource, resolve
from blockflow.program import load
from blockflow.split import export, split, store_blocks

PROGRAM = PROGRAM_FILE["torch.export"]
FORMATS = ("inside .pt2", "safetensors", "torch.export.load, unchecked")


def source_of(model: str) -> ModuleSource:
    """A built-in network; or `wide`: few operators, and 268 MB of weights."""
    if model == "wide":
        module = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(16)))
        return ModuleSource(model, module.eval(), (Port("input", "float32", ("batch", 2048)),))
    source = resolve(model)
    assert isinstance(source, ModuleSource)
    return source


def stored(model: str, folder: Path) -> tuple[dict[str, Callable[[str], object]], int]:
    """The ways to load a model, by their names, given a device; and the bytes of its weights."""
    source = source_of(model)
    (block,) = split(export(source.module, source.inputs), 1, source.name)
    apart = Store(folder / model / "apart", create=True)
    store_blocks([block], apart)
    inside = Store(folder / model / "inside", create=True)
    digest = block.digest
    inside.put(block.manifest(), lambda draft: write_archive(block.program, draft / PROGRAM))
    file = inside.path(digest) / PROGRAM
    ways: dict[str, Callable[[str], object]] = {
        FORMATS[0]: lambda device: load(inside, digest, device),
        FORMATS[1]: lambda device: load(apart, digest, device),
        FORMATS[2]: lambda _: torch.export.load(file),
    }
    return ways, block.cost.parameter_bytes


def drop_pages(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def compare(model: str, device: str, runs: int, folder: Path) -> dict[str, Any]:
    """Seconds of every load, by way, warm and cold."""
    ways, weights = stored(model, folder)
    samples: dict[str, dict[str, list[float]]] = {each: {"warm": [], "cold": []} for each in ways}
    for way in ways.values():
        way(device)  # not counted: imports, and the device's first memory
    for state in ("warm", "cold"):
        for _ in range(runs):
            for name, way in ways.items():
                if state == "cold":
                    drop_pages(folder / model)
                synchronize(device)
                start = time.perf_counter()
                loaded = way(device)
                synchronize(device)
                samples[name][state].append(time.perf_counter() - start)
                del loaded
    return {"model": model, "weight_bytes": weights, "seconds": samples}


def report(found: dict[str, Any]) -> str:
    where = found["conditions"]
    lines = [
        "# Weights inside the program's file, or each in its own",
        "",
        f"Loading onto {found['device']}: {where.get('gpu', where['cpu'])};",
        f"torch {where['torch']}; commit {where['commit']}; {where['date']}.",
        "Made by `benchmarks/weight_formats.py`, which says what is compared.",
        "",
        "Medians in milliseconds; in brackets the least:",
        "",
        "| model | weights | | " + " | ".join(FORMATS) + " |",
        "|---|---|---|---|---|---|",
    ]
    for each in found["models"]:
        size = f"{each['weight_bytes'] / 1e6:.0f} MB"
        for state in ("warm", "cold"):
            times = [each["seconds"][name][state] for name in FORMATS]
            cells = [f"{statistics.median(t) * 1e3:.0f} ({min(t) * 1e3:.0f})" for t in times]
            lines.append(f"| {each['model']} | {size} | {state} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet152", "wide"])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("docs/results/weight-formats-cpu"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "conditions": measured.conditions(options.device),
            "device": options.device,
            "models": [
                compare(model, options.device, options.runs, Path(folder))
                for model in options.models
            ],
        }
    print(report(found))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(report(found), encoding="utf-8")
    measured.write(options.output.with_suffix(".json"), found)


if __name__ == "__main__":
    main()
