"""What the stock class of a model can have fewer of, found out before units are chosen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from torch import nn

from ..groups import Groups
from ..passes.selection import Selection, lanes_of
from ..plan import PrunePlan
from .config import Unsolved, solve_config


def fixed_in_stock(model: nn.Module, groups: Groups, chosen: Selection) -> list[str]:
    """Eligible groups of which no configuration of the model's class has another number of units.

    Families of groups are tried with half of their units on models built on the meta device: those of one kind together (an
    encoder's and a decoder's FFN may have one field of the configuration), and if that is refused those of one size, then each by
    itself. Whether what remains can shrink to the very widths that will be chosen is not tried; nor are hidden dimensions, of which
    most classes take some numbers and refuse others.

    Args:
        model: A Hugging Face model.
        groups: Its prune groups.
        chosen: What may be pruned, with uniform widths.

    Returns:
        Patterns for `Selection.protect`. None if the model's own configuration does not give its own shapes (a model with adapters,
        or one that was pruned to widths of its own): then nothing can be told.
    """
    if not (hasattr(model, "config") and hasattr(model, "save_pretrained")) or not _solvable(model, groups, {}):
        return []
    half: dict[str, dict[str, int]] = {}  # of each family, by the names of its groups
    for label, names in lanes_of(groups, chosen).items():
        first = groups[names[0]]
        multiple = chosen.multiple_of(first.kind)
        kept = first.size // 2 // multiple * multiple
        if first.kind != "hidden" and kept:
            half[label] = dict.fromkeys(names, kept)
    fixed = set(half)
    for together in _parts(groups, half):
        if fixed.issuperset(together) and _solvable(model, groups, {n: k for label in together for n, k in half[label].items()}):
            fixed.difference_update(together)
    return [pattern for label in half if label in fixed for pattern in _patterns(groups, label, half[label])]


def _parts(groups: Groups, half: dict[str, dict[str, int]]) -> Iterator[list[str]]:
    """Families by kind, then by kind and size, then one by one; no set of them twice."""
    tried: list[list[str]] = []
    key = {label: (groups[next(iter(names))].kind, groups[next(iter(names))].size) for label, names in half.items()}
    for alike in ({label: kind for label, (kind, _) in key.items()}, key, {label: label for label in key}):
        for each in dict.fromkeys(alike.values()):
            together = [label for label in half if alike[label] == each]
            if together not in tried:
                tried.append(together)
                yield together


def _patterns(groups: Groups, family: str, names: Iterable[str]) -> list[str]:
    """A family's name if that, read as a pattern, means its groups and no other; or else their names."""
    return [family] if {name for name in groups if fnmatchcase(name, family)} == set(names) else list(names)


def _solvable(model: nn.Module, groups: Groups, kept: dict[str, int]) -> bool:
    try:
        solve_config(model, groups, PrunePlan.from_keep(groups, {name: list(range(count)) for name, count in kept.items()}))
    except Unsolved:
        return False
    return True
