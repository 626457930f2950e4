"""How one call of an operator is written down: `Case`, with its tensors given as recipes (`Recipe`).

A recipe can be drawn many times over: with normal, all-negative and all-positive entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """How to draw one tensor argument.

    Attributes:
        shape: Its shape.
        kind: ``float``, ``positive``, ``complex``, ``single`` (whole numbers in float32), ``int`` (below ``high``) or ``bool``.
        high: Exclusive upper bound of an ``int`` tensor.
        constant: Not an input: these very entries, a constant of the graph.
    """

    shape: tuple[int, ...]
    kind: str = "float"
    high: int = 0
    constant: Tensor | None = field(default=None, compare=False)

    def draw(self, generator: torch.Generator, sign: str) -> Tensor:
        """A tensor; ``sign`` is ``normal``, ``negative`` or ``positive`` (for bools: mixed, mostly False, mostly True)."""
        if self.constant is not None:
            return self.constant.clone()
        if self.kind == "int":
            return torch.randint(0, self.high, self.shape, generator=generator)
        if self.kind == "single":
            return torch.randint(-4, 5, self.shape, generator=generator).float()
        if self.kind == "bool":
            return torch.rand(self.shape, generator=generator) < {"normal": 0.6, "negative": 0.1, "positive": 0.9}[sign]
        made = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "complex":
            return torch.complex(made, torch.randn(self.shape, generator=generator, dtype=torch.float64))
        if self.kind == "positive" or sign == "positive":
            return 0.2 + made.abs()
        return made if sign == "normal" else -0.2 - made.abs()

    def __repr__(self) -> str:
        name = "const" if self.constant is not None else self.kind
        return f"{name}{list(self.shape)}"


@dataclass(frozen=True)
class Case:
    """One operator call; ``values`` is False where the operator's entries are not determined (``empty``, dropout's mask)."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    values: bool = True

    def __str__(self) -> str:
        keywords = [f"{k}={v}" for k, v in self.kwargs.items()]
        return f"{self.target}({', '.join([*map(repr, self.args), *keywords])})"


def t(*shape: int) -> Recipe:
    """A float64 tensor."""
    return Recipe(shape)


def positive(*shape: int) -> Recipe:
    """A float64 tensor with positive entries, whatever the sign asked for (a variance)."""
    return Recipe(shape, "positive")


def z(*shape: int) -> Recipe:
    """A complex128 tensor."""
    return Recipe(shape, "complex")


def ints(high: int, *shape: int) -> Recipe:
    """An int64 tensor with entries below ``high``."""
    return Recipe(shape, "int", high)


def bools(*shape: int) -> Recipe:
    """A bool tensor."""
    return Recipe(shape, "bool")


def const(*entries: Any) -> Recipe:
    """A constant of the graph."""
    tensor = torch.tensor(entries)
    return Recipe(tuple(tensor.shape), "const", constant=tensor)


def op(target: Any, *args: Any, **kwargs: Any) -> Case:
    """A case."""
    return Case(target, args, kwargs)


def shape_only(target: Any, *args: Any, **kwargs: Any) -> Case:
    """A case of which only the output's shape is compared."""
    return Case(target, args, kwargs, values=False)
