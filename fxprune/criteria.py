"""Importance criteria: what one parameter element, or one unit's slice, contributes to the loss.

Each criterion turns a parameter ``w`` and its gradient ``g`` into an element-wise statistic that adds up over the elements a unit
owns. Sources: LLM-Pruner (arXiv 2305.11627), section 3.2: vector-wise importance (eq. 3), element-wise importance (eq. 5) with the
diagonal of the empirical Fisher in place of the Hessian (eq. 4).

Activation criteria look at what the linear maps read that contract the units (``x``, ``[tokens, features]``) and at their weights
(``W``, ``[outputs, features]``): one number a feature. Sources: Wanda (arXiv 2306.11695, eq. 1), structured as in the FLAP
authors' Wanda-sp; FLAP (arXiv 2312.11983, eq. 5); ``kfac`` takes a feature's and its gradient's second moments as independent, as
K-FAC does (arXiv 1503.05671): the diagonal of the factored Fisher, which is less noisy than the Fisher of few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from .errors import UsageError, nearest

if TYPE_CHECKING:
    from .passes.activations import Moments

ElementScore: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``(weight, gradient) -> statistic`` of the weight's shape; may overwrite the gradient."""

FeatureScore: TypeAlias = "Callable[[Tensor, Moments], Tensor]"
"""``(weight [outputs, features], moments) -> scores [features]``."""

UserCriterion: TypeAlias = Callable[[str, Tensor, Tensor], Tensor]
"""A user's own: ``(parameter name, weight, gradient) -> scores`` of the weight's shape."""


@dataclass(frozen=True)
class Criterion:
    """How a parameter is scored.

    Attributes:
        name: What users write.
        formula: For tables and model cards.
        element: The element-wise statistic, or None if no parameter is looked at.
        gradient: True if a calibration gradient is needed.
        per_sample: True if every calibration sample gives its own gradient (Fisher).
        signed: True if the statistic is summed with its sign and the absolute value is taken per unit and parameter.
        accumulate: True if the whole calibration set's gradient is needed at once, element by element.
        feature: For activation criteria, the statistic of what a linear map reads; ``element`` is then None, and ``gradient`` says
            whether the gradient of what is read is needed.
    """

    name: str
    formula: str
    element: ElementScore | None = None
    gradient: bool = True
    per_sample: bool = False
    signed: bool = False
    accumulate: bool = False
    feature: FeatureScore | None = None

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is needed."""
        return self.gradient or self.feature is not None


CRITERIA = {
    c.name: c
    for c in (
        Criterion("random", "uniform noise, seeded", None, gradient=False),
        Criterion("l1", "sum |w|", lambda w, g: w.abs(), gradient=False),
        Criterion("l2", "sum w^2", lambda w, g: w.square(), gradient=False),
        Criterion("taylor_vector", "|sum w g|", lambda w, g: g.mul_(w), signed=True),
        Criterion("taylor1", "sum |w g|", lambda w, g: g.mul_(w).abs_()),
        Criterion("taylor2", "sum |w h w|, h = mean g^2 over samples", lambda w, g: g.mul_(w).square_(), per_sample=True),
        Criterion("taylor_mixed", "sum |w g - w h w / 2|", per_sample=True, accumulate=True),
        Criterion("wanda", "sum |w| sqrt(E[x^2])", gradient=False, feature=lambda w, m: w.abs().sum(0) * m.power.sqrt()),
        Criterion("flap", "sum w^2 Var[x]", gradient=False, feature=lambda w, m: w.square().sum(0) * m.variance),
        Criterion("kfac", "sum E[x^2] E[(dL/dx)^2]", feature=lambda w, m: m.power * m.sensitivity),
    )
}

AGGREGATIONS = ("sum", "mean", "max", "product", "last", "first")
"""How the scores of a group's members become one: LLM-Pruner's summation, product, max-pooling and last-only, and two more.

``product`` is taken as the geometric mean: it ranks a group's units as the product does, but stays on the scale of one member,
where the product of a few hundred small numbers would be zero for every unit.
"""


def find_criterion(criterion: str | Criterion | UserCriterion) -> Criterion | UserCriterion:
    """A built-in criterion by name; a `Criterion` or a user's callable is handed back.

    Raises:
        UsageError: An unknown name.
    """
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise UsageError(f"unknown criterion '{criterion}'; {nearest(criterion, CRITERIA)}")
        return CRITERIA[criterion]
    if not isinstance(criterion, Criterion) and not callable(criterion):
        raise UsageError(f"a criterion is a name or a callable (name, weight, gradient) -> scores, not {criterion!r}")
    return criterion


def check_aggregation(how: str) -> None:
    """Raise `UsageError` for an unknown aggregation."""
    if how not in AGGREGATIONS:
        raise UsageError(f"unknown aggregation '{how}'; {nearest(how, AGGREGATIONS)}")


def aggregate(scores: list[Tensor], how: str) -> Tensor:
    """One score per unit from one per unit and member.

    Args:
        scores: For each member (in order of first use) a float tensor of shape ``[units]``.
        how: One of `AGGREGATIONS`.

    Raises:
        UsageError: An unknown aggregation.
    """
    check_aggregation(how)
    stacked = torch.stack(scores)
    match how:
        case "sum":
            return stacked.sum(0)
        case "mean":
            return stacked.mean(0)
        case "max":
            return stacked.amax(0)
        case "product":
            return stacked.sign().prod(0) * stacked.abs().log().mean(0).exp()
        case "last":
            return stacked[-1]
        case _:
            return stacked[0]
