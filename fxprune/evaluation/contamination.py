"""Whether an evaluation text was seen before: compared with the sketches that a checkpoint's report holds of its data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.overlap import COMPARED, WORDS, Sketch, overlap
from ..errors import CheckpointError, UsageError
from ..reporting.numbers import overlap_warning

LIMIT = 0.01
"""Share of n-grams in common that is still put down to chance and quotations."""


def read_seen(checkpoint: str | os.PathLike[str]) -> list[Mapping[str, Any]]:
    """What a checkpoint was calibrated and trained on: the entries ``data`` of its ``fxprune_report.json``.

    Returns:
        Mappings with ``use`` (``calibration`` or ``recovery``), ``name`` and, where the text was sketched, ``sketch``; nothing
        for what is no checkpoint of ours.

    Raises:
        CheckpointError: The report is damaged.
    """
    path = Path(checkpoint) / "fxprune_report.json"
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8")).get("data", [])
        return [{"use": str(e["use"]), "name": str(e["name"]), "sketch": e.get("sketch")} for e in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read what '{path}' says of its data: {type(error).__name__}: {error}") from error


def find_overlaps(texts: Mapping[str, Iterable[str]], seen: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Texts that have more than `LIMIT` of their n-grams in common with something seen, or it with them.

    Args:
        texts: Rows of each evaluation text, by name.
        seen: What `read_seen` gave.

    Returns:
        For each pair ``text``, ``use``, ``name``, ``of_text`` (share of the text's n-grams that was seen), ``of_data`` (share of
        what was seen that is in the text) and ``words`` of an n-gram.

    Raises:
        UsageError: A sketch is none.
    """
    known = []
    for entry in seen:
        if entry.get("sketch") is not None:
            try:
                known.append((entry, Sketch.from_json(entry["sketch"])))
            except UsageError as error:
                raise UsageError(f"the {entry['use']} data '{entry['name']}': {error}") from error
    found = []
    for name, rows in texts.items() if known else ():
        sketch = Sketch(rows, limit=COMPARED)
        for entry, other in known:
            shares = {"of_text": round(overlap(sketch, other), 4), "of_data": round(overlap(other, sketch), 4)}
            if max(shares.values()) > LIMIT:
                found.append({"text": name, "use": entry["use"], "name": entry["name"], **shares, "words": WORDS})
    return tuple(found)


def warning(found: Mapping[str, Any]) -> str:
    """What to tell people of an overlap."""
    return f"WARNING: {overlap_warning(found)}"
