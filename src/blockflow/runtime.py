"""The block runtime: a thread for each block that receives, computes and sends.

The thread owns the block's sockets and, on a GPU, its stream. It waits for nothing on the GPU: what
it launches is ordered there, by the stream and by TensorMQ's events.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blockflow.errors import BlockFailed, BlockFlowError, DeadlineExceeded, Unavailable
from blockflow.ledger import Ledger, ledger_path
from blockflow.program import Program
from blockflow.protocol import (
    BlockReport,
    ChannelReport,
    Hop,
    Note,
    Route,
    RouteId,
    decode_note,
    encode,
)
from blockflow.reconcile import BlockSpec
from blockflow.topology import BlockName, PipelineName
from tensormq import Loop, Message, Peer, PeerLost, Pull, Push, Request, TensorMQError, slot_size
from tensormq import Timeout as NoSlot

log = logging.getLogger(__name__)


@dataclass
class _Work:
    """Tensors that wait for a block, named as the step before named them."""

    route: RouteId
    requests: tuple[Request, ...]
    tensors: Mapping[str, Tensor]
    hops: tuple[Hop, ...]
    done: Callable[[], None]
    ready: torch.cuda.Event | None = None
    received: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float | None:
        """Seconds of CLOCK_MONOTONIC after which no request in it matters any more."""
        deadlines = [request.deadline for request in self.requests]
        return None if not deadlines or 0 in deadlines else max(deadlines)


@dataclass(frozen=True)
class _Way:
    """What a block knows of a route: where its inputs come from, where its outputs go."""

    pipeline: PipelineName
    wiring: Mapping[str, str]
    following: Peer | Block
    results: Peer


@dataclass
class _Counts:
    requests: dict[PipelineName, int] = field(default_factory=dict)
    failures: int = 0
    batches: int = 0
    compute_ms: float = 0.0


class Block:
    """A loaded block and its thread.

    endpoint: where its inputs arrive. neighbours: the blocks of this worker by endpoint, to which
    tensors are handed in the process. on_fatal: called with the reason when the device's context is
    lost, after which nothing in this process can compute.
    """

    def __init__(
        self,
        spec: BlockSpec,
        program: Program,
        endpoint: str,
        neighbours: Mapping[str, Block],
        on_fatal: Callable[[str], None],
        slots: int = 4,
    ) -> None:
        self.spec = spec
        self.endpoint = endpoint
        self._program = program
        self._neighbours = neighbours
        self._on_fatal = on_fatal
        self._slots = slots
        self._device = torch.device(spec.device)
        self._gpu = self._device.type == "cuda"
        self._loop = Loop()
        self._queue: deque[_Work] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._ways: dict[RouteId, _Way] = {}
        self._peers: dict[str, Peer] = {}
        self._local_counts: dict[BlockName, list[int]] = {}
        self._counts = _Counts()
        self._timed: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._ledger: Ledger | None = None
        self._stopping = False
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=f"block {spec.name}")

    # Called from other threads

    def start(self) -> Future[None]:
        """Start the thread; the future is done when the block is warm and its endpoint bound."""
        self._thread.start()
        return self._started

    def connect(self, routes: Iterable[Route]) -> Future[None]:
        """Learn those of `routes` that pass this block and open their channels."""
        mine = [r for r in routes if any(step.block == self.spec.name for step in r.steps)]
        return self._perform(lambda: self._connect(mine))

    def retire(self, routes: Iterable[RouteId]) -> Future[None]:
        """Forget routes, and close the channels that no route needs any more."""
        ids = tuple(routes)
        return self._perform(lambda: self._retire(ids))

    def submit(self, work: _Work) -> None:
        """Take work from a block of the same process."""
        self._loop.call_soon(lambda: self._queue.append(work))

    def stop(self) -> None:
        """Let the thread finish what is queued and end; wait for it with `join`."""

        def end() -> None:
            self._stopping = True

        self._loop.call_soon(end)

    def join(self, timeout: float) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def report(self) -> BlockReport:
        counts = self._counts
        push = getattr(self, "_push", None)
        channels = [
            ChannelReport(s.endpoint, str(s.carrier), s.messages, s.bytes, s.host_bytes)
            for s in (push.statistics() if push is not None else ())
        ]
        channels += [
            ChannelReport(f"local:{name}", "local", messages, size, 0)
            for name, (messages, size) in self._local_counts.copy().items()
        ]
        return BlockReport(
            block=self.spec.name,
            requests=dict(counts.requests),
            failures=counts.failures,
            batches=counts.batches,
            compute_ms=counts.compute_ms,
            channels=tuple(channels),
        )

    def _perform(self, job: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()

        def run() -> None:
            try:
                job()
            except (BlockFlowError, TensorMQError) as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        # Not in the callback itself: it may run while a send waits for a slot, and a job changes
        # what that send is looking at.
        self._loop.call_soon(lambda: self._jobs.append(run))
        return future

    # The thread

    def _run(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                if self._gpu:
                    torch.cuda.set_device(self._device)
                    stack.enter_context(torch.cuda.stream(torch.cuda.Stream(self._device)))
                self._warm()
                self._open()
                stack.callback(self._close)
                self._started.set_result(None)
                self._serve()
        except Exception as error:
            if not self._started.done():
                self._started.set_exception(error)
            else:
                log.exception("block %s stopped", self.spec.name)
                self._on_fatal(f"block {self.spec.name}: {error}")

    def _warm(self) -> None:
        """Compute on zeros, so that no request pays for what is done only once."""
        manifest = self._program.manifest
        sizes = {1, self.spec.max_batch} if self._gpu else {1}
        for rows in sizes:
            inputs = {
                port.name: torch.zeros(
                    port.sized(rows), dtype=getattr(torch, port.dtype), device=self._device
                )
                for port in manifest.inputs
            }
            outputs = self._program(inputs)
            for port in manifest.outputs:
                found = outputs[port.name]
                if tuple(found.shape) != port.sized(rows) or found.dtype != getattr(
                    torch, port.dtype
                ):
                    raise BlockFailed(
                        f"block {self.spec.name} gives {port.name} as {found.dtype} "
                        f"{list(found.shape)}; its manifest says {port.dtype} {list(port.shape)}"
                    )
        if self._gpu:
            torch.cuda.synchronize(self._device)

    def _open(self) -> None:
        largest = {
            port.name: (port.dtype, port.sized(self.spec.max_batch))
            for port in self._program.manifest.outputs
        }
        device = str(self._device)
        self._pull = Pull(self.endpoint, device=device, loop=self._loop)
        self._push = Push(
            slots=self._slots, slot_bytes=slot_size(largest), device=device, loop=self._loop
        )
        self._ledger = Ledger(ledger_path(self.endpoint))
        self._push.on_lost = lambda peer: log.warning("lost %s: %s", peer.endpoint, peer.lost)

    def _close(self) -> None:
        if self._gpu:
            torch.cuda.synchronize(self._device)
        self._pull.close()
        self._push.close()
        self._loop.close()
        if self._ledger is not None:
            self._ledger.close()

    def _serve(self) -> None:
        while True:
            while self._jobs:
                self._jobs.popleft()()
            message = self._pull.poll()
            if message is not None:
                self._compute(self._work_of(message))
            elif self._queue:
                self._compute(self._queue.popleft())
            elif self._stopping:
                return
            else:
                self._loop.run_once()
            self._resolve_times()

    def _work_of(self, message: Message) -> _Work:
        note = decode_note(message.note)
        route = RouteId(message.route)
        return _Work(route, message.requests, message.tensors, note.hops, message.release)

    def _compute(self, work: _Work) -> None:
        way = self._ways.get(work.route)
        if way is None:
            log.error("block %s has no route %s any more", self.spec.name, work.route)
            work.done()
            return
        counts = self._counts
        count = len(work.requests)
        counts.requests[way.pipeline] = counts.requests.get(way.pipeline, 0) + count
        if self._ledger is not None:
            self._ledger.begin([request.id for request in work.requests])
        try:
            self._forward(work, way)
        except Exception as error:  # whatever a model raises fails its own request
            counts.failures += count
            self._fail(work, way, error)
            if isinstance(error, torch.AcceleratorError):
                # The context is lost: every later call on this device would fail as well.
                raise
        finally:
            if self._ledger is not None:
                self._ledger.end()
            work.done()

    def _forward(self, work: _Work, way: _Way) -> None:
        started = time.monotonic()
        if work.deadline is not None and started > work.deadline:
            raise DeadlineExceeded(f"the deadline passed before block {self.spec.name} began")
        stream = torch.cuda.current_stream(self._device) if self._gpu else None
        if work.ready is not None and stream is not None:
            work.ready.wait(stream)
            for tensor in work.tensors.values():
                tensor.record_stream(stream)  # the allocator of another stream may not reuse it yet
        inputs = {
            mine: work.tensors[theirs].to(self._device, non_blocking=True)
            for mine, theirs in way.wiring.items()
        }
        began = self._event(timing=True)
        outputs = self._program(inputs)
        ended = self._event(timing=True)
        finished = time.monotonic()
        self._counts.batches += 1
        if began is not None and ended is not None:
            self._timed.append((began, ended))
        else:
            self._counts.compute_ms += (finished - started) * 1e3
        hop = Hop(self.spec.name, (started - work.received) * 1e3, (finished - started) * 1e3)
        hops = (*work.hops, hop)
        if isinstance(way.following, Block):
            self._hand_over(work, way.following, outputs, hops)
        else:
            left = None if work.deadline is None else max(0.0, work.deadline - finished)
            self._push.send(
                outputs,
                to=way.following,
                requests=work.requests,
                route=work.route,
                note=encode(Note(hops)),
                timeout=left,
            )

    def _hand_over(
        self, work: _Work, to: Block, outputs: dict[str, Tensor], hops: tuple[Hop, ...]
    ) -> None:
        """Give tensors to a block of this process: no copy, unless they live in a lent slot."""
        lent = {t.untyped_storage().data_ptr() for t in work.tensors.values()}
        kept = {
            name: tensor.clone() if tensor.untyped_storage().data_ptr() in lent else tensor
            for name, tensor in outputs.items()
        }
        count = self._local_counts.setdefault(to.spec.name, [0, 0])
        count[0] += 1
        count[1] += sum(tensor.nbytes for tensor in kept.values())
        to.submit(_Work(work.route, work.requests, kept, hops, _nothing, self._event(timing=False)))

    def _fail(self, work: _Work, way: _Way, error: Exception) -> None:
        """Tell the requests' gateway what happened; the block goes on with the next."""
        match error:
            case BlockFlowError():
                known: BlockFlowError = error
            case NoSlot():
                known = DeadlineExceeded(
                    f"the deadline passed while block {self.spec.name} waited for the next block"
                )
            case PeerLost():
                known = Unavailable(f"the block after {self.spec.name} is gone: {error}")
            case _:
                known = BlockFailed(
                    f"block {self.spec.name} failed: {type(error).__name__}: {error}"
                )
                log.exception("block %s failed", self.spec.name, exc_info=error)
        note = encode(Note(work.hops, str(known), known.status))
        try:
            self._push.send({}, to=way.results, requests=work.requests, route=work.route, note=note)
        except PeerLost:
            log.warning("nobody is left to be told: %s", known)

    def _event(self, *, timing: bool) -> torch.cuda.Event | None:
        if not self._gpu:
            return None
        event = torch.cuda.Event(enable_timing=timing)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _resolve_times(self) -> None:
        """Add up device times that are known by now; waits for none."""
        while self._timed and self._timed[0][1].query():
            began, ended = self._timed.popleft()
            self._counts.compute_ms += began.elapsed_time(ended)

    def _connect(self, routes: Iterable[Route]) -> None:
        for route in routes:
            names = [step.block for step in route.steps]
            here = names.index(self.spec.name)
            results = self._peer(route.results)
            following: Peer | Block = results
            if here + 1 < len(route.steps):
                endpoint = route.steps[here + 1].endpoint
                following = self._neighbours.get(endpoint) or self._peer(endpoint)
            self._ways[route.id] = _Way(
                route.pipeline, route.steps[here].wiring, following, results
            )

    def _peer(self, endpoint: str) -> Peer:
        peer = self._peers.get(endpoint)
        if peer is None or peer.lost is not None:
            peer = self._peers[endpoint] = self._push.connect(endpoint)
        return peer

    def _retire(self, routes: Iterable[RouteId]) -> None:
        for route in routes:
            self._ways.pop(route, None)
        needed = {id(way.following) for way in self._ways.values()}
        needed |= {id(way.results) for way in self._ways.values()}
        for endpoint, peer in tuple(self._peers.items()):
            if id(peer) not in needed:
                del self._peers[endpoint]
                self._push.disconnect(peer)


def _nothing() -> None:
    """Tensors that were handed over in the process need no release."""
