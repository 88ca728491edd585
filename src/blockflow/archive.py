"""Program files: `.pt2` archives of torch.export, read and written without running anybody's code.

Note [Loading runs nobody's code]
    `torch.export.load` is no boundary: it falls back to `pickle` for weights, constants and
    sample inputs, evaluates shape expressions through sympy, resolves operator names to any
    attribute of `torch`, pastes names into generated Python, and opens compiled libraries. So an
    archive never reaches it. `read_archive` reads the members itself, lets only what it knows
    pass, and gives torch a new archive written from that, in memory. What is refused is refused
    by default: a layout that a later torch invents is an error here, not a hole.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import math
import operator
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from blockflow.errors import ModelRefused

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
_MODULE = re.compile(r"[A-Za-z0-9_.]+(?:@\d+)?")
_VERSION = re.compile(r"[A-Za-z0-9_.+<=-]*")
_PAYLOAD = re.compile(r"(?:weight|tensor)_\d+")
_CPU = {"type": "cpu", "index": None}

_OPERATOR = re.compile(r"torch\.ops\.(aten|prims|torchvision)\.(\w+)\.\w+")
_HIGHER_ORDER = frozenset(
    f"torch.ops.higher_order.{name}"
    for name in ("cond", "wrap_with_autocast", "wrap_with_set_grad_enabled")
)
_DUNDER_OPERATORS = frozenset(f"__{name}__" for name in ("and", "or", "xor", "lshift", "rshift"))
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

    Sample inputs, stack traces and guards are dropped and every device is read as "cpu"; of all
    that is said about operators, the paths of their modules stay. Raises ModelRefused, naming the
    file and the member at fault; see Note [Loading runs nobody's code].
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
    if name in {"data.pkl", "constants.pkl"}:
        return "it is a pickle of torch.save or TorchScript; write the file with torch.export.save"
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
                return _module_names(value.get("nn_module_stack"))
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
            elif key in {"as_float", "as_floats"}:  # JSON has no other way to write these
                if value not in {"Infinity", "-Infinity", "NaN"}:
                    raise refusal(f"has the number {value[:80]!r}")
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


def _module_names(stack: object) -> dict[str, str]:
    """Which submodules an operator was traced in, by their paths, and nothing else of `stack`."""
    if not isinstance(stack, str):
        return {}
    # torch writes `key,path,class;...`; a class's name may have commas, within brackets.
    paths = [item.split(",", 2)[1] for item in stack.split(";") if item.count(",") >= 2]
    kept = [path for path in paths if _MODULE.fullmatch(path)]
    return {"nn_module_stack": ";".join(f"{i},{path},Module" for i, path in enumerate(kept))}


def _check_operator_name(name: str, refusal: Callable[[str], ModelRefused]) -> None:
    if name in _SCALAR_FUNCTIONS or name in _HIGHER_ORDER:
        return
    match = _OPERATOR.fullmatch(name)
    if (
        match is None
        or match[2] in _FORBIDDEN_OPERATORS
        or (match[2].startswith("__") and match[2] not in _DUNDER_OPERATORS)
    ):
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
