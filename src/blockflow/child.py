"""The life of a child process: bound to its parent's, led over a control socket."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import time

import zmq

from blockflow import protocol

_PR_SET_PDEATHSIG = 1
LOG_FORMAT = "BLOCKFLOW_LOG_FORMAT"
"""The environment variable by which the server tells its children how to log."""


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process the moment its parent, process `parent`, is gone.

    The kernel means the parent's thread that started the child: the server starts children from
    its main thread alone.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the call took effect
        sys.exit(1)


def start_logging(name: str, level: str) -> None:
    """Log to stderr as process `name`, as text or as one JSON object a line."""
    handler = logging.StreamHandler()
    if os.environ.get(LOG_FORMAT) == "json":
        handler.setFormatter(_JsonFormatter(name))
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {name} %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _JsonFormatter(logging.Formatter):
    """Objects with `at` (UTC), `process`, `level`, `logger`, `message` and perhaps `error`.

    Whatever a caller adds with `extra` (such as a request's id) stands beside them.
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
