"""The report of a checkpoint as one HTML file and as Markdown, rendered from its JSON files alone."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from ..errors import UsageError
from ..files import write_whole
from ..names import RECIPE_FILE, REPORT_FILE
from .blocks import Page, Tile, code, in_markdown, inline, markdown
from .card import CARD_FILE, card, is_ours
from .numbers import MACS, MEMORY, PARAMETERS, Record, numbers, part, read_record
from .recipe import recipe_yaml
from .sections import UNREADABLE, error_said, sections

log = logging.getLogger("fxprune")

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"


def render_report(directory: str | os.PathLike[str], *, base_model: str | None = None) -> list[Path]:
    """Render the pages of a checkpoint again from what its JSON files say now.

    Args:
        directory: Of a checkpoint that `fxprune.prune` or `fxprune.recover` wrote, also one of an earlier version.
        base_model: The hub id of the model that this one comes from, for the metadata of its card. It is kept in the JSON, so that
            later renderings and recoveries of the checkpoint say it too.

    Returns:
        The files that were written: ``report.html``, ``report.md``, ``fxprune_recipe.yaml``, and the model card ``README.md``
        unless somebody has written or changed it.

    Raises:
        UsageError: There is no such directory, no report in it, or it cannot be written to; each file is then whole. Or
            ``base_model`` is no hub id.
        CheckpointError: The JSON is damaged.
    """
    path = Path(directory)
    if base_model is not None:
        _state(path, base_model)
    written = write_pages(path)
    if base_model is not None and path / CARD_FILE not in written:
        log.warning(
            "'%s' has been changed by somebody and is left as it is: write 'base_model: %s' among its metadata yourself",
            path / CARD_FILE,
            base_model,
        )
    return written


def _state(directory: Path, base_model: str) -> None:
    """Keep in the JSON which model of the hub the checkpoint comes from."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(base_model)
    except HFValidationError as error:
        raise UsageError(
            f"'{base_model}' is no hub id: it has the form name or owner/name, as in HuggingFaceTB/SmolLM2-135M"
        ) from error
    report = read_record(directory).report
    stated = {**report, "dense": {**part(report, "dense"), "base_model": base_model}}
    write_whole(directory / REPORT_FILE, json.dumps(stated, indent=1) + "\n", called="the report")


def write_pages(directory: Path, *, name: str | None = None) -> list[Path]:
    """As `render_report`; ``name`` is what the directory will be called, where it is not its name yet."""
    found = read_record(directory)
    record = found if name is None else replace(found, name=name)
    page = page_of(record)
    texts = {HTML_FILE: render_html(page), MARKDOWN_FILE: render_markdown(page), RECIPE_FILE: recipe_yaml(record.report)}
    old = directory / CARD_FILE
    if not old.is_file() or is_ours(old.read_text(encoding="utf-8", errors="replace")):
        texts[CARD_FILE] = card(record)
    written = []
    for file, text in texts.items():
        if text:
            write_whole(directory / file, text)
            written.append(directory / file)
    return written


def page_of(record: Record) -> Page:
    """What the report says."""
    report = record.report
    versions = part(report, "versions")
    made = f"Written by fxprune {versions['fxprune']}" if versions.get("fxprune") else "Written by fxprune"
    return Page(
        title=record.name,
        lead=lead(report),
        tiles=_tiles(record),
        sections=sections(record),
        footer=f"{made} from `fxprune_report.json`; `fxprune report` renders it again.",
    )


def lead(report: Mapping[str, Any]) -> list[str]:
    """What this model is, in a sentence or two."""
    dense = part(report, "dense")
    of = code(dense["name"]) if dense.get("name") else "a dense model"
    kind = f" ({dense['class']}, {dense['dtype']})" if dense.get("class") and dense.get("dtype") else ""
    said = []
    if isinstance(report.get("removed"), int | float):
        said.append(f"{of[0].upper()}{of[1:]}{kind} with {report['removed']:.1%} of its parameters removed.")
    recovery = part(report, "recovery")
    if isinstance(recovery.get("tokens"), int):
        said.append(
            f"Then trained on {recovery['tokens']:,} tokens ({part(recovery, 'settings').get('method', 'all parameters')})."
        )
    return said


def _tiles(record: Record) -> list[Tile]:
    """The numbers that are seen first; none where they cannot be read, which the sections say."""
    try:
        return list(_first_seen(record))
    except UNREADABLE:
        return []


def _first_seen(record: Record) -> Iterator[Tile]:
    found = numbers(record)
    labels = {PARAMETERS: "parameters", MACS: "compute per token", MEMORY: "memory"}
    for n in found:
        if n.label in labels and n.change:
            unit, size = ("B", 1e6) if n.label == MEMORY else ("", 1.0)
            yield Tile(labels[n.label], n.change, " to ".join(_brief(v, size, unit) for v in (n.dense, n.value)))
    if now := [n for n in found if n.group == "perplexity" and n.dense is not None and not n.stale]:
        yield Tile(now[0].label, now[0].text(now[0].value), f"dense {now[0].text(now[0].dense)}")
    if check := record.report.get("verify"):
        yield Tile("error of the rewrite", error_said(check["max_rel_error"], 0), f"allowed {check['tolerance']:.0e}")


def _brief(value: float | None, factor: float, unit: str) -> str:
    """A number in three digits, with k, M and G before its unit."""
    if value is None:
        return ""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value * factor >= size * 0.9995:
            return f"{value * factor / size:.3g} {letter}{unit}"
    return f"{value * factor:.3g} {unit}".rstrip()


def render_html(page: Page) -> str:
    """One file that needs nothing else: style and pictures are in it, and there is no script."""
    return _templates().get_template("page.html.j2").render(page=page)


def render_markdown(page: Page) -> str:
    """The same in Markdown."""
    return _templates().get_template("page.md.j2").render(page=page)


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fxprune.reporting", "templates"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"inline": inline, "in_markdown": in_markdown, "markdown": markdown}
    return environment
