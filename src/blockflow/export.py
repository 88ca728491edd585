"""Export: from a module to a program with a symbolic batch, by torch.export.

A model that cannot be exported is refused in one line: torch's reason, and the line of the model's
own source where it arose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import linecache
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from blockflow.archive import first_line, log_captured
from blockflow.artifact import BATCH, Port
from blockflow.errors import ModelRefused


def export(module: nn.Module, inputs: Sequence[Port]) -> ExportedProgram:
    """Trace a module in eval mode with a symbolic batch, on CPU.

    `inputs` are under the argument names of `forward`, whose order the program keeps. Raises
    ModelRefused with torch's reason in one line.
    """
    names = argument_names(module, inputs)
    examples = {port.name: example(port, rows=2) for port in inputs}
    rows = Dim("batch", min=1)
    shapes = {port.name: {0: rows} if has_rows(port) else {} for port in inputs}
    if names is None:  # forward(*args)
        args, kwargs = tuple(examples.values()), {}
        dynamic: Any = (tuple(shapes.values()),)
    else:
        args, kwargs = (), {name: examples[name] for name in names}
        dynamic = {name: shapes[name] for name in names}

    def trace() -> ExportedProgram:
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)

    said = io.StringIO()
    try:
        with (
            # torch prints the half-traced graph and logs its thoughts before it raises.
            contextlib.redirect_stderr(said),
            log_captured("torch.fx.experimental.symbolic_shapes"),
            log_captured("torch._subclasses.fake_tensor"),
            warnings.catch_warnings(),
            as_served(module),
        ):
            # Said of recurrent layers, which keep their weights in a list as well.
            warnings.filterwarnings("ignore", ".* assigned during export", UserWarning)
            try:
                program = trace()
            except RuntimeError as error:
                if _UNKNOWN_RESULT not in str(error):
                    raise
                _register_dataclasses(module(*args, **kwargs))
                program = trace()
    except Exception as error:
        # torch.export reports what it cannot trace through a dozen unrelated types.
        raise ModelRefused(
            f"torch.export cannot trace {type(module).__name__}{_place(error)}: {_reason(error)}"
        ) from error
    sys.stderr.write(said.getvalue())
    return program


_UNKNOWN_RESULT = "in output, which is not a known type"


def _register_dataclasses(result: object) -> None:
    """Tell torch what is in the dataclasses that a model returned, as their authors seldom do."""
    for leaf in pytree.tree_leaves(result):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            for field in dataclasses.fields(leaf):
                _register_dataclasses(getattr(leaf, field.name))


def example(port: Port, rows: int, seed: int = 0) -> Tensor:
    """A random CPU tensor that fits a port; integers are 0 or 1, which every table has.

    The first of every row of integers is 1: a mask that lets nothing pass makes attention NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = [rows if size == BATCH else int(size) for size in port.shape]
    dtype: torch.dtype = getattr(torch, port.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    numbers = torch.randint(0, 2, shape, generator=generator)
    if numbers.dim() > 1 and numbers.numel():
        numbers[..., 0] = 1
    return numbers.to(dtype)


def has_rows(port: Port) -> bool:
    """Whether a port's first dimension is the batch."""
    return port.shape[:1] == (BATCH,)


def argument_names(module: nn.Module, inputs: Sequence[Port]) -> list[str] | None:
    """The names of `inputs` in the order of `forward`, or None where it takes any number."""
    if not inputs:
        raise ModelRefused(f"{type(module).__name__} takes no input: a block needs one")
    parameters = inspect.signature(module.forward).parameters
    kinds = {p.kind for p in parameters.values()}
    given = {port.name for port in inputs}
    if inspect.Parameter.VAR_POSITIONAL in kinds and not given <= set(parameters):
        return None
    unknown = given - set(parameters)
    if unknown:
        raise ModelRefused(
            f"{type(module).__name__}.forward takes ({', '.join(parameters)}), "
            f"no {', '.join(sorted(unknown))}"
        )
    missing = [
        name
        for name, parameter in parameters.items()
        if name not in given
        and parameter.default is inspect.Parameter.empty
        and parameter.kind not in {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    ]
    if missing:
        raise ModelRefused(
            f"{type(module).__name__}.forward takes ({', '.join(parameters)}), and nothing says "
            f"what {', '.join(missing)} is"
        )
    return [name for name in parameters if name in given]


@contextlib.contextmanager
def as_served(module: nn.Module) -> Iterator[None]:
    """The module as a block will run it, for as long as the context lasts.

    No parameter wants a gradient: matmul takes another path for those that do, even where no
    gradient is recorded. torch's attention layers leave out their fused path, which export never
    takes and which differs in the last bits. Models of `transformers` keep no cache of keys and
    values: a block has no memory between requests.
    """
    wanting = [parameter for parameter in module.parameters() if parameter.requires_grad]
    fused = torch.backends.mha.get_fastpath_enabled()
    configs = {id(config): config for m in module.modules() if (config := _config(m)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", None) is True]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for parameter in wanting:
            parameter.requires_grad_(False)
        for config in caching:
            config.use_cache = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for parameter in wanting:
            parameter.requires_grad_(True)
        for config in caching:
            config.use_cache = True


def _config(module: nn.Module) -> Any:
    """The configuration of a `transformers` model."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return None
    return module.config


def _place(error: BaseException) -> str:
    """Where in the model's own source an error arose: the innermost frame outside of libraries."""
    torch_root = str(Path(torch.__file__).parent) + os.sep
    own = str(Path(__file__).parent) + os.sep
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        if file.startswith((torch_root, own, "<")) or f"{os.sep}contextlib.py" in file:
            continue
        text = linecache.getline(file, line).strip()
        said = f": `{text if len(text) <= 80 else text[:79] + '…'}`" if text else ""
        return f" (line {line} of {Path(file).name}, in {frame.f_code.co_name}{said})"
    return ""


_FIXED_BATCH = re.compile(
    r"batch as dynamic but your code specialized it to be a constant \((\d+)\)"
)


def _reason(error: BaseException) -> str:
    line = first_line(error).partition(" (unhinted:")[0]
    if _UNKNOWN_RESULT in line:
        return (
            f"it returns a {line.removeprefix('Found ').partition(' ' + _UNKNOWN_RESULT)[0]}: "
            "return tensors, alone or in tuples, lists, dicts and dataclasses"
        )
    if "data-dependent" in line:
        return (
            "the control flow depends on the data (an `if`, a loop or an index by a tensor's "
            f"value); use torch.where or torch.cond instead: {line}"
        )
    fixed = _FIXED_BATCH.search(line)
    if fixed is not None:
        return (
            f"it takes batches of {fixed[1]} alone, the size that it was tried with: somewhere it "
            "uses a number, as in view(2, -1), or compares the batch size; take the size from "
            "x.shape[0]"
        )
    return line
