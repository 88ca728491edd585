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
from typing import Any

import psutil
import pytest
from hypothesis import settings

from blockflow.artifact import Store
from running import Mlp, store_model

# The same examples in every run, however slow the machine; benchmarks/fuzz.py and
# HYPOTHESIS_PROFILE=explore look for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=5000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def _children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True)}


def _shared_memory() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}  # noqa: S108


def _used_elsewhere() -> set[str]:
    """Named segments that processes map which are none of ours: neighbours come and go."""
    mine = _children() | {os.getpid()}
    found: set[str] = set()
    for process in psutil.process_iter():
        if process.pid not in mine:
            try:
                maps = Path(f"/proc/{process.pid}/maps").read_text()
            except OSError:
                continue  # it has ended, or is somebody else's
            found.update(re.findall(r"/dev/shm/(\S+)", maps))  # noqa: S108
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
        left: dict[str, Any] = {
            "processes": _children() - before[0],
            "shared memory": _shared_memory() - before[1],
            "slabs": max(0, _slabs() - before[2]),
            "threads": {t.name for t in set(threading.enumerate()) - before[3] if not t.daemon},
        }
        if left["shared memory"]:
            left["shared memory"] -= _used_elsewhere()
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


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"), create=True)


@pytest.fixture(scope="module")
def mlp(store: Store) -> list[str]:
    """The digests of `Mlp()` in three blocks."""
    return store_model(store, Mlp(), 3)
