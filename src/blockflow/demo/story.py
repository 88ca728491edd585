"""The demo from its beginning to its end."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from blockflow.artifact import Store
from blockflow.client import ControlClient, InferenceClient
from blockflow.demo.answers import TOLERANCE, blocks_after, counts_of
from blockflow.demo.digits import TASKS, load_digits, train
from blockflow.demo.resnet import RESNET_BLOCKS, ROUNDS, add_resnet, compare_resnet, resnet_source
from blockflow.demo.server import orderly_sigterm, serving
from blockflow.demo.tables import print_digits, print_processes, print_resnet
from blockflow.demo.terminal import print_heading, working
from blockflow.demo.trunk import (
    ask_at_once,
    digits_topology,
    requests_of,
    score,
    split_where_they_differ,
)
from blockflow.errors import BlockFlowError
from blockflow.split import split_model


def run() -> None:
    """Run the whole demo and print what it finds; it takes about a minute on two cores.

    Must be called from the main thread, whose SIGTERM it turns into an orderly end. Raises
    BlockFlowError when something fails or an answer is wrong, with the last lines of the server.
    """
    began = time.monotonic()
    console = Console(highlight=False)
    with orderly_sigterm():
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

    print_heading(console, "Three tasks on one trunk")
    digits = load_digits()
    with working(
        console,
        f"Training on {len(digits.train)} images of handwritten digits; "
        f"{len(digits.held_out)} are held out",
    ):
        models = train(digits)
    with working(console, "Exporting three networks and looking for what they share"):
        split = split_where_they_differ(models, store)
    console.print(
        f"All three compute the same up to `{split.trunk.manifest.origin.last}`: "
        f"{len(store.digests())} blocks are stored, not {2 * len(models)}."
    )

    topology = digits_topology(split)
    with (
        serving(home, topology, console) as server,
        InferenceClient(server.inference) as inference,
        ControlClient(server.control) as control,
    ):
        print_processes(console, server, control)
        with working(console, "Asking all three tasks at the same time"):
            answers = ask_at_once(inference, digits)
            each = len(requests_of(digits))
            blocks = blocks_after(control, counts_of(topology, dict.fromkeys(models, each)))
        scores = [score(task, models[task.name], digits, answers[task.name]) for task in TASKS]
        print_digits(console, scores, split, blocks)

        print_heading(console, "ResNet-50 with random weights in four processes")
        with working(console, "Splitting ResNet-50") as say:
            source = resnet_source()
            resnet = split_model(source, RESNET_BLOCKS, store, progress=say)
        with working(console, "Adding it to the server, which goes on serving the digits"):
            add_resnet(control, topology, resnet)
        print_processes(console, server, control)
        with working(console, f"Comparing it with the whole network, {ROUNDS} rounds"):
            comparison = compare_resnet(inference, control, source.module, resnet)
        print_resnet(console, comparison)

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
        with working(console, "Stopping the server with SIGINT"):
            stopped = server.stop()
    console.print(f"It ended in {stopped.seconds:.1f} s with all of its {stopped.count} processes.")
