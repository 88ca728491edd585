"""Routes: blocks as steps, and a fused chain as one."""

from __future__ import annotations

from collections.abc import Sequence

from blockflow.artifact import Digest
from blockflow.protocol import Route, RouteId
from blockflow.reconcile import BlockSpec
from blockflow.routing import lay_route
from blockflow.topology import BlockName, Pipeline, PipelineName
from blockflow.wiring import Source, wire
from test_reconcile import manifest, port

ONE = manifest("one", [port("x", 4)], [port("y", 4)])
A, B, C = (BlockName(name) for name in "abc")


def route(*chains: Sequence[BlockName], outputs: dict[str, str] | None = None) -> Route:
    """Of a pipeline of the blocks a, b and c, of which each passes on what it is given."""
    names = (A, B, C)
    pipeline = Pipeline(blocks=names, **({} if outputs is None else {"outputs": outputs}))
    wired, problems = wire(pipeline, dict.fromkeys(names, ONE).get)
    assert wired is not None, problems
    digest = Digest("d")
    return lay_route(
        RouteId(1),
        PipelineName("p"),
        wired,
        {name: BlockSpec(name, digest, "cpu", 8) for name in names},
        {digest: ONE},
        {name: f"ipc:///{name}" for name in names},
        chains,
        "ipc:///results",
    )


def test_each_block_is_a_step() -> None:
    found = route()
    assert [(step.block, step.endpoint) for step in found.steps] == [
        (name, f"ipc:///{name}") for name in (A, B, C)
    ]
    assert [step.feeds["x"].block for step in found.steps] == [None, A, B]
    assert found.gives == {"y": Source(C, "y")}


def test_a_chain_is_a_step_under_the_name_of_its_first_block() -> None:
    found = route((A, B))
    assert [step.block for step in found.steps] == [A, C]
    assert found.steps[1].feeds == {"x": Source(A, "y")}
    assert found.following(A) == found.steps[1:]


def test_what_a_chain_gives_is_the_pipelines_output() -> None:
    found = route((A, B, C))
    assert [step.block for step in found.steps] == [A]
    assert found.gives == {"y": Source(A, "y")}
