"""Strange requests get an answer that says what is wrong with them, soon, and leave nothing behind.

`benchmarks/fuzz.py` does the same with many more of them, on a whole server.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import httpx
import pytest
from schemathesis import Case

from blockflow.api import create_app
from blockflow.artifact import Store
from blockflow.client import InferenceClient
from fake_controller import WANTED, FakeController
from fuzzing import Answer, Findings, fuzz_infer, fuzz_rest
from running import Mlp, Server, some_rows, store_model, topology

pytestmark = [pytest.mark.slow]


def test_the_management_api_answers_whatever_is_asked() -> None:
    controller = FakeController()
    controller.current = WANTED
    app = create_app(controller)
    findings = Findings()

    def ask(case: Case) -> Answer:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport) as client:
                sent = case.as_transport_kwargs(base_url="http://127.0.0.1:8080")
                return await client.request(
                    sent["method"],
                    sent["url"],
                    params=sent.get("params"),
                    headers={**sent["headers"], "host": "127.0.0.1:8080"},
                    **({"json": sent["json"]} if "json" in sent else {"content": sent.get("data")}),
                )

        response = asyncio.run(send())
        return Answer(response.status_code, dict(response.headers), response.content)

    fuzz_rest(app.openapi(), ask, 20, findings)
    assert findings.faults == []
    assert {200, 422} <= findings.statuses.keys()
    assert findings.statuses.total() >= 200


@pytest.mark.timeout(180)
def test_mutated_bodies_are_answered_and_hold_no_slots(run_dir: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store", create=True)
    wanted = topology(store.root, {"a": {"one": store_model(store, Mlp(), 1)[0]}})
    depth = 4
    with Server(run_dir, wanted, "--queue-depth", str(depth)) as server:
        server.wait_ready()
        findings = Findings()
        fuzz_infer(server.http_port, "a", 1500, findings)
        assert findings.faults == []
        assert findings.statuses[200] > 100
        assert findings.statuses[400] > 500
        assert_every_slot_is_free(server, depth)


def assert_every_slot_is_free(server: Server, depth: int) -> None:
    shapes: list[tuple[int, ...]] = []

    def call() -> None:
        with InferenceClient(f"http://127.0.0.1:{server.http_port}", timeout=20) as client:
            shapes.append(client.infer("a", {"x": some_rows()})["output"].shape)

    threads = [threading.Thread(target=call) for _ in range(depth)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shapes == [(1, 4)] * depth
