"""The curves of a training: what the page draws is what the JSON holds, of made-up histories and of a real curriculum."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from fxprune.recovery.curriculum import Curriculum
from fxprune.reporting.numbers import Record
from fxprune.reporting.page import page_of, render_html

from .curricula import measurements, taught, write_sources
from .recovering import SMALL, pruned, trained
from .reported import Tables, recovery, report, unreadable
from .test_reporting_charts import scale

LOSS = "training loss over optimizer steps"
HELD_OUT = "validation perplexity over optimizer steps"
RATE = "learning rate over optimizer steps"


@dataclass(frozen=True)
class Line:
    """A line of a chart: its points ``[points, 2]``, and how much of each axis a pixel is, ``[2]``."""

    points: np.ndarray
    pixel: np.ndarray

    def near(self, x: Any, y: Any) -> bool:
        """It goes through these points, to half a pixel."""
        return len(self.points) == len(x) and bool((np.abs(self.points - np.stack([x, y], 1)) <= self.pixel / 2).all())


def drawn(page: str, title: str) -> list[Line]:
    """The lines of a chart, read off its axes, in the order in which they lie on each other."""
    (svg,) = (s for s in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if f"<title>{title}</title>" in s)
    (across, x0), (up, y0) = scale(svg, "x"), scale(svg, "y")
    found = []
    for line in ElementTree.fromstring(svg).iter("polyline"):
        if line.get("class") != "leader":
            pixels = np.array([[float(v) for v in p.split(",")] for p in (line.get("points") or "").split()])
            found.append(Line((pixels - (x0, y0)) / (across, up), 1 / np.abs([across, up])))
    return found


def page(data: dict[str, Any]) -> str:
    return render_html(page_of(Record("trained", report(recovery=data))))


def history(steps: int) -> dict[str, list[float]]:
    chosen = random.Random(steps)
    losses = [3 * math.exp(-i / steps) + chosen.uniform(-0.5, 0.5) for i in range(steps)]
    rates = [1e-3 * (steps - i) / steps for i in range(steps)]
    return {"step": list(range(1, steps + 1)), "loss": losses, "lr": rates, "tokens": [64 * i for i in range(1, steps + 1)]}


def test_a_short_history_is_drawn_step_by_step() -> None:
    made = history(8)
    (line,) = drawn(page(recovery(history=made)), LOSS)
    assert line.near(made["step"], made["loss"])


@pytest.mark.parametrize("steps", [9, 12, 240, 500, 1000])
def test_a_longer_one_with_its_running_mean_in_front(steps: int) -> None:
    made = history(steps)
    faint, mean = drawn(page(recovery(history=made)), LOSS)
    size = -(-steps // 240)  # neighbours that share a point, so that no curve has more than 240
    cuts = range(0, steps, size)
    at, losses = (np.array([np.mean(made[key][i : i + size]) for i in cuts]) for key in ("step", "loss"))
    assert len(losses) <= 240
    assert faint.near(at, losses)
    reach = max(1, len(losses) // 20)
    around = [np.mean(losses[max(0, i - reach) : i + reach + 1]) for i in range(len(losses))]
    assert mean.near(at, around)
    assert not mean.near(at, losses)


def test_a_loss_that_is_not_finite_leaves_a_gap_and_is_told() -> None:
    made = history(6)
    made["loss"][2] = math.nan
    text = page(recovery(history=made))
    (line,) = drawn(text, LOSS)
    assert line.near([s for s in made["step"] if s != 3], [v for v in made["loss"] if not math.isnan(v)])
    assert "a loss is not finite, and is not drawn" in text


def stored(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "fxprune_report.json").read_text())["recovery"]
    return found


def test_a_real_recovery(text: Path, tmp_path: Path) -> None:
    made = trained(pruned(), str(text), output=tmp_path / "out")
    assert unreadable(tmp_path / "out") == []
    page, data = (tmp_path / "out" / "report.html").read_text(), stored(tmp_path / "out")
    history, validation = data["history"], data["validation"]
    assert history["loss"] == made.report.history["loss"]
    assert len(history["loss"]) == SMALL["max_steps"]
    (loss,), (rate,), (perplexity,) = (drawn(page, title) for title in (LOSS, RATE, HELD_OUT))
    assert loss.near(history["step"], history["loss"])
    assert rate.near(history["step"], history["lr"])
    assert perplexity.near([v["step"] for v in validation], [v["perplexity"] for v in validation])


def test_a_real_curriculum(tmp_path: Path) -> None:
    sources = list(write_sources(tmp_path))
    made = taught(Curriculum([sources], rounds=3, patience=0), output=tmp_path / "out")
    assert unreadable(tmp_path / "out") == []
    page, data = (tmp_path / "out" / "report.html").read_text(), stored(tmp_path / "out")
    raw, mean = drawn(page, LOSS)
    assert raw.near(made.report.history["step"], made.report.history["loss"])
    assert len(mean.points) == len(raw.points)
    measured = measurements(made)
    rounds = [m for m in measured if m["steps"]]
    steps = [m["step"] + at * m["steps"] for m in rounds for at in (0, 1)]
    for line, name in zip(drawn(page, "share of each source"), ("kept.jsonl", "lost.jsonl"), strict=True):
        assert line.near(steps, [m["weights"][name] for m in rounds for _ in (0, 1)])
    for line, name in zip(drawn(page, "degradation (nats/token)"), ("kept.jsonl", "lost.jsonl"), strict=True):
        assert line.near([m["step"] for m in measured], [m["degradation"][name] for m in measured])
        last = data["curriculum"]["final"][name]["degradation"]
        assert Tables(page).row(name)[:2] == [f"{measured[0]['degradation'][name]:.3f}", f"{last:.3f}"]
