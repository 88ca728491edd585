"""The modules that can be compiled do what their sources do: their own tests, run against both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Whatever imports a compiled module and starts nothing that would import another copy of it.
_SUITES = (
    "tensormq",
    "tensormq_pool",
    "tensormq_ring",
    "tensormq_tcp",
    "tensormq_wire",
    "batching",
    "dispatch",
    "joining",
    "ledger",
    "runner",
    "runtime",
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("compiled")
    made = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-build-isolation", "--target", str(target), str(ROOT)),
        ],
        env={**os.environ, "BLOCKFLOW_COMPILE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, f"{made.stdout}\n{made.stderr}"
    return target


def run(compiled: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(compiled)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_modules_pass_the_tests_of_their_sources(compiled: Path) -> None:
    told = run(compiled, "-m", "blockflow", "--version")
    assert told.stdout.endswith(", compiled\n"), told.stderr
    suites = [f"tests/test_{name}.py" for name in _SUITES]
    done = run(compiled, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", *suites)
    assert done.returncode == 0, done.stdout[-10_000:]
