"""Charts as inline SVG: small multiples with units on their axes, labels at the lines, and the page's colours.

Every chart is drawn for a width of 360 pixels, so that three stand beside each other on a wide screen and one fills a telephone,
with letters of one size. Colours are variables of the page's style sheet: ``--s0`` to ``--s5``, chosen to differ for the
colour-blind, on a light and on a dark page. What is given as text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 236
TOP, BOTTOM, LEFT, RIGHT = 30, 38, 46, 14
LETTER = 6.1
"""Pixels of a letter of the labels, about."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: What is measured, with its unit.
        log: Logarithmic.
        zero: Begins at zero, if nothing is below.
        low: Begins no later than here.
        high: Ends no earlier than here.
        whole: There is nothing between whole numbers, so that ticks stand at these only.
    """

    label: str
    log: bool = False
    zero: bool = False
    low: float | None = None
    high: float | None = None
    whole: bool = False


LAYER = Axis("layer", whole=True)


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        label: Written at its end; empty for none.
        points: Drawn from left to right.
        colour: A number of the palette, or a place between 0 and 1 on the ramp from its first to its second colour.
        dots: Mark the points.
        line: Connect them.
        faint: Behind the others.
        hint: Shown while the pointer rests on it; by default the label.
    """

    label: str
    points: Points
    colour: int | float = 0
    dots: bool = False
    line: bool = True
    faint: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Spread:
    """How values spread, for one place on the axis.

    Attributes:
        x: The place.
        low: 5 % of the values are below.
        lower: 25 % are.
        middle: The median.
        upper: 25 % are above.
        high: 5 % are.
        cut: The largest value of what was removed; None if nothing was.
        hint: Shown while the pointer rests on it.
    """

    x: float
    low: float
    lower: float
    middle: float
    upper: float
    high: float
    cut: float | None = None
    hint: str = ""


def number(value: float, digits: int = 3) -> str:
    """A number for a label: thousands with commas, powers of ten where they are shorter."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else ("∞" if value > 0 else "-∞") if math.isinf(value) else "-"
    size = abs(value)
    if size >= 1e7 or size < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 2}e}".partition("e")
        return f"{mantissa.rstrip('0').removesuffix('.')}e{int(exponent)}"
    return f"{value:,.{max(0, digits - 3)}f}" if size >= 100 else f"{value:.{digits}g}"


def lines(series: Sequence[Series], x: Axis, y: Axis, *, title: str) -> Markup:
    """Lines, each with its name at its end where there is room for it.

    Args:
        series: Points that are not finite (or not above 0 on a logarithmic axis) are left out.
        x: Horizontal.
        y: Vertical.
        title: What the chart shows, for those who cannot see it.
    """
    shown = [(s, [(a, b) for a, b in s.points if _drawable(a, x) and _drawable(b, y)]) for s in series]
    shown = [(s, points) for s, points in shown if points]
    named = [s.label for s, _ in shown if s.label]
    room = min(118.0, max((len(n) * LETTER + 10 for n in named), default=0.0))
    frame = _Frame(x, y, [a for _, p in shown for a, _ in p], [b for _, p in shown for _, b in p], right=RIGHT + room)
    for s, points in sorted(shown, key=lambda pair: not pair[0].faint):
        frame.add(f'<g class="{"faint" if s.faint else "series"}" style="{_colour(s.colour)}">{_title(s.hint or s.label)}')
        if s.line and len(points) > 1:
            frame.add(f'<polyline points="{" ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in points)}"/>')
        if s.dots or len(points) == 1:
            frame.parts += [f'<circle cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="3.2"/>' for a, b in points]
        frame.add("</g>")
    paths = [[(frame.x(a), frame.y(b)) for a, b in points] for _, points in shown]
    frame.label_ends([(*path[-1], s.label, s.colour) for (s, _), path in zip(shown, paths, strict=True) if s.label], room, paths)
    return frame.svg(title)


def bars(values: Sequence[tuple[float, float, float]], x: Axis, y: Axis, *, title: str) -> Markup:
    """Bars of what is left, each in front of what there was.

    Args:
        values: For each bar its place, what there was, and what is left.
        x: Places are whole numbers.
        y: From zero.
        title: What the chart shows.
    """
    most = max(before for _, before, _ in values)
    places = [place for place, _, _ in values]
    frame = _Frame(x, y, [min(places) - 0.5, max(places) + 0.5], [0.0, most], exact=True)
    wide = min(26.0, max(1.5, (frame.x(1.0) - frame.x(0.0)) * 0.74))
    for place, before, after in values:
        left = frame.x(place) - wide / 2
        frame.add(f"<g>{_title(f'{x.label} {place:g}: {number(after)} of {number(before)}')}")
        for kind, value in (("ghost", before), ("bar", after)):
            top = frame.y(value)
            frame.add(
                f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{frame.bottom - top:.1f}" rx="1"/>'
            )
        frame.add("</g>")
    least, place = min((after, place) for place, _, after in values)
    frame.note(max(frame.x(place), frame.left + len(number(least)) * LETTER / 2), frame.y(least) - 4, number(least))
    return frame.svg(title)


def spreads(rows: Sequence[Spread], x: Axis, y: Axis, *, title: str) -> Markup:
    """A line from the 5 % to the 95 % quantile, a box between the quartiles, a dot at the median, and a mark where the cut is."""
    values = [v for row in rows for v in (row.low, row.lower, row.middle, row.upper, row.high, row.cut) if v is not None]
    places = [row.x for row in rows]
    frame = _Frame(x, y, [min(places) - 0.5, max(places) + 0.5], [v for v in values if _drawable(v, y)], exact=True)
    wide = min(14.0, max(1.5, (frame.x(1.0) - frame.x(0.0)) * 0.55))
    for row in rows:
        low, lower, middle, upper, high = (
            frame.y(max(v, frame.least)) for v in (row.low, row.lower, row.middle, row.upper, row.high)
        )
        at = frame.x(row.x)
        frame.add(f'<g class="spread">{_title(row.hint)}<line x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        frame.add(
            f'<rect x="{at - wide / 2:.1f}" y="{upper:.1f}" width="{wide:.1f}" height="{max(lower - upper, 0.8):.1f}" rx="1"/>'
            f'<circle cx="{at:.1f}" cy="{middle:.1f}" r="{min(2.4, wide / 2):.1f}"/>'
        )
        if row.cut is not None and _drawable(row.cut, y):
            cut = frame.y(row.cut)
            frame.add(f'<line class="cut" x1="{at - wide * 0.8:.1f}" x2="{at + wide * 0.8:.1f}" y1="{cut:.1f}" y2="{cut:.1f}"/>')
        frame.add("</g>")
    return frame.svg(title)


def _drawable(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log)


def _title(text: str) -> Markup:
    return Markup("<title>{}</title>").format(text) if text else Markup("")


def _colour(colour: int | float) -> str:
    if isinstance(colour, int):
        return f"--c:var(--s{colour % 6})"
    return f"--c:color-mix(in oklab, var(--s1) {100 * min(max(colour, 0), 1):.0f}%, var(--s0))"


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in between; with 2 and 5 of each where there are few, and round numbers where the range is short."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5)):
        found = [s * 10.0**p for p in powers for s in steps if low * 0.999 <= s * 10.0**p <= high * 1.001]
        if len(found) > 2:
            return found[:: math.ceil(len(found) / 7)]
    return [tick for tick in nice_ticks(low, high, 4) if tick > 0]


@dataclass
class _Frame:
    """The axes, and what is drawn between them."""

    across: Axis
    up: Axis
    xs: Sequence[float]
    ys: Sequence[float]
    right: float = RIGHT
    exact: bool = False
    parts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bottom = HEIGHT - BOTTOM
        self.x0, self.x1 = _limits(self.across, self.xs, margin=0.0 if self.exact else 0.02)
        self.y0, self.y1 = _limits(self.up, self.ys, margin=0.0 if self.exact and not self.up.log else 0.04)
        self.least = self.y0
        self.ticks = _texts(_ticks(self.up, self.y0, self.y1))
        self.left = max(LEFT, 12 + LETTER * max((len(text) for text in self.ticks.values()), default=0))
        self.wide = WIDTH - self.left - self.right

    def x(self, value: float) -> float:
        return self.left + self.wide * _share(value, self.x0, self.x1, self.across.log)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - TOP) * _share(value, self.y0, self.y1, self.up.log)

    def add(self, text: str) -> None:
        self.parts.append(text)

    def note(self, x: float, y: float, text: str, anchor: str = "middle", style: str = "") -> None:
        self.add(f'<text class="note" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">{escape(text)}</text>')

    def label_ends(self, ends: Iterable[tuple[float, float, str, int | float]], room: float, paths: Sequence[Points]) -> None:
        """Names at the lines' ends, moved apart where they would lie on each other, and away from the lines."""
        here = list(ends)
        placed = sorted((end for end in here if self.left + self.wide - end[0] <= 40), key=lambda end: end[1])
        heights = _apart([y for _, y, _, _ in placed], 12.0, TOP, self.bottom)
        for x, y, label, colour in (
            end for end in here if self.left + self.wide - end[0] > 40
        ):  # far from the edge: beside the point, above it or below
            sides = [y - 5, y + 13] if y + 17 < self.bottom else [y - 5]
            height = min(sides, key=lambda h: _crossed(paths, x + 7, x + 7 + LETTER * len(label), h - 9, h + 2))
            beside = any(abs(height - 4 - other) < 14 for other in heights)  # a name at the edge
            end = self.left + self.wide if beside else WIDTH - 6
            self.note(x + 7, height, _shortened(label, end - x - 7), "start", _colour(colour))
        for (x, y, label, colour), height in zip(placed, heights, strict=True):
            at = self.left + self.wide + 8
            if abs(height - y) > 3 or at - x > 14:
                points = f"{x + 4:.1f},{y:.1f} {at - 3:.1f},{height:.1f}"
                self.add(f'<polyline class="leader" points="{points}"/>')
            self.note(at, height + 4, _shortened(label, room - 6), "start", _colour(colour))

    def svg(self, title: str) -> Markup:
        """The whole picture."""
        out: list[str] = [Markup('<svg class="chart" viewBox="0 0 {} {}" role="img">').format(WIDTH, HEIGHT), _title(title)]
        out.append(Markup('<text class="axis" x="{}" y="14">{}</text>').format(2, self.up.label))
        out.append(
            Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                round(self.left + self.wide / 2), HEIGHT - 5, self.across.label
            )
        )
        ends = f'x1="{self.left:.0f}" x2="{self.left + self.wide:.0f}"'
        for tick, text in self.ticks.items():
            out.append(f'<line class="grid" {ends} y1="{self.y(tick):.1f}" y2="{self.y(tick):.1f}"/>')
            out.append(f'<text class="tick" x="{self.left - 6:.0f}" y="{self.y(tick) + 3.8:.1f}" text-anchor="end">{text}</text>')
        out.append(f'<line class="base" {ends} y1="{self.bottom + 0.5}" y2="{self.bottom + 0.5}"/>')
        out += [
            f'<text class="tick" x="{self.x(tick):.1f}" y="{self.bottom + 15}" text-anchor="middle">{text}</text>'
            for tick, text in _texts(_ticks(self.across, self.x0, self.x1)).items()
        ]
        return Markup("".join([*out, *self.parts, "</svg>"]))


def _ticks(axis: Axis, low: float, high: float) -> list[float]:
    if axis.log:
        return log_ticks(low, high)
    ticks = nice_ticks(low, high)
    return [t for t in ticks if t == int(t)] if axis.whole else ticks


def _texts(ticks: Sequence[float]) -> dict[float, str]:
    """What is written at each tick: with so many digits that it says where the tick is."""
    for digits in range(3, 9):
        found = {tick: number(tick, digits) for tick in ticks}
        if all(math.isclose(float(text.replace(",", "")), tick, rel_tol=1e-9) for tick, text in found.items()):
            break
    return found


def _shortened(label: str, room: float) -> str:
    """A name, or so much of its beginning that it fits into some pixels."""
    letters = max(3, int(room / LETTER))
    return label if len(label) <= letters else f"{label[: letters - 1]}…"


def _crossed(paths: Sequence[Points], left: float, right: float, top: float, bottom: float) -> int:
    """How much of a rectangle's length has a line in it, in eighths."""
    count = 0
    for x in (left + (right - left) * i / 7 for i in range(8)):
        heights = (c + (d - c) * (x - a) / (b - a) for path in paths for (a, c), (b, d) in pairwise(path) if a <= x <= b and b > a)
        count += any(top <= y <= bottom for y in heights)
    return count


def _limits(axis: Axis, values: Sequence[float], *, margin: float) -> tuple[float, float]:
    found = [*values, *(v for v in (axis.low, axis.high) if v is not None)]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    if axis.log:
        low, high = (low if low > 0 else high / 10), max(high, 1e-300)
        spare = (high / low) ** margin if high > low * 1.001 else 1.5
        return low / spare, high * spare
    if axis.zero and low > 0:
        low = 0.0
    size = max(abs(low), abs(high))
    if high - low <= size * 1e-6:  # flat
        return (low - size / 10, high + size / 10) if size else (0.0, 1.0)
    spare = (high - low) * margin
    return low if low in (0, axis.low) else low - spare, high if high == axis.high else high + spare


def _share(value: float, low: float, high: float, log: bool) -> float:
    if log:
        return math.log(max(value, low) / low) / math.log(high / low)
    return (value - low) / (high - low)


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Rising heights, moved so little that none is closer to the next than the gap (or as far apart as there is room)."""
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(1, len(wanted) - 1)) if len(wanted) > 1 else gap
    heights = list(wanted)
    heights[0] = max(heights[0], low)
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    heights[-1] = min(heights[-1], high)
    for i in range(len(heights) - 2, -1, -1):
        heights[i] = min(heights[i], heights[i + 1] - gap)
    return heights
