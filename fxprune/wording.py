"""Numbers with their nouns and lists cut short, as messages and reports say them."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, what: str, plural: str = "") -> str:
    """``1 core``, ``2 cores``; the plural where it is not the noun with an s."""
    return f"{number} {what if number == 1 else plural or what + 's'}"


def listed(names: Sequence[str], most: int, between: str = ", ") -> str:
    """``a, b``, and of more names than are wanted ``a, b and 3 more``."""
    rest = len(names) - most
    return between.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
