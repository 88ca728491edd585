"""Networks and how they are run: op by op, or as one CUDA graph; whole, or block by block."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blockflow.artifact import Manifest, Port, Store
from blockflow.backends import round_to_tf32
from blockflow.models import ModuleSource
from blockflow.program import Program, load
from blockflow.runner import prepare
from blockflow.topology import Precision
from blockflow.wiring import by_rule

Tensors = dict[str, Tensor]
Call = Callable[[Mapping[str, Tensor]], Tensors]


def zeros(ports: Sequence[Port], rows: int, device: str) -> Tensors:
    return {
        port.name: torch.zeros(port.sized(rows), dtype=getattr(torch, port.dtype), device=device)
        for port in ports
    }


def arrays(ports: Sequence[Port], rows: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """One request's tensors as a client has them: equal for equal seeds."""
    generator = np.random.default_rng(seed)
    return {
        port.name: generator.standard_normal(port.sized(rows), np.float32).astype(port.dtype)
        for port in ports
    }


def synchronised(device: str) -> float:
    """Wait until `device` has done what it was given; the time when it had."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.monotonic()


def begin(device: str, precision: Precision) -> None:
    """Make `device` this thread's, with a stream of its own: the default one cannot be captured.

    `precision` holds for all that this process computes, as in BlockFlow's workers.
    """
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))
        round_to_tf32(precision == "tf32")


def run_by(program: Program, rows: int, how: str) -> Call:
    """A program as BlockFlow's own runner runs it, warm: op by op (`how` is "eager") or replayed
    from CUDA graphs ("graph"), whose results are overwritten by the next call.
    """
    runner = prepare(program, rows, graphs=how == "graph")
    if how == "graph" and runner.kind != "cuda graph":
        raise RuntimeError(f"no CUDA graph: {runner.reason}")

    def call(inputs: Mapping[str, Tensor]) -> Tensors:
        runner.take({name: (tensor,) for name, tensor in inputs.items()})
        return runner.run()

    for _ in range(3):
        call(zeros(program.manifest.inputs, rows, str(program.device)))
    synchronised(str(program.device))
    return call


def whole(source: ModuleSource, device: str) -> Call:
    """The network as its users have it: one module, called."""
    module = source.module.eval().to(device)

    def call(inputs: Mapping[str, Tensor]) -> Tensors:
        with torch.inference_mode():
            return {"output": module(**inputs)}

    return call


class Chain:
    """Blocks of the store in one process, each by itself and synchronised, or all as one."""

    def __init__(
        self,
        store: Store,
        digests: Sequence[str],
        rows: int,
        device: str,
        how: str,
        precision: Precision,
    ) -> None:
        self._device = device
        self._blocks: list[tuple[Mapping[str, str], Call]] = []
        self.manifests: list[Manifest] = []
        for digest in digests:
            program = load(store, digest, device, precision=precision)
            wires = {port.name: port.name for port in program.manifest.inputs}
            if self.manifests:
                wires = by_rule(self.manifests[-1].outputs, program.manifest.inputs)
            self._blocks.append((wires, run_by(program, rows, how)))
            self.manifests.append(program.manifest)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensors:
        values = dict(inputs)
        for wires, call in self._blocks:
            values = call({mine: values[theirs] for mine, theirs in wires.items()})
        return values

    def times(self, inputs: Mapping[str, Tensor]) -> list[float]:
        """Milliseconds of each block, from a device that is idle to one that is idle again."""
        values = dict(inputs)
        marks = [synchronised(self._device)]
        for wires, call in self._blocks:
            values = call({mine: values[theirs] for mine, theirs in wires.items()})
            marks.append(synchronised(self._device))
        return [(after - before) * 1e3 for before, after in pairwise(marks)]
