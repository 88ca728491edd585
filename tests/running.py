"""A real server in a process of its own, and small real models to deploy on it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch
import yaml
from torch import Tensor, nn

from blockflow.artifact import Port, Store
from blockflow.client import ControlClient, InferenceClient
from blockflow.errors import BlockFlowError
from blockflow.split import export, split, store_blocks

DEVICE_PORT = Port("x", "float32", ("batch", 16))


class Mlp(nn.Module):
    """float32[batch, 16] → float32[batch, 4] in three layers; `seed` makes it another model."""

    def __init__(self, seed: int = 0, width: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                nn.Linear(width, 4),
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Fragile(nn.Module):
    """int64[batch, 1] → float32[batch, 4]; an index beyond 7 is an error inside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x).squeeze(1)  # type: ignore[no-any-return]


class Slow(nn.Module):
    """float32[batch, 16] → float32[batch, 16]; takes some 0.3 s on one core."""

    def forward(self, x: Tensor) -> Tensor:
        big = x.new_ones(1200, 1200)
        for _ in range(12):
            big = (big @ big) * 1e-4
        return x + big.sum() * 0


def store_model(store: Store, model: nn.Module, blocks: int, port: Port = DEVICE_PORT) -> list[str]:
    """Split `model` and give its blocks' digests, first to last."""
    made = split(export(model.eval(), [port]), blocks, type(model).__name__.lower())
    return [str(block.digest) for block in store_blocks(made, store).blocks]


def topology(
    store: Path, pipelines: Mapping[str, Mapping[str, str]], **extra: Any
) -> dict[str, Any]:
    """Pipelines as name → {block name: digest}; `extra` holds settings by block name."""
    blocks = {
        block.replace("-", "_"): {"artifact": digest, **extra.get(block, {})}
        for members in pipelines.values()
        for block, digest in members.items()
    }
    return {
        "store": str(store),
        "blocks": blocks,
        "pipelines": {name: {"blocks": list(members)} for name, members in pipelines.items()},
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(true: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait until `true()` holds and give the seconds it took."""
    start = time.monotonic()
    while not true():
        if time.monotonic() - start > seconds:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.02)
    return time.monotonic() - start


class Server:
    """`blockflow serve` on free ports; its output goes to `<directory>/server.log`."""

    def __init__(self, directory: Path, wanted: Mapping[str, Any] | None, *options: str) -> None:
        self.control_port, self.http_port = free_port(), free_port()
        self.log = directory / "server.log"
        self.run_dir = directory / "run"
        command = [
            *(sys.executable, "-m", "blockflow", "serve", "--run-dir", str(self.run_dir)),
            *("--state-dir", str(directory / "state")),
            *("--port", str(self.control_port), "--http-port", str(self.http_port)),
            *options,
        ]
        if wanted is not None:
            file = directory / "topology.yaml"
            file.write_text(yaml.safe_dump(dict(wanted)))
            command += ["--topology", str(file)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.control = ControlClient(f"http://127.0.0.1:{self.control_port}", timeout=60)
        self.inference = InferenceClient(f"http://127.0.0.1:{self.http_port}", timeout=60)

    @property
    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_ready(self, seconds: float = 60) -> float:
        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended:\n{self.log.read_text()}")
            try:
                return self.control.ready()
            except BlockFlowError:
                return False

        return wait_for(ready, seconds, "ready")

    def block(self, name: str) -> dict[str, Any]:
        return next(b for b in self.control.blocks() if b["name"] == name)

    def interrupt(self) -> float:
        """Ctrl-C; gives the seconds until the process ended."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(20)
        return time.monotonic() - start

    def close(self) -> None:
        self.control.close()
        self.inference.close()
        if self.process.poll() is None:
            self.interrupt()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self.log.exists():
            print(self.log.read_text())  # noqa: T201 - shown with the failure
        self.close()
