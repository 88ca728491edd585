from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from blockflow.child import LOG_FORMAT, start_logging
from blockflow.requestlog import LogRequests

_log = logging.getLogger("test")


async def _work(request: Request) -> PlainTextResponse:
    await asyncio.sleep(0.01)
    _log.info("at work")
    return PlainTextResponse("done", int(request.query_params.get("status", "200")))


async def _ask(*requests: tuple[str, dict[str, str]]) -> list[httpx.Response]:
    transport = httpx.ASGITransport(LogRequests(Starlette(routes=[Route("/work", _work)])))
    async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
        asked = (client.get(path, headers=headers) for path, headers in requests)
        return list(await asyncio.gather(*asked))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is logged as JSON meanwhile."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    monkeypatch.setenv(LOG_FORMAT, "json")
    text = io.StringIO()
    monkeypatch.setattr("sys.stderr", text)
    start_logging("gateway", "info")
    yield text
    root.handlers[:], root.level = before[0], before[1]


def test_records_carry_the_id_of_their_request(written: io.StringIO) -> None:
    asked = [("/work", {"x-request-id": f"mine-{number}"}) for number in range(3)]
    answers = asyncio.run(_ask(*asked, ("/work?status=500", {"x-request-id": "bad"})))
    assert [a.headers["x-request-id"] for a in answers] == ["mine-0", "mine-1", "mine-2", "bad"]
    records = [json.loads(line) for line in written.getvalue().splitlines()]
    at_work = [record["request"] for record in records if record["message"] == "at work"]
    assert sorted(at_work) == ["bad", "mine-0", "mine-1", "mine-2"]
    (failed,) = [record for record in records if record["level"] == "warning"]
    assert (failed["request"], failed["status"]) == ("bad", 500)
    assert failed["milliseconds"] >= 10


@pytest.mark.parametrize("given", ["", "two words", "x" * 200, 'a"b'])
def test_an_id_that_cannot_be_one_is_replaced(given: str) -> None:
    (answer,) = asyncio.run(_ask(("/work", {"x-request-id": given})))
    assert len(answer.headers["x-request-id"]) == 16
