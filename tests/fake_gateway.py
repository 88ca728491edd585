"""A dispatcher that computes with numpy, and a real server around any ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import uvicorn
from numpy.typing import NDArray

from blockflow import oip
from blockflow.artifact import Port
from blockflow.errors import DeadlineExceeded, NotFound
from blockflow.gateway.http import ModelStatus
from blockflow.oip import (
    BlockTiming,
    InferRequest,
    InferResult,
    ModelMetadata,
    TensorValue,
    Timings,
)

Compute = Callable[..., Mapping[str, NDArray[Any]]]


def model(
    name: str, dtype: str = "float32", shape: tuple[int, ...] = (3,), max_batch: int = 4
) -> ModelMetadata:
    """One input `x` and one output `y` of the same shape."""
    return ModelMetadata(
        name,
        (Port("x", dtype, ("batch", *shape)),),
        (Port("y", dtype, ("batch", *shape)),),
        max_batch,
    )


class FakeDispatcher:
    """Answers at once with what a function of the named input arrays gives.

    `gate` holds every answer back while it is clear, no longer than its request's own time.
    `cancelled` is set when an answer that was held back is cancelled.
    """

    def __init__(self) -> None:
        self._models: dict[str, ModelStatus] = {}
        self._compute: dict[str, Compute] = {}
        self.seen: list[InferRequest] = []
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None

    def add(self, metadata: ModelMetadata, compute: Compute, reason: str | None = None) -> None:
        self._models[metadata.name] = ModelStatus(metadata, reason is None, reason)
        self._compute[metadata.name] = compute

    def models(self) -> Mapping[str, ModelStatus]:
        return self._models

    def check(self, model: str) -> None:
        """Nobody is refused."""

    async def infer(self, model: ModelMetadata, request: InferRequest) -> InferResult:
        if model.name not in self._compute:
            raise NotFound(f"no model {model.name}")
        self.seen.append(request)
        self.started.set()
        try:
            async with asyncio.timeout(request.timeout):
                while not self.gate.is_set():  # noqa: ASYNC110 -- another thread opens it
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise DeadlineExceeded(
                f"model {model.name!r} did not answer within {request.timeout:g} s"
            ) from None
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.failure is not None:
            raise self.failure
        arrays = {tensor.name: tensor.numpy() for tensor in request.inputs}
        outputs = [
            TensorValue.from_numpy(name, array)
            for name, array in self._compute[model.name](**arrays).items()
        ]
        trunk, head = BlockTiming("trunk", 0.1, 0.2, 1.25), BlockTiming("head v1", 0.0, 3.0, 0.5)
        return InferResult(outputs, Timings(6.5, (trunk, head)) if request.timing else None)


def zoo() -> FakeDispatcher:
    """The models that the tests talk to."""
    fake = FakeDispatcher()
    fake.add(model("double"), lambda x: {"y": x * 2})
    fake.add(model("starting"), lambda x: {"y": x}, reason="block 'trunk' is loading")
    fake.add(
        ModelMetadata(
            "two-heads",
            (Port("left", "float32", ("batch", 2)), Port("right", "int64", ("batch", 2))),
            (
                Port("sum", "float32", ("batch", 2)),
                Port("big", "bool", ("batch", 2)),
                Port("half", "bfloat16", ("batch", 2)),
            ),
            8,
        ),
        lambda left, right: {
            "sum": (left + right).astype(np.float32),
            "big": right > 10,
            "half": left.astype(ml_dtypes.bfloat16),
        },
    )
    for datatype in oip.DATATYPES:
        fake.add(model(f"same-{datatype.dtype}", datatype.dtype, (2,)), _same(datatype.dtype))
    return fake


def _same(dtype: str) -> Compute:
    return lambda x: {"y": x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)}


@contextlib.contextmanager
def serving(app: Any) -> Iterator[tuple[str, int]]:
    """Serve `app` with uvicorn, uvloop and httptools on a free port of 127.0.0.1."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="uvicorn")
    thread.start()
    try:
        # The socket listens already, so a client that comes early waits in its queue.
        yield listener.getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
    assert not thread.is_alive()
