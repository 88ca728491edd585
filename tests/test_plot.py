"""Pictures: what they show is what the analysis found, and they open without a network."""

from __future__ import annotations

import struct
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from blockflow.artifact import Port
from blockflow.cuts import Analysis
from blockflow.errors import InvalidInput
from blockflow.export import export
from blockflow.measure import Measure
from blockflow.plot import Cut, Profile, check_picture, draw, human_bytes, human_operations, profile

SHOWN = Profile(
    name="<net> & co",
    operators=("conv", "relu", "linear", "softmax"),
    seconds=(3e-6, 1e-6, 4e-6, 0.0),
    parameter_bytes=(100, 0, 300, 0),
    flops=(1000, 0, 3000, 0),
    activation_bytes=(64, 64, 16, 16),
    modules=(("stem", 0), ("head", 2)),
    cuts=(Cut(1, 1, 64), Cut(2, 2, 2_000_000), Cut(3, 1, 0)),
    chosen=(2,),
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.stem(x)))
        return result


def svg(path: Path) -> ElementTree.Element:
    text = path.read_text()
    return ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])  # noqa: S314


def test_a_profile_is_what_the_analysis_found() -> None:
    analysis = Analysis(export(Net().eval(), (Port("x", "float32", ("batch", 4)),)))
    shown = profile(analysis, "net", tensors=1, chosen=[2])
    assert len(shown.operators) == 3
    assert shown.flops == (64, 0, 32)
    assert shown.activation_bytes == (32, 32, 8)
    assert shown.parameter_bytes == ((4 * 8 + 8) * 4, 0, (8 * 2 + 2) * 4)
    assert shown.cuts == (Cut(1, 1, 32), Cut(2, 1, 32))
    assert shown.modules == (("stem", 0), ("head", 2))
    assert sum(share for *_, share in shown.blocks()) == pytest.approx(1)


def test_what_has_accumulated_ends_at_100_percent() -> None:
    for _, _, values in SHOWN.cumulative():
        assert values[0] == 0
        assert values == sorted(values)
        assert values[-1] == pytest.approx(100)
        assert len(values) == 5


def test_the_summary_says_how_unequal_the_blocks_are() -> None:
    assert SHOWN.summary() == (
        "400 B of weights, 4.0 kFLOP per row, 3 cut points; "
        "2 blocks, the slowest 1.00 × the average"
    )


def test_measured_time_is_told_with_rows_and_precision() -> None:
    shown = replace(SHOWN, measured=Measure("cpu", 1, "bf16"))
    assert "; 0.008 ms on cpu (1 row, bf16); " in shown.summary()


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 FLOP"), (999, "999 FLOP"), (1000, "1.0 kFLOP"), (3.6e9, "3.6 GFLOP")],
)
def test_operations_for_people(count: float, words: str) -> None:
    assert human_operations(count) == words


def test_html_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    draw(SHOWN, tmp_path / "net.html")
    text = (tmp_path / "net.html").read_text()
    for word in ("http:", "https:", "<script", "<link", "@import", "url(", "src="):
        assert word not in text
    assert "<title>&lt;net&gt; &amp; co</title>" in text
    root = svg(tmp_path / "net.html")
    assert len(root.findall("circle")) == len(SHOWN.cuts)
    assert len(root.findall("rect[@class='bar']")) == len(SHOWN.operators)
    words = [each.text for each in root.iter("text")]
    assert "block 2 · 50%" in words
    assert "2.0 MB" in words
    assert {"stem", "head"} <= set(words)


def test_nothing_is_drawn_outside_the_picture(tmp_path: Path) -> None:
    draw(SHOWN, tmp_path / "net.html")
    root = svg(tmp_path / "net.html")
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for each in root.iter():
        for name, limit in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            assert 0 <= float(each.attrib.get(name, 0)) <= limit


def test_png_is_drawn_by_matplotlib(tmp_path: Path) -> None:
    draw(SHOWN, tmp_path / "net.png")
    content = (tmp_path / "net.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1440, 960)
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("suffix", ["png", "html"])
def test_a_model_without_cuts_weights_or_cost_can_be_drawn(tmp_path: Path, suffix: str) -> None:

    bare = Profile("bare", ("relu",), (0.0,), (0,), (0,), (0,), (), (), ())
    draw(bare, tmp_path / f"bare.{suffix}")
    assert (tmp_path / f"bare.{suffix}").stat().st_size > 500


def test_without_matplotlib_the_message_names_the_alternative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidInput, match=r"needs matplotlib.*\.html"):
        check_picture(tmp_path / "net.png")
    check_picture(tmp_path / "net.html")


def test_a_picture_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"name a \.png or an \.html file"):
        check_picture(tmp_path / "net.jpg")
    with pytest.raises(InvalidInput, match="there is no directory"):
        check_picture(tmp_path / "none" / "net.html")


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (3e12, "3000.0 GB")],
)
def test_bytes_for_people(count: float, words: str) -> None:
    assert human_bytes(count) == words
