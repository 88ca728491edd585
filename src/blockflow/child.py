"""The life of a child process: bound to its parent's, led over a control socket."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

import zmq

from blockflow import protocol

_PR_SET_PDEATHSIG = 1


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
    logging.basicConfig(
        level=level.upper(), format=f"%(asctime)s {name} %(levelname)s %(message)s", force=True
    )


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
