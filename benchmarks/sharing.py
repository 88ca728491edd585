"""How many bytes a family of fine-tuned models takes, against what arithmetic says it must take.

    python benchmarks/sharing.py                  # 20 ResNet-152 variants: minutes, 3 GB of disk
    python benchmarks/sharing.py --model resnet18 --size 64 --output /tmp/results

Of N variants, a fraction f share a part s of their bytes (all but the main path of the last stage
and the classifier, which fine-tuning changed); the others share nothing. The bytes that N models
take apart are then saved by f s (1 - 1 / (f N)). Writes sharing.md and sharing.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from blockflow.artifact import Port, Store
from blockflow.models import ModuleSource, built_in
from blockflow.share import split_shared


def is_tuned(name: str) -> bool:
    """Whether fine-tuning changed a parameter: those of the last stage's main path and the head.

    The shortcut of the last stage stays: it is read after operators that differ, and shared still.
    """
    return name.startswith(("layer4.", "fc.")) and ".downsample." not in name


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that a served model needs: batch norm's count of batches is none of them."""
    every = [*module.named_parameters(), *module.named_buffers()]
    return {name: t.detach() for name, t in every if not name.endswith("num_batches_tracked")}


def unlike_any_other(module: nn.Module, seed: int, *, all_of_it: bool) -> nn.Module:
    """Give the tuned weights, or all of them, values that no other variant has."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in tensors(module).items():
        if all_of_it or is_tuned(name):
            value.add_(torch.rand(value.shape, generator=generator), alpha=0.01)
    return module


def variants(model: str, count: int, sharing: int, port: Port) -> Iterator[ModuleSource]:
    base = unlike_any_other(built_in(model), 0, all_of_it=True)
    for index in range(count):
        module = unlike_any_other(copy.deepcopy(base), index + 1, all_of_it=index >= sharing)
        yield ModuleSource(f"variant{index + 1}", module, (port,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet152")
    parser.add_argument("--variants", type=int, default=20)
    parser.add_argument("--sharing", type=int, default=19, help="how many share their trunk")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    port = Port("x", "float32", ("batch", 3, options.size, options.size))

    every = {name: t.nbytes for name, t in tensors(built_in(options.model)).items()}
    model_bytes = sum(every.values())
    part = 1 - sum(size for name, size in every.items() if is_tuned(name)) / model_bytes
    fraction = options.sharing / options.variants
    bound = fraction * part * (1 - 1 / options.sharing)
    apart = options.variants * model_bytes

    with tempfile.TemporaryDirectory(prefix="sharing-") as folder:
        store = Store(Path(folder), create=True)
        start = time.monotonic()
        family = split_shared(
            variants(options.model, options.variants, options.sharing, port),
            store,
            progress=lambda line: print(f"{time.monotonic() - start:7.1f} s  {line}", flush=True),
        )
        took = time.monotonic() - start
        stored = sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file())
        on_disk = sum(path.stat().st_blocks * 512 for path in store.root.rglob("*"))

    found = {
        "model": options.model,
        "variants": options.variants,
        "sharing": options.sharing,
        "image": options.size,
        "model_bytes": model_bytes,
        "shared_part": part,
        "bytes_apart": apart,
        "bound_saved": bound,
        "bound_bytes": apart * (1 - bound),
        "topology_bytes": family.parameter_bytes,
        "topology_saved": 1 - family.parameter_bytes / apart,
        "store_bytes": stored,
        "store_saved": 1 - stored / apart,
        "store_bytes_on_disk": on_disk,
        "flops_apart": family.flops_apart,
        "flops_shared": family.flops,
        "blocks": len(family.blocks),
        "seconds": took,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cpu": processor(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    (options.output / "sharing.json").write_text(json.dumps(found, indent=2) + "\n")
    text = report(found)
    (options.output / "sharing.md").write_text(text)
    print(text)
    for what in ("topology_bytes", "store_bytes"):
        off = found[what] / found["bound_bytes"] - 1
        assert abs(off) <= 0.01, f"{what} is {off:.2%} off the bound"


def report(found: dict[str, object]) -> str:
    def gigabytes(key: str) -> str:
        return f"{float(str(found[key])) / 1e9:.3f} GB"

    def off(key: str) -> str:
        return f"{float(str(found[key])) / float(str(found['bound_bytes'])) - 1:+.2%}"

    def percent(key: str) -> str:
        return f"{float(str(found[key])):.2%}"

    def arithmetic(key: str) -> str:
        return f"{float(str(found[key])) / 1e9:.1f} GFLOP"

    return f"""# A family of fine-tuned models in one store

{found["variants"]} variants of {found["model"]}, of which {found["sharing"]} share
{percent("shared_part")} of their bytes (all but the main path of the last stage and the
classifier); the rest shares nothing. `blockflow split --share` was told nothing of this.

| | bytes | saved | off the bound |
|---|---:|---:|---:|
| every model by itself | {gigabytes("bytes_apart")} | | |
| bound, f s (1 - 1 / (f N)) | {gigabytes("bound_bytes")} | {percent("bound_saved")} | |
| weights of the topology's blocks | {gigabytes("topology_bytes")} | \
{percent("topology_saved")} | {off("topology_bytes")} |
| the store, all files | {gigabytes("store_bytes")} | {percent("store_saved")} | \
{off("store_bytes")} |

The store takes {gigabytes("store_bytes_on_disk")} of a disk with blocks of 4 KiB. One row that
goes to every variant needs {arithmetic("flops_apart")} apart, and {arithmetic("flops_shared")} if
each block is computed once.

Every variant's chain of blocks was proven equal to its model bit for bit before it was stored.
All of it took {float(str(found["seconds"])):.0f} s and at most {gigabytes("peak_memory_bytes")} of
memory, on {found["cpus"]} CPUs ({found["cpu"]}) with torch {found["torch"]}, at
{found["commit"]}.

Made by `python benchmarks/sharing.py`; the numbers are in [sharing.json](sharing.json).
"""


def processor() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return f"commit {run.stdout.strip()}" if run.returncode == 0 else "no commit"


if __name__ == "__main__":
    main()
