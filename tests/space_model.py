"""A brute-force model of index spaces: booleans over whole dimensions, with numpy's own reshape and concatenate."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.spaces import Axis, Concat, Product, Space, Sym, resolve

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


def owners(space: Space, axis: Axis) -> set[tuple[int, int]]:
    """Every (unit, position) such that removing the unit alone removes the position."""
    import torch

    pairs = set()
    for unit in range(axis.size):
        others = torch.tensor([u for u in range(axis.size) if u != unit], dtype=torch.long)
        gone = np.flatnonzero(~kept_mask(space, {axis: others}))
        pairs |= {(unit, int(p)) for p in gone}
    return pairs
