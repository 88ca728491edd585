"""Identity: the name of what a program computes.

Note [Canonical identity]
    A block is named by what it computes. Every value of a graph has a hash: of the operator that
    makes it, its full argument list, and the hashes of what it takes. Inputs count by position,
    dtype and shape; weights by dtype, shape, stride and bytes; the batch size is one word. The
    program's name is the hash of its outputs' hashes. So two graphs have one name exactly if they
    put the same operators on the same data in the same way. Names of ports, parameters and nodes,
    the order in which independent branches were traced, and what no output depends on are no part
    of it: the same trunk cut from two models is one artifact, and a block from the middle of one
    model can be the whole of another.

    Two things need care, because they break "a value is what made it":
    - Memory that is written in place. All values in it (by the shadow run, which sees more than
      schemas tell) then mean what they meant and, on top, the chain of writes since they were made.
    - Random operators. Two calls alike give two values, so each counts with its number.

    The hashes are of what is computed, not of the mathematical function: x + y is not y + x.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from blockflow.artifact import BATCH, Digest, Port
from blockflow.errors import ModelRefused
from blockflow.graph import (
    batch_symbol,
    input_nodes,
    is_batch_size,
    is_random,
    mutated_arguments,
    output_nodes,
    port_of,
    weight_nodes,
)
from blockflow.shadow import Shadow

_IDENTITY = "blockflow-program-2"


def digest_of(program: ExportedProgram, shadow: Shadow | None = None) -> Digest:
    """The name of what a program computes; see Note [Canonical identity].

    `shadow` is the program's own shadow run, for callers who have one already.
    """
    values = Values(program, shadow)
    inputs = input_nodes(program)
    identity = _hashed(
        _IDENTITY,
        [values.declared(node) for node in inputs],
        [values.of(node) for node in output_nodes(program)],
        [values.of(node) for node in inputs],  # what it leaves in them, if it writes to them
        sorted(values.effects),
    )
    return Digest(f"sha256-{identity.hex()}")


def script_digest(script: Path | bytes, inputs: Sequence[Port]) -> Digest:
    """The name of a TorchScript file: the hash of its bytes and of the inputs it is said to take.

    The file does not tell its inputs, so two descriptions of them make two artifacts. Their names
    are left out, as everywhere.
    """
    described = [[port.dtype, port.shape] for port in inputs]
    digest = hashlib.sha256(msgspec.msgpack.encode(["blockflow-torchscript-2", described]))
    with io.BytesIO(script) if isinstance(script, bytes) else script.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return Digest(f"sha256-{digest.hexdigest()}")


class Values:
    """The hash of every value in a program: equal hashes mean the same computation, and the same
    result bit for bit, on the same inputs.

    effects: hashes of the operators that give no value but may raise (assertions of the exporter).
    """

    def __init__(self, program: ExportedProgram, shadow: Shadow | None = None) -> None:
        self._program = program
        self._shadow = shadow or Shadow(program)
        self._batch = batch_symbol(program)
        self._weights = weight_nodes(program)
        self._inputs = {node: place for place, node in enumerate(input_nodes(program))}
        self._made: dict[fx.Node, bytes] = {}
        self._writes: dict[int, bytes] = {}  # of each memory: the chain of writes to it so far
        self._birth: dict[fx.Node, bytes] = {}
        self._random = 0
        self.effects: list[bytes] = []
        for node in program.graph.nodes:
            if node.op != "output" and (
                node.op != "placeholder" or node in self._weights or node in self._inputs
            ):
                self._visit(node)

    def of(self, node: fx.Node) -> bytes:
        """The hash of a node's value as it is when the program ends."""
        writes = self._written(node)
        made = self._made[node]
        return made if writes == self._birth[node] else _hashed("written", made, writes)

    def declared(self, node: fx.Node) -> bytes:
        """The hash of an input before anything wrote to it."""
        return self._made[node]

    def _written(self, node: fx.Node) -> bytes:
        return self._writes.get(self._shadow.memory(node), b"")

    def _visit(self, node: fx.Node) -> None:
        made = self._made[node] = _hashed(*self._describe(node))
        for place, written in enumerate(mutated_arguments(node)):
            memory = self._shadow.memory(written)
            self._writes[memory] = _hashed(self._writes.get(memory, b""), made, place)
        self._birth[node] = self._written(node)
        if node.op == "call_function" and node.meta.get("val") is None:
            self.effects.append(made)

    def _describe(self, node: fx.Node) -> tuple[Any, ...]:
        if is_batch_size(node, self._batch):
            return (BATCH,)
        if node in self._inputs:
            port = port_of("", node.meta["val"], self._batch)
            return ("input", self._inputs[node], port.dtype, list(port.shape))
        if node in self._weights:
            return ("weight", *_identify(self._weights[node][1]))
        if node.op == "get_attr":
            inner = getattr(self._program.graph_module, str(node.target))
            return ("graph", _describe_graph(inner))
        call = _describe_call(node, self.of)
        if is_random(node):
            self._random += 1
            return (*call, "random", self._random)
        return call


def _hashed(*items: Any) -> bytes:
    # msgpack values end by themselves: no two sequences of items give the same bytes.
    return hashlib.sha256(msgspec.msgpack.encode(items)).digest()


def _describe_call(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> tuple[Any, ...]:
    def plain(value: Any) -> Any:
        match value:
            case fx.Node():
                return ["value", value_of(value)]
            case None | bool() | int() | float() | str():
                return value
            case complex():
                return ["complex", value.real, value.imag]
            case list() | tuple():
                return [plain(item) for item in value]
            case dict():
                return ["dict", [[str(k), plain(v)] for k, v in sorted(value.items())]]
            case torch.device():
                return ["device"]  # where a block runs is no part of what it computes
            case torch.dtype() | torch.layout() | torch.memory_format():
                return [str(value)]
        raise ModelRefused(
            f"the operator {node.target} takes a {type(value).__name__}, which BlockFlow cannot "
            "identify"
        )

    if isinstance(node.target, torch._ops.OpOverload):
        arguments = []
        for index, argument in enumerate(node.target._schema.arguments):
            if index < len(node.args):
                value = node.args[index]
            else:
                value = node.kwargs.get(
                    argument.name, argument.default_value if argument.has_default_value() else None
                )
            arguments.append(plain(value))
        return ("call", str(node.target), arguments)
    name = getattr(node.target, "__name__", None) or str(node.target)
    return ("call", str(name), plain(node.args), plain(dict(node.kwargs)))


def _describe_graph(module: nn.Module) -> list[Any]:
    """A subgraph of a control-flow operator, its values numbered in their order."""
    if not isinstance(module, fx.GraphModule):
        raise ModelRefused(f"the graph holds a {type(module).__name__}, no subgraph")
    numbers: dict[fx.Node, int] = {}
    items: list[Any] = []
    for node in module.graph.nodes:
        match node.op:
            case "placeholder":
                items.append("input")
            case "get_attr":
                items.append(_describe_graph(getattr(module, str(node.target))))
            case _:
                items.append(list(_describe_call(node, numbers.__getitem__)))
        numbers[node] = len(numbers)
    return items


def _identify(value: Tensor) -> tuple[str, list[int], list[int], bytes]:
    flat = value.cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(flat.numpy().data).digest()
    return str(value.dtype), list(value.shape), list(value.stride()), digest
