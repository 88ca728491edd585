"""Clients of a BlockFlow server: `InferenceClient` for models, `ControlClient` for the topology.

Both are synchronous, keep their connections open, and may be shared between threads. Whatever goes
wrong is an error of `blockflow.errors`, chosen by the HTTP status, with the server's own words.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, TypeAlias
from urllib.parse import quote

import httpx
import msgspec
from numpy.typing import NDArray

from blockflow import oip
from blockflow.edit import Conflict, StaleGeneration
from blockflow.errors import (
    BlockFlowError,
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    Overloaded,
    Poisonous,
    RequestInvalid,
    RequestTooLarge,
    TopologyInvalid,
    Unavailable,
)

_BY_STATUS: dict[int, type[BlockFlowError]] = {
    404: NotFound,
    409: Conflict,
    412: StaleGeneration,
    413: RequestTooLarge,
    429: Overloaded,
    503: Unavailable,
    504: DeadlineExceeded,
}


Kind: TypeAlias = Literal["block", "pipeline"]


class _Client:
    """One server's HTTP API; the common ground of the two clients."""

    def __init__(self, url: str, timeout: float, token: str | None, ca_file: Path | None) -> None:
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, TypeError):
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InvalidInput(f"{url!r} is no server's address; one is http://127.0.0.1:8000")
        self._url = str(parsed).rstrip("/")
        self._timeout = timeout
        self._http = httpx.Client(
            base_url=self._url,
            timeout=timeout,
            headers={} if token is None else {"authorization": f"Bearer {token}"},
            verify=True if ca_file is None else ssl.create_default_context(cafile=ca_file),
            # Given up well before the server does (uvicorn: 5 s), or a request may be sent into a
            # connection that is just being closed.
            limits=httpx.Limits(keepalive_expiry=2.0),
            # Proxies of the environment are for the world outside; they break 127.0.0.1.
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        self._http.close()

    def _answer(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The response, whatever its status. Raises `Unavailable` or `DeadlineExceeded`."""
        try:
            return self._http.request(method, path, **request)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unavailable(
                f"no BlockFlow server answers at {self._url}; start one with `blockflow serve`"
            ) from error
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(
                f"the server at {self._url} did not answer {method} {path} within "
                f"{self._timeout:g} s"
            ) from error
        except httpx.RequestError as error:
            raise Unavailable(
                f"the connection to {self._url} was lost during {method} {path}: {error}"
            ) from error

    def _ask(self, method: str, path: str, **request: Any) -> Any:
        """The JSON of a successful answer."""
        response = self._answer(method, path, **request)
        _raise_for_status(response)
        try:
            return msgspec.json.decode(response.content)
        except (ValueError, RecursionError) as error:
            raise BlockFlowError(
                f"{self._url}{path} answered something other than JSON: is this BlockFlow?"
            ) from error

    def _is_ready(self, path: str) -> bool:
        response = self._answer("GET", path)
        if response.status_code == 503:
            return False
        _raise_for_status(response)
        return True


class InferenceClient(_Client):
    """The models of the server at `url` ("http://127.0.0.1:8000").

    `timeout` is in seconds, for each step of a request (connect, send, and wait for the answer).
    `token` is what the server asks for, if it does; `ca_file` (PEM) is what an https server's
    certificate is checked with, instead of the authorities that everybody trusts.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        timeout: float = 60.0,
        *,
        token: str | None = None,
        ca_file: Path | None = None,
    ) -> None:
        super().__init__(url, timeout, token, ca_file)

    def infer(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any]],
        *,
        outputs: Iterable[str] = (),
        deadline: float | None = None,
        request_id: str = "",
    ) -> dict[str, NDArray[Any]]:
        """Run `model` on `inputs`, with binary tensors both ways; arrays in, new arrays out.

        Each input has the dtype of its port exactly, and the batch as its first dimension (see
        `metadata`); bfloat16 ones are arrays of `ml_dtypes.bfloat16`. bfloat16 outputs come back as
        float32. `outputs` names the wanted outputs; none means all. `deadline` is in seconds: a
        server that cannot answer by then does not compute.

        Raises `RequestInvalid`, `NotFound`, `Overloaded`, `Unavailable`, `DeadlineExceeded`, or
        plain `BlockFlowError` where the server failed.
        """
        return self._infer(model, inputs, outputs, deadline, request_id, timing=False)[0]

    def infer_timed(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any]],
        *,
        outputs: Iterable[str] = (),
        deadline: float | None = None,
        request_id: str = "",
    ) -> tuple[dict[str, NDArray[Any]], oip.Timings]:
        """As `infer`, and where the request's time went: at each block, and in all.

        On a GPU the answer waits until the blocks know how long the device computed, which takes a
        few milliseconds. Raises BlockFlowError too for a server that does not say.
        """
        found, timings = self._infer(model, inputs, outputs, deadline, request_id, timing=True)
        if timings is None:
            raise BlockFlowError(f"the server at {self._url} does not say where the time went")
        return found, timings

    def _infer(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Iterable[str],
        deadline: float | None,
        request_id: str,
        *,
        timing: bool,
    ) -> tuple[dict[str, NDArray[Any]], oip.Timings | None]:
        request = oip.encode_request(
            [oip.TensorValue.from_numpy(name, array) for name, array in inputs.items()],
            outputs=outputs,
            timeout=deadline,
            request_id=request_id,
            timing=timing,
        )
        response = self._answer(
            "POST",
            f"/v2/models/{_segment(model)}/infer",
            content=b"".join(request.chunks),
            headers=request.headers,
        )
        _raise_for_status(response, RequestInvalid)
        answer = oip.parse_response(response.content, response.headers.get(oip.HEADER_LENGTH))
        # Copied, because views into the response are read-only and unaligned.
        return {tensor.name: tensor.numpy().copy() for tensor in answer.outputs}, answer.timings

    def models(self) -> list[dict[str, Any]]:
        """The deployed models: `name`, `version`, `state` ("READY", "UNAVAILABLE"), `reason`."""
        answer: list[dict[str, Any]] = self._ask("POST", "/v2/repository/index")
        return answer

    def metadata(self, model: str) -> dict[str, Any]:
        """The model's `name`, `versions`, `platform`, and `inputs` and `outputs` with the
        protocol's datatypes ("FP32") and shapes (-1 for the batch)."""
        answer: dict[str, Any] = self._ask("GET", f"/v2/models/{_segment(model)}")
        return answer

    def ready(self, model: str | None = None) -> bool:
        """Whether `model`, or every model, can answer. Raises if no server does."""
        path = "/v2/health/ready" if model is None else f"/v2/models/{_segment(model)}/ready"
        return self._is_ready(path)


class ControlClient(_Client):
    """The management API of the server at `url` ("http://127.0.0.1:8080").

    `timeout` is in seconds; a new topology is answered when it serves, which takes as long as
    loading its blocks. `token` and `ca_file` are as for `InferenceClient`.

    Every change may be a dry run, which only says what would change; with `match` it is refused
    (StaleGeneration) unless that generation serves.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        timeout: float = 300.0,
        *,
        token: str | None = None,
        ca_file: Path | None = None,
    ) -> None:
        super().__init__(url, timeout, token, ca_file)

    def put_topology(
        self,
        topology: Mapping[str, Any],
        dry_run: bool = False,
        *,
        match: int | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Make `topology` what the server runs, or with `dry_run` only say what would change.

        Raises `TopologyInvalid` with every problem of a topology that cannot be deployed. New
        workers that are not ready after `timeout_s` seconds are given up, and all stays as it was.
        """
        return self._change("PUT", "/v1/topology", topology, dry_run, match, timeout_s=timeout_s)

    def rollback(
        self, generation: int | None = None, dry_run: bool = False, *, match: int | None = None
    ) -> dict[str, Any]:
        """Apply the topology of an old `generation` again; without one, of the one before.

        Raises `NotFound`, and `Conflict` for a generation that never served.
        """
        body = {"generation": generation}
        return self._change("POST", "/v1/topology/rollback", body, dry_run, match)

    def history(self, limit: int = 50) -> list[dict[str, Any]]:
        """The generations that were tried, the newest first, each with its topology."""
        answer: list[dict[str, Any]] = self._ask(
            "GET", "/v1/topology/history", params={"limit": limit}
        )
        return answer

    def deploy(
        self,
        kind: Kind,
        name: str,
        settings: Mapping[str, Any],
        dry_run: bool = False,
        *,
        match: int | None = None,
    ) -> dict[str, Any]:
        """Add a block or a pipeline. Raises `Conflict` when there is one of that name."""
        return self._change("POST", f"/v1/{kind}s/{_segment(name)}", settings, dry_run, match)

    def configure(
        self,
        kind: Kind,
        name: str,
        settings: Mapping[str, Any],
        dry_run: bool = False,
        *,
        match: int | None = None,
    ) -> dict[str, Any]:
        """Change what `settings` names and leave the rest; None brings back a default."""
        return self._change("PATCH", f"/v1/{kind}s/{_segment(name)}", settings, dry_run, match)

    def delete(
        self,
        kind: Kind,
        name: str,
        dry_run: bool = False,
        *,
        cascade: bool = False,
        match: int | None = None,
    ) -> dict[str, Any]:
        """Remove a pipeline, or a block, with `cascade` together with the pipelines that use it.

        Raises `Conflict` for a block that is used.
        """
        more = {"cascade": True} if cascade else {}
        path = f"/v1/{kind}s/{_segment(name)}"
        return self._change("DELETE", path, None, dry_run, match, **more)

    def restart(
        self, block: str, dry_run: bool = False, *, match: int | None = None
    ) -> dict[str, Any]:
        """Replace the process that hosts `block`; no request is lost."""
        path = f"/v1/blocks/{_segment(block)}/restart"
        return self._change("POST", path, None, dry_run, match)

    def push(self, digest: str, tar: IO[bytes]) -> dict[str, Any]:
        """Store an artifact, given as the tar file that `upload.pack` writes.

        Raises InvalidInput when it is damaged, not what its digest names, or uploads are off.
        """
        answer: dict[str, Any] = self._ask(
            "PUT",
            f"/v1/artifacts/{_segment(digest)}",
            content=iter(lambda: tar.read(1 << 20), b""),
            headers={"content-type": "application/x-tar"},
        )
        return answer

    def logs(self, block: str, tail: int = 100) -> list[str]:
        """The last lines that the block's process has written."""
        path = f"/v1/blocks/{_segment(block)}/logs"
        answer: dict[str, Any] = self._ask("GET", path, params={"tail": tail})
        lines: list[str] = answer["lines"]
        return lines

    def events(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """What happened since event number `after`, and then whatever happens, without end.

        Ends when the server does, or when it is not read from for long.
        """
        headers = {"last-event-id": str(after)}
        # The server writes every 15 seconds, even when nothing happens.
        timeout = httpx.Timeout(self._timeout, read=60.0)
        try:
            with self._http.stream(
                "GET", "/v1/events", headers=headers, timeout=timeout
            ) as response:
                if not response.is_success:
                    response.read()
                    _raise_for_status(response)
                for line in response.iter_lines():
                    if line.startswith("data:"):
                        yield msgspec.json.decode(line[5:])
        except httpx.RequestError as error:
            raise Unavailable(f"the connection to {self._url} was lost: {error}") from error

    def _change(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        dry_run: bool,
        match: int | None,
        **more: Any,
    ) -> dict[str, Any]:
        params = {"dry_run": dry_run} | {k: v for k, v in more.items() if v is not None}
        headers = {} if match is None else {"if-match": f'"{match}"'}
        answer: dict[str, Any] = self._ask(
            method, path, params=params, headers=headers, **({} if body is None else {"json": body})
        )
        return answer

    def topology(self) -> dict[str, Any]:
        """The `topology` that serves, and its `generation`."""
        answer: dict[str, Any] = self._ask("GET", "/v1/topology")
        return answer

    def blocks(self) -> list[dict[str, Any]]:
        """Every block with its process, state, memory and connections."""
        answer: list[dict[str, Any]] = self._ask("GET", "/v1/blocks")
        return answer

    def pipelines(self) -> list[dict[str, Any]]:
        """Every pipeline, and whether it serves."""
        answer: list[dict[str, Any]] = self._ask("GET", "/v1/pipelines")
        return answer

    def gateway(self) -> dict[str, Any]:
        """The gateway's process, memory and connections."""
        answer: dict[str, Any] = self._ask("GET", "/v1/gateway")
        return answer

    def devices(self) -> dict[str, Any]:
        """The devices of the server's host."""
        answer: dict[str, Any] = self._ask("GET", "/v1/devices")
        return answer

    def health(self) -> dict[str, Any]:
        """An answer, as long as the server lives."""
        answer: dict[str, Any] = self._ask("GET", "/healthz")
        return answer

    def ready(self) -> bool:
        """Whether every block and pipeline serves. Raises if no server answers."""
        return self._is_ready("/readyz")


class _Refusal(msgspec.Struct):
    error: str
    problems: list[str] = []


def _raise_for_status(
    response: httpx.Response, bad_request: type[InvalidInput] = InvalidInput
) -> None:
    if response.is_success:
        return
    status = response.status_code
    try:
        refusal = msgspec.json.decode(response.content, type=_Refusal)
    except (ValueError, RecursionError):
        # Not BlockFlow's words: a proxy's page, or another server at this address.
        refusal = _Refusal(f"{response.url} answered HTTP {status}: {response.text[:200]!r}")
    if status == 422:
        if bad_request is RequestInvalid:
            raise Poisonous(refusal.error)
        raise TopologyInvalid(refusal.problems or [refusal.error])
    if status in _BY_STATUS:
        raise _BY_STATUS[status](refusal.error)
    raise (bad_request if 400 <= status < 500 else BlockFlowError)(refusal.error)


def _segment(model: str) -> str:
    """`model` as one segment of a path, whatever it holds."""
    if model in ("", ".", ".."):
        # Not quotable: paths are normalised, and the request would go somewhere else.
        raise NotFound(f"no model can have the name {model!r}")
    return quote(model, safe="", errors="replace")
