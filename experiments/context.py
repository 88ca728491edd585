"""What a process takes before it has a model: a CUDA context, cuBLAS and cuDNN.

It is measured in a process that has nothing else, and that every comparison "beyond one context"
subtracts from both sides.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from multiprocessing.connection import Connection

import networks
import torch
from lab import Lab, Memory

from blockflow.child import die_with_parent
from blockflow.topology import Precision


def warm(device: str, precision: Precision) -> None:
    """Make this process ready to compute, on the stream on which it will: libraries take memory
    for each stream."""
    networks.begin(device, precision)
    if device.startswith("cuda"):
        image = torch.ones(1, 8, 32, 32, device=device)
        torch.nn.functional.conv2d(image, torch.ones(8, 8, 3, 3, device=device))
        torch.mm(image[0, 0], image[0, 0])
        networks.synchronised(device)


def measured(lab: Lab) -> int:
    """Bytes of a fresh process that is warm and has no model."""
    memory = Memory(lab)
    spawn = mp.get_context("spawn")
    mine, theirs = spawn.Pipe()
    process = spawn.Process(
        target=_be_warm, args=(lab.device, lab.precision, os.getpid(), theirs), daemon=True
    )
    process.start()
    theirs.close()
    try:
        mine.recv()
        return memory.taken(int(process.pid or 0))
    finally:
        mine.close()
        process.join(20)
        process.kill()
        process.join()
        memory.settle()


def _be_warm(device: str, precision: Precision, parent: int, control: Connection) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warm(device, precision)
    control.send("warm")
    try:
        control.recv()
    except EOFError:
        return
