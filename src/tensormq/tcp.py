"""tcp: who may connect, which CURVE keys prove, and what becomes of each connection.

Nothing that a peer says of its process is believed here: tensors travel inline, and an end hears
of the other's death by the end of the connection. What ZeroMQ tells of connections, it tells
through a monitor, a socket of its own.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from .errors import SecurityError
from .keys import Keys, check_key
from .loop import Loop

log = logging.getLogger(__name__)

_ZAP = "inproc://zeromq.zap.01"  # where ZeroMQ asks, in each context
_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_SILENCE_SECONDS = 10


def is_tcp(endpoint: str) -> bool:
    return endpoint.startswith("tcp://")


def require(endpoint: str, keys: Keys | None, others: Collection[str], insecure: bool) -> None:
    """Refuse a way of reaching `endpoint` that is not safe and was not asked for as such.

    others: the public keys of the other end. Raises SecurityError.
    """
    if not is_tcp(endpoint):
        if keys is not None or others or insecure:
            raise SecurityError(f"{endpoint} takes no keys: its directory is what protects it")
    elif insecure:
        if keys is not None or others:
            raise SecurityError(f"{endpoint} is to be insecure, and is given keys")
        log.warning("%s is insecure: whoever reaches it can read and send tensors", endpoint)
    elif keys is None or not others:
        raise SecurityError(
            f"{endpoint} needs keys of this end and the other's public key "
            "(see `python -m tensormq keys`), or insecure=True"
        )
    for key in others:
        check_key(key)


def tune(socket: zmq.Socket[bytes]) -> None:
    """Have the kernel end connections to a host that has been silent for ten seconds.

    ZeroMQ's own heartbeats would end those that take longer to bring one large tensor.
    """
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _SILENCE_SECONDS // 2)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, _SILENCE_SECONDS // 2)
    socket.setsockopt(zmq.TCP_MAXRT, _SILENCE_SECONDS * 1000)


class Connections:
    """What becomes of the connections of one socket, told in the loop's thread.

    on_end(fd): a connection ended. on_failure(reason): one was not made, for the ends did not
    agree on who they are. on_accept(fd): there is a new one, which is not proven yet.
    """

    def __init__(
        self,
        loop: Loop,
        socket: zmq.Socket[bytes],
        *,
        on_end: Callable[[int], None],
        on_failure: Callable[[str], None],
        on_accept: Callable[[int], None] | None = None,
    ) -> None:
        self._loop = loop
        self._watched = socket
        self._on_end = on_end
        self._on_failure = on_failure
        self._on_accept = on_accept
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | _FAILED
        address = f"inproc://tensormq-{secrets.token_hex(8)}"
        socket.monitor(address, events)
        self._monitor: zmq.Socket[bytes] = socket.context.socket(zmq.PAIR)
        # Events that find no room would hold up ZeroMQ's thread, and `close` with it.
        self._monitor.setsockopt(zmq.RCVHWM, 0)
        self._monitor.setsockopt(zmq.LINGER, 0)
        self._monitor.connect(address)
        loop.watch(self._monitor, self.look)

    def look(self) -> None:
        """Tell all that has happened so far."""
        while not self._monitor.closed:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            kind, value = event["event"], event["value"]
            if kind == zmq.EVENT_DISCONNECTED:
                self._on_end(value)
            elif kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._on_failure("the consumer does not allow the producer's key")
            elif kind & _FAILED:
                self._on_failure(
                    "the ends did not come to terms: one uses keys and the other none, "
                    "or the producer was given another public key than the consumer's"
                )
            elif kind == zmq.EVENT_ACCEPTED and self._on_accept is not None:
                self._on_accept(value)

    def close(self) -> None:
        """Stop telling; before the socket itself is closed."""
        if not self._monitor.closed:
            self._loop.unwatch(self._monitor)
            self._watched.disable_monitor()
            self._monitor.close()


class Doorkeeper:
    """Says who may connect to a socket of `context`, by the public keys that it knows.

    ZeroMQ asks one doorkeeper for each context, so every such socket has a context of its own.
    """

    def __init__(self, loop: Loop, allowed: Collection[str]) -> None:
        self._loop = loop
        self._allowed = frozenset(allowed)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._asked = self.context.socket(zmq.REP)
        self._asked.setsockopt(zmq.LINGER, 0)
        self._asked.bind(_ZAP)
        loop.watch(self._asked, self._answer)

    def guard(self, socket: zmq.Socket[bytes], keys: Keys) -> None:
        """Let only those connect to `socket`, before it is bound, whose key is allowed."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
        socket.setsockopt(zmq.ZAP_DOMAIN, b"tensormq")
        # Without an answer nobody gets in; ZeroMQ would let everybody.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def _answer(self) -> None:
        while True:
            try:
                version, number, _domain, address, _identity, mechanism, *credentials = (
                    self._asked.recv_multipart(zmq.NOBLOCK)
                )
            except zmq.Again:
                return
            key = ""
            if mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == 32:
                key = z85.encode(credentials[0]).decode()
            if key in self._allowed:
                status, text = b"200", b"OK"
            else:
                log.warning("refused the key %s of %s", key, address.decode(errors="replace"))
                status, text = b"400", b"this key is not allowed"
            self._asked.send_multipart([version, number, status, text, b"", b""])

    def close(self) -> None:
        """After the sockets that are guarded."""
        self._loop.unwatch(self._asked)
        self._asked.close()
        self.context.term()


def identify(socket: zmq.Socket[bytes], keys: Keys, server_key: str) -> None:
    """Have `socket`, before it connects, prove who it is, and ask the same of the other end."""
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
    socket.setsockopt(zmq.CURVE_SERVERKEY, server_key.encode())
