"""What the explorer's page shows, as plain data: groups, layers, importance, ownership and what a plan keeps."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import numpy as np
from torch import Tensor

from ..groups import Groups, Member, PruneGroup
from ..names import BLOCK_SCORES
from ..plan import PrunePlan
from ..spaces import Axis, Concat, Product, Space, kept_size, resolve
from ..table import group_summary

FORMAT = 1

DIGITS = 3
"""Significant digits that a score keeps in the page."""


def explorer_data(
    groups: Groups,
    *,
    title: str,
    architecture: str = "",
    scores: Mapping[str, Tensor] | None = None,
    importance: Mapping[str, str] | None = None,
    plan: PrunePlan | None = None,
) -> dict[str, Any]:
    """Everything that the page knows, JSON-able.

    Args:
        groups: What `fxprune.find_groups` returned.
        title: The model's name.
        architecture: Its class.
        scores: For each group a tensor ``[units]``; larger is more important. Kept to `DIGITS` significant digits.
        importance: What the scores are, as ``name``, ``formula`` and ``data``; without scores ``why`` says why there are none.
        plan: What is to be kept.

    Returns:
        ``rows`` are numbered layers with their parameters before and after; ``layouts`` are the spaces of parameter dimensions
        as trees (see `layout`), each once; a group's ``kept`` is a bit for each unit, base64.

    Raises:
        PlanError: The plan is of another model.
    """
    if plan is not None:
        plan.check(groups)
    names = {name: i for i, name in enumerate(dict.fromkeys(m.name for g in groups.values() for m in g.members))}
    kinds = {g.axis: g.kind for g in groups.values()}
    layouts: dict[str, int] = {}
    trees: list[Any] = []

    def number(member: Member) -> int:
        tree = layout(member.space, member.axis, kinds)
        key = repr(tree)
        if key not in layouts:
            layouts[key] = len(trees)
            trees.append(tree)
        return layouts[key]

    def described(group: PruneGroup) -> dict[str, Any]:
        row, column = place(group.name)
        own = (scores or {}).get(group.name)
        kept = plan.keep.get(group.name) if plan else None
        return {
            "name": group.name,
            "kind": group.kind,
            "row": row,
            "column": column,
            "size": group.size,
            "perUnit": round(group.parameters_per_unit, 3),
            "prunable": group.prunable,
            "reasons": list(group.axis.pins),
            "normalised": group.normalised,
            "least": group.least,
            "multiple": group.multiple,
            "members": [[names[m.name], m.dim, number(m)] for m in group.members],
            **({} if own is None else {"scores": rounded(own.tolist())}),
            **({} if kept is None else {"kept": _bits(kept, group.size)}),
        }

    listed = [described(group) for group in groups.values()]
    return {
        "fxprune_explorer": FORMAT,
        "title": title,
        "architecture": architecture,
        "digits": DIGITS,
        "summary": asdict(group_summary(groups)),
        "importance": dict(importance or {}),
        "parameters": _parameters(groups, names),
        "layouts": trees,
        "groups": listed,
        **_layers(groups, plan),
        "plan": None if plan is None else _planned(groups, plan),
    }


def layout(space: Space, axis: Axis, kinds: Mapping[Axis, str]) -> list[Any]:
    """A dimension's space as a tree.

    Args:
        space: Of the dimension.
        axis: The group's own.
        kinds: The kind of each axis, for people.

    Returns:
        ``["own", size]`` for the group's axis, ``["axis", size, kind]`` for another, ``["x", factor, ..]`` for a product
        (row-major) and ``["+", part, ..]`` for parts one after another.
    """
    match resolve(space):
        case Axis() as found:
            return ["own", found.size] if found is axis else ["axis", found.size, kinds.get(found, "")]
        case Product(factors=inner):
            return ["x", *(layout(s, axis, kinds) for s in inner)]
        case Concat(parts=inner):
            return ["+", *(layout(s, axis, kinds) for s in inner)]
        case other:  # a size that varies from call to call has no units
            return ["axis", 1, str(other)]


def place(name: str) -> tuple[str, str]:
    """The numbered layer that a group lies in and its role there; ``("", name)`` outside.

    ``model.layers.3.mlp.ffn`` lies in ``model.layers.3`` and is its ``mlp.ffn``; further numbers become ``*``.
    """
    found = re.match(r"((?:[^.]+\.)*?\d+)\.(.+)", name)
    if not found:
        return "", name
    return found[1], re.sub(r"(?<=\.)\d+(?=\.)", "*", found[2])


def rounded(values: Iterable[float]) -> list[float | None]:
    """Numbers to `DIGITS` significant digits; None for what is not finite."""
    return [float(f"{v:.{DIGITS}g}") if math.isfinite(v) else None for v in values]


def _bits(kept: Tensor, size: int) -> str:
    mask = np.zeros(size, dtype=bool)
    mask[kept.numpy()] = True
    return base64.b64encode(np.packbits(mask).tobytes()).decode()


def _parameters(groups: Groups, names: Mapping[str, int]) -> list[list[Any]]:
    """For each name its shape, whether it is trained, and the other names of tied weights."""
    aliases: dict[str, list[str]] = {}
    for alias, first in groups.aliases.items():
        aliases.setdefault(first, []).append(alias)
    values = groups.inference.tensors
    return [[n, list(cast(Tensor, values[n].tensor).shape), n in groups.parameters, aliases.get(n, [])] for n in names]


def _layers(groups: Groups, plan: PrunePlan | None) -> dict[str, Any]:
    """Parameters of each numbered layer, and of the rest, before and after."""
    counts = {groups[n].axis: c for n, c in plan.counts().items()} if plan else {}
    gone = groups.parameters_of(plan.drop) if plan else set()
    rows: dict[str, list[int]] = {}
    outside = [0, 0]
    for name, value in groups.parameters.items():
        row, _ = place(name)
        entry = rows.setdefault(row, [0, 0]) if row else outside
        entry[0] += cast(Tensor, value.tensor).numel()
        entry[1] += 0 if name in gone else math.prod(kept_size(s, lambda axis: counts.get(axis, axis.size)) for s in value)
    dropped = set(plan.drop) if plan else set()
    ordered = sorted(rows, key=_stack)
    layers = [{"name": r, "parameters": rows[r], "block": r in groups.blocks, "dropped": r in dropped} for r in ordered]
    return {"rows": layers, "outside": outside}


def _stack(row: str) -> tuple[str, int]:
    stack, _, number = row.rpartition(".")
    return stack, int(number)


def _planned(groups: Groups, plan: PrunePlan) -> dict[str, Any]:
    return {
        "before": groups.total,
        "after": groups.remaining(plan.counts(), plan.drop),
        "drop": list(plan.drop),
        "recipe": [[str(k), _said(v)] for k, v in plan.recipe.items() if k != BLOCK_SCORES and v not in (None, "", (), [], {})],
    }


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_said(v)}" for k, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
