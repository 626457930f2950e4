"""The selection pass: scores and a target become a plan.

Units are removed step by step. A *lane* is what must shrink together: one group, or with ``widths="uniform"`` all groups of a
family (the same role in every layer), each losing its own least important units. Every step of every lane has a priority:

- ``local`` ranking: the share of the lane that is gone after it, so all lanes shrink alike;
- ``global`` ranking: the importance it removes per parameter it removes, so unimportant lanes shrink first.

Steps are taken in order of priority until the target is met; a lane whose next step would overshoot stops, and the others go on.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from ..errors import PlanError, UsageError, nearest
from ..groups import KINDS, Groups, PruneGroup, layer_of
from ..plan import PrunePlan
from .base import Pass
from .dependency import groups_of
from .importance import SCORES

PLAN = "fxprune.plan"
LAYERS = "layers"
DEFAULT_KINDS = ("kv_heads", "query_groups", "ffn")
RANKINGS = ("local", "global")
WIDTHS = ("uniform", "per-layer")


@dataclass(frozen=True)
class Selection:
    """What to remove, and under which constraints.

    Attributes:
        ratio: Share of all of the model's parameters to remove, in (0, 1). Exactly one of ``ratio`` and ``units`` is given.
        units: Share of the units of every eligible group to remove (LLM-Pruner's pruning ratio), or a mapping from kind to share.
        kinds: Kinds that may be pruned, from `fxprune.groups.KINDS` and ``"layers"`` (whole residual blocks); a mapping gives
            each a pace: with 0.5 a kind loses units half as fast as one with 1.
        ranking: ``local`` or ``global``.
        widths: ``uniform`` (the same in every layer, loads everywhere) or ``per-layer``.
        protect_first: Layers at the start that stay whole. With ``uniform`` widths, widths in protected layers would differ: an
            error, unless only ``layers`` are dropped.
        protect_last: Layers at the end that stay whole.
        protect: Group names or patterns (``model.layers.3.*``) that stay whole.
        multiple: Round kept units to a multiple of this: one number for every kind but heads, or a mapping from kind.
        floor: Least share of units that a group keeps; at least one unit always stays.
    """

    ratio: float | None = None
    units: float | Mapping[str, float] | None = None
    kinds: Sequence[str] | Mapping[str, float] = DEFAULT_KINDS
    ranking: str = "local"
    widths: str = "uniform"
    protect_first: int = 0
    protect_last: int = 0
    protect: Sequence[str] = ()
    multiple: int | Mapping[str, int] = 1
    floor: float = 0.0

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.units is None):
            raise UsageError("give either ratio= (share of all parameters) or units= (share of units), not both or neither")
        shares = self.units.values() if isinstance(self.units, Mapping) else [self.ratio if self.units is None else self.units]
        for share in shares:
            if not isinstance(share, int | float) or not 0 < share < 1:
                raise UsageError(f"a ratio must lie between 0 and 1 (0.2 removes 20 %), got {share!r}")
        for kind in [*self.pace, *(self.units if isinstance(self.units, Mapping) else ())]:
            if kind not in (*KINDS, LAYERS):
                raise UsageError(f"unknown kind '{kind}'; {nearest(kind, (*KINDS, LAYERS))}")
        if not self.pace or all(p == 0 for p in self.pace.values()):
            raise UsageError("no kind may be pruned: name at least one")
        for name, value, valid in (("ranking", self.ranking, RANKINGS), ("widths", self.widths, WIDTHS)):
            if value not in valid:
                raise UsageError(f"unknown {name} '{value}'; {nearest(str(value), valid)}")
        if not 0 <= self.floor < 1:
            raise UsageError(f"floor is a share of units from 0 up to (not including) 1, got {self.floor}")
        if any(m < 1 for m in (self.multiple.values() if isinstance(self.multiple, Mapping) else [self.multiple])):
            raise UsageError(f"multiple must be at least 1, got {self.multiple}")

    @property
    def pace(self) -> dict[str, float]:
        """How fast each eligible kind shrinks, relative to the others."""
        return dict(self.kinds) if isinstance(self.kinds, Mapping) else dict.fromkeys(self.kinds, 1.0)

    def multiple_of(self, kind: str) -> int:
        """The multiple that a kind's kept units are rounded to."""
        if isinstance(self.multiple, Mapping):
            return self.multiple.get(kind, 1)
        return 1 if kind in ("kv_heads", "query_groups", "experts") else self.multiple

    def share_of(self, kind: str) -> float:
        """Share of units to remove in ``units`` mode."""
        if isinstance(self.units, Mapping):
            return self.units.get(kind, 0.0)
        return self.units or 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data for the plan's recipe."""
        return {
            "ratio": self.ratio,
            "units": dict(self.units) if isinstance(self.units, Mapping) else self.units,
            "kinds": self.pace,
            "ranking": self.ranking,
            "widths": self.widths,
            "protect_first": self.protect_first,
            "protect_last": self.protect_last,
            "protect": list(self.protect),
            "multiple": dict(self.multiple) if isinstance(self.multiple, Mapping) else self.multiple,
            "floor": self.floor,
        }


class SelectionPass(Pass):
    """Choose units by the scores that an `ImportancePass` left; the plan goes to ``gm.meta["fxprune.plan"]``."""

    def __init__(self, selection: Selection | None = None, *, block_scores: Mapping[str, float] | None = None, **options: Any) -> None:
        super().__init__()
        self.selection = selection or Selection(**options)
        self.block_scores = block_scores

    def call(self, graph_module: GraphModule) -> PassResult:
        """Select and annotate; the graph is not modified."""
        if SCORES not in graph_module.meta:
            raise UsageError("no scores on the graph: run an ImportancePass before the SelectionPass")
        graph_module.meta[PLAN] = select(
            groups_of(graph_module), graph_module.meta[SCORES], self.selection, block_scores=self.block_scores
        )
        return PassResult(graph_module, False)


@dataclass
class _Lane:
    """Groups (or blocks) that shrink together, and the counts they may stop at."""

    kind: str
    names: list[str]
    size: int
    stops: list[int]


@dataclass(frozen=True)
class _Step:
    priority: float
    lane: int
    stop: int


def select(
    groups: Groups,
    scores: Mapping[str, Tensor],
    selection: Selection | None = None,
    *,
    block_scores: Mapping[str, float] | None = None,
    recipe: Mapping[str, Any] | None = None,
    **options: Any,
) -> PrunePlan:
    """Choose the units to keep.

    Args:
        groups: The model's prune groups.
        scores: Importance of each unit, as `fxprune.score` returns it.
        selection: The target and constraints; or give its fields as keywords (``ratio=0.2``).
        block_scores: Importance of each residual block, for kind ``layers``; without it the first blocks are kept (LLM-Pruner's
            layer-wise baseline).
        recipe: More settings to record in the plan.
        **options: Fields of `Selection`.

    Returns:
        The plan. ``plan.recipe["removed"]`` is the share of parameters that it removes, and ``plan.recipe["note"]`` says so where
        the target could not be met within 0.1 percentage points.

    Raises:
        UsageError: Unknown kinds, impossible ratios or protections that match nothing.
        PlanError: The target is out of reach under the constraints; says how far it goes.
    """
    chosen = selection or Selection(**options)
    lanes = _lanes(groups, chosen)
    ranked = {n: torch.argsort(scores[n], stable=True) for lane in lanes if lane.kind != LAYERS for n in _known(lane.names, scores)}
    blocks = _ranked_blocks(groups, chosen, block_scores)
    if chosen.units is not None:
        stops = [_stop_at(lane, chosen.share_of(lane.kind)) for lane in lanes]
    else:
        steps = sorted(_steps(groups, lanes, chosen, scores, block_scores), key=lambda s: (s.priority, s.stop, s.lane))
        stops = _fill(groups, lanes, steps, float(chosen.ratio or 0), blocks)
    keep, drop = _materialise(groups, lanes, stops, ranked, blocks)
    removed = 1 - groups.remaining({n: len(u) for n, u in keep.items()}, drop) / groups.total
    facts: dict[str, Any] = {**chosen.to_json(), **(recipe or {}), "removed": round(removed, 6)}
    if chosen.ratio is not None and abs(removed - chosen.ratio) > 1e-3:
        facts["note"] = f"asked for {chosen.ratio:.2%} of the parameters; the nearest that the units allow is {removed:.2%}"
    if not keep and not drop:
        raise PlanError("nothing would be removed: the ratio is smaller than the smallest unit, or every group is protected")
    return PrunePlan.from_keep(groups, keep, drop=drop, recipe=facts, scores=dict(scores))


def _known(names: Sequence[str], scores: Mapping[str, Tensor]) -> Sequence[str]:
    for name in names:
        if name not in scores:
            raise UsageError(f"there are no scores for group '{name}'; score the model first")
    return names


def _eligible(groups: Groups, chosen: Selection) -> list[PruneGroup]:
    layers = sorted({g.layer for g in groups.values() if g.layer is not None})
    guarded = {*layers[: chosen.protect_first], *layers[len(layers) - chosen.protect_last :]}
    for pattern in chosen.protect:
        if not any(fnmatch.fnmatch(n, pattern) for n in (*groups, *groups.blocks)):
            raise UsageError(f"protect='{pattern}' matches no group and no block; {nearest(pattern, groups)}")
    return [
        g
        for g in groups.values()
        if g.prunable
        and chosen.pace.get(g.kind, 0) > 0
        and g.layer not in guarded
        and not any(fnmatch.fnmatch(g.name, p) for p in chosen.protect)
    ]


def _lanes(groups: Groups, chosen: Selection) -> list[_Lane]:
    eligible = _eligible(groups, chosen)
    missing = [k for k in chosen.pace if chosen.pace[k] > 0 and k != LAYERS and not any(g.kind == k for g in groups.values() if g.prunable)]
    if missing and len(missing) == len([k for k in chosen.pace if chosen.pace[k] > 0]):
        have = sorted({g.kind for g in groups.values() if g.prunable})
        raise UsageError(f"this model has no prunable group of kind {', '.join(missing)}; it has {', '.join(have) or 'none'}")
    lanes: dict[tuple[str, int], _Lane] = {}
    for group in eligible:
        key = (group.family if chosen.widths == "uniform" else group.name, group.size)
        if key not in lanes:
            lanes[key] = _Lane(group.kind, [], group.size, _stops(group, chosen))
        lanes[key].names.append(group.name)
    if chosen.widths == "uniform":
        for (family, size), lane in lanes.items():
            whole = [g.name for g in groups.values() if g.family == family and g.size == size]
            if len(lane.names) < len(whole):
                raise UsageError(
                    f"widths='uniform' needs the same width in every layer, but some layers of {family} are protected: "
                    "use widths='per-layer', or protect nothing"
                )
    blocks = _open_blocks(groups, chosen)
    if chosen.pace.get(LAYERS, 0) > 0:
        if not blocks:
            raise UsageError("this model has no residual block that can be dropped whole")
        least = max(1, math.ceil(chosen.floor * len(groups.blocks)))
        room = min(len(blocks), len(groups.blocks) - least)
        lanes["", 0] = _Lane(LAYERS, blocks, len(groups.blocks), list(range(len(groups.blocks) - 1, len(groups.blocks) - room - 1, -1)))
    return list(lanes.values())


def _stops(group: PruneGroup, chosen: Selection) -> list[int]:
    """Counts of kept units that a group may stop at, falling."""
    least = max(1, math.ceil(chosen.floor * group.size))
    multiple = chosen.multiple_of(group.kind)
    return [n for n in range(group.size - 1, least - 1, -1) if n % multiple == 0]


def _open_blocks(groups: Groups, chosen: Selection) -> list[str]:
    numbers = sorted({layer_of(p) or 0 for p in groups.blocks})
    guarded = {*numbers[: chosen.protect_first], *numbers[len(numbers) - chosen.protect_last :]}
    return [
        p for p in groups.blocks if (layer_of(p) or 0) not in guarded and not any(fnmatch.fnmatch(p, pattern) for pattern in chosen.protect)
    ]


def _ranked_blocks(groups: Groups, chosen: Selection, block_scores: Mapping[str, float] | None) -> list[str]:
    """Blocks in the order in which they go: least important first, or from the end."""
    blocks = _open_blocks(groups, chosen)
    return blocks[::-1] if block_scores is None else sorted(blocks, key=lambda p: block_scores[p])


def _steps(
    groups: Groups, lanes: Sequence[_Lane], chosen: Selection, scores: Mapping[str, Tensor], block_scores: Mapping[str, float] | None
) -> list[_Step]:
    steps = []
    for number, lane in enumerate(lanes):
        pace = chosen.pace[lane.kind]
        if chosen.ranking == "local":
            steps += [_Step((lane.size - stop) / lane.size / pace, number, i) for i, stop in enumerate(lane.stops)]
            continue
        if lane.kind == LAYERS:
            raise UsageError("global ranking compares units by importance per parameter; whole layers have none: use ranking='local'")
        order = torch.stack([torch.sort(scores[n].double()).values for n in lane.names]).sum(0).cumsum(0)
        cost = sum(groups[n].parameters_per_unit for n in lane.names)
        densities = [float(order[lane.size - stop - 1]) / ((lane.size - stop) * cost) / pace for stop in lane.stops]
        running = torch.tensor(densities, dtype=torch.float64).cummax(0).values if densities else torch.empty(0)
        steps += [_Step(float(d), number, i) for i, d in enumerate(running)]
    return steps


def _fill(groups: Groups, lanes: Sequence[_Lane], steps: Sequence[_Step], ratio: float, blocks: Sequence[str]) -> list[int | None]:
    """Take steps in order while the target is not exceeded; a lane that would overshoot stops. Returns each lane's stop."""
    target = (1 - ratio) * groups.total
    frozen: set[int] = set()
    best: tuple[float, list[int | None]] = (math.inf, [None] * len(lanes))

    def state(prefix: Sequence[_Step], base: Sequence[int | None]) -> list[int | None]:
        stops = list(base)
        for step in prefix:
            stops[step.lane] = lanes[step.lane].stops[step.stop]
        return stops

    def left(stops: Sequence[int | None]) -> int:
        counts = {n: s for lane, s in zip(lanes, stops, strict=True) if s is not None and lane.kind != LAYERS for n in lane.names}
        gone = next((lane.size - s for lane, s in zip(lanes, stops, strict=True) if lane.kind == LAYERS and s is not None), 0)
        return groups.remaining(counts, blocks[:gone])

    base: list[int | None] = [None] * len(lanes)
    todo = list(steps)
    while True:
        low, high = 0, len(todo)  # the longest prefix that does not exceed the target
        while low < high:
            middle = (low + high + 1) // 2
            if left(state(todo[:middle], base)) >= target:
                low = middle
            else:
                high = middle - 1
        base = state(todo[:low], base)
        gap = left(base) - target
        best = min(best, (abs(gap), base), key=lambda b: b[0])
        if low == len(todo):
            break
        over = state(todo[: low + 1][low:], base)
        best = min(best, (abs(left(over) - target), over), key=lambda b: b[0])
        if gap <= 5e-4 * groups.total:
            break
        frozen.add(todo[low].lane)
        todo = [s for s in todo[low:] if s.lane not in frozen]
    reached = 1 - left(best[1]) / groups.total
    if left(state(steps, [None] * len(lanes))) - target > 1e-3 * groups.total:  # not even with every step
        raise PlanError(
            f"a ratio of {ratio:.1%} cannot be reached: with these kinds, protections, floor and multiple at most {reached:.1%} "
            "of the parameters can go"
        )
    return best[1]


def _stop_at(lane: _Lane, share: float) -> int | None:
    """The stop nearest to a share of removed units."""
    wanted = lane.size * (1 - share)
    options = [lane.size, *lane.stops]
    stop = min(options, key=lambda s: (abs(s - wanted), -s))
    return None if stop == lane.size else stop


def _materialise(
    groups: Groups, lanes: Sequence[_Lane], stops: Sequence[int | None], ranked: Mapping[str, Tensor], blocks: Sequence[str]
) -> tuple[dict[str, Tensor], list[str]]:
    keep: dict[str, Tensor] = {}
    drop: list[str] = []
    for lane, stop in zip(lanes, stops, strict=True):
        if stop is None:
            continue
        if lane.kind == LAYERS:
            drop = list(blocks[: lane.size - stop])
            continue
        for name in lane.names:
            keep[name] = ranked[name][groups[name].size - stop :].sort().values
    gone = tuple(drop)
    inside = tuple(f"{p}." for p in gone)
    keep = {n: u for n, u in keep.items() if not n.startswith(inside)} if inside else keep
    return keep, [p for p in groups.blocks if p in gone]
