"""What operators do to a server while it serves: updates, kills of workers, kills of the server.

    python benchmarks/endurance.py [--kills 50] [--output docs/results/control-plane.json]

1. Poisson load at half the capacity for at least 60 s while 20 updates of every kind are applied.
2. The same load while every worker is killed with SIGKILL in turn.
3. SIGKILL of the server at random moments of updates, `--kills` times; each time the next server
   must come up with the last topology that was acknowledged.

The load comes from a process of its own, which checks every answer. The capacity is what a closed
loop of 8 requests gets while workers are restarted one after the other: a worker that starts takes
as much of a small machine's cores as it can get.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measured import conditions, percentiles, write
from served import (
    Body,
    Load,
    Mlp,
    Server,
    capacity,
    count,
    directory,
    store_model,
    topology,
    wait_for,
)

from blockflow.artifact import Store
from blockflow.client import ControlClient
from blockflow.errors import BlockFlowError

_SECONDS = 60.0


def updates(
    control: ControlClient, base: dict[str, Any], others: list[str]
) -> list[Callable[[], Any]]:
    """Twenty changes of every kind; the last one leaves what was there before the first."""
    pieces = [f"other{number}" for number in range(3)]
    moved = {**base, "blocks": {n: {**b, "worker": "w"} for n, b in base["blocks"].items()}}
    swapped = {
        **base,
        "blocks": {**base["blocks"], "two": {**base["blocks"]["two"], "max_batch": 2}},
    }
    add: list[Callable[[], Any]] = [
        lambda n=name, d=digest: control.deploy("block", n, {"artifact": d})  # type: ignore[misc]
        for name, digest in zip(pieces, others, strict=True)
    ]
    return [
        *add,
        lambda: control.deploy("pipeline", "b", {"blocks": pieces}),
        lambda: control.configure("block", "two", {"max_batch": 4}),
        lambda: control.configure("block", "two", {"max_batch": None}),
        lambda: control.restart("two"),
        lambda: control.configure("block", "one", {"worker": "together"}),
        lambda: control.configure("block", "two", {"worker": "together"}),
        lambda: control.restart("one"),
        lambda: control.configure("block", "one", {"worker": None}),
        lambda: control.configure("pipeline", "b", {"outputs": ["label"]}),
        lambda: control.delete("pipeline", "b"),
        control.rollback,
        lambda: control.delete("block", "other1", cascade=True),
        lambda: control.put_topology(moved),
        control.rollback,
        lambda: control.put_topology(swapped),
        lambda: control.deploy("pipeline", "c", {"blocks": ["one", "two", "three"]}),
        lambda: control.put_topology(base),
    ]


def under_load(server: Server, body: Body, rate: float, work: Callable[[], Any]) -> dict[str, Any]:
    """Do `work` under load for at least a minute, and say what became of the requests."""
    load = Load(server, "a", body, "--rate", str(rate), "--seconds", "3600")
    begin = time.monotonic()
    done = work()
    time.sleep(max(0.0, _SECONDS - (time.monotonic() - begin)))
    rows = load.stop()
    taken = [1e3 * seconds for _, seconds, status in rows if status == 200]
    return {
        "seconds": time.monotonic() - begin,
        **count(rows),
        "failed": sum(status != 200 for *_, status in rows),
        "wrong": sum(status == -1 for *_, status in rows),
        "ms": percentiles(taken),
        "longest_ms": max(taken),
        "work": done,
    }


def apply_all(server: Server, base: dict[str, Any], others: list[str]) -> list[float]:
    seconds = []
    begin = time.monotonic()
    for number, step in enumerate(updates(server.control, base, others)):
        time.sleep(max(0.0, begin + number * _SECONDS / 20 - time.monotonic()))
        start = time.monotonic()
        step()
        seconds.append(time.monotonic() - start)
        assert server.control.ready()
    return seconds


def kill_all(server: Server) -> dict[str, float]:
    """Seconds until every pipeline was ready again, by the block whose worker was killed."""
    took = {}
    for victim in ("one", "two", "three"):
        time.sleep(3)
        os.kill(server.block(victim)["pid"], signal.SIGKILL)
        start = time.monotonic()
        wait_for(lambda: not server.control.ready(), 5, "not ready")
        server.wait_ready(60)
        took[victim] = time.monotonic() - start
    return took


@contextlib.contextmanager
def restarting(server: Server) -> Iterator[None]:
    """One worker after the other is restarted meanwhile."""
    stop = threading.Event()

    def restart() -> None:
        for victim in itertools.cycle(("one", "two", "three")):
            if stop.is_set():
                return
            server.control.restart(victim)

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def serves(server: Server) -> tuple[int, dict[str, Any]]:
    current = server.control.topology()
    return current["generation"], current["topology"]


def kill_servers(place: Path, store: Store, mlp: list[str], kills: int) -> dict[str, Any]:
    randomly = random.Random(2)
    alone = topology(store.root, {"a": {"one": mlp[0]}})
    wanted = [
        {**alone, "pipelines": {**alone["pipelines"], "b": {"blocks": ["one"]}}},
        topology(store.root, {"a": {"one": mlp[0]}}, one={"max_batch": 4}),
        alone,
        topology(store.root, {"a": {"one": mlp[0], "two": mlp[1]}}),
    ]
    server = Server(place, alone)
    outcomes = {"acknowledged": 0, "decided and not yet acknowledged": 0}
    try:
        server.wait_ready()
        known = serves(server)
        for kill in range(kills):
            tried: list[Any] = []

            def update(server: Server = server, tried: list[Any] = tried) -> None:
                nonlocal known
                for each in wanted:
                    tried.append(each)
                    try:
                        server.control.put_topology(each)
                    except BlockFlowError:
                        return
                    known = serves(server)

            thread = threading.Thread(target=update)
            thread.start()
            time.sleep(randomly.uniform(0, 5 if kill % 2 else 0.5))
            server.process.kill()
            server.process.wait()
            thread.join()
            server.control.close()
            server.inference.close()
            server = Server(place, None)
            server.wait_ready()
            found = serves(server)
            if found == known:
                outcomes["acknowledged"] += 1
            else:
                blocks = {name: block["artifact"] for name, block in found[1]["blocks"].items()}
                assert found[0] == known[0] + 1, (found[0], known[0])
                assert blocks == {n: b["artifact"] for n, b in tried[-1]["blocks"].items()}
                outcomes["decided and not yet acknowledged"] += 1
            assert server.inference.infer("a", {"x": np.zeros((1, 16), np.float32)})
            known = found
            print(f"kill {kill + 1}: {outcomes}", flush=True)
    finally:
        server.close()
    return {"kills": kills, "came up with the last topology": outcomes}


def measure(kills: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with directory() as place:
        store = Store(place / "store", create=True)
        mlp, others = store_model(store, Mlp(), 3), store_model(store, Mlp(seed=5), 3)
        base = topology(store.root, {"a": {"one": mlp[0], "two": mlp[1], "three": mlp[2]}})
        body = Body(place / "body.npz", Mlp(), np.ones((2, 16), np.float32))
        with Server(place, base) as server:
            server.wait_ready()
            results["capacity_at_rest_per_s"] = capacity(server, "a", body, 8, 8)
            with restarting(server):
                most = results["capacity_per_s"] = capacity(server, "a", body, 8, 20)
            print(results, flush=True)
            results["updates"] = under_load(
                server, body, most / 2, lambda: apply_all(server, base, others)
            )
            print(results["updates"], flush=True)
            results["kills of workers"] = under_load(
                server, body, most / 2, lambda: kill_all(server)
            )
            print(results["kills of workers"], flush=True)
    with directory() as place:
        store = Store(place / "store", create=True)
        results["kills of the server"] = kill_servers(
            place, store, store_model(store, Mlp(), 3), kills
        )
    return results


def table(results: dict[str, Any]) -> list[str]:
    lines = [
        (
            f"Capacity {results['capacity_per_s']:.0f} requests/s while workers are restarted "
            f"({results['capacity_at_rest_per_s']:.0f} at rest); load at half of it."
        ),
        "",
        "| while | seconds | requests | failed | wrong | p50 ms | p99 ms | longest ms |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in ("updates", "kills of workers"):
        found = results[name]
        ms = found["ms"]
        lines.append(
            f"| {name} | {found['seconds']:.0f} | {found['requests']} | {found['failed']} | "
            f"{found['wrong']} | {ms['p50']:.1f} | {ms['p99']:.1f} | {found['longest_ms']:.0f} |"
        )
    took = results["updates"]["work"]
    ready = results["kills of workers"]["work"]
    server = results["kills of the server"]
    return [
        *lines,
        "",
        f"20 updates took {min(took):.2f} to {max(took):.2f} s each.",
        "Ready again after " + ", ".join(f"{s:.1f} s ({name})" for name, s in ready.items()) + ".",
        f"{server['kills']} kills of the server: {server['came up with the last topology']}.",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    results = measure(options.kills)
    print("\n".join(table(results)))
    write(options.output, {**conditions("cpu"), **results})


if __name__ == "__main__":
    main()
