"""What a page is made of, and how each part is written in Markdown; the HTML is in the templates.

Plain text may hold code between backticks; everything else in it is escaped, whichever way it is written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """Cells; the first column names the rows. ``words`` stand at the left, numbers at the right; ``folded`` opens on demand."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: str = ""
    words: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Chart:
    """A picture with a caption; ``text`` is what Markdown has instead of it, line by line."""

    svg: Markup
    caption: str
    text: Sequence[str] = ()


@dataclass(frozen=True)
class Charts:
    """Pictures beside each other."""

    charts: Sequence[Chart]
    kind: str = "charts"


@dataclass(frozen=True)
class Listing:
    """Something to copy."""

    text: str
    language: str = ""
    kind: str = "listing"


@dataclass(frozen=True)
class Notes:
    """What to know; warnings stand out."""

    items: Sequence[str]
    warning: bool = False
    kind: str = "notes"


Block: TypeAlias = Text | Table | Charts | Listing | Notes


@dataclass(frozen=True)
class Section:
    """A titled part of a page."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Tile:
    """A number that is seen first."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Page:
    """A document."""

    title: str
    lead: Sequence[str]
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    footer: str = ""


def code(name: object) -> str:
    """A name as code within a text."""
    return f"`{' '.join(str(name).split()).replace('`', chr(39))}`"


def inline(text: object) -> Markup:
    """A text in HTML."""
    parts = str(text).split("`")
    if len(parts) % 2 == 0:  # a backtick without its other half
        return escape(str(text))
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def in_markdown(text: object) -> str:
    """A text in Markdown, on one line."""
    parts = " ".join(str(text).split()).split("`")
    if len(parts) % 2 == 0:
        return _plain("'".join(parts))
    return "`".join(p.replace("|", "\\|") if i % 2 else _plain(p) for i, p in enumerate(parts))


def _plain(text: str) -> str:
    text = re.sub(r"([\\*\[\]<>|~])", r"\\\1", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return re.sub(r"^(\s*)([#+-]|\d+\.)(?=\s)", r"\1\\\2", text)


def fenced(text: str, language: str = "") -> str:
    """A listing, in a fence that nothing in it can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, words: bool = False) -> str:
    """A Markdown table; numbers stand at the right, words at the left."""
    lines = [header, ["---", *["---" if words else "---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def markdown(block: Block) -> str:
    """A block in Markdown."""
    if isinstance(block, Table):
        cells = [[in_markdown(cell) for cell in row] for row in (block.header, *block.rows)]
        text = table(cells[0], cells[1:], words=block.words).rstrip()
        if not block.folded:
            return text
        return f"<details><summary>{escape(' '.join(block.folded.split()))}</summary>\n\n{text}\n\n</details>"
    if isinstance(block, Charts):
        parts = (f"{in_markdown(c.caption)}\n\n{fenced(chr(10).join(c.text))}" for c in block.charts if c.text)
        return "\n\n".join(parts)
    if isinstance(block, Listing):
        return fenced(block.text, block.language)
    if isinstance(block, Notes):
        return "\n".join(f"- {'**Warning:** ' if block.warning else ''}{in_markdown(item)}" for item in block.items)
    return in_markdown(block.text)
