"""The gateway's dispatcher by itself, before any block is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockflow.artifact import Port
from blockflow.errors import DeadlineExceeded, Unavailable
from blockflow.gateway.dispatch import BlockDispatcher
from blockflow.oip import InferRequest, ModelMetadata
from blockflow.protocol import Incarnation, Model, RouteId

PORT = Port("x", "float32", ("batch", 2))
MODEL = ModelMetadata("a", (PORT,), (PORT,), 8)
REQUEST = InferRequest("", (), 1, (), 0.2)


@asynccontextmanager
async def dispatcher(run_dir: Path) -> AsyncIterator[BlockDispatcher]:
    made = BlockDispatcher(
        f"ipc://{run_dir}/1.results.sock",
        incarnation=Incarnation(1),
        queue_depth=4,
        slowdown=2,
        timeout=5,
    )
    try:
        yield made
    finally:
        await made.close()


def test_a_route_that_was_not_opened_is_waited_for(run_dir: Path) -> None:
    """A worker may die while the gateway is replaced: then its successor hears of old routes."""

    async def ask() -> None:
        async with dispatcher(run_dir) as made:
            with pytest.raises(Unavailable, match="starting"):
                made.models()
            made.publish([Model(MODEL, RouteId(7), returning=True)])
            assert not made.models()["a"].ready
            made.check("a")
            with pytest.raises(DeadlineExceeded):
                await made.infer(MODEL, REQUEST)
            made.publish([Model(MODEL, None, "block one failed")])
            with pytest.raises(Unavailable, match="block one failed"):
                await made.infer(MODEL, REQUEST)
            assert made.channels() == ()

    asyncio.run(ask())
