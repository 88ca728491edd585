"""Artifacts that come over the network: whole, and what their digest names, or not at all."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from blockflow.artifact import Store
from blockflow.errors import BlockFlowError, InvalidInput, ModelRefused, RequestTooLarge
from blockflow.upload import pack, receive
from running import Mlp, Server, store_model

pytestmark = [pytest.mark.slow]

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[str]]:
    store = Store(tmp_path_factory.mktemp("source"), create=True)
    return store, [store_model(store, Mlp(seed), 1)[0] for seed in (0, 1)]


@pytest.fixture
def target(tmp_path: Path) -> Store:
    return Store(tmp_path / "target", create=True)


def packed(store: Store, digest: str) -> Files:
    body = io.BytesIO()
    pack(store, digest, body)
    body.seek(0)
    with tarfile.open(fileobj=body) as tar:
        return {m.name: (tar.extractfile(m) or io.BytesIO()).read() for m in tar}


def tar_of(files: Files) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return body.getvalue()


def send(target: Store, digest: str, body: bytes, limit: int = 1 << 20) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 5000):
            yield body[start : start + 5000]

    asyncio.run(receive(target, digest, chunks(), limit))


def test_an_artifact_arrives_whole(source: tuple[Store, list[str]], target: Store) -> None:
    store, (digest, _) = source
    send(target, digest, tar_of(packed(store, digest)))
    assert target.verify(digest) == store.manifest(digest)
    send(target, digest, tar_of(packed(store, digest)))  # once more is no fault
    assert target.digests() == [digest]
    assert list((target.root / "tmp").iterdir()) == []


def _without(name: str) -> Callable[[Files], Files]:
    return lambda files: {k: v for k, v in files.items() if not k.startswith(name)}


def _with(name: str, content: bytes = b"x") -> Callable[[Files], Files]:
    return lambda files: {**files, name: content}


def _damaged(name: str) -> Callable[[Files], Files]:
    return lambda files: {
        k: v[:-1] + bytes([v[-1] ^ 1]) if k.startswith(name) else v for k, v in files.items()
    }


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_without("manifest.json"), "has no manifest.json"),
        (_without("program.pt2"), "program.pt2 .* is missing"),
        (_without("tensors/"), "is damaged"),
        (_damaged("program.pt2"), "not what it should be"),
        (_damaged("weights.json"), "not what it should be"),
        (_damaged("tensors/"), "is damaged"),
        (_with("manifest.json"), "cannot be read"),
        (_with("../evil"), "is no file of an artifact"),
        (_with("/etc/evil"), "is no file of an artifact"),
        (_with("program.pt"), "does not list"),
        (lambda files: {"manifest.json": files["manifest.json"] * 20000}, "too large"),
    ],
)
def test_what_is_not_whole_is_refused(
    source: tuple[Store, list[str]],
    target: Store,
    spoil: Callable[[Files], Files],
    words: str,
) -> None:
    store, (digest, _) = source
    with pytest.raises(InvalidInput, match=words):
        send(target, digest, tar_of(spoil(packed(store, digest))), limit=1 << 26)
    assert target.digests() == []
    assert target.tensors() == {}
    assert list((target.root / "tmp").iterdir()) == []


def test_another_computation_under_this_digest_is_refused(
    source: tuple[Store, list[str]], target: Store
) -> None:
    store, (digest, other) = source
    files = packed(store, other)
    files["manifest.json"] = files["manifest.json"].replace(other.encode(), digest.encode())
    with pytest.raises(ModelRefused, match=f"computes is {other}, not {digest}"):
        send(target, digest, tar_of(files))
    assert target.digests() == []


def test_links_and_what_is_no_tar_file_are_refused(
    source: tuple[Store, list[str]], target: Store
) -> None:
    _, (digest, _) = source
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        link = tarfile.TarInfo("program.pt2")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(InvalidInput, match="is no plain file"):
        send(target, digest, body.getvalue())
    for nonsense in (b"", b"PK" * 1000, b"\x80\x04." * 500):
        with pytest.raises(InvalidInput):
            send(target, digest, nonsense)
    with pytest.raises(InvalidInput, match="is not an artifact digest"):
        send(target, "../../etc", b"")


def test_what_is_too_large_is_refused(source: tuple[Store, list[str]], target: Store) -> None:
    store, (digest, _) = source
    with pytest.raises(RequestTooLarge, match="more than 10000 bytes"):
        send(target, digest, tar_of(packed(store, digest)), limit=10000)


@pytest.mark.timeout(180)
def test_a_server_takes_artifacts_only_if_it_was_told_to(
    source: tuple[Store, list[str]], run_dir: Path, tmp_path: Path
) -> None:
    store, (digest, _) = source
    place = ["--store", str(tmp_path / "there")]
    with io.BytesIO() as tar, Server(run_dir, None, *place) as server:
        server.wait_ready()
        pack(store, digest, tar)
        tar.seek(0)
        with pytest.raises(BlockFlowError, match="--allow-uploads"):
            server.control.push(digest, tar)
    with io.BytesIO() as tar, Server(run_dir, None, *place, "--allow-uploads") as server:
        server.wait_ready()
        pack(store, digest, tar)
        tar.seek(0)
        assert server.control.push(digest, tar)["digest"] == digest
        wanted = {"blocks": {"m": {"artifact": digest}}, "pipelines": {"a": {"blocks": ["m"]}}}
        server.control.put_topology(wanted)
        assert server.inference.ready("a")
