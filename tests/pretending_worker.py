"""A worker that takes the CPU for its GPU, and joins the MPS stand-in as CUDA joins MPS."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import msgspec

from blockflow import mps_daemon, protocol, worker


class PretendingWorker(worker.Worker):
    _mps: socket.socket | None = None

    def _load(self, load: protocol.Load) -> None:
        if (directory := os.environ.get(mps_daemon.PIPES)) is not None:
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-pretended"
            assert {block.device for block in load.blocks} == {"cuda:0"}
            self._mps = socket.socket(socket.AF_UNIX)
            self._mps.connect(str(Path(directory) / "control"))
            self._mps.sendall(f"client {os.getpid()}\n".encode())
            threading.Thread(target=self._listen, args=(self._mps,), daemon=True).start()
        blocks = tuple(msgspec.structs.replace(block, device="cpu") for block in load.blocks)
        super()._load(msgspec.structs.replace(load, blocks=blocks))

    def _listen(self, mps: socket.socket) -> None:
        if mps.recv(100) == b"fault\n":
            self._die("CUDA error: an illegal memory access was encountered")

    def _stop(self) -> None:
        super()._stop()
        if self._mps is not None:
            self._mps.sendall(b"bye\n")


if __name__ == "__main__":
    worker.Worker = PretendingWorker  # type: ignore[misc]
    worker.main()
