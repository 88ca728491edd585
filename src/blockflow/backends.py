"""torch's settings that hold for the whole process: TF32, and which convolutions are tried."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def round_to_tf32(rounded: bool) -> None:
    """Whether GPUs round float32 to TF32 in products and convolutions, from now on."""
    # Not by the newer `fp32_precision`: what is set so cannot be read by these, which torch.export
    # does, and raises.
    torch.backends.cudnn.allow_tf32 = rounded
    torch.backends.cuda.matmul.allow_tf32 = rounded


@contextlib.contextmanager
def rounding_to_tf32(rounded: bool) -> Iterator[None]:
    """`round_to_tf32` for as long as the context lasts."""
    convolutions = torch.backends.cudnn.allow_tf32
    products = torch.backends.cuda.matmul.allow_tf32
    round_to_tf32(rounded)
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.backends.cuda.matmul.allow_tf32 = products


@contextlib.contextmanager
def trying_algorithms() -> Iterator[None]:
    """Have cuDNN try every algorithm for every new size, for as long as the context lasts."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
