"""Compensated loss curves: every point against the eager model with weights solved by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune import find_groups, trace
from fxprune.passes.sensitivity import measure_curves

from .sensing import (
    GPT2,
    LLAMA,
    Case,
    Edit,
    batches,
    case_of,
    compensated,
    eager_loss,
    features,
    gram_of,
    untouched,
)


@pytest.fixture(scope="module")
def llama() -> Case:
    return case_of("llama")


@pytest.fixture(scope="module")
def gpt2() -> Case:
    return case_of("gpt2")


@pytest.mark.parametrize(("ridge", "apart"), [(0.03, True), (0.5, False)])
@pytest.mark.parametrize(("family", "edits"), [("llama", LLAMA), ("gpt2", GPT2)])
def test_compensated_points_are_the_loss_of_a_compensated_eager_model(
    family: str, edits: Mapping[str, Edit], ridge: float, apart: bool, request: pytest.FixtureRequest
) -> None:
    case: Case = request.getfixturevalue(family)
    """What the loss is measured on, the weights are not fitted to (unless there is nothing else)."""
    fitted, measured = (batches()[:2], batches()[2:]) if apart else (batches(), batches())
    options: dict[str, Any] = {"names": list(edits), "levels": 3, "samples": 2 if apart else None, "ridge": ridge}
    with untouched(case.gm):
        curves = measure_curves(case.gm, case.groups, case.scores, batches(), compensated=True, **options)
        plain = measure_curves(case.gm, case.groups, case.scores, batches(), **options)
    dense = eager_loss(case.model, measured)
    for name in (n for n in edits if n != "model.layers.head_dim"):
        order = case.scores[name].argsort()
        for count, change in curves[name][1:]:
            path, gone = features(name, order[:count])
            weight = case.model.get_parameter(f"{path}.weight").detach()
            columns = weight if family == "llama" else weight.mT
            new = compensated(columns, gram_of(case, path, fitted), gone, ridge)
            model = copy.deepcopy(case.model)
            model.get_parameter(f"{path}.weight").data = new if family == "llama" else new.mT
            assert change == pytest.approx(eager_loss(model, measured) - dense, abs=1e-4), (name, count)
        assert max(abs(a - b) for (_, a), (_, b) in zip(curves[name], plain[name], strict=True)) > 1e-3
    if family == "llama":  # no linear map reads rotary pairs: nothing can make up for them
        for (_, a), (_, b) in zip(curves["model.layers.head_dim"], plain["model.layers.head_dim"], strict=True):
            assert a == pytest.approx(b, abs=1e-6)


class Forked(nn.Module):
    """Channels that a linear map and something else read."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 9), nn.Linear(9, 3)
        self.gains = nn.Parameter(torch.randn(9))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        out: Tensor = self.leave(h) + (h * self.gains).sum(-1, keepdim=True)
        return out


def test_units_that_reach_the_output_past_the_map() -> None:
    """What one map makes up for is not all that goes with the units: such a group is measured without compensation."""
    torch.manual_seed(0)
    model, x, y = Forked(), torch.randn(50, 4), torch.randn(50, 3)
    gm = trace(model, (x,))
    groups = find_groups(gm)
    (name,) = [n for n, g in groups.items() if g.prunable]
    scores = {name: torch.arange(9.0)}
    options: dict[str, Any] = {"loss": lambda out, batch: (out - y).square().mean(), "levels": 8}
    curve = measure_curves(gm, groups, scores, [{"x": x}], compensated=True, **options)[name]
    with torch.no_grad():
        h = torch.tanh(model.enter(x))
        for count, change in curve[1:]:
            out = (
                h[:, count:] @ model.leave.weight[:, count:].mT
                + model.leave.bias
                + (h * model.gains)[:, count:].sum(-1, keepdim=True)
            )
            wanted = (out - y).square().mean() - (model(x) - y).square().mean()
            assert change == pytest.approx(float(wanted), abs=1e-5), count
