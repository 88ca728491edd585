"""Verbs about the artifact store: `store ls`, `store verify`, `store gc`, `share`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from blockflow.artifact import Store
from blockflow.cli.command import CONTROL, app, read_topology, verb
from blockflow.cli.server import CaFile, Server, TokenFile, connect
from blockflow.cli.text import operations, print_table, short_digest, size
from blockflow.errors import BlockFlowError, InvalidInput, StoreCorrupt
from blockflow.state import STATE_FILE, topologies_in
from blockflow.topology import Topology, parse
from blockflow.upload import pack

store_app = typer.Typer(help="Look into the artifact store, check it, and clean it up.")
app.add_typer(store_app, name="store", no_args_is_help=True)

StoreOption = Annotated[Path, typer.Option("--store", help="directory of the artifact store")]
_HISTORY = 500  # generations: all that a server remembers

ServerOption = Annotated[
    str | None, typer.Option(help="management address of a server whose topology counts as well")
]


@store_app.command("ls")
@verb
def list_artifacts(
    store: StoreOption = Path("store"),
    topologies: Annotated[
        list[Path] | None,
        typer.Option("--topology", "-t", help="say which artifacts this topology file uses"),
    ] = None,
    server: ServerOption = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
) -> None:
    """List the artifacts with where they were cut from, their costs, and what uses them."""
    place = Store(store)
    users = _users(_topologies(topologies or (), server, token_file, ca_file))
    rows = []
    damaged = []
    for digest in place.digests():
        try:
            manifest = place.manifest(digest)
        except StoreCorrupt as error:
            damaged.append(error)
            continue
        origin = manifest.origin
        rows.append(
            (
                short_digest(digest),
                origin.model,
                f"{origin.index + 1}/{origin.count}",
                size(manifest.parameter_bytes),
                operations(manifest.flops),
                ", ".join(users.get(digest, ())),
            )
        )
    # First to last within a model, whatever their digests.
    rows.sort(key=lambda row: (row[1], int(row[2].partition("/")[2]), int(row[2].split("/")[0])))
    console = Console()
    print_table(
        console, ("artifact", "~model", ">block", ">weights", ">work/row", "~used by"), rows
    )
    tensors = place.tensors()
    if rows:
        console.print()
    count = len(rows)
    typer.echo(
        f"{count} artifact{'' if count == 1 else 's'}, "
        f"{len(tensors)} tensor files with {size(sum(tensors.values()))}"
    )
    for fault in damaged:
        typer.echo(f"error: {fault}", err=True)
    if damaged:
        raise typer.Exit(1)


@store_app.command("verify")
@verb
def verify_artifacts(
    digests: Annotated[
        list[str] | None,
        typer.Argument(metavar="DIGEST...", help="artifacts to check; default: all of them"),
    ] = None,
    store: StoreOption = Path("store"),
) -> None:
    """Read every byte, and name every file that is not what it was when it was stored."""
    place = Store(store)
    wanted = [place.find(each) for each in digests or ()] or place.digests()
    damaged = 0
    for digest in wanted:
        faults = place.faults(digest)
        damaged += bool(faults)
        for fault in faults:
            typer.echo(f"artifact {short_digest(digest)}: {fault}", err=True)
    if damaged:
        typer.echo(f"{damaged} of {len(wanted)} artifacts are damaged", err=True)
        raise typer.Exit(1)
    typer.echo(f"{len(wanted)} artifact{'' if len(wanted) == 1 else 's'} verified")


@store_app.command("push")
@verb
def push_artifacts(
    digests: Annotated[
        list[str] | None,
        typer.Argument(metavar="DIGEST...", help="artifacts to send; default: all of them"),
    ] = None,
    server: Server = CONTROL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    store: StoreOption = Path("store"),
) -> None:
    """Send artifacts to a server that takes them (`serve --allow-uploads`)."""
    place = Store(store)
    wanted = [place.find(each) for each in digests or ()] or place.digests()
    with connect(server, token_file, ca_file, timeout=600) as client:
        for digest in wanted:
            with tempfile.TemporaryFile() as tar:
                pack(place, digest, tar)
                sent = tar.tell()
                tar.seek(0)
                client.push(digest, tar)
            typer.echo(f"{short_digest(digest)}: {size(sent)}")


@store_app.command("gc")
@verb
def collect_garbage(
    keep: Annotated[
        list[Path] | None,
        typer.Option("--keep", "-k", help="topology file whose artifacts stay; may be repeated"),
    ] = None,
    server: ServerOption = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Name nothing: keep what is known to be in use, alone.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    store: StoreOption = Path("store"),
) -> None:
    """Remove the artifacts and weights that nothing uses.

    The topology files that `split` wrote for this store, and the history of every server that
    served from it, running or not, are known and need not be named, for as long as they are where
    they were. Of a server, what it serves and what it can be rolled back to stays.

    Waits for writers at work; a `split` that has not written its topology yet loses nothing.
    """
    if not (keep or server or everything):
        raise InvalidInput(
            "say what must stay: --keep TOPOLOGY for every topology file that uses this store, "
            "--server URL for a running server; or --all to remove everything that the files which "
            "the store knows of do not use"
        )
    place = Store(store)

    def used() -> Iterator[str]:
        yield from _users(_topologies(keep or (), server, token_file, ca_file, history=True))
        yield from _users(_known_topologies(place))

    before = {digest: _origin(place, digest) for digest in place.digests()}
    garbage = place.collect(used(), dry_run=dry_run)
    would = "would be " if dry_run else ""
    for digest in garbage.artifacts:
        typer.echo(f"{would}removed: {short_digest(digest)} {before.get(digest, '')}".rstrip())
    artifacts, tensors = len(garbage.artifacts), len(garbage.tensors)
    typer.echo(
        f"{would}freed: {size(garbage.bytes)}, {artifacts} artifact{'' if artifacts == 1 else 's'} "
        f"and {tensors} tensor file{'' if tensors == 1 else 's'}"
    )


@app.command()
@verb
def share(
    store: Annotated[Path, typer.Argument(help="directory of the artifact store")],
    topologies: Annotated[
        list[Path] | None,
        typer.Option("--topology", "-t", help="say which pipelines of this file share blocks"),
    ] = None,
    server: ServerOption = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
) -> None:
    """Say what the artifacts of STORE have in common, and what is saved by storing it once.

    Equal blocks are one artifact already; equal weights in different blocks are one tensor file.
    """
    place = Store(store)
    overlaps = place.overlaps()
    console = Console()
    print_table(
        console,
        (">bytes", ">tensors", ">saved", "~held by"),
        (
            (
                size(each.bytes),
                str(each.tensors),
                size(each.bytes * (len(each.artifacts) - 1)),
                ", ".join(f"{short_digest(d)} ({_origin(place, d)})" for d in each.artifacts),
            )
            for each in overlaps
        ),
    )
    print_table(
        console,
        ("artifact", ">weights", "~block", "~pipelines that share it"),
        _shared_blocks(place, _topologies(topologies or (), server, token_file, ca_file)),
    )
    if overlaps:
        console.print()
    saved = sum(each.bytes * (len(each.artifacts) - 1) for each in overlaps)
    typer.echo(
        f"equal weights are stored once: {size(saved)} saved"
        if saved
        else "no two artifacts hold equal weights"
    )
    if saved:
        typer.echo(
            "they may compute the same: splitting their models together makes that one\n"
            "block, see `blockflow split --help` under --share"
        )


def _shared_blocks(
    store: Store, topologies: Iterable[tuple[str, Topology]]
) -> Iterator[tuple[str, str, str, str]]:
    for name, topology in topologies:
        users: dict[str, dict[str, list[str]]] = {}
        for pipeline, settings in topology.pipelines.items():
            for block in settings.members:
                digest = topology.blocks[block].artifact
                users.setdefault(digest, {}).setdefault(block, []).append(pipeline)
        for digest, blocks in users.items():
            pipelines = [each for every in blocks.values() for each in every]
            if len(pipelines) > 1 and digest in store:
                yield (
                    short_digest(digest),
                    size(store.manifest(digest).parameter_bytes),
                    ", ".join(f"{name}: {block}" for block in blocks),
                    ", ".join(pipelines),
                )


def _topologies(
    files: Iterable[Path],
    server: str | None,
    token_file: Path | None,
    ca_file: Path | None,
    *,
    history: bool = False,
) -> list[tuple[str, Topology]]:
    """Each topology with what to call it: the file's name, or "server".

    With `history`, those that the server could be rolled back to as well.
    """
    found = [(path.name, read_topology(path)) for path in files]
    if server is not None:
        with connect(server, token_file, ca_file, timeout=30) as client:
            found.append(("server", parse(client.topology()["topology"])))
            if history:
                found += [
                    (f"generation {each['generation']}", parse(each["topology"]))
                    for each in client.history(limit=_HISTORY)
                ]
    return found


def _known_topologies(store: Store) -> Iterator[tuple[str, Topology]]:
    """What the files use that the store knows of; see Note [Who uses the store] in `artifact`.

    Raises InvalidInput where one cannot be read.
    """
    for path in store.users():
        if not path.exists():
            continue
        try:
            if path.name == STATE_FILE:
                yield from ((str(path), topology) for topology in topologies_in(path))
            else:
                yield str(path), read_topology(path)
        except (BlockFlowError, OSError) as error:
            raise InvalidInput(
                f"nothing was removed: {path} uses this store, and what it uses cannot be known "
                f"({error}); mend it, or move it away"
            ) from error


def _users(topologies: Iterable[tuple[str, Topology]]) -> dict[str, list[str]]:
    """Digest to the blocks that use it, as `topology: block`."""
    users: dict[str, list[str]] = {}
    for name, topology in topologies:
        for block, settings in topology.blocks.items():
            users.setdefault(settings.artifact, []).append(f"{name}: {block}")
    return users


def _origin(store: Store, digest: str) -> str:
    try:
        origin = store.manifest(digest).origin
    except StoreCorrupt:
        return "(damaged)"
    return f"{origin.model} {origin.index + 1}/{origin.count}"
