"""The plan: which units of which groups stay, frozen, in JSON, and good for any copy of the model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import PlanError, nearest
from .files import read_json, write_whole
from .names import PLAN_FILE

if TYPE_CHECKING:
    from .groups import Groups

FORMAT = 1


@dataclass(frozen=True, eq=False)
class PrunePlan:
    """What to keep. Build it with `fxprune.select` or `PrunePlan.from_keep`.

    Attributes:
        keep: For each pruned group the units that stay, a sorted LongTensor; groups not listed stay whole.
        drop: Residual blocks that go whole, by module path.
        sizes: Units of each listed group before pruning.
        members: For each listed group the parameter dimensions it cuts, as ``[name, dim]``.
        fingerprint: Of the model that the plan was made for.
        recipe: The settings that made it, for people and for reproduction.
        scores: Importance of each unit, if it was kept along.
        curves: What was measured of each lane before anything went, if it was: ``[(units removed, change), ...]``, see
            `fxprune.measure_curves`.
    """

    keep: Mapping[str, Tensor]
    drop: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    members: Mapping[str, list[list[Any]]] = field(default_factory=dict)
    fingerprint: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)

    def __repr__(self) -> str:
        gone, units = sum(self.sizes[n] - len(k) for n, k in self.keep.items()), sum(self.sizes[n] for n in self.keep)
        return f"PrunePlan({gone:,} of {units:,} units in {len(self.keep)} groups go, {len(self.drop)} blocks)"

    @classmethod
    def from_keep(
        cls,
        groups: Groups,
        keep: Mapping[str, Tensor | Sequence[int]],
        *,
        drop: Iterable[str] = (),
        recipe: Mapping[str, Any] | None = None,
        scores: Mapping[str, Tensor] | None = None,
    ) -> PrunePlan:
        """A plan from explicit units.

        Args:
            groups: What `fxprune.find_groups` returned.
            keep: Group name to the units that stay.
            drop: Module paths of residual blocks to remove.
            recipe: Settings to record.
            scores: Scores to record.

        Raises:
            PlanError: An unknown or unprunable group, units that are no whole numbers, a unit out of range, or nothing left of a
                group.
        """
        chosen = {}
        for name, units in keep.items():
            if name not in groups:
                raise PlanError(f"the plan names a prune group '{name}' that the model does not have; {nearest(name, groups)}")
            chosen[name] = torch.unique(_units_of(name, units))
        chosen = {n: u for n, u in chosen.items() if len(u) != groups[n].size or u.tolist() != list(range(groups[n].size))}
        plan = cls(
            keep=chosen,
            drop=tuple(dict.fromkeys(drop)),
            sizes={n: groups[n].size for n in chosen},
            members={n: [[m.name, m.dim] for m in groups[n].members] for n in chosen},
            fingerprint=groups.fingerprint(),
            recipe=dict(recipe or {}),
            scores=dict(scores or {}),
        )
        plan.check(groups)
        return plan

    @classmethod
    def from_removed(cls, groups: Groups, gone: Mapping[str, Tensor], *, recipe: Mapping[str, Any] | None = None) -> PrunePlan:
        """A plan from the units that go, as `removed` gives them; raises as `from_keep`."""
        keep = {}
        for name, units in gone.items():
            if name not in groups:
                raise PlanError(f"the plan names a prune group '{name}' that the model does not have; {nearest(name, groups)}")
            numbers, size = _units_of(name, units), groups[name].size
            if any(not 0 <= n < size for n in numbers.tolist()):
                raise PlanError(f"a unit of group '{name}' is out of range: it has {size}")
            stays = torch.ones(size, dtype=torch.bool)
            stays[numbers] = False
            keep[name] = stays.nonzero().flatten()
        return cls.from_keep(groups, keep, recipe=recipe)

    def check(self, groups: Groups) -> None:
        """Raise `PlanError` unless the plan fits this model exactly."""
        if self.fingerprint != groups.fingerprint():
            raise PlanError(
                f"the plan was made for another model (fingerprint {self.fingerprint or 'missing'}, this model has "
                f"{groups.fingerprint()}): parameter names or shapes differ"
            )
        for name, units in self.keep.items():
            if name not in groups:
                raise PlanError(f"the plan names a prune group '{name}' that the model does not have; {nearest(name, groups)}")
            group = groups[name]
            if not group.prunable:
                raise PlanError(f"group '{name}' cannot be pruned: {group.reason}")
            if len(units) == 0:
                raise PlanError(f"the plan keeps no unit of group '{name}': at least one must stay")
            if len(units) < group.least:
                raise PlanError(f"the plan keeps {len(units)} units of group '{name}', but a top-k takes {group.least} of them")
            wrong = [u for u in units.tolist() if not 0 <= u < group.size]
            if wrong:
                raise PlanError(f"the plan keeps unit {wrong[0]} of group '{name}', which has units 0 to {group.size - 1}")
            if bool((units[1:] <= units[:-1]).any()):
                raise PlanError(f"the plan's units of group '{name}' are not in rising order")
            if name in self.members:  # buffers and constants may differ from trace to trace
                recorded = {(n, dim) for n, dim in self.members[name] if n in groups.parameters}
                if recorded != {(m.name, m.dim) for m in group.members if m.trainable} or self.sizes.get(name) != group.size:
                    raise PlanError(f"the plan was made for another form of group '{name}': in this trace it cuts other dimensions")
        for path in self.drop:
            if path not in groups.blocks:
                raise PlanError(f"'{path}' is not a residual block that can be dropped; {nearest(path, groups.blocks)}")

    def counts(self) -> dict[str, int]:
        """Units kept by each listed group."""
        return {n: len(u) for n, u in self.keep.items()}

    def removed(self) -> dict[str, Tensor]:
        """The units that go from each listed group, rising."""
        gone = {}
        for name, units in self.keep.items():
            stays = torch.zeros(self.sizes[name], dtype=torch.bool)
            stays[units] = True
            gone[name] = (~stays).nonzero().flatten()
        return gone

    def diff(self, other: PrunePlan) -> dict[str, dict[str, list[int] | list[str]]]:
        """Units that only this plan keeps (``mine``) or only the other (``theirs``), for each group where they differ.

        Raises:
            PlanError: The plans are of different models.
        """
        if self.fingerprint != other.fingerprint:
            raise PlanError(f"the plans were made for different models (fingerprints {self.fingerprint} and {other.fingerprint})")
        changes: dict[str, dict[str, list[int] | list[str]]] = {}
        for name in dict.fromkeys([*self.keep, *other.keep]):
            size = self.sizes.get(name) or other.sizes[name]
            mine, theirs = (set(p.keep[name].tolist()) if name in p.keep else set(range(size)) for p in (self, other))
            if mine != theirs:
                changes[name] = {"mine": sorted(mine - theirs), "theirs": sorted(theirs - mine)}
        if set(self.drop) != set(other.drop):
            changes["drop"] = {"mine": sorted(set(self.drop) - set(other.drop)), "theirs": sorted(set(other.drop) - set(self.drop))}
        return changes

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return {
            "fxprune_plan": FORMAT,
            "fingerprint": self.fingerprint,
            "recipe": dict(self.recipe),
            "drop": list(self.drop),
            "groups": {n: {"size": self.sizes[n], "keep": u.tolist(), "members": self.members[n]} for n, u in self.keep.items()},
            **({"scores": {n: s.tolist() for n, s in self.scores.items()}} if self.scores else {}),
            **({"curves": {n: [list(point) for point in c] for n, c in self.curves.items()}} if self.curves else {}),
        }

    @classmethod
    def from_json(cls, data: Any) -> PrunePlan:
        """Read what `to_json` gave.

        Raises:
            PlanError: The data is no plan, or of a later format.
        """
        if not isinstance(data, dict) or data.get("fxprune_plan") != FORMAT:
            raise PlanError(f"this is not an fxprune plan of format {FORMAT}")
        try:
            groups = _expect(data, "groups", dict)
            return cls(
                keep={n: torch.tensor(_whole_numbers(_expect(g, "keep", list), n), dtype=torch.long) for n, g in groups.items()},
                drop=tuple(str(path) for path in _expect(data, "drop", list)),
                sizes={n: _expect(g, "size", int) for n, g in groups.items()},
                members={n: [[str(name), int(dim)] for name, dim in _expect(g, "members", list)] for n, g in groups.items()},
                fingerprint=_expect(data, "fingerprint", str),
                recipe=_expect(data, "recipe", dict),
                scores={n: torch.tensor(s, dtype=torch.float32) for n, s in data.get("scores", {}).items()},
                curves={n: [(int(units), float(change)) for units, change in c] for n, c in data.get("curves", {}).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise PlanError(f"the plan is damaged: {reason}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, in one step: a file of that name is whole at any time.

        Raises:
            PlanError: The file cannot be written, or the recipe holds something that is no JSON.
        """
        try:
            text = json.dumps(self.to_json(), indent=1) + "\n"
        except TypeError as error:
            raise PlanError(f"the plan's recipe cannot be written as JSON: {error}") from error
        write_whole(path, text, called="the plan", error=PlanError)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrunePlan:
        """Read a plan file, or the one in the directory of a checkpoint.

        Raises:
            PlanError: The file is missing, is no JSON, or is no plan.
        """
        file = Path(path, PLAN_FILE) if os.path.isdir(path) else path
        data = read_json(file, called="the plan", error=PlanError)
        try:
            return cls.from_json(data)
        except PlanError as error:
            raise PlanError(f"'{os.fspath(file)}' cannot be used: {error}") from error


def _expect(data: Any, key: str, kind: type) -> Any:
    value = data[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"'{key}' should be of type {kind.__name__}, got {value!r:.80}")
    return value


def _units_of(name: str, units: Any) -> Tensor:
    """Units of a group as a LongTensor; `PlanError` where they are something else."""
    try:
        numbers = torch.as_tensor(units).cpu().flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(f"the units of group '{name}' must be whole numbers, got {units!r:.80}") from error
    if numbers.numel() and (numbers.dtype == torch.bool or numbers.is_floating_point() or numbers.is_complex()):
        raise PlanError(f"the units of group '{name}' must be whole numbers, got {str(numbers.dtype).removeprefix('torch.')}")
    return numbers.long()


def _whole_numbers(units: list[Any], name: str) -> list[int]:
    for unit in units:
        if not isinstance(unit, int) or isinstance(unit, bool):
            raise TypeError(f"the units of group '{name}' must be whole numbers, got {unit!r:.80}")
    return units
