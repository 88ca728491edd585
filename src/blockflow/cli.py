"""The command line: `blockflow split`, `serve`, `apply`, `status`, `infer`, `demo`.

Exit codes: 0 done, 1 refused or failed (one message on stderr says why), 2 wrong usage, 130 Ctrl-C.
BLOCKFLOW_TRACEBACK=1 shows where an error came from.

What a verb needs is imported when it runs: torch takes seconds to load, and only `split` and `demo`
compute.
"""

from __future__ import annotations

import functools
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from blockflow import __version__
from blockflow.errors import BlockFlowError, InvalidInput, TopologyInvalid
from blockflow.options import ServeOptions
from blockflow.topology import Topology, dump, parse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blockflow.client import InferenceClient
    from blockflow.split import SplitResult
    from blockflow.status import BlockStatus, PipelineStatus

P = ParamSpec("P")

_CONTROL = f"http://127.0.0.1:{ServeOptions.model_fields['control_port'].default}"
_INFERENCE = f"http://127.0.0.1:{ServeOptions.model_fields['http_port'].default}"

app = typer.Typer(
    name="blockflow",
    help="Deploy, manage and serve modular neural networks.",
    no_args_is_help=True,
    add_completion=False,
    # `_verb` reports errors, in one line.
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; the entry point of the `blockflow` program."""
    app()


def _verb(run: Callable[P, None]) -> Callable[P, None]:
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
            for line in _explain(error):
                typer.echo(line, err=True)
            raise typer.Exit(1) from None

    return guarded


def _explain(error: Exception) -> list[str]:
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


def _flag(option: str, *names: str) -> Any:
    """Declare a flag for one of the server's options, in that option's own words."""
    return typer.Option(*names, help=ServeOptions.model_fields[option].description)


def _default(option: str) -> Any:
    return ServeOptions.model_fields[option].default


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blockflow {__version__}")
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


@app.command()
@_verb
def split(
    model: Annotated[
        str, typer.Argument(help="resnet18 to resnet152, package.module:factory, or a .pt2 or .pt")
    ],
    blocks: Annotated[int, typer.Option("--blocks", "-n", min=1, help="number of blocks")],
    store: Annotated[Path, typer.Option(help="directory of the artifact store")] = Path("store"),
    output: Annotated[Path, typer.Option("--output", "-o", help="topology file to write")] = Path(
        "topology.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace the topology file.")] = False,
    name: Annotated[
        str | None, typer.Option(help="name of the pipeline; default: the model's")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda:<index>")] = "cpu",
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", help="an input, such as x:float32[batch,3,224,224]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of a built-in model's random weights")] = 0,
) -> None:
    """Cut MODEL into blocks of equal cost and write a topology that serves them."""
    # What would make the result unusable is found before the work, which takes minutes.
    _check_names(name or "model", device)
    if output.exists() and not force:
        raise InvalidInput(f"{output} exists; --force replaces it")
    if not output.parent.is_dir():
        raise InvalidInput(f"there is no directory {output.parent} to write {output.name} into")

    errors = Console(stderr=True)
    # Each block is built and stored; the model is read before, and compared with in between.
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task(f"{escape(model)}: loading torch", total=2 * blocks + 2)

        from blockflow.artifact import Store
        from blockflow.models import parse_input, resolve
        from blockflow.split import split_model, topology_for

        def say(step: str) -> None:
            progress.update(task, description=escape(step), advance=1)

        source = resolve(model, [parse_input(each) for each in inputs or ()], seed=seed)
        result = split_model(source, blocks, Store(store, create=True), progress=say)

    topology = topology_for(result, name or result.model, device=device)
    relative = os.path.relpath(store.resolve(), output.parent.resolve())
    output.write_text(dump(topology.model_copy(update={"store": relative})), encoding="utf-8")
    _print_split(result, topology, output)


def _check_names(pipeline: str, device: str) -> None:
    parse(
        {
            "blocks": {"block": {"artifact": f"sha256-{0:064}", "device": device}},
            "pipelines": {pipeline: {"blocks": ["block"]}},
        }
    )


def _print_split(result: SplitResult, topology: Topology, output: Path) -> None:
    console = Console()
    seconds = sum(block.seconds for block in result.blocks)
    _print_table(
        console,
        ("~block", ">MB", ">MFLOP/row", ">cost", "artifact", ""),
        (
            (
                block.name,
                f"{block.manifest.parameter_bytes / 1e6:.1f}",
                f"{block.manifest.flops / 1e6:.1f}" if block.manifest.flops else "-",
                f"{block.seconds / seconds:.0%}" if seconds else "-",
                _short_digest(block.digest),
                "stored before" if block.shared else "",
            )
            for block in result.blocks
        ),
    )
    (pipeline,) = topology.pipelines
    console.print()
    typer.echo(f"pipeline {pipeline} is in {output}; next: blockflow serve --topology {output}")


@app.command()
@_verb
def serve(
    topology: Annotated[
        Path | None, typer.Option("--topology", "-t", help="topology file to deploy at the start")
    ] = None,
    store: Annotated[Path | None, _flag("store", "--store")] = None,
    host: Annotated[str, _flag("host", "--host")] = _default("host"),
    control_port: Annotated[int, _flag("control_port", "--port")] = _default("control_port"),
    http_port: Annotated[int, _flag("http_port", "--http-port")] = _default("http_port"),
    run_dir: Annotated[Path | None, _flag("run_dir", "--run-dir")] = None,
    max_body_bytes: Annotated[int, _flag("max_body_bytes", "--max-body-bytes")] = _default(
        "max_body_bytes"
    ),
    request_timeout_s: Annotated[float, _flag("request_timeout_s", "--request-timeout")] = _default(
        "request_timeout_s"
    ),
    queue_depth: Annotated[int, _flag("queue_depth", "--queue-depth")] = _default("queue_depth"),
    ready_timeout_s: Annotated[float, _flag("ready_timeout_s", "--ready-timeout")] = _default(
        "ready_timeout_s"
    ),
    drain_timeout_s: Annotated[float, _flag("drain_timeout_s", "--drain-timeout")] = _default(
        "drain_timeout_s"
    ),
    log_level: Annotated[str, _flag("log_level", "--log-level")] = _default("log_level"),
) -> None:
    """Serve a topology until Ctrl-C."""
    try:
        options = ServeOptions.model_validate(
            {
                "topology": _read_topology(topology) if topology else None,
                "store": store.absolute() if store else None,
                "host": host,
                "control_port": control_port,
                "http_port": http_port,
                "run_dir": run_dir,
                "max_body_bytes": max_body_bytes,
                "request_timeout_s": request_timeout_s,
                "queue_depth": queue_depth,
                "ready_timeout_s": ready_timeout_s,
                "drain_timeout_s": drain_timeout_s,
                "log_level": log_level,
            }
        )
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, each['loc']))}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()
        ]
        raise InvalidInput("; ".join(wrong)) from error

    from blockflow.server import serve as run_server

    run_server(options)


@app.command()
@_verb
def apply(
    file: Annotated[Path, typer.Argument(help="topology file (YAML)")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check it, and say what would change.")
    ] = False,
    server: Annotated[str, typer.Option(help="the server's management address")] = _CONTROL,
) -> None:
    """Make a running server serve FILE, or say everything that is wrong with it."""
    from blockflow.client import ControlClient
    from blockflow.status import ApplyResult

    wanted = _read_topology(file)
    with ControlClient(server) as client:
        result = ApplyResult.model_validate(
            client.put_topology(wanted.model_dump(mode="json"), dry_run)
        )
    would = "would be " if dry_run else ""
    replaced = sorted({*result.start} & {*result.stop})
    for done, workers in (
        ("started", sorted({*result.start} - {*replaced})),
        ("replaced", replaced),
        ("stopped", sorted({*result.stop} - {*replaced})),
        ("kept", sorted(result.keep)),
    ):
        if workers:
            typer.echo(f"{would}{done}: {', '.join(workers)}")
    if dry_run:
        typer.echo(f"generation {result.generation} still serves: this was a dry run")
    else:
        typer.echo(f"generation {result.generation} serves")


@app.command()
@_verb
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    server: Annotated[str, typer.Option(help="the server's management address")] = _CONTROL,
) -> None:
    """Show pipelines, blocks, memory and connections."""
    from blockflow.client import ControlClient
    from blockflow.status import BlockStatus, PipelineStatus

    with ControlClient(server, timeout=10) as client:
        generation = client.topology()["generation"]
        blocks, pipelines, devices = client.blocks(), client.pipelines(), client.devices()
    if as_json:
        everything = {
            "generation": generation,
            "pipelines": pipelines,
            "blocks": blocks,
            **devices,
        }
        typer.echo(json.dumps(everything, indent=2))
        return
    _print_status(
        generation,
        [BlockStatus.model_validate(each) for each in blocks],
        [PipelineStatus.model_validate(each) for each in pipelines],
    )


def _print_status(
    generation: int, blocks: list[BlockStatus], pipelines: list[PipelineStatus]
) -> None:
    console = Console()
    console.print(f"generation {generation}", highlight=False)
    if not blocks:
        console.print("nothing is deployed")
        return
    _print_table(
        console,
        ("~pipeline", "ready", ">requests", ">errors", "~blocks"),
        (
            (
                each.name,
                _yes(each.ready),
                f"{each.requests}",
                f"{each.errors}",
                " → ".join(each.blocks),
            )
            for each in pipelines
        ),
    )
    _print_table(
        console,
        ("~block", "state", "~worker", "artifact", ">requests", ">ms"),
        (
            (
                each.name,
                each.state.value,
                each.worker,
                _short_digest(each.artifact),
                str(each.requests),
                "-" if each.compute_ms_mean is None else f"{each.compute_ms_mean:.2f}",
            )
            for each in blocks
        ),
    )
    _print_table(
        console,
        ("~worker", "device", ">pid", ">device memory", ">host memory"),
        (
            (
                each.worker,
                each.device,
                "-" if each.pid is None else str(each.pid),
                _size(each.device_memory_bytes),
                _size(each.host_memory_bytes),
            )
            for each in {block.worker: block for block in blocks}.values()
        ),
    )
    _print_table(
        console,
        ("~from", "~to", "carrier", ">messages", ">bytes", ">through host"),
        (
            (
                each.name,
                channel.peer,
                channel.carrier,
                str(channel.messages),
                _size(channel.bytes),
                _size(channel.host_bytes),
            )
            for each in blocks
            for channel in each.channels
        ),
    )
    reasons = [(f"pipeline {each.name}", each.reason) for each in pipelines]
    reasons += [(f"block {each.name}", each.reason) for each in blocks]
    for what, reason in reasons:
        if reason:
            console.print(f"{what}: {reason}", markup=False, highlight=False)


@app.command()
@_verb
def infer(
    pipeline: Annotated[str, typer.Argument(help="pipeline to ask")],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", "-i", help="an input as NAME=FILE.npy")
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Make up the inputs that are not given.")
    ] = False,
    rows: Annotated[int, typer.Option(min=1, help="rows of inputs that are made up")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="save the outputs to this .npz file")
    ] = None,
    server: Annotated[str, typer.Option(help="the server's inference address")] = _INFERENCE,
) -> None:
    """Send one request to a pipeline and summarise the answer."""
    import numpy as np

    from blockflow.client import InferenceClient

    arrays = dict(_read_input(each) for each in inputs or ())
    if not arrays and not random:
        raise typer.BadParameter("give --input NAME=FILE.npy for every input, or --random")
    with InferenceClient(server) as client:
        if random:
            arrays = _made_up(client, pipeline, rows) | arrays
        start = time.perf_counter()
        answers = client.infer(pipeline, arrays)
        took_ms = (time.perf_counter() - start) * 1e3
    console = Console()
    _print_table(
        console,
        ("~output", "dtype", "~shape", ">min", ">mean", ">max"),
        (
            (
                name,
                str(array.dtype),
                "×".join(map(str, array.shape)),
                *(
                    f"{float(f(array)):.6g}" if array.size else "-"
                    for f in (np.min, np.mean, np.max)
                ),
            )
            for name, array in answers.items()
        ),
    )
    console.print(f"answered in {took_ms:.1f} ms", highlight=False)
    if output is not None:
        _save(output, answers)
        console.print(f"saved to {output}", markup=False, highlight=False)


def _read_input(given: str) -> tuple[str, NDArray[Any]]:
    import numpy as np

    name, equals, path = given.partition("=")
    if not equals or not name or not path:
        raise typer.BadParameter(f"{given!r} is not NAME=FILE.npy")
    with Path(path).open("rb") as file:
        try:
            return name, np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise InvalidInput(f"{path} is no .npy file of numbers: {error}") from error


def _save(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a .npz file. `numpy.savez` takes names as keywords, and so refuses some of them."""
    import numpy as np

    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _made_up(client: InferenceClient, pipeline: str, rows: int) -> dict[str, NDArray[Any]]:
    import numpy as np

    from blockflow.oip import DATATYPES

    dtypes = {each.name: each.numpy for each in DATATYPES}
    generator = np.random.default_rng()
    arrays = {}
    for port in client.metadata(pipeline)["inputs"]:
        if port["datatype"] == "BF16":
            raise InvalidInput(f"--random makes no BF16: give --input {port['name']}=FILE.npy")
        shape = [rows if size == -1 else size for size in port["shape"]]
        # From 0 to 1: integers become 0, which every index and category allows.
        arrays[port["name"]] = generator.random(shape).astype(dtypes[port["datatype"]])
    return arrays


@app.command()
@_verb
def demo() -> None:
    """Split models, serve them and watch shared blocks at work, on this machine alone."""
    from blockflow.demo import run

    run()


def _read_topology(path: Path) -> Topology:
    """Read a topology file; its `store` becomes absolute, from the file's own directory."""
    topology = parse(path.read_bytes())
    if topology.store is None:
        return topology
    store = (path.parent / topology.store).resolve()
    return topology.model_copy(update={"store": str(store)})


def _print_table(console: Console, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    """Print a table, unless it has no rows.

    Columns marked `>` hold numbers; those marked `~` are folded where the line is too short.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.lstrip(">~"),
            justify="right" if column.startswith(">") else "left",
            no_wrap=not column.startswith("~"),
            overflow="fold",
        )
    for row in rows:
        # Text: rich would read brackets in plain strings as markup.
        table.add_row(*(Text(cell) for cell in row))
    if table.row_count:
        console.print()
        console.print(table)


def _short_digest(digest: str) -> str:
    return digest.removeprefix("sha256-")[:12]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
