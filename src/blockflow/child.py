"""The life of a child process: bound to its parent's, led over a control socket."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path

import zmq

from blockflow import protocol

_PR_SET_PDEATHSIG = 1
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked into, never written
REQUEST: ContextVar[str | None] = ContextVar("request", default=None)
"""The id of the request that is being answered, for what is logged meanwhile."""
LOG_FORMAT = "BLOCKFLOW_LOG_FORMAT"
"""The environment variable by which the server tells its children how to log."""


def die_with_parent(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel kill this process the moment its parent, process `parent`, is gone.

    The kernel means the parent's thread that started the child: the server starts children from
    its main thread alone. `by` is the signal, for those that have something to put in order first.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, by) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the call took effect
        sys.exit(1)


def keep_what_is_there() -> None:
    """Have the garbage collector leave alone what this process has by now.

    With torch loaded that is a few hundred thousand objects, which stay to the end; to look through
    them takes a tenth of a second, in which no request is served.
    """
    gc.collect()
    gc.freeze()


def cuda_leftovers(names: Iterable[str], uid: int, pid: int) -> list[str]:
    """Those of `names`, files in /dev/shm, that CUDA's driver made in process `pid` of user `uid`.

    The driver does not remove them when the process is killed or leaves by `os._exit`.
    """
    return [name for name in names if name.startswith(f"cuda.shm.{uid:x}.{pid:x}.")]


def remove_cuda_leftovers(pid: int) -> None:
    """Remove what CUDA's driver left in /dev/shm of this user's process `pid`, which has ended."""
    there = [path.name for path in _SHARED_MEMORY.iterdir()]
    for name in cuda_leftovers(there, os.getuid(), pid):
        left = _SHARED_MEMORY / name
        with contextlib.suppress(FileNotFoundError):
            if left.lstat().st_uid == os.getuid():
                left.unlink()


def start_logging(name: str, level: str) -> None:
    """Log to stderr as process `name`, as text or as one JSON object a line."""
    handler = logging.StreamHandler()
    if os.environ.get(LOG_FORMAT) == "json":
        handler.setFormatter(_JsonFormatter(name))
    else:
        handler.setFormatter(_TextFormatter(f"%(asctime)s {name} %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _TextFormatter(logging.Formatter):
    """Lines that end with the request's id where there is one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        said = super().formatMessage(record)
        request = REQUEST.get()
        return said if request is None else f"{said} [request {request}]"


class _JsonFormatter(logging.Formatter):
    """Objects: `at` (UTC), `process`, `level`, `logger`, `message`, perhaps `request`, `error`.

    Whatever a caller adds with `extra` stands beside them.
    """

    _USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        said: dict[str, object] = {
            "at": f"{at}.{int(record.msecs):03d}Z",
            "process": self._process,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request := REQUEST.get()) is not None:
            said["request"] = request
        said |= {k: v for k, v in vars(record).items() if k not in self._USUAL and k not in said}
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


class ControlSocket:
    """A child's end of the control connection; used by one thread."""

    def __init__(self, endpoint: str, incarnation: protocol.Incarnation) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 1000)
        self.socket.setsockopt(zmq.IDENTITY, str(incarnation).encode())
        self.socket.connect(endpoint)
        self.say(protocol.Hello(incarnation, os.getpid()))

    def say(self, message: protocol.FromChild) -> None:
        self.socket.send(protocol.encode(message))

    def hear(self) -> protocol.Command | None:
        """The next command, or None when there is none now."""
        try:
            return protocol.decode_command(self.socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def close(self) -> None:
        self.socket.close()
