"""The experiments run, on a network that takes no time; what they find is not looked at.

Their arithmetic is: when requests are due, what counts as kept up, who is charged for memory.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import client
import families
import lab
import numpy as np
import page
import pytest
import torch
from deployed import Entry
from families import Family, Task

from blockflow.artifact import Port
from blockflow.devices import Device
from blockflow.protocol import Note, Route, RouteId, Step, encode
from blockflow.topology import BlockName, PipelineName
from blockflow.wiring import Source
from tensormq import Loop, Pull, Push

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "experiments"

TINY = ("--model", "running:Mlp", "--input", "x:float32[batch,16]", "--device", "cpu", "--quick")


# Ten processes load torch in each: seconds on an idle machine, minutes on one that is busy.
def slow(test: Any) -> Any:
    return pytest.mark.slow(pytest.mark.timeout(320)(test))


def run(name: str, out: Path, *options: str) -> dict[str, Any]:
    """What an experiment wrote; its figure is an image."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}",
        "GOMP_SPINCOUNT": "10000",  # or an experiment starts anew to set it
    }
    command = [sys.executable, str(EXPERIMENTS / f"run_{name}_test.py"), *TINY, "--out", str(out)]
    done = subprocess.run(
        [*command, *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (source,) = out.glob("*.json")
    assert source.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads(source.read_text())
    page = subprocess.run(
        [sys.executable, str(EXPERIMENTS / "page.py"), str(out)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert page.returncode == 0, page.stderr
    text = out.with_suffix(".md").read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (out.parent / link).is_file()
    for target in found["targets"]:
        assert target["target"] in text
        assert target["met"] is None  # they are set for a GPU
    return found


@slow
def test_latency(tmp_path: Path) -> None:
    found = run("latency", tmp_path / "out", "--blocks", "2", "--rounds", "2", "--requests", "3")
    variants = {row["variant"]: row for row in found["rows"]}
    assert {"traditional, pickled", "TensorMQ, a worker each", "monolith"} <= variants.keys()
    for row in variants.values():
        assert row["max_difference"] <= 1e-6
        assert row["end_to_end_ms"]["n"] == 6
        assert row["end_to_end_ms"]["mean"] >= row["overhead_ms"]["mean"]
    assert "CUDA graphs" in found["left_out"]
    assert found["conditions"]["split"]["costs"] == "modelled"
    assert len(found["conditions"]["split"]["last_operators"]) == 2


@slow
def test_throughput(tmp_path: Path) -> None:
    options = ("--blocks", "2", "--batches", "1,2", "--clients", "2", "--rates", "0.1,0.5")
    found = run("throughput", tmp_path / "out", *options, "--seconds", "0.1")
    for each in found["loads"].values():
        assert each["peak"] >= each["saturated"]["per_second"] > 0
        assert each["saturated"]["max_difference"] <= 1e-5
    assert found["loads"]["TensorMQ, one worker, fused, batching"]["gateway"]["2"]["requests"] >= 2


@slow
def test_energy(tmp_path: Path) -> None:
    options = ("--blocks", "2", "--batches", "1", "--seconds", "0.1", "--clients", "2")
    found = run("energy", tmp_path / "out", *options)
    assert all(row["gross_mj"] is None for row in found["rows"])
    assert any("energy" in what for what in found["left_out"])
    assert all(row["per_second"] > 0 for row in found["rows"])
    assert all(row["requests"] >= 32 for row in found["rows"])
    names = {row["variant"] for row in found["rows"]}
    assert {"TensorMQ, a worker each", "TensorMQ, a worker each, batching"} <= names


@slow
def test_memory(tmp_path: Path) -> None:
    found = run("vram", tmp_path / "out", "--tasks", "2", "--fractions", "1", "--processes", "1")
    (row,) = found["rows"]
    assert found["processes"]["extrapolated"]
    assert row["weights_saved"] == pytest.approx(row["bound"])
    assert all(each["max_difference"] <= 1e-6 for each in row["blockflow"].values())


@slow
def test_sharing(tmp_path: Path) -> None:
    found = run("sharing", tmp_path / "out", "--tasks", "2", "--seconds", "0.1")
    (row,) = found["rows"]
    for each in row["found"].values():
        assert each["max_difference"] <= 1e-5
        assert each["saturated_per_second"] > 0
        met = [step for step in each["steps"] if step["met"]]
        assert each["within"]["per_second"] == max((s["per_second"] for s in met), default=0)
    memory = row["memory"]
    assert memory["bound_weights"] == pytest.approx(1 - found["share"] / 2)
    assert memory["bound_in_all"] > memory["bound_weights"]


@pytest.mark.parametrize(("rate", "seconds"), [(500.0, 2.0), (3.0, 0.1), (31.7, 4.0)])
def test_as_many_are_due_as_are_offered(rate: float, seconds: float) -> None:
    due = client.schedule(rate, seconds, 0)
    assert len(due) == max(8, round(rate * seconds))
    assert len(due) / due[-1] == pytest.approx(rate)
    assert due == sorted(due)
    assert due == client.schedule(rate, seconds, 0) != client.schedule(rate, seconds, 1)


def test_a_steady_queue_keeps_up_and_one_that_grows_does_not() -> None:
    due = client.schedule(1000, 1, 0)
    assert client.kept_up(due, [at + 0.02 for at in due]) >= client.ANSWERED
    half = [due[0] + 2e-3 * number for number in range(len(due))]  # 500 a second are answered
    assert client.kept_up(due, half) == pytest.approx(0.5, abs=0.03)
    assert client.kept_up(due, []) == 0


def test_poisson_offers_what_it_says() -> None:
    waiting: list[client.Answer] = []

    def poll(seconds: float) -> list[client.Answer]:
        found, waiting[:] = waiting[:], []
        return found

    def send(number: int) -> None:
        waiting.append(client.Answer(number, lab.time.monotonic(), None))

    found = client.poisson(send, poll, 400, 0.2, lambda answer: 0.0)
    assert len(found.ms) == 80
    assert found.seconds >= 0.2
    assert found.kept_up > 0


def searched(limit: float, start: float, rates: int) -> list[client.Step]:
    """A search of which every rate up to `limit` meets."""
    steps: list[client.Step] = []
    while (rate := client.next_rate(steps, start, rates)) is not None:
        steps.append(client.Step(rate, rate, 1, 1, 1000, 0, met=rate <= limit))
    return steps


@pytest.mark.parametrize("limit", [90.0, 130.0, 1000.0, 1800.0])
def test_the_highest_rate_is_found_from_what_saturates(limit: float) -> None:
    steps = searched(limit, 1000, 30)
    assert steps[0].offered == 1000
    best = client.best_step(steps)
    assert best is not None
    assert limit / 1.05 <= best.offered <= limit


def test_a_rate_has_failed_when_it_failed_twice() -> None:
    steps = searched(0, 1000, 4)
    assert client.best_step(steps) is None
    assert [step.offered for step in steps[:4]] == [1000, 1000, 800, 800]
    assert len(steps) == 8

    lucky = [client.Step(1000, 1000, 1, 30, 1000, 0, met=False)]
    lucky.append(client.Step(1000, 1000, 1, 19, 1000, 0, met=True))
    assert client.next_rate(lucky, 1000, 9) == 1250


def test_every_round_has_all_in_an_order_of_its_own() -> None:
    order = list(lab.shuffled("abcdef", 60, seed=3))
    rounds = [tuple(order[start : start + 6]) for start in range(0, 360, 6)]
    assert all(sorted(each) == list("abcdef") for each in rounds)
    assert len(set(rounds)) > 40
    assert len({each[(each.index("a") + 1) % 6] for each in rounds}) == 5  # who follows changes
    assert order == list(lab.shuffled("abcdef", 60, seed=3))


def test_enough_requests_where_time_allows() -> None:
    assert client.how_many(4, 0.001) == 4000
    assert client.how_many(4, 0.1) == 100
    assert client.how_many(1, 0.09) == 32


class Card:
    """What `Memory` asks of a Lab, with a GPU of which `used` bytes are taken."""

    gpu = True

    def __init__(self, used: int) -> None:
        self.used = used
        self.said: list[str] = []

    def gpu_now(self) -> Device:
        total = 1 << 40
        return Device(
            name="cuda:0",
            kind="cuda",
            model="stand-in",
            memory_total=total,
            memory_available=total - self.used,
        )

    def say(self, line: str) -> None:
        self.said.append(line)


def test_memory_is_charged_to_who_took_it() -> None:
    card: Any = Card(used=500)  # the client's own context, and what others have
    first = lab.Memory(card)
    card.used += 2000
    warm = first.taken(0)
    assert warm == 2000
    second = lab.Memory(card)
    card.used += 900
    assert second.taken(0) == 900
    under_load = lab.Memory(card)
    card.used += 70  # the first side's, while it alone is asked
    assert under_load.grown(0, warm) == 2070
    card.used = 500 + (64 << 20)
    first.settle(0)
    assert card.said == ["64 MiB of the GPU were not given back"]


def test_memory_beyond_one_context() -> None:
    tasks = tuple(Task(f"task{n}", "trunk", f"head{n}") for n in range(4))
    family = Family(tasks, 0.75, 100, {"trunk": 75, **{f"head{n}": 25 for n in range(4)}})
    taken = {"monoliths": 1000 + 440, "one trunk": 1000 + 220}
    memory = families.memory(taken, 1000, family, tasks)
    assert memory["beyond_context"] == 0.5
    assert memory["bound_weights"] == pytest.approx(1 - 0.75 * (1 - 1 / 4))
    assert memory["in_all"] == pytest.approx(1220 / 1440)
    assert memory["bound_in_all"] == pytest.approx(1175 / 1400)
    assert memory["beyond_weights_bytes"] == {"monoliths": 40, "one trunk": 45}


class Echo:
    """In the place of a House: a first block that sends its input on to where results go."""

    def __init__(self, folder: Path) -> None:
        self._endpoint = f"ipc://{folder}/block.sock"
        self._wanted: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._laid, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        loop = Loop()
        pull = Pull(self._endpoint, loop=loop)
        push = Push(slots=4, slot_bytes=256, loop=loop)
        peer = push.connect(self._wanted.get())
        self._laid.set()
        while not self._stop.is_set():
            loop.run_once(0.01)
            while (message := pull.poll()) is not None:
                with message:
                    tensors = {name: np.array(each) for name, each in message.tensors.items()}
                    note = encode(Note())
                    push.send(tensors, to=peer, requests=message.requests, note=note)
        push.close()
        pull.close()
        loop.close()

    def lay(self, pipeline: str, results: str, pump: Any) -> Route:
        self._wanted.put(results)
        while not self._laid.is_set():
            pump()
        port = Port("x", "float32", ("batch", 4))
        feeds = {"x": Source(None, "x")}
        step = Step(BlockName("b"), self._endpoint, feeds, 32, (port,))
        name = PipelineName(pipeline)
        return Route(RouteId(1), name, (step,), results, (port,), (port,), feeds)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(20)


def test_ends_on_the_host_use_no_gpu_and_a_client_that_does_not_wait_hears(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    house: Any = Echo(tmp_path)
    # On a machine without a GPU an end on the device could not be made.
    entry = Entry(house, tmp_path, ["p"], "cuda:0", sides=("host",), slots=8, rows=1)
    try:
        with pytest.raises(ValueError, match="no ends for tensors on the device: made for host"):
            entry.use("device")
        entry.use("host")
        sent = np.arange(4, dtype=np.float32)[None]
        entry.send(7, {"x": sent})
        answers: list[client.Answer] = []
        end = lab.time.monotonic() + 20
        while not answers and lab.time.monotonic() < end:
            answers = entry.poll(0)
        (answer,) = answers
        assert answer.number == 7
        np.testing.assert_array_equal(answer.output, sent)
    finally:
        entry.close()
        house.close()
    assert not torch.cuda.is_initialized()


def test_a_page_has_runs_side_by_side_and_room_for_reasons(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    where = {
        "cpu": "a CPU",
        "versions": {},
        "python": "3",
        "commit": "c",
        "date": "today",
        "seconds": 1.0,
        "precision": "fp32",
        "mps": "auto",
        "load_average": 0.0,
        "command": "run",
    }
    for stem, found, met in (("energy", 3.0, False), ("energy-mps-off", 5.0, True)):
        written = {
            "experiment": "energy",
            "conditions": where,
            "left_out": {},
            "model": "m",
            "idle_watts": {},
            "rows": [],
            "targets": [{"target": "less", "least": 4, "found": found, "met": met}],
        }
        (folder / f"{stem}.json").write_text(json.dumps(written))
    text = page.page(folder, "Title", "")
    assert "| less | ≥ 4 | 3 **MISSED** | 5 met |" in text
    assert "What was missed" not in text
    assert "### mps-off" in text
    assert ".png" not in text  # there is none
    (folder / "notes.md").write_text("Physics.\n")
    assert "## What was missed, and why\n\nPhysics." in page.page(folder, "Title", "")
    (folder / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match="not written by an experiment"):
        page.page(folder, "Title", "")
