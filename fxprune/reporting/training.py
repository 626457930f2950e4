"""The part of a page on a recovery: what was trained, how the loss went, and what each source of a curriculum got and lost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .blocks import Block, Chart, Charts, Notes, Table
from .charts import Axis, Series, lines

STEP = Axis("optimizer step", low=0, whole=True)
POINTS = 240
"""Of a curve; longer ones are drawn as means of neighbours."""


def held_out(recovery: Mapping[str, Any]) -> tuple[float, float] | None:
    """Perplexity on held-out text before the training, and of the weights that were kept; None where nothing was held out."""
    found = {v["step"]: v["perplexity"] for v in recovery["validation"]}
    return (recovery["validation"][0]["perplexity"], found[recovery["best_step"]]) if found else None


def recovery_blocks(recovery: Mapping[str, Any]) -> Iterator[Block]:
    """Blocks of a recovery's report (`fxprune.RecoveryReport.to_json`)."""
    validation: Sequence[Mapping[str, float]] = recovery["validation"]
    settings, history = recovery["settings"], recovery["history"]
    share = recovery["trained_parameters"] / recovery["parameters"] if recovery["parameters"] else 0.0
    pace = f"{recovery['tokens_per_second']:,.0f} tokens/s, " if recovery["tokens_per_second"] else ""  # too few steps tell of none
    rows = [
        ["method", f"{settings['method']}, {recovery['trained_parameters']:,} parameters trained ({share:.1%})"],
        ["steps", f"{recovery['steps']:,} ({recovery['stopped']}); weights of step {recovery['best_step']:,}"],
        ["tokens read", f"{recovery['tokens']:,}"],
        ["pace", f"{pace}{recovery['seconds']:,.1f} s"],
        ["teacher", recovery["teacher"] or "none"],
    ]
    if both := held_out(recovery):
        rows.insert(0, ["perplexity, held out", f"{both[0]:,.2f} before, {both[1]:,.2f} after"])
    yield Table(["", "value"], rows, words=True)
    pictures = []
    if history["loss"]:
        raw, series = history["loss"], loss_series(history)
        chart = lines(series, STEP, Axis("training loss (nats/token)"), title="training loss over optimizer steps")
        pictures.append(Chart(chart, f"training loss: {raw[0]:.3f} at the first step, {raw[-1]:.3f} at the last"))
    if len(validation) > 1:
        series = [Series("", [(v["step"], v["perplexity"]) for v in validation], dots=True)]
        best = [(recovery["best_step"], both[1])] if both else []
        series.append(Series("kept", best, colour=1, dots=True))
        chart = lines(series, STEP, Axis("perplexity, held out"), title="validation perplexity over optimizer steps")
        pictures.append(Chart(chart, "validation perplexity", [f"step {v['step']:>7}  {v['perplexity']:,.2f}" for v in validation]))
    if history["lr"]:
        chart = lines(
            [Series("", _thinned(list(zip(history["step"], history["lr"], strict=True))), colour=2)],
            STEP,
            Axis("learning rate", zero=True),
            title="learning rate over optimizer steps",
        )
        pictures.append(Chart(chart, "learning rate"))
    if pictures:
        yield Charts(pictures)
    if bad := sum(not math.isfinite(v) for v in history["loss"]):
        said = "a loss is not finite, and is" if bad == 1 else f"{bad} losses are not finite, and are"
        yield Notes([f"{said} not drawn"], warning=True)
    if recovery.get("curriculum"):
        yield from _curriculum(recovery["curriculum"])


def _curriculum(curriculum: Mapping[str, Any]) -> Iterator[Block]:
    """Shares and losses of each source over the rounds."""
    records = curriculum["measurements"]
    names = list(dict.fromkeys(name for stage in curriculum["stages"] for name in stage))
    lost = all(r["degradation"] is not None for r in records)
    what = "degradation" if lost else "loss"
    shares, losses = [], []
    for i, name in enumerate(names):
        own = [r for r in records if name in r[what]]
        steps = [(r["step"] + at * r["steps"], r["weights"][name]) for r in own if r["steps"] for at in (0, 1)]
        shares.append(Series(name, steps, colour=i))
        losses.append(Series(name, [(r["step"], r[what][name]) for r in own], colour=i, dots=True))
    label = f"{what if lost else 'held-out loss'} (nats/token)"
    yield Charts(
        [
            Chart(
                lines(shares, STEP, Axis("share of the tokens", low=0, high=1), title="share of each source"),
                "share of each source",
            ),
            Chart(lines(losses, STEP, Axis(label), title=label), label),
        ]
    )
    rows = []
    for name in names:
        first = next(r for r in records if name in r[what])
        after = curriculum["final"].get(name, {}).get(what)
        tokens = sum(r["tokens"].get(name, 0) for r in records if r["steps"])
        rows.append([name, f"{first[what][name]:.3f}", "" if after is None else f"{after:.3f}", f"{tokens:,}"])
    yield Table(["source", f"{label}, before", "after", "tokens read"], rows)


def loss_series(history: Mapping[str, Sequence[float]]) -> list[Series]:
    """The loss of every step, and of a long run its running mean in front of it."""
    raw = list(zip(history["step"], history["loss"], strict=True))
    if len(raw) < 9:
        return [Series("", raw)]
    return [Series("", _thinned(raw), faint=True), Series("mean", _smooth(_thinned(raw)))]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / POINTS)
    parts = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(a for a, _ in p) / len(p), sum(b for _, b in p) / len(p)) for p in parts]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of a tenth of the curve around each point."""
    reach = max(1, len(points) // 20)
    windows = (points[max(0, i - reach) : i + reach + 1] for i in range(len(points)))
    return [(points[i][0], sum(b for _, b in w) / len(w)) for i, w in enumerate(windows)]
