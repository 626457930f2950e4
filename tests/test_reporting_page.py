"""A report and a comparison in a real browser: no word on the console, nothing loaded, and nothing over the edge of a telephone."""

from __future__ import annotations

from pathlib import Path

import pytest

import fxprune
from fxprune.cli import main

from .browser import browser, picture, visit
from .reported import evaluation, full, recovery, report, write

pytestmark = browser

LONG = "model.language_model.layers.{}.feed_forward.experts.shared_expert.ffn"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Both kinds of page as the commands write them, of checkpoints that have everything, and names that are long."""
    place = tmp_path_factory.mktemp("pages")
    record = full()
    wide = {LONG.format(i): [1536, 1024 - i] for i in range(30)}
    one = write(place / "SmolLM2-135M-Instruct-pruned-20-recovered", dict(record.report), dict(record.evaluation or {}))
    two = write(place / "half", report(removed=0.5, parameters_after=51_200, widths=wide), evaluation())
    three = write(place / "three-quarters", report(removed=0.75, recovery=recovery()), evaluation())
    fxprune.render_report(one)
    assert main(["compare", str(one), str(two), str(three), "-o", str(place / "compare.html")]) == 0
    return {
        "report": (one / "report.html").read_text(),
        "wide": fxprune.render_report(two)[0].read_text(),
        "compare": (place / "compare.html").read_text(),
        "two": fxprune.compare(one, two).html(),
    }


LOOK = """
for (const d of document.querySelectorAll("details")) d.open = true;
const cut = [], inside = (e) => { for (let p = e.parentElement; p; p = p.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(p).overflowX)) return true; return false; };
for (const svg of document.querySelectorAll("svg.chart")) {
    const box = svg.getBoundingClientRect();
    for (const t of svg.querySelectorAll("text")) {
        const own = t.getBoundingClientRect();
        if (own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1 || own.bottom > box.bottom + 1)
            cut.push(t.textContent);
    }
}
const over = [...document.querySelectorAll("body *")].filter((e) => !inside(e) &&
    e.getBoundingClientRect().right > window.innerWidth + 1).map((e) => `${e.tagName} ${e.textContent.slice(0, 40)}`);
return { inner: window.innerWidth, wide: document.documentElement.scrollWidth, cut, over,
    charts: document.querySelectorAll("svg.chart").length, heading: document.querySelector("h1").textContent,
    sections: [...document.querySelectorAll("h2")].map((e) => e.textContent),
    loaded: performance.getEntriesByType("resource").map((e) => e.name) };
"""


@pytest.mark.parametrize("width", [1400, 420])
@pytest.mark.parametrize("name", ["report", "wide", "compare", "two"])
def test_it_opens_in_silence_and_fits(pages: dict[str, str], tmp_path: Path, name: str, width: int) -> None:
    seen = visit(pages[name], tmp_path, LOOK, width=width)
    found = seen.answer
    assert seen.console == []
    assert found["loaded"] == []
    assert found["inner"] == width
    assert found["wide"] <= width
    assert (found["over"], found["cut"]) == ([], [])
    assert found["charts"] == pages[name].count("<svg") > 2
    assert not [title for title in found["sections"] if not title]
    assert "cannot be read" not in seen.dom
    if name != "wide":
        assert "SmolLM2-135M-Instruct-pruned-20-recovered" in found["heading"]


@pytest.mark.parametrize("name", ["report", "compare"])
def test_it_looks_like_something_in_light_and_in_the_dark(pages: dict[str, str], tmp_path: Path, name: str) -> None:
    light, dark = (picture(pages[name], tmp_path, dark=night) for night in (False, True))
    assert light[0][1:4] != dark[0][1:4]  # the first pixel
    for rows in (light, dark):
        assert len(set(rows)) > 200  # of a blank page all rows are alike
