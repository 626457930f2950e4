"""A pruned network and the masked dense one: compared by `fxprune.passes.verify`, or by hand with a stock model.

The norms here take their statistics over the kept units only: weights that are zero do not do that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.capture import trace
from fxprune.groups import Groups, PruneGroup
from fxprune.passes.dependency import find_groups
from fxprune.passes.rewrite import rewrite
from fxprune.passes.verify import verify
from fxprune.plan import PrunePlan

from .zoo import tokens

TRACED, RUN = (2, 7), (3, 11)
"""Batch and sequence of the example that is traced, and of the one that is checked: never the same."""


def traced(model: nn.Module, **more: Tensor) -> tuple[GraphModule, Groups]:
    """The traced model and its groups; it must do what the model does, at other sizes than it was traced with."""
    gm = trace(model, {"input_ids": tokens(*TRACED), **more})
    return gm, find_groups(gm)


def some(group: PruneGroup, n: int | None = None) -> Tensor:
    """Random units to keep: half of them by default."""
    return torch.randperm(group.size)[: max(n or group.size // 2, group.least)].sort().values


def prunable(groups: Groups) -> dict[str, PruneGroup]:
    """The groups that may be pruned."""
    return {n: g for n, g in groups.items() if g.prunable}


def error(gm: GraphModule, groups: Groups, keep: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> float:
    """What verify says of pruning down to the given units."""
    plan = PrunePlan.from_keep(groups, keep)
    report = verify(gm, rewrite(gm, plan), plan, inputs)
    assert report.outputs >= 1
    return report.max_rel_error


def sizes(groups: Groups) -> dict[str, list[int]]:
    """Sizes of the prunable groups by kind, sorted."""
    found: dict[str, list[int]] = {}
    for group in prunable(groups).values():
        found.setdefault(group.kind, []).append(group.size)
    return {kind: sorted(n) for kind, n in found.items()}


def logits_of(model: Any) -> Tensor:
    """Of the tokens on which a pruned network and its reference are compared."""
    with torch.no_grad():
        out: Tensor = model(input_ids=tokens(*RUN, seed=2)).logits
    return out


def assert_same_logits(small: nn.Module, stock: nn.Module, dense: nn.Module) -> None:
    """The pruned module does what the altered stock model does, and that is not what the dense one did."""
    expected = logits_of(stock)
    torch.testing.assert_close(logits_of(small), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (logits_of(dense) - expected).abs().max() > 1e-2 * expected.abs().max(), "the removed units did not matter: no test"


def rows_of(heads: Sequence[int], width: int = 8) -> list[int]:
    """The features of some heads."""
    return [h * width + i for h in heads for i in range(width)]


class KeptRMSNorm(nn.Module):
    """RMS norm whose mean square is taken over some units only; the others come out as zero."""

    def __init__(self, norm: Any, kept: Tensor) -> None:
        super().__init__()
        self.weight, self.eps, self.kept = norm.weight, norm.variance_epsilon, kept

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        y = x[..., self.kept]
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + self.eps) * self.weight[self.kept]
        return torch.zeros_like(x).index_copy(-1, self.kept, y)


class KeptLayerNorm(nn.Module):
    """Layer norm whose mean and variance are taken over some units only; the others come out as zero."""

    def __init__(self, norm: Any, kept: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.kept = norm.weight, norm.bias, norm.eps, kept

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        y = x[..., self.kept]
        y = y - y.mean(-1, keepdim=True)
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + self.eps) * self.weight[self.kept] + self.bias[self.kept]
        return torch.zeros_like(x).index_copy(-1, self.kept, y)


def replace_modules(root: nn.Module, old: type[nn.Module] | str, make: Callable[[nn.Module], nn.Module]) -> int:
    """Replace every submodule of a class; returns how many there were."""
    found = [(n, m) for n, m in root.named_modules() if type(m) is old or type(m).__name__ == old]
    for name, module in found:
        path, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(path), leaf, make(module))
    return len(found)
