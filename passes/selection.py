"""The selection pass: scores and a target become a plan.

Units are removed step by step. A *lane* is what must shrink together: one group, or with ``widths="uniform"`` all groups of a
family (the same role in every layer), each losing its own least important units. Every step of every lane has a priority:

- ``local`` ranking: the share of the lane that is gone after it, so all lanes shrink alike;
- ``global`` ranking: the importance that the step removes per parameter it removes, so unimportant units go first;
- ``standardised`` ranking: the score of the step's unit in standard deviations from its group's mean (FLAP, arXiv 2312.11983);
- ``measured`` ranking: by how much the loss rose per removed parameter when the group was cut (`fxprune.passes.sensitivity`).

Steps are taken in order of priority until the target is met; a lane whose next step would overshoot stops, and the others go on.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from ..errors import PlanError, UsageError, check_whole, is_number, nearest
from ..groups import KINDS, LAYERS, Groups, PruneGroup, layer_of
from ..names import BLOCK_SCORES
from ..plan import PrunePlan
from ..wording import listed
from .base import Pass
from .blocks import guarded_layers, inside, least_left, open_blocks, ranked_blocks, room_of
from .budget import Lane, Meter, Whole, fill, stop_at
from .dependency import PLAN, groups_of
from .importance import SCORES
from .knowledge import KNOWLEDGE, protecting
from .sensitivity import CURVES, Curve, Curves

DEFAULT_KINDS = ("kv_heads", "query_groups", "ffn")
RANKINGS = ("local", "global", "standardised", "measured")
WIDTHS = ("uniform", "per-layer")
NO_LAYERS = "{} ranking compares units by what goes with them; whole layers have no such score: use ranking='local'"


@dataclass(frozen=True)
class Selection:
    """What to remove, and under which constraints.

    Attributes:
        ratio: Share of all of the model's parameters to remove, in (0, 1). Exactly one of ``ratio`` and ``units`` is given.
        units: Share of the units of every eligible group to remove (LLM-Pruner's pruning ratio), or a mapping from kind to share;
            the mapping's kinds are then the eligible ones.
        kinds: Kinds that may be pruned, from `fxprune.groups.KINDS` and ``"layers"`` (whole residual blocks); a mapping gives
            each a pace: with 0.5 a kind loses units half as fast as one with 1.
        ranking: ``local``, ``global``, ``standardised`` or ``measured``.
        widths: ``uniform`` (the same in every layer, loads everywhere) or ``per-layer``.
        protect_first: Layers at the start that stay whole. With ``uniform`` widths, widths in protected layers would differ: an
            error, unless only ``layers`` are dropped. So is a kind whose groups reach through all layers (``hidden``).
        protect_last: Layers at the end that stay whole.
        protect: Names or patterns (``model.layers.3.*``) of groups that stay whole, or of blocks with all their groups.
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
        for name in ("kinds", "protect"):  # one name is a list of one
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        for name, value in (("kinds", self.kinds), ("protect", self.protect)):
            if not isinstance(value, Sequence | Set | Mapping) or not all(isinstance(each, str) for each in value):
                raise UsageError(f"{name} must be names, got {value!r}")
        if isinstance(self.units, Mapping) and self.kinds == DEFAULT_KINDS:
            object.__setattr__(self, "kinds", tuple(self.units))
        if (self.ratio is None) == (self.units is None):
            raise UsageError("give either ratio= (share of all parameters) or units= (share of units), not both or neither")
        shares = self.units if isinstance(self.units, Mapping) else {"": self.ratio if self.units is None else self.units}
        for kind, share in shares.items():
            if not is_number(share) or not 0 < share < 1:
                what = "a ratio" if self.units is None else f"the share of units{kind and f' of kind {kind}'}"
                raise UsageError(f"{what} must lie between 0 and 1 (0.2 removes 20 %), got {share!r}")
        multiples = self.multiple if isinstance(self.multiple, Mapping) else {"": self.multiple}
        for kind in (k for k in [*self.pace, *shares, *multiples] if k):
            if kind not in (*KINDS, LAYERS):
                raise UsageError(f"unknown kind '{kind}'; {nearest(kind, (*KINDS, LAYERS))}")
        for kind in (k for k in shares if k and self.pace.get(k, 0) == 0):
            raise UsageError(f"units= gives a share for kind '{kind}', but kinds= leaves it out")
        if any(not is_number(pace) or not 0 <= pace < math.inf for pace in self.pace.values()):
            raise UsageError(f"a pace must be 0 or a positive number, got {self.pace}")
        if all(pace == 0 for pace in self.pace.values()):
            raise UsageError("no kind may be pruned: name at least one")
        for name, value, valid in (("ranking", self.ranking, RANKINGS), ("widths", self.widths, WIDTHS)):
            if value not in valid:
                raise UsageError(f"unknown {name} '{value}'; {nearest(str(value), valid)}")
        for name in ("protect_first", "protect_last"):
            check_whole(name, getattr(self, name), 0)
        if not is_number(self.floor) or not 0 <= self.floor < 1:
            raise UsageError(f"floor is a share of units from 0 up to (not including) 1, got {self.floor}")
        for kind, multiple in multiples.items():
            check_whole(f"multiple of {kind}" if isinstance(self.multiple, Mapping) else "multiple", multiple, 1)

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
        """Share of units to remove in ``units`` mode; of a slower kind, correspondingly less than of the fastest."""
        if isinstance(self.units, Mapping):
            return self.units.get(kind, 0.0)
        return (self.units or 0.0) * self.pace[kind] / max(self.pace.values())

    def limits(self) -> str:
        """What bounds the units that may go, as it would be typed: ``kinds=ffn, protect_first=4``."""
        said = [f"kinds={','.join(kind for kind, pace in self.pace.items() if pace > 0)}"]
        said += [f"{name}={value}" for name in ("protect_first", "protect_last", "floor") if (value := getattr(self, name))]
        if self.protect:
            said.append(f"protect={listed(self.protect, 2, ',')}")
        if self.multiple != 1:
            several = self.multiple.items() if isinstance(self.multiple, Mapping) else ()
            said.append(f"multiple={','.join(f'{kind}={n}' for kind, n in several) or self.multiple}")
        return ", ".join(said)

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
    """Choose units by the scores that an `ImportancePass` left (and the curves that a `SensitivityPass` left).

    The plan goes to ``gm.meta["fxprune.plan"]``. With ``protect_share``, that share of what a `KnowledgePass` found to matter most
    stays whole.
    """

    def __init__(
        self,
        selection: Selection | None = None,
        *,
        block_scores: Mapping[str, float] | None = None,
        protect_share: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.selection = _given(selection, options)
        self.block_scores, self.protect_share = block_scores, protect_share

    def call(self, graph_module: GraphModule) -> PassResult:
        """Select and annotate; the graph is not modified."""
        if SCORES not in graph_module.meta:
            raise UsageError("no scores on the graph: run an ImportancePass before the SelectionPass")
        groups, chosen = groups_of(graph_module), self.selection
        if self.protect_share is not None:
            if KNOWLEDGE not in graph_module.meta:
                raise UsageError("no knowledge on the graph: run a KnowledgePass before the SelectionPass")
            graph_module.meta[KNOWLEDGE].check(groups)
            chosen = protecting(chosen, graph_module.meta[KNOWLEDGE], self.protect_share)
        graph_module.meta[PLAN] = select(
            groups,
            graph_module.meta[SCORES],
            chosen,
            block_scores=self.block_scores,
            curves=graph_module.meta.get(CURVES),
        )
        return PassResult(graph_module, False)


def _given(selection: Selection | None, options: Mapping[str, Any]) -> Selection:
    fields = [f.name for f in dataclasses.fields(Selection)]
    for name in options:
        if selection is not None:
            raise UsageError(f"give either selection= or its fields as keywords, not both ('{name}')")
        if name not in fields:
            raise UsageError(f"unknown option '{name}'; {nearest(name, fields)}")
    return selection or Selection(**options)


def select(
    groups: Groups,
    scores: Mapping[str, Tensor],
    selection: Selection | None = None,
    *,
    block_scores: Mapping[str, float] | None = None,
    curves: Curves | None = None,
    recipe: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    **options: Any,
) -> PrunePlan:
    """Choose the units to keep.

    Args:
        groups: The model's prune groups.
        scores: Importance of each unit, as `fxprune.score` returns it.
        selection: The target and constraints; or give its fields as keywords (``ratio=0.2``).
        block_scores: Importance of each residual block, for kind ``layers``; without it the first blocks are kept (LLM-Pruner's
            layer-wise baseline).
        curves: For ``measured`` ranking: what `fxprune.measure_curves` returned, of every group or of lanes (`lanes_of`).
        recipe: More settings to record in the plan.
        notes: What else to say in ``plan.recipe["note"]``.
        **options: Fields of `Selection`.

    Returns:
        The plan. ``plan.recipe["removed"]`` is the share of parameters that it removes, ``plan.recipe["note"]`` says so where the
        target could not be met within 0.1 percentage points, and ``plan.recipe["block_scores"]`` what blocks went by.

    Raises:
        UsageError: Unknown kinds, impossible ratios or protections that match nothing.
        PlanError: The target is out of reach under the constraints; says how far it goes.
    """
    chosen, notes = _given(selection, options), list(notes)
    lanes = _lanes(groups, chosen)
    notes += absent_kinds(groups, chosen)
    if chosen.ranking == "measured" and chosen.units is None:
        lanes = _with_curves(lanes, curves, notes)
    _check_scores(groups, lanes, scores)
    ranked = {n: torch.argsort(scores[n], stable=True) for lane in lanes if lane.kind != LAYERS for n in lane.names}
    blocks = ranked_blocks(groups, chosen, block_scores)
    if chosen.units is not None:
        stops = [stop_at(lane, chosen.share_of(lane.kind)) for lane in lanes]
    else:
        steps = _steps(groups, lanes, chosen, scores, curves)
        stops = fill(Meter(groups, lanes, blocks), steps, float(chosen.ratio or 0), chosen.limits())
    keep, drop = _materialise(groups, lanes, stops, ranked, blocks)
    removed = 1 - groups.remaining({n: len(u) for n, u in keep.items()}, drop) / groups.total
    facts: dict[str, Any] = {**chosen.to_json(), **(recipe or {}), "removed": round(removed, 6)}
    if block_scores is not None and chosen.pace.get(LAYERS, 0) > 0:
        facts[BLOCK_SCORES] = {path: float(f"{value:.4g}") for path, value in block_scores.items()}
    if chosen.ratio is not None and abs(removed - chosen.ratio) > 1e-3:
        notes.append(f"asked for {chosen.ratio:.2%} of the parameters: the nearest that the units allow is {removed:.2%}")
    if notes:
        facts["note"] = "; ".join(notes)
    if not keep and not drop:
        raise PlanError(
            "nothing would be removed: the share is smaller than the smallest unit, or every group is protected (with "
            f"{chosen.limits()})"
        )
    return PrunePlan.from_keep(groups, keep, drop=drop, recipe=facts, scores=dict(scores))


def _with_curves(lanes: Sequence[Lane], curves: Curves | None, notes: list[str]) -> list[Lane]:
    """The lanes whose loss was measured; the others stay whole, and a note says so."""
    if any(lane.kind == LAYERS for lane in lanes):
        raise UsageError(NO_LAYERS.format("measured"))
    if curves is None:
        raise UsageError("ranking='measured' needs loss curves: pass curves=fxprune.measure_curves(...)")
    left = [lane for lane in lanes if lane.label not in curves and not all(name in curves for name in lane.names)]
    if left:
        names = [name for lane in left for name in lane.names if name not in curves]
        notes.append(f"the loss of {len(names)} groups, such as {names[0]}, was not measured: they stay whole")
    found = [lane for lane in lanes if lane not in left]
    if not found:
        raise UsageError(f"ranking='measured', but no loss curve belongs to a group that may be pruned; {notes[-1]}")
    return found


def absent_kinds(groups: Groups, chosen: Selection) -> list[str]:
    """A note on each kind that was asked for and of which nothing may go; not on those that recipes name for any model."""
    have = {LAYERS, *DEFAULT_KINDS, *(g.kind for g in groups.values() if g.prunable)}
    absent = [kind for kind, pace in chosen.pace.items() if pace > 0 and kind not in have]
    return [f"this model has nothing of kind '{kind}' that can be pruned{_pinned(groups, [kind])}" for kind in absent]


def _pinned(groups: Groups, kinds: Collection[str]) -> str:
    """Why the first group of these kinds cannot be pruned, to be put behind a sentence; empty if there is none."""
    found = next((g for g in groups.values() if g.kind in kinds and not g.prunable), None)
    return "" if found is None else f" ('{found.name}': {found.reason})"


def _check_scores(groups: Groups, lanes: Sequence[Lane], scores: Mapping[str, Tensor]) -> None:
    for name in (n for lane in lanes if lane.kind != LAYERS for n in lane.names):
        if name not in scores:
            raise UsageError(f"there are no scores for group '{name}'; score the model first")
        if scores[name].shape != (groups[name].size,):
            raise UsageError(f"group '{name}' has {groups[name].size} units, but its scores have shape {tuple(scores[name].shape)}")
        if not bool(torch.isfinite(scores[name]).all()):
            raise UsageError(f"the scores of group '{name}' are not finite")


def _eligible(groups: Groups, chosen: Selection) -> list[PruneGroup]:
    guarded = guarded_layers({g.layer for g in groups.values() if g.layer is not None}, chosen)
    for pattern in chosen.protect:
        if not fnmatch.filter((*groups, *groups.blocks), pattern):
            raise UsageError(f"protect='{pattern}' matches no group and no block; {nearest(pattern, (*groups, *groups.blocks))}")
    whole = [b for pattern in chosen.protect for b in fnmatch.filter(groups.blocks, pattern)]
    protected = {n for pattern in chosen.protect for n in fnmatch.filter(groups, pattern)}
    protected |= {n for n in groups for b in whole if inside(n, b)}
    found = [
        g
        for g in groups.values()
        if g.prunable and chosen.pace.get(g.kind, 0) > 0 and g.layer not in guarded and g.name not in protected
    ]
    for group in (g for g in found if g.layer is None):
        if guarded & {layer_of(m.name) for m in group.members}:
            raise UsageError(
                f"'{group.name}' reaches through all layers, so protect_first and protect_last cannot keep some of them whole: "
                f"leave kind '{group.kind}' out, or protect nothing"
            )
    return found


def lanes_of(groups: Groups, selection: Selection) -> dict[str, list[str]]:
    """The eligible groups by what must lose units together: each on its own, or with uniform widths every layer's of one family.

    Args:
        groups: The model's prune groups.
        selection: Kinds, widths and protections.

    Returns:
        For each lane's name (the group's, or the family's) the names of its groups, as `fxprune.measure_curves` takes them.

    Raises:
        UsageError: As from `select`.
    """
    return {lane.label: list(lane.names) for lane in _lanes(groups, selection) if lane.kind != LAYERS}


def _lanes(groups: Groups, chosen: Selection) -> list[Lane]:
    eligible = _eligible(groups, chosen)
    wanted = [k for k, pace in chosen.pace.items() if pace > 0]
    have = {g.kind for g in groups.values() if g.prunable}
    if LAYERS not in wanted and not have.intersection(wanted):
        there = sorted(have | ({LAYERS} if groups.blocks else set()))
        missing = f"{', '.join(wanted)}{_pinned(groups, wanted)}"
        raise UsageError(f"this model has no prunable group of kind {missing}; it has {', '.join(there) or 'none'}")
    lanes: dict[tuple[str, int], Lane] = {}
    for group in eligible:
        key = (group.family if chosen.widths == "uniform" else group.name, group.size)
        if key not in lanes:
            taken = key[0] in (other for other, _ in lanes)  # a family of groups of several sizes
            label = f"{key[0]} ({group.size} units)" if taken else key[0]
            lanes[key] = Lane(label, group.kind, [], group.size, _stops(group, chosen))
        lanes[key].names.append(group.name)
    if chosen.widths == "uniform":
        _check_uniform(groups, eligible)
    if LAYERS in wanted:
        if not groups.blocks:
            raise UsageError("this model has no residual block that can be dropped whole")
        blocks, n = open_blocks(groups, chosen), len(groups.blocks)
        room = sum(room_of(groups, blocks, chosen).values())
        lanes["", 0] = Lane(LAYERS, LAYERS, blocks, n, range(n - 1, n - room - 1, -1))
    return list(lanes.values())


def _check_uniform(groups: Groups, eligible: Sequence[PruneGroup]) -> None:
    """No group of a family that shrinks may have to stay as it is."""
    shrinking, names = {(g.family, g.size) for g in eligible}, {g.name for g in eligible}
    for group in groups.values():
        if (group.family, group.size) not in shrinking or group.name in names:
            continue
        if not group.prunable:
            raise UsageError(
                f"widths='uniform' needs the same width in every layer, but '{group.name}' cannot be pruned ({group.reason}): "
                "use widths='per-layer', or leave the kind out"
            )
        raise UsageError(
            f"widths='uniform' needs the same width in every layer, but some layers of {group.family} are protected: "
            "use widths='per-layer', or protect nothing"
        )


def _stops(group: PruneGroup, chosen: Selection) -> range:
    """Counts of kept units that a group may stop at, falling."""
    multiple = math.lcm(chosen.multiple_of(group.kind), group.multiple)
    least = max(least_left(group.size, chosen.floor), group.least)
    return range((group.size - 1) // multiple * multiple, least - 1, -multiple)


def _steps(groups: Groups, lanes: Sequence[Lane], chosen: Selection, scores: Mapping[str, Tensor], curves: Curves | None) -> Whole:
    """Each step's lane, in order of priority; the steps of one lane are in order, one for each of its stops."""
    priorities: list[npt.NDArray[np.float64]] = [np.empty(0)]
    for lane in lanes:
        gone, pace = lane.size - np.array(lane.stops, dtype=np.int64), chosen.pace[lane.kind]
        if chosen.ranking == "local":
            priorities.append(gone / lane.size / pace)
            continue
        if lane.kind == LAYERS:
            raise UsageError(NO_LAYERS.format(chosen.ranking))
        if chosen.ranking == "standardised":
            density = _standardised(lane, scores)[gone - 1]
        else:
            cost = sum(groups[n].parameters_per_unit for n in lane.names)
            if chosen.ranking == "global":
                removed = _importance(lane, scores, gone)
            else:
                removed = np.diff(_measured(lane, curves or {})[gone], prepend=0.0)
            density = removed / (np.diff(gone, prepend=0) * cost)
            if chosen.ranking == "measured":  # units before a curve's first point are gone already: they go first
                density[gone <= min(points[0][0] for points in _curves_of(lane, curves or {}))] = -np.inf
        density = np.where(density < 0, density * pace, density / pace)
        priorities.append(np.maximum.accumulate(density) if len(density) else density)
    numbers = np.repeat(np.arange(len(lanes)), [len(lane.stops) for lane in lanes])
    within = np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(len(lane.stops)) for lane in lanes)])
    order: Whole = numbers[np.lexsort((numbers, within, np.concatenate(priorities)))]
    return order


def _rising(lane: Lane, scores: Mapping[str, Tensor]) -> list[Tensor]:
    return [scores[n].double().cpu().sort().values for n in lane.names]


def _importance(lane: Lane, scores: Mapping[str, Tensor], gone: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The importance that goes with each step; not the difference of two long sums, in which small scores would be lost."""
    each: npt.NDArray[np.float64] = torch.stack(_rising(lane, scores)).sum(0).numpy()
    found: npt.NDArray[np.float64] = np.add.reduceat(each[: gone.max(initial=0)], np.append(0, gone)[:-1])
    return found


def _standardised(lane: Lane, scores: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
    """The score of each next unit in standard deviations from its group's mean; the mean over the lane's groups."""
    steps = [(s - s.mean()) / s.std().clamp_min(1e-30) if len(s) > 1 else s - s for s in _rising(lane, scores)]
    found: npt.NDArray[np.float64] = torch.stack(steps).mean(0).numpy()
    return found


def _measured(lane: Lane, curves: Curves) -> npt.NDArray[np.float64]:
    """The loss that the first 0, 1, 2, ... units of the lane's groups cost: the lower convex hull of what was measured."""
    total = np.zeros(lane.size + 1)
    for points in map(_hull, _curves_of(lane, curves)):
        total += np.interp(np.arange(lane.size + 1), [n for n, _ in points], [change for _, change in points])
    total -= total[0]  # a curve may count from another point than the whole group
    return total


def _curves_of(lane: Lane, curves: Curves) -> list[Curve]:
    """The lane's own curve, or those of its groups."""
    return [curves[name] for name in ([lane.label] if lane.label in curves else lane.names)]


def _hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull of a curve: noise may not make the second half of a group look cheaper than the first."""
    hull: list[tuple[int, float]] = []
    for x, y in sorted(points):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-1][0]) >= (y - hull[-1][1]) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((x, y))
    return hull


def _materialise(
    groups: Groups, lanes: Sequence[Lane], stops: Sequence[int | None], ranked: Mapping[str, Tensor], blocks: Sequence[str]
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
