"""A server that does nothing but keep an MPS daemon, until it is killed: mps_peer.py RUN_DIR."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from blockflow import mps_daemon
from blockflow.supervisor import Child, Supervisor

GPU = "GPU-11111111-2222-3333-4444-555555555555"


async def keeper(supervisor: Supervisor, directory: Path) -> Child:
    return await supervisor.spawn(
        "the keeper",
        mps_daemon.MODULE,
        supervisor.next_incarnation(),
        ["--directory", str(directory), "--gpu", GPU],
        seconds=20,
        extra_environment={mps_daemon.PIPES: str(directory)},
    )


async def main(run_dir: Path) -> None:
    await keeper(Supervisor(run_dir, run_dir, "info"), run_dir / "0.mps")
    (run_dir / "ready").touch()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
