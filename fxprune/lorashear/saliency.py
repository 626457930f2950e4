"""Saliency of prune units: how much each would be missed, from its base weights and the update that its adapters learnt.

With ``x`` the base weights of a unit as one vector, ``x'`` those of them that have an adapter (or are trained themselves), and
``g`` the update ``s B A`` of their adapters (or their gradient):

- ``magnitude``: ``|x|``;
- ``average``: ``|x| / number of elements``;
- ``cosine``: ``1 + <x', g> / (|x'| |g|)``, and 1 where either is zero;
- ``taylor1``: ``|<x', g>|``;
- ``taylor2``: ``<x', g>^2 / 2``.

The five are those of the authors' published optimizer code (see docs/lorashear.md). Each is divided by its norm over all units that
are compared, and the weighted sum is the saliency. ``s B A`` is never formed: with ``W`` the weight's rows, ``|B_i A|^2`` is
``B_i (A A^T) B_i^T`` and ``<W_i, B_i A>`` is ``(W_i A^T) B_i^T``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FxPruneError, UsageError, nearest
from .adapters import update_factors, wide
from .units import Part, Structure

CRITERIA = ("magnitude", "average", "cosine", "taylor1", "taylor2")


@dataclass(frozen=True)
class Moments:
    """Sums over the elements of each unit of a group: float64 CPU tensors ``[size]``.

    Attributes:
        square: Of ``x^2``.
        guided_square: Of ``x'^2``.
        update_square: Of ``g^2``.
        product: Of ``x' g``.
        elements: Numbers of elements of ``x``.
    """

    square: Tensor
    guided_square: Tensor
    update_square: Tensor
    product: Tensor
    elements: Tensor


def check_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of the criteria, those that are zero left out.

    Raises:
        UsageError: No mapping, an unknown criterion, a weight that is negative or no number, or nothing left.
    """
    if not isinstance(weights, Mapping):
        raise UsageError(f"saliency is a mapping from criterion to weight, got {weights!r}")
    for name, weight in weights.items():
        if name not in CRITERIA:
            raise UsageError(f"unknown saliency criterion '{name}'; {nearest(name, CRITERIA)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UsageError(f"the weight of saliency criterion '{name}' must be 0 or a positive number, got {weight!r}")
    found = {name: float(weight) for name, weight in weights.items() if weight}
    if not found:
        raise UsageError(f"no saliency criterion has a weight: give at least one of {', '.join(CRITERIA)}")
    return found


@torch.no_grad()
def moments(structure: Structure, tensors: Mapping[str, Tensor]) -> Moments:
    """The sums over each unit's elements.

    Args:
        structure: A group with its base weights.
        tensors: Every parameter by name.
    """
    size = structure.group.size
    square, guided, update, product = (torch.zeros(size, dtype=torch.float64) for _ in range(4))
    for part in structure.parts:
        units, positions = part.incidence
        rows = by_position(wide(part.tensor), part.member.dim)
        squares = (rows * rows).sum(1)
        square.index_add_(0, units, _credit(squares, positions))
        found = _update(part, rows, tensors)
        if found is not None:
            guided.index_add_(0, units, _credit(squares, positions))
            update.index_add_(0, units, _credit(found[0], positions))
            product.index_add_(0, units, _credit(found[1], positions))
    return Moments(square, guided, update, product, structure.elements)


def saliency(
    found: Mapping[str, Moments], weights: Mapping[str, float], gone: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The weighted sum of the normalised criteria.

    Args:
        found: The moments of every group that is compared.
        weights: Of the criteria, as `check_weights` returns them.
        gone: For some groups the units that are not compared any more, a LongTensor.

    Returns:
        For each group a float64 tensor ``[size]``, at least 0; larger is more salient. Units that are gone have a number so far
        below 0 that no sum over units of all groups with one of them is positive.

    Raises:
        FxPruneError: A sum is not finite.
    """
    stays = _staying({name: len(m.square) for name, m in found.items()}, gone)
    total = {name: torch.zeros_like(m.square) for name, m in found.items()}
    for criterion, weight in weights.items():
        values = {name: measure(m, criterion) for name, m in found.items()}
        norm = math.sqrt(sum(float(v[stays[name]].square().sum()) for name, v in values.items()))
        if not math.isfinite(norm):
            raise FxPruneError(f"the saliency ({criterion}) is not finite: the weights or the adapters have diverged")
        if norm:
            for name, value in values.items():
                total[name] += weight * value / norm
    return _lowered(total, stays, sum(weights.values()) * len(found))


def by_parameter(
    scores: Mapping[str, Tensor], per_unit: Mapping[str, float], gone: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Importance by parameter, in place of saliency.

    Args:
        scores: Of each unit of every group that is compared, at least 0.
        per_unit: How many parameters go with a unit of each group.
        gone: As for `saliency`.

    Returns:
        As `saliency`.
    """
    values = {name: own.double() / per_unit[name] for name, own in scores.items()}
    most = sum(float(value.max()) for value in values.values())
    return _lowered(values, _staying({name: len(value) for name, value in values.items()}, gone), most)


def _staying(sizes: Mapping[str, int], gone: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """For each group which units are compared."""
    stays = {name: torch.ones(size, dtype=torch.bool) for name, size in sizes.items()}
    for name, units in (gone or {}).items():
        stays[name][units] = False
    return stays


def _lowered(values: Mapping[str, Tensor], stays: Mapping[str, Tensor], most: float) -> dict[str, Tensor]:
    """The values, and for units that are gone a number so far below 0 that ``most`` (of a sum over groups) does not outweigh it."""
    return {name: torch.where(stays[name], value, -1 - most) for name, value in values.items()}


def measure(m: Moments, criterion: str) -> Tensor:
    """One criterion, not normalised: a float64 tensor ``[size]``."""
    if criterion == "magnitude":
        return m.square.sqrt()
    if criterion == "average":
        return m.square.sqrt() / m.elements.clamp_min(1)
    if criterion == "cosine":
        norms = m.guided_square.sqrt() * m.update_square.sqrt()
        return 1 + torch.where(norms > 0, m.product / norms.clamp_min(1e-300), 0).clamp(-1, 1)
    return m.product.abs() if criterion == "taylor1" else m.product.square() / 2


def by_position(tensor: Tensor, dim: int) -> Tensor:
    """A tensor as rows, one for each position along a dimension: ``[positions, the rest]``."""
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)


def _update(part: Part, rows: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """For each position the sums of ``g^2`` and ``x g``; None if there is neither a gradient nor an adapter."""
    if part.trained:
        if part.tensor.grad is None:
            return None
        gradient = by_position(wide(part.tensor.grad), part.member.dim)
        return (gradient * gradient).sum(1), (rows * gradient).sum(1)
    if not part.adapters:
        return None
    left, right = update_factors(part.adapters, part.member.dim, tensors)
    return ((left @ (right @ right.mT)) * left).sum(1).clamp_min(0), ((rows @ right.mT) * left).sum(1)


def _credit(line: Tensor, positions: Tensor) -> Tensor:
    return line.double().cpu().index_select(0, positions)
