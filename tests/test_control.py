"""The control plane as operators meet it: real processes, updated, killed, stopped, restarted."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from torch import Tensor, nn

from blockflow.artifact import Store
from blockflow.client import ControlClient, InferenceClient
from blockflow.edit import Conflict, StaleGeneration
from blockflow.errors import (
    BlockFlowError,
    DeadlineExceeded,
    InvalidInput,
    StartFailed,
    TopologyInvalid,
)
from blockflow.supervisor import Child, Supervisor
from operating import (
    kill_during_updates,
    kill_worker,
    three_blocks,
    twenty_updates,
    what_serves,
)
from running import (
    Load,
    Mlp,
    Server,
    Slow,
    answer,
    free_port,
    some_rows,
    store_model,
    topology,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OPERATOR = "a-secret-for-operators"
CUSTOMER = "a-secret-for-customers"

KILLS = int(os.environ.get("BLOCKFLOW_TEST_KILLS", "6"))
"""How often the server is killed during updates."""


class Endless(nn.Module):
    """float32[batch, 16] → float32[batch, 16]; computes for a quarter of a minute or more."""

    def forward(self, x: Tensor) -> Tensor:
        big = x.new_ones(2400, 2400)
        for _ in range(80):
            big = (big @ big) * 1e-4
        return x + big.sum() * 0


@pytest.fixture
def base(store: Store, mlp: list[str]) -> dict[str, Any]:
    return three_blocks(store.root, mlp)


def follow(server: Server) -> list[dict[str, Any]]:
    """A list that grows as events happen, for as long as the server lives."""
    events: list[dict[str, Any]] = []

    def read() -> None:
        try:
            with ControlClient(f"http://127.0.0.1:{server.control_port}") as client:
                for event in client.events():
                    events.append(event)  # noqa: PERF402 - seen as they come
        except BlockFlowError:
            pass  # the server was killed

    threading.Thread(target=read, daemon=True).start()
    return events


def test_garbage_is_never_what_a_stopped_server_can_go_back_to(
    store: Store, mlp: list[str], base: dict[str, Any], directory: Path
) -> None:
    unused, other = store_model(store, Mlp(seed=6), 1)[0], store_model(store, Mlp(seed=5), 1)[0]
    with Server(directory, base) as server:
        server.wait_ready()
        control = server.control
        control.put_topology(
            {"blocks": {"alone": {"artifact": other, "device": "cpu"}}, "pipelines": {}}
        )
    gc = [sys.executable, "-m", "blockflow", "store", "gc", "--all", "--store", str(store.root)]
    done = subprocess.run(gc, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("removed: ") == 1
    assert set(store.digests()) == {*mlp, other}
    assert unused not in store
    for digest in store.digests():
        store.verify(digest)


def test_twenty_updates_of_every_kind_under_load(
    store: Store, mlp: list[str], base: dict[str, Any], directory: Path
) -> None:
    """Nothing fails, every answer is right, and the verbs say what they did."""
    others = store_model(store, Mlp(seed=5), 3)
    x = some_rows(3)
    with Server(directory, base) as server:
        server.wait_ready()
        events = follow(server)
        control = server.control
        first = control.topology()["topology"]

        def asks(pipeline: str, model: nn.Module) -> None:
            got = server.inference.infer(pipeline, {"x": x})["output"]
            np.testing.assert_allclose(got, answer(model, x), atol=1e-5)

        steps = twenty_updates(control, base, others)
        assert len(steps) == 20
        with Load(server, "a", Mlp()) as load, Load(server, "a", Mlp()) as other:
            for number, step in enumerate(steps):
                good = load.good
                before, _ = what_serves(server)
                result = step()
                assert result["generation"] in {before, before + 1}
                assert result["actions"]
                assert control.ready(), number
                if number in {3, 6, 9}:
                    asks("b", Mlp(seed=5))
                wait_for(lambda good=good: load.good > good + 3, 10, "answers")  # type: ignore[misc]
        assert load.failures == other.failures == []
        assert what_serves(server)[1] == first

        with pytest.raises(Conflict, match="block one is used by pipeline a"):
            control.delete("block", "one")
        with pytest.raises(StaleGeneration, match="generation 19 serves, not 2"):
            control.delete("pipeline", "a", match=2)
        with pytest.raises(TopologyInvalid, match=r"blocks\.one\.max_batch"):
            control.configure("block", "one", {"max_batch": 0})
        dry = control.delete("block", "one", dry_run=True, cascade=True)
        assert dry["actions"] == ["remove pipeline a", "stop worker one"]
        control.rollback(1, match=19)
        assert what_serves(server) == (20, first)
        history = control.history()
        assert [record["generation"] for record in history] == [*range(20, 0, -1)]
        assert {record["outcome"] for record in history} == {"applied"}
        assert (history[0]["verb"], history[-1]["verb"]) == ("rollback", "serve")
        wait_for(lambda: any(e["subject"] == "20" for e in events), 5, "the last event")
        life_of = [e["kind"] for e in events if e["subject"] == "other1"]
        life = ["worker_started", "worker_ready", "worker_stopped"]
        assert life_of == [*life, *life, "worker_started", "worker_ready"][: len(life_of)]
        assert [e["number"] for e in events] == [*range(1, len(events) + 1)]


def test_few_workers_start_at_once_while_others_serve(
    store: Store, base: dict[str, Any], directory: Path
) -> None:
    """On two cores, one after the other; before anything serves, all of them together."""
    two_cores = (
        "import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2]); "
        "from blockflow.cli import main; main()"
    )
    with Server(directory, base, program=["-c", two_cores]) as server:
        server.wait_ready()
        server.control.put_topology(
            {**base, "blocks": {n: {**b, "max_batch": 4} for n, b in base["blocks"].items()}}
        )
        late = r"worker one did not .*; worker two was not begun within 0\.3 s"
        with pytest.raises(BlockFlowError, match=late):
            server.control.put_topology(base, timeout_s=0.3)
        assert server.control.ready()
        with contextlib.closing(server.control.events()) as events:
            happened = list(itertools.takewhile(lambda e: e["subject"] != "2", events))
    first = [e["kind"] for e in happened if e["kind"] in {"worker_started", "worker_ready"}]
    assert first == ["worker_started"] * 3 + ["worker_ready"] * 3 + [
        "worker_started", "worker_ready"] * 3  # fmt: skip


def test_what_is_handed_over_is_counted_with_its_hops(
    base: dict[str, Any], directory: Path
) -> None:
    """From the gateway through the blocks and back, and as Prometheus reads it."""
    together = {"one": {"worker": "w"}, "two": {"worker": "w", "fuse": False}}
    wanted = {
        **base,
        "blocks": {n: {**b, **together.get(n, {})} for n, b in base["blocks"].items()},
    }
    with Server(directory, wanted) as server:
        server.wait_ready()
        for _ in range(5):
            server.inference.infer("a", {"x": some_rows(2)})

        def hops() -> dict[str, int]:
            found = {b["name"]: b["hop_seconds"] for b in server.control.blocks()}
            found["gateway"] = server.control.gateway()["hops"].get("shm")
            return {name: sum(each["counts"]) if each else 0 for name, each in found.items()}

        everywhere = dict.fromkeys(("one", "two", "three", "gateway"), 5)
        wait_for(lambda: hops() == everywhere, 5, "reports")
        gateway = server.control.gateway()
        assert gateway["ready"]
        assert gateway["host_memory_bytes"] > 1 << 20
        (channel,) = gateway["channels"]
        sent = 5 * some_rows(2).nbytes
        counts = {"messages": 5, "bytes": sent, "host_bytes": sent}
        assert channel == {"peer": "one", "carrier": "shm", **counts}
        url = f"http://127.0.0.1:{server.control_port}/metrics"
        metrics = httpx.get(url, trust_env=False).text
        for line in (
            'blockflow_block_hop_seconds_count{block="two"} 5.0',
            'blockflow_gateway_hop_seconds_count{carrier="shm"} 5.0',
            f'blockflow_channel_bytes_total{{block="gateway",carrier="shm",peer="one"}} {sent}.0',
        ):
            assert line in metrics


def test_every_worker_is_killed_in_turn_under_load(base: dict[str, Any], directory: Path) -> None:
    with Server(directory, base) as server:
        server.wait_ready()
        events = follow(server)
        with Load(server, "a", Mlp()) as load, Load(server, "a", Mlp()) as other:
            for victim in ("one", "two", "three"):
                good = load.good
                wait_for(lambda good=good: load.good > good + 3, 10, "answers")  # type: ignore[misc]
                took = kill_worker(server, victim)
                print(f"{victim}: ready again after {took:.1f} s")  # noqa: T201 - a measurement
                assert server.block(victim)["restarts"] == 1
        assert load.failures == other.failures == []
        # Nothing has been changed, so nothing was applied.
        assert what_serves(server)[0] == 1
        life = [(e["kind"], e["reason"]) for e in events if e["subject"] == "two"]
        assert [kind for kind, _ in life] == [
            *("worker_started", "worker_ready", "worker_failed"),
            *("worker_started", "worker_ready"),
        ]
        assert life[2][1] == "its process ended with signal 9"


def test_a_successor_that_dies_before_the_others_are_back_is_replaced(
    store: Store, mlp: list[str], directory: Path
) -> None:
    with Server(directory, topology(store.root, {"a": {"one": mlp[0], "two": mlp[1]}})) as server:
        server.wait_ready()
        dead = [block["pid"] for block in server.control.blocks()]
        for pid in dead:
            os.kill(pid, signal.SIGKILL)

        def successors() -> list[int]:
            ready = [b["pid"] for b in server.control.blocks() if b["state"] == "ready"]
            return [pid for pid in ready if pid not in {None, *dead}]

        wait_for(lambda: bool(successors()), 30, "a successor")
        (first,) = successors()
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: len(successors()) == 2 and first not in successors(), 60, "successors")
        server.wait_ready(5)
        assert server.inference.infer("a", {"x": some_rows()})


def test_a_worker_that_stands_still_is_replaced(
    mlp: list[str], base: dict[str, Any], directory: Path
) -> None:
    wanted = {
        "store": base["store"],
        "blocks": {**base["blocks"], "other": {"artifact": mlp[0]}},
        "pipelines": {**base["pipelines"], "b": {"blocks": ["other"]}},
    }
    with Server(directory, wanted, "--heartbeat-timeout", "5") as server:
        server.wait_ready()
        with Load(server, "a", Mlp()) as load:
            wait_for(lambda: load.good > 3, 10, "answers")
            pid = server.block("two")["pid"]
            os.kill(pid, signal.SIGSTOP)
            # It is no longer called ready before it is certain that it hangs.
            wait_for(lambda: not server.control.ready(), 4, "not ready")
            wait_for(lambda: not server.inference.ready("a"), 4, "not ready for clients")
            said = {p["name"]: (p["ready"], p["reason"]) for p in server.control.pipelines()}
            assert said["b"] == (True, None)
            assert said["a"] == (False, "worker two has said nothing for more than 2.5 s")
            assert server.inference.ready("b")
            wait_for(lambda: server.block("two")["pid"] not in {None, pid}, 30, "a successor")
            server.wait_ready()
            good = load.good
            wait_for(lambda: load.good > good + 3, 10, "answers")
        assert load.failures == []
        log = server.log.read_text()
        assert "worker two failed: it has said nothing for 5 s, so it was killed" in log


def test_a_server_that_stood_still_does_not_blame_its_workers(
    base: dict[str, Any], directory: Path
) -> None:
    with Server(directory, base, "--heartbeat-timeout", "2") as server:
        server.wait_ready()
        before = {block["name"]: block["pid"] for block in server.control.blocks()}
        os.kill(server.process.pid, signal.SIGSTOP)
        time.sleep(5)
        os.kill(server.process.pid, signal.SIGCONT)
        time.sleep(2)
        assert server.control.ready()
        assert {block["name"]: block["pid"] for block in server.control.blocks()} == before


def test_a_gateway_that_stands_still_is_replaced(base: dict[str, Any], directory: Path) -> None:
    with Server(directory, base, "--heartbeat-timeout", "2") as server:
        server.wait_ready()
        workers = {block["pid"] for block in server.control.blocks()}
        (gateway,) = [child for child in server.children if child.pid not in workers]
        gateway.suspend()
        wait_for(lambda: not gateway.is_running(), 20, "the end of the gateway")
        server.wait_ready()
        assert server.inference.infer("a", {"x": some_rows()})["output"].shape == (1, 4)
        assert {block["pid"] for block in server.control.blocks()} == workers


def test_a_block_that_computes_for_ever_is_replaced(store: Store, directory: Path) -> None:
    digest = store_model(store, Endless(), 1)[0]
    wanted = topology(store.root, {"e": {"endless": digest}})
    with Server(directory, wanted, "--request-timeout", "5", "--hang-grace", "1") as server:
        server.wait_ready(120)
        events = follow(server)
        with pytest.raises(DeadlineExceeded):
            server.inference.infer("e", {"x": some_rows()}, deadline=0.2)
        # Marked by its own deadline, and killed by the longest that any request may have.
        wait_for(lambda: not server.inference.ready("e"), 4, "a doubt")
        overdue = "block endless computes a request that was due 1 s ago or more"
        (pipeline,) = server.control.pipelines()
        assert pipeline["reason"] == server.block("endless")["reason"] == overdue
        assert server.block("endless")["state"] == "ready"
        wait_for(lambda: "worker_failed" in [e["kind"] for e in events], 20, "an end of it")
        reasons = {e["kind"]: e["reason"] for e in events}
        assert reasons["worker_overdue"] == overdue
        killed = "block endless computed one request for 6 s, so it was killed"
        assert reasons["worker_failed"] == killed
        server.wait_ready(120)


def test_a_crash_loop_is_shown_and_a_restart_ends_it(base: dict[str, Any], directory: Path) -> None:
    with Server(directory, base) as server:
        server.wait_ready()

        def kill() -> bool:
            block = server.block("two")
            if block["state"] == "ready":
                os.kill(block["pid"], signal.SIGKILL)
                wait_for(lambda: server.block("two")["state"] != "ready", 2, "the death")
            return bool(server.block("two")["state"] == "crash_looping")

        wait_for(kill, 60, "a crash loop")
        assert server.block("two")["restarts"] >= 4
        assert not server.control.ready()
        (pipeline,) = server.control.pipelines()
        assert not pipeline["ready"]
        with pytest.raises(BlockFlowError, match="not ready: block two failed"):
            server.inference.infer("a", {"x": some_rows()})
        assert server.control.restart("two")["start"] == ["two"]
        assert server.control.ready()
        assert server.block("two")["state"] == "ready"
        assert server.inference.infer("a", {"x": some_rows()})["output"].shape == (1, 4)


def test_a_generation_that_is_not_ready_in_time_is_rolled_back(
    store: Store, base: dict[str, Any], directory: Path
) -> None:
    slow = store_model(store, Slow(), 1)[0]
    damaged = store_model(store, Mlp(seed=11), 1)[0]
    program = store.path(damaged) / "program.pt2"
    program.chmod(0o600)
    program.write_bytes(program.read_bytes()[:-100])
    with Server(directory, base) as server:
        server.wait_ready()
        pids = {block["name"]: block["pid"] for block in server.control.blocks()}
        with Load(server, "a", Mlp()) as load:
            for digest, seconds, words in (
                (slow, 0.3, r"worker new did not .* within 0\.\d+ s; the old generation"),
                (damaged, None, r"block new .*program\.pt2"),
            ):
                wanted = {**base, "blocks": {**base["blocks"], "new": {"artifact": digest}}}
                with pytest.raises(BlockFlowError, match=words):
                    server.control.put_topology(wanted, timeout_s=seconds)
                assert server.control.ready()
            wait_for(lambda: load.good > 3, 10, "answers")
        assert load.failures == []
        assert {block["name"]: block["pid"] for block in server.control.blocks()} == pids
        newest, older, _ = server.control.history()
        assert (newest["outcome"], older["outcome"]) == ("failed", "failed")
        assert "program.pt2" in newest["reason"]
        assert what_serves(server)[0] == 1
        with pytest.raises(Conflict, match="generation 2 never served"):
            server.control.rollback(2)
        with pytest.raises(BlockFlowError, match="no generation served before"):
            server.control.rollback()
        assert len(server.children) == 4


def test_after_a_failed_update_workers_come_back_from_the_store_that_serves(
    base: dict[str, Any], directory: Path
) -> None:
    other = Store(directory / "other", create=True)
    digest = store_model(other, Mlp(seed=5), 1)[0]
    with Server(directory, base) as server:
        server.wait_ready()
        with pytest.raises(BlockFlowError, match="the old generation keeps serving"):
            server.control.put_topology(
                topology(other.root, {"b": {"alone": digest}}), timeout_s=0.3
            )
        kill_worker(server, "two")
        assert server.control.restart("two")["start"] == ["two"]
        tried, serves = server.control.history()
        assert (tried["store"], serves["store"]) == (str(other.root), str(base["store"]))


def test_kill_9_during_updates_resumes_what_was_acknowledged(
    store: Store, mlp: list[str], directory: Path
) -> None:
    for outcomes in kill_during_updates(directory, store.root, mlp, KILLS):
        print(outcomes)  # noqa: T201 - a measurement
    assert outcomes.total() == KILLS


def test_resuming_with_a_block_that_cannot_start_serves_the_others(
    store: Store, mlp: list[str], directory: Path
) -> None:
    lonely = store_model(store, Mlp(seed=21), 1)[0]
    wanted = topology(store.root, {"a": {"one": mlp[0]}, "b": {"lonely": lonely}})
    with Server(directory, wanted) as server:
        server.wait_ready()
    program = store.path(lonely) / "program.pt2"
    whole = program.read_bytes()
    program.chmod(0o600)
    program.write_bytes(whole[:-100])
    with Server(directory, None) as server:
        wait_for(lambda: _is_ready(server, "a"), 60, "pipeline a")
        ready = {each["name"]: each["ready"] for each in server.control.pipelines()}
        assert ready == {"a": True, "b": False}
        assert "program.pt2" in server.block("lonely")["reason"]
        assert what_serves(server)[0] == 1
        program.write_bytes(whole)
        server.wait_ready()


def _is_ready(server: Server, pipeline: str) -> bool:
    try:
        return server.inference.ready(pipeline)
    except BlockFlowError:
        return False


def test_one_server_for_each_state(base: dict[str, Any], directory: Path) -> None:
    with Server(directory, base) as server:
        server.wait_ready()
        state = directory / "state"
        assert state.stat().st_mode & 0o777 == 0o700
        second = subprocess.run(
            [sys.executable, "-m", "blockflow", "serve", "--state-dir", str(state),
             "--port", str(free_port()), "--http-port", str(free_port())],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert second.returncode == 1
        assert "another server keeps its state in" in second.stderr
        assert "Traceback" not in second.stderr
        assert server.control.ready()


def test_logs_and_the_last_events_of_a_block(base: dict[str, Any], directory: Path) -> None:
    with Server(directory, base, "--log-format", "json", "--log-level", "debug") as server:
        server.wait_ready()
        for line in server.control.logs("one", 20):
            assert line.startswith("{"), line
        with pytest.raises(BlockFlowError, match="no block nowhere"):
            server.control.logs("nowhere")
        shown = subprocess.run(
            [sys.executable, "-m", "blockflow", "history", "--server",
             f"http://127.0.0.1:{server.control_port}"],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert "serve" in shown.stdout
        assert '"level": "info"' in server.log.read_text()


def test_logs_are_kept_of_all_that_live_and_of_the_last_that_ended(run_dir: Path) -> None:
    """However long ago the living were started, and also of those that never said hello."""
    logs = run_dir / "logs"
    logs.mkdir()

    async def work() -> None:
        supervisor = Supervisor(run_dir, logs, "info")

        async def spawn(name: str, module: str) -> Child:
            number = supervisor.next_incarnation()
            return await supervisor.spawn(name, module, number, ["--name", name], seconds=60)

        worker = await spawn("worker", "blockflow.worker")
        for _ in range(55):
            with pytest.raises(StartFailed, match="No module named"):
                await spawn("stillborn", "blockflow.nowhere")
        (log,) = logs.glob("*-worker.log")
        assert len([*logs.glob("*-stillborn.log")]) == 50
        await worker.kill()
        supervisor.forget(worker)
        assert log.exists()
        assert len([*logs.glob("*-stillborn.log")]) == 49
        await supervisor.close()

    asyncio.run(work())


def test_of_an_earlier_server_the_logs_are_kept_that_were_written_last(run_dir: Path) -> None:
    """The gateway, for one, was started before all others and ended with them."""
    logs = [run_dir / f"20260101T000000Z-{number:06d}-any.log" for number in range(60)]
    for age, log in enumerate(logs):
        log.touch()
        os.utime(log, (1e9 - age, 1e9 - age))

    async def work() -> None:
        await Supervisor(run_dir, run_dir, "info").close()

    asyncio.run(work())
    assert [log for log in logs if log.exists()] == logs[:50]


@pytest.mark.parametrize("tls", [False, True])
def test_strangers_need_tokens(base: dict[str, Any], directory: Path, tls: bool) -> None:
    control, inference = directory / "control.token", directory / "inference.token"
    control.write_text(f"{OPERATOR}\n")
    inference.write_text(f"{CUSTOMER}\n")
    control.chmod(0o600)
    inference.chmod(0o600)
    options = ["--token-file", str(control), "--inference-token-file", str(inference)]
    certificate = None
    if tls:
        certificate = make_certificate(directory)
        options += ["--tls-cert", str(certificate), "--tls-key", str(directory / "key.pem")]
    scheme = "https" if tls else "http"
    with Server(directory, base, "--host", "0.0.0.0", *options) as server:  # noqa: S104
        there = f"{scheme}://127.0.0.1:{server.control_port}"
        models = f"{scheme}://127.0.0.1:{server.http_port}"
        with (
            ControlClient(there, token=OPERATOR, ca_file=certificate) as operator,
            InferenceClient(models, token=CUSTOMER, ca_file=certificate) as customer,
            ControlClient(there, token=CUSTOMER, ca_file=certificate) as intruder,
            InferenceClient(models, ca_file=certificate) as stranger,
        ):

            def ready() -> bool:
                try:
                    return operator.ready()
                except BlockFlowError:
                    return False

            wait_for(ready, 60, "ready")
            assert customer.infer("a", {"x": some_rows()})["output"].shape == (1, 4)
            for refused in (
                intruder.topology,
                lambda: intruder.put_topology({}),
                lambda: stranger.infer("a", {"x": some_rows()}),
                stranger.models,
            ):
                with pytest.raises(InvalidInput, match="asks for a token"):
                    refused()
            assert intruder.health() == {"status": "ok"}
            shown = subprocess.run(
                [sys.executable, "-m", "blockflow", "status", "--server", there],
                capture_output=True, text=True, check=False, timeout=60,
                env={**os.environ, "BLOCKFLOW_TOKEN_FILE": str(control),
                     **({"BLOCKFLOW_CA_FILE": str(certificate)} if certificate else {})},
            )  # fmt: skip
            assert "generation 1" in shown.stdout, shown.stderr


def make_certificate(directory: Path) -> Path:
    assert shutil.which("openssl"), "openssl makes the certificate of this test"
    certificate = directory / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(directory / "key.pem"), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate


@pytest.fixture
def directory(run_dir: Path) -> Path:
    return run_dir
