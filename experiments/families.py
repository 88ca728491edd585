"""Families of tasks: networks of which some have one trunk in common, each with a head of its own.

The trunk is the first part of the network, up to the cut that is nearest to the wanted share of
its bytes. A fraction of the tasks shares it; the others have trunks of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from networks import Chain
from torch import Tensor

from blockflow.artifact import Store
from blockflow.graph import weight_nodes
from blockflow.identity import digest_of
from blockflow.models import ModuleSource
from blockflow.split import BlockSource, cut_points, export, split_at, store_blocks
from blockflow.topology import Precision


@dataclass(frozen=True)
class Task:
    """A network as two artifacts of the store."""

    name: str
    trunk: str
    head: str


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


def build(source: ModuleSource, store: Store, count: int, share: float, trunks: int) -> Family:
    """`count` tasks, all with heads of their own and `trunks` at the end with trunks of their own.

    Their weights are the source's, each tensor moved by a little that is different for each task.
    """
    program = export(source.module, source.inputs)
    cuts = cut_points(program)
    whole = sum(weight.nbytes for _, weight in weight_nodes(program).values())
    before, best = 0, (1.0, cuts[0])
    for cut in cuts:
        before += cut.cost.parameter_bytes
        best = min(best, (abs(before / whole - share), cut), key=lambda each: each[0])
    trunk, head = split_at(program, [best[1]], source.name)
    own = _Variants(trunk, store), _Variants(head, store)
    tasks = []
    for index in range(count):
        trunk_seed = index + 1 if index >= count - trunks else 0
        tasks.append(Task(f"task{index + 1}", own[0].digest(trunk_seed), own[1].digest(index)))
    sizes = {
        digest: store.manifest(digest).parameter_bytes
        for t in tasks
        for digest in (t.trunk, t.head)
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
        self._made: dict[int, str] = {}

    def digest(self, seed: int) -> str:
        if seed not in self._made:
            generator = torch.Generator().manual_seed(seed)
            for weight, original in zip(self._weights, self._original, strict=True):
                weight.copy_(_moved(original, generator) if seed else original)
            block = replace(self._block, digest=digest_of(self._block.program))
            self._made[seed] = str(store_blocks([block], self._store).blocks[0].digest)
        return self._made[seed]


def _moved(weight: Tensor, generator: torch.Generator) -> Tensor:
    if not weight.is_floating_point():
        return weight
    # One random number for a tensor: different is enough, and billions would take minutes.
    return weight * (1 + 0.01 * float(torch.rand((), generator=generator)))


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
