"""The demo: what it computes, what it says when something is wrong, and that it leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from blockflow.artifact import Store
from blockflow.demo.digits import TASKS, Classifier, Digits, load_digits, train
from blockflow.demo.resnet import _mean_compute_ms
from blockflow.demo.server import serving
from blockflow.demo.trunk import (
    ROWS,
    SINGLES,
    digits_topology,
    requests_of,
    score,
    split_where_they_differ,
)
from blockflow.errors import BlockFlowError
from blockflow.status import BlockState, BlockStatus
from blockflow.topology import parse

DIGIT = TASKS[0]


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def models(digits: Digits) -> dict[str, Classifier]:
    return train(digits)


class Always(nn.Module):
    """Logits that favour one class, with an offset."""

    def __init__(self, favoured: int, offset: float = 0.0) -> None:
        super().__init__()
        self.logits = torch.zeros(10)
        self.logits[favoured] = 1
        self.logits += offset

    def forward(self, image: Tensor) -> Tensor:
        return self.logits.repeat(len(image), 1)


def answer_of(model: nn.Module, digits: Digits) -> Any:
    return model(digits.held_out).numpy()


# ------------------------------------------------------------------------------ data and training


def test_a_fifth_of_the_digits_is_held_out_and_the_same_every_time(digits: Digits) -> None:
    assert digits.train.shape == (1437, 1, 8, 8)
    assert digits.held_out.shape == (360, 1, 8, 8)
    assert (digits.train.min(), digits.train.max()) == (0, 1)
    assert digits.held_out_digits.unique().tolist() == list(range(10))
    assert torch.equal(digits.held_out, load_digits().held_out)
    seen = {image.numpy().tobytes() for image in digits.train}
    assert not any(image.numpy().tobytes() in seen for image in digits.held_out)


def test_labels_answer_the_questions() -> None:
    every = torch.arange(10)
    assert {task.name: task.label(every).tolist() for task in TASKS} == {
        "digit": list(range(10)),
        "parity": [0, 1] * 5,
        "half": [0] * 5 + [1] * 5,
    }
    for task in TASKS:
        assert task.label(every).max() + 1 == task.classes


def test_requests_hold_every_image_once(digits: Digits) -> None:
    parts = requests_of(digits)
    assert np.array_equal(np.concatenate(parts), digits.held_out.numpy())
    assert [len(part) for part in parts[:SINGLES]] == [1] * SINGLES
    assert max(map(len, parts)) == ROWS


@pytest.mark.slow
def test_training_succeeds_on_one_frozen_trunk(
    digits: Digits, models: dict[str, Classifier]
) -> None:
    assert len({id(model.trunk) for model in models.values()}) == 1
    for task in TASKS:
        model = models[task.name]
        assert not model.training
        assert not any(p.requires_grad for p in model.trunk.parameters())
        found = model(digits.held_out).argmax(dim=1)
        assert (found == task.label(digits.held_out_digits)).float().mean() > 0.9


@pytest.mark.slow
def test_the_trunk_is_found_whole_and_stored_once(
    models: dict[str, Classifier], tmp_path: Path
) -> None:
    store = Store(tmp_path, create=True)
    cut = split_where_they_differ(models, store)
    assert set(store.digests()) == {cut.trunk.digest, *(h.digest for h in cut.heads.values())}
    assert len(store.digests()) == 1 + len(models)

    def weights(module: nn.Module) -> int:
        return sum(t.nbytes for t in module.state_dict().values() if t.is_floating_point())

    trunk = weights(models["digit"].trunk)
    assert cut.trunk.manifest.parameter_bytes == trunk
    assert cut.bytes_alone == sum(map(weights, models.values()))
    assert cut.bytes_shared == cut.bytes_alone - 2 * trunk

    topology = digits_topology(cut)
    assert {p.blocks[0] for p in topology.pipelines.values()} == {"trunk"}
    assert {p.blocks[1] for p in topology.pipelines.values()} == set(topology.blocks) - {"trunk"}


@pytest.mark.slow
def test_networks_without_a_common_trunk_are_refused(tmp_path: Path) -> None:
    models = {n: Classifier(nn.Conv2d(1, 2, 3), nn.Flatten()).eval() for n in ("a", "b")}
    with pytest.raises(BlockFlowError, match="none was found"):
        split_where_they_differ(models, Store(tmp_path, create=True))


# ------------------------------------------------------------------------------------- comparing


def test_an_equal_answer_is_scored(digits: Digits) -> None:
    found = score(DIGIT, Always(3), digits, answer_of(Always(3), digits))
    share = float((digits.held_out_digits == 3).float().mean())
    assert found.accuracy == found.accuracy_alone == pytest.approx(share)
    assert (found.difference, found.images) == (0, 360)


@pytest.mark.parametrize(
    ("answered", "complaint"),
    [
        (Always(3, offset=0.01), "differs from its network by 0.01"),
        (Always(3, offset=float("nan")), "differs from its network by nan"),
        (Always(4), "differs from its network by 1"),
        (nn.Flatten(), r"answered \(360, 64\), its network \(360, 10\)"),
    ],
)
def test_a_wrong_answer_is_refused(digits: Digits, answered: nn.Module, complaint: str) -> None:
    with pytest.raises(BlockFlowError, match=complaint):
        score(DIGIT, Always(3), digits, answer_of(answered, digits))


def test_another_prediction_is_refused_however_close_the_logits_are(digits: Digits) -> None:
    answer = np.zeros((360, 10), dtype=np.float32)
    answer[:, 0] = 1
    answer[:, 1] = 1 + 1e-6

    class Tie(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.tensor([[1.0, 1.0, *[0.0] * 8]]).repeat(len(image), 1)

    with pytest.raises(BlockFlowError, match="predicts other classes"):
        score(DIGIT, Tie(), digits, answer)


def block(requests: int, mean: float | None) -> BlockStatus:
    return BlockStatus(
        name="b",
        artifact=f"sha256-{0:064}",
        device="cpu",
        worker="b",
        state=BlockState.READY,
        requests=requests,
        compute_ms_mean=mean,
    )


@pytest.mark.parametrize("before", [block(2, 30.0), block(0, None)])
def test_the_mean_between_two_reports_leaves_the_earlier_requests_out(before: BlockStatus) -> None:
    total = before.requests * (before.compute_ms_mean or 0)
    after = block(before.requests + 3, (total + 3 * 5.0) / (before.requests + 3))
    assert _mean_compute_ms(before, after) == pytest.approx(5.0)


# ------------------------------------------------------------------------------------ whole runs


@pytest.mark.slow
def test_a_server_that_does_not_start_is_told_with_its_last_words(run_dir: Path) -> None:
    topology = parse(
        {
            "blocks": {"lost": {"artifact": f"sha256-{0:064}"}},
            "pipelines": {"p": {"blocks": ["lost"]}},
        }
    )
    Store(run_dir / "store", create=True)
    with (
        pytest.raises(BlockFlowError, match=r"(?s)ended with status 1\n.*last lines.*lost"),
        serving(run_dir, topology, Console(quiet=True)),
    ):
        pytest.fail("it started")


def start(home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "blockflow", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(home), "COLUMNS": "80"},
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_prints_both_tables_and_leaves_nothing(run_dir: Path) -> None:
    process = start(run_dir)
    output, error = process.communicate(timeout=290)
    assert (process.returncode, error) == (0, "")
    assert max(map(len, output.splitlines())) <= 80
    first, second = output.index("Table 1."), output.index("Table 2.")
    assert first < second
    assert re.search(r"^ *trunk +\d+ +[\d.]+ kB +19 +19 +19 ", output[first:second], re.MULTILINE)
    assert len(re.findall(r"resnet50-[1-4]of4 +\d+ +[\d.]+ MB +shm", output[second:])) == 4
    assert "All checks passed" in output
    assert list(run_dir.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_demo_that_is_told_to_end_takes_everything_with_it(run_dir: Path) -> None:
    process = start(run_dir)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Processes:"):
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 4  # server, gateway and two workers
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (128 + signal.SIGTERM, "")
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []
    assert list(run_dir.iterdir()) == []
