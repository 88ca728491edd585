"""The thread that hears of deaths where the loop cannot."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sleeping import Sleeper, sleeping
from tensormq.watchdog import GRACE, Watch


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    with sleeping() as sleeper:
        yield sleeper


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_who_lives_is_left_alone_and_who_died_is_let_go_until_somebody_has_heard(
    sleeper: Sleeper,
) -> None:
    calls: list[float] = []
    watch = Watch(sleeper.pidfd, lambda: calls.append(time.monotonic()))
    time.sleep(2 * GRACE)
    assert calls == []
    sleeper.kill()
    died = time.monotonic()
    time.sleep(4.5 * GRACE)
    watch.cancel()
    assert len(calls) > 1
    assert calls[0] - died >= GRACE * 0.9
    count = len(calls)
    time.sleep(2 * GRACE)
    assert len(calls) == count


def test_a_death_that_the_loop_heard_of_lets_nobody_go(sleeper: Sleeper) -> None:
    calls: list[None] = []
    watch = Watch(sleeper.pidfd, lambda: calls.append(None))
    sleeper.kill()
    sleeper.process.wait()
    watch.cancel()
    watch.cancel()
    time.sleep(3 * GRACE)
    assert calls == []


def test_who_cancels_waits_for_what_is_under_way(sleeper: Sleeper) -> None:
    begun, finished = threading.Event(), threading.Event()

    def let_go() -> None:
        begun.set()
        time.sleep(0.1)
        finished.set()

    watch = Watch(sleeper.pidfd, let_go)
    sleeper.kill()
    assert begun.wait(5)
    watch.cancel()
    assert finished.is_set()


def test_one_that_fails_does_not_keep_others_waiting(
    sleeper: Sleeper, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("on purpose")

    called = threading.Event()
    watches = [Watch(sleeper.pidfd, fail), Watch(sleeper.pidfd, called.set)]
    sleeper.kill()
    assert called.wait(5)
    for watch in watches:
        watch.cancel()
    assert "cannot be let go" in caplog.text


def test_a_watch_keeps_one_descriptor(sleeper: Sleeper) -> None:
    Watch(sleeper.pidfd, lambda: None).cancel()  # the thread has started
    before = descriptors()
    watches = [Watch(sleeper.pidfd, lambda: None) for _ in range(5)]
    assert descriptors() == before + 5
    for watch in watches:
        watch.cancel()
    assert descriptors() == before
