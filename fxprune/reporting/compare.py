"""Several checkpoints of one dense model side by side: what each was made by, how large it is, and what it still can do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text as RichText

from ..errors import CheckpointError, UsageError
from ..files import read_json
from ..names import PLAN_FILE, family_of, layer_of
from ..recipes import SETTINGS
from .blocks import Block, Chart, Charts, Notes, Page, Section, Table, code
from .charts import LAYER, Axis, Series, lines
from .numbers import Number, Record, numbers, overlap_warning, part, read_record, widths_of
from .page import render_html, render_markdown
from .sections import UNREADABLE

FORMAT = 1
SHOWN = ("criterion", "ranking", "widths", "kinds", "compensation", "rounds", "calibration")
"""Settings that a comparison always shows; others where they differ."""


@dataclass(frozen=True)
class Line:
    """One number of every checkpoint, measured alike.

    Attributes:
        number: What it is; its ``value`` is that of the first checkpoint which has one.
        values: Of each checkpoint; None where it was not measured so.
        denses: Of the dense model, as it was measured beside each checkpoint; None where it was not.
    """

    number: Number
    values: tuple[float | None, ...]
    denses: tuple[float | None, ...]

    @property
    def dense(self) -> float | None:
        """Of the dense model, as the first checkpoint has it that has one."""
        return next((d for d in self.denses if d is not None), None)

    @property
    def kept(self) -> tuple[float | None, ...]:
        """Each value divided by the dense model's: by that beside it, where there is one (two runs of a clock are not alike)."""
        own = (self.dense if d is None else d for d in self.denses)
        return tuple(None if v is None or d is None or not d > 0 else v / d for v, d in zip(self.values, own, strict=True))

    @property
    def dense_text(self) -> str:
        """The dense model's number, from the least to the largest where it was measured several times."""
        found = sorted(d for d in self.denses if d is not None)
        return " to ".join(dict.fromkeys(self.number.text(d) for d in (*found[:1], *found[-1:])))


@dataclass(frozen=True)
class Comparison:
    """Checkpoints side by side. ``str`` is the table in Markdown.

    Attributes:
        records: What each directory says of itself, in the order given.
        names: What each is called, all different.
        lines: The numbers. Those of one name that were measured otherwise stand in lines of their own.
        settings: For each setting its value in each checkpoint, as text.
        notes: What cannot be compared, and why.
    """

    records: tuple[Record, ...]
    names: tuple[str, ...]
    lines: tuple[Line, ...]
    settings: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def table(self) -> RichTable:
        """For a terminal."""
        header, rows = self._cells()
        table = RichTable(
            box=box.SIMPLE_HEAD, caption=RichText("\n".join([*self._brackets(), *self.notes])), caption_justify="left"
        )
        for i, name in enumerate(header):
            table.add_column(RichText(name), justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(RichText, row))
        return table

    def markdown(self) -> str:
        """As Markdown."""
        return render_markdown(self.page())

    def html(self) -> str:
        """As one HTML file with charts."""
        return render_html(self.page())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "fxprune_comparison": FORMAT,
            "checkpoints": list(self.names),
            "settings": {name: list(values) for name, values in self.settings.items()},
            "numbers": [
                {
                    "label": line.number.label,
                    "protocol": line.number.protocol,
                    "dense": line.dense,
                    "denses": list(line.denses),
                    "values": list(line.values),
                    "kept": list(line.kept),
                }
                for line in self.lines
            ],
            "notes": list(self.notes),
        }

    def page(self) -> Page:
        """As a page."""
        header, rows = self._cells()
        dense = next((d for r in self.records if (d := part(r.report, "dense").get("name"))), "")
        said = [*self._brackets(), *(f"{x.number.label}: {x.number.protocol}" for x in self.lines if x.number.protocol)]
        found = [Section("Before you compare", [Notes(self.notes, warning=True)])] if self.notes else []
        found.append(Section("Side by side", [Table(header, rows), *([Notes(list(dict.fromkeys(said)))] if said else [])]))
        for title, blocks in (
            ("What is lost, by what was removed", list(self._ratio_curves())),
            ("Widths", list(self._widths())),
            ("Settings", [Table(["", *self.names], [[n, *values] for n, values in self.settings.items()], words=True)]),
        ):
            if blocks:
                found.append(Section(title, blocks))
        lead = [f"{len(self.names)} checkpoints of {code(dense) if dense else 'one dense model'}."]
        return Page(f"{', '.join(self.names)}", lead, (), found, "Written by `fxprune compare`.")

    def _brackets(self) -> list[str]:
        """What stands in brackets, if anything does."""
        shown = any(k is not None for line in self.lines for k in line.kept)
        return ["in brackets: the share of the dense model's number, as it was measured beside each"] if shown else []

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        rows = []
        for line in self.lines:
            cells = []
            for value, kept in zip(line.values, line.kept, strict=True):
                share = f" ({kept:.1%})" if kept is not None and value is not None else ""
                cells.append(f"{line.number.text(value)}{share}" if value is not None else "-")
            rows.append([line.number.label, line.dense_text or "-", *cells])
        return ["", "dense", *(f"{name}" for name in self.names)], rows

    def _ratio_curves(self) -> Iterator[Block]:
        """Perplexity and task average over the share removed; checkpoints of one recipe are connected."""
        removed = [100 * float(r.report["removed"]) if "removed" in r.report else None for r in self.records]
        kinds = [_kind(r) for r in self.records]
        pictures = []
        for line in self.lines:
            label, group = line.number.label, line.number.group
            if (group != "perplexity" and label != "average of tasks (%)") or sum(v is not None for v in line.values) < 2:
                continue
            series = []
            for colour, kind in enumerate(dict.fromkeys(kinds)):
                points = sorted(
                    (x, v, n)
                    for x, v, n, k in zip(removed, line.values, self.names, kinds, strict=True)
                    if k == kind and x is not None and v is not None
                )
                if points:
                    shown = points[-1][2] if len(points) == 1 else kind_name(kind)
                    hint = ", ".join(f"{n}: {line.number.text(v)}" for _, v, n in points)
                    series.append(Series(shown, [(x, v) for x, v, _ in points], colour, dots=True, hint=hint))
            values = [v for v in (line.dense, *line.values) if v is not None and v > 0]
            wide = group == "perplexity" and max(values) > 4 * min(values)
            if line.dense is not None:
                series.append(Series("dense", [(0.0, line.dense)], 4, dots=True))
            x = Axis("parameters removed (%)", low=0)
            picture = lines(series, x, Axis(label, log=wide), title=f"{label} by share removed")
            told = [
                f"{r:5.1f}% removed  {line.number.text(v):>9}  {name}"
                for r, v, name in zip(removed, line.values, self.names, strict=True)
                if r is not None and v is not None
            ]
            pictures.append(Chart(picture, label, sorted(told)))
        if pictures:
            yield Charts(pictures)

    def _widths(self) -> Iterator[Block]:
        """The share of units that stays, layer by layer."""
        families: dict[str, list[Series]] = {}
        rows: dict[str, list[str]] = {}
        for i, record in enumerate(self.records):
            own: dict[str, list[tuple[float, float]]] = {}
            sums: dict[str, list[float]] = {}
            for name, (before, after) in widths_of(record.report).items():
                family, layer = family_of(name), layer_of(name)
                total = sums.setdefault(family, [0, 0, float("inf"), 0])
                total[:] = [total[0] + before, total[1] + after, min(total[2], after), max(total[3], after)]
                if layer is not None:
                    own.setdefault(family, []).append((layer, 100 * after / before))
            for family, points in own.items():
                families.setdefault(family, []).append(Series(self.names[i], sorted(points), i, dots=len(points) < 40))
            for family, (before, after, least, most) in sums.items():
                spread = f"{least:g}" if least == most else f"{least:g} to {most:g}"
                rows.setdefault(family, ["all"] * len(self.records))[i] = f"{after / before:.1%}, {spread}"
        pictures = [
            Chart(lines(s, LAYER, Axis("units that stay (%)", low=0, high=100), title=f"{family} by layer"), code(family))
            for family, s in families.items()
            if any(len(each.points) > 1 for each in s)
        ]
        if pictures:
            yield Charts(pictures)
        if rows:
            yield Table(["units that stay, width", *self.names], [[f, *cells] for f, cells in rows.items()])

    def __str__(self) -> str:
        return self.markdown()


def compare(*directories: str | os.PathLike[str]) -> Comparison:
    """Put checkpoints of one dense model side by side, from what their JSON files say.

    Args:
        *directories: Two or more, as `fxprune.prune` and `fxprune.recover` write them; what ``fxprune eval --attach`` left in one
            is read too.

    Raises:
        UsageError: Fewer than two, one without a report, or checkpoints of different dense models.
        CheckpointError: A file in one of them is damaged.
    """
    if any(not isinstance(directory, str | os.PathLike) for directory in directories):
        raise UsageError("checkpoints are compared by their directories, given one by one: compare('a', 'b')")
    if len(directories) < 2:
        given = "".join(f", got '{os.fspath(directory)}' alone" for directory in directories)
        raise UsageError(f"a comparison needs two checkpoints or more{given}")
    records = tuple(read_record(directory) for directory in directories)
    names = _names(records, directories)
    notes = _same_dense(records, names, directories)
    measured, warnings = [], []
    for record, name in zip(records, names, strict=True):
        try:
            measured.append([n for n in numbers(record) if not n.stale])
            warnings += [f"{name}: {overlap_warning(found)}" for found in (record.evaluation or {}).get("overlaps") or ()]
        except UNREADABLE as error:
            raise CheckpointError(f"the report of '{name}' cannot be read: {type(error).__name__}: {error}") from error
    lines = _lines(measured, names, notes)
    notes += warnings
    try:
        comparison = Comparison(records, names, lines, _settings(records), tuple(notes))
        comparison.page()  # what cannot be shown is told now
    except UNREADABLE as error:
        raise CheckpointError(f"a report cannot be read: {type(error).__name__}: {error}") from error
    return comparison


def _names(records: Sequence[Record], directories: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    """The directories' names; with what stands above them where two are the same."""
    short = [r.name for r in records]
    if len(set(short)) == len(short):
        return tuple(short)
    longer = ["/".join(Path(d).resolve().parts[-2:]) for d in directories]
    if len(set(longer)) == len(longer):
        return tuple(longer)
    return tuple(f"{name} ({i})" for i, name in enumerate(short, start=1))


def _same_dense(records: Sequence[Record], names: Sequence[str], directories: Sequence[str | os.PathLike[str]]) -> list[str]:
    """What to say of the dense models; those of other shapes are refused."""
    prints = [part(r.report, "dense").get("fingerprint") or _planned(d) for r, d in zip(records, directories, strict=True)]
    sizes = [r.report.get("parameters_before") for r in records]
    for what, found in (("parameters", sizes), ("fingerprint", prints)):
        known = [(value, name) for value, name in zip(found, names, strict=True) if value is not None]
        other = next(((value, name) for value, name in known if value != known[0][0]), None)
        if other is not None:
            shown = [f"{v:,} parameters" if what == "parameters" else f"fingerprint {v}" for v in (known[0][0], other[0])]
            raise UsageError(
                f"'{known[0][1]}' and '{other[1]}' were pruned from different dense models ({shown[0]} and {shown[1]}): compare "
                "checkpoints of one"
            )
    called = dict.fromkeys(n for r in records if (n := part(r.report, "dense").get("name")))
    notes = []
    if len(called) > 1:
        notes.append(f"the dense models have other names and equal shapes ({', '.join(called)}): they may differ in their weights")
    if any(value is None for value in prints):
        which = ", ".join(n for n, value in zip(names, prints, strict=True) if value is None)
        notes.append(f"{which}: nothing says which dense model it was made from")
    return notes


def _planned(directory: str | os.PathLike[str]) -> Any:
    """The dense model's fingerprint by the plan, for reports of earlier versions."""
    path = Path(directory) / PLAN_FILE
    if not path.is_file():
        return None
    plan = read_json(path, called="the plan", error=CheckpointError)
    return plan.get("fingerprint") if isinstance(plan, Mapping) else None


def _lines(measured: Sequence[Sequence[Number]], names: Sequence[str], notes: list[str]) -> tuple[Line, ...]:
    found: dict[tuple[str, str], dict[int, Number]] = {}
    for i, own in enumerate(measured):
        for one in own:
            found.setdefault((one.label, one.protocol), {})[i] = one
    place = {"size": 0, "perplexity": 1, "task": 2, "latency": 3}
    order = list(dict.fromkeys(sorted((key[0] for key in found), key=lambda label: place[_group(found, label)])))
    lines = []
    for label in order:
        protocols = [key for key in found if key[0] == label]
        if len(protocols) > 1 and any(len(found[key]) < len(measured) for key in protocols):
            said = "; ".join(f"{', '.join(names[i] for i in found[key])}: {key[1]}" for key in protocols)
            notes.append(f"{label} was measured in {len(protocols)} ways, each in a line of its own: {said}")
        for key in protocols:
            alike = found[key]
            dense = [n.dense for n in alike.values() if n.dense is not None]
            first = next(iter(alike.values()))
            if first.group != "latency" and dense and max(dense) - min(dense) > 1e-6 * max(map(abs, dense)):
                notes.append(f"{label}: the dense model's differs between the checkpoints, from {min(dense):g} to {max(dense):g}")
            each = [alike.get(i) for i in range(len(measured))]
            lines.append(Line(first, tuple(n.value if n else None for n in each), tuple(n.dense if n else None for n in each)))
    notes += _under_two_names(found)
    return tuple(lines)


def _under_two_names(found: Mapping[tuple[str, str], Mapping[int, Number]]) -> Iterator[str]:
    """Perplexities of what looks like one text: measured alike, in other checkpoints, with one number of the dense model."""
    by_protocol: dict[str, list[str]] = {}
    for label, protocol in found:
        if _group(found, label) == "perplexity":
            by_protocol.setdefault(protocol, []).append(label)
    for protocol, labels in by_protocol.items():
        for one, other in combinations(labels, 2):
            mine, theirs = found[one, protocol], found[other, protocol]
            dense = {n.dense for n in (*mine.values(), *theirs.values())}
            if not set(mine) & set(theirs) and len(dense) == 1 and None not in dense:
                yield f"{one} and {other} seem to be of one text under two names: name it alike to have one line ({protocol})"


def _group(found: Mapping[tuple[str, str], Mapping[int, Number]], label: str) -> str:
    return next(n.group for key, own in found.items() if key[0] == label for n in own.values())


def _settings(records: Sequence[Record]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {
        "removed": tuple(f"{r.report['removed']:.2%}" if "removed" in r.report else "-" for r in records),
        "form": tuple(str(r.report.get("form") or "-") for r in records),
    }
    for name in dict.fromkeys([*SHOWN, *SETTINGS, "seed"]):
        values = [part(r.report, "recipe").get(name) for r in records]
        texts = tuple(_setting(v) for v in values)
        if any(v is not None for v in values) and (name in SHOWN or len(set(texts)) > 1):
            found[name.replace("_", " ")] = texts
    found["recovered"] = tuple(_recovered(r) for r in records)
    found["fxprune"] = tuple(str(part(r.report, "versions").get("fxprune", "-")) for r in records)
    return found


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v:g}" if isinstance(v, int | float) else f"{k} {v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "-" if value is None else str(value)


def _recovered(record: Record) -> str:
    recovery = part(record.report, "recovery")
    if not recovery:
        return "no"
    settings = part(recovery, "settings")
    return f"{settings.get('method', 'yes')}, {recovery.get('steps', 0):,} steps, {recovery.get('tokens', 0):,} tokens"


def _kind(record: Record) -> tuple[str, ...]:
    """What a checkpoint was made by, whatever the ratio: checkpoints of one kind make a curve."""
    recipe = part(record.report, "recipe")
    recovered = bool(record.report.get("recovery"))
    return (*(_setting(recipe.get(name)) for name in SHOWN if name != "calibration"), "recovered" if recovered else "")


def kind_name(kind: tuple[str, ...]) -> str:
    """The first words of a kind."""
    criterion, ranking, *_, recovered = kind
    return f"{criterion}, {recovered}" if recovered else f"{criterion}, {ranking}"
