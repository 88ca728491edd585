"""Telling processes apart, and hearing of their death at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .wire import Host, Process

_FIELDS_BEFORE_START = 19  # fields of /proc/<pid>/stat between the command's ")" and starttime


def _started(pid: int) -> int:
    # The command may hold spaces and brackets, so fields are counted from its last ")".
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[_FIELDS_BEFORE_START])


def this_process() -> Process:
    """This process, with the boot and pid namespace that its pid is valid in."""
    pid = os.getpid()
    host = Host(
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        pid_namespace=str(Path("/proc/self/ns/pid").readlink()),
        uid=os.getuid(),
    )
    return Process(host, pid, _started(pid))


def open_pidfd(process: Process) -> int | None:
    """A file descriptor that becomes readable when `process` ends; None when it already has.

    Only for a process of this host. The caller closes the descriptor. Raises OSError when this
    process may have no more descriptors.
    """
    try:
        fd = os.pidfd_open(process.pid)
    except (ProcessLookupError, OverflowError):
        return None
    except OSError as error:
        if error.errno == errno.EINVAL:  # no number of a process
            return None
        raise
    # The pid may have been given to somebody else before the descriptor pinned it.
    try:
        if _started(process.pid) == process.started:
            return fd
    except OSError:
        pass  # it ended between the two calls
    os.close(fd)
    return None
