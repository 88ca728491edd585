"""The verb `demo`."""
# ruff: noqa: PLC0415  imports inside the verbs keep torch out of those that do not compute

from __future__ import annotations

from blockflow.cli.command import app, verb


@app.command()
@verb
def demo() -> None:
    """Split models, serve them and watch shared blocks at work, on this machine alone."""
    from blockflow.demo.story import run

    run()
