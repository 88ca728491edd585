"""Strange requests: from the management API's OpenAPI document, and mutated inference bodies."""

from __future__ import annotations

import copy
import http.client
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case
from schemathesis.generation import GenerationMode

from blockflow import oip

Ask = Callable[[Case], "Answer"]

ENDLESS = "/v1/events"
"""It streams until the client goes, and is asked apart from the rest."""


# An upload's body is bytes like any other to the fuzzer.
schemathesis.serializer.alias("application/x-tar", "application/octet-stream")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    """By their names in lower case."""
    body: bytes


@dataclass
class Findings:
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def judge(self, what: str, answer: Answer) -> None:
        """Only overload and not being ready are the server's to refuse, and both end."""
        self.statuses[answer.status] += 1
        later = answer.status in {429, 503} and int(answer.headers.get("retry-after", "0")) >= 1
        if answer.status >= 500 and not later:
            self.faults.append(f"{what}: {answer.status} {answer.body[:300]!r}")
        elif answer.status == 429 and not later:
            self.faults.append(f"{what}: no Retry-After")
        elif answer.status >= 400 and not _says_why(answer.body):
            self.faults.append(f"{what}: {answer.status} without a reason: {answer.body[:300]!r}")


def _says_why(body: bytes) -> bool:
    try:
        return bool(json.loads(body)["error"])
    except (ValueError, TypeError, KeyError):
        return False


def fuzz_rest(
    document: dict[str, Any], ask: Ask, cases: int, findings: Findings, *, number: int = 0
) -> None:
    """Ask every operation of an OpenAPI document `cases` times, half of them against its schema."""
    schema = schemathesis.openapi.from_dict(document)
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path == ENDLESS:
            continue
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
            _fuzz_operation(operation, mode, ask, cases // 2, findings, number)


def _fuzz_operation(
    operation: Any, mode: GenerationMode, ask: Ask, cases: int, findings: Findings, number: int
) -> None:
    @seed(number)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def one(case: Case) -> None:
        findings.judge(f"{mode.value} {case.method} {case.formatted_path}", ask(case))

    try:
        one()
    except Unsatisfiable:
        # What takes nothing cannot be given anything against its schema.
        if mode is GenerationMode.POSITIVE:
            raise


WEIRD: Sequence[Any] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -0.0, 0.5),
    *("", "x", "FP32", "BYTES", "\x00", "\ud800", "é" * 300, "9" * 5000, [], {}, [[]], [None]),
    *([1, [2, [3]]], {"x": {}}, [0] * 1000, [-1, -1], [2**40, 2**40], [1, 16, 1], [0, 16]),
)


def infer_bodies(randomly: random.Random) -> Iterator[tuple[bytes, dict[str, str]]]:
    """Bodies and headers of inference requests for `x` float32[batch, 16], most of them spoilt."""
    while True:
        rows = randomly.choice([1, 1, 2, 7])
        x = np.zeros((rows, 16), np.float32)
        plain = {
            "id": "one",
            "parameters": {"timeout": 5_000_000, "binary_data_output": randomly.random() < 0.5},
            "inputs": [
                {"name": "x", "shape": [rows, 16], "datatype": "FP32", "data": x.ravel().tolist()}
            ],
            "outputs": [{"name": "output", "parameters": {"binary_data": False}}],
        }
        if randomly.random() < 0.5:
            for _ in range(randomly.choice([0, 1, 1, 2, 5])):
                _spoil(plain, randomly)
            body = json.dumps(plain).encode("utf-8", "surrogatepass")
            headers = {"Content-Type": "application/json"}
        else:
            encoded = oip.encode_request([oip.TensorValue.from_numpy("x", x)], timeout=5.0)
            body = b"".join(encoded.chunks)
            headers = {k: v for k, v in encoded.headers.items() if k != "Content-Length"}
        if randomly.random() < 0.5:
            body = _garble(body, randomly)
        if randomly.random() < 0.2:
            headers[oip.HEADER_LENGTH] = randomly.choice(
                ["0", "-1", "1", "x", "1e3", " 7", "99999999999999999999", str(len(body)), ""]
            )
        if randomly.random() < 0.05:
            headers["Content-Encoding"] = randomly.choice(["gzip", "identity", "br", "\xff"])
        yield body, headers


def _spoil(value: Any, randomly: random.Random) -> None:
    """Put something strange somewhere into a JSON value."""
    while True:
        keys: Sequence[Any] = list(value) if isinstance(value, dict) else range(len(value))
        key = randomly.choice(keys) if keys else None
        if key is None:
            return
        if isinstance(value[key], dict | list) and value[key] and randomly.random() < 0.7:
            value = value[key]
            continue
        if isinstance(value, dict) and randomly.random() < 0.3:
            moved = value.pop(key)
            if randomly.random() < 0.5:
                value[randomly.choice(["", "name", "data", "shape", "parameters"])] = moved
        else:
            value[key] = copy.deepcopy(randomly.choice(WEIRD))
        return


def _garble(body: bytes, randomly: random.Random) -> bytes:
    spoilt = bytearray(body)
    for _ in range(randomly.choice([1, 1, 3, 20])):
        at = randomly.randrange(len(spoilt) + 1)
        length = randomly.choice([1, 1, 4, 100])
        match randomly.randrange(4):
            case 0:
                spoilt[at : at + length] = randomly.randbytes(len(spoilt[at : at + length]))
            case 1:
                del spoilt[at : at + length]
            case 2:
                spoilt[at:at] = spoilt[at : at + length]
            case _:
                spoilt[at:at] = randomly.randbytes(length)
    return bytes(spoilt)


def fuzz_infer(port: int, model: str, cases: int, findings: Findings, *, number: int = 0) -> None:
    """Send mutated bodies, one after the other; whatever takes longer than 20 s is a fault."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    bodies = infer_bodies(random.Random(number))
    for index in range(cases):
        body, headers = next(bodies)
        what = f"body {number}/{index}"
        try:
            connection.request("POST", f"/v2/models/{model}/infer", body, headers)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            findings.judge(what, Answer(response.status, found, response.read()))
        except (OSError, http.client.HTTPException) as error:
            findings.faults.append(f"{what}: {type(error).__name__}: {error}")
            connection.close()
    connection.close()
