"""The budget: what shrinks together, what is left of the parameters after so many steps, and which steps meet a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ..errors import PlanError
from ..groups import LAYERS, Groups
from ..spaces import Axis, Concat, Product, Space, kept_size, resolve

Whole: TypeAlias = npt.NDArray[np.int64]


@dataclass
class Lane:
    """Groups (or blocks) that shrink together, and the counts they may stop at, falling; it is called as the group or family is."""

    label: str
    kind: str
    names: list[str]
    size: int
    stops: range


class Meter:
    """Parameters that are left when each lane has taken so many of its steps: exact, and quick.

    Parameters of one layout (the same expression over other axes, as in every layer) are counted together.
    """

    def __init__(self, groups: Groups, lanes: Sequence[Lane], blocks: Sequence[str]) -> None:
        self.lanes, self.total = lanes, groups.total
        lane_of = {groups[n].axis: i for i, lane in enumerate(lanes) if lane.kind != LAYERS for n in lane.names}
        last = next((i for i, lane in enumerate(lanes) if lane.kind == LAYERS), None)
        self.layers = last
        gone_after: dict[str, int] = {}
        for i, path in enumerate(blocks if last is not None else ()):
            for name in groups.parameters_of([path]):
                gone_after.setdefault(name, i + 1)
        alike: dict[Any, tuple[list[Space], list[Axis], list[list[int]], list[int]]] = {}
        for name, value in groups.parameters.items():
            seen: dict[Axis, int] = {}
            layout = tuple(_layout(space, seen) for space in value)
            _, _, rows, gone = alike.setdefault(layout, (list(value), list(seen), [], []))
            rows.append([lane_of.get(axis, -1) for axis in seen])
            gone.append(gone_after.get(name, len(blocks) + 1))
        self.alike = [
            (dims, axes, np.array(rows, dtype=np.int64).reshape(len(rows), -1), np.array(gone))
            for dims, axes, rows, gone in alike.values()
        ]

    def stops(self, taken: Whole) -> list[int | None]:
        """Units kept by each lane, None where no step was taken."""
        return [lane.stops[n - 1] if n else None for lane, n in zip(self.lanes, taken.tolist(), strict=True)]

    def left(self, taken: Whole) -> int:
        """Parameters left."""
        counts = np.array(
            [lane.size if s is None else s for lane, s in zip(self.lanes, self.stops(taken), strict=True)], dtype=np.int64
        )
        dropped = 0 if self.layers is None else self.lanes[self.layers].size - int(counts[self.layers])
        total = 0
        for dims, axes, rows, gone in self.alike:
            table: dict[Axis, Any] = {}
            for i, axis in enumerate(axes):
                lane = rows[:, i]
                table[axis] = np.where(lane < 0, axis.size, counts[lane]) if len(counts) else np.full(len(rows), axis.size)
            size = math.prod(cast(int, kept_size(space, table.__getitem__)) for space in dims)
            total += int((size * (gone > dropped)).sum())
        return total


def _layout(space: Space, seen: dict[Axis, int]) -> Any:
    """The expression of a space with its axes numbered as they come."""
    space = resolve(space)
    match space:
        case Axis():
            return (seen.setdefault(space, len(seen)), space.size)
        case Product(factors=children):
            return ("x", *(_layout(c, seen) for c in children))
        case Concat(parts=children):
            return ("+", *(_layout(c, seen) for c in children))
        case _:
            return "?"


def fill(meter: Meter, steps: Whole, ratio: float, limits: str) -> list[int | None]:
    """Take steps in order while the target is not exceeded; a lane that would overshoot stops.

    Args:
        meter: Counts what is left.
        steps: Each step's lane, in order of priority.
        ratio: Share of all parameters to remove.
        limits: What bounds the steps, for the message.

    Returns:
        Each lane's stop, None for one that lost nothing.

    Raises:
        PlanError: All steps together do not come near the target.
    """
    lanes, target = len(meter.lanes), (1 - ratio) * meter.total

    def after(base: Whole, prefix: Whole) -> Whole:
        return base + np.bincount(prefix, minlength=lanes)

    taken: Whole = np.zeros(lanes, dtype=np.int64)
    everything, todo = after(taken, steps), steps
    candidates: list[tuple[float, Whole]] = []
    while True:
        low, high = 0, len(todo)  # the longest prefix that does not exceed the target
        while low < high:
            middle = (low + high + 1) // 2
            if meter.left(after(taken, todo[:middle])) >= target:
                low = middle
            else:
                high = middle - 1
        taken = after(taken, todo[:low])
        gap = meter.left(taken) - target
        candidates.append((abs(gap), taken))
        if low == len(todo):
            break
        over = after(taken, todo[low : low + 1])
        candidates.append((abs(meter.left(over) - target), over))
        if gap <= 5e-4 * meter.total:
            break
        todo = todo[low:][todo[low:] != todo[low]]
    best = min(candidates, key=lambda c: c[0])[1]  # the first of equals
    if meter.left(everything) - target > 1e-3 * meter.total:  # not even with every step
        raise PlanError(
            f"a ratio of {ratio:.1%} cannot be reached: with {limits} at most {1 - meter.left(best) / meter.total:.1%} "
            "of the parameters can go; ask for less, or leave less whole"
        )
    return meter.stops(best)


def stop_at(lane: Lane, share: float) -> int | None:
    """The stop nearest to a share of removed units."""
    wanted = lane.size * (1 - share)
    options = [lane.size, *lane.stops]
    stop = min(options, key=lambda s: (abs(s - wanted), -s))
    return None if stop == lane.size else stop
