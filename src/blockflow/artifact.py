"""Artifacts: immutable, content-addressed pieces of a model, and the store that holds them.

No torch here: the server, the gateway and the command line read manifests without it.
`program` turns an artifact into something that computes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NewType

import msgspec

from blockflow.errors import InvalidInput, NotFound, StoreCorrupt

Digest = NewType("Digest", str)
"""`sha256-<64 hex digits>`: the hash of a block's computation and weights, names left out."""

Format = Literal["torch.export", "torchscript"]

BATCH = "batch"
"""The symbolic first dimension of a port's shape."""


class Port(msgspec.Struct, frozen=True):
    """A named input or output of a block.

    `dtype` is torch's name without the prefix ("float32"). `shape` starts with `BATCH` when the
    block takes any number of rows; the other dimensions are numbers.
    """

    name: str
    dtype: str
    shape: tuple[int | Literal["batch"], ...]

    def sized(self, rows: int) -> tuple[int, ...]:
        """The shape for a batch of `rows`."""
        return tuple(size if isinstance(size, int) else rows for size in self.shape)


class Origin(msgspec.Struct, frozen=True):
    """Where a block was cut from: `model` as it was named, block `index` of `count`."""

    model: str
    index: int
    count: int
    first: str
    last: str


class StoredFile(msgspec.Struct, frozen=True):
    sha256: str
    bytes: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What people and programs need to know of an artifact without loading it.

    `flops` counts floating-point operations for one row (0 where torch cannot count them).
    `mutates_inputs` says that the program may write to its inputs, so that whoever runs it must
    give it copies.
    """

    format: Format
    digest: Digest
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parameter_bytes: int
    flops: int
    mutates_inputs: bool
    origin: Origin
    files: dict[str, StoredFile]


PROGRAM_FILE: Mapping[Format, str] = {"torch.export": "program.pt2", "torchscript": "program.pt"}
"""Which file of an artifact holds the program."""

_MANIFEST = "manifest.json"
_DRAFTS = "tmp"
_DIGEST = re.compile(r"sha256-[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")
_CHUNK = 1 << 20


def parse_digest(text: str) -> Digest:
    """`text` as a digest, or InvalidInput: digests come from people and become paths."""
    if not _DIGEST.fullmatch(text):
        raise InvalidInput(
            f"{text[:80]!r} is not an artifact digest: expected sha256- and 64 hexadecimal digits"
        )
    return Digest(text)


class Store:
    """A directory of artifacts: `<root>/<2 hex digits>/<digest>/{manifest.json, program.*}`.

    An artifact appears whole, by one rename, or not at all; it never changes afterwards. Any
    number of processes may read and write at once. What a killed writer leaves lies under
    `<root>/tmp`, is never read, and goes when somebody next writes.

    Raises NotFound if `root` is no directory and `create` is false.
    """

    def __init__(self, root: Path, *, create: bool = False) -> None:
        if create:
            root.mkdir(parents=True, exist_ok=True)
        elif not root.is_dir():
            raise NotFound(
                f"there is no artifact store at {root}: split a model into it first, "
                "or name the directory that holds one"
            )
        self.root = root

    def put(self, manifest: Manifest, write: Callable[[Path], None]) -> Manifest:
        """Store one artifact and return the manifest that is in the store afterwards.

        `manifest.files` is ignored: `write` fills an empty directory with the files, and they are
        recorded as they lie there. If the digest is stored already, `write` is not called and the
        earlier manifest is returned: equal digests mean equal computations, whoever cut them.
        """
        digest = parse_digest(manifest.digest)
        final = self.path(digest)
        if final.exists():
            return self.manifest(digest)
        self.sweep()
        with self._draft() as draft:
            write(draft)
            stored = msgspec.structs.replace(manifest, files=_seal(draft))
            _write_durably(draft / _MANIFEST, encode_manifest(stored))
            _sync(draft)
            final.parent.mkdir(exist_ok=True)
            _sync(self.root)
            try:
                draft.rename(final)
            except OSError as error:
                if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                    raise
                return self.manifest(digest)  # another writer was first with the same content
            _sync(final.parent)
        return stored

    def manifest(self, digest: str) -> Manifest:
        """The manifest of one artifact. Raises NotFound or StoreCorrupt."""
        path = self.path(digest) / _MANIFEST
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            if path.parent.exists():
                raise StoreCorrupt(f"artifact {digest} has lost its {path}: {_REPAIR}") from None
            raise NotFound(
                f"the store at {self.root} has no artifact {digest}: split the model into this "
                "store, or point the topology's `store` at the one that has it"
            ) from None
        try:
            manifest = msgspec.json.decode(text, type=Manifest)
        except msgspec.MsgspecError as error:  # ValidationError and DecodeError
            raise StoreCorrupt(f"{path} is not a manifest ({error}): {_REPAIR}") from None
        if manifest.digest != digest:
            raise StoreCorrupt(f"{path} speaks of {manifest.digest}: {_REPAIR}")
        if not all(_FILE.fullmatch(name) for name in manifest.files):
            raise StoreCorrupt(f"{path} names a file outside its directory: {_REPAIR}")
        if PROGRAM_FILE[manifest.format] not in manifest.files:
            raise StoreCorrupt(f"{path} lists no {PROGRAM_FILE[manifest.format]}: {_REPAIR}")
        return manifest

    def path(self, digest: str) -> Path:
        """The directory where an artifact lies, or would lie. Raises InvalidInput."""
        name = parse_digest(digest)
        return self.root / name[7:9] / name

    def __contains__(self, digest: str) -> bool:
        return self.path(digest).exists()

    def digests(self) -> list[Digest]:
        """Every artifact in the store, sorted."""
        found = self.root.glob("[0-9a-f][0-9a-f]/sha256-*")
        return sorted(Digest(path.name) for path in found if _DIGEST.fullmatch(path.name))

    def verify(self, digest: str) -> Manifest:
        """The manifest, once every file is what it was when it was stored.

        Reads all the bytes. Raises NotFound, or StoreCorrupt naming the first file at fault.
        """
        manifest = self.manifest(digest)
        for name, expected in manifest.files.items():
            path = self.path(digest) / name
            try:
                found = _describe(path)
            except OSError as error:
                raise StoreCorrupt(f"{path} cannot be read ({error.strerror}): {_REPAIR}") from None
            if found != expected:
                raise StoreCorrupt(
                    f"{path} is damaged: {found.bytes} bytes with sha256 {found.sha256[:12]}…, "
                    f"expected {expected.bytes} bytes with {expected.sha256[:12]}…: {_REPAIR}"
                )
        return manifest

    def sweep(self) -> int:
        """Delete what killed writers left behind; return how many leftovers went."""
        swept = 0
        for draft in (self.root / _DRAFTS).glob("*"):
            with contextlib.suppress(OSError):  # a writer finished, or another sweeper was faster
                descriptor = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(draft)
                    swept += 1
                finally:
                    os.close(descriptor)
        return swept

    @contextlib.contextmanager
    def _draft(self) -> Iterator[Path]:
        """A new directory of this file system, locked for as long as this process writes to it.

        The lock is what tells a writer at work from one that was killed: the kernel drops it with
        the process, however that ends.
        """
        drafts = self.root / _DRAFTS
        drafts.mkdir(exist_ok=True)
        while True:
            draft = drafts / secrets.token_hex(8)
            draft.mkdir()
            try:
                descriptor = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue  # a sweeper came between mkdir and open
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if draft.exists():
                break
            os.close(descriptor)  # a sweeper came between mkdir and flock
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            os.close(descriptor)


_REPAIR = "delete the artifact's directory and split the model again"


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as the JSON that lies in the store: indented, one trailing newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def _seal(directory: Path) -> dict[str, StoredFile]:
    files = {}
    for path in sorted(directory.iterdir()):
        if not _FILE.fullmatch(path.name) or path.name == _MANIFEST:
            raise InvalidInput(f"an artifact cannot hold a file named {path.name!r}")
        _sync(path)
        files[path.name] = _describe(path)
    return files


def _describe(path: Path) -> StoredFile:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return StoredFile(sha256=digest.hexdigest(), bytes=size)


def _write_durably(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    """Flush a file or a directory to the disk: a rename must not become durable before it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
