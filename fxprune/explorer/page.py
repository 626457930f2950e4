"""The explorer's page: data, style and script in one HTML file."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

SCRIPTS = ("model.js", "colours.js", "drawing.js", "layers.js", "units.js", "profile.js", "group.js", "table.js", "main.js")
"""In the order in which they run; together they are one function."""


def render(data: Mapping[str, Any]) -> str:
    """The page.

    Args:
        data: From `fxprune.explorer.data.explorer_data`.

    Returns:
        HTML that reads nothing from elsewhere: its content security policy forbids it. No name in the data can end its script or
        become markup.
    """
    script = "\n".join(_read(name) for name in SCRIPTS)
    return Template(_read("page.html")).substitute(
        title=html.escape(str(data["title"])),
        style=_read("page.css"),
        script=f'(() => {{\n"use strict";\n{script}\n}})();',
        data=embedded(data),
    )


def embedded(data: Any) -> str:
    """Compact JSON that may stand in a script element: no ``<``, ``>``, ``&`` and no line separators."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII only: U+2028 and U+2029 are escaped already
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _read(name: str) -> str:
    return files(__package__).joinpath("page", name).read_text(encoding="utf-8")
