"""A controller without processes, for tests of what stands in front of one."""

from __future__ import annotations

from collections.abc import AsyncIterator

from blockflow.artifact import Manifest
from blockflow.devices import Mps
from blockflow.edit import Change, Conflict, Terms, Verb
from blockflow.errors import NotFound, UploadsOff
from blockflow.status import (
    ApplyResult,
    BlockState,
    BlockStatus,
    ChannelStatus,
    Event,
    EventKind,
    GatewayStatus,
    GenerationRecord,
    Outcome,
    PipelineStatus,
)
from blockflow.topology import Block, BlockName, Generation, Pipeline, Topology
from blockflow.wiring import edges, entries, exits, ordered, path

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
        self.records: list[GenerationRecord] = []
        self.terms = Terms()
        self.happened: list[Event] = [
            Event(number=1, at=1.5, kind=EventKind.WORKER_STARTED, subject="a"),
            Event(number=2, at=2.5, kind=EventKind.WORKER_FAILED, subject="a", reason="signal 9"),
        ]

    async def update(self, change: Change, verb: Verb, terms: Terms) -> ApplyResult:
        self.terms = terms
        terms.check(Generation(self.generation))
        topology = change(self.current)
        if self.error is not None:
            raise self.error
        before, after = set(self.current.blocks), set(topology.blocks)
        if not terms.dry_run:
            self.generation += 1
            self.current = topology
            record = GenerationRecord(
                generation=self.generation,
                verb=verb,
                at=1000.0 + self.generation,
                outcome=Outcome.APPLIED,
                topology=topology,
            )
            self.records.insert(0, record)
        return ApplyResult(
            generation=self.generation,
            dry_run=terms.dry_run,
            keep=tuple(sorted(before & after)),
            start=tuple(sorted(after - before)),
            stop=tuple(sorted(before - after)),
            actions=tuple(f"start worker {name}" for name in sorted(after - before)),
        )

    async def rollback(self, to: Generation | None, terms: Terms) -> ApplyResult:
        record = await self.generation_of(self.generation - 1 if to is None else to)
        if record.outcome is Outcome.FAILED:
            raise Conflict(f"generation {to} never served")
        return await self.update(lambda _: record.topology, Verb.ROLLBACK, terms)

    async def restart(self, block: BlockName, terms: Terms) -> ApplyResult:
        terms.check(Generation(self.generation))
        await self.logs(block, 1)
        return ApplyResult(
            generation=self.generation, dry_run=terms.dry_run, start=(block,), stop=(block,)
        )

    async def receive(self, digest: str, body: AsyncIterator[bytes]) -> Manifest:
        async for _ in body:
            pass
        raise UploadsOff(f"nothing is stored here, and so {digest} is not")

    async def history(self, limit: int) -> list[GenerationRecord]:
        return self.records[:limit]

    async def generation_of(self, number: int) -> GenerationRecord:
        for record in self.records:
            if record.generation == number:
                return record
        raise NotFound(f"there is no generation {number}")

    async def events(self, after: int) -> AsyncIterator[Event]:
        for event in self.happened:
            if event.number > after:
                yield event

    async def logs(self, block: BlockName, lines: int) -> list[str]:
        if block not in self.current.blocks:
            raise NotFound(f"there is no block {block}")
        return [f"line {number}" for number in range(lines)]

    def topology(self) -> tuple[Generation, Topology]:
        return Generation(self.generation), self.current

    async def blocks(self) -> list[BlockStatus]:
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
                blocks=ordered(pipeline),
                edges=edges(pipeline),
                entries=entries(pipeline),
                exits=exits(pipeline),
                path=path(pipeline),
                ready=not waiting & set(pipeline.members),
                reason=f"waits for {', '.join(sorted(waiting))}" if waiting else None,
                max_batch=8,
            )
            for name, pipeline in self.current.pipelines.items()
        ]

    async def gateway(self) -> GatewayStatus:
        channels = tuple(
            ChannelStatus(peer=first, carrier="shm", messages=4, bytes=2048, host_bytes=2048)
            for first in list(self.current.blocks)[:1]
        )
        return GatewayStatus(
            pid=43,
            url="http://127.0.0.1:8000",
            ready=True,
            host_memory_bytes=60 << 20,
            channels=channels,
        )

    def mps(self) -> dict[str, Mps]:
        return {}

    def waiting(self) -> list[str]:
        return [
            f"pipeline {pipeline.name} is not ready: {pipeline.reason}"
            for pipeline in self.pipelines()
            if not pipeline.ready
        ]
