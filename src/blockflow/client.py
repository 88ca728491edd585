"""Clients of a BlockFlow server: `InferenceClient` for models, `ControlClient` for the topology.

Both are synchronous, keep their connections open, and may be shared between threads. Whatever goes
wrong is an error of `blockflow.errors`, chosen by the HTTP status, with the server's own words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx
import msgspec
from numpy.typing import NDArray

from blockflow import oip
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
    413: RequestTooLarge,
    429: Overloaded,
    503: Unavailable,
    504: DeadlineExceeded,
}


class _Client:
    """One server's HTTP API; the common ground of the two clients."""

    def __init__(self, url: str, timeout: float) -> None:
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
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", timeout: float = 60.0) -> None:
        super().__init__(url, timeout)

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
        request = oip.encode_request(
            [oip.TensorValue.from_numpy(name, array) for name, array in inputs.items()],
            outputs=outputs,
            timeout=deadline,
            request_id=request_id,
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
        return {tensor.name: tensor.numpy().copy() for tensor in answer.outputs}

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
    loading its blocks.
    """

    def __init__(self, url: str = "http://127.0.0.1:8080", timeout: float = 300.0) -> None:
        super().__init__(url, timeout)

    def put_topology(self, topology: Mapping[str, Any], dry_run: bool = False) -> dict[str, Any]:
        """Make `topology` what the server runs, or with `dry_run` only say what would change.

        Raises `TopologyInvalid` with every problem of a topology that cannot be deployed.
        """
        answer: dict[str, Any] = self._ask(
            "PUT", "/v1/topology", params={"dry_run": dry_run}, json=topology
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
