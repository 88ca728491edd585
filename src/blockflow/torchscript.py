"""TorchScript: what can be learned of a model that comes as an old `.pt` file, and cutting it.

A script tells neither its inputs nor its outputs; they are learned from runs on random inputs. It
is one block, or a cut at its top-level submodules where it does nothing but call them once each, in
order, on the previous one's output.
"""

from __future__ import annotations

import io
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from blockflow.archive import first_line
from blockflow.artifact import BATCH, Port
from blockflow.cuts import HIDDEN, Cost, port_bytes
from blockflow.errors import ModelRefused
from blockflow.export import example, has_rows
from blockflow.graph import output_names
from blockflow.program import flatten_outputs, read_script

_ROWS = 2


@dataclass(frozen=True)
class Interface:
    """What a script takes and gives, and whether it writes to what it takes."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    mutates_inputs: bool


@dataclass(frozen=True)
class Stage:
    """A top-level submodule of a script that is a sequence of them."""

    name: str
    module: torch.jit.ScriptModule
    interface: Interface
    cost: Cost

    @property
    def row_bytes(self) -> int:
        """How many bytes of one row it gives."""
        return port_bytes(self.interface.outputs[0])


def read_file(path: Path) -> torch.jit.ScriptModule:
    """Read a TorchScript file that comes from somewhere. Raises ModelRefused.

    torch's reader does not look at the checksums that its writer puts beside every member: a model
    with a damaged weight would be read, and served.
    """
    script = read_script(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelRefused(f"{path} is damaged ({error}): write it again") from None
    if damaged is not None:
        raise ModelRefused(f"{path} is damaged: {damaged} is not what was written; write it again")
    return script


def interface_of(script: torch.jit.ScriptModule, inputs: tuple[Port, ...], what: str) -> Interface:
    """Learn a script's outputs, and whether it writes its inputs, from two runs on random inputs.

    `what` names the script in messages. Raises ModelRefused.
    """
    seen: list[tuple[list[str], list[Tensor]]] = []
    mutates = False
    sizes = (2, 3) if any(has_rows(port) for port in inputs) else (1, 1)
    for rows in sizes:
        given = [example(port, rows, seed) for seed, port in enumerate(inputs)]
        before = [tensor._version for tensor in given]
        try:
            with torch.no_grad():
                value = script(*given)
        except Exception as error:
            raise ModelRefused(
                f"{what} does not run on the inputs that it is said to take: {_reason(error)}"
            ) from error
        mutates = mutates or [tensor._version for tensor in given] != before
        paths, _ = pytree.tree_flatten_with_path(value)
        names = output_names([path for path, _ in paths])
        tensors = list(flatten_outputs(value, names))
        if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise ModelRefused(f"{what} returns nested values: return tensors only")
        seen.append((names, tensors))
    (names, small), (again, large) = seen
    if names != again:
        raise ModelRefused(f"{what} returns different outputs for different batch sizes")
    ports = []
    for name, one, other in zip(names, small, large, strict=True):
        shape: list[Any] = list(one.shape)
        if sizes[0] != sizes[1]:
            if tuple(one.shape[:1]) != sizes[:1] or tuple(other.shape[:1]) != sizes[1:]:
                raise ModelRefused(
                    f"the output {name!r} of {what} has no batch dimension in front though the "
                    "inputs have one"
                )
            shape[0] = BATCH
        if list(other.shape[1:]) != list(one.shape[1:]):
            raise ModelRefused(f"the output {name!r} of {what} changes shape with the batch")
        dtype = str(one.dtype).removeprefix("torch.")
        ports.append(Port(name=name, dtype=dtype, shape=tuple(shape)))
    return Interface(inputs, tuple(ports), mutates)


def stages(script: torch.jit.ScriptModule, inputs: tuple[Port, ...], path: Path) -> list[Stage]:
    """The submodules that a script calls one after the other.

    Raises ModelRefused, saying what else it does, where it is no such sequence.
    """
    found: list[Stage] = []
    ports = inputs
    for name in _sequence(script, path):
        module = getattr(script, name)
        interface = interface_of(module, ports, f"the submodule {name!r} of {path}")
        (output, *others) = interface.outputs
        if others:
            raise ModelRefused(
                f"{path} cannot be cut: its {name} gives {1 + len(others)} tensors instead of one"
            )
        found.append(Stage(name, module, interface, _cost(module, ports, output)))
        ports = (Port(name=HIDDEN, dtype=output.dtype, shape=output.shape),)
    return found


def joined(parts: Sequence[Stage]) -> bytes:
    """A TorchScript file that calls the submodules of `parts` in order."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The deprecation of the format in which this model comes and has to stay.
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is ", DeprecationWarning)
        modules = nn.Sequential(*(part.module for part in parts)).eval()
        torch.jit.save(torch.jit.script(modules), buffer)
    return buffer.getvalue()


def weight_bytes(module: torch.jit.ScriptModule) -> int:
    """Bytes of parameters and buffers, each once."""
    weights = {t.data_ptr(): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.nbytes for t in weights.values())


def _sequence(script: torch.jit.ScriptModule, path: Path) -> list[str]:
    """Names of the submodules in the order of their calls, if there is nothing else."""

    def refusal(why: str) -> ModelRefused:
        return ModelRefused(
            f"{path} is TorchScript that cannot be cut: {why}, and only a plain sequence of "
            "submodules can be; deploy it as one block, or export the model with torch.export"
        )

    graph = script.graph
    _, *arguments = graph.inputs()
    if len(arguments) != 1:
        raise refusal(f"it takes {len(arguments)} inputs")
    value = arguments[0]
    members: dict[Any, str] = {}
    called: list[str] = []
    for node in graph.nodes():
        match node.kind():
            case "prim::GetAttr":
                members[node.output().debugName()] = node.s("name")
            case "prim::CallMethod" if node.s("name") == "forward":
                module, *given = node.inputs()
                name = members.get(module.debugName(), "a submodule of a submodule")
                if [g.debugName() for g in given] != [value.debugName()]:
                    raise refusal(f"its {name} takes something else than the previous output")
                if name in called:
                    raise refusal(f"it calls {name} twice")
                called.append(name)
                value = node.output()
            case "prim::Constant":
                pass  # an argument of something else, which is refused
            case "prim::CallFunction":
                function = next(node.inputs()).node().s("name")
                raise refusal(f"beside calling submodules it computes {function}")
            case kind:
                raise refusal(f"beside calling submodules it computes {kind}")
    if [output.debugName() for output in graph.outputs()] != [value.debugName()]:
        raise refusal("it returns something else than the last submodule's output")
    if not called:
        raise refusal("it has no submodules")
    return called


def _cost(module: torch.jit.ScriptModule, inputs: Sequence[Port], output: Port) -> Cost:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(*(example(port, _ROWS) for port in inputs))
    size = torch.empty(output.sized(1), dtype=getattr(torch, output.dtype), device="meta").nbytes
    return Cost(weight_bytes(module), counter.get_total_flops() // _ROWS, size, 2 * size)


def _reason(error: BaseException) -> str:
    """The last line of a TorchScript error says what happened; those before, where in its code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return last[:300] if last.startswith("RuntimeError: ") else first_line(error)
