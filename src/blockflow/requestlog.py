"""Every request has an id: the client's own or a new one, in the answer and in what is logged."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import TYPE_CHECKING

from blockflow.child import REQUEST

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = logging.getLogger(__name__)

_HEADER = b"x-request-id"
_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


class LogRequests:
    """ASGI middleware: `X-Request-Id` is taken over or made up, answered, and part of every record.

    Answers are logged at level debug, those with a status of 500 or more as warnings, except 503:
    whoever is refused is told why, and overload must not fill a disk.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == _HEADER), b"")
        request = given if _ID.fullmatch(given) else secrets.token_hex(8).encode()
        token = REQUEST.set(request.decode())
        start = time.monotonic()
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (_HEADER, request)]
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            level = logging.WARNING if status >= 500 and status != 503 else logging.DEBUG
            if _log.isEnabledFor(level):
                took = 1e3 * (time.monotonic() - start)
                _log.log(
                    level,
                    "%s %r: %s",
                    scope["method"],
                    scope["path"][:200],
                    status or "no answer",
                    extra={"status": status, "milliseconds": round(took, 3)},
                )
            REQUEST.reset(token)
