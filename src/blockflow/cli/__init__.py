"""The command line: `blockflow split`, `serve`, `apply`, `status`, `infer`, `demo` and more.

Exit codes: 0 done, 1 refused or failed (one message on stderr says why), 2 wrong usage, 130 Ctrl-C.
BLOCKFLOW_TRACEBACK=1 shows where an error came from.

What a verb needs is imported when it runs: torch takes seconds to load, and only the verbs of
`models` and `demo` compute.
"""

from __future__ import annotations

# Importing a group of verbs registers them; `--help` lists them in this order.
# isort: off
from blockflow.cli import models, store, server, control, requests, demo
from blockflow.cli.command import app
# isort: on

__all__ = ["app", "control", "demo", "main", "models", "requests", "server", "store"]


def main() -> None:
    """Run the command line; the entry point of the `blockflow` program."""
    app()
