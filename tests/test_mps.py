"""The life of an MPS daemon, with real processes and a stand-in for NVIDIA's programs."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from blockflow import mps_daemon
from blockflow.artifact import Store
from blockflow.child import cuda_leftovers
from blockflow.errors import BlockFlowError, StartFailed, TopologyInvalid
from blockflow.protocol import Publish
from blockflow.supervisor import Supervisor
from mps_peer import GPU, keeper
from operating import kill_worker
from running import Mlp, store_model, topology, wait_for
from test_mps_system import ON_GPU, TESTS, mps_of, pids, serve, with_mps

FAKE = Path(__file__).parent / "fake_mps"


@pytest.fixture(autouse=True)
def fake_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{FAKE}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}:{os.environ.get('PYTHONPATH', '')}")


def with_supervisor(run_dir: Path, work: Callable[[Supervisor], Awaitable[None]]) -> None:
    async def run() -> None:
        supervisor = Supervisor(run_dir, run_dir, "info")
        try:
            await work(supervisor)
        finally:
            await supervisor.close()

    asyncio.run(run())


def processes_of(directory: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if mps_daemon._is_left(p, directory)]


class Client:
    """Connects to the stand-in as CUDA's driver does to NVIDIA's."""

    def __init__(self, directory: Path, pid: int) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(5)
        self.socket.connect(str(directory / "control"))
        self.socket.sendall(f"client {pid}\n".encode())


def test_a_daemon_is_started_asked_and_ended(run_dir: Path) -> None:
    directory = run_dir / "0.mps"

    async def work(supervisor: Supervisor) -> None:
        child = await keeper(supervisor, directory)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        (server,) = mps_daemon.servers(directory)
        daemon = next(p for p in processes_of(directory) if "-f" in p.cmdline())
        environment = daemon.environ()
        assert environment["CUDA_VISIBLE_DEVICES"] == GPU
        assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert mps_daemon.clients(directory) == {}
        client = Client(directory, 4711)
        other = Client(directory, 4712)
        assert mps_daemon.clients(directory) == {4711: server, 4712: server}
        assert mps_daemon.terminate(directory, 4711)
        assert not mps_daemon.terminate(directory, 4713)
        assert mps_daemon.clients(directory) == {4712: server}
        client.socket.close()
        other.socket.close()
        with pytest.raises(StartFailed, match="does not know Publish"):
            await child.command(Publish(()))
        await child.stop(10)
        assert not child.alive
        assert processes_of(directory) == []
        assert not directory.exists()

    with_supervisor(run_dir, work)


@pytest.mark.parametrize("victim", ["nvidia-cuda-mps-control", "mps_daemon"])
def test_what_a_death_leaves_is_ended_or_cleared(run_dir: Path, victim: str) -> None:
    """The keeper ends what a dead daemon leaves; of a dead keeper, the next one clears it."""
    directory = run_dir / "0.mps"

    async def work(supervisor: Supervisor) -> None:
        child = await keeper(supervisor, directory)
        reasons: list[str] = []
        child.on_exit = reasons.append
        (server,) = mps_daemon.servers(directory)
        (process,) = [p for p in processes_of(directory) if victim in " ".join(p.cmdline())]
        process.kill()
        await child.ended()
        (reason,) = reasons
        if victim == "mps_daemon":
            assert reason == "its process ended with signal 9"
            assert psutil.pid_exists(server)
        else:
            assert "nvidia-cuda-mps-control ended with status -9" in reason
            assert processes_of(directory) == []
        await child.kill()
        successor = await keeper(supervisor, directory)
        assert mps_daemon.servers(directory) != [server]
        assert not psutil.pid_exists(server)
        await successor.stop(10)
        assert processes_of(directory) == []

    with_supervisor(run_dir, work)


def test_the_daemon_does_not_outlive_a_server_that_was_killed(run_dir: Path) -> None:
    directory = run_dir / "0.mps"
    peer = Path(__file__).with_name("mps_peer.py")
    server = subprocess.Popen([sys.executable, str(peer), str(run_dir)])
    wait_for((run_dir / "ready").exists, 20, "a daemon")
    assert len(processes_of(directory)) == 3
    server.kill()
    server.wait()
    wait_for(lambda: not processes_of(directory), 10, "the end of MPS")
    wait_for(lambda: not directory.exists(), 5, "the end of its directory")


def test_a_daemon_that_cannot_start_says_why(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MPS", "broken")

    async def work(supervisor: Supervisor) -> None:
        with pytest.raises(
            StartFailed, match=r"ended with status 1; control\.log: this GPU cannot do it"
        ):
            await keeper(supervisor, run_dir / "0.mps")

    with_supervisor(run_dir, work)
    assert processes_of(run_dir / "0.mps") == []


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mps_daemon.missing() is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert mps_daemon.missing() == (
        "there is no nvidia-cuda-mps-control on the PATH; it comes with NVIDIA's driver"
    )


def test_leftovers_of_cuda_are_those_of_one_process() -> None:
    names = ["cuda.shm.3e8.1f.1", "cuda.shm.3e8.1f.22", "cuda.shm.3e8.1f0.1", "cuda.shm.0.1f.1"]
    assert cuda_leftovers([*names, "x"], 1000, 31) == ["cuda.shm.3e8.1f.1", "cuda.shm.3e8.1f.22"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fake", ["", "closed"])
def test_a_failed_update_leaves_mps_to_what_serves(
    store: Store, run_dir: Path, monkeypatch: pytest.MonkeyPatch, fake: str
) -> None:
    """Who its clients are, who is none, and whether that may be."""
    monkeypatch.setenv("FAKE_MPS", fake)
    digests = store_model(store, Mlp(), 2)
    damaged = store_model(store, Mlp(seed=5), 1)[0]
    program = store.path(damaged) / "program.pt2"
    program.chmod(0o600)
    program.write_bytes(program.read_bytes()[:-100])
    blocks = {"one": digests[0], "two": digests[1]}
    serves = with_mps(topology(store.root, {"a": blocks}, one=ON_GPU, two=ON_GPU), "auto")
    two = {**serves["blocks"]["two"], "max_batch": 4}
    failing = {**serves["blocks"], "two": two, "three": {**ON_GPU, "artifact": damaged}}
    with serve(run_dir, serves) as server:
        server.wait_ready(120)
        before = mps_of(server)
        assert before["clients"] == ({} if fake else pids(server))
        for setting in ("auto", "on"):
            with pytest.raises(BlockFlowError, match="the old generation keeps serving"):
                server.control.put_topology(with_mps({**serves, "blocks": failing}, setting))
            assert mps_of(server) == before
        kill_worker(server, "one")
        assert mps_of(server)["state"] == before["state"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_why_a_gpu_does_without_mps_is_told_of_what_serves(
    store: Store, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not of what was tried."""
    programs = run_dir / "bin"  # NVIDIA's are not there yet
    monkeypatch.setenv("PATH", os.environ["PATH"].replace(str(FAKE), str(programs)))
    digests = store_model(store, Mlp(), 2)
    blocks = {"one": digests[0], "two": digests[1]}
    off = with_mps(topology(store.root, {"a": blocks}, one=ON_GPU, two=ON_GPU), "off")
    with serve(run_dir, off) as server:
        server.wait_ready(120)
        control = server.control
        with pytest.raises(TopologyInvalid, match="it is on, but MPS cannot be had"):
            control.put_topology(with_mps(off, "on"))
        assert mps_of(server) == {"state": "off", "reason": None, "clients": {}}
        auto = with_mps(off, "auto")
        control.put_topology(auto)
        before = mps_of(server)
        assert before == {"state": "failed", "reason": mps_daemon.missing(), "clients": {}}
        programs.symlink_to(FAKE)
        with pytest.raises(BlockFlowError, match="the old generation keeps serving"):
            control.put_topology(auto, timeout_s=0.1)
        assert mps_of(server) == before
        control.put_topology(auto)
        assert mps_of(server) == {"state": "on", "reason": None, "clients": pids(server)}
