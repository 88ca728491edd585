"""The worker process: hosts blocks of one device, does what the server says, reports.

python -m blockflow.worker --control ENDPOINT --incarnation N --parent PID --name NAME
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
from concurrent.futures import Future, wait
from pathlib import Path

import zmq

from blockflow import protocol
from blockflow.artifact import Store
from blockflow.child import ControlSocket, die_with_parent, start_logging
from blockflow.errors import BlockFlowError, StartFailed

log = logging.getLogger(__name__)

_REPORT_EVERY_MS = 500
_CONNECT_TIMEOUT = 30.0
_STOP_TIMEOUT = 3.0


class Worker:
    """Carries out the server's commands; the main thread owns the control socket."""

    def __init__(self, control: ControlSocket) -> None:
        # Heavy (it loads torch), so it comes after Hello: the server knows at once that we live.
        from blockflow import program, runtime  # noqa: PLC0415

        self._program = program
        self._runtime = runtime
        self._control = control
        self._blocks: dict[str, runtime.Block] = {}
        self._fatal: queue.SimpleQueue[str] = queue.SimpleQueue()

    def run(self) -> int:
        """Serve until told to stop; returns the exit status."""
        poller = zmq.Poller()
        poller.register(self._control.socket, zmq.POLLIN)
        while True:
            poller.poll(_REPORT_EVERY_MS)
            while (command := self._control.hear()) is not None:
                if isinstance(command.body, protocol.Stop):
                    self._stop()
                    self._control.say(protocol.Done(command.sequence))
                    return 0
                self._obey(command)
            if not self._fatal.empty():
                log.critical("%s", self._fatal.get())
                return 70
            reports = tuple(block.report() for block in self._blocks.values())
            self._control.say(protocol.WorkerReport(reports))

    def _obey(self, command: protocol.Command) -> None:
        try:
            match command.body:
                case protocol.Load() as load:
                    self._load(load)
                case protocol.Connect(routes=routes):
                    _finish([block.connect(routes) for block in self._blocks.values()])
                case protocol.Retire(routes=routes):
                    _finish([block.retire(routes) for block in self._blocks.values()])
                case other:
                    raise StartFailed(f"a worker does not know the command {other}")
        except Exception as error:  # every failure is the server's to judge
            log.exception("cannot carry out a command")
            known = isinstance(error, BlockFlowError)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            self._control.say(protocol.Failed(command.sequence, reason))
        else:
            self._control.say(protocol.Done(command.sequence))

    def _load(self, load: protocol.Load) -> None:
        store = Store(Path(load.store))
        started = []
        for spec, endpoint in zip(load.blocks, load.endpoints, strict=True):
            try:
                program = self._program.load(store, spec.digest, spec.device)
            except (BlockFlowError, RuntimeError) as error:
                raise StartFailed(f"block {spec.name} cannot be loaded: {error}") from error
            block = self._runtime.Block(spec, program, endpoint, self._blocks, self._fatal.put)
            self._blocks[endpoint] = block
            started.append(block)
        for block in started:
            try:
                block.start().result()
            except Exception as error:
                raise StartFailed(f"block {block.spec.name} cannot start: {error}") from error

    def _stop(self) -> None:
        for block in self._blocks.values():
            block.stop()
        for block in self._blocks.values():
            if not block.join(_STOP_TIMEOUT):
                log.warning("block %s did not finish in time", block.spec.name)


def _finish(futures: list[Future[None]]) -> None:
    """Wait for all; raise the first failure."""
    wait(futures, timeout=_CONNECT_TIMEOUT)
    for future in futures:
        future.result(timeout=0)


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
