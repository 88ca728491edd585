"""What every verb is made with: the Typer application, how errors are told, shared options."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

import tensormq
from blockflow import __version__
from blockflow.errors import BlockFlowError, TopologyInvalid
from blockflow.options import ServeOptions
from blockflow.topology import Topology, parse

P = ParamSpec("P")

CONTROL = f"http://127.0.0.1:{ServeOptions.model_fields['control_port'].default}"
INFERENCE = f"http://127.0.0.1:{ServeOptions.model_fields['http_port'].default}"

app = typer.Typer(
    name="blockflow",
    help="Deploy, manage and serve modular neural networks.",
    no_args_is_help=True,
    add_completion=False,
    # Not "rich": it would take [batch,3,224,224] for markup and swallow it.
    rich_markup_mode="markdown",
    # `verb` reports errors, in one line.
    pretty_exceptions_enable=False,
)


def verb(run: Callable[P, None]) -> Callable[P, None]:
    """Turn whatever a verb raises into one readable message and an exit code."""

    @functools.wraps(run)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            run(*args, **kwargs)
        except (typer.Exit, typer.BadParameter, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            if os.environ.get("BLOCKFLOW_TRACEBACK") == "1":
                raise
            for line in explain(error):
                typer.echo(line, err=True)
            raise typer.Exit(1) from None

    return guarded


def explain(error: Exception) -> list[str]:
    match error:
        case TopologyInvalid(problems=problems):
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            return [f"error: the topology has {count}:", *(f"  {each}" for each in problems)]
        case BlockFlowError():
            return [f"error: {error}"]
        case OSError(strerror=str(reason), filename=str(name)):
            return [f"error: {name}: {reason}"]
        case OSError():
            return [f"error: {error}"]
        case _:
            what = f"{type(error).__name__}: {error}"
            return [f"error: unexpected {what} (BLOCKFLOW_TRACEBACK=1 shows where)"]


def flag(option: str, *names: str) -> Any:
    """Declare a flag for one of the server's options, in that option's own words."""
    return typer.Option(*names, help=ServeOptions.model_fields[option].description)


def default(option: str) -> Any:
    return ServeOptions.model_fields[option].default


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blockflow {__version__}" + (", compiled" if tensormq.COMPILED else ""))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def read_topology(path: Path) -> Topology:
    """Read a topology file; its `store` becomes absolute, from the file's own directory."""
    topology = parse(path.read_bytes())
    if topology.store is None:
        return topology
    store = (path.parent / topology.store).resolve()
    return topology.model_copy(update={"store": str(store)})
