"""Verbs that read models: `split`, `inspect`."""
# ruff: noqa: PLC0415  imports inside the verbs keep torch out of those that do not compute

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text
from rich.tree import Tree

from blockflow.artifact import Manifest, Store
from blockflow.cli.command import app, verb
from blockflow.cli.text import operations, print_table, short_digest, size
from blockflow.errors import BlockFlowError, InvalidInput
from blockflow.measure import ROWS, Measure
from blockflow.topology import Precision, Topology, dump, parse
from blockflow.wiring import path as path_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from blockflow.models import ScriptFile
    from blockflow.plot import Profile
    from blockflow.share import Family, SharedBlock
    from blockflow.split import SplitResult

_DIGEST = re.compile(r"(sha256-)?[0-9a-f]{4,64}")

_Rows = Annotated[
    int | None,
    typer.Option("--rows", min=1, help=f"rows of the batch to measure with; default: {ROWS}"),
]
_Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="|".join(get_args(Precision)),
        help="what to measure float32 computed in, as a block's precision; default: fp32",
    ),
]


@app.command()
@verb
def split(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="resnet18 to resnet152, package.module:factory, torchvision:NAME, timm:NAME, "
            "or a .pt2 or .pt file",
        ),
    ],
    blocks: Annotated[
        int | None, typer.Option("--blocks", "-n", min=1, help="number of blocks of equal cost")
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="cut before these modules: layer2,layer3")
    ] = None,
    every: Annotated[bool, typer.Option("--every", help="Cut wherever it can be cut.")] = False,
    share: Annotated[
        bool,
        typer.Option("--share", help="Cut several models so that what is equal is one block."),
    ] = False,
    store: Annotated[Path, typer.Option(help="directory of the artifact store")] = Path("store"),
    output: Annotated[Path, typer.Option("--output", "-o", help="topology file to write")] = Path(
        "topology.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace the topology file.")] = False,
    name: Annotated[
        str | None, typer.Option(help="name of the pipeline; default: the model's")
    ] = None,
    device: Annotated[str, typer.Option(help="where to serve it: cpu, or cuda:INDEX")] = "cpu",
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", help="an input, such as x:float32[batch,3,224,224]"),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(help="balance by times measured on cpu or cuda:INDEX; default: by a model"),
    ] = None,
    rows: _Rows = None,
    precision: _Precision = None,
    seed: Annotated[int, typer.Option(help="of a built-in model's random weights")] = 0,
) -> None:
    """Cut MODEL into blocks and write a topology that serves them.

    With --share, several models: what they compute alike, with the same weights, becomes blocks
    that are stored and deployed once, and each model is a pipeline. The rest, and what is shared,
    is cut further as the other options say.
    """
    # What would make the result unusable is found before the work, which takes minutes.
    if len(models) > 1 and not share:
        raise InvalidInput(f"{len(models)} models are split together with --share only")
    if share and (name is not None or measure is not None):
        refused = "--name" if name is not None else "--measure"
        raise InvalidInput(
            f"{refused} does not go with --share: pipelines are named after the models, and blocks "
            "that models share are balanced by modelled costs"
        )
    if measure is not None and blocks is None:
        raise InvalidInput("--measure goes with --blocks: nothing else asks what a block costs")
    modules = None if at is None else _module_names(at)
    ways = sum((blocks is not None, at is not None, every))
    if ways > 1 or not (ways or share):
        raise InvalidInput("say how to split: --blocks N, --at MODULE,MODULE, or --every")
    _check_names(name or "model", device)
    measured = _measure(measure, rows, precision)
    if output.exists() and not force:
        raise InvalidInput(f"{output} exists; --force replaces it")
    if not output.parent.is_dir():
        raise InvalidInput(f"there is no directory {output.parent} to write {output.name} into")

    place = Store(store, create=True)
    # Until the topology is written, nothing says that the blocks are in use.
    with place.writing():
        if share:
            with _progress(f"{models[0]}: loading torch") as say:
                from blockflow.models import parse_input, resolve
                from blockflow.share import family_topology, split_shared
                from blockflow.split import AtModules, Everywhere

                where = AtModules(modules) if modules else Everywhere() if every else blocks or 1
                ports = [parse_input(each) for each in inputs or ()]
                family = split_shared(
                    (resolve(model, ports, seed=seed) for model in models),
                    place,
                    blocks=where,
                    progress=say,
                )
            topology = family_topology(family, device=device)
        else:
            with _progress(f"{models[0]}: loading torch") as say:
                from blockflow.models import parse_input, resolve
                from blockflow.split import AtModules, Everywhere, split_model, topology_for

                where = AtModules(modules) if modules else Everywhere() if every else blocks or 1
                ports = [parse_input(each) for each in inputs or ()]
                source = resolve(models[0], ports, seed=seed)
                result = split_model(source, where, place, measure=measured, progress=say)
            topology = topology_for(result, name or result.model, device=device)
        relative = os.path.relpath(store.resolve(), output.parent.resolve())
        text = dump(topology.model_copy(update={"store": relative}))
        used = {block.artifact for block in topology.blocks.values()}
        with place.using(used, output):
            _replace(output, text)
    if share:
        _print_family(family, topology, output)
    else:
        _print_split(result, topology, output, measured)


@app.command()
@verb
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|DIGEST",
            help="a model as `split` takes it, or an artifact as `store ls` prints it",
        ),
    ],
    blocks: Annotated[
        int | None, typer.Option("--blocks", "-n", min=1, help="mark the cuts for so many blocks")
    ] = None,
    tensors: Annotated[
        int, typer.Option(min=1, help="most tensors that may cross a cut point")
    ] = 6,
    plot: Annotated[
        Path | None, typer.Option(help="draw a picture into this .png or .html file")
    ] = None,
    measure: Annotated[
        str | None, typer.Option(help="measure times on cpu or cuda:INDEX; default: model them")
    ] = None,
    rows: _Rows = None,
    precision: _Precision = None,
    store: Annotated[Path, typer.Option(help="directory of the artifact store")] = Path("store"),
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", help="an input, such as x:float32[batch,3,224,224]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of a built-in model's random weights")] = 0,
) -> None:
    """Show where a model can be cut and what lies between, or what an artifact is."""
    measured = _measure(measure, rows, precision)
    if plot is not None:
        from blockflow.plot import check_picture

        check_picture(plot)
    place, manifest = None, None
    if _DIGEST.fullmatch(model):
        place = Store(store)
        manifest = place.verify(place.find(model), weights=False)
        _print_manifest(place, manifest)
        if plot is None and blocks is None and measure is None:
            return
    with _progress(f"{model}: loading torch") as say:
        from blockflow.models import ScriptFile, parse_input, resolve
        from blockflow.plot import draw
        from blockflow.share import read_source
        from blockflow.weights import read_program

        if place is not None and manifest is not None:
            if manifest.format != "torch.export":
                raise InvalidInput(f"{model} is TorchScript, into which BlockFlow does not look")
            name = f"{manifest.origin.model} {manifest.origin.index + 1}/{manifest.origin.count}"
            program = read_program(place, manifest)
            shown = _profile(program, name, blocks, tensors, measured, say)
        else:
            source = resolve(model, [parse_input(each) for each in inputs or ()], seed=seed)
            name = source.name
            say(f"{name}: exporting")
            if isinstance(source, ScriptFile):
                if measure is not None:
                    raise InvalidInput(f"{model} is TorchScript, whose costs are modelled only")
                shown = _script_profile(source, blocks)
            else:
                shown = _profile(read_source(source), name, blocks, tensors, measured, say)
        if plot is not None:
            say(f"{name}: drawing {plot}")
            draw(shown, plot)
    if manifest is None or blocks is not None:
        _print_profile(shown)
    if plot is not None:
        typer.echo(f"the picture is in {plot}")


def _profile(
    program: ExportedProgram,
    name: str,
    blocks: int | None,
    tensors: int,
    measure: Measure | None,
    say: Callable[[str], None],
) -> Profile:
    from blockflow.cuts import Analysis
    from blockflow.plot import profile
    from blockflow.split import balanced_places

    say(f"{name}: looking for cut points")
    analysis = Analysis(program, measure)
    chosen = balanced_places(analysis, blocks, name) if blocks else []
    return profile(analysis, name, tensors=tensors, chosen=chosen)


def _script_profile(source: ScriptFile, blocks: int | None) -> Profile:
    from blockflow.plot import script_profile
    from blockflow.split import script_places, script_stages

    every = script_stages(source)
    return script_profile(every, source.name, script_places(source, every, blocks or 1))


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all: a full disk must not cost what was there before."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:
        raise BlockFlowError(
            f"{path} cannot be written ({error.strerror}); the blocks are in the store, and what "
            "was in the file still is"
        ) from error
    finally:
        new.unlink(missing_ok=True)


def _print_profile(shown: Profile) -> None:
    """A line for each cut point, with all that lies before it; those that are made are marked."""
    console = Console()
    totals = {label: values for label, _, values in shown.cumulative()}
    weights = list(accumulate(shown.parameter_bytes, initial=0))
    flops = list(accumulate(shown.flops, initial=0))
    written = list(accumulate(shown.activation_bytes, initial=0))
    seconds = list(accumulate(shown.seconds, initial=0.0))
    crossing = {cut.place: cut for cut in shown.cuts}
    block = 1
    rows = []
    for place in [*crossing, len(shown.seconds)]:
        made = place in shown.chosen
        cut = crossing.get(place)
        rows.append(
            (
                f"✂ {block}" if made else "",
                shown.operators[place - 1] if cut else "the end",
                size(weights[place]),
                operations(flops[place]),
                size(written[place]),
                f"{1e3 * seconds[place]:.3f}" if shown.measured else f"{totals['time'][place]:.1f}",
                size(cut.row_bytes) if cut else "",
                str(cut.tensors) if cut else "",
            )
        )
        block += made
    columns = (
        *("~behind", ">weights", ">work/row", ">written"),
        *(">ms" if shown.measured else ">time %", ">crosses", ">tensors"),
    )
    typer.echo(f"{shown.name}: {shown.summary()}")
    if shown.chosen:
        print_table(console, ("cut", *columns), rows)
    else:
        print_table(console, columns, (row[1:] for row in rows))
    for index, (first, end, share) in enumerate(shown.blocks(), 1):
        if shown.chosen:
            typer.echo(
                f"block {index}: {share:.1%} of the "
                f"{'measured' if shown.measured else 'modelled'} time, "
                f"{size(weights[end] - weights[first])}, "
                f"{operations(flops[end] - flops[first])} per row"
                + (f", {1e3 * (seconds[end] - seconds[first]):.3f} ms" if shown.measured else "")
            )


def _print_manifest(place: Store, manifest: Manifest) -> None:
    console = Console()
    origin = manifest.origin
    weights = place.weights(manifest)
    stored = sum({each.sha256: each.bytes for each in weights.values()}.values())
    lines = [
        ("artifact", manifest.digest),
        ("format", manifest.format),
        ("cut from", f"{origin.model}, block {origin.index + 1} of {origin.count}"),
        ("operators", f"{origin.first} to {origin.last}"),
        ("parameters", size(manifest.parameter_bytes)),
        ("arithmetic", f"{operations(manifest.flops)} per row" if manifest.flops else "unknown"),
        ("weights", f"{len(weights)} in tensor files of {size(stored)}" if weights else "inside"),
        ("writes inputs", "yes, to copies" if manifest.mutates_inputs else "no"),
        ("files", ", ".join(f"{name} {size(f.bytes)}" for name, f in manifest.files.items())),
    ]
    for label, value in lines:
        typer.echo(f"{label:15}{value}")
    print_table(
        console,
        ("", "~port", "dtype", "~shape"),
        (
            (kind, port.name, port.dtype, "×".join(map(str, port.shape)))
            for kind, ports in (("input", manifest.inputs), ("output", manifest.outputs))
            for port in ports
        ),
    )


@contextlib.contextmanager
def _progress(first: str) -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done, where that is a terminal; nobody knows how long it takes.

    The context gives the function to say it with.
    """
    errors = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(
        *columns, console=errors, transient=True, disable=not errors.is_terminal
    ) as progress:
        task = progress.add_task(escape(first), total=None)
        yield lambda step: progress.update(task, description=escape(step))


def _module_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if "" in names:
        raise InvalidInput(f"--at takes names of modules, such as layer2,layer3, not {text!r}")
    return names


def _check_names(pipeline: str, device: str) -> None:
    parse(
        {
            "blocks": {"block": {"artifact": f"sha256-{0:064}", "device": device}},
            "pipelines": {pipeline: {"blocks": ["block"]}},
        }
    )


def _measure(device: str | None, rows: int | None, precision: str | None) -> Measure | None:
    """What the options --measure, --rows and --precision ask for."""
    if device is None:
        for option, given in (("--rows", rows), ("--precision", precision)):
            if given is not None:
                raise InvalidInput(
                    f"{option} says how to measure, and goes with --measure cpu or --measure "
                    "cuda:INDEX"
                )
        return None
    if not re.fullmatch(r"cpu|cuda:\d+", device):
        raise InvalidInput(f"--measure takes cpu or cuda:INDEX, such as cuda:0, not {device!r}")
    for known in get_args(Precision):
        if known == (precision or "fp32"):
            return Measure(device, ROWS if rows is None else rows, known)
    raise InvalidInput(f"--precision takes {', '.join(get_args(Precision))}, not {precision!r}")


def _print_split(
    result: SplitResult, topology: Topology, output: Path, measured: Measure | None
) -> None:
    console = Console()
    seconds = sum(block.seconds for block in result.blocks)
    print_table(
        console,
        ("~block", ">weights", ">work/row", ">cost", "artifact", ""),
        (
            (
                block.name,
                size(block.manifest.parameter_bytes),
                operations(block.manifest.flops),
                f"{block.seconds / seconds:.0%}" if seconds else "-",
                short_digest(block.digest),
                "stored before" if block.shared else "",
            )
            for block in result.blocks
        ),
    )
    (pipeline,) = topology.pipelines
    console.print()
    if measured is not None:
        typer.echo(f"cost is time on {measured}")
    typer.echo(f"pipeline {pipeline} is in {output}; next: blockflow serve --topology {output}")


def _print_family(family: Family, topology: Topology, output: Path) -> None:
    """The blocks, from what most models share to what each has for itself: as a tree if they are
    one, and otherwise as a list with the path of each model.
    """
    console = Console()
    leaves: dict[tuple[str, ...], list[str]] = {}
    for model in family.models:
        leaves.setdefault(model.blocks, []).append(model.name)
    paths = dict.fromkeys(
        model.blocks[:depth] for model in family.models for depth in range(1, len(model.blocks) + 1)
    )
    console.print()
    if len(paths) == len(family.blocks):
        tree = Tree(Text("input"), guide_style="dim")
        branches: dict[tuple[str, ...], Tree] = {(): tree}
        for path in paths:
            label = _described(family.blocks[path[-1]])
            ends = leaves.get(path, [])
            if ends and ends != [path[-1]]:
                label.append(f"  → {_listed(ends)}", style="green")
            branches[path] = branches[path[:-1]].add(label)
        console.print(tree, highlight=False)
    else:
        for block in family.blocks.values():
            console.print(_described(block))
        console.print()
        for name, pipeline in topology.pipelines.items():
            console.print(Text(f"{name}: {path_of(pipeline)}"))
    if not any(len(block.models) > 1 for block in family.blocks.values()) and (
        len(family.models) > 1 and not family.kept_apart
    ):
        console.print()
        typer.echo("the models have nothing in common: no operator of one is one of another")
    for said in family.kept_apart:
        console.print()
        console.print(Text(said))
    apart, together = family.parameter_bytes_apart, family.parameter_bytes
    saved = 1 - together / apart if apart else 0.0
    print_table(
        console,
        ("", ">apart", ">shared", ">saved"),
        [
            ("weights", size(apart), size(together), f"{saved:.1%}"),
            (
                "one row through all models",
                operations(family.flops_apart),
                operations(family.flops),
                f"{1 - family.flops / family.flops_apart:.1%}" if family.flops_apart else "-",
            ),
        ],
    )
    console.print()
    count = len(family.models)
    typer.echo(
        f"{count} pipeline{'' if count == 1 else 's'} through {len(family.blocks)} blocks "
        f"{'is' if count == 1 else 'are'} in {output}; next: blockflow serve --topology {output}"
    )


def _described(block: SharedBlock) -> Text:
    label = Text(block.name, style="bold" if len(block.models) > 1 else "")
    flops = block.manifest.flops
    label.append(f"  {size(block.manifest.parameter_bytes)}", style="cyan")
    label.append(f"  {operations(flops)}" if flops else "", style="cyan")
    label.append(f"  {short_digest(block.digest)}", style="dim")
    if len(block.models) > 1:
        label.append(f"  shared by {_listed(block.models)}")
    return label


def _listed(names: Sequence[str]) -> str:
    if len(names) <= 4:
        return ", ".join(names)
    return f"{len(names)} models ({names[0]} … {names[-1]})"
