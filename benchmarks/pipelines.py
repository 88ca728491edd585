"""What many pipelines cost: 1, 20 and 200 of them over 20 blocks in 4 workers.

    python benchmarks/pipelines.py [--rounds 5] [--output docs/results/pipelines.json]

Each pipeline is another chain of three blocks. The overhead is measured for one and the same
pipeline, asked one request at a time from a second process: the gateway's processor time for each
request (user and system, of all its threads), and the time from request to answer. The counts of
pipelines are taken in turn, `--rounds` times, so that a neighbour's work hits all of them alike.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from measured import conditions, percentiles, write
from served import Body, Load, Server, directory, store_model
from torch import Tensor, nn

from blockflow.artifact import Store

_BLOCKS = 20
_WORKERS = 4
_COUNTS = (1, 20, 200)


class Layer(nn.Module):
    """float32[batch, 16] → float32[batch, 16]; `seed` makes it another block."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def topology(store: Store, digests: Sequence[str], pipelines: int) -> dict[str, Any]:
    # In one order, for all pipelines together must not form a cycle. The first is always the same.
    chains = itertools.islice(itertools.combinations(range(_BLOCKS), 3), None)
    spread = sorted(chains, key=lambda chain: (chain != (0, 1, 2), sum(chain) * 7919 % 1009))
    return {
        "store": str(store.root),
        "blocks": {
            f"b{number}": {"artifact": digest, "worker": f"w{number % _WORKERS}"}
            for number, digest in enumerate(digests)
        },
        "pipelines": {
            f"p{number}": {"blocks": [f"b{block}" for block in chain]}
            for number, chain in enumerate(spread[:pipelines])
        },
    }


def gateway_of(server: Server) -> psutil.Process:
    (found,) = [child for child in server.children if "blockflow.gateway" in child.cmdline()]
    return found


def ask(server: Server, body: Body, seconds: float) -> tuple[float, list[float]]:
    """The gateway's processor time for a request, and the times of the requests; milliseconds."""
    gateway = gateway_of(server)
    before = gateway.cpu_times()
    rows = Load(server, "p0", body, "--clients", "1", "--seconds", str(seconds)).finish()
    after = gateway.cpu_times()
    assert all(status == 200 for *_, status in rows)
    spent = (after.user + after.system) - (before.user + before.system)
    return 1e3 * spent / len(rows), [1e3 * taken for _, taken, _ in rows]


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    with directory() as place:
        store = Store(place / "store", create=True)
        layers = [Layer(seed) for seed in range(_BLOCKS)]
        digests = [store_model(store, layer, 1)[0] for layer in layers]
        body = Body(place / "body.npz", nn.Sequential(*layers[:3]), np.ones((1, 16), np.float32))
        found: dict[int, dict[str, list[Any]]] = {
            count: {"apply_s": [], "server_mib": [], "gateway_mib": [], "cpu_ms": [], "ms": []}
            for count in _COUNTS
        }
        with Server(place, topology(store, digests, 1)) as server:
            server.wait_ready(120)
            ask(server, body, 2)
            for _ in range(rounds):
                for count in _COUNTS:
                    start = time.monotonic()
                    server.control.put_topology(topology(store, digests, count))
                    took = time.monotonic() - start
                    time.sleep(1)
                    cpu, taken = ask(server, body, seconds)
                    each = found[count]
                    each["apply_s"].append(took)
                    each["server_mib"].append(
                        psutil.Process(server.process.pid).memory_info().rss / 2**20
                    )
                    each["gateway_mib"].append(gateway_of(server).memory_info().rss / 2**20)
                    each["cpu_ms"].append(cpu)
                    each["ms"].append(percentiles(taken))
    return {str(count): each for count, each in found.items()}


def table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| pipelines | apply s | server MiB | gateway MiB | CPU ms/request | vs 1 | p50 ms |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    one = median(found["1"]["cpu_ms"])
    for count, each in found.items():
        cpu = median(each["cpu_ms"])
        lines.append(
            f"| {count} | {median(each['apply_s']):.2f} | {median(each['server_mib']):.0f} | "
            f"{median(each['gateway_mib']):.0f} | {cpu:.3f} | {cpu / one:.2f} | "
            f"{median(ms['p50'] for ms in each['ms']):.2f} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    found = measure(options.rounds, options.seconds)
    print("\n".join(table(found)))
    write(options.output, {**conditions("cpu"), "pipelines": found})


if __name__ == "__main__":
    main()
