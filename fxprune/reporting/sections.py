"""From a checkpoint's JSON to the sections of its page: each reads what is there, and says nothing where nothing is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..names import BLOCK_SCORES, family_of, layer_of
from .blocks import Block, Chart, Charts, Listing, Notes, Section, Table, Text, code
from .charts import LAYER, Axis, Series, Spread, bars, lines, number, spreads
from .loading import form_said
from .numbers import Record, numbers, numbers_table, overlap_warning, part, widths_of
from .recipe import calibration_text, prune_command, recipe_yaml, recover_commands, replay_command, shear_command
from .shearing import shearing_blocks
from .training import recovery_blocks

BAR = 24
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
"""What reading plain data of another shape than was expected may raise (a generator makes RuntimeError of StopIteration)."""

LABELLED = 4
"""Lanes that are named in a chart of many."""


def sections(record: Record) -> list[Section]:
    """Every section that the record has something for.

    What cannot be read (an edited file, a later format) is named in its place; the rest of the page is as it would be.
    """
    found = []
    for title, build in BUILDERS.items():
        try:
            blocks = list(build(record))
        except UNREADABLE as error:
            blocks = [Notes([f"this part of the report cannot be read: {type(error).__name__}: {error}"], warning=True)]
        if blocks:
            found.append(Section(title, blocks))
    return found


def _numbers(record: Record) -> Iterator[Block]:
    found = numbers(record)
    if not found:
        return
    yield numbers_table(found)
    said = [f"{n.label.removesuffix(' (ms)')}: {n.protocol}" for n in found if n.group in ("perplexity", "task") and n.protocol]
    if any(n.group == "perplexity" for n in found) and not record.report.get("recovery"):
        said.append("no recovery training has been done")
    if timed := next((n for n in found if n.group == "latency"), None):
        said.append(f"latency: {timed.protocol}")
    if said:
        yield Notes(said)


def _notes(record: Record) -> Iterator[Block]:
    report, evaluation = record.report, record.evaluation or {}
    warnings = [overlap_warning(o) for o in evaluation.get("overlaps") or ()]
    if report.get("verify") is None and "verify" in report:
        warnings.append("verification was switched off: nothing has shown that this is the dense model without its units")
    if report.get("recovery") and (report.get("perplexity") or report.get("samples")):
        warnings.append("perplexities and texts marked as before recovery are of the pruned model that was recovered")
    if warnings:
        yield Notes(warnings, warning=True)
    notes = [note for note in str(report.get("note") or "").split("; ") if note]
    for stage in ("recovery", "shearing"):
        notes += [note for note in (report.get(stage) or {}).get("notes") or [] if note not in notes and note != report.get("note")]
    if evaluation.get("cut"):
        notes.append(f"{evaluation['cut']:,} task requests were longer than the model reads: their first tokens were dropped")
    if notes:
        yield Notes(notes)


def _widths(record: Record) -> Iterator[Block]:
    report = record.report
    families: dict[str, list[tuple[int, str, float, float]]] = {}
    for name, (before, after) in widths_of(report).items():
        layer = layer_of(name)
        families.setdefault(family_of(name), []).append((-1 if layer is None else layer, name, before, after))
    if report.get("dropped"):
        yield Text(f"Whole blocks that went: {', '.join(map(code, report['dropped']))}.")
    if scores := part(part(report, "recipe"), BLOCK_SCORES):
        ranked = sorted(scores, key=lambda path: float(scores[path]))
        gone = [[path, number(scores[path]), "went" if path in (report.get("dropped") or ()) else ""] for path in ranked]
        yield Table(["block", "importance", ""], gone, folded="what every block is worth, the least first")
    pictures, rows = [], []
    for family, entries in families.items():
        entries.sort()
        sizes = {(before, after) for _, _, before, after in entries}
        if len(sizes) == 1:
            before, after = next(iter(sizes))
            where = f" in each of {len(entries)} layers" if len(entries) > 1 else ""
            what = f"{code(family)}: {before:g} to {after:g} units{where}" if before != after else f"{code(family)}: all {before:g}"
            rows.append(what if before != after else f"{what} units stay{where}")
        if len(entries) > 1 and any(b != a for _, _, b, a in entries):
            left = sum(a for _, _, _, a in entries) / sum(b for _, _, b, _ in entries)
            pictures.append(
                Chart(
                    bars(
                        [(layer, b, a) for layer, _, b, a in entries],
                        LAYER,
                        Axis("units", whole=True),
                        title=f"{family} by layer",
                    ),
                    f"{code(family)}: {left:.1%} of the units stay",
                    _text_bars(entries) if len(sizes) > 1 else (),
                )
            )
    if rows:
        yield Notes(rows)
    if pictures:
        yield Charts(pictures)
        yield Table(
            ["group", "before", "after", "stay"],
            [[name, f"{b:,}", f"{a:,}", f"{a / b:.1%}"] for entries in families.values() for _, name, b, a in entries if b != a],
            folded="every group in numbers",
        )


def _text_bars(entries: Sequence[tuple[int, str, float, float]]) -> list[str]:
    return [f"{layer:>3}  {'#' * round(BAR * after / before):.<{BAR}}  {after:g}/{before:g}" for layer, _, before, after in entries]


def _curves(record: Record) -> Iterator[Block]:
    report = record.report
    curves: Mapping[str, Sequence[Sequence[float]]] = report.get("curves") or {}
    if not curves:
        return
    measure = (report.get("recipe") or {}).get("measured", "divergence")
    rise = "rise of the loss (nats/token)" if measure == "loss" else "divergence from dense (nats/token)"
    families: dict[str, dict[str, Sequence[Sequence[float]]]] = {}
    for lane, points in curves.items():
        families.setdefault(family_of(lane), {})[lane] = points
    yield Text(
        "What taking units away costs, measured lane by lane while all else is whole"
        + (" and with the rest compensated" if (report.get("recipe") or {}).get("compensation") == "least-squares" else "")
        + ": the curves that the budget was spent by."
    )
    pictures, ends = [], []
    for family, lanes in families.items():
        last = {lane: points[-1][1] for lane, points in lanes.items()}
        ranked = sorted(last, key=lambda lane: -last[lane])
        named = set(ranked[:LABELLED] + ranked[-1:]) if len(ranked) > LABELLED + 1 else set(ranked)
        places = {lane: layer_of(lane) for lane in lanes}
        deepest = max((p for p in places.values() if p is not None), default=0) or 1
        series = [
            Series(
                _lane(lane) if lane in named else "",
                [(units, change) for units, change in points],
                colour=(places[lane] or 0) / deepest if len(lanes) > 1 else 0,
                dots=len(lanes) == 1,
                hint=f"{lane}: {number(last[lane])} nats without {points[-1][0]:g} units",
            )
            for lane, points in lanes.items()
        ]
        caption = code(family) + (": first layers blue, last ones orange" if len(lanes) > 2 else "")
        x, y = Axis("units removed", whole=True), Axis(rise, zero=True)
        pictures.append(Chart(lines(series, x, y, title=f"{family}: {rise}"), caption))
        ends += [[lane, f"{lanes[lane][-1][0]:g}", f"{last[lane]:.4g}"] for lane in ranked]
    yield Charts(pictures)
    yield Table(["lane", "units removed", rise], ends, folded="the last point of every curve, the dearest of each family first")
    if bad := [lane for lane, points in curves.items() if any(not math.isfinite(change) for _, change in points)]:
        yield Notes([f"not finite somewhere, and not drawn there: {', '.join(map(code, bad[:5]))}"], warning=True)


def _lane(name: str) -> str:
    layer = layer_of(name)
    return name.rpartition(".")[2] if layer is None else f"layer {layer}"


def _importance(record: Record) -> Iterator[Block]:
    found: Mapping[str, Mapping[str, Any]] = record.report.get("importance") or {}
    families: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, spread in found.items():
        if all(math.isfinite(q) for q in spread["quantiles"]):
            families.setdefault(family_of(name), []).append((name, spread))
    pictures, rows = [], []
    for family, entries in families.items():
        spans = []
        for i, (name, spread) in enumerate(entries):
            _, low, lower, middle, upper, high, _ = spread["quantiles"]
            cut, layer = spread["cut"], layer_of(name)
            said = f"{name}: median {number(middle)}" + ("" if cut is None else f", went up to {number(cut)}")
            spans.append(Spread(float(i if layer is None else layer), low, lower, middle, upper, high, cut, said))
            rows.append(
                [name, f"{spread['units']:,}", *(number(q) for q in spread["quantiles"]), "" if cut is None else number(cut)]
            )
        values = [v for s in spans for v in (s.low, s.high)]
        wide = min(values) > 0 and max(values) / min(values) > 30
        chart = spreads(spans, LAYER, Axis("importance of a unit", log=wide), title=f"importance of the units of {family}")
        pictures.append(Chart(chart, code(family)))
    if pictures:
        recipe = record.report.get("recipe") or {}
        by = f" by {code(recipe['criterion'])}" if recipe.get("criterion") else ""
        yield Text(
            f"How the importance of a group's units{by} spreads: box between the quartiles, line from 5\u00a0% to 95\u00a0%, dot "
            "at the median; the orange mark is the most important unit that went."
        )
        yield Charts(pictures)
        header = ["group", "units", "least", "5 %", "25 %", "median", "75 %", "95 %", "most", "went up to"]
        yield Table(header, rows, folded="in numbers")


def _compensation(record: Record) -> Iterator[Block]:
    made = record.report.get("compensation")
    if not made:
        return
    maps: Mapping[str, Any] = made.get("maps") or {}
    yield Text(
        f"Units that went were made up for ({made['method']}) on {made['tokens']:,} calibration tokens, in "
        f"{len(maps or made.get('added') or ())} maps that read them."
    )
    families: dict[str, list[tuple[str, Any]]] = {}
    for name, errors in maps.items():
        if isinstance(errors, Sequence) and len(errors) == 2:
            families.setdefault(family_of(name), []).append((name, errors))
    pictures = []
    for family, entries in families.items():
        if len(entries) > 2:
            places = [float(i if layer_of(n) is None else layer_of(n) or 0) for i, (n, _) in enumerate(entries)]
            series = [
                Series(label, list(zip(places, (e[i] for _, e in entries), strict=True)), colour=colour, dots=True)
                for i, (label, colour) in enumerate((("without", 1), ("with", 0)))
            ]
            y = Axis("squared error of the output, over its square", zero=True)
            pictures.append(Chart(lines(series, LAYER, y, title=f"{family}: {y.label}"), code(family)))
    if pictures:
        yield Charts(pictures)
    rows = [[name, *(f"{error:.4g}" for error in errors)] for entries in families.values() for name, errors in entries]
    if rows:
        yield Table(["map: squared error over square", "without", "with"], rows, folded="every map in numbers")


def _shearing(record: Record) -> Iterator[Block]:
    if shearing := record.report.get("shearing"):
        yield from shearing_blocks(shearing)


def _proof(record: Record) -> Iterator[Block]:
    report, said = record.report, []
    if check := report.get("verify"):
        rounding = check.get("rounding")
        wide = "" if rounding is None else f"; in float64: in its own precision rounding makes {rounding:.1e} of it"
        said.append(
            f"rewritten graph against the {check['reference']}: relative error {error_said(check['max_rel_error'])} (allowed "
            f"{check['tolerance']:.0e}{wide})"
        )
        if report.get("compensation"):
            said.append("what was compared are the weights before they were compensated")
    elif "verify" in report:
        said.append("verification was switched off")
    if report.get("eager_error") is not None:
        said.append(f"eager model against the rewritten graph: relative error {error_said(report['eager_error'])}")
    if meaning := form_said(record):
        said.append(f"form {code(report['form'])}: {meaning}")
    if report.get("stock_load"):
        said.append(f"read back by a process that never imports fxprune: {report['stock_load']}")
    if said:
        yield Notes(said)


def error_said(error: float, digits: int = 1) -> str:
    """A relative error for people."""
    return "0" if error == 0 else f"{error:.{digits}e}"


def _samples(record: Record) -> Iterator[Block]:
    after = "pruned, before recovery" if record.report.get("recovery") else "pruned"
    for s in record.report.get("samples") or ():
        rows = [["dense", _line(s["before"])], [after, _line(s["after"])]]
        yield Table(["prompt", _line(s["prompt"])], rows, words=True)


def _line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def _data(record: Record) -> Iterator[Block]:
    report, rows = record.report, []
    recipe = report.get("recipe") or {}
    if recipe.get("calibration") and recipe["calibration"] != "none":
        how, known = str(recipe["calibration"]), calibration_text(report)
        shape = re.match(r"(\d+) x (\d+) tokens", how)
        tokens = f"{int(shape[1]) * int(shape[2]):,}" if shape else ""
        rows.append(["calibration", known or how, tokens, how if known else ""])
    if recovery := report.get("recovery"):
        training, held = recovery["data"]["training"], recovery["data"].get("validation")
        detail = f"{training['examples']:,} examples, {training['tokens']:,} tokens in all; {recovery['tokens']:,} were read"
        rows.append(["training", str(training["sources"]), f"{recovery['tokens']:,}", detail])
        if held:
            rows.append(["validation", str(held["sources"]), f"{held['tokens']:,}", f"{held['examples']:,} examples"])
        rows += [
            ["training before that", str(earlier["data"]["training"]["sources"]), f"{earlier['tokens']:,}", ""]
            for earlier in _earlier(recovery)
        ]
    rows += [
        ["evaluation", f"{p['text']} ({p.get('source') or 'given'})", f"{p['tokens']:,}", f"windows of {p['length']}"]
        for p in (record.evaluation or {}).get("perplexities") or ()
    ]
    if rows:
        yield Table(["use", "text", "tokens", "how"], rows, words=True)


def _earlier(recovery: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    while earlier := recovery.get("earlier"):
        yield earlier
        recovery = earlier


def _recipe(record: Record) -> Iterator[Block]:
    report, name = record.report, record.name
    text = recipe_yaml(report)
    command = prune_command(report, name) or shear_command(report, name)
    if text:
        limit = "; the limit is what was read, whether tokens or steps were given" if "shearing" in report else ""
        yield Text(
            "The settings, as `fxprune_recipe.yaml` beside this page. Run in its directory, with your paths in place of the names "
            f"of model, texts and output{limit}:"
        )
        yield Listing(command, "bash")
        yield Listing(text, "yaml")
    if (report.get("widths") or report.get("dropped")) and "shearing" not in report:
        replayed = (report.get("recipe") or {}).get("replayed")
        yield Text("A plan was replayed, run in its directory:" if replayed else "The same units again, whatever the text:")
        yield Listing(replay_command(report, name), "bash")
    for again in recover_commands(report, name):
        yield Text("And the training after it:")
        yield Listing(again, "bash")


def _made(record: Record) -> Iterator[Block]:
    report = record.report
    times = {**(report.get("seconds") or {}), **((report.get("shearing") or {}).get("seconds") or {})}
    stages = [[name, f"{seconds:,.1f}"] for name, seconds in times.items()]
    versions = {**(report.get("versions") or {}), **((report.get("recovery") or {}).get("versions") or {})}
    if versions:
        yield Table(["", "version"], [[name, str(value)] for name, value in versions.items()], words=True)
    if stages:
        yield Table(["stage", "seconds"], stages, folded="time of each stage")


def _recovery(record: Record) -> Iterator[Block]:
    if recovery := record.report.get("recovery"):
        yield from recovery_blocks(recovery)


BUILDERS: dict[str, Callable[[Record], Iterator[Block]]] = {
    "Before and after": _numbers,
    "Notes and warnings": _notes,
    "What went": _widths,
    "Sensitivity": _curves,
    "Importance": _importance,
    "Compensation": _compensation,
    "Shearing": _shearing,
    "Recovery": _recovery,
    "Proof": _proof,
    "Generated text": _samples,
    "Data": _data,
    "Recipe": _recipe,
    "Versions and time": _made,
}
