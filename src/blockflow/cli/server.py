"""Verbs around a server: `serve`, `apply`, `status`."""
# ruff: noqa: PLC0415  imports inside the verbs keep torch out of those that do not compute

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from blockflow.cli.command import CONTROL, app, default, flag, read_topology, verb
from blockflow.cli.text import print_table, short_digest, size, yes
from blockflow.errors import InvalidInput
from blockflow.options import ServeOptions

if TYPE_CHECKING:
    from blockflow.client import ControlClient
    from blockflow.devices import Survey
    from blockflow.status import BlockStatus, GatewayStatus, PipelineStatus

Server = Annotated[str, typer.Option(help="the server's management address")]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file", envvar="BLOCKFLOW_TOKEN_FILE", help="file with the server's bearer token"
    ),
]
CaFile = Annotated[
    Path | None,
    typer.Option(
        "--ca-file",
        envvar="BLOCKFLOW_CA_FILE",
        help="certificates (PEM) to check the server's with",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only check it, and say what would change.")
]
IfMatch = Annotated[
    int | None, typer.Option("--if-match", help="refuse unless this generation serves")
]


def connect(
    server: str, token_file: Path | None, ca_file: Path | None, timeout: float = 300.0
) -> ControlClient:
    """A client for a verb's flags. Raises InvalidInput, OSError."""
    from blockflow.access import read_token
    from blockflow.client import ControlClient

    token = None if token_file is None else read_token(token_file)
    return ControlClient(server, timeout, token=token, ca_file=ca_file)


def show_result(answer: dict[str, Any]) -> None:
    """Say what a change did, or in a dry run would do."""
    from blockflow.status import ApplyResult

    result = ApplyResult.model_validate(answer)
    would = "would be " if result.dry_run else ""
    replaced = sorted({*result.start} & {*result.stop})
    for done, workers in (
        ("started", sorted({*result.start} - {*replaced})),
        ("replaced", replaced),
        ("stopped", sorted({*result.stop} - {*replaced})),
        ("kept", sorted(result.keep)),
    ):
        if workers:
            typer.echo(f"{would}{done}: {', '.join(workers)}")
    if result.dry_run:
        typer.echo(f"generation {result.generation} still serves: this was a dry run")
    else:
        typer.echo(f"generation {result.generation} serves")


@app.command()
@verb
def serve(
    topology: Annotated[
        Path | None, typer.Option("--topology", "-t", help="topology file to deploy at the start")
    ] = None,
    store: Annotated[Path | None, flag("store", "--store")] = None,
    host: Annotated[str, flag("host", "--host")] = default("host"),
    control_port: Annotated[int, flag("control_port", "--port")] = default("control_port"),
    http_port: Annotated[int, flag("http_port", "--http-port")] = default("http_port"),
    run_dir: Annotated[Path | None, flag("run_dir", "--run-dir")] = None,
    state_dir: Annotated[Path | None, flag("state_dir", "--state-dir")] = None,
    token_file: Annotated[Path | None, flag("token_file", "--token-file")] = None,
    inference_token_file: Annotated[
        Path | None, flag("inference_token_file", "--inference-token-file")
    ] = None,
    tls_cert: Annotated[Path | None, flag("tls_cert", "--tls-cert")] = None,
    tls_key: Annotated[Path | None, flag("tls_key", "--tls-key")] = None,
    max_body_bytes: Annotated[int, flag("max_body_bytes", "--max-body-bytes")] = default(
        "max_body_bytes"
    ),
    allow_uploads: Annotated[bool, flag("allow_uploads", "--allow-uploads")] = default(
        "allow_uploads"
    ),
    max_upload_bytes: Annotated[int, flag("max_upload_bytes", "--max-upload-bytes")] = default(
        "max_upload_bytes"
    ),
    request_timeout_s: Annotated[float, flag("request_timeout_s", "--request-timeout")] = default(
        "request_timeout_s"
    ),
    queue_depth: Annotated[int, flag("queue_depth", "--queue-depth")] = default("queue_depth"),
    max_slowdown: Annotated[float, flag("max_slowdown", "--max-slowdown")] = default(
        "max_slowdown"
    ),
    ready_timeout_s: Annotated[float, flag("ready_timeout_s", "--ready-timeout")] = default(
        "ready_timeout_s"
    ),
    drain_timeout_s: Annotated[float, flag("drain_timeout_s", "--drain-timeout")] = default(
        "drain_timeout_s"
    ),
    heartbeat_timeout_s: Annotated[
        float, flag("heartbeat_timeout_s", "--heartbeat-timeout")
    ] = default("heartbeat_timeout_s"),
    hang_grace_s: Annotated[float, flag("hang_grace_s", "--hang-grace")] = default("hang_grace_s"),
    log_format: Annotated[str, flag("log_format", "--log-format")] = default("log_format"),
    log_level: Annotated[str, flag("log_level", "--log-level")] = default("log_level"),
) -> None:
    """Serve a topology, or without one what served last, until Ctrl-C."""
    try:
        options = ServeOptions.model_validate(
            {
                "topology": read_topology(topology) if topology else None,
                "store": store.absolute() if store else None,
                "host": host,
                "control_port": control_port,
                "http_port": http_port,
                "run_dir": run_dir,
                "state_dir": state_dir.absolute() if state_dir else None,
                "token_file": token_file,
                "inference_token_file": inference_token_file,
                "tls_cert": tls_cert,
                "tls_key": tls_key,
                "max_body_bytes": max_body_bytes,
                "allow_uploads": allow_uploads,
                "max_upload_bytes": max_upload_bytes,
                "request_timeout_s": request_timeout_s,
                "queue_depth": queue_depth,
                "max_slowdown": max_slowdown,
                "ready_timeout_s": ready_timeout_s,
                "drain_timeout_s": drain_timeout_s,
                "heartbeat_timeout_s": heartbeat_timeout_s,
                "hang_grace_s": hang_grace_s,
                "log_format": log_format,
                "log_level": log_level,
            }
        )
    except ValidationError as error:
        wrong = [
            ": ".join((*map(str, each["loc"]), each["msg"].removeprefix("Value error, ")))
            for each in error.errors()
        ]
        raise InvalidInput("; ".join(wrong)) from error

    from blockflow.server import serve as run_server

    run_server(options)


@app.command()
@verb
def apply(
    file: Annotated[Path, typer.Argument(help="topology file (YAML)")],
    dry_run: DryRun = False,
    if_match: IfMatch = None,
    timeout_s: Annotated[
        float | None,
        typer.Option("--timeout", help="seconds that new workers may take to get ready"),
    ] = None,
    server: Server = CONTROL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
) -> None:
    """Make a running server serve FILE, or say everything that is wrong with it."""
    wanted = read_topology(file)
    with connect(server, token_file, ca_file) as client:
        show_result(
            client.put_topology(
                wanted.model_dump(mode="json"), dry_run, match=if_match, timeout_s=timeout_s
            )
        )


@app.command()
@verb
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it again every second until Ctrl-C.")
    ] = False,
    server: Server = CONTROL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
) -> None:
    """Show pipelines, blocks, memory and connections."""
    with connect(server, token_file, ca_file, timeout=10) as client:
        while True:
            if watch:
                Console().clear()
            _show_status(client, as_json)
            if not watch:
                return
            time.sleep(1)


def _show_status(client: ControlClient, as_json: bool) -> None:
    from blockflow.devices import Survey
    from blockflow.status import BlockStatus, GatewayStatus, PipelineStatus

    generation = client.topology()["generation"]
    blocks, pipelines, devices = client.blocks(), client.pipelines(), client.devices()
    gateway = client.gateway()
    if as_json:
        everything = {
            "generation": generation,
            "pipelines": pipelines,
            "blocks": blocks,
            "gateway": gateway,
            **devices,
        }
        typer.echo(json.dumps(everything, indent=2))
        return
    _print_status(
        generation,
        [BlockStatus.model_validate(each) for each in blocks],
        [PipelineStatus.model_validate(each) for each in pipelines],
        GatewayStatus.model_validate(gateway),
        Survey.model_validate(devices),
    )


def _print_status(
    generation: int,
    blocks: list[BlockStatus],
    pipelines: list[PipelineStatus],
    gateway: GatewayStatus,
    survey: Survey,
) -> None:
    mps = {device.name: device.mps for device in survey.devices if device.mps is not None}
    under_mps = {worker for each in mps.values() for worker in each.clients}
    console = Console()
    console.print(f"generation {generation}", highlight=False)
    if not blocks:
        console.print("nothing is deployed")
        return
    print_table(
        console,
        ("~pipeline", "ready", ">requests", ">errors", "~blocks"),
        (
            (
                each.name,
                yes(each.ready),
                f"{each.requests}",
                f"{each.errors}",
                each.path,
            )
            for each in pipelines
        ),
    )
    print_table(
        console,
        ("~block", "state", "~worker", "artifact", "runner", ">requests", ">ms"),
        (
            (
                each.name,
                each.state.value,
                each.worker,
                short_digest(each.artifact),
                f"in {each.fused_into}" if each.fused_into else each.runner or "-",
                str(each.requests),
                "-" if each.compute_ms_mean is None else f"{each.compute_ms_mean:.2f}",
            )
            for each in blocks
        ),
    )
    print_table(
        console,
        ("~worker", "device", ">pid", ">device memory", ">host memory"),
        (
            (
                each.worker,
                f"{each.device}, MPS" if each.worker in under_mps else each.device,
                "-" if each.pid is None else str(each.pid),
                size(each.device_memory_bytes),
                size(each.host_memory_bytes),
            )
            for each in {block.worker: block for block in blocks}.values()
        ),
    )
    print_table(
        console,
        ("~from", "~to", "carrier", ">messages", ">bytes", ">through host"),
        (
            (
                sender,
                channel.peer,
                channel.carrier,
                str(channel.messages),
                size(channel.bytes),
                # What is on a CPU has no other place for its tensors.
                "-" if device == "cpu" else size(channel.host_bytes),
            )
            for sender, device, channels in (
                ("gateway", "cpu", gateway.channels),
                *((each.name, each.device, each.channels) for each in blocks),
            )
            for channel in channels
        ),
    )
    reasons = [(f"pipeline {each.name}", each.reason) for each in pipelines]
    reasons += [(f"block {each.name}", each.reason) for each in blocks]
    reasons += [
        (f"block {each.name}", each.runner_reason and f"runs eagerly: {each.runner_reason}")
        for each in blocks
        if each.fused_into is None
    ]
    reasons += [(f"MPS of {name}", each.reason) for name, each in mps.items()]
    for what, reason in reasons:
        if reason:
            console.print(f"{what}: {reason}", markup=False, highlight=False)
