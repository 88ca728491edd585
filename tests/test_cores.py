"""How the cores are divided."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from blockflow import cores
from blockflow.cores import Cores


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "available", lambda: 4)


def test_who_computes_alone_has_all_cores_and_others_their_part(tmp_path: Path) -> None:
    a, b, c = (Cores(tmp_path / "cores", name) for name in "abc")
    assert a.take() == 4
    assert b.take() == 2
    assert c.take() == 1  # four by three: threads must not outnumber cores
    a.give_back()
    c.give_back()
    assert b.take() == 4
    for each in (a, b, c):
        each.close()


def test_pinned_cores_are_divided_with_nobody(tmp_path: Path) -> None:
    a, b = Cores(tmp_path / "cores", "a", alone=True), Cores(tmp_path / "cores", "b")
    assert b.take() == 4
    assert a.take() == 4
    a.give_back()
    for each in (a, b):
        each.close()


def test_there_is_always_one_thread(tmp_path: Path) -> None:
    many = [Cores(tmp_path / "cores", f"block {number}") for number in range(9)]
    assert [each.take() for each in many][-1] == 1
    for each in many:
        each.close()


def test_a_limit_holds(tmp_path: Path) -> None:
    a, b = Cores(tmp_path / "cores", "a", most=3), Cores(tmp_path / "cores", "b", most=99)
    assert a.take() == 3
    a.give_back()
    assert b.take() == 4
    a.close()
    b.close()


def test_the_dead_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, alive = Cores(tmp_path / "cores", "dead"), Cores(tmp_path / "cores", "alive")
    dead.take()
    assert alive.take() == 2
    later = time.monotonic() + 6
    monkeypatch.setattr(cores.time, "monotonic", lambda: later)
    assert alive.take() == 4
    dead.close()
    alive.close()


@pytest.mark.parametrize(
    ("text", "quota"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("", None)]
)
def test_a_container_says_its_quota(tmp_path: Path, text: str, quota: float | None) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert cores._quota(file) == quota
    assert cores._quota(tmp_path / "none") is None
