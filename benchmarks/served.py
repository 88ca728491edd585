"""A server in a process of its own, models on it, and load from another process."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from running import Mlp, Server, store_model, topology, wait_for  # noqa: E402

__all__ = ["Body", "Load", "Mlp", "Server", "directory", "store_model", "topology", "wait_for"]


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """A directory with a path short enough for sockets, gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="bf-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


class Body:
    """What a load sends: one input, and the answer that it must get."""

    def __init__(self, path: Path, model: nn.Module, x: NDArray[np.float32]) -> None:
        self.path = path
        with torch.inference_mode():
            expected = model.eval()(torch.from_numpy(x)).numpy()
        np.savez(path, x=x, expected=expected)


class Load:
    """A process that sends requests; `finish` gives what became of each one."""

    def __init__(self, server: Server, model: str, body: Body, *options: str) -> None:
        command = [sys.executable, str(HERE / "load.py"), str(server.http_port), model]
        self._process = subprocess.Popen(
            [*command, str(body.path), *options], stdout=subprocess.PIPE, text=True
        )

    def stop(self) -> list[list[float]]:
        """End it now; what is under way is waited for."""
        self._process.terminate()
        return self.finish()

    def finish(self) -> list[list[float]]:
        """Rows of due time, seconds until the answer, and status, in the order of due times."""
        output, _ = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"the load ended with status {self._process.returncode}")
        rows: list[list[float]] = json.loads(output)
        return sorted(rows)


def capacity(server: Server, model: str, body: Body, clients: int, seconds: float) -> float:
    """Answers a second with so many requests under way."""
    rows = Load(server, model, body, "--clients", str(clients), "--seconds", str(seconds)).finish()
    done = [due + taken for due, taken, status in rows if status == 200]
    late = [at for at in done if at > done[0] + 0.2 * seconds]
    return len(late) / (max(late) - min(late))


def count(rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How many requests there were, by status."""
    found: dict[str, int] = {}
    for _, _, status in rows:
        found[str(int(status))] = found.get(str(int(status)), 0) + 1
    return {"requests": len(rows), "by_status": found}
