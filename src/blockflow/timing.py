"""Timing: how long each operator of a program takes on a device."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from blockflow.archive import first_line
from blockflow.backends import rounding_to_tf32, trying_algorithms
from blockflow.errors import ModelRefused
from blockflow.export import example
from blockflow.graph import compute_in, input_nodes, input_ports, weight_nodes
from blockflow.measure import Measure
from blockflow.program import DTYPES

# On a GPU the first runs try cuDNN's algorithms, and an operator takes microseconds.
_WARM = {"cpu": 1, "cuda": 3}
_RUNS = {"cpu": 5, "cuda": 20}
_AHEAD_CYCLES = 200_000_000  # about a tenth of a second on current GPUs


def operator_seconds(program: ExportedProgram, measure: Measure) -> dict[fx.Node, float]:
    """Seconds that each operator takes for a batch of `measure.rows`: the median of several runs.

    Computed as `program.load` has a block of that precision compute, but operator by operator. On
    CPU by the host's monotonic clock around each call. On a GPU by events around each call, less
    what they take themselves, on one stream that is held back until the run is enqueued, so that
    what is measured is the GPU's time and not the launches (up to the length of the driver's
    queue); and with the fastest of cuDNN's algorithms, as CUDA graphs are captured. Raises
    ModelRefused where the device is not there or the program does not run on it.
    """
    try:
        place = torch.device(measure.device)
        dtype = DTYPES[measure.precision]
        module = program.graph_module
        if dtype != torch.float32:
            module = copy.deepcopy(module)
            compute_in(module, dtype)
        clock = _Clock(module, place)

        def converted(tensor: Tensor, to: bool) -> Tensor:
            return tensor.to(place, dtype if to else tensor.dtype)

        # As `compute_in` converts weights, and `Program.inside` inputs.
        weights = {
            node: converted(value, value.is_floating_point())
            for node, (_, value) in weight_nodes(program).items()
        }
        inputs = {
            node: converted(tensor, tensor.dtype == torch.float32)
            for seed, (node, port) in enumerate(
                zip(input_nodes(program), input_ports(program), strict=True)
            )
            for tensor in (example(port, measure.rows, seed),)
        }
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        seen: list[dict[fx.Node, float]] = []
        with torch.inference_mode(), _settings(place, measure):
            for run in range(_WARM[place.type] + _RUNS[place.type]):
                given = [
                    inputs[node].clone() if node in inputs else weights.get(node)
                    for node in placeholders
                ]
                times = clock.time(given)
                if run >= _WARM[place.type]:
                    seen.append(times)
    except Exception as error:
        raise ModelRefused(
            f"the model cannot be timed on {measure}: {type(error).__name__}: {first_line(error)}"
        ) from error
    # By position: nodes of a converted program are copies.
    return {
        node: statistics.median(times[timed] for times in seen)
        for node, timed in zip(program.graph.nodes, module.graph.nodes, strict=True)
        if timed in seen[0]
    }


@contextlib.contextmanager
def _settings(place: torch.device, measure: Measure) -> Iterator[None]:
    """torch as a worker has it that replays a block of this precision."""
    with contextlib.ExitStack() as stack:
        if place.type == "cuda":
            stack.enter_context(torch.cuda.device(place))  # where events are recorded
            stack.enter_context(trying_algorithms())
            if DTYPES[measure.precision] == torch.float32:
                stack.enter_context(rounding_to_tf32(measure.precision == "tf32"))
        yield


class _Clock(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, device: torch.device) -> None:
        super().__init__(module)
        self._device = device
        self._node: fx.Node = next(iter(module.graph.nodes))
        self._seconds: dict[fx.Node, float] = {}
        self._events: dict[fx.Node, tuple[torch.cuda.Event, torch.cuda.Event]] = {}

    def time(self, given: list[Tensor | None]) -> dict[fx.Node, float]:
        self._seconds = {}
        self._events = {}
        if self._device.type != "cuda":
            self.run(*given, enable_io_processing=False)
            return self._seconds
        torch.cuda.synchronize(self._device)
        torch.cuda._sleep(_AHEAD_CYCLES)
        began, ended = _event(), _event()
        self.run(*given, enable_io_processing=False)
        torch.cuda.synchronize(self._device)
        nothing = began.elapsed_time(ended)
        return {
            # What two events cost is as much as a small operator; a view costs nothing else.
            node: max(before.elapsed_time(after) - nothing, 0.0) / 1e3
            for node, (before, after) in self._events.items()
        }

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
            before = _event()
            result = target(*args, **kwargs)
            self._events[node] = before, _event()
        else:
            start = time.perf_counter()
            result = target(*args, **kwargs)
            self._seconds[node] = time.perf_counter() - start
        return result


def _event() -> torch.cuda.Event:
    """Now, on the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
