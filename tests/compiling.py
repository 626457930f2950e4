"""Small networks for the compiler tests, with a plan, the rewritten graph to compare with, and a backend."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from fxprune.backend import Backend, GraphRecord


class Feed(nn.Module):
    """A feed-forward block of width 10."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Up, activate, down."""
        return self.down(self.widen(x))

    def widen(self, x: Tensor) -> Tensor:
        """Up and activate."""
        return nn.functional.gelu(self.up(x))


class Block(Feed):
    """A residual feed-forward block."""

    def forward(self, x: Tensor) -> Tensor:
        """``x + f(x)``."""
        return x + super().forward(x)


class Stack(nn.Module):
    """Residual feed-forward blocks; a graph break before each if asked."""

    def __init__(self, count: int = 2, *, breaks: bool = False) -> None:
        super().__init__()
        self.blocks, self.breaks = nn.ModuleList(Block() for _ in range(count)), breaks

    def forward(self, x: Tensor) -> Tensor:
        """One block after the other."""
        for block in self.blocks:
            if self.breaks:
                torch._dynamo.graph_break()
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def untraced() -> Iterator[None]:
    """Without what torch writes for its trace viewer: pytest catches it all, which takes longer than compiling."""
    logger = logging.getLogger("torch.__trace")
    before, logger.disabled = logger.disabled, True
    yield
    logger.disabled = before


@dataclass
class Case:
    """A model, a plan for it and the module that the plan gives.

    Attributes:
        model: The dense one.
        plan: Made from a trace.
        small: The rewritten trace.
    """

    model: nn.Module
    plan: fxprune.PrunePlan
    small: GraphModule

    def compile(self, *, inner: Any = "eager", **options: Any) -> tuple[Any, list[GraphRecord]]:
        """The compiled model, and the list that its graphs are recorded in."""
        backend = Backend(self.plan, inner=inner)
        return torch.compile(self.model, backend=backend, **options), backend.graphs


def case(model: nn.Module, inputs: Any, kinds: Collection[str] = (), drop: Collection[str] = (), seed: int = 0) -> Case:
    """Prune random halves of every group (of some kinds)."""
    torch._dynamo.reset()
    gm = fxprune.trace(model.eval(), inputs)
    groups = fxprune.find_groups(gm)
    generator = torch.Generator().manual_seed(seed)
    keep = {
        g.name: torch.randperm(g.size, generator=generator)[: max(g.size // 2, g.least)]
        for g in groups.values()
        if g.prunable and (not kinds or g.kind in kinds)
    }
    plan = fxprune.PrunePlan.from_keep(groups, keep, drop=drop)
    return Case(model, plan, fxprune.rewrite(gm, plan))


def feeds(count: int = 2, *, breaks: bool = False) -> Case:
    """A seeded stack with every width halved."""
    torch.manual_seed(0)
    made = case(Stack(count), (torch.randn(3, 5, 6),), kinds=["ffn"])
    made.model.breaks = breaks  # type: ignore[assignment]
    return made
