"""The store: whole artifacts or none, whatever happens to the processes that write them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from blockflow.artifact import Digest, Manifest, Origin, Port, Store, parse_digest
from blockflow.errors import InvalidInput, NotFound, StoreCorrupt

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
