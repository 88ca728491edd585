"""The whole system: real processes, real sockets, real kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
import tritonclient.http as triton
from torch import Tensor, nn

from blockflow import ledger, oip
from blockflow.artifact import Port, Store
from blockflow.client import InferenceClient
from blockflow.errors import (
    BlockFlowError,
    DeadlineExceeded,
    Poisonous,
    TopologyInvalid,
    Unavailable,
)
from blockflow.models import ScriptFile
from blockflow.split import split_model
from running import (
    Fragile,
    Load,
    Mlp,
    Server,
    Slow,
    answer,
    channels_between_blocks,
    four_blocks,
    free_port,
    some_rows,
    store_model,
    topology,
    wait_for,
)
from tensormq import Loop, Push, Request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def directory(run_dir: Path) -> Path:
    return run_dir


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_resnet50_in_four_blocks_equals_the_monolith(store: Store, directory: Path) -> None:
    """Through the public Triton client, binary and JSON."""
    wanted, x, expected = four_blocks(store, "cpu")
    with Server(directory, wanted) as server:
        server.wait_ready(120)
        client = triton.InferenceServerClient(f"127.0.0.1:{server.http_port}")
        try:
            assert client.is_model_ready("resnet50")
            for binary in (True, False):
                given = triton.InferInput("x", list(x.shape), "FP32")
                given.set_data_from_numpy(x, binary_data=binary)
                asked = triton.InferRequestedOutput("output", binary_data=binary)
                got = client.infer("resnet50", [given], outputs=[asked]).as_numpy("output")
                np.testing.assert_allclose(got, expected, atol=1e-4)
        finally:
            client.close()
        assert {c["carrier"] for c in channels_between_blocks(server, 2)} == {"shm"}


@pytest.mark.parametrize("fuse", [True, False])
def test_two_pipelines_share_one_copy_of_a_block(
    store: Store, mlp: list[str], directory: Path, fuse: bool
) -> None:
    other = Mlp()
    with torch.no_grad():
        other.layers[4].weight += 1  # another head on the same trunk
    others = store_model(store, other, 3)
    assert others[:2] == mlp[:2]
    wanted = topology(
        store.root,
        {
            "a": {"trunk": mlp[0], "middle": mlp[1], "head-a": mlp[2]},
            "b": {"trunk": mlp[0], "middle": mlp[1], "head-b": others[2]},
        },
        trunk={"worker": "shared", "fuse": fuse},
        middle={"worker": "shared", "fuse": fuse},
    )
    wanted["pipelines"]["b"] |= {"inputs": ["image"], "outputs": ["label"]}
    wanted["blocks"] = {name.replace("_", "-"): block for name, block in wanted["blocks"].items()}
    x = some_rows(3)
    with Server(directory, wanted) as server:
        server.wait_ready()
        for _ in range(2):
            np.testing.assert_allclose(
                server.inference.infer("a", {"x": x})["output"], answer(Mlp(), x), atol=1e-6
            )
        np.testing.assert_allclose(
            server.inference.infer("b", {"image": x})["label"], answer(other, x), atol=1e-6
        )
        wait_for(lambda: server.block("trunk")["requests"] == 3, 5, "a report")
        trunk, middle = server.block("trunk"), server.block("middle")
        for block in (trunk, middle):
            assert block["requests_by_pipeline"] == {"a": 2, "b": 1}
        assert trunk["pid"] == middle["pid"]
        # Two workers for the heads, one for the shared blocks, one gateway.
        assert len(server.children) == 4
        local = [c for c in trunk["channels"] if c["peer"] == "middle"]
        onwards = sum(c["messages"] for c in middle["channels"] if c["peer"].startswith("head"))
        if fuse:
            assert (trunk["fused_into"], middle["fused_into"]) == (None, "trunk")
            assert (trunk["channels"], middle["compute_ms_mean"]) == ([], None)
        else:
            assert (trunk["fused_into"], middle["fused_into"]) == (None, None)
            assert [(c["carrier"], c["messages"]) for c in local] == [("local", 3)]
        assert trunk["compute_ms_mean"] > 0
        assert 0 < trunk["queue_ms_mean"] < 5000
        assert onwards == 3


def test_a_bad_topology_is_refused_and_what_runs_is_untouched(
    store: Store, mlp: list[str], directory: Path
) -> None:
    wanted = topology(store.root, {"a": {"one": mlp[0], "two": mlp[1], "three": mlp[2]}})
    with Server(directory, wanted) as server:
        server.wait_ready()
        before = {b["name"]: b["pid"] for b in server.control.blocks()}
        bad = {
            "store": str(store.root),
            "blocks": {
                "one": {"artifact": mlp[0], "device": "cuda:7"},
                "two": {"artifact": "sha256-" + "0" * 64},
                "three": {"artifact": mlp[2]},
                "four": {"artifact": mlp[1]},
            },
            "pipelines": {
                "a": {"blocks": ["one", "three"]},
                "b": {"blocks": ["four", "three"]},
                "c": {"blocks": ["three", "four", "missing"]},
            },
        }
        with Load(server, "a", Mlp()) as load:
            with pytest.raises(TopologyInvalid) as refused:
                server.control.put_topology(bad)
            time.sleep(0.2)
        text = "\n".join(refused.value.problems)
        for part in ("cuda:7", "0" * 64, "missing", "cycle", "gives"):
            assert part in text
        assert load.failures == []
        assert load.good > 0
        assert {b["name"]: b["pid"] for b in server.control.blocks()} == before
        assert server.control.topology()["generation"] == 1


def test_kill_9_of_the_server_leaves_nothing(store: Store, mlp: list[str], directory: Path) -> None:
    wanted = topology(store.root, {"a": {"one": mlp[0], "two": mlp[1], "three": mlp[2]}})
    with Server(directory, wanted) as server:
        server.wait_ready()
        segments = set(Path("/dev/shm").iterdir())  # noqa: S108
        children = [child.pid for child in server.children]
        assert len(children) == 4
        with Load(server, "a", Mlp()) as load:
            wait_for(lambda: load.good > 3, 10, "answers")
            server.process.kill()
            server.process.wait()
            wait_for(lambda: not any(map(is_alive, children)), 5, "no child left")
        assert set(Path("/dev/shm").iterdir()) <= segments  # noqa: S108
    with Server(directory, wanted) as server:  # the same run directory, whatever was left in it
        server.wait_ready()
        assert server.inference.infer("a", {"x": some_rows()})["output"].shape == (1, 4)


def test_ctrl_c_ends_everything_within_five_seconds(
    store: Store, mlp: list[str], directory: Path
) -> None:
    wanted = topology(store.root, {"a": {"one": mlp[0], "two": mlp[1], "three": mlp[2]}})
    with Server(directory, wanted) as server:
        server.wait_ready()
        children = [child.pid for child in server.children]
        with Load(server, "a", Mlp()) as load:
            wait_for(lambda: load.good > 3, 10, "answers")
            assert server.interrupt() < 5
        assert server.process.returncode == 0
        assert not any(map(is_alive, children))
        assert not server.run_dir.exists()


def test_ctrl_c_during_the_start(store: Store, mlp: list[str], directory: Path) -> None:
    wanted = topology(store.root, {"a": {"one": mlp[0], "two": mlp[1], "three": mlp[2]}})
    with Server(directory, wanted) as server:
        wait_for(lambda: len(server.children) >= 2, 20, "children")
        children = [child.pid for child in server.children]
        assert server.interrupt() < 5
        assert not any(map(is_alive, children))
        assert not server.run_dir.exists()


def test_no_request_is_lost_when_workers_are_killed(
    store: Store, mlp: list[str], directory: Path
) -> None:
    wanted = topology(store.root, {"a": {"one": mlp[0], "two": mlp[1], "three": mlp[2]}})
    with Server(directory, wanted) as server:
        server.wait_ready()
        with Load(server, "a", Mlp()) as load, Load(server, "a", Mlp()) as other:
            for victim in ("two", "one", "three"):
                good = load.good
                wait_for(lambda good=good: load.good > good + 3, 10, "answers")  # type: ignore[misc]
                pid = server.block(victim)["pid"]
                os.kill(pid, signal.SIGKILL)
                wait_for(lambda: not server.control.ready(), 1, "not ready")
                # The gateway hears of it a moment after the server knows.
                wait_for(lambda: not server.inference.ready("a"), 1, "not ready at the gateway")
                server.wait_ready(30)
                assert server.block(victim)["pid"] != pid
            good = load.good
            wait_for(lambda: load.good > good + 3, 10, "answers")
        assert load.failures == other.failures == []


def test_a_request_that_workers_die_of_is_refused(store: Store, directory: Path) -> None:
    digest = store_model(store, Slow(), 1)[0]
    with Server(directory, topology(store.root, {"s": {"slow": digest}})) as server:
        server.wait_ready()
        outcome: list[BlockFlowError] = []

        def call() -> None:
            with pytest.raises(BlockFlowError) as raised:
                server.inference.infer("s", {"x": some_rows()})
            outcome.append(raised.value)

        def computing() -> bool:
            return any(ledger.read(path) for path in server.run_dir.glob("*.now"))

        thread = threading.Thread(target=call)
        thread.start()
        for _ in range(2):
            wait_for(computing, 20, "a computation")
            os.kill(server.block("slow")["pid"], signal.SIGKILL)
            wait_for(lambda: not server.control.ready(), 1, "not ready")
            server.wait_ready(30)
        thread.join()
        assert isinstance(outcome[0], Poisonous)
        assert "2 workers died while they computed this request" in str(outcome[0])
        with InferenceClient(f"http://127.0.0.1:{server.http_port}", timeout=60) as client:
            assert client.infer("s", {"x": some_rows()})["output"].shape == (1, 16)


def test_a_killed_gateway_comes_back_at_the_same_port(
    store: Store, mlp: list[str], directory: Path
) -> None:
    wanted = topology(store.root, {"a": {"one": mlp[0], "two": mlp[1], "three": mlp[2]}})
    x = some_rows()
    with Server(directory, wanted) as server:
        server.wait_ready()
        workers = {b["pid"] for b in server.control.blocks()}
        (gateway,) = [child for child in server.children if child.pid not in workers]
        gateway.kill()
        wait_for(lambda: not server.control.ready(), 1, "not ready")
        server.wait_ready(30)
        np.testing.assert_allclose(
            server.inference.infer("a", {"x": x})["output"], answer(Mlp(), x), atol=1e-6
        )
        assert {b["pid"] for b in server.control.blocks()} == workers


def test_no_request_fails_during_updates(store: Store, mlp: list[str], directory: Path) -> None:
    one_each = {"one": mlp[0], "two": mlp[1], "three": mlp[2]}
    base = topology(store.root, {"a": one_each})
    with_b = topology(store.root, {"a": one_each, "b": {**one_each}})
    moved = topology(store.root, {"a": one_each}, two={"worker": "elsewhere"}, one={"max_batch": 4})
    together = topology(store.root, {"a": one_each}, **{n: {"worker": "w"} for n in one_each})
    with Server(directory, base) as server, Load(server, "a", Mlp()) as load:
        server.wait_ready()
        load.failures.clear()
        for number, wanted in enumerate((with_b, moved, together, base), start=2):
            assert server.control.put_topology(wanted, dry_run=True)["generation"] == number - 1
            assert server.control.put_topology(wanted)["generation"] == number
            assert server.control.ready()
        assert server.inference.models()[0]["name"] == "a"
        assert load.failures == []
        assert load.good > 50
        server.control.put_topology({"store": str(store.root)})  # nothing is deployed any more
        assert server.control.blocks() == []
        wait_for(lambda: len(server.children) == 1, 5, "only the gateway")


def test_a_block_that_cannot_start_is_named_and_the_old_generation_serves(
    store: Store, mlp: list[str], directory: Path
) -> None:
    base = topology(store.root, {"a": {"one": mlp[0], "two": mlp[1], "three": mlp[2]}})
    damaged = store_model(store, Mlp(seed=9), 1)[0]
    program = store.path(damaged) / "program.pt2"
    program.chmod(0o600)
    program.write_bytes(program.read_bytes()[:-100])
    with Server(directory, base) as server:
        server.wait_ready()
        worse = {**base, "blocks": {**base["blocks"], "bad": {"artifact": damaged}}}
        with pytest.raises(BlockFlowError, match=r"bad.*program\.pt2.*old generation"):
            server.control.put_topology(worse)
        assert server.control.ready()
        assert server.inference.infer("a", {"x": some_rows()})["output"].shape == (1, 4)
        assert len(server.children) == 4


def test_a_request_that_breaks_its_block_fails_alone(store: Store, directory: Path) -> None:
    digests = store_model(store, Fragile(), 1, Port("x", "int64", ("batch", 1)))
    wanted = topology(store.root, {"f": {"table": digests[0]}})
    with Server(directory, wanted) as server:
        server.wait_ready()
        pid = server.block("table")["pid"]
        for index in (99, 3, 99, 7):
            x = np.array([[index]])
            if index == 99:
                with pytest.raises(BlockFlowError, match="block table failed: IndexError"):
                    server.inference.infer("f", {"x": x})
            else:
                assert server.inference.infer("f", {"x": x})["output"].shape == (1, 4)
        assert server.block("table")["pid"] == pid


def test_a_compiled_block_computes_the_same(store: Store, mlp: list[str], directory: Path) -> None:
    fast = {"worker": "fast", "compile": True}
    wanted = topology(
        store.root, {"a": {"one": mlp[0], "two": mlp[1], "three": mlp[2]}}, one=fast, two=fast
    )
    with Server(directory, wanted) as server:
        server.wait_ready(120)
        runners = {block["name"]: block["runner"] for block in server.control.blocks()}
        assert runners == {"one": "compiled", "two": "compiled", "three": "eager"}
        assert {block["runner_reason"] for block in server.control.blocks()} == {None}
        assert server.block("two")["fused_into"] == "one"

        inputs = [some_rows(rows, seed=rows) for rows in range(1, 9)]
        expected = [answer(Mlp(), x) for x in inputs]

        def ask(number: int) -> None:
            with InferenceClient(f"http://127.0.0.1:{server.http_port}", timeout=60) as client:
                got = client.infer("a", {"x": inputs[number % 8]})["output"]
                np.testing.assert_allclose(got, expected[number % 8], atol=1e-5)

        with ThreadPoolExecutor(8) as pool:
            # Batches of every size, as they come together.
            for future in [pool.submit(ask, number) for number in range(64)]:
                future.result()
        code = directory / "state" / "compiled"
        assert code.stat().st_mode & 0o777 == 0o700
        made = {path: path.stat().st_mtime_ns for path in code.rglob("*.so")}
        assert made
        server.control.restart("one")
        assert server.block("one")["runner"] == "compiled"
        assert {path: path.stat().st_mtime_ns for path in code.rglob("*.so")} == made


def test_a_block_that_cannot_be_compiled_serves_as_it_is_and_says_so(
    store: Store, mlp: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(directory / "no-compiler"))
    wanted = topology(
        store.root,
        {"a": {"one": mlp[0], "two": mlp[1], "three": mlp[2]}},
        one={"compile": True},
    )
    x = some_rows(3)
    with Server(directory, wanted) as server:
        server.wait_ready(120)
        got = server.inference.infer("a", {"x": x})["output"]
        np.testing.assert_allclose(got, answer(Mlp(), x), atol=1e-6)
        block = server.block("one")
        assert block["runner"] == "eager"
        assert block["runner_reason"].startswith("not compiled: ")
        assert "no-compiler" in block["runner_reason"]


def test_a_blocks_threads_stay_on_its_cores(store: Store, directory: Path) -> None:
    slow = store_model(store, Slow(), 1)[0]
    first, *others = cores = sorted(os.sched_getaffinity(0))
    wanted = topology(
        store.root,
        {"a": {"pinned": slow}, "b": {"free": slow}},
        pinned={"worker": "together", "cpus": [first]},
        free={"worker": "together"},
    )
    x = some_rows()
    with Server(directory, wanted) as server:
        server.wait_ready()
        worker = psutil.Process(server.block("pinned")["pid"])

        def computing(model: str) -> set[int]:
            """The threads of the worker that a request keeps busy."""
            before = {each.id: each.user_time for each in worker.threads()}
            for _ in range(3):
                got = server.inference.infer(model, {"x": x})["output"]
                np.testing.assert_allclose(got, x, atol=1e-6)
            took = {t.id: t.user_time - before.get(t.id, 0.0) for t in worker.threads()}
            return {thread for thread, seconds in took.items() if seconds > max(took.values()) / 4}

        (alone,) = computing("a")
        assert os.sched_getaffinity(alone) == {first}
        for thread in computing("b"):
            assert os.sched_getaffinity(thread) == {first, *others}

        # With every core but the first, where there are so many, or all of them.
        several = others if len(others) > 1 else cores
        wanted["blocks"]["pinned"]["cpus"] = ",".join(map(str, several))
        server.control.put_topology(wanted)
        worker = psutil.Process(server.block("pinned")["pid"])
        team = computing("a")
        assert 1 <= len(team) <= len(several)
        for thread in team:
            assert os.sched_getaffinity(thread) == set(several)

        wanted["blocks"]["pinned"]["cpus"] = [max(cores) + 1]
        with pytest.raises(TopologyInvalid) as refused:
            server.control.put_topology(wanted)
        assert f"cpus names core {max(cores) + 1}, and this server may run on" in str(refused.value)
        assert server.control.ready()


def test_a_request_is_timed_at_each_of_its_blocks_on_demand(
    store: Store, mlp: list[str], directory: Path
) -> None:
    slow = store_model(store, Slow(), 1)[0]
    blocks = {"slow": slow, "one": mlp[0], "two": mlp[1], "three": mlp[2]}
    together = {"worker": "together", "fuse": False}
    wanted = topology(
        store.root, {"a": blocks}, slow={"max_batch": 1}, two=together, three=together
    )
    x = some_rows()
    expected = answer(Mlp(), x)
    with Server(directory, wanted) as server:
        server.wait_ready()
        found: list[oip.Timings] = []

        def ask() -> None:
            with InferenceClient(f"http://127.0.0.1:{server.http_port}", timeout=60) as client:
                got, timings = client.infer_timed("a", {"x": x})
                np.testing.assert_allclose(got["output"], expected, atol=1e-5)
                found.append(timings)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        for total, times in found:
            assert [each.block for each in times] == ["slow", "one", "two", "three"]
            assert min(min(each[1:]) for each in times) >= 0
            assert 0 < sum(sum(each[1:]) for each in times) <= total
            assert max(times, key=lambda each: each.compute_ms).block == "slow"
        # The last of them waited at the slow block for the others, and not on its way there.
        last = max((times[0] for _, times in found), key=lambda each: each.queue_ms)
        first = min((times[0] for _, times in found), key=lambda each: each.queue_ms)
        assert last.queue_ms > first.compute_ms > last.hop_ms

        # Who does not ask is counted all the same.
        np.testing.assert_allclose(
            server.inference.infer("a", {"x": x})["output"], answer(Mlp(), x), atol=1e-5
        )
        wait_for(
            lambda: {block["requests"] for block in server.control.blocks()} == {5}, 5, "reports"
        )
        text = httpx.get(f"http://127.0.0.1:{server.control_port}/metrics").text
        for block in blocks:
            status = server.block(block)
            assert status["queue_ms_mean"] is not None
            for figure in ("hop", "queue", "compute"):
                name = f"blockflow_block_{figure}_seconds"
                count = 5 if figure != "compute" else sum(status["batch_sizes"]["counts"])
                assert f'{name}_count{{block="{block}"}} {count:.1f}' in text
                assert f'{name}_bucket{{block="{block}",le="+Inf"}} {count:.1f}' in text


# To the gateway, requests that wait for company look as slow as those before a block that is busy.
_PATIENT = "--request-timeout", "3600"


def together(
    server: Server,
    asks: Sequence[Callable[[InferenceClient], None]],
    beside: Callable[[], None] = lambda: None,
) -> None:
    """Requests that a block which delays its batches computes in one."""
    with ThreadPoolExecutor(len(asks)) as pool:
        asks[0](server.inference)  # from now on it is busy, and waits for company

        def ask(one: Callable[[InferenceClient], None]) -> None:
            with InferenceClient(f"http://127.0.0.1:{server.http_port}", timeout=60) as client:
                one(client)

        futures = [pool.submit(ask, one) for one in asks]
        beside()
        for future in futures:
            future.result()


def test_an_exception_in_a_batch_fails_the_request_that_raises_it_alone(
    store: Store, directory: Path
) -> None:
    digest = store_model(store, Fragile(), 1, Port("x", "int64", ("batch", 1)))[0]
    delayed = {"max_delay_ms": 500, "max_batch": 32}
    wanted = topology(store.root, {"a": {"table": digest}, "b": {"table": digest}}, table=delayed)
    rows = Fragile().table.weight.shape[0]

    def look_up(index: int) -> Callable[[InferenceClient], None]:
        def ask(client: InferenceClient) -> None:
            x = np.array([[index % rows], [index]])
            if index >= rows:
                with pytest.raises(BlockFlowError, match="block table failed: IndexError"):
                    client.infer("ab"[index % 2], {"x": x})
            else:
                got = client.infer("ab"[index % 2], {"x": x})["output"]
                np.testing.assert_array_equal(got[0], got[1])

        return ask

    with Server(directory, wanted, *_PATIENT) as server:
        server.wait_ready()
        pid = server.block("table")["pid"]
        for poison in (98, 99):  # one of each pipeline
            together(server, [look_up(index) for index in (0, 1, poison, 2, 3)])
        log = "\n".join(server.control.logs("table"))
        assert log.count("a batch failed (index out of range in self); one by one") == 2
        assert server.block("table")["pid"] == pid
        assert server.block("table")["restarts"] == 0


def test_a_wrong_tensor_that_slips_through_fails_alone(
    store: Store, mlp: list[str], directory: Path
) -> None:
    poisons = (
        (np.zeros((1, 7), np.float32), 1),  # another width
        (np.zeros((1, 16), np.float32), 2),  # fewer rows than it says: others' would be shifted
        (np.zeros((2, 16), np.float32), 1),  # and more
        (np.zeros((1, 16), np.float64), 1),  # the whole batch would become float64
        (np.zeros((1, 16, 1), np.float32), 1),
    )
    wanted = topology(
        store.root,
        {"a": {"one": mlp[0], "two": mlp[1], "three": mlp[2]}},
        one={"max_delay_ms": 500, "max_batch": 32},
    )

    inputs = [some_rows(seed + 1, seed) for seed in range(3)]
    expected = [answer(Mlp(), x) for x in inputs]

    def ask(number: int) -> Callable[[InferenceClient], None]:
        def one(client: InferenceClient) -> None:
            got = client.infer("a", {"x": inputs[number]})["output"]
            np.testing.assert_allclose(got, expected[number], atol=1e-6)

        return one

    with Server(directory, wanted, *_PATIENT) as server:
        server.wait_ready()
        pid = server.block("one")["pid"]
        # As no gateway sends it: straight to the block, on the route of the others. Workers are
        # numbered in the order of their names.
        sockets = server.run_dir.glob("*.0.sock")
        first = min(sockets, key=lambda path: int(path.name.partition(".")[0]))
        loop = Loop()
        with Push(slots=1, slot_bytes=4096, loop=loop) as push:
            peer = push.connect(f"ipc://{first}")
            for number, (poison, rows) in enumerate(poisons, start=1):

                def slip_through(poison: Any = poison, rows: int = rows) -> None:
                    push.send({"x": poison}, to=peer, requests=(Request(7, rows, 0.0),), route=1)

                together(server, [ask(0), ask(1), ask(2), ask(0)], slip_through)
                assert loop.run_until(lambda: push.free_slots == 1, 10)
                log = "\n".join(server.control.logs("one"))
                assert log.count("one by one") == number
                assert log.count("a batch failed (block one was given x as ") == number
        loop.close()

        def computed() -> dict[str, int]:
            return {block["name"]: block["requests"] for block in server.control.blocks()}

        good = 5 * len(poisons)  # and what was wrong goes no further
        counts = {"one": good + len(poisons), "two": good, "three": good}
        wait_for(lambda: computed() == counts, 5, "reports")
        assert server.block("one")["pid"] == pid


class Moody(nn.Module):
    """float32[batch, 16] → twice that, or one row where a value is below -100."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.min()) < -100:
            return x[:1]
        return x * 2


def test_a_model_that_gives_too_few_rows_fails_the_request_that_makes_it(
    store: Store, tmp_path: Path, directory: Path
) -> None:
    path = tmp_path / "moody.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Moody()), path)
    port = Port("x", "float32", ("batch", 16))
    (block,) = split_model(ScriptFile("moody", path, (port,)), 1, store).blocks
    delayed = {"max_delay_ms": 500, "max_batch": 32}
    wanted = topology(store.root, {"a": {"moody": str(block.digest)}}, moody=delayed)

    def good(client: InferenceClient) -> None:
        x = some_rows(2)
        np.testing.assert_array_equal(client.infer("a", {"x": x})["output"], x * 2)

    def bad(client: InferenceClient) -> None:
        with pytest.raises(
            BlockFlowError, match=r"gave output as torch\.float32 \[1, 16\] and should"
        ):
            client.infer("a", {"x": some_rows(2) - 1000})

    with Server(directory, wanted, *_PATIENT) as server:
        server.wait_ready()
        together(server, [good, good, bad, good])
        log = "\n".join(server.control.logs("moody"))
        assert "a batch failed (block moody gave output as torch.float32 [1, 16] and should" in log
        assert server.block("moody")["restarts"] == 0


def test_requests_of_different_pipelines_are_computed_together(
    store: Store, directory: Path
) -> None:
    """And one that breaks the batch fails alone."""
    trunk = store_model(store, Slow(), 1)[0]
    table = store_model(store, Fragile(), 1, Port("x", "int64", ("batch", 1)))[0]
    wanted = topology(
        store.root, {"a": {"slow": trunk}, "b": {"slow": trunk}, "f": {"table": table}}
    )
    with Server(directory, wanted) as server:
        server.wait_ready()
        outcomes: dict[int, object] = {}

        def call(number: int) -> None:
            with InferenceClient(f"http://127.0.0.1:{server.http_port}", timeout=60) as client:
                x = some_rows(1 + number % 2, seed=number)
                got = client.infer("ab"[number % 2], {"x": x})["output"]
                np.testing.assert_allclose(got, x, atol=1e-6)
                outcomes[number] = got.shape

        threads = [threading.Thread(target=call, args=[number]) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes == {number: (1 + number % 2, 16) for number in range(6)}
        wait_for(lambda: server.block("slow")["batch_sizes"]["sum"] == 6, 5, "a report")
        block = server.block("slow")
        assert block["requests_by_pipeline"] == {"a": 3, "b": 3}
        assert (
            sum(block["batch_sizes"]["counts"]) <= 4
        )  # one begins alone, the others wait for it and go together

        def look_up(index: int) -> None:
            with InferenceClient(f"http://127.0.0.1:{server.http_port}", timeout=60) as client:
                try:
                    outcomes[index] = client.infer("f", {"x": np.array([[index]])})["output"].shape
                except BlockFlowError as error:
                    outcomes[index] = type(error).__name__

        for _ in range(20):
            threads = [threading.Thread(target=look_up, args=[i]) for i in (0, 1, 99, 2, 3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert outcomes[99] == "BlockFlowError"
            assert all(outcomes[index] == (1, 4) for index in range(4))


def test_deadlines_and_full_queues(store: Store, directory: Path) -> None:
    digest = store_model(store, Slow(), 1)[0]
    wanted = topology(store.root, {"s": {"slow": digest}})
    with Server(directory, wanted, "--queue-depth", "2") as server:
        server.wait_ready()
        x = some_rows()
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            server.inference.infer("s", {"x": x}, deadline=0.05)
        assert time.monotonic() - start < 2
        statuses: set[int] = set()
        end = time.monotonic() + 60

        def call() -> None:
            body = {
                "inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "data": [0] * 16}]
            }
            url = f"http://127.0.0.1:{server.http_port}/v2/models/s/infer"
            while not statuses >= {200, 429} and time.monotonic() < end:
                response = httpx.post(url, json=body, timeout=60)
                statuses.add(response.status_code)
                if response.status_code == 429:
                    assert int(response.headers["retry-after"]) >= 1

        # Two are computed at a time: the last would wait for more than a moment.
        threads = [threading.Thread(target=call) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == {200, 429}
        wait_for(
            lambda: server.inference.infer("s", {"x": x})["output"].shape == (1, 16), 20, "idle"
        )


def test_two_servers_on_one_port(store: Store, mlp: list[str], directory: Path) -> None:
    with Server(directory, None) as server:
        server.wait_ready()
        second = subprocess.run(
            [sys.executable, "-m", "blockflow", "serve", "--port", str(server.control_port),
             "--http-port", str(free_port())],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert second.returncode == 1
        assert f"127.0.0.1:{server.control_port}" in second.stderr
        assert "Traceback" not in second.stderr
        third = subprocess.run(
            [sys.executable, "-m", "blockflow", "serve", "--run-dir", str(server.run_dir),
             "--port", str(free_port()), "--http-port", str(free_port())],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert third.returncode == 1
        assert "another server runs in" in third.stderr
        assert server.control.ready()


def test_the_first_topology_must_be_good(store: Store, mlp: list[str], directory: Path) -> None:
    wanted = topology(store.root, {"a": {"three": mlp[2], "one": mlp[0]}})
    with Server(directory, wanted) as server:
        assert server.process.wait(30) == 1
        log = server.log.read_text()
        assert "error: " in log
        assert "block three gives" in log
        assert "Traceback" not in log


def test_unavailable_is_said_while_starting(store: Store, mlp: list[str], directory: Path) -> None:
    wanted = topology(store.root, {"a": {"one": mlp[0], "two": mlp[1], "three": mlp[2]}})
    with Server(directory, wanted) as server:

        def answers() -> bool:
            try:
                return server.control.health() == {"status": "ok"}
            except Unavailable:
                return False

        wait_for(answers, 20, "the management API")
        assert not server.control.ready()
        server.wait_ready()
