"""Handwritten digits, three questions about them, and a network for each question.

The networks share a trunk, which is trained on the first question and then frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from blockflow.errors import BlockFlowError

SEED = 0


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
