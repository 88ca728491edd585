"""CURVE keys: what proves to the other end of a tcp connection who this end is."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from .errors import SecurityError

_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # 32 bytes in Z85


@dataclass(frozen=True)
class Keys:
    """A key pair, each key 40 characters of Z85. The public one is no secret: give it to peers."""

    public: str
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        check_key(self.public)
        if not _KEY.fullmatch(self.secret):
            raise SecurityError("that is no secret key: it has 40 characters of Z85")


def make_keys(path: str | Path) -> Keys:
    """Make a key pair and keep it in a new file that its owner alone can read.

    Raises SecurityError when the file exists or cannot be made.
    """
    public, secret = zmq.curve_keypair()
    keys = Keys(public.decode(), secret.decode())
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SecurityError(f"{path} cannot hold new keys: {error.strerror}") from None
    with os.fdopen(file, "w") as writing:
        writing.write(f"{keys.public}\n{keys.secret}\n")
    return keys


def load_keys(path: str | Path) -> Keys:
    """The key pair that `make_keys` wrote.

    Raises SecurityError when the file does not hold one, or is not its owner's alone.
    """
    try:
        with Path(path).open() as file:
            status = os.fstat(file.fileno())
            lines = file.read(1000).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SecurityError(f"{path} cannot be read: {error}") from None
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise SecurityError(
            f"{path} holds a secret key and must belong to this user and have mode 0600: "
            "make new keys, for these may be known to others"
        )
    if len(lines) != 3 or lines[2]:
        raise SecurityError(f"{path} does not hold keys: a public and a secret one, a line each")
    return Keys(lines[0], lines[1])


def check_key(public: str) -> None:
    """Raises SecurityError for what cannot be a public key."""
    if not _KEY.fullmatch(public):
        raise SecurityError(f"{public!r} is no public key: it has 40 characters of Z85")
