"""Where a Pull end is bound: a socket of this user alone, or a tcp port."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Collection
from pathlib import Path

import zmq

from . import tcp
from .errors import EndpointError
from .keys import Keys
from .loop import Loop

_LONGEST_PATH = 107


def _router(context: zmq.Context[zmq.Socket[bytes]], largest: int) -> zmq.Socket[bytes]:
    """A ROUTER that refuses frames of more than `largest` bytes, with the sender's connection."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.setsockopt(zmq.SNDHWM, 0)  # credits bound what is under way, not ZeroMQ
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, largest)
    return socket


class IpcListener:
    """A Unix socket in a directory that belongs to this user alone.

    ZeroMQ would let a second bind steal the path silently, and creates sockets that anybody may
    connect to: a lock beside the socket and a private directory prevent both.
    Raises EndpointError.
    """

    def __init__(self, loop: Loop, endpoint: str, largest: int) -> None:
        self.endpoint = endpoint
        self._path = _private_path(endpoint)
        self._lock_path = self._path.with_name(self._path.name + ".lock")
        self._lock = os.open(self._lock_path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise EndpointError(f"{endpoint} is in use by another Pull") from None
        self.socket = _router(loop.context, largest)
        try:
            self.socket.bind(endpoint)
            self._path.chmod(0o600)
        except (zmq.ZMQError, OSError) as error:
            self.socket.close()
            os.close(self._lock)
            raise EndpointError(f"{endpoint} cannot be bound: {error}") from None

    def close(self) -> None:
        self.socket.close()
        self._path.unlink(missing_ok=True)
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)


class TcpListener:
    """A tcp port, for those with a key that is allowed; for anybody, if `keys` is None.

    on_end(connection) is called in the loop's thread when a connection that `connection_of` has
    named ends, and `on_failure` when one was not made. Raises EndpointError.
    """

    def __init__(
        self,
        loop: Loop,
        endpoint: str,
        largest: int,
        keys: Keys | None,
        allowed_keys: Collection[str],
        *,
        on_end: Callable[[int], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._on_end = on_end
        self._doorkeeper = tcp.Doorkeeper(loop, allowed_keys) if keys is not None else None
        self.socket = _router(
            self._doorkeeper.context if self._doorkeeper else loop.context, largest
        )
        tcp.tune(self.socket)
        if self._doorkeeper is not None and keys is not None:
            self._doorkeeper.guard(self.socket, keys)
        self._open: set[int] = set()
        self._connections = tcp.Connections(
            loop,
            self.socket,
            on_accept=self._open.add,
            on_end=self._end,
            on_failure=on_failure,
        )
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise EndpointError(f"{endpoint} cannot be bound: {error}") from None
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def connection_of(self, frame: zmq.Frame) -> int | None:
        """The connection that brought `frame`; None when it has ended since.

        It is the number of a descriptor, and so may name another one later: what has become of
        connections is heeded first.
        """
        self._connections.look()
        connection = int(frame.get(zmq.SRCFD))
        return connection if connection in self._open else None

    def _end(self, connection: int) -> None:
        self._open.discard(connection)
        self._on_end(connection)

    def close(self) -> None:
        self._connections.close()
        self.socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.close()


def _private_path(endpoint: str) -> Path:
    scheme, _, rest = endpoint.partition("://")
    if scheme != "ipc" or not rest.startswith("/"):
        raise EndpointError(f"{endpoint!r} is neither tcp:// nor ipc:// with an absolute path")
    path = Path(rest)
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise EndpointError(
            f"{path} is longer than the {_LONGEST_PATH} bytes a Unix socket's path may have"
        )
    try:
        directory = path.parent.stat()
    except OSError as error:
        raise EndpointError(f"{path.parent} cannot hold an endpoint: {error.strerror}") from None
    if directory.st_uid != os.getuid() or stat.S_IMODE(directory.st_mode) & 0o077:
        raise EndpointError(f"{path.parent} must belong to this user and have mode 0700")
    return path
