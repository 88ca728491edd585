"""The state on disk: what was recorded is there afterwards, whoever was killed in between."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from blockflow.edit import Verb
from blockflow.errors import InvalidInput, NotFound, StartFailed
from blockflow.state import State, topologies_in
from blockflow.status import Outcome
from blockflow.topology import Block, Generation, Topology
from fake_controller import DIGEST, WANTED

_OPEN = "import sys, pathlib, blockflow.state as s; s.State(pathlib.Path(sys.argv[1]))"
_RECORD = """
import pathlib, sys
sys.path.insert(0, sys.argv[3])
import test_state
test_state._record_until_killed(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
"""


def test_a_new_state_knows_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "state"
    with closing(State(directory)) as state:
        assert state.last_applied() is None
        assert state.history() == []
        assert state.next_number() == 1
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()} == {0o600}


def test_what_was_recorded_is_there_afterwards(tmp_path: Path) -> None:
    with closing(State(tmp_path / "s")) as state:
        state.record(Generation(1), WANTED, Path("/store"), Verb.SERVE)
        state.record(Generation(2), Topology(), None, Verb.APPLY, "block a: out of memory")
    with closing(State(tmp_path / "s")) as state:
        last = state.last_applied()
        assert last is not None
        assert (last.generation, last.topology, last.store) == (1, WANTED, "/store")
        assert (last.verb, last.outcome) == ("serve", Outcome.APPLIED)
        assert abs(last.at - time.time()) < 60
        newest, oldest = state.history()
        assert (newest.outcome, newest.reason) == (Outcome.FAILED, "block a: out of memory")
        assert oldest == last == state.get(Generation(1))
        assert [each.generation for each in state.history(1)] == [2]
        # A number that a failed attempt had is not given to another.
        assert state.next_number() == 3


def test_what_a_server_remembers_can_be_read_beside_it(tmp_path: Path) -> None:
    with closing(State(tmp_path / "s")) as state:
        state.record(Generation(1), WANTED, Path("/store"), Verb.SERVE)
        state.record(Generation(2), Topology(), None, Verb.APPLY)
        assert topologies_in(state.file) == [WANTED, Topology()]
    assert topologies_in(state.file) == [WANTED, Topology()]
    state.file.write_bytes(b"no database" * 100)
    with pytest.raises(InvalidInput, match=r"the history in .*state\.db cannot be read: file is"):
        topologies_in(state.file)
    state.file.unlink()
    with pytest.raises(InvalidInput, match="cannot be read: unable to open"):
        topologies_in(state.file)
    assert not state.file.exists()


def test_the_generation_before_is_one_that_served(tmp_path: Path) -> None:
    with closing(State(tmp_path / "s")) as state:
        state.record(Generation(1), WANTED, None, Verb.SERVE)
        state.record(Generation(2), Topology(), None, Verb.APPLY, "no")
        state.record(Generation(3), Topology(), None, Verb.APPLY)
        assert state.before(Generation(3)).generation == 1
        for ask in (lambda: state.before(Generation(1)), lambda: state.get(Generation(9))):
            with pytest.raises(NotFound):
                ask()
        for number in (-1, 0, 1 << 80):
            with pytest.raises(NotFound):
                state.get(Generation(number))


def test_the_history_is_bounded_and_what_serves_is_kept(tmp_path: Path) -> None:
    # Waiting for the disk 600 times is not what this is about.
    with closing(State(tmp_path / "s")) as state:
        state._database.execute("PRAGMA synchronous = OFF")
        for number in range(1, 11):
            state.record(Generation(number), WANTED, None, Verb.APPLY)
        for number in range(11, 600):
            state.record(Generation(number), WANTED, None, Verb.APPLY, "no")
        kept = [each.generation for each in state.history(1000)]
        assert kept == [*range(599, 99, -1), 10]
        last = state.last_applied()
        assert last is not None
        assert last.generation == 10


def test_a_directory_belongs_to_one_server(tmp_path: Path) -> None:
    with closing(State(tmp_path / "s")):
        with pytest.raises(StartFailed, match="choose another --state-dir"):
            State(tmp_path / "s")
        other = subprocess.run(
            [sys.executable, "-c", _OPEN, str(tmp_path / "s")],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert "another server keeps its state" in other.stderr
    State(tmp_path / "s").close()


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o755)
    with pytest.raises(StartFailed, match="mode 0700"):
        State(tmp_path / "s")
    (tmp_path / "file").write_text("")
    with pytest.raises(StartFailed, match="cannot be made"):
        State(tmp_path / "file" / "s")


@pytest.mark.parametrize("content", [b"no database" * 100, b"SQLite format 3\0" + b"\0" * 4080])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    State(tmp_path / "s").close()
    (tmp_path / "s" / "state.db").write_bytes(content)
    for _ in range(2):  # the second time: a failure gives the lock back
        with pytest.raises(StartFailed, match=r"state\.db cannot be used.*move the file away"):
            State(tmp_path / "s")


def test_a_file_of_another_version_is_left_alone(tmp_path: Path) -> None:
    State(tmp_path / "s").close()
    path = tmp_path / "s" / "state.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 7")
    before = path.read_bytes()
    with pytest.raises(StartFailed, match="format 7"):
        State(tmp_path / "s")
    assert path.read_bytes() == before


def test_a_full_disk_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    with closing(State(tmp_path / "s")) as state:
        state.record(Generation(1), WANTED, None, Verb.SERVE)
        (pages,) = state._database.execute("PRAGMA page_count").fetchone()
        state._database.execute(f"PRAGMA max_page_count = {pages}")
        large = Topology(blocks={f"b{i}": Block(artifact=DIGEST) for i in range(200)})
        with pytest.raises(StartFailed, match=r"full.*make room"):
            state.record(Generation(2), large, None, Verb.APPLY)
        assert [each.generation for each in state.history()] == [1]
        state._database.execute("PRAGMA max_page_count = 1000000")
        state.record(Generation(2), large, None, Verb.APPLY)
        assert [each.generation for each in state.history()] == [2, 1]


def _record_until_killed(directory: Path, told: int) -> None:
    state = State(directory)
    while True:
        number = state.next_number()
        blocks = {f"b{i}": Block(artifact=DIGEST) for i in range(number % 50)}
        state.record(number, Topology(blocks=blocks), None, Verb.APPLY)
        os.write(told, f"{number}\n".encode())


def test_kill_9_at_any_moment_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    randomly = random.Random(7)
    directory = tmp_path / "s"
    seen = 0
    for _ in range(10):
        said, told = os.pipe()
        os.set_inheritable(told, True)
        child = subprocess.Popen(
            [sys.executable, "-c", _RECORD, str(directory), str(told), str(Path(__file__).parent)],
            pass_fds=[told],
        )
        os.close(told)
        with os.fdopen(said, "rb") as lines:
            first = lines.readline()  # it is at work
            time.sleep(randomly.uniform(0, 0.1))
            child.send_signal(signal.SIGKILL)
            child.wait()
            acknowledged = [first, *lines.readlines()]
        whole = [line for line in acknowledged if line.endswith(b"\n")]
        with closing(State(directory)) as state:
            last = state.last_applied()
            assert last is not None
            # Written and not yet acknowledged is the most that it may be ahead.
            assert int(whole[-1]) <= last.generation <= int(whole[-1]) + 1
            assert len(last.topology.blocks) == last.generation % 50
            assert last.generation > seen
            seen = last.generation
