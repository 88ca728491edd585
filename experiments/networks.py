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
from blockflow.models import ModuleSource
from blockflow.program import load
from blockflow.reconcile import wiring

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


class Graphed:
    """A call captured as one CUDA graph; its results are overwritten by the next call."""

    def __init__(self, call: Call, example: Tensors) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in example.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(3):
                call(self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self._graph):
            self._outputs = call(self._inputs)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensors:
        for name, tensor in self._inputs.items():
            tensor.copy_(inputs[name], non_blocking=True)
        self._graph.replay()
        return self._outputs


def runner(call: Call, ports: Sequence[Port], rows: int, device: str, how: str) -> Call:
    """`call`, warm, run op by op (`how` is "eager") or as a CUDA graph ("graph")."""
    example = zeros(ports, rows, device)
    made: Call = Graphed(call, example) if how == "graph" else call
    for _ in range(3):
        made(example)
    synchronised(device)
    return made


def whole(source: ModuleSource, device: str) -> Call:
    """The network as its users have it: one module."""
    module = source.module.eval().to(device)

    def call(inputs: Mapping[str, Tensor]) -> Tensors:
        with torch.inference_mode():
            return {"output": module(**inputs)}

    return call


class Chain:
    """Blocks of the store in one process, each by itself and synchronised, or all as one."""

    def __init__(
        self, store: Store, digests: Sequence[str], rows: int, device: str, how: str
    ) -> None:
        self._device = device
        self._blocks: list[tuple[Mapping[str, str], Call]] = []
        self.manifests: list[Manifest] = []
        for digest in digests:
            program = load(store, digest, device)
            ports = program.manifest.inputs
            wires = {port.name: port.name for port in ports}
            if self.manifests:
                wires = wiring(self.manifests[-1], program.manifest)
            self._blocks.append((wires, runner(program, ports, rows, device, how)))
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
