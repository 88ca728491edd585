"""Variants as a client sees them: requests sent, answers awaited, and the clock beside them."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import networks
import numpy as np
import torch
from networks import Call
from numpy.typing import NDArray

Inputs = Mapping[str, Any]
"""A request's tensors: NumPy arrays, or torch tensors on the device."""

_TIMEOUT = 60.0
_UNDER_WAY = 16
ANSWERED = 0.95
"""Of what was offered, so much must be answered in the same time, or too much was offered."""
_SETTLED = 0.1
"""Of a stretch of arrivals, the part that is left out where answers are counted: a queue fills."""
_CHECKED = 16
"""Under load, one answer of so many is compared: a client that compares all would be the limit."""


@dataclass(frozen=True)
class Answer:
    """`at` is when the output was where the client wants it, ready to be used.

    `compute` is how long each block computed, in milliseconds, where a variant can tell that
    without changing what is measured.
    """

    number: int
    at: float
    output: Any
    compute: tuple[float, ...] = ()


class Variant(Protocol):
    """A way to run the network.

    `use` chooses where a client's tensors are: "host" (NumPy arrays in, NumPy arrays out) or
    "device" (CUDA tensors in, CUDA tensors out).
    """

    def use(self, side: str) -> None: ...
    def send(self, number: int, inputs: Inputs) -> None: ...
    def poll(self, seconds: float) -> list[Answer]: ...
    def close(self) -> None: ...


class Monolith:
    """The network in the client's own process: one at a time, in order."""

    def __init__(self, call: Call, device: str) -> None:
        self._call = call
        self._device = device
        self._side = "host"
        self._waiting: deque[tuple[int, Inputs]] = deque()

    def use(self, side: str) -> None:
        self._side = side

    def send(self, number: int, inputs: Inputs) -> None:
        self._waiting.append((number, inputs))

    def poll(self, seconds: float) -> list[Answer]:
        if not self._waiting:
            time.sleep(seconds)
            return []
        number, inputs = self._waiting.popleft()
        if self._side == "host":
            here = {name: torch.from_numpy(a).to(self._device) for name, a in inputs.items()}
            received = networks.synchronised(self._device)
            outputs = self._call(here)
            computed = networks.synchronised(self._device)
            output = next(iter(outputs.values())).cpu().numpy()
            at = time.monotonic()
        else:
            received = time.monotonic()
            output = next(iter(self._call(inputs).values()))
            at = computed = networks.synchronised(self._device)
        return [Answer(number, at, output, ((computed - received) * 1e3,))]

    def close(self) -> None: ...


@dataclass(frozen=True)
class Sample:
    """One request: milliseconds from end to end and of each block, and the greatest difference of
    its answer from the whole network's."""

    ms: float
    compute: tuple[float, ...]
    difference: float


class Questions(Protocol):
    """What is asked: `difference` is that of an answer from the right one."""

    def inputs(self, number: int, side: str) -> Inputs: ...
    def difference(self, answer: Answer) -> float: ...


class Requests:
    """A few different requests with the whole network's answers to them."""

    def __init__(
        self, inputs: Sequence[Mapping[str, NDArray[Any]]], whole: Call, device: str
    ) -> None:
        self.host = list(inputs)
        self._tensors = [
            {name: torch.from_numpy(a).to(device) for name, a in each.items()} for each in inputs
        ]
        self._expected = [
            next(iter(whole(each).values())).cpu().numpy().copy() for each in self._tensors
        ]

    def inputs(self, number: int, side: str) -> Inputs:
        kind: Sequence[Inputs] = self.host if side == "host" else self._tensors
        return kind[number % len(kind)]

    def tensors(self, number: int) -> dict[str, torch.Tensor]:
        """A request as tensors on the network's device."""
        return self._tensors[number % len(self._tensors)]

    def difference(self, answer: Answer) -> float:
        """The greatest difference of an answer from the whole network's."""
        found = answer.output
        if isinstance(found, torch.Tensor):
            found = found.cpu().numpy()
        return float(np.abs(found - self._expected[answer.number % len(self._expected)]).max())

    @property
    def largest(self) -> float:
        """The greatest magnitude in the whole network's answers: what differences compare to."""
        return max(float(np.abs(each).max()) for each in self._expected)


def one_by_one(variant: Variant, requests: Questions, side: str, count: int) -> Iterator[Sample]:
    """Send a request, wait for its answer, and so on."""
    variant.use(side)
    for number in range(count):
        inputs = requests.inputs(number, side)
        start = time.monotonic()
        variant.send(number, inputs)
        answer = _one(variant, start + _TIMEOUT)
        yield Sample((answer.at - start) * 1e3, answer.compute, requests.difference(answer))


def _one(variant: Variant, end: float) -> Answer:
    while not (answers := variant.poll(1.0)):
        if time.monotonic() > end:
            raise TimeoutError(f"no answer within {_TIMEOUT:g} s")
    (answer,) = answers
    return answer


@dataclass(frozen=True)
class Run:
    """A stretch of requests: its `seconds`, and the milliseconds of each that was answered.

    `kept_up`: of requests that came at a given rate, the part that was answered meanwhile.
    """

    seconds: float
    ms: list[float]
    difference: float
    kept_up: float = 1.0


_ENOUGH = 100
_LEAST = 32
_LONGER = 4


def how_many(seconds: float, each: float) -> int:
    """Requests for about `seconds` when one is answered every `each` seconds.

    At least a hundred where they take at most four times as long, and 32 however long they take.
    """
    fewest = _ENOUGH if _ENOUGH * each <= _LONGER * seconds else _LEAST
    return max(fewest, math.ceil(seconds / each))


def closed_loop(variant: Variant, requests: Questions, side: str, count: int, clients: int) -> Run:
    """So many synchronous clients: each sends its next request when it has its answer."""
    variant.use(side)
    starts: dict[int, float] = {}
    times: list[float] = []
    worst = 0.0
    sent = 0
    begin = last = time.monotonic()
    while len(times) < count:
        while sent < count and len(starts) < clients:
            starts[sent] = time.monotonic()
            variant.send(sent, requests.inputs(sent, side))
            sent += 1
        for answer in variant.poll(1.0):
            last = answer.at
            times.append((answer.at - starts.pop(answer.number)) * 1e3)
            if len(times) % _CHECKED == 1:
                worst = max(worst, requests.difference(answer))
        if time.monotonic() > last + _TIMEOUT:
            raise TimeoutError(f"no answer within {_TIMEOUT:g} s")
    return Run(last - begin, times, worst)


def schedule(rate: float, seconds: float, seed: int) -> list[float]:
    """When requests are due that come at random, `rate` a second: seconds from the beginning.

    Their number is what `rate` and `seconds` say, at least 8, and they are spread until exactly
    that many are due at `rate`: what is offered is what was asked for, whatever was drawn.
    """
    count = max(8, round(rate * seconds))
    moments = np.cumsum(np.random.default_rng(seed).exponential(1, count))
    due: list[float] = (moments * (count / rate / moments[-1])).tolist()
    return due


def kept_up(due: Sequence[float], answered: Sequence[float]) -> float:
    """The part of what came due in a stretch that was answered in it; at most 1.

    Both in seconds from the stretch's beginning. Between two moments of a steady state as many are
    answered as come due; were it counted from the beginning, those that are under way at the end
    would be missing, and a short stretch would look overloaded.
    """
    begin, end = _SETTLED * due[-1], due[-1]
    came = sum(begin < at <= end for at in due)
    went = sum(begin < at <= end for at in answered)
    return min(1.0, went / came)


def poisson(
    send: Callable[[int], None],
    poll: Callable[[float], list[Answer]],
    rate: float,
    seconds: float,
    check: Callable[[Answer], float],
    *,
    seed: int = 0,
    under_way: int = _UNDER_WAY,
) -> Run:
    """Requests that arrive at random moments, `rate` a second, whether or not others are done.

    At most `under_way` of them are sent and not answered; the others wait here. A request's time
    counts from the moment at which it should have been sent. Gives up when the last answer is as
    late as the whole stretch is long: nobody waits for a queue that only grows.
    """
    offsets = schedule(rate, seconds, seed)
    begin = time.monotonic() + 0.01
    due = [begin + offset for offset in offsets]
    last = due[-1] + max(seconds, offsets[-1])
    sent, times, answered, worst = 0, [], [], 0.0
    waiting = 0
    while len(times) < len(due) and (not times or time.monotonic() < last):
        now = time.monotonic()
        while sent < len(due) and due[sent] <= now and waiting < under_way:
            send(sent)
            sent += 1
            waiting += 1
        free = sent < len(due) and waiting < under_way
        # ZeroMQ waits whole milliseconds, rounded up: the last one is spent asking.
        pause = max(0.0, due[sent] - time.monotonic() - 0.001) if free else 0.05
        if not pause:
            os.sched_yield()  # where cores are few, those that compute the answers need this one
        for answer in poll(pause):
            waiting -= 1
            answered.append(answer.at - begin)
            times.append((answer.at - due[answer.number]) * 1e3)
            if len(times) % _CHECKED == 1:
                worst = max(worst, check(answer))
    while waiting and time.monotonic() < last + _TIMEOUT:  # the next stretch begins with nothing
        waiting -= len(poll(0.05))
    return Run(max(offsets[-1], *answered), times, worst, kept_up(offsets, answered))


@dataclass(frozen=True)
class Step:
    """One stretch of a search: requests `offered` a second, and `per_second` answered."""

    offered: float
    per_second: float
    p50_ms: float
    p99_ms: float
    requests: int
    max_difference: float
    met: bool


_WIDER = 1.25
_CLOSE = 1.05
_TRIES = 2


def next_rate(steps: Sequence[Step], start: float, rates: int) -> float | None:
    """The rate to try next when the highest that meets a limit is looked for; None at the end.

    Begins at `start`, and falls by more and more until one is met. A rate counts as too high when
    it failed twice: one slow moment of the machine is not the system's limit. Ends after `rates`
    different ones, or when the highest that was met is within a twentieth of the lowest that was
    not.
    """
    tried: dict[float, list[bool]] = {}
    for step in steps:
        tried.setdefault(step.offered, []).append(step.met)
    if not tried:
        return start
    last = steps[-1].offered
    if not any(tried[last]) and len(tried[last]) < _TRIES:
        return last
    held = max((rate for rate, met in tried.items() if any(met)), default=None)
    failed = min((rate for rate, met in tried.items() if not any(met)), default=None)
    if len(tried) >= rates:
        return None
    if failed is None:
        return last * _WIDER
    if held is None:
        return failed / _WIDER ** len(tried)
    return None if failed <= held * _CLOSE else (held + failed) / 2


def best_step(steps: Sequence[Step]) -> Step | None:
    """The step with the highest rate that met the limit."""
    return max((step for step in steps if step.met), key=lambda step: step.offered, default=None)
