"""The management API: HTTP in front of a controller.

It decides nothing. Requests are read and checked here, the controller acts, and every error is
answered as `{"error": "...", "problems": [...]}`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Annotated, Any, Protocol
from urllib.parse import urlsplit

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from blockflow import __version__
from blockflow import topology as topology_file
from blockflow.devices import Survey, survey
from blockflow.errors import BlockFlowError, RequestTooLarge, TopologyInvalid
from blockflow.status import ApplyResult, BlockStatus, PipelineStatus
from blockflow.topology import Generation, Topology

_log = logging.getLogger(__name__)

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


class Controller(Protocol):
    """What the API needs of a controller. All of it is called on the event loop."""

    async def apply(self, topology: Topology, dry_run: bool) -> ApplyResult:
        """Make `topology` the one that serves, or with `dry_run` only say what that would do.

        Raises:
            TopologyInvalid: it cannot be deployed.
            StartFailed: a block did not come up; the old generation keeps serving.
        """
        ...

    def topology(self) -> tuple[Generation, Topology]: ...

    def blocks(self) -> list[BlockStatus]: ...

    def pipelines(self) -> list[PipelineStatus]: ...

    def waiting(self) -> list[str]:
        """Say what should serve and does not, and why; empty when everything does."""
        ...


class CurrentTopology(BaseModel):
    generation: int
    topology: Topology


class Health(BaseModel):
    status: str = "ok"


class Failure(BaseModel):
    """The body of every answer that is not a success."""

    error: str
    problems: list[str] = []


def create_app(controller: Controller) -> FastAPI:
    """Build the API of `controller`; it answers only requests that were made on this host."""
    app = FastAPI(
        title="BlockFlow",
        summary="Deploy and observe blocks and pipelines.",
        version=__version__,
        responses={422: {"model": Failure}},
        # One schema for what is sent and what is answered: a default is not "required" in either.
        separate_input_output_schemas=False,
    )
    app.add_middleware(SameHostOnly)
    _answer_errors(app)

    @app.put(
        "/v1/topology",
        tags=["topology"],
        openapi_extra=_TOPOLOGY_BODY,
        responses={413: {"model": Failure}, 415: {"model": Failure}, 500: {"model": Failure}},
    )
    async def put_topology(
        request: Request,
        dry_run: Annotated[
            bool, Query(description="only check it, and say what would change")
        ] = False,
    ) -> ApplyResult:
        """Replace the whole topology; answers when the new one serves."""
        parse = _parser(request.headers.get("content-type", ""))
        # In a thread: a topology of the largest size takes a second to parse.
        wanted = await asyncio.to_thread(parse, await _body(request))
        return await controller.apply(wanted, dry_run)

    @app.get("/v1/topology", tags=["topology"])
    async def get_topology() -> CurrentTopology:
        """Give the topology that serves now, and its generation."""
        generation, current = controller.topology()
        return CurrentTopology(generation=generation, topology=current)

    @app.get("/v1/blocks", tags=["status"])
    async def get_blocks() -> list[BlockStatus]:
        """List the blocks with their process, memory, counts and connections."""
        return controller.blocks()

    @app.get("/v1/pipelines", tags=["status"])
    async def get_pipelines() -> list[PipelineStatus]:
        """List the pipelines, and whether each one serves."""
        return controller.pipelines()

    @app.get("/v1/devices", tags=["status"])
    def get_devices() -> Survey:
        """List the devices of this host."""
        return survey()

    @app.get("/healthz", tags=["health"])
    async def get_health() -> Health:
        """Answer as long as the server lives."""
        return Health()

    @app.get("/readyz", tags=["health"], responses={503: {"model": Failure}})
    async def get_readiness() -> JSONResponse:
        """Answer 200 when every block and pipeline serves, or else 503 and what does not."""
        if waiting := controller.waiting():
            return _failure(503, "not everything is ready", waiting)
        return JSONResponse({"status": "ready"})

    return app


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
        problem = _stranger(Headers(scope=scope))
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await _failure(403, problem)(scope, receive, send)


def _stranger(headers: Headers) -> str | None:
    hosts = headers.getlist("host")
    if len(hosts) != 1 or _host_name(f"//{hosts[0]}") not in LOOPBACK_HOSTS:
        said = ", ".join(hosts) or "nothing"
        known = ", ".join(sorted(LOOPBACK_HOSTS))
        return f"the Host header says {said}; this API answers to {known}"
    for origin in headers.getlist("origin"):
        if origin.lower() not in {f"http://{hosts[0].lower()}", f"https://{hosts[0].lower()}"}:
            return f"a page of {origin} may not use this API"
    return None


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _parser(content_type: str) -> Callable[[bytes], Topology]:
    match content_type.partition(";")[0].strip().lower():
        case "application/json":
            return topology_file.parse_json
        case "" | "application/yaml" | "application/x-yaml" | "text/yaml" | "text/x-yaml":
            return topology_file.parse
        case other:
            raise HTTPException(
                415, f"send the topology as application/json or application/yaml, not {other}"
            )


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > topology_file.MAX_BYTES:
            raise RequestTooLarge(
                f"a topology may have {topology_file.MAX_BYTES} bytes, and this one has more"
            )
    return bytes(body)


def _failure(status: int, error: str, problems: list[str] | None = None) -> JSONResponse:
    body = Failure(error=error, problems=problems or [])
    return JSONResponse(body.model_dump(), status_code=status)


def _answer_errors(app: FastAPI) -> None:
    async def ours(_: Request, error: BlockFlowError) -> JSONResponse:
        problems = list(error.problems) if isinstance(error, TopologyInvalid) else []
        if error.status >= 500:
            _log.error("%s: %s", type(error).__name__, error)
        return _failure(error.status, str(error), problems)

    async def http(_: Request, error: HTTPException) -> JSONResponse:
        answer = _failure(error.status_code, str(error.detail))
        answer.headers.update(error.headers or {})
        return answer

    async def bad_parameter(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = [
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()
        ]
        return _failure(422, "the request's parameters are not valid", problems)

    async def gone(_: Request, __: ClientDisconnect) -> JSONResponse:
        return _failure(400, "the client went away before its request was complete")

    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again after this answer, so that the server logs the traceback.
        return _failure(500, f"an internal error ({type(error).__name__}); the log has the details")

    app.exception_handler(BlockFlowError)(ours)
    app.exception_handler(HTTPException)(http)
    app.exception_handler(RequestValidationError)(bad_parameter)
    app.exception_handler(ClientDisconnect)(gone)
    app.exception_handler(Exception)(unexpected)


_TOPOLOGY_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"$ref": "#/components/schemas/Topology"}}
            for kind in ("application/json", "application/yaml")
        },
    }
}
