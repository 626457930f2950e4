"""What the units of a prune group are made of: base weights that shrink, and factors of adapters that follow them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from ..groups import Groups, Member, PruneGroup
from ..passes.masking import unfit
from .adapters import Adapter, factors_of


@dataclass(frozen=True, eq=False)
class Part:
    """One parameter dimension that a group's units own positions of.

    Attributes:
        member: The dimension.
        tensor: The parameter.
        adapters: Of the parameter; their update stands in for its gradient.
        trained: True if the wrapped optimizer trains the parameter itself.
    """

    member: Member
    tensor: nn.Parameter
    adapters: tuple[Adapter, ...]
    trained: bool

    @cached_property
    def incidence(self) -> tuple[Tensor, Tensor]:
        """(units, positions), sorted by position."""
        return self.member.incidence

    @property
    def guided(self) -> bool:
        """True if there is a gradient for it, or an update that stands in for one."""
        return self.trained or bool(self.adapters)

    @property
    def key(self) -> str:
        """Names the part within its group."""
        return f"{self.member.name}:{self.member.dim}"


@dataclass(frozen=True, eq=False)
class Structure:
    """A group whose units may be brought to zero.

    Attributes:
        group: The prune group.
        parts: Base weights: a unit's slices of them are the vector ``x`` that the method looks at.
        followers: Factors of adapters (and their biases): they shrink by the same factor.
    """

    group: PruneGroup
    parts: tuple[Part, ...]
    followers: tuple[Part, ...]

    @property
    def elements(self) -> Tensor:
        """How many base-weight elements each unit owns: a float64 tensor ``[size]``."""
        total = torch.zeros(self.group.size, dtype=torch.float64)
        for part in self.parts:
            units, _ = part.incidence
            per_position = part.tensor.numel() // max(part.member.shape[part.member.dim], 1)
            total += torch.bincount(units, minlength=self.group.size) * per_position
        return total


def find_structures(
    groups: Groups, adapters: Mapping[str, tuple[Adapter, ...]], trained: Collection[str]
) -> tuple[dict[str, Structure], dict[str, str]]:
    """The groups that LHSPG may work on, and why the others are left alone.

    Args:
        groups: Of the model with its adapters.
        adapters: As `find_adapters` returns them.
        trained: Names of the parameters that the wrapped optimizer trains.

    Returns:
        (structures by group name, reasons by group name). Axes of adapters alone (ranks) are in neither.
    """
    factors = factors_of(adapters)
    found: dict[str, Structure] = {}
    reasons: dict[str, str] = {}
    for group in groups.values():
        members = [m for m in group.members if m.trainable]
        if all(m.name in factors for m in members):
            continue
        parts = []
        for member in members:
            tensor = cast(nn.Parameter, groups.parameters[member.name].tensor)
            own = adapters.get(member.name, ())
            parts.append(Part(member, tensor, own, member.name in trained))
        structure = Structure(
            group,
            tuple(p for p in parts if p.member.name not in factors),
            tuple(p for p in parts if p.member.name in factors),
        )
        reason = unfit(group) or _obstacle(structure)
        if reason:
            reasons[group.name] = reason
        else:
            found[group.name] = structure
    return found, reasons


def without_adapters(
    groups: Groups, structures: Mapping[str, Structure], reasons: Mapping[str, str], factors: Collection[str]
) -> Groups:
    """The groups as a selection shall see them: adapters do not count as parameters, and only structures are prunable.

    A group's ``parameters_per_unit`` is that of the base weights alone.
    """
    made = []
    for group in groups.values():
        members = tuple(m for m in group.members if m.name not in factors)
        if group.name in structures:
            alone = float(structures[group.name].elements.mean())
            made.append(dataclasses.replace(group, members=members, parameters_per_unit=alone))
        elif any(m.trainable for m in members):
            made.append(dataclasses.replace(group, members=members, prunable=False, reason=reasons[group.name]))
    bare = Groups(groups.inference, made, groups.blocks, groups.aliases)
    bare.parameters = {name: value for name, value in groups.parameters.items() if name not in factors}
    return bare


def _obstacle(structure: Structure) -> str:
    """Why the units of a group that zeros can remove cannot be shrunk one by one; empty if they can."""
    seen: set[str] = set()
    for part in structure.parts:
        if part.member.name in seen:
            return f"its units own elements of '{part.member.name}' along two dimensions"
        seen.add(part.member.name)
        _, positions = part.incidence
        if len(torch.unique(positions)) != len(positions):
            return f"two of its units own one position of '{part.member.name}'"
    if not any(part.guided for part in structure.parts):
        return "none of its weights is trained or has an adapter"
    return ""
