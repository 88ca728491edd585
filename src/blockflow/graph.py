"""Graphs: what an exported program is made of, and copies of parts of it.

Everything here reads an `ExportedProgram` of `torch.export` and changes nothing in it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    OutputKind,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from blockflow.artifact import BATCH, Port
from blockflow.errors import ModelRefused

# --------------------------------------------------------------------------------- the interface


def input_nodes(program: ExportedProgram) -> list[fx.Node]:
    """The placeholders that the caller fills with tensors, in calling order."""
    by_name = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    found = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(spec.arg, TensorArgument):
                found.append(by_name[spec.arg.name])
            elif not isinstance(spec.arg, ConstantArgument):
                raise ModelRefused(
                    f"the input {spec.arg.name!r} is no tensor: a block takes tensors only"
                )
    return found


def output_nodes(program: ExportedProgram) -> list[fx.Node]:
    """What the program returns, flat, without what is None.

    Raises ModelRefused if it returns anything but tensors, or writes to its own weights.
    """
    for output in program.graph_signature.output_specs:
        if output.kind is not OutputKind.USER_OUTPUT:
            raise ModelRefused(
                f"the model writes to its own {output.target!r} as it runs: a block has no memory "
                "between requests; put the model in eval mode, or take that state out of it"
            )
    returned = program.graph.output_node().args[0]
    nodes = []
    for item in returned if isinstance(returned, (tuple, list)) else (returned,):
        if item is None:
            continue
        if not isinstance(item, fx.Node) or not isinstance(item.meta.get("val"), Tensor):
            raise ModelRefused(f"the model returns {item!r} beside tensors: return tensors only")
        nodes.append(item)
    if not nodes:
        raise ModelRefused("the model returns no tensor")
    return nodes


def weight_nodes(program: ExportedProgram) -> dict[fx.Node, tuple[str, Tensor]]:
    """Placeholders that stand for parameters, buffers and constants, with name and value."""
    by_name = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    found: dict[fx.Node, tuple[str, Tensor]] = {}
    for spec in program.graph_signature.input_specs:
        match spec.kind:
            case InputKind.USER_INPUT:
                continue
            case InputKind.PARAMETER | InputKind.BUFFER | InputKind.CONSTANT_TENSOR:
                target = str(spec.target)
                value = program.state_dict.get(target, program.constants.get(target))
            case _:
                target, value = str(spec.target), None
        if (
            not isinstance(value, Tensor)
            or type(value.data) is not Tensor
            or value.layout is not torch.strided
            or value.is_quantized
        ):
            raise ModelRefused(
                f"the weight {target!r} is no plain dense tensor: BlockFlow cannot store it"
            )
        found[by_name[spec.arg.name]] = (target, value.detach())
    return found


def batch_symbol(program: ExportedProgram) -> object | None:
    """The symbol of the batch dimension: the one that is the first dimension of an input."""
    for node in input_nodes(program):
        shape = node.meta["val"].shape
        if len(shape) and isinstance(shape[0], torch.SymInt):
            symbol: object = shape[0].node.expr
            return symbol
    return None


def port_of(name: str, value: Tensor, batch: object | None) -> Port:
    """Describe a traced tensor. Raises ModelRefused where a shape is neither batch nor number."""
    shape: list[Any] = []
    sizes: tuple[Any, ...] = tuple(value.shape)  # SymInt hides as int from the type checker
    for index, size in enumerate(sizes):
        if not isinstance(size, torch.SymInt):
            shape.append(size)
        elif index == 0 and size.node.expr == batch:
            shape.append(BATCH)
        elif index == 0:
            said = str(size).replace(str(batch), BATCH)
            raise ModelRefused(
                f"the first dimension of {name!r} is {said}, not the batch itself: rows of "
                "different requests could not be told apart"
            )
        else:
            raise ModelRefused(
                f"dimension {index} of {name!r} changes from request to request ({size}): only "
                "the first dimension, the batch, may; give the others a number"
            )
    return Port(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=tuple(shape))


def input_ports(program: ExportedProgram) -> tuple[Port, ...]:
    """The inputs under the model's own argument names."""
    batch = batch_symbol(program)
    return tuple(port_of(node.name, node.meta["val"], batch) for node in input_nodes(program))


def output_ports(program: ExportedProgram) -> tuple[Port, ...]:
    """The outputs: `output`; or `output_0`, ... for a tuple; or the keys of a dict."""
    nodes = output_nodes(program)
    batch = batch_symbol(program)
    returned = program.graph.output_node().args[0]
    flat = returned if isinstance(returned, (tuple, list)) else (returned,)
    # None is a leaf here, so that the others keep their places: `output_2` stays the third.
    spec = program.call_spec.out_spec
    tree = pytree.tree_unflatten(range(len(flat)), spec)
    paths, _ = pytree.tree_flatten_with_path(tree)
    names = output_names([path for path, leaf in paths if flat[leaf] is not None])
    return tuple(
        port_of(name, node.meta["val"], batch) for name, node in zip(names, nodes, strict=True)
    )


def output_names(paths: Sequence[tuple[Any, ...]]) -> list[str]:
    """Names for the leaves of what a model returned, from their paths in it."""
    names = []
    for path in paths:
        keys = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", "")))) for k in path]
        numbered = bool(path) and isinstance(path[0], pytree.SequenceKey)
        names.append("_".join(["output", *keys] if numbered or not path else keys))
    if len(set(names)) != len(names) or "" in names:
        names = [f"output_{index}" for index in range(len(paths))]
    return names


# ---------------------------------------------------------------------------------- pure modules


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operator writes to, by its schema.

    An operator that runs a subgraph has no schema. If anything is written in there, all that it
    takes counts as written.
    """
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        inner = [getattr(node.graph.owning_module, str(n.target), None) for n in _subgraphs(node)]
        if any(map(_writes, inner)):
            return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    return [value for value, written in _aliased_arguments(node) if written]


def _subgraphs(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source.op == "get_attr"]


def _writes(module: object) -> bool:
    return isinstance(module, fx.GraphModule) and any(
        mutated_arguments(node) for node in module.graph.nodes
    )


def viewed_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory an operator's result may share, by its schema."""
    if node.target is operator.getitem:
        return list(node.all_input_nodes)
    return [value for value, _ in _aliased_arguments(node)]


def _aliased_arguments(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    if isinstance(node.target, torch._ops.OpOverload):
        for index, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is not None:
                given = index < len(node.args)
                value = node.args[index] if given else node.kwargs.get(argument.name)
                for item in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(item, fx.Node):
                        yield item, argument.alias_info.is_write


def is_batch_size(node: fx.Node, batch: object | None) -> bool:
    """Whether a node is the plain number of rows, which any batched tensor can tell."""
    value = node.meta.get("val")
    return (
        batch is not None
        and node.target is torch.ops.aten.sym_size.int
        and isinstance(value, torch.SymInt)
        and bool(value.node.expr == batch)
    )


def input_independent(program: ExportedProgram) -> set[fx.Node]:
    """The nodes whose value no input's data can change: weights, the batch size, tables.

    They can be computed again wherever they are needed. What is random, written in place, or
    shares memory with something that is written in place is not among them.
    """
    batch = batch_symbol(program)
    weights = weight_nodes(program)
    written: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):  # from a view back to what it is a view of
        written.update(mutated_arguments(node))
        if mutated_arguments(node) or node in written:
            written.update(viewed_arguments(node))
    tainted = set(written)
    for node in program.graph.nodes:  # and forward, to the other views of the same memory
        if any(source in tainted for source in viewed_arguments(node)):
            tainted.add(node)
    free: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            independent = node in weights
        elif node.op == "get_attr" or is_batch_size(node, batch):
            independent = True
        else:
            independent = (
                node.op == "call_function"
                and node not in tainted
                and not mutated_arguments(node)
                and not is_random(node)
                # An operator without a result is an assertion about its place in the graph.
                and bool(node.users)
                and all(source in free for source in node.all_input_nodes)
            )
        if independent:
            free.add(node)
    return free


def is_random(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )


def plain_module(
    program: ExportedProgram, device: torch.device | str | None = None
) -> fx.GraphModule:
    """The program as a module of nothing but operators: positional tensors in, a tuple out.

    Weights that no operator uses are left out; the others become buffers under flattened names.
    There is no guard, hook or pytree around the graph. With a device, weights are moved there and
    every device written into the graph is replaced by it.
    """
    target = None if device is None else torch.device(device)
    module = copy_graph(
        program,
        body=[n for n in program.graph.nodes if n.op in {"get_attr", "call_function"}],
        inputs={node: node.name for node in input_nodes(program)},
        outputs=output_nodes(program),
        weights=weight_nodes(program),
    )
    if target is not None:
        module.to(target)
        _replace(module, lambda value: target if isinstance(value, torch.device) else value)
    return module


def compute_in(module: fx.GraphModule, dtype: torch.dtype) -> None:
    """Turn a module of float32 into one of `dtype`: its weights, and where the graph names it."""
    module.to(dtype)
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                # Operators that make a tensor out of nothing make float32 where none is named.
                made = node.meta.get("val")
                given = (each.meta.get("val") for each in node.all_input_nodes)
                if (
                    node.op == "call_function"
                    and isinstance(made, Tensor)
                    and made.dtype == torch.float32
                    and not any(isinstance(value, Tensor) for value in given)
                ):
                    node.kwargs = {**node.kwargs, "dtype": dtype}
    _replace(module, lambda value: dtype if value is torch.float32 else value)


def put_channels_last(module: fx.GraphModule) -> None:
    """Lay the weights of convolutions out with channels last, as inputs will be."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                if node.target is torch.ops.aten.view.default:
                    # A view of what now lies otherwise may need a copy.
                    node.target = torch.ops.aten.reshape.default
            part.recompile()


def copy_graph(
    program: ExportedProgram,
    *,
    body: Sequence[fx.Node],
    inputs: Mapping[fx.Node, str],
    outputs: Sequence[fx.Node],
    weights: Mapping[fx.Node, tuple[str, Tensor]],
) -> fx.GraphModule:
    """A module that computes `outputs` from `inputs` by the nodes of `body`, in that order.

    The values of `inputs` are the names of the module's arguments, in their order. `body` must be
    closed: what its nodes use is in it, in `inputs`, a weight, or the batch size, which is asked
    of the first input that has rows.
    """
    batch = batch_symbol(program)
    root = nn.Module()
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node, argument in inputs.items():  # first, so that no other node can take their names
        copies[node] = graph.placeholder(argument)
        copies[node].meta["val"] = node.meta["val"]
    batched = next(
        (
            n
            for n in inputs
            if n.meta["val"].dim() and isinstance(n.meta["val"].shape[0], torch.SymInt)
        ),
        None,
    )
    rows: fx.Node | None = None
    used: set[str] = set()

    def copied(node: fx.Node) -> fx.Node:
        nonlocal rows
        if node in copies:
            return copies[node]
        if is_batch_size(node, batch) and batched is not None:
            if rows is None:
                rows = graph.call_function(torch.ops.aten.sym_size.int, (copies[batched], 0))
                rows.meta["val"] = node.meta["val"]
            return rows
        name, value = weights[node]
        flat = name.replace(".", "_")
        while flat in used or hasattr(root, flat):
            flat += "_"
        used.add(flat)
        root.register_buffer(flat, _compact(value))
        copies[node] = graph.get_attr(flat)
        copies[node].meta["val"] = node.meta.get("val")
        return copies[node]

    for node in body:
        if is_batch_size(node, batch):
            continue
        if node.op == "get_attr":
            setattr(root, str(node.target), getattr(program.graph_module, str(node.target)))
        copies[node] = graph.node_copy(node, copied)
    graph.output(tuple(copied(node) for node in outputs))
    graph.lint()
    return fx.GraphModule(root, graph)


def _compact(value: Tensor) -> Tensor:
    """The tensor in a storage of its own: torch saves whole storages, however little is used."""
    if value.untyped_storage().nbytes() == value.numel() * value.element_size():
        return value
    return value.clone()


def _replace(module: fx.GraphModule, replaced: Callable[[Any], Any]) -> None:
    """Put `replaced(value)` for every value that is written into the graph."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.args = fx.node.map_aggregate(node.args, replaced)
                node.kwargs = fx.node.map_aggregate(node.kwargs, replaced)
            part.recompile()
