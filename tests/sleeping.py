"""A process that does nothing, to be watched and killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple


class Sleeper(NamedTuple):
    process: subprocess.Popen[bytes]
    pidfd: int

    def kill(self) -> None:
        self.process.kill()


@contextlib.contextmanager
def sleeping() -> Iterator[Sleeper]:
    with subprocess.Popen(["sleep", "60"]) as process:
        pidfd = os.pidfd_open(process.pid)
        try:
            yield Sleeper(process, pidfd)
        finally:
            os.close(pidfd)
            process.kill()
