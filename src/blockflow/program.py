"""Programs: an artifact from the store, loaded onto a device and called.

TorchScript files are read by torch's own restricted reader, but may call any TorchScript
operator, such as those that write files: they are code, and to be trusted like code.
`torch.export` programs are not: see `archive`.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import msgspec
import torch
from torch import Tensor, fx

from blockflow.archive import first_line
from blockflow.artifact import PROGRAM_FILE, Manifest, Store
from blockflow.backends import round_to_tf32
from blockflow.errors import ModelRefused
from blockflow.graph import compute_in, plain_module, put_channels_last
from blockflow.topology import Precision
from blockflow.weights import read_program
from blockflow.wiring import by_rule

DTYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""What float32 is computed in. For tf32, GPUs round as `backends` has them do."""


class Program:
    """A loaded artifact: `program({"x": tensor})` gives `{"output": tensor}`.

    Tensors must lie on `device` and fit the manifest's ports; nothing is checked per call. The
    result may share memory with an input (a block can be a mere view). A call does not change its
    inputs: where the program would, it works on copies.

    `call` takes and gives float32 as `dtype`, and images with channels last if `channels_last`; for
    callers the ports are as the manifest says. `module` is the graph that it runs, where there is
    one.
    """

    compiled = False
    uncompiled: str | None = None
    """Why it is not compiled, though that was asked for."""

    def __init__(
        self,
        manifest: Manifest,
        device: torch.device,
        call: Callable[..., Sequence[Tensor]],
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        module: fx.GraphModule | None = None,
    ) -> None:
        self.manifest = manifest
        self.device = device
        self.dtype = dtype
        self.module = module
        self.dtypes = frozenset({dtype})
        """What float32 is computed in, somewhere on the way."""
        self.ports = manifest.inputs + manifest.outputs
        """Every tensor that goes in or out, or from one part to the next."""
        self._call = call
        self._channels_last = channels_last
        self._inputs = tuple(port.name for port in manifest.inputs)
        self._outputs = tuple(port.name for port in manifest.outputs)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode():
            tensors = [self.inside(inputs[name]) for name in self._inputs]
            if self.manifest.mutates_inputs:
                tensors = [tensor.clone() for tensor in tensors]
            outputs = self._call(*tensors)
            return {
                name: tensor.float() if tensor.dtype == self.dtype else tensor
                for name, tensor in zip(self._outputs, outputs, strict=True)
            }

    def compiled_to(self, call: Callable[..., Sequence[Tensor]]) -> Program:
        """The same program, run by `call` from now on."""
        made = copy.copy(self)
        made._call = call
        made.compiled = True
        return made

    def left_uncompiled(self, reason: str) -> Program:
        """The same program, which could not be compiled for `reason`."""
        made = copy.copy(self)
        made.uncompiled = f"not compiled: {reason}"
        return made

    def inside(self, tensor: Tensor) -> Tensor:
        """An input as `call` takes it."""
        dtype = self.dtype if tensor.dtype == torch.float32 else tensor.dtype
        if self._channels_last and tensor.dim() == 4:
            return tensor.to(dtype, memory_format=torch.channels_last)
        return tensor.to(dtype)


class Chain(Program):
    """Programs of one device, each of which takes what the one before gives, as one program.

    It takes what the first takes, and gives what the last gives.
    """

    def __init__(self, programs: Sequence[Program]) -> None:
        first, last = programs[0], programs[-1]
        manifest = msgspec.structs.replace(
            first.manifest, outputs=last.manifest.outputs, mutates_inputs=False
        )
        super().__init__(manifest, first.device, self._through)
        self._programs = tuple(programs)
        self._wirings = [
            by_rule(before.manifest.outputs, after.manifest.inputs)
            for before, after in itertools.pairwise(programs)
        ]
        self.ports = tuple(port for program in programs for port in program.ports)
        self.dtypes = frozenset(program.dtype for program in programs)
        self.compiled = all(program.compiled for program in programs)
        self.uncompiled = next((p.uncompiled for p in programs if p.uncompiled), None)

    def _through(self, *tensors: Tensor) -> Sequence[Tensor]:
        first, *others = self._programs
        found = first(dict(zip(self._inputs, tensors, strict=True)))
        for program, wires in zip(others, self._wirings, strict=True):
            found = program({mine: found[theirs] for mine, theirs in wires.items()})
        return [found[name] for name in self._outputs]


def load(
    store: Store,
    digest: str,
    device: torch.device | str,
    *,
    precision: Precision = "fp32",
    channels_last: bool = False,
) -> Program:
    """Check an artifact's bytes, load it onto a device and return it ready to run.

    precision: what a float32 artifact is computed in. That fp32 is not rounded to TF32, or that it
    is for tf32, holds for the whole process, so it has to be the same for all that is loaded.
    Raises NotFound, StoreCorrupt, or ModelRefused for a file that torch cannot read.
    """
    manifest = store.verify(digest, weights=False)  # those are checked as they are read
    place = torch.device(device)
    dtype = DTYPES[precision]
    if place.type == "cuda" and dtype == torch.float32:
        round_to_tf32(precision == "tf32")
    module: fx.GraphModule | None = None
    match manifest.format:
        case "torch.export":
            module = plain_module(read_program(store, manifest, place), place)
            if dtype != torch.float32:
                compute_in(module, dtype)
            if channels_last:
                put_channels_last(module)
            # The bound method skips nn.Module.__call__: there are no hooks to look for.
            call = module.forward
        case "torchscript":
            names = [port.name for port in manifest.outputs]
            script = read_script(store.path(digest) / PROGRAM_FILE[manifest.format], place)
            if dtype != torch.float32:
                script.to(dtype)
            if channels_last:
                script.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

            def call(*tensors: Tensor) -> Sequence[Tensor]:
                return flatten_outputs(script(*tensors), names)

    return Program(manifest, place, call, dtype=dtype, channels_last=channels_last, module=module)


def read_script(
    path: Path | IO[bytes], device: torch.device | str = "cpu"
) -> torch.jit.ScriptModule:
    """Read a TorchScript file, by path or open, in eval mode. Raises ModelRefused."""
    try:
        with warnings.catch_warnings():
            # TorchScript is deprecated in favour of torch.export; serving old files is why this
            # function exists.
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is ", DeprecationWarning)
            script: torch.jit.ScriptModule = torch.jit.load(path, map_location=device)
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        # torch adds a paragraph of guesses.
        why = first_line(error).partition(" This is an internal")[0].rstrip(".")
        if "constants.pkl" in why:
            why = "torch.save wrote it; write it with torch.jit.save, or torch.export.save as .pt2"
        raise ModelRefused(f"{path} is no TorchScript file, or a damaged one: {why}") from None
    script.eval()
    return script


def flatten_outputs(value: object, names: Sequence[str]) -> Sequence[Tensor]:
    """What a TorchScript model returned, as tensors in the order of `names`."""
    match value:
        case Tensor():
            return (value,)
        case tuple() | list():
            return value
        case dict():
            return [value[name] for name in names]
    raise ModelRefused(f"the model returned a {type(value).__name__}, no tensors")
