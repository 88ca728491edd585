"""The server's options, declared once: the command line takes its flags and defaults from here."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from blockflow.topology import Topology


class ServeOptions(BaseModel):
    """How `blockflow serve` runs. Times are in seconds, sizes in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    topology: Topology | None = Field(
        None, description="what to deploy at the start; without it, what served last"
    )
    store: Path | None = Field(
        None, description="the artifact store, for topologies that name none"
    )
    state_dir: Path | None = Field(
        None,
        description="directory that remembers every generation; default: "
        "$XDG_STATE_HOME/blockflow or ~/.local/state/blockflow",
    )
    # Before `host`, whose validation looks at them.
    token_file: Path | None = Field(
        None,
        description="file with the bearer token that the management API asks for (mode 0600, at "
        "least 16 characters)",
    )
    inference_token_file: Path | None = Field(
        None, description="file with the bearer token that the inference API asks for"
    )
    host: str = Field(
        "127.0.0.1",
        description="address to listen on; one that others can reach needs both token files",
    )
    tls_cert: Path | None = Field(None, description="certificate chain (PEM); turns on HTTPS")
    tls_key: Path | None = Field(None, description="private key of the certificate (PEM)")
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
    allow_uploads: bool = Field(
        False, description="take artifacts over the management API into the store"
    )
    max_upload_bytes: int = Field(4 << 30, ge=1, description="largest artifact to take")
    request_timeout_s: float = Field(30, gt=0, description="time a request may take")
    queue_depth: int = Field(
        32, ge=1, description="requests under way through a first block; others wait or are refused"
    )
    max_slowdown: float = Field(
        2,
        ge=1,
        description="how many times its unloaded time a request may take under overload, before "
        "others are refused for it; a large number leaves that to the queue's depth",
    )
    ready_timeout_s: float = Field(120, gt=0, description="time a worker may take to get ready")
    drain_timeout_s: float = Field(
        10, ge=0, description="time that running requests get before their worker is stopped"
    )
    heartbeat_timeout_s: float = Field(
        10,
        ge=1,
        description="time that a process may say nothing before it is taken for hung and replaced",
    )
    hang_grace_s: float = Field(
        10,
        gt=0,
        description="time after its deadline that a request may still be computed before its "
        "worker is said to hang, which makes its pipelines not ready; one that computes a request "
        "for so much longer than --request-timeout is replaced",
    )
    log_format: Literal["text", "json"] = Field("text", description="how to write log messages")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe log messages to write"
    )

    @field_validator("host")
    @classmethod
    def _strangers_need_tokens(cls, host: str, info: ValidationInfo) -> str:
        missing = [
            f"--{name.replace('_', '-')}"
            for name in ("token_file", "inference_token_file")
            if info.data.get(name) is None
        ]
        if missing and not is_loopback(host):
            raise ValueError(
                f"{host} is not a loopback address: others can reach it, so give "
                f"{' and '.join(missing)} as well, or listen on 127.0.0.1"
            )
        return host

    @model_validator(mode="after")
    def _certificates_have_keys(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both --tls-cert and --tls-key")
        return self


def is_loopback(host: str) -> bool:
    """Whether only this host can reach what listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
