"""The soak script with small counts: its full ones take hours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"


def soak(directory: Path, *arguments: str) -> dict[str, Any]:
    report = directory / "soak.json"
    subprocess.run(
        [sys.executable, SOAK, *arguments, "--json", report],
        check=True,
        timeout=100,
        stdout=subprocess.DEVNULL,
    )
    results: dict[str, Any] = json.loads(report.read_text())["results"]
    return results


@pytest.mark.slow
def test_hostile_bytes_are_parsed_or_refused(tmp_path: Path) -> None:
    outcomes = soak(tmp_path, "fuzz", "--count", "20000")["outcomes"]
    assert outcomes["frames refused"] > 0
    assert outcomes["frames parsed as Deliver"] > 0
    assert outcomes["rings read to the end"] > 0
    assert outcomes["rings refused by their reader"] > 0
    assert outcomes["rings refused by their writer"] > 0
    frames = sum(count for name, count in outcomes.items() if name.startswith("frames"))
    rings = sum(count for name, count in outcomes.items() if name.startswith("rings"))
    assert (frames, rings) == (20_000, 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_restarts_of_either_end_leave_nothing(tmp_path: Path, device: str) -> None:
    results = soak(tmp_path, "restarts", "--count", "20", "--device", device)
    assert results["counted"]["restarts"] == 20
    assert results["counted"]["messages received"] > 0
    assert results["counted"]["messages sent"] > 0
    assert results["grown"] == []


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_ends_that_are_opened_and_closed_leave_nothing(tmp_path: Path, device: str) -> None:
    results = soak(tmp_path, "reopen", "--count", "60", "--device", device)
    assert results["counted"] == {"ends": 60, "messages": 180}
    assert results["grown"] == []
