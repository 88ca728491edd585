"""Verbs that operate a running server: change its parts, look back, and follow what happens."""

from __future__ import annotations

import difflib
import json
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from blockflow.cli.command import CONTROL, app, read_topology, verb
from blockflow.cli.server import CaFile, DryRun, IfMatch, Server, TokenFile, connect, show_result
from blockflow.cli.text import print_table
from blockflow.topology import Topology, dump


class Kind(StrEnum):
    BLOCK = "block"
    PIPELINE = "pipeline"


_Kind = Annotated[Kind, typer.Argument(help="what it is")]
_Name = Annotated[str, typer.Argument(help="its name")]
_Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SETTING=VALUE]...",
        help="such as max_batch=4, blocks=a,b, or 'graph={a: input, b: a}'",
    ),
]
_LISTS = frozenset({"blocks", "inputs", "outputs"})


@app.command()
@verb
def diff(
    file: Annotated[Path, typer.Argument(help="topology file (YAML)")],
    server: Server = CONTROL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
) -> None:
    """Show how FILE differs from what serves, and what applying it would do."""
    wanted = read_topology(file)
    with connect(server, token_file, ca_file) as client:
        answer = client.put_topology(wanted.model_dump(mode="json"), dry_run=True)
        current = client.topology()
    lines = difflib.unified_diff(
        dump(Topology.model_validate(current["topology"])).splitlines(),
        dump(wanted).splitlines(),
        f"generation {current['generation']}",
        str(file),
        lineterm="",
    )
    changed = False
    for line in lines:
        changed = True
        typer.echo(line)
    if not changed:
        typer.echo(f"generation {current['generation']} serves just that")
        return
    typer.echo()
    for action in answer["actions"]:
        typer.echo(f"would {action}")


@app.command()
@verb
def deploy(
    kind: _Kind,
    name: _Name,
    settings: _Settings = None,
    dry_run: DryRun = False,
    if_match: IfMatch = None,
    server: Server = CONTROL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
) -> None:
    """Add a block or a pipeline to what serves."""
    with connect(server, token_file, ca_file) as client:
        read = _read_settings(settings)
        show_result(client.deploy(kind.value, name, read, dry_run, match=if_match))


@app.command()
@verb
def configure(
    kind: _Kind,
    name: _Name,
    settings: _Settings = None,
    dry_run: DryRun = False,
    if_match: IfMatch = None,
    server: Server = CONTROL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
) -> None:
    """Change settings of a block or a pipeline; `SETTING=` brings back its default."""
    with connect(server, token_file, ca_file) as client:
        read = _read_settings(settings)
        show_result(client.configure(kind.value, name, read, dry_run, match=if_match))


@app.command()
@verb
def delete(
    kind: _Kind,
    name: _Name,
    cascade: Annotated[
        bool, typer.Option("--cascade", help="Also delete the pipelines that use the block.")
    ] = False,
    dry_run: DryRun = False,
    if_match: IfMatch = None,
    server: Server = CONTROL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
) -> None:
    """Remove a block or a pipeline from what serves."""
    with connect(server, token_file, ca_file) as client:
        show_result(client.delete(kind.value, name, dry_run, cascade=cascade, match=if_match))


@app.command()
@verb
def restart(
    block: Annotated[str, typer.Argument(help="the block")],
    dry_run: DryRun = False,
    if_match: IfMatch = None,
    server: Server = CONTROL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
) -> None:
    """Replace the process of a block; requests go on meanwhile."""
    with connect(server, token_file, ca_file) as client:
        show_result(client.restart(block, dry_run, match=if_match))


@app.command()
@verb
def history(
    limit: Annotated[int, typer.Option(min=1, max=500, help="most generations to list")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    server: Server = CONTROL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
) -> None:
    """List the generations that were tried, the newest first."""
    with connect(server, token_file, ca_file) as client:
        records = client.history(limit)
    if as_json:
        typer.echo(json.dumps(records, indent=2))
        return
    print_table(
        Console(),
        (">generation", "when", "verb", "outcome", ">blocks", ">pipelines", "~reason"),
        (
            (
                str(each["generation"]),
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["at"])),
                each["verb"],
                each["outcome"],
                str(len(each["topology"]["blocks"])),
                str(len(each["topology"]["pipelines"])),
                each["reason"] or "",
            )
            for each in records
        ),
    )


@app.command()
@verb
def rollback(
    generation: Annotated[
        int | None, typer.Argument(help="whose topology to apply again; default: the one before")
    ] = None,
    dry_run: DryRun = False,
    if_match: IfMatch = None,
    server: Server = CONTROL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
) -> None:
    """Serve an old generation's topology again, as a new generation."""
    with connect(server, token_file, ca_file) as client:
        show_result(client.rollback(generation, dry_run, match=if_match))


@app.command()
@verb
def events(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    server: Server = CONTROL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
) -> None:
    """Show what happened lately, and then whatever happens, until Ctrl-C."""
    with connect(server, token_file, ca_file) as client:
        for event in client.events():
            if as_json:
                typer.echo(json.dumps(event))
                continue
            at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
            reason = f": {event['reason']}" if event["reason"] else ""
            what = event["kind"].replace("_", " ")
            typer.echo(f"{at} {what} {event['subject']}{reason}")


@app.command()
@verb
def logs(
    block: Annotated[str, typer.Argument(help="the block")],
    tail: Annotated[int, typer.Option("--tail", "-n", min=1, max=10_000, help="lines")] = 100,
    server: Server = CONTROL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
) -> None:
    """Show the last lines that a block's process has written."""
    with connect(server, token_file, ca_file) as client:
        for line in client.logs(block, tail):
            typer.echo(line)


def _read_settings(given: list[str] | None) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for each in given or ():
        name, equals, text = each.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{each!r} is not SETTING=VALUE")
        if name in _LISTS and not text.startswith("{"):
            settings[name] = [part for part in text.split(",") if part] or None
            continue
        try:
            settings[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise typer.BadParameter(f"{each!r}: the value cannot be read: {error}") from error
    return settings
