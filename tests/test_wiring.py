"""Wiring: graphs of blocks as people write them, and what can be wrong with them."""

from __future__ import annotations

from typing import Any

import pytest

from blockflow.artifact import Manifest, Port
from blockflow.reconcile import validate
from blockflow.topology import BlockName, Pipeline, PipelineName, Topology
from blockflow.wiring import Source, edges, entries, exits, ordered, path, wire
from test_reconcile import block, manifest, port, store, wired

# One tensor in, one out; two in; two out.
ONE = manifest("one", [port("x", 4)], [port("y", 4)])
TWO = manifest("two", [port("a", 4), port("b", 4)], [port("y", 4)])
FORK = manifest("fork", [port("x", 4)], [port("y", 4), port("z", 2)])
WIDE = manifest("wide", [port("x", 9)], [port("y", 9)])
FIXED = manifest("fixed", [port("x", 4, rows=2)], [port("y", 4, rows=2)])
KINDS = (ONE, TWO, FORK, WIDE, FIXED)


def graph(feeds: dict[str, Any], kinds: str = "", **settings: Any) -> Topology:
    """Blocks are of kind ONE unless `kinds` says another: `a:two b:fork`."""
    of = dict(pair.split(":") for pair in kinds.split())
    names = {*feeds, *of}
    return Topology(
        blocks={name: block(of.get(name, "one")) for name in sorted(names)},
        pipelines={"p": Pipeline(graph=feeds, **settings)},
    )


def problems(feeds: dict[str, Any], kinds: str = "", **settings: Any) -> list[str]:
    return validate(graph(feeds, kinds, **settings), store(*KINDS), ["cpu"])


DIAMOND = {"t": "input", "l": "t", "r": "t", "j": {"a": "l.y", "b": "r"}}


def test_a_diamond() -> None:
    found = wired(graph(DIAMOND, "j:two"), *KINDS)
    assert found.blocks == ("t", "l", "r", "j")
    assert found.feeds[BlockName("j")] == {
        "a": Source(BlockName("l"), "y"),
        "b": Source(BlockName("r"), "y"),
    }
    assert found.gives == {"y": Source(BlockName("j"), "y")}
    assert (found.inputs, found.outputs) == ((port("x", 4),), (port("y", 4),))
    assert validate(graph(DIAMOND, "j:two"), store(*KINDS), ["cpu"]) == []


def test_fan_out_with_an_answer_from_the_middle() -> None:
    outputs = {"age": "l", "who": "r.y", "features": "t.y", "logits": "t.z"}
    feeds = {"t": "input", "l": {"x": "t.y"}, "r": "t.y"}
    found = wired(graph(feeds, "t:fork", outputs=outputs), *KINDS)
    assert [each.name for each in found.outputs] == list(outputs)
    assert found.outputs[3] == Port("logits", "float32", ("batch", 2))
    assert found.feeds[BlockName("r")] == {"x": Source(BlockName("t"), "y")}


def test_a_skip_over_several_blocks_and_inputs_of_several_blocks() -> None:
    feeds = {"u": {"a": "d", "b": "e.y"}, "e": {"x": "input.image"}, "d": "c", "c": "e"}
    found = wired(graph(feeds, "u:two"), *KINDS)
    assert found.blocks == ("e", "c", "d", "u")
    assert [each.name for each in found.inputs] == ["image"]
    feeds = {"l": {"x": "input.image"}, "j": {"a": "l", "b": "input.mask"}}
    found = wired(graph(feeds, "j:two", inputs=("mask", "image")), *KINDS)
    assert [each.name for each in found.inputs] == ["mask", "image"]
    shared = wired(graph({"l": "input", "r": "input", "j": {"a": "l", "b": "r"}}, "j:two"), *KINDS)
    assert shared.inputs == (port("x", 4),)


def test_names_with_dots_are_read_as_the_longest_block_that_fits() -> None:
    feeds = {"v1": "input", "v1.y": "v1", "j": {"a": "v1.y", "b": "v1.y.y"}}
    found = wired(graph(feeds, "j:two"), *KINDS)
    assert found.feeds[BlockName("j")] == {
        "a": Source(BlockName("v1.y"), "y"),
        "b": Source(BlockName("v1.y"), "y"),
    }


def test_a_chain_may_answer_with_tensors_of_any_block() -> None:
    pipeline = Pipeline(blocks=("a", "b"), outputs={"early": "a", "late": "b.y"})
    wanted = Topology(blocks={"a": block("one"), "b": block("one")}, pipelines={"p": pipeline})
    assert validate(wanted, store(ONE), ["cpu"]) == []
    assert wired(wanted, ONE).gives["early"] == Source(BlockName("a"), "y")


FAN = {"t": "input", "l": "t", "r": "t"}


@pytest.mark.parametrize(
    ("feeds", "kinds", "settings", "expected"),
    [
        (
            {"t": "input", "j": {"a": "t", "b": "lost.y"}},
            "j:two",
            {},
            ["block j is fed by lost.y, which is not in the graph; there are: input, t, j"],
        ),
        (
            {"t": "input", "l": "lost"},
            "",
            {},
            ["block l is fed by lost, which is not in the graph; there are: input, t, l"],
        ),
        (
            {"t": "input", "j": {"a": "t", "c": "t"}},
            "j:two",
            {},
            [
                ("block j has no input c; it takes 2 tensors (a float32[batch,4], "
                "b float32[batch,4])"),
                "nothing feeds input b float32[batch,4] of block j",
            ],
        ),
        (
            {"t": "input", "l": {"x": "t.z"}},
            "",
            {},
            [
                ("input x of block l: block t has no output z; it gives 1 tensor "
                "(y float32[batch,4])")
            ],
        ),
        (
            {"t": "input", "l": {"x": "t"}},
            "t:fork",
            {},
            [
                ("input x of block l: block t gives 2 tensors (y float32[batch,4], "
                "z float32[batch,2]); say which: BLOCK.PORT")
            ],
        ),
        (
            {"t": "input", "l": "t.z", "w": "t.y"},
            "t:fork w:wide",
            {"outputs": {"a": "l", "b": "w"}},
            [
                "block t gives z float32[batch,2] but block l takes x float32[batch,4]",
                "block t gives y float32[batch,4] but block w takes x float32[batch,9]",
            ],
        ),
        (
            {"t": "input", "j": "t"},
            "j:two",
            {},
            [
                ("block t gives 1 tensor (y float32[batch,4]) but block j takes 2 tensors "
                "(a float32[batch,4], b float32[batch,4])")
            ],
        ),
        (
            {"t": "input", "j": "t.y"},
            "j:two",
            {},
            [
                ("block j takes 2 tensors (a float32[batch,4], b float32[batch,4]); say what feeds "
                "each: {port: source}")
            ],
        ),
        (
            {"j": {"a": "input", "b": "input.b"}},
            "j:two",
            {},
            ["input a of block j is fed by all that clients send; say which: input.NAME"],
        ),
        (
            {"a": {"a": "input.x", "b": "c"}, "b": "a", "c": "b"},
            "a:two",
            {"outputs": {"y": "c"}},
            ["its blocks feed each other in a cycle, a → b → c → a"],
        ),
        (
            {"a": "a"},
            "",
            {"outputs": {"y": "a"}},
            ["its blocks feed each other in a cycle, a → a"],
        ),
        (
            FAN,
            "",
            {},
            [
                ("it ends in blocks l, r; say which of their tensors clients get: "
                "`outputs: {name: BLOCK.PORT}`")
            ],
        ),
        (
            FAN,
            "",
            {"outputs": {"y": "l"}},
            ["block r feeds neither a block nor an output"],
        ),
        (
            FAN,
            "",
            {"outputs": {"y": "l", "z": "r.z", "w": "input.x", "v": "lost"}},
            [
                "output v is fed by lost, which is not in the graph; there are: input, t, l, r",
                "output z: block r has no output z; it gives 1 tensor (y float32[batch,4])",
                "output w is what clients send; it must come from a block",
            ],
        ),
        (
            {"t": "input"},
            "",
            {"outputs": {}},
            ["it has no outputs; say what clients get: {name: BLOCK.PORT}",
             "block t feeds neither a block nor an output"],
        ),
        (
            {"l": {"x": "input.image"}},
            "",
            {"inputs": ("photo",)},
            [
                "no block takes the input photo",
                "block l takes the input image; the pipeline's are photo",
            ],
        ),
        (
            {"l": "input", "w": "input", "j": {"a": "l", "b": "l"}},
            "w:wide j:two",
            {"outputs": {"y": "j", "z": "w"}},
            [
                ("the input x goes to block l as x float32[batch,4] and to block w as "
                "x float32[batch,9]")
            ],
        ),
        (
            {"f": "input", "l": "f", "r": "f"},
            "f:fixed",
            {"outputs": {"a": "l", "b": "r"}},
            [
                ("block f takes x float32[2,4], which has no batch dimension; where a pipeline "
                "branches or joins, every tensor must have one"),
                ("block f gives y float32[2,4], which has no batch dimension; where a pipeline "
                "branches or joins, every tensor must have one"),
            ],
        ),
        (
            {"input": "input"},
            "",
            {},
            [
                ("a block in a graph cannot be called `input`, which stands for what clients send; "
                "deploy it under another name")
            ],
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    feeds: dict[str, Any], kinds: str, settings: dict[str, Any], expected: list[str]
) -> None:
    assert problems(feeds, kinds, **settings) == [f"pipeline p: {each}" for each in expected]


def test_a_block_that_is_not_deployed_is_named_once() -> None:
    wanted = graph({"t": "input", "l": "t"})
    missing = wanted.model_copy(update={"blocks": {"t": block("one")}})
    assert validate(missing, store(ONE), ["cpu"]) == [
        "pipeline p: there is no block l; there are: t"
    ]


def test_fixed_rows_may_pass_a_graph_that_is_a_line() -> None:
    assert problems({"f": "input", "l": "f"}, "f:fixed") == []


def test_a_graph_and_a_chain_in_opposite_order_are_a_cycle() -> None:
    wanted = graph(DIAMOND, "j:two")
    chain = Pipeline(blocks=("l", "t"))
    both = wanted.model_copy(update={"pipelines": {**wanted.pipelines, "q": chain}})
    (problem,) = validate(both, store(*KINDS), ["cpu"])
    assert "t → l in pipeline p" in problem
    assert "l → t in pipeline q" in problem


def test_order_edges_and_the_line_that_people_read() -> None:
    chain = Pipeline(blocks=("a", "b", "c"))
    assert (path(chain), edges(chain)) == ("a → b → c", (("a", "b"), ("b", "c")))
    assert path(Pipeline(blocks=("a",))) == "a"
    backwards = Pipeline(graph={"c": "b", "b": "a", "a": "input"})
    assert (ordered(backwards), path(backwards)) == (("a", "b", "c"), "a → b → c")
    diamond = Pipeline(graph=DIAMOND)
    assert path(diamond) == "t → l, r; l → j; r → j"
    assert (entries(diamond), exits(diamond)) == (("t",), ("j",))
    skips = Pipeline(graph={**DIAMOND, "j": {"a": "l", "b": "input.b"}}, outputs={"o": "r"})
    assert (entries(skips), exits(skips)) == (("t", "j"), ("r",))
    apart = Pipeline(graph={"a": "input", "b": "input"}, outputs={"x": "a", "y": "b"})
    assert path(apart) == "a; b"


def test_nothing_is_wired_while_a_manifest_is_unknown() -> None:
    def manifest_of(name: BlockName) -> Manifest | None:
        return ONE if name == "t" else None

    found, said = wire(Pipeline(graph={"t": "input", "l": "t"}), manifest_of)
    assert (found, said) == (None, ())


def test_only_a_validated_pipeline_is_wired() -> None:
    from blockflow.reconcile import wiring_of

    wanted = graph({"t": "input", "l": "lost"})
    with pytest.raises(ValueError, match=r"pipeline p was not validated: .*lost"):
        wiring_of(wanted, {each.digest: each for each in KINDS}, PipelineName("p"))
