"""The Open Inference Protocol v2 over HTTP: a Starlette application in front of a `Dispatcher`.

This module moves bytes and maps errors to statuses. What the bytes mean is `oip`'s business, where
the tensors go is the dispatcher's.

Every answer is JSON, or JSON and binary tensors; every refusal is `{"error": "..."}`:

    400  the request does not fit the protocol or the model     408  the body came too slowly
    404  unknown path, model or version                         413  the body is too large
    405  wrong method                                           415  compressed body
    422  workers died of the request
    429  too much is under way (Retry-After)                    500  a block failed, or a bug
    503  the model is not ready (Retry-After)                   504  the request's time ran out
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from blockflow import __version__, oip
from blockflow.errors import (
    BlockFlowError,
    NotFound,
    Overloaded,
    RequestInvalid,
    RequestTooLarge,
    Unavailable,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model that clients may ask for; `reason` says why it is not ready.

    `returning`: it will be ready again soon, so that a request may as well wait for it.
    """

    metadata: oip.ModelMetadata
    ready: bool
    reason: str | None = None
    returning: bool = False


class Dispatcher(Protocol):
    """What the gateway needs from whoever brings requests to the blocks."""

    def models(self) -> Mapping[str, ModelStatus]:
        """Every deployed model by name, as of now. Called for every request: must be cheap.

        Raises `Unavailable` while it is not known yet what is deployed.
        """
        ...

    def check(self, model: str) -> None:
        """Raise `Overloaded` when a request to `model` would be refused whatever it holds."""
        ...

    async def infer(self, model: oip.ModelMetadata, request: oip.InferRequest) -> oip.InferResult:
        """Compute the answer to a request that was read as one to `model` as it was then.

        Raises `BlockFlowError`s, among them `DeadlineExceeded` when the request's time has run out.
        Is cancelled when the client is gone, and must end soon after that. The bytes of the result
        must stay as they are until the result is garbage: they are on their way to the socket after
        this returns.
        """
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may ask of the gateway.

    `body_bytes` bounds one request's body, `held_bytes` all bodies that are being received or
    computed at one time (one body of the largest size always fits). `body_seconds` is the time for
    a whole body to arrive.
    """

    body_bytes: int = 64 * 2**20
    held_bytes: int = 2**30
    body_seconds: float = 60.0


def create_app(dispatcher: Dispatcher, limits: Limits | None = None) -> Starlette:
    """The gateway as an ASGI application."""
    gateway = _Gateway(dispatcher, limits or Limits())
    routes = [
        _route("/v2", gateway.server_metadata),
        _route("/v2/health/live", gateway.live),
        _route("/v2/health/ready", gateway.ready),
        _route("/v2/repository/index", gateway.repository_index, "POST"),
    ]
    for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes += [
            _route(model, gateway.model_metadata),
            _route(f"{model}/ready", gateway.model_ready),
            _route(f"{model}/infer", gateway.infer, "POST"),
        ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_refusal})
    # A redirect of a POST makes clients send the body again, or drop it.
    app.router.redirect_slashes = False
    return app


class _Gateway:
    def __init__(self, dispatcher: Dispatcher, limits: Limits) -> None:
        self._dispatcher = dispatcher
        self._limits = limits
        self._held = _HeldMemory(max(limits.held_bytes, limits.body_bytes))

    async def server_metadata(self, _request: Request) -> Response:
        return _json(oip.server_metadata(__version__))

    async def live(self, _request: Request) -> Response:
        return _json({"live": True})

    async def ready(self, _request: Request) -> Response:
        waiting = {
            name: status.reason or "not ready"
            for name, status in self._dispatcher.models().items()
            if not status.ready
        }
        if not waiting:
            return _json({"ready": True})
        error = "not every model is ready: " + "; ".join(
            f"{name}: {reason}" for name, reason in waiting.items()
        )
        return _json({"ready": False, "error": error, "models": waiting}, 503, _RETRY)

    async def repository_index(self, request: Request) -> Response:
        with self._held.lease() as lease:
            body = await _receive_body(request, self._limits, lease)
            try:
                wanted = msgspec.json.decode(body, type=_IndexRequest) if body else _IndexRequest()
            except (ValueError, RecursionError) as error:
                raise RequestInvalid(f"the index request cannot be read: {error}") from None
        return _json(
            [
                {
                    "name": name,
                    "version": oip.MODEL_VERSION,
                    "state": "READY" if status.ready else "UNAVAILABLE",
                    "reason": status.reason or "",
                }
                for name, status in self._dispatcher.models().items()
                if status.ready or not wanted.ready
            ]
        )

    async def model_metadata(self, request: Request) -> Response:
        return _json(oip.model_metadata(self._status(request).metadata))

    async def model_ready(self, request: Request) -> Response:
        status = self._status(request)
        name = status.metadata.name
        if status.ready:
            return _json({"name": name, "ready": True})
        return _json({"name": name, "ready": False, "error": _not_ready(status)}, 503, _RETRY)

    async def infer(self, request: Request) -> Response:
        # All that can be refused without the body is refused before it: an upload may be long.
        status = self._status(request)
        if not (status.ready or status.returning):
            raise Unavailable(_not_ready(status))
        self._dispatcher.check(status.metadata.name)
        _refuse_compressed(request)
        lengths = request.headers.getlist(oip.HEADER_LENGTH)
        if len(lengths) > 1:
            raise RequestInvalid(f"the header {oip.HEADER_LENGTH} is given {len(lengths)} times")
        header_length = oip.parse_header_length(lengths[0] if lengths else None)

        with self._held.lease() as lease:
            body = await _receive_body(request, self._limits, lease)
            parsed = oip.parse_request(body, header_length, status.metadata)
            result = await self._infer_while_connected(request, status.metadata, parsed)
        encoded = oip.encode_response(status.metadata, parsed, result.outputs, result.timings)
        return _Pieces(encoded, result.timings)

    async def _infer_while_connected(
        self, request: Request, model: oip.ModelMetadata, parsed: oip.InferRequest
    ) -> oip.InferResult:
        """The dispatcher's answer; its work is cancelled when nobody will read it."""
        infer = asyncio.ensure_future(self._dispatcher.infer(model, parsed))
        gone = asyncio.ensure_future(_disconnected(request.receive))
        try:
            await asyncio.wait((infer, gone), return_when="FIRST_COMPLETED")
            if infer.cancelled():
                raise Unavailable(f"the gateway is giving up its work on model {model.name!r}")
            if infer.done():
                return infer.result()
            raise ClientDisconnect
        finally:
            infer.cancel()
            gone.cancel()
            # The body's memory is not given back while the dispatcher may still read it.
            await asyncio.gather(infer, gone, return_exceptions=True)

    def _status(self, request: Request) -> ModelStatus:
        models = self._dispatcher.models()
        name = request.path_params["name"]
        status = models.get(name)
        if status is None:
            known = ", ".join(sorted(models)) or "none"
            raise NotFound(f"no model {name[:80]!r} is deployed; deployed models: {known}")
        version = request.path_params.get("version", oip.MODEL_VERSION)
        if version != oip.MODEL_VERSION:
            raise NotFound(
                f"model {name!r} has no version {version[:80]!r}; its one version is "
                f"{oip.MODEL_VERSION!r}"
            )
        return status


class _IndexRequest(msgspec.Struct):
    ready: bool = False


def _not_ready(status: ModelStatus) -> str:
    return f"model {status.metadata.name!r} is not ready: {status.reason or 'no reason given'}"


# --- Request bodies -----------------------------------------------------------------------------


class _HeldMemory:
    """Bounds the bytes of all request bodies together, for one body's limit does not."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0

    @contextlib.contextmanager
    def lease(self) -> Iterator[Callable[[int], None]]:
        """Lends a function that takes more bytes, or raises `Overloaded`, until the `with` ends."""
        mine = 0

        def take(count: int) -> None:
            nonlocal mine
            if self._taken + count > self._limit:
                raise Overloaded(
                    f"requests that are under way hold {self._taken} of {self._limit} bytes; "
                    f"no room for {count} more: try again later"
                )
            self._taken += count
            mine += count

        try:
            yield take
        finally:
            self._taken -= mine


def _refuse_compressed(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise HTTPException(
            415,
            f"Content-Encoding {encoding[:80]!r} is not supported: send the body uncompressed",
            {"Accept-Encoding": "identity"},
        )


async def _receive_body(
    request: Request, limits: Limits, take: Callable[[int], None]
) -> memoryview | bytearray:
    """All of the body, copied once out of the server's chunks.

    Raises `RequestTooLarge` (before reading, where Content-Length tells), `Overloaded`, 408, and
    `ClientDisconnect` for a body that ends early.
    """
    length = request.headers.get("content-length")
    try:
        async with asyncio.timeout(limits.body_seconds):
            if length is None:
                return await _receive_unknown(request.receive, limits, take)
            return await _receive_known(request.receive, int(length), limits, take)
    except TimeoutError:
        # What is still to come of this body must not be taken for the next request.
        raise HTTPException(
            408,
            f"the request's body did not arrive within {limits.body_seconds:g} s",
            {"Connection": "close"},
        ) from None


async def _receive_known(
    receive: Receive, length: int, limits: Limits, take: Callable[[int], None]
) -> memoryview:
    if length > limits.body_bytes:
        raise RequestTooLarge(
            f"the request's body has {length} bytes; {limits.body_bytes} are the most"
        )
    take(length)
    # numpy's memory is not cleared: pages are committed as bytes arrive, not when they are
    # announced.
    body = np.empty(length, np.uint8).data
    filled = 0
    async for chunk in _chunks(receive):
        body[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return body


async def _receive_unknown(
    receive: Receive, limits: Limits, take: Callable[[int], None]
) -> bytearray:
    body = bytearray()
    async for chunk in _chunks(receive):
        if len(body) + len(chunk) > limits.body_bytes:
            raise RequestTooLarge(
                f"the request's body has more than {limits.body_bytes} bytes, which are the most"
            )
        take(len(chunk))
        body += chunk
    return body


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def _disconnected(receive: Receive) -> None:
    """Returns when the client is gone; the body must have been received."""
    while (await receive())["type"] != "http.disconnect":
        pass


# --- Answers ------------------------------------------------------------------------------------

_RETRY = {"Retry-After": "1"}
_LATER = frozenset({429, 503})

_CLIENT_CLOSED_REQUEST = 499


class _Pieces(Response):
    """A response whose body is sent piece by piece, so that tensors are not joined first."""

    def __init__(self, encoded: oip.Encoded, timings: oip.Timings | None) -> None:
        super().__init__(headers=encoded.headers)
        if timings is not None:
            self.headers["Server-Timing"] = _server_timing(timings)
        self._pieces = encoded.chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _server_timing(timings: oip.Timings) -> str:
    named = [("total", timings.total_ms)]
    for each in timings.blocks:
        # Names become tokens (RFC 9110): whatever else they hold must not end the header.
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", each.block)
        named += [
            (f"{name}.hop", each.hop_ms),
            (f"{name}.queue", each.queue_ms),
            (f"{name}.compute", each.compute_ms),
        ]
    return ", ".join(f"{name};dur={milliseconds:.3f}" for name, milliseconds in named)


def _json(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = msgspec.json.encode(content)
    return Response(body, status, headers, media_type="application/json")


def _refusal(
    request: Request, status: int, error: str, headers: Mapping[str, str] | None = None
) -> Response:
    headers = {**(_RETRY if status in _LATER else {}), **(headers or {})}
    if "expect" in request.headers:
        # A client that was never told to continue may send its next request instead of the body.
        headers["Connection"] = "close"
    return _json({"error": error}, status, headers)


async def _http_refusal(request: Request, exception: Exception) -> Response:
    """Refusals that only HTTP knows; Starlette's own get words that say what to do."""
    if not isinstance(exception, HTTPException):
        raise exception
    path = request.url.path[:200]
    match exception.status_code:
        case 404:
            error = f"nothing answers at {path!r}; the Open Inference Protocol starts at /v2"
        case 405:
            error = f"{request.method} is not allowed at {path!r}"
        case _:
            error = exception.detail
    return _refusal(request, exception.status_code, error, exception.headers)


def _route(
    path: str, endpoint: Callable[[Request], Awaitable[Response]], method: str = "GET"
) -> Route:
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)  # nobody reads it
        except BlockFlowError as error:
            if error.status == 500:
                _log.error("%s %s: %s", request.method, path, error)
            headers = None
            if isinstance(error, Unavailable) and error.status in _LATER:
                headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            return _refusal(request, error.status, str(error), headers)
        except HTTPException:
            raise
        except Exception:  # noqa: BLE001 -- the last resort: a bug must not leak its internals
            _log.exception("%s %s failed", request.method, request.url.path)
            return _refusal(request, 500, "internal error; the server's log says more")

    return Route(path, answer, methods=[method])
