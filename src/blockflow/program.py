"""Programs: an artifact from the store, loaded onto a device and called.

TorchScript files are read by torch's own restricted reader, but may call any TorchScript
operator, such as those that write files: they are code, and to be trusted like code.
`torch.export` programs are not: see `archive`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from blockflow.archive import first_line
from blockflow.artifact import PROGRAM_FILE, Manifest, Store
from blockflow.errors import ModelRefused
from blockflow.graph import plain_module
from blockflow.weights import read_program


class Program:
    """A loaded artifact: `program({"x": tensor})` gives `{"output": tensor}`.

    Tensors must lie on `device` and fit the manifest's ports; nothing is checked per call. The
    result may share memory with an input (a block can be a mere view). A call does not change its
    inputs: where the program would, it works on copies.
    """

    def __init__(
        self, manifest: Manifest, device: torch.device, call: Callable[..., Sequence[Tensor]]
    ) -> None:
        self.manifest = manifest
        self.device = device
        self._call = call
        self._inputs = tuple(port.name for port in manifest.inputs)
        self._outputs = tuple(port.name for port in manifest.outputs)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode():
            tensors = [inputs[name] for name in self._inputs]
            if self.manifest.mutates_inputs:
                tensors = [tensor.clone() for tensor in tensors]
            return dict(zip(self._outputs, self._call(*tensors), strict=True))


def load(store: Store, digest: str, device: torch.device | str) -> Program:
    """Check an artifact's bytes, load it onto a device and return it ready to run.

    Raises NotFound, StoreCorrupt, or ModelRefused for a file that torch cannot read.
    """
    manifest = store.verify(digest, weights=False)  # those are checked as they are read
    place = torch.device(device)
    match manifest.format:
        case "torch.export":
            # The bound method skips nn.Module.__call__: there are no hooks to look for.
            call = plain_module(read_program(store, manifest, place), place).forward
        case "torchscript":
            names = [port.name for port in manifest.outputs]
            script = read_script(store.path(digest) / PROGRAM_FILE[manifest.format], place)

            def call(*tensors: Tensor) -> Sequence[Tensor]:
                return flatten_outputs(script(*tensors), names)

    return Program(manifest, place, call)


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
        raise ModelRefused(f"{path} is no TorchScript file: {first_line(error)}") from None
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
