"""The figures of the experiments: one for each, from what its JSON holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

_DPI = 90
_COLOURS = plt.get_cmap("tab10").colors


def _write(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def overheads(path: Path, results: Mapping[str, Any]) -> None:
    """Histograms of the communication overhead, on a logarithmic axis, one line of axes a side."""
    sides = list(dict.fromkeys(row["side"] for row in results["rows"]))
    figure, axes = plt.subplots(len(sides), 1, figsize=(9, 3.6 * len(sides)), squeeze=False)
    for axis, side in zip(axes[:, 0], sides, strict=True):
        rows = [
            row
            for row in results["rows"]
            if row["side"] == side and not row["variant"].startswith("monolith")
        ]
        positive = [v for row in rows for v in row["overheads"] if v > 0]
        bins = np.geomspace(min(positive), max(positive) * 1.01, 60)
        for index, row in enumerate(rows):
            over = row["overhead_ms"]
            label = f"{row['variant']}: {over['mean']:.2f} ms (σ {over['sigma']:.2f})"
            colour = _COLOURS[index % len(_COLOURS)]
            axis.hist(row["overheads"], bins=bins, alpha=0.6, label=label, color=colour)
        axis.set_xscale("log")
        axis.set_xlabel("communication overhead of a request, ms")
        axis.set_ylabel("requests")
        axis.set_title(
            f"{results['model']} in {results['blocks']} blocks, {side} tensors in and out"
        )
        axis.legend(fontsize=7)
    _write(figure, path)
