"""Every way to run one network that is compared here, started side by side and used in turns."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networks
from client import Monolith, Variant
from deployed import Entry, House, blockflow_topology
from lab import Lab
from traditional import Pipeline

from blockflow.program import load
from blockflow.split import split_model

PICKLED = "traditional, pickled"
RAW = "traditional, raw frames"
HANDLE = "handle per message"
FOUR = "TensorMQ, a worker each"
ONE = "TensorMQ, one worker"
FUSED = "TensorMQ, one worker, fused"
MONOLITH = "monolith"
BATCHING = ", batching"
_GRAPHS = ", CUDA graphs"


@dataclass(frozen=True)
class Kind:
    """What a variant is: `transport` of a traditional pipeline, or `settings` of BlockFlow's
    blocks, or neither: the monolith. `how` the blocks run: "eager" or "graph". `rows` is the most
    rows of a request. BlockFlow's blocks put requests together up to so many rows: with more than
    one they batch, and their names must say so."""

    name: str
    how: str
    transport: str | None = None
    settings: Mapping[str, Any] | None = None
    rows: int = 1


_KINDS = tuple(
    kind
    for how, suffix in (("eager", ""), ("graph", _GRAPHS))
    for kind in (
        Kind(PICKLED + suffix, how, transport="pickled"),
        Kind(RAW + suffix, how, transport="raw"),
        *((Kind(HANDLE, how, transport="handle"),) if how == "eager" else ()),
        Kind(FOUR + suffix, how, settings={}),
        Kind(ONE + suffix, how, settings={"together": True, "fuse": False}),
        Kind(FUSED + suffix, how, settings={"together": True}),
        Kind(MONOLITH + suffix, how),
    )
)


def kinds(lab: Lab, names: Collection[str] | None = None, rows: int = 1) -> list[Kind]:
    """The variants of these names, or all, that run on this device."""
    return [
        replace(kind, rows=rows)
        for kind in _KINDS
        if (lab.gpu or kind.how == "eager") and (names is None or kind.name in names)
    ]


def batching(chosen: Sequence[Kind], rows: int) -> list[Kind]:
    """The same with blocks that compute as many requests together as wait, up to `rows` rows."""
    return [replace(kind, name=kind.name + BATCHING, rows=rows) for kind in chosen]


def best(name: str, gpu: bool) -> str:
    """The variant as it runs by default on this device: with CUDA graphs where there is a GPU."""
    return name + _GRAPHS if gpu else name


class Variants:
    """Variants of one network: `all` by name, `kinds` what each is, and `pipelines` what
    BlockFlow's are called at the gateway of `house`.

    `whole` is the network as one module. sides: where a client's tensors will be.
    """

    def __init__(
        self, lab: Lab, chosen: Sequence[Kind], sides: Collection[str] = ("host",)
    ) -> None:
        self._lab = lab
        self.source = lab.source()
        self.digests = lab.blocks()
        self.kinds = {kind.name: kind for kind in chosen}
        # Names of blocks and pipelines are plain: what a variant is called is for people.
        deployed = [kind for kind in chosen if kind.settings is not None]
        self.pipelines = {kind.name: f"p{index}" for index, kind in enumerate(deployed)}
        folder = lab.new_folder()
        self.house = House(self._topology(deployed), folder / "house")
        lab.say("waiting for the server")
        self.house.wait_ready()
        lab.join(self.house.joining)
        stages = {
            kind.name: Pipeline(
                folder,
                lab.store,
                self.digests,
                transport=kind.transport,
                how=kind.how,
                device=lab.device,
                rows=kind.rows,
                precision=lab.precision,
            )
            for kind in chosen
            if kind.transport is not None
        }
        networks.begin(lab.device, lab.precision)
        self.whole = networks.whole(self.source, lab.device)
        monoliths = {
            kind.name: Monolith(self._monolith(kind), lab.device)
            for kind in chosen
            if kind.transport is None and kind.settings is None
        }
        lab.say("waiting for the stages")
        for stage in stages.values():
            stage.wait_ready()
        entries = {
            name: Entry(self.house, folder, [pipeline], lab.device, sides=sides)
            for name, pipeline in self.pipelines.items()
        }
        started: dict[str, Variant] = {**stages, **monoliths, **entries}
        self.all = {kind.name: started[kind.name] for kind in chosen}
        lab.note_conditions()

    def chain(self, how: str, rows: int) -> networks.Chain:
        """The blocks in this process."""
        lab = self._lab
        return networks.Chain(lab.store, self.digests, rows, lab.device, how, lab.precision)

    def _topology(self, deployed: Sequence[Kind]) -> dict[str, Any]:
        lab = self._lab
        settings = {
            self.pipelines[kind.name]: {
                "max_batch": kind.rows,
                "precision": lab.precision,
                "cuda_graph": kind.how == "graph",
                # On a CPU: as many as a stage has, though other variants are deployed beside it.
                "threads": len(os.sched_getaffinity(0)),
                **(kind.settings or {}),
            }
            for kind in deployed
        }
        return blockflow_topology(lab.store.root, self.digests, lab.device, settings, lab.devices())

    def _monolith(self, kind: Kind) -> networks.Call:
        """The module itself; or the same network, unsplit, replayed by the runner of blocks."""
        if kind.how == "eager":
            return self.whole
        lab = self._lab
        (block,) = split_model(lab.source(), 1, lab.store).blocks
        program = load(lab.store, block.digest, lab.device, precision=lab.precision)
        return networks.run_by(program, kind.rows, kind.how)

    def close(self) -> None:
        for variant in self.all.values():
            variant.close()
        self.house.close()

    def __enter__(self) -> Variants:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
