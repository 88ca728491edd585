"""Timing: how long each operator of a program takes on a device."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from blockflow.archive import first_line
from blockflow.errors import ModelRefused
from blockflow.export import example
from blockflow.graph import input_nodes, input_ports, weight_nodes

_WARM = 1
_AHEAD_CYCLES = 200_000_000  # about a tenth of a second on current GPUs


def operator_seconds(
    program: ExportedProgram, device: torch.device | str, *, rows: int, runs: int = 5
) -> dict[fx.Node, float]:
    """Seconds that each operator takes for a batch of `rows`: the median of `runs` runs.

    On CPU by the host's monotonic clock around each call. On a GPU by events around each call, on
    one stream that is held back until the run is enqueued, so that what is measured is the GPU's
    time and not the launches (up to the length of the driver's queue). Raises ModelRefused where
    the device is not there or the program does not run on it.
    """
    place = torch.device(device)
    try:
        clock = _Clock(program, place)
        inputs = {
            node: example(port, rows, seed).to(place)
            for seed, (node, port) in enumerate(
                zip(input_nodes(program), input_ports(program), strict=True)
            )
        }
        weights = {node: value.to(place) for node, (_, value) in weight_nodes(program).items()}
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        seen: list[dict[fx.Node, float]] = []
        with torch.inference_mode():
            for run in range(_WARM + runs):
                given = [
                    inputs[node].clone() if node in inputs else weights.get(node)
                    for node in placeholders
                ]
                times = clock.time(given)
                if run >= _WARM:
                    seen.append(times)
    except Exception as error:
        raise ModelRefused(
            f"the model cannot be timed on {place}: {type(error).__name__}: {first_line(error)}"
        ) from error
    return {node: statistics.median(times[node] for times in seen) for node in seen[0]}


class _Clock(fx.Interpreter):
    def __init__(self, program: ExportedProgram, device: torch.device) -> None:
        super().__init__(program.graph_module)
        self._device = device
        self._node: fx.Node = next(iter(program.graph.nodes))
        self._seconds: dict[fx.Node, float] = {}
        self._events: dict[fx.Node, tuple[torch.cuda.Event, torch.cuda.Event]] = {}

    def time(self, given: list[Tensor | None]) -> dict[fx.Node, float]:
        self._seconds = {}
        self._events = {}
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda._sleep(_AHEAD_CYCLES)
        self.run(*given, enable_io_processing=False)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._seconds = {
                node: began.elapsed_time(ended) / 1e3
                for node, (began, ended) in self._events.items()
            }
        return self._seconds

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def here(value: Any) -> Any:
            return self._device if isinstance(value, torch.device) else value

        args = fx.node.map_aggregate(args, here)
        kwargs = fx.node.map_aggregate(kwargs, here)
        node = self._node
        if self._device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            result = target(*args, **kwargs)
            ended.record()
            self._events[node] = began, ended
        else:
            start = time.perf_counter()
            result = target(*args, **kwargs)
            self._seconds[node] = time.perf_counter() - start
        return result
