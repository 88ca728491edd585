"""What every benchmark reports: the hardware, the commit, the versions, and percentiles."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

import tensormq
from blockflow import environment


def start_as_served(variables: Mapping[str, str] = MappingProxyType({})) -> None:
    """Start this process anew, unless it was, with what the supervisor gives its children, and
    `variables`: what a server's blocks are compared with waits and keeps memory as they do.

    They are read when a process starts.
    """
    wanted = {**environment.serving(), **variables}
    if wanted.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


def conditions(device: str) -> dict[str, Any]:
    """Where and with what a benchmark ran."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": f"{_cpu()}, {len(_cores())} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiled": tensormq.COMPILED,
        "kernel": platform.release(),
    }
    if device.startswith("cuda"):
        import pynvml

        pynvml.nvmlInit()
        found["gpu"] = torch.cuda.get_device_name(device)
        found["driver"] = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    return found


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 of `values`, and how many there are."""
    p50, p95, p99 = np.percentile(np.asarray(values), [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "n": len(values)}


def sizes(text: str) -> Iterator[tuple[str, int]]:
    """`600KB,3.2MB` as labels and bytes."""
    units = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3}
    for part in text.split(","):
        match = re.fullmatch(r"([0-9.]+)(B|KB|MB|GB)", part.strip())
        if match is None:
            raise SystemExit(f"{part!r} is not a size such as 600KB")
        yield part.strip(), int(float(match[1]) * units[match[2]])


def write(path: Path | None, results: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {path}", file=sys.stderr)


def _commit() -> str:
    """The commit that is measured, with a "+" where files were changed since.

    BENCHMARK_COMMIT says it where the files were carried to without their history.
    """
    said = os.environ.get("BENCHMARK_COMMIT")
    return said or _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "-s") else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _cores() -> set[int]:
    return os.sched_getaffinity(0)
