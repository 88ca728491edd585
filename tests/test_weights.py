"""Weights: written once, read bit for bit, and never believed without their digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from blockflow.artifact import Digest, Manifest, Origin, Port, Store
from blockflow.errors import StoreCorrupt
from blockflow.export import export
from blockflow.graph import plain_module
from blockflow.weights import read_program, write_program

A = Digest("sha256-" + "a" * 64)
ROW = Port("x", "float32", ("batch", 4))


class Many(nn.Module):
    """Weights of several dtypes and layouts, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.tied = self.weight
        self.transposed = nn.Parameter(torch.randn(4, 3, generator=generator).t().detach())
        self.halved: Tensor
        self.bfloat: Tensor
        self.number: Tensor
        self.flags: Tensor
        self.empty: Tensor
        self.register_buffer("halved", torch.randn(4, generator=generator).half())
        self.register_buffer("bfloat", torch.randn(4, generator=generator).bfloat16())
        self.register_buffer("number", torch.tensor(3))
        self.register_buffer("flags", torch.tensor([True, False, True, True]))
        self.register_buffer("empty", torch.zeros(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight + self.halved + self.bfloat * self.number
        y = torch.where(self.flags, y @ self.tied, y) + self.empty.sum()
        return torch.nn.functional.linear(y, self.transposed)


def put(store: Store, module: nn.Module, digest: Digest = A) -> Manifest:
    program = export(module.eval(), (ROW,))
    manifest = Manifest(
        format="torch.export",
        digest=digest,
        inputs=(ROW,),
        outputs=(Port("output", "float32", ("batch", 3)),),
        parameter_bytes=0,
        flops=0,
        mutates_inputs=False,
        origin=Origin(model="m", index=0, count=1, first="a", last="b"),
        files={},
    )
    return store.put(manifest, lambda folder: write_program(program, folder, store))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", create=True)


def test_weights_come_back_bit_for_bit_and_in_their_layout(store: Store) -> None:
    module = Many()
    manifest = put(store, module)
    program = read_program(store, manifest)
    state = module.state_dict()
    assert set(program.state_dict) == set(state)
    for name, value in program.state_dict.items():
        assert value.dtype == state[name].dtype
        assert value.stride() == state[name].stride()
        assert torch.equal(value, state[name])
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(plain_module(program)(x)[0], module(x))


def test_writing_leaves_the_program_its_weights(store: Store) -> None:
    module = Many()
    program = export(module.eval(), (ROW,))
    (store.root / "folder").mkdir()
    write_program(program, store.root / "folder", store)
    assert torch.equal(program.state_dict["weight"], module.weight)


def test_tied_weights_are_one_file_and_one_tensor(store: Store) -> None:
    manifest = put(store, Many())
    weights = store.weights(manifest)
    assert weights["weight"] == weights["tied"]
    program = read_program(store, manifest)
    assert program.state_dict["weight"].data_ptr() == program.state_dict["tied"].data_ptr()


def test_a_program_file_holds_no_weights(store: Store) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 9000), nn.Linear(9000, 3))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layers(x)
            return result

    manifest = put(store, Wide())
    assert manifest.files["program.pt2"].bytes < 30_000
    assert sum(store.tensors().values()) > 9000 * 8 * 4


def test_tensor_files_are_safetensors(store: Store) -> None:
    manifest = put(store, Many())
    weight = store.weights(manifest)["halved"]
    content = store.tensor_path(weight.sha256).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header == {"tensor": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}}
    assert (8 + length) % 64 == 0
    assert len(content) == 8 + length + 8
    from safetensors import torch as safetensors

    loaded = safetensors.load(content)["tensor"]
    assert torch.equal(loaded, Many().halved)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content[:20] + b"x" + content[21:],
        lambda _: b"",
    ],
)
def test_a_damaged_tensor_is_never_used(store: Store, damage: Callable[[bytes], bytes]) -> None:
    manifest = put(store, Many())
    path = store.tensor_path(store.weights(manifest)["weight"].sha256)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StoreCorrupt, match=rf"{path} is damaged"):
        read_program(store, manifest)
    path.unlink()
    with pytest.raises(StoreCorrupt, match=rf"{path} cannot be read"):
        read_program(store, manifest)


def test_weights_that_do_not_fit_the_program_are_refused(store: Store) -> None:
    """A program without one of its weights would compute with zeros."""
    manifest = put(store, Many())
    weights = store.weights(manifest)
    wrong = dict(weights)
    del wrong["halved"]
    for listed in (
        wrong,
        {**weights, "halved": weights["flags"]},
        {**weights, "more": weights["halved"]},
    ):
        text = msgspec.json.encode(listed)
        path = store.path(A) / "weights.json"
        path.write_bytes(text)
        files = {
            **manifest.files,
            "weights.json": msgspec.structs.replace(
                manifest.files["weights.json"], sha256=_sha256(text), bytes=len(text)
            ),
        }
        with pytest.raises(StoreCorrupt, match=r"disagree about '(halved|more)'"):
            read_program(store, msgspec.structs.replace(manifest, files=files))


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
