"""Artifacts: immutable, content-addressed pieces of a model, and the store that holds them.

No torch here: the server, the gateway and the command line read manifests without it.
`program` turns an artifact into something that computes.
"""

from __future__ import annotations

from typing import Literal, NewType

import msgspec

Digest = NewType("Digest", str)
"""`sha256-<64 hex digits>`: the hash of a block's computation and weights, names left out."""

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

    format: Literal["torch.export", "torchscript"]
    digest: Digest
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parameter_bytes: int
    flops: int
    mutates_inputs: bool
    origin: Origin
    files: dict[str, StoredFile]
