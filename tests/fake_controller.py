"""A controller without processes, for tests of what stands in front of one."""

from __future__ import annotations

from blockflow.status import ApplyResult, BlockState, BlockStatus, ChannelStatus, PipelineStatus
from blockflow.topology import Block, Generation, Pipeline, Topology

DIGEST = "sha256-" + "a" * 64
WANTED = Topology(
    store="/store",
    blocks={"a": Block(artifact=DIGEST), "b": Block(artifact=DIGEST)},
    pipelines={"p": Pipeline(blocks=("a", "b"))},
)


class FakeController:
    """Takes every topology at its word: its blocks are in the state that the test gives them."""

    def __init__(self) -> None:
        self.generation = 0
        self.current = Topology()
        self.states: dict[str, tuple[BlockState, str | None]] = {}
        self.error: Exception | None = None

    async def apply(self, topology: Topology, dry_run: bool) -> ApplyResult:
        if self.error is not None:
            raise self.error
        before, after = set(self.current.blocks), set(topology.blocks)
        if not dry_run:
            self.generation += 1
            self.current = topology
        return ApplyResult(
            generation=self.generation,
            dry_run=dry_run,
            keep=tuple(sorted(before & after)),
            start=tuple(sorted(after - before)),
            stop=tuple(sorted(before - after)),
        )

    def topology(self) -> tuple[Generation, Topology]:
        return Generation(self.generation), self.current

    def blocks(self) -> list[BlockStatus]:
        statuses = []
        for name, block in self.current.blocks.items():
            state, reason = self.states.get(name, (BlockState.READY, None))
            statuses.append(
                BlockStatus(
                    name=name,
                    artifact=block.artifact,
                    device=block.device,
                    worker=name,
                    pid=42,
                    state=state,
                    reason=reason,
                    requests=3,
                    requests_by_pipeline={"p": 3},
                    compute_ms_mean=1.5,
                    channels=(
                        ChannelStatus(
                            peer="b", carrier="shm", messages=3, bytes=3072, host_bytes=0
                        ),
                    ),
                )
            )
        return statuses

    def pipelines(self) -> list[PipelineStatus]:
        waiting = {name for name, (state, _) in self.states.items() if state != BlockState.READY}
        return [
            PipelineStatus(
                name=name,
                blocks=pipeline.blocks,
                ready=not waiting & set(pipeline.blocks),
                reason=f"waits for {', '.join(sorted(waiting))}" if waiting else None,
                max_batch=8,
            )
            for name, pipeline in self.current.pipelines.items()
        ]

    def waiting(self) -> list[str]:
        return [
            f"pipeline {pipeline.name} is not ready: {pipeline.reason}"
            for pipeline in self.pipelines()
            if not pipeline.ready
        ]
