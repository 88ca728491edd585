"""The clients against real servers, the right ones and the wrong ones."""

from __future__ import annotations

import concurrent.futures
import math
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from blockflow import api, errors
from blockflow.client import ControlClient, InferenceClient
from blockflow.gateway.http import Limits, create_app
from blockflow.status import BlockState
from fake_controller import WANTED, FakeController
from fake_gateway import FakeDispatcher, serving, zoo

X = np.array([[1.0, 2.0, 3.0]], np.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FakeDispatcher, str]]:
    fake = zoo()
    with serving(create_app(fake, Limits(body_bytes=10_000))) as (host, port):
        yield fake, f"http://{host}:{port}"


@pytest.fixture
def fake(server: tuple[FakeDispatcher, str]) -> Iterator[FakeDispatcher]:
    server[0].seen.clear()
    yield server[0]
    server[0].failure = None
    server[0].gate.set()


@pytest.fixture
def client(server: tuple[Any, str]) -> Iterator[InferenceClient]:
    with InferenceClient(server[1], timeout=5) as client:
        yield client


# --- Inference ----------------------------------------------------------------------------------


def test_infer(client: InferenceClient, fake: FakeDispatcher) -> None:
    answer = client.infer("double", {"x": X}, deadline=1.5, request_id="r")
    assert list(answer) == ["y"]
    np.testing.assert_array_equal(answer["y"], X * 2)
    assert answer["y"].flags.writeable
    assert answer["y"].flags.aligned
    assert (fake.seen[0].id, fake.seen[0].timeout) == ("r", 1.5)


def test_infer_with_arrays_of_any_layout(client: InferenceClient) -> None:
    x = np.arange(12, dtype=">f4").reshape(3, 4).T[:, ::-1]
    np.testing.assert_array_equal(client.infer("double", {"x": x})["y"], x * 2)


def test_infer_many_inputs_and_some_outputs(client: InferenceClient) -> None:
    inputs = {"left": np.ones((2, 2), np.float32), "right": np.full((2, 2), 11)}
    answer = client.infer("two-heads", inputs, outputs=["half", "big"])
    assert list(answer) == ["half", "big"]
    assert answer["half"].dtype == np.float32
    assert answer["half"].tolist() == [[1, 1], [1, 1]]
    assert answer["big"].dtype == np.bool_
    assert answer["big"].all()


def test_bfloat16_in_and_float32_out(client: InferenceClient) -> None:
    answer = client.infer("same-bfloat16", {"x": np.array([[0.1, 2]], ml_dtypes.bfloat16)})
    assert answer["y"].tolist() == [[0.10009765625, 2.0]]


def test_nan_arrives(client: InferenceClient) -> None:
    x = np.array([[math.nan, math.inf, 0]], np.float32)
    np.testing.assert_array_equal(client.infer("double", {"x": x})["y"], x)


def test_one_client_serves_many_threads(client: InferenceClient) -> None:
    def work(number: int) -> bool:
        return bool((client.infer("double", {"x": X * number})["y"] == X * number * 2).all())

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(80)))


def test_what_there_is(client: InferenceClient) -> None:
    assert client.metadata("double")["outputs"] == [
        {"name": "y", "datatype": "FP32", "shape": [-1, 3]}
    ]
    assert {"double", "starting"} <= {model["name"] for model in client.models()}
    assert client.ready("double")
    assert not client.ready("starting")
    assert not client.ready()
    for call in (client.ready, client.metadata):
        with pytest.raises(errors.NotFound, match="no model 'a b%' is deployed"):
            call("a b%")
        for nonsense in ("a/b", "..", "", "?", "\ud800"):
            with pytest.raises(errors.NotFound):
                call(nonsense)


@pytest.mark.parametrize(
    ("model", "array", "error", "message"),
    [
        ("nobody", X, errors.NotFound, "no model 'nobody' is deployed; deployed models: double"),
        ("starting", X, errors.Unavailable, "block 'trunk' is loading"),
        ("double", X.astype(np.float64), errors.RequestInvalid, "FP64; model 'double' takes FP32"),
        ("double", np.zeros((5, 3), np.float32), errors.RequestInvalid, "1 to 4 rows"),
        ("double", np.zeros((1000, 3), np.float32), errors.RequestTooLarge, "10000 are the most"),
        ("double", np.array([["a"]]), errors.RequestInvalid, "numpy dtype <U1"),
    ],
)
def test_refusals_are_our_errors(
    client: InferenceClient, model: str, array: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        client.infer(model, {"x": array})
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (errors.Overloaded("full"), errors.Overloaded),
        (errors.DeadlineExceeded("late"), errors.DeadlineExceeded),
        (errors.BlockFailed("broken"), errors.BlockFlowError),
        (RuntimeError("bug"), errors.BlockFlowError),
    ],
)
def test_failures_are_our_errors(
    client: InferenceClient, fake: FakeDispatcher, failure: Exception, error: type[Exception]
) -> None:
    fake.failure = failure
    with pytest.raises(error) as caught:
        client.infer("double", {"x": X})
    assert type(caught.value) is error


def test_times_run_out(server: tuple[Any, str], fake: FakeDispatcher) -> None:
    fake.gate.clear()
    with InferenceClient(server[1], timeout=0.2) as client:
        with pytest.raises(errors.DeadlineExceeded, match=r"within 0\.05 s"):
            client.infer("double", {"x": X}, deadline=0.05)
        with pytest.raises(errors.DeadlineExceeded, match=r"did not answer POST .* within 0\.2 s"):
            client.infer("double", {"x": X})


# --- Servers that are not there, or are something else -------------------------------------------


def test_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    # The port was free a moment ago, and nobody is told of it.
    words = f"no BlockFlow server answers at http://127.0.0.1:{port}; start one with `blockflow ser"
    with InferenceClient(f"http://127.0.0.1:{port}/") as client:
        for call in (client.ready, client.models, lambda: client.infer("m", {"x": X})):
            with pytest.raises(errors.Unavailable, match=words):
                call()
    with ControlClient(f"http://127.0.0.1:{port}") as control:
        for call in (control.ready, control.topology, lambda: control.put_topology({})):
            with pytest.raises(errors.Unavailable, match=words):
                call()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "", "ftp://a", "http://", "http://[::1", "x y"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(errors.InvalidInput, match="is no server's address"):
        InferenceClient(url)


def test_a_connection_that_is_cut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def cut() -> None:
            connection, _ = listener.accept()
            connection.recv(1)
            connection.close()

        thread = threading.Thread(target=cut)
        thread.start()
        with (
            InferenceClient(f"http://127.0.0.1:{listener.getsockname()[1]}") as client,
            pytest.raises(errors.Unavailable, match="was lost during GET /v2/health/ready"),
        ):
            client.ready()
        thread.join()


def answering(answer: Callable[[Request], Response]) -> Any:
    async def endpoint(request: Request) -> Response:
        return answer(request)

    methods = ["GET", "POST", "PUT"]
    return serving(Starlette(routes=[Route("/{path:path}", endpoint, methods=methods)]))


def test_a_server_of_something_else() -> None:
    with (
        answering(lambda _: PlainTextResponse("hello")) as (host, port),
        InferenceClient(f"http://{host}:{port}") as client,
        ControlClient(f"http://{host}:{port}") as control,
    ):
        with pytest.raises(errors.BlockFlowError, match="other than JSON: is this BlockFlow"):
            control.topology()
        with pytest.raises(errors.BlockFlowError, match="the server's answer cannot be read"):
            client.infer("m", {"x": X})
    with (
        answering(lambda _: PlainTextResponse("<h1>Bad gateway", 502)) as (host, port),
        InferenceClient(f"http://{host}:{port}") as client,
        pytest.raises(errors.BlockFlowError, match="answered HTTP 502: '<h1>Bad gateway'"),
    ):
        client.ready()


# --- The management API -------------------------------------------------------------------------


@pytest.fixture
def controller() -> FakeController:
    return FakeController()


@pytest.fixture
def control(controller: FakeController) -> Iterator[ControlClient]:
    with (
        serving(api.create_app(controller)) as (host, port),
        ControlClient(f"http://{host}:{port}", timeout=10) as client,
    ):
        yield client


def test_control(control: ControlClient, controller: FakeController) -> None:
    wanted = WANTED.model_dump(mode="json")
    assert control.health() == {"status": "ok"}
    assert control.put_topology(wanted, dry_run=True)["dry_run"] is True
    assert control.topology()["generation"] == 0
    assert control.put_topology(wanted)["generation"] == 1
    assert control.topology()["topology"] == wanted
    assert control.ready()
    assert [block["name"] for block in control.blocks()] == ["a", "b"]
    assert [pipeline["name"] for pipeline in control.pipelines()] == ["p"]
    assert control.devices()
    controller.states["a"] = (BlockState.FAILED, "out of memory")
    assert not control.ready()


def test_control_refusals(control: ControlClient, controller: FakeController) -> None:
    controller.error = errors.TopologyInvalid(["block 'a' names no artifact", "there is no cuda:7"])
    with pytest.raises(errors.TopologyInvalid) as caught:
        control.put_topology(WANTED.model_dump(mode="json"))
    assert caught.value.problems == ("block 'a' names no artifact", "there is no cuda:7")
    with pytest.raises(errors.TopologyInvalid) as caught:
        control.put_topology({"blokcs": {}})
    assert len(caught.value.problems) == 1
    assert "blokcs" in caught.value.problems[0]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, errors.InvalidInput),
        (403, errors.InvalidInput),
        (404, errors.NotFound),
        (422, errors.TopologyInvalid),
        (500, errors.BlockFlowError),
        (503, errors.Unavailable),
    ],
)
def test_control_errors_by_status(status: int, error: type[Exception]) -> None:
    with (
        answering(lambda _: JSONResponse({"error": "words of the server"}, status)) as address,
        ControlClient(f"http://{address[0]}:{address[1]}") as control,
        pytest.raises(error, match="words of the server") as caught,
    ):
        control.topology()
    assert type(caught.value) is error


def test_the_client_starts_without_torch_or_servers() -> None:
    forbidden = "{'torch', 'zmq', 'starlette', 'fastapi', 'uvicorn', 'blockflow.gateway'}"
    program = f"import sys, blockflow.client; sys.exit(str({forbidden} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert ran.stderr.strip() == b"set()"
