"""Benchmarks that stand where a process of the server does must keep up with what it does."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blockflow.artifact import Store
from blockflow.measure import Measure

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
    assert written["split"]["costs"] == "modelled"  # on a CPU
    assert len(written["split"]["last_operators"]) == 4
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


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_networks_are_split_by_costs_measured_in_another_process(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    balanced = importlib.import_module("balanced")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT / 'tests'}")
    given = "running:Mlp", 3, store
    inputs = ["x:float32[batch,16]"]
    measured = balanced.blocks_of(*given, Measure("cpu", 1, "bf16"), inputs)
    modelled = balanced.blocks_of(*given, balanced.one_row("cpu", "fp32"), inputs)
    assert measured.costs == "measured on cpu (1 row, bf16)"
    assert modelled.costs == "modelled"
    for each in (measured, modelled):
        assert len(each.names) == len(each.digests) == len(each.told()["last_operators"]) == 3
        assert [manifest.origin.index for manifest in each.manifests] == [0, 1, 2]
        assert set(each.digests) <= set(map(str, store.digests()))
    with pytest.raises(SystemExit, match=r"running:Mlp was not split: error: .* 99 blocks"):
        balanced.blocks_of("running:Mlp", 99, store, Measure("cpu"), inputs)
    assert balanced.one_row("cuda:1", "tf32") == Measure("cuda:1", 1, "tf32")
