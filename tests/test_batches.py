"""What is taken out of calibration batches, and the logits in whatever a model returns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import UsageError
from fxprune.passes.batches import flat_arguments, logits_of, rows_of

LOGITS = torch.ones(2, 3, 5)


@pytest.mark.parametrize(
    "outputs",
    [
        SimpleNamespace(loss=torch.zeros(()), logits=LOGITS),
        LOGITS,
        (LOGITS, torch.zeros(1)),
        [torch.arange(3), LOGITS],
        {"tokens": torch.arange(3), "scores": LOGITS},
        ((torch.ones(2, dtype=torch.bool), {"first": LOGITS}), torch.zeros(1)),
    ],
)
def test_logits_in_whatever_a_model_returns(outputs: Any) -> None:
    assert logits_of(outputs) is LOGITS


def test_no_logits() -> None:
    for outputs in (SimpleNamespace(logits=None), (), (torch.arange(3), "text")):
        with pytest.raises(UsageError, match=r"^the model gives no logits: it is no language model$"):
            logits_of(outputs)
        with pytest.raises(UsageError, match=r"^say which$"):
            logits_of(outputs, "say which")


def test_rows_are_those_of_the_longest_tensor() -> None:
    assert rows_of({"scale": torch.tensor(2.0)}) == 1
    assert rows_of({"positions": torch.zeros(1, 7), "ids": torch.zeros(4, 7), "scale": torch.tensor(2.0)}) == 4


class Pair(nn.Module):
    """Takes two tensors, and not in the order of the alphabet."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 3)

    def forward(self, second: Tensor, first: Tensor) -> Tensor:
        return self.map(second) - first


def test_flat_arguments_are_the_placeholders_values() -> None:
    batch = {"first": torch.zeros(2, 3), "other": torch.zeros(1), "second": torch.ones(2, 3)}
    gm = fxprune.trace(Pair(), {"second": batch["second"], "first": batch["first"]})
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    values = flat_arguments(gm, batch)
    assert len(values) == 2
    assert all(value is batch[name] for name, value in zip(names, values, strict=True))
    with pytest.raises(UsageError, match=r"a calibration batch has second, but .* traced with second, first: first is missing"):
        flat_arguments(gm, {"second": batch["second"]})
