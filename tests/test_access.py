"""Tokens in files, and the middleware that asks for them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from blockflow.access import read_token, require_token
from blockflow.api import create_app
from blockflow.errors import InvalidInput
from blockflow.options import ServeOptions
from fake_controller import FakeController

TOKEN = "correct-horse-battery"  # noqa: S105


def token_file(directory: Path, content: str | bytes = TOKEN + "\n", mode: int = 0o600) -> Path:
    path = directory / "token"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)
    return path


def test_a_token_is_read_without_the_space_around_it(tmp_path: Path) -> None:
    assert read_token(token_file(tmp_path, f"  {TOKEN}\n")) == TOKEN
    assert read_token(token_file(tmp_path, mode=0o400)) == TOKEN


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o610])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(InvalidInput, match="chmod 600"):
        read_token(token_file(tmp_path, mode=mode))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "16 to 4096"),
        ("short", "16 to 4096"),
        (" " * 40, "16 to 4096"),
        ("x" * 5000, "16 to 4096"),
        ("two words are not one", "one line"),
        ("a-line-of-a-token\nand-another-one", "one line"),
        ("contraseña-muy-larga", "letters, digits"),
        (b"\xff" * 20, "letters, digits"),
    ],
)
def test_what_is_no_token_is_refused_and_not_repeated(
    tmp_path: Path, content: str | bytes, words: str
) -> None:
    with pytest.raises(InvalidInput, match=words) as refused:
        read_token(token_file(tmp_path, content))
    if isinstance(content, str) and content.strip():
        assert content.strip() not in str(refused.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no file"):
        read_token(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_token(tmp_path / "missing")


async def _hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": f"{scope['type']}.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def ask(app: Any, path: str = "/", **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://example:1") as client:
            return await client.get(path, **request)

    return asyncio.run(send())


@pytest.mark.parametrize("given", [f"Bearer {TOKEN}", f"bearer  {TOKEN} ", f"BEARER {TOKEN}"])
def test_who_knows_the_token_is_answered(given: str) -> None:
    app = require_token(_hello, TOKEN)
    assert ask(app, headers={"authorization": given}).text == "hello"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "")],
        [("authorization", TOKEN)],
        [("authorization", f"Basic {TOKEN}")],
        [("authorization", "Bearer")],
        [("authorization", f"Bearer {TOKEN[:-1]}")],
        [("authorization", f"Bearer {TOKEN}x")],
        [("authorization", "Bearer \xff")],
        [("authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {TOKEN}")],
        [("cookie", f"token={TOKEN}")],
    ],
)
def test_who_does_not_is_refused(headers: list[tuple[str, str]]) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    response = ask(require_token(_hello, TOKEN), headers=raw)
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert "--token-file" in response.json()["error"]
    assert TOKEN not in response.text


def test_a_token_in_the_address_is_none() -> None:
    # Addresses end up in logs and histories.
    assert ask(require_token(_hello, TOKEN), f"/?token={TOKEN}").status_code == 401


def test_open_paths_are_open_exactly() -> None:
    app = require_token(_hello, TOKEN, {"/healthz"})
    assert ask(app, "/healthz").text == "hello"
    assert ask(app, "/healthz?x=1").text == "hello"
    for path in ("/healthz/", "/Healthz", "/healthz/../v1/topology", "//healthz"):
        assert ask(app, path).status_code == 401


def test_websockets_are_closed() -> None:
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    app = require_token(_hello, TOKEN, {"/"})
    asyncio.run(app({"type": "websocket", "path": "/", "headers": []}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_the_management_api_with_a_token() -> None:
    app = create_app(FakeController(), TOKEN)
    secret = {"authorization": f"Bearer {TOKEN}"}
    assert ask(app, "/v1/topology").status_code == 401
    assert ask(app, "/openapi.json").status_code == 401
    assert ask(app, "/metrics").status_code == 401
    assert ask(app, "/healthz").json() == {"status": "ok"}
    assert ask(app, "/v1/topology", headers=secret).json()["generation"] == 0
    # The page asks for the token itself, so it must come without one.
    assert ask(app, "/").status_code == 200
    described = ask(app, "/openapi.json", headers=secret).json()
    assert described["security"] == [{"token": []}]
    assert described["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert described["paths"]["/healthz"]["get"]["security"] == []


def test_others_are_let_in_only_with_tokens(tmp_path: Path) -> None:
    token = token_file(tmp_path)
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):  # noqa: S104
        for given in ({}, {"token_file": token}, {"inference_token_file": token}):
            with pytest.raises(ValidationError, match=r"not a loopback address.*token-file"):
                ServeOptions(host=host, **given)
        ServeOptions(host=host, token_file=token, inference_token_file=token)


def test_a_certificate_needs_its_key(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="--tls-key"):
        ServeOptions(tls_cert=tmp_path / "cert.pem")
