"""Pictures of a model: its cost along the network, where it can be cut, and where it is.

Three panels over the operators in their order: the time of each, what has accumulated, and the
bytes of one row that would cross at each cut point. `.png` is drawn by matplotlib, an optional
dependency; `.html` by this module alone: one file with an SVG in it, which loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from blockflow.errors import InvalidInput
from blockflow.quantities import scaled

if TYPE_CHECKING:
    from blockflow.cuts import Analysis
    from blockflow.measure import Measure
    from blockflow.torchscript import Stage

_TIME, _WEIGHTS, _FLOPS, _CUT = "#2563eb", "#d97706", "#059669", "#dc2626"
_TEXT, _FAINT, _BAND, _GRID = "#1e293b", "#64748b", "#eef2f7", "#d8dee8"
_SUFFIXES = (".png", ".html")


@dataclass(frozen=True)
class Cut:
    """A cut point before operator `place`: how many tensors cross, and the bytes of one row."""

    place: int
    tensors: int
    row_bytes: int


@dataclass(frozen=True)
class Profile:
    """What a picture shows.

    seconds, parameter_bytes, flops, activation_bytes: by operator, in order; see `cuts.Cost` for
    their meaning.
    operators: their names. modules: where each top-level submodule begins. chosen: the places of
    the cuts that were made, all of them among `cuts`. measured: how seconds were, or None for
    modelled ones.
    """

    name: str
    operators: tuple[str, ...]
    seconds: tuple[float, ...]
    parameter_bytes: tuple[int, ...]
    flops: tuple[int, ...]
    activation_bytes: tuple[int, ...]
    modules: tuple[tuple[str, int], ...]
    cuts: tuple[Cut, ...]
    chosen: tuple[int, ...]
    measured: Measure | None = None

    def blocks(self) -> Iterator[tuple[int, int, float]]:
        """Each block's first place, its end, and its share of the time."""
        total = sum(self.seconds) or 1.0
        for first, end in pairwise([0, *self.chosen, len(self.seconds)]):
            yield first, end, sum(self.seconds[first:end]) / total

    def cumulative(self) -> Iterator[tuple[str, str, list[float]]]:
        """Label, colour, and the percentage reached at each place, from 0 to the end."""
        for label, colour, values in (
            ("time", _TIME, self.seconds),
            ("weights", _WEIGHTS, self.parameter_bytes),
            ("FLOPs", _FLOPS, self.flops),
        ):
            total = sum(values)
            if total:
                yield label, colour, [100 * v / total for v in accumulate(values, initial=0)]

    def summary(self) -> str:
        """One line: how large the model is, and how it is cut."""
        said = (
            f"{human_bytes(sum(self.parameter_bytes))} of weights, "
            f"{human_operations(sum(self.flops))} per row, {len(self.cuts)} cut points"
        )
        if self.measured:
            said += f"; {1e3 * sum(self.seconds):.3g} ms on {self.measured}"
        if self.chosen:
            slowest = max(share for _, _, share in self.blocks())
            count = len(self.chosen) + 1
            said += f"; {count} blocks, the slowest {slowest * count:.2f} × the average"
        return said

    @property
    def time_label(self) -> str:
        return f"time on {self.measured}" if self.measured else "modelled time"


def profile(analysis: Analysis, name: str, *, tensors: int, chosen: Sequence[int] = ()) -> Profile:
    """Read what a picture shows from a program's analysis, with cuts of at most `tensors`."""
    cuts = [Cut(c.place, len(c.tensors), c.row_bytes) for c in analysis.cuts(tensors)]
    known = {cut.place for cut in cuts}
    extra = analysis.cut_points_at([place for place in chosen if place not in known])
    cuts += [Cut(c.place, len(c.tensors), c.row_bytes) for c in extra]
    return Profile(
        name=name,
        operators=tuple(node.name for node in analysis.body),
        seconds=tuple(cost.seconds for cost in analysis.costs),
        parameter_bytes=tuple(cost.parameter_bytes for cost in analysis.costs),
        flops=tuple(cost.flops for cost in analysis.costs),
        activation_bytes=tuple(cost.activation_bytes for cost in analysis.costs),
        modules=_landmarks(analysis.modules),
        cuts=tuple(sorted(cuts, key=lambda cut: cut.place)),
        chosen=tuple(chosen),
        measured=analysis.measure,
    )


def script_profile(every: Sequence[Stage], name: str, chosen: Sequence[int]) -> Profile:
    """Read what a picture shows from the submodules that TorchScript calls one after the other."""
    names = tuple(stage.name for stage in every)
    return Profile(
        name=name,
        operators=names,
        seconds=tuple(stage.cost.seconds for stage in every),
        parameter_bytes=tuple(stage.cost.parameter_bytes for stage in every),
        flops=tuple(stage.cost.flops for stage in every),
        activation_bytes=tuple(stage.cost.activation_bytes for stage in every),
        modules=tuple((each, place) for place, each in enumerate(names)),
        cuts=tuple(Cut(place, 1, each.row_bytes) for place, each in enumerate(every[:-1], 1)),
        chosen=tuple(chosen),
    )


def check_picture(path: Path) -> None:
    """Raise InvalidInput, before any work, if `draw` could not write a picture at `path`."""
    if path.suffix not in _SUFFIXES:
        raise InvalidInput(f"{path} is no picture that can be drawn: name a .png or an .html file")
    if not path.parent.is_dir():
        raise InvalidInput(f"there is no directory {path.parent} to write {path.name} into")
    if path.suffix == ".png":
        try:
            import matplotlib  # noqa: F401, PLC0415  loads slowly, and may not be installed
        except ImportError:
            raise InvalidInput(
                "a .png needs matplotlib: pip install matplotlib, or name an .html file, which "
                "needs nothing"
            ) from None


def draw(shown: Profile, path: Path) -> None:
    """Write the picture to a `.png` or `.html` file. Raises InvalidInput as `check_picture`."""
    check_picture(path)
    if path.suffix == ".png":
        _draw_png(shown, path)
    else:
        path.write_text(_html(shown), encoding="utf-8")


def human_bytes(count: float) -> str:
    """`count` bytes with a decimal unit: "1.2 MB"."""
    return scaled(count, ("B", "kB", "MB", "GB"))


def human_operations(count: float) -> str:
    """Floating-point operations with a decimal unit: "1.2 GFLOP"."""
    return scaled(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP"))


def _landmarks(modules: dict[str, int]) -> tuple[tuple[str, int], ...]:
    """Top-level submodules; or, where one holds everything, those inside it."""
    depth = 0
    while True:
        level = [(name, place) for name, place in modules.items() if name.count(".") == depth]
        if len(level) != 1 or not any(name.count(".") > depth for name in modules):
            return tuple(sorted(level, key=lambda each: each[1]))
        depth += 1


def _readable(shown: Profile, gap: float) -> list[tuple[str, int]]:
    """The landmarks whose names have room: each at least `gap` operators after the one before."""
    found: list[tuple[str, int]] = []
    for name, place in shown.modules:
        if not found or place - found[-1][1] >= gap:
            found.append((name, place))
    return found


# ------------------------------------------------------------------------------------------- png


def _draw_png(shown: Profile, path: Path) -> None:
    # The canvas without pyplot: no window system is asked for, no global state is left.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    count = len(shown.seconds)
    figure = Figure(figsize=(12, 8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{shown.name}\n", fontsize=15, fontweight="bold", color=_TEXT)
    figure.text(0.5, 0.948, shown.summary(), ha="center", fontsize=10, color=_FAINT)
    time, total, bytes_ = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": (1.1, 1.4, 1.1)}
    )
    for axes in (time, total, bytes_):
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=_GRID, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_FAINT, labelsize=9)
        for index, (first, end, _) in enumerate(shown.blocks()):
            if index % 2 and shown.chosen:
                axes.axvspan(first, end, color=_BAND, zorder=0, linewidth=0)
        for place in shown.chosen:
            axes.axvline(place, color=_CUT, linewidth=1.3, linestyle=(0, (4, 2)))

    time.bar(
        [place + 0.5 for place in range(count)],
        [1e6 * seconds for seconds in shown.seconds],
        width=1.0,
        color=_TIME,
        linewidth=0,
    )
    time.set_ylabel(f"{shown.time_label}\nper operator, µs", color=_TEXT)
    if shown.chosen:
        time.set_ylim(0, 1.35e6 * max(shown.seconds) or 1.0)  # room for the blocks' names
        for index, (first, end, share) in enumerate(shown.blocks(), 1):
            time.text(
                (first + end) / 2,
                0.97,
                f"block {index}\n{share:.0%}" if len(shown.chosen) < 12 else f"{index}",
                transform=time.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=9,
                color=_CUT,
            )

    for label, colour, values in shown.cumulative():
        total.plot(range(count + 1), values, color=colour, linewidth=2, label=label)
    total.set_ylabel("done so far, %", color=_TEXT)
    total.set_ylim(0, 103)
    if total.lines:  # a model without weights and costs has nothing to explain
        total.legend(frameon=False, loc="upper left", fontsize=9)

    sizes = [max(cut.row_bytes, 1) for cut in shown.cuts]
    places = [cut.place for cut in shown.cuts]
    bytes_.set_yscale("log")
    bytes_.scatter(places, sizes, s=12, color=_FAINT, linewidth=0, label="could be cut")
    made = [(c.place, max(c.row_bytes, 1)) for c in shown.cuts if c.place in shown.chosen]
    if made:
        bytes_.scatter(*zip(*made, strict=True), s=44, color=_CUT, zorder=3, label="is cut")
        for place, size in made:
            bytes_.annotate(
                human_bytes(size),
                (place, size),
                xytext=(6, 8),
                textcoords="offset points",
                fontsize=9,
                color=_CUT,
                bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85},
            )
        bytes_.legend(edgecolor="none", loc="lower center", ncols=2, fontsize=9)
    if sizes:
        bytes_.set_ylim(min(sizes) / 2, max(sizes) * 3)
    bytes_.yaxis.set_major_locator(LogLocator(numticks=6))
    bytes_.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    bytes_.yaxis.set_minor_formatter(NullFormatter())
    bytes_.set_ylabel("crosses a cut,\nper row", color=_TEXT)
    bytes_.set_xlim(0, count)
    landmarks = _readable(shown, count / 24)
    if landmarks:
        bytes_.set_xticks(
            [place for _, place in landmarks],
            [name for name, _ in landmarks],
            rotation=35,
            ha="right",
            rotation_mode="anchor",
        )
        bytes_.set_xlabel("first operator of each module", color=_FAINT, fontsize=9)
    else:
        bytes_.set_xlabel("operators, in order", color=_FAINT, fontsize=9)
    figure.align_ylabels()
    figure.savefig(path)


# ------------------------------------------------------------------------------------------ html

_WIDTH, _LEFT, _RIGHT = 1100, 90, 20
_PANELS = ((70, 150), (260, 200), (500, 150))  # top and height of each, in pixels
_HEIGHT = 730


def _html(shown: Profile) -> str:
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{escape(shown.name)}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ margin: 1.5rem auto; max-width: {_WIDTH}px; background: #fff; }}
svg {{ width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: {_TEXT}; }}
.faint {{ fill: {_FAINT}; }} .cut {{ fill: {_CUT}; }} .end {{ text-anchor: end; }}
.cut {{ paint-order: stroke; stroke: #fff; stroke-width: 3px; }}
.middle {{ text-anchor: middle; }} circle:hover, rect.bar:hover {{ fill: {_CUT}; }}
</style>
{_svg(shown)}
</html>
"""


def _svg(shown: Profile) -> str:
    drawing = _Drawing(shown)
    drawing.frame()
    drawing.times(*_PANELS[0])
    drawing.totals(*_PANELS[1])
    drawing.crossing(*_PANELS[2])
    drawing.cuts()
    return "\n".join([*drawing.parts, "</svg>"])


class _Drawing:
    """The SVG under construction, `parts` in the order of painting."""

    def __init__(self, shown: Profile) -> None:
        self._shown = shown
        title = escape(shown.name)
        self.parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">']
        self._text(_WIDTH / 2, 22, shown.name, "middle", ' font-size="18" font-weight="bold"')
        self._text(_WIDTH / 2, 44, shown.summary(), "middle faint")

    def _x(self, place: float) -> float:
        inner = _WIDTH - _LEFT - _RIGHT
        return round(_LEFT + inner * place / len(self._shown.seconds), 2)

    def _text(self, x: float, y: float, words: str, kind: str = "", more: str = "") -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{more}>{escape(words)}</text>'
        )

    def _level(self, y: float, words: str) -> None:
        """A grid line with what it stands for."""
        self.parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="{_GRID}"/>')
        self._text(_LEFT - 6, y + 4, words, "end faint")

    def frame(self) -> None:
        """Shading of every second block, axes, and the names of modules below."""
        for top, height in _PANELS:
            for first, end, _ in list(self._shown.blocks())[1::2]:
                self.parts.append(
                    f'<rect x="{self._x(first)}" y="{top}" height="{height}" '
                    f'width="{self._x(end) - self._x(first):.2f}" fill="{_BAND}"/>'
                )
            self.parts.append(
                f'<path d="M{_LEFT} {top}V{top + height}H{_WIDTH - _RIGHT}" fill="none" '
                f'stroke="{_FAINT}"/>'
            )
        bottom = sum(_PANELS[-1])
        for name, place in _readable(self._shown, len(self._shown.seconds) / 28):
            x = self._x(place)
            self.parts.append(f'<path d="M{x} {bottom}v5" stroke="{_FAINT}"/>')
            turned = f' transform="rotate(-35 {x} {bottom + 16})"'
            self._text(x, bottom + 16, name, "end faint", turned)

    def times(self, top: int, height: int) -> None:
        """A bar for each operator, with its name and costs for the mouse."""
        shown = self._shown
        self._text(_LEFT, top - 6, f"{shown.time_label} per operator")
        most = max(shown.seconds) * 1.35 or 1.0  # room for the blocks' names above the bars
        for part in (0.25, 0.5, 0.75):
            self._level(top + height * (1 - part), f"{1e6 * most * part:.3g} µs")
        width = self._x(1) - self._x(0)
        for place, seconds in enumerate(shown.seconds):
            tall = height * seconds / most
            said = (
                f"{shown.operators[place]}: {1e6 * seconds:.3g} µs, "
                f"{human_bytes(shown.parameter_bytes[place])} of weights, "
                f"{human_operations(shown.flops[place])}"
            )
            self.parts.append(
                f'<rect class="bar" x="{self._x(place)}" y="{top + height - tall:.2f}" '
                f'width="{width:.2f}" height="{tall:.2f}" fill="{_TIME}">'
                f"<title>{escape(said)}</title></rect>"
            )
        if shown.chosen:
            for index, (first, end, share) in enumerate(shown.blocks(), 1):
                few = len(shown.chosen) < 12
                said = f"block {index} · {share:.0%}" if few else f"{index}"
                self._text(self._x((first + end) / 2), top + 14, said, "middle cut")

    def totals(self, top: int, height: int) -> None:
        """Lines of what has accumulated, from 0 to 100 %."""
        self._text(_LEFT, top - 6, "done so far")
        for percent in (25, 50, 75, 100):
            self._level(top + height * (1 - percent / 100), f"{percent} %")
        for index, (label, colour, values) in enumerate(self._shown.cumulative()):
            points = " ".join(
                f"{self._x(place)},{top + height * (1 - value / 100):.2f}"
                for place, value in enumerate(values)
            )
            self.parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
            )
            self._text(_LEFT + 12, top + 18 + 16 * index, label, "", f' style="fill:{colour}"')

    def crossing(self, top: int, height: int) -> None:
        """A dot for each cut point, by the bytes that would cross, on a logarithmic scale."""
        self._text(_LEFT, top - 6, "crosses a cut, per row")
        cuts = self._shown.cuts
        if not cuts:
            return
        exponents = [math.log10(max(cut.row_bytes, 1)) for cut in cuts]
        low, high = math.floor(min(exponents)), math.ceil(max(exponents) + 1e-9)
        high = max(high, low + 1)

        def y(exponent: float) -> float:
            return top + height * (1 - 0.92 * (exponent - low) / (high - low))

        for exponent in range(low, high + 1):
            self._level(y(exponent), human_bytes(10.0**exponent))
        for cut, at in zip(cuts, map(y, exponents), strict=True):
            made = cut.place in self._shown.chosen
            tensors = "1 tensor" if cut.tensors == 1 else f"{cut.tensors} tensors"
            said = (
                f"behind {self._shown.operators[cut.place - 1]}: {human_bytes(cut.row_bytes)} "
                f"in {tensors}"
            )
            x = self._x(cut.place)
            self.parts.append(
                f'<circle cx="{x}" cy="{at:.2f}" r="{5 if made else 2.5}" '
                f'fill="{_CUT if made else _FAINT}"><title>{escape(said)}</title></circle>'
            )
            if made:
                self._text(x + 7, at - 6, human_bytes(cut.row_bytes), "cut")

    def cuts(self) -> None:
        """A line through all panels for each cut that is made."""
        for top, height in _PANELS:
            self.parts += [
                f'<path d="M{self._x(place)} {top}V{top + height}" stroke="{_CUT}" '
                'stroke-width="1.3" stroke-dasharray="5 3"/>'
                for place in self._shown.chosen
            ]
