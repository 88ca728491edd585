"""Edits of topologies: pure, so that everything about them is told here."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockflow import edit, reconcile
from blockflow.edit import Conflict, StaleGeneration, Terms
from blockflow.errors import NotFound, TopologyInvalid
from blockflow.topology import Block, Generation, Pipeline, Topology
from fake_controller import DIGEST, WANTED

OTHER = "sha256-" + "b" * 64


def test_blocks_come_change_and_go() -> None:
    one = edit.add_block("c", {"artifact": OTHER, "max_batch": 2})(WANTED)
    assert one.blocks["c"] == Block(artifact=OTHER, max_batch=2)
    assert (one.store, one.pipelines) == (WANTED.store, WANTED.pipelines)
    two = edit.change_block("c", {"device": "cuda:0", "max_batch": None})(one)
    assert two.blocks["c"] == Block(artifact=OTHER, device="cuda:0")
    assert edit.remove_block("c")(two) == WANTED


def test_pipelines_come_change_and_go() -> None:
    one = edit.add_pipeline("q", {"blocks": ["b"], "inputs": ["image"]})(WANTED)
    assert one.pipelines["q"] == Pipeline(blocks=("b",), inputs=("image",))
    two = edit.change_pipeline("q", {"blocks": ["a"], "inputs": None})(one)
    assert two.pipelines["q"] == Pipeline(blocks=("a",))
    assert edit.remove_pipeline("q")(two) == WANTED


def test_a_block_that_is_used_stays_unless_its_users_go_too() -> None:
    with pytest.raises(Conflict, match="block a is used by pipeline p"):
        edit.remove_block("a")(WANTED)
    gone = edit.remove_block("a", cascade=True)(WANTED)
    assert (list(gone.blocks), gone.pipelines) == (["b"], {})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (edit.add_block("a", {"artifact": DIGEST}), Conflict, "a block a already"),
        (edit.add_pipeline("p", {"blocks": ["a"]}), Conflict, "a pipeline p already"),
        (edit.change_block("x", {}), NotFound, "there are: a, b"),
        (edit.change_pipeline("x", {}), NotFound, "there are: p"),
        (edit.remove_block("x"), NotFound, "no block x"),
        (edit.remove_pipeline("x"), NotFound, "no pipeline x"),
        (edit.add_block("a b", {"artifact": DIGEST}), TopologyInvalid, "'a b' is no name"),
        (edit.add_block("c", {}), TopologyInvalid, "blocks.c.artifact: is missing"),
        (edit.change_block("a", {"divice": "cpu"}), TopologyInvalid, "did you mean device"),
        (edit.change_block("a", {"max_batch": "8"}), TopologyInvalid, "max_batch"),
        (edit.change_block("a", {"artifact": None}), TopologyInvalid, "artifact: is missing"),
    ],
)
def test_what_cannot_be_done_is_explained(
    change: edit.Change, error: type[Exception], words: str
) -> None:
    before = WANTED.model_copy()
    with pytest.raises(error, match=words):
        change(WANTED)
    assert before == WANTED


def test_terms_name_the_generation_they_were_made_for() -> None:
    Terms().check(Generation(3))
    Terms(match=Generation(3)).check(Generation(3))
    with pytest.raises(StaleGeneration, match="generation 4 serves, not 3") as stale:
        Terms(match=Generation(3)).check(Generation(4))
    assert stale.value.status == 412


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(st.text(max_size=8), st.dictionaries(st.sampled_from(
    [*Block.model_fields, *Pipeline.model_fields, "x"]), json_values, max_size=4))  # fmt: skip
def test_any_edit_gives_a_topology_or_one_of_our_errors(
    name: str, settings: dict[str, Any]
) -> None:
    for make in (edit.add_block, edit.change_block, edit.add_pipeline, edit.change_pipeline):
        for called in (name, "a", "p"):
            try:
                assert isinstance(make(called, settings)(WANTED), Topology)
            except (TopologyInvalid, Conflict, NotFound):
                continue


def actions(before: Topology, after: Topology) -> tuple[str, ...]:
    plan = reconcile.diff(reconcile.plan_workers(before), reconcile.plan_workers(after))
    return reconcile.actions(before, after, plan)


def test_actions_are_told_in_words() -> None:
    assert actions(WANTED, WANTED) == ()
    assert actions(Topology(), WANTED) == (
        "start worker a on cpu with block a",
        "start worker b on cpu with block b",
        "add pipeline p: a → b",
    )
    assert actions(WANTED, Topology()) == (
        "remove pipeline p",
        "stop worker a",
        "stop worker b",
    )
    changed = edit.change_pipeline("p", {"blocks": ["b", "a"]})(
        edit.change_block("a", {"max_batch": 4, "artifact": OTHER})(WANTED)
    )
    assert actions(WANTED, changed) == (
        (
            "replace worker a (block a: digest sha256-aaaaaaaaaaaa → sha256-bbbbbbbbbbbb; "
            "block a: max_batch 8 → 4)"
        ),
        "change pipeline p: a → b becomes b → a",
    )
    moved = edit.change_block("b", {"worker": "w"})(edit.change_block("a", {"worker": "w"})(WANTED))
    assert actions(WANTED, moved) == (
        "start worker w on cpu with blocks a, b",
        "stop worker a",
        "stop worker b",
    )
    named = edit.change_pipeline("p", {"inputs": ["image"]})(WANTED)
    assert actions(WANTED, named) == ("change pipeline p: other names of its inputs or outputs",)
