"""How a loaded program is run: replayed from CUDA graphs where it can be, called where not.

To launch the kernels of a small network one by one takes longer than the kernels do. A CUDA graph
launches all of them at once, but for one number of rows, and with inputs and outputs in one place.
So there is a graph for each of a few sizes of batches (`buckets`): a batch is copied into the
inputs of the smallest that holds it, and its outputs lie where that graph writes them every time.
Rows that are left over keep what an earlier batch left there, which no other row may depend on:
`prepare` tries that out, and calls a program for which it does not hold.

A runner belongs to one thread and to the stream that was current when it was prepared. Two steps
make a run: `take` has the inputs, `run` gives the outputs.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from blockflow.archive import first_line
from blockflow.backends import trying_algorithms
from blockflow.errors import BlockFailed
from blockflow.export import example, has_rows
from blockflow.program import Program
from blockflow.tolerance import agree

_WARM_RUNS = 3

# Capturing changes how the whole process allocates and which convolutions it tries.
_preparing = threading.Lock()


def buckets(largest: int) -> tuple[int, ...]:
    """The sizes of batches for which there are graphs: powers of two, and `largest` itself."""
    powers = [1 << n for n in range(largest.bit_length()) if 1 << n < largest]
    return (*powers, largest)


class Loan:
    """Outputs of a graph on their way to another stream of this process.

    They lie where the next run writes. Whoever reads them holds the loan meanwhile and
    leaves an event behind. The lender, before it writes again, has its stream wait for that event;
    if not everything was read yet, it first moves the tensors to memory of their own. So a reader
    that keeps up costs no copy, and one that lags does not stop the lender. Lender and readers
    share a thread.

    written: recorded behind what wrote the tensors. read: an event that is the loan's until it is
    recalled.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], written: torch.cuda.Event, read: torch.cuda.Event
    ) -> None:
        self.tensors = dict(tensors)
        self._written = written
        self._read = read
        self._was_read = False
        self._moved = False
        self._over = False

    @contextlib.contextmanager
    def reading(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """What `stream` is given inside reads the tensors, which do not change meanwhile."""
        self._written.wait(stream)
        if self._moved:
            for tensor in self.tensors.values():
                # Its own stream's allocator may not reuse it while this stream reads it.
                tensor.record_stream(stream)
        try:
            yield
        finally:
            if not self._moved:
                self._read.record(stream)
                self._was_read = True

    def end(self) -> None:
        """Nobody will read any more."""
        self._over = True
        self.tensors.clear()

    def recall(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """What `stream` is given from now on may write where the tensors were; gives `read`."""
        if self._was_read:
            self._read.wait(stream)
        if not self._over:
            self.tensors.update({name: each.clone() for name, each in self.tensors.items()})
            self._written = stream.record_event()
            self._moved = True
        return self._read


class EagerRunner:
    """Calls the program. `reason` says why not something faster, where that could be expected."""

    static = False
    """Whether inputs are copied to places of its own, which `take` does, and outputs lie in such,
    with the shapes that they were tried with; or else both are new tensors in every run."""

    def __init__(self, program: Program, reason: str | None = None) -> None:
        self.kind = "compiled" if program.compiled else "eager"
        self.reason = "; ".join(filter(None, (reason, program.uncompiled))) or None
        self._program = program
        self._inputs: dict[str, Tensor] = {}

    def take(self, parts: Mapping[str, Sequence[Tensor]]) -> None:
        """Have the inputs of the next run: by port, tensors whose rows are put together."""
        self._inputs = {
            name: torch.cat(tuple(tensors)) if len(tensors) > 1 else tensors[0]
            for name, tensors in parts.items()
        }

    def run(self) -> dict[str, Tensor]:
        inputs, self._inputs = self._inputs, {}
        return self._program(inputs)

    def lend(self, tensors: Mapping[str, Tensor]) -> Loan | None:
        """The outputs are new tensors in every run: nobody has to care who still reads them."""
        return None


@dataclass(frozen=True)
class _Bucket:
    rows: int
    graph: torch.cuda.CUDAGraph
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


class GraphRunner:
    """Replays the program from CUDA graphs. Raises whatever torch raises where it cannot.

    largest: the most rows of a batch. Programs whose tensors have no batch dimension have one
    graph. All graphs share one pool of memory, and the inputs of the smaller are the first rows of
    the largest's: they run one at a time.
    """

    static = True

    def __init__(self, program: Program, largest: int) -> None:
        from tensormq.cuda import copy  # noqa: PLC0415 - where there is a GPU

        self.kind = "compiled, cuda graph" if program.compiled else "cuda graph"
        self.reason = program.uncompiled
        self._program = program
        self._stream = torch.cuda.current_stream(program.device)
        self._loans: list[Loan] = []
        # To make an event takes as long as to record it. A stream that waits for one waits for
        # what it stood for at that moment: one is enough for what the latest run has written.
        self._written = torch.cuda.Event()
        self._marked = False
        self._spare: list[torch.cuda.Event] = []
        manifest = program.manifest
        with_rows = {has_rows(port) for port in program.ports}
        if len(with_rows) > 1:
            raise NotCapturable("some of its tensors have a batch dimension and others have none")
        self._batched = with_rows == {True}
        self._places = {
            port.name: example(port, largest).to(program.device) for port in manifest.inputs
        }
        self._single = {name: place.split(1) for name, place in self._places.items()}
        self._copy = copy
        self._pool = torch.cuda.graph_pool_handle()
        sizes = buckets(largest) if self._batched else (largest,)
        with trying_algorithms():  # each size comes only once
            # From the largest down: what the smaller need fits into the memory of the larger.
            self._buckets = [self._captured(size) for size in reversed(sizes)][::-1]
        self._sizes = [bucket.rows for bucket in self._buckets]
        self._check()
        self._bucket, self._rows = self._buckets[0], 0

    def take(self, parts: Mapping[str, Sequence[Tensor]]) -> None:
        """Copy the inputs of the next run to where the graph reads: by port, tensors whose rows
        are put together.

        Raises ValueError for tensors that do not fit the ports.
        """
        rows = sum(each.shape[0] for each in next(iter(parts.values()))) if self._batched else 1
        number = bisect.bisect_left(self._sizes, rows)
        if number == len(self._buckets):
            raise ValueError(f"a batch has {rows} rows and may have {self._sizes[-1]}")
        bucket = self._buckets[number if self._batched else 0]
        for name, tensors in parts.items():
            self._fill(name, bucket.inputs[name], tensors, rows)
        self._bucket, self._rows = bucket, rows

    def _fill(self, name: str, place: Tensor, parts: Sequence[Tensor], rows: int) -> None:
        found = sum(part.shape[0] for part in parts) if self._batched else len(parts) * rows
        if found != rows:
            raise ValueError(f"{name} has {found} rows beside other inputs with {rows}")
        start = 0
        for part in parts:
            count = part.shape[0] if self._batched else rows
            mine = self._piece(name, place, start, count) if self._batched else place
            if part.shape != mine.shape or part.dtype != mine.dtype:
                raise ValueError(
                    f"{name} is {part.dtype}{list(part.shape)} and should be "
                    f"{place.dtype}{list(mine.shape)}"
                )
            self._copy(mine, part)
            start += count

    def _piece(self, name: str, place: Tensor, start: int, rows: int) -> Tensor:
        """Some rows of a place. To cut them out anew takes longer than to copy them."""
        if rows == place.shape[0]:
            return place
        return self._single[name][start] if rows == 1 else place[start : start + rows]

    def run(self) -> dict[str, Tensor]:
        # Whichever graph they are of: what one uses in between may be where another's outputs lie.
        self._spare += [loan.recall(self._stream) for loan in self._loans]
        self._loans.clear()
        self._marked = False
        bucket = self._bucket
        bucket.graph.replay()
        if self._batched and self._rows < bucket.rows:
            return {name: each[: self._rows] for name, each in bucket.outputs.items()}
        return dict(bucket.outputs)

    def lend(self, tensors: Mapping[str, Tensor]) -> Loan | None:
        """Let another stream read outputs of the last run, or parts of them."""
        if not self._marked:
            self._marked = True
            self._written.record(self._stream)
        read = self._spare.pop() if self._spare else torch.cuda.Event()
        loan = Loan(tensors, self._written, read)
        self._loans.append(loan)
        return loan

    def _captured(self, rows: int) -> _Bucket:
        inputs = {
            name: place[:rows] if self._batched else place for name, place in self._places.items()
        }
        for _ in range(_WARM_RUNS):
            _try(self._program, inputs, rows)
        with _refusing_to_wait():
            self._program(inputs)
        graph = torch.cuda.CUDAGraph()
        outputs: dict[str, Tensor] = {}
        try:
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                # What other threads do meanwhile has nothing to do with what is captured here.
                capture_error_mode="thread_local",
            ):
                outputs = _apart(self._program(inputs), inputs)
        except BaseException:
            self._give_up(graph)
            raise
        return _Bucket(rows, graph, inputs, outputs)

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """Tell torch's allocator that a capture has ended, which a failed one does not.

        Without this it would, as in any capture, postpone for ever what has to wait for an event:
        tensors that two streams have used would never be freed.
        """
        device = self._program.device
        with contextlib.suppress(RuntimeError):  # it knows already
            torch._C._cuda_endAllocateToPool(device.index or 0, self._pool)
        _failed.append(graph)

    def _check(self) -> None:
        """Compare with calls of the program. Raises NotCapturable where they differ."""
        ports = self._program.manifest.inputs
        below = 0
        for seed, bucket in enumerate(self._buckets):
            # As many rows of padding as there can be, and none.
            for rows in sorted({below + 1, bucket.rows}):
                given = {
                    port.name: example(port, rows, seed).to(self._program.device) for port in ports
                }
                expected = self._program(given)
                self.take({name: (tensor,) for name, tensor in given.items()})
                for name, found in self.run().items():
                    _compare(name, found, expected[name], self._program.dtypes)
            below = bucket.rows


Runner: TypeAlias = EagerRunner | GraphRunner


class NotCapturable(Exception):
    """A program that must be called; the message says why."""


# Of the whole process, like the allocator that may still point to them.
_failed: list[torch.cuda.CUDAGraph] = []


def prepare(program: Program, largest: int, *, graphs: bool = True) -> Runner:
    """Warm a program up for batches of up to `largest` rows, on the current stream.

    On a GPU and with `graphs`, it is replayed from CUDA graphs unless that fails or gives other
    numbers than a call of the program: then the runner's `reason` says why.
    """
    if program.device.type != "cuda":
        _warm(program, 1)
        return EagerRunner(program)
    reason = "cuda_graph is off"
    with _preparing:
        if graphs:
            try:
                runner = GraphRunner(program, largest)
                # Graphs have memory of their own: what it took to warm up and to compare is of no
                # use to them, and none to other streams while it is kept for this one.
                torch.cuda.empty_cache()
                return runner
            except NotCapturable as error:
                reason = str(error)
            except Exception as error:  # noqa: BLE001 - what is wrong shows when it is called
                reason = f"it cannot be captured: {type(error).__name__}: {first_line(error)}"
            torch.cuda.synchronize(program.device)
            torch.cuda.empty_cache()
        for rows in sorted({1, largest}):
            _warm(program, rows)
        torch.cuda.synchronize(program.device)
    return EagerRunner(program, reason)


def _warm(program: Program, rows: int) -> None:
    """Compute on zeros, so that no request pays for what is done only once."""
    inputs = {
        port.name: torch.zeros(
            port.sized(rows), dtype=getattr(torch, port.dtype), device=program.device
        )
        for port in program.manifest.inputs
    }
    _try(program, inputs, rows)


def _try(program: Program, inputs: Mapping[str, Tensor], rows: int) -> None:
    outputs = program(inputs)
    for port in program.manifest.outputs:
        found = outputs[port.name]
        if tuple(found.shape) != port.sized(rows) or found.dtype != getattr(torch, port.dtype):
            raise BlockFailed(
                f"it gives {port.name} as {found.dtype} {list(found.shape)}; its manifest says "
                f"{port.dtype} {list(port.shape)}"
            )


@contextlib.contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Raise where the host would wait for the GPU, which cannot be captured.

    To find that out by a failed capture is possible, but leaves torch in disorder.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # That the mode is a prototype: what it does not notice, the capture will.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _apart(outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs that do not lie in the inputs, which are written before the outputs were read."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    return {
        name: tensor.clone() if tensor.untyped_storage().data_ptr() in taken else tensor
        for name, tensor in outputs.items()
    }


def _compare(
    name: str, found: Tensor, expected: Tensor, computed_in: Collection[torch.dtype]
) -> None:
    if not agree(found, expected, computed_in):
        raise NotCapturable(
            f"replayed, {name} is another than when it is called: the model draws random numbers, "
            "or the rows of a batch depend on each other"
        )
