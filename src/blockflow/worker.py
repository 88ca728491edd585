"""The worker process: hosts blocks of one device, does what the server says, reports.

python -m blockflow.worker --control ENDPOINT --incarnation N --parent PID --name NAME
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from blockflow import protocol
from blockflow.artifact import Store
from blockflow.child import ControlSocket, die_with_parent, keep_what_is_there, start_logging
from blockflow.errors import BlockFlowError, StartFailed

if TYPE_CHECKING:
    from blockflow.block import Block
    from blockflow.runtime import BlockThread

log = logging.getLogger(__name__)

_REPORT_EVERY_MS = 500
_CONNECT_TIMEOUT = 30.0
_STOP_TIMEOUT = 3.0


class Worker:
    """Carries out the server's commands.

    The main thread owns the control socket and never waits for anything else, so that a worker
    which does not report is hung. What takes long (loading torch, a model, a connection) is done by
    one other thread, in the order of the commands.
    """

    def __init__(self, control: ControlSocket) -> None:
        self._control = control
        self._blocks: dict[str, Block] = {}
        self._threads: tuple[BlockThread, ...] = ()
        self._fatal: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[protocol.Done | protocol.Failed] = queue.SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._hands = ThreadPoolExecutor(1, thread_name_prefix="commands")
        # Now, because it takes seconds and the first command will need it.
        self._hands.submit(_import_torch)

    def run(self) -> int:
        """Serve until told to stop; returns the exit status."""
        poller = zmq.Poller()
        poller.register(self._control.socket, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        while True:
            if any(ready == self._bell for ready, _ in poller.poll(_REPORT_EVERY_MS)):
                os.eventfd_read(self._bell)
            while not self._answers.empty():
                self._control.say(self._answers.get())
            while (command := self._control.hear()) is not None:
                if isinstance(command.body, protocol.Stop):
                    self._stop()
                    self._control.say(protocol.Done(command.sequence))
                    return 0
                self._hands.submit(self._obey, command)
            if not self._fatal.empty():
                log.critical("%s", self._fatal.get())
                return 70
            served = self._blocks.copy().values() if self._threads else ()
            reports = tuple(report for block in served for report in block.reports())
            self._control.say(protocol.WorkerReport(reports))

    def _ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    def _die(self, reason: str) -> None:
        self._fatal.put(reason)
        self._ring()

    # The other thread

    def _obey(self, command: protocol.Command) -> None:
        answer: protocol.Done | protocol.Failed = protocol.Done(command.sequence)
        try:
            match command.body:
                case protocol.Load() as load:
                    self._load(load)
                case protocol.Connect(routes=routes):
                    _finish([thread.connect(routes) for thread in self._threads])
                case protocol.Retire(routes=routes):
                    _finish([thread.retire(routes) for thread in self._threads])
                case other:
                    raise StartFailed(f"a worker does not know the command {other}")
        except Exception as error:  # every failure is the server's to judge
            log.exception("cannot carry out a command")
            known = isinstance(error, BlockFlowError)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            answer = protocol.Failed(command.sequence, reason)
        self._answers.put(answer)
        self._ring()

    def _load(self, load: protocol.Load) -> None:
        from blockflow import program as programs  # noqa: PLC0415
        from blockflow.block import Block  # noqa: PLC0415
        from blockflow.compilation import compiled  # noqa: PLC0415
        from blockflow.runtime import threads_for  # noqa: PLC0415

        store = Store(Path(load.store))
        loaded: dict[str, programs.Program] = {}
        for spec in load.blocks:
            try:
                program = programs.load(
                    store,
                    spec.digest,
                    spec.device,
                    precision=spec.precision,
                    channels_last=spec.channels_last,
                )
            except (BlockFlowError, RuntimeError) as error:
                raise StartFailed(f"block {spec.name} cannot be loaded: {error}") from error
            loaded[spec.name] = compiled(program, spec.max_batch) if spec.compile else program
        fused = {chain[0]: chain[1:] for chain in load.chains}
        inner = {name for others in fused.values() for name in others}
        for spec, endpoint in zip(load.blocks, load.endpoints, strict=True):
            if spec.name in inner:
                continue
            program, others = loaded[spec.name], fused.get(spec.name, ())
            if others:
                program = programs.Chain([program, *(loaded[name] for name in others)])
            self._blocks[endpoint] = Block(spec, program, endpoint, self._blocks, fused=others)
        threads = threads_for(tuple(self._blocks.values()), self._die)
        for thread in threads:
            thread.start().result()
        self._threads = tuple(threads)
        keep_what_is_there()

    def _stop(self) -> None:
        for thread in self._threads:
            thread.stop()
        for thread in self._threads:
            if not thread.join(_STOP_TIMEOUT):
                log.warning("block %s did not finish in time", thread.name)


def _import_torch() -> None:
    from blockflow import runtime  # noqa: F401, PLC0415


def _finish(futures: list[Future[None]]) -> None:
    """Wait for all; raise the first failure. Raises StartFailed when they take too long."""
    _, late = wait(futures, timeout=_CONNECT_TIMEOUT)
    if late:
        raise StartFailed(
            f"{len(late)} of {len(futures)} threads did not change their blocks' routes within "
            f"{_CONNECT_TIMEOUT:g} s: they compute"
        )
    for future in futures:
        future.result()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m blockflow.worker")
    parser.add_argument("--control", required=True)
    parser.add_argument("--incarnation", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--log-level", default="info")
    options = parser.parse_args()
    die_with_parent(options.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when we stop
    start_logging(f"worker {options.name}", options.log_level)
    control = ControlSocket(options.control, protocol.Incarnation(options.incarnation))
    status = Worker(control).run()
    control.close()
    # Not sys.exit: destructors of a lost CUDA context, and of threads that did not finish, hang.
    logging.shutdown()
    os._exit(status)


if __name__ == "__main__":
    main()
