"""NVIDIA's MPS control daemon for one GPU, kept by a process that ends it with the server.

python -m blockflow.mps_daemon --control ENDPOINT --incarnation N --parent PID --directory DIR
    --gpu UUID

`nvidia-cuda-mps-control` starts `nvidia-cuda-mps-server` as a process of its own, which outlives a
control daemon that is killed. So neither is a child of the server: between them stands this
process, to which whatever they start is handed by the kernel. It ends them on command, when the
server dies, or when one of them does, and then itself.

Everything needs no root: the pipe directory is private.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import zmq

from blockflow import protocol
from blockflow.child import (
    ControlSocket,
    die_with_parent,
    remove_cuda_leftovers,
    start_logging,
)
from blockflow.errors import StartFailed

log = logging.getLogger(__name__)

MODULE = "blockflow.mps_daemon"
CONTROL = "nvidia-cuda-mps-control"
_SERVER = "nvidia-cuda-mps-server"
PIPES = "CUDA_MPS_PIPE_DIRECTORY"
_LOGS = "CUDA_MPS_LOG_DIRECTORY"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_START_SECONDS = 20.0
_ASK_SECONDS = 5.0
_QUIT_SECONDS = 2
"""How long clients may take to go before the daemon ends their servers."""


def missing() -> str | None:
    """Say which of NVIDIA's programs cannot be found, or None."""
    for program in (CONTROL, _SERVER):
        if shutil.which(program) is None:
            return f"there is no {program} on the PATH; it comes with NVIDIA's driver"
    return None


def ask(directory: Path, command: str, seconds: float = _ASK_SECONDS) -> str:
    """Have the daemon of the pipe directory carry out `command`; gives what it answers.

    Raises StartFailed when no daemon answers there in time.
    """
    try:
        said = subprocess.run(
            [CONTROL],
            input=f"{command}\n",
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, PIPES: str(directory)},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StartFailed(f"the MPS daemon cannot be asked to {command!r}: {error}") from error
    if said.returncode != 0:
        words = " ".join((said.stdout + said.stderr).split()) or f"status {said.returncode}"
        raise StartFailed(f"the MPS daemon does not answer {command!r}: {words}")
    return said.stdout.strip()


def servers(directory: Path) -> list[int]:
    """The pids of the MPS servers that the daemon has started. Raises StartFailed."""
    return _numbers(ask(directory, "get_server_list"))


def clients(directory: Path) -> dict[int, int]:
    """Each client's pid and its MPS server's. Raises StartFailed."""
    return {
        client: server
        for server in servers(directory)
        for client in _numbers(ask(directory, f"get_client_list {server}"))
    }


def terminate(directory: Path, pid: int) -> bool:
    """Take a client's work off the GPU, so that its death is nobody else's; whether it was one.

    Raises StartFailed.
    """
    server = clients(directory).get(pid)
    if server is None:
        return False
    ask(directory, f"terminate_client {server} {pid}")
    return True


def clear(directory: Path) -> None:
    """Kill what a server that was killed left running on this pipe directory, and remove it."""
    left = [process for process in psutil.process_iter() if _is_left(process, directory)]
    for process in left:
        log.warning("killing process %d, which kept MPS in %s", process.pid, directory)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, 5)
    shutil.rmtree(directory, ignore_errors=True)


def _is_left(process: psutil.Process, directory: Path) -> bool:
    """Whether it is a daemon, a server or a keeper with this pipe directory; never a client."""
    try:
        if process.pid == os.getpid() or process.uids().real != os.getuid():
            return False
        command = process.cmdline()
        ours = process.name().startswith("nvidia-cuda-mps") or MODULE in command
        ours = ours or any(Path(word).name in {CONTROL, _SERVER} for word in command[:2])
        return ours and process.environ().get(PIPES) == str(directory)
    except psutil.Error:
        return False


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdecimal()]


class Keeper:
    """Holds the daemon of one pipe directory, and everything that it starts."""

    def __init__(self, directory: Path, gpu: str) -> None:
        self._directory = directory
        self._gpu = gpu
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self, cancelled: Callable[[], bool]) -> None:
        """Start the daemon and a server that is ready for clients. Raises StartFailed."""
        clear(self._directory)
        self._directory.mkdir(mode=0o700)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
        try:
            self._daemon = subprocess.Popen(
                [CONTROL, "-f"],
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    PIPES: str(self._directory),
                    _LOGS: str(self._directory),
                    "CUDA_VISIBLE_DEVICES": self._gpu,
                },
                # Safe, for this process has one thread.
                preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509
            )
        except OSError as error:
            raise StartFailed(f"{CONTROL} cannot be started: {error}") from error
        end = time.monotonic() + _START_SECONDS
        self._wait(end, cancelled, self._answers, f"{CONTROL} does not answer")
        # A client that comes while its server initializes is refused, so it is there before them.
        ask(self._directory, f"start_server -uid {os.getuid()}", _START_SECONDS)
        self._wait(end, cancelled, self._has_server, f"{_SERVER} does not get ready")

    def check(self) -> None:
        """Raises StartFailed when the daemon has ended."""
        status = None if self._daemon is None else self._daemon.poll()
        if status is not None:
            raise StartFailed(f"{CONTROL} ended with status {status}{self._last_words()}")

    def stop(self) -> None:
        """End the daemon and whatever it started, politely if it can be."""
        if self._daemon is None:
            return
        everyone = {process.pid for process in psutil.Process().children(recursive=True)}
        if self._daemon.poll() is None:
            try:
                ask(self._directory, f"quit -t {_QUIT_SECONDS}")
                self._daemon.wait(1)
            except (StartFailed, subprocess.TimeoutExpired) as error:
                log.warning("killing the MPS daemon: %s", error)
        # When a daemon has died, its servers become children of this process.
        end = time.monotonic() + _START_SECONDS
        while (left := psutil.Process().children()) and time.monotonic() < end:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, 1)
        for pid in everyone:
            remove_cuda_leftovers(pid)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _wait(
        self, end: float, cancelled: Callable[[], bool], done: Callable[[], bool], what: str
    ) -> None:
        while not done():
            self.check()
            if cancelled():
                raise StartFailed("the server ended")
            if time.monotonic() > end:
                raise StartFailed(f"{what} within {_START_SECONDS:g} s{self._last_words()}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            servers(self._directory)
        except StartFailed:
            return False
        return True

    def _has_server(self) -> bool:
        for server in servers(self._directory):
            state = ask(self._directory, f"get_server_status {server}").upper()
            if "FAULT" in state:
                raise StartFailed(f"{_SERVER} is in a fault{self._last_words()}")
            # Any other word, too: old daemons do not know the command.
            return "INITIALIZING" not in state
        return False

    def _last_words(self) -> str:
        """The ends of the logs that NVIDIA's programs write, for the reader of a failure."""
        words = ""
        for name in ("control.log", "server.log"):
            with contextlib.suppress(OSError):
                text = (self._directory / name).read_text(errors="replace")
                if lines := [line.strip() for line in text.splitlines() if line.strip()]:
                    words += f"; {name}: {' | '.join(lines[-3:])}"
        return words


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m blockflow.mps_daemon")
    parser.add_argument("--control", required=True)
    parser.add_argument("--incarnation", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--log-level", default="info")
    options = parser.parse_args()
    bell, ringer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    terminated: list[int] = []
    signal.set_wakeup_fd(ringer)
    signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)  # to be woken when the daemon ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(options.parent, signal.SIGTERM)
    start_logging("mps", options.log_level)
    keeper = Keeper(options.directory, options.gpu)
    status = 0
    try:
        keeper.start(lambda: bool(terminated))
        # Now, for its greeting says that the daemon is ready.
        control = ControlSocket(options.control, protocol.Incarnation(options.incarnation))
        _serve(control, keeper, bell, terminated)
    except StartFailed as error:
        status = 1
        keeper.stop()
        log.error("%s", error)  # noqa: TRY400 - one line, for the server quotes the last one
    else:
        keeper.stop()
        control.close()
    logging.shutdown()
    os._exit(status)  # as workers end; nothing here is left to put in order


def _serve(control: ControlSocket, keeper: Keeper, bell: int, terminated: list[int]) -> None:
    """Until told to stop, or until the server has died. Raises StartFailed if the daemon ends."""
    poller = zmq.Poller()
    poller.register(control.socket, zmq.POLLIN)
    poller.register(bell, zmq.POLLIN)
    while not terminated:
        if any(ready == bell for ready, _ in poller.poll()):
            os.read(bell, 4096)
        keeper.check()
        while (command := control.hear()) is not None:
            if isinstance(command.body, protocol.Stop):
                keeper.stop()
                control.say(protocol.Done(command.sequence))
                return
            reason = f"the keeper of MPS does not know {type(command.body).__name__}"
            control.say(protocol.Failed(command.sequence, reason))


if __name__ == "__main__":
    main()
