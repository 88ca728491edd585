"""The gateway under a real server, spoken to by Triton's client, by ours, and by raw sockets."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from blockflow import __version__, oip
from blockflow.errors import BlockFailed, Overloaded, StoreCorrupt
from blockflow.gateway.http import Limits, create_app
from blockflow.oip import TensorValue
from fake_gateway import FakeDispatcher, serving, zoo

LIMITS = Limits(body_bytes=4096, held_bytes=6000, body_seconds=0.4)

X = np.array([[1.0, 2.0, 3.0]], np.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FakeDispatcher, tuple[str, int]]]:
    fake = zoo()
    with serving(create_app(fake, LIMITS)) as address:
        yield fake, address


@pytest.fixture
def fake(server: tuple[FakeDispatcher, Any]) -> Iterator[FakeDispatcher]:
    dispatcher = server[0]
    dispatcher.seen.clear()
    dispatcher.started.clear()
    dispatcher.cancelled.clear()
    yield dispatcher
    dispatcher.failure = None
    dispatcher.gate.set()


@pytest.fixture
def address(server: tuple[Any, tuple[str, int]]) -> tuple[str, int]:
    return server[1]


@pytest.fixture
def http(address: tuple[str, int]) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=f"http://{address[0]}:{address[1]}", trust_env=False, timeout=10
    ) as client:
        yield client


@pytest.fixture
def client(address: tuple[str, int]) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"{address[0]}:{address[1]}") as client:
        yield client


def triton_input(name: str, array: np.ndarray[Any, Any], binary: bool = True) -> Any:
    tensor = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    return tensor.set_data_from_numpy(array, binary_data=binary)


def infer_body(array: np.ndarray[Any, Any] = X, **parameters: Any) -> bytes:
    tensor = {
        "name": "x",
        "shape": array.shape,
        "datatype": np_to_triton_dtype(array.dtype),
        "data": array.ravel().tolist(),
    }
    return json.dumps({"inputs": [tensor], "parameters": parameters}).encode()


DOUBLE = "/v2/models/double/infer"


# --- Triton's client ----------------------------------------------------------------------------


@pytest.mark.parametrize("binary_in", [True, False], ids=["binary-in", "json-in"])
@pytest.mark.parametrize("binary_out", [True, False], ids=["binary-out", "json-out"])
def test_triton_fp32(client: Any, fake: FakeDispatcher, binary_in: bool, binary_out: bool) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    result = client.infer(
        "double",
        [triton_input("x", x, binary_in)],
        outputs=[triton.InferRequestedOutput("y", binary_data=binary_out)],
        request_id="r-1",
        timeout=2_000_000,
    )
    np.testing.assert_array_equal(result.as_numpy("y"), x * 2)
    answer = result.get_response()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("r-1", "double", "1")
    assert ("data" in answer["outputs"][0]) is not binary_out
    assert (fake.seen[0].timeout, fake.seen[0].rows) == (2.0, 2)


@pytest.mark.parametrize("dtype", [datatype.dtype for datatype in oip.DATATYPES])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_triton_every_datatype(client: Any, dtype: str, binary: bool) -> None:
    numpy_dtype: Any = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    x = np.array([[0, 1]]).astype(numpy_dtype)
    binary_in = binary or dtype == "bfloat16"  # Triton's client sends no BF16 as JSON
    result = client.infer(
        f"same-{dtype}",
        [triton_input("x", x, binary_in)],
        outputs=[triton.InferRequestedOutput("y", binary_data=binary)],
    )
    got = result.as_numpy("y")
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got.astype(np.float64), x.astype(np.float64))


def test_triton_many_inputs_and_outputs_with_and_without_version(client: Any) -> None:
    left = np.array([[1, 2], [3, 4]], np.float32)
    right = np.array([[10, 20], [30, 5]], np.int64)
    inputs = [triton_input("right", right), triton_input("left", left)]
    for version in ("", "1"):
        result = client.infer("two-heads", inputs, model_version=version)
        np.testing.assert_array_equal(result.as_numpy("sum"), left + right)
        np.testing.assert_array_equal(result.as_numpy("big"), right > 10)
        np.testing.assert_array_equal(result.as_numpy("half"), left.astype(ml_dtypes.bfloat16))
    only = client.infer("two-heads", inputs, outputs=[triton.InferRequestedOutput("big")])
    assert [output["name"] for output in only.get_response()["outputs"]] == ["big"]


def test_triton_metadata_and_readiness(client: Any) -> None:
    assert client.is_server_live()
    assert not client.is_server_ready()  # one model is starting
    assert client.is_model_ready("double")
    assert client.is_model_ready("double", "1")
    assert not client.is_model_ready("double", "2")
    assert not client.is_model_ready("starting")
    assert not client.is_model_ready("nobody")
    assert client.get_server_metadata() == oip.server_metadata(__version__)
    metadata = client.get_model_metadata("double")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    index = {entry["name"]: entry for entry in client.get_model_repository_index()}
    assert index["double"] == {"name": "double", "version": "1", "state": "READY", "reason": ""}
    assert index["starting"]["state"] == "UNAVAILABLE"
    assert index["starting"]["reason"] == "block 'trunk' is loading"


def test_triton_sees_our_errors(client: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"takes 1 to 4 rows") as caught:
        client.infer("double", [triton_input("x", np.zeros((9, 3), np.float32))])
    assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match=r"no model 'nobody'.*double, same-"):
        client.infer("nobody", [triton_input("x", X)])
    with pytest.raises(InferenceServerException, match="send the body uncompressed") as caught:
        client.infer("double", [triton_input("x", X)], request_compression_algorithm="gzip")
    assert caught.value.status() == "415"
    result = client.infer("double", [triton_input("x", X)], response_compression_algorithm="gzip")
    np.testing.assert_array_equal(result.as_numpy("y"), X * 2)


def test_triton_nan_travels_as_binary_only(client: Any) -> None:
    x = np.array([[np.nan, np.inf, -np.inf]], np.float32)
    np.testing.assert_array_equal(client.infer("double", [triton_input("x", x)]).as_numpy("y"), x)
    with pytest.raises(InferenceServerException, match="send such a tensor as binary data"):
        client.infer("double", [triton_input("x", x, binary=False)])
    as_json = [triton.InferRequestedOutput("y", binary_data=False)]
    with pytest.raises(InferenceServerException, match="request this output with 'binary_data'"):
        client.infer("double", [triton_input("x", x)], outputs=as_json)


# --- What HTTP says -----------------------------------------------------------------------------


def refused(response: httpx.Response, status: int, message: str) -> None:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert re.search(message, response.json()["error"]), response.json()


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/", 404, "nothing answers at '/'"),
        ("GET", "/v2/", 404, "starts at /v2"),
        ("GET", "/v2/models/nobody", 404, "no model 'nobody' is deployed; deployed models: dou"),
        ("GET", "/v2/models/nobody/ready", 404, "no model 'nobody'"),
        ("GET", "/v2/models/double/versions/2", 404, "no version '2'; its one version is '1'"),
        ("GET", "/v2/models/%ff%00%0a", 404, "no model"),
        ("POST", "/v2/models/double/versions/x/infer", 404, "no version 'x'"),
        ("GET", DOUBLE, 405, "GET is not allowed"),
        ("POST", "/v2", 405, "POST is not allowed"),
        ("DELETE", "/v2/models/double", 405, "DELETE is not allowed"),
        ("GET", "/v2/health/ready", 503, "starting: block 'trunk' is loading"),
        ("GET", "/v2/models/starting/ready", 503, "not ready: block 'trunk' is loading"),
        ("POST", "/v2/models/starting/infer", 503, "not ready: block 'trunk' is loading"),
        ("POST", DOUBLE, 400, "no JSON"),
    ],
)
def test_refused_paths(
    http: httpx.Client, method: str, path: str, status: int, message: str
) -> None:
    response = http.request(method, path)
    refused(response, status, message)
    assert ("retry-after" in response.headers) == (status == 503)
    assert ("allow" in response.headers) == (status == 405)


def test_health_bodies(http: httpx.Client) -> None:
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/models/double/ready").json() == {"name": "double", "ready": True}
    answer = http.get("/v2/health/ready").json()
    assert answer["models"] == {"starting": "block 'trunk' is loading"}
    assert http.head("/v2").status_code == 200


def test_a_server_whose_models_are_all_ready_is_ready() -> None:
    with (
        serving(create_app(FakeDispatcher())) as address,
        httpx.Client(base_url=f"http://{address[0]}:{address[1]}", trust_env=False) as http,
    ):
        answer = http.get("/v2/health/ready")
    assert (answer.status_code, answer.json()) == (200, {"ready": True})


def test_repository_index_can_leave_out_what_is_not_ready(http: httpx.Client) -> None:
    names = {entry["name"] for entry in http.post("/v2/repository/index").json()}
    ready = {e["name"] for e in http.post("/v2/repository/index", json={"ready": True}).json()}
    assert names - ready == {"starting"}
    refused(http.post("/v2/repository/index", json={"ready": "x"}), 400, "cannot be read")
    refused(http.post("/v2/repository/index", content=b"["), 400, "cannot be read")


def test_server_timing_is_a_valid_header(http: httpx.Client) -> None:
    response = http.post(DOUBLE, content=infer_body(timing=True))
    assert response.headers["server-timing"] == (
        "total;dur=6.500, trunk.hop;dur=0.100, trunk.queue;dur=0.200, trunk.compute;dur=1.250, "
        "head_v1.hop;dur=0.000, head_v1.queue;dur=3.000, head_v1.compute;dur=0.500"
    )
    answer = response.json()
    assert answer["outputs"][0]["data"] == [2.0, 4.0, 6.0]
    assert answer["parameters"] == {
        "timing.total_ms": 6.5,
        "timing.trunk.hop_ms": 0.1,
        "timing.trunk.queue_ms": 0.2,
        "timing.trunk.compute_ms": 1.25,
        "timing.head v1.hop_ms": 0.0,
        "timing.head v1.queue_ms": 3.0,
        "timing.head v1.compute_ms": 0.5,
    }


@pytest.mark.parametrize("parameters", [{}, {"timing": False}, {"timing": None}])
def test_nobody_is_told_times_who_did_not_ask(
    http: httpx.Client, parameters: dict[str, object]
) -> None:
    response = http.post(DOUBLE, content=infer_body(**parameters))
    assert "server-timing" not in response.headers
    assert "parameters" not in response.json()


def test_to_ask_for_times_is_to_say_true(http: httpx.Client) -> None:
    refused(http.post(DOUBLE, content=infer_body(timing="yes")), 400, "'timing'.*true or false")


def test_triton_asks_for_times(client: Any) -> None:
    given = [triton_input("x", X)]
    result = client.infer("double", given, parameters={"timing": True})
    assert result.get_response()["parameters"]["timing.trunk.compute_ms"] == 1.25


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "image/png", None])
def test_content_type_decides_nothing(http: httpx.Client, content_type: str | None) -> None:
    headers, chunks = oip.encode_request([TensorValue.from_numpy("x", X)])
    del headers["Content-Type"]
    if content_type is not None:
        headers["Content-Type"] = content_type
    response = http.post(DOUBLE, content=b"".join(chunks), headers=headers)
    answer = oip.parse_response(response.content, response.headers.get(oip.HEADER_LENGTH))
    np.testing.assert_array_equal(answer.outputs[0].numpy(), X * 2)


@pytest.mark.parametrize("length", ["-1", "ten", "", "1e3", "99999", "0"])
def test_bad_header_length(http: httpx.Client, length: str) -> None:
    response = http.post(DOUBLE, content=infer_body(), headers={oip.HEADER_LENGTH: length})
    refused(response, 400, "Inference-Header-Content-Length|no JSON")


def test_header_length_given_twice(http: httpx.Client) -> None:
    headers = [(oip.HEADER_LENGTH, "10"), (oip.HEADER_LENGTH, "20")]
    refused(http.post(DOUBLE, content=infer_body(), headers=headers), 400, "given 2 times")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, identity"])
def test_compressed_bodies_are_refused(http: httpx.Client, encoding: str) -> None:
    response = http.post(
        DOUBLE, content=gzip.compress(infer_body()), headers={"Content-Encoding": encoding}
    )
    refused(response, 415, "send the body uncompressed")
    assert response.headers["accept-encoding"] == "identity"


def test_the_path_is_decoded_and_a_connection_survives_refusals(http: httpx.Client) -> None:
    for _ in range(3):
        refused(http.post(DOUBLE, content=b"{" * 4000), 400, "nested|does not follow")
        assert http.post("/v2/models/doubl%65/infer", content=infer_body()).status_code == 200


# --- What the dispatcher says -------------------------------------------------------------------


def test_errors_of_the_dispatcher(http: httpx.Client, fake: FakeDispatcher) -> None:
    fake.failure = Overloaded("block 'trunk' has 64 requests waiting")
    response = http.post(DOUBLE, content=infer_body())
    refused(response, 429, "64 requests waiting")
    assert response.headers["retry-after"] == "1"
    fake.failure = BlockFailed("block 'head' failed: index out of range")
    refused(http.post(DOUBLE, content=infer_body()), 500, "block 'head' failed")
    fake.failure = StoreCorrupt("x")
    refused(http.post(DOUBLE, content=infer_body()), 500, "x")


def test_bugs_are_logged_and_not_shown(
    http: httpx.Client, fake: FakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    fake.failure = RuntimeError("secret of the house")
    with caplog.at_level(logging.ERROR):
        response = http.post(DOUBLE, content=infer_body())
    refused(response, 500, "internal error")
    assert "secret" not in response.text
    assert "secret of the house" in caplog.text
    assert http.get("/v2/health/live").status_code == 200


def test_a_wrong_answer_of_the_blocks_is_a_bug(http: httpx.Client, fake: FakeDispatcher) -> None:
    metadata = fake.models()["double"].metadata
    fake.add(metadata, lambda x: {"other": x})
    try:
        refused(http.post(DOUBLE, content=infer_body()), 500, "internal error")
    finally:
        fake.add(metadata, lambda x: {"y": x * 2})


def test_deadline(http: httpx.Client, fake: FakeDispatcher) -> None:
    fake.gate.clear()
    response = http.post(DOUBLE, content=infer_body(timeout=50_000))
    refused(response, 504, r"did not answer within 0\.05 s")


# --- Bodies that do not behave ------------------------------------------------------------------


def test_a_large_body_is_refused_before_it_is_sent(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(head(10**12))
        assert status_and_error(connection)[0] == 413


def test_a_large_body_is_refused_although_it_was_sent(http: httpx.Client) -> None:
    for _ in range(2):
        refused(http.post(DOUBLE, content=bytes(10**6)), 413, "1000000 bytes; 4096 are the most")


def test_a_large_chunked_body_is_refused(http: httpx.Client) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(1000)

    refused(http.post(DOUBLE, content=pieces()), 413, "more than 4096 bytes")


def test_a_chunked_body_is_read(http: httpx.Client) -> None:
    body = infer_body()
    response = http.post(DOUBLE, content=iter([body[:10], body[10:]]))
    assert response.json()["outputs"][0]["data"] == [2.0, 4.0, 6.0]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_slow_body_is_not_waited_for(address: tuple[str, int], chunked: bool) -> None:
    with socket.create_connection(address, timeout=5) as connection:
        began = time.monotonic()
        connection.sendall(head(None if chunked else 100))
        connection.sendall(b"4\r\nabcd\r\n" if chunked else b"abcd")
        status, error, rest = status_and_error(connection)
        assert (status, error) == (408, "the request's body did not arrive within 0.4 s")
        assert time.monotonic() - began > 0.39  # a timer may fire a clock's tick early
        assert rest == b""  # and the connection is closed


def test_a_body_that_ends_early_harms_nobody(
    address: tuple[str, int], http: httpx.Client, fake: FakeDispatcher
) -> None:
    for length in (100, None):
        with socket.create_connection(address, timeout=5) as connection:
            connection.sendall(head(length))
            connection.sendall(b"32\r\nabc" if length is None else b"abc")
    assert http.post(DOUBLE, content=infer_body()).status_code == 200
    assert len(fake.seen) == 1


def test_expect_continue(address: tuple[str, int]) -> None:
    expect = "Expect: 100-continue"
    with socket.create_connection(address, timeout=5) as connection:
        body = infer_body()
        connection.sendall(head(len(body), expect))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 Continue")
        connection.sendall(body)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(head(10**9, expect))
        status, _, rest = status_and_error(connection)
        assert (status, rest) == (413, b"")


def test_a_client_that_goes_away_cancels_its_work(
    address: tuple[str, int], fake: FakeDispatcher
) -> None:
    fake.gate.clear()
    body = infer_body()
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(head(len(body)) + body)
        assert fake.started.wait(5)
        assert not fake.cancelled.is_set()
    assert fake.cancelled.wait(5)


def test_held_memory_is_bounded_and_given_back(
    address: tuple[str, int], http: httpx.Client, fake: FakeDispatcher
) -> None:
    fake.gate.clear()
    body = infer_body() + b" " * 3000
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(address, timeout=5))
        connection.sendall(head(len(body)) + body)
        assert fake.started.wait(5)
        response = http.post(DOUBLE, content=body)
        refused(response, 429, r"hold \d+ of 6000 bytes; no room for \d+ more")
        assert response.headers["retry-after"] == "1"
        refused(http.post(DOUBLE, content=iter([body])), 429, "no room")
    assert fake.cancelled.wait(5)
    fake.gate.set()
    end = time.monotonic() + 5
    while (status := http.post(DOUBLE, content=body).status_code) == 429:
        assert time.monotonic() < end
    assert status == 200


def head(length: int | None, *more: str) -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = [f"POST {DOUBLE} HTTP/1.1", "Host: test", size, *more]
    return "\r\n".join([*lines, "", ""]).encode()


def status_and_error(connection: socket.socket) -> tuple[int, str, bytes]:
    """The response's status and error, and what follows if the server closes the connection."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    header, _, body = received.partition(b"\r\n\r\n")
    match = re.search(rb"content-length: (\d+)", header)
    assert match
    while len(body) < int(match[1]):
        body += connection.recv(65536)
    document, rest = body[: int(match[1])], body[int(match[1]) :]
    if b"connection: close" in header.lower():
        rest += connection.recv(100)
    return int(header.split()[1]), json.loads(document)["error"], rest


def test_every_answer_is_honest_json_whatever_is_sent(http: httpx.Client) -> None:
    bodies = [
        b"null",
        b"[]",
        b'"x"',
        b"\x00" * 50,
        b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[1e999,1,1]}]}',
        b'{"inputs":[{"name":"\\u0000","shape":[],"datatype":"FP32"}]}',
        b'{"id":"\\ud83d","inputs":[]}',
        b'{"inputs":[{"name":"x","shape":[9223372036854775807,3],"datatype":"FP32","data":[]}]}',
    ]
    for body in bodies:
        for headers in ({}, {oip.HEADER_LENGTH: str(len(body) // 2)}):
            refused(http.post(DOUBLE, content=body, headers=headers), 400, ".")
