"""The ledger: what is being computed, readable when whoever wrote it is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockflow.ledger import Entry, Ledger, ledger_path, read


@pytest.mark.parametrize("count", [0, 1, 3, 511])
def test_what_is_written_is_read(tmp_path: Path, count: int) -> None:
    path = ledger_path(f"ipc://{tmp_path}/7.0.sock")
    assert path == tmp_path / "7.0.now"
    assert read(path) == ()
    ledger = Ledger(path)
    ledger.write([Entry(1, 2.0)] * 5)
    entries = [Entry((3 << 40) + number, 0.5 * number) for number in range(count)]
    ledger.write(entries)
    assert read(path) == tuple(entries)
    ledger.close()
    assert read(path) == ()


def test_only_so_many_are_noted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "0.now")
    ledger.write([Entry(number, 0.0) for number in range(600)])
    assert [entry.request for entry in read(tmp_path / "0.now")] == [*range(511)]
    ledger.close()


def test_a_file_of_another_size_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "0.now").write_bytes(b"\xff" * 100)
    assert read(tmp_path / "0.now") == ()
