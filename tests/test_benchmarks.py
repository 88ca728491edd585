"""Benchmarks that stand where a process of the server does must keep up with what it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_runtime_deploys_fused_blocks_as_the_server_does(tmp_path: Path) -> None:
    results = tmp_path / "runtime.json"
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "runtime.py"),
            *("--model", "resnet18", "--only", "worker: fused", "--json", str(results)),
            *("--rounds", "1", "--requests", "2", "--seconds", "0.1", "--under-way", "2"),
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    found = json.loads(results.read_text())["results"]
    assert set(found) == {"called", "worker: fused"}
    assert len(found["worker: fused"]["samples"]) == 2  # each compared with what was called
