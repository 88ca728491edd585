"""Benchmarks that stand where a process of the server does must keep up with what it does."""

from __future__ import annotations

import json
import os
import signal
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
    written = json.loads(results.read_text())
    found = written["results"]
    assert written["interrupted"] is None
    assert set(found) == {"called", "worker: fused"}
    assert len(found["worker: fused"]["samples"]) == 2  # each compared with what was called


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_runtime_writes_what_it_has_when_it_is_ended(tmp_path: Path) -> None:
    results = tmp_path / "runtime.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "runtime.py"),
        *("--model", "resnet18", "--only", "four workers", "--json", str(results)),
        *("--quick", "--rounds", "1000", "--requests", "1"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "latency, round 3 of 1000" in line:
                process.send_signal(signal.SIGTERM)
        assert process.wait() != 0
    written = json.loads(results.read_text())
    assert written["interrupted"] == "KeyboardInterrupt: "
    assert written["options"]["under_way"] == "[1, 8]"
    assert set(written["results"]) == {"called", "four workers"}
    assert 2 <= len(written["results"]["four workers"]["samples"]) < 1000
    assert len(written["results"]["four workers"]["runners"]) == 4
