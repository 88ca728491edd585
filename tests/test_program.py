"""Programs: identity, files that must not be trusted, and running what was stored."""

from __future__ import annotations

import io
import json
import math
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from blockflow.archive import read_archive, write_archive
from blockflow.artifact import Digest, Manifest, Origin, Port, Store
from blockflow.cuts import Analysis
from blockflow.errors import ModelRefused, NotFound, StoreCorrupt
from blockflow.graph import input_ports, output_ports, plain_module
from blockflow.identity import digest_of, script_digest
from blockflow.program import load, read_script
from blockflow.topology import Precision


class Net(nn.Module):
    """A convolution, an in-place ReLU, a view by the batch size, a linear layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 4, 3)
            self.bn = nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.bn(self.conv(x))).mean((2, 3))
        result: Tensor = self.head(y.view(y.size(0), -1))
        return result


def traced(module: nn.Module, *shape: int, inputs: int = 1) -> ExportedProgram:
    examples = tuple(torch.randn(2, *(shape or (3, 8, 8))) for _ in range(inputs))
    rows = Dim("rows", min=1)
    return torch.export.export(
        module.eval(), examples, dynamic_shapes=tuple({0: rows} for _ in examples), strict=False
    )


def digest(program: ExportedProgram) -> Digest:
    return digest_of(program)


def manifest(program: ExportedProgram, *, mutates_inputs: bool = False) -> Manifest:
    return Manifest(
        format="torch.export",
        digest=digest(program),
        inputs=input_ports(program),
        outputs=output_ports(program),
        parameter_bytes=0,
        flops=0,
        mutates_inputs=mutates_inputs,
        origin=Origin(model="net", index=0, count=1, first="", last=""),
        files={},
    )


def stored(store: Store, program: ExportedProgram, *, mutates_inputs: bool = False) -> Manifest:
    return store.put(
        manifest(program, mutates_inputs=mutates_inputs),
        lambda folder: write_archive(program, folder / "program.pt2"),
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", create=True)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good file, which tests read and never change."""
    path = tmp_path_factory.mktemp("archive") / "net.pt2"
    write_archive(traced(Net()), path)
    return path


# ------------------------------------------------------------------------------------- identity


class Renamed(nn.Module):
    """`Net` with every name changed, registered in another order, with a weight nobody uses."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.unused = nn.Linear(9, 9)
        self.classifier = net.head
        self.stem = nn.ModuleDict({"norm": net.bn, "filter": net.conv})

    def forward(self, x: Tensor) -> Tensor:
        rows = x.size(0)
        features = torch.relu_(self.stem["norm"](self.stem["filter"](x))).mean((2, 3))
        result: Tensor = self.classifier(features.view(rows, -1))
        return result


def test_names_and_order_do_not_matter() -> None:
    net = Net()
    assert digest(traced(net)) == digest(traced(Net())) == digest(traced(Renamed(net)))


def test_one_weight_bit_matters() -> None:
    net = Net()
    before = digest(traced(net))
    with torch.no_grad():
        net.head.bias.view(torch.int32)[3] ^= 1
    assert digest(traced(net)) != before


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_buffers_matter(buffer: str) -> None:
    net = Net()
    before = digest(traced(net))
    getattr(net.bn, buffer)[0] += 1
    assert digest(traced(net)) != before


def test_buffers_that_nothing_uses_do_not_matter() -> None:
    net = Net()
    before = digest(traced(net))
    assert net.bn.num_batches_tracked is not None
    net.bn.num_batches_tracked += 1
    assert digest(traced(net)) == before


def test_arguments_of_operators_matter() -> None:
    net = Net()
    before = digest(traced(net))
    net.bn.eps = math.nextafter(net.bn.eps, 1)
    assert digest(traced(net)) != before


def test_sizes_and_dtypes_of_inputs_matter() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    assert digest(traced(Double(), 3)) != digest(traced(Double(), 4))
    whole = torch.export.export(Double(), (torch.zeros(2, 3, dtype=torch.int64),), strict=False)
    fixed = torch.export.export(Double(), (torch.zeros(2, 3),), strict=False)
    assert len({digest(whole), digest(fixed), digest(traced(Double(), 3))}) == 3


def test_memory_layout_of_weights_matters() -> None:
    # Kernels are chosen by layout, and kernels differ in the last bit.
    assert digest(traced(Net())) != digest(traced(Net().to(memory_format=torch.channels_last)))  # type: ignore[call-overload]


def test_default_arguments_are_the_same_said_or_unsaid() -> None:
    class Unsaid(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.add.Tensor(x, x)  # type: ignore[no-any-return]

    class Said(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.add.Tensor(x, x, alpha=1)  # type: ignore[no-any-return]

    assert digest(traced(Unsaid())) == digest(traced(Said()))


class Minus(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b


class Renaming(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"difference": left - right}


class Swapped(nn.Module):
    def forward(self, b: Tensor, a: Tensor) -> Tensor:
        return a - b


def test_ports_count_by_position_and_not_by_name() -> None:
    minus, renamed, swapped = (digest(traced(m(), 3, inputs=2)) for m in (Minus, Renaming, Swapped))
    assert minus == renamed != swapped


class TwoBranches(nn.Module):
    def __init__(self, first: str) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        if self.first == "left":
            left = x.sin().exp()
            right = x.cos().tanh()
        else:
            right = x.cos().tanh()
            left = x.sin().exp()
        return left * right


def test_the_order_in_which_branches_were_traced_does_not_matter() -> None:
    assert digest(traced(TwoBranches("left"), 3)) == digest(traced(TwoBranches("right"), 3))


class Overwriting(nn.Module):
    """What a value means depends on when its memory is written."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        alias = torch.dropout(y, 0.5, train=False)  # y itself, which its schema does not say
        match self.kind:
            case "before":
                alias.relu_()
                return y + 1
            case "after":
                z = y + 1
                alias.relu_()
                return z
            case "view":
                alias.view(-1)[:1].zero_()
                return y + 1
            case "twice":
                alias.relu_()
                alias.neg_()
                return y + 1
            case "twice the other way":
                alias.neg_()
                alias.relu_()
                return y + 1
        return y + 1


def test_writes_in_place_count_where_they_are_seen() -> None:
    kinds = ("before", "after", "view", "twice", "twice the other way", "never")
    found = {kind: digest(traced(Overwriting(kind), 3)) for kind in kinds}
    assert found["after"] == found["never"]
    assert len(set(found.values())) == len(kinds) - 1


def test_two_draws_are_not_one() -> None:
    class Once(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            noise = torch.rand_like(x)
            return noise - noise

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.rand_like(x) - torch.rand_like(x)

    assert digest(traced(Once(), 3)) != digest(traced(Twice(), 3))


def test_module_names_survive_a_file_of_torch(tmp_path: Path) -> None:
    torch.export.save(traced(Net()), tmp_path / "net.pt2")
    found = Analysis(read_archive(tmp_path / "net.pt2")).modules
    assert found == Analysis(traced(Net())).modules == {"conv": 0, "bn": 1, "head": 5}


def test_a_file_keeps_the_identity(archive: Path) -> None:
    assert digest(read_archive(archive)) == digest(traced(Net()))


def test_torchscript_is_its_bytes_and_its_declared_inputs(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"code and weights")
    x, y = Port("x", "float32", ("batch", 3)), Port("x", "float32", ("batch", 4))
    before = script_digest(path, [x])
    assert script_digest(path, [x]) == before != script_digest(path, [y])
    path.write_bytes(b"code and weightz")
    assert script_digest(path, [x]) != before


# --------------------------------------------------------------------------------------- running


def test_a_stored_program_computes_what_the_module_does(store: Store) -> None:
    net = Net()
    put = stored(store, traced(net))
    program = load(store, put.digest, "cpu")
    assert program.manifest == put
    assert program.device == torch.device("cpu")
    for rows in (1, 2, 7):
        x = torch.randn(rows, 3, 8, 8)
        with torch.inference_mode():
            expected = net(x)
        found = program({"x": x})
        assert list(found) == ["output"]
        assert torch.equal(found["output"], expected)
        assert found["output"].is_inference()


def test_the_file_holds_no_pickle_and_no_paths(archive: Path) -> None:
    with zipfile.ZipFile(archive) as members:
        for name in members.namelist():
            content = members.read(name)
            assert not content.startswith(b"\x80\x02"), name
            assert not content.startswith(b"PK"), name
            assert __file__.encode() not in content, name


def test_programs_with_dict_outputs_and_several_inputs(store: Store) -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"sum": a + b, "difference": a - b}

    put = stored(store, traced(Two(), 3, inputs=2))
    assert [p.name for p in put.outputs] == ["sum", "difference"]
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    found = load(store, put.digest, "cpu")({"b": b, "a": a})
    assert torch.equal(found["difference"], a - b)
    assert torch.equal(found["sum"], a + b)


def test_outputs_of_a_tuple_are_numbered() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            return x + 1, [x + 2, x + 3]

    names = [port.name for port in output_ports(traced(Pair(), 3))]
    assert names == ["output_0", "output_1_0", "output_1_1"]


class Overwrites(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_()


def test_inputs_are_copied_where_the_program_would_change_them(store: Store) -> None:
    put = stored(store, traced(Overwrites(), 3), mutates_inputs=True)
    x = torch.randn(2, 3)
    kept = x.clone()
    load(store, put.digest, "cpu")({"x": x})
    assert torch.equal(x, kept)


def test_devices_written_into_the_graph_are_replaced() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(3, device="cpu").to(x.device)

    module = plain_module(traced(Adds(), 3), "meta")
    (result,) = module(torch.empty(5, 3, device="meta"))
    assert result.device.type == "meta"
    assert result.shape == (5, 3)


def test_a_plain_module_has_only_the_weights_it_uses() -> None:
    names = dict(plain_module(traced(Renamed(Net()))).named_buffers())
    assert sum("unused" in name for name in names) == 0
    assert len(names) == 8  # weight and bias of three layers, mean and variance of one


def test_views_of_a_large_storage_are_stored_small(tmp_path: Path) -> None:
    net = Net()
    flat = torch.zeros(1_000_000)
    flat[:5] = net.head.bias.detach()
    net.head.bias = nn.Parameter(flat[:5])
    module = plain_module(traced(net))
    path = tmp_path / "small.pt2"
    write_archive(traced(module), path)
    assert path.stat().st_size < 100_000


def test_torchscript_runs(store: Store, tmp_path: Path) -> None:
    net = Net().eval()
    path = tmp_path / "net.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(net), path)
    x = torch.randn(3, 3, 8, 8)
    port = Port("image", "float32", ("batch", 3, 8, 8))
    described = msgspec.structs.replace(
        manifest(traced(net)),
        format="torchscript",
        digest=script_digest(path, [port]),
        inputs=(port,),
    )

    def copy(folder: Path) -> None:
        (folder / "program.pt").write_bytes(path.read_bytes())

    put = store.put(described, copy)
    found = load(store, put.digest, "cpu")({"image": x})
    with torch.inference_mode():
        assert torch.equal(found["output"], net(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_program_computes_on_a_gpu(store: Store) -> None:
    net = Net()
    put = stored(store, traced(net))
    program = load(store, put.digest, "cuda:0")
    x = torch.randn(3, 3, 8, 8)
    found = program({"x": x.cuda()})["output"]
    assert found.device == torch.device("cuda:0")
    with torch.inference_mode():
        torch.testing.assert_close(found.cpu(), net(x), rtol=1e-3, atol=1e-3)


def test_loading_checks_the_bytes(store: Store) -> None:
    put = stored(store, traced(Net()))
    path = store.path(put.digest) / "program.pt2"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreCorrupt, match=r"program\.pt2 is damaged"):
        load(store, put.digest, "cpu")
    with pytest.raises(NotFound):
        load(store, "sha256-" + "0" * 64, "cpu")


# ---------------------------------------------------------------------------------- hostile files


class Bomb:
    """Unpickling it creates a file: the proof that code ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def tampered(
    source: Path,
    target: Path,
    change: dict[str, Callable[[bytes], bytes]] | None = None,
    add: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A copy of an archive with some members changed and others added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            short = name.partition("/")[2]
            new.writestr(name, (change or {}).get(short, lambda content: content)(old.read(name)))
        prefix = old.namelist()[0].partition("/")[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # zipfile minds duplicate names
            for name, content in (add or {}).items():
                new.writestr(f"{prefix}/{name}", content)
    return target


def in_json(edit: Callable[[Any], object]) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        document = json.loads(content)
        edit(document)
        return json.dumps(document).encode()

    return change


def instead(content: bytes, _: bytes) -> bytes:
    return content


SAMPLES = "data/sample_inputs/model.pt"
MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


def test_an_untouched_copy_is_read(archive: Path, tmp_path: Path) -> None:
    assert digest(read_archive(tampered(archive, tmp_path / "copy.pt2"))) == digest(traced(Net()))


def test_pickled_sample_inputs_are_refused_and_not_run(archive: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for content in (saved(((Bomb(marker),), {})), pickle.dumps(Bomb(marker)), b"garbage"):
        hostile = tampered(archive, tmp_path / "h.pt2", {SAMPLES: partial(instead, content)})
        with pytest.raises(ModelRefused, match=r"h\.pt2: data/sample_inputs/model\.pt holds more"):
            read_archive(hostile)
    assert not marker.exists()


def test_honest_sample_inputs_are_fine(archive: Path, tmp_path: Path) -> None:
    honest = saved(((torch.zeros(2, 3, 8, 8),), {}))
    copy = tampered(archive, tmp_path / "h.pt2", {SAMPLES: partial(instead, honest)})
    read_archive(copy)


def test_what_torch_itself_saves_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plain torch.pt2"
    torch.export.save(traced(Net()), path)
    assert digest(read_archive(path)) == digest(traced(Net()))


@pytest.mark.parametrize("config", [WEIGHTS, CONSTANTS])
def test_pickled_weights_are_refused_and_not_run(
    archive: Path, tmp_path: Path, config: str
) -> None:
    marker = tmp_path / "ran"
    kind, file = ("weights", "weight_0") if config == WEIGHTS else ("constants", "tensor_0")

    def edit(document: Any) -> None:
        document["config"]["head.bias"] = {
            "path_name": file,
            "is_param": False,
            "use_pickle": True,
            "tensor_meta": None,
        }

    hostile = tampered(
        archive,
        tmp_path / "h.pt2",
        {config: in_json(edit), f"data/{kind}/{file}": lambda _: saved(Bomb(marker))},
    )
    with pytest.raises(ModelRefused, match=rf"{config} asks to unpickle '{file}'"):
        read_archive(hostile)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("member", "why"),
    [
        ("data/weights/model.pt", "it is a pickle"),
        ("data/constants/model.pt", "it is a pickled object"),
        ("data/constants/custom_obj_0", "it is a pickled object"),
        ("data/constants/opaque_obj_0", "it is a pickled object"),
        ("data/aotinductor/model/model.so", "it is compiled code"),
        ("models/other.json", "one program per file"),
        ("version", "unknown member"),
        ("../../etc/passwd", "unknown member"),
    ],
)
def test_members_that_do_not_belong_are_refused(
    archive: Path, tmp_path: Path, member: str, why: str
) -> None:
    marker = tmp_path / "ran"
    hostile = tampered(archive, tmp_path / "h.pt2", add={member: saved(Bomb(marker))})
    with pytest.raises(ModelRefused, match=f"{member} does not belong .*{why}"):
        read_archive(hostile)
    assert not marker.exists()


def graph(document: Any) -> Any:
    return document["graph_module"]["graph"]


def root_call(document: Any) -> Any:
    return document["graph_module"]["module_call_graph"][0]["signature"]


def first_symbol(document: Any) -> Any:
    return graph(document)["tensor_values"]["x"]["sizes"][0]["as_expr"]


SHELL = "__import__('pathlib').Path({marker!r}).touch()"


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda d, shell: first_symbol(d).update(expr_str=shell), "shape expression"),
        (lambda d, shell: first_symbol(d).update(expr_str=f"Symbol({shell})"), "shape expression"),
        (
            lambda d, _: first_symbol(d).update(expr_str="Pow(Integer(9), Pow(Integer(9), 9))"),
            "shape expression",
        ),
        (lambda d, _: graph(d)["nodes"][1].update(target="torch.load"), "calls 'torch.load'"),
        (lambda d, _: graph(d)["nodes"][1].update(target="torch.os.system"), "calls"),
        (lambda d, _: graph(d)["nodes"][1].update(target="_operator.attrgetter"), "calls"),
        (
            lambda d, _: graph(d)["nodes"][1].update(target="torch.ops.aten.from_file.default"),
            "calls 'torch.ops.aten.from_file.default'",
        ),
        (
            lambda d, _: graph(d)["nodes"][1].update(target="torch.ops.aten.__init__.default"),
            "calls",
        ),
        (lambda d, shell: graph(d)["nodes"][1].update(name=f"y = {shell};"), "identifiers"),
        (lambda d, _: graph(d)["nodes"][1].update(name="torch.load"), "identifiers"),
        (
            lambda d, shell: graph(d)["inputs"][-1].update(as_tensor={"name": f"x={shell}"}),
            "identifiers",
        ),
        (
            lambda d, shell: root_call(d).update(forward_arg_names=[f"x={shell}"]),
            "identifiers",
        ),
        (
            lambda d, _: root_call(d).update(
                in_spec='[1, {"type": "collections.defaultdict", "context": "{}", '
                '"children_spec": []}]'
            ),
            "takes or returns a collections.defaultdict",
        ),
        (lambda d, _: root_call(d).update(in_spec="[2, {}]"), "unknown version"),
        (
            lambda d, _: graph(d)["nodes"][1]["inputs"][0].update(
                arg={"as_custom_obj": {"name": "x", "class_fqn": "y"}}
            ),
            "script or opaque object",
        ),
    ],
)
def test_code_in_the_graph_is_refused_and_not_run(
    archive: Path, tmp_path: Path, edit: Callable[[Any, str], object], why: str
) -> None:
    marker = tmp_path / "ran"
    shell = SHELL.format(marker=str(marker))
    hostile = tampered(
        archive, tmp_path / "h.pt2", {MODEL: in_json(lambda document: edit(document, shell))}
    )
    with pytest.raises(ModelRefused, match=rf"h\.pt2: models/model\.json .*{why}"):
        read_archive(hostile)
    assert not marker.exists()


def test_guards_and_metadata_are_dropped(archive: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    shell = SHELL.format(marker=str(marker))

    def edit(document: Any) -> None:
        document["guards_code"] = [shell]
        for node in graph(document)["nodes"]:
            node["metadata"] = {"stack_trace": f"\n{shell}\n", "torch_fn": f"a;{shell}"}

    copy = tampered(archive, tmp_path / "h.pt2", {MODEL: in_json(edit)})
    program = read_archive(copy)
    plain_module(program)(torch.zeros(1, 3, 8, 8))
    program.module()(torch.zeros(2, 3, 8, 8))
    assert not marker.exists()


def test_a_weight_cannot_reach_outside_its_bytes(archive: Path, tmp_path: Path) -> None:
    def edit(document: Any) -> None:
        document["config"]["head.bias"]["tensor_meta"]["sizes"] = [{"as_int": 1_000_000}]

    hostile = tampered(archive, tmp_path / "h.pt2", {WEIGHTS: in_json(edit)})
    with pytest.raises(ModelRefused, match="torch cannot read"):
        read_archive(hostile)


def test_compressed_and_doubled_members_are_refused(archive: Path, tmp_path: Path) -> None:
    squeezed = tampered(archive, tmp_path / "c.pt2", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelRefused, match="is compressed"):
        read_archive(squeezed)
    doubled = tampered(archive, tmp_path / "d.pt2", add={MODEL: b"{}"})
    with pytest.raises(ModelRefused, match="is there twice"):
        read_archive(doubled)


def test_files_that_are_no_archive_are_refused(archive: Path, tmp_path: Path) -> None:
    whole = archive.read_bytes()
    path = tmp_path / "x.pt2"
    for content in (
        b"",
        b"PK",
        b"\x80\x02}q\x00.",
        *(whole[: len(whole) * n // 9] for n in range(9)),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelRefused, match=r"x\.pt2"):
            read_archive(path)
    with pytest.raises(ModelRefused, match="there is no file"):
        read_archive(tmp_path / "absent.pt2")
    path.write_bytes(saved(Bomb(tmp_path / "ran")))
    with pytest.raises(ModelRefused):
        read_archive(path)
    assert not (tmp_path / "ran").exists()


def refusal(path: Path) -> str:
    """Why a file is refused, or nothing if it is read. Any other error fails the test."""
    try:
        read_archive(path)
    except ModelRefused as error:
        return str(error)
    return ""


def test_any_flipped_byte_is_harmless(archive: Path, tmp_path: Path) -> None:
    whole = archive.read_bytes()
    path = tmp_path / "x.pt2"
    for place in range(0, len(whole), 97):
        content = bytearray(whole)
        content[place] ^= 0x41
        path.write_bytes(content)
        assert "\n" not in refusal(path)


def test_any_changed_value_is_harmless(archive: Path, tmp_path: Path) -> None:
    choose = random.Random(0)

    def scramble(document: Any) -> None:
        places: list[tuple[Any, Any]] = []

        def visit(value: Any) -> None:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                places.append((value, key))
                if isinstance(item, dict | list):
                    visit(item)

        visit(document)
        owner, key = choose.choice(places)
        owner[key] = choose.choice([None, -1, 2**70, 0.5, "x", "", [], [[]], {}, {"a": {}}, True])

    for _ in range(60):
        member = choose.choice([MODEL, MODEL, WEIGHTS])
        copy = tampered(archive, tmp_path / "x.pt2", {member: in_json(scramble)})
        assert "\n" not in refusal(copy)


def test_a_reader_of_torchscript_refuses_other_files(store: Store, tmp_path: Path) -> None:
    for content in (b"", b"garbage", saved(Bomb(tmp_path / "ran"))):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(ModelRefused, match="is no TorchScript file, or a damaged one: "):
            read_script(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    ("precision", "channels_last", "tolerance"),
    [("fp32", True, 1e-5), ("fp16", False, 1e-2), ("bf16", True, 5e-2)],
)
def test_what_is_computed_otherwise_looks_the_same_from_outside(
    store: Store, precision: Precision, channels_last: bool, tolerance: float
) -> None:
    net = Net()
    kept = stored(store, traced(net))
    program = load(store, kept.digest, "cpu", precision=precision, channels_last=channels_last)
    x = torch.randn(3, 3, 8, 8)
    (found,) = program({kept.inputs[0].name: x}).values()
    with torch.inference_mode():
        expected = net.eval()(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max())
    if precision != "fp32":
        assert not torch.equal(found, expected)


class Casts(nn.Module):
    """Names float32 in the graph, flattens an image, and passes integers through."""

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.nn.functional.conv2d(x, torch.ones(2, 3, 3, 3), padding=1)
        y = torch.cat([y, torch.zeros(y.shape[0], 2, 4, 4)], 1)
        return y.view(y.shape[0], -1).softmax(1, dtype=torch.float32), ids + 1


def test_types_and_views_in_the_graph_follow(store: Store) -> None:
    rows = Dim("rows", min=1)
    program = torch.export.export(
        Casts(),
        (torch.randn(2, 3, 4, 4), torch.ones(2, 1, dtype=torch.int64)),
        dynamic_shapes=({0: rows}, {0: rows}),
        strict=False,
    )
    kept = stored(store, program)
    loaded = load(store, kept.digest, "cpu", precision="bf16", channels_last=True)
    x, ids = torch.randn(3, 3, 4, 4), torch.arange(3).view(3, 1)
    names = [port.name for port in kept.inputs]
    scores, numbers = loaded({names[0]: x, names[1]: ids}).values()
    expected, _ = Casts()(x, ids)
    assert (scores.dtype, numbers.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.05)
    assert numbers.flatten().tolist() == [1, 2, 3]
