"""The part of a page on a shearing: what each layer was found to be worth, and how units were brought to zero in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..names import layer_of
from .blocks import Block, Chart, Charts, Table, Text, code
from .charts import LAYER, Axis, Series, lines, number
from .training import STEP, loss_series


def shearing_blocks(shearing: Mapping[str, Any]) -> Iterator[Block]:
    """Blocks of a shearing's report (`fxprune.ShearReport.to_json`)."""
    trained, tokens = shearing["lhspg"], shearing["tokens"]
    rows = [
        ["asked for", f"{shearing['ratio']:.2%} of all parameters; {shearing['removed']:.2%} went"],
        ["units ranked by", trained.get("criterion", "")],
        ["tokens read", f"{tokens['total']:,} in all"],
        ["of them", ", ".join(f"{n:,} {part}" for part, n in tokens.items() if part != "total" and isinstance(n, int))],
        ["in each period", ", ".join(f"{n:,}" for n in tokens["periods"])],
        ["exactly zero before they went", f"{shearing['prune'].get('zeros', 0):,} numbers"],
    ]
    yield Table(["", "value"], [row for row in rows if row[1]], words=True)
    pictures = []
    history = trained.get("history") or {}
    if history.get("loss"):
        chart = lines(loss_series(history), STEP, Axis("training loss (nats/token)"), title="training loss over optimizer steps")
        pictures.append(Chart(chart, "loss while units are brought to zero"))
    if periods := trained.get("periods"):
        points = [(float(p["step"]), 100 * p["removed"]) for p in periods]
        chart = lines([Series("", points, dots=True)], STEP, Axis("parameters redundant (%)", zero=True), title="share by period")
        text = [f"step {p['step']:>7}  {p['removed']:.2%} of the parameters, {p['units']:,} units" for p in periods]
        pictures.append(Chart(chart, "what is redundant from each period on", text))
    if pictures:
        yield Charts(pictures)
    if knowledge := shearing.get("knowledge"):
        yield from _knowledge(knowledge)
    settings = shearing.get("settings") or {}
    flat = [[k, f"{v}"] for k, v in settings.items() if isinstance(v, str | int | float | list)]
    if flat:
        yield Table(["setting", "value"], flat, folded=f"settings (recipe {shearing.get('recipe', 'own')})", words=True)


def _knowledge(knowledge: Mapping[str, Any]) -> Iterator[Block]:
    rows = knowledge.get("groups") or {row["name"]: row for row in knowledge["rows"]}  # the former in early reports
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, row in rows.items():
        if (layer := layer_of(name)) is not None:
            kinds.setdefault(row["kind"], []).append((float(layer), float(row["loss_change"])))
    yield Text(f"What each group is worth: the rise of the loss without it, measured on {knowledge['text'] or 'batches given'}.")
    series = [Series(kind, sorted(points), colour=i, dots=True) for i, (kind, points) in enumerate(kinds.items())]
    if series:
        y = Axis("rise of the loss (nats/token)", zero=True)
        yield Charts([Chart(lines(series, LAYER, y, title="worth of each group by layer"), "worth by layer")])
    ranked = sorted(rows, key=lambda name: rows[name]["rank"])
    kept = set(knowledge.get("protected") or ())
    cells = [[str(rows[n]["rank"]), n, number(float(rows[n]["loss_change"])), "yes" if n in kept else ""] for n in ranked]
    yield Table(["rank", "group", "rise of the loss", "protected"], cells, folded="every group")
    if kept:
        yield Text(f"Left whole: {', '.join(code(name) for name in ranked if name in kept)}.")
