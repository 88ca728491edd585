"""How far two ways to compute the same may lie apart."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""As a part of the largest value: for other numbers of rows, other algorithms are chosen."""


def agree(found: Tensor, expected: Tensor, computed_in: Collection[torch.dtype]) -> bool:
    """Whether two results are the same, as far as what they were computed in can tell."""
    if not expected.dtype.is_floating_point:
        return torch.equal(found, expected)
    size = torch.nan_to_num(expected.double(), posinf=0.0, neginf=0.0).abs()
    tolerance = max(map(_tolerance, {expected.dtype, *computed_in}))
    bound = tolerance * float(size.max() if size.numel() else 0.0)
    return torch.allclose(found.double(), expected.double(), rtol=0.0, atol=bound, equal_nan=True)


def _tolerance(dtype: torch.dtype) -> float:
    tf32 = torch.backends.cudnn.allow_tf32
    return 1e-2 if dtype == torch.float32 and tf32 else _TOLERANCE[dtype]
