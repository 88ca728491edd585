"""The three networks cut where they stop being one, and all three asked at the same time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import nn

from blockflow.artifact import Port, Store
from blockflow.client import InferenceClient
from blockflow.demo.answers import Array, call, difference_of
from blockflow.demo.digits import TASKS, Digits, Task
from blockflow.errors import BlockFlowError
from blockflow.split import StoredBlock, export, shared_prefix, split_at, store_blocks
from blockflow.topology import Topology, parse

SINGLES = 8
"""Images of each task that go in a request of their own; the others go `ROWS` at a time."""
ROWS = 32


@dataclass(frozen=True)
class SharedSplit:
    """The blocks of networks with one trunk; heads are by name of the task."""

    trunk: StoredBlock
    heads: Mapping[str, StoredBlock]

    @property
    def bytes_shared(self) -> int:
        """Bytes of weights in the blocks, the trunk's counted once."""
        return weight_bytes(self.trunk) + sum(map(weight_bytes, self.heads.values()))

    @property
    def bytes_alone(self) -> int:
        """Bytes of weights of the networks, each with a trunk of its own."""
        return sum(weight_bytes(self.trunk) + weight_bytes(head) for head in self.heads.values())


def weight_bytes(block: StoredBlock) -> int:
    return block.manifest.parameter_bytes


def split_where_they_differ(models: Mapping[str, nn.Module], store: Store) -> SharedSplit:
    """Cut every network behind the longest part that all have in common, and store the blocks.

    Nothing tells where that is: the exported graphs and weights are compared. Raises
    BlockFlowError unless the networks have a common part and it is stored once.
    """
    image = Port(name="image", dtype="float32", shape=("batch", 1, 8, 8))
    programs = {name: export(model, [image]) for name, model in models.items()}
    cuts = shared_prefix(list(programs.values()))
    if cuts is None:
        raise BlockFlowError("the networks share a trunk, and none was found")
    trunks, heads = [], {}
    for (name, program), cut in zip(programs.items(), cuts, strict=True):
        sources = split_at(program, [cut], name, model=models[name])
        trunk, heads[name] = store_blocks(sources, store).blocks
        trunks.append(trunk)
    if len({trunk.digest for trunk in trunks}) != 1:
        raise BlockFlowError("the networks' common part became more than one artifact")
    return SharedSplit(trunks[0], heads)


def digits_topology(split: SharedSplit) -> Topology:
    """The trunk in one worker, the heads together in another, and a pipeline for each task."""
    blocks = {"trunk": {"artifact": split.trunk.digest, "max_batch": ROWS}}
    for name, head in split.heads.items():
        blocks[f"{name}-head"] = {"artifact": head.digest, "max_batch": ROWS, "worker": "heads"}
    pipelines = {name: {"blocks": ["trunk", f"{name}-head"]} for name in split.heads}
    return parse({"blocks": blocks, "pipelines": pipelines})


def requests_of(digits: Digits) -> list[Array]:
    """The held-out images as requests: a few single ones, then up to `ROWS` at a time."""
    single, many = digits.held_out[:SINGLES], digits.held_out[SINGLES:]
    return [part.numpy() for part in (*single.split(1), *many.split(ROWS))]


def ask_at_once(client: InferenceClient, digits: Digits) -> dict[str, Array]:
    """Logits of every task for all held-out images, asked from a thread for each task."""
    parts = requests_of(digits)
    together = threading.Barrier(len(TASKS))

    def ask(pipeline: str) -> Array:
        together.wait()
        return np.concatenate([client.infer(pipeline, {"image": part})["output"] for part in parts])

    with ThreadPoolExecutor(len(TASKS)) as threads:
        names = [task.name for task in TASKS]
        try:
            return dict(zip(names, threads.map(ask, names), strict=True))
        except BaseException:
            # A signal may arrive before all of them were started: nobody may wait for the rest.
            together.abort()
            raise


@dataclass(frozen=True)
class Score:
    """What a pipeline answered beside what the whole network does; accuracies from 0 to 1."""

    task: Task
    images: int
    accuracy: float
    accuracy_alone: float
    difference: float


def score(task: Task, model: nn.Module, digits: Digits, answer: Array) -> Score:
    """Compare a task's logits with those of the whole network, called on the same batches.

    Raises BlockFlowError if a prediction differs or a logit does by more than `TOLERANCE`.
    """
    expected = np.concatenate([call(model, part) for part in requests_of(digits)])
    difference = difference_of(task.name, answer, expected)
    if not np.array_equal(answer.argmax(axis=1), expected.argmax(axis=1)):
        raise BlockFlowError(f"pipeline {task.name} predicts other classes than its network")
    labels = task.label(digits.held_out_digits).numpy()
    return Score(
        task=task,
        images=len(labels),
        accuracy=float((answer.argmax(axis=1) == labels).mean()),
        accuracy_alone=float((expected.argmax(axis=1) == labels).mean()),
        difference=difference,
    )
