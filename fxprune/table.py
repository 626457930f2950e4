"""Prune groups as rows for people (a `rich` table) and for programs (plain dataclasses)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .groups import Groups, PruneGroup, layer_of
from .wording import counted


@dataclass(frozen=True)
class GroupRow:
    """One prune group, or several of one family that differ in nothing but their layer. `dataclasses.asdict` is JSON-able.

    Attributes:
        name: The group's name; of several, the family's, with ``*`` for the layer.
        kind: What the axis is: ``"ffn"``, ``"kv_heads"``, ...
        units: Units of each group.
        parameters_per_unit: Parameters that go with one unit.
        layers: Numbers of the layers that the parameters lie in, such as ``"0-29"`` or ``"0,2-5"``; empty outside numbered layers.
        prunable: Whether units may be removed.
        reason: Why not; of several groups, without the names of the nodes, which differ. Empty if prunable.
        normalised: True if a norm or softmax runs over the axis.
        groups: Names of the groups.
        parameters: Every parameter dimension that they cut, as ``name[dim]``.
    """

    name: str
    kind: str
    units: int
    parameters_per_unit: float
    layers: str
    prunable: bool
    reason: str
    normalised: bool
    groups: tuple[str, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class GroupSummary:
    """The whole model in one line, which is what ``str`` gives.

    Attributes:
        parameters: Parameters of the model, tied ones counted once.
        prunable_parameters: Those that lie in at least one prunable group, that is, that some unit takes with it.
        groups: Number of prune groups.
        prunable_groups: Those that may be pruned.
        blocks: Residual blocks that can be dropped whole.
    """

    parameters: int
    prunable_parameters: int
    groups: int
    prunable_groups: int
    blocks: int

    @property
    def share(self) -> float:
        """Share of the parameters that lie in at least one prunable group, from 0 to 1."""
        return self.prunable_parameters / self.parameters if self.parameters else 0.0

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters, {100 * self.share:.1f} % of them in prunable groups; "
            f"{self.prunable_groups} of {self.groups} groups prunable, {counted(self.blocks, 'residual block')}"
        )


def group_rows(groups: Groups, *, only_prunable: bool = False, collapse: bool = False) -> list[GroupRow]:
    """The groups as plain rows, in graph order.

    Args:
        groups: What `fxprune.find_groups` returned.
        only_prunable: Leave out what cannot be pruned.
        collapse: One row for all groups of a family that agree in kind, units, parameters per unit and, but for the names of
            nodes, in the reason that forbids pruning.
    """
    listed = [g for g in groups.values() if g.prunable or not only_prunable]
    if not collapse:
        return [_row([g]) for g in listed]
    families: dict[object, list[PruneGroup]] = {}
    for g in listed:
        alike = (g.family, g.kind, g.size, g.parameters_per_unit, g.normalised, g.prunable, _nameless(g.reason))
        families.setdefault(alike, []).append(g)
    return [_row(family) for family in families.values()]


def _row(family: Sequence[PruneGroup]) -> GroupRow:
    first, single = family[0], len(family) == 1
    members = [m for g in family for m in g.members if m.trainable]
    return GroupRow(
        name=first.name if single else first.family,
        kind=first.kind,
        units=first.size,
        parameters_per_unit=first.parameters_per_unit,
        layers=_ranges(n for n in (layer_of(m.name) for m in members) if n is not None),
        prunable=first.prunable,
        reason=first.reason if single else _nameless(first.reason),
        normalised=first.normalised,
        groups=tuple(g.name for g in family),
        parameters=tuple(f"{m.name}[{m.dim}]" for m in members),
    )


def _nameless(reason: str) -> str:
    """A reason without the fx node's name: ``at view_3 (aten.view)`` becomes ``at aten.view``."""
    return re.sub(r"\bat \w+ \(([^()]*)\)", r"at \1", reason)


def _ranges(numbers: Iterable[int]) -> str:
    """``0,2-5`` for 0, 2, 3, 4, 5."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def group_summary(groups: Groups) -> GroupSummary:
    """Count the model's parameters, and those that lie in at least one prunable group.

    Args:
        groups: What `fxprune.find_groups` returned.
    """
    free = [g for g in groups.values() if g.prunable]
    owned: dict[str, dict[int, Tensor]] = {}
    for member in (m for g in free for m in g.members if m.trainable):
        dims = owned.setdefault(member.name, {})
        mask = dims.setdefault(member.dim, torch.zeros(member.shape[member.dim], dtype=torch.bool))
        mask[member.incidence[1]] = True
    reached = 0
    for name, dims in owned.items():
        shape = groups.parameters[name].shape
        untouched = (n - int(dims[dim].sum()) if dim in dims else n for dim, n in enumerate(shape))
        reached += math.prod(shape) - math.prod(untouched)
    return GroupSummary(groups.total, reached, len(groups), len(free), len(groups.blocks))


def group_table(groups: Groups, *, only_prunable: bool = False, expand: bool = False) -> Table:
    """The groups as a table; print it with a `rich.console.Console`.

    Args:
        groups: What `fxprune.find_groups` returned.
        only_prunable: Leave out what cannot be pruned.
        expand: A row for every group, instead of one for all layers that are alike.

    Returns:
        A table whose caption is the summary.
    """
    table = Table(caption=str(group_summary(groups)), caption_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("group", overflow="fold")
    table.add_column("kind")
    table.add_column("units", justify="right")
    table.add_column("parameters\nper unit", justify="right")
    table.add_column("layers")
    table.add_column("prunable", overflow="fold")
    for row in group_rows(groups, only_prunable=only_prunable, collapse=not expand):
        cells = (row.name, row.kind, f"{row.units:,}", _number(row.parameters_per_unit), row.layers or "-", _verdict(row))
        table.add_row(*map(Text, cells), style=None if row.prunable else "dim")  # Text: a name is no markup
    return table


def wide_console() -> Console:
    """A console for standard output that does not squeeze tables into 80 columns where there is no terminal to fit."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _number(n: float) -> str:
    return f"{n:,.1f}".removesuffix(".0")


def _verdict(row: GroupRow) -> str:
    if row.prunable:
        return "yes, normalised" if row.normalised else "yes"
    return f"no: {row.reason}"
