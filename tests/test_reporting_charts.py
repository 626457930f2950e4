"""Charts: what is drawn stands where the numbers say, and labels neither lie on each other nor break the page."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxprune.reporting.charts import LAYER, Axis, Series, Spread, bars, lines, log_ticks, nice_ticks, number, spreads

X, Y = Axis("layer"), Axis("loss (nats)")


def parsed(svg: str) -> ElementTree.Element:
    """The picture as XML: what is not well-formed fails here."""
    return ElementTree.fromstring(svg)


def scale(svg: str, side: str) -> tuple[float, float]:
    """(pixels per unit, pixel of 0) of an axis, from its ticks."""
    ends = "end" if side == "y" else "middle"
    ticks = [t for t in parsed(svg).iter("text") if t.get("class") == "tick" and t.get("text-anchor") == ends]
    places = [(float((t.text or "").replace(",", "")), float(t.get(side) or 0) - (3.8 if side == "y" else 0)) for t in ticks]
    (a, at_a), (b, at_b) = places[0], places[-1]
    return (at_b - at_a) / (b - a), at_a - a * (at_b - at_a) / (b - a)


def test_bars_are_as_high_as_their_numbers() -> None:
    values = [(float(i), 64.0, 64.0 - 9 * i) for i in range(6)]
    svg = bars(values, X, Axis("units"), title="widths")
    slope, zero = scale(svg, "y")
    across, start = scale(svg, "x")
    kept = [r for r in parsed(svg).iter("rect") if r.get("class") == "bar"]
    ghosts = [r for r in parsed(svg).iter("rect") if r.get("class") == "ghost"]
    for rects, column in ((kept, 2), (ghosts, 1)):
        for rect, value in zip(rects, values, strict=True):
            assert float(rect.get("height") or 0) == pytest.approx(-slope * value[column], abs=0.2)
            assert float(rect.get("y") or 0) == pytest.approx(zero + slope * value[column], abs=0.2)
            middle = float(rect.get("x") or 0) + float(rect.get("width") or 0) / 2
            assert middle == pytest.approx(start + across * value[0], abs=0.2)
    assert [t.text for t in parsed(svg).iter("text") if t.get("class") == "note"] == ["19"]
    assert "layer 5: 19 of 64" in svg


def test_lines_go_through_their_points() -> None:
    points = [(0.0, 1.0), (2.0, 3.0), (6.0, 2.0)]
    svg = lines([Series("one", points, dots=True)], X, Axis("loss", zero=True), title="loss")
    slope, zero = scale(svg, "y")
    across, start = scale(svg, "x")
    line = next(p for p in parsed(svg).iter("polyline"))
    drawn = [tuple(map(float, p.split(","))) for p in (line.get("points") or "").split()]
    for (a, b), (x, y) in zip(points, drawn, strict=True):
        assert x == pytest.approx(start + across * a, abs=0.2)
        assert y == pytest.approx(zero + slope * b, abs=0.2)
    assert len(list(parsed(svg).iter("circle"))) == 3
    texts = [t.text for t in parsed(svg).iter("text")]
    assert {"one", "layer", "loss"} <= set(texts), "the line and both axes are named"


def test_a_logarithmic_axis() -> None:
    svg = lines([Series("", [(1.0, 0.001), (2.0, 0.1), (3.0, 10.0)])], X, Axis("score", log=True), title="scores")
    line = next(p for p in parsed(svg).iter("polyline"))
    heights = [float(p.split(",")[1]) for p in (line.get("points") or "").split()]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_spreads_stand_in_order() -> None:
    row = Spread(3.0, 1.0, 2.0, 3.0, 4.0, 5.0, 2.5, "a group")
    svg = spreads([row, Spread(4.0, 1.0, 2.0, 3.0, 4.0, 5.0)], X, Y, title="importance")
    slope, zero = scale(svg, "y")
    group = next(g for g in parsed(svg).iter("g"))
    line, cut = list(group.iter("line"))
    assert float(line.get("y1") or 0) == pytest.approx(zero + slope * 1, abs=0.2)
    assert float(line.get("y2") or 0) == pytest.approx(zero + slope * 5, abs=0.2)
    assert float(cut.get("y1") or 0) == pytest.approx(zero + slope * 2.5, abs=0.2)
    assert svg.count('class="cut"') == 1


def test_labels_keep_apart() -> None:
    many = [Series(f"line {i}", [(0.0, 0.0), (1.0, 1.0 + i / 1000)], i) for i in range(8)]
    svg = lines(many, X, Y, title="many")
    heights = sorted(float(t.get("y") or 0) for t in parsed(svg).iter("text") if t.get("class") == "note")
    assert len(heights) == 8
    assert min(b - a for a, b in pairwise(heights)) >= 11.9
    assert heights[0] > 20
    assert heights[-1] < 236


def test_ticks_that_lie_close_are_told_apart() -> None:
    svg = lines([Series("", [(0.0, -0.016301), (4.0, -0.016299)])], X, Y, title="flat")
    ticks = [t for t in parsed(svg).iter("text") if t.get("class") == "tick" and t.get("text-anchor") == "end"]
    assert len({t.text for t in ticks}) == len(ticks) > 2
    for tick in ticks:
        assert float(tick.get("x") or 0) >= 6 * len(tick.text or ""), "cut off at the edge"


@pytest.mark.parametrize("values", [(115.2, 123.9), (0.1, 0.12), (1.01e7, 1.09e7), (1_000.5, 1_001.75), (2e-6, 2.09e-6)])
def test_a_tick_says_where_it_stands(values: tuple[float, float]) -> None:
    svg = lines([Series("", list(enumerate(values)))], X, Y, title="numbers")
    ticks = [t for t in parsed(svg).iter("text") if t.get("class") == "tick" and t.get("text-anchor") == "end"]
    said = [float((t.text or "").replace(",", "")) for t in ticks]
    places = [float(t.get("y") or 0) for t in ticks]
    slope = (places[-1] - places[0]) / (said[-1] - said[0])
    assert len(ticks) > 2
    for value, place in zip(said, places, strict=True):
        assert place == pytest.approx(places[0] + slope * (value - said[0]), abs=0.15)


def test_there_is_no_half_unit() -> None:
    for svg in (
        bars([(0, 2, 1), (1, 2, 2)], LAYER, Axis("units", whole=True), title="heads"),
        lines([Series("", [(0, 2), (1, 1)])], LAYER, Axis("units", whole=True), title="heads"),
    ):
        ticks = [t.text for t in parsed(svg).iter("text") if t.get("class") == "tick"]
        assert set(ticks) == {"0", "1", "2"}.intersection(ticks)
        assert "2" in ticks


def test_a_name_stands_where_no_line_is() -> None:
    rising = Series("", [(0.0, 0.0), (50.0, 60.0)])
    svg = lines([rising, Series("other", [(20.0, 24.0)], 1), Series("at the foot", [(0.0, 0.0)], 2)], X, Y, title="names")
    heights = {t.text: float(t.get("y") or 0) for t in parsed(svg).iter("text") if t.get("class") == "note"}
    other, foot = sorted(float(c.get("cy") or 0) for c in parsed(svg).iter("circle"))
    assert heights["other"] > other, "the line rises, so that there is room under it"
    assert heights["at the foot"] < foot, "under it is the axis"


def test_a_long_name_ends_where_the_picture_or_another_name_does() -> None:
    long, end = Series("a checkpoint that was pruned and recovered", [(25.0, 50.0)]), Series("half", [(50.0, 50.0)], 1)
    dense, low = Series("dense", [(0.0, 40.0)], 2), Series("half", [(50.0, 40.0)], 1)

    def note(svg: str, begin: str) -> tuple[float, float, str]:
        (found,) = (t for t in parsed(svg).iter("text") if t.get("class") == "note" and (t.text or "").startswith(begin))
        text, at = found.text or "", float(found.get("x") or 0)
        return at, at + 6.1 * len(text), text

    _, right, said = note(lines([long, low, dense], X, Y, title="alone"), "a check")
    assert (said[-1], 340 < right <= 360) == ("…", True)
    svg = lines([long, end, dense], X, Y, title="beside another")
    _, right, said = note(svg, "a check")
    assert (said[-1], right <= note(svg, "half")[0]) == ("…", True)
    assert note(svg, "dense")[2] == "dense"
    assert "<title>a checkpoint that was pruned and recovered</title>" in svg, "the whole name is shown under the pointer"


def test_names_are_escaped() -> None:
    bad = '<script>"&'
    for svg in (
        lines([Series(bad, [(0, 1), (1, 2)], hint=bad)], Axis(bad), Axis(bad), title=bad),
        bars([(0, 2, 1)], Axis(bad), Axis(bad), title=bad),
        spreads([Spread(0, 1, 2, 3, 4, 5, hint=bad)], Axis(bad), Axis(bad), title=bad),
    ):
        assert "<script" not in svg
        assert next(parsed(svg).iter("title")).text == bad


@given(
    st.lists(st.tuples(st.floats(allow_nan=True, width=32), st.floats(allow_nan=True, width=32)), max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_any_numbers_make_a_picture(points: list[tuple[float, float]], log: bool, zero: bool) -> None:
    svg = lines([Series("x", points, dots=True)], X, Axis("y", log=log, zero=zero), title="any")
    parsed(svg)
    assert "nan" not in svg
    assert "inf" not in svg
    drawn = [p for p in points if all(map(math.isfinite, p)) and (p[1] > 0 or not log)]
    assert len(re.findall("<circle", svg)) == len(drawn)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low: float, wide: float) -> None:
    ticks = nice_ticks(low, low + wide)
    assert 1 <= len(ticks) <= 11
    assert all(low - wide * 1e-6 <= t <= low + wide * (1 + 1e-6) for t in ticks)
    steps = [b - a for a, b in pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3) if steps else True


def test_ticks() -> None:
    assert nice_ticks(0, 1536) == [0, 500, 1000, 1500]
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert nice_ticks(3, 3) == [3]
    assert log_ticks(1e-5, 1e-2) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2])
    assert log_ticks(30, 120) == [50, 75, 100]
    assert log_ticks(10, 100) == pytest.approx([10, 20, 50, 100])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1536, "1,536"),
        (0.25, "0.25"),
        (1e-5, "1e-5"),
        (2.5e-7, "2.5e-7"),
        (3e9, "3e9"),
        (math.inf, "∞"),
        (12.345, "12.3"),
    ],
)
def test_numbers_of_labels(value: float, text: str) -> None:
    assert number(value) == text
