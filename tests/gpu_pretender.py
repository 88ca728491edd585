"""`blockflow` on a host that pretends to have a GPU: gpu_pretender.py serve ...

Everything is real but NVIDIA's management library and the workers, which compute on the CPU.
"""

from __future__ import annotations

import sys
from typing import Any

from fake_nvml import FakeNvml

sys.modules["pynvml"] = FakeNvml(["GPU-pretended"])  # type: ignore[assignment]

from blockflow import supervisor  # noqa: E402
from blockflow.cli import main  # noqa: E402

_spawn = supervisor.Supervisor.spawn


async def spawn(
    self: supervisor.Supervisor, name: str, module: str, *arguments: Any, **settings: Any
) -> supervisor.Child:
    pretended = {"blockflow.worker": "pretending_worker"}
    return await _spawn(self, name, pretended.get(module, module), *arguments, **settings)


if __name__ == "__main__":
    supervisor.Supervisor.spawn = spawn  # type: ignore[method-assign, assignment]
    main()
