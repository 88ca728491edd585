"""The page: its answers, and the page itself in a real browser against a real server."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import psutil
import pytest
import uvicorn
import yaml
from selenium import webdriver
from selenium.common.exceptions import JavascriptException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from blockflow import dashboard, wiring
from blockflow import topology as topology_file
from blockflow.api import create_app
from blockflow.artifact import Store
from blockflow.devices import Device, Survey
from blockflow.errors import StartFailed
from blockflow.status import BlockState
from blockflow.topology import Block, Pipeline, Topology
from fake_controller import DIGEST, WANTED, FakeController
from running import Mlp, Server, store_model, topology, wait_for

# The answers


def get(path: str) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(Starlette(routes=dashboard.routes()))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get(path)

    return asyncio.run(send())


def test_every_file_is_served_as_what_it_is() -> None:
    kinds = {route.path: get(route.path).headers["content-type"] for route in dashboard.routes()}
    assert kinds["/"] == "text/html; charset=utf-8"
    assert kinds["/dashboard/app.js"] == "text/javascript; charset=utf-8"
    assert kinds["/dashboard/style.css"] == "text/css; charset=utf-8"
    assert kinds["/dashboard/icon.svg"] == "image/svg+xml"


def test_the_page_may_load_and_reach_nothing_but_its_server() -> None:
    policy = dict(
        directive.split(" ", 1)
        for directive in get("/").headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert policy["frame-ancestors"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"


def test_no_file_names_another_host_or_makes_markup_of_text() -> None:
    for route in dashboard.routes():
        text = get(route.path).text.replace("http://www.w3.org/", "")
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text
        assert "insertAdjacentHTML" not in text
        assert "style=" not in text


@pytest.mark.parametrize(
    "path", ["/dashboard/", "/dashboard/__init__.py", "/dashboard/../topology.py", "/dashboard/x"]
)
def test_nothing_else_is_served(path: str) -> None:
    assert get(path).status_code == 404


# In a browser


class Page:
    """The page in a Chromium of its own, as a person sees it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self._driver = driver

    def open(self, url: str, *, width: int = 1280, height: int = 900) -> None:
        self._driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        self._driver.get(url)
        self.wait(lambda: self.text("#verdict") != "connecting", "the first answers")

    def find(self, selector: str) -> WebElement:
        return self._driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What is visible of the first match."""
        return self.find(selector).text

    def texts(self, selector: str) -> list[str]:
        """Of every match, visible or not. In one step, for the page refreshes itself."""
        found: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)",
            selector,
        )
        return found

    def row(self, table: str, name: str) -> dict[str, str]:
        """The cells of a table's row by the heads of their columns."""
        found: dict[str, str] | None = self.run(
            """const table = document.querySelector(arguments[0]);
            const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
            const row = [...table.tBodies[0].rows].find((r) => r.dataset.key === arguments[1]);
            return row && Object.fromEntries(
                [...row.cells].map((cell, i) => [heads[i], cell.textContent]));""",
            table,
            name,
        )
        assert found is not None, f"{table} has no row {name}"
        return found

    def run(self, script: str, *arguments: object) -> Any:
        return self._driver.execute_script(script, *arguments)

    def module(self, name: str, expression: str, *arguments: object) -> Any:
        """The value of `expression` over `module`, one of the page's, and `given`."""
        script = f"""const [given, done] = [[...arguments].slice(0, -1), [...arguments].at(-1)];
            import("/dashboard/{name}").then((module) => done({expression}))"""
        return self._driver.execute_async_script(script, *arguments)

    def press(self, *keys: str) -> None:
        for key in keys:
            self._driver.switch_to.active_element.send_keys(key)

    @property
    def focused(self) -> WebElement:
        return self._driver.switch_to.active_element

    def wait(self, true: Callable[[], object], what: str, seconds: float = 10) -> float:
        return wait_for(lambda: bool(true()), seconds, what)

    def write(self, text: str) -> None:
        """Put `text` into the editor."""
        area = self.find("#text")
        area.clear()
        area.send_keys(text)

    def complaints(self) -> list[str]:
        """What the browser wrote to its console: errors, refusals, failed requests."""
        return [entry["message"] for entry in self._driver.get_log("browser")]

    def prefer(self, feature: str, value: str) -> None:
        self._driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": feature, "value": value}]}
        )

    def names(self) -> list[tuple[str, str]]:
        """Role and name of everything that can be operated, as a screen reader tells them."""
        tree = self._driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})
        roles = {"button", "link", "textbox", "searchbox", "table", "dialog", "image", "meter"}
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in tree["nodes"]
            if not node["ignored"] and node["role"]["value"] in roles
        ]

    def picture(self, file: Path) -> bytes:
        """The whole page, as a PNG."""
        metrics = self._driver.execute_cdp_cmd("Page.getLayoutMetrics", {})
        area = metrics["cssContentSize"]
        answer = self._driver.execute_cdp_cmd(
            "Page.captureScreenshot",
            {"captureBeyondViewport": True, "clip": {**area, "scale": 1}},
        )
        file.write_bytes(base64.b64decode(answer["data"]))
        return file.read_bytes()


@pytest.fixture
def page() -> Iterator[Page]:
    """A new browser, so that nothing of one test reaches another."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.fail(
            "the page is tested in Chromium, which is not installed: on Debian, "
            "`apt-get install chromium chromium-driver`"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    profile = tempfile.mkdtemp(prefix="bf-chromium-")
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    # A driver that is named is not looked for on the internet.
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Page(browser)
    finally:
        browser.quit()
        shutil.rmtree(profile, ignore_errors=True)


class Site:
    """The management API of a fake controller, on a port of this process.

    `earlier` are routes that answer before the API's own; `port` 0 takes a free one.
    """

    def __init__(
        self, controller: FakeController, *earlier: Route, token: str | None = None, port: int = 0
    ) -> None:
        app = create_app(controller, token)
        app.router.routes[:0] = earlier
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
        )
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._thread = threading.Thread(
            target=lambda: self._server.run(sockets=[self._listener]), name="site"
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()

    def __exit__(self, *_: object) -> None:
        self.stop()


@pytest.fixture
def controller() -> FakeController:
    controller = FakeController()
    controller.generation, controller.current = 1, WANTED
    return controller


@pytest.fixture(scope="module")
def shared(store: Store) -> dict[str, Any]:
    """Two pipelines, `one` and `two`, that share the block `trunk`."""
    trunk, first = store_model(store, Mlp(seed=0), 2)
    _, second = store_model(store, Mlp(seed=1), 2)
    return topology(
        store.root,
        {
            "one": {"trunk": trunk, "head_one": first},
            "two": {"trunk": trunk, "head_two": second},
        },
    )


@pytest.mark.slow
def test_two_pipelines_through_one_trunk(
    page: Page, shared: dict[str, Any], run_dir: Path, tmp_path: Path
) -> None:
    """A shared block is there once, both lines run through it, and requests become rates."""
    with Server(run_dir, shared) as server:
        server.wait_ready()
        page.open(f"http://127.0.0.1:{server.control_port}/")
        page.wait(lambda: page.text("#verdict") == "everything ready", "ready")
        assert page.texts("#graph .block .title .name") == ["trunk", "head_one", "head_two"]
        assert page.texts('#graph [data-block="trunk"] .row .name') == ["one", "two"]
        assert page.text('#graph [data-block="trunk"] .badge') == "shared by 2"
        assert len(page.texts("#graph .line")) == 2
        assert page.row("#blocks", "trunk")["Pipelines"] == "one, two"
        carriers = set(page.texts("#graph .hop"))
        assert "shm" in " ".join(carriers)
        # A rate needs two reports.
        page.wait(lambda: page.row("#pipelines", "one")["Requests/s"] == "0", "a first rate")

        stop = threading.Event()

        def load() -> None:
            while not stop.wait(0.02):
                server.inference.infer("one", {"x": np.zeros((1, 16), np.float32)})

        loading = threading.Thread(target=load)
        loading.start()
        try:
            page.wait(
                lambda: float(page.row("#pipelines", "one")["Requests/s"]) > 5, "a rate of requests"
            )
            # Both are of one report: what went through the trunk is what came for `one`.
            page.wait(
                lambda: page.row("#blocks", "trunk")["Compute"].endswith(" ms"), "compute time"
            )
            assert page.row("#pipelines", "two")["Requests/s"] == "0"
            page.wait(lambda: page.row("#pipelines", "one")["p50"].endswith(" ms"), "latency")
            assert page.row("#workers", worker(page))["Host memory"].endswith("MiB")
            picture = page.picture(tmp_path / "page.png")
        finally:
            stop.set()
            loading.join()
        assert len(picture) > 20_000
        assert page.complaints() == []


def worker(page: Page) -> str:
    """The key of the first worker's row."""
    key: str = page.run("return document.querySelector('#workers tbody tr').dataset.key")
    return key


@pytest.mark.slow
def test_a_killed_worker_shows_within_two_seconds_and_so_does_its_successor(
    page: Page, shared: dict[str, Any], run_dir: Path
) -> None:
    with Server(run_dir, shared) as server:
        server.wait_ready()
        page.open(f"http://127.0.0.1:{server.control_port}/")
        page.wait(lambda: page.text("#verdict") == "everything ready", "ready")
        pid = server.block("head_two")["pid"]
        psutil.Process(pid).send_signal(signal.SIGKILL)
        page.wait(lambda: page.text("#verdict") == "1 pipeline not ready", "not ready", 2)
        assert page.row("#pipelines", "two")["State"].startswith("not ready: block head_two")
        assert page.row("#pipelines", "one")["State"] == "ready"
        card = page.find('#graph [data-block="head_two"]')
        assert card.get_attribute("data-state") != "ready"
        assert "head_two" in page.texts("#announcer")[0]
        page.wait(lambda: page.text("#verdict") == "everything ready", "recovery", 30)
        assert "two is ready" in page.texts("#announcer")[0]
        assert page.row("#workers", worker(page))["Process"] != str(pid)
        page.wait(
            lambda: any("worker failed" in event for event in page.texts("#events li")), "the event"
        )
        assert page.complaints() == []


@pytest.mark.slow
def test_a_topology_is_checked_applied_and_rolled_back(
    page: Page, shared: dict[str, Any], run_dir: Path
) -> None:
    with Server(run_dir, shared) as server:
        server.wait_ready()
        page.open(f"http://127.0.0.1:{server.control_port}/")
        page.wait(lambda: page.texts("#generation") == ["1"], "the generation")
        served = page.run("return document.querySelector('#text').value")
        assert topology_file.parse(served) == topology_file.parse(shared)

        wrong = "blocks: {a: {}, b: {device: gpu}}\npipelines: {p: {blocks: [c]}}\nextra: 1"
        page.write(wrong)
        page.find("#check").click()
        page.wait(lambda: "problem" in page.text("#outcome"), "problems")
        shown = page.texts("#outcome li")
        with pytest.raises(topology_file.TopologyInvalid) as refused:
            topology_file.parse(wrong)
        assert shown == list(refused.value.problems)
        assert len(shown) >= 4
        # The browser's own line about the answer.
        assert page.complaints()[0].count("status of 422") == 1

        smaller = {
            **shared,
            "blocks": {n: b for n, b in shared["blocks"].items() if n != "head_two"},
            "pipelines": {"one": shared["pipelines"]["one"]},
        }
        page.write(yaml.safe_dump(smaller))
        page.find("#check").click()
        page.wait(lambda: "It can be deployed" in page.text("#outcome"), "a dry run")
        assert "head_two" in page.text("#outcome")
        assert server.control.topology()["generation"] == 1
        page.find("#apply").click()
        page.wait(lambda: page.texts("#generation") == ["2"], "generation 2", 30)
        page.wait(lambda: "two" not in " ".join(page.texts("#graph .name")), "the new graph")

        page.wait(lambda: len(page.texts("#history tbody tr")) == 2, "the history")
        page.find('#history button[aria-label="Roll back to generation 1"]').click()
        page.wait(lambda: page.find("#confirm-yes").is_displayed(), "what it would do")
        assert "head_two" in page.text("#confirm-text")
        page.find("#confirm-yes").click()
        page.wait(lambda: page.texts("#generation") == ["3"], "generation 3", 30)
        page.wait(lambda: not page.find("#confirm").is_displayed(), "the dialog's end")
        assert set(server.control.topology()["topology"]["pipelines"]) == {"one", "two"}
        assert page.complaints() == []


@pytest.mark.slow
def test_a_server_that_is_gone_is_said_to_be_gone_and_found_again(
    page: Page, controller: FakeController
) -> None:
    with Site(controller) as site:
        page.open(site.url)
        page.wait(lambda: page.text("#verdict") == "everything ready", "ready")
    page.wait(lambda: page.text("#verdict") == "server gone", "the server's end")
    assert "does not answer" in page.text("#trouble")
    assert "stale" in page.find("body").get_attribute("class").split()
    # What was there is still shown, with the time that it is from.
    assert page.row("#blocks", "a")["State"] == "ready"
    with Site(controller, port=site.port):
        page.wait(lambda: page.text("#verdict") == "everything ready", "the server's return")
        assert not page.find("#trouble").is_displayed()
        assert "The server is back" in page.texts("#announcer")[0]


@pytest.mark.slow
def test_nothing_deployed_says_how_to_deploy(page: Page) -> None:
    with Site(FakeController()) as site:
        page.open(site.url)
        assert page.text("#verdict") == "nothing deployed"
        assert "blockflow apply" in page.text("#nothing")
        assert not page.find("#graph").is_displayed()
        assert page.complaints() == []


MARKUP = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


@pytest.mark.slow
def test_text_of_others_never_becomes_markup(page: Page, controller: FakeController) -> None:
    """Names are restricted, but reasons, problems and carriers come from anywhere."""
    controller.states = {"b": (BlockState.FAILED, MARKUP)}
    controller.error = StartFailed(MARKUP)
    with Site(controller) as site:
        page.open(site.url)
        page.wait(lambda: MARKUP in page.row("#blocks", "b")["State"], "the reason as text")
        page.write("{}")
        page.find("#apply").click()
        page.wait(lambda: MARKUP in page.text("#outcome"), "the error as text")
        assert page.run("return document.querySelectorAll('main img, main script').length") == 0
        assert page.text("#verdict") == "1 pipeline not ready"
        # And if a line of the page ever made markup of text, the browser would refuse it.
        with pytest.raises(JavascriptException, match="TrustedHTML"):
            page.run("document.querySelector('#outcome').innerHTML = '<b>x</b>'")


@pytest.mark.slow
def test_a_topology_is_applied_by_keyboard_alone(page: Page, controller: FakeController) -> None:
    with Site(controller) as site:
        page.open(site.url)
        page.wait(lambda: page.texts("#generation") == ["1"], "the generation")
        page.press(Keys.TAB)
        assert page.focused.text == "Skip to the topology editor"
        page.press(Keys.ENTER, Keys.TAB)
        assert page.focused.get_attribute("id") == "text"
        page.press(Keys.CONTROL + "a", Keys.DELETE, "blocks: {}")
        page.press(Keys.TAB)
        assert page.focused.text == "Check"
        page.press(Keys.ENTER)
        page.wait(lambda: "It can be deployed" in page.text("#outcome"), "a dry run")
        assert page.focused.text == "Check"
        page.press(Keys.TAB)
        assert page.focused.text == "Apply"
        outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
        page.press(Keys.SPACE)
        page.wait(lambda: page.texts("#generation") == ["2"], "generation 2")
        assert controller.current == Topology()
        assert page.complaints() == []


@pytest.mark.slow
def test_what_changed_in_the_meantime_is_not_overruled_unseen(
    page: Page, controller: FakeController
) -> None:
    with Site(controller) as site:
        page.open(site.url)
        page.wait(lambda: page.texts("#generation") == ["1"], "the generation")
        page.write("{}")
        controller.generation = 5
        page.wait(lambda: page.text("#apply") == "Apply over generation 5", "a warning")
        assert "began as generation 1" in page.text("#text-hint")
        # A change that the page has not shown yet is refused by the server.
        page.run("document.querySelector('#text').focus()")
        controller.generation = 6
        page.press(Keys.CONTROL + Keys.ENTER)
        page.wait(
            lambda: "generation" in page.text("#outcome") or controller.generation == 7, "an answer"
        )
        assert controller.terms.match in (5, 6)


@pytest.mark.slow
def test_a_screen_reader_finds_names_and_tables(page: Page, controller: FakeController) -> None:
    with Site(controller) as site:
        page.open(site.url)
        page.wait(lambda: page.texts("#generation") == ["1"], "the generation")
        names = page.names()
        assert [role for role, name in names if not name.strip()] == []
        assert ("button", "Pipeline p, ready, through a, b. Show its line alone") in names
        assert ("table", "Blocks") in names
        assert page.run("return document.documentElement.lang") == "en"
        assert page.texts("#blocks tbody th[scope=row]") == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (400, "light"), (400, "dark")])
def test_every_width_and_scheme(page: Page, width: int, scheme: str) -> None:
    """Only the graph and the tables scroll sideways, and text stands out from what is behind it."""
    long = "a" + "-long" * 12
    controller = FakeController()
    blocks = {f"{long}{i}": Block(artifact=DIGEST) for i in range(2)}
    controller.current = Topology(blocks=blocks, pipelines={long: Pipeline(blocks=tuple(blocks))})
    controller.states = {f"{long}0": (BlockState.FAILED, "word" * 200)}
    page.prefer("prefers-color-scheme", scheme)
    with Site(controller) as site:
        page.open(site.url, width=width)
        assert page.run("return document.documentElement.scrollWidth") <= width
        poor = page.run(CONTRAST)
        assert poor == []
        assert page.complaints() == []


CONTRAST = """
// Text whose contrast with the nearest painted background is below WCAG AA's 4.5.
const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const rgba = (colour) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = (colour) => {
  const [r, g, b] = rgba(colour).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if (rgba(colour)[3] === 255) return colour;
  }
  return "white";
};
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const text = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!text || !element.checkVisibility() || element.closest("svg")) continue;
  const style = getComputedStyle(element);
  const [a, b] = [light(style.color), light(behind(element))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) found.push(`${element.tagName}.${element.className} ${ratio.toFixed(2)}`);
}
return found;
"""


@pytest.mark.slow
def test_gpus_show_what_they_draw(page: Page, controller: FakeController) -> None:
    gpu = Device(
        name="cuda:0",
        kind="cuda",
        model="NVIDIA H200",
        memory_total=80 << 30,
        memory_available=60 << 30,
        utilization=0.37,
        power_watts=312.4,
        energy_joules=7000.0,
        temperature_celsius=54.0,
    )

    async def devices(_: Request) -> Response:
        return JSONResponse(Survey(devices=(gpu,), problem="a fan is loose").model_dump())

    with Site(controller, Route("/v1/devices", devices)) as site:
        page.open(site.url)
        page.wait(lambda: page.texts("#devices tbody tr"), "the device")
        row = page.row("#devices", "cuda:0")
        assert row["Device"] == "cuda:0NVIDIA H200"
        assert "20.0 GiB of 80.0 GiB" in row["Memory"]
        assert (row["Utilization"], row["Power"], row["Temperature"]) == ("37 %", "312 W", "54 °C")
        assert "GPU power" in page.texts("#sums dt")
        assert page.text("#device-problem") == "a fan is loose"


@pytest.mark.slow
def test_a_token_is_asked_for_and_kept_for_the_tab(page: Page, controller: FakeController) -> None:
    token = "correct horse battery".replace(" ", "-")
    with Site(controller, token=token) as site:
        page.open(site.url)
        assert page.text("#verdict") == "locked"
        assert page.focused.get_attribute("id") == "token"
        page.press("wrong-wrong-wrong-wrong", Keys.ENTER)
        page.wait(lambda: page.find("#token").get_attribute("value") == "", "an answer")
        assert page.text("#verdict") == "locked"
        page.press(token, Keys.ENTER)
        page.wait(lambda: page.text("#verdict") == "everything ready", "the page")
        assert not page.find("#token-form").is_displayed()
        page.wait(lambda: "worker failed" in " ".join(page.texts("#events li")), "the events")


@pytest.mark.slow
def test_many_pipelines_are_drawn_by_choice(page: Page) -> None:
    controller = FakeController()
    blocks = {f"b{i}": Block(artifact=DIGEST) for i in range(20)}
    pipelines = {
        f"p{i:03}": Pipeline(blocks=(f"b{i % 7}", f"b{7 + i % 5}", f"b{12 + i % 8}"))
        for i in range(200)
    }
    controller.current = Topology(blocks=blocks, pipelines=pipelines)
    with Site(controller) as site:
        page.open(site.url)
        page.wait(lambda: len(page.texts("#pipelines tbody tr")) == 200, "the table")
        assert len(page.texts("#graph .block")) == 20
        assert len(page.texts("#graph .source")) == 16
        assert page.text("#graph-choice output") == "16 of 200 are drawn"
        page.find("#graph-filter").send_keys("p19")
        page.wait(
            lambda: page.texts("#graph .source .name") and len(page.texts("#graph .source")) == 10,
            "the choice",
        )
        assert page.focused.get_attribute("id") == "graph-filter"
        assert page.complaints() == []


@pytest.mark.slow
def test_one_line_can_be_shown_alone(page: Page, controller: FakeController) -> None:
    controller.current = Topology(
        blocks=WANTED.blocks,
        pipelines={"p": Pipeline(blocks=("a", "b")), "q": Pipeline(blocks=("a",))},
    )
    with Site(controller) as site:
        page.open(site.url)
        page.wait(lambda: len(page.texts("#graph .source")) == 2, "the graph")
        chip = page.find('#graph .source[data-line="q"]')
        chip.send_keys(Keys.ENTER)
        assert chip.get_attribute("aria-pressed") == "true"
        lit = page.run(
            "return [...document.querySelectorAll('.lit .line.on')].map((l) => l.dataset.line)"
        )
        assert lit == ["q"]
        # The page refreshes itself, and what has the focus keeps it, even in a new graph.
        controller.current = WANTED.model_copy(
            update={"pipelines": {**controller.current.pipelines, "r": Pipeline(blocks=("b",))}}
        )
        page.wait(lambda: len(page.texts("#graph .source")) == 3, "the new graph")
        assert page.focused.get_attribute("data-line") == "q"


@pytest.mark.slow
def test_a_pipeline_that_branches_and_joins_is_drawn_so(
    page: Page, controller: FakeController
) -> None:
    feeds = {"t": "input", "l": "t", "r": "t", "j": {"a": "l", "b": "r"}}
    controller.current = Topology(
        blocks={name: Block(artifact=DIGEST) for name in feeds},
        pipelines={"p": Pipeline(graph=feeds, outputs={"all": "j", "part": "t"})},
    )
    with Site(controller) as site:
        page.open(site.url)
        page.wait(lambda: page.texts("#graph .source"), "the graph")
        left = page.run(
            """const left = (name) =>
                document.querySelector(`[data-block="${name}"]`).getBoundingClientRect().left;
            return ["t", "l", "r", "j"].map(left);"""
        )
        assert left[0] < left[1] == left[2] < left[3]
        # Five ways between blocks and two to clients, which have a dot each.
        drawn = page.run("return document.querySelector('#graph .line path').getAttribute('d')")
        assert drawn.count("M") == 7
        assert page.run("return document.querySelectorAll('#graph .line circle').length") == 2
        assert page.row("#pipelines", "p")["Blocks"] == "t → l, r; l → j; r → j"
        assert page.complaints() == []


# The pure modules, in the browser that they are for


@pytest.mark.slow
def test_the_pure_modules(page: Page, controller: FakeController) -> None:
    """Of one browser, for to start one takes longer than all of this."""
    with Site(controller) as site:
        page.open(site.url)
        _yaml_is_read_back(page)
        _graphs_are_laid_out(page)
        _rates_are_measured(page)


def _yaml_is_read_back(page: Page) -> None:
    names = [
        "no", "Off", "null", "1e3", "012", "0x1f", "1_000", "2024-01-01", "12.30.00", "a", "x-1",
        "y", "true", "a.b", "1", "a-",
    ]  # fmt: skip
    odd = Topology(
        store="/tmp/a b: #c\"d'é",  # noqa: S108 - a name, not a file
        blocks={name: Block(artifact=DIGEST, worker=name, device="cuda:0") for name in names},
        pipelines={
            **{name: Pipeline(blocks=(name,), inputs=("a: b", "[x")) for name in names},
            "graph": Pipeline(
                graph={"a": "input", "x-1": {"no": "input.a: b", "x": "a.1"}},
                outputs={"off": "x-1.y"},
            ),
        },
    )
    for given in (odd, Topology()):
        text = page.module("format.js", "module.toYaml(given[0])", given.model_dump(mode="json"))
        assert topology_file.parse(text or "{}") == given, text


def _graphs_are_laid_out(page: Page) -> None:
    def lay_out(pipelines: dict[str, list[str] | Pipeline], *more: str) -> Any:
        listed = [
            {
                "name": name,
                "blocks": each.members,
                "edges": wiring.edges(each),
                "entries": wiring.entries(each),
                "exits": wiring.exits(each),
            }
            if isinstance(each, Pipeline)
            else {
                "name": name,
                "blocks": each,
                "edges": list(itertools.pairwise(each)),
                "entries": each[:1],
                "exits": each[-1:],
            }
            for name, each in pipelines.items()
        ]
        blocks = list(dict.fromkeys([b for each in listed for b in each["blocks"]] + [*more]))
        layout = page.module("layout.js", "module.layOut(given[0], given[1])", listed, blocks)
        boxes = [*layout["blocks"], *layout["sources"]]
        for i, one in enumerate(boxes):
            assert 0 <= one["x"] <= one["x"] + one["width"] <= layout["width"]
            assert 0 <= one["y"] <= one["y"] + one["height"] <= layout["height"]
            for other in boxes[i + 1 :]:
                apart = (
                    one["x"] + one["width"] <= other["x"]
                    or other["x"] + other["width"] <= one["x"]
                    or one["y"] + one["height"] <= other["y"]
                    or other["y"] + other["height"] <= one["y"]
                )
                assert apart, (one, other)
        return layout

    shared = lay_out({"p": ["a", "b", "c"], "q": ["a", "d"], "r": ["e"]}, "lonely")
    place = {block["name"]: block for block in shared["blocks"]}
    assert place["a"]["x"] < place["b"]["x"] < place["c"]["x"]
    assert place["b"]["x"] == place["d"]["x"]
    assert sorted(place["a"]["rows"]) == ["p", "q"]
    assert place["lonely"]["rows"] == []
    assert {(hop["from"], hop["to"]) for hop in shared["hops"]} == {
        ("a", "b"), ("b", "c"), ("c", None), ("a", "d"), ("d", None), ("e", None),
    }  # fmt: skip
    straight = lay_out({"p": ["a", "b", "c"], "q": ["d", "e", "f"]})
    for line in straight["lines"]:
        assert len({y for way in line["ways"] for _, y in way}) == 1
    # What the server would refuse must not stop the page: circles, and a block that comes twice.
    lay_out({"p": ["a", "b"], "q": ["b", "a"]})
    lay_out({"p": ["a", "b", "a"]})
    # Lines that pass a layer go between its blocks, and through none of them.
    passing = lay_out({"p": ["a", "b", "c"], "q": ["a", "c"], "r": ["c"]})
    middle = next(block for block in passing["blocks"] if block["name"] == "b")
    for line in passing["lines"]:
        for x, y in itertools.chain(*line["ways"]):
            if x == middle["x"] and line["name"] != "p":
                assert not middle["y"] <= y <= middle["y"] + middle["height"]
    # A line branches and joins, and ends wherever clients get something.
    feeds = {"t": "input", "l": "t", "r": "t", "j": {"a": "l", "b": "r", "c": "t", "d": "input.d"}}
    branching = lay_out({"p": Pipeline(graph=feeds, outputs={"all": "j", "part": "t"})})
    place = {block["name"]: block for block in branching["blocks"]}
    assert place["t"]["x"] < place["l"]["x"] == place["r"]["x"] < place["j"]["x"]
    (line,) = branching["lines"]
    assert len(line["ways"]) == 7
    arriving = [way[-1] for way in line["ways"] if way[-1][0] == place["j"]["x"]]
    assert len(arriving) == 4
    assert len({y for _, y in arriving}) == 1
    rights = [place[name]["x"] + place[name]["width"] for name in ("t", "j")]
    assert sorted(x for x, _ in line["ends"]) == rights
    assert {(hop["from"], hop["to"]) for hop in branching["hops"]} == {
        ("t", "l"), ("t", "r"), ("t", "j"), ("l", "j"), ("r", "j"), ("j", None),
    }  # fmt: skip


def _rates_are_measured(page: Page) -> None:
    readings = json.dumps([[0, 100], [1, 110], [2, 120], [3, 5], [4, 15]])
    measured = page.module(
        "meters.js",
        f"""(() => {{
            const meters = new module.Meters();
            const before = meters.rate("x");
            for (const [time, value] of {readings}) meters.add("x", time, value);
            const h = (counts) => ({{ bounds: [0.1, 0.2], counts, sum: 0 }});
            meters.addHistogram("h", 0, h([5, 0, 0]));
            meters.addHistogram("h", 1, h([5, 10, 0]));
            return [before, meters.rate("x"), meters.trail("x").map(([, rate]) => rate),
                meters.quantile("h", h([5, 10, 0]), 0.5), meters.quantile("none", h([0]), 0.5)];
        }})()""",
    )
    # From 120 to 5 is a new process that has counted to 5.
    assert measured == [None, pytest.approx(25 / 3), [10, 10, 5, 10], pytest.approx(0.15), None]
