"""The whole system on an NVIDIA GPU: what CPU tests cannot show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blockflow.artifact import Store
from running import Server, channels_between_blocks, four_blocks

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"), create=True)


def test_on_a_gpu_no_byte_between_blocks_passes_the_host(store: Store, run_dir: Path) -> None:
    wanted, x, expected = four_blocks(store, "cuda:0")
    with Server(run_dir, wanted) as server:
        server.wait_ready(180)
        for _ in range(20):
            got = server.inference.infer("resnet50", {"x": x})["output"]
            np.testing.assert_allclose(got, expected, atol=1e-3)
        between = channels_between_blocks(server, 20)
        assert {c["carrier"] for c in between} == {"cuda_ipc"}
        assert sum(c["host_bytes"] for c in between) == 0
        assert all(c["bytes"] > 0 for c in between)
