"""The ways of a block: channels that routes need, opened and left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blockflow.artifact import Digest
from blockflow.protocol import Route, RouteId
from blockflow.reconcile import BlockSpec
from blockflow.routing import lay_route
from blockflow.topology import BlockName, Pipeline, PipelineName
from blockflow.ways import Ways
from blockflow.wiring import wire
from tensormq import Loop, Pull, Push
from test_reconcile import manifest, port

ONE = manifest("one", [port("x", 4)], [port("y", 4)])
FIRST, SLOW, QUICK = (BlockName(name) for name in ("first", "slow", "quick"))


def spec(name: BlockName) -> BlockSpec:
    return BlockSpec(name, Digest("d"), "cpu", 8)


def route(number: int, second: BlockName, results: str, endpoint: str) -> Route:
    names = (FIRST, second)
    pipeline = Pipeline.model_validate({"blocks": names})
    wired, problems = wire(pipeline, dict.fromkeys(names, ONE).get)
    assert wired is not None, problems
    return lay_route(
        RouteId(number),
        PipelineName(second),
        wired,
        {name: spec(name) for name in names},
        {Digest("d"): ONE},
        {FIRST: "ipc:///nowhere", second: endpoint},
        (),
        results,
    )


def test_a_route_is_left_without_waiting_for_a_block_that_computes(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = {"x": np.ones(4, np.float32)}
    with (
        Loop() as loop,
        Pull(f"ipc://{run_dir}/results.sock", loop=loop) as results,
        Pull(f"ipc://{run_dir}/slow.sock", loop=loop) as slow,
        Pull(f"ipc://{run_dir}/quick.sock", loop=loop) as quick,
        Push(slots=1, slot_bytes=256, loop=loop) as push,
    ):
        ways = Ways(spec(FIRST), push, {})
        for number, (name, end) in enumerate([(SLOW, slow), (QUICK, quick)], 1):
            ways.learn(route(number, name, results.endpoint, end.endpoint))
        to_quick = ways.get(RouteId(2))
        to_slow = ways.get(RouteId(1))
        assert to_slow is not None
        assert to_quick is not None
        push.send(x, to=to_slow.followers)
        held = slow.recv(timeout=1)
        with monkeypatch.context() as patch:
            patch.delattr(Loop, "run_until")  # by which everything waits
            ways.forget([RouteId(1)])
        assert ways.get(RouteId(1)) is None
        assert not push.has_room(to_quick.followers)
        held.release()
        push.send(x, to=to_quick.followers, timeout=1)
        quick.recv(timeout=1).release()
