"""Verbs that ask a pipeline: `infer`."""
# ruff: noqa: PLC0415  imports inside the verbs keep torch out of those that do not compute

from __future__ import annotations

import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from blockflow.cli.command import INFERENCE, app, verb
from blockflow.cli.text import print_table
from blockflow.errors import InvalidInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blockflow.client import InferenceClient


@app.command()
@verb
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
    timing: Annotated[
        bool, typer.Option("--timing", help="Say where the request's time went.")
    ] = False,
    server: Annotated[str, typer.Option(help="the server's inference address")] = INFERENCE,
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
        timings = None
        if timing:
            answers, timings = client.infer_timed(pipeline, arrays)
        else:
            answers = client.infer(pipeline, arrays)
        took_ms = (time.perf_counter() - start) * 1e3
    console = Console()
    print_table(
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
    if timings is not None:
        print_table(
            console,
            ("~block", ">hop ms", ">queue ms", ">compute ms"),
            ((each.block, *(f"{value:.3f}" for value in each[1:])) for each in timings.blocks),
        )
        console.print(f"{timings.total_ms:.1f} ms in the server", highlight=False)
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
