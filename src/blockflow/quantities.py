"""Large numbers as people read them; pure."""

from __future__ import annotations

from collections.abc import Sequence


def scaled(count: float, units: Sequence[str]) -> str:
    """`count` in the unit that suits it, each of `units` a thousand of the one before: "1.2 MB".

    In the last unit numbers may be as large as they are. The first is for whole numbers.
    """
    if count < 1000:
        return f"{count:.0f} {units[0]}"
    for unit in units[1:-1]:
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} {units[-1]}"
