"""Every way to run one network that is compared here, started side by side and used in turns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
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
_GRAPHS = ", CUDA graphs"


@dataclass(frozen=True)
class Kind:
    """What a variant is: `transport` of a traditional pipeline, or `settings` of BlockFlow's
    blocks, or neither: the monolith. `how` the blocks run: "eager" or "graph"."""

    name: str
    how: str
    transport: str | None = None
    settings: Mapping[str, Any] | None = None


KINDS = tuple(
    kind
    for how, suffix in (("eager", ""), ("graph", _GRAPHS))
    for kind in (
        Kind(PICKLED + suffix, how, transport="pickled"),
        Kind(RAW + suffix, how, transport="raw"),
        *((Kind(HANDLE, how, transport="handle"),) if how == "eager" else ()),
        Kind(FOUR + suffix, how, settings={}),
        Kind(ONE + suffix, how, settings={"together": True}),
        Kind(MONOLITH + suffix, how),
    )
)


def best(name: str, gpu: bool) -> str:
    """The variant as it runs by default on this device: with CUDA graphs where there is a GPU."""
    return name + _GRAPHS if gpu else name


@dataclass
class Variants:
    """The variants named in `chosen`, or all that run here, for requests of up to `rows` rows.

    `chains` are the blocks in this process by runner, `kinds` what each variant is, and `pipelines`
    what BlockFlow's are called at the gateway.
    """

    lab: Lab
    rows: int
    chosen: Collection[str] | None = None
    all: dict[str, Variant] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    pipelines: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lab = self.lab
        self.source = lab.source()
        lab.say(f"splitting {lab.options.model}")
        split = split_model(self.source, lab.options.blocks, lab.store)
        self.digests = [str(block.digest) for block in split.blocks]
        hows = ("eager", "graph") if lab.gpu else ("eager",)
        kinds = [
            kind
            for kind in KINDS
            if kind.how in hows and (self.chosen is None or kind.name in self.chosen)
        ]
        self.kinds = {kind.name: kind for kind in kinds}
        # Names of blocks and pipelines are plain: what a variant is called is for people.
        pipelines = {
            f"p{index}": kind for index, kind in enumerate(kinds) if kind.settings is not None
        }
        topology = blockflow_topology(
            lab.store.root,
            self.digests,
            lab.device,
            {
                name: {
                    "max_batch": self.rows,
                    "precision": lab.precision,
                    "cuda_graph": kind.how == "graph",
                    **(kind.settings or {}),
                }
                for name, kind in pipelines.items()
            },
        )
        folder = lab.new_folder()
        self.house = House(topology, folder / "house")
        stages = {
            kind.name: Pipeline(
                folder,
                lab.store,
                self.digests,
                transport=kind.transport,
                how=kind.how,
                device=lab.device,
                rows=self.rows,
                precision=lab.precision,
            )
            for kind in kinds
            if kind.transport is not None
        }
        lab.say("waiting for the server")
        self.house.wait_ready()
        networks.begin(lab.device)
        self.chains = {
            how: networks.Chain(lab.store, self.digests, self.rows, lab.device, how, lab.precision)
            for how in hows
        }
        # After the chains: their loading chose the precision of everything in this process.
        self.whole = networks.whole(self.source, lab.device)
        for kind in kinds:
            if kind.transport is None and kind.settings is None:
                self.all[kind.name] = Monolith(self._monolith(kind.how), lab.device)
        lab.say("waiting for the stages")
        for name, stage in stages.items():
            stage.wait_ready()
            self.all[name] = stage
        for pipeline, kind in pipelines.items():
            self.pipelines[kind.name] = pipeline
            self.all[kind.name] = Entry(self.house, folder, [pipeline], lab.device)
        self.all = {kind.name: self.all[kind.name] for kind in kinds}

    def _monolith(self, how: str) -> networks.Call:
        """The module itself; or the same network, unsplit, replayed by the runner of blocks."""
        if how == "eager":
            return self.whole
        lab = self.lab
        (block,) = split_model(lab.source(), 1, lab.store).blocks
        program = load(lab.store, block.digest, lab.device, precision=lab.precision)
        return networks.run_by(program, self.rows, how)

    def close(self) -> None:
        for variant in self.all.values():
            variant.close()
        self.house.close()

    def __enter__(self) -> Variants:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
