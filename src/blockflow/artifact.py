"""Artifacts: immutable, content-addressed pieces of a model, and the store that holds them.

No torch here: the server, the gateway and the command line read manifests without it.
`weights` fills and reads tensor files, `program` turns an artifact into something that computes.

Note [Weights are stored once]
    A program file holds no weights. Each weight is a safetensors file of its own under
    `<root>/tensors`, named by the sha256 of that file, and an artifact's `weights.json` says which
    of them it uses: two blocks, of one model or of many, that hold an equal tensor share the file.
    TorchScript files are opaque and keep their weights inside; so do artifacts without a
    `weights.json`, which earlier versions wrote.

Note [Who may be in the store at once]
    Readers take no lock: an artifact and a tensor file appear whole, by one rename, and never
    change. Writers hold `<root>/lock` shared, from before they look for what is there
    already until the artifact that relies on it has appeared; `Store.writing` stretches this until
    the topology that uses the artifacts is written. Collecting garbage holds the lock alone. The
    kernel drops a lock with the process, however that ends.

Note [Who uses the store]
    What uses an artifact lies outside of the store: in topology files, and in the history of
    servers, of which none may be running. So a store knows the paths of both: `split` and servers
    leave theirs under `<root>/users` before they write into the file that they use something, and
    whoever collects garbage reads those files. A file that is gone uses nothing; one that cannot be
    read might, and then nothing is removed.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NewType

import msgspec

from blockflow.errors import BlockFlowError, InvalidInput, NotFound, StoreCorrupt

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


class StoredWeight(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One weight of an artifact: the tensor file that holds it, and how it lies in memory.

    `sha256` is of the whole file and is its name; `bytes` counts the elements alone, without the
    file's header. `dtype` is torch's name without the prefix. `stride` is counted in elements, and
    given where it is not that of a contiguous tensor: the file then holds the elements flat, in
    the order of memory.
    """

    sha256: str
    bytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None


class Garbage(msgspec.Struct, frozen=True):
    """What `Store.collect` removed, or would remove: artifacts, tensor files, and their bytes."""

    artifacts: tuple[Digest, ...]
    tensors: tuple[str, ...]
    bytes: int


class Overlap(msgspec.Struct, frozen=True):
    """Weights that several artifacts hold: how many tensor files, and their bytes of elements."""

    artifacts: tuple[Digest, ...]
    tensors: int
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

WEIGHTS_FILE = "weights.json"
"""Which file of an artifact says where its weights are; see Note [Weights are stored once]."""

TENSORS = "tensors"
"""Folder of the tensor files: of the store, and of a draft for those that are new."""

_MANIFEST = "manifest.json"
_DRAFTS = "tmp"
_LOCK = "lock"
_SHA256 = re.compile(r"[0-9a-f]{64}")
# EFBIG: the limit of a process's files (ulimit -f), or of the file system.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
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
    """A directory of artifacts, which any number of processes may read and write at once.

        <root>/<2 hex digits>/<digest>/{manifest.json, program.*, weights.json}
        <root>/tensors/<2 hex digits>/<sha256>.safetensors
        <root>/users/<16 hex digits of the sha256 of a path>
        <root>/{tmp, lock}

    An artifact appears whole, by one rename, or not at all; it never changes afterwards. What a
    killed writer leaves lies under `<root>/tmp`, is never read, and goes when somebody next
    writes. See Note [Weights are stored once] and Note [Who may be in the store at once].

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

    # ------------------------------------------------------------------------------- writing

    def put(self, manifest: Manifest, write: Callable[[Path], None]) -> Manifest:
        """Store one artifact and return the manifest that is in the store afterwards.

        `manifest.files` is ignored: `write` fills an empty directory with the files, and they are
        recorded as they lie there. Tensor files that the store lacks go into its subdirectory
        `tensors`, under `tensor_name`. If the digest is stored already, `write` is not called and
        the earlier manifest is returned: equal digests mean equal computations, whoever cut them.

        Raises BlockFlowError if the disk is full; nothing of the artifact is then in the store.
        """
        digest = parse_digest(manifest.digest)
        final = self.path(digest)
        with self.writing():
            if final.exists():
                return self.manifest(digest)
            self.sweep()
            with self._room_for(digest), self.draft() as draft:
                write(draft)
                stored = msgspec.structs.replace(manifest, files=_seal(draft))
                _write_durably(draft / _MANIFEST, encode_manifest(stored))
                final.parent.mkdir(exist_ok=True)
                self._publish_tensors(draft)
                _sync(draft)
                _sync(self.root)
                try:
                    draft.rename(final)
                except OSError as error:
                    if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                        raise
                    return self.manifest(digest)  # another writer was first with the same content
                _sync(final.parent)
        return stored

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Keep `collect` out, for as long as artifacts are stored that no topology uses yet.

        Any number of writers may be at work at once; nesting is allowed.
        """
        with self._locked(fcntl.LOCK_SH):
            yield

    @contextlib.contextmanager
    def using(self, digests: Iterable[str], user: Path) -> Iterator[None]:
        """For whoever writes into the file `user` that it uses these artifacts, meanwhile.

        Keeps `collect` out, and leaves the file's path in the store; see Note [Who uses the store].
        Raises NotFound where an artifact is not there (any more), and OSError.
        """
        with self.writing():
            for digest in digests:
                if digest not in self:
                    self.manifest(digest)  # says so
            path = str(user.resolve())
            final = self._users / hashlib.sha256(path.encode()).hexdigest()[:16]
            if not final.exists():
                self._users.mkdir(exist_ok=True)
                with self.draft() as draft:
                    _write_durably(draft / final.name, f"{path}\n".encode())
                    (draft / final.name).replace(final)
                _sync(self._users)
            yield

    def users(self) -> list[Path]:
        """The files that say what they use of this store, as far as it knows; some may be gone."""
        return sorted(
            Path(path.read_text().removesuffix("\n"))
            for path in self._users.glob("*")
            if re.fullmatch(r"[0-9a-f]{16}", path.name)
        )

    @property
    def _users(self) -> Path:
        return self.root / "users"

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        descriptor = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _room_for(self, digest: Digest) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            # torch's archive writer says RuntimeError whatever the system told it.
            full = (
                error.errno in _FULL
                if isinstance(error, OSError)
                else "PytorchStreamWriter failed writing" in str(error)
            )
            if not full:
                raise
            raise BlockFlowError(
                f"no room for artifact {digest} in the store at {self.root}: the disk is full, or "
                "a quota or a limit on file sizes is reached; nothing of it was stored. Free "
                "space, for example with `blockflow store gc`, and try again"
            ) from error

    def _publish_tensors(self, draft: Path) -> None:
        """Move a draft's tensor files to where they belong."""
        new = draft / TENSORS
        if not new.exists():
            return
        finals = {path: self.root / TENSORS / path.name[:2] / path.name for path in new.iterdir()}
        folders = {final.parent for final in finals.values()}
        for folder in folders:  # all before the first file: a full disk shows here
            folder.mkdir(parents=True, exist_ok=True)
        for path, final in finals.items():
            path.replace(final)  # which another writer may have put there, with the same bytes
        for folder in (*folders, self.root / TENSORS):
            _sync(folder)
        new.rmdir()

    # ------------------------------------------------------------------------------- reading

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

    def weights(self, manifest: Manifest) -> dict[str, StoredWeight]:
        """Where the weights of an artifact are, by their names in its program.

        Empty where they lie inside the program file. Reads `weights.json` and checks its digest;
        raises StoreCorrupt.
        """
        if WEIGHTS_FILE not in manifest.files:
            return {}
        path = self.path(manifest.digest) / WEIGHTS_FILE
        try:
            text = path.read_bytes()
        except OSError as error:
            raise StoreCorrupt(f"{path} cannot be read ({error.strerror}): {_REPAIR}") from None
        expected = manifest.files[WEIGHTS_FILE]
        _compare(path, _stored(text), expected)
        try:
            found = msgspec.json.decode(text, type=dict[str, StoredWeight])
        except msgspec.MsgspecError as error:
            raise StoreCorrupt(f"{path} lists no weights ({error}): {_REPAIR}") from None
        if not all(_SHA256.fullmatch(weight.sha256) for weight in found.values()):
            raise StoreCorrupt(f"{path} names a file outside the store: {_REPAIR}")
        return found

    def path(self, digest: str) -> Path:
        """The directory where an artifact lies, or would lie. Raises InvalidInput."""
        name = parse_digest(digest)
        return self.root / name[7:9] / name

    def tensor_path(self, sha256: str) -> Path:
        """Where a tensor file lies, or would lie."""
        return self.root / TENSORS / sha256[:2] / tensor_name(sha256)

    def __contains__(self, digest: str) -> bool:
        return self.path(digest).exists()

    def digests(self) -> list[Digest]:
        """Every artifact in the store, sorted."""
        found = self.root.glob("[0-9a-f][0-9a-f]/sha256-*")
        return sorted(Digest(path.name) for path in found if _DIGEST.fullmatch(path.name))

    def find(self, text: str) -> Digest:
        """The stored artifact whose digest `text` is, or is the beginning of.

        The beginning has at least 4 hexadecimal digits, with or without `sha256-`. Raises
        InvalidInput or NotFound.
        """
        start = text.removeprefix("sha256-")
        if not re.fullmatch(r"[0-9a-f]{4,64}", start):
            raise InvalidInput(
                f"{text[:80]!r} is no digest, nor the beginning of one: give 4 to 64 hexadecimal "
                "digits, as `blockflow store ls` prints them"
            )
        found = [digest for digest in self.digests() if digest.startswith(f"sha256-{start}")]
        if not found:
            raise NotFound(f"the store at {self.root} has no artifact {text}")
        if len(found) > 1:
            raise InvalidInput(
                f"{len(found)} artifacts in the store at {self.root} begin with {text}: "
                "give more digits"
            )
        return found[0]

    def tensors(self) -> dict[str, int]:
        """Every tensor file in the store: its sha256, and its size in bytes."""
        found = (self.root / TENSORS).glob("[0-9a-f][0-9a-f]/*.safetensors")
        return {path.stem: path.stat().st_size for path in sorted(found)}

    def overlaps(self) -> list[Overlap]:
        """The sets of artifacts that hold equal weights, those with the most bytes first.

        Every tensor file counts for one set: that of all artifacts that use it. Raises
        StoreCorrupt.
        """
        users: dict[str, list[Digest]] = {}
        sizes: dict[str, int] = {}
        for digest in self.digests():
            used = {each.sha256: each for each in self.weights(self.manifest(digest)).values()}
            for sha256, weight in used.items():
                users.setdefault(sha256, []).append(digest)
                sizes[sha256] = weight.bytes
        groups: dict[tuple[Digest, ...], list[int]] = {}
        for sha256, digests in users.items():
            if len(digests) > 1:
                groups.setdefault(tuple(digests), []).append(sizes[sha256])
        found = [Overlap(group, len(each), sum(each)) for group, each in groups.items()]
        return sorted(found, key=lambda each: (-each.bytes, each.artifacts))

    # ------------------------------------------------------------------------------ verifying

    def verify(self, digest: str, *, weights: bool = True) -> Manifest:
        """The manifest, once every file is what it was when it was stored.

        Reads all the bytes; without `weights`, all but the tensor files, for whoever checks those
        as it loads them. Raises NotFound, or StoreCorrupt naming the first file at fault.
        """
        manifest = self.manifest(digest)
        for problem in self._problems(manifest, weights):
            raise problem
        return manifest

    def faults(self, digest: str) -> list[StoreCorrupt]:
        """Everything that is wrong with one artifact. Raises NotFound."""
        try:
            return list(self._problems(self.manifest(digest), weights=True))
        except StoreCorrupt as error:
            return [error]

    def _problems(self, manifest: Manifest, weights: bool) -> Iterator[StoreCorrupt]:
        for name, expected in manifest.files.items():
            path = self.path(manifest.digest) / name
            try:
                _compare(path, _describe(path), expected)
            except OSError as error:
                yield StoreCorrupt(f"{path} cannot be read ({error.strerror}): {_REPAIR}")
            except StoreCorrupt as error:
                yield error
        if not weights:
            return
        try:
            used = {weight.sha256 for weight in self.weights(manifest).values()}
        except StoreCorrupt:
            return  # weights.json is among the files, and was named above
        for sha256 in sorted(used):
            path = self.tensor_path(sha256)
            try:
                found = _describe(path).sha256
            except OSError as error:
                yield StoreCorrupt(f"{path} cannot be read ({error.strerror}): {REPAIR_TENSOR}")
                continue
            if found != sha256:
                yield StoreCorrupt(
                    f"{path} is damaged: its sha256 is {found[:12]}…: {REPAIR_TENSOR}"
                )

    # ------------------------------------------------------------------------------- removing

    def collect(self, keep: Iterable[str], *, dry_run: bool = False) -> Garbage:
        """Remove every artifact that is not in `keep`, and every tensor file that none uses.

        Waits until no writer is at work and keeps others out meanwhile. `keep` is iterated over
        after the wait, so that a generator can tell what those writers' topologies use. With
        `dry_run`, only says what would go. Raises StoreCorrupt, and removes nothing, if it cannot
        be known which tensor files an artifact in `keep` uses.
        """
        with self._locked(fcntl.LOCK_EX):
            kept = {parse_digest(digest) for digest in keep}
            stored = self.digests()
            used = {
                weight.sha256
                for digest in stored
                if digest in kept
                for weight in self.weights(self.manifest(digest)).values()
            }
            artifacts = [digest for digest in stored if digest not in kept]
            tensors = {sha: size for sha, size in self.tensors().items() if sha not in used}
            count = sum(tensors.values()) + sum(_size(self.path(digest)) for digest in artifacts)
            if not dry_run:
                self.sweep()
                for digest in artifacts:
                    self._remove(digest)
                for sha256 in tensors:  # after the artifacts: no reader finds one without them
                    self.tensor_path(sha256).unlink()
        return Garbage(artifacts=tuple(artifacts), tensors=tuple(tensors), bytes=count)

    def _remove(self, digest: Digest) -> None:
        with self.draft() as draft:
            path = self.path(digest)
            path.rename(draft / digest)
            with contextlib.suppress(OSError):  # others are left in it
                path.parent.rmdir()

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
    def draft(self) -> Iterator[Path]:
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
REPAIR_TENSOR = (
    "delete it, and the directories of the artifacts that use it (`blockflow store verify` names "
    "them), and split the models again"
)


def tensor_name(sha256: str) -> str:
    """The name of a tensor file, in the store and in a draft."""
    return f"{sha256}.safetensors"


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as the JSON that lies in the store: indented, one trailing newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def _seal(directory: Path) -> dict[str, StoredFile]:
    files = {}
    for path in sorted(directory.iterdir()):
        if path.name == TENSORS:
            continue  # each is named by its content, and synced by whoever wrote it
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


def _stored(content: bytes) -> StoredFile:
    return StoredFile(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def _compare(path: Path, found: StoredFile, expected: StoredFile) -> None:
    if found != expected:
        raise StoreCorrupt(
            f"{path} is damaged: {found.bytes} bytes with sha256 {found.sha256[:12]}…, "
            f"expected {expected.bytes} bytes with {expected.sha256[:12]}…: {_REPAIR}"
        )


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


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
