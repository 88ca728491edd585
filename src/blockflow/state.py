"""The memory of a server: every generation that was tried, in one SQLite file.

What `record` has returned from is on the disk. A server that is killed at any moment, or loses
power, comes back with the last generation that was applied.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from blockflow.edit import Verb
from blockflow.errors import InvalidInput, NotFound, StartFailed
from blockflow.status import GenerationRecord, Outcome
from blockflow.topology import Generation, Topology

STATE_FILE = "state.db"
_LOCK = "state.lock"
_VERSION = 1
_REMEMBERED = 500

_SCHEMA = """
CREATE TABLE generations (
    number INTEGER PRIMARY KEY,
    topology TEXT NOT NULL,
    store TEXT,
    verb TEXT NOT NULL,
    at REAL NOT NULL,
    outcome TEXT NOT NULL,
    reason TEXT
) STRICT
"""
_COLUMNS = "number, topology, store, verb, at, outcome, reason"


class State:
    """Opens the state of `directory`, which is made when it is missing, for this process alone.

    Every method may be called from any thread. All raise StartFailed when the disk does not do its
    part.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._guard = threading.Lock()
        _make_private(directory)
        self._lock = os.open(directory / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise StartFailed(
                f"another server keeps its state in {directory}; choose another --state-dir"
            ) from None
        try:
            self._database = self._open()
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def logs(self) -> Path:
        """The directory for what child processes write."""
        logs = self._directory / "logs"
        logs.mkdir(mode=0o700, exist_ok=True)
        return logs

    @property
    def machine_code(self) -> Path:
        """The directory for what compiling makes, which is loaded again: of this user alone."""
        directory = self._directory / "compiled"
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StartFailed(f"cannot make the directory {directory}: {error}") from error
        return directory

    @property
    def file(self) -> Path:
        """Where the generations are; see `topologies_in`."""
        return self._directory / STATE_FILE

    def close(self) -> None:
        with self._guard:
            self._database.close()
            os.close(self._lock)

    def last_applied(self) -> GenerationRecord | None:
        """What should serve; None when nothing was ever applied."""
        found = self._read("WHERE outcome = 'applied' ORDER BY number DESC LIMIT 1")
        return found[0] if found else None

    def before(self, number: Generation) -> GenerationRecord:
        """The last generation that was applied before `number`. Raises NotFound."""
        found = self._read(
            "WHERE outcome = 'applied' AND number < ? ORDER BY number DESC LIMIT 1", number
        )
        if not found:
            raise NotFound(f"no generation served before generation {number}")
        return found[0]

    def get(self, number: Generation) -> GenerationRecord:
        """Raises NotFound."""
        if not 0 < number < 1 << 62 or not (found := self._read("WHERE number = ?", number)):
            raise NotFound(
                f"there is no generation {number} in the history (the last {_REMEMBERED} are kept)"
            )
        return found[0]

    def history(self, limit: int = _REMEMBERED) -> list[GenerationRecord]:
        """The generations that are remembered, the newest first."""
        return self._read("ORDER BY number DESC LIMIT ?", limit)

    def next_number(self) -> Generation:
        """A number above all that were ever given out."""
        with self._transaction() as database:
            (highest,) = database.execute("SELECT max(number) FROM generations").fetchone()
        return Generation((highest or 0) + 1)

    def record(
        self,
        number: Generation,
        topology: Topology,
        store: Path | None,
        verb: Verb,
        reason: str | None = None,
    ) -> None:
        """Write down that a generation is to serve, or with a `reason` that it failed."""
        outcome = Outcome.APPLIED if reason is None else Outcome.FAILED
        row = (
            number,
            topology.model_dump_json(exclude_none=True),
            None if store is None else str(store),
            verb.value,
            time.time(),
            outcome.value,
            reason,
        )
        with self._transaction() as database:
            database.execute(
                f"INSERT INTO generations ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                row,
            )
            # However many attempts failed since, what serves is never forgotten.
            database.execute(
                "DELETE FROM generations WHERE number <= ? AND number != "
                "(SELECT max(number) FROM generations WHERE outcome = 'applied')",
                (number - _REMEMBERED,),
            )

    def _read(self, where: str, *values: object) -> list[GenerationRecord]:
        with self._transaction() as database:
            rows = database.execute(
                f"SELECT {_COLUMNS} FROM generations {where}",  # noqa: S608 - our own words
                values,
            ).fetchall()
        try:
            return [
                GenerationRecord(
                    generation=number,
                    topology=Topology.model_validate_json(topology),
                    store=store,
                    verb=verb,
                    at=at,
                    outcome=outcome,
                    reason=reason,
                )
                for number, topology, store, verb, at, outcome, reason in rows
            ]
        except ValidationError as error:
            raise self._damaged(str(error)) from error

    def _open(self) -> sqlite3.Connection:
        path = self._directory / STATE_FILE
        # Made here, because SQLite's own files would get the umask's mode.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            # EXTRA also syncs the directory after a commit: without it, a loss of power may bring
            # the rollback journal, and so the generation before, back.
            database.execute("PRAGMA journal_mode = DELETE")
            database.execute("PRAGMA synchronous = EXTRA")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version == 0:
                database.execute("BEGIN IMMEDIATE")
                database.execute(_SCHEMA)
                database.execute(f"PRAGMA user_version = {_VERSION}")
                database.execute("COMMIT")
            elif version != _VERSION:
                raise StartFailed(
                    f"{path} was written by another version of BlockFlow (format {version}, this "
                    f"one reads {_VERSION}); choose another --state-dir"
                )
        except sqlite3.Error as error:
            database.close()
            raise self._damaged(str(error)) from error
        except StartFailed:
            database.close()
            raise
        return database

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._guard:
            database = self._database
            try:
                database.execute("BEGIN IMMEDIATE")
                yield database
                database.execute("COMMIT")
            except sqlite3.DatabaseError as error:
                raise self._damaged(str(error)) from error
            finally:
                if database.in_transaction:
                    database.execute("ROLLBACK")

    def _damaged(self, why: str) -> StartFailed:
        return StartFailed(
            f"the state in {self._directory / STATE_FILE} cannot be used: {why}; make room on "
            "its disk, or move the file away to start without a history"
        )


def topologies_in(file: Path) -> list[Topology]:
    """All that a server remembers, read from its file, whether the server runs or not.

    Raises InvalidInput where it cannot be read.
    """
    try:
        uri = f"{file.resolve().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
            rows = database.execute("SELECT topology FROM generations").fetchall()
        return [Topology.model_validate_json(text) for (text,) in rows]
    except (sqlite3.Error, ValidationError) as error:
        raise InvalidInput(f"the history in {file} cannot be read: {error}") from error


def _make_private(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        raise StartFailed(
            f"the state directory {directory} cannot be made: {error.strerror}"
        ) from None
    if (
        not stat.S_ISDIR(found.st_mode)
        or found.st_uid != os.getuid()
        or stat.S_IMODE(found.st_mode) & 0o077
    ):
        raise StartFailed(
            f"the state directory {directory} must be this user's own, with mode 0700"
        )
