"""The gateway's dispatcher, with a block that this test plays and before there is any."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from blockflow import oip
from blockflow.artifact import Port
from blockflow.errors import DeadlineExceeded, Unavailable
from blockflow.gateway.dispatch import BlockDispatcher
from blockflow.protocol import (
    Hop,
    Incarnation,
    Model,
    Note,
    Route,
    RouteId,
    Step,
    decode_note,
    encode,
)
from blockflow.topology import BlockName, PipelineName
from blockflow.wiring import Source
from tensormq import Message, Peer, Pull, Push

X, Y = Port("x", "float32", ("batch", 2)), Port("y", "float32", ("batch", 2))
NET = oip.ModelMetadata("net", (X,), (Y,), 4)
BLOCK = BlockName("block")


def route_through(endpoint: str, results: str) -> Route:
    step = Step(BLOCK, endpoint, {"x": Source(None, "x")}, 4, (X,))
    gives = {"y": Source(BLOCK, "y")}
    return Route(RouteId(7), PipelineName("net"), (step,), results, (X,), (Y,), gives)


@pytest.fixture
def endpoints(run_dir: Path) -> tuple[str, str]:
    return f"ipc://{run_dir}/block.sock", f"ipc://{run_dir}/results.sock"


Play = Callable[[Message, Push, Peer], None]


def ask(endpoints: tuple[str, str], play: Play, *, timing: bool) -> oip.InferResult:
    """Have a dispatcher ask a block, which answers as `play` says, for twice its input."""
    listening = threading.Event()

    def block() -> None:
        with Pull(endpoints[0]) as pull, Push(slots=2, slot_bytes=4096) as push:
            listening.set()
            with pull.recv(20) as message:
                play(message, push, push.connect(endpoints[1]))

    async def main() -> oip.InferResult:
        dispatcher = BlockDispatcher(
            endpoints[1], incarnation=Incarnation(1), queue_depth=2, slowdown=10.0, timeout=20.0
        )
        try:
            route = route_through(*endpoints)
            await dispatcher.connect([route])
            dispatcher.publish([Model(NET, route.id)])
            x = oip.TensorValue.from_numpy("x", np.ones((1, 2), np.float32))
            outputs = (oip.RequestedOutput("y", binary=True),)
            return await dispatcher.infer(NET, oip.InferRequest("", (x,), 1, outputs, None, timing))
        finally:
            await dispatcher.close()

    thread = threading.Thread(target=block)
    thread.start()
    try:
        assert listening.wait(20)
        return asyncio.run(main())
    finally:
        thread.join(20)


def answer(message: Message, push: Push, peer: Peer, note: Note) -> None:
    doubled = {"y": np.asarray(message.tensors["x"]) * 2}
    requests = message.requests
    push.send(doubled, to=peer, requests=requests, route=message.route, note=encode(note))


def test_an_answer_waits_for_times_that_its_blocks_tell_later(endpoints: tuple[str, str]) -> None:
    """As a block on a GPU does, which does not know how long it computes when it sends."""

    def play(message: Message, push: Push, peer: Peer) -> None:
        assert decode_note(message.note).hops == ((),)
        hop = Hop(BLOCK, 0.25, 0.5, None)
        answer(message, push, peer, Note(((hop,),), BLOCK))
        later = encode(Note(((Hop(BLOCK, 0.25, 0.5, 1.75),),), BLOCK))
        push.send({}, to=peer, requests=message.requests, route=message.route, note=later)

    result = ask(endpoints, play, timing=True)
    assert result.outputs[0].numpy().tolist() == [[2.0, 2.0]]
    assert result.timings is not None
    assert result.timings.blocks == (oip.BlockTiming("block", 0.25, 0.5, 1.75),)
    assert result.timings.total_ms > 0


def test_times_may_come_before_the_outputs(endpoints: tuple[str, str]) -> None:
    def play(message: Message, push: Push, peer: Peer) -> None:
        early = encode(Note(((Hop(BLOCK, 0.25, 0.5, 1.75),),), BLOCK))
        push.send({}, to=peer, requests=message.requests, route=message.route, note=early)
        answer(message, push, peer, Note(((Hop(BLOCK, 0.25, 0.5, None),),), BLOCK))

    result = ask(endpoints, play, timing=True)
    assert result.outputs[0].numpy().tolist() == [[2.0, 2.0]]
    assert result.timings is not None
    assert result.timings.blocks == (oip.BlockTiming("block", 0.25, 0.5, 1.75),)


def test_who_does_not_ask_sends_nothing_more_and_waits_for_nothing(
    endpoints: tuple[str, str],
) -> None:
    def play(message: Message, push: Push, peer: Peer) -> None:
        assert message.note == b""
        answer(message, push, peer, Note(block=BLOCK))

    result = ask(endpoints, play, timing=False)
    assert result.outputs[0].numpy().tolist() == [[2.0, 2.0]]
    assert result.timings is None


NOTHING = oip.InferRequest("", (), 1, (), 0.2)


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
            made.publish([Model(NET, RouteId(7), returning=True)])
            assert not made.models()["net"].ready
            made.check("net")
            with pytest.raises(DeadlineExceeded):
                await made.infer(NET, NOTHING)
            made.publish([Model(NET, None, "block one failed")])
            with pytest.raises(Unavailable, match="block one failed"):
                await made.infer(NET, NOTHING)
            assert made.channels() == ()

    asyncio.run(ask())
