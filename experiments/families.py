"""Families of tasks: networks of which some have one trunk in common, each with a head of its own.

The trunk is the first part of the network, up to the cut that is nearest to the wanted share of
its bytes. A fraction of the tasks shares it; the others have trunks of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from networks import Chain
from torch import Tensor

from blockflow.artifact import Store
from blockflow.graph import weight_nodes
from blockflow.identity import digest_of
from blockflow.models import ModuleSource
from blockflow.split import (
    BlockSource,
    cut_points,
    export,
    split,
    split_at,
    store_blocks,
)
from blockflow.topology import Precision


@dataclass(frozen=True)
class Task:
    """A network as two artifacts of the store, and as one where that was asked for."""

    name: str
    trunk: str
    head: str
    whole: str | None = None


@dataclass(frozen=True)
class Family:
    """`share` is the part of a network's bytes that the shared trunk has; `task_bytes` a whole
    network's."""

    tasks: tuple[Task, ...]
    share: float
    task_bytes: int
    bytes_of: Mapping[str, int]

    def distribution(self, fraction: float) -> tuple[Task, ...]:
        """As many tasks, of which `fraction` share the first task's trunk."""
        sharing = round(fraction * len(self.tasks))
        trunk = self.tasks[0].trunk
        return tuple(
            replace(task, trunk=trunk) if index < sharing else task
            for index, task in enumerate(self.tasks)
        )

    def unique_bytes(self, tasks: Sequence[Task]) -> int:
        return sum(self.bytes_of[d] for d in {d for task in tasks for d in (task.trunk, task.head)})

    def bound(self, fraction: float) -> float:
        """What sharing can save of all tasks' bytes: f s (1 - 1 / (f N))."""
        count = len(self.tasks)
        sharing = round(fraction * count)
        return sharing / count * self.share * (1 - 1 / sharing)


def build(
    source: ModuleSource,
    store: Store,
    count: int,
    share: float,
    trunks: int,
    *,
    wholes: bool = False,
) -> Family:
    """`count` tasks, all with heads of their own and `trunks` at the end with trunks of their own.

    Their weights are the source's, each tensor moved by a little that is different for each task.
    `wholes`: every task also as one artifact, with the weights of its two.
    """
    for index, value in enumerate(source.module.state_dict().values()):
        if value.is_floating_point():
            value.mul_(1 + 1e-5 * index)  # no two alike, so that each is known by its content
    program = export(source.module, source.inputs)
    cuts = cut_points(program)
    total = sum(weight.nbytes for _, weight in weight_nodes(program).values())
    before, best = 0, (1.0, cuts[0])
    for cut in cuts:
        before += cut.cost.parameter_bytes
        best = min(best, (abs(before / total - share), cut), key=lambda each: each[0])
    trunk, head = (_Variants(each, store) for each in split_at(program, [best[1]], source.name))
    whole = _Variants(split(program, 1, source.name)[0], store) if wholes else None
    tasks = []
    for index in range(count):
        seed = index + 1 if index >= count - trunks else 0
        seeds = dict.fromkeys(trunk.keys, seed) | dict.fromkeys(head.keys, index)
        tasks.append(
            Task(
                f"task{index + 1}",
                trunk.digest(seeds),
                head.digest(seeds),
                whole.digest(seeds) if whole is not None else None,
            )
        )
    sizes = {
        digest: store.manifest(digest).parameter_bytes
        for task in tasks
        for digest in (task.trunk, task.head)
    }
    trunk_bytes = sizes[tasks[0].trunk]
    task_bytes = trunk_bytes + sizes[tasks[0].head]
    return Family(tuple(tasks), trunk_bytes / task_bytes, task_bytes, sizes)


class _Variants:
    """Copies of a block with other weights, each made and stored when it is first asked for."""

    def __init__(self, block: BlockSource, store: Store) -> None:
        self._block = block
        self._store = store
        self._weights = [weight for _, weight in weight_nodes(block.program).values()]
        self._original = [weight.clone() for weight in self._weights]
        self.keys = [_key(weight) for weight in self._original]
        self._made: dict[tuple[int, ...], str] = {}

    def digest(self, seeds: Mapping[str, int]) -> str:
        """The artifact whose weights are moved as these seeds say, by the keys of the weights."""
        mine = tuple(seeds[key] for key in self.keys)
        if mine not in self._made:
            for weight, original, seed in zip(self._weights, self._original, mine, strict=True):
                weight.copy_(_moved(original, seed))
            block = replace(self._block, digest=digest_of(self._block.program))
            self._made[mine] = str(store_blocks([block], self._store).blocks[0].digest)
        return self._made[mine]


def _key(weight: Tensor) -> str:
    return hashlib.sha256(weight.numpy(force=True).tobytes()).hexdigest()


def _moved(weight: Tensor, seed: int) -> Tensor:
    # One number for a tensor: different is enough, and random ones for all would take minutes.
    return weight * (1 + 0.001 * seed) if weight.is_floating_point() else weight


def topology(
    store: Store,
    tasks: Sequence[Task],
    device: str,
    settings: Mapping[str, Any],
    devices: Mapping[str, Any],
) -> dict[str, Any]:
    """A pipeline for each task, every distinct artifact once; `settings` are the blocks', `devices`
    the topology's section of that name.
    """
    names: dict[str, str] = {}
    pipelines = {}
    for task in tasks:
        for kind, digest in (("trunk", task.trunk), ("head", task.head)):
            names.setdefault(digest, f"{kind}-{task.name}")
        pipelines[task.name] = {"blocks": [names[task.trunk], names[task.head]]}
    blocks = {
        name: {"artifact": digest, "device": device, **settings} for digest, name in names.items()
    }
    return {
        "store": str(store.root),
        "devices": dict(devices),
        "blocks": blocks,
        "pipelines": pipelines,
    }


def monolith(
    store: Store, task: Task, rows: int, device: str, how: str, precision: Precision
) -> Chain:
    """A task by itself, with weights of its own, whoever else is there."""
    return Chain(store, [task.trunk, task.head], rows, device, how, precision)


def memory(
    taken: Mapping[str, int], bare: int, family: Family, tasks: Sequence[Task]
) -> dict[str, Any]:
    """Memory of "one trunk" as a part of that of "monoliths", and what arithmetic says of it.

    `taken` are their bytes. `bare` is what one process takes without a model, which both sides take
    once. `bound_weights`: if nothing but weights took memory beyond it, 1 - s (1 - 1 / N);
    `bound_in_all`: the same with it. What is beyond both is what graphs, their buffers and channels
    take.
    """
    apart, shared = taken["monoliths"], taken["one trunk"]
    weights_apart, weights_shared = len(tasks) * family.task_bytes, family.unique_bytes(tasks)
    return {
        "beyond_context": (shared - bare) / (apart - bare) if apart > bare else None,
        "bound_weights": weights_shared / weights_apart,
        "in_all": shared / apart,
        "bound_in_all": (bare + weights_shared) / (bare + weights_apart),
        "weights_bytes": {"monoliths": weights_apart, "one trunk": weights_shared},
        "beyond_weights_bytes": {
            "monoliths": apart - bare - weights_apart,
            "one trunk": shared - bare - weights_shared,
        },
    }
