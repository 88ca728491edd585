"""Workers of one NVIDIA GPU under MPS, with NVIDIA's own daemon."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from blockflow import mps_daemon
from blockflow.artifact import Store
from running import Load, Mlp, Server, four_blocks, store_model, topology, wait_for

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(400)]

NAMES = ("one", "two", "three", "four")


@pytest.fixture
def wanted(store: Store) -> dict[str, Any]:
    """`Mlp()` in three workers of cuda:0 under MPS, exact enough for `Load`."""
    settings = {"device": "cuda:0", "precision": "fp32"}
    blocks = dict(zip(NAMES, store_model(store, Mlp(), 3), strict=False))
    made = topology(store.root, {"a": blocks}, **dict.fromkeys(blocks, settings))
    return {**made, "devices": {"cuda:0": {"mps": "on"}}}


def mps_of(server: Server) -> dict[str, Any]:
    (gpu,) = [d for d in server.control.devices()["devices"] if d["name"] == "cuda:0"]
    mps: dict[str, Any] = gpu["mps"]
    return mps


def pipes(server: Server) -> Path:
    return server.run_dir / "0.mps"


def pids(server: Server) -> dict[str, int]:
    return {block["worker"]: block["pid"] for block in server.control.blocks()}


def processes(directory: Path) -> list[psutil.Process]:
    """NVIDIA's daemon and server with this pipe directory, and what keeps them."""
    return [p for p in psutil.process_iter() if mps_daemon._is_left(p, directory)]


def test_four_workers_are_clients_and_compute_what_the_network_does(
    store: Store, run_dir: Path
) -> None:
    wanted, x, expected = four_blocks(store, "cuda:0")
    with Server(run_dir, {**wanted, "devices": {"cuda:0": {"mps": "on"}}}) as server:
        server.wait_ready(240)
        workers = pids(server)
        assert len(set(workers.values())) == 4
        assert mps_of(server) == {"state": "on", "reason": None, "clients": workers}
        assert set(mps_daemon.clients(pipes(server))) == set(workers.values())
        for _ in range(20):
            got = server.inference.infer("resnet50", {"x": x})["output"]
            np.testing.assert_allclose(got, expected, atol=1e-3)
        directory = pipes(server)
        assert processes(directory)
    assert processes(directory) == []
    assert not server.run_dir.exists()


def test_the_death_of_one_restarts_all_and_loses_nothing(
    wanted: dict[str, Any], run_dir: Path
) -> None:
    with Server(run_dir, wanted, "--request-timeout", "120") as server:
        server.wait_ready(240)
        before = pids(server)
        with contextlib.ExitStack() as stack:
            loads = [stack.enter_context(Load(server, "a", Mlp())) for _ in range(4)]
            wait_for(lambda: all(load.good > 20 for load in loads), 30, "answers")
            os.kill(before["two"], signal.SIGKILL)

            def back() -> bool:
                now = pids(server)
                return None not in now.values() and not set(now.values()) & set(before.values())

            wait_for(back, 120, "successors of all")
            server.wait_ready(120)
            good = [load.good for load in loads]
            wait_for(
                lambda: all(load.good > g + 20 for load, g in zip(loads, good, strict=True)),
                60,
                "answers after the death",
            )
        assert [load.failures for load in loads] == [[], [], [], []]
        assert mps_of(server) == {"state": "on", "reason": None, "clients": pids(server)}
        assert set(mps_daemon.clients(pipes(server))) == set(pids(server).values())


def test_mps_is_turned_off_and_on_under_load(wanted: dict[str, Any], run_dir: Path) -> None:
    with Server(run_dir, wanted) as server:
        server.wait_ready(240)
        with Load(server, "a", Mlp()) as load:
            for setting in ("off", "auto"):
                before = pids(server)
                server.control.put_topology({**wanted, "devices": {"cuda:0": {"mps": setting}}})
                assert not set(pids(server).values()) & set(before.values())
                on = setting == "auto"
                assert mps_of(server)["state"] == ("on" if on else "off")
                assert bool(processes(pipes(server))) == on
                good = load.good
                wait_for(lambda good=good: load.good > good + 20, 30, "answers")  # type: ignore[misc]
        assert load.failures == []


def test_nothing_of_mps_outlives_a_server_that_was_killed(
    wanted: dict[str, Any], run_dir: Path
) -> None:
    server = Server(run_dir, wanted)
    try:
        server.wait_ready(240)
        directory = pipes(server)
        assert processes(directory)
        server.process.kill()
        server.process.wait()
        wait_for(lambda: not processes(directory), 30, "the end of MPS")
    finally:
        server.close()
    with Server(run_dir, wanted) as successor:  # in the same run directory
        successor.wait_ready(240)
        assert set(mps_daemon.clients(pipes(successor))) == set(pids(successor).values())
    assert not successor.run_dir.exists()
