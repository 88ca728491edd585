"""The whole system on one machine: `blockflow serve`.

This process holds the management API and the controller; it starts the gateway and the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import uvicorn
import uvloop

from blockflow import mps_daemon
from blockflow.access import read_token
from blockflow.api import create_app
from blockflow.child import LOG_FORMAT, start_logging
from blockflow.controller import Controller
from blockflow.errors import StartFailed
from blockflow.mps import SUFFIX as MPS_SUFFIX
from blockflow.options import ServeOptions
from blockflow.state import State

log = logging.getLogger(__name__)

_LOCK = "server.lock"
_OURS = {".sock", ".lock", ".log", ".now", ".cores"}
"""What servers and their children put into a run directory."""
_LONGEST_RUN_DIR = 80
"""Bytes; a Unix socket's path may have 107, and the names in the directory are short."""


def serve(options: ServeOptions) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP.

    Raises StartFailed when a port or the run directory is taken or a block does not come up, and
    TopologyInvalid when the topology cannot be deployed.
    """
    os.environ[LOG_FORMAT] = options.log_format  # for this process and its children
    start_logging("server", options.log_level)
    token = None if options.token_file is None else read_token(options.token_file)
    if options.inference_token_file is not None:
        read_token(options.inference_token_file)  # refused here, rather than by the gateway
    with (
        _listener(options.host, options.control_port, "management") as control,
        _listener(options.host, options.http_port, "inference") as inference,
        _run_directory(options.run_dir) as run_dir,
        contextlib.closing(State(options.state_dir or _default_state_dir())) as state,
    ):
        uvloop.run(_serve(options, run_dir, control, inference, state, token))


async def _serve(
    options: ServeOptions,
    run_dir: Path,
    control: socket.socket,
    inference: socket.socket,
    state: State,
    token: str | None,
) -> None:
    controller = Controller(options, run_dir, inference.fileno(), state)
    server = _Server(
        uvicorn.Config(
            create_app(controller, token),
            ssl_certfile=options.tls_cert,
            ssl_keyfile=options.tls_key,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
    )
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    # SIGHUP, too, is an end: its terminal is gone, and with it whoever could send Ctrl-C.
    # Under nohup it is ignored, and stays so.
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    for number in (signal.SIGINT, signal.SIGTERM, *hangup):
        loop.add_signal_handler(number, stop.set)
    serving = loop.create_task(server.serve(sockets=[control]))
    scheme = "http" if options.tls_cert is None else "https"
    log.info("inference at %s, management at %s", _url(scheme, inference), _url(scheme, control))
    starting = loop.create_task(controller.start())
    stopped = loop.create_task(stop.wait())
    try:
        await asyncio.wait((starting, stopped, serving), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            log.info("ready")
            await asyncio.wait((stopped, serving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (starting, stopped):
            task.cancel()
        await asyncio.gather(starting, stopped, return_exceptions=True)
        server.should_exit = True
        await controller.close()
        await serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `_serve`, which has more to stop than this server."""
        yield


def _url(scheme: str, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


@contextlib.contextmanager
def _listener(host: str, port: int, what: str) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(1024)
        except OSError as error:
            raise StartFailed(
                f"the {what} API cannot listen on {host}:{port}: {error.strerror}; "
                "stop what is there or choose another port"
            ) from None
        yield listener
    finally:
        listener.close()


@contextlib.contextmanager
def _run_directory(chosen: Path | None) -> Iterator[Path]:
    """A directory for sockets that only this user can enter, gone afterwards.

    Its lock is held as long as this process lives, so that a directory which a killed server left
    behind is known as such and cleared by the next one. Nothing is removed but what servers make.
    """
    if chosen is None:
        run_dir, lock = _new_run_directory(_private_directory(_default_base()))
    else:
        run_dir = _private_directory(chosen.absolute())
        if any(run_dir.iterdir()) and not (run_dir / _LOCK).exists():
            raise StartFailed(
                f"{run_dir} holds files and is no run directory; choose an empty or new --run-dir"
            )
        taken = _try_lock(run_dir)
        if taken is None:
            raise StartFailed(f"another server runs in {run_dir}; choose another --run-dir")
        lock = taken
    try:
        if len(os.fsencode(run_dir)) > _LONGEST_RUN_DIR:
            raise StartFailed(
                f"{run_dir} is too long for the sockets in it: a run directory's path may have "
                f"{_LONGEST_RUN_DIR} bytes"
            )
        _clear(run_dir)
        yield run_dir
    finally:
        _remove(run_dir)
        os.close(lock)


def _default_state_dir() -> Path:
    home = os.environ.get("XDG_STATE_HOME")
    base = Path(home) if home and Path(home).is_absolute() else Path.home() / ".local" / "state"
    return base / "blockflow"


def _default_base() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "blockflow"
    return Path(tempfile.gettempdir()) / f"blockflow-{os.getuid()}"


def _private_directory(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if (
        not stat.S_ISDIR(found.st_mode)
        or found.st_uid != os.getuid()
        or stat.S_IMODE(found.st_mode) & 0o077
    ):
        raise StartFailed(f"{path} must be a directory of this user with mode 0700")
    return path


def _try_lock(run_dir: Path) -> int | None:
    lock = os.open(run_dir / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _new_run_directory(base: Path) -> tuple[Path, int]:
    """A locked directory under `base`, after those that killed servers left are removed."""
    # Held meanwhile, so that no other server takes the new directory for one left behind.
    guard = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        for directory in base.iterdir():
            if directory.is_dir() and (left := _try_lock(directory)) is not None:
                _remove(directory)
                os.close(left)
        run_dir = Path(tempfile.mkdtemp(dir=base))
        lock = _try_lock(run_dir)
    finally:
        os.close(guard)
    if lock is None:
        raise StartFailed(f"{run_dir} is locked by another process")
    return run_dir, lock


def _clear(run_dir: Path) -> None:
    for left in run_dir.iterdir():
        if left.suffix == MPS_SUFFIX:
            mps_daemon.clear(left)
        elif left.suffix in _OURS and left.name != _LOCK:
            left.unlink(missing_ok=True)


def _remove(run_dir: Path) -> None:
    _clear(run_dir)
    (run_dir / _LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's files keep it in place
        run_dir.rmdir()
