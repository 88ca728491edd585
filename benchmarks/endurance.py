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
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measured import conditions, percentiles, write
from served import Body, Load, Mlp, Server, capacity, count, directory, store_model

from blockflow.artifact import Store
from operating import kill_during_updates, kill_worker, three_blocks, twenty_updates

_SECONDS = 60.0


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
    for number, step in enumerate(twenty_updates(server.control, base, others)):
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
        took[victim] = kill_worker(server, victim)
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


def kill_servers(kills: int) -> dict[str, Any]:
    found: Counter[str] = Counter()
    with directory() as place:
        store = Store(place / "store", create=True)
        mlp = store_model(store, Mlp(), 3)
        for kill, outcomes in enumerate(kill_during_updates(place, store.root, mlp, kills), 1):
            print(f"kill {kill}: {dict(outcomes)}", flush=True)
            found = outcomes
    return {"kills": kills, "came up with": dict(found)}


def serve_and_disturb() -> dict[str, Any]:
    """The first two parts, on one server."""
    results: dict[str, Any] = {}
    with directory() as place:
        store = Store(place / "store", create=True)
        mlp, others = store_model(store, Mlp(), 3), store_model(store, Mlp(seed=5), 3)
        base = three_blocks(store.root, mlp)
        body = Body(place / "body.npz", Mlp(), np.ones((2, 16), np.float32))
        with Server(place, base) as server:
            server.wait_ready()
            results["capacity_at_rest_per_s"] = capacity(server, "a", body, 8, 8)
            with restarting(server):
                most = results["capacity_per_s"] = capacity(server, "a", body, 8, 20)
            print(results, flush=True)
            for name, work in (
                ("kills of workers", lambda: kill_all(server)),
                ("updates", lambda: apply_all(server, base, others)),
            ):
                results[name] = under_load(server, body, most / 2, work)
                print(name, results[name], flush=True)
    return results


def measure(kills: int) -> dict[str, Any]:
    return {**serve_and_disturb(), "kills of the server": kill_servers(kills)}


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
        f"{server['kills']} kills of the server; what came up was: {server['came up with']}.",
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
