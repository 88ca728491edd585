"""Programs compiled by torch's inductor, once and for every number of rows.

A program's graph is plain operators with a symbolic batch already, so it goes to the compiler as it
is. Nothing is traced, and so no guard can find at a request that something has changed since (other
rows, or another number of threads, as a block on the CPU has all the time) and compile once more.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from blockflow.archive import first_line
from blockflow.export import example
from blockflow.program import Program
from blockflow.protocol import MACHINE_CODE
from blockflow.tolerance import agree


class NotCompiled(Exception):
    """A program that stays as it is; the message says why."""


def compiled(program: Program, largest: int) -> Program:
    """`program` compiled for batches of up to `largest` rows, which takes a while.

    Where that fails or gives other numbers than the program, it stays as it is and says why
    (`uncompiled`).
    """
    try:
        made = program.compiled_to(_machine_code(program))
        _compare(program, made, largest)
    except NotCompiled as error:
        return program.left_uncompiled(str(error))
    except Exception as error:  # noqa: BLE001 - a compiler may raise anything
        return program.left_uncompiled(f"{type(error).__name__}: {first_line(error)}")
    return made


def _machine_code(program: Program) -> Callable[..., Sequence[Tensor]]:
    if program.module is None:
        raise NotCompiled("it is TorchScript")
    if MACHINE_CODE not in os.environ:
        # By default it is a name in /tmp that anybody could have taken, and code is loaded from it.
        raise NotCompiled(f"{MACHINE_CODE} names no directory for what compiling makes")
    from torch._functorch import config as tracing  # noqa: PLC0415 - takes seconds
    from torch._inductor import standalone_compile  # noqa: PLC0415

    # Says once for each program that what was made cannot be saved, which nobody wants.
    logging.getLogger("torch._inductor.standalone_compile").setLevel(logging.ERROR)
    module, inputs = _graph(program, program.module)
    options = {
        # The number of threads is the block's to choose, for each batch.
        "cpp.dynamic_threads": True,
        # No pool of processes, and no cache that is pickled; machine code is kept all the same.
        "compile_threads": 1,
        "fx_graph_cache": False,
    }
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        tracing.patch(enable_autograd_cache=False),
    ):
        warnings.simplefilter("ignore")  # what torch says to itself
        call: Callable[..., Sequence[Tensor]] = standalone_compile(
            module,
            inputs,
            dynamic_shapes="from_graph",
            options={"config_patches": options},
        )
    return call


class _Given(fx.GraphModule):
    """A graph that the compiler may keep: a copy of it would have copies of the weights.

    Newer releases of torch than 2.11 have `donate_graph_module` for that.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Given:
        return self


def _graph(program: Program, module: fx.GraphModule) -> tuple[fx.GraphModule, list[Any]]:
    """A graph that the compiler may keep, which shares the weights, and inputs without data."""
    graph = copy.deepcopy(module.graph)
    inputs = []
    for node in graph.nodes:
        if node.op == "placeholder":
            seen = node.meta["val"]
            with seen.fake_mode:
                # As they come: what was exported was float32 on the CPU.
                inputs.append(program.inside(seen.to(program.device)))
            node.meta["val"] = inputs[-1]
    # Where the compiler looks for what the symbols mean.
    for node in graph.output_node().all_input_nodes:
        node.meta["example_value"] = inputs[0]
    return _Given(module, graph), inputs


def _compare(program: Program, made: Program, largest: int) -> None:
    """Compare on inputs without meaning. Raises NotCompiled where the numbers differ."""
    for seed, rows in enumerate(sorted({1, min(2, largest), largest})):
        given = {
            port.name: example(port, rows, seed).to(program.device)
            for port in program.manifest.inputs
        }
        expected = program(given)
        for name, found in made(given).items():
            if not agree(found, expected[name], program.dtypes):
                raise NotCompiled(f"compiled, {name} is another than when it is called")
