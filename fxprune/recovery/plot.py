"""A picture of a curriculum: what each source's share was in each round, and what was lost on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..plotting import check_plot, new_figure, save_figure


def plot_curriculum(curriculum: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the shares of each round, and below them the degradation (without a dense model: the loss) of each source.

    Args:
        curriculum: Of a report: ``report.curriculum``, or ``["recovery"]["curriculum"]`` of a checkpoint's report file.
        path: What to write; the kind of file is by its name.

    Raises:
        UsageError: As `check_plot`, or the file cannot be written.
    """
    check_plot(path)
    records = curriculum["measurements"]
    names = list(dict.fromkeys(name for stage in curriculum["stages"] for name in stage))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    figure = new_figure(8, 6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for record in (r for r in records if r["steps"]):
        bottom = 0.0
        for name, share in record["weights"].items():
            place = {"bottom": bottom, "align": "edge", "edgecolor": "white"}
            upper.bar(record["step"], share, record["steps"], color=colours[name], **place)
            bottom += share
    lost = all(r["degradation"] is not None for r in records)
    for number in range(1, len(curriculum["stages"]) + 1):
        for name in curriculum["stages"][number - 1]:
            points = [(r["step"], r["degradation" if lost else "loss"][name]) for r in records if r["stage"] == number]
            lower.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colours[name])
    for name, colour in colours.items():
        lower.plot([], [], marker="o", markersize=4, color=colour, label=name)
    upper.set(ylabel="share of tokens", ylim=(0, 1))
    lower.set(xlabel="optimizer step", ylabel=f"{'degradation' if lost else 'held-out loss'} (nats per token)")
    lower.grid(alpha=0.3)
    lower.legend()
    save_figure(figure, path)
