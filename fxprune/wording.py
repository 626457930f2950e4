"""Numbers with their nouns, as messages and reports say them."""

from __future__ import annotations


def counted(number: int, what: str, plural: str = "") -> str:
    """``1 core``, ``2 cores``; the plural where it is not the noun with an s."""
    return f"{number} {what if number == 1 else plural or what + 's'}"
