"""How the costs of a model's operators are measured, where they are not modelled; pure."""

from __future__ import annotations

from dataclasses import dataclass

from blockflow.topology import Precision

ROWS = 8
"""Rows of the batches that costs are modelled for, and measured with unless said otherwise."""


@dataclass(frozen=True)
class Measure:
    """Time each operator on `device` for a batch of `rows`, with float32 computed in `precision`.

    device: cpu or cuda:INDEX. What balances one device, number of rows and precision does not
    balance another: small batches leave a GPU idle in other places than large ones.
    """

    device: str
    rows: int = ROWS
    precision: Precision = "fp32"

    def __str__(self) -> str:
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"{self.device} ({rows}, {self.precision})"
