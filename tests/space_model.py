"""A brute-force model of index spaces: booleans over whole dimensions, with numpy's own reshape and concatenate."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.spaces import Axis, Concat, Product, Space, Sym, resolve, size_of

Mask = Any
"""A one-dimensional numpy array of bool: True for the indices that stay."""


def kept_mask(space: Space, choice: Mapping[Axis, Tensor], symbols: Mapping[Any, int] | None = None) -> Mask:
    """Which indices of a dimension stay when axes keep the chosen units; axes not chosen stay whole.

    A Product is the outer AND of its factors, flattened; a Concat is its parts one after another. ``symbols`` gives symbolic
    dimensions a size.
    """
    space = resolve(space)
    if isinstance(space, Axis):
        mask = np.ones(space.size, dtype=bool)
        if space in choice:
            mask[:] = False
            mask[choice[space].numpy()] = True
        return mask
    if isinstance(space, Sym):
        return np.ones(int(space.expr.subs(dict(symbols or {}))), dtype=bool)
    if isinstance(space, Product):
        factors = (kept_mask(f, choice, symbols) for f in space.factors)
        return reduce(lambda a, b: np.logical_and.outer(a, b).reshape(-1), factors, np.ones(1, dtype=bool))
    assert isinstance(space, Concat)
    return np.concatenate([kept_mask(p, choice, symbols) for p in space.parts])


def parts(space: Space) -> list[Mask]:
    """For each part of each Concat in a space, at whatever depth, the positions of the dimension that belong to it."""
    space = resolve(space)
    if not isinstance(space, Product | Concat):
        return []
    children = space.factors if isinstance(space, Product) else space.parts
    found = []
    for i, child in enumerate(children):
        before, after = ([np.ones(size_of(c), dtype=bool) for c in some] for some in (children[:i], children[i + 1 :]))
        whole = [np.ones(size_of(child), dtype=bool)] if isinstance(space, Concat) else []
        for inner in [*whole, *parts(child)]:
            if isinstance(space, Concat):
                found.append(np.concatenate([*(b & False for b in before), inner, *(a & False for a in after)]))
            else:
                found.append(reduce(lambda x, y: np.logical_and.outer(x, y).reshape(-1), [*before, inner, *after]))
    return found


def owners(space: Space, axis: Axis) -> set[tuple[int, int]]:
    """Every (unit, position) such that removing the unit alone removes the position."""
    pairs = set()
    for unit in range(axis.size):
        others = torch.tensor([u for u in range(axis.size) if u != unit], dtype=torch.long)
        gone = np.flatnonzero(~kept_mask(space, {axis: others}))
        pairs |= {(unit, int(p)) for p in gone}
    return pairs
