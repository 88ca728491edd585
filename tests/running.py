"""A real server in a process of its own, and small real models to deploy on it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from blockflow import models
from blockflow.artifact import Port, Store
from blockflow.backends import rounding_to_tf32
from blockflow.client import ControlClient, InferenceClient
from blockflow.errors import BlockFlowError
from blockflow.split import export, split, split_model, store_blocks, topology_for

Floats = NDArray[np.float32]

DEVICE_PORT = Port("x", "float32", ("batch", 16))


class Mlp(nn.Module):
    """float32[batch, 16] → float32[batch, 4] in three layers; `seed` makes it another model."""

    def __init__(self, seed: int = 0, width: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
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

    def __init__(
        self,
        directory: Path,
        wanted: Mapping[str, Any] | None,
        *options: str,
        program: Sequence[str] = ("-m", "blockflow"),
    ) -> None:
        self.control_port, self.http_port = free_port(), free_port()
        self.log = directory / "server.log"
        self.run_dir = directory / "run"
        command = [
            *(sys.executable, *program, "serve", "--run-dir", str(self.run_dir)),
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


def answer(model: nn.Module, x: Floats) -> Floats:
    with torch.inference_mode():
        computed: Floats = model.eval()(torch.from_numpy(x)).numpy()
        return computed


def some_rows(rows: int = 1, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, 16), np.float32)


class Load:
    """Requests without a pause from a thread, each answer checked, until told to stop."""

    def __init__(self, server: Server, pipeline: str, model: nn.Module) -> None:
        self.good = 0
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._arguments = server.http_port, pipeline, model
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        port, pipeline, model = self._arguments
        x = some_rows(2, seed=3)
        expected = answer(model, x)
        with InferenceClient(f"http://127.0.0.1:{port}", timeout=120) as client:
            while not self._stop.is_set():
                try:
                    got = client.infer(pipeline, {"x": x})["output"]
                except BlockFlowError as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    time.sleep(0.05)
                else:
                    if np.allclose(got, expected, atol=1e-5):
                        self.good += 1
                    else:
                        self.failures.append(f"a wrong answer: {got}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def four_blocks(store: Store, device: str) -> tuple[dict[str, Any], Floats, Floats]:
    """A topology of ResNet-50 in four blocks, an input, and the whole network's answer to it."""
    source = models.resolve("resnet50")
    assert isinstance(source, models.ModuleSource)
    wanted = topology_for(split_model(source, 4, store), "resnet50", device=device)
    x = np.random.default_rng(0).standard_normal((2, 3, 224, 224), np.float32)
    with rounding_to_tf32(False), torch.inference_mode():  # as blocks of precision fp32 have it
        whole = source.module.eval().to(device)
        expected = whole(torch.from_numpy(x).to(device)).cpu().numpy()
    return {**wanted.model_dump(exclude_none=True), "store": str(store.root)}, x, expected


def channels_between_blocks(server: Server, messages: int) -> list[dict[str, Any]]:
    """The channels of a pipeline of four workers, once they have reported so many messages."""

    def between() -> list[dict[str, Any]]:
        blocks = server.control.blocks()
        assert len({block["pid"] for block in blocks}) == 4
        return [c for b in blocks for c in b["channels"] if c["peer"] != "gateway"]

    wait_for(lambda: [c["messages"] for c in between()] == [messages] * 3, 5, "reports")
    return between()
