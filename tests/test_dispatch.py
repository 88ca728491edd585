"""The gateway's dispatcher, with a block that this test plays and before there is any."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import zmq

from blockflow import oip
from blockflow.artifact import Port
from blockflow.errors import DeadlineExceeded, Unavailable
from blockflow.gateway.dispatch import BlockDispatcher
from blockflow.gateway.http import create_app
from blockflow.protocol import (
    Command,
    Connect,
    Failed,
    Hello,
    Hop,
    Incarnation,
    Model,
    Note,
    Route,
    RouteId,
    Step,
    decode_from_child,
    decode_note,
    encode,
)
from blockflow.topology import BlockName, PipelineName
from blockflow.wiring import Source
from tensormq import Message, Peer, Pull, Push, Request

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


@asynccontextmanager
async def dispatcher(results: str, seconds: float = 20.0) -> AsyncIterator[BlockDispatcher]:
    made = BlockDispatcher(
        results,
        incarnation=Incarnation(1),
        queue_depth=2,
        slowdown=10.0,
        timeout=seconds,
        on_fatal=pytest.fail,
    )
    try:
        yield made
    finally:
        await made.close()


@contextmanager
def block(endpoints: tuple[str, str], play: Play) -> Iterator[None]:
    """A block that answers one message, as `play` says."""
    listening = threading.Event()

    def serve() -> None:
        with Pull(endpoints[0]) as pull, Push(slots=2, slot_bytes=4096) as push:
            listening.set()
            with pull.recv(20) as message:
                play(message, push, push.connect(endpoints[1]))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert listening.wait(20)
        yield
    finally:
        thread.join(20)


async def double(made: BlockDispatcher, route: Route, *, timing: bool = False) -> oip.InferResult:
    """Ask the block on `route` for twice its input."""
    await made.connect([route])
    made.publish([Model(NET, route.id)])
    x = oip.TensorValue.from_numpy("x", np.ones((1, 2), np.float32))
    outputs = (oip.RequestedOutput("y", binary=True),)
    return await made.infer(NET, oip.InferRequest("", (x,), 1, outputs, None, timing))


def ask(endpoints: tuple[str, str], play: Play, *, timing: bool) -> oip.InferResult:
    """Have a dispatcher ask a block, which answers as `play` says, for twice its input."""

    async def main() -> oip.InferResult:
        async with dispatcher(endpoints[1]) as made:
            return await double(made, route_through(*endpoints), timing=timing)

    with block(endpoints, play):
        return asyncio.run(main())


def answer(message: Message, push: Push, peer: Peer, note: Note) -> None:
    doubled = {"y": np.asarray(message.tensors["x"]) * 2}
    requests = message.requests
    push.send(doubled, to=peer, requests=requests, route=message.route, note=encode(note))


def at_once(message: Message, push: Push, peer: Peer) -> None:
    answer(message, push, peer, Note(block=BLOCK))


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


def test_a_route_that_was_not_opened_is_waited_for(endpoints: tuple[str, str]) -> None:
    """A worker may die while the gateway is replaced: then its successor hears of old routes."""

    async def ask() -> None:
        async with dispatcher(endpoints[1]) as made:
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


def test_a_request_whose_time_runs_out_is_counted_and_hears_why(
    endpoints: tuple[str, str],
) -> None:
    """Over HTTP, where the client's going away is looked out for meanwhile."""

    async def ask() -> None:
        async with dispatcher(endpoints[1]) as made:
            made.publish([Model(NET, None, "block one is loading", returning=True)])
            app = httpx.ASGITransport(create_app(made))
            async with httpx.AsyncClient(transport=app, base_url="http://gateway") as client:
                tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}
                body = {"inputs": [tensor], "parameters": {"timeout": 50_000}}
                response = await client.post("/v2/models/net/infer", json=body)
            late = "model 'net' did not answer within 0.05 s: block one is loading"
            assert (response.status_code, response.json()) == (504, {"error": late})
            assert made.counts()[PipelineName("net")].errors == {"DeadlineExceeded": 1}

    asyncio.run(ask())


def test_no_request_takes_longer_than_the_gateway_lets_it(endpoints: tuple[str, str]) -> None:
    async def ask() -> None:
        async with dispatcher(endpoints[1], seconds=0.05) as made:
            made.publish([Model(NET, None, returning=True)])
            for timeout in (None, 1000.0):
                with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s"):
                    await made.infer(NET, oip.InferRequest("", (), 1, (), timeout))

    asyncio.run(ask())


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Nothing more can be opened in this process."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 + max(int(each.name) for each in Path("/proc/self/fd").iterdir())
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for each in taken:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_channel_that_cannot_be_opened_is_told_of_and_opened_later(
    endpoints: tuple[str, str],
) -> None:
    async def main() -> oip.InferResult:
        route = route_through(*endpoints)
        async with dispatcher(endpoints[1]) as made:
            with no_descriptor_left(), pytest.raises(OSError, match="Too many open files"):
                await asyncio.wait_for(made.connect([route]), 20)
            return await double(made, route)

    with block(endpoints, at_once):
        assert asyncio.run(main()).outputs[0].numpy().tolist() == [[2.0, 2.0]]


def test_a_command_that_nobody_waits_for_any_more_harms_nobody(endpoints: tuple[str, str]) -> None:
    """As when the gateway is stopped meanwhile."""

    async def main() -> None:
        route = route_through(*endpoints)
        async with dispatcher(endpoints[1]) as made:
            connecting = asyncio.create_task(made.connect([route]))
            await asyncio.sleep(0)
            connecting.cancel()
            await double(made, route)

    with block(endpoints, at_once):
        asyncio.run(main())


def hear(server: zmq.Socket[bytes], kind: type[Failed | Hello]) -> tuple[bytes, object]:
    """Who says something of this kind, and what; all else is ignored."""
    while True:
        child, said = server.recv_multipart()
        if isinstance(message := decode_from_child(said), kind):
            return child, message


def test_a_gateway_tells_what_it_cannot_do_and_ends_when_it_can_do_nothing_more(
    endpoints: tuple[str, str], run_dir: Path
) -> None:
    """The server starts another then."""
    control = f"ipc://{run_dir}/control.sock"
    server: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    with server, socket.create_server(("127.0.0.1", 0)) as listener:
        server.bind(control)
        server.setsockopt(zmq.RCVTIMEO, 20_000)
        options = {
            "control": control,
            "incarnation": 1,
            "parent": os.getpid(),
            "results": endpoints[1],
            "fd": listener.fileno(),
            "queue-depth": 0,  # no channel has so few slots
            "max-slowdown": 2,
            "request-timeout": 5,
            "max-body-bytes": 4096,
        }
        command = [sys.executable, "-m", "blockflow.gateway"]
        command += [f"--{name}={value}" for name, value in options.items()]
        with subprocess.Popen(
            command, pass_fds=[listener.fileno()], stderr=subprocess.PIPE, text=True
        ) as gateway:
            try:
                child, _ = hear(server, Hello)
                connect = Command(5, Connect((route_through(*endpoints),)))
                server.send_multipart([child, encode(connect)])
                _, failed = hear(server, Failed)
                assert failed == Failed(5, "ValueError: 0 slots; a Push has 1 to 1024")
                with Push(slots=1, slot_bytes=256) as push:
                    peer = push.connect(endpoints[1])
                    push.send({}, to=peer, note=b"not a note")
                    times_of_two = encode(Note((None, None), BLOCK))
                    one = (Request(1, 1),)
                    push.send({}, to=peer, requests=one, route=7, note=times_of_two)
                    _, log = gateway.communicate(timeout=20)
            finally:
                gateway.kill()
    assert gateway.returncode == 70
    assert "an answer has an unreadable note" in log
    assert "CRITICAL the tensor thread stopped: ValueError" in log
