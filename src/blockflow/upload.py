"""Artifacts on their way from one store to another: as a tar file, checked before they arrive.

Without torch. What an artifact computes is checked in a process of its own (`vouch`), because its
digest is the name of its computation and only a process with torch can tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

import msgspec

from blockflow.artifact import (
    PROGRAM_FILE,
    TENSORS,
    WEIGHTS_FILE,
    Manifest,
    Store,
    tensor_name,
)
from blockflow.errors import (
    BlockFlowError,
    InvalidInput,
    ModelRefused,
    RequestTooLarge,
    StoreCorrupt,
)

_MANIFEST = "manifest.json"
_TENSOR = re.compile(rf"{TENSORS}/([0-9a-f]{{64}})\.safetensors")
_LARGEST_MANIFEST = 1 << 20
_BUFFER = 1 << 20
_VOUCH_SECONDS = 300.0
_REFUSED = 3
"""Exit status of `vouch` when the artifact is at fault."""


def pack(store: Store, digest: str, target: IO[bytes]) -> Manifest:
    """Write an artifact with all its weights to `target` as a tar file.

    The manifest comes first. Raises NotFound, StoreCorrupt.
    """
    manifest = store.verify(digest)
    weights = sorted({weight.sha256 for weight in store.weights(manifest).values()})
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        names = [(store.path(digest) / name, name) for name in (_MANIFEST, *sorted(manifest.files))]
        names += [(store.tensor_path(each), f"{TENSORS}/{tensor_name(each)}") for each in weights]
        for path, name in names:
            info = tarfile.TarInfo(name)
            info.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(info, file)
    return manifest


async def receive(store: Store, digest: str, body: AsyncIterator[bytes], limit: int) -> Manifest:
    """Take the artifact `digest` out of a tar file of `pack`'s kind, of at most `limit` bytes.

    Nothing of it is in the store until every file has the digest that the manifest says, and the
    program computes what the artifact's own digest names. Nothing of it is ever unpickled or run.
    Raises InvalidInput, RequestTooLarge, ModelRefused, and BlockFlowError where the disk is full.
    """
    store.path(digest)  # it is a digest
    with contextlib.ExitStack() as stack:
        folder = await asyncio.to_thread(stack.enter_context, store.draft())
        await _save(body, folder / "body.tar", limit)
        quarantine = Store(folder / "store", create=True)
        manifest = await asyncio.to_thread(_unpack, folder / "body.tar", quarantine, digest)
        await _vouch(quarantine, digest)
        return await asyncio.to_thread(_adopt, quarantine, store, manifest)


async def _save(body: AsyncIterator[bytes], path: Path, limit: int) -> None:
    size = 0
    with await asyncio.to_thread(path.open, "wb", _BUFFER) as file:
        async for chunk in body:
            size += len(chunk)
            if size > limit:
                raise RequestTooLarge(
                    f"the artifact has more than {limit} bytes, which are the most that this "
                    "server takes (--max-upload-bytes)"
                )
            await asyncio.to_thread(file.write, chunk)


def _unpack(body: Path, quarantine: Store, digest: str) -> Manifest:
    try:
        with tarfile.open(body, "r:") as tar:
            members = _members(tar)
            manifest = _manifest(tar, members.pop(_MANIFEST, None), digest)

            def write(draft: Path) -> None:
                for name, member in members.items():
                    path = draft / name
                    path.parent.mkdir(exist_ok=True)
                    _copy(tar, member, path)

            stored = quarantine.put(manifest, write)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise InvalidInput(f"the artifact's tar file cannot be read: {error}") from None
    for name, expected in manifest.files.items():
        if stored.files.get(name) != expected:
            raise InvalidInput(f"{name} of artifact {digest} is missing, or not what it should be")
    if stored.files.keys() != manifest.files.keys():
        raise InvalidInput(f"artifact {digest} brings files that its manifest does not list")
    try:
        quarantine.verify(digest)
    except StoreCorrupt as error:
        raise InvalidInput(f"artifact {digest} is damaged: {error}") from None
    return stored


def _members(tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    members: dict[str, tarfile.TarInfo] = {}
    allowed = {_MANIFEST, WEIGHTS_FILE, *PROGRAM_FILE.values()}
    for member in tar:
        if not member.isreg() or member.issparse():
            raise InvalidInput(f"{member.name[:80]!r} is no plain file")
        if member.name not in allowed and not _TENSOR.fullmatch(member.name):
            raise InvalidInput(f"{member.name[:80]!r} is no file of an artifact")
        if member.name in members:
            raise InvalidInput(f"{member.name} comes twice")
        members[member.name] = member
    return members


def _manifest(tar: tarfile.TarFile, member: tarfile.TarInfo | None, digest: str) -> Manifest:
    if member is None or member.size > _LARGEST_MANIFEST:
        raise InvalidInput(f"artifact {digest} has no {_MANIFEST}, or too large a one")
    file = tar.extractfile(member)
    try:
        manifest = msgspec.json.decode(file.read() if file else b"", type=Manifest)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidInput(f"{_MANIFEST} of artifact {digest} cannot be read: {error}") from None
    if manifest.digest != digest:
        raise InvalidInput(f"{_MANIFEST} speaks of {manifest.digest[:80]!r}, not of {digest}")
    if manifest.format != "torch.export":
        raise InvalidInput(
            f"artifact {digest} is {manifest.format}: such files are code, and code is not taken "
            "from others; split the model on the server's host"
        )
    return manifest


def _copy(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = tar.extractfile(member)
    if source is None:
        raise InvalidInput(f"{member.name} is no plain file")
    with path.open("xb") as target:
        while chunk := source.read(_BUFFER):
            target.write(chunk)
        os.fsync(target.fileno())


async def _vouch(quarantine: Store, digest: str) -> None:
    """Have another process compute the digest of what the program computes."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "blockflow.vouch", str(os.getpid())),
        *(str(quarantine.root), digest),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(_VOUCH_SECONDS):
            _, said = await process.communicate()
    except TimeoutError:
        raise ModelRefused(
            f"artifact {digest} could not be read within {_VOUCH_SECONDS:g} s"
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    lines = said.decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else f"exit status {process.returncode}"
    if process.returncode == _REFUSED:
        raise ModelRefused(last)
    if process.returncode:
        raise BlockFlowError(f"artifact {digest} could not be checked: {last}")


def _adopt(quarantine: Store, store: Store, manifest: Manifest) -> Manifest:
    source = quarantine.path(manifest.digest)
    weights = {weight.sha256 for weight in quarantine.weights(manifest).values()}

    def write(draft: Path) -> None:
        for name in manifest.files:
            (source / name).rename(draft / name)
        for sha256 in weights:
            if not store.tensor_path(sha256).exists():
                (draft / TENSORS).mkdir(exist_ok=True)
                quarantine.tensor_path(sha256).rename(draft / TENSORS / tensor_name(sha256))

    return store.put(manifest, write)
