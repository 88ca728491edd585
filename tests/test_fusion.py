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
