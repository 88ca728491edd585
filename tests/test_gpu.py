"""The whole system on an NVIDIA GPU: what CPU tests cannot show."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from blockflow.artifact import Store
from blockflow.client import InferenceClient
from running import Server, channels_between_blocks, four_blocks, some_rows, wait_for
from test_graphs import (
    DIAMOND,
    JOIN,
    LEFT,
    RIGHT,
    SKIP,
    TRUNK,
    Diamond,
    Pick,
    computed,
    many,
    store_parts,
    topology,
)

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param(["cuda:0"], id="one"),
        pytest.param(["cuda:0", "cuda:1"], id="two", marks=pytest.mark.two_gpus),
    ],
)
def test_on_gpus_no_byte_between_blocks_passes_the_host(
    store: Store, run_dir: Path, devices: Sequence[str]
) -> None:
    wanted, x, expected = four_blocks(store, "cuda:0")
    for block, device in zip(wanted["blocks"].values(), itertools.cycle(devices), strict=False):
        block["device"] = device
    with Server(run_dir, wanted) as server:
        server.wait_ready(180)
        for _ in range(20):
            got = server.inference.infer("resnet50", {"x": x})["output"]
            np.testing.assert_allclose(got, expected, atol=1e-3)
        between = channels_between_blocks(server, 20)
        assert {c["carrier"] for c in between} == {"cuda_ipc"}
        assert sum(c["host_bytes"] for c in between) == 0
        assert all(c["bytes"] > 0 for c in between)


def test_on_a_gpu_a_request_is_timed_by_the_devices_own_events(store: Store, run_dir: Path) -> None:
    wanted, x, expected = four_blocks(store, "cuda:0")
    with Server(run_dir, wanted) as server:
        server.wait_ready(180)
        for _ in range(5):
            got, (total, times) = server.inference.infer_timed("resnet50", {"x": x})
            np.testing.assert_allclose(got["output"], expected, atol=1e-3)
            assert [each.block for each in times] == list(wanted["blocks"])
            assert all(each.compute_ms > 0 for each in times)
            # One after the other on the same device, and over before the answer was sent.
            assert sum(each.compute_ms for each in times) < total
        # What nobody asks for does not wait for the device, and is counted all the same.
        np.testing.assert_allclose(
            server.inference.infer("resnet50", {"x": x})["output"], expected, atol=1e-3
        )
        wait_for(
            lambda: {sum(b["compute_seconds"]["counts"]) for b in server.control.blocks()} == {6},
            5,
            "reports",
        )


APART = {
    "one": "trunk.d trunk.skip",
    "two": "left.d left.skip",
    "three": "right.d right.skip",
    "four": "join.d join.skip pick.skip",
}
TOGETHER = {
    "near": "trunk.d left.d join.d trunk.skip right.skip join.skip pick.skip",
    "far": "right.d left.skip",
}


@pytest.mark.parametrize("workers", [APART, TOGETHER], ids=["apart", "together"])
def test_graphs_on_a_gpu_equal_the_networks_and_no_byte_between_blocks_passes_the_host(
    store: Store, run_dir: Path, workers: Mapping[str, str]
) -> None:
    """Trunk, two branches, a join, and answers from amid them; batches, and parts that wait."""
    outputs = {"answer": "join.d", "left": "left.d", "features": "trunk.d"}
    pipelines = {"diamond": {**DIAMOND, "outputs": outputs}, "skip": SKIP}
    wanted = topology(store, store_parts(store), workers, pipelines, "cuda:0")
    inputs = [some_rows(rows, seed=rows) for rows in range(1, 9)]
    expected = []
    for x in inputs:
        hidden = computed(TRUNK, x)
        left = computed(LEFT, hidden)
        joined = computed(JOIN, computed(RIGHT, left), hidden)
        expected.append(
            {
                "diamond": {"answer": computed(Diamond(), x), "left": left, "features": hidden},
                "skip": {"output": computed(Pick(), joined, x)},
            }
        )

    def check(client: InferenceClient, number: int) -> None:
        name = ("diamond", "skip")[number % 2]
        which = number // 2 % len(inputs)
        got = client.infer(name, {"x": inputs[which]})
        assert set(got) == set(expected[which][name])
        for output, values in expected[which][name].items():
            np.testing.assert_allclose(got[output], values, atol=1e-5)

    # Clients that never pause are overload, which is not what is tried here.
    with Server(run_dir, wanted, "--max-slowdown", "1e6") as server:
        server.wait_ready(180)
        many(server, 320, check)
        wait_for(
            lambda: {block["requests"] for block in server.control.blocks()} == {160}, 10, "reports"
        )
        blocks = server.control.blocks()
        between = [c for block in blocks for c in block["channels"] if c["peer"] != "gateway"]
        assert {c["carrier"] for c in between} == {"cuda_ipc", "local"}
        assert sum(c["host_bytes"] for c in between) == 0
        assert all(c["bytes"] > 0 for c in between)
        assert {block["runner"] for block in blocks} == {"cuda graph"}
        assert {(block["incomplete"], block["queued"]) for block in blocks} == {(0, 0)}
