"""Which of a plan's groups a graph holds whole: those are pruned in it, the others run dense in it.

A group of the graph is the plan's when it cuts the same dimensions of the same parameters into as many units; where fixed sizes
let a graph compute a shared constant apart for every layer, several of its groups are one of the plan's. Where a unit's
coupling leaves the graph (a graph break, a KV cache that is handed in or out), inference has pinned it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import PlanError
from ..groups import Groups, PruneGroup
from ..plan import PrunePlan
from .owner import Owner

_Members = frozenset[tuple[str, int]]

_SAID = {
    "a model input": "its units enter the graph from outside (a graph break, or a KV cache)",
    "a model output": "its units leave the graph (a graph break, or a KV cache: use_cache=False keeps it inside)",
}


_NOT_WHOLE = (
    "the block is not whole in this graph, or what it computes leaves the graph in other ways too (a KV cache: use_cache=False "
    "keeps it inside)"
)


@dataclass
class Matched:
    """What a graph can do of a plan.

    Attributes:
        keep: Units that stay, by the plan's name of the group.
        local: The graph's own groups that make up each of those.
        drop: Blocks to leave out.
        dense: Groups and blocks that the graph reads but cannot prune, with the reason.
    """

    keep: dict[str, Tensor] = field(default_factory=dict)
    local: dict[str, list[str]] = field(default_factory=dict)
    drop: list[str] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)

    def forget(self, name: str, reason: str) -> None:
        """Run a group or block dense after all."""
        self.keep.pop(name, None)
        self.drop = [path for path in self.drop if path != name]
        self.dense[name] = reason


def touched(plan: PrunePlan, owner: Owner, names: set[str]) -> list[str]:
    """Groups and blocks of the plan that have one of the named parameters.

    Raises:
        PlanError: A block that the plan drops has no parameters.
    """
    groups = [g for g, members in plan.members.items() if any(n in names and n in owner.parameters for n, _ in members)]
    return groups + [path for path in plan.drop if not names.isdisjoint(_inside(owner, path))]


def _inside(owner: Owner, path: str) -> set[str]:
    """First names of a block's parameters: a module that stands in several places has those of the first."""
    names = {owner.names[id(p)] for p in owner.module.get_submodule(path).parameters()}
    if not names:
        raise PlanError(f"the plan drops '{path}', which has no parameters: compiled graphs do not tell where it is")
    return names


def match(plan: PrunePlan, owner: Owner, groups: Groups) -> Matched:
    """Find the plan's groups and blocks in a graph.

    Raises:
        PlanError: The plan was made for another form of a group.
    """
    found = Matched()
    wanted = {name: _trainable(plan.members[name], owner) for name in plan.keep}
    by_members: dict[_Members, list[PruneGroup]] = {}
    for group in groups.values():
        by_members.setdefault(frozenset((m.name, m.dim) for m in group.members if m.trainable), []).append(group)
    for name in touched(plan, owner, set(groups.parameters)):
        if name not in wanted:
            if name in groups.blocks:
                found.drop.append(name)
            else:
                found.dense[name] = _NOT_WHOLE
            continue
        alike = by_members.get(wanted[name], [])
        chosen = _choose(name, alike, plan, wanted) or ([] if alike else _parts(wanted[name], plan.sizes[name], by_members))
        pinned = next((g for g in chosen if not g.prunable), None)
        if not chosen or pinned:
            found.dense[name] = _said(pinned) if pinned else _why_not(wanted[name], alike, groups)
        else:
            found.keep[name], found.local[name] = plan.keep[name], [g.name for g in chosen]
    return found


def _trainable(members: list[list[object]], owner: Owner) -> _Members:
    return frozenset((str(n), int(str(dim))) for n, dim in members if n in owner.parameters)


def _choose(name: str, alike: list[PruneGroup], plan: PrunePlan, wanted: Mapping[str, _Members]) -> list[PruneGroup]:
    """The graph's group with the same members and size; the name decides where several have them."""
    sized = [g for g in alike if g.size == plan.sizes[name]]
    if alike and not sized:
        have = ", ".join(str(g.size) for g in alike)
        raise PlanError(
            f"the plan was made for another form of group '{name}': it had {plan.sizes[name]} units there, and here it has {have}"
        )
    twins = [n for n in wanted if wanted[n] == wanted[name] and plan.sizes[n] == plan.sizes[name]]
    if len(sized) == 1 and len(twins) == 1:
        return sized
    return [g for g in sized if g.name == name][:1]


def _parts(members: _Members, size: int, by_members: Mapping[_Members, list[PruneGroup]]) -> list[PruneGroup]:
    """Groups of that size which together cut the same dimensions, none of them twice; empty if there are none."""
    inside = {m: [g for g in groups if g.size == size] for m, groups in by_members.items() if m and m < members}
    parts = [(m, groups[0]) for m, groups in inside.items() if len(groups) == 1]
    whole = sorted(pair for m, _ in parts for pair in m)
    return [g for _, g in parts] if whole == sorted(members) else []


def _why_not(members: _Members, alike: list[PruneGroup], groups: Groups) -> str:
    if alike:
        return "the graph has several groups of its form, and cannot tell which it is"
    missing = len({n for n, _ in members} - set(groups.parameters))
    if missing:
        return f"the graph holds only a part of it ({missing} of its parameters are in another graph)"
    near = [g for g in groups.values() if any((m.name, m.dim) in members for m in g.members)]
    pinned = next((g for g in near if not g.prunable), None)
    return _said(pinned) if pinned else "its parameters are coupled in another way in this graph"


def _said(group: PruneGroup) -> str:
    """Why it is pinned; that it crosses the graph's border goes before other reasons."""
    reason = next((r for r in group.axis.pins if r in _SAID), group.reason)
    return _SAID.get(reason, reason)
