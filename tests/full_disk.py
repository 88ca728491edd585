"""Disks that really are full, for processes of their own.

Every process may limit its own files (EFBIG). A file system of a few kilobytes (ENOSPC) needs the
right to mount one, which root has, and everybody in a user namespace where the kernel allows it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
from pathlib import Path

_IN_A_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-ec")

_SMALL = """
    import os, resource, subprocess, sys
    from pathlib import Path

    KIND, ROOT = sys.argv[1], Path(sys.argv[2])

    def allow(kilobytes):
        if KIND == "tmpfs":
            used = os.statvfs(ROOT)
            taken = (used.f_blocks - used.f_bfree) * used.f_frsize // 1024
            size = f"remount,size={taken + kilobytes}k"
            subprocess.run(["mount", "-o", size, str(ROOT)], check=True)
        else:
            limit = (kilobytes * 1024, resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
"""


@functools.cache
def can_mount() -> bool:
    try:
        done = subprocess.run(
            [*_IN_A_NAMESPACE, "mount -t tmpfs none /tmp"], capture_output=True, check=False
        )
    except FileNotFoundError:  # no `unshare`
        return False
    return done.returncode == 0


def kinds() -> list[str]:
    """What a disk can be full by, here."""
    return ["limit", *(["tmpfs"] if can_mount() else [])]


def run(kind: str, root: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code that may call `allow(kilobytes)`: so much more can be written below `ROOT`.

    Of a tmpfs, all goes with the process, so that the code itself has to look at what is left.
    With a limit, what is allowed is the size of each file, not of all together.
    """
    program = textwrap.dedent(_SMALL) + textwrap.dedent(code)
    own = [sys.executable, "-c", program, kind, str(root), *arguments]
    if kind == "tmpfs":
        own = [
            *_IN_A_NAMESPACE,
            'mount -t tmpfs -o size=8m none "$0" && exec "$@"',
            str(root),
            *own,
        ]
    return subprocess.run(own, capture_output=True, text=True, check=False, timeout=100)
