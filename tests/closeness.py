"""How far two tensors are from each other."""

from __future__ import annotations

from torch import Tensor


def relative(expected: Tensor, actual: Tensor) -> float:
    """The largest difference, as a share of the largest entry expected; the shapes must be the same."""
    assert expected.shape == actual.shape
    expected, actual = expected.detach().double(), actual.detach().double()
    return float((expected - actual).abs().max() / expected.abs().max())
