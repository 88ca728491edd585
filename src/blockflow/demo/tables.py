"""What the demo shows: which processes run, and its two tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from blockflow.client import ControlClient
from blockflow.demo.answers import blocks_of
from blockflow.demo.resnet import Comparison
from blockflow.demo.server import Server
from blockflow.demo.terminal import kilobytes, milliseconds, table
from blockflow.demo.trunk import Score, SharedSplit, weight_bytes
from blockflow.errors import BlockFlowError
from blockflow.status import BlockStatus


def print_processes(console: Console, server: Server, control: ControlClient) -> None:
    """Say which processes run. Raises BlockFlowError unless the server's children are the
    gateway and one worker for each that the topology names."""
    workers: dict[int | None, list[BlockStatus]] = {}
    for block in blocks_of(control).values():
        workers.setdefault(block.pid, []).append(block)
    others = {process.pid for process in server.children()} - set(workers)
    if len(others) != 1 or None in workers:
        raise BlockFlowError(f"expected a gateway beside the workers, found {sorted(others)}")
    console.print(f"Processes: server {server.pid}, gateway {others.pop()}, workers")
    for pid, blocks in workers.items():
        names = ", ".join(block.name for block in blocks)
        console.print(f"  {pid}  {blocks[0].worker}" + (f": {names}" if len(blocks) > 1 else ""))


def print_digits(
    console: Console,
    scores: Sequence[Score],
    split: SharedSplit,
    blocks: Mapping[str, BlockStatus],
) -> None:
    accuracy = table(
        *("task", ">images", ">network alone", ">served", ">largest difference"),
        title="Table 1. Three tasks on one trunk",
    )
    for each in scores:
        accuracy.add_row(
            f"{each.task.name}: {each.task.question}",
            str(each.images),
            f"{each.accuracy_alone:.2%}",
            f"{each.accuracy:.2%}",
            f"{each.difference:.1g}",
        )
    pipelines = [each.task.name for each in scores]
    use = table(
        *("block", ">pid", ">weights", *(f">{each}" for each in pipelines), ">mean compute")
    )
    for name, block in {
        "trunk": split.trunk,
        **{f"{task}-head": head for task, head in split.heads.items()},
    }.items():
        status = blocks[name]
        use.add_row(
            name,
            str(status.pid),
            kilobytes(weight_bytes(block)),
            *(str(status.requests_by_pipeline.get(each, "")) for each in pipelines),
            milliseconds(status.compute_ms_mean),
        )
    console.print()
    console.print(accuracy)
    console.print("Requests that each block computed, by pipeline:")
    console.print(use)
    console.print(
        f"Weights: {kilobytes(split.bytes_shared)} with one trunk, "
        f"{kilobytes(split.bytes_alone)} without sharing."
    )


def print_resnet(console: Console, comparison: Comparison) -> None:
    latency = table(
        *(">images", ">largest difference", ">p50 served", ">p50 network alone"),
        title="Table 2. ResNet-50 in four blocks beside the whole network",
    )
    for each in comparison.measured:
        latency.add_row(
            str(each.rows),
            f"{each.difference:.1g}",
            milliseconds(each.served_ms),
            milliseconds(each.alone_ms),
        )
    use = table("block", ">pid", ">weights", "sends by", ">mean compute")
    for stored in comparison.result.blocks:
        status = comparison.blocks[stored.name]
        use.add_row(
            stored.name,
            str(status.pid),
            f"{weight_bytes(stored) / 1e6:.1f} MB",
            ", ".join(sorted({each.carrier for each in status.channels if each.messages})),
            milliseconds(comparison.compute_ms[stored.name]),
        )
    use.add_section()
    use.add_row(
        "together",
        "",
        f"{sum(map(weight_bytes, comparison.result.blocks)) / 1e6:.1f} MB",
        "",
        milliseconds(sum(comparison.compute_ms.values())),
    )
    console.print()
    console.print(latency)
    console.print("One image in each block:")
    console.print(use)
