"""The Open Inference Protocol v2 as values: REST bodies to tensors and back, without any I/O.

Covers the JSON form and the binary tensor data extension. The rules are the protocol's; where it is
silent this codec does what Triton does, except that

- NaN and infinity are refused in JSON in both directions (RFC 8259 has no words for them, and a
  strict client would fail on a body that holds them); binary data carries them;
- FP16 and BF16 may be written as JSON numbers;
- what would change the meaning of an answer and is not supported (shared memory regions,
  classification) is refused rather than ignored. Other unknown parameters are ignored.

Every tensor is raw bytes here: little-endian, C order, no padding, as on the wire.
"""

from __future__ import annotations

import functools
import math
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from blockflow.artifact import BATCH, Port
from blockflow.errors import BlockFlowError, ModelRefused, RequestInvalid

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
"""The HTTP header that says how many bytes of a body are JSON; what follows is tensor data."""

MODEL_VERSION: Final = "1"
"""The one version a model has: a pipeline is replaced as a whole, by the topology."""

_T = TypeVar("_T")

_MOST_DIMENSIONS = 32
_INT64_MAX = 2**63 - 1


class Datatype(NamedTuple):
    """One row of the table of element types.

    `name` is the protocol's ("FP32"), `dtype` is torch's without the prefix ("float32"), `itemsize`
    is in bytes. `numpy` is the little-endian type that holds the elements; numpy has no bfloat16,
    so BF16 is held as its 16 bits.
    """

    name: str
    dtype: str
    itemsize: int
    numpy: np.dtype[Any]


DATATYPES: Final[tuple[Datatype, ...]] = (
    Datatype("BOOL", "bool", 1, np.dtype("?")),
    Datatype("UINT8", "uint8", 1, np.dtype("<u1")),
    Datatype("UINT16", "uint16", 2, np.dtype("<u2")),
    Datatype("UINT32", "uint32", 4, np.dtype("<u4")),
    Datatype("UINT64", "uint64", 8, np.dtype("<u8")),
    Datatype("INT8", "int8", 1, np.dtype("<i1")),
    Datatype("INT16", "int16", 2, np.dtype("<i2")),
    Datatype("INT32", "int32", 4, np.dtype("<i4")),
    Datatype("INT64", "int64", 8, np.dtype("<i8")),
    Datatype("FP16", "float16", 2, np.dtype("<f2")),
    Datatype("FP32", "float32", 4, np.dtype("<f4")),
    Datatype("FP64", "float64", 8, np.dtype("<f8")),
    Datatype("BF16", "bfloat16", 2, np.dtype("<u2")),
)
_BY_NAME = {datatype.name: datatype for datatype in DATATYPES}
_BY_DTYPE = {datatype.dtype: datatype for datatype in DATATYPES}
_FLOATING = ("FP16", "FP32", "FP64", "BF16")


def datatype_of(dtype: str) -> Datatype:
    """The datatype that carries torch's `dtype` ("float32").

    Raises `InvalidInput` (as `ModelRefused`) for a dtype that the protocol has no word for.
    """
    try:
        return _BY_DTYPE[dtype]
    except KeyError:
        raise ModelRefused(
            f"the Open Inference Protocol cannot carry {_shown(dtype)}; it carries "
            + ", ".join(_BY_DTYPE)
        ) from None


class ModelMetadata(msgspec.Struct, frozen=True):
    """What clients may know of a model, and what their requests are checked against.

    `max_batch` is the most rows of one request. Raises `ModelRefused` for ports that the protocol
    cannot speak of.
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    max_batch: int

    def __post_init__(self) -> None:
        for side, ports in (("input", self.inputs), ("output", self.outputs)):
            names = [port.name for port in ports]
            if not names or len(set(names)) < len(names):
                raise ModelRefused(
                    f"model {self.name!r} needs at least one {side} and a different name for each; "
                    f"it has {names}"
                )
            for port in ports:
                try:
                    datatype_of(port.dtype)
                except ModelRefused as error:
                    raise ModelRefused(
                        f"{side} {port.name!r} of model {self.name!r}: {error}"
                    ) from None
        if self.max_batch < 1:
            raise ModelRefused(
                f"model {self.name!r} has max_batch {self.max_batch}; it must be at least 1"
            )


@dataclass(frozen=True, slots=True)
class TensorValue:
    """A named tensor on the host: `data` is its raw little-endian bytes in C order.

    `dtype` is torch's name ("float32"). `data` has format "B" and `itemsize * prod(shape)` bytes,
    and may start at any address: a view into a request's body is not aligned. Whoever makes one
    keeps the bytes unchanged for as long as the value lives, for nothing between here and the
    socket copies them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def from_numpy(cls, name: str, array: NDArray[Any]) -> TensorValue:
        """The tensor's bytes without a copy if `array` is little-endian and C-contiguous.

        Arrays of `ml_dtypes.bfloat16` become "bfloat16". Raises `RequestInvalid` for element types
        that the protocol cannot carry (objects, strings, complex numbers, times).
        """
        datatype = _BY_DTYPE.get(array.dtype.name)
        if datatype is None:
            raise RequestInvalid(
                f"tensor {_shown(name)} has numpy dtype {array.dtype}, which the Open Inference "
                "Protocol cannot carry; it carries " + ", ".join(_BY_DTYPE)
            )
        contiguous = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        # Through a byte view, because numpy lends no buffer of element types it did not define.
        data = contiguous.reshape(-1).view(np.uint8).data
        return cls(name, datatype.dtype, tuple(array.shape), data)

    def numpy(self) -> NDArray[Any]:
        """An array of `shape`: a view of `data`, or for bfloat16 a float32 copy (exact).

        Raises `ValueError` if `data` and `shape` disagree.
        """
        elements = np.frombuffer(self.data, dtype=datatype_of(self.dtype).numpy)
        if self.dtype == "bfloat16":
            elements = (elements.astype(np.uint32) << 16).view(np.float32)
        return elements.reshape(self.shape)


class RequestedOutput(NamedTuple):
    """An output that the client wants, and whether as binary data or as JSON numbers."""

    name: str
    binary: bool


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request that fits its model.

    `inputs` has one tensor per input port, in the model's order; `rows` is the size of their
    symbolic batch dimension (1 for a model without one). `outputs` has at least one entry.
    `timeout` is in seconds and counts from when the whole request was there; None means that the
    client named none. `id` is empty if the client gave none. `timing`: it wants to know its times.
    """

    id: str
    inputs: tuple[TensorValue, ...]
    rows: int
    outputs: tuple[RequestedOutput, ...]
    timeout: float | None
    timing: bool = False


class BlockTiming(NamedTuple):
    """A request's time on the way to a block, waiting there, and in the block's computation.

    In milliseconds. On a GPU `compute_ms` is what the device's events measured.
    """

    block: str
    hop_ms: float
    queue_ms: float
    compute_ms: float


class Timings(NamedTuple):
    """Where a request's time went: `total_ms` in the gateway and behind it, and at each block.

    The blocks are in the order in which the request met them. Times at blocks that compute side by
    side do not add up; what the total has beyond them is the gateway's, the way back, and on a GPU
    what the device kept waiting.
    """

    total_ms: float
    blocks: tuple[BlockTiming, ...]


@dataclass(frozen=True, slots=True)
class InferResult:
    """What the blocks answered: at least the requested outputs, in any order.

    `timings` is None for a request that did not ask.
    """

    outputs: Sequence[TensorValue]
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class InferAnswer:
    """A server's response as its client reads it."""

    model: str
    id: str
    outputs: tuple[TensorValue, ...]
    timings: Timings | None = None


class Encoded(NamedTuple):
    """An HTTP body in pieces, so that no tensor is copied to put it beside another."""

    headers: dict[str, str]
    chunks: list[bytes | memoryview]


# --- What the JSON looks like -------------------------------------------------------------------

# Bounded, so that no dimension that passes is too large to print or to multiply.
_Dimension = Annotated[int, msgspec.Meta(ge=0, le=_INT64_MAX)]
# The protocol allows only scalars. Anything else here would let a small body grow many times over
# as Python objects. Null is what serialisers of optional fields write.
_Parameters = dict[str, str | bool | int | float | None]


class _Tensor(msgspec.Struct):
    name: str
    shape: list[_Dimension]
    datatype: str
    parameters: _Parameters | None = None
    # Left unparsed until the shape is known to be right.
    data: msgspec.Raw = msgspec.Raw()


class _Output(msgspec.Struct):
    name: str
    parameters: _Parameters | None = None


class _Request(msgspec.Struct):
    inputs: list[_Tensor]
    id: str | None = None
    parameters: _Parameters | None = None
    outputs: list[_Output] | None = None


class _Answer(msgspec.Struct):
    model_name: str
    outputs: list[_Tensor]
    id: str | None = None
    parameters: _Parameters | None = None


_request_decoder = msgspec.json.Decoder(_Request)
_answer_decoder = msgspec.json.Decoder(_Answer)


# --- The server's side --------------------------------------------------------------------------


def parse_header_length(value: str | None) -> int | None:
    """The value of an `Inference-Header-Content-Length` header, or None where there is none.

    Raises `RequestInvalid` unless it is a plain decimal number.
    """
    if value is None:
        return None
    # int() alone would also take "+1", "1_0" and the digits of other scripts.
    if not (value.isascii() and value.isdigit() and len(value) <= 19):
        raise RequestInvalid(
            f"the header {HEADER_LENGTH} must be a number of bytes in decimal digits, "
            f"not {_shown(value)}"
        )
    return int(value)


def parse_request(
    body: bytes | bytearray | memoryview, header_length: int | None, model: ModelMetadata
) -> InferRequest:
    """Read the body of an infer request to `model`.

    `header_length` is the value of the `Inference-Header-Content-Length` header: that many bytes of
    JSON, then the binary tensors in the order of the JSON's inputs. None means that all of the body
    is JSON. Binary inputs are views into `body`, which must not change afterwards.

    Raises `RequestInvalid`, and nothing else, whatever the bytes are.
    """
    head, tail = _divided(body, header_length, "request")
    request = _decoded(head, _request_decoder, "request")
    parameters = request.parameters or {}

    ports = {port.name: port for port in model.inputs}
    tensors: dict[str, _Tensor] = {}
    rows: int | None = None
    for tensor in request.inputs:
        what = f"input {_shown(tensor.name)}"
        if tensor.name in tensors:
            raise RequestInvalid(f"{what} is given twice")
        port = ports.get(tensor.name)
        if port is None:
            raise RequestInvalid(f"{what} is unknown: model {model.name!r} takes {_listed(ports)}")
        expected = datatype_of(port.dtype)
        if _datatype_named(tensor.datatype, what) is not expected:
            raise RequestInvalid(
                f"{what} has datatype {tensor.datatype}; model {model.name!r} takes {expected.name}"
            )
        rows = _agreed_rows(tensor, port, rows)
        tensors[tensor.name] = tensor
    if missing := ports.keys() - tensors.keys():
        raise RequestInvalid(
            f"missing input {_listed(sorted(missing))}: model {model.name!r} takes {_listed(ports)}"
        )
    if rows is not None and not 1 <= rows <= model.max_batch:
        raise RequestInvalid(
            f"the request has a batch of {rows}; model {model.name!r} takes 1 to {model.max_batch} "
            "rows in one request"
        )

    values = _values(request.inputs, head, tail, "input")
    return InferRequest(
        id=request.id or "",
        inputs=tuple(values[name] for name in ports),
        rows=1 if rows is None else rows,
        outputs=_requested_outputs(request, parameters, model),
        timeout=_timeout_seconds(parameters),
        timing=_flag(parameters, "timing", "the request") or False,
    )


def encode_response(
    model: ModelMetadata,
    request: InferRequest,
    outputs: Iterable[TensorValue],
    timings: Timings | None = None,
) -> Encoded:
    """The answer to `request`: the outputs it asked for, each in the form it asked for.

    JSON numbers are flat, in C order. Binary outputs are passed on as they are. Timings become
    parameters: `timing.total_ms`, `timing.<block>.hop_ms` and so on.

    Raises `RequestInvalid` where JSON was asked for and cannot say the values (NaN, infinity), and
    `ValueError` for outputs that are missing or whose bytes do not fill their shape: that is no
    fault of the client's.
    """
    by_name = {tensor.name: tensor for tensor in outputs}
    described: list[dict[str, Any]] = []
    chunks: list[bytes | memoryview] = []
    for wanted in request.outputs:
        if wanted.name not in by_name:
            raise ValueError(
                f"model {model.name!r} answered with {sorted(by_name)}, without {wanted.name!r}"
            )
        tensor = by_name[wanted.name]
        described.append(_described(tensor))
        if wanted.binary:
            described[-1]["parameters"] = {"binary_data_size": tensor.data.nbytes}
            chunks.append(tensor.data)
        else:
            described[-1]["data"] = _json_numbers(tensor)
    head: dict[str, Any] = {"model_name": model.name, "model_version": MODEL_VERSION}
    if request.id:
        head["id"] = request.id
    if timings is not None:
        head["parameters"] = _timing_parameters(timings)
    head["outputs"] = described
    return _encoded(head, chunks)


def server_metadata(version: str) -> dict[str, Any]:
    """The body of `GET /v2`."""
    return {"name": "blockflow", "version": version, "extensions": ["binary_tensor_data"]}


def model_metadata(model: ModelMetadata) -> dict[str, Any]:
    """The body of `GET /v2/models/{name}`; the symbolic batch dimension is -1."""

    def described(port: Port) -> dict[str, Any]:
        return {
            "name": port.name,
            "datatype": datatype_of(port.dtype).name,
            "shape": [-1 if size == BATCH else size for size in port.shape],
        }

    return {
        "name": model.name,
        "versions": [MODEL_VERSION],
        "platform": "blockflow",
        "inputs": [described(port) for port in model.inputs],
        "outputs": [described(port) for port in model.outputs],
    }


# --- The client's side --------------------------------------------------------------------------


def encode_request(
    inputs: Iterable[TensorValue],
    *,
    outputs: Iterable[str] = (),
    timeout: float | None = None,
    request_id: str = "",
    timing: bool = False,
) -> Encoded:
    """An infer request with binary tensors both ways.

    `outputs` names the wanted ones; none means all. `timeout` is in seconds. `timing` asks where
    the request's time goes. Raises
    `RequestInvalid` for a timeout that is not a positive, finite number.
    """
    described: list[dict[str, Any]] = []
    chunks: list[bytes | memoryview] = []
    for tensor in inputs:
        size = {"binary_data_size": tensor.data.nbytes}
        described.append({**_described(tensor), "parameters": size})
        chunks.append(tensor.data)
    head: dict[str, Any] = {"inputs": described}
    if request_id:
        head["id"] = request_id
    if names := list(outputs):
        head["outputs"] = [{"name": name} for name in names]
    head["parameters"] = {"binary_data_output": True}
    if timeout is not None:
        if not 0 < timeout < math.inf:
            raise RequestInvalid(f"timeout must be a positive number of seconds, not {timeout}")
        # Rounded up: zero microseconds would be refused.
        head["parameters"]["timeout"] = math.ceil(timeout * 1e6)
    if timing:
        head["parameters"]["timing"] = True
    return _encoded(head, chunks)


def parse_response(body: bytes | bytearray | memoryview, header: str | None) -> InferAnswer:
    """Read the body of a successful answer; binary outputs are views into `body`.

    `header` is the answer's `Inference-Header-Content-Length`, if it has one.

    Raises `BlockFlowError` for a body that is no answer of this protocol.
    """
    try:
        head, tail = _divided(body, parse_header_length(header), "answer")
        answer = _decoded(head, _answer_decoder, "answer")
        values = _values(answer.outputs, head, tail, "output")
    except RequestInvalid as error:
        raise BlockFlowError(f"the server's answer cannot be read: {error}") from error
    timings = _timings_in(answer.parameters or {})
    return InferAnswer(answer.model_name, answer.id or "", tuple(values.values()), timings)


# --- Bodies and their two parts -----------------------------------------------------------------


def _divided(
    body: bytes | bytearray | memoryview, header_length: int | None, kind: str
) -> tuple[memoryview, memoryview | None]:
    """The JSON of a body, and the binary data behind it (None if the header did not name any)."""
    view = memoryview(body)
    # An empty view cannot be cast.
    view = view.cast("B") if view.nbytes else memoryview(b"")
    if header_length is None:
        head, tail = view, None
    elif 0 <= header_length <= len(view):
        head, tail = view[:header_length], view[header_length:]
    else:
        raise RequestInvalid(
            f"{HEADER_LENGTH} says {header_length} bytes of JSON, but the {kind}'s body has "
            f"{len(view)} bytes"
        )
    if not head:
        raise RequestInvalid(f"the {kind} has no JSON; an object with 'inputs' was expected")
    return head, tail


def _decoded(head: memoryview, decoder: msgspec.json.Decoder[_T], kind: str) -> _T:
    try:
        return decoder.decode(head)
    except RecursionError:
        reason = "it is nested too deeply"
    except (msgspec.MsgspecError, ValueError) as error:  # ValueError: bytes that are no UTF-8
        reason = str(error)
        if re.search(rb"[:,[\s](NaN|-?Infinity)", head):
            reason += "; JSON has no NaN or infinity: send such a tensor as binary data"
    raise RequestInvalid(f"the {kind}'s JSON does not follow the Open Inference Protocol: {reason}")


def _encoded(head: dict[str, Any], chunks: list[bytes | memoryview]) -> Encoded:
    encoded = msgspec.json.encode(head)
    length = len(encoded) + sum(memoryview(chunk).nbytes for chunk in chunks)
    headers = {"Content-Type": "application/json", "Content-Length": str(length)}
    if chunks:
        headers["Content-Type"] = "application/octet-stream"
        headers[HEADER_LENGTH] = str(len(encoded))
    return Encoded(headers, [encoded, *chunks])


def _described(tensor: TensorValue) -> dict[str, Any]:
    datatype = datatype_of(tensor.dtype)
    expected = math.prod(tensor.shape) * datatype.itemsize
    if tensor.data.nbytes != expected:
        raise ValueError(
            f"tensor {tensor.name!r} of {datatype.name} {list(tensor.shape)} needs {expected} "
            f"bytes and has {tensor.data.nbytes}"
        )
    return {"name": tensor.name, "datatype": datatype.name, "shape": tensor.shape}


# --- Shapes and parameters ----------------------------------------------------------------------


def _datatype_named(name: str, what: str) -> Datatype:
    if name == "BYTES":
        raise RequestInvalid(
            f"{what} has datatype BYTES, which BlockFlow does not serve: its blocks compute on "
            "numbers. Encode strings and images as numbers first"
        )
    datatype = _BY_NAME.get(name)
    if datatype is None:
        raise RequestInvalid(
            f"{what} has unknown datatype {_shown(name)}; the known ones are {', '.join(_BY_NAME)}"
        )
    return datatype


def _agreed_rows(tensor: _Tensor, port: Port, rows: int | None) -> int | None:
    """The batch size after `tensor` was held against its port; `rows` is what came before it."""
    fits = len(tensor.shape) == len(port.shape) and all(
        expected in (BATCH, got) for expected, got in zip(port.shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, port.shape))
        raise RequestInvalid(
            f"input {_shown(port.name)} has shape {_shape(tensor.shape)}; expected [{wanted}]"
        )
    for expected, got in zip(port.shape, tensor.shape, strict=True):
        if expected != BATCH:
            continue
        if rows is not None and got != rows:
            raise RequestInvalid(
                f"input {_shown(port.name)} has a batch of {got}, other inputs one of {rows}; "
                "all must agree"
            )
        rows = got
    return rows


def _requested_outputs(
    request: _Request, parameters: _Parameters, model: ModelMetadata
) -> tuple[RequestedOutput, ...]:
    default = _flag(parameters, "binary_data_output", "the request") or False
    if not request.outputs:
        return tuple(RequestedOutput(port.name, default) for port in model.outputs)
    known = [port.name for port in model.outputs]
    wanted: dict[str, RequestedOutput] = {}
    for output in request.outputs:
        what = f"output {_shown(output.name)}"
        if output.name not in known:
            raise RequestInvalid(
                f"{what} is unknown: model {model.name!r} answers with {_listed(known)}"
            )
        if output.name in wanted:
            raise RequestInvalid(f"{what} is requested twice")
        own = output.parameters or {}
        _refuse_unsupported(own, what)
        binary = _flag(own, "binary_data", what)
        wanted[output.name] = RequestedOutput(output.name, default if binary is None else binary)
    return tuple(wanted.values())


def _timeout_seconds(parameters: _Parameters) -> float | None:
    """The `timeout` parameter, microseconds as in Triton, in seconds."""
    value = parameters.get("timeout")
    if value is None:
        return None
    # bool is an int to Python. The upper bound keeps out integers that no float can hold.
    if isinstance(value, bool | str) or not 0 < value <= _INT64_MAX:
        raise RequestInvalid(
            "the request's parameter 'timeout' must be a positive number of microseconds"
        )
    return value / 1e6


_TIMING = "timing."
_FIGURES = BlockTiming._fields[1:]


def _timing_parameters(timings: Timings) -> dict[str, float]:
    """Flat, because the protocol's parameters are scalars; in microseconds' precision."""
    found = {f"{_TIMING}total_ms": round(timings.total_ms, 3)}
    for each in timings.blocks:
        for figure in _FIGURES:
            found[f"{_TIMING}{each.block}.{figure}"] = round(getattr(each, figure), 3)
    return found


def _timings_in(parameters: _Parameters) -> Timings | None:
    """The timings among an answer's parameters; None where there are none, or not all of them."""
    total: float | None = None
    blocks: dict[str, dict[str, float]] = {}
    for name, value in parameters.items():
        if not name.startswith(_TIMING) or not isinstance(value, int | float):
            continue
        # A block's name may have dots.
        block, _, figure = name.removeprefix(_TIMING).rpartition(".")
        if not block and figure == "total_ms":
            total = float(value)
        elif figure in _FIGURES:
            blocks.setdefault(block, {})[figure] = float(value)
    if total is None or any(len(figures) < len(_FIGURES) for figures in blocks.values()):
        return None
    return Timings(total, tuple(BlockTiming(block, **known) for block, known in blocks.items()))


def _flag(parameters: _Parameters, name: str, what: str) -> bool | None:
    value = parameters.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise RequestInvalid(f"parameter {name!r} of {what} must be true or false")


def _refuse_unsupported(parameters: _Parameters, what: str) -> None:
    for name in ("shared_memory_region", "classification"):
        if parameters.get(name) is not None:
            raise RequestInvalid(
                f"{what} asks for {name!r}, an extension that this server does not offer "
                "(see 'extensions' in GET /v2)"
            )


# --- Tensor data --------------------------------------------------------------------------------


def _values(
    tensors: Sequence[_Tensor], head: memoryview, tail: memoryview | None, side: str
) -> dict[str, TensorValue]:
    """Every tensor with its bytes, by name; uses up the binary data to the last byte."""
    values: dict[str, TensorValue] = {}
    start = 0
    for tensor in tensors:
        what = f"{side} {_shown(tensor.name)}"
        datatype = _datatype_named(tensor.datatype, what)
        shape = tuple(tensor.shape)
        if len(shape) > _MOST_DIMENSIONS:
            raise RequestInvalid(
                f"{what} has {len(shape)} dimensions; {_MOST_DIMENSIONS} are the most"
            )
        own = tensor.parameters or {}
        _refuse_unsupported(own, what)
        size = own.get("binary_data_size")
        text = bytes(tensor.data)
        if size is None:
            data = _from_json(text, datatype, shape, what)
        else:
            if text not in (b"", b"null"):
                raise RequestInvalid(f"{what} has both 'data' and 'binary_data_size'; give one")
            data = _from_binary(size, tail, start, datatype, shape, what)
            start += data.nbytes
        values[tensor.name] = TensorValue(tensor.name, datatype.dtype, shape, data)
    if tail is not None and start != len(tail):
        raise RequestInvalid(
            f"{len(tail)} bytes of binary data follow the JSON of {len(head)} bytes, but the "
            f"{side}s' 'binary_data_size' add up to {start}"
        )
    return values


def _from_binary(
    size: object,
    tail: memoryview | None,
    start: int,
    datatype: Datatype,
    shape: tuple[int, ...],
    what: str,
) -> memoryview:
    if tail is None:
        raise RequestInvalid(
            f"{what} has 'binary_data_size', which needs the HTTP header {HEADER_LENGTH}"
        )
    if type(size) is not int:
        raise RequestInvalid(f"parameter 'binary_data_size' of {what} must be a number of bytes")
    expected = math.prod(shape) * datatype.itemsize
    if size != expected:
        raise RequestInvalid(
            f"{what} has a 'binary_data_size' that does not match: {datatype.name} "
            f"{_shape(shape)} takes {expected} bytes"
        )
    data = tail[start : start + expected]
    if len(data) < expected:
        raise RequestInvalid(
            f"the binary data of {what} is cut short: expected {expected} bytes, got {len(data)}"
        )
    # A bool with any other bit set is undefined behaviour in the C++ that will read it.
    if datatype.name == "BOOL" and data and np.frombuffer(data, np.uint8).max() > 1:
        raise RequestInvalid(f"the binary data of {what} is BOOL and has bytes other than 0 and 1")
    return data


_NESTED = re.compile(rb"\[\s*\[")


def _from_json(text: bytes, datatype: Datatype, shape: tuple[int, ...], what: str) -> memoryview:
    """The bytes of a tensor that was written as a JSON array, flat or nested like its shape."""
    if text in (b"", b"null"):
        raise RequestInvalid(f"{what} has no data: neither 'data' nor 'binary_data_size'")
    if not text.startswith(b"["):
        raise RequestInvalid(f"'data' of {what} must be an array")
    # Counted before anything is parsed: a short text of numbers becomes many times its size in
    # Python objects, and a body of the wrong length shall not get that memory. A rectangular
    # nest has as many commas as a flat array.
    elements = math.prod(shape)
    count = text.count(b",") + 1
    if count != elements and not (elements == 0 and count == 1):
        raise RequestInvalid(
            f"'data' of {what} has {count} elements; shape {_shape(shape)} takes {elements}"
        )
    depth = len(shape) if len(shape) > 1 and _NESTED.match(text) else 1
    try:
        values = _array_decoder(datatype.name, depth).decode(text)
    except msgspec.ValidationError as error:
        raise RequestInvalid(
            f"'data' of {what} does not hold {datatype.name} values: {error}"
        ) from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RequestInvalid(f"'data' of {what} cannot be read: {error}") from None
    return _packed(values, datatype, shape if depth > 1 else (elements,), what)


@functools.lru_cache(maxsize=len(DATATYPES) * (_MOST_DIMENSIONS + 1))
def _array_decoder(datatype: str, depth: int) -> msgspec.json.Decoder[Any]:
    """A decoder of `depth` nested arrays that refuses every value of the wrong kind or range.

    Floating-point types take integers too; no type takes a bool for a number or 1.0 for an integer.
    """
    dtype = _BY_NAME[datatype].numpy
    element: Any
    if datatype == "BOOL":
        element = bool
    elif datatype in _FLOATING:
        element = float
    elif datatype == "UINT64":
        # msgspec takes no bound above int64; `_packed` sees to the upper one.
        element = Annotated[int, msgspec.Meta(ge=0)]
    else:
        bounds = np.iinfo(dtype)
        element = Annotated[int, msgspec.Meta(ge=int(bounds.min), le=int(bounds.max))]
    for _ in range(depth):
        element = types.GenericAlias(list, (element,))
    return msgspec.json.Decoder(element)


def _packed(values: list[Any], datatype: Datatype, shape: tuple[int, ...], what: str) -> memoryview:
    try:
        array = np.array(values, np.float64 if datatype.name in _FLOATING else datatype.numpy)
    except OverflowError:
        raise RequestInvalid(
            f"'data' of {what} has a number that {datatype.name} cannot hold"
        ) from None
    except ValueError:
        raise RequestInvalid(
            f"'data' of {what} is ragged: its inner arrays differ in length; expected "
            f"{_shape(shape)}"
        ) from None
    if array.shape != shape:
        raise RequestInvalid(
            f"'data' of {what} is nested as {_shape(array.shape)}; expected {_shape(shape)} or flat"
        )
    if datatype.name in _FLOATING:
        with np.errstate(over="ignore"):
            narrow = array.astype(np.float32 if datatype.name == "BF16" else datatype.numpy)
        if datatype.name == "BF16":
            # The float32's nearest bfloat16, ties to even: add just under half of the last kept
            # bit, or exactly half if that bit is odd. That carries into infinity at most.
            bits = narrow.view(np.uint32)
            rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            packed = (rounded >> np.uint32(16)).astype(datatype.numpy)
            finite = bool(((packed & 0x7F80) != 0x7F80).all())
        else:
            packed = narrow
            finite = bool(np.isfinite(narrow).all())
        # JSON numbers are finite, so an infinity is one that did not fit.
        if not finite:
            raise RequestInvalid(f"'data' of {what} has a number that {datatype.name} cannot hold")
        array = packed
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _json_numbers(tensor: TensorValue) -> list[Any]:
    array = tensor.numpy()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise RequestInvalid(
            f"output {tensor.name!r} holds NaN or infinity, which JSON cannot say: "
            "request this output with 'binary_data': true"
        )
    numbers: list[Any] = array.ravel().tolist()
    return numbers


# --- What clients wrote, shown to them in messages of bounded length ----------------------------


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "…")


def _shape(shape: Sequence[int]) -> str:
    shown = ", ".join(map(str, shape[:8]))
    return f"[{shown}]" if len(shape) <= 8 else f"[{shown}, …] ({len(shape)} dimensions)"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
