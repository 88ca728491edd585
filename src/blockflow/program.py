"""Programs: what an artifact computes. Reads and writes program files, names them, runs them.

Note [Loading runs nobody's code]
    `torch.export.load` is no boundary: it falls back to `pickle` for weights, constants and
    sample inputs, evaluates shape expressions through sympy, resolves operator names to any
    attribute of `torch`, pastes names into generated Python, and opens compiled libraries. So an
    archive never reaches it. `read_archive` reads the members itself, lets only what it knows
    pass, and gives torch a new archive written from that, in memory. What is refused is refused
    by default: a layout that a later torch invents is an error here, not a hole.

    TorchScript files are read by torch's own restricted reader, but may call any TorchScript
    operator, such as those that write files: they are code, and to be trusted like code.

Note [Canonical identity]
    A block is named by what it computes and by its ports. `digest_of` walks the graph and hashes
    every operator with its full argument list, inputs by position, weights by dtype, shape,
    stride and bytes. Names of parameters and nodes, stack traces, and the order and presence of
    what no operator uses are left out, so that the same trunk cut from two models is one
    artifact. A value that does not depend on the input's data (a weight, the batch size, a table
    of positions) is hashed where it is first used, because exporters are free to compute it
    anywhere before.

    Names of ports count: an artifact has one manifest, so two blocks that call their ports
    differently cannot be the same artifact. f(a, b) and f(b, a) would be taken for each other,
    and a block in the middle of one model for the whole of another one.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import logging
import math
import operator
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
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

from blockflow.artifact import BATCH, PROGRAM_FILE, Digest, Manifest, Port, Store
from blockflow.errors import ModelRefused

# ------------------------------------------------------------------------------------ archives

_MEMBER = re.compile(
    r"""(?P<prefix>[^/]+)/(?:
      (?P<model>models/model\.json)
    | (?P<config>data/(?:weights/model_weights_config|constants/model_constants_config)\.json)
    | (?P<payload>data/(?:weights/weight|constants/tensor)_\d+)
    | (?P<samples>data/sample_inputs/model\.pt)
    | (?P<mark>archive_format|archive_version|byteorder|\.data/version)
    | (?P<dropped>\.data/serialization_id|\.format_version|\.storage_alignment|extra/.*)
    )""",
    re.VERBOSE,
)
_REQUIRED = (
    "archive_format",
    "archive_version",
    "models/model.json",
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
)
_SAMPLES = "data/sample_inputs/model.pt"

_NAME = re.compile(r"[A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*")
_PATHS = frozenset({"parameter_name", "buffer_name", "tensor_constant_name", "fqn"})
_VERSION = re.compile(r"[A-Za-z0-9_.+<=-]*")
_PAYLOAD = re.compile(r"(?:weight|tensor)_\d+")
_CPU = {"type": "cpu", "index": None}

_OPERATOR = re.compile(r"torch\.ops\.(aten|prims|torchvision)\.(\w+)\.\w+")
_HIGHER_ORDER = frozenset(
    f"torch.ops.higher_order.{name}"
    for name in ("cond", "wrap_with_autocast", "wrap_with_set_grad_enabled")
)
_FORBIDDEN_OPERATORS = frozenset(  # files, logs and global state; `_` names are checked as well
    {"from_file", "save", "warn", "_print", "manual_seed", "seed", "set_grad_enabled"}
)
_SCALAR_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in (
            *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "getitem"),
            *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"),
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum")
    },
}

_TREE_TYPES = frozenset(
    {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
)

_EXPRESSIONS = frozenset(
    {
        *("Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Equality", "FloatTrueDiv"),
        *("FloorDiv", "FloorToInt", "GreaterThan", "Identity", "IntTrueDiv", "Integer"),
        *("LessThan", "Max", "Min", "Mod", "ModularIndexing", "Mul", "Not", "Or", "Pow"),
        *("PythonMod", "Rational", "StrictGreaterThan", "StrictLessThan", "Symbol", "ToFloat"),
        *("TruncToFloat", "TruncToInt", "Unequality", "Where"),
    }
)
_SYMBOL = re.compile(r"[a-z]\w{0,30}")
_SYMBOL_FLAGS = frozenset({"positive", "integer", "nonnegative", "nonzero", "real", "zero"})


def read_archive(path: Path) -> ExportedProgram:
    """Read a `.pt2` file of `torch.export.save` without running anything that it brings along.

    Sample inputs, stack traces and guards are dropped and every device is read as "cpu". Raises
    ModelRefused, naming the file and the member at fault; see Note [Loading runs nobody's code].
    """
    try:
        with zipfile.ZipFile(path) as archive:
            clean = _screened(archive, path)
    except FileNotFoundError:
        raise ModelRefused(f"there is no file {path}") from None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RecursionError) as error:
        raise ModelRefused(
            f"{path} is no torch.export archive, or a damaged one ({first_line(error)}): "
            "write it with torch.export.save"
        ) from None
    with log_captured("torch.export") as logged, warnings.catch_warnings():
        # torch 2.11 says this of weights that lie in the archive's own bytes; nobody writes there.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        try:
            program = torch.export.load(clean)
        except Exception as error:  # noqa: BLE001  the loader raises whatever it trips over
            cause = logged[-1] if logged else error
            raise ModelRefused(f"torch cannot read {path}: {first_line(cause)}") from None
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function" and not _is_operator(node.target):
                    raise _refusal(
                        path, "models/model.json", f"calls {node.target}, no tensor operator"
                    )
    return program


def write_archive(program: ExportedProgram, path: Path) -> None:
    """Write a program so that `read_archive` takes it back: nothing in the file is pickled.

    Stack traces and module names stay behind: they hold paths of the machine that exported.
    `program` loses them as well, and its example inputs.
    """
    program.example_inputs = None  # torch.export.save has no option to leave them out
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                    node.meta.pop(key, None)
    with warnings.catch_warnings():
        # Said of weights in another memory format than the default: their whole storage is saved.
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        torch.export.save(program, path)


def _refusal(path: Path, member: str, why: str) -> ModelRefused:
    return ModelRefused(f"{path}: {member} {why}")


def _screened(archive: zipfile.ZipFile, path: Path) -> io.BytesIO:
    """A new archive with what may pass of `archive`."""
    members: dict[str, zipfile.ZipInfo] = {}
    kinds: dict[str, str] = {}
    prefixes = set()
    for info in archive.infolist():
        match = _MEMBER.fullmatch(info.filename)
        if match is None or match.lastgroup is None:
            raise _refusal(
                path, info.filename, f"does not belong in a program ({_suspicion(info)})"
            )
        prefix = match["prefix"]
        name = info.filename.removeprefix(prefix + "/")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise _refusal(
                path, info.filename, "is compressed or encrypted; torch stores members as is"
            )
        if name in members:
            raise _refusal(path, info.filename, "is there twice")
        prefixes.add(prefix)
        members[name] = info
        kinds[name] = match.lastgroup
    if len(prefixes) != 1:
        raise ModelRefused(f"{path} holds {len(prefixes)} top folders instead of one")
    for name in _REQUIRED:
        if name not in members:
            raise ModelRefused(
                f"{path} has no {name}: it is no archive of torch.export.save, or of an old torch; "
                "export the model again"
            )

    clean = io.BytesIO()
    with zipfile.ZipFile(clean, "w", zipfile.ZIP_STORED) as out:
        for name, info in members.items():
            content = archive.read(info)
            match kinds[name]:
                case "model" | "config":
                    document = _screen(json.loads(content), path, name)
                    out.writestr(f"program/{name}", json.dumps(document))
                case "payload":
                    out.writestr(f"program/{name}", content)
                case "mark":
                    if name == "byteorder" and content != b"little":
                        raise _refusal(path, name, "is not little")
                    out.writestr(f"program/{name}", content)
                case "samples":
                    _check_samples(content, path)
        # The loader wants the member; empty, it is not unpickled.
        out.writestr(f"program/{_SAMPLES}", b"")
    clean.seek(0)
    return clean


def _suspicion(info: zipfile.ZipInfo) -> str:
    name = info.filename.partition("/")[2]
    if name.startswith("data/aotinductor/"):
        return "it is compiled code"
    if name.startswith("data/constants/"):
        return "it is a pickled object"
    if name.endswith(".pt"):
        return "it is a pickle; save the model again with a current torch"
    if name.startswith("models/"):
        return "one program per file, named model"
    return "unknown member"


def _check_samples(content: bytes, path: Path) -> None:
    """Sample inputs are never used; that they would need a full unpickler marks a hostile file."""
    if content:
        try:
            torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        except Exception:  # noqa: BLE001  any failure means the same
            raise _refusal(
                path, _SAMPLES, "holds more than tensors: it needs a pickle that can run code"
            ) from None


def _screen(value: Any, path: Path, member: str, key: str = "") -> Any:
    """Copy a JSON document of an archive, checking every string in it by the key it stands at."""

    def refusal(why: str) -> ModelRefused:
        return _refusal(path, member, why)

    match value:
        case dict():
            if key in {"device", "as_device"}:
                return dict(_CPU)
            if key == "metadata":
                return {}
            if value.get("use_pickle"):
                raise refusal(f"asks to unpickle {str(value.get('path_name'))[:80]!r}")
            for name in value:
                if not _PATH.fullmatch(name):
                    raise refusal(f"has the name {name[:80]!r}, which is not made of identifiers")
                if "custom_obj" in name and name != "custom_obj_values":
                    raise refusal("holds a script or opaque object; only tensors can be stored")
            if value.get("custom_obj_values"):
                raise refusal("holds a script or opaque object; only tensors can be stored")
            return {name: _screen(item, path, member, name) for name, item in value.items()}
        case list():
            if key == "guards_code":  # Python source; ports are checked by the manifest instead
                return []
            if key == "module_call_graph":  # only the outermost entry says how to call
                value = [v for v in value if isinstance(v, dict) and v.get("fqn") == ""]
            return [_screen(item, path, member, key) for item in value]
        case str():
            if key == "expr_str":
                _check_expression(value, refusal)
            elif key in {"target", "as_operator"}:
                _check_operator_name(value, refusal)
            elif key in {"in_spec", "out_spec"}:
                _check_tree(json.loads(value), refusal)
            elif key == "path_name":
                if not _PAYLOAD.fullmatch(value):
                    raise refusal(f"takes a weight from {value[:80]!r}, which is no raw tensor")
            elif key in {"as_string", "as_strings"}:
                pass  # an operator's argument ("mean", "bilinear"); generated code quotes it
            else:
                # A node's name becomes the left side of an assignment in generated code.
                allowed = _PATH if key in _PATHS else _NAME
                if not (_VERSION if key == "torch_version" else allowed).fullmatch(value):
                    raise refusal(f"has {key} = {value[:80]!r}, which is not made of identifiers")
            return value
        case None | bool() | int() | float():
            return value
    raise refusal(f"holds a {type(value).__name__}")


def _check_operator_name(name: str, refusal: Callable[[str], ModelRefused]) -> None:
    if name in _SCALAR_FUNCTIONS or name in _HIGHER_ORDER:
        return
    match = _OPERATOR.fullmatch(name)
    if match is None or match[2] in _FORBIDDEN_OPERATORS or match[2].startswith("__"):
        raise refusal(f"calls {name[:80]!r}, which is not among the operators that a block may use")


def _is_operator(target: object) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return True
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{target.name()}" in _HIGHER_ORDER
    return any(target is function for function in _SCALAR_FUNCTIONS.values())


def _check_tree(spec: Any, refusal: Callable[[str], ModelRefused]) -> None:
    """Check a pytree's JSON: a context can name a module to import, a type can be anybody's."""

    def visit(node: Any) -> None:
        if not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"}:
            raise refusal("describes its arguments in an unknown way")
        if node["type"] not in _TREE_TYPES:
            raise refusal(
                f"takes or returns a {str(node['type'])[:80]}: a block takes and returns tensors, "
                "alone or in tuples, lists and dicts"
            )
        context = node["context"]
        keys = json.loads(context) if isinstance(context, str) else context
        if keys is not None and not (
            isinstance(keys, list) and all(isinstance(k, str) and _NAME.fullmatch(k) for k in keys)
        ):
            raise refusal(f"names arguments {str(context)[:80]!r}")
        for child in node["children_spec"]:
            visit(child)

    if not isinstance(spec, list) or len(spec) != 2 or spec[0] != 1:
        raise refusal("describes its arguments in an unknown version")
    visit(spec[1])


def _check_expression(text: str, refusal: Callable[[str], ModelRefused]) -> None:
    """Let pass what sympy's `srepr` prints for a shape: nested calls of known names on numbers."""

    def bad() -> ModelRefused:
        return refusal(f"has the shape expression {text[:80]!r}, which is not plain arithmetic")

    def number(node: ast.expr) -> bool:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            node = node.operand
        return (
            isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 2**63
        )

    def visit(node: ast.expr) -> None:
        match node:
            case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))]):
                flags = {flag.arg for flag in node.keywords}
                values = [flag.value for flag in node.keywords]
                if not (_SYMBOL.fullmatch(name) and flags <= _SYMBOL_FLAGS):
                    raise bad()
                if not all(isinstance(v, ast.Constant) and type(v.value) is bool for v in values):
                    raise bad()
            case ast.Call(func=ast.Name(id="Pow"), args=[base, exponent], keywords=[]):
                match exponent:  # a tower of powers would take for ever
                    case ast.Call(
                        func=ast.Name(id="Integer"), args=[ast.Constant(value=int(n))], keywords=[]
                    ) if 0 <= n <= 8:
                        visit(base)
                    case _:
                        raise bad()
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                if name not in _EXPRESSIONS or name in {"Symbol", "Pow"}:
                    raise bad()
                for arg in args:
                    visit(arg)
            case ast.Name(id="true" | "false"):
                pass
            case _ if number(node):
                pass
            case _:
                raise bad()

    if len(text) > 2000:
        raise bad()
    try:
        visit(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise bad() from None


@contextlib.contextmanager
def log_captured(name: str) -> Iterator[list[BaseException]]:
    """Keep what a logger would print as a traceback, and give the errors to the caller instead."""
    errors: list[BaseException] = []

    def keep(record: logging.LogRecord) -> bool:
        if isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
            errors.append(record.exc_info[1])
        return False

    logger = logging.getLogger(name)
    logger.addFilter(keep)
    try:
        yield errors
    finally:
        logger.removeFilter(keep)


def first_line(error: BaseException) -> str:
    """The one line of an error that says most: a model's author has no use for torch's trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    chosen = next((line[2:] for line in lines if line.startswith("- ")), lines[0] if lines else "")
    text = chosen or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


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
    """What the program returns, flat. Raises ModelRefused if it returns or writes anything else."""
    for output in program.graph_signature.output_specs:
        if output.kind is not OutputKind.USER_OUTPUT:
            raise ModelRefused(
                f"the model writes to its own {output.target!r} as it runs: a block has no memory "
                "between requests; put the model in eval mode"
            )
    returned = program.graph.output_node().args[0]
    nodes = []
    for item in returned if isinstance(returned, (tuple, list)) else (returned,):
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
    tree = pytree.tree_unflatten(range(len(nodes)), program.call_spec.out_spec)
    paths, _ = pytree.tree_flatten_with_path(tree)
    names = output_names([path for path, _ in paths])
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
    if len(set(names)) != len(names):
        names = [f"output_{index}" for index in range(len(paths))]
    return names


# ---------------------------------------------------------------------------------- pure modules


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operator writes to, by its schema."""
    return [value for value, written in _aliased_arguments(node) if written]


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
                and not _is_random(node)
                # An operator without a result is an assertion about its place in the graph.
                and bool(node.users)
                and all(source in free for source in node.all_input_nodes)
            )
        if independent:
            free.add(node)
    return free


def _is_random(node: fx.Node) -> bool:
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
        _replace_devices(module, target)
    return module


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


def _replace_devices(module: fx.GraphModule, device: torch.device) -> None:
    def replaced(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.args = fx.node.map_aggregate(node.args, replaced)
                node.kwargs = fx.node.map_aggregate(node.kwargs, replaced)
            part.recompile()


# -------------------------------------------------------------------------------------- identity

_IDENTITY = "blockflow-program-1"


def digest_of(program: ExportedProgram, inputs: Sequence[Port], outputs: Sequence[Port]) -> Digest:
    """The name of what a program computes; see Note [Canonical identity]."""
    walk = _Walk(program)
    walk.run()
    walk.feed("outputs", [walk.number(node) for node in output_nodes(program)])
    walk.feed("ports", [port.name for port in inputs], [port.name for port in outputs])
    return Digest(f"sha256-{walk.hash.hexdigest()}")


def prefix_digests(program: ExportedProgram) -> dict[fx.Node, bytes]:
    """For each node that computes: the hash of everything computed up to and including it."""
    found: dict[fx.Node, bytes] = {}
    walk = _Walk(program)
    walk.run(lambda node: found.__setitem__(node, walk.hash.digest()))
    return found


def script_digest(path: Path, inputs: Sequence[Port]) -> Digest:
    """The name of a TorchScript file: the hash of its bytes and of the inputs it is said to take.

    The file does not tell its inputs, so two descriptions of them make two artifacts.
    """
    digest = hashlib.sha256(msgspec.msgpack.encode(["blockflow-torchscript-1", inputs]))
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return Digest(f"sha256-{digest.hexdigest()}")


class _Walk:
    """Numbers the values of a graph in order of first use and hashes how each is made."""

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self._batch = batch_symbol(program)
        self._weights = weight_nodes(program)
        self._free = input_independent(program)
        self._numbers: dict[fx.Node, int] = {}
        self.hash = hashlib.sha256()
        self.feed(_IDENTITY)
        for node in input_nodes(program):
            port = port_of("", node.meta["val"], self._batch)
            self._numbers[node] = len(self._numbers)
            self.feed("input", port.dtype, list(port.shape))

    def feed(self, *items: Any) -> None:
        # msgpack values end by themselves: no two sequences of items give the same bytes.
        self.hash.update(msgspec.msgpack.encode(items))

    def run(self, after: Callable[[fx.Node], object] = lambda _: None) -> None:
        for node in self._program.graph.nodes:
            if node.op == "call_function" and node not in self._free and not self._is_dead(node):
                self.number(node)
                after(node)

    def number(self, node: fx.Node) -> int | str:
        if is_batch_size(node, self._batch):
            return BATCH
        if node not in self._numbers:
            item = self._describe(node)  # first: it numbers what the node uses
            self._numbers[node] = len(self._numbers)
            self.feed(*item)
        return self._numbers[node]

    def _describe(self, node: fx.Node) -> tuple[Any, ...]:
        if node in self._weights:
            return ("weight", *_identify(self._weights[node][1]))
        if node.op == "get_attr":
            inner = getattr(self._program.graph_module, str(node.target))
            return ("graph", _describe_graph(inner))
        return _describe_call(node, self.number)

    @staticmethod
    def _is_dead(node: fx.Node) -> bool:
        return (
            not node.users
            and not node.is_impure()
            and isinstance(node.meta.get("val"), (Tensor, torch.SymInt))
        )


def _describe_call(node: fx.Node, number: Callable[[fx.Node], int | str]) -> tuple[Any, ...]:
    def plain(value: Any) -> Any:
        match value:
            case fx.Node():
                return ["value", number(value)]
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


# --------------------------------------------------------------------------------------- running


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
    manifest = store.verify(digest)
    place = torch.device(device)
    path = store.path(digest) / PROGRAM_FILE[manifest.format]
    match manifest.format:
        case "torch.export":
            # The bound method skips nn.Module.__call__: there are no hooks to look for.
            call = plain_module(read_archive(path), place).forward
        case "torchscript":
            names = [port.name for port in manifest.outputs]
            script = read_script(path, place)

            def call(*tensors: Tensor) -> Sequence[Tensor]:
                return flatten_outputs(script(*tensors), names)

    return Program(manifest, place, call)


def read_script(path: Path, device: torch.device | str = "cpu") -> torch.jit.ScriptModule:
    """Read a TorchScript file, in eval mode. Raises ModelRefused."""
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
