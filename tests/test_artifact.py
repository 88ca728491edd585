"""The store: whole artifacts or none, whatever happens to the processes that write them."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

import full_disk
from blockflow.artifact import (
    TENSORS,
    WEIGHTS_FILE,
    Digest,
    Manifest,
    Origin,
    Port,
    Store,
    StoredWeight,
    parse_digest,
    tensor_name,
)
from blockflow.errors import BlockFlowError, InvalidInput, NotFound, StoreCorrupt

A = Digest("sha256-" + "a" * 64)
B = Digest("sha256-" + "b" * 64)


def manifest(digest: Digest = A, model: str = "m") -> Manifest:
    return Manifest(
        format="torch.export",
        digest=digest,
        inputs=(Port("x", "float32", ("batch", 3)),),
        outputs=(Port("output", "float32", ("batch", 2)),),
        parameter_bytes=24,
        flops=12,
        mutates_inputs=False,
        origin=Origin(model=model, index=0, count=1, first="linear", last="linear"),
        files={},
    )


def writing(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "program.pt2").write_bytes(content)

    return write


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", create=True)


def test_what_is_put_can_be_read(store: Store) -> None:
    put = store.put(manifest(), writing(b"program"))
    assert store.manifest(A) == store.verify(A) == put
    assert put.files["program.pt2"].bytes == 7
    assert (store.path(A) / "program.pt2").read_bytes() == b"program"
    assert store.digests() == [A]
    assert A in store
    assert B not in store


def test_manifest_is_json_for_people(store: Store) -> None:
    store.put(manifest(), writing(b"program"))
    text = (store.path(A) / "manifest.json").read_text()
    assert '\n  "inputs": [\n' in text
    assert text.endswith("}\n")


def test_the_same_digest_is_stored_once(store: Store) -> None:
    first = store.put(manifest(model="first"), writing(b"program"))

    def never(_: Path) -> None:
        raise AssertionError("written twice")

    assert store.put(manifest(model="second"), never) == first


def test_a_failed_write_leaves_nothing(store: Store) -> None:
    def fail(folder: Path) -> None:
        (folder / "program.pt2").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.put(manifest(), fail)
    assert store.digests() == []
    assert list((store.root / "tmp").iterdir()) == []


def test_a_store_must_exist(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no artifact store at"):
        Store(tmp_path / "nowhere")


def test_a_missing_artifact_says_where_it_was_looked_for(store: Store) -> None:
    with pytest.raises(NotFound, match=rf"{store.root} has no artifact {A}: split the model"):
        store.manifest(A)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256-",
        A.upper(),
        A + "\n",
        A[:-1],
        "../" + A,
        "sha256-../../etc",
        "sha256-" + "g" * 64,
    ],
)
def test_only_digests_become_paths(store: Store, text: str) -> None:
    for use in (parse_digest, store.path, store.manifest, store.verify, store.__contains__):
        with pytest.raises(InvalidInput, match="not an artifact digest"):
            use(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"prograM"), "program.pt2 is damaged"),
        (lambda path: path.write_bytes(b"prog"), "4 bytes .* expected 7"),
        (lambda path: path.unlink(), "program.pt2 cannot be read"),
    ],
)
def test_a_damaged_file_is_named(
    store: Store, damage: Callable[[Path], object], message: str
) -> None:
    store.put(manifest(), writing(b"program"))
    damage(store.path(A) / "program.pt2")
    store.manifest(A)
    with pytest.raises(StoreCorrupt, match=message):
        store.verify(A)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not a manifest"),
        (lambda text: text.replace(b"flops", b"flips"), "is not a manifest"),
        (lambda text: text.replace(b'"format": "torch.export"', b'"format": "onnx"'), "manifest"),
        (lambda text: text.replace(b"sha256-aa", b"sha256-ab"), "speaks of sha256-ab"),
        (lambda text: text.replace(b'"program.pt2"', b'"../program.pt2"'), "outside its directory"),
        (lambda text: text.replace(b'"program.pt2"', b'"other.pt2"'), "lists no program.pt2"),
    ],
)
def test_a_damaged_manifest_is_refused(
    store: Store, change: Callable[[bytes], bytes], message: str
) -> None:
    store.put(manifest(), writing(b"program"))
    path = store.path(A) / "manifest.json"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(StoreCorrupt, match=message):
        store.manifest(A)


def test_a_lost_manifest_is_not_a_missing_artifact(store: Store) -> None:
    store.put(manifest(), writing(b"program"))
    (store.path(A) / "manifest.json").unlink()
    with pytest.raises(StoreCorrupt, match="has lost"):
        store.manifest(A)


def test_reading_a_store_needs_no_torch() -> None:
    code = "import sys, blockflow.artifact; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# A writer in a process of its own: `put A`, stopping at a given stage until it reads a line.
WRITER = """
    import sys, time
    from pathlib import Path
    import msgspec
    from blockflow.artifact import Manifest, Store

    root, text, stage, size = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

    def stop(here):
        if here == stage:
            print("stopped", flush=True)
            sys.stdin.readline()

    rename = Path.rename
    Path.rename = lambda self, to: (stop("rename"), rename(self, to))[1]

    def write(folder):
        stop("empty")
        with (folder / "program.pt2").open("wb") as file:
            file.write(b"p" * (size // 2))
            file.flush()
            stop("half")
            file.write(b"p" * (size - size // 2))
        stop("full")

    Store(root).put(msgspec.json.decode(text, type=Manifest), write)
"""


def writer(store: Store, digest: Digest, stage: str, size: int = 1000) -> subprocess.Popen[str]:
    text = msgspec.json.encode(manifest(digest)).decode()
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(store.root), text, stage, str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> int:
    with process:
        assert process.stdin is not None
        process.stdin.close()
        return process.wait()


@pytest.mark.parametrize("stage", ["empty", "half", "full", "rename"])
def test_a_killed_writer_leaves_a_good_store(store: Store, stage: str) -> None:
    process = writer(store, A, stage)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n"
        process.kill()
    assert store.digests() == []
    assert len(list((store.root / "tmp").iterdir())) == 1
    with pytest.raises(NotFound):
        store.manifest(A)
    store.put(manifest(), writing(b"program"))
    store.verify(A)
    assert list((store.root / "tmp").iterdir()) == []


def test_sweeping_spares_a_writer_at_work(store: Store) -> None:
    process = writer(store, A, "half")
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n"
    assert store.sweep() == 0
    store.put(manifest(B), writing(b"other"))
    assert finish(process) == 0
    assert store.digests() == [A, B]
    assert store.verify(A).files["program.pt2"].bytes == 1000


def test_writers_of_one_digest_agree(store: Store) -> None:
    processes = [writer(store, A, "rename", 100_000) for _ in range(3)]
    for process in processes:  # all have written all, and none has renamed
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n"
    assert [finish(process) for process in processes] == [0, 0, 0]
    assert store.digests() == [A]
    store.verify(A)
    assert list((store.root / "tmp").iterdir()) == []


# --------------------------------------------------------------------- tensors, stored once


def tensor_file(folder: Path, content: bytes) -> str:
    """A draft's tensor file; the store does not look into it, only at its digest."""
    sha256 = hashlib.sha256(content).hexdigest()
    (folder / TENSORS).mkdir(exist_ok=True)
    (folder / TENSORS / tensor_name(sha256)).write_bytes(content)
    return sha256


def with_tensors(*contents: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "program.pt2").write_bytes(b"program")
        weights = {
            f"w{index}": StoredWeight(tensor_file(folder, each), len(each), "uint8", (len(each),))
            for index, each in enumerate(contents)
        }
        (folder / WEIGHTS_FILE).write_bytes(msgspec.json.encode(weights))

    return write


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_artifacts_that_share_a_tensor_share_its_file(store: Store) -> None:
    first = store.put(manifest(A), with_tensors(b"shared", b"a"))
    store.put(manifest(B), with_tensors(b"shared", b"b"))
    assert store.tensors() == {sha(b"shared"): 6, sha(b"a"): 1, sha(b"b"): 1}
    assert set(first.files) == {"program.pt2", "weights.json"}
    assert [weight.sha256 for weight in store.weights(first).values()] == [
        sha(b"shared"),
        sha(b"a"),
    ]
    assert store.verify(A) == first
    assert not (store.path(A) / TENSORS).exists()


def test_an_artifact_may_keep_its_weights_inside(store: Store) -> None:
    assert store.weights(store.put(manifest(), writing(b"program"))) == {}


def test_a_damaged_tensor_is_named_for_every_artifact_that_uses_it(store: Store) -> None:
    store.put(manifest(A), with_tensors(b"shared", b"a"))
    store.put(manifest(B), with_tensors(b"shared", b"b"))
    store.tensor_path(sha(b"shared")).write_bytes(b"Shared")
    store.tensor_path(sha(b"b")).unlink()
    (fault,) = store.faults(A)
    assert f"{store.tensor_path(sha(b'shared'))} is damaged" in str(fault)
    assert len(store.faults(B)) == 2
    store.verify(A, weights=False)
    with pytest.raises(StoreCorrupt, match="safetensors"):
        store.verify(B)


def test_every_fault_is_found(store: Store) -> None:
    store.put(manifest(), with_tensors(b"a"))
    assert store.faults(A) == []
    (store.path(A) / "program.pt2").write_bytes(b"other")
    (store.path(A) / "weights.json").write_bytes(b"{}")
    found = [str(fault) for fault in store.faults(A)]
    assert len(found) == 2
    assert "program.pt2 is damaged" in found[0]
    assert "weights.json is damaged" in found[1]
    (store.path(A) / "manifest.json").write_text("{}")
    assert len(store.faults(A)) == 1


def test_weights_name_no_file_outside_the_store(store: Store) -> None:
    def write(folder: Path) -> None:
        (folder / "program.pt2").write_bytes(b"program")
        weight = StoredWeight("../../etc/passwd", 1, "uint8", (1,))
        (folder / WEIGHTS_FILE).write_bytes(msgspec.json.encode({"w": weight}))

    stored = store.put(manifest(), write)
    with pytest.raises(StoreCorrupt, match="names a file outside the store"):
        store.weights(stored)


# ------------------------------------------------------------------------------------ garbage


def test_garbage_is_what_nobody_keeps(store: Store) -> None:
    store.put(manifest(A), with_tensors(b"shared", b"a"))
    store.put(manifest(B), with_tensors(b"shared", b"bb"))
    would = store.collect([B], dry_run=True)
    assert store.digests() == [A, B]
    gone = store.collect([B])
    assert would == gone
    assert gone.artifacts == (A,)
    assert gone.tensors == (sha(b"a"),)
    assert store.digests() == [B]
    assert set(store.tensors()) == {sha(b"shared"), sha(b"bb")}
    store.verify(B)
    assert store.collect([B]).bytes == 0
    assert store.collect([]).artifacts == (B,)
    assert store.tensors() == {}
    assert list((store.root / "tmp").iterdir()) == []


def test_the_bytes_of_garbage_are_those_that_the_files_had(store: Store) -> None:
    store.put(manifest(A), with_tensors(b"shared", b"a"))
    before = sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file())
    assert store.collect([]).bytes == before


def test_what_a_kept_artifact_uses_must_be_known(store: Store) -> None:
    store.put(manifest(A), with_tensors(b"a"))
    store.put(manifest(B), with_tensors(b"b"))
    (store.path(A) / "weights.json").write_bytes(b"{}")
    with pytest.raises(StoreCorrupt, match=r"weights\.json is damaged"):
        store.collect([A])
    assert store.digests() == [A, B]


def test_garbage_is_collected_when_the_writer_is_done(store: Store) -> None:
    """What a writer stored, and no topology uses yet, survives until the writer lets go."""
    store.put(manifest(B), writing(b"other"))
    process = writer(store, A, "full")
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n"
    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(store.collect, [A])
        with pytest.raises(TimeoutError):
            collecting.result(timeout=0.3)
        assert store.digests() == [B]
        assert finish(process) == 0
        assert collecting.result(timeout=30).artifacts == (B,)
    store.verify(A)


def test_a_session_of_writing_keeps_garbage_collectors_out(store: Store) -> None:
    with ThreadPoolExecutor(1) as pool:
        with store.writing():
            store.put(manifest(A), writing(b"program"))
            store.put(manifest(B), writing(b"program"))
            collecting = pool.submit(store.collect, [])
            with pytest.raises(TimeoutError):
                collecting.result(timeout=0.1)
            assert store.digests() == [A, B]
        assert collecting.result(timeout=30).artifacts == (A, B)


def test_who_uses_the_store_is_known_before_it_does(store: Store, tmp_path: Path) -> None:
    digest = store.put(manifest(), writing(b"program")).digest
    user = tmp_path / "topology.yaml"
    for _ in range(2):
        with store.using([digest], user):
            assert store.users() == [user]
            assert not user.exists()
    with (
        pytest.raises(NotFound, match="has no artifact"),
        store.using([f"sha256-{'0' * 64}"], tmp_path / "other"),
    ):
        raise AssertionError
    assert store.users() == [user]


def test_a_killed_writer_does_not_lock_the_store(store: Store) -> None:
    process = writer(store, A, "half")
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n"
        process.kill()
    assert store.collect([]).artifacts == ()
    assert list((store.root / "tmp").iterdir()) == []


# ------------------------------------------------------------------------ killed at any moment

# Forks a child for every call that `work` makes into the system, and kills it there. No torch:
# a process with threads must not be forked.
KILLED_EVERYWHERE = """
    import hashlib, os, signal, sys
    from pathlib import Path
    import msgspec
    from blockflow.artifact import *
    from blockflow.artifact import TENSORS, WEIGHTS_FILE, tensor_name

    os.fsync = lambda _: None  # slow, and only of use to those whose machine dies
    root = Path(sys.argv[1])
    new, old = (msgspec.json.decode(text, type=Manifest) for text in sys.argv[2:])

    def write(folder):
        (folder / TENSORS).mkdir()
        weights = {}
        for content in (b"shared", new.digest.encode()):
            sha256 = hashlib.sha256(content).hexdigest()
            (folder / TENSORS / tensor_name(sha256)).write_bytes(content)
            weights[sha256] = StoredWeight(sha256, len(content), "uint8", (len(content),))
        (folder / WEIGHTS_FILE).write_bytes(msgspec.json.encode(weights))
        with (folder / "program.pt2").open("wb", buffering=0) as file:
            for _ in range(5):
                file.write(b"part")

    def put():
        Store(root).put(new, write)

    def collect():
        Store(root).collect([old.digest])

    def killed_at(work, call):
        child = os.fork()
        if child:
            return os.waitpid(child, 0)[1] == signal.SIGKILL
        left = call
        def count(frame, event, what):
            nonlocal left
            if event == "c_call" and {what.__module__, type(what.__self__).__module__} & {
                "posix", "fcntl", "_io"
            }:
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
        sys.setprofile(count)
        work()
        sys.setprofile(None)
        os._exit(0)

    store = Store(root, create=True)
    for work, before in ((put, False), (collect, True)):
        call = 0
        while True:
            store.put(old, write)
            if before:
                store.put(new, write)
            if not killed_at(work, call):
                break
            call += 1
            store.verify(old.digest)
            if new.digest in store:
                store.verify(new.digest)
            # The next one does what the dead one could not, and nothing is left of that.
            work()
            assert (new.digest in store) is not before
            store.verify(old.digest)
            store.collect([old.digest])
            assert list((root / "tmp").iterdir()) == []
            assert set(store.tensors()) == set(store.weights(store.manifest(old.digest)))
            store.collect([])
        print(call)
"""


def test_a_process_killed_at_any_call_leaves_a_good_store(tmp_path: Path) -> None:
    manifests = [msgspec.json.encode(manifest(digest)).decode() for digest in (A, B)]
    done = subprocess.run(
        [
            *(sys.executable, "-c", textwrap.dedent(KILLED_EVERYWHERE)),
            *(str(tmp_path / "store"), *manifests),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    puts, collects = map(int, done.stdout.split())
    assert puts > 70
    assert collects > 20


CROWD = """
    import hashlib, random, sys
    from pathlib import Path
    import msgspec
    from blockflow.artifact import *
    from blockflow.artifact import TENSORS, WEIGHTS_FILE, tensor_name

    store = Store(Path(sys.argv[1]))
    like = msgspec.json.decode(sys.argv[2], type=Manifest)
    order = random.Random(sys.argv[3])
    for _ in range(30):
        number = order.randrange(10)
        digest = Digest(f"sha256-{number:064x}")

        def write(folder):
            (folder / TENSORS).mkdir()
            weights = {}
            for content in (b"x" * 50_000, str(number % 3).encode() * 50_000):
                sha256 = hashlib.sha256(content).hexdigest()
                if not store.tensor_path(sha256).exists():
                    (folder / TENSORS / tensor_name(sha256)).write_bytes(content)
                weights[sha256] = StoredWeight(sha256, 50_000, "uint8", (50_000,))
            (folder / WEIGHTS_FILE).write_bytes(msgspec.json.encode(weights))
            (folder / "program.pt2").write_bytes(digest.encode())

        with store.writing():
            store.put(msgspec.structs.replace(like, digest=digest), write)
            store.verify(digest)
        if order.random() < 0.3:
            store.collect(f"sha256-{each:064x}" for each in range(0, 10, 2))
"""


def test_a_crowd_of_writers_and_collectors_agree(store: Store) -> None:
    """What is stored stays whole while others remove tensors that it shares with what they drop."""
    text = msgspec.json.encode(manifest()).decode()
    crowd = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CROWD), str(store.root), text, str(seed)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(4)
    ]
    for process in crowd:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert store.digests()
    for digest in store.digests():
        store.verify(digest)
    store.collect([])
    assert store.tensors() == {}
    assert list((store.root / "tmp").iterdir()) == []


# ---------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError(
            "[enforce fail at inline_container.cc:820] . PytorchStreamWriter failed "
            "writing file data/0: file write failed"
        ),
    ],
)
def test_a_full_disk_is_one_clear_message(store: Store, error: Exception) -> None:
    store.put(manifest(B), writing(b"other"))

    def fail(folder: Path) -> None:
        with_tensors(b"new")(folder)
        raise error

    with pytest.raises(BlockFlowError, match=r"disk is full.*nothing of it was stored"):
        store.put(manifest(A), fail)
    assert store.digests() == [B]
    assert store.tensors() == {}
    assert list((store.root / "tmp").iterdir()) == []
    store.verify(B)


FULL = """
    import hashlib
    import msgspec
    from blockflow.artifact import *
    from blockflow.artifact import TENSORS, WEIGHTS_FILE, tensor_name
    from blockflow.errors import BlockFlowError

    other, manifest = (msgspec.json.decode(text, type=Manifest) for text in sys.argv[3:])
    store = Store(ROOT / "store", create=True)

    def write(folder):
        (folder / "program.pt2").write_bytes(b"p" * 9_000)
        (folder / TENSORS).mkdir()
        weights = {}
        for number in range(4):
            content = (folder.name + str(number)).encode() * 600
            sha256 = hashlib.sha256(content).hexdigest()
            (folder / TENSORS / tensor_name(sha256)).write_bytes(content)
            weights[sha256] = StoredWeight(sha256, len(content), "uint8", (len(content),))
        (folder / WEIGHTS_FILE).write_bytes(msgspec.json.encode(weights))

    store.put(other, write)
    before = store.tensors()
    failed = 0
    while True:
        allow(4 * failed)
        try:
            store.put(manifest, write)
        except BlockFlowError as error:
            print(error)
            failed += 1
        else:
            break
        assert store.digests() == [other.digest]
        assert store.tensors() == before
        assert list((ROOT / "store" / "tmp").iterdir()) == []
        store.verify(other.digest)
    allow(8_000)
    store.verify(manifest.digest)
    store.collect([other.digest])
    assert store.tensors() == before
    assert failed > 2
"""


@pytest.mark.parametrize("kind", full_disk.kinds())
def test_a_disk_that_is_full_at_any_byte_leaves_a_good_store(tmp_path: Path, kind: str) -> None:
    """The disk is a little larger every time, until all of the artifact fits."""
    texts = [msgspec.json.encode(manifest(digest)).decode() for digest in (B, A)]
    done = full_disk.run(kind, tmp_path, FULL, *texts)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for line in done.stdout.splitlines():
        assert f"no room for artifact {A} in the store at {tmp_path}/store: the disk is" in line


def test_other_errors_pass_as_they_are(store: Store) -> None:
    def fail(folder: Path) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        store.put(manifest(A), fail)


def test_an_artifact_is_found_by_the_beginning_of_its_digest(store: Store) -> None:
    near = Digest("sha256-" + "a" * 63 + "0")
    for digest in (A, B, near):
        store.put(manifest(digest), writing(b"program"))
    assert store.find("bbbb") == store.find("sha256-bbbbbb") == store.find(B) == B
    assert store.find(A) == A
    with pytest.raises(InvalidInput, match=r"2 artifacts .* begin with aaaa"):
        store.find("aaaa")
    with pytest.raises(NotFound, match="has no artifact cccc"):
        store.find("cccc")
    for text in ("", "bbb", "BBBB", "../bbbb", "b" * 65):
        with pytest.raises(InvalidInput, match="is no digest"):
            store.find(text)
