"""The codec: what it reads, what it refuses and in which words, and that nothing else escapes."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockflow import oip
from blockflow.artifact import Port
from blockflow.errors import BlockFlowError, ModelRefused, RequestInvalid
from blockflow.oip import InferRequest, ModelMetadata, RequestedOutput, TensorValue

MODEL = ModelMetadata(
    "resnet",
    (Port("x", "float32", ("batch", 3)), Port("n", "int32", ("batch",))),
    (Port("y", "float32", ("batch", 2)), Port("z", "int64", ("batch",))),
    max_batch=4,
)
X = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2.5, -3]}
N = {"name": "n", "shape": [1], "datatype": "INT32", "data": [7]}


def one_input(dtype: str, *shape: int, batch: bool = True) -> ModelMetadata:
    ports = (Port("x", dtype, ("batch", *shape) if batch else shape),)
    return ModelMetadata("m", ports, (Port("y", dtype, ("batch",)),), max_batch=64)


def request_for(dtype: str, data: object, shape: list[int]) -> bytes:
    datatype = oip.datatype_of(dtype).name
    tensor = {"name": "x", "shape": shape, "datatype": datatype, "data": data}
    return json.dumps({"inputs": [tensor]}).encode()


def parse(body: dict[str, Any] | bytes, header_length: int | None = None) -> InferRequest:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return oip.parse_request(raw, header_length, MODEL)


def parse_binary(
    inputs: list[dict[str, Any]], tail: bytes, model: ModelMetadata = MODEL
) -> InferRequest:
    head = json.dumps({"inputs": inputs}).encode()
    return oip.parse_request(head + tail, len(head), model)


# --- The table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", oip.DATATYPES, ids=lambda datatype: datatype.name)
def test_table_agrees_with_torch_and_numpy(datatype: oip.Datatype) -> None:
    assert getattr(torch, datatype.dtype).itemsize == datatype.itemsize == datatype.numpy.itemsize
    assert datatype.dtype in ("bfloat16", datatype.numpy.name)
    assert oip.datatype_of(datatype.dtype) is datatype


def test_codec_needs_no_torch_zmq_or_web_framework() -> None:
    forbidden = "{'torch', 'zmq', 'starlette', 'fastapi', 'uvicorn', 'httpx'}"
    program = f"import sys, blockflow.oip; sys.exit(str({forbidden} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert ran.stderr.strip() == b"set()"


def test_a_model_that_the_protocol_cannot_carry_is_refused() -> None:
    with pytest.raises(ModelRefused, match=r"input 'x' of model 'm'.*'complex64'.*float32"):
        one_input("complex64")
    port = Port("x", "float32", ("batch",))
    with pytest.raises(ModelRefused, match="different name"):
        ModelMetadata("m", (port, port), (port,), 1)
    with pytest.raises(ModelRefused, match="at least one output"):
        ModelMetadata("m", (port,), (), 1)
    with pytest.raises(ModelRefused, match="max_batch 0"):
        ModelMetadata("m", (port,), (port,), 0)


def test_metadata_documents() -> None:
    assert oip.server_metadata("1.2") == {
        "name": "blockflow",
        "version": "1.2",
        "extensions": ["binary_tensor_data"],
    }
    assert oip.model_metadata(MODEL) == {
        "name": "resnet",
        "versions": ["1"],
        "platform": "blockflow",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "n", "datatype": "INT32", "shape": [-1]},
        ],
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [-1, 2]},
            {"name": "z", "datatype": "INT64", "shape": [-1]},
        ],
    }


# --- Reading requests ---------------------------------------------------------------------------


def test_json_request() -> None:
    request = parse({"id": "r1", "inputs": [N, X]})
    assert request.id == "r1"
    assert request.rows == 1
    assert request.timeout is None
    x, n = request.inputs  # in the model's order, whatever the request's
    assert (x.name, x.dtype, x.shape) == ("x", "float32", (1, 3))
    assert x.numpy().tolist() == [[1.0, 2.5, -3.0]]
    assert n.numpy().tolist() == [7]
    assert request.outputs == (RequestedOutput("y", False), RequestedOutput("z", False))


def test_binary_request_is_not_copied() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    n = np.array([1, 2], np.int32)
    head = json.dumps(
        {
            "inputs": [
                {**N, "shape": [2], "data": None, "parameters": {"binary_data_size": 8}},
                {"name": "x", "shape": [2, 3], "datatype": "FP32"}
                | {"parameters": {"binary_data_size": 24}},
            ]
        }
    ).encode()
    body = bytearray(head + n.tobytes() + x.tobytes())
    request = oip.parse_request(body, len(head), MODEL)
    assert request.rows == 2
    np.testing.assert_array_equal(request.inputs[0].numpy(), x)
    np.testing.assert_array_equal(request.inputs[1].numpy(), n)
    body[-4:] = np.float32(99).tobytes()
    assert request.inputs[0].numpy()[1, 2] == 99


def test_json_and_binary_inputs_mix() -> None:
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32"}
    request = parse_binary(
        [N, tensor | {"parameters": {"binary_data_size": 12}}],
        np.array([4, 5, 6], np.float32).tobytes(),
    )
    assert request.inputs[0].numpy().tolist() == [[4, 5, 6]]
    assert request.inputs[1].numpy().tolist() == [7]


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        ("bool", [True, False]),
        ("uint8", [0, 255]),
        ("uint16", [0, 65535]),
        ("uint32", [0, 2**32 - 1]),
        ("uint64", [0, 2**64 - 1]),
        ("int8", [-128, 127]),
        ("int16", [-(2**15), 2**15 - 1]),
        ("int32", [-(2**31), 2**31 - 1]),
        ("int64", [-(2**63), 2**63 - 1]),
        ("float16", [-65504, 6e-8]),
        ("float32", [3.4028234663852886e38, 0.1]),
        ("float64", [1.7976931348623157e308, 5e-324]),
    ],
)
def test_json_numbers_to_the_edges_of_their_type(dtype: str, data: list[Any]) -> None:
    got = oip.parse_request(request_for(dtype, data, [2]), None, one_input(dtype)).inputs[0]
    np.testing.assert_array_equal(got.numpy(), np.array(data, dtype))
    assert got.data.tobytes() == np.array(data, dtype).tobytes()


@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda v: abs(v) < 3e38),
        min_size=1,
        max_size=8,
    )
)
def test_json_bfloat16_rounds_to_nearest_even(values: list[float]) -> None:
    body = request_for("bfloat16", values, [len(values)])
    got = oip.parse_request(body, None, one_input("bfloat16")).inputs[0]
    expected = np.array(values, np.float32).astype(ml_dtypes.bfloat16)
    assert got.data.tobytes() == expected.tobytes()
    np.testing.assert_array_equal(got.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("data", [[[1, 2], [3, 4]], [1, 2, 3, 4]], ids=["nested", "flat"])
def test_json_data_nested_or_flat(data: list[Any]) -> None:
    body = request_for("int64", data, [2, 2])
    got = oip.parse_request(body, None, one_input("int64", 2)).inputs[0]
    assert got.numpy().tolist() == [[1, 2], [3, 4]]


def test_json_with_whitespace_and_nulls_where_values_are_optional() -> None:
    body = b"""
    { "id": null, "parameters": { "note": null }, "outputs": null, "custom": {"deep": [1]},
      "inputs": [ { "name": "x", "shape": [ 1 , 3 ], "datatype": "FP32", "parameters": null,
                    "data" : [
                       [ 1 , 2 , 3 ] ] },
                  { "name": "n", "shape": [1], "datatype": "INT32", "data": [ 1 ] } ] } """
    assert parse(body).inputs[0].numpy().tolist() == [[1, 2, 3]]


def test_fixed_shapes_have_one_row() -> None:
    body = request_for("float32", [1, 2], [2])
    assert oip.parse_request(body, None, one_input("float32", 2, batch=False)).rows == 1


@pytest.mark.parametrize(
    ("parameters", "outputs", "expected"),
    [
        ({}, None, [("y", False), ("z", False)]),
        ({"binary_data_output": True}, None, [("y", True), ("z", True)]),
        ({"binary_data_output": True}, [], [("y", True), ("z", True)]),
        ({}, [{"name": "z"}], [("z", False)]),
        ({"binary_data_output": True}, [{"name": "z"}], [("z", True)]),
        ({}, [{"name": "z", "parameters": {"binary_data": True}}, {"name": "y"}], "z binary"),
        (
            {"binary_data_output": True},
            [{"name": "z", "parameters": {"binary_data": False}}],
            [("z", False)],
        ),
    ],
)
def test_requested_outputs(parameters: Any, outputs: Any, expected: Any) -> None:
    if expected == "z binary":
        expected = [("z", True), ("y", False)]
    body = {"inputs": [X, N], "parameters": parameters}
    if outputs is not None:
        body["outputs"] = outputs
    assert list(parse(body).outputs) == expected


def test_timeout_is_in_microseconds() -> None:
    assert parse({"inputs": [X, N], "parameters": {"timeout": 250_000}}).timeout == 0.25


# --- Refusing requests --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no JSON"),
        (b"{", "does not follow"),
        (b"[]", "Expected `object`, got `array`"),
        (b"\xff\xfe", "does not follow"),
        (b'{"inputs": []} x', "trailing characters"),
        (b'{"inputs": [], "id": "\xed\xa0\x80"}', "does not follow"),
        (b'{"inputs": [], "id": "\\ud800"}', "does not follow"),
        (b"[" * 100_000, "does not follow"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"inputs": ' + b'{"a":' * 100_000, "does not follow"),
        ({}, "missing required field `inputs`"),
        ({"inputs": [X, N], "id": 7}, "Expected `str | null`, got `int`"),
        ({"inputs": [N]}, "missing input 'x': model 'resnet' takes 'x', 'n'"),
        ({"inputs": [X, X, N]}, "input 'x' is given twice"),
        ({"inputs": [X, N, X | {"name": "q"}]}, "input 'q' is unknown"),
        ({"inputs": [X | {"datatype": "FP64"}, N]}, "has datatype FP64; model 'resnet' takes FP32"),
        ({"inputs": [X | {"datatype": "fp32"}, N]}, "unknown datatype 'fp32'; the known ones"),
        ({"inputs": [X | {"datatype": "BYTES"}, N]}, "BYTES, which BlockFlow does not serve"),
        ({"inputs": [X | {"shape": [3]}, N]}, r"shape \[3\]; expected \[batch, 3\]"),
        ({"inputs": [X | {"shape": [1, 4]}, N]}, r"shape \[1, 4\]; expected \[batch, 3\]"),
        ({"inputs": [X | {"shape": [-1, 3]}, N]}, ">= 0"),
        ({"inputs": [X | {"shape": [1.0, 3]}, N]}, "Expected `int`"),
        ({"inputs": [X | {"shape": [True, 3]}, N]}, "Expected `int`"),
        ({"inputs": [X | {"shape": [10**30, 3]}, N]}, "<= 9223372036854775807"),
        ({"inputs": [X | {"shape": [0, 3], "data": []}, N | {"shape": [0]}]}, "a batch of 0"),
        ({"inputs": [X | {"shape": [5, 3]}, N | {"shape": [5]}]}, "takes 1 to 4 rows"),
        ({"inputs": [X, N | {"shape": [2], "data": [1, 2]}]}, "batch of 2, other inputs one of 1"),
        ({"inputs": [X | {"data": [1, 2]}, N]}, r"has 2 elements; shape \[1, 3\] takes 3"),
        ({"inputs": [X | {"data": []}, N]}, "elements"),
        ({"inputs": [X | {"data": [[1, 2], [3]]}, N]}, "ragged"),
        ({"inputs": [X | {"data": [[[1, 2, 3]]]}, N]}, "does not hold FP32 values"),
        ({"inputs": [X | {"data": [[1], [2], [3]]}, N]}, r"nested as \[3, 1\]; expected \[1, 3\]"),
        ({"inputs": [X | {"data": [1, [2], 3]}, N]}, "Expected `float`, got `array`"),
        ({"inputs": [X | {"data": [1, "2", 3]}, N]}, "Expected `float`, got `str`"),
        ({"inputs": [X | {"data": [1, True, 3]}, N]}, "Expected `float`, got `bool`"),
        ({"inputs": [X | {"data": [1, None, 3]}, N]}, "Expected `float`, got `null`"),
        ({"inputs": [X | {"data": "abc"}, N]}, "must be an array"),
        ({"inputs": [X | {"data": {"a": 1}}, N]}, "must be an array"),
        ({"inputs": [X | {"data": None}, N]}, "has no data"),
        ({"inputs": [X | {"data": [1, 1e39, 3]}, N]}, "a number that FP32 cannot hold"),
        ({"inputs": [X | {"data": [1, math.nan, 3]}, N]}, "no NaN or infinity: send such"),
        ({"inputs": [X | {"data": [1, -math.inf, 3]}, N]}, "no NaN or infinity: send such"),
        ({"inputs": [X, N | {"data": [1.5]}]}, "Expected `int`, got `float`"),
        ({"inputs": [X, N | {"data": [1.0]}]}, "Expected `int`, got `float`"),
        ({"inputs": [X, N | {"data": [True]}]}, "Expected `int`, got `bool`"),
        ({"inputs": [X, N | {"data": [2**31]}]}, "<= 2147483647"),
        ({"inputs": [X, N | {"data": [-(2**31) - 1]}]}, ">= -2147483648"),
        ({"inputs": [X, N], "outputs": [{"name": "w"}]}, "'w' is unknown.*answers with 'y', 'z'"),
        ({"inputs": [X, N], "outputs": [{"name": "y"}] * 2}, "requested twice"),
        (
            {"inputs": [X, N], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]},
            "'binary_data' of output 'y' must be true or false",
        ),
        (
            {"inputs": [X, N], "outputs": [{"name": "y", "parameters": {"classification": 3}}]},
            "'classification', an extension",
        ),
        (
            {"inputs": [X | {"parameters": {"shared_memory_region": "r"}}, N]},
            "'shared_memory_region', an extension",
        ),
        ({"inputs": [X, N], "parameters": {"binary_data_output": "yes"}}, "true or false"),
        ({"inputs": [X, N], "parameters": {"a": [1]}}, "got `array`"),
        ({"inputs": [X, N], "parameters": []}, "Expected `object"),
        (
            {"inputs": [X | {"parameters": {"binary_data_size": 12}}, N]},
            "both 'data' and 'binary_data_size'",
        ),
    ],
)
def test_refusals(body: Any, message: str) -> None:
    with pytest.raises(RequestInvalid, match=message):
        parse(body)


@pytest.mark.parametrize("value", [0, -1, True, "5", 10**30, -0.5, 1e300])
def test_timeout_must_be_positive(value: object) -> None:
    with pytest.raises(RequestInvalid, match="positive number of microseconds"):
        parse({"inputs": [X, N], "parameters": {"timeout": value}})


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        ("uint8", "300"),
        ("uint8", "-1"),
        ("uint64", str(2**64)),
        ("uint64", "-1"),
        ("int64", str(2**63)),
        ("float16", "65520"),
        ("bfloat16", "3.4e38"),
        ("float64", "1e999"),
        ("float64", "-1e999"),
        ("float64", "1" * 400),
        ("int64", "1" * 5000),
        ("int64", "1e2"),
        ("bool", "1"),
        ("bool", '"true"'),
    ],
)
def test_numbers_that_their_type_cannot_hold(dtype: str, text: str) -> None:
    body = request_for(dtype, 0, [1]).replace(b'"data": 0', f'"data": [{text}]'.encode())
    with pytest.raises(RequestInvalid, match=r"input 'x'|out of range"):
        oip.parse_request(body, None, one_input(dtype))


X_BINARY = {"name": "x", "shape": [1, 3], "datatype": "FP32"}


@pytest.mark.parametrize(
    ("size", "tail", "message"),
    [
        (12, bytes(11), "cut short: expected 12 bytes, got 11"),
        (12, bytes(13), "13 bytes of binary data follow .* add up to 12"),
        (8, bytes(8), r"FP32 \[1, 3\] takes 12 bytes"),
        (-12, bytes(12), "takes 12 bytes"),
        (10**25, bytes(12), "takes 12 bytes"),
        (12.0, bytes(12), "must be a number of bytes"),
        (True, bytes(12), "must be a number of bytes"),
        ("12", bytes(12), "must be a number of bytes"),
    ],
)
def test_binary_sizes(size: object, tail: bytes, message: str) -> None:
    with pytest.raises(RequestInvalid, match=message):
        parse_binary([X_BINARY | {"parameters": {"binary_data_size": size}}, N], tail)


def test_binary_data_without_the_header_is_explained() -> None:
    with pytest.raises(RequestInvalid, match="needs the HTTP header Inference-Header-Content-Len"):
        parse({"inputs": [X_BINARY | {"parameters": {"binary_data_size": 12}}, N]})


def test_bytes_behind_json_are_refused() -> None:
    with pytest.raises(RequestInvalid, match="4 bytes of binary data follow"):
        parse_binary([X, N], bytes(4))


def test_binary_bool_holds_only_0_and_1() -> None:
    tensor = {"name": "x", "shape": [3], "datatype": "BOOL", "parameters": {"binary_data_size": 3}}
    got = parse_binary([tensor], b"\x00\x01\x01", one_input("bool")).inputs[0]
    assert got.numpy().tolist() == [False, True, True]
    with pytest.raises(RequestInvalid, match="bytes other than 0 and 1"):
        parse_binary([tensor], b"\x00\x02\x01", one_input("bool"))


@pytest.mark.parametrize("length", [-1, 10**9])
def test_header_length_outside_the_body(length: int) -> None:
    with pytest.raises(RequestInvalid, match=f"says {length} bytes of JSON"):
        parse({"inputs": [X, N]}, length)


def test_header_length_as_text() -> None:
    assert oip.parse_header_length(None) is None
    assert oip.parse_header_length("0120") == 120
    for text in ("", "-1", "+1", "1_0", " 1", "1.0", "0x10", "ten", "١", "9" * 40):
        with pytest.raises(RequestInvalid, match="decimal digits"):
            oip.parse_header_length(text)


def test_messages_are_short_whatever_was_sent() -> None:
    for body in (
        {"inputs": [X | {"name": "n" * 10**6}]},
        {"inputs": [X | {"datatype": "F" * 10**6}, N]},
        {"inputs": [X | {"shape": [1] * 10**5}, N]},
        {"inputs": [X, N], "outputs": [{"name": "o" * 10**6}]},
    ):
        with pytest.raises(RequestInvalid) as caught:
            parse(body)
        assert len(str(caught.value)) < 400


# --- Nothing but RequestInvalid -----------------------------------------------------------------


def only_request_invalid(body: bytes, header_length: int | None) -> None:
    try:
        request = oip.parse_request(body, header_length, MODEL)
    except RequestInvalid as error:
        str(error).encode()  # it can be said in JSON
        return
    for tensor in request.inputs:
        assert tensor.numpy().shape == tensor.shape
    assert 1 <= request.rows <= MODEL.max_batch


lengths = st.none() | st.integers(-2, 400)


@given(st.binary(max_size=300), lengths)
def test_fuzz_bytes(body: bytes, header_length: int | None) -> None:
    only_request_invalid(body, header_length)


def valid_binary() -> tuple[bytes, int]:
    x = TensorValue.from_numpy("x", np.ones((2, 3), np.float32))
    n = TensorValue.from_numpy("n", np.ones(2, np.int32))
    encoded = oip.encode_request([x, n], outputs=["y"], timeout=1.0, request_id="id")
    return b"".join(encoded.chunks), int(encoded.headers[oip.HEADER_LENGTH])


@given(st.data())
def test_fuzz_mutated_requests(data: st.DataObject) -> None:
    body, length = valid_binary()
    text = json.dumps({"inputs": [X, N], "id": "a", "parameters": {"timeout": 5}}).encode()
    raw, header_length = data.draw(st.sampled_from([(body, length), (text, None)]))
    mutated = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(mutated)))
        match data.draw(st.sampled_from(["set", "insert", "delete"])):
            case "set":
                mutated[where : where + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "insert":
                mutated[where:where] = data.draw(
                    st.sampled_from([b"[", b"]", b"{", b'"', b",", b"9" * 30, b"null", b"1e999"])
                )
            case _:
                del mutated[where : where + data.draw(st.integers(1, 8))]
    only_request_invalid(bytes(mutated), header_length)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["FP32", "INT32", "BYTES", "x", "n", "y"])
)
documents = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Requests whose every field is right, or anything."""

    def tensor(right: dict[str, Any]) -> Any:
        fields = {key: draw(st.just(value) | documents) for key, value in right.items()}
        if draw(st.booleans()):
            fields["parameters"] = draw(
                st.fixed_dictionaries({}, optional={"binary_data_size": documents}) | documents
            )
        return fields

    body: dict[str, Any] = {"inputs": [tensor(X), tensor(N)]}
    if draw(st.booleans()):
        body["outputs"] = draw(
            documents
            | st.lists(
                st.fixed_dictionaries({"name": documents}, optional={"parameters": documents}),
                max_size=3,
            )
        )
    if draw(st.booleans()):
        keys = {"timeout": documents, "binary_data_output": documents}
        body["parameters"] = draw(st.fixed_dictionaries({}, optional=keys) | documents)
    return body


@settings(max_examples=300)
@given(requests(), st.sampled_from([None, 0]), st.binary(max_size=20))
def test_fuzz_wrong_types_everywhere(body: dict[str, Any], tail: int | None, more: bytes) -> None:
    head = json.dumps(body).encode()
    if tail is None:
        only_request_invalid(head, None)
    else:
        only_request_invalid(head + more, len(head))


# --- There and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", oip.DATATYPES, ids=lambda datatype: datatype.name)
@given(data=st.data())
@settings(max_examples=15)
def test_binary_round_trip(datatype: oip.Datatype, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4))
    limit = 1 if datatype.name == "BOOL" else 255
    size = rows * 3 * datatype.itemsize
    raw = bytes(data.draw(st.lists(st.integers(0, limit), min_size=size, max_size=size)))
    tensor = TensorValue("x", datatype.dtype, (rows, 3), memoryview(raw))
    port = (Port("x", datatype.dtype, ("batch", 3)),)
    model = ModelMetadata("m", port, port, 4)

    sent = oip.encode_request([tensor], timeout=0.5, request_id="r")
    body = b"".join(sent.chunks)
    assert int(sent.headers["Content-Length"]) == len(body)
    got = oip.parse_request(body, int(sent.headers[oip.HEADER_LENGTH]), model)
    assert got == InferRequest("r", (tensor,), rows, (RequestedOutput("x", True),), 0.5)

    answered = oip.encode_response(model, got, [tensor])
    assert answered.chunks[1] is tensor.data
    answer = oip.parse_response(b"".join(answered.chunks), answered.headers.get(oip.HEADER_LENGTH))
    assert answer == oip.InferAnswer("m", "r", (tensor,))


def asking(*outputs: RequestedOutput) -> InferRequest:
    return InferRequest("", (), 1, outputs, None)


@pytest.mark.parametrize(
    ("dtype", "values", "text"),
    [
        ("bool", [True, False], b"[true,false]"),
        ("uint64", [2**64 - 1], b"[18446744073709551615]"),
        ("float16", [1.5, -2], b"[1.5,-2.0]"),
        ("float32", [0.25, 3], b"[0.25,3.0]"),
        ("bfloat16", [1.5, 3.140625], b"[1.5,3.140625]"),
        ("int8", [-128], b"[-128]"),
    ],
)
def test_json_response(dtype: str, values: list[Any], text: bytes) -> None:
    numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    tensor = TensorValue.from_numpy("y", np.array(values, numpy_dtype))
    assert tensor.dtype == dtype
    headers, chunks = oip.encode_response(
        one_input(dtype), asking(RequestedOutput("y", False)), [tensor]
    )
    assert headers == {"Content-Type": "application/json", "Content-Length": str(len(chunks[0]))}
    assert chunks[0] == (
        b'{"model_name":"m","model_version":"1","outputs":[{"name":"y","datatype":"'
        + oip.datatype_of(dtype).name.encode()
        + f'","shape":[{len(values)}],"data":'.encode()
        + text
        + b"}]}"
    )
    answer = oip.parse_response(chunks[0], None)
    np.testing.assert_array_equal(answer.outputs[0].numpy(), tensor.numpy())


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=5))
def test_json_response_keeps_every_float32(values: list[float]) -> None:
    tensor = TensorValue.from_numpy("y", np.array(values, np.float32))
    encoded = oip.encode_response(MODEL, asking(RequestedOutput("y", False)), [tensor])
    answer = oip.parse_response(encoded.chunks[0], None)
    assert answer.outputs[0].data == tensor.data


def test_response_mixes_json_and_binary_in_the_order_asked() -> None:
    y = TensorValue.from_numpy("y", np.zeros((1, 2), np.float32))
    z = TensorValue.from_numpy("z", np.array([5]))
    wanted = asking(RequestedOutput("z", False), RequestedOutput("y", True))
    headers, chunks = oip.encode_response(MODEL, wanted, [y, z])
    assert headers["Content-Type"] == "application/octet-stream"
    head = json.loads(bytes(chunks[0]))
    assert [output["name"] for output in head["outputs"]] == ["z", "y"]
    assert head["outputs"][0]["data"] == [5]
    assert head["outputs"][1]["parameters"] == {"binary_data_size": 8}
    assert int(headers[oip.HEADER_LENGTH]) == len(chunks[0])
    assert chunks[1:] == [y.data]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ml_dtypes.bfloat16])
def test_json_cannot_say_nan(value: float, dtype: Any) -> None:
    tensor = TensorValue.from_numpy("y", np.array([[0, value]], dtype))
    with pytest.raises(RequestInvalid, match=r"'y' holds NaN or infinity.*binary_data"):
        oip.encode_response(MODEL, asking(RequestedOutput("y", False)), [tensor])
    oip.encode_response(MODEL, asking(RequestedOutput("y", True)), [tensor])


def test_wrong_outputs_are_not_blamed_on_the_client() -> None:
    wanted = asking(RequestedOutput("y", True))
    with pytest.raises(ValueError, match="without 'y'"):
        oip.encode_response(MODEL, wanted, [])
    broken = TensorValue("y", "float32", (1, 2), memoryview(bytes(4)))
    with pytest.raises(ValueError, match="needs 8 bytes and has 4"):
        oip.encode_response(MODEL, wanted, [broken])


@pytest.mark.parametrize("timeout", [0, -1, math.inf, math.nan])
def test_client_timeout_must_be_positive(timeout: float) -> None:
    with pytest.raises(RequestInvalid, match="positive number of seconds"):
        oip.encode_request([], timeout=timeout)


def test_arrays_of_any_layout_become_little_endian_and_contiguous() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    tensor = TensorValue.from_numpy("x", array)
    assert tensor.shape == (3, 2)
    assert tensor.data.tobytes() == array.astype("<i4").tobytes()
    scalar = TensorValue.from_numpy("x", np.array(1.5))
    assert scalar.shape == ()
    assert scalar.numpy() == 1.5
    assert TensorValue.from_numpy("x", np.zeros((0, 3), np.float32)).numpy().shape == (0, 3)
    contiguous = np.zeros(4, np.float32)
    assert np.shares_memory(TensorValue.from_numpy("x", contiguous).numpy(), contiguous)
    for wrong in (np.array(["a"]), np.array([object()]), np.array([1j])):
        with pytest.raises(RequestInvalid, match="cannot carry"):
            TensorValue.from_numpy("x", wrong)


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (b"", None),
        (b"<html>", None),
        (b"{}", "-1"),
        (b'{"model_name":"m","outputs":[{"name":"y","shape":[2],"datatype":"FP32"}]}', None),
        (b'{"model_name":"m","outputs":[]}x', "31"),
        (
            b'{"model_name":"m","outputs":[{"name":"y","shape":['
            + b"1," * 99
            + b'1],"datatype":"FP32","data":[1]}]}',
            None,
        ),
    ],
)
def test_a_servers_nonsense_is_the_servers_fault(body: bytes, header: str | None) -> None:
    with pytest.raises(BlockFlowError, match="the server's answer cannot be read") as caught:
        oip.parse_response(body, header)
    assert not isinstance(caught.value, RequestInvalid)


@given(st.binary(max_size=200), st.none() | st.integers(-1, 200).map(str))
def test_fuzz_answers(body: bytes, header: str | None) -> None:
    with contextlib.suppress(BlockFlowError):
        oip.parse_response(body, header)
