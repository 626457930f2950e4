"""Taking units away in the running model: their parameter slices are set to zero, and put back afterwards.

For units that nothing but linear maps and element-wise operators look at, that is what removal computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import networkx as nx
import torch
from torch import Tensor

from ..groups import Groups, PruneGroup


def measurable(groups: Groups) -> list[PruneGroup]:
    """The prunable groups whose units can be taken away by zeros."""
    return [g for g in groups.values() if not unfit(g)]


def unfit(group: PruneGroup) -> str:
    """Why zeros cannot stand for the removal of a group's units; empty if they can."""
    if not group.prunable:
        return f"it cannot be pruned ({group.reason})"
    if group.normalised:
        return "a norm, a softmax or a router looks at all of its units"
    return ""


@contextmanager
def without(groups: Groups, group: PruneGroup, units: Tensor) -> Iterator[None]:
    """The model with the parameter slices of some units set to zero; afterwards it is as it was, bit for bit."""
    saved: list[tuple[Tensor, int, Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for member in (m for m in group.members if m.trainable):
                parameter = cast(Tensor, groups.parameters[member.name].tensor)
                index = member.indices(units).to(parameter.device)
                saved.append((parameter, member.dim, index, parameter.index_select(member.dim, index)))
                parameter.index_fill_(member.dim, index, 0)
        yield
    finally:
        with torch.no_grad():
            for parameter, dim, index, values in reversed(saved):
                parameter.index_copy_(dim, index, values)


def linked(groups: Groups, names: Sequence[str]) -> list[list[str]]:
    """Groups in sets that have no parameter in common: zeros in one are put back without touching those of another."""
    graph = nx.Graph()
    graph.add_nodes_from(names)
    graph.add_edges_from((name, ("parameter", m.name)) for name in names for m in groups[name].members if m.trainable)
    return [[n for n in names if n in part] for part in nx.connected_components(graph)]
