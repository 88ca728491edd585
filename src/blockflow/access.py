"""Who may use an API: those of this host, or those who know a token.

A token is a secret of at least 16 printable characters in a file that only its owner can read.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from blockflow.errors import InvalidInput

if TYPE_CHECKING:  # clients read tokens too, and need no server's libraries for it
    from starlette.types import ASGIApp, Receive, Scope, Send

_LEAST = 16
_MOST = 4096


def read_token(path: Path) -> str:
    """The token in `path`, without the space around it.

    Raises InvalidInput when others may read the file, or it holds no token; OSError.
    """
    # One open: the file that is checked is the one that is read.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidInput(f"{path} is no file")
        if found.st_uid not in {os.getuid(), 0} or stat.S_IMODE(found.st_mode) & 0o077:
            raise InvalidInput(
                f"{path} holds a secret that others may read; `chmod 600 {path}` as its owner"
            )
        content = os.read(fd, _MOST + 1)
    finally:
        os.close(fd)
    token = content.strip().decode("ascii", "replace")
    if len(token) < _LEAST or len(content) > _MOST:
        raise InvalidInput(f"the token in {path} must have {_LEAST} to {_MOST} characters")
    if not all("!" <= character <= "~" for character in token):
        raise InvalidInput(
            f"the token in {path} may hold letters, digits and punctuation only, in one line"
        )
    return token


def require_token(app: ASGIApp, token: str, open_paths: Collection[str] = ()) -> ASGIApp:
    """`app` for those who send `Authorization: Bearer <token>`; others are answered 401.

    open_paths: the paths that everybody may ask for, such as those of health checks.
    """
    return RequireToken(app, token, open_paths)


class RequireToken:
    """What `require_token` makes; a class, so that frameworks can add it as middleware."""

    def __init__(self, app: ASGIApp, token: str, open_paths: Collection[str] = ()) -> None:
        self._app = app
        self._token = token.encode()
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "lifespan":
                await self._app(scope, receive, send)
            case "http" if self._admits(scope):
                await self._app(scope, receive, send)
            case "http":
                await _refuse(send)
            case _:
                # WebSockets: neither API has any, and their token would need a place of its own.
                await send({"type": "websocket.close", "code": 1008})

    def _admits(self, scope: Scope) -> bool:
        if scope["path"] in self._open_paths:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, token = given[0].partition(b" ")
        # In constant time: how long a comparison takes must not tell how much of a guess is right.
        matches = hmac.compare_digest(token.strip(), self._token)
        return bool(scheme.lower() == b"bearer" and matches)


class SameHostOnly:
    """Keep web pages away from an API without authentication (ASGI middleware).

    A page that the user of this host visits may send requests to a loopback address. Where the
    browser shows the page's origin, `Origin` gives it away; where the page's own name was pointed
    at 127.0.0.1 (DNS rebinding), `Host` does.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        problem = _stranger(scope["headers"])
        if problem is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _answer(send, 403, problem)
        else:
            await send({"type": "websocket.close", "code": 1008})


def _stranger(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    def values(wanted: bytes) -> list[str]:
        return [value.decode("latin-1") for name, value in headers if name == wanted]

    hosts = values(b"host")
    if len(hosts) != 1 or not _is_this_host(f"//{hosts[0]}"):
        said = ", ".join(hosts) or "nothing"
        return f"the Host header says {said}; this API answers to localhost, 127.0.0.1 and ::1"
    for origin in values(b"origin"):
        if origin.lower() not in {f"http://{hosts[0].lower()}", f"https://{hosts[0].lower()}"}:
            return f"a page of {origin} may not use this API"
    return None


def _is_this_host(url: str) -> bool:
    try:
        name = urlsplit(url).hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def _refuse(send: Send) -> None:
    await _answer(
        send,
        401,
        "this API asks for a token: send `Authorization: Bearer <token>` (the command line takes "
        "it from --token-file or BLOCKFLOW_TOKEN_FILE)",
        (b"www-authenticate", b'Bearer realm="BlockFlow"'),
    )


async def _answer(send: Send, status: int, error: str, *more: tuple[bytes, bytes]) -> None:
    body = json.dumps({"error": error, "problems": []}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        # The body of the request was not read.
        (b"connection", b"close"),
        *more,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
