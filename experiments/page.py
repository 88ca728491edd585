"""A page of docs/results from the JSON and the figures that experiments wrote.

    python experiments/page.py docs/results/experiments-cpu --title "Experiments on a CPU"

Reads every JSON in the folder and writes `<folder>.md` beside it. Runs of one experiment with other
settings (mps-off, tf32) stand side by side. Nothing on the page is typed by hand but what --notes
(a Markdown file) says, which comes first, and `notes.md` in the folder, which comes after the
targets: why those were missed that were.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Found = Mapping[str, Any]
_MIB = 1 << 20


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(columns) + " |",
        "|---|" + "---:|" * (len(columns) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def spread(values: Found, digits: int = 2) -> str:
    return f"{values['mean']:.{digits}f} ± {values['sigma']:.{digits}f}"


def latency(found: Found) -> list[str]:
    lines = []
    for side in dict.fromkeys(row["side"] for row in found["rows"]):
        lines += [
            f"{found['model']} in {found['blocks']} blocks, {side} tensors in and out, ms:",
            "",
        ]
        lines += table(
            ["variant", "end to end", "p50", "p99", "overhead", "p50", "p99", "a hop", "max diff"],
            [
                [
                    row["variant"],
                    spread(row["end_to_end_ms"]),
                    f"{row['end_to_end_ms']['p50']:.2f}",
                    f"{row['end_to_end_ms']['p99']:.2f}",
                    spread(row["overhead_ms"], 3),
                    f"{row['overhead_ms']['p50']:.3f}",
                    f"{row['overhead_ms']['p99']:.3f}",
                    f"{row['hop_ms']:.3f}",
                    f"{row['max_difference']:.1e}",
                ]
                for row in found["rows"]
                if row["side"] == side
            ],
        )
    inside = [row for row in found["rows"] if len(row["compute_in_situ_ms"]) == found["blocks"]]
    lines += ["Inference of each block, ms: by itself, and inside a variant that can tell:", ""]
    lines += table(
        ["", *(f"block {index + 1}" for index in range(found["blocks"]))],
        [
            *(
                [f"by itself, {how}", *(spread(block) for block in blocks)]
                for how, blocks in found["alone_ms"].items()
            ),
            *(
                [f"{row['variant']}, {row['side']}", *map(spread, row["compute_in_situ_ms"])]
                for row in inside
            ),
        ],
    )
    return lines


def energy(found: Found) -> list[str]:
    def number(value: float | None) -> str:
        return "left out" if value is None else f"{value:.1f}"

    watts = ", ".join(f"{name}: {number(each)}" for name, each in found["idle_watts"].items())
    return [
        f"{found['model']}, host tensors in and out. Idle power, W: {watts}.",
        "",
        *table(
            ["variant", "load", "rows", "mJ", "mJ net", "inferences/s", "p50 ms", "max diff"],
            [
                [
                    row["variant"],
                    row["load"],
                    str(row["batch"]),
                    number(row["gross_mj"]),
                    number(row["net_mj"]),
                    f"{row['per_second']:.1f}",
                    f"{row['ms_p50']:.2f}",
                    f"{row['max_difference']:.1e}",
                ]
                for row in found["rows"]
            ],
        ),
    ]


def throughput(found: Found) -> list[str]:
    counts = list(next(iter(found["loads"].values()))["clients"])

    def rate(value: float | None) -> str:
        return "none" if value is None else f"{value:.1f}"

    lines = ["Inferences/s for requests of one row, by the number of synchronous clients:", ""]
    lines += table(
        ["variant", *counts, "16", "p99 ms of 16", "knee", "peak"],
        [
            [
                name,
                *(f"{each['clients'][count]['per_second']:.1f}" for count in counts),
                f"{each['saturated']['per_second']:.1f}",
                f"{each['saturated']['p99_ms']:.1f}",
                rate(each["knee"]),
                rate(each["peak"]),
            ]
            for name, each in found["loads"].items()
        ],
    )
    lines += ["The same through the gateway, over HTTP (clients in threads of one process):", ""]
    lines += table(
        ["variant", *counts],
        [
            [name, *(f"{each['gateway'][count]['per_second']:.1f}" for count in counts)]
            for name, each in found["loads"].items()
            if each["gateway"]
        ],
    )
    sizes = list(next(iter(found["batches"].values())))
    lines += ["Rows/s by the rows of a request, 4 synchronous clients:", ""]
    lines += table(
        ["variant", *sizes],
        [
            [name, *(f"{each[size]['per_second']:.1f}" for size in sizes)]
            for name, each in found["batches"].items()
        ],
    )
    return lines


def vram(found: Found) -> list[str]:
    apart = found["processes"]
    how = f"extrapolated from {apart['measured']}" if apart["extrapolated"] else "all measured"
    rows = []
    for row in found["rows"]:
        title = f"{row['sharing']} of {found['tasks']}"

        def line(name: str, size: float | None, *cells: str, title: str = title) -> None:
            shown = "" if size is None else f"{size / _MIB:.0f}"
            rows.append([title, name, shown, *cells, *[""] * (3 - len(cells))])

        line(f"a process for each task ({how})", apart["bytes"])
        line("all monoliths in one process", row["one_process_bytes"])
        for name, each in row["blockflow"].items():
            saved = f"{each['saved']:.2%}", f"{each['saved_beyond_context']:.2%}"
            line(name, each["bytes"], *saved, f"{each['max_difference']:.1e}")
        line("weights alone", row["weights_shared_bytes"], f"{row['weights_saved']:.2%}")
        line("bound", None, f"{row['bound']:.2%}")
    columns = ["share a trunk", "variant", f"{found['memory']}, MiB", "saved", "saved beyond one"]
    share = found["rows"][0]["share"]
    return [
        f"{found['tasks']} tasks of {found['model']}; the trunk has {share:.1%} of a task's bytes.",
        'Saved is against all monoliths in one process; "beyond one" leaves out of both what a',
        f"process takes before it has a model ({apart['context_bytes'] / _MIB:.0f} MiB).",
        "",
        *table([*columns, "max diff"], rows),
    ]


def sharing(found: Found) -> list[str]:
    rows = [
        [
            f"{row['tasks']}, {name}",
            f"{each['alone_p50_ms']:.2f}",
            f"{each['saturated_per_second']:.1f}",
            f"{each['saturated_p99_ms']:.1f}",
            f"{each['within']['per_second']:.1f}",
            f"{each['within']['p99_ms']:.1f} of {each['p99_limit_ms']:.3g}",
            f"{each['bytes'] / _MIB:.0f}",
            f"{each['max_difference']:.1e}",
        ]
        for row in found["rows"]
        for name, each in row["found"].items()
    ]
    clients = f"{found['clients']} clients, /s"
    columns = ["tasks", "one at a time, p50 ms", clients, "p99 ms", "within p99, /s"]
    memories = [
        [
            str(row["tasks"]),
            "" if row["memory"]["beyond_context"] is None else f"{beyond:.3f}",
            f"{row['memory']['bound_weights']:.3f}",
            f"{row['memory']['in_all']:.3f}",
            f"{row['memory']['bound_in_all']:.3f}",
            *(f"{each / _MIB:.0f}" for each in row["memory"]["beyond_weights_bytes"].values()),
        ]
        for row in found["rows"]
        for beyond in [row["memory"]["beyond_context"]]
    ]
    return [
        f"{found['model']}, {found['share']:.1%} of a task's bytes shared; random tasks;",
        f"batches up to {found['max_batch']}.",
        "",
        *table([*columns, "p99 ms", f"{found['memory']}, MiB", "max diff"], rows),
        "Memory of one trunk as a part of the monoliths'. Bounds are arithmetic: if nothing but",
        f"weights took memory beyond one context ({found['context_bytes'] / _MIB:.0f} MiB),",
        "without and with it. The last columns are what is neither context nor weights, in MiB.",
        "",
        *table(
            [
                "tasks",
                "beyond one context",
                "bound: weights alone",
                "in all",
                "bound",
                "monoliths",
                "one trunk",
            ],
            memories,
        ),
    ]


SECTIONS = {
    "latency": ("Latency and communication overhead", latency),
    "throughput": ("Throughput", throughput),
    "energy": ("Energy", energy),
    "vram": ("Memory of many tasks", vram),
    "sharing-tasks": ("Many tasks on one trunk", sharing),
}


def target_table(runs: Mapping[str, Found]) -> list[str]:
    """The targets of one experiment, with a column for each of its runs."""
    words = {True: "met", False: "**MISSED**", None: "not judged"}
    wanted: dict[str, str] = {}
    cells: dict[str, dict[str, str]] = {}
    for run, found in runs.items():
        for each in found["targets"]:
            name = each["target"]
            wanted[name] = f"≥ {each['least']:g}" if "least" in each else f"≤ {each['most']:g}"
            number = "" if each["found"] is None else f"{each['found']:.3g} "
            cells.setdefault(name, {})[run] = f"{number}{words[each['met']]}"
    return table(
        ["target", "wanted", *runs],
        [
            [name, wanted[name], *(mine.get(run, "") for run in runs)]
            for name, mine in cells.items()
        ],
    )


def conditions(found: Found, source: Path) -> list[str]:
    where = found["conditions"]
    hardware = ", ".join(filter(None, [where.get("gpu"), where["cpu"]]))
    versions = [f"{name} {version}" for name, version in where["versions"].items()]
    if "driver" in where:
        versions += [f"driver {where['driver']}", f"CUDA {where['cuda']}"]
    # Of runs before there was a choice, nothing was.
    versions += ["compiled"] if where.get("compiled") else []
    split = f"costs {where['split']['costs']}; " if where.get("split") else ""
    ran = (
        f"{hardware}; {', '.join(versions)}, Python {where['python']}; commit {where['commit']}; "
        f"{where['date']}; {where['seconds']:.0f} s; precision {where['precision']}; "
        f"MPS {where['mps']}; {split}load of the machine when it began: "
        f"{where['load_average']:.1f}."
    )
    numbers = f"[{source.name}]({source.parent.name}/{source.name})"
    out = (f"Left out: {what} ({why})." for what, why in found["left_out"].items())
    return [ran, f"`{where['command']}`; numbers: {numbers}.", "", *out, ""]


def runs_in(folder: Path) -> dict[str, dict[str, Path]]:
    """The JSON of each experiment, by what its run is called: its settings, or "default"."""
    found: dict[str, dict[str, Path]] = {name: {} for name in SECTIONS}
    for source in sorted(folder.glob("*.json"), key=lambda path: (len(path.stem), path.stem)):
        name = json.loads(source.read_text()).get("experiment")
        if name not in found:
            raise SystemExit(f"{source} was not written by an experiment; keep it elsewhere")
        found[name][source.stem.removeprefix(name).strip("-") or "default"] = source
    return {name: runs for name, runs in found.items() if runs}


def page(folder: Path, title: str, notes: str) -> str:
    lines = [f"# {title}", "", *([notes.strip(), ""] if notes else []), "## Targets", ""]
    experiments = {
        name: {run: (source, json.loads(source.read_text())) for run, source in runs.items()}
        for name, runs in runs_in(folder).items()
    }
    for name, runs in experiments.items():
        lines += [f"{SECTIONS[name][0]}:", ""]
        lines += target_table({run: found for run, (_, found) in runs.items()})
    reasons = folder / "notes.md"
    if reasons.exists():
        lines += ["## What was missed, and why", "", reasons.read_text().strip(), ""]
    for name, runs in experiments.items():
        heading, body = SECTIONS[name]
        lines += [f"## {heading}", ""]
        for run, (source, found) in runs.items():
            lines += [f"### {run}", ""] if len(runs) > 1 or run != "default" else []
            lines += conditions(found, source)
            lines += body(found)
            figure = source.with_suffix(".png")
            if figure.exists():
                lines += [f"![{heading}, {run}]({folder.name}/{figure.name})", ""]
    lines += ["Made by `experiments/page.py`; the method is in experiments/README.md.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--title", default="Experiments")
    parser.add_argument("--notes", type=Path, help="Markdown that comes first")
    options = parser.parse_args()
    notes = options.notes.read_text() if options.notes else ""
    text = page(options.folder, options.title, notes)
    options.folder.with_suffix(".md").write_text(text, encoding="utf-8")
    print(options.folder.with_suffix(".md"))


if __name__ == "__main__":
    main()
