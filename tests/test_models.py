"""Models by name: the built-in networks, import paths, files, and the input syntax."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from blockflow.artifact import Port
from blockflow.errors import ModelRefused
from blockflow.models import (
    BUILT_IN,
    ModuleSource,
    ProgramFile,
    ResNet,
    ScriptFile,
    built_in,
    parse_input,
    resolve,
)

# Counted on torchvision's own models.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
STATE_KEYS = {"resnet18": 122, "resnet34": 218, "resnet50": 320, "resnet101": 626, "resnet152": 932}


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_sizes_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        model = BUILT_IN[name]()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert len(model.state_dict()) == STATE_KEYS[name]


def test_parameter_names_are_torchvisions() -> None:
    with torch.device("meta"):
        small, large = BUILT_IN["resnet18"]().state_dict(), BUILT_IN["resnet50"]().state_dict()
    assert list(small)[:7] == [
        "conv1.weight",
        "bn1.weight",
        "bn1.bias",
        "bn1.running_mean",
        "bn1.running_var",
        "bn1.num_batches_tracked",
        "layer1.0.conv1.weight",
    ]
    assert list(small)[-2:] == ["fc.weight", "fc.bias"]
    assert small["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert small["layer2.0.downsample.1.running_var"].shape == (128,)
    assert "layer1.0.downsample.0.weight" not in small
    assert large["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert large["layer3.5.conv3.weight"].shape == (1024, 256, 1, 1)
    assert large["layer4.0.conv2.weight"].shape == (512, 512, 3, 3)
    assert large["fc.weight"].shape == (1000, 2048)


def test_weights_come_from_the_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = built_in("resnet18"), built_in("resnet18"), built_in("resnet18", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.training
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.state_dict()["fc.weight"], other.state_dict()["fc.weight"])


def test_a_built_in_name_resolves() -> None:
    source = resolve("resnet18")
    assert isinstance(source, ModuleSource)
    assert source.inputs == (Port("x", "float32", ("batch", 3, 224, 224)),)
    assert resolve("resnet18", [parse_input("x:float32[batch,3,64,64]")]).inputs[0].shape[2] == 64  # type: ignore[union-attr]


FACTORY = """
import torch
from torch import nn

def net():
    return nn.Linear(3, 2)

net.example_inputs = {"input": torch.zeros(1, 3)}

class Told(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

    def example_inputs(self):
        return {"input": torch.zeros(4, 3, dtype=torch.float64)}

def untold():
    return nn.Linear(3, 2)

def number():
    return 3

def broken():
    raise ValueError("no weights here")
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_factories.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "some_factories", raising=False)
    return "some_factories"


def test_an_import_path_resolves_from_the_working_directory(factories: str) -> None:
    source = resolve(f"{factories}:net")
    assert isinstance(source, ModuleSource)
    assert source.name == "net"
    assert not source.module.training
    assert source.inputs == (Port("input", "float32", ("batch", 3)),)
    told = resolve(f"{factories}:Told")
    assert isinstance(told, ModuleSource)
    assert told.inputs == (Port("input", "float64", ("batch", 3)),)


def test_the_user_can_tell_the_inputs(factories: str) -> None:
    source = resolve(f"{factories}:untold", [parse_input("input:float32[batch,3]")])
    assert isinstance(source, ModuleSource)
    assert isinstance(source.module, nn.Linear)
    with pytest.raises(ModelRefused, match=r"does not tell what it takes.*--input"):
        resolve(f"{factories}:untold")


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("absent", "has no attribute 'absent'"),
        ("number", "returned a int, no torch.nn.Module"),
        ("broken", "ValueError: no weights here"),
    ],
)
def test_a_bad_factory_is_named(factories: str, attribute: str, message: str) -> None:
    with pytest.raises(ModelRefused, match=message):
        resolve(f"{factories}:{attribute}")


def test_libraries_that_do_not_import_are_named() -> None:
    for library in ("torchvision", "timm"):
        try:
            __import__(library)
        except (ImportError, RuntimeError):
            with pytest.raises(ModelRefused, match=f"needs {library}, which cannot be imported"):
                resolve(f"{library}:resnet18")


def test_a_missing_module_is_named() -> None:
    with pytest.raises(ModelRefused, match="No module named 'nowhere'"):
        resolve("nowhere:net")


def test_files_resolve_by_their_ending(tmp_path: Path) -> None:
    for name in ("a net.pt2", "b.pt"):
        (tmp_path / name).write_bytes(b"")
    port = parse_input("x:float32[batch,3]")
    assert resolve(str(tmp_path / "a net.pt2")) == ProgramFile("a-net", tmp_path / "a net.pt2")
    assert resolve(str(tmp_path / "b.pt"), [port]) == ScriptFile("b", tmp_path / "b.pt", (port,))
    with pytest.raises(ModelRefused, match="does not tell what it takes"):
        resolve(str(tmp_path / "b.pt"))
    with pytest.raises(ModelRefused, match="knows its own inputs"):
        resolve(str(tmp_path / "a net.pt2"), [port])
    with pytest.raises(ModelRefused, match="there is no file"):
        resolve(str(tmp_path / "c.pt2"))


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ModelRefused, match="no model 'resnet19': give one of resnet18, resnet34"):
        resolve("resnet19")


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("x:float32[batch,3,224,224]", Port("x", "float32", ("batch", 3, 224, 224))),
        ("ids : int64[ batch, 128 ]", Port("ids", "int64", ("batch", 128))),
        ("scale:float16[1]", Port("scale", "float16", (1,))),
        ("flag:bool[]", Port("flag", "bool", ())),
    ],
)
def test_inputs_are_parsed(text: str, port: Port) -> None:
    assert parse_input(text) == port


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "does not describe an input"),
        ("x:float32", "does not describe an input"),
        ("x:float32[batch,3", "does not describe an input"),
        ("2x:float32[batch]", "no Python identifier"),
        ("x:float31[batch]", "unknown dtype 'float31'"),
        ("x:float32[3,batch]", "only the first dimension"),
        ("x:float32[batch,-1]", "size '-1'"),
        ("x:float32[batch,0]", "size '0'"),
        ("x:float32[batch,,3]", "size ''"),
        ("x:float32[rows,3]", "size 'rows'"),
    ],
)
def test_bad_inputs_say_which_part_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ModelRefused, match=message):
        parse_input(text)


def test_a_resnet_computes() -> None:
    model = built_in("resnet18")
    assert isinstance(model, ResNet) or type(model).__module__.startswith("torchvision")
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
