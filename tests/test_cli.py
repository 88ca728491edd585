from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import msgspec
import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

import full_disk
from blockflow import __version__, cli
from blockflow.api import create_app
from blockflow.artifact import (
    TENSORS,
    WEIGHTS_FILE,
    Digest,
    Manifest,
    Origin,
    Port,
    Store,
    StoredWeight,
    tensor_name,
)
from blockflow.client import ControlClient
from blockflow.edit import Verb
from blockflow.errors import StartFailed, TopologyInvalid
from blockflow.gateway.http import create_app as create_gateway
from blockflow.options import ServeOptions
from blockflow.reconcile import validate
from blockflow.state import State
from blockflow.status import BlockState
from blockflow.topology import Block, Generation, Pipeline, Topology, dump, parse
from fake_controller import DIGEST, WANTED, FakeController
from fake_gateway import serving, zoo


def run(*arguments: object) -> Result:
    """Run the command line in this process, on a terminal of 80 columns."""
    return CliRunner().invoke(
        cli.app, [str(each) for each in arguments], env={"COLUMNS": "80", "TERM": "dumb"}
    )


def spawn(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start the command line as users do; stdout and stderr are read as text."""
    # Ctrl-C as on a terminal, also where these tests run in the background and ignore it.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{heed}; from blockflow.cli import main; main()"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )  # type: ignore[call-overload]


def refused(result: Result, code: int = 1) -> list[str]:
    """The lines on stderr of a verb that failed as it should."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stderr.splitlines()


@pytest.fixture
def controller() -> FakeController:
    return FakeController()


@pytest.fixture
def control(controller: FakeController) -> Iterator[str]:
    """The address of a server's management API."""
    with serving(create_app(controller)) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture
def gateway() -> Iterator[str]:
    """The address of a server's inference API."""
    with serving(create_gateway(zoo())) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture
def closed() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def topology_file(tmp_path: Path) -> Path:
    path = tmp_path / "topology.yaml"
    path.write_text(dump(WANTED.model_copy(update={"store": "store"})))
    return path


# --------------------------------------------------------------------------------- the whole


def test_version() -> None:
    assert run("--version").output == f"blockflow {__version__}\n"


def test_help_lists_every_verb() -> None:
    output = run("--help").output
    for verb in ("split", "inspect", "store", "share", "serve", "apply", "status", "infer", "demo"):
        assert verb in output


def test_help_says_every_word_of_every_option() -> None:
    """Markup would swallow what stands in brackets, such as [batch,3,224,224] or <index>."""

    def options(command: click.Command, path: list[str]) -> Iterator[tuple[str, str]]:
        for name, inner in getattr(command, "commands", {}).items():
            yield from options(inner, [*path, name])
        wide = {"COLUMNS": "400", "TERM": "dumb"}
        shown = CliRunner().invoke(cli.app, [*path, "--help"], env=wide).output
        for each in command.params:
            if words := getattr(each, "help", None):
                yield words.replace("`", ""), shown

    found = list(options(typer.main.get_command(cli.app), []))
    assert len(found) > 50
    for words, shown in found:
        assert " ".join(words.split()) in " ".join(shown.replace("`", "").split())


def test_what_does_not_compute_starts_without_torch() -> None:
    code = (
        "import sys, blockflow.cli, blockflow.client, blockflow.status, blockflow.options\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_verbs_that_ask_a_server_never_import_torch(
    control: str, gateway: str, topology_file: Path
) -> None:
    code = """
import sys
from typer.testing import CliRunner
from blockflow.cli import app
for verb in sys.argv[1].split("|"):
    result = CliRunner().invoke(app, verb.split())
    assert result.exit_code == 0, result.output
assert "torch" not in sys.modules
"""
    verbs = (
        f"apply {topology_file} --server {control}|status --server {control}"
        f"|infer double --random --server {gateway}"
    )
    subprocess.run([sys.executable, "-c", code, verbs], check=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["apply"],
        ["status", "--nonsense"],
        ["infer", "p"],
        ["infer", "p", "--input", "x"],
        ["infer", "p", "--random", "--rows", "0"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    refused(run(*arguments), 2)


def test_a_real_process_reports_an_error_in_one_line(closed: str) -> None:
    process = spawn("status", "--server", closed)
    output, error = process.communicate(timeout=30)
    assert (process.returncode, output) == (1, "")
    assert error == (
        f"error: no BlockFlow server answers at {closed}; start one with `blockflow serve`\n"
    )


def test_a_traceback_is_shown_on_request(closed: str) -> None:
    process = spawn("status", "--server", closed, env=os.environ | {"BLOCKFLOW_TRACEBACK": "1"})
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Traceback" in error


def test_ctrl_c_exits_with_130() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        process = spawn("status", "--server", f"http://127.0.0.1:{listener.getsockname()[1]}")
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(1)  # it has asked, and waits for the answer
            process.send_signal(signal.SIGINT)
            output, error = process.communicate(timeout=30)
    assert (process.returncode, output, error) == (130, "", "")


# ------------------------------------------------------------------------------------- split

TINY = """
import torch

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))

    def forward(self, x):
        return self.layers(x)
"""


def test_split_writes_blocks_and_a_topology_that_finds_them(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    (tmp_path / "deploy").mkdir()
    process = spawn(
        *("split", "tiny:Tiny", "--blocks", 3, "--store", "store", "--name", "toy"),
        *("--input", "x:float32[batch,4]", "-o", "deploy/topology.yaml"),
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "80"},
    )
    output, error = process.communicate(timeout=100)
    assert (process.returncode, error) == (0, "")
    assert max(map(len, output.splitlines())) <= 100
    topology = parse((tmp_path / "deploy" / "topology.yaml").read_text())
    assert topology.store == "../store"
    (name,) = topology.pipelines
    assert name == "toy"
    store = Store(tmp_path / "store")
    chain = [topology.blocks[each] for each in topology.pipelines[name].blocks]
    manifests: dict[Digest, Manifest | str] = {
        Digest(block.artifact): store.verify(block.artifact) for block in chain
    }
    assert len(manifests) == 3
    assert validate(topology, manifests, ["cpu"]) == []
    for block in chain:
        assert block.artifact.removeprefix("sha256-")[:12] in output


def test_split_refuses_bad_names_before_it_works(tmp_path: Path) -> None:
    output = tmp_path / "topology.yaml"
    arguments = ["split", "resnet18", "--blocks", 2, "--store", tmp_path / "store", "-o", output]
    assert len(refused(run(*arguments, "--name", "a b", "--device", "gpu"))) == 3
    output.write_text("mine")
    assert refused(run(*arguments)) == [f"error: {output} exists; --force replaces it"]
    assert output.read_text() == "mine"
    missing = tmp_path / "missing" / "topology.yaml"
    (line,) = refused(run(*arguments[:-1], missing))
    assert line.startswith("error: there is no directory ")
    assert not (tmp_path / "store").exists()


SPLIT_INTO_A_FULL_DISK = """
    import torch
    from typer.testing import CliRunner
    from blockflow.artifact import Store
    from blockflow.cli import app

    def stack():
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(12)))
        model.example_inputs = {"input": torch.zeros(2, 128)}
        return model

    def split(*more):
        arguments = ["--store", "store", "-o", "topology.yaml", *more]
        done = CliRunner().invoke(app, ["split", "__main__:stack", "--blocks", "4", *arguments])
        print(done.exit_code, "|", done.stderr.strip(), "|", done.stdout.strip()[-40:])
        store = Store(ROOT / "store")
        assert list((ROOT / "store" / "tmp").iterdir()) == []
        used = set()
        for digest in store.digests():
            used |= {each.sha256 for each in store.weights(store.verify(digest)).values()}
        assert set(store.tensors()) == used
        print(len(store.digests()), (ROOT / "topology.yaml").exists())

    os.chdir(ROOT)
    for allowed in (int(sys.argv[3]), int(sys.argv[4]), 6_000):
        allow(allowed)
        split()
    (ROOT / "topology.yaml").write_text("mine")
    allow(0)
    split("--force")
    print((ROOT / "topology.yaml").read_text())
"""


@pytest.mark.parametrize("kind", full_disk.kinds())
def test_splitting_into_a_full_disk_is_one_clear_message(tmp_path: Path, kind: str) -> None:
    """A block has three layers of 66 kB: the disk has room for none of them, then for one block
    (a limit is for each file, so that it is none again), at last for all. When a topology cannot
    be written, the one before stays.
    """
    sizes = ("40", "260") if kind == "tmpfs" else ("20", "60")
    done = full_disk.run(kind, tmp_path, SPLIT_INTO_A_FULL_DISK, *sizes)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in lines[0], lines[2]:
        code, error, said = (each.strip() for each in line.split("|"))
        assert (code, said) == ("1", "")
        assert error.startswith("error: no room for artifact sha256-")
        assert "in the store at store: the disk is full" in error
    assert (lines[1], lines[3]) == ("0 False", "1 False" if kind == "tmpfs" else "0 False")
    assert lines[4].startswith("0 |  | ")
    assert lines[5] == "4 True"
    assert lines[6].startswith("1 | error: topology.yaml cannot be written (")
    assert lines[-2:] == ["4 True", "mine"]


# ------------------------------------------------------------------------------------- serve


def test_every_option_of_the_server_is_a_flag_with_its_default() -> None:
    parameters = inspect.signature(cli.server.serve).parameters
    assert set(parameters) == set(ServeOptions.model_fields)
    for name, field in ServeOptions.model_fields.items():
        assert parameters[name].default == field.default, name


def test_a_host_that_others_can_reach_is_refused() -> None:
    (line,) = refused(run("serve", "--host", "192.168.0.7"))
    assert line.startswith("error: host: 192.168.0.7 is not a loopback address")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.53", "::1", "localhost"])
def test_loopback_hosts_are_taken(host: str) -> None:
    assert ServeOptions(host=host).host == host


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--port", "70000"], "control_port"),
        (["--queue-depth", "0"], "queue_depth"),
        (["--log-level", "loud"], "log_level"),
    ],
)
def test_options_out_of_range_are_named(flags: list[str], word: str) -> None:
    (line,) = refused(run("serve", *flags))
    assert line.startswith(f"error: {word}: ")


def test_serve_refuses_a_file_that_is_not_there_or_not_a_topology(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert refused(run("serve", "--topology", missing)) == [
        f"error: {missing}: No such file or directory"
    ]
    bad = tmp_path / "bad.yaml"
    bad.write_text("blocks: {a: {}, b: {device: gpu, artifact: x}}")
    assert refused(run("serve", "--topology", bad)) == [
        "error: the topology has 3 problems:",
        "  blocks.a.artifact: is missing",
        (
            "  blocks.b.artifact: must be a digest: sha256- and 64 hex digits, "
            "as `blockflow split` prints it, not 'x'"
        ),
        "  blocks.b.device: must be cpu or cuda:<index>, such as cuda:0, not 'gpu'",
    ]


# ------------------------------------------------------------------------------------- apply


def test_apply_sends_the_file_with_an_absolute_store(
    control: str, controller: FakeController, topology_file: Path
) -> None:
    result = run("apply", topology_file, "--server", control)
    assert result.output == "started: a, b\ngeneration 1 serves\n"
    assert controller.current.store == str(topology_file.parent / "store")
    assert controller.current.blocks == WANTED.blocks


def test_apply_says_what_a_dry_run_would_do(
    control: str, controller: FakeController, topology_file: Path
) -> None:
    result = run("apply", topology_file, "--dry-run", "--server", control)
    assert result.output == (
        "would be started: a, b\ngeneration 0 still serves: this was a dry run\n"
    )
    assert controller.current == Topology()


def test_apply_leaves_the_store_to_the_server_where_the_file_names_none(
    control: str, controller: FakeController, tmp_path: Path
) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text("{}")
    assert run("apply", path, "--server", control).exit_code == 0
    assert controller.current.store is None


def test_apply_lists_every_problem_that_the_server_finds(
    control: str, controller: FakeController, topology_file: Path
) -> None:
    controller.error = TopologyInvalid(["block a: no device", "pipeline p: no block"])
    assert refused(run("apply", topology_file, "--server", control)) == [
        "error: the topology has 2 problems:",
        "  block a: no device",
        "  pipeline p: no block",
    ]


def test_apply_says_why_a_start_failed(
    control: str, controller: FakeController, topology_file: Path
) -> None:
    controller.error = StartFailed("worker a: out of memory; generation 1 keeps serving")
    assert refused(run("apply", topology_file, "--server", control)) == [
        "error: worker a: out of memory; generation 1 keeps serving"
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"a: {b", "not valid YAML: line 1"), (b"\xff", "not UTF-8"), (b"", "it is empty")],
)
def test_apply_refuses_a_file_that_is_no_yaml(
    control: str, tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "topology.yaml"
    path.write_bytes(content)
    first, problem = refused(run("apply", path, "--server", control))
    assert first == "error: the topology has 1 problem:"
    assert words in problem


def test_apply_refuses_a_directory(tmp_path: Path) -> None:
    assert refused(run("apply", tmp_path)) == [f"error: {tmp_path}: Is a directory"]


# ------------------------------------------------------------------------------------ status


def test_status_of_a_server_without_blocks(control: str) -> None:
    assert run("status", "--server", control).output == "generation 0\nnothing is deployed\n"


def test_status_shows_everything_within_80_columns(
    control: str, controller: FakeController
) -> None:
    long = "a-block-with-a-name-as-long-as-names-may-be." + "x" * 19
    controller.current = Topology(
        blocks={long: Block(artifact=DIGEST, device="cuda:10"), "b": Block(artifact=DIGEST)},
        pipelines={long: Pipeline(blocks=(long, "b"))},
    )
    controller.states = {"b": (BlockState.STARTING, "loads [3 of 4] files")}
    output = run("status", "--server", control).output
    assert max(map(len, output.splitlines())) <= 80
    for words in (
        "starting",
        "ready",
        "cuda:10",
        "3.1 kB",
        "gateway",
        "shm",
        "loads [3 of 4] files",
    ):
        assert words in output


def test_status_as_json(control: str, controller: FakeController) -> None:
    controller.current = WANTED
    shown = json.loads(run("status", "--json", "--server", control).output)
    keys = {"generation", "pipelines", "blocks", "gateway", "devices", "problem"}
    assert set(shown) == keys
    assert [channel["peer"] for channel in shown["gateway"]["channels"]] == ["a"]
    assert [block["name"] for block in shown["blocks"]] == ["a", "b"]
    assert shown["devices"][0]["name"] == "cpu"


# ------------------------------------------------------------------------------------- infer


def test_infer_sends_arrays_and_saves_the_answer(gateway: str, tmp_path: Path) -> None:
    np.save(tmp_path / "left.npy", np.float32([[1, 2]]))
    np.save(tmp_path / "right.npy", np.int64([[3, 30]]))
    result = run(
        *("infer", "two-heads", "--server", gateway, "-o", tmp_path / "out.npz"),
        *("--input", f"left={tmp_path / 'left.npy'}", "-i", f"right={tmp_path / 'right.npy'}"),
    )
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80 + len(str(tmp_path))
    assert "answered in " in result.output
    with np.load(tmp_path / "out.npz") as saved:
        assert set(saved) == {"sum", "big", "half"}
        np.testing.assert_array_equal(saved["sum"], [[4, 32]])
        np.testing.assert_array_equal(saved["big"], [[False, True]])


def test_infer_says_where_the_time_went(gateway: str) -> None:
    result = run("infer", "double", "--random", "--timing", "--server", gateway)
    assert result.exit_code == 0, result.output
    assert re.search(r"trunk +0\.100 +0\.200 +1\.250", result.output)
    assert "6.5 ms in the server" in result.output


def test_infer_makes_up_the_inputs_that_are_not_given(gateway: str, tmp_path: Path) -> None:
    np.save(tmp_path / "right.npy", np.int64([[3, 30]] * 3))
    result = run(
        *("infer", "two-heads", "--server", gateway, "--random", "--rows", 3),
        *("--input", f"right={tmp_path / 'right.npy'}"),
    )
    assert result.exit_code == 0, result.output
    assert "3×2" in result.output


def test_any_output_name_can_be_saved(tmp_path: Path) -> None:
    cli.requests._save(
        tmp_path / "out.npz", {"file": np.zeros(2), "allow_pickle": np.ones((), bool)}
    )
    with np.load(tmp_path / "out.npz") as saved:
        assert saved["file"].shape == (2,)
        assert saved["allow_pickle"]


def test_infer_reports_what_the_server_refuses(gateway: str) -> None:
    (line,) = refused(run("infer", "nobody", "--random", "--server", gateway))
    assert line.startswith("error: ")
    assert "nobody" in line


def test_infer_refuses_files_that_hold_no_array(tmp_path: Path, gateway: str) -> None:
    bad, pickled, many = tmp_path / "bad.npy", tmp_path / "pickled.npy", tmp_path / "many.npz"
    bad.write_text("hello")
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    np.savez(many, a=np.zeros(1))
    for path in (bad, pickled, many, tmp_path / "missing.npy"):
        (line,) = refused(run("infer", "double", "--input", f"x={path}", "--server", gateway))
        assert line.startswith("error: ")
        assert str(path) in line


# ------------------------------------------------------------------------------------- store


def put(store: Store, digest: str, content: bytes, index: int = 0) -> Digest:
    """An artifact of one program file and one tensor file; neither is looked into here."""

    def write(folder: Path) -> None:
        (folder / "program.pt2").write_bytes(b"program")
        sha256 = hashlib.sha256(content).hexdigest()
        (folder / TENSORS).mkdir()
        (folder / TENSORS / tensor_name(sha256)).write_bytes(content)
        weight = StoredWeight(sha256, len(content), "uint8", (len(content),))
        (folder / WEIGHTS_FILE).write_bytes(msgspec.json.encode({"w": weight}))

    port = Port("x", "float32", ("batch", 3))
    manifest = Manifest(
        format="torch.export",
        digest=Digest(f"sha256-{digest * 64}"),
        inputs=(port,),
        outputs=(port,),
        parameter_bytes=1_500_000,
        flops=2_000_000,
        mutates_inputs=False,
        origin=Origin(model="net", index=index, count=2, first="a", last="b"),
        files={},
    )
    return store.put(manifest, write).digest


@pytest.fixture
def stored(tmp_path: Path) -> Store:
    """Two artifacts, of which `topology.yaml` uses the one that begins with b."""
    store = Store(tmp_path / "store", create=True)
    put(store, "a", b"weight of a", index=1)
    digest = put(store, "b", b"weight of b")
    (tmp_path / "topology.yaml").write_text(
        dump(Topology(store="store", blocks={"used": Block(artifact=digest)}))
    )
    return store


def test_store_ls_shows_origin_costs_and_users(stored: Store, tmp_path: Path) -> None:
    result = run("store", "ls", "--store", stored.root, "-t", tmp_path / "topology.yaml")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["artifact", "model", "block", "weights", "work/row", "used", "by"]
    assert lines[2].split() == [
        *("b" * 12, "net", "1/2", "1.5", "MB", "2.0", "MFLOP", "topology.yaml:", "used")
    ]
    assert lines[3].split() == ["a" * 12, "net", "2/2", "1.5", "MB", "2.0", "MFLOP"]
    assert lines[-1] == "2 artifacts, 2 tensor files with 22 B"


def test_store_ls_goes_on_after_a_damaged_manifest(stored: Store) -> None:
    (stored.path(f"sha256-{'a' * 64}") / "manifest.json").write_text("{}")
    result = run("store", "ls", "--store", stored.root)
    (line,) = refused(result)
    assert "manifest.json is not a manifest" in line
    assert "bbbbbbbbbbbb" in result.output


def test_store_ls_of_an_empty_store(tmp_path: Path) -> None:
    assert (
        run("store", "ls", "--store", tmp_path).output == "0 artifacts, 0 tensor files with 0 B\n"
    )
    (line,) = refused(run("store", "ls", "--store", tmp_path / "none"))
    assert "there is no artifact store at" in line


def test_store_verify_names_every_damaged_file(stored: Store) -> None:
    assert run("store", "verify", "--store", stored.root).output == "2 artifacts verified\n"
    program = stored.path(f"sha256-{'a' * 64}") / "program.pt2"
    program.write_bytes(b"x")
    (tensor,) = [
        stored.tensor_path(sha)
        for sha, size in stored.tensors().items()
        if sha == hashlib.sha256(b"weight of b").hexdigest()
    ]
    tensor.write_bytes(b"x")
    first, second, last = refused(run("store", "verify", "--store", stored.root))
    assert first.startswith(f"artifact aaaaaaaaaaaa: {program} is damaged")
    assert second.startswith(f"artifact bbbbbbbbbbbb: {tensor} is damaged")
    assert last == "2 of 2 artifacts are damaged"
    assert len(refused(run("store", "verify", "aaaa", "--store", stored.root))) == 2


def test_store_verify_refuses_what_is_not_there(stored: Store) -> None:
    (line,) = refused(run("store", "verify", "cccc", "--store", stored.root))
    assert "has no artifact cccc" in line


def test_store_gc_must_be_told_what_to_keep(stored: Store) -> None:
    (line,) = refused(run("store", "gc", "--store", stored.root))
    assert line.startswith("error: say what must stay: --keep TOPOLOGY")
    assert len(stored.digests()) == 2


def test_store_gc_keeps_what_a_topology_uses(stored: Store, tmp_path: Path) -> None:
    verb = ("store", "gc", "--store", stored.root, "--keep", tmp_path / "topology.yaml")
    result = run(*verb, "--dry-run")
    assert result.exit_code == 0
    first, last = result.output.splitlines()
    assert first == "would be removed: aaaaaaaaaaaa net 2/2"
    assert last.startswith("would be freed: ")
    assert last.endswith("1 artifact and 1 tensor file")
    assert len(stored.digests()) == 2
    assert run(*verb).output.splitlines()[0] == "removed: aaaaaaaaaaaa net 2/2"
    assert stored.digests() == [f"sha256-{'b' * 64}"]
    assert run(*verb).output == "freed: 0 B, 0 artifacts and 0 tensor files\n"
    stored.verify(f"sha256-{'b' * 64}")


def test_store_gc_keeps_what_a_running_server_uses(
    stored: Store, control: str, controller: FakeController
) -> None:
    digest = f"sha256-{'a' * 64}"
    controller.current = Topology(blocks={"a": Block(artifact=digest)})
    assert run("store", "gc", "--store", stored.root, "--server", control).exit_code == 0
    assert stored.digests() == [digest]


def test_store_gc_keeps_what_a_server_can_be_rolled_back_to(
    stored: Store, control: str, controller: FakeController
) -> None:
    before = Topology(blocks={"a": Block(artifact=f"sha256-{'a' * 64}")})
    for topology in (before, Topology()):
        with ControlClient(control) as client:
            client.put_topology(topology.model_dump(mode="json"))
    assert run("store", "gc", "--store", stored.root, "--server", control).exit_code == 0
    assert stored.digests() == [f"sha256-{'a' * 64}"]


def test_store_gc_reads_topologies_when_writers_are_done(stored: Store, tmp_path: Path) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text(dump(Topology()))
    with ThreadPoolExecutor(1) as pool:
        with stored.writing():
            collecting = pool.submit(run, "store", "gc", "--store", stored.root, "-k", path)
            with pytest.raises(TimeoutError):
                collecting.result(timeout=0.5)
            digest = f"sha256-{'a' * 64}"
            path.write_text(dump(Topology(blocks={"a": Block(artifact=digest)})))
        assert collecting.result(timeout=30).exit_code == 0
    assert stored.digests() == [digest]


def test_store_gc_removes_nothing_when_the_server_does_not_answer(
    stored: Store, closed: str
) -> None:
    (line,) = refused(run("store", "gc", "--store", stored.root, "--server", closed))
    assert "no BlockFlow server answers" in line
    assert len(stored.digests()) == 2


def test_store_gc_of_everything(stored: Store) -> None:
    assert run("store", "gc", "--store", stored.root, "--all").exit_code == 0
    assert stored.digests() == []
    assert stored.tensors() == {}


def test_store_gc_knows_the_topologies_that_split_wrote(family: Path) -> None:
    store = Store(family / "store", create=True)
    unused = put(store, "a", b"weight of a")
    verb = ("store", "gc", "--store", "store", "--all")
    done = run("split", "family_of_models:one", "-n", "2", "-o", "topology.yaml")
    assert done.exit_code == 0, done.output
    used = [each for each in store.digests() if each != unused]
    assert store.users() == [family / "topology.yaml"]
    assert run(*verb).exit_code == 0
    assert store.digests() == used
    # What cannot be read might use anything.
    good = (family / "topology.yaml").read_text()
    (family / "topology.yaml").write_text("blocks: [")
    line, *_ = refused(run(*verb))
    assert line.startswith(f"error: nothing was removed: {family / 'topology.yaml'} uses this")
    assert store.digests() == used
    # One that is gone uses nothing, until it is back.
    (family / "topology.yaml").rename(family / "away.yaml")
    assert "would be removed" in run(*verb, "--dry-run").output
    (family / "topology.yaml").write_text(good)
    assert run(*verb).output == "freed: 0 B, 0 artifacts and 0 tensor files\n"
    (family / "topology.yaml").unlink()
    assert run(*verb).exit_code == 0
    assert store.digests() == []


def test_store_gc_knows_the_history_of_servers_that_do_not_run(
    stored: Store, tmp_path: Path
) -> None:
    digest = f"sha256-{'a' * 64}"
    with contextlib.closing(State(tmp_path / "state")) as state:
        with stored.using([digest], state.file):
            wanted = Topology(blocks={"a": Block(artifact=digest)})
            state.record(Generation(1), wanted, stored.root, Verb.APPLY)
            state.record(Generation(2), Topology(), stored.root, Verb.APPLY)
        assert run("store", "gc", "--store", stored.root, "--all").exit_code == 0
    assert run("store", "gc", "--store", stored.root, "--all").exit_code == 0
    assert stored.digests() == [digest]


# ------------------------------------------------------------------------------------ sharing


def test_share_says_which_weights_artifacts_have_in_common(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", create=True)
    first = put(store, "a", b"one weight of all")
    put(store, "b", b"one weight of all", index=1)
    put(store, "c", b"another")
    (tmp_path / "topology.yaml").write_text(
        dump(
            Topology(
                blocks={"trunk": Block(artifact=first)},
                pipelines={"p": Pipeline(blocks=("trunk",)), "q": Pipeline(blocks=("trunk",))},
            )
        )
    )
    result = run("share", store.root, "-t", tmp_path / "topology.yaml")
    assert result.exit_code == 0
    words = result.output.split()
    assert {"aaaaaaaaaaaa", "bbbbbbbbbbbb"} <= set(words)
    assert "cccccccccccc" not in words
    assert "equal weights are stored once: 17 B saved" in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert "topology.yaml: trunk" in result.output
    assert "p, q" in result.output


def test_share_says_so_when_nothing_is_shared(stored: Store) -> None:
    assert run("share", stored.root).output == "no two artifacts hold equal weights\n"


FAMILY = """
import torch

class Variant(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Linear(64, 4))
        torch.manual_seed(head)
        self.head = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.trunk(x))

def make(head):
    module = Variant(head)
    module.example_inputs = {"x": torch.zeros(2, 4)}
    return module

def one(): return make(1)
def two(): return make(2)
def other():
    module = make(3)
    torch.nn.init.zeros_(module.trunk[0].weight)
    return module
"""


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "family_of_models.py").write_text(FAMILY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("family_of_models", None)


def test_split_shares_blocks_and_prints_the_tree(family: Path) -> None:
    models = [f"family_of_models:{name}" for name in ("one", "two")]
    result = run("split", *models, "--share", "--store", "store", "-o", "topology.yaml")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 100
    for words in ("trunk  2.3 kB", "shared by one, two", "→ one", "→ two", "48.3%"):
        assert words in result.output
    topology = parse((family / "topology.yaml").read_text())
    assert set(topology.blocks) == {"trunk", "one-2of2", "two-2of2"}
    assert topology.pipelines["one"].blocks == ("trunk", "one-2of2")
    assert topology.pipelines["two"].blocks == ("trunk", "two-2of2")
    store = Store(family / "store")
    manifests: dict[Digest, Manifest | str] = {each: store.verify(each) for each in store.digests()}
    assert validate(topology, manifests, ["cpu"]) == []


def test_split_says_so_when_models_have_nothing_in_common(family: Path) -> None:
    models = [f"family_of_models:{name}" for name in ("one", "other")]
    result = run("split", *models, "--share", "--store", "store", "-o", "topology.yaml")
    assert result.exit_code == 0, result.output
    assert "the models have nothing in common" in result.output


TOWERS = """
import torch

class Towers(torch.nn.Module):
    def __init__(self, left, right, head, turned=False):
        super().__init__()
        self.turned = turned
        for name, seed in (("left", left), ("right", right), ("head", head)):
            torch.manual_seed(seed)
            setattr(self, name, torch.nn.Linear(4, 4))

    def forward(self, x, y):
        right = self.right(y)
        if self.turned:
            right = torch.mm(self.right.weight, y.T).T * 2.0
        return self.head(torch.relu(self.left(x)) + right)

def make(*seeds, **options):
    module = Towers(*seeds, **options)
    module.example_inputs = {"x": torch.zeros(2, 4), "y": torch.zeros(2, 4)}
    return module

def one(): return make(1, 10, 91)
def two(): return make(1, 20, 92)
def three(): return make(3, 20, 93)
def four(): return make(4, 40, 94, turned=True)
def five(): return make(5, 40, 95, turned=True)
"""


def test_split_prints_blocks_that_overlap_as_a_list_and_what_is_kept_apart(family: Path) -> None:
    Path("family_of_models.py").write_text(TOWERS)
    models = [f"family_of_models:{name}" for name in ("one", "two", "three")]
    result = run("split", *models, "--share", "--store", "store", "-o", "topology.yaml")
    assert result.exit_code == 0, result.output
    for words in (
        "trunk-1  80 B  32 FLOP",
        "shared by one, two",
        "shared by two, three",
        "one: trunk-1 → one-2of2",
        "two: trunk-1 → two-3of3; trunk-2 → two-3of3",
        "three: trunk-2 → three-2of2",
    ):
        assert result.output.count(words) == 1, result.output
    # Three models of three layers, two of which are counted once too often.
    rows = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "weights 720 B 560 B 22.2%" in rows
    assert "one row through all models 288 FLOP 224 FLOP 22.2%" in rows

    models = [f"family_of_models:{name}" for name in ("four", "five")]
    result = run("split", *models, "--share", "--store", "store", "-o", "other.yaml")
    assert result.exit_code == 0, result.output
    printed = " ".join(result.output.split())
    assert "four, five compute alike, but not in one block of them all, 32 FLOP per row" in printed
    assert "nothing in common" not in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a:b", "c:d", "-n", "2"], "2 models are split together with --share only"),
        (["a:b", "--share", "--name", "p"], "--name does not go with --share"),
        (["a:b", "--share", "--measure", "cpu", "-n", "2"], "--measure does not go with --share"),
        (["a:b", "--share", "--at", "x", "-n", "2"], "say how to split"),
        (["a:b", "-n", "2", "--rows", "1"], "--rows says how to measure, and goes with --measure"),
        (["a:b", "-n", "2", "--precision", "bf16"], "--precision says how to measure"),
        (
            ["a:b", "-n", "2", "--measure", "cpu", "--precision", "int8"],
            "--precision takes fp32, tf32, fp16, bf16, not 'int8'",
        ),
        (["a:b"], "say how to split"),
        (["a:b", "-n", "2", "--every"], "say how to split"),
        (["a:b", "--at", ""], "--at takes names of modules, such as layer2,layer3, not ''"),
        (["a:b", "--at", "layer2,"], "--at takes names of modules"),
    ],
)
def test_split_refuses_options_that_do_not_fit(arguments: list[str], words: str) -> None:
    (line,) = refused(run("split", *arguments))
    assert words in line


# ------------------------------------------------------------------------------------ inspect


def test_inspect_shows_cut_points_and_draws_them(family: Path) -> None:
    model = "family_of_models:one"
    result = run("inspect", model)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines()[1:])) <= 80
    assert "✂" not in result.output
    lines = run("inspect", model, "-n", 2, "--plot", "net.html").output.splitlines()
    assert sum("✂ 1" in line for line in lines) == 1
    assert lines[-3].startswith("block 1: ")
    assert lines[-2].startswith("block 2: ")
    assert lines[-1] == "the picture is in net.html"
    assert "<svg" in (family / "net.html").read_text()
    measured = run("inspect", model, "--measure", "cpu").output.splitlines()
    assert " ms on cpu (8 rows, fp32)" in measured[0]
    header = ["behind", "weights", "work/row", "written", "ms", "crosses", "tensors"]
    assert measured[2].split() == header
    assert max(map(len, measured[1:])) <= 80
    asked = ("--measure", "cpu", "--rows", 2, "--precision", "bf16")
    result = run("inspect", model, "-n", 2, "--plot", "net.html", *asked)
    assert result.exit_code == 0, result.output
    assert " ms on cpu (2 rows, bf16); 2 blocks" in result.output
    assert "% of the measured time, " in result.output
    assert "time on cpu (2 rows, bf16)" in (family / "net.html").read_text()


def test_split_says_how_it_measured(family: Path) -> None:
    asked = ("--measure", "cpu", "--rows", 1, "--precision", "bf16")
    result = run("split", "family_of_models:one", "-n", 2, "--store", "s", "-o", "t.yaml", *asked)
    assert result.exit_code == 0, result.output
    assert "cost is time on cpu (1 row, bf16)" in result.output
    assert len(parse((family / "t.yaml").read_bytes()).blocks) == 2


def test_inspect_shows_what_a_script_is_a_sequence_of(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save = (
        "import sys, torch; from torch import nn; m = nn.Sequential(nn.Linear(4, 4), nn.ReLU());"
        "torch.jit.script(m).save(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", save, str(path)], check=True)
    given = ("inspect", path, "-i", "x:float32[batch,4]")
    result = run(*given, "-n", 2, "--plot", tmp_path / "model.html")
    assert result.exit_code == 0, result.output
    assert "✂ 1  0" in result.output
    assert "<svg" in (tmp_path / "model.html").read_text()
    (line,) = refused(run(*given, "--measure", "cpu"))
    assert "whose costs are modelled only" in line
    places = ("--store", tmp_path / "store", "-o", tmp_path / "topology.yaml")
    (line,) = refused(run("split", *given[1:], "-n", 2, "--measure", "cpu", *places))
    assert "whose costs are modelled only" in line


def test_inspect_shows_an_artifact(family: Path) -> None:
    model = "family_of_models:one"
    assert run("split", model, "-n", 1, "--store", "store", "-o", "t.yaml").exit_code == 0
    (digest,) = Store(family / "store").digests()
    result = run("inspect", digest[:20])
    assert result.exit_code == 0, result.output
    for words in (digest, "one, block 1 of 1", "batch×4", "weights.json"):
        assert words in result.output
    again = run("inspect", digest, "-n", 2)
    assert "✂ 1" in again.output


def test_inspect_refuses_before_it_works(stored: Store) -> None:
    (line,) = refused(run("inspect", "resnet18", "--plot", "net.gif"))
    assert "name a .png or an .html file" in line
    for verb in (("inspect",), ("split", "-n", 2)):
        (line,) = refused(run(*verb, "resnet18", "--measure", "gpu"))
        assert line == "error: --measure takes cpu or cuda:INDEX, such as cuda:0, not 'gpu'"
        (line,) = refused(run(*verb, "resnet18", "--rows", 1))
        assert line.startswith("error: --rows says how to measure, and goes with --measure")
    (line,) = refused(run("inspect", "cccc", "--store", stored.root))
    assert "has no artifact cccc" in line
    (stored.path(f"sha256-{'b' * 64}") / "program.pt2").write_bytes(b"x")
    (line,) = refused(run("inspect", "bbbb", "--store", stored.root))
    assert "program.pt2 is damaged" in line
