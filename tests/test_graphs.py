"""Pipelines that branch and join, on real processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from blockflow import cli
from blockflow.artifact import Port, Store
from blockflow.client import InferenceClient
from blockflow.errors import BlockFlowError, DeadlineExceeded, TopologyInvalid
from blockflow.export import export
from blockflow.split import split, store_blocks
from running import Floats, Fragile, Load, Server, Slow, some_rows, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROW = ("batch", 16)


class Layer(nn.Module):
    """float32[batch, 16] → float32[batch, width]; `seed` makes it another one."""

    def __init__(self, seed: int, width: int = 16) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear = nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Sum(nn.Module):
    """Two float32[batch, 16] → float32[batch, 4]; not the same in both of them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Layer(31, 4), Layer(32, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        left: Tensor = self.left(a)
        right: Tensor = self.right(b)
        return left - right


class Pick(nn.Module):
    """float32[batch, 4] and float32[batch, 16] → their sum, the first one repeated."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a.repeat(1, 4) + b


TRUNK, LEFT, RIGHT, HEAD, JOIN = Layer(0), Layer(1), Layer(2), Layer(3, 4), Sum()


class Diamond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right, self.join = TRUNK, LEFT, RIGHT, JOIN

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x)
        answer: Tensor = self.join(self.left(hidden), self.right(hidden))
        return answer


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"), create=True)


def store_parts(store: Store) -> Mapping[str, str]:
    """Make the artifacts that `topology` deploys; gives digests by name."""
    x, a, b = (Port(name, "float32", ROW) for name in "xab")
    index = Port("x", "int64", ("batch", 1))
    few = Port("a", "float32", ("batch", 4))
    modules: dict[str, tuple[nn.Module, list[Port]]] = {
        "trunk": (TRUNK, [x]),
        "left": (LEFT, [x]),
        "right": (RIGHT, [x]),
        "head": (HEAD, [x]),
        "join": (JOIN, [a, b]),
        "slow": (Slow(), [x]),
        "fragile": (Fragile(), [index]),
        "pick": (Pick(), [few, b]),
        "whole": (Diamond(), [x]),
    }
    found = {}
    for name, (module, ports) in modules.items():
        (made,) = store_blocks(split(export(module.eval(), ports), 1, name), store).blocks
        found[name] = str(made.digest)
    return found


@pytest.fixture(scope="module")
def digests(store: Store) -> Mapping[str, str]:
    return store_parts(store)


def computed(module: nn.Module, *inputs: Floats) -> Floats:
    with torch.inference_mode():
        found: Floats = module.eval()(*map(torch.from_numpy, inputs)).numpy()
        return found


# Every test has blocks of its own, named after their artifacts and the test: `trunk.heads`. They
# share four workers.

HEADS: Mapping[str, Any] = {
    "graph": {
        "trunk.heads": "input",
        "head.heads": "trunk.heads",
        "right.heads": "trunk.heads",
    },
    "outputs": {"age": "head.heads", "mood": "right.heads.output", "features": "trunk.heads"},
}
DIAMOND: Mapping[str, Any] = {
    "graph": {
        "trunk.d": "input",
        "left.d": "trunk.d",
        "right.d": "trunk.d",
        "join.d": {"a": "left.d", "b": "right.d"},
    }
}
CHAIN: Mapping[str, Any] = {"blocks": ["whole.c"]}
CHANGED: Mapping[str, Any] = {
    "graph": {
        "trunk.c": "input",
        "left.c": "trunk.c",
        "right.c": "trunk.c",
        "join.c": {"a": "left.c", "b": "right.c"},
    }
}
SKIP: Mapping[str, Any] = {
    "graph": {
        "trunk.skip": "input",
        "left.skip": "trunk.skip",
        "right.skip": "left.skip",
        "join.skip": {"a": "right.skip", "b": "trunk.skip"},
        "pick.skip": {"a": "join.skip", "b": "input.x"},
    }
}
FUSED: Mapping[str, Any] = {
    "graph": {
        "trunk.f0": "input",
        "trunk.f1": "trunk.f0",
        "left.f0": "trunk.f1",
        "left.f1": "left.f0",
        "left.f2": "left.f1",
        "right.f": "trunk.f1",
        "join.f": {"a": "left.f2", "b": "right.f"},
    },
    "outputs": {"answer": "join.f", "features": "left.f2"},
}
_AT_JOIN = {"join.cross": {"a": "left.cross", "b": "right.cross"}}
CROSSING: Mapping[str, Any] = {
    "towers": {
        "graph": {
            "left.cross": {"x": "input.l"},
            "right.cross": {"x": "input.r"},
            **_AT_JOIN,
        }
    },
    "late": {
        "graph": {
            "trunk.cross": {"x": "input.l"},
            "left.cross": "trunk.cross",
            "right.cross": {"x": "input.r"},
            **_AT_JOIN,
        }
    },
    "other": {
        "graph": {
            "left.cross": {"x": "input.l"},
            "trunk.other": {"x": "input.r"},
            "right.cross": "trunk.other",
            **_AT_JOIN,
        }
    },
}
_FRAGILE = {
    "fragile.fail": {"x": "input.index"},
    "right.fail": {"x": "input.x"},
    "pick.fail": {"a": "fragile.fail", "b": "right.fail"},
    "head.fail": "pick.fail",
}
FAILING: Mapping[str, Any] = {
    "once": {"graph": _FRAGILE, "outputs": {"answer": "head.fail", "middle": "right.fail"}},
    # A second join behind the first hears of what fails before it.
    "twice": {
        "graph": {
            **_FRAGILE,
            "trunk.fail": {"x": "input.x"},
            "join.fail": {"a": "pick.fail", "b": "trunk.fail"},
        },
        "outputs": {"answer": "join.fail", "middle": "head.fail"},
    },
}
SLOW: Mapping[str, Any] = {
    "graph": {
        "trunk.slow": "input",
        "slow.slow": "trunk.slow",
        "join.slow": {"a": "trunk.slow", "b": "slow.slow"},
    }
}
PIPELINES: Mapping[str, Mapping[str, Any]] = {
    "heads": HEADS,
    "diamond": DIAMOND,
    "skip": SKIP,
    "fused": FUSED,
    **CROSSING,
    **FAILING,
    "slow": SLOW,
    "changing": CHAIN,
}
WORKERS = {
    "one": "trunk.heads head.heads trunk.d trunk.skip right.skip trunk.f0 trunk.f1 trunk.cross "
    "trunk.other trunk.fail trunk.slow trunk.c whole.c",
    "two": "left.d left.skip join.skip right.f left.cross right.fail slow.slow left.c",
    "three": "right.heads right.d pick.skip left.f0 left.f1 left.f2 right.cross fragile.fail "
    "join.fail right.c",
    "four": "join.d join.f join.cross pick.fail head.fail join.slow join.c",
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "left.cross": {"max_batch": 32},
    "right.cross": {"max_batch": 2},
    "slow.slow": {"max_batch": 1},
}


def topology(
    store: Store,
    digests: Mapping[str, str],
    workers: Mapping[str, str],
    pipelines: Mapping[str, Mapping[str, Any]],
    device: str = "cpu",
) -> dict[str, Any]:
    """`workers` names the blocks of each, and they are named after their artifacts."""
    blocks = {
        name: {
            "artifact": digests[name.partition(".")[0]],
            "worker": worker,
            "device": device,
            **SETTINGS.get(name, {}),
        }
        for worker, names in workers.items()
        for name in names.split()
    }
    return {"store": str(store.root), "blocks": blocks, "pipelines": dict(pipelines)}


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, store: Store, digests: Mapping[str, str]
) -> Iterator[Server]:
    wanted = topology(store, digests, WORKERS, PIPELINES)
    # Clients that never pause are overload, which is not what is tried here.
    options = "--max-slowdown", "1e6"
    with Server(tmp_path_factory.mktemp("graphs"), wanted, *options) as running:
        running.wait_ready()
        yield running


def wait_for_channels(server: Server, block: str, expected: Mapping[str, tuple[str, int]]) -> None:
    """Wait for carrier and messages by peer; a channel that only tells of failures is left out."""

    def channels() -> dict[str, tuple[str, int]]:
        return {
            c["peer"]: (c["carrier"], c["messages"])
            for c in server.block(block)["channels"]
            if c["carrier"] != "inline"
        }

    wait_for(lambda: channels() == expected, 10, f"{block} reports {expected}")


def wait_for_requests(server: Server, block: str, count: int) -> None:
    wait_for(lambda: server.block(block)["requests"] == count, 10, f"{block}'s report")


def wait_for_none_at(server: Server, *blocks: str) -> None:
    """Wait until nothing is kept at blocks, complete or not."""
    for block in blocks:
        wait_for(
            lambda block=block: not any(server.block(block)[n] for n in ("incomplete", "queued")),  # type: ignore[misc]
            20,
            f"nothing is left at {block}",
        )


def many(server: Server, jobs: int, each: Any) -> None:
    """Call `each(client, number)` so often, from 16 clients at once."""
    local = threading.local()
    clients: list[InferenceClient] = []

    def run(number: int) -> None:
        if not hasattr(local, "client"):
            local.client = InferenceClient(f"http://127.0.0.1:{server.http_port}", timeout=60)
            clients.append(local.client)
        each(local.client, number)

    try:
        with ThreadPoolExecutor(16) as pool:
            for _ in pool.map(run, range(jobs)):
                pass
    finally:
        for client in clients:
            client.close()


def test_two_heads_and_the_trunk_answer_at_once(server: Server) -> None:
    """One head beside the trunk in its worker, one in another."""
    for rows in range(1, 6):
        x = some_rows(rows, seed=rows)
        got = server.inference.infer("heads", {"x": x})
        features = computed(TRUNK, x)
        assert set(got) == {"age", "mood", "features"}
        np.testing.assert_allclose(got["features"], features, atol=1e-6)
        np.testing.assert_allclose(got["age"], computed(HEAD, features), atol=1e-6)
        np.testing.assert_allclose(got["mood"], computed(RIGHT, features), atol=1e-6)
    assert set(server.inference.infer("heads", {"x": x}, outputs=["mood"])) == {"mood"}
    wait_for_channels(
        server,
        "trunk.heads",
        {"head.heads": ("local", 6), "right.heads": ("shm", 6), "gateway": ("shm", 6)},
    )
    wait_for_channels(server, "right.heads", {"gateway": ("shm", 6)})
    status = next(each for each in server.control.pipelines() if each["name"] == "heads")
    assert status["blocks"] == ["trunk.heads", "head.heads", "right.heads"]
    assert status["edges"] == [["trunk.heads", "head.heads"], ["trunk.heads", "right.heads"]]


def test_a_diamond_equals_the_network_it_was_cut_from(server: Server) -> None:
    for rows in (1, 3, 8):
        x = some_rows(rows, seed=rows)
        got = server.inference.infer("diamond", {"x": x})["output"]
        np.testing.assert_allclose(got, computed(Diamond(), x), atol=1e-6)
    response = httpx.post(
        f"http://127.0.0.1:{server.http_port}/v2/models/diamond/infer",
        json={
            "inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "data": [0.5] * 16}],
            "parameters": {"timing": True},
        },
        timeout=60,
    )
    named = [part.split(";")[0] for part in response.headers["server-timing"].split(", ")]
    figures = ("hop", "queue", "compute")
    members = ("trunk.d", "left.d", "right.d", "join.d")
    assert named == ["total", *(f"{block}.{each}" for block in members for each in figures)]
    wait_for_requests(server, "join.d", 4)
    # One message for both, and none that went twice.
    wait_for_channels(server, "trunk.d", {"left.d": ("shm", 4), "right.d": ("shm", 4)})
    for branch in ("left.d", "right.d"):
        wait_for_channels(server, branch, {"join.d": ("shm", 4)})


def test_a_skip_connection_over_several_blocks_of_two_workers(server: Server) -> None:
    x = some_rows(4)
    hidden = computed(TRUNK, x)
    joined = computed(JOIN, computed(RIGHT, computed(LEFT, hidden)), hidden)
    for _ in range(3):
        got = server.inference.infer("skip", {"x": x})["output"]
        np.testing.assert_allclose(got, computed(Pick(), joined, x), atol=1e-6)


def test_chains_in_a_graph_are_fused_and_nothing_is_where_it_branches_or_joins(
    server: Server,
) -> None:
    x = some_rows(3)
    stem = computed(TRUNK, computed(TRUNK, x))
    features = computed(LEFT, computed(LEFT, computed(LEFT, stem)))
    got = server.inference.infer("fused", {"x": x})
    np.testing.assert_allclose(got["features"], features, atol=1e-6)
    joined = computed(JOIN, features, computed(RIGHT, stem))
    np.testing.assert_allclose(got["answer"], joined, atol=1e-6)

    def fused() -> dict[str, str]:
        blocks = [block for block in server.control.blocks() if block["name"] in FUSED["graph"]]
        return {block["name"]: block["fused_into"] for block in blocks if block["fused_into"]}

    expected = {"trunk.f1": "trunk.f0", "left.f1": "left.f0", "left.f2": "left.f0"}
    wait_for(lambda: fused() == expected, 10, "reports of fused blocks")


def test_pipelines_that_cross_at_a_join_do_not_wait_for_each_other(server: Server) -> None:
    """Requests reach the join's two sides in different orders, and more of them than have slots."""
    a, b = some_rows(2, seed=1), some_rows(2, seed=2)
    expected = {
        "towers": computed(JOIN, computed(LEFT, a), computed(RIGHT, b)),
        "late": computed(JOIN, computed(LEFT, computed(TRUNK, a)), computed(RIGHT, b)),
        "other": computed(JOIN, computed(LEFT, a), computed(RIGHT, computed(TRUNK, b))),
    }

    def check(client: InferenceClient, number: int) -> None:
        name = sorted(expected)[number % 3]
        got = client.infer(name, {"l": a, "r": b})["output"]
        np.testing.assert_allclose(got, expected[name], atol=1e-5)

    many(server, 300, check)
    wait_for_requests(server, "join.cross", 300)
    assert server.block("join.cross")["requests_by_pipeline"] == dict.fromkeys(expected, 100)
    wait_for_none_at(server, "join.cross")


def test_a_failing_branch_fails_its_request_once_and_nothing_is_kept(server: Server) -> None:
    """More failures, on either side of the other branch's part, than there are slots."""
    x = some_rows()
    good, bad = np.array([[3]]), np.array([[9]])

    def send(client: InferenceClient, number: int) -> None:
        name = sorted(FAILING)[number % 2]
        if number % 3:
            with pytest.raises(BlockFlowError, match=r"block fragile.fail failed: IndexError"):
                client.infer(name, {"index": bad, "x": x})
        else:
            assert set(client.infer(name, {"index": good, "x": x})) == {"answer", "middle"}

    def failures() -> list[dict[str, int]]:
        pipelines = {each["name"]: each for each in server.control.pipelines()}
        return [pipelines[name]["errors_by_kind"] for name in FAILING]

    many(server, 120, send)
    wait_for_requests(server, "pick.fail", 40)
    wait_for_requests(server, "right.fail", 120)
    wait_for_none_at(server, "pick.fail", "head.fail", "join.fail")
    wait_for(lambda: failures() == [{"BlockFailed": 40}] * 2, 10, "the gateway's report")
    many(server, 40, lambda client, _: client.infer("twice", {"index": good, "x": x}))


def test_a_deadline_in_one_branch_is_the_requests(server: Server) -> None:
    x = some_rows()
    answered: list[int] = []

    def send(client: InferenceClient, number: int) -> None:
        try:
            client.infer("slow", {"x": x}, deadline=0.6)
        except DeadlineExceeded:
            return
        answered.append(number)

    many(server, 24, send)
    assert len(answered) < 24
    wait_for_none_at(server, "join.slow", "slow.slow")
    got = server.inference.infer("slow", {"x": x})["output"]
    hidden = computed(TRUNK, x)
    np.testing.assert_allclose(got, computed(JOIN, hidden, hidden), atol=1e-6)


def test_a_chain_becomes_a_graph_and_a_chain_again_while_it_serves(server: Server) -> None:
    url = f"http://127.0.0.1:{server.control_port}/v1"

    def change(settings: Mapping[str, Any]) -> list[str]:
        answer = httpx.patch(f"{url}/pipelines/changing", json=settings, timeout=60)
        assert answer.status_code == 200, answer.text
        actions: list[str] = answer.json()["actions"]
        return actions

    drawn = "trunk.c → left.c, right.c; left.c → join.c; right.c → join.c"
    with Load(server, "changing", Diamond()) as load:
        for settings, before, after in ((CHANGED, "whole.c", drawn), (CHAIN, drawn, "whole.c")):
            assert change(settings) == [f"change pipeline changing: {before} becomes {after}"]
            good = load.good
            wait_for(lambda good=good: load.good > good + 3, 20, "answers")  # type: ignore[misc]
    assert load.failures == []
    half = {"changing": {"graph": {"trunk.c": "input", "join.c": {"a": "trunk.c"}}}}
    serving = server.control.topology()["topology"]
    with pytest.raises(TopologyInvalid, match="nothing feeds input b"):
        server.control.put_topology({**serving, "pipelines": {**PIPELINES, **half}})
    refused = httpx.delete(f"{url}/blocks/right.d", timeout=60)
    assert refused.status_code == 409
    assert "block right.d is used by pipeline diamond" in refused.json()["error"]


def test_the_command_line_adds_a_graph_asks_it_and_removes_it(
    server: Server, tmp_path: Path
) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
        assert result.exit_code == 0, result.output
        return result.output

    management = "--server", f"http://127.0.0.1:{server.control_port}"
    feeds = "graph={trunk.c: input, left.c: trunk.c, join.c: {a: left.c, b: trunk.c}}"
    outputs = "outputs={joined: join.c, features: trunk.c}"
    assert "generation" in run("deploy", "pipeline", "more", feeds, outputs, *management)
    assert "trunk.c → left.c, join.c; left.c → join.c" in run("status", *management)
    inference = "--server", f"http://127.0.0.1:{server.http_port}"
    file = tmp_path / "answer.npz"
    run("infer", "more", "--random", "--rows", "3", "-o", str(file), *inference)
    with np.load(file) as answer:
        features = answer["features"]
        joined = computed(JOIN, computed(LEFT, features), features)
        np.testing.assert_allclose(answer["joined"], joined, atol=1e-6)
    run("delete", "pipeline", "more", *management)


def test_no_request_is_lost_when_a_branch_is_killed(
    store: Store, digests: Mapping[str, str], run_dir: Path
) -> None:
    workers = {"both": "trunk.d left.d", "right": "right.d", "join": "join.d"}
    wanted = topology(store, digests, workers, {"diamond": DIAMOND})
    with Server(run_dir, wanted) as server:
        server.wait_ready()
        with Load(server, "diamond", Diamond()) as load, Load(server, "diamond", Diamond()) as more:
            for victim in ("right.d", "join.d"):
                before = load.good
                wait_for(lambda before=before: load.good > before + 3, 20, "answers")  # type: ignore[misc]
                os.kill(server.block(victim)["pid"], signal.SIGKILL)
                wait_for(
                    lambda victim=victim: server.block(victim)["restarts"] == 1,  # type: ignore[misc]
                    20,
                    "its successor",
                )
                server.wait_ready()
            before = load.good
            wait_for(lambda: load.good > before + 3, 20, "answers")
        assert load.failures == more.failures == []
        wait_for_none_at(server, "join.d")
