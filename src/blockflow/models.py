"""Models by name: where a network to be split comes from.

A model is named in one of five ways:

    resnet50                  one of `BUILT_IN`, with random weights from a seed
    torchvision:vit_b_16      a model of torchvision, or timm, with random weights from a seed
    package.module:factory    a callable that returns an `nn.Module`
    trunk.pt2                 a file of torch.export.save
    old.pt                    a TorchScript file

A factory's model may be one of `transformers`: it is split as it is.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from blockflow.artifact import BATCH, Port
from blockflow.errors import ModelRefused


@dataclass(frozen=True)
class ModuleSource:
    """A module on CPU, in eval mode; `inputs` are named like the arguments of its `forward`."""

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]


@dataclass(frozen=True)
class ProgramFile:
    """A `.pt2` file: it knows its own inputs."""

    name: str
    path: Path


@dataclass(frozen=True)
class ScriptFile:
    """A TorchScript file; its inputs are what the user says they are."""

    name: str
    path: Path
    inputs: tuple[Port, ...]


SourceModel = ModuleSource | ProgramFile | ScriptFile


def resolve(model: str, inputs: Sequence[Port] = (), *, seed: int = 0) -> SourceModel:
    """Find a model by name; `inputs` says what it takes where nothing else does.

    A factory tells its inputs by an attribute `example_inputs`, of the factory or of the module
    it returns: tensors by argument name, whose first dimension is the batch, or a callable that
    returns them. Importing runs the module's code and the factory, with the working directory
    importable. Models of `transformers` tell their inputs themselves, as far as they know them.
    `seed` is that of random weights. Raises ModelRefused.
    """
    ports = tuple(inputs)
    if model in BUILT_IN:
        return ModuleSource(model, built_in(model, seed=seed), ports or (_IMAGE,))
    path = Path(model)
    if path.suffix in {".pt2", ".pt"} and ":" not in path.name:
        if not path.is_file():
            raise ModelRefused(f"there is no file {path}")
        name = _plain_name(path.stem)
        if path.suffix == ".pt2":
            if ports:
                raise ModelRefused(f"{path} knows its own inputs: leave --input out")
            return ProgramFile(name, path)
        if not ports:
            raise ModelRefused(
                f"a TorchScript file does not tell what it takes: say it for {path}, for example "
                "--input x:float32[batch,3,224,224]"
            )
        return ScriptFile(name, path, ports)
    library, colon, rest = model.partition(":")
    if colon and library in _LIBRARIES:
        return _from_library(library, rest, ports, seed)
    if colon:
        return _from_factory(model, ports, seed)
    raise ModelRefused(
        f"no model {model!r}: give one of {', '.join(BUILT_IN)}, an import path "
        "(package.module:factory), torchvision:NAME, timm:NAME, or a .pt2 or .pt file"
    )


# ----------------------------------------------------------------------------------- input ports

_PORT = re.compile(r"(?P<name>[^:\[\]]+):(?P<dtype>\w+)\[(?P<shape>[^\[\]]*)\]")
_PORT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_DTYPES = frozenset(
    {
        *("bool", "uint8", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64"),
    }
)


def parse_input(text: str) -> Port:
    """Read `x:float32[batch,3,224,224]`. Raises ModelRefused saying which part is wrong."""
    match = _PORT.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ModelRefused(
            f"{text[:80]!r} does not describe an input: write NAME:DTYPE[batch,SIZE,...], "
            "for example x:float32[batch,3,224,224]"
        )
    name, dtype, sizes = match["name"], match["dtype"], match["shape"]
    if not _PORT_NAME.fullmatch(name):
        raise ModelRefused(f"the input name {name[:80]!r} is no Python identifier")
    if dtype not in _DTYPES:
        raise ModelRefused(
            f"input {name!r} has the unknown dtype {dtype!r}: one of {', '.join(sorted(_DTYPES))}"
        )
    shape: list[int | Literal["batch"]] = []
    for index, size in enumerate(sizes.split(",") if sizes else []):
        if size == BATCH and index == 0:
            shape.append("batch")
        elif size.isascii() and size.isdigit() and 0 < int(size) < 2**31:
            shape.append(int(size))
        elif size == BATCH:
            raise ModelRefused(f"input {name!r}: only the first dimension can be `batch`")
        else:
            raise ModelRefused(
                f"input {name!r} has the size {size!r}: sizes are positive numbers, "
                "and the first one may be `batch`"
            )
    return Port(name=name, dtype=dtype, shape=tuple(shape))


def _port_of_example(name: str, value: object) -> Port:
    if not isinstance(value, Tensor) or value.dim() == 0:
        raise ModelRefused(
            f"the example input {name!r} is no tensor with a batch dimension in front"
        )
    dtype = str(value.dtype).removeprefix("torch.")
    return Port(name=name, dtype=dtype, shape=("batch", *value.shape[1:]))


# ------------------------------------------------------------------------------------- factories


def _from_factory(model: str, ports: tuple[Port, ...], seed: int) -> ModuleSource:
    module_name, _, attribute = model.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
        with _seeded(seed):
            module = target()
        examples = getattr(module, "example_inputs", getattr(target, "example_inputs", None))
        if callable(examples):
            examples = examples()
    except Exception as error:
        # Somebody else's code: whatever it raises, the reader needs its name and message.
        raise ModelRefused(
            f"cannot make a model from {model!r}: {type(error).__name__}: {_one_line(error)}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelRefused(f"{model!r} returned a {type(module).__name__}, no torch.nn.Module")
    if not ports and examples is None:
        examples = _transformer_inputs(module)
    if not ports:
        if not isinstance(examples, dict) or not examples:
            raise ModelRefused(
                f"{model!r} does not tell what it takes: give the factory an `example_inputs` "
                "(a dict of tensors by argument name), or say it with "
                "--input x:float32[batch,3,224,224]"
            )
        ports = tuple(_port_of_example(name, value) for name, value in examples.items())
    return ModuleSource(_plain_name(attribute), module.eval().cpu(), ports)


def _transformer_inputs(module: nn.Module) -> object:
    """What a model of `transformers` says of its inputs, or None.

    A vision model's `dummy_inputs` are those of a language model; its configuration knows better.
    """
    config = getattr(module, "config", None)
    size, channels = (getattr(config, name, None) for name in ("image_size", "num_channels"))
    if getattr(module, "main_input_name", None) == "pixel_values" and isinstance(channels, int):
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        if isinstance(height, int) and isinstance(width, int):
            return {"pixel_values": torch.zeros(1, channels, height, width)}
        return None
    dummies = getattr(module, "dummy_inputs", None)
    # What the base class says is for language models; others inherit it.
    known = inspect.signature(module.forward).parameters
    return dummies if isinstance(dummies, dict) and set(dummies) <= set(known) else None


_LIBRARIES: Mapping[str, tuple[str, str]] = {  # module, and its function from name to model
    "torchvision": ("torchvision.models", "get_model"),
    "timm": ("timm", "create_model"),
}


def _from_library(library: str, name: str, ports: tuple[Port, ...], seed: int) -> ModuleSource:
    package, function = _LIBRARIES[library]
    try:
        make = getattr(importlib.import_module(package), function)
    except (ImportError, RuntimeError) as error:  # RuntimeError: its operators do not fit torch
        raise ModelRefused(
            f"{library}:{name} needs {library}, which cannot be imported here ({error}): install "
            "the version that goes with this torch"
        ) from error
    try:
        with _seeded(seed):
            module: nn.Module = make(name)
    except Exception as error:
        raise ModelRefused(f"{library} makes no {name!r}: {_one_line(error)}") from error
    if not ports:
        size = getattr(module, "default_cfg", {}).get("input_size", (3, 224, 224))
        argument = next(iter(inspect.signature(module.forward).parameters))
        ports = (Port(name=argument, dtype="float32", shape=("batch", *size)),)
    return ModuleSource(_plain_name(name), module.eval().cpu(), ports)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights from a seed, without touching anybody else's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _plain_name(text: str) -> str:
    """A name that can stand at the beginning of a block's name."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._")
    return name[:40] or "model"


# ---------------------------------------------------------------------------------------- ResNet

_IMAGE = Port(name="x", dtype="float32", shape=("batch", 3, 224, 224))


def built_in(name: str, *, seed: int = 0) -> nn.Module:
    """A ResNet in eval mode with random weights: the same for the same seed, nothing downloaded.

    It is torchvision's class where torchvision imports, and otherwise one of the same structure
    and parameter names, so that torchvision's checkpoints load into either. Even the order of
    operators is the same, and with it the digest of every block.
    """
    if name not in BUILT_IN:
        raise ModelRefused(f"no built-in model {name!r}: there are {', '.join(BUILT_IN)}")
    with _seeded(seed):
        make = _from_torchvision(name) or BUILT_IN[name]
        return make().eval()


def _from_torchvision(name: str) -> Callable[[], nn.Module] | None:
    try:
        models = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError):  # RuntimeError: its operators do not fit this torch
        return None
    found: Callable[[], nn.Module] = getattr(models, name)
    return found


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _convolution(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(y)
        return result


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut; the stride lies on the 3×3 ("v1.5")."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _convolution(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(y)
        return result


class ResNet(nn.Module):
    """He et al. 2015, as torchvision builds it: float32 [batch, 3, 224, 224] to [batch, 1000]."""

    def __init__(self, block: type[BasicBlock | Bottleneck], layers: Sequence[int]) -> None:
        super().__init__()
        self._inputs = 64
        self.conv1 = _convolution(3, 64, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._layer(block, 64, layers[0], stride=1)
        self.layer2 = self._layer(block, 128, layers[1], stride=2)
        self.layer3 = self._layer(block, 256, layers[2], stride=2)
        self.layer4 = self._layer(block, 512, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, 1000)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _layer(
        self, block: type[BasicBlock | Bottleneck], width: int, count: int, stride: int
    ) -> nn.Sequential:
        outputs = width * block.expansion
        downsample = None
        if stride != 1 or self._inputs != outputs:
            downsample = nn.Sequential(
                _convolution(self._inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )
        first = block(self._inputs, width, stride, downsample)
        self._inputs = outputs
        return nn.Sequential(first, *(block(outputs, width, 1, None) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        result: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return result


BUILT_IN: dict[str, Callable[[], nn.Module]] = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "resnet152": partial(ResNet, Bottleneck, (3, 8, 36, 3)),
}
