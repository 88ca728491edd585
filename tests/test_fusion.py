"""Which blocks are run in one go."""

from __future__ import annotations

from typing import Any

import pytest

from blockflow.fusion import chains
from blockflow.reconcile import actions, diff, plan_workers
from blockflow.topology import Block, Pipeline, Topology

DIGEST = "sha256-" + "0" * 64


def wanted(pipelines: dict[str, str], **settings: dict[str, Any]) -> Topology:
    names = {name for chain in pipelines.values() for name in chain.split()} | settings.keys()
    blocks = {
        name: Block(artifact=DIGEST, **{"worker": "w", **settings.get(name, {})})
        for name in sorted(names)
    }
    return Topology(
        blocks=blocks,
        pipelines={n: Pipeline(blocks=tuple(chain.split())) for n, chain in pipelines.items()},
    )


def test_a_chain_in_one_worker_is_fused() -> None:
    assert chains(wanted({"p": "c a b"})) == (("c", "a", "b"),)
    assert chains(wanted({"p": "a b", "q": "c d"})) == (("a", "b"), ("c", "d"))


def test_a_trunk_is_fused_and_its_heads_are_not() -> None:
    assert chains(wanted({"p": "a b x", "q": "a b y"})) == (("a", "b"),)


@pytest.mark.parametrize(
    ("pipelines", "why"),
    [
        ({"p": "a b", "q": "b"}, "a request enters between"),
        ({"p": "a b", "q": "a"}, "a request leaves between"),
        ({"p": "a b", "q": "a c"}, "the first has two ways on"),
        ({"p": "a b", "q": "c b"}, "the second has two ways in"),
        ({"p": "a"}, "there is only one"),
        ({}, "nothing is used"),
    ],
)
def test_where_anything_comes_between_nothing_is_fused(pipelines: dict[str, str], why: str) -> None:
    assert chains(wanted(pipelines, a={}, b={})) == (), why


@pytest.mark.parametrize(
    "settings",
    [
        {"worker": "other"},
        {"worker": None},
        {"fuse": False},
        {"max_batch": 4},
        {"cuda_graph": False},
        {"threads": 1},
    ],
)
def test_blocks_that_do_not_agree_stay_apart(settings: dict[str, Any]) -> None:
    assert chains(wanted({"p": "a b c d"}, b=settings)) == (("c", "d"),)
    assert chains(wanted({"p": "a b"}, a=settings)) == ()


def test_a_worker_is_replaced_when_other_blocks_are_fused() -> None:
    before, after = wanted({"p": "a b c"}), wanted({"p": "a b c", "q": "b c"})
    plan = diff(plan_workers(before), plan_workers(after))
    said = actions(before, after, plan)
    assert said[0] == "replace worker w (a → b → c apart; b → c fused)"
    assert plan_workers(before) == plan_workers(wanted({"p": "a b c"}))


def graph(feeds: dict[str, Any], outputs: dict[str, str] | None = None) -> Topology:
    return Topology(
        blocks={name: Block(artifact=DIGEST, worker="w") for name in sorted(feeds)},
        pipelines={"p": Pipeline(graph=feeds, outputs=outputs)},
    )


DIAMOND = {
    "a1": "input",
    "a2": "a1",
    "l1": "a2",
    "l2": "l1",
    "r": "a2",
    "j": {"a": "l2", "b": "r"},
    "z": "j",
}


def test_the_chains_of_a_graph_are_fused_between_where_it_branches_and_joins() -> None:
    assert chains(graph(DIAMOND)) == (("a1", "a2"), ("j", "z"), ("l1", "l2"))


@pytest.mark.parametrize(
    ("feeds", "outputs", "why"),
    [
        ({}, {"early": "l1", "late": "z"}, "clients get what is between"),
        ({"l2": {"x": "l1", "y": "input.y"}}, None, "clients send what joins there"),
        ({"l2": {"x": "l1.one"}}, None, "not all of it is taken, or under another name"),
        ({"l2": "l1.one"}, None, "not all of it is taken"),
        ({"j": {"a": "l2", "b": "r", "c": "l1"}}, None, "it is needed later"),
    ],
)
def test_in_a_graph_nothing_is_fused_where_anything_comes_between(
    feeds: dict[str, Any], outputs: dict[str, str] | None, why: str
) -> None:
    assert chains(graph({**DIAMOND, **feeds}, outputs)) == (("a1", "a2"), ("j", "z")), why
