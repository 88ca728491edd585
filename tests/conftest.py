"""Fixtures for every test: a short private directory for sockets, and nothing left behind."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


def _children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True)}


def _shared_memory() -> set[str]:
    """Named segments, without those that other programs of this machine have made and use now."""
    mine = _children() | {os.getpid()}
    found = set()
    for entry in Path("/dev/shm").iterdir():  # noqa: S108
        maker = re.match(r"torch_(\d+)_", entry.name)
        if maker is None or int(maker[1]) in mine or not psutil.pid_exists(int(maker[1])):
            found.add(entry.name)
    return found


def _slabs() -> int:
    """memfds that this process holds open: one for each live slab."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            count += "memfd:tensormq" in str(link.readlink())
        except OSError:
            continue  # the descriptor that listed the directory
    return count


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a process, a thread, a slab or a segment of shared memory."""
    before = _children(), _shared_memory(), _slabs(), set(threading.enumerate())
    yield
    end = time.monotonic() + 5
    while True:
        left = {
            "processes": _children() - before[0],
            "shared memory": _shared_memory() - before[1],
            "slabs": max(0, _slabs() - before[2]),
            "threads": {t.name for t in set(threading.enumerate()) - before[3] if not t.daemon},
        }
        if not any(left.values()):
            return
        if time.monotonic() > end:
            pytest.fail(f"left behind: { {k: v for k, v in left.items() if v} }")
        time.sleep(0.05)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A 0700 directory with a path short enough for Unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="bf-"))
    yield path
    shutil.rmtree(path)
