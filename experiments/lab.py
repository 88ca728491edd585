"""What every experiment shares: its options, where it runs, its statistics, and what it writes.

Times are in milliseconds unless a name says otherwise, and taken from CLOCK_MONOTONIC, which all
processes of a host share.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

import tensormq
from blockflow.artifact import Store
from blockflow.devices import Device, list_devices
from blockflow.models import ModuleSource, parse_input, resolve
from blockflow.topology import Precision

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import balanced
import measured

MIB = 1 << 20


def arguments(description: str | None, *, model: str) -> argparse.ArgumentParser:
    """The options that every experiment has. Starts the process anew where it must."""
    measured.start_as_served(
        {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            # To look for a GPU must not begin to use it: MPS can only be joined before.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
    )
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=model)
    parser.add_argument(
        "--input", help="what it takes, where it does not tell: x:float32[batch,3,64,64]"
    )
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--device", default=list_devices()[:2][-1].name, help="cpu or cuda:<index>")
    parser.add_argument(
        "--mps",
        default="auto",
        choices=("auto", "on", "off"),
        help="of every variant: as the topology's setting for the GPU says, auto by default",
    )
    parser.add_argument(
        "--precision", default="fp32", choices=get_args(Precision), help="of every variant"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a short run: two to three minutes with a GPU and 16 cores (see README.md)",
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where results go")
    parser.add_argument("--store", type=Path, help="keep blocks here, for the next experiment")
    return parser


class Lab:
    """One run of an experiment: its folders, its network, and what it found."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.options = options
        self.device = str(options.device)
        self.mps = False
        # A CPU computes in float32 whatever is asked for.
        self.precision: Precision = options.precision if self.device != "cpu" else "fp32"
        self.gpu = self.device.startswith("cuda")
        self.console = Console(width=140)
        self.runners = ("eager", "graph") if self.gpu else ("eager",)
        self._folders = 0
        self._conditions: dict[str, Any] = {}
        self._split: dict[str, Any] | None = None
        self.left_out: dict[str, str] = {}
        self._start = time.monotonic()
        # Experiments want a machine to themselves; whether they had it can be read from this.
        self._load = os.getloadavg()[0]
        self._stack = contextlib.ExitStack()
        # Short, because the paths of sockets in it are limited; mkdtemp makes it private.
        self.folder = Path(tempfile.mkdtemp(prefix="lab-"))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.store = Store(options.store or self.folder / "store", create=True)
        options.out.mkdir(parents=True, exist_ok=True)

    def source(self) -> ModuleSource:
        """The network that is measured: its weights are the same for the same seed, everywhere."""
        given = self.options.input
        source = resolve(self.options.model, [parse_input(given)] if given else [])
        if not isinstance(source, ModuleSource):
            raise SystemExit(f"{self.options.model} is a file: give a model that can be built")
        return source

    def blocks(self) -> list[str]:
        """The digests of the network's blocks, which are balanced for one row on this device.

        Does not use the GPU in this process: see `join`.
        """
        self.say(f"splitting {self.options.model}")
        found = balanced.blocks_of(
            self.options.model,
            self.options.blocks,
            self.store,
            balanced.one_row(self.device, self.precision),
            [self.options.input] if self.options.input else [],
        )
        self._split = found.told()
        return found.digests

    def devices(self) -> dict[str, Any]:
        """The section `devices` of topologies here."""
        return {self.device: {"mps": self.options.mps}} if self.gpu else {}

    def join(self, environment: Mapping[str, str]) -> None:
        """Share the GPU with a server's workers under MPS, in this process and those it starts.

        Before this process uses the GPU. There is one server at a time in this environment.
        """
        self.mps = bool(environment)
        if environment:
            os.environ.update(environment)
            self.device = "cuda:0"
            self.say("this process and its stages join MPS")

    @property
    def stem(self) -> str:
        """What results are called: the experiment, and the options that make it another one."""
        parts = [self.name]
        if self.gpu:
            parts += [f"mps-{self.options.mps}"] if self.options.mps != "auto" else []
            parts += [self.precision] if self.precision != "fp32" else []
        parts += ["channels-last"] if getattr(self.options, "channels_last", False) else []
        parts += ["compiled"] if tensormq.COMPILED else []
        return "-".join(parts)

    @property
    def figure(self) -> Path:
        return Path(self.options.out) / f"{self.stem}.png"

    def new_folder(self) -> Path:
        """A private folder for sockets, of this run alone."""
        self._folders += 1
        folder = self.folder / str(self._folders)
        folder.mkdir(mode=0o700)
        return folder

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self._start:6.1f} s  {line}", flush=True)

    def leave_out(self, what: str, why: str) -> None:
        """Name what is not measured here; it appears in the table and in the JSON."""
        self.left_out[what] = why
        self.say(f"left out: {what} ({why})")

    def note_conditions(self) -> None:
        """Note where and with what this runs, while this process can still ask the GPU.

        It no longer can when the server has ended under whose MPS it used it.
        """
        self._conditions = measured.conditions(self.device)

    def conditions(self) -> dict[str, Any]:
        """Where, when and with what this ran."""
        if not self._conditions:
            self.note_conditions()
        found = dict(self._conditions)
        found["seconds"] = round(time.monotonic() - self._start, 1)
        found["load_average"] = self._load
        found["precision"] = self.precision
        found["split"] = self._split
        found["mps"] = f"{self.options.mps}: {'joined' if self.mps else 'not used'}"
        found["command"] = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        found["versions"] = {
            name: importlib.metadata.version(name) for name in ("torch", "pyzmq", "msgspec")
        }
        if self.gpu:
            found["cuda"] = torch.version.cuda
        return found

    def gpu_now(self) -> Device:
        """What NVML says of the GPU now: memory, power, and the energy it has taken so far."""
        return next(each for each in list_devices() if each.name == self.device)

    def write(self, results: Mapping[str, Any]) -> None:
        """Write `<experiment>.json` with the conditions and what was left out."""
        measured.write(
            self.options.out / f"{self.stem}.json",
            {
                "experiment": self.name,
                "conditions": self.conditions(),
                "left_out": self.left_out,
                **results,
            },
        )

    def judged(self, targets: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Targets with `met`, which is None where there is no GPU: they are set for one."""
        return [{**each, "met": _met(each) if self.gpu else None} for each in targets]

    def target_table(self, targets: Iterable[Mapping[str, Any]]) -> None:
        words = {True: "met", False: "MISSED", None: "not judged"}
        rows = [
            [
                each["target"],
                f"≥ {each['least']:g}" if "least" in each else f"≤ {each['most']:g}",
                "" if each["found"] is None else f"{each['found']:.3g}",
                words[each["met"]],
            ]
            for each in targets
        ]
        self.table("targets", ["target", "wanted", "found", ""], rows)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        table = Table(title=title, box=None, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class Memory:
    """Bytes that are used: of the GPU, or of these processes on the host."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._before = self._used() if lab.gpu else 0

    def _used(self) -> int:
        now = self._lab.gpu_now()
        return now.memory_total - now.memory_available

    def taken(self, root: int) -> int:
        """Since this was made; on a host, by `root` and the processes under it."""
        if self._lab.gpu:
            return self._used() - self._before
        tree = psutil.Process(root)
        return sum(p.memory_full_info().pss for p in (tree, *tree.children(recursive=True)))

    def grown(self, root: int, earlier: int) -> int:
        """What `root` takes now, which took `earlier` when this was made and alone took more."""
        return earlier + self.taken(root) if self._lab.gpu else self.taken(root)

    def settle(self, seconds: float = 10) -> None:
        """Wait until what was given back has arrived, and say so when some of it does not come."""
        end = time.monotonic() + seconds
        while self._lab.gpu and (held := self._used() - self._before) > 16 * MIB:
            if time.monotonic() > end:
                self._lab.say(f"{held / MIB:.0f} MiB of the GPU were not given back")
                break
            time.sleep(0.1)


def statistics(values: Sequence[float]) -> dict[str, float]:
    """Mean, σ, p50 and p99 of `values`, and how many there are."""
    array = np.asarray(values, float)
    p50, p99 = np.percentile(array, [50, 99])
    return {
        "mean": float(array.mean()),
        "sigma": float(array.std()),
        "p50": float(p50),
        "p99": float(p99),
        "n": len(array),
    }


def shuffled(items: Sequence[Any], rounds: int, seed: int = 0) -> Iterator[Any]:
    """Every item once a round, each round in an order of its own, the same for the same seed.

    A slow moment of the machine then meets all variants, and no variant always follows the same.
    """
    choose = random.Random(seed)  # noqa: S311 - repeatable, not secret
    for _ in range(rounds):
        order = list(items)
        choose.shuffle(order)
        yield from order


def at_least(name: str, wanted: float, found: float | None) -> dict[str, Any]:
    """A line of what the experiment must show; whether it does is judged in `Lab.judged`."""
    return {"target": name, "least": wanted, "found": found}


def at_most(name: str, wanted: float, found: float | None) -> dict[str, Any]:
    return {"target": name, "most": wanted, "found": found}


def _met(target: Mapping[str, Any]) -> bool | None:
    if target["found"] is None:
        return None
    if "least" in target:
        return bool(target["found"] >= target["least"])
    return bool(target["found"] <= target["most"])
