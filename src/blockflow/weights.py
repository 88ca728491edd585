"""Weights: tensors between a program and the store's tensor files, each stored once.

See Note [Weights are stored once] in `artifact`. A tensor file is a safetensors file with one
entry, `tensor`, and a header padded so that the elements begin at a multiple of 64 bytes. It is
written and read here, without the safetensors package: the format is a length, a line of JSON and
the bytes, and a file must have one spelling only, for its digest to name its content.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from blockflow.archive import read_archive, write_archive
from blockflow.artifact import (
    PROGRAM_FILE,
    REPAIR_TENSOR,
    TENSORS,
    WEIGHTS_FILE,
    Manifest,
    Store,
    StoredWeight,
    tensor_name,
)
from blockflow.errors import ModelRefused, StoreCorrupt

_DTYPES: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_ALIGNMENT = 64
# Reading and hashing both leave Python's lock; beyond a few threads the disk is what is slow.
_THREADS = min(8, os.cpu_count() or 1)


def write_program(program: ExportedProgram, folder: Path, store: Store) -> None:
    """Write a program into an artifact's draft, and the tensor files that the store lacks.

    To be called while the store's `put` holds the draft. Raises ModelRefused for a dtype that
    safetensors has no name for. See `archive.write_archive` for what `program` loses.
    """
    _write_weights(program, folder, store)
    with _without_weights(program):
        write_archive(program, folder / PROGRAM_FILE["torch.export"])


def read_program(
    store: Store, manifest: Manifest, device: torch.device | str = "cpu"
) -> ExportedProgram:
    """The program of a `torch.export` artifact with its weights on `device`.

    The artifact's own files must have been verified; every byte of the tensor files is hashed
    here on its way, once, and what is used is what was checked. A tensor that two weights name is
    read once and shared by both. Raises StoreCorrupt naming the file at fault, or ModelRefused.
    """
    program = read_archive(store.path(manifest.digest) / PROGRAM_FILE[manifest.format])
    _read_weights(program, store, manifest, torch.device(device))
    return program


def _write_weights(program: ExportedProgram, folder: Path, store: Store) -> None:
    named = {
        name: value.detach()
        for name, value in (*program.state_dict.items(), *program.constants.items())
        if isinstance(value, Tensor)
    }
    with ThreadPoolExecutor(_THREADS) as pool:
        written = pool.map(lambda name: _write(name, named[name], folder, store), named)
        stored = dict(zip(named, written, strict=True))
    text = msgspec.json.format(msgspec.json.encode(stored, order="sorted"), indent=1)
    (folder / WEIGHTS_FILE).write_bytes(text + b"\n")


@contextmanager
def _without_weights(program: ExportedProgram) -> Iterator[None]:
    """Empty a program of its weights for as long as it is written.

    A placeholder of one element, repeated by strides of zero, stands for each: the file stays a
    valid archive of `torch.export` with every shape and dtype in it.
    """
    tables = (program.state_dict, program.constants)
    saved = [dict(table) for table in tables]
    try:
        for table in tables:
            for name, value in table.items():
                if isinstance(value, Tensor):
                    # Of nothing there is nothing to repeat, and torch miscounts it.
                    one = torch.zeros(() if value.numel() else (0,), dtype=value.dtype)
                    empty = one.expand(value.shape) if value.numel() else one.view(value.shape)
                    is_parameter = isinstance(value, nn.Parameter)
                    table[name] = nn.Parameter(empty, False) if is_parameter else empty
        yield
    finally:
        for table, before in zip(tables, saved, strict=True):
            table.update(before)


def _read_weights(
    program: ExportedProgram, store: Store, manifest: Manifest, device: torch.device
) -> None:
    if WEIGHTS_FILE not in manifest.files:
        return  # they lie inside the program file
    weights = store.weights(manifest)
    tables = (program.state_dict, program.constants)
    empty = {
        name: value
        for table in tables
        for name, value in table.items()
        if isinstance(value, Tensor)
    }
    distinct = {(each.sha256, each.stride): each for each in weights.values()}
    with ThreadPoolExecutor(_THREADS) as pool:
        read = pool.map(lambda each: _read(each, store, device), distinct.values())
        tensors = dict(zip(distinct, read, strict=True))
    # A weight that is missing would stay the placeholder: zeros, and wrong answers.
    for name in empty.keys() | weights.keys():
        known, weight = empty.get(name), weights.get(name)
        value = None if weight is None else tensors[weight.sha256, weight.stride]
        if (
            known is None
            or value is None
            or (known.shape, known.dtype) != (value.shape, value.dtype)
        ):
            raise StoreCorrupt(
                f"artifact {manifest.digest}: {WEIGHTS_FILE} and the program disagree about "
                f"{name!r}: delete the artifact's directory and split the model again"
            )
        table = next(table for table in tables if name in table)
        table[name] = nn.Parameter(value, False) if isinstance(known, nn.Parameter) else value


def _write(name: str, value: Tensor, folder: Path, store: Store) -> StoredWeight:
    dtype = _DTYPES.get(value.dtype)
    if dtype is None:
        raise ModelRefused(f"the weight {name!r} is {value.dtype}: BlockFlow cannot store that")
    value = value.cpu()
    stride = None if value.is_contiguous() else _dense_stride(value)
    shape = tuple(value.shape)
    if stride is None:
        flat = value.contiguous().reshape(-1)
    else:
        flat = value.as_strided((value.numel(),), (1,))
        shape = (value.numel(),)
    content = flat.view(torch.uint8).numpy().data
    header = _header(dtype, shape, len(content))
    digest = hashlib.sha256(header)
    digest.update(content)
    sha256 = digest.hexdigest()
    path = folder / TENSORS / tensor_name(sha256)
    if not store.tensor_path(sha256).exists():
        path.parent.mkdir(exist_ok=True)
        # Two weights of one artifact may be equal, and be written by two threads at once.
        partial = path.with_suffix(f".{id(value):x}")
        with partial.open("wb") as file:
            file.write(header)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    return StoredWeight(
        sha256=sha256,
        bytes=len(content),
        dtype=str(value.dtype).removeprefix("torch."),
        shape=tuple(value.shape),
        stride=stride,
    )


def _dense_stride(value: Tensor) -> tuple[int, ...] | None:
    """The strides of a tensor that fills its stretch of memory in another order than its own.

    None for one with gaps or repetitions, which is stored as its contiguous copy.
    """
    span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    dense = span == value.numel() and 0 not in value.stride()
    return value.stride() if dense else None


def _header(dtype: str, shape: tuple[int, ...], count: int) -> bytes:
    text = msgspec.json.encode(
        {"tensor": {"dtype": dtype, "shape": shape, "data_offsets": [0, count]}}
    )
    text = text.ljust(-(-(len(text) + 8) // _ALIGNMENT) * _ALIGNMENT - 8)
    return struct.pack("<Q", len(text)) + text


def _read(weight: StoredWeight, store: Store, device: torch.device) -> Tensor:
    path = store.tensor_path(weight.sha256)
    dtype: torch.dtype = getattr(torch, weight.dtype)
    shape = weight.shape if weight.stride is None else (weight.bytes // dtype.itemsize,)
    header = _header(_DTYPES[dtype], shape, weight.bytes)
    # Memory of its own and of just this size: a view into a larger one would be copied later on.
    data = torch.empty(
        weight.bytes // dtype.itemsize, dtype=dtype, pin_memory=device.type == "cuda"
    )
    buffer = data.view(torch.uint8).numpy()
    try:
        with path.open("rb", buffering=0) as file:
            start = file.read(len(header))
            count = 0
            while count < weight.bytes and (step := file.readinto(buffer[count:].data)):
                count += step
            rest = file.read(1)
    except OSError as error:
        raise StoreCorrupt(f"{path} cannot be read ({error.strerror}): {REPAIR_TENSOR}") from None
    digest = hashlib.sha256(start)
    digest.update(buffer.data)
    if start != header or count < weight.bytes or rest or digest.hexdigest() != weight.sha256:
        raise StoreCorrupt(f"{path} is damaged: {REPAIR_TENSOR}")
    if weight.stride is None:
        tensor = data.view(weight.shape)
    else:
        tensor = data.as_strided(weight.shape, weight.stride)
    return tensor.to(device)
