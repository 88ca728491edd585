"""What should be, against what is: pure decisions over topologies, manifests and workers.

`validate` says whether a topology can be deployed, `plan_workers` which processes it asks for, and
`diff` what to start and stop so that the running ones become those.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

import msgspec

from blockflow.artifact import BATCH, Digest, Manifest
from blockflow.fusion import chains
from blockflow.topology import (
    Block,
    BlockName,
    Gpu,
    Pipeline,
    PipelineName,
    Precision,
    Topology,
    WorkerName,
)
from blockflow.wiring import Wiring, cycle, edges, path, port_text, wire

_OTHER_FLOATS = {"float16", "bfloat16", "float64"}


class BlockSpec(msgspec.Struct, frozen=True):
    """Everything that a worker needs to know of one of its blocks."""

    name: BlockName
    digest: Digest
    device: str
    max_batch: int
    max_delay_ms: float = 0
    precision: Precision = "fp32"
    channels_last: bool = False
    cuda_graph: bool = True
    compile: bool = False
    threads: int | None = None
    cpus: tuple[int, ...] | None = None


class WorkerSpec(msgspec.Struct, frozen=True):
    """A process that should exist. `blocks` is sorted by name, so equal specs compare equal.

    `mps`: it shares its GPU with the device's other workers under MPS, and dies with them.
    `chains` are those of its blocks that are fused, first to last.
    """

    name: WorkerName
    device: str
    blocks: tuple[BlockSpec, ...]
    mps: bool = False
    chains: tuple[tuple[BlockName, ...], ...] = ()


class Plan(msgspec.Struct, frozen=True):
    """What turns the running workers into the desired ones.

    A changed worker is in both `start` (as it should be) and `stop` (as it was): the old one goes
    only after the routes lead to the new one. Each part is sorted by worker name.
    """

    keep: tuple[WorkerSpec, ...]
    start: tuple[WorkerSpec, ...]
    stop: tuple[WorkerSpec, ...]

    @property
    def is_empty(self) -> bool:
        """Nothing has to change."""
        return not self.start and not self.stop


def validate(
    topology: Topology,
    manifests: Mapping[Digest, Manifest | str],
    devices: Collection[str],
    cpus: Collection[int] = (),
) -> list[str]:
    """List every reason why `topology` cannot be deployed; an empty list means that it can.

    Args:
        topology: what someone wants.
        manifests: what the store says of each artifact: its manifest, or in words why it has none.
            A digest that is absent is not in the store.
        devices: the names of the devices that exist ("cpu", "cuda:0", ...).
        cpus: the numbers of the cores that workers may run on.
    """
    return [
        *_artifact_problems(topology, manifests),
        *_device_problems(topology, devices),
        *_core_problems(topology, cpus),
        *_worker_problems(topology),
        *_member_problems(topology),
        *_cycle_problems(topology),
        *_wiring_problems(topology, manifests),
    ]


def wiring_of(
    topology: Topology, manifests: Mapping[Digest, Manifest], name: PipelineName
) -> Wiring:
    """Wire a pipeline of a topology that has passed `validate`."""
    found, problems = _wire(topology, manifests, topology.pipelines[name])
    if found is None:
        raise ValueError(f"pipeline {name} was not validated: {'; '.join(problems)}")
    return found


def rows_of(topology: Topology, name: PipelineName) -> int:
    """The most rows of one request to a pipeline: what all of its blocks can take."""
    members = topology.pipelines[name].members
    return min(topology.blocks[block].max_batch for block in members)


def mps_wanted(topology: Topology) -> dict[str, bool]:
    """Say which GPUs' workers should run under MPS: true where they must, false where they may."""
    workers: dict[str, set[str]] = defaultdict(set)
    for name, block in topology.blocks.items():
        if block.device != "cpu":
            workers[block.device].add(block.worker or name)
    settings = {device: topology.devices.get(device, Gpu()).mps for device in workers}
    return {
        device: setting == "on"
        for device, setting in sorted(settings.items())
        if setting == "on" or (setting == "auto" and len(workers[device]) > 1)
    }


def plan_workers(topology: Topology, mps: Collection[str] = ()) -> dict[WorkerName, WorkerSpec]:
    """Say which processes `topology`, which has passed `validate`, asks for.

    A block that names no worker gets one of its own, named after the block. `mps` are the devices
    whose workers run under MPS.
    """
    members: dict[WorkerName, list[BlockSpec]] = defaultdict(list)
    for name, block in sorted(topology.blocks.items()):
        spec = BlockSpec(
            name=BlockName(name),
            digest=Digest(block.artifact),
            device=block.device,
            max_batch=block.max_batch,
            max_delay_ms=block.max_delay_ms,
            precision=block.precision,
            channels_last=block.channels_last,
            cuda_graph=block.cuda_graph,
            compile=block.compile,
            threads=block.threads,
            cpus=block.cpus,
        )
        members[WorkerName(block.worker or name)].append(spec)
    fused = chains(topology)
    return {
        worker: WorkerSpec(
            worker,
            blocks[0].device,
            tuple(blocks),
            blocks[0].device in mps,
            tuple(chain for chain in fused if topology.blocks[chain[0]].worker == worker),
        )
        for worker, blocks in sorted(members.items())
    }


def diff(
    running: Mapping[WorkerName, WorkerSpec], desired: Mapping[WorkerName, WorkerSpec]
) -> Plan:
    """Say what to keep, start and stop. The worker is the unit: one that changed is replaced."""
    keep = {name for name, spec in desired.items() if running.get(name) == spec}
    return Plan(
        keep=tuple(desired[name] for name in sorted(keep)),
        start=tuple(desired[name] for name in sorted(desired.keys() - keep)),
        stop=tuple(running[name] for name in sorted(running.keys() - keep)),
    )


def actions(before: Topology, after: Topology, plan: Plan) -> tuple[str, ...]:
    """Say in words, in the order in which it is done, what turns `before` into `after`."""
    stopped = {spec.name: spec for spec in plan.stop}
    started = {spec.name for spec in plan.start}
    return (
        *(
            _replacement(stopped[spec.name], spec)
            if spec.name in stopped
            else f"start worker {spec.name} on {spec.device} with {_members(spec)}"
            for spec in plan.start
        ),
        *_pipeline_actions(before, after),
        *(f"stop worker {name}" for name in stopped if name not in started),
    )


def _replacement(old: WorkerSpec, new: WorkerSpec) -> str:
    was = {block.name: block for block in old.blocks}
    now = {block.name: block for block in new.blocks}
    changes = [f"without block {name}" for name in was.keys() - now.keys()]
    changes += [f"with block {name}" for name in now.keys() - was.keys()]
    for name in was.keys() & now.keys():
        for setting in BlockSpec.__struct_fields__:
            before, after = getattr(was[name], setting), getattr(now[name], setting)
            if before != after:
                changes.append(f"block {name}: {setting} {_brief(before)} → {_brief(after)}")
    if old.mps != new.mps:
        changes.append("under MPS" if new.mps else "without MPS")
    changes += [f"{_path(chain)} fused" for chain in set(new.chains) - set(old.chains)]
    changes += [f"{_path(chain)} apart" for chain in set(old.chains) - set(new.chains)]
    return f"replace worker {new.name} ({'; '.join(sorted(changes)) or 'as it is'})"


def _brief(value: object) -> str:
    return value[:19] if isinstance(value, str) else str(value)


def _members(spec: WorkerSpec) -> str:
    return _blocks([block.name for block in spec.blocks])


def _pipeline_actions(before: Topology, after: Topology) -> Iterator[str]:
    for name, pipeline in after.pipelines.items():
        old = before.pipelines.get(name)
        if old is None:
            yield f"add pipeline {name}: {path(pipeline)}"
        elif path(old) != path(pipeline):
            yield f"change pipeline {name}: {path(old)} becomes {path(pipeline)}"
        elif old.feeds != pipeline.feeds:
            yield f"change pipeline {name}: other tensors between its blocks"
        elif old != pipeline:
            yield f"change pipeline {name}: other names of its inputs or outputs"
    for name in before.pipelines:
        if name not in after.pipelines:
            yield f"remove pipeline {name}"


def _path(blocks: Sequence[str]) -> str:
    return " → ".join(blocks)


def _artifact_problems(
    topology: Topology, manifests: Mapping[Digest, Manifest | str]
) -> Iterator[str]:
    store = f"the store {topology.store}" if topology.store else "the store"
    for name, block in topology.blocks.items():
        match manifests.get(Digest(block.artifact)):
            case None:
                yield (
                    f"block {name}: artifact {block.artifact} is not in {store}; "
                    "split the model into that store, or point `store` at the one that has it"
                )
            case str() as reason:
                yield f"block {name}: artifact {block.artifact} cannot be used: {reason}"
            case Manifest() as manifest:
                yield from _batch_problems(name, block.max_batch, manifest)
                yield from _precision_problems(name, block, manifest)


def _batch_problems(name: str, max_batch: int, manifest: Manifest) -> Iterator[str]:
    for port in manifest.inputs:
        rows = port.shape[0] if port.shape else BATCH
        if isinstance(rows, int) and rows > max_batch:
            yield (
                f"block {name}: its artifact takes exactly {rows} rows ({port_text(port)}), more "
                f"than its max_batch of {max_batch}; set max_batch to at least {rows}"
            )


def _precision_problems(name: str, block: Block, manifest: Manifest) -> Iterator[str]:
    if block.precision == "fp32":
        return
    if block.precision == "tf32" and block.device == "cpu":
        yield f"block {name}: precision tf32 is for GPUs, and the block is on the CPU; use fp32"
    other = {port.dtype for port in manifest.inputs + manifest.outputs} & _OTHER_FLOATS
    if other:
        yield (
            f"block {name}: precision {block.precision} is for float32 artifacts, and this one has "
            f"{', '.join(sorted(other))}; leave it at fp32"
        )


def _device_problems(topology: Topology, devices: Collection[str]) -> Iterator[str]:
    for name, block in topology.blocks.items():
        if block.device not in devices:
            there_are = ", ".join(sorted(devices)) or "none"
            yield f"block {name}: there is no device {block.device} here; there are: {there_are}"
    for name in topology.devices:
        if name not in devices:
            there_are = ", ".join(sorted(devices)) or "none"
            yield f"devices.{name}: there is no device {name} here; there are: {there_are}"


def _core_problems(topology: Topology, cpus: Collection[int]) -> Iterator[str]:
    for name, block in topology.blocks.items():
        missing = [core for core in block.cpus or () if core not in cpus]
        if missing:
            yield (
                f"block {name}: cpus names {_cores(missing)}, and this server may run on "
                f"{_cores(sorted(cpus))}; choose among those"
            )
        if block.cpus and block.threads and block.threads > len(block.cpus):
            yield (
                f"block {name}: {block.threads} threads cannot run side by side on "
                f"{_cores(block.cpus)}; lower threads or name more cpus"
            )


def _cores(numbers: Sequence[int]) -> str:
    """Cores as people write them: `core 5`, `cores 0-3,6`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{'core' if len(numbers) == 1 else 'cores'} {text or 'none'}"


def _worker_problems(topology: Topology) -> Iterator[str]:
    named: dict[str, list[str]] = defaultdict(list)
    for name, block in topology.blocks.items():
        if block.worker is not None:
            named[block.worker].append(name)
    for worker, blocks in named.items():
        if worker in topology.blocks and topology.blocks[worker].worker is None:
            yield (
                f"worker {worker}: {_blocks(blocks)} asked for it, but block {worker} names no "
                f"worker and gets one of its own with that name; write `worker: {worker}` at block "
                f"{worker} to share it, or choose another name"
            )
        modes = {
            precision: block
            for block in blocks
            if (precision := topology.blocks[block].precision) in ("fp32", "tf32")
        }
        if len(modes) > 1:
            yield (
                f"worker {worker}: block {modes['fp32']} asks for fp32 and block {modes['tf32']} "
                "for tf32, which is a setting of a whole process; give them the same, or two "
                "workers"
            )
        if len({topology.blocks[block].device for block in blocks}) > 1:
            where = ", ".join(f"{block} on {topology.blocks[block].device}" for block in blocks)
            yield f"worker {worker}: its blocks must share one device, but it has {where}"


def _member_problems(topology: Topology) -> Iterator[str]:
    for name, pipeline in topology.pipelines.items():
        for block in dict.fromkeys(pipeline.members):
            if block not in topology.blocks:
                known = ", ".join(topology.blocks) or "none"
                yield f"pipeline {name}: there is no block {block}; there are: {known}"


def _cycle_problems(topology: Topology) -> Iterator[str]:
    """Look for blocks that wait for each other.

    A block that waits for a free slot in the next one keeps its own slots. Two pipelines that pass
    the same blocks in opposite order would then stop each other for ever.
    """
    users: dict[tuple[str, str], str] = {}
    for name, pipeline in topology.pipelines.items():
        mine = edges(pipeline)
        if not cycle(mine):  # or else that is the problem
            for edge in mine:
                users.setdefault(edge, name)
    while found := cycle(users):
        way = " → ".join(found)
        steps = ", ".join(
            f"{before} → {after} in pipeline {users[before, after]}"
            for before, after in itertools.pairwise(found)
        )
        yield (
            f"the pipelines form a cycle {way} ({steps}): the blocks would wait for each other's "
            "slots for ever; deploy one of them under a second name"
        )
        users = {edge: user for edge, user in users.items() if not set(edge) & set(found)}


def _wiring_problems(
    topology: Topology, manifests: Mapping[Digest, Manifest | str]
) -> Iterator[str]:
    for name, pipeline in topology.pipelines.items():
        for problem in _wire(topology, manifests, pipeline)[1]:
            yield f"pipeline {name}: {problem}"


def _wire(
    topology: Topology,
    manifests: Mapping[Digest, Manifest] | Mapping[Digest, Manifest | str],
    pipeline: Pipeline,
) -> tuple[Wiring | None, tuple[str, ...]]:
    def manifest_of(block: BlockName) -> Manifest | None:
        if block not in topology.blocks:
            return None
        manifest = manifests.get(Digest(topology.blocks[block].artifact))
        return manifest if isinstance(manifest, Manifest) else None

    return wire(pipeline, manifest_of)


def _blocks(names: Sequence[str]) -> str:
    return f"{'block' if len(names) == 1 else 'blocks'} {', '.join(names)}"
