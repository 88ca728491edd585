"""A network as blocks that take about the same time, for benchmarks and experiments.

On a CPU they are cut by modelled costs, which give the same blocks on every machine. On a GPU they
are cut by costs that are measured there, with one row and in the run's precision: what balances
eight rows does not balance one, and the slowest block limits a pipeline.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockflow.artifact import Manifest, Store
from blockflow.measure import Measure
from blockflow.models import parse_input, resolve
from blockflow.split import split_model
from blockflow.topology import Precision, parse


@dataclass(frozen=True)
class Blocks:
    """Blocks of one network in a store, first to last: their names and manifests.

    costs: by which they were balanced.
    """

    store: Store
    names: tuple[str, ...]
    manifests: tuple[Manifest, ...]
    costs: str

    @property
    def digests(self) -> list[str]:
        return [str(manifest.digest) for manifest in self.manifests]

    def told(self) -> dict[str, Any]:
        """How the network was split, for the JSON of a run."""
        return {
            "costs": self.costs,
            "last_operators": [manifest.origin.last for manifest in self.manifests],
        }


def one_row(device: str, precision: Precision) -> Measure | None:
    """How costs are measured for requests of one row on this device; modelled on a CPU."""
    return Measure(device, 1, precision) if device.startswith("cuda") else None


def blocks_of(
    model: str, count: int, store: Store, measure: Measure | None, inputs: Sequence[str] = ()
) -> Blocks:
    """Split what `blockflow split` calls `model` into `count` blocks, and put them into the store.

    With `measure`, by costs measured as it says, in a process of their own: one that has used a GPU
    cannot join MPS any more.
    """
    if measure is None:
        split = split_model(resolve(model, [parse_input(each) for each in inputs]), count, store)
        names = tuple(block.name for block in split.blocks)
        return Blocks(store, names, tuple(block.manifest for block in split.blocks), "modelled")
    with tempfile.TemporaryDirectory(prefix="split-") as folder:
        file = Path(folder) / "topology.yaml"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "blockflow", "split", model),
                *("--blocks", str(count), "--store", str(store.root), "--output", str(file)),
                *("--measure", measure.device, "--rows", str(measure.rows)),
                *("--precision", measure.precision),
                *(part for each in inputs for part in ("--input", each)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{model} was not split: {done.stderr.strip()}")
        topology = parse(file.read_bytes())
    (pipeline,) = topology.pipelines.values()
    manifests = (store.manifest(topology.blocks[name].artifact) for name in pipeline.blocks)
    return Blocks(store, tuple(pipeline.blocks), tuple(manifests), f"measured on {measure}")
