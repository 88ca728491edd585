"""The page of the management API: one document, a few modules, no build step, no other host.

The page holds no secret and no state: it reads the management API as any client does.
"""

from __future__ import annotations

import mimetypes
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_HEADERS = {
    # What people name their blocks reaches this page. Nothing that is inline may run, nothing may
    # be loaded from or sent to anywhere else, and no text can become markup: Trusted Types without
    # a policy make the browser refuse every assignment to `innerHTML` and its kin.
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # A page from before an update would speak to an API that it does not know.
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """Build the routes of the page, `/`, and of its files, `/dashboard/<file>`.

    The files are read here, once: a request names a route and never a path on the disk.
    """
    made = []
    for file in sorted((files(__name__) / "static").iterdir(), key=lambda file: file.name):
        path = "/" if file.name == "index.html" else f"/dashboard/{file.name}"
        kind = _KINDS.get(file.name.rpartition(".")[2]) or mimetypes.guess_type(file.name)[0]
        made.append(_route(path, file.read_bytes(), kind or "application/octet-stream"))
    return made


# By hand, for a host's mime.types may call JavaScript something that browsers refuse to run.
_KINDS = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}


def _route(path: str, content: bytes, kind: str) -> Route:
    async def answer(_: Request) -> Response:
        return Response(content, headers={**_HEADERS, "Content-Type": kind})

    return Route(path, answer, include_in_schema=False)
