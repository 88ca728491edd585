from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from blockflow.api import create_app
from blockflow.errors import StartFailed, TopologyInvalid
from blockflow.status import BlockState
from blockflow.topology import MAX_BYTES, Topology, dump
from fake_controller import DIGEST, WANTED, FakeController


class Http:
    """A client of the app, as a program on the same host is one."""

    def __init__(self, controller: FakeController) -> None:
        self._app = create_app(controller)

    def __call__(self, method: str, path: str, **request: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1:8080"
            ) as client:
                return await client.request(method, path, **request)

        return asyncio.run(send())

    def put_yaml(self, text: str | bytes, **request: Any) -> httpx.Response:
        headers = {"content-type": "application/yaml"}
        return self("PUT", "/v1/topology", content=text, headers=headers, **request)


@pytest.fixture
def controller() -> FakeController:
    return FakeController()


@pytest.fixture
def http(controller: FakeController) -> Http:
    return Http(controller)


def failure(response: httpx.Response, status: int) -> tuple[str, list[str]]:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error", "problems"}
    return response.json()["error"], response.json()["problems"]


@pytest.mark.parametrize(
    "content_type",
    ["application/yaml", "application/x-yaml", "text/yaml; charset=utf-8", None],
)
def test_put_takes_yaml(http: Http, controller: FakeController, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = http("PUT", "/v1/topology", content=dump(WANTED).encode(), headers=headers)
    assert response.status_code == 200
    assert response.json() == {
        "generation": 1,
        "dry_run": False,
        "keep": [],
        "start": ["a", "b"],
        "stop": [],
        "actions": ["start worker a", "start worker b"],
    }
    assert controller.current == WANTED


def test_put_takes_json(http: Http, controller: FakeController) -> None:
    assert http("PUT", "/v1/topology", json=WANTED.model_dump(mode="json")).status_code == 200
    assert controller.current == WANTED


def test_a_dry_run_changes_nothing(http: Http, controller: FakeController) -> None:
    response = http.put_yaml(dump(WANTED), params={"dry_run": "true"})
    assert (response.json()["dry_run"], response.json()["start"]) == (True, ["a", "b"])
    assert controller.current == Topology()


def test_get_gives_back_what_was_put(http: Http) -> None:
    assert http("GET", "/v1/topology").json() == {
        "generation": 0,
        "topology": {"store": None, "blocks": {}, "pipelines": {}, "devices": {}},
    }
    http.put_yaml(dump(WANTED))
    current = http("GET", "/v1/topology").json()
    assert current["generation"] == 1
    assert Topology.model_validate(current["topology"]) == WANTED
    again = http("PUT", "/v1/topology", json=current["topology"])
    assert again.json()["keep"] == ["a", "b"]


def test_an_empty_topology_removes_everything(http: Http) -> None:
    http.put_yaml(dump(WANTED))
    assert http.put_yaml("{}").json()["stop"] == ["a", "b"]


@pytest.mark.parametrize("body", [b"{", b"", b"\xff", b"[1]", b"blocks: {a: {}}"])
@pytest.mark.parametrize("kind", ["application/yaml", "application/json"])
def test_a_body_that_is_no_topology_is_422_with_problems(
    http: Http, body: bytes, kind: str
) -> None:
    response = http("PUT", "/v1/topology", content=body, headers={"content-type": kind})
    error, found = failure(response, 422)
    assert error.startswith("the topology has 1 problem")
    assert len(found) == 1


def test_every_problem_is_answered(http: Http, controller: FakeController) -> None:
    _, found = failure(http.put_yaml("blocks: {a: {}, b: {device: gpu}}\nextra: 1"), 422)
    assert len(found) == 4
    controller.error = TopologyInvalid(["block a: there is no device", "pipeline p: no block"])
    _, found = failure(http.put_yaml("{}"), 422)
    assert found == ["block a: there is no device", "pipeline p: no block"]


def test_a_large_body_is_413(http: Http, controller: FakeController) -> None:
    error, _ = failure(http.put_yaml(b"#" * (MAX_BYTES + 1)), 413)
    assert str(MAX_BYTES) in error
    assert http.put_yaml(b"{}" + b" " * (MAX_BYTES - 2)).status_code == 200


def test_a_large_body_is_not_read_to_its_end() -> None:
    chunks = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal chunks
        while True:
            chunks += 1
            assert chunks < 100
            yield b"#" * (MAX_BYTES // 4)

    failure(Http(FakeController())("PUT", "/v1/topology", content=endless()), 413)


def test_another_content_type_is_415(http: Http) -> None:
    response = http("PUT", "/v1/topology", content=b"{}", headers={"content-type": "text/html"})
    error, _ = failure(response, 415)
    assert "text/html" in error


def test_a_start_that_failed_says_why(http: Http, controller: FakeController) -> None:
    controller.error = StartFailed("worker a: out of memory; generation 3 keeps serving")
    error, _ = failure(http.put_yaml("{}"), 500)
    assert error == "worker a: out of memory; generation 3 keeps serving"


def test_a_bug_answers_without_its_insides(http: Http, controller: FakeController) -> None:
    controller.error = RuntimeError("secret")
    error, _ = failure(http.put_yaml("{}"), 500)
    assert "RuntimeError" in error
    assert "secret" not in error


def test_errors_of_the_framework_have_the_same_form(http: Http) -> None:
    failure(http("GET", "/nowhere"), 404)
    failure(http("DELETE", "/v1/topology"), 405)
    _, found = failure(http.put_yaml("{}", params={"dry_run": "perhaps"}), 422)
    assert found[0].startswith("query.dry_run: ")


@pytest.mark.parametrize(
    ("kind", "name", "settings", "change"),
    [
        ("blocks", "new", {"artifact": DIGEST}, {"max_batch": 4}),
        ("pipelines", "q", {"blocks": ["a"]}, {"blocks": ["b"]}),
    ],
)
def test_one_member_is_deployed_configured_and_deleted(
    http: Http,
    controller: FakeController,
    kind: str,
    name: str,
    settings: dict[str, Any],
    change: dict[str, Any],
) -> None:
    controller.current = WANTED
    path = f"/v1/{kind}/{name}"
    failure(http("PATCH", path, json=change), 404)
    failure(http("DELETE", path), 404)
    _, problems = failure(http("POST", path, json={**settings, "bogus": 1}), 422)
    assert problems[0].startswith(f"{kind}.{name}.bogus: is not a known setting")
    failure(http("POST", path, content=b"[1]"), 422)
    assert http("POST", path, json=settings, params={"dry_run": True}).json()["generation"] == 0
    assert http("POST", path, json=settings).json()["generation"] == 1
    error, _ = failure(http("POST", path, json=settings), 409)
    assert "already" in error
    failure(http("PATCH", path, json=change, headers={"if-match": '"7"'}), 412)
    assert http("PATCH", path, json=change).json()["generation"] == 2
    member = controller.current.model_dump(mode="json")[kind][name]
    assert {setting: member[setting] for setting in change} == change
    assert http("DELETE", path).json()["generation"] == 3
    assert controller.current == WANTED
    failure(http("POST", f"/v1/{kind}/no spaces", json=settings), 422)


def test_blocks_and_pipelines_are_listed(http: Http, controller: FakeController) -> None:
    controller.current = WANTED
    assert http("GET", "/v1/blocks").json()[0] == {
        "name": "a",
        "artifact": DIGEST,
        "device": "cpu",
        "worker": "a",
        "pid": 42,
        "state": "ready",
        "reason": None,
        "restarts": 0,
        "device_memory_bytes": None,
        "host_memory_bytes": None,
        "requests": 3,
        "requests_by_pipeline": {"p": 3},
        "queued": 0,
        "incomplete": 0,
        "batch_sizes": None,
        "compute_seconds": None,
        "queue_seconds": None,
        "hop_seconds": None,
        "compute_ms_mean": 1.5,
        "queue_ms_mean": None,
        "runner": None,
        "runner_reason": None,
        "fused_into": None,
        "channels": [
            {"peer": "b", "carrier": "shm", "messages": 3, "bytes": 3072, "host_bytes": 0}
        ],
    }
    (pipeline,) = http("GET", "/v1/pipelines").json()
    assert (pipeline["name"], pipeline["blocks"], pipeline["ready"]) == ("p", ["a", "b"], True)
    gateway = http("GET", "/v1/gateway").json()
    assert (gateway["pid"], gateway["ready"]) == (43, True)
    assert [channel["peer"] for channel in gateway["channels"]] == ["a"]


def test_devices_are_listed(http: Http) -> None:
    answer = http("GET", "/v1/devices").json()
    assert answer["devices"][0]["name"] == "cpu"
    assert "problem" in answer


def test_alive_is_not_ready(http: Http, controller: FakeController) -> None:
    controller.current = WANTED
    controller.states = {"b": (BlockState.FAILED, "exit code 1"), "a": (BlockState.STARTING, None)}
    assert http("GET", "/healthz").json() == {"status": "ok"}
    _, found = failure(http("GET", "/readyz"), 503)
    assert found == [
        "pipeline p is not ready: waits for a, b",
    ]


def test_ready_when_everything_serves(http: Http, controller: FakeController) -> None:
    assert http("GET", "/readyz").status_code == 200
    controller.current = Topology(blocks=WANTED.blocks)
    controller.states = {"b": (BlockState.DRAINING, None)}
    assert http("GET", "/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]", "[::1]:8080", "LOCALHOST"]
)
def test_this_host_is_answered(http: Http, host: str) -> None:
    assert http("GET", "/v1/topology", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "user@evil.example",
        "localhost@evil.example",
        "10.0.0.1",
        "0.0.0.0",  # noqa: S104
        "[::1",
        "",
    ],
)
def test_a_name_that_was_rebound_to_this_host_is_refused(http: Http, host: str) -> None:
    failure(http("GET", "/v1/topology", headers={"host": host}), 403)


def test_two_host_headers_are_refused(http: Http) -> None:
    headers = [("host", "localhost"), ("host", "evil.example")]
    failure(http("GET", "/v1/topology", headers=headers), 403)


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8080", ""],
)
def test_a_page_of_another_origin_is_refused(
    http: Http, controller: FakeController, origin: str
) -> None:
    controller.current = WANTED
    response = http("PUT", "/v1/topology", content=b"{}", headers={"origin": origin})
    failure(response, 403)
    assert controller.current == WANTED


def test_a_page_of_this_server_may_use_it(http: Http) -> None:
    headers = {"origin": "http://127.0.0.1:8080"}
    assert http("PUT", "/v1/topology", content=b"{}", headers=headers).status_code == 200


def test_the_api_describes_itself(http: Http) -> None:
    assert "swagger" in http("GET", "/docs").text.lower()
    described = http("GET", "/openapi.json").json()
    assert set(described["paths"]) == {
        "/v1/topology",
        "/v1/topology/history",
        "/v1/topology/history/{generation}",
        "/v1/topology/rollback",
        "/v1/blocks",
        "/v1/blocks/{name}",
        "/v1/blocks/{name}/logs",
        "/v1/blocks/{name}/restart",
        "/v1/pipelines",
        "/v1/pipelines/{name}",
        "/v1/gateway",
        "/v1/events",
        "/v1/devices",
        "/v1/artifacts/{digest}",
        "/metrics",
        "/healthz",
        "/readyz",
    }
    body = described["paths"]["/v1/topology"]["put"]["requestBody"]["content"]
    reference = body["application/yaml"]["schema"]["$ref"].removeprefix("#/components/schemas/")
    assert set(described["components"]["schemas"][reference]["properties"]) == {
        "store",
        "blocks",
        "pipelines",
        "devices",
    }
