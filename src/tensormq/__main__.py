"""`python -m tensormq keys PATH`: make a key pair for tcp endpoints and say the public key."""

from __future__ import annotations

import argparse
import sys

from .errors import SecurityError
from .keys import make_keys


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tensormq")
    verbs = parser.add_subparsers(required=True)
    keys = verbs.add_parser("keys", help="make a key pair for tcp endpoints; prints the public key")
    keys.add_argument("path", help="the new file, which its owner alone can read")
    options = parser.parse_args()
    try:
        made = make_keys(options.path)
    except SecurityError as error:
        sys.exit(str(error))
    sys.stdout.write(made.public + "\n")


if __name__ == "__main__":
    main()
