"""Child processes: started, led by commands, heard, and stopped or mourned."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec
import zmq
import zmq.asyncio

from blockflow import environment, protocol
from blockflow.child import remove_cuda_leftovers
from blockflow.errors import NotInTime, StartFailed
from blockflow.protocol import Incarnation

log = logging.getLogger(__name__)

_LAST_WORDS = 2000
_COMMAND_TIMEOUT = 60.0
_LOOK_EVERY = 0.25
_LARGEST_LOG = 16 << 20
_LARGEST_TAIL = 256 << 10
_KEPT_LOGS = 50
"""Of processes that have ended."""


class Patience:
    """Tells for how long something has been there, as far as we were there to see it.

    Time counts only between two looks that follow each other closely. Otherwise a server that was
    stopped for a minute itself would find, when it goes on, that everybody else had been silent.
    """

    def __init__(self, most_between_looks: float) -> None:
        self._most = most_between_looks
        self._last: float | None = None
        self._ages: dict[int, float] = {}

    def look(self, now: float, present: Iterable[int]) -> float:
        """Give the seconds for which the oldest of `present` has been there at every look."""
        passed = 0.0 if self._last is None else min(now - self._last, self._most)
        known = self._ages
        self._last = now
        self._ages = {each: known[each] + passed if each in known else 0.0 for each in present}
        return max(self._ages.values(), default=0.0)


class Child:
    """A process that was started; `report` is the last one it sent."""

    def __init__(
        self,
        name: str,
        incarnation: Incarnation,
        process: asyncio.subprocess.Process,
        log_file: Path,
        send: Callable[[bytes], None],
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self.pid = process.pid
        self.log_file = log_file
        self.report: protocol.WorkerReport | protocol.GatewayReport | None = None
        self.on_exit: Callable[[str], None] | None = None
        self.silent = 0.0
        """Seconds since it was last heard; of interest once it is ready."""
        self._heard = 0
        self._patience = Patience(2 * _LOOK_EVERY)
        self._verdict: str | None = None
        self._process = process
        self._send = send
        self._sequences = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._greeted = asyncio.get_running_loop().create_future()
        self._exited = asyncio.get_running_loop().create_task(self._watch())

    @property
    def alive(self) -> bool:
        return not self._exited.done()

    @property
    def condemned(self) -> bool:
        return self._verdict is not None

    async def ended(self) -> None:
        """Wait until its process has ended."""
        await asyncio.shield(self._exited)

    async def command(self, body: protocol.Body, seconds: float = _COMMAND_TIMEOUT) -> None:
        """Have `body` carried out. Raises StartFailed when it fails, takes too long or dies."""
        sequence = next(self._sequences)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[sequence] = done
        self._send(protocol.encode(protocol.Command(sequence, body)))
        what = type(body).__name__.lower()
        try:
            await self._unless_it_dies(done, seconds, f"carry out {what!r}")
        finally:
            del self._waiting[sequence]

    async def greeted(self, seconds: float) -> None:
        """Wait for its Hello. Raises StartFailed."""
        await self._unless_it_dies(self._greeted, seconds, "say hello")

    async def stop(
        self, seconds: float, before_kill: Callable[[], Awaitable[object]] | None = None
    ) -> None:
        """Ask it to end; kill it when it has not after `seconds`, and `before_kill` is done."""
        self.on_exit = None
        if self.alive:
            end = asyncio.get_running_loop().time() + seconds
            with contextlib.suppress(StartFailed):
                await self.command(protocol.Stop(), seconds)
            try:
                async with asyncio.timeout_at(end):
                    await asyncio.shield(self._exited)
            except TimeoutError:
                log.warning("%s does not stop; killing it", self.name)
                if before_kill is not None:
                    await before_kill()
        await self.kill()

    async def kill(self) -> None:
        self.on_exit = None
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._exited
        _cut(self.log_file, _LARGEST_TAIL)

    def condemn(self, reason: str) -> None:
        """Kill it for `reason`; what follows is what follows every death."""
        self._verdict = f"{reason}, so it was killed"
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def look(self, now: float) -> None:
        """Note how long it has been silent, and keep its log within bounds."""
        self.silent = self._patience.look(now, (self._heard,))
        with contextlib.suppress(OSError):
            if self.log_file.stat().st_size > _LARGEST_LOG:
                _cut(self.log_file, _LARGEST_TAIL)

    def log_lines(self, count: int) -> list[str]:
        """The last lines that it wrote, at most `count`, and at most 256 KiB of them."""
        return _last_lines(self.log_file, count)

    def hear(self, message: protocol.FromChild) -> None:
        self._heard += 1
        match message:
            case protocol.Hello():
                if not self._greeted.done():
                    self._greeted.set_result(None)
            case protocol.Done(sequence=sequence):
                if (done := self._waiting.get(sequence)) is not None and not done.done():
                    done.set_result(None)
            case protocol.Failed(sequence=sequence, reason=reason):
                if (done := self._waiting.get(sequence)) is not None and not done.done():
                    done.set_exception(StartFailed(reason))
            case protocol.WorkerReport() | protocol.GatewayReport():
                self.report = message

    async def _unless_it_dies(self, done: asyncio.Future[None], seconds: float, what: str) -> None:
        await asyncio.wait(
            (done, self._exited), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if done.done():
            done.result()
        elif self._exited.done():
            raise StartFailed(f"{self.name} ended before it could {what}: {self._exited.result()}")
        else:
            raise NotInTime(f"{self.name} did not {what} within {seconds:.3g} s")

    async def _watch(self) -> str:
        status = await self._process.wait()
        remove_cuda_leftovers(self.pid)
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        reason = self._verdict or f"its process ended with {how}"
        last_words = _last_lines(self.log_file, 1)
        if last_words and status >= 0:
            reason += f"; its last words: {last_words[0][:_LAST_WORDS]}"
        if self.on_exit is not None:
            self.on_exit(reason)
        return reason


class Supervisor:
    """Starts children and carries messages between them and the server.

    Used from the event loop of the main thread: children die with the thread that started them.
    What they write lies in `logs`, and stays there when they end: the last of it, of the last few.
    """

    def __init__(self, run_dir: Path, logs: Path, log_level: str) -> None:
        self._logs = logs
        self._began = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self._ended_logs = deque(_in_order_of_their_ends(logs))
        self._remove_old_logs()
        self._run_dir = run_dir
        self._log_level = log_level
        self._incarnations = itertools.count(1)
        self._children: dict[bytes, Child] = {}
        self._endpoint = f"ipc://{run_dir}/control.sock"
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.bind(self._endpoint)
        self._ears = asyncio.get_running_loop().create_task(self._listen())
        self._eyes = asyncio.get_running_loop().create_task(self._look())

    def next_incarnation(self) -> Incarnation:
        return Incarnation(next(self._incarnations))

    async def spawn(
        self,
        name: str,
        module: str,
        incarnation: Incarnation,
        arguments: Sequence[str],
        *,
        seconds: float,
        pass_fds: Sequence[int] = (),
        extra_environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Child:
        """Start `python -m module` and wait for its Hello. Raises StartFailed."""
        plain = name.removeprefix("the ").replace(" ", "-")
        log_file = self._logs / f"{self._began}-{incarnation:06d}-{plain}.log"
        command = [
            *(sys.executable, "-m", module),
            *("--control", self._endpoint),
            *("--incarnation", str(incarnation)),
            *("--parent", str(os.getpid())),
            *("--log-level", self._log_level),
            *arguments,
        ]
        variables = {
            **os.environ,
            # `cuda:N` means the same device here, in NVML and in the child.
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            **environment.serving(),
            **extra_environment,
        }
        # Appended to, so that what follows a truncation begins at the file's start.
        with log_file.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=variables,
                pass_fds=pass_fds,
                start_new_session=True,  # Ctrl-C is for the server, which then stops its children
            )
        identity = str(incarnation).encode()

        def send(frame: bytes) -> None:
            self._socket.send_multipart([identity, frame])

        child = Child(name, incarnation, process, log_file, send)
        self._children[identity] = child
        try:
            await child.greeted(seconds)
        except BaseException:
            await child.kill()
            self.forget(child)
            raise
        return child

    def forget(self, child: Child) -> None:
        """Have done with a child that has ended; more than once is as good as once."""
        if self._children.pop(str(child.incarnation).encode(), None) is not None:
            self._ended_logs.append(child.log_file)
            self._remove_old_logs()

    async def close(self) -> None:
        self._ears.cancel()
        self._eyes.cancel()
        await asyncio.gather(self._ears, self._eyes, return_exceptions=True)
        self._socket.close()

    def _remove_old_logs(self) -> None:
        while len(self._ended_logs) > _KEPT_LOGS:
            self._ended_logs.popleft().unlink(missing_ok=True)

    async def _listen(self) -> None:
        while True:
            identity, frame = await self._socket.recv_multipart()
            child = self._children.get(identity)
            if child is None:
                continue  # it was given up before it spoke
            try:
                child.hear(protocol.decode_from_child(frame))
            except msgspec.MsgspecError as error:
                log.warning("%s sent something unreadable: %s", child.name, error)

    async def _look(self) -> None:
        while True:
            now = asyncio.get_running_loop().time()
            for child in tuple(self._children.values()):
                if child.alive:
                    child.look(now)
            await asyncio.sleep(_LOOK_EVERY)


def _cut(log_file: Path, size: int) -> None:
    """Leave the last `size` bytes of a log, which its process may be appending to."""
    with contextlib.suppress(OSError), log_file.open("r+b") as file:
        if file.seek(0, os.SEEK_END) <= size:
            return
        file.seek(-size, os.SEEK_END)
        end = file.read(size)
        file.seek(0)
        file.write(end)
        file.truncate()


def _in_order_of_their_ends(logs: Path) -> list[Path]:
    """The logs of processes that have all ended, as far as their last words tell when."""
    return sorted(logs.glob("*.log"), key=lambda log: log.stat().st_mtime_ns)


def _last_lines(log_file: Path, count: int) -> list[str]:
    try:
        with log_file.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LARGEST_TAIL))
            text = file.read(_LARGEST_TAIL).decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if size > _LARGEST_TAIL:
        del lines[:1]  # its beginning is missing
    return lines[-count:]
