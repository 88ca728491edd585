"""Workers that share a GPU under MPS, with real processes on a host that pretends to have one."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from blockflow import mps_daemon
from blockflow.artifact import Store
from blockflow.errors import BlockFlowError, TopologyInvalid
from running import Load, Mlp, Server, some_rows, store_model, topology, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TESTS = Path(__file__).parent
FAKE = TESTS / "fake_mps"
ON_GPU = {"device": "cuda:0", "precision": "fp32"}


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{FAKE}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}:{os.environ.get('PYTHONPATH', '')}")


@pytest.fixture(scope="module")
def mlp(store: Store) -> list[str]:
    """The digests of `Mlp()` in two blocks."""
    return store_model(store, Mlp(), 2)


@pytest.fixture
def wanted(store: Store, mlp: list[str]) -> dict[str, Any]:
    """Two workers on cuda:0, under MPS where it can be had."""
    blocks = {"one": mlp[0], "two": mlp[1]}
    made = topology(store.root, {"a": blocks}, one=ON_GPU, two=ON_GPU)
    return with_mps(made, "auto")


def serve(directory: Path, wanted: Mapping[str, Any] | None, *options: str) -> Server:
    """Patient, so that a slow machine's restarts are not taken for lost requests."""
    patience = ("--request-timeout", "120")
    return Server(directory, wanted, *patience, *options, program=[str(TESTS / "gpu_pretender.py")])


def mps_of(server: Server) -> dict[str, Any]:
    _, gpu = server.control.devices()["devices"]
    mps: dict[str, Any] = gpu["mps"]
    return mps


def pids(server: Server) -> dict[str, int | None]:
    return {block["worker"]: block["pid"] for block in server.control.blocks()}


def all_new(server: Server, before: Mapping[str, int | None]) -> Callable[[], bool]:
    def new() -> bool:
        now = pids(server)
        return None not in now.values() and not set(now.values()) & set(before.values())

    return new


def processes(server: Server) -> list[psutil.Process]:
    directory = server.run_dir / "0.mps"
    return [p for p in psutil.process_iter() if mps_daemon._is_left(p, directory)]


def with_mps(wanted: Mapping[str, Any], setting: object) -> dict[str, Any]:
    return {**wanted, "devices": {"cuda:0": {"mps": setting}}}


def test_workers_that_share_a_gpu_die_and_return_together(
    wanted: dict[str, Any], run_dir: Path
) -> None:
    with serve(run_dir, wanted) as server:
        server.wait_ready(120)
        before = pids(server)
        assert mps_of(server) == {"state": "on", "reason": None, "clients": before}
        assert set(mps_daemon.clients(server.run_dir / "0.mps")) == set(before.values())
        with Load(server, "a", Mlp()) as load:
            wait_for(lambda: load.good > 3, 60, "answers")
            os.kill(before["two"] or 0, signal.SIGKILL)
            wait_for(all_new(server, before), 120, "successors of both")
            server.wait_ready(120)
            good = load.good
            wait_for(lambda: load.good > good + 3, 60, "answers")
        assert load.failures == []
        assert mps_of(server) == {"state": "on", "reason": None, "clients": pids(server)}
        log = server.log.read_text()
        assert "worker two failed: its process ended with signal 9" in log
        assert (
            "worker one failed: worker two, with which it shared the GPU under MPS, failed" in log
        )
        # A restart on request is polite, and the others stay.
        before = pids(server)
        server.control.restart("two")
        assert pids(server)["one"] == before["one"]

        # The daemon's own death is that of all, too.
        before = pids(server)
        (daemon,) = [p for p in processes(server) if "-f" in p.cmdline()]
        daemon.kill()
        wait_for(all_new(server, before), 120, "successors of both")
        server.wait_ready(120)
        assert mps_of(server)["clients"] == pids(server)
    assert processes(server) == []
    assert not server.run_dir.exists()


def test_workers_whose_context_is_lost_leave_and_return_together(
    wanted: dict[str, Any], run_dir: Path
) -> None:
    """After a fault that another client of the GPU caused."""
    with serve(run_dir, wanted) as server:
        server.wait_ready(120)
        before = pids(server)
        with Load(server, "a", Mlp()) as load, socket.socket(socket.AF_UNIX) as stranger:
            wait_for(lambda: load.good > 3, 60, "answers")
            stranger.connect(str(server.run_dir / "0.mps" / "control"))
            stranger.sendall(b"client 1\n")
            stranger.close()
            wait_for(all_new(server, before), 120, "successors of both")
            server.wait_ready(120)
            good = load.good
            wait_for(lambda: load.good > good + 3, 60, "answers")
        assert load.failures == []
        assert "failed: its process ended with exit status 70" in server.log.read_text()
        assert mps_of(server) == {"state": "on", "reason": None, "clients": pids(server)}


def test_a_worker_that_hangs_is_parted_from_the_others_first(
    wanted: dict[str, Any], run_dir: Path
) -> None:
    with serve(run_dir, wanted, "--heartbeat-timeout", "4") as server:
        server.wait_ready(120)
        before = pids(server)
        os.kill(before["two"] or 0, signal.SIGSTOP)
        wait_for(lambda: pids(server)["two"] not in {None, before["two"]}, 60, "a successor")
        server.wait_ready(120)
        assert pids(server)["one"] == before["one"]
        assert "terminate_client" in (server.run_dir / "0.mps" / "control.log").read_text()
        assert server.inference.infer("a", {"x": some_rows()})["output"].shape == (1, 4)


def test_the_setting_is_changed_under_load(wanted: dict[str, Any], run_dir: Path) -> None:
    with serve(run_dir, wanted) as server:
        server.wait_ready(120)
        with Load(server, "a", Mlp()) as load:
            for setting, state in ((False, "off"), ("on", "on"), ("off", "off")):
                before = pids(server)
                wish = with_mps(wanted, setting)
                dry = server.control.put_topology(wish, dry_run=True)
                verb = "under MPS" if state == "on" else "without MPS"
                assert dry["actions"] == [f"replace worker {w} ({verb})" for w in ("one", "two")]
                assert pids(server) == before
                server.control.put_topology(wish)
                assert all_new(server, before)()
                clients = pids(server) if state == "on" else {}
                assert mps_of(server) == {"state": state, "reason": None, "clients": clients}
                assert len(processes(server)) == (3 if state == "on" else 0)
        assert load.good > 0
        assert load.failures == []
        # One worker alone does without, if nobody says otherwise.
        together = {n: {**b, "worker": "w"} for n, b in wanted["blocks"].items()}
        server.control.put_topology({**wanted, "blocks": together})
        assert mps_of(server)["state"] == "off"


def test_where_mps_cannot_be_had(
    wanted: dict[str, Any], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` does without and says why; `on` is refused, and what serves goes on."""
    monkeypatch.setenv("FAKE_MPS", "broken")
    with serve(run_dir, wanted) as server:
        server.wait_ready(120)
        before = pids(server)
        mps = mps_of(server)
        assert mps["state"] == "failed"
        assert "control.log: this GPU cannot do it" in mps["reason"]
        assert server.log.read_text().count("cuda:0 is without MPS") == 1
        with pytest.raises(TopologyInvalid, match=r"devices\.cuda:0\.mps: it is on, but MPS can"):
            server.control.put_topology(with_mps(wanted, "on"))
        assert pids(server) == before
        assert server.control.ready()
        assert server.control.topology()["generation"] == 1


def test_a_worker_that_does_not_join_is_found_out(
    wanted: dict[str, Any], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MPS", "closed")
    with serve(run_dir, wanted) as server:
        server.wait_ready(120)
        mps = mps_of(server)
        assert (mps["state"], mps["clients"]) == ("failed", {})
        assert "worker one did not join it" in mps["reason"]
        before = pids(server)
        # Nothing else changes, and they must not be kept for that.
        with pytest.raises(BlockFlowError, match="MPS is on for cuda:0, but worker two did not"):
            server.control.put_topology(with_mps(wanted, "on"))
        assert pids(server) == before
        assert server.inference.infer("a", {"x": some_rows()})["output"].shape == (1, 4)


def test_nothing_of_mps_outlives_a_server_that_was_killed(
    wanted: dict[str, Any], run_dir: Path
) -> None:
    server = serve(run_dir, wanted)
    try:
        server.wait_ready(120)
        workers = pids(server)
        assert len(processes(server)) == 3
        server.process.kill()
        server.process.wait()
    finally:
        server.close()
    with serve(run_dir, wanted) as successor:  # at once, in the same run directory
        successor.wait_ready(120)
        assert all_new(successor, workers)()
        assert len(processes(successor)) == 3
        assert mps_of(successor)["clients"] == pids(successor)
    assert processes(successor) == []
    assert not successor.run_dir.exists()
