"""ResNet-50 in four blocks beside the whole network: latency and throughput of the block runtime.

    python benchmarks/runtime.py --device cuda:0 --precision tf32 --json runtime-cuda.json
    python benchmarks/runtime.py --device cpu --rounds 6 --json runtime-cpu.json
    python benchmarks/runtime.py --device cuda:0 --quick

Variants, which take turns in every round:

    called               the whole network, called in this process
    replayed             the same from one CUDA graph: what the other figures are compared with
    four replayed        the four blocks in this process, each from its graph on its own stream,
                         handed over as blocks of one worker do it, but by one thread
    fused, replayed      the four blocks in this process, run in one go from one graph
    worker: one block    the whole network as the only block of a worker
    worker: four blocks  the four blocks in one worker
    worker: fused        the four blocks in one worker, run in one go
    four workers         each of the four blocks in a worker of its own
    ..., called          on a GPU the last three without graphs, to be compared with `called`

In those of this process, time is from having the input on the device to having the output there.
In the others this process stands where the gateway does: it sends tensors of its device through
TensorMQ, and time is from the beginning of the send to having the answer on its own device, ready,
as with those of this process; its slot is given back afterwards. Nothing is batched (max_batch 1).
On a GPU, its work is waited for before and after each request; the clock is the host's. Every
answer of a latency round is compared with the called network's.

The four blocks are balanced by modelled costs on a CPU, by measured ones on a GPU (balanced.py).

A line on stderr says what is being done. What was measured so far is printed and written, too, when
it is interrupted (Ctrl-C, SIGTERM) or fails.

To measure under MPS, start its daemon first, and give both the same private directory:

    export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
    nvidia-cuda-mps-control -d
    python benchmarks/runtime.py --device cuda:0 --precision tf32
    echo quit | nvidia-cuda-mps-control
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import measured
import torch
from balanced import Blocks, blocks_of, one_row
from rich.console import Console
from rich.table import Table
from torch import Tensor

from blockflow import environment, protocol
from blockflow.artifact import Store
from blockflow.export import example
from blockflow.program import Chain, Program, load
from blockflow.protocol import RouteId
from blockflow.reconcile import BlockSpec
from blockflow.routing import lay_route
from blockflow.runner import Runner, prepare
from blockflow.supervisor import Child, Supervisor
from blockflow.topology import BlockName, Pipeline, PipelineName
from blockflow.wiring import by_rule, wire
from tensormq import Loop, Message, Peer, Pull, Push, Request, slot_size

_T = TypeVar("_T")

Answer: TypeAlias = tuple[Tensor, Callable[[], None]]
"""An output on the device, and what is to be called when nobody needs it any more."""

_THOROUGH = {"rounds": 20, "requests": 20, "seconds": 1.0, "under_way": [1, 4, 8]}
_QUICK = {"rounds": 8, "requests": 10, "seconds": 0.5, "under_way": [1, 8]}
_CALLED = ", called"
_WARM = 20
_TIMEOUT = 60.0


class Direct:
    """Blocks of this process in one thread, handed over as blocks of one worker do it."""

    concurrent = False

    def __init__(self, name: str, programs: Sequence[Program], *, graphs: bool) -> None:
        self.name = name
        self._device = programs[0].device
        self._streams: list[torch.cuda.Stream | None] = []
        self._runners: list[Runner] = []
        for program in programs:
            stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
            with _on(stream):
                self._runners.append(prepare(program, 1, graphs=graphs))
            self._streams.append(stream)
        manifests = [program.manifest for program in programs]
        self._wirings = [{port.name: port.name for port in manifests[0].inputs}]
        self._wirings += [
            by_rule(before.outputs, after.inputs) for before, after in itertools.pairwise(manifests)
        ]
        self.kinds = tuple(f"{runner.kind} ({runner.reason})" for runner in self._runners)

    def ask(self, x: Tensor) -> Answer:
        output = self._launch(x)
        _wait(self._streams[-1])
        return output, _nothing

    def _launch(self, x: Tensor) -> Tensor:
        loan = None
        tensors: Mapping[str, Tensor] = {next(iter(self._wirings[0])): x}
        for runner, stream, wires in zip(self._runners, self._streams, self._wirings, strict=True):
            with _on(stream):
                parts = {mine: [tensors[theirs]] for mine, theirs in wires.items()}
                reading = loan.reading(stream) if loan and stream else contextlib.nullcontext()
                with reading:
                    runner.take(parts)
                if loan is not None:
                    loan.end()
                tensors = runner.run()
                loan = runner.lend(tensors) if runner is not self._runners[-1] else None
                if loan is not None:
                    tensors = loan.tensors.copy()
        return next(iter(tensors.values()))

    def throughput(self, x: Tensor, seconds: float, under_way: int) -> float:
        """Answers a second, with the host at most `under_way` requests ahead of the device."""
        events: list[torch.cuda.Event] = []
        done, end, start = 0, time.monotonic() + seconds, time.monotonic()
        stream = self._streams[-1]
        while time.monotonic() < end:
            self._launch(x)
            done += 1
            if stream is not None:
                events.append(stream.record_event())
                if len(events) >= under_way:
                    events.pop(0).synchronize()
        _wait(stream)
        return done / (time.monotonic() - start)

    def close(self) -> None: ...


class Deployed:
    """Blocks in workers; this process stands where the gateway does."""

    concurrent = True

    def __init__(
        self,
        name: str,
        workers: Sequence[Sequence[int]],
        blocks: Blocks,
        options: argparse.Namespace,
        control: Control,
        number: int,
        *,
        fuse: bool = False,
        graphs: bool = True,
    ) -> None:
        self.name = name
        self._device = options.device
        self._gpu = options.device.startswith("cuda")
        self._control = control
        run_dir = control.run_dir
        specs = [
            BlockSpec(
                name=BlockName(block),
                digest=manifest.digest,
                device=options.device,
                max_batch=1,
                precision=options.precision,
                channels_last=options.channels_last,
                cuda_graph=graphs,
            )
            for block, manifest in zip(blocks.names, blocks.manifests, strict=True)
        ]
        endpoints = [f"ipc://{run_dir}/{number}.{index}.sock" for index in range(len(specs))]
        loads = [
            protocol.Load(
                str(blocks.store.root),
                tuple(specs[index] for index in members),
                tuple(endpoints[index] for index in members),
                (tuple(specs[index].name for index in members),) if fuse else (),
            )
            for members in workers
        ]
        self._children = control.start(name, loads)
        manifests = blocks.manifests
        known = {spec.name: manifest for spec, manifest in zip(specs, manifests, strict=True)}
        wired, problems = wire(Pipeline(blocks=tuple(known)), known.get)
        if wired is None:
            raise RuntimeError(f"{name}: {'; '.join(problems)}")
        self._route = lay_route(
            RouteId(number),
            PipelineName(name.replace(" ", "-")),
            wired,
            {spec.name: spec for spec in specs},
            {spec.digest: manifest for spec, manifest in zip(specs, manifests, strict=True)},
            {spec.name: endpoint for spec, endpoint in zip(specs, endpoints, strict=True)},
            [chain for load_ in loads for chain in load_.chains],
            f"ipc://{run_dir}/{number}.results.sock",
        )
        self._input = manifests[0].inputs[0]
        self._loop = Loop()
        self._pull = Pull(self._route.results, device=options.device, loop=self._loop)
        self._push = Push(
            slots=max(options.under_way),
            slot_bytes=slot_size({"x": (self._input.dtype, self._input.sized(1))}),
            device=options.device,
            loop=self._loop,
        )
        control.command(self._children, protocol.Connect((self._route,)), self._loop)
        self._peer: Peer = self._push.connect(endpoints[0], timeout=_TIMEOUT)
        self.kinds: tuple[str, ...] = ()

    def ask(self, x: Tensor) -> Answer:
        self._send(x)
        message = self._receive()
        return next(iter(message.tensors.values())), message.release

    def _send(self, x: Tensor) -> None:
        self._push.send(
            {self._input.name: x},
            to=self._peer,
            requests=(Request(1, 1, 0.0),),
            route=self._route.id,
        )

    def _receive(self) -> Message:
        message = self._pull.recv(_TIMEOUT)
        if not message.tensors:
            raise RuntimeError(f"{self.name}: {protocol.decode_note(message.note).error}")
        if self._gpu:
            torch.cuda.current_stream(self._device).synchronize()
        return message

    def throughput(self, x: Tensor, seconds: float, under_way: int) -> float:
        """Answers a second with so many requests under way."""
        for _ in range(under_way):
            self._send(x)
        start, done = time.monotonic(), 0
        while time.monotonic() < start + seconds:
            self._receive().release()
            done += 1
            self._send(x)
        passed = time.monotonic() - start
        for _ in range(under_way):
            self._receive().release()
        return done / passed

    def close(self) -> None:
        self.kinds = tuple(
            f"{block.block}: {block.runner} ({block.runner_reason})"
            for child in self._children
            if isinstance(child.report, protocol.WorkerReport)
            for block in child.report.blocks
        )
        self._push.close()
        self._control.stop(self._children, self._loop)
        self._pull.close()
        self._loop.close()


class Control:
    """A supervisor on a thread of its own: while it connects workers, tensors must move here."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever)
        self._thread.start()
        self._supervisor = self._do(self._make())

    async def _make(self) -> Supervisor:
        logs = self.run_dir / "logs"
        logs.mkdir()
        return Supervisor(self.run_dir, logs, "warning")

    def _do(self, work: Coroutine[Any, Any, _T], loop: Loop | None = None) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._events)
        while loop is not None and not future.done():
            loop.run_once(0.01)
        return future.result()

    def start(self, name: str, loads: Sequence[protocol.Load]) -> list[Child]:
        """Start a worker for each of `loads`, side by side."""

        async def begin(place: int, load_: protocol.Load) -> Child:
            child = await self._supervisor.spawn(
                f"{name} {place}",
                "blockflow.worker",
                self._supervisor.next_incarnation(),
                ["--name", f"{name} {place}"],
                seconds=120,
            )
            await child.command(load_, 120)
            return child

        async def begin_all() -> list[Child]:
            return await asyncio.gather(*(begin(*each) for each in enumerate(loads)))

        return self._do(begin_all())

    def command(self, children: Sequence[Child], body: protocol.Body, loop: Loop) -> None:
        async def tell_all() -> None:
            await asyncio.gather(*(child.command(body) for child in children))

        self._do(tell_all(), loop)

    def stop(self, children: Sequence[Child], loop: Loop) -> None:
        async def stop_all() -> None:
            await asyncio.gather(*(child.stop(10) for child in children))

        self._do(stop_all(), loop)

    def close(self) -> None:
        self._do(self._supervisor.close())
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join()
        self._events.close()


def main() -> None:
    measured.start_as_served()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "tf32", "fp16", "bf16"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--store", type=Path, help="where blocks are kept for the next time")
    parser.add_argument("--rounds", type=int, help="in which all variants take turns (20)")
    parser.add_argument("--requests", type=int, help="of one variant in a round (20)")
    parser.add_argument("--seconds", type=float, help="of one measure of throughput (1)")
    parser.add_argument(
        "--under-way",
        type=lambda text: [int(part) for part in text.split(",")],
        help="requests at once (1,4,8)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="8 rounds of 10 requests, half a second, 1 and 8 at once, unless said otherwise",
    )
    parser.add_argument(
        "--only", help="these variants, beside `called`: replayed;worker: fused;four workers"
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    for name, value in (_QUICK if options.quick else _THOROUGH).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    # As Ctrl-C does it: what was measured so far is not lost.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found = Measured()
    try:
        with tempfile.TemporaryDirectory(prefix="runtime-") as folder:
            _measure(options, Path(folder), found)
    except BaseException as error:
        _report(options, found, f"{type(error).__name__}: {error}")
        raise
    _report(options, found, None)


def _report(options: argparse.Namespace, found: Measured, interrupted: str | None) -> None:
    results = found.results()
    if not results:
        return
    where = measured.conditions(options.device)
    where["threads"] = torch.get_num_threads()
    names = "OMP_NUM_THREADS", *environment.serving(), "CUDA_MPS_PIPE_DIRECTORY"
    where["environment"] = {name: os.environ.get(name) for name in names}
    _print(where, options, results)
    measured.write(
        options.json,
        {
            "conditions": where,
            "options": {
                name: str(value)
                for name, value in vars(options).items()
                if name not in {"json", "store"}
            },
            "split": found.split,
            "unit": "ms, answers per second",
            "interrupted": interrupted,
            "results": results,
        },
    )


def _say(phase: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {phase}", file=sys.stderr, flush=True)


def _measure(options: argparse.Namespace, folder: Path, found: Measured) -> None:
    torch.backends.cudnn.benchmark = False
    store = Store(options.store or folder / "store", create=True)
    _say(f"splitting {options.model}")
    whole = blocks_of(options.model, 1, store, None)
    four = blocks_of(options.model, 4, store, one_row(options.device, options.precision))
    found.split = four.told()
    settings = {"precision": options.precision, "channels_last": options.channels_last}

    def programs(split: Blocks) -> list[Program]:
        return [load(store, digest, options.device, **settings) for digest in split.digests]

    x = example(whole.manifests[0].inputs[0], 1, seed=1).to(options.device)
    gpu = options.device.startswith("cuda")
    control = Control(folder)
    makers: list[tuple[str, Callable[[str], Direct | Deployed]]] = [
        ("called", lambda name: Direct(name, programs(whole), graphs=False)),
    ]
    if gpu:
        makers += [
            ("replayed", lambda name: Direct(name, programs(whole), graphs=True)),
            ("four replayed", lambda name: Direct(name, programs(four), graphs=True)),
            ("fused, replayed", lambda name: Direct(name, [Chain(programs(four))], graphs=True)),
        ]
    deployed = [
        ("worker: one block", [[0]], whole),
        ("worker: four blocks", [[0, 1, 2, 3]], four),
        ("worker: fused", [[0, 1, 2, 3]], four),
        ("four workers", [[0], [1], [2], [3]], four),
    ]
    if gpu:
        deployed += [(name + _CALLED, *rest) for name, *rest in deployed[1:]]
    for number, (name, workers, split) in enumerate(deployed):
        makers.append(
            (
                name,
                lambda name, workers=workers, split=split, number=number: Deployed(
                    name,
                    workers,
                    split,
                    options,
                    control,
                    number,
                    fuse="fused" in name,
                    graphs=not name.endswith(_CALLED),
                ),
            )
        )
    with contextlib.ExitStack() as stack:
        stack.callback(control.close)
        variants: list[Direct | Deployed] = []
        for name, make in makers:
            if name == "called" or not options.only or name in options.only.split(";"):
                _say(f"getting {name} ready")
                variants.append(make(name))
                stack.callback(variants[-1].close)
        found.variants = variants
        expected, _ = variants[0].ask(x)
        bound = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}[options.precision]
        _latencies(variants, x, expected, bound, options, found.latencies)
        _throughputs(variants, x, options, found.throughputs)


class Measured:
    """What is known so far, by variant."""

    def __init__(self) -> None:
        self.split: dict[str, Any] = {}
        self.variants: Sequence[Direct | Deployed] = ()
        self.latencies: dict[str, list[float]] = {}
        self.throughputs: dict[str, dict[str, list[float]]] = {}

    def results(self) -> dict[str, Any]:
        return {
            each.name: {
                "latency": measured.percentiles(self.latencies[each.name]),
                "samples": self.latencies[each.name],
                "throughput": self.throughputs.get(each.name, {}),
                "runners": each.kinds,
            }
            for each in self.variants
            if self.latencies.get(each.name)
        }


def _latencies(
    variants: Sequence[Direct | Deployed],
    x: Tensor,
    expected: Tensor,
    bound: float,
    options: argparse.Namespace,
    times: dict[str, list[float]],
) -> None:
    """Milliseconds of every request, one at a time."""
    largest = float(expected.abs().max())
    _say("warming up")
    for variant in variants:
        times[variant.name] = []
        for _ in range(_WARM if options.device != "cpu" else 3):
            _, done = variant.ask(x)
            done()
    for number in range(options.rounds):
        _say(f"latency, round {number + 1} of {options.rounds}")
        # Another order in every round: nobody always follows the same neighbour.
        for variant in variants[number % len(variants) :] + variants[: number % len(variants)]:
            for _ in range(options.requests):
                if options.device != "cpu":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                found, done = variant.ask(x)
                times[variant.name].append((time.perf_counter() - start) * 1e3)
                difference = float((found - expected).abs().max())
                done()
                assert difference <= bound * largest, f"{variant.name}: off by {difference}"


def _throughputs(
    variants: Sequence[Direct | Deployed],
    x: Tensor,
    options: argparse.Namespace,
    rates: dict[str, dict[str, list[float]]],
) -> None:
    """Answers a second by how many requests are under way, three times each, in turns."""
    for under_way in options.under_way:
        for turn in range(3):
            _say(f"throughput, {under_way} at once, turn {turn + 1} of 3")
            for variant in variants:
                rate = variant.throughput(x, options.seconds, under_way)
                mine = rates.setdefault(variant.name, {}).setdefault(str(under_way), [])
                mine.append(rate)


def _nothing() -> None:
    """The output of a network of this process lies in memory of its own."""


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
        yield


def _wait(stream: torch.cuda.Stream | None) -> None:
    if stream is not None:
        stream.synchronize()


def _print(
    where: Mapping[str, Any], options: argparse.Namespace, results: Mapping[str, Any]
) -> None:
    console = Console(width=140)
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    called = next(iter(results.values()))
    table = Table(title=f"{options.model}, one row, {options.precision}", box=None)
    table.add_column("variant")
    for title in ("p50 ms", "p95", "p99", "p50 against monolith"):
        table.add_column(title, justify="right")
    for under_way in options.under_way:
        table.add_column(f"{under_way} at once /s", justify="right")
    for name, found in results.items():
        latency = found["latency"]
        base = called if name.endswith(_CALLED) else results.get("replayed", called)
        table.add_row(
            name,
            *(f"{latency[key]:.3f}" for key in ("p50", "p95", "p99")),
            f"{latency['p50'] / base['latency']['p50']:.3f}",
            *(
                f"{_median(rates):.3g} ({_median(rates) / _median(base['throughput'][key]):.2f})"
                for key, rates in found["throughput"].items()
                if key in base["throughput"]
            ),
        )
    console.print(table)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()
