"""What admission is for: how long admitted requests take when more come than can be served.

    python benchmarks/overload.py [--seconds 20] [--output docs/results/overload.json]

Requests come as a Poisson process (open loop) from a second process. The capacity is what a closed
loop of 8 requests gets with admission off. "Unloaded" is a tenth of the capacity. A request's time
is from when it was due to its answer, by the load's clock; the first 3 s of each run are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured import conditions, percentiles, write
from served import Body, Load, Server, capacity, directory, store_model, topology
from torch import Tensor, nn

from blockflow import models
from blockflow.artifact import Store
from blockflow.split import split_model, topology_for

_LEFT_OUT = 3.0


class Wide(nn.Module):
    """float32[batch, 16] → float32[batch, 4]; 17 million weights, so that a row takes some ms."""

    def __init__(self, width: int = 2048) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(16, width)]
        for _ in range(4):
            layers += [nn.ReLU(), nn.Linear(width, width)]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def wide(store: Store) -> tuple[dict[str, Any], nn.Module, np.ndarray[Any, Any]]:
    digests = store_model(store, Wide(), 2)
    wanted = topology(
        store.root,
        {"m": {"one": digests[0], "two": digests[1]}},
        one={"max_batch": 1, "worker": "w"},
        two={"max_batch": 1, "worker": "w"},
    )
    return wanted, Wide(), np.ones((1, 16), np.float32)


def resnet18(store: Store) -> tuple[dict[str, Any], nn.Module, np.ndarray[Any, Any]]:
    source = models.resolve("resnet18")
    assert isinstance(source, models.ModuleSource)
    made = topology_for(split_model(source, 3, store), "m", device="cpu")
    wanted = {**made.model_dump(exclude_none=True), "store": str(store.root)}
    return wanted, source.module, np.zeros((1, 3, 224, 224), np.float32)


MODELS = {"MLP, 17 M weights, 2 blocks": wide, "ResNet-18, 3 blocks": resnet18}


def measure(name: str, seconds: float) -> dict[str, Any]:
    with directory() as place:
        store = Store(place / "store", create=True)
        wanted, model, x = MODELS[name](store)
        body = Body(place / "body.npz", model, x)
        off = place / "off"
        off.mkdir()
        with Server(off, wanted, "--max-slowdown", "1000000") as server:
            server.wait_ready()
            most = capacity(server, "m", body, 8, max(8.0, seconds / 2))
            without = run(server, body, 3 * most, seconds)
        on = place / "on"
        on.mkdir()
        with Server(on, wanted) as server:
            server.wait_ready()
            runs = {
                f"{times}x": run(server, body, times * most, seconds * (2 if times == 0.1 else 1))
                for times in (0.1, 0.5, 1, 3)
            }
    return {"capacity_per_s": most, "runs": {**runs, "3x, admission off": without}}


def run(server: Server, body: Body, rate: float, seconds: float) -> dict[str, Any]:
    load = Load(server, "m", body, "--rate", str(rate), "--seconds", str(seconds))
    rows = load.finish()
    begin = rows[0][0] + _LEFT_OUT
    rows = [row for row in rows if row[0] >= begin]
    answered = [1e3 * taken for _, taken, status in rows if status == 200]
    refused = [1e3 * taken for _, taken, status in rows if status == 429]
    return {
        "rate_per_s": rate,
        "requests": len(rows),
        "answered_per_s": len(answered) / (seconds - _LEFT_OUT),
        "refused_share": len(refused) / len(rows),
        "failed": len(rows) - len(answered) - len(refused),
        "ms": percentiles(answered),
        "refusal_ms": percentiles(refused) if refused else None,
        "samples_ms": [round(each, 3) for each in answered],
    }


def table(results: dict[str, Any]) -> list[str]:
    lines = [
        "| model | load | sent /s | answered /s | refused | p50 ms | p99 ms | p99 / unloaded |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in results.items():
        unloaded = found["runs"]["0.1x"]["ms"]["p99"]
        for load, each in found["runs"].items():
            ms = each["ms"]
            lines.append(
                f"| {name} | {load} | {each['rate_per_s']:.0f} | {each['answered_per_s']:.0f} | "
                f"{each['refused_share']:.0%} | {ms['p50']:.1f} | {ms['p99']:.1f} | "
                f"{ms['p99'] / unloaded:.2f} |"
            )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if options.seconds <= _LEFT_OUT:
        parser.error(f"--seconds must be more than the {_LEFT_OUT:g} that are left out")
    results = {name: measure(name, options.seconds) for name in options.model or MODELS}
    print("\n".join(table(results)))
    write(options.output, {**conditions("cpu"), "seconds": options.seconds, "models": results})


if __name__ == "__main__":
    main()
