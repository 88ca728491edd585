"""The demo: `blockflow demo` does BlockFlow's main job on real data and checks every answer.

Three networks that share a trained trunk become four blocks and serve three tasks at once from
two worker processes. Then the same server, while it runs, gets ResNet-50 as four more blocks in
four more processes. Every answer is compared with that of the whole network, called directly.

All of it runs on the CPU. It needs scikit-learn for its handwritten digits, and no internet.
Whatever it writes is in one temporary directory, which is gone afterwards, as are its processes.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from blockflow.artifact import Port, Store
from blockflow.client import ControlClient, InferenceClient
from blockflow.errors import BlockFlowError, StartFailed, Unavailable
from blockflow.models import ModuleSource, resolve
from blockflow.split import (
    SplitResult,
    StoredBlock,
    export,
    shared_prefix,
    split_at,
    split_model,
    store_blocks,
    topology_for,
)
from blockflow.status import ApplyResult, BlockStatus
from blockflow.topology import Topology, dump, parse

Array = NDArray[Any]

SEED = 0

SINGLES = 8
"""Images of each task that go in a request of their own; the others go `ROWS` at a time."""
ROWS = 32

RESNET = "resnet50"
RESNET_BLOCKS = 4
ROUNDS = 15
"""Requests to ResNet-50 whose latency is measured, each beside a call of the whole network."""
WARM_UP = 2
"""Rounds before those, which bring both sides to speed."""

TOLERANCE = 1e-4
"""Largest accepted difference to the whole network, relative to its largest output. None is
expected where both run the same kernels, but a process with another number of threads may sum in
another order."""

_READY_SECONDS = 120.0
_STOP_SECONDS = 5.0
_COUNTS_SECONDS = 10.0
_LAST_LINES = 15


def run() -> None:
    """Run the whole demo and print what it finds; it takes about a minute on two cores.

    Must be called from the main thread, whose SIGTERM it turns into an orderly end. Raises
    BlockFlowError when something fails or an answer is wrong, with the last lines of the server.
    """
    began = time.monotonic()
    console = Console(highlight=False)
    with _orderly_sigterm():
        # Sockets lie in here, whose paths may have a hundred characters: the prefix is short.
        home = Path(tempfile.mkdtemp(prefix="bf-"))
        try:
            _run_in(home, console)
        finally:
            shutil.rmtree(home)
    seconds = time.monotonic() - began
    console.print(f"Removed {escape(str(home))}. [bold]All checks passed[/] in {seconds:.0f} s.")


def _run_in(home: Path, console: Console) -> None:
    store = Store(home / "store", create=True)

    _print_heading(console, "Three tasks on one trunk")
    digits = load_digits()
    with _working(
        console,
        f"Training on {len(digits.train)} images of handwritten digits; "
        f"{len(digits.held_out)} are held out",
    ):
        models = train(digits)
    with _working(console, "Exporting three networks and looking for what they share"):
        split = split_where_they_differ(models, store)
    console.print(
        f"All three compute the same up to `{split.trunk.manifest.origin.last}`: "
        f"{len(store.digests())} blocks are stored, not {2 * len(models)}."
    )

    topology = digits_topology(split)
    with (
        _serving(home, topology, console) as server,
        InferenceClient(server.inference) as inference,
        ControlClient(server.control) as control,
    ):
        _print_processes(console, server, control)
        with _working(console, "Asking all three tasks at the same time"):
            answers = ask_at_once(inference, digits)
            each = len(requests_of(digits))
            blocks = _blocks_after(control, _counts_of(topology, dict.fromkeys(models, each)))
        scores = [score(task, models[task.name], digits, answers[task.name]) for task in TASKS]
        _print_digits(console, scores, split, blocks)

        _print_heading(console, "ResNet-50 with random weights in four processes")
        with _working(console, "Splitting ResNet-50") as say:
            source = resolve(RESNET, seed=SEED)
            assert isinstance(source, ModuleSource)
            resnet = split_model(source, RESNET_BLOCKS, store, progress=say)
        with _working(console, "Adding it to the server, which goes on serving the digits"):
            _add(control, topology, resnet)
        _print_processes(console, server, control)
        with _working(console, f"Comparing it with the whole network, {ROUNDS} rounds"):
            comparison = compare_resnet(inference, control, source.module, resnet)
        _print_resnet(console, comparison)

        if comparison.blocks["trunk"].pid != blocks["trunk"].pid:
            raise BlockFlowError("the shared trunk was restarted by an update that kept it")
        again = inference.infer("digit", {"image": requests_of(digits)[0]})["output"]
        # Not to the last bit: the first time, images of other tasks were in the same batch.
        if not np.allclose(again, answers["digit"][: len(again)], atol=TOLERANCE):
            raise BlockFlowError("the update changed an answer of the pipeline `digit`")
        console.print(
            f"The trunk still is process {blocks['trunk'].pid}, and `digit` answers as before."
        )

        console.print()
        with _working(console, "Stopping the server with SIGINT"):
            stopped = server.stop()
    console.print(f"It ended in {stopped.seconds:.1f} s with all of its {stopped.count} processes.")


# ------------------------------------------------------------------------------ data and training


@dataclass(frozen=True)
class Task:
    """A question about a digit: `label` maps digits (int64, 0 to 9) to classes from 0."""

    name: str
    question: str
    classes: int
    label: Callable[[Tensor], Tensor]


TASKS = (
    Task("digit", "which digit", 10, lambda digit: digit),
    Task("parity", "odd or even", 2, lambda digit: digit % 2),
    Task("half", "at least five", 2, lambda digit: (digit >= 5).long()),
)


@dataclass(frozen=True)
class Digits:
    """Images are float32 [n, 1, 8, 8] from 0 to 1, digits int64 [n]."""

    train: Tensor
    train_digits: Tensor
    held_out: Tensor
    held_out_digits: Tensor


def load_digits() -> Digits:
    """scikit-learn's 1797 handwritten digits, a fifth of them held out.

    The split is the same every time. Raises BlockFlowError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load  # noqa: PLC0415  an optional dependency
        from sklearn.model_selection import train_test_split  # noqa: PLC0415
    except ImportError as error:
        raise BlockFlowError(
            "the demo takes its images from scikit-learn: pip install 'blockflow[demo]'"
        ) from error
    bundle = load()
    images = torch.tensor(bundle.images / 16, dtype=torch.float32).unsqueeze(1)
    digits = torch.tensor(bundle.target, dtype=torch.int64)
    train, held_out = train_test_split(
        np.arange(len(images)), test_size=0.2, random_state=SEED, stratify=bundle.target
    )
    return Digits(images[train], digits[train], images[held_out], digits[held_out])


class Classifier(nn.Module):
    """A trunk and a head: images to logits, float32 [batch, classes]."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(image))
        return logits


FEATURES = 256


def _trunk() -> nn.Module:
    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *stage(1, 32),
        *stage(32, 64),
        nn.MaxPool2d(2),
        *stage(64, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )


def _head(classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, classes))


def train(digits: Digits) -> dict[str, Classifier]:
    """Train a trunk on the first task, freeze it, and train a head on it for every task.

    The networks are in eval mode, by name of the task, and hold the same trunk.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        trunk = _trunk()
        first = TASKS[0]
        _fit(
            Classifier(trunk, _head(first.classes)),
            digits.train,
            first.label(digits.train_digits),
            epochs=10,
        )
        trunk.eval().requires_grad_(False)
        features = trunk(digits.train)
        models = {}
        for task in TASKS:
            head = _head(task.classes)
            _fit(head, features, task.label(digits.train_digits), epochs=20)
            models[task.name] = Classifier(trunk, head).eval()
    return models


def _fit(module: nn.Module, inputs: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    module.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(inputs[rows]), labels[rows]).backward()
            optimizer.step()


# ---------------------------------------------------------------------- from networks to topology


@dataclass(frozen=True)
class SharedSplit:
    """The blocks of networks with one trunk; heads are by name of the task."""

    trunk: StoredBlock
    heads: Mapping[str, StoredBlock]

    @property
    def bytes_shared(self) -> int:
        """Bytes of weights in the blocks, the trunk's counted once."""
        return _weights(self.trunk) + sum(map(_weights, self.heads.values()))

    @property
    def bytes_alone(self) -> int:
        """Bytes of weights of the networks, each with a trunk of its own."""
        return sum(_weights(self.trunk) + _weights(head) for head in self.heads.values())


def _weights(block: StoredBlock) -> int:
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


def _add(control: ControlClient, serving: Topology, result: SplitResult) -> None:
    """Add a split model to the topology that serves. Raises unless nothing else changes."""
    added = topology_for(result, result.model)
    wanted = serving.model_copy(
        update={
            "blocks": {**serving.blocks, **added.blocks},
            "pipelines": {**serving.pipelines, **added.pipelines},
        }
    )
    applied = ApplyResult.model_validate(control.put_topology(wanted.model_dump(mode="json")))
    if applied.stop or sorted(applied.start) != sorted(added.blocks):
        raise BlockFlowError(
            f"an update that adds {result.model} started {', '.join(applied.start) or 'nothing'} "
            f"and stopped {', '.join(applied.stop) or 'nothing'}"
        )


# ----------------------------------------------------------------------------------------- server


@dataclass(frozen=True)
class Stopped:
    """How a server ended: after how long, and how many processes went with it."""

    seconds: float
    count: int


class _Server:
    """`blockflow serve` in a process of its own, with everything that it started."""

    def __init__(self, home: Path, topology: Topology) -> None:
        file = home / "topology.yaml"
        file.write_text(dump(topology), encoding="utf-8")
        control, inference = _free_ports(2)
        self.control = f"http://127.0.0.1:{control}"
        self.inference = f"http://127.0.0.1:{inference}"
        self._run_dir = home / "run"
        self._log = home / "server.log"
        with self._log.open("wb") as output:
            # In this process's group: Ctrl-C in a terminal reaches the server as well.
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "blockflow", "serve"),
                    *("--topology", str(file)),
                    *("--store", str(home / "store")),
                    *("--port", str(control)),
                    *("--http-port", str(inference)),
                    *("--run-dir", str(self._run_dir)),
                    *("--state-dir", str(home / "state")),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Raises StartFailed."""
        end = time.monotonic() + _READY_SECONDS
        with ControlClient(self.control, timeout=5) as control:
            while time.monotonic() < end:
                if self._process.poll() is not None:
                    raise StartFailed(f"the server ended with status {self._process.returncode}")
                with contextlib.suppress(Unavailable):  # nobody listens yet
                    if control.ready():
                        return
                time.sleep(0.05)
        raise StartFailed(f"the server was not ready within {_READY_SECONDS:g} s")

    def children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def stop(self) -> Stopped:
        """Stop it as Ctrl-C does. Raises BlockFlowError if it leaves anything behind."""
        children = self.children()
        began = time.monotonic()
        self._process.send_signal(signal.SIGINT)
        try:
            status = self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise BlockFlowError(
                f"the server did not end within {_STOP_SECONDS:g} s of SIGINT"
            ) from None
        seconds = time.monotonic() - began
        _, left = psutil.wait_procs(children, timeout=max(0.0, _STOP_SECONDS - seconds))
        if left:
            names = ", ".join(_describe(process) for process in left)
            _kill(left)
            raise BlockFlowError(f"the server left processes behind: {names}")
        if status != 0:
            raise BlockFlowError(f"the server ended with status {status} after SIGINT")
        if self._run_dir.exists():
            raise BlockFlowError(f"the server left its run directory {self._run_dir} behind")
        return Stopped(seconds, len(children) + 1)

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return "\n".join(["the server's last lines:", *(f"  {line}" for line in lines)])

    def kill(self) -> None:
        """Make sure that nothing is left of it, politely if it lets us."""
        children = self.children()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
            self._process.kill()
            self._process.wait()
        _kill(children)


@contextlib.contextmanager
def _serving(home: Path, topology: Topology, console: Console) -> Iterator[_Server]:
    """A server that is ready; what goes wrong while it runs is told with its last words."""
    server = _Server(home, topology)
    try:
        with _working(console, "Starting the server"):
            server.wait_until_ready()
        yield server
    except Exception as error:
        what = str(error)
        if not isinstance(error, BlockFlowError):
            what = f"{type(error).__name__}: {what}"
        raise BlockFlowError(f"{what}\n{server.last_words()}") from error
    finally:
        server.kill()


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 where nobody listens now; all are held until all are chosen."""
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [each.getsockname()[1] for each in sockets]


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # psutil does not kill another process that got the same pid
    psutil.wait_procs(processes, timeout=_STOP_SECONDS)


def _describe(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{process.pid} ({' '.join(process.cmdline()[1:4])})"
    return str(process.pid)


@contextlib.contextmanager
def _orderly_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that the server is stopped as well."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _blocks(control: ControlClient) -> dict[str, BlockStatus]:
    statuses = [BlockStatus.model_validate(each) for each in control.blocks()]
    return {each.name: each for each in statuses}


Counts = Mapping[str, Mapping[str, int]]
"""Requests by block and pipeline."""


def _counts_of(topology: Topology, requests: Mapping[str, int]) -> Counts:
    """What the blocks will have counted after so many requests to each pipeline."""
    counts: dict[str, dict[str, int]] = {}
    for pipeline, count in requests.items():
        for block in topology.pipelines[pipeline].members:
            counts.setdefault(block, {})[pipeline] = count
    return counts


def _blocks_after(control: ControlClient, expected: Counts) -> dict[str, BlockStatus]:
    """Every block, once those of `expected` report these counts: workers report twice a second.

    Raises BlockFlowError if they do not.
    """
    end = time.monotonic() + _COUNTS_SECONDS
    while True:
        blocks = _blocks(control)
        wrong = [name for name in expected if blocks[name].requests_by_pipeline != expected[name]]
        if not wrong:
            return blocks
        if time.monotonic() > end:
            raise BlockFlowError(
                f"block {wrong[0]} counted the requests {blocks[wrong[0]].requests_by_pipeline}, "
                f"and {dict(expected[wrong[0]])} were answered"
            )
        time.sleep(0.1)


# ---------------------------------------------------------------------------- asking and comparing


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
    expected = np.concatenate([_call(model, part) for part in requests_of(digits)])
    difference = _difference(task.name, answer, expected)
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


@dataclass(frozen=True)
class Measured:
    """Requests of `rows` images through the blocks beside calls of the whole network.

    Latencies are medians in milliseconds, on this process's clock: `served_ms` from the client's
    call to its return, `alone_ms` of the network called in this process, where the threads of
    torch may spin between operators. The workers' threads sleep then, as they share the cores.
    """

    rows: int
    difference: float
    served_ms: float
    alone_ms: float


@dataclass(frozen=True)
class Comparison:
    """What `compare_resnet` found.

    `compute_ms` is the mean time that a block computes, by name, in the rounds of one row, on the
    worker's clock. `blocks` are all blocks of the server, after the last round.
    """

    result: SplitResult
    measured: Sequence[Measured]
    compute_ms: Mapping[str, float]
    blocks: Mapping[str, BlockStatus]


def compare_resnet(
    client: InferenceClient, control: ControlClient, model: nn.Module, result: SplitResult
) -> Comparison:
    """Compare and time a served ResNet and the whole one. Raises BlockFlowError if they differ."""
    topology = topology_for(result, result.model)
    asked = 0

    def rounds(rows: int, count: int) -> Measured:
        nonlocal asked
        asked += count
        return _measure(client, result.model, model, rows, count)

    def blocks() -> dict[str, BlockStatus]:
        return _blocks_after(control, _counts_of(topology, {result.model: asked}))

    for rows in (1, 2):
        rounds(rows, WARM_UP)
    before = blocks()
    one = rounds(1, ROUNDS)
    after = blocks()
    two = rounds(2, ROUNDS)
    means = {name: _mean_compute_ms(before[name], after[name]) for name in topology.blocks}
    return Comparison(result, (one, two), means, blocks())


def _measure(
    client: InferenceClient, pipeline: str, model: nn.Module, rows: int, rounds: int
) -> Measured:
    generator = np.random.default_rng(SEED)
    differences, served, alone = [], [], []
    for _ in range(rounds):
        # One after the other, so that whatever else the machine does falls on both.
        images = generator.standard_normal((rows, 3, 224, 224), dtype=np.float32)
        start = time.perf_counter()
        answer = client.infer(pipeline, {"x": images})["output"]
        between = time.perf_counter()
        expected = _call(model, images)
        end = time.perf_counter()
        differences.append(_difference(pipeline, answer, expected))
        served.append((between - start) * 1e3)
        alone.append((end - between) * 1e3)
    return Measured(rows, max(differences), statistics.median(served), statistics.median(alone))


def _mean_compute_ms(before: BlockStatus, after: BlockStatus) -> float:
    """Mean compute time of the requests between, which came one by one: each was a computation."""
    total_before = (before.compute_ms_mean or 0.0) * before.requests
    total_after = (after.compute_ms_mean or 0.0) * after.requests
    return (total_after - total_before) / (after.requests - before.requests)


def _call(model: nn.Module, inputs: Array) -> Array:
    with torch.inference_mode():
        outputs: Array = model(torch.from_numpy(inputs)).numpy()
    return outputs


def _difference(pipeline: str, answer: Array, expected: Array) -> float:
    """The largest difference. Raises BlockFlowError if it is more than `TOLERANCE` allows."""
    if answer.shape != expected.shape:
        raise BlockFlowError(
            f"pipeline {pipeline} answered {answer.shape}, its network {expected.shape}"
        )
    difference = float(np.abs(answer - expected).max())
    allowed = TOLERANCE * float(np.abs(expected).max())
    if math.isnan(difference) or difference > allowed:
        raise BlockFlowError(
            f"pipeline {pipeline} differs from its network by {difference:.3g}; "
            f"{allowed:.3g} is allowed"
        )
    return difference


# ----------------------------------------------------------------------------------------- output


@contextlib.contextmanager
def _working(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """Say what is under way: a spinner on a terminal, a line elsewhere. Yields what adds detail."""
    if not console.is_terminal:
        console.print(f"{what} …", markup=False)
        yield lambda _: None
        return
    with console.status(f"{escape(what)} …") as status:
        yield lambda detail: status.update(f"{escape(what)}: {escape(detail)} …")


def _print_heading(console: Console, text: str) -> None:
    console.print()
    console.print(text, style="bold underline")


def _table(*columns: str, title: str | None = None) -> Table:
    """Columns marked `>` hold numbers."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in columns:
        table.add_column(
            column.lstrip(">"), justify="right" if column.startswith(">") else "left", no_wrap=True
        )
    return table


def _print_processes(console: Console, server: _Server, control: ControlClient) -> None:
    """Say which processes run. Raises BlockFlowError unless the server's children are the
    gateway and one worker for each that the topology names."""
    workers: dict[int | None, list[BlockStatus]] = {}
    for block in _blocks(control).values():
        workers.setdefault(block.pid, []).append(block)
    others = {process.pid for process in server.children()} - set(workers)
    if len(others) != 1 or None in workers:
        raise BlockFlowError(f"expected a gateway beside the workers, found {sorted(others)}")
    console.print(f"Processes: server {server.pid}, gateway {others.pop()}, workers")
    for pid, blocks in workers.items():
        names = ", ".join(block.name for block in blocks)
        console.print(f"  {pid}  {blocks[0].worker}" + (f": {names}" if len(blocks) > 1 else ""))


def _print_digits(
    console: Console,
    scores: Sequence[Score],
    split: SharedSplit,
    blocks: Mapping[str, BlockStatus],
) -> None:
    accuracy = _table(
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
    use = _table(
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
            _kilobytes(_weights(block)),
            *(str(status.requests_by_pipeline.get(each, "")) for each in pipelines),
            _milliseconds(status.compute_ms_mean),
        )
    console.print()
    console.print(accuracy)
    console.print("Requests that each block computed, by pipeline:")
    console.print(use)
    console.print(
        f"Weights: {_kilobytes(split.bytes_shared)} with one trunk, "
        f"{_kilobytes(split.bytes_alone)} without sharing."
    )


def _print_resnet(console: Console, comparison: Comparison) -> None:
    latency = _table(
        *(">images", ">largest difference", ">p50 served", ">p50 network alone"),
        title="Table 2. ResNet-50 in four blocks beside the whole network",
    )
    for each in comparison.measured:
        latency.add_row(
            str(each.rows),
            f"{each.difference:.1g}",
            _milliseconds(each.served_ms),
            _milliseconds(each.alone_ms),
        )
    use = _table("block", ">pid", ">weights", "sends by", ">mean compute")
    for stored in comparison.result.blocks:
        status = comparison.blocks[stored.name]
        use.add_row(
            stored.name,
            str(status.pid),
            f"{_weights(stored) / 1e6:.1f} MB",
            ", ".join(sorted({each.carrier for each in status.channels if each.messages})),
            _milliseconds(comparison.compute_ms[stored.name]),
        )
    use.add_section()
    use.add_row(
        "together",
        "",
        f"{sum(map(_weights, comparison.result.blocks)) / 1e6:.1f} MB",
        "",
        _milliseconds(sum(comparison.compute_ms.values())),
    )
    console.print()
    console.print(latency)
    console.print("One image in each block:")
    console.print(use)


def _kilobytes(count: int) -> str:
    return f"{count / 1e3:,.1f} kB"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
