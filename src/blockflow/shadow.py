"""The shadow run: a program run on tensors without data, which tells what its schemas do not.

How many floating-point operations each operator takes, how many bytes it writes, which values share
memory (an idle dropout returns its own input, and its schema says nothing of it), and which lie in
memory row after row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from blockflow.archive import first_line
from blockflow.errors import ModelRefused
from blockflow.graph import batch_symbol, mutated_arguments, viewed_arguments, weight_nodes

_POOLS = {
    torch.ops.aten.avg_pool1d.default,
    torch.ops.aten.avg_pool2d.default,
    torch.ops.aten.max_pool1d.default,
    torch.ops.aten.max_pool2d.default,
    torch.ops.aten.max_pool2d_with_indices.default,
}


class Shadow(fx.Interpreter):
    """What the shadow run of a program found.

    flops: floating-point operations for one row, by torch's flop counter (which counts matrix
    products, convolutions and attention, and nothing else). written: bytes written for one row, to
    new memory or in place. moved: bytes read and written for one row, without weights. All by node;
    of a batch of two rows, halved. Raises ModelRefused.
    """

    _ROWS = 2  # one row would let views pass for contiguous that are not

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph_module, garbage_collect_values=False)
        self._weights = weight_nodes(program)
        self._rows = self._ROWS if batch_symbol(program) is not None else 1
        self.flops: dict[fx.Node, int] = {}
        self.written: dict[fx.Node, int] = {}
        self.moved: dict[fx.Node, int] = {}
        self._memory: dict[fx.Node, int] = {}
        self._contiguous: dict[fx.Node, bool] = {}
        self._owner: dict[int, int] = {}
        mode = FakeTensorMode()
        self._counter = FlopCounterMode(display=False)
        with torch.no_grad(), mode, self._counter:
            placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
            try:
                self.run(*map(self._fake, placeholders), enable_io_processing=False)
            except (DynamicOutputShapeException, DataDependentOutputException) as error:
                raise ModelRefused(
                    f"what {error.func} returns depends on the data of its input, as with x[x > 0] "
                    "or .item(): a block's sizes must not, except for the batch"
                ) from error
            except Exception as error:
                raise ModelRefused(f"the model does not run: {first_line(error)}") from error
        # Kept until here so that no storage's address was used twice.
        self.env.clear()

    def memory(self, node: fx.Node) -> int:
        """Equal for nodes whose tensors share memory."""
        return self._memory[node]

    def in_rows(self, node: fx.Node) -> bool:
        """Whether a node's tensors are contiguous: one row after the other, without gaps."""
        return self._contiguous[node]

    def _fake(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        sizes: list[Any] = list(value.shape)
        if not any(isinstance(size, torch.SymInt) for size in sizes):
            return torch.empty_strided(sizes, value.stride(), dtype=value.dtype)
        rows = [self._rows if isinstance(size, torch.SymInt) else size for size in sizes]
        return torch.empty(rows, dtype=value.dtype)

    def run_node(self, n: fx.Node) -> Any:
        before = self._counter.get_total_flops()
        result = super().run_node(n)
        self.flops[n] = (self._counter.get_total_flops() - before) // self._rows
        tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self._contiguous[n] = all(t.is_contiguous() for t in tensors)
        # A set of nodes sharing memory is named by the first of them.
        sources = [self._memory[source] for source in (*viewed_arguments(n), *mutated_arguments(n))]
        storages = [t.untyped_storage()._cdata for t in tensors]
        known = [self._owner[s] for s in storages if s in self._owner]
        group = min([*sources, *known], default=len(self._memory))
        for other in {*sources, *known} - {group}:
            self._merge(other, group)
        self._memory[n] = group
        fresh = [t for t, s in zip(tensors, storages, strict=True) if s not in self._owner]
        self._owner.update(dict.fromkeys(storages, group))
        overwritten = [self.env[source] for source in mutated_arguments(n)]
        written = sum(t.nbytes for t in (*fresh, *overwritten))
        self.written[n] = written // self._rows
        read = sum(t.nbytes for t in self._values_of(n)) if written else 0  # a view reads nothing
        if n.target in _POOLS:  # reads its window anew for each result, and does little else
            read = written * math.prod(pytree.tree_leaves(n.args[1]))
        self.moved[n] = (read + written) // self._rows
        return result

    def _values_of(self, node: fx.Node) -> list[Tensor]:
        """The tensors that an operator takes, without weights."""
        taken = [self.env[n] for n in node.all_input_nodes if n not in self._weights]
        return [t for t in pytree.tree_leaves(taken) if isinstance(t, Tensor)]

    def _merge(self, old: int, new: int) -> None:
        self._memory.update((n, new) for n, group in self._memory.items() if group == old)
        self._owner.update((s, new) for s, group in self._owner.items() if group == old)
