"""Thousands of strange requests to a whole server: no 5xx, no hang, no slot lost.

    python benchmarks/fuzz.py [--rest 5000] [--infer 20000] [--output docs/results/fuzz.json]

The management API is asked what its own OpenAPI document allows, and what it does not allow
(schemathesis); the inference API gets mutated bodies, with 4 slots, so that few lost ones would
stop it.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from measured import conditions, write
from schemathesis import Case
from served import Mlp, Server, directory, store_model, topology

from blockflow.artifact import Store
from blockflow.client import InferenceClient
from fuzzing import Answer, Findings, fuzz_infer, fuzz_rest

_DEPTH = 4


def rest(server: Server, cases: int) -> Findings:
    url = f"http://127.0.0.1:{server.control_port}"
    findings = Findings()
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        document = client.get("/openapi.json").json()

        def ask(case: Case) -> Answer:
            sent = case.as_transport_kwargs(base_url=url)
            response = client.request(
                sent["method"],
                sent["url"],
                params=sent.get("params"),
                headers={**sent["headers"], "host": f"127.0.0.1:{server.control_port}"},
                **({"json": sent["json"]} if "json" in sent else {"content": sent.get("data")}),
            )
            return Answer(response.status_code, dict(response.headers), response.content)

        operations = sum(len(each) for each in document["paths"].values())
        number = 0
        while findings.statuses.total() < cases:
            fuzz_rest(document, ask, max(20, cases // operations), findings, number=number)
            number += 1
    return findings


def every_slot_is_free(server: Server) -> bool:
    answered = []

    def call() -> None:
        with InferenceClient(f"http://127.0.0.1:{server.http_port}", timeout=20) as client:
            answered.append(client.infer("a", {"x": np.zeros((1, 16), np.float32)}))

    threads = [threading.Thread(target=call) for _ in range(_DEPTH)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(answered) == _DEPTH


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rest", type=int, default=5000)
    parser.add_argument("--infer", type=int, default=20000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    with directory() as place:
        store = Store(place / "store", create=True)
        wanted = topology(store.root, {"a": {"one": store_model(store, Mlp(), 1)[0]}})
        with Server(place, wanted, "--queue-depth", str(_DEPTH), "--log-level", "error") as server:
            server.wait_ready()
            infer = Findings()
            fuzz_infer(server.http_port, "a", options.infer, infer)
            results["infer"] = {
                "cases": infer.statuses.total(),
                "statuses": dict(sorted(infer.statuses.items())),
                "faults": infer.faults,
                "every slot is free": every_slot_is_free(server),
            }
            found = rest(server, options.rest)
            results["rest"] = {
                "cases": found.statuses.total(),
                "statuses": dict(sorted(found.statuses.items())),
                "faults": found.faults,
                "alive": server.control.health(),
            }
    for name, each in results.items():
        print(name, each)
    write(options.output, {**conditions("cpu"), **results})


if __name__ == "__main__":
    main()
