"""Least squares for one linear map: weights with which the features that stay make up for those that go.

With X the features that a map reads, kept ones K and removed ones R, G = X^T X and D the diagonal of G_KK, they are
W_K + W_R G_RK (G_KK + ridge D)^-1. The ridge says how little the text is trusted: too small a one fits what only this text has,
and the map is worse for it on any other. It is chosen by what comes out on tokens that were held back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)
"""What is tried; with infinity the weights stay as they are."""

HELD = 0.2
"""Share of each batch's tokens, from its end, that is held back."""


@dataclass(frozen=True)
class Gram:
    """X^T X of what a map reads, ``[features, features]`` in float32.

    Attributes:
        fitted: Of the tokens to fit to.
        held: Of those that were held back.
        tokens: Number of the former.
        held_tokens: Number of the latter.
    """

    fitted: Tensor
    held: Tensor
    tokens: int
    held_tokens: int

    @property
    def total(self) -> Tensor:
        """Of all tokens."""
        return self.fitted + self.held if self.held_tokens else self.fitted

    def for_all(self, ridge: float) -> float:
        """What a ridge that suits the fitted tokens comes to for all of them: the more text, the less."""
        return ridge * self.tokens / (self.tokens + self.held_tokens)


@dataclass(frozen=True)
class Solution:
    """A map's new weights.

    Attributes:
        weight: ``[outputs, kept]``, fitted to all tokens.
        left: Positions of the kept features, rising.
        ridge: What was used.
        before: Squared error of the map's output over the output's square on the tokens held back, with the sliced weights.
        after: The same with weights fitted to the other tokens.
    """

    weight: Tensor
    left: Tensor
    ridge: float
    before: float
    after: float


def sum_gram(rows: Iterable[Tensor]) -> Gram:
    """The `Gram` of rows ``[tokens, features]`` that come batch by batch."""
    sums: list[Tensor | None] = [None, None]
    counts = [0, 0]
    for piece in rows:
        x = piece.float()
        cut = len(x) - round(HELD * len(x))
        for i, part in enumerate((x[:cut], x[cut:])):
            known = sums[i]
            sums[i] = part.mT @ part if known is None else known.addmm_(part.mT, part)
            counts[i] += len(part)
    fitted, held = sums
    assert fitted is not None
    assert held is not None
    return Gram(fitted, held, *counts)


def fit_map(weight: Tensor, gram: Gram, stays: Tensor, ridge: float | None = None) -> Solution:
    """New weights for the kept features of a map.

    Args:
        weight: ``[outputs, features]``.
        gram: Of what it reads.
        stays: Which features are kept, bool ``[features]``.
        ridge: A share of each feature's own power; by default the one of `RIDGES` with the least error on the tokens held back.
    """
    left = stays.nonzero().flatten()
    check = gram.held if gram.held_tokens else gram.fitted
    chosen = choose_ridge(weight, gram, stays) if ridge is None else ridge
    before, after = (output_error(weight, check, left, solve(weight, gram.fitted, stays, r)) for r in (math.inf, chosen))
    chosen = gram.for_all(chosen) if ridge is None else chosen
    return Solution(solve(weight, gram.total, stays, chosen), left, chosen, before, after)


def choose_ridge(weight: Tensor, gram: Gram, stays: Tensor) -> float:
    """The one of `RIDGES` with the least error on the tokens held back, in float32; 1 where none were."""
    if not gram.held_tokens:
        return 1.0
    left = stays.nonzero().flatten()
    errors = {
        r: output_error(weight, gram.held, left, solve(weight, gram.fitted, stays, r, torch.float32), torch.float32) for r in RIDGES
    }
    return min(errors, key=lambda r: (errors[r], -r))


def solve(weight: Tensor, gram: Tensor, stays: Tensor, ridge: float, precision: torch.dtype = torch.float64) -> Tensor:
    """The weights of the kept features that make up for the removed ones.

    Args:
        weight: ``[outputs, features]``.
        gram: X^T X, ``[features, features]``.
        stays: Which features are kept, bool ``[features]``.
        ridge: A share of each feature's own power; with infinity the weights stay as they are.
        precision: To solve in.

    Returns:
        Weights ``[outputs, kept]`` of the weight's dtype.
    """
    left, gone = (mask.nonzero().flatten().to(weight.device) for mask in (stays, ~stays))
    if math.isinf(ridge):
        return weight[:, left]
    inner = gram[left][:, left].to(precision)
    power = gram.diagonal().to(precision)
    scale = (power[left] + 1e-9 * power.mean().clamp_min(1e-30)).sqrt()  # every feature at power 1: well conditioned
    inner.div_(scale).div_(scale[:, None]).diagonal().add_(ridge + 1e-9)
    lost = weight[:, gone].to(precision) @ gram[gone][:, left].to(precision) / scale
    moved = torch.cholesky_solve(lost.mT, torch.linalg.cholesky(inner)).mT / scale
    solved: Tensor = (weight[:, left].to(precision) + moved).to(weight.dtype)
    return solved


def output_error(weight: Tensor, gram: Tensor, left: Tensor, new: Tensor, precision: torch.dtype = torch.float64) -> float:
    """Squared error of a map's output over the output's square, with weights ``new [outputs, kept]`` for the kept features."""
    g, w = gram.to(precision), weight.to(precision)
    power, change = float((w @ g * w).sum()), w.clone()
    change[:, left.to(w.device)] -= new.to(precision)
    return max(float((change @ g * change).sum()), 0.0) / max(power, 1e-30)
