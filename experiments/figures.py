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


def energy(path: Path, results: Mapping[str, Any]) -> None:
    """Energy of an inference over the batch, for one client and saturated; on a CPU, the rate."""
    rows = results["rows"]
    measured = any(row["gross_mj"] is not None for row in rows)
    key, label = ("gross_mj", "mJ per inference") if measured else ("per_second", "inferences/s")
    loads = list(dict.fromkeys(row["load"] for row in rows))
    figure, axes = plt.subplots(1, len(loads), figsize=(11, 4.2), squeeze=False)
    for axis, load in zip(axes[0], loads, strict=True):
        for index, name in enumerate(dict.fromkeys(row["variant"] for row in rows)):
            mine = [row for row in rows if (row["variant"], row["load"]) == (name, load)]
            axis.plot(
                [row["batch"] for row in mine],
                [row[key] for row in mine],
                marker="o",
                color=_COLOURS[index % len(_COLOURS)],
                label=name,
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("rows of a request")
        axis.set_ylabel(label)
        axis.set_title(f"{results['model']}, {load}")
        axis.legend(fontsize=7)
    _write(figure, path)


def vram(path: Path, results: Mapping[str, Any]) -> None:
    """Memory of each variant, one group of bars for each distribution."""
    rows = results["rows"]
    series = {
        "a process for each task": [results["processes"]["bytes"] for _ in rows],
        "all monoliths in one process": [row["one_process_bytes"] for row in rows],
    }
    for name in rows[0]["blockflow"]:
        series[f"BlockFlow, {name}"] = [row["blockflow"][name]["bytes"] for row in rows]
    series["weights alone, shared"] = [row["weights_shared_bytes"] for row in rows]
    figure, axis = plt.subplots(figsize=(9, 4.2))
    width = 0.8 / len(series)
    places = np.arange(len(rows))
    for index, (name, values) in enumerate(series.items()):
        heights = [value / 2**30 for value in values]
        bars = axis.bar(places + index * width, heights, width, label=name, color=_COLOURS[index])
        axis.bar_label(bars, fmt="%.1f", fontsize=7)
    axis.set_xticks(places + width * (len(series) - 1) / 2)
    axis.set_xticklabels([f"{row['fraction']:.0%} share {row['share']:.0%}" for row in rows])
    axis.set_ylabel(f"{results['memory']}, GiB")
    axis.set_title(f"{results['tasks']} tasks of {results['model']}")
    axis.legend(fontsize=7)
    _write(figure, path)


def throughput(path: Path, results: Mapping[str, Any]) -> None:
    """Answered over offered, p99 over offered, and rows a second over the rows of a request."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4))
    for index, (name, each) in enumerate(results["loads"].items()):
        colour = _COLOURS[index % len(_COLOURS)]
        offered = [a["offered"] for a in each["arrivals"]]
        style = {"marker": "o", "markersize": 3, "color": colour, "label": name}
        axes[0].plot(offered, [a["per_second"] for a in each["arrivals"]], **style)
        axes[1].plot(offered, [a["p99_ms"] for a in each["arrivals"]], **style)
        batches = results["batches"].get(name, {})
        if batches:
            axes[2].plot(
                [int(rows) for rows in batches],
                [found["per_second"] for found in batches.values()],
                **style,
            )
    for axis, label in zip(
        axes, ("answered, requests/s", "p99, ms", "rows/s (4 clients)"), strict=True
    ):
        axis.set_ylabel(label)
        axis.set_xlabel("offered, requests/s")
    axes[1].set_yscale("log")
    axes[2].set_xscale("log", base=2)
    axes[2].set_xlabel("rows of a request")
    axes[0].set_title(f"{results['model']} in {results['blocks']} blocks, Poisson arrivals")
    axes[0].legend(fontsize=6)
    axes[2].legend(fontsize=6)
    _write(figure, path)


def sharing(path: Path, results: Mapping[str, Any]) -> None:
    """Throughput within the limit of latency, and memory, over the number of tasks."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for index, name in enumerate(results["rows"][0]["found"]):
        tasks = [row["tasks"] for row in results["rows"]]
        found = [row["found"][name] for row in results["rows"]]
        style = {"marker": "o", "color": _COLOURS[index], "label": name}
        axes[0].plot(tasks, [each["within"]["per_second"] for each in found], **style)
        axes[1].plot(tasks, [each["bytes"] / 2**30 for each in found], **style)
    axes[0].set_ylabel("requests/s within the limit of p99")
    axes[1].set_ylabel(f"{results['memory']}, GiB")
    axes[0].set_title(f"{results['model']}, {results['share']:.0%} of the bytes shared")
    for axis in axes:
        axis.set_xlabel("tasks")
        axis.set_ylim(bottom=0)
        axis.legend()
    _write(figure, path)
