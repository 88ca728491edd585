"""A page of docs/results from the JSON and the figures that experiments wrote.

    python experiments/page.py docs/results/experiments-cpu --title "Experiments on a CPU"

Reads every JSON in the folder and writes `<folder>.md` beside it. Nothing on the page is typed by
hand but what --notes (a Markdown file) says, which comes after the targets.
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
            f"{each['within']['p99_ms']:.1f} of {each['p99_limit_ms']:.0f}",
            f"{each['bytes'] / _MIB:.0f}",
            f"{each['max_difference']:.1e}",
        ]
        for row in found["rows"]
        for name, each in row["found"].items()
    ]
    columns = ["tasks", "one at a time, p50 ms", "16 clients, /s", "p99 ms", "within p99, /s"]
    return [
        f"{found['model']}, {found['share']:.1%} of a task's bytes shared; random tasks.",
        "",
        *table([*columns, "p99 ms", f"{found['memory']}, MiB", "max diff"], rows),
    ]


SECTIONS = {
    "latency": ("Latency and communication overhead", latency),
    "throughput": ("Throughput", throughput),
    "energy": ("Energy", energy),
    "vram": ("Memory of many tasks", vram),
    "sharing-tasks": ("Many tasks on one trunk", sharing),
}


def target_table(targets: Sequence[Found]) -> list[str]:
    words = {True: "met", False: "**missed**", None: "not judged"}
    return table(
        ["target", "wanted", "found", ""],
        [
            [
                each["target"],
                f"≥ {each['least']:g}" if "least" in each else f"≤ {each['most']:g}",
                "" if each["found"] is None else f"{each['found']:.3g}",
                words[each["met"]],
            ]
            for each in targets
        ],
    )


def conditions(found: Found, source: Path) -> list[str]:
    where = found["conditions"]
    hardware = ", ".join(filter(None, [where.get("gpu"), where["cpu"]]))
    versions = [f"{name} {version}" for name, version in where["versions"].items()]
    if "driver" in where:
        versions += [f"driver {where['driver']}", f"CUDA {where['cuda']}"]
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


def page(folder: Path, title: str, notes: str) -> str:
    lines = [f"# {title}", "", notes.strip(), ""]
    sources = sorted(
        folder.glob("*.json"),
        key=lambda path: (list(SECTIONS).index(json.loads(path.read_text())["experiment"]), path),
    )
    for source in sources:
        found = json.loads(source.read_text())
        heading, body = SECTIONS[found["experiment"]]
        suffix = source.stem.removeprefix(found["experiment"]).strip("-")
        lines += [f"## {heading}{f' ({suffix})' if suffix else ''}", ""]
        lines += conditions(found, source)
        lines += body(found)
        lines += target_table(found["targets"])
        figure = source.with_suffix(".png")
        if figure.exists():
            lines += [f"![{heading}]({folder.name}/{figure.name})", ""]
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
