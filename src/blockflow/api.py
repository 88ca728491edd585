"""The management API: HTTP in front of a controller.

It decides nothing. Requests are read and checked here, the controller acts, and every error is
answered as `{"error": "...", "problems": [...]}`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Annotated, Any, Protocol

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from blockflow import __version__, dashboard, edit, telemetry
from blockflow import topology as topology_file
from blockflow.access import RequireToken, SameHostOnly
from blockflow.artifact import Manifest
from blockflow.devices import Mps, Survey, survey
from blockflow.edit import Change, Terms, Verb
from blockflow.errors import BlockFlowError, RequestTooLarge, TopologyInvalid, Unavailable
from blockflow.requestlog import LogRequests
from blockflow.status import (
    ApplyResult,
    BlockStatus,
    Event,
    GatewayStatus,
    GenerationRecord,
    PipelineStatus,
)
from blockflow.topology import Block, BlockName, Generation, Pipeline, Topology

_log = logging.getLogger(__name__)

# The page itself holds no secret: it asks for the token and then for everything else.
_OPEN_PATHS = frozenset({"/healthz", *(route.path for route in dashboard.routes())})
_PAUSE_SECONDS = 15.0


class Controller(Protocol):
    """What the API needs of a controller. All of it is called on the event loop."""

    async def update(self, change: Change, verb: Verb, terms: Terms) -> ApplyResult:
        """Make what `change` makes of the topology the one that serves.

        Raises:
            StaleGeneration: another generation serves than the one in `terms`.
            TopologyInvalid: it cannot be deployed; whatever else `change` raises.
            StartFailed: a block did not come up; the old generation keeps serving.
        """
        ...

    async def rollback(self, to: Generation | None, terms: Terms) -> ApplyResult:
        """Apply the topology of an old generation (None: the one before) as a new one."""
        ...

    async def restart(self, block: BlockName, terms: Terms) -> ApplyResult:
        """Replace the process of the worker that hosts `block`."""
        ...

    async def receive(self, digest: str, body: AsyncIterator[bytes]) -> Manifest:
        """Take the artifact `digest` into the store, out of a tar file."""
        ...

    async def history(self, limit: int) -> list[GenerationRecord]:
        """The generations that were tried, the newest first."""
        ...

    async def generation_of(self, number: Generation) -> GenerationRecord: ...

    def events(self, after: int) -> AsyncIterator[Event]:
        """What is remembered of events above number `after`, and then whatever happens."""
        ...

    async def logs(self, block: BlockName, lines: int) -> list[str]: ...

    def topology(self) -> tuple[Generation, Topology]: ...

    async def blocks(self) -> list[BlockStatus]: ...

    def pipelines(self) -> list[PipelineStatus]: ...

    async def gateway(self) -> GatewayStatus: ...

    def mps(self) -> Mapping[str, Mps]:
        """What is known of MPS, by the names of GPUs."""
        ...

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


class BlockLogs(BaseModel):
    block: str
    lines: list[str]


class Artifact(BaseModel):
    digest: str
    files: dict[str, int] = Field(description="its files in the store, and their bytes")
    parameter_bytes: int


class Rollback(BaseModel):
    model_config = ConfigDict(extra="forbid")

    generation: int | None = Field(
        None, description="whose topology is applied again; null: the one that served before"
    )


def create_app(controller: Controller, token: str | None = None) -> FastAPI:
    """Build the API of `controller`.

    It answers those who send `token`; without one, only requests that were made on this host.
    """
    app = FastAPI(
        title="BlockFlow",
        summary="Deploy and observe blocks and pipelines.",
        version=__version__,
        responses={422: {"model": Failure}, **({401: {"model": Failure}} if token else {})},
        # One schema for what is sent and what is answered: a default is not "required" in either.
        separate_input_output_schemas=False,
    )
    if token is None:
        app.add_middleware(SameHostOnly)
    else:
        app.add_middleware(RequireToken, token=token, open_paths=_OPEN_PATHS)
        _describe_token(app)
    app.add_middleware(LogRequests)  # the last one that is added comes first
    _answer_errors(app)
    app.include_router(_topology_routes(controller))
    app.include_router(_edit_routes(controller))
    app.include_router(_artifact_routes(controller))
    app.include_router(_status_routes(controller))
    metrics = telemetry.metrics_route(controller)
    app.add_api_route(
        metrics.path, metrics.endpoint, tags=["status"], response_class=PlainTextResponse
    )
    app.router.routes.extend(dashboard.routes())
    return app


def _topology_routes(controller: Controller) -> APIRouter:
    """The whole topology: put, read, remembered, rolled back."""
    app = APIRouter(tags=["topology"])

    @app.put(
        "/v1/topology",
        openapi_extra=_TOPOLOGY_BODY,
        responses=_failures(409, 412, 413, 415, 500),
    )
    async def put_topology(
        request: Request, terms: Annotated[Terms, Depends(_terms)]
    ) -> ApplyResult:
        """Replace the whole topology; answers when the new one serves."""
        parse = _parser(request.headers.get("content-type", ""))
        # In a thread: a topology of the largest size takes a second to parse.
        wanted = await asyncio.to_thread(parse, await _body(request))
        return await controller.update(edit.replace(wanted), Verb.APPLY, terms)

    @app.get("/v1/topology")
    async def get_topology(response: Response) -> CurrentTopology:
        """Give the topology that serves now, and its generation (which is also its ETag)."""
        generation, current = controller.topology()
        response.headers["etag"] = f'"{generation}"'
        return CurrentTopology(generation=generation, topology=current)

    @app.get("/v1/topology/history")
    async def get_history(
        limit: Annotated[int, Query(ge=1, le=500, description="most generations to list")] = 50,
    ) -> list[GenerationRecord]:
        """List the generations that were tried, the newest first."""
        return await controller.history(limit)

    @app.get("/v1/topology/history/{generation}", responses=_failures(404))
    async def get_generation(generation: int) -> GenerationRecord:
        """Give a remembered generation with its topology."""
        return await controller.generation_of(Generation(generation))

    @app.post(
        "/v1/topology/rollback",
        openapi_extra=_body_schema(Rollback.model_json_schema(), required=False),
        responses=_failures(404, 409, 412, 413, 500),
    )
    async def post_rollback(
        request: Request, terms: Annotated[Terms, Depends(_terms)]
    ) -> ApplyResult:
        """Apply an old generation's topology again, as a new generation."""
        wanted = await _object(request, optional=True)
        try:
            to = Rollback.model_validate(wanted, strict=True).generation
        except ValidationError as error:
            raise TopologyInvalid(
                [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            ) from error
        return await controller.rollback(None if to is None else Generation(to), terms)

    return app


def _edit_routes(controller: Controller) -> APIRouter:
    """The imperative verbs: each edits the topology and applies the outcome."""
    app = APIRouter(tags=["edit"])

    @app.post(
        "/v1/blocks/{name}",
        openapi_extra=_body_schema(Block.model_json_schema()),
        responses=_failures(409, 412, 413, 500),
    )
    async def post_block(
        name: str, request: Request, terms: Annotated[Terms, Depends(_terms)]
    ) -> ApplyResult:
        """Deploy a block; answers when it is ready."""
        settings = await _object(request)
        return await controller.update(edit.add_block(name, settings), Verb.DEPLOY, terms)

    @app.patch(
        "/v1/blocks/{name}",
        openapi_extra=_body_schema(_partial(Block)),
        responses=_failures(404, 409, 412, 413, 500),
    )
    async def patch_block(
        name: str, request: Request, terms: Annotated[Terms, Depends(_terms)]
    ) -> ApplyResult:
        """Change settings of a block; null brings back a default."""
        settings = await _object(request)
        return await controller.update(edit.change_block(name, settings), Verb.CONFIGURE, terms)

    @app.delete("/v1/blocks/{name}", responses=_failures(404, 409, 412, 500))
    async def delete_block(
        name: str,
        terms: Annotated[Terms, Depends(_terms)],
        cascade: Annotated[
            bool, Query(description="also delete the pipelines that use it")
        ] = False,
    ) -> ApplyResult:
        """Remove a block that no pipeline uses."""
        return await controller.update(edit.remove_block(name, cascade), Verb.DELETE, terms)

    @app.post("/v1/blocks/{name}/restart", responses=_failures(404, 409, 412, 500))
    async def restart_block(name: str, terms: Annotated[Terms, Depends(_terms)]) -> ApplyResult:
        """Replace the process of the block's worker; requests go on."""
        return await controller.restart(BlockName(name), terms)

    @app.post(
        "/v1/pipelines/{name}",
        openapi_extra=_body_schema(Pipeline.model_json_schema()),
        responses=_failures(409, 412, 413, 500),
    )
    async def post_pipeline(
        name: str, request: Request, terms: Annotated[Terms, Depends(_terms)]
    ) -> ApplyResult:
        """Deploy a pipeline over blocks that are there."""
        settings = await _object(request)
        return await controller.update(edit.add_pipeline(name, settings), Verb.DEPLOY, terms)

    @app.patch(
        "/v1/pipelines/{name}",
        openapi_extra=_body_schema(_partial(Pipeline)),
        responses=_failures(404, 409, 412, 413, 500),
    )
    async def patch_pipeline(
        name: str, request: Request, terms: Annotated[Terms, Depends(_terms)]
    ) -> ApplyResult:
        """Change settings of a pipeline; null brings back a default."""
        settings = await _object(request)
        return await controller.update(edit.change_pipeline(name, settings), Verb.CONFIGURE, terms)

    @app.delete("/v1/pipelines/{name}", responses=_failures(404, 409, 412, 500))
    async def delete_pipeline(name: str, terms: Annotated[Terms, Depends(_terms)]) -> ApplyResult:
        """Remove a pipeline; its blocks stay."""
        return await controller.update(edit.remove_pipeline(name), Verb.DELETE, terms)

    return app


def _artifact_routes(controller: Controller) -> APIRouter:
    """What `blockflow store push` sends."""
    app = APIRouter(tags=["artifacts"])

    @app.put(
        "/v1/artifacts/{digest}",
        openapi_extra=_TAR_BODY,
        responses=_failures(400, 403, 413, 500),
    )
    async def put_artifact(digest: str, request: Request) -> Artifact:
        """Store an artifact (a tar file) once all its digests are checked. Off by default."""
        manifest = await controller.receive(digest, request.stream())
        return Artifact(
            digest=manifest.digest,
            files={name: file.bytes for name, file in manifest.files.items()},
            parameter_bytes=manifest.parameter_bytes,
        )

    return app


def _status_routes(controller: Controller) -> APIRouter:
    """What is, and what happens."""
    app = APIRouter()

    @app.get("/v1/blocks", tags=["status"])
    async def get_blocks() -> list[BlockStatus]:
        """List the blocks with their process, memory, counts and connections."""
        return await controller.blocks()

    @app.get("/v1/pipelines", tags=["status"])
    async def get_pipelines() -> list[PipelineStatus]:
        """List the pipelines, and whether each one serves."""
        return controller.pipelines()

    @app.get("/v1/gateway", tags=["status"])
    async def get_gateway() -> GatewayStatus:
        """Give the gateway's process, memory and connections."""
        return await controller.gateway()

    @app.get("/v1/blocks/{name}/logs", tags=["status"], responses=_failures(404))
    async def get_logs(
        name: str,
        tail: Annotated[int, Query(ge=1, le=10_000, description="most lines to give")] = 100,
    ) -> BlockLogs:
        """Give the last lines that a block's process has written."""
        return BlockLogs(block=name, lines=await controller.logs(BlockName(name), tail))

    @app.get(
        "/v1/events",
        tags=["status"],
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def get_events(
        last_event_id: Annotated[
            str | None, Header(description="only what came after this event")
        ] = None,
    ) -> StreamingResponse:
        """Stream events (server-sent events): the last 200 first, then each one as it happens."""
        after = int(last_event_id) if last_event_id and last_event_id.isdecimal() else 0
        return StreamingResponse(
            _event_stream(controller.events(after)),
            media_type="text/event-stream",
            headers={"cache-control": "no-store"},
        )

    @app.get("/v1/devices", tags=["status"])
    async def get_devices() -> Survey:
        """List the devices of this host."""
        return (await asyncio.to_thread(survey)).with_mps(controller.mps())

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


def _terms(
    dry_run: Annotated[bool, Query(description="only check it, and say what would change")] = False,
    timeout_s: Annotated[
        float | None,
        Query(
            gt=0,
            le=86_400,
            description="seconds that new workers may take to get ready before all is as it was",
        ),
    ] = None,
    if_match: Annotated[
        str | None, Header(description="refuse (412) unless this generation serves")
    ] = None,
) -> Terms:
    match = None
    if if_match is not None and if_match.strip() != "*":
        plain = if_match.strip().removeprefix("W/").strip('"')
        if not (plain.isascii() and plain.isdecimal() and len(plain) < 19):
            raise HTTPException(422, f"If-Match must be a generation's number, not {if_match!r}")
        match = Generation(int(plain))
    return Terms(dry_run=dry_run, match=match, timeout_s=timeout_s)


async def _event_stream(events: AsyncIterator[Event]) -> AsyncIterator[str]:
    """Events on the wire, with a comment in every pause, so that a dead peer is noticed."""
    feed = aiter(events)
    coming: asyncio.Task[Event] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(feed))
            done, _ = await asyncio.wait((coming,), timeout=_PAUSE_SECONDS)
            if not done:
                yield ": nothing new\n\n"
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            finally:
                coming = None
            yield f"id: {event.number}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"
    finally:
        if coming is not None:
            coming.cancel()


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


async def _object(request: Request, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object that a request brings. Raises TopologyInvalid."""
    body = await _body(request)
    if optional and not body:
        return {}
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise TopologyInvalid([f"the body must be a JSON object: {error}"]) from error


def _failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Failure} for status in statuses}


def _body_schema(schema: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": required, "content": content}}


def _partial(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of some of a member's settings."""
    schema = model.model_json_schema()
    return {
        **{key: value for key, value in schema.items() if key != "required"},
        "title": f"Partial{model.__name__}",
    }


def _describe_token(app: FastAPI) -> None:
    """Say in the OpenAPI document that a token is needed."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        document = describe()
        document.setdefault("components", {})["securitySchemes"] = {
            "token": {"type": "http", "scheme": "bearer"}
        }
        document["security"] = [{"token": []}]
        for path in _OPEN_PATHS & document["paths"].keys():
            for operation in document["paths"][path].values():
                operation["security"] = []
        return document

    app.openapi = described  # type: ignore[method-assign]


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > topology_file.MAX_BYTES:
            raise RequestTooLarge(
                f"a topology may have {topology_file.MAX_BYTES} bytes, and this one has more"
            )
    return bytes(body)


def _failure(
    status: int, error: str, problems: list[str] | None = None, retry_after: float = 1.0
) -> JSONResponse:
    body = Failure(error=error, problems=problems or [])
    later = {"retry-after": str(max(1, math.ceil(retry_after)))} if status in {429, 503} else {}
    return JSONResponse(body.model_dump(), status_code=status, headers=later)


def _answer_errors(app: FastAPI) -> None:
    async def ours(_: Request, error: BlockFlowError) -> JSONResponse:
        problems = list(error.problems) if isinstance(error, TopologyInvalid) else []
        if error.status >= 500:
            _log.error("%s: %s", type(error).__name__, error)
        retry_after = error.retry_after if isinstance(error, Unavailable) else 1.0
        return _failure(error.status, str(error), problems, retry_after)

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


_TAR_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
    }
}

_TOPOLOGY_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"$ref": "#/components/schemas/Topology"}}
            for kind in ("application/json", "application/yaml")
        },
    }
}
