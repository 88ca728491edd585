"""The threads of a worker that serve its blocks.

A thread owns the sockets of its blocks and, on a GPU, their streams: one for each block that is
replayed from graphs, and one for all others. All blocks on a GPU share one:
it only launches what the GPU computes, and threads of one process that launch side by side wait for
each other's interpreter lock. Blocks on the CPU that may use all of its cores share one, too: side
by side they would have as many threads for each core as they are. A block that is to have fewer
threads, or cores of its own, has a thread of its own.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import torch

from blockflow.block import Block
from blockflow.cores import available, pin
from blockflow.errors import BlockFlowError, StartFailed
from blockflow.protocol import Route, RouteId
from blockflow.reconcile import BlockSpec
from tensormq import Loop, TensorMQError

log = logging.getLogger(__name__)


def threads_for(blocks: Sequence[Block], on_fatal: Callable[[str], None]) -> list[BlockThread]:
    """The threads for the blocks of a worker, which are all on one device."""
    together = [block for block in blocks if not _apart(block.spec)]
    apart = [[block] for block in blocks if _apart(block.spec)]
    return [BlockThread(group, on_fatal) for group in (together, *apart) if group]


def _apart(spec: BlockSpec) -> bool:
    """Whether a block computes on a part of the cores, beside others."""
    if torch.device(spec.device).type == "cuda":
        return False
    return spec.cpus is not None or (spec.threads is not None and spec.threads < available())


class BlockThread:
    """A thread that serves blocks of one device.

    on_fatal: called with the reason when it cannot go on, or the device's context is lost, after
    which nothing in this process can compute.
    """

    def __init__(self, blocks: Sequence[Block], on_fatal: Callable[[str], None]) -> None:
        self._blocks = tuple(blocks)
        self._on_fatal = on_fatal
        self._current = blocks[0]
        self._loop = Loop()
        self._jobs: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._started: Future[None] = Future()
        self.name = ", ".join(block.spec.name for block in blocks)
        self._served_by = threading.Thread(target=self._run, name=f"blocks {self.name}")

    # Called from other threads

    def start(self) -> Future[None]:
        """Start; the future is done when all blocks are warm and their endpoints bound."""
        self._served_by.start()
        return self._started

    def connect(self, routes: Sequence[Route]) -> Future[None]:
        """Have the blocks learn those of `routes` that pass them, and open their channels."""
        return self._for_each(lambda block: block.connect(routes))

    def retire(self, routes: Iterable[RouteId]) -> Future[None]:
        """Have the blocks forget routes, and close the channels that no route needs any more."""
        ids = tuple(routes)
        return self._for_each(lambda block: block.retire(ids))

    def stop(self) -> None:
        """Finish what is queued and end; wait for it with `join`."""

        def end() -> None:
            self._stopping = True

        self._loop.call_soon(end)

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the thread's end; False when it goes on."""
        self._served_by.join(timeout)
        return not self._served_by.is_alive()

    def _for_each(self, job: Callable[[Block], None]) -> Future[None]:
        future: Future[None] = Future()

        def run() -> None:
            try:
                for block in self._blocks:
                    self._enter(block)
                    job(block)
            except (BlockFlowError, TensorMQError) as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        # Not in the callback itself: it may run while a channel is opened, and a job changes what
        # that is looking at.
        self._loop.call_soon(lambda: self._jobs.append(run))
        return future

    # The thread

    def _run(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(self._loop.close)
                self._open(stack)
                self._started.set_result(None)
                self._serve()
        except Exception as error:
            name = self._current.spec.name
            if not self._started.done():
                failed = StartFailed(f"block {name} cannot start: {error}")
                failed.__cause__ = error
                self._started.set_exception(failed)
            else:
                log.exception("block %s stopped", name)
                self._on_fatal(f"block {name}: {error}")

    def _open(self, stack: contextlib.ExitStack) -> None:
        cores = {core for block in self._blocks for core in block.spec.cpus or ()}
        if cores:
            # Before anything is computed: torch's threads of this one come with its first
            # computation, and start where it may run.
            pin(cores)
        device = torch.device(self._current.spec.device)
        shared = None
        if device.type == "cuda":
            torch.cuda.set_device(device)
            shared = torch.cuda.Stream(device)
        for block in self._blocks:
            self._current = block
            block.open(self._loop, shared, self._on_fatal)
            stack.callback(block.close)

    def _serve(self) -> None:
        while True:
            while self._jobs:
                self._jobs.popleft()()
            due = math.inf
            now = time.monotonic()
            for block in self._blocks:
                # Not those that only wait for a GPU: there may be many, and to ask each for every
                # message of another would take longer than the message.
                if block.busy or block.due <= now:
                    self._enter(block)
                    block.turn()
                due = min(due, block.due)
            if self._stopping and all(block.idle for block in self._blocks):
                return
            # A block may have been given something by one whose turn was after its own.
            if self._jobs or any(block.fresh for block in self._blocks):
                due = 0.0
            self._loop.run_once(None if due == math.inf else max(0.0, due - time.monotonic()))

    def _enter(self, block: Block) -> None:
        if block is not self._current:
            self._current = block
            block.enter()
