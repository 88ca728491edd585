"""The gateway process: the inference API in front of the blocks.

    python -m blockflow.gateway --control ENDPOINT --incarnation N --parent PID --results ENDPOINT
                                --fd LISTENING_SOCKET ...

The server binds the listening socket and hands it down, so that clients wait rather than fail
while a gateway is replaced.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NoReturn

import uvicorn
import uvloop

from blockflow import protocol
from blockflow.access import SameHostOnly, read_token, require_token
from blockflow.child import ControlSocket, die_with_parent, keep_what_is_there, start_logging
from blockflow.errors import BlockFlowError
from blockflow.gateway.dispatch import BlockDispatcher
from blockflow.gateway.http import Limits, create_app
from blockflow.requestlog import LogRequests
from tensormq import TensorMQError

log = logging.getLogger(__name__)

_REPORT_EVERY = 0.5
_HEALTH = ("/v2/health/live", "/v2/health/ready")


class Gateway:
    """Serves HTTP and carries out the server's commands, on one event loop."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        options = self._options
        self._dispatcher = BlockDispatcher(
            options.results,
            incarnation=protocol.Incarnation(options.incarnation),
            queue_depth=options.queue_depth,
            slowdown=options.max_slowdown,
            timeout=options.request_timeout,
            on_fatal=_die,
        )
        listener = socket.socket(fileno=options.fd)
        scheme = "http" if options.tls_cert is None else "https"
        self._url = "{}://{}:{}".format(scheme, *listener.getsockname()[:2])
        app = create_app(self._dispatcher, Limits(body_bytes=options.max_body_bytes))
        self._server = uvicorn.Server(
            uvicorn.Config(
                LogRequests(
                    SameHostOnly(app)
                    if options.token_file is None
                    else require_token(app, read_token(options.token_file), _HEALTH)
                ),
                ssl_certfile=options.tls_cert,
                ssl_keyfile=options.tls_key,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=2,
            )
        )
        self._control = ControlSocket(options.control, protocol.Incarnation(options.incarnation))
        # The descriptor signals edges: it must be drained whenever it fires, and after sends.
        asyncio.get_running_loop().add_reader(self._control.socket.fileno(), self._hear)
        keep_what_is_there()
        self._start(self._report())
        self._hear()
        await self._server.serve(sockets=[listener])
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._dispatcher.close()
        asyncio.get_running_loop().remove_reader(self._control.socket.fileno())
        self._control.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _hear(self) -> None:
        while (command := self._control.hear()) is not None:
            self._start(self._obey(command))

    async def _report(self) -> None:
        while True:
            dispatcher = self._dispatcher
            report = protocol.GatewayReport(
                self._url, dispatcher.counts(), dispatcher.channels(), dispatcher.hops()
            )
            self._control.say(report)
            self._hear()
            await asyncio.sleep(_REPORT_EVERY)

    async def _obey(self, command: protocol.Command) -> None:
        answer: protocol.Done | protocol.Failed = protocol.Done(command.sequence)
        try:
            match command.body:
                case protocol.Connect(routes=routes):
                    await self._dispatcher.connect(routes)
                case protocol.Retire(routes=ids):
                    await self._dispatcher.retire(ids)
                case protocol.Publish(models=models):
                    self._dispatcher.publish(models)
                case protocol.Drain(routes=ids, timeout=timeout):
                    await self._dispatcher.drain(ids, timeout)
                case protocol.Abort(routes=ids, reason=reason, suspects=suspects):
                    self._dispatcher.abort(ids, reason, suspects)
                case protocol.Stop():
                    self._server.should_exit = True
                case other:
                    raise BlockFlowError(f"a gateway does not know the command {other}")
        except (BlockFlowError, TensorMQError) as error:
            answer = protocol.Failed(command.sequence, str(error))
        except Exception as error:  # every failure is the server's to judge
            log.exception("cannot carry out a command")
            answer = protocol.Failed(command.sequence, f"{type(error).__name__}: {error}")
        self._control.say(answer)
        self._hear()


def _die(reason: str) -> None:
    """End at once: the server starts another gateway."""
    log.critical("%s", reason)
    _leave(70)


def _leave(status: int) -> NoReturn:
    logging.shutdown()
    os._exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m blockflow.gateway")
    parser.add_argument("--control", required=True)
    parser.add_argument("--incarnation", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--results", required=True)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--queue-depth", type=int, required=True)
    parser.add_argument("--max-slowdown", type=float, required=True)
    parser.add_argument("--request-timeout", type=float, required=True)
    parser.add_argument("--max-body-bytes", type=int, required=True)
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("--tls-cert", type=Path)
    parser.add_argument("--tls-key", type=Path)
    parser.add_argument("--log-level", default="info")
    options = parser.parse_args()
    die_with_parent(options.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when we stop
    start_logging("gateway", options.log_level)
    uvloop.run(Gateway(options).run())
    _leave(0)


if __name__ == "__main__":
    main()
