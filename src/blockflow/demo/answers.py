"""What blocks counted, and how far an answer is from that of the whole network."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from blockflow.client import ControlClient
from blockflow.errors import BlockFlowError
from blockflow.status import BlockStatus
from blockflow.topology import Topology

Array = NDArray[Any]

TOLERANCE = 1e-4
"""Largest accepted difference to the whole network, relative to its largest output. None is
expected where both run the same kernels, but a process with another number of threads may sum in
another order."""

_COUNTS_SECONDS = 10.0


def blocks_of(control: ControlClient) -> dict[str, BlockStatus]:
    statuses = [BlockStatus.model_validate(each) for each in control.blocks()]
    return {each.name: each for each in statuses}


Counts = Mapping[str, Mapping[str, int]]
"""Requests by block and pipeline."""


def counts_of(topology: Topology, requests: Mapping[str, int]) -> Counts:
    """What the blocks will have counted after so many requests to each pipeline."""
    counts: dict[str, dict[str, int]] = {}
    for pipeline, count in requests.items():
        for block in topology.pipelines[pipeline].members:
            counts.setdefault(block, {})[pipeline] = count
    return counts


def blocks_after(control: ControlClient, expected: Counts) -> dict[str, BlockStatus]:
    """Every block, once those of `expected` report these counts: workers report twice a second.

    Raises BlockFlowError if they do not.
    """
    end = time.monotonic() + _COUNTS_SECONDS
    while True:
        blocks = blocks_of(control)
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


def call(model: nn.Module, inputs: Array) -> Array:
    with torch.inference_mode():
        outputs: Array = model(torch.from_numpy(inputs)).numpy()
    return outputs


def difference_of(pipeline: str, answer: Array, expected: Array) -> float:
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
