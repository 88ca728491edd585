"""The experiments run, on a network that takes no time; what they find is not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "experiments"
TINY = ("--model", "running:Mlp", "--input", "x:float32[batch,16]", "--device", "cpu", "--quick")

# Ten processes load torch in each: seconds on an idle machine, minutes on one that is busy.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(320)]


def run(name: str, out: Path, *options: str) -> dict[str, Any]:
    """What an experiment wrote; its figure is an image."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}",
        "GOMP_SPINCOUNT": "10000",  # or an experiment starts anew to set it
    }
    command = [sys.executable, str(EXPERIMENTS / f"run_{name}_test.py"), *TINY, "--out", str(out)]
    done = subprocess.run(
        [*command, *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (source,) = out.glob("*.json")
    assert source.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads(source.read_text())
    page = subprocess.run(
        [sys.executable, str(EXPERIMENTS / "page.py"), str(out)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert page.returncode == 0, page.stderr
    text = out.with_suffix(".md").read_text()
    for target in found["targets"]:
        assert target["target"] in text
        assert target["met"] is None  # they are set for a GPU
    return found


def test_latency(tmp_path: Path) -> None:
    found = run("latency", tmp_path / "out", "--blocks", "2", "--rounds", "2", "--requests", "3")
    variants = {row["variant"]: row for row in found["rows"]}
    assert {"traditional, pickled", "TensorMQ, a worker each", "monolith"} <= variants.keys()
    for row in variants.values():
        assert row["max_difference"] <= 1e-6
        assert row["end_to_end_ms"]["n"] == 6
        assert row["end_to_end_ms"]["mean"] >= row["overhead_ms"]["mean"]
    assert "CUDA graphs" in found["left_out"]
    assert found["conditions"]["split"]["costs"] == "modelled"
    assert len(found["conditions"]["split"]["last_operators"]) == 2


def test_throughput(tmp_path: Path) -> None:
    options = ("--blocks", "2", "--batches", "1,2", "--clients", "2", "--rates", "0.1,0.5")
    found = run("throughput", tmp_path / "out", *options, "--seconds", "0.1")
    for each in found["loads"].values():
        assert each["peak"] >= each["saturated"]["per_second"] > 0
        assert each["saturated"]["max_difference"] <= 1e-5
    assert found["loads"]["TensorMQ, one worker, fused, batching"]["gateway"]["2"]["requests"] >= 2


def test_energy(tmp_path: Path) -> None:
    options = ("--blocks", "2", "--batches", "1", "--seconds", "0.1", "--clients", "2")
    found = run("energy", tmp_path / "out", *options)
    assert all(row["gross_mj"] is None for row in found["rows"])
    assert any("energy" in what for what in found["left_out"])
    assert all(row["per_second"] > 0 for row in found["rows"])


def test_memory(tmp_path: Path) -> None:
    found = run("vram", tmp_path / "out", "--tasks", "2", "--fractions", "1", "--processes", "1")
    (row,) = found["rows"]
    assert found["processes"]["extrapolated"]
    assert row["weights_saved"] == pytest.approx(row["bound"])
    assert all(each["max_difference"] <= 1e-6 for each in row["blockflow"].values())


def test_sharing(tmp_path: Path) -> None:
    found = run("sharing", tmp_path / "out", "--tasks", "2", "--seconds", "0.1")
    (row,) = found["rows"]
    for each in row["found"].values():
        assert each["max_difference"] <= 1e-5
        assert each["saturated_per_second"] > 0
