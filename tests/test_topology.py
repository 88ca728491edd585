from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blockflow.errors import TopologyInvalid
from blockflow.topology import MAX_BYTES, Block, Gpu, Pipeline, Topology, dump, parse, parse_json

DIGEST = "sha256-" + "a" * 64

GOOD = f"""
store: ./store
blocks:
  trunk: {{artifact: {DIGEST}, device: "cuda:0", worker: gpu, max_batch: 32}}
  head:  {{artifact: {DIGEST}}}
pipelines:
  digits: {{blocks: [trunk, head]}}
"""


def problems(source: str | bytes | dict[str, object]) -> list[str]:
    with pytest.raises(TopologyInvalid) as caught:
        parse(source)
    return list(caught.value.problems)


def outcome(read: Callable[[Any], Topology], source: object) -> Topology | tuple[str, ...]:
    try:
        return read(source)
    except TopologyInvalid as error:
        return error.problems


def test_reads_blocks_and_pipelines() -> None:
    assert parse(GOOD) == Topology(
        store="./store",
        blocks={
            "trunk": Block(artifact=DIGEST, device="cuda:0", worker="gpu", max_batch=32),
            "head": Block(artifact=DIGEST, device="cpu", worker=None, max_batch=8),
        },
        pipelines={"digits": Pipeline(blocks=("trunk", "head"))},
    )


def test_bytes_text_and_plain_data_read_alike() -> None:
    plain = {"blocks": {"a": {"artifact": DIGEST}}}
    text = f"blocks: {{a: {{artifact: {DIGEST}}}}}"
    assert parse(text) == parse(text.encode()) == parse(b"\xef\xbb\xbf" + text.encode())
    assert parse(text) == parse(plain)


def test_an_empty_topology_is_valid() -> None:
    assert parse("{}") == parse({}) == parse_json("{}") == Topology()


@pytest.mark.parametrize("text", ["", "   \n", "# only a comment\n"])
def test_an_empty_file_is_refused_rather_than_read_as_remove_everything(text: str) -> None:
    assert problems(text) == ["it is empty; to remove everything, write {}"]


def test_every_problem_is_listed_in_plain_words() -> None:
    text = f"""
blocks:
  a: {{artifact: {DIGEST}, devise: cpu, max_batch: yes}}
  b: {{device: gpu}}
  1: {{artifact: {DIGEST}}}
  c: 3
  -x: {{artifact: {DIGEST}}}
  d: {{artifact: ../../etc, worker: "", max_batch: 0}}
pipelines:
  p: [a]
  q: {{blocks: a}}
  r: {{blocks: []}}
  s: {{blocks: [1, a b]}}
  t: {{inputs: [x]}}
  u: {{blocks: [a], graph: {{a: input}}, outputs: 4}}
  v: {{graph: {{}}}}
  w: {{graph: {{a: 1, b: {{x: 2, 3: input, "": a}}, 4: input, c: "", -d: a}}, outputs: {{o: 3}}}}
extra: 1
"""
    name_rule = (
        "a name has 1 to 63 letters, digits, '_', '.' or '-', and starts with a letter or a digit"
    )
    port_rule = "the name of a tensor has 1 to 128 characters"
    digest_rule = "must be a digest: sha256- and 64 hex digits, as `blockflow split` prints it"
    assert sorted(problems(text)) == sorted(
        [
            "blocks.a.devise: is not a known setting; did you mean device?",
            "blocks.a.max_batch: must be a whole number from 1 to 4096, not True",
            "blocks.b.artifact: is missing",
            "blocks.b.device: must be cpu or cuda:<index>, such as cuda:0, not 'gpu'",
            "blocks: 1 is no name: it is read as a number; put it in quotes",
            "blocks.c: must be a mapping of settings, not a number",
            f"blocks: '-x' is no name: {name_rule}",
            f"blocks.d.artifact: {digest_rule}, not '../../etc'",
            f"blocks.d.worker: must be a name; {name_rule}, not ''",
            "blocks.d.max_batch: must be a whole number from 1 to 4096, not 0",
            "pipelines.p: must be a mapping of settings, not a list",
            "pipelines.q.blocks: must be a list of block names, not text",
            "pipelines.r.blocks: must name at least one block",
            "pipelines.s.blocks[0]: 1 is no name: it is read as a number; put it in quotes",
            f"pipelines.s.blocks[1]: 'a b' is no name: {name_rule}",
            "pipelines.t: must have `blocks` (a chain) or a `graph`",
            "pipelines.u.outputs: must be a list of names, not a number",
            "pipelines.v.graph: must name at least one block",
            (
                "pipelines.w.graph.a: must say where the block's inputs come from: `input`, "
                "a block, or {port: BLOCK.PORT}, not a number"
            ),
            f"pipelines.w.graph.b.x: 2 is no name: {port_rule}",
            "pipelines.w.graph.b: 3 is no name: it is read as a number; put it in quotes",
            f"pipelines.w.graph.b: '' is no name: {port_rule}",
            "pipelines.w.graph: 4 is no name: it is read as a number; put it in quotes",
            f"pipelines.w.graph.c: '' is no name: {port_rule}",
            f"pipelines.w.graph: '-d' is no name: {name_rule}",
            f"pipelines.w.outputs.o: 3 is no name: {port_rule}",
            "extra: is not a known setting; known are store, blocks, pipelines, devices",
        ]
    )


def test_mps_is_set_for_a_gpu_also_in_yaml_s_own_words() -> None:
    for written, meant in (("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on")):
        read = parse(f'devices: {{"cuda:1": {{mps: {written}}}}}')
        assert read.devices == {"cuda:1": Gpu(mps=meant)}
        assert parse(dump(read)) == read
    assert parse("devices: {cuda:1: {}}").devices["cuda:1"].mps == "off"
    text = 'devices: {cpu: {mps: on}, "cuda:0": {mps: 1}, "cuda:1": {mpx: on}, "cuda:2": on}'
    assert sorted(problems(text)) == [
        "devices.cuda:0.mps: must be auto, on or off, not 1",
        "devices.cuda:1.mpx: is not a known setting; did you mean mps?",
        "devices.cuda:2: must be a mapping of settings, not true or false",
        "devices: 'cpu' is no GPU: it must be cuda:<index>, such as cuda:0",
    ]


def test_how_a_block_is_computed_is_checked() -> None:
    text = f"""
blocks:
  a: {{artifact: {DIGEST}, precision: half, channels_last: 1, cuda_graph: auto, compile: 1}}
  b: {{artifact: {DIGEST}, max_delay_ms: -1}}
  c: {{artifact: {DIGEST}, max_delay_ms: .inf}}
  d: {{artifact: {DIGEST}, max_delay_ms: yes}}
"""
    delay = "must be a number of milliseconds from 0 to 60000"
    assert problems(text) == [
        "blocks.a.precision: must be fp32, tf32, fp16 or bf16, not 'half'",
        "blocks.a.channels_last: must be true or false, not 1",
        "blocks.a.cuda_graph: must be true or false, not 'auto'",
        "blocks.a.compile: must be true or false, not 1",
        f"blocks.b.max_delay_ms: {delay}, not -1",
        f"blocks.c.max_delay_ms: {delay}, not inf",
        f"blocks.d.max_delay_ms: {delay}, not True",
    ]
    for value, said in (
        ("3-1", "'3-1'"),
        ("0-", "'0-'"),
        ("'-1'", "'-1'"),
        ("0-99999", "'0-99999'"),
        ("[0, 4096]", "[0, 4096]"),
        ("[0, true]", "[0, True]"),
        ("['0']", "['0']"),
        ("[]", "[]"),
        ("3", "3"),
        ("{0: 1}", "{0: 1}"),
    ):
        assert problems(f"blocks: {{a: {{artifact: {DIGEST}, cpus: {value}}}}}") == [
            f'blocks.a.cpus: must be cores, such as "0-3,6" or [0, 1, 2, 3, 6], not {said}'
        ]
    for value in ("'0-2,6'", "'6, 0-1,1-2'", "[6, 2, 1, 0, 0]"):
        pinned = parse(f"blocks: {{a: {{artifact: {DIGEST}, cpus: {value}}}}}")
        assert pinned.blocks["a"].cpus == (0, 1, 2, 6)
        assert parse(dump(pinned)) == pinned
    good = f"{{artifact: {DIGEST}, cuda_graph: off, max_delay_ms: 2, precision: bf16}}"
    block = parse(f"blocks: {{a: {good}}}").blocks["a"]
    assert (block.cuda_graph, block.max_delay_ms, block.precision) == (False, 2.0, "bf16")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("blocks:", "blocks: must be a mapping of names, not empty (write {} for none)"),
        ("- a", "it must be a mapping with `blocks` and `pipelines`, not a list"),
        ("hello", "it must be a mapping with `blocks` and `pipelines`, not text"),
        ("1: 2", "1: a setting's name must be text; put it in quotes"),
        ("store: ''", "store: must be the path of a directory, not ''"),
        ('store: "a\\0b"', "store: must be the path of a directory, not 'a\\x00b'"),
    ],
)
def test_wrong_shapes_are_explained(text: str, problem: str) -> None:
    assert problems(text) == [problem]


def test_duplicate_names_are_refused_with_their_lines() -> None:
    text = f"""
blocks:
  a: {{artifact: {DIGEST}}}
  b: {{artifact: {DIGEST}, device: cpu, device: cpu}}
  a: {{artifact: {DIGEST}}}
pipelines: {{}}
pipelines: {{}}
"""
    assert sorted(problems(text)) == [
        "blocks.a: is defined twice (lines 3 and 5)",
        "blocks.b.device: is defined twice (lines 4 and 4)",
        "pipelines: is defined twice (lines 6 and 7)",
    ]


def test_duplicates_do_not_hide_other_problems() -> None:
    text = "blocks: {a: {device: gpu}, a: {}}"
    assert problems(text) == [
        "blocks.a: is defined twice (lines 1 and 1)",
        "blocks.a.artifact: is missing",
    ]


def test_json_duplicates_are_refused() -> None:
    with pytest.raises(TopologyInvalid, match="blocks: is defined twice"):
        parse_json('{"blocks": {}, "blocks": {}}')


@pytest.mark.parametrize("text", ["{", "", "nope", '{"blocks": NaN}', "[" * 100_000, b"\xff"])
def test_bad_json_is_a_problem_not_a_crash(text: str | bytes) -> None:
    with pytest.raises(TopologyInvalid):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: {b", "line 1, column 6"),
        ("a: 1\n---\nb: 2", "line 2, column 1"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: !!int x", "invalid literal"),
        ("a: " + "9" * 10_000, "Exceeds the limit"),
        ("? [a]\n: 1", "unhashable key"),
        ("a\x00", "unacceptable character"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        ("[" * 100_000, "nested too deeply"),
        ("x" * (MAX_BYTES + 1), f"it has {MAX_BYTES + 1} bytes; at most {MAX_BYTES} are read"),
    ],
)
def test_bad_yaml_is_a_problem_not_a_crash(text: str | bytes, words: str) -> None:
    (problem,) = problems(text)
    assert words in problem


def test_aliases_that_stand_for_too_much_are_refused() -> None:
    levels = "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    (problem,) = problems("a: &a [x]\n" + levels)
    assert "aliases stand for more than" in problem


def test_aliases_that_nest_too_deeply_are_refused() -> None:
    levels = "".join(f"k{i + 1}: &k{i + 1} [[[[*k{i}]]]]\n" for i in range(100))
    assert problems(f"k0: &k0 [x]\n{levels}store: *k100") == ["it is nested too deeply"]


@pytest.mark.parametrize("depth", [40, 500, 900])
def test_json_that_nests_too_deeply_is_refused(depth: int) -> None:
    text = '{"store": ' + "[" * depth + "]" * depth + "}"
    with pytest.raises(TopologyInvalid, match="nested too deeply"):
        parse_json(text)


def test_a_number_too_long_to_print_is_refused() -> None:
    (problem,) = problems("store: 0x" + "f" * 10_000)
    assert problem == "store: must be the path of a directory, not a number"


def test_an_alias_to_itself_is_refused() -> None:
    (problem,) = problems("blocks: &b {a: *b}")
    assert "aliases stand for more than" in problem


def test_aliases_and_merge_keys_may_be_used() -> None:
    text = f"blocks: {{a: &a {{artifact: {DIGEST}, worker: w}}, b: {{<<: *a, max_batch: 2}}}}"
    blocks = parse(text).blocks
    assert blocks["b"] == Block(artifact=DIGEST, worker="w", max_batch=2)


def test_a_name_that_looks_like_a_date_stays_a_name() -> None:
    assert list(parse(f"blocks: {{2024-01-31: {{artifact: {DIGEST}}}}}").blocks) == ["2024-01-31"]


names = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,12}\Z")
blocks = st.builds(
    Block,
    artifact=st.text("0123456789abcdef", min_size=64, max_size=64).map("sha256-".__add__),
    device=st.sampled_from(["cpu", "cuda:0", "cuda:11"]),
    worker=st.none() | names,
    max_batch=st.integers(1, 4096),
    max_delay_ms=st.floats(0, 60_000),
    precision=st.sampled_from(["fp32", "tf32", "fp16", "bf16"]),
    channels_last=st.booleans(),
    cuda_graph=st.booleans(),
)
ports = st.text(
    st.characters(min_codepoint=0x20, exclude_categories=["Cs"]), min_size=1, max_size=8
)
feeds = ports | st.dictionaries(ports, ports, max_size=3)
topologies = st.builds(
    Topology,
    store=st.none() | st.text(min_size=1).filter(lambda text: "\x00" not in text),
    blocks=st.dictionaries(names, blocks, max_size=4),
    pipelines=st.dictionaries(
        names,
        st.builds(Pipeline, blocks=st.lists(names, min_size=1, max_size=4).map(tuple))
        | st.builds(
            Pipeline,
            graph=st.dictionaries(names, feeds, min_size=1, max_size=4),
            outputs=st.none() | st.lists(ports).map(tuple) | st.dictionaries(ports, ports),
        ),
        max_size=3,
    ),
)


@given(topologies)
@example(Topology(store="a line\x85break"))
def test_what_is_dumped_is_read_back(topology: Topology) -> None:
    assert parse(dump(topology)) == topology
    assert parse_json(topology.model_dump_json()) == topology


@given(st.text(max_size=200) | st.binary(max_size=200))
def test_no_text_does_anything_but_parse_or_be_refused(text: str | bytes) -> None:
    assert outcome(parse, text)
    assert outcome(parse_json, text)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "store": plain,
            "blocks": plain
            | st.dictionaries(
                names,
                plain | st.dictionaries(st.sampled_from([*Block.model_fields, "x"]), plain),
            ),
            "pipelines": plain
            | st.dictionaries(
                names,
                plain
                | st.fixed_dictionaries({"blocks": plain})
                | st.fixed_dictionaries({"graph": plain, "outputs": plain})
                | st.fixed_dictionaries({"graph": st.dictionaries(names, plain)}),
            ),
        },
    )
)
def test_any_data_is_accepted_or_explained(data: dict[str, object]) -> None:
    result = outcome(parse, data)
    assert isinstance(result, Topology) or not any("Input should" in each for each in result)
