"""The server's options, declared once: the command line takes its flags and defaults from here."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from blockflow.topology import Topology


class ServeOptions(BaseModel):
    """How `blockflow serve` runs. Times are in seconds, sizes in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    topology: Topology | None = Field(None, description="what to deploy at the start")
    store: Path | None = Field(
        None, description="the artifact store, for topologies that name none"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    control_port: int = Field(
        8080, ge=0, le=65535, description="port of the management API; 0 takes a free one"
    )
    http_port: int = Field(
        8000, ge=0, le=65535, description="port of the inference API; 0 takes a free one"
    )
    run_dir: Path | None = Field(
        None, description="directory for sockets, readable by its owner alone; default: a new one"
    )
    max_body_bytes: int = Field(64 << 20, ge=1, description="largest inference request")
    request_timeout_s: float = Field(30, gt=0, description="time a request may take")
    queue_depth: int = Field(
        32, ge=1, description="requests in flight per entry block before new ones are refused"
    )
    ready_timeout_s: float = Field(120, gt=0, description="time a worker may take to get ready")
    drain_timeout_s: float = Field(
        10, ge=0, description="time that running requests get before their worker is stopped"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe log messages to write"
    )

    @field_validator("host")
    @classmethod
    def _must_be_loopback(cls, host: str) -> str:
        if not _is_loopback(host):
            raise ValueError(
                f"{host} is not a loopback address: BlockFlow has no authentication yet, so it "
                "listens on 127.0.0.1, ::1 or localhost only; put an authenticating proxy in front"
            )
        return host


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
