"""Numbers with their nouns, lists cut short, and options as they are typed: how messages and reports say them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def counted(number: int, what: str, plural: str = "") -> str:
    """``1 core``, ``2 cores``; the plural where it is not the noun with an s."""
    return f"{number} {what if number == 1 else plural or what + 's'}"


def listed(names: Sequence[str], most: int, between: str = ", ") -> str:
    """``a, b``, and of more names than are wanted ``a, b and 3 more``."""
    rest = len(names) - most
    return between.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, by its name; of digests, which tell people nothing, that alone."""
    said = []
    for name in {**now, **was}:
        before, after = was.get(name), now.get(name)
        if before != after:
            digests = all(_DIGEST.fullmatch(str(value)) for value in (before, after))
            said.append(f"{name} differs" if digests else f"{name} was {_short(before)}, now {_short(after)}")
    return said


_DIGEST = re.compile(r"[0-9a-f]{16,}")


def _short(value: Any) -> str:
    text = ",".join(value) if isinstance(value, Mapping) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_typed(message: str, options: Collection[str]) -> str:
    """A message that names keyword arguments, with those that a command has as its options.

    ``say widths='per-layer'`` becomes ``say --widths per-layer``; what is said in both ways is said once.

    Args:
        message: Of an error.
        options: Names of the command's options, as Python has them (``max_steps``).
    """

    def option(found: re.Match[str]) -> str:
        name, value = found["name"], found["text"] or found["plain"] or ""
        if name not in options or found["literal"] == "False":
            return found[0]
        return f"--{name.replace('_', '-')}" + (f" {value}" if value else "")

    def bare(found: re.Match[str]) -> str:
        return f"--{found['name'].replace('_', '-')}" if found["name"] in options else found[0]

    value = r"(?:'(?P<text>[^' ]*)'|(?P<literal>True|False)|(?P<plain>[\w.*-]+(?:,[\w.*-]+)*(?<![.,])))?"
    said = re.sub(rf"(?<![\w.'-])(?P<name>[a-z][a-z_]*)={value}(?![\w'\"{{\[(]|\.\w)", option, message)
    said = re.sub(r"(?<![\w.'/-])(?P<name>[a-z]+(?:_[a-z]+)+)(?![\w'/=(]|\.\w)", bare, said)
    said = re.sub(r"\([a-z_]+='[^']*', (--[^)]*)\)", r"(\1)", said)  # the same in Python, and as an option
    return re.sub(r"(--[a-z-]+(?: [\w.-]+)?) \(\1\)", r"\1", said)
