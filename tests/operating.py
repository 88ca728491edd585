"""What operators do to a server while it serves, for tests and for benchmarks alike."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blockflow.client import ControlClient
from blockflow.errors import BlockFlowError
from running import Server, some_rows, topology, wait_for


def three_blocks(store: Path, mlp: Sequence[str]) -> dict[str, Any]:
    """Pipeline `a` through the three blocks `one`, `two` and `three`, a worker for each."""
    return topology(store, {"a": {"one": mlp[0], "two": mlp[1], "three": mlp[2]}})


def what_serves(server: Server) -> tuple[int, Mapping[str, Any]]:
    current = server.control.topology()
    return current["generation"], current["topology"]


def twenty_updates(
    control: ControlClient, base: dict[str, Any], others: Sequence[str]
) -> list[Callable[[], Any]]:
    """Changes of every kind to `three_blocks`; the last one leaves what was there at first.

    others: the digests of three more blocks, of which steps 3 to 12 have a pipeline `b`.
    """
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


def kill_worker(server: Server, block: str) -> float:
    """SIGKILL for the process of `block`; gives the seconds until all was ready again."""
    os.kill(server.block(block)["pid"], signal.SIGKILL)
    start = time.monotonic()
    wait_for(lambda: not server.control.ready(), 1, "not ready")
    server.wait_ready(30)
    return time.monotonic() - start


def kill_during_updates(
    directory: Path, store: Path, mlp: Sequence[str], kills: int
) -> Iterator[Counter[str]]:
    """SIGKILL for the server at random moments of updates that do and do not start workers.

    After each kill, the next server is started without a topology, and must come up with the last
    one that was acknowledged; or with the one that was being applied, for it may have been decided
    and the server killed before it could say so. Gives how often each was so.
    """
    randomly = random.Random(2)
    alone = topology(store, {"a": {"one": mlp[0]}})
    wanted = [
        {**alone, "pipelines": {**alone["pipelines"], "b": {"blocks": ["one"]}}},
        topology(store, {"a": {"one": mlp[0]}}, one={"max_batch": 4}),
        alone,
        topology(store, {"a": {"one": mlp[0], "two": mlp[1]}}),
    ]
    outcomes = Counter({"acknowledged": 0, "decided": 0})
    server = Server(directory, alone)
    try:
        server.wait_ready()
        known = what_serves(server)
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
                    known = what_serves(server)

            thread = threading.Thread(target=update)
            thread.start()
            time.sleep(randomly.uniform(0, 3 if kill % 2 else 0.3))
            server.process.kill()
            server.process.wait()
            thread.join()
            server.close()

            server = Server(directory, None)
            server.wait_ready()
            generation, found = what_serves(server)
            if generation == known[0]:
                assert found == known[1]
                outcomes["acknowledged"] += 1
            else:
                assert generation == known[0] + 1
                for part in ("pipelines", "blocks"):
                    assert found[part].keys() == tried[-1][part].keys()
                outcomes["decided"] += 1
            assert server.inference.infer("a", {"x": some_rows()})
            known = generation, found
            yield outcomes
    finally:
        server.close()
