"""`blockflow serve` in a process of its own, and the certainty that nothing is left of it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from blockflow.client import ControlClient
from blockflow.demo.terminal import working
from blockflow.errors import BlockFlowError, StartFailed, Unavailable
from blockflow.topology import Topology, dump

_READY_SECONDS = 120.0
_STOP_SECONDS = 5.0
_LAST_LINES = 15


@dataclass(frozen=True)
class Stopped:
    """How a server ended: after how long, and how many processes went with it."""

    seconds: float
    count: int


class Server:
    """`blockflow serve` in a process of its own, with everything that it started."""

    def __init__(self, home: Path, topology: Topology) -> None:
        file = home / "topology.yaml"
        file.write_text(dump(topology), encoding="utf-8")
        control, inference = _free_ports(2)
        self.control = f"http://127.0.0.1:{control}"
        self.inference = f"http://127.0.0.1:{inference}"
        self._run_dir = home / "run"
        self._log = home / "server.log"
        with self._log.open("wb") as output:
            # In this process's group: Ctrl-C in a terminal reaches the server as well.
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "blockflow", "serve"),
                    *("--topology", str(file)),
                    *("--store", str(home / "store")),
                    *("--port", str(control)),
                    *("--http-port", str(inference)),
                    *("--run-dir", str(self._run_dir)),
                    *("--state-dir", str(home / "state")),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Raises StartFailed."""
        end = time.monotonic() + _READY_SECONDS
        with ControlClient(self.control, timeout=5) as control:
            while time.monotonic() < end:
                if self._process.poll() is not None:
                    raise StartFailed(f"the server ended with status {self._process.returncode}")
                with contextlib.suppress(Unavailable):  # nobody listens yet
                    if control.ready():
                        return
                time.sleep(0.05)
        raise StartFailed(f"the server was not ready within {_READY_SECONDS:g} s")

    def children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def stop(self) -> Stopped:
        """Stop it as Ctrl-C does. Raises BlockFlowError if it leaves anything behind."""
        children = self.children()
        began = time.monotonic()
        self._process.send_signal(signal.SIGINT)
        try:
            status = self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise BlockFlowError(
                f"the server did not end within {_STOP_SECONDS:g} s of SIGINT"
            ) from None
        seconds = time.monotonic() - began
        _, left = psutil.wait_procs(children, timeout=max(0.0, _STOP_SECONDS - seconds))
        if left:
            names = ", ".join(_describe(process) for process in left)
            _kill(left)
            raise BlockFlowError(f"the server left processes behind: {names}")
        if status != 0:
            raise BlockFlowError(f"the server ended with status {status} after SIGINT")
        if self._run_dir.exists():
            raise BlockFlowError(f"the server left its run directory {self._run_dir} behind")
        return Stopped(seconds, len(children) + 1)

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return "\n".join(["the server's last lines:", *(f"  {line}" for line in lines)])

    def kill(self) -> None:
        """Make sure that nothing is left of it, politely if it lets us."""
        children = self.children()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
            self._process.kill()
            self._process.wait()
        _kill(children)


@contextlib.contextmanager
def serving(home: Path, topology: Topology, console: Console) -> Iterator[Server]:
    """A server that is ready; what goes wrong while it runs is told with its last words."""
    server = Server(home, topology)
    try:
        with working(console, "Starting the server"):
            server.wait_until_ready()
        yield server
    except Exception as error:
        what = str(error)
        if not isinstance(error, BlockFlowError):
            what = f"{type(error).__name__}: {what}"
        raise BlockFlowError(f"{what}\n{server.last_words()}") from error
    finally:
        server.kill()


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 where nobody listens now; all are held until all are chosen."""
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [each.getsockname()[1] for each in sockets]


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # psutil does not kill another process that got the same pid
    psutil.wait_procs(processes, timeout=_STOP_SECONDS)


def _describe(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{process.pid} ({' '.join(process.cmdline()[1:4])})"
    return str(process.pid)


@contextlib.contextmanager
def orderly_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that the server is stopped as well."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
