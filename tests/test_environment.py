"""What the processes of a server are started with."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from blockflow import environment

_BODIES = """
import resource, threading
def bodies():
    for _ in range(20):
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        bytes(8 << 20)
faults = []
bodies()
thread = threading.Thread(target=bodies)
thread.start()
thread.join()
print(faults[-1] - faults[25], faults[19] - faults[5])
"""


def test_what_the_environment_says_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.serving():
        monkeypatch.delenv(name, raising=False)
    assert environment.serving()["OMP_WAIT_POLICY"] == "active"
    # Without an end to it, those that wait would spin for ever.
    assert int(environment.serving()["GOMP_SPINCOUNT"]) <= 10_000
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert environment.serving()["GOMP_SPINCOUNT"] == "7"


def test_only_who_has_a_gpu_without_mps_asks_for_more_queues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in environment.serving()
    assert environment.without_mps() == {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "12")
    assert environment.without_mps() == {"CUDA_DEVICE_MAX_CONNECTIONS": "12"}


def test_memory_that_was_freed_is_used_again_without_the_kernel() -> None:
    """In every thread, and also where it is large."""
    told = subprocess.run(
        [sys.executable, "-c", _BODIES],
        env={**os.environ, **environment.serving()},
        capture_output=True,
        text=True,
        check=True,
    )
    pages = (8 << 20) // resource.getpagesize()
    assert all(int(faults) < pages for faults in told.stdout.split()), told.stdout
