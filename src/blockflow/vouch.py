"""Says whether an artifact computes what its digest names: `python -m blockflow.vouch`.

    python -m blockflow.vouch PARENT STORE DIGEST

A process of its own, so that the server needs no torch and no file from elsewhere is read in it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from blockflow.artifact import Store
from blockflow.child import die_with_parent
from blockflow.errors import BlockFlowError

_REFUSED = 3


def main() -> None:
    parent, root, digest = sys.argv[1:]
    die_with_parent(int(parent))
    from blockflow.identity import digest_of  # noqa: PLC0415
    from blockflow.weights import read_program  # noqa: PLC0415

    store = Store(Path(root))
    try:
        found = digest_of(read_program(store, store.manifest(digest), "cpu"))
    except BlockFlowError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(_REFUSED)
    if found != digest:
        sys.stderr.write(f"what the artifact computes is {found}, not {digest}\n")
        sys.exit(_REFUSED)


if __name__ == "__main__":
    main()
