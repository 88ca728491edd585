"""The topology: every block and pipeline that should exist, as people write it.

Pure data, validated where it enters. What depends on artifacts and devices is checked by
`reconcile.validate`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, NewType, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from blockflow.errors import TopologyInvalid

BlockName = NewType("BlockName", str)
PipelineName = NewType("PipelineName", str)
WorkerName = NewType("WorkerName", str)
Generation = NewType("Generation", int)

MAX_BYTES = 1 << 20
"""Largest topology that is read, in bytes of UTF-8."""

# YAML's aliases let a few hundred bytes stand for more values than memory holds. The depth keeps
# what walks the values, from PyYAML to `repr`, off Python's recursion limit.
_MAX_VALUES = 200_000
_MAX_DEPTH = 32
_NESTED = "it is nested too deeply"

Precision = Literal["fp32", "tf32", "fp16", "bf16"]
PortName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f]+$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]

INPUT = "input"
"""What a pipeline's graph calls the tensors that clients send."""


_MOST_CPUS = 4095


def _cores_in(text: str) -> list[int]:
    """The numbers that `0-3,6` names. Raises PydanticCustomError."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", part, re.ASCII)
        if match is None:
            raise PydanticCustomError("cpus", "are no cores")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise PydanticCustomError("cpus", "are no cores")
        found += range(first, last + 1)
    return found


def _shape(value: object) -> str:
    return "mapping" if isinstance(value, Mapping) else "plain"


# Told apart by shape, so that a mistake is explained once and not once for each form.
Feed = Annotated[
    Annotated[PortName, Tag("plain")] | Annotated[dict[PortName, PortName], Tag("mapping")],
    Discriminator(_shape),
]
Outputs = Annotated[
    Annotated[tuple[PortName, ...], Tag("plain")]
    | Annotated[dict[PortName, PortName], Tag("mapping")],
    Discriminator(_shape),
]


GpuName = Annotated[str, Field(pattern=r"^cuda:(0|[1-9][0-9]{0,2})$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Block(_Frozen):
    """A deployed artifact."""

    # The digest names a folder of the store: the pattern is also what keeps `../` out of paths.
    artifact: str = Field(
        pattern=r"^sha256-[0-9a-f]{64}$",
        description="digest of the artifact: sha256-<64 hex digits>",
    )
    device: str = Field(
        "cpu", pattern=r"^(cpu|cuda:(0|[1-9][0-9]{0,2}))$", description="cpu, or cuda:<index>"
    )
    worker: Name | None = Field(
        None, description="worker process to live in; blocks that name the same one share it"
    )
    # Strict: YAML's `yes` is not 1, and "8" is not 8.
    max_batch: int = Field(8, ge=1, le=4096, strict=True, description="most rows of one request")
    max_delay_ms: float = Field(
        0,
        ge=0,
        le=60_000,
        strict=True,
        allow_inf_nan=False,
        description="how long a busy block waits for more requests before it computes a batch",
    )
    precision: Precision = Field(
        "fp32", description="what a float32 artifact is computed in; its ports stay float32"
    )
    channels_last: bool = Field(
        False, strict=True, description="lay images out with their channels last while computing"
    )
    cuda_graph: bool = Field(
        True, strict=True, description="replay the block from CUDA graphs, where it can be captured"
    )
    compile: bool = Field(
        False,
        strict=True,
        description="compile the program before the block is ready, which may take minutes",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        strict=True,
        description="most threads on the CPU; by default all cores, divided among the workers that "
        "compute at the same moment, and the blocks of a worker then compute in turns",
    )
    # Strict all the way: PyYAML reads a bare 0-3 as text, and 3 as a number.
    cpus: tuple[Annotated[int, Field(ge=0, le=_MOST_CPUS, strict=True)], ...] | None = Field(
        None,
        min_length=1,
        description='cores that the block\'s threads stay on, such as "0-3,6" or [0, 1]; it has '
        "them for itself as far as other blocks are concerned",
    )
    fuse: bool = Field(
        True,
        strict=True,
        description="run in one go with the neighbours in its worker that nothing else leads to",
    )

    @field_validator("cpus", mode="wrap")
    @classmethod
    def _as_numbers(
        cls, value: object, read: ValidatorFunctionWrapHandler
    ) -> tuple[int, ...] | None:
        if isinstance(value, str):
            value = _cores_in(value)
        try:
            cores: tuple[int, ...] | None = read(value)
        except ValidationError:
            raise PydanticCustomError("cpus", "are no cores") from None
        return None if cores is None else tuple(sorted(set(cores)))


class Reference(NamedTuple):
    """What a graph points to: a block or, where `block` is None, what clients send.

    `port` is None where all of its tensors are meant, or the only one.
    """

    block: str | None
    port: str | None


class Pipeline(_Frozen):
    """Blocks that clients see as one model: a chain of them (`blocks`), or a `graph`."""

    blocks: tuple[Name, ...] | None = Field(
        None, min_length=1, description="block names, first to last"
    )
    graph: dict[Name, Feed] | None = Field(
        None,
        min_length=1,
        description="block: where its inputs come from, as `input`, a block, or "
        "{port: input.NAME or BLOCK.PORT}",
    )
    # One artifact serves models that call the same tensor by different names.
    inputs: tuple[PortName, ...] | None = Field(
        None, description="what clients call the inputs, in the order of the first block's"
    )
    outputs: Outputs | None = Field(
        None,
        description="what clients call the outputs: names in the order of the last block's, or "
        "{name: BLOCK.PORT}",
    )

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        if self.blocks is None and self.graph is None:
            raise PydanticCustomError("form", "must have `blocks` (a chain) or a `graph`")
        if self.blocks is not None and self.graph is not None:
            raise PydanticCustomError("form", "has both `blocks` and a `graph`; leave one out")
        return self

    @property
    def members(self) -> tuple[BlockName, ...]:
        """The blocks in the order in which they are written."""
        return tuple(map(BlockName, self.graph if self.graph is not None else self.blocks or ()))

    @property
    def feeds(self) -> Mapping[BlockName, str | Mapping[str, str]]:
        """Where each block's inputs come from, a chain written as the graph that it is."""
        if self.graph is not None:
            return {BlockName(name): feed for name, feed in self.graph.items()}
        return dict(zip(self.members, (INPUT, *self.members), strict=False))

    def reference(self, text: str) -> Reference:
        """Read `input`, `input.NAME`, `BLOCK` or `BLOCK.PORT`.

        A block's name may have dots, so the longest member that fits is meant. One that is no
        member is given as far as the first dot.
        """
        if text == INPUT or text.startswith(INPUT + "."):
            return Reference(None, text[len(INPUT) + 1 :] or None)
        fitting = [name for name in self.members if text == name or text.startswith(name + ".")]
        block = max(fitting, key=len, default=text.partition(".")[0])
        return Reference(block, text[len(block) + 1 :] or None)


class Gpu(_Frozen):
    """How the workers of one GPU use it."""

    mps: Literal["auto", "on", "off"] = Field(
        default="off",
        description="whether the GPU's workers run under NVIDIA MPS, side by side but without "
        "isolation from each other's death; auto: when it has several and MPS can be had",
    )

    @field_validator("mps", mode="before")
    @classmethod
    def _as_written(cls, value: object) -> object:
        # YAML reads a bare `on` as true.
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class Topology(_Frozen):
    """All blocks and pipelines that should exist; an empty one is valid and removes everything."""

    store: str | None = Field(
        None, pattern=r"^[^\x00]+$", description="the artifact store's directory"
    )
    blocks: dict[Name, Block] = Field(default_factory=dict)
    pipelines: dict[Name, Pipeline] = Field(default_factory=dict)
    devices: dict[GpuName, Gpu] = Field(
        default_factory=dict, description="settings of GPUs, by their names: cuda:<index>"
    )


def parse(source: str | bytes | Mapping[str, object]) -> Topology:
    """Read a topology from YAML text (UTF-8, at most `MAX_BYTES`) or from plain data.

    Raises:
        TopologyInvalid: with every problem found, each one led by the path it was found at.
    """
    if isinstance(source, str | bytes):
        return _validated(*_read_yaml(_decoded(source)))
    return _validated(source, [])


def parse_json(text: str | bytes) -> Topology:
    """Read a topology from JSON text (UTF-8, at most `MAX_BYTES`); raises as `parse` does."""
    return _validated(*_read_json(_decoded(text)))


def dump(topology: Topology) -> str:
    """Write a topology as YAML that `parse` reads back as an equal one."""
    plain = topology.model_dump(mode="json", exclude_none=True)
    # PyYAML writes NEL as it is and reads it as a line break; escaped, it survives.
    readable = "\x85" not in topology.model_dump_json()
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=readable)
    return text


def _decoded(text: str | bytes) -> str:
    size = len(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    if size > MAX_BYTES:
        raise TopologyInvalid([f"it has {size} bytes; at most {MAX_BYTES} are read"])
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TopologyInvalid([f"it is not UTF-8 text: {error}"]) from error


def _read_json(text: str) -> tuple[object, list[str]]:
    duplicates: list[str] = []

    def members(pairs: list[tuple[str, object]]) -> dict[str, object]:
        seen: dict[str, object] = {}
        for key, value in pairs:
            if key in seen:
                duplicates.append(f"{key}: is defined twice in one object")
            seen[key] = value
        return seen

    try:
        data = json.loads(text, object_pairs_hook=members)
    except RecursionError as error:
        raise TopologyInvalid([_NESTED]) from error
    except ValueError as error:
        raise TopologyInvalid([f"it is not valid JSON: {error}"]) from error
    level = [data]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, list | dict)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise TopologyInvalid([_NESTED])
    return data, duplicates


class _TooDeep(yaml.YAMLError):
    pass


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with a bound on depth and no dates: `2024-01-01` stays a name."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own declaration of it
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _TooDeep
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _read_yaml(text: str) -> tuple[object, list[str]]:
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise TopologyInvalid(["it is empty; to remove everything, write {}"])
        values, depth = _extent(root)
        if values > _MAX_VALUES:
            raise TopologyInvalid([f"its aliases stand for more than {_MAX_VALUES} values"])
        if depth > _MAX_DEPTH:
            raise _TooDeep
        return loader.construct_document(root), list(_duplicates(root, ""))
    except _TooDeep as error:
        raise TopologyInvalid([_NESTED]) from error
    except yaml.MarkedYAMLError as error:
        raise TopologyInvalid([f"it is not valid YAML: {_where_and_what(error)}"]) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # ValueError: scalars that look like a number and are none, such as `!!int x`.
        said = " ".join(str(error).split())
        raise TopologyInvalid([f"it is not valid YAML: {said}"]) from error


def _where_and_what(error: yaml.MarkedYAMLError) -> str:
    what = ", ".join(part for part in (error.context, error.problem) if part)
    mark = error.problem_mark or error.context_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" if mark else what


def _extent(root: yaml.Node) -> tuple[float, float]:
    """Count the values that `root` stands for with its aliases written out, and their depth."""
    known: dict[int, tuple[float, float]] = {}

    def extent(node: yaml.Node) -> tuple[float, float]:
        if id(node) not in known:
            # Until it is known: an alias to a node that is still open means itself, without end.
            known[id(node)] = float("inf"), float("inf")
            below = [extent(child) for child in _children(node)]
            known[id(node)] = (
                1 + sum(values for values, _ in below),
                1 + max((depth for _, depth in below), default=0),
            )
        return known[id(node)]

    return extent(root)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _duplicates(node: yaml.Node, path: str) -> Iterator[str]:
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield from _duplicates(child, f"{path}[{index}]")
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name = str(key.value)
        line = key.start_mark.line + 1
        here = f"{path}.{name}" if path else name
        # A merge key (`<<`) may come twice, and what it brings in is there to be overridden.
        if key.tag != "tag:yaml.org,2002:merge":
            if name in lines:
                yield f"{here}: is defined twice (lines {lines[name]} and {line})"
            lines.setdefault(name, line)
        yield from _duplicates(value, here)


def _validated(data: object, problems: Iterable[str]) -> Topology:
    found = list(problems)
    if not isinstance(data, Mapping):
        found.append(f"it must be a mapping with `blocks` and `pipelines`, not {_kind(data)}")
        raise TopologyInvalid(found)
    try:
        topology = Topology.model_validate(dict(data))
    except ValidationError as error:
        found += [
            _problem(detail["type"], detail["loc"], detail)
            for detail in error.errors()
            # Pydantic counts only the valid members; the others have been reported one by one.
            if not (detail["type"] == "too_short" and detail["input"])
        ]
    else:
        if not found:
            return topology
    raise TopologyInvalid(found)


_A_NAME = "a name has 1 to 63 letters, digits, '_', '.' or '-', and starts with a letter or a digit"
_A_PORT = "the name of a tensor has 1 to 128 characters"
_EXPECTED = {
    "artifact": "must be a digest: sha256- and 64 hex digits, as `blockflow split` prints it",
    "device": "must be cpu or cuda:<index>, such as cuda:0",
    "worker": f"must be a name; {_A_NAME}",
    "max_batch": "must be a whole number from 1 to 4096",
    "max_delay_ms": "must be a number of milliseconds from 0 to 60000",
    "precision": "must be fp32, tf32, fp16 or bf16",
    "channels_last": "must be true or false",
    "cuda_graph": "must be true or false",
    "compile": "must be true or false",
    "mps": "must be auto, on or off",
    "fuse": "must be true or false",
    "threads": "must be a whole number from 1 to 1024",
    "cpus": 'must be cores, such as "0-3,6" or [0, 1, 2, 3, 6]',
    "store": "must be the path of a directory",
}


def _problem(kind: str, at: tuple[int | str, ...], detail: Mapping[str, Any]) -> str:
    """Say one of pydantic's findings in the words of the person who wrote the file."""
    value = detail["input"]
    if at[-1] == "[key]" and at[0] == "devices":
        return f"devices: {value!r} is no GPU: it must be cuda:<index>, such as cuda:0"
    is_key = at[-1] == "[key]"
    at = _without_tags(at[:-2] if is_key else at)
    path = _path(at)
    names_a_port = at[2:3] == ("outputs",) or (at[2:3] == ("graph",) and len(at) > 3)
    if is_key and names_a_port and isinstance(value, str):
        return f"{path}: {_short(value)} is no name: {_A_PORT}"
    if is_key:
        return f"{path}: {_short(value)} is no name: {_explain_name(value)}"
    field = at[-1]
    match kind:
        case "missing":
            return f"{path}: is missing"
        case "extra_forbidden":
            known = list(_model_of(at).model_fields)
            close = difflib.get_close_matches(str(field), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            return f"{path}: is not a known setting; {hint}"
        case "invalid_key":
            return f"{path}: a setting's name must be text; put it in quotes"
        case "too_short":
            return f"{path}: must name at least one block"
        case "dict_type" if len(at) == 1:
            return f"{path}: must be a mapping of names, not {_kind(value)} (write {{}} for none)"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{path}: must be a mapping of settings, not {_kind(value)}"
        case "form":
            return f"{path}: {detail['msg']}"
        case "tuple_type":
            names = "block names" if field == "blocks" else "names"
            return f"{path}: must be a list of {names}, not {_kind(value)}"
        case "string_type" if at[2:3] == ("graph",) and len(at) == 4:
            return (
                f"{path}: must say where the block's inputs come from: `input`, a block, or "
                f"{{port: BLOCK.PORT}}, not {_kind(value)}"
            )
    if at[2:3] == ("blocks",):
        return f"{path}: {_short(value)} is no name: {_explain_name(value)}"
    if len(at) > 3:
        return f"{path}: {_short(value)} is no name: {_A_PORT}"
    if field in _EXPECTED:
        return f"{path}: {_EXPECTED[str(field)]}, not {_short(value)}"
    return f"{path}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"


def _without_tags(at: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Leave out what tells the forms of a setting apart, for nobody wrote it."""
    match at:
        case ("pipelines", _, "graph", _, "plain" | "mapping", *rest):
            return (*at[:4], *rest)
        case ("pipelines", _, "outputs", "plain" | "mapping", *rest):
            return (*at[:3], *rest)
        case _:
            return at


def _path(at: tuple[int | str, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in at[1:]]
    return f"{at[0]}{''.join(parts)}"


def _model_of(setting: tuple[int | str, ...]) -> type[BaseModel]:
    if len(setting) == 1:
        return Topology
    kinds: dict[object, type[BaseModel]] = {"blocks": Block, "pipelines": Pipeline, "devices": Gpu}
    return kinds[setting[0]]


def _explain_name(value: object) -> str:
    if isinstance(value, str):
        return _A_NAME
    return f"it is read as {_kind(value)}; put it in quotes"


def _short(value: object) -> str:
    try:
        said = repr(value)
    except ValueError:  # an integer of thousands of digits, which YAML reads from hexadecimal
        return "a number"
    return said if len(said) <= 80 else f"{said[:77]}..."


def _kind(value: object) -> str:
    match value:
        case None:
            return "empty"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return f"a {type(value).__name__}"
