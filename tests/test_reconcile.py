from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockflow.artifact import BATCH, Digest, Manifest, Origin, Port
from blockflow.reconcile import (
    BlockSpec,
    Plan,
    WorkerSpec,
    actions,
    diff,
    mps_wanted,
    plan_workers,
    rows_of,
    validate,
    wiring_of,
)
from blockflow.topology import (
    Block,
    BlockName,
    Gpu,
    Pipeline,
    PipelineName,
    Precision,
    Topology,
    WorkerName,
)
from blockflow.wiring import Source, Wiring, by_rule


def digest(of: str) -> Digest:
    return Digest("sha256-" + of.encode().hex().ljust(64, "0"))


def port(name: str, *shape: int, dtype: str = "float32", rows: int | None = None) -> Port:
    return Port(name, dtype, (BATCH if rows is None else rows, *shape))


def manifest(of: str, inputs: list[Port], outputs: list[Port]) -> Manifest:
    return Manifest(
        format="torch.export",
        digest=digest(of),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        parameter_bytes=0,
        flops=0,
        mutates_inputs=False,
        origin=Origin("net", 0, 1, "first", "last"),
        files={},
    )


def store(*manifests: Manifest) -> dict[Digest, Manifest | str]:
    return {each.digest: each for each in manifests}


def block(of: str, device: str = "cpu", worker: str | None = None, max_batch: int = 8) -> Block:
    return Block(artifact=digest(of), device=device, worker=worker, max_batch=max_batch)


def topology(blocks: dict[str, Block], **pipelines: str) -> Topology:
    return Topology(
        store="./store",
        blocks=blocks,
        pipelines={
            name: Pipeline(blocks=tuple(chain.split())) for name, chain in pipelines.items()
        },
    )


def wired(wanted: Topology, *manifests: Manifest) -> Wiring:
    return wiring_of(wanted, {each.digest: each for each in manifests}, PipelineName("p"))


SAME = manifest("same", [port("x", 4)], [port("x", 4)])
"""An artifact that fits behind itself."""


def chains(**pipelines: str) -> list[str]:
    """The problems of pipelines over blocks that all fit behind each other."""
    names = {name for chain in pipelines.values() for name in chain.split()}
    wanted = topology({name: block("same") for name in sorted(names)}, **pipelines)
    return validate(wanted, store(SAME), ["cpu"])


def test_a_good_topology_has_no_problems() -> None:
    assert chains(p="trunk a", q="trunk b", r="b c") == []


def test_an_empty_topology_and_an_unused_block_are_no_problems() -> None:
    assert validate(Topology(), {}, []) == []
    assert validate(topology({"a": block("same")}), store(SAME), ["cpu"]) == []


def test_an_unknown_artifact_names_block_digest_and_store() -> None:
    (problem,) = validate(topology({"a": block("lost")}), {}, ["cpu"])
    assert problem == (
        f"block a: artifact {digest('lost')} is not in the store ./store; "
        "split the model into that store, or point `store` at the one that has it"
    )


def test_a_damaged_artifact_says_why() -> None:
    (problem,) = validate(
        topology({"a": block("bad")}), {digest("bad"): "manifest.json is damaged"}, ["cpu"]
    )
    assert problem == f"block a: artifact {digest('bad')} cannot be used: manifest.json is damaged"


def test_a_missing_device_lists_those_that_exist() -> None:
    wanted = topology({"a": block("same", device="cuda:3")})
    assert validate(wanted, store(SAME), ["cuda:0", "cpu"]) == [
        "block a: there is no device cuda:3 here; there are: cpu, cuda:0"
    ]


def test_precision_is_for_float32_and_tf32_for_gpus() -> None:
    half = manifest("half", [port("x", 4, dtype="float16")], [port("y", 4)])
    tokens = manifest("tokens", [port("x", 4, dtype="int64")], [port("y", 4)])
    wanted = Topology(
        blocks={
            "a": Block(artifact=half.digest, precision="bf16"),
            "b": Block(artifact=SAME.digest, precision="tf32"),
            "c": Block(artifact=tokens.digest, precision="bf16"),
            "d": Block(artifact=SAME.digest, precision="tf32", device="cuda:0"),
        }
    )
    other, no_gpu = validate(wanted, store(half, SAME, tokens), ["cpu", "cuda:0"])
    assert other == (
        "block a: precision bf16 is for float32 artifacts, and this one has float16; leave it at "
        "fp32"
    )
    assert no_gpu == "block b: precision tf32 is for GPUs, and the block is on the CPU; use fp32"


def test_blocks_of_one_worker_agree_on_tf32() -> None:
    def gpu(precision: Precision) -> Block:
        return Block(artifact=SAME.digest, device="cuda:0", worker="w", precision=precision)

    wanted = Topology(blocks={"a": gpu("fp32"), "b": gpu("tf32"), "c": gpu("fp16")})
    (problem,) = validate(wanted, store(SAME), ["cuda:0"])
    assert problem.startswith("worker w: block a asks for fp32 and block b for tf32")
    wanted = Topology(blocks={"b": gpu("tf32"), "c": gpu("fp16"), "d": gpu("tf32")})
    assert validate(wanted, store(SAME), ["cuda:0"]) == []


def test_how_a_block_is_computed_is_a_reason_to_replace_its_worker() -> None:
    settings = {
        "max_delay_ms": 2.5,
        "precision": "fp16",
        "channels_last": True,
        "cuda_graph": False,
        "compile": True,
        "threads": 1,
        "cpus": (0, 1),
    }
    before = Topology(blocks={"a": Block(artifact=SAME.digest)})
    for name, value in settings.items():
        after = Topology(blocks={"a": Block(artifact=SAME.digest, **{name: value})})
        (worker,) = plan_workers(after).values()
        assert getattr(worker.blocks[0], name) == value
        plan = diff(plan_workers(before), plan_workers(after))
        (said,) = actions(before, after, plan)
        assert f"block a: {name} " in said


def test_a_block_is_pinned_to_cores_that_there_are() -> None:
    def pinned(**settings: object) -> list[str]:
        wanted = Topology(blocks={"a": Block(artifact=SAME.digest, **settings)})
        return validate(wanted, store(SAME), ["cpu"], cpus={0, 1, 2, 5})

    assert pinned(cpus="0-2,5") == pinned(cpus=[1], threads=1) == []
    there_are = "and this server may run on cores 0-2,5; choose among those"
    assert pinned(cpus="2-4,9") == [f"block a: cpus names cores 3-4,9, {there_are}"]
    assert pinned(cpus=[3]) == [f"block a: cpus names core 3, {there_are}"]
    assert pinned(cpus=[0, 1], threads=3) == [
        "block a: 3 threads cannot run side by side on cores 0-1; lower threads or name more cpus"
    ]


def test_a_pipeline_over_missing_blocks_names_each_one() -> None:
    wanted = topology({"a": block("same"), "b": block("same")}, p="a x b y")
    assert validate(wanted, store(SAME), ["cpu"]) == [
        "pipeline p: there is no block x; there are: a, b",
        "pipeline p: there is no block y; there are: a, b",
    ]


def test_a_block_comes_once_in_a_pipeline() -> None:
    (problem,) = chains(p="a b a")
    assert problem.startswith("pipeline p: block a comes twice")


def test_pipelines_in_opposite_order_are_a_cycle() -> None:
    (problem,) = chains(p="a b", q="b a")
    assert "a → b in pipeline p" in problem
    assert "b → a in pipeline q" in problem


def test_separate_cycles_are_all_found() -> None:
    found = chains(p="a b", q="b c", r="c a", s="x y", t="y x", fine="a x")
    assert len(found) == 2
    assert any("c → a in pipeline r" in problem for problem in found)
    assert any("y → x in pipeline t" in problem for problem in found)


def test_ports_that_differ_are_said_from_both_sides() -> None:
    a = manifest("a", [port("x", 3)], [port("hidden", 64, 8, 8)])
    b = manifest("b", [port("hidden", 128, 4, 4)], [port("y", 10)])
    wanted = topology({"a": block("a"), "b": block("b")}, p="a b")
    (problem,) = validate(wanted, store(a, b), ["cpu"])
    assert problem == (
        "pipeline p: block a gives hidden float32[batch,64,8,8] "
        "but block b takes hidden float32[batch,128,4,4]"
    )


def fit(gives: list[Port], takes: list[Port]) -> list[str]:
    a = manifest("a", [port("x", 3)], gives)
    b = manifest("b", takes, [port("y", 10)])
    return validate(topology({"a": block("a"), "b": block("b")}, p="a b"), store(a, b), ["cpu"])


@pytest.mark.parametrize(
    ("gives", "takes"),
    [
        ([port("x", 4)], [port("anything", 4)]),
        ([port("u", 1), port("v", 2)], [port("v", 2), port("u", 1)]),
        ([port("u", 1), port("v", 2)], [port("v", 1), port("w", 2)]),
        ([port("x", 4, rows=2)], [port("x", 4, rows=2)]),
        ([port("x", 4, rows=2)], [port("x", 4)]),
        ([port("x")], [port("x")]),
        ([Port("x", "float32", ())], [Port("x", "float32", ())]),
    ],
)
def test_ports_fit(gives: list[Port], takes: list[Port]) -> None:
    assert fit(gives, takes) == []


@pytest.mark.parametrize(
    ("gives", "takes", "words"),
    [
        ([port("x", 4)], [port("x", 4, dtype="float16")], "float32[batch,4] but block b takes"),
        ([port("x", 4)], [port("x", 4, 1)], "takes x float32[batch,4,1]"),
        ([port("x", 4)], [port("x", 4, rows=2)], "takes x float32[2,4]"),
        ([port("x", 4)], [port("x", 4), port("z", 1)], "gives 1 tensor (x float32[batch,4])"),
        ([port("x", 4), port("z", 1)], [port("x", 4)], "gives 2 tensors (x"),
        ([], [port("x", 4)], "gives 0 tensors but"),
    ],
)
def test_ports_do_not_fit(gives: list[Port], takes: list[Port], words: str) -> None:
    (problem,) = fit(gives, takes)
    assert words in problem


def test_every_port_that_does_not_fit_is_listed() -> None:
    assert len(fit([port("u", 1), port("v", 2)], [port("u", 3), port("v", 4)])) == 2


def test_a_fixed_number_of_rows_must_fit_into_max_batch() -> None:
    fixed = manifest("fixed", [port("x", 4, rows=16)], [port("x", 4, rows=16)])
    (problem,) = validate(topology({"a": block("fixed")}), store(fixed), ["cpu"])
    assert "takes exactly 16 rows (x float32[16,4]), more than its max_batch of 8" in problem
    assert validate(topology({"a": block("fixed", max_batch=16)}), store(fixed), ["cpu"]) == []


def test_blocks_of_one_worker_share_a_device() -> None:
    wanted = topology({"a": block("same", worker="w"), "b": block("same", "cuda:0", worker="w")})
    assert validate(wanted, store(SAME), ["cpu", "cuda:0"]) == [
        "worker w: its blocks must share one device, but it has a on cpu, b on cuda:0"
    ]


def test_a_named_worker_does_not_collide_with_a_block_that_names_none() -> None:
    wanted = topology({"a": block("same"), "b": block("same", worker="a")})
    (problem,) = validate(wanted, store(SAME), ["cpu"])
    assert problem.startswith("worker a: block b asked for it, but block a names no worker")
    both = topology({"a": block("same", worker="a"), "b": block("same", worker="a")})
    assert validate(both, store(SAME), ["cpu"]) == []


def test_every_kind_of_problem_is_listed_at_once() -> None:
    a = manifest("a", [port("x", 3)], [port("h", 1)])
    wanted = topology(
        {
            "a": block("a", worker="w"),
            "b": block("lost", worker="w", device="cuda:0"),
            "c": block("a"),
            "d": block("a", worker="c"),
        },
        p="a b nowhere",
        q="b a",
        r="a c",
        s="c c",
    )
    found = validate(wanted, store(a), ["cpu"])
    for words in (
        "is not in the store",
        "no device cuda:0",
        "must share one device",
        "worker c: block d",
        "no block nowhere",
        "form a cycle",
        "comes twice",
        "pipeline r: block a gives h float32[batch,1] but block c takes x float32[batch,3]",
    ):
        assert any(words in problem for problem in found), words


def test_wiring_is_by_name_where_names_agree_and_by_position_otherwise() -> None:
    gives = [port("u", 1), port("v", 2)]
    assert by_rule(gives, [port("v", 2), port("u", 1)]) == {"u": "u", "v": "v"}
    assert by_rule(gives, [port("v", 1), port("w", 2)]) == {"v": "u", "w": "v"}
    with pytest.raises(ValueError, match="zip"):
        by_rule(gives, [port("v", 1)])


def test_a_pipeline_takes_what_its_first_block_takes_and_no_more_than_its_smallest_block() -> None:
    a = manifest("a", [port("image", 3)], [port("h", 1)])
    b = manifest("b", [port("h", 1)], [port("label", 10)])
    wanted = topology({"a": block("a", max_batch=32), "b": block("b", max_batch=4)}, p="a b")
    assert wired(wanted, a, b) == Wiring(
        blocks=(BlockName("a"), BlockName("b")),
        feeds={
            BlockName("a"): {"image": Source(None, "image")},
            BlockName("b"): {"h": Source(BlockName("a"), "h")},
        },
        gives={"label": Source(BlockName("b"), "label")},
        inputs=a.inputs,
        outputs=b.outputs,
    )
    assert rows_of(wanted, PipelineName("p")) == 4


def test_a_pipeline_may_call_its_tensors_by_other_names_than_its_blocks() -> None:
    a = manifest("a", [port("x", 3), port("mask", 1)], [port("h", 1)])
    b = manifest("b", [port("h", 1)], [port("y", 10)])
    blocks = {"a": block("a"), "b": block("b")}
    pipeline = Pipeline(blocks=("a", "b"), inputs=("image", "where"), outputs=("label",))
    wanted = Topology(blocks=blocks, pipelines={"p": pipeline})
    found = wired(wanted, a, b)
    assert [each.name for each in found.inputs] == ["image", "where"]
    assert found.feeds[BlockName("a")] == {
        "x": Source(None, "image"),
        "mask": Source(None, "where"),
    }
    assert found.gives == {"label": Source(BlockName("b"), "y")}
    assert validate(wanted, store(a, b), ["cpu"]) == []
    wrong = Pipeline(blocks=("a", "b"), inputs=("image",), outputs=("y", "y"))
    problems = validate(Topology(blocks=blocks, pipelines={"p": wrong}), store(a, b), ["cpu"])
    assert len(problems) == 3
    assert "names 1 inputs (image), but block a has 2 tensors" in problems[0]
    assert "outputs has the name y 2 times" in problems[2]


def test_a_block_lives_in_its_own_worker_unless_it_names_one() -> None:
    wanted = topology(
        {
            "head": block("h", "cuda:0", worker="gpu"),
            "alone": block("x", max_batch=2),
            "body": block("b", "cuda:0", worker="gpu"),
        }
    )
    assert plan_workers(wanted) == {
        "alone": WorkerSpec(
            WorkerName("alone"), "cpu", (BlockSpec(BlockName("alone"), digest("x"), "cpu", 2),)
        ),
        "gpu": WorkerSpec(
            WorkerName("gpu"),
            "cuda:0",
            (
                BlockSpec(BlockName("body"), digest("b"), "cuda:0", 8),
                BlockSpec(BlockName("head"), digest("h"), "cuda:0", 8),
            ),
        ),
    }


names = st.sampled_from(["a", "b", "c", "d", "e"])
topologies = st.dictionaries(
    names,
    st.builds(
        block,
        of=st.sampled_from(["one", "two"]),
        worker=st.none() | st.sampled_from(["w1", "w2"]),
        max_batch=st.sampled_from([1, 8]),
    ),
).map(topology)


@given(topologies, topologies)
def test_applying_the_plan_gives_the_desired_workers(before: Topology, after: Topology) -> None:
    running, desired = plan_workers(before), plan_workers(after)
    plan = diff(running, desired)

    workers = {spec.name: spec for spec in running.values() if spec not in plan.stop}
    assert workers == {spec.name: spec for spec in plan.keep}
    workers |= {spec.name: spec for spec in plan.start}
    assert workers == desired

    assert all(running[spec.name] == desired[spec.name] == spec for spec in plan.keep)
    assert all(running[spec.name] == spec != desired.get(spec.name) for spec in plan.stop)
    assert all(desired[spec.name] == spec != running.get(spec.name) for spec in plan.start)


@given(topologies)
def test_nothing_changes_where_nothing_changed(wanted: Topology) -> None:
    workers = plan_workers(wanted)
    plan = diff(workers, plan_workers(wanted))
    assert plan == Plan(keep=tuple(workers.values()), start=(), stop=())
    assert plan.is_empty


@given(topologies, st.randoms())
def test_the_order_in_the_file_restarts_nothing(wanted: Topology, shuffle: random.Random) -> None:
    items = list(wanted.blocks.items())
    shuffle.shuffle(items)
    assert plan_workers(wanted.model_copy(update={"blocks": dict(items)})) == plan_workers(wanted)


@given(topologies)
def test_every_block_is_in_exactly_one_worker(wanted: Topology) -> None:
    placed = [spec.name for worker in plan_workers(wanted).values() for spec in worker.blocks]
    assert sorted(placed) == sorted(wanted.blocks)


@given(
    st.lists(
        st.permutations("abcdef").flatmap(
            lambda all_: st.integers(1, 6).map(lambda count: all_[:count])
        ),
        max_size=4,
    )
)
def test_cycles_are_found_exactly_where_the_union_has_them(orders: list[list[str]]) -> None:
    found = chains(**{f"p{index}": " ".join(order) for index, order in enumerate(orders)})
    edges = {edge for order in orders for edge in itertools.pairwise(order)}
    # By hand: a graph is acyclic exactly if taking away sources, again and again, empties it.
    left = {node for edge in edges for node in edge}
    while sources := {node for node in left if not any(a in left and b == node for a, b in edges)}:
        left -= sources
    assert bool(found) == bool(left)


def test_mps_is_wanted_where_it_is_on_or_several_workers_share_a_gpu() -> None:
    blocks = {
        "a": block("same", "cuda:0"),
        "b": block("same", "cuda:0"),
        "c": block("same", "cuda:1", "w"),
        "d": block("same", "cuda:1", "w"),
        "e": block("same"),
        "f": block("same"),
    }
    made = topology(blocks)

    def wanted(**settings: str) -> dict[str, bool]:
        gpus = {name.replace("_", ":"): Gpu(mps=each) for name, each in settings.items()}  # type: ignore[arg-type]
        return mps_wanted(made.model_copy(update={"devices": gpus}))

    assert wanted() == {}
    assert wanted(cuda_0="auto", cuda_1="off", cuda_2="on") == {"cuda:0": False}
    assert wanted(cuda_1="auto") == {}
    assert wanted(cuda_0="off", cuda_1="on") == {"cuda:1": True}

    without, under = plan_workers(made), plan_workers(made, {"cuda:0"})
    assert [name for name, spec in under.items() if spec.mps] == ["a", "b"]
    assert actions(made, made, diff(without, under)) == (
        "replace worker a (under MPS)",
        "replace worker b (under MPS)",
    )
    assert actions(made, made, diff(under, without))[0] == "replace worker a (without MPS)"


def test_settings_of_a_gpu_that_is_not_there_are_refused() -> None:
    wanted = topology({}).model_copy(update={"devices": {"cuda:3": Gpu()}})
    assert validate(wanted, {}, ["cpu", "cuda:0"]) == [
        "devices.cuda:3: there is no device cuda:3 here; there are: cpu, cuda:0"
    ]
