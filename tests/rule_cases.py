"""The table of operator cases that `test_rules` runs: at least one for every overload that has a rule.

A case is an operator with its arguments, tensors given as recipes (`Recipe`), so that one case can be drawn many times over:
with normal, all-negative and all-positive entries. `REFERENCES` holds, for operators whose rule marks an axis as normalised,
what they compute over the kept entries alone, written in numpy's masked arrays and nothing of fxprune.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

aten: Any = torch.ops.aten


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


INDEXING = [
    op(aten.select.int, t(4, 5), 0, 2),
    op(aten.select.int, t(4, 5, 6), -1, -2),
    op(aten.select_scatter.default, t(4, 5), t(4), 1, 2),
    op(aten.select_scatter.default, t(4, 5, 6), t(5, 6), 0, -1),
    op(aten.unbind.int, t(3, 4)),
    op(aten.unbind.int, t(4, 5, 2), -1),
    op(aten.index_select.default, t(5, 4), 0, ints(5, 3)),
    op(aten.index_select.default, t(5, 4, 3), -2, ints(4, 6)),
    op(aten.index_select.default, t(5, 4), 1, ints(4)),
    op(aten.index.Tensor, t(5, 4), [ints(5, 3)]),
    op(aten.index.Tensor, t(5, 4, 6), [None, ints(4, 2, 3)]),
    op(aten.index.Tensor, t(5, 4, 6), [ints(5, 3), ints(4, 3)]),
    op(aten.index.Tensor, t(5, 4, 6), [ints(5, 3), None, ints(6, 3)]),
    op(aten.index.Tensor, t(5, 4, 6, 2), [None, ints(4, 3, 1), ints(6, 2)]),
    op(aten.index.Tensor, t(5, 4, 6, 2), [None, ints(4, 3), None, ints(2, 3)]),
    op(aten.index.Tensor, t(5, 4), [ints(5)]),
    op(aten.index.Tensor, t(5, 4), [None, ints(4, 1)]),
    op(aten.index.Tensor, t(5, 4), [bools(5)]),
    op(aten.index.Tensor, t(5, 4, 3), [bools(5, 4)]),
    op(aten.index.Tensor, t(5, 4), [None, bools(4)]),
    op(aten.index.Tensor, t(3, 5, 4, 6), [None, bools(5, 4)]),
    op(aten.index.Tensor, t(5, 4), [bools(5), const(1)]),
    op(aten.index.Tensor, t(3, 8), [None, const(2, 3, 4)]),
    op(aten.index.Tensor, t(3, 8), [None, const(-3, -2, -1)]),
    op(aten.index.Tensor, t(3, 8), [None, const(*range(8))]),
    op(aten.index.Tensor, t(3, 8), [None, const(-2)]),
    op(aten.index.Tensor, t(8, 3), [const(0, 1, 2)]),
    op(aten.index.Tensor, t(3, 8), [None, const(0, 2, 4)]),
    op(aten.index.Tensor, t(3, 8), [None, const(6, 7, 0)]),
    op(aten.index.Tensor, t(3, 8), [None, const([0, 1], [2, 3])]),
    op(aten.index.Tensor, t(3, 8, 4), [None, const(1, 2), const(1, 2)]),
    op(aten.index.Tensor_hacked_twin, t(5, 4), [ints(5, 3)]),
    op(aten.index_put.default, t(5, 4), [const(0, 3)], t(2, 4)),
    op(aten.index_put.default, t(5, 4), [const(0, 3)], t(4), True),
    op(aten.index_put.default, t(5, 4), [None, const(1)], t(5, 1)),
    op(aten.index_put.default, t(5, 4, 6), [const(0, 3), None, const(1, 1)], t(2, 4), True),
    op(aten.index_put.default, t(5, 4, 6), [None, const(0, 3), const(1, 5)], t(5, 2)),
    op(aten.index_put.default, t(5, 4, 6), [None, const([0], [3]), const(1, 5)], t(5, 2, 2)),
    op(aten.index_put.default, t(5, 4), [bools(5, 4)], t()),
    op(aten.index_put.default, t(5, 4), [bools(5)], t(4)),
    op(aten.index_put.default, t(5, 4, 3), [bools(5)], t(1, 4, 1)),
    op(aten.index_put.default, t(3, 5, 4), [None, bools(5, 4)], t(3, 1)),
    op(aten.index_put.default, t(3, 5, 4), [None, const(True, False, True, True, False)], t(3, 3, 4)),
    op(aten.index_put.default, t(5, 4), [const(True, False, True, True, False), const(1)], t(3)),
    op(aten.index_put.hacked_twin, t(5, 4), [const(0, 3)], t(2, 4)),
    op(aten.gather.default, t(4, 5), 1, ints(5, 4, 3)),
    op(aten.gather.default, t(4, 5), 0, ints(4, 2, 5)),
    op(aten.gather.default, t(4, 5, 3), -2, ints(5, 4, 6, 3)),
    op(aten.gather.default, t(4, 5), 1, ints(5, 3, 2)),
    op(aten.gather.default, t(5), 0, ints(5, 3)),
    op(aten.scatter.value, t(4, 5), 1, ints(5, 4, 2), 7.0),
    op(aten.scatter.src, t(4, 5), 1, ints(5, 4, 2), t(4, 2)),
    op(aten.scatter.src, t(4, 5), 0, ints(4, 1, 5), t(3, 5)),
    op(aten.scatter.src, t(4, 5), 1, ints(5, 3, 2), t(4, 2)),
    op(aten.scatter.src, t(4, 5), -1, ints(5, 4, 2), t(6, 3)),
    op(aten.scatter.reduce, t(4, 5), 1, ints(5, 4, 3), t(4, 3), reduce="add"),
    op(aten.scatter.value_reduce, t(4, 5), 1, ints(5, 4, 3), 2.0, reduce="multiply"),
    op(aten.scatter_add.default, t(4, 5), 1, ints(5, 4, 3), t(4, 3)),
    op(aten.scatter_add.default, t(4, 5, 3), 0, ints(4, 6, 5, 3), t(6, 5, 3)),
    op(aten.scatter_reduce.two, t(4, 5), 1, ints(5, 4, 3), t(4, 3), "amax"),
    op(aten.scatter_reduce.two, t(4, 5), 1, ints(5, 4, 3), t(4, 3), "mean", include_self=False),
    op(aten.index_add.default, t(4, 5), 0, ints(4, 3), t(3, 5)),
    op(aten.index_add.default, t(4, 5, 3), -2, ints(5, 2), t(4, 2, 3), alpha=0.5),
    op(aten.index_copy.default, t(4, 5), 1, const(3, 1), t(4, 2)),
    op(aten.topk.default, t(4, 6), 2),
    op(aten.masked_scatter.default, t(2, 3, 4), const([[True], [False], [True]], [[True], [False], [False]]), t(5, 4)),
    op(aten.masked_scatter.default, t(3, 4), bools(3, 4), t(3, 4)),
    op(aten.linalg_norm.default, t(3, 4), None, [1], True),
    op(aten.linalg_norm.default, t(3, 4), None, [-2]),
    op(aten.linalg_norm.default, t(3, 4), 1, [1]),
    op(aten.linalg_norm.default, t(3, 4)),
    op(aten.linalg_norm.ord_str, t(3, 4), "fro", [0, 1]),
    op(aten.one_hot.default, ints(5, 4, 3), 6),
    op(aten.histc.default, Recipe((7,), "single"), 4, 0, 3),
    op(aten.topk.default, t(6, 4, 3), 3, 0, False),
    op(aten.sort.default, t(4, 5)),
    op(aten.sort.default, t(4, 5), 0, True),
    op(aten.sort.stable, t(4, 5), stable=True, dim=-2),
    op(aten.argsort.default, t(4, 5), 0),
    op(aten.argsort.stable, t(4, 5), stable=True, dim=1),
    op(aten.cumsum.default, t(4, 5), 1),
    op(aten.cumsum.default, t(4, 5, 3), -3),
    op(aten.cumsum.default, t(), 0),
    op(aten.cumprod.default, t(4, 5), 0),
    op(aten.logcumsumexp.default, t(4, 5), -1),
    op(aten.cummax.default, t(4, 5), 1),
    op(aten.cummin.default, t(4, 5), 0),
    op(aten.diff.default, t(4, 6)),
    op(aten.diff.default, t(6, 4), 2, 0),
    op(aten.diff.default, t(4, 6), 1, -1, t(4, 1)),
    op(aten.diff.default, t(6, 4), 1, 0, t(2, 4), t(1, 4)),
    op(aten.flip.default, t(4, 5), [1]),
    op(aten.flip.default, t(4, 5, 3), [0, -1]),
    op(aten.flip.default, t(4, 5), []),
    op(aten.roll.default, t(4, 5), [2], [0]),
    op(aten.roll.default, t(4, 5), [1, 2], [-1, 0]),
    op(aten.roll.default, t(4, 5), [3]),
    op(aten.triu.default, t(4, 5)),
    op(aten.triu.default, t(3, 4, 5), 1),
    op(aten.tril.default, t(4, 5), -1),
    op(aten.tril.default, t(2, 3, 5, 5)),
    op(aten.pad.default, t(4, 5), [1, 2]),
    op(aten.pad.default, t(3, 4, 5), [0, 0, 1, 1], "constant", 2.0),
    op(aten.pad.default, t(3, 4, 5), [2, 1], "reflect"),
    op(aten.pad.default, t(2, 3, 4, 5), [1, 1, 2, 0], "replicate"),
    op(aten.pad.default, t(2, 3, 4, 5), [0, 0, 1, 1], "circular"),
    op(aten.pad.default, t(4, 6), [-1, -2]),
    op(aten.constant_pad_nd.default, t(4, 5), [1, 0, 0, 2], 1.0),
    op(aten.constant_pad_nd.default, t(4, 5), [0, 0, 0, 0]),
]

CONTRACTIONS = [
    op(aten.linear.default, t(3, 4), t(5, 4)),
    op(aten.linear.default, t(4), t(5, 4), t(5)),
    op(aten.linear.default, t(2, 3, 4), t(5, 4), t(5)),
    op(aten.linear.default, t(2, 6, 3, 4), t(5, 4), t(5)),
    op(aten.linear.default, t(3, 4), t(4)),
    op(aten.linear.default, t(3, 4), t(1, 4), t(1)),
    op(aten.mm.default, t(3, 4), t(4, 5)),
    op(aten.mm.default, t(4, 4), t(4, 4)),
    op(aten.mv.default, t(3, 4), t(4)),
    op(aten.dot.default, t(6), t(6)),
    op(aten.matmul.default, t(3, 4), t(4, 5)),
    op(aten.matmul.default, t(4), t(4)),
    op(aten.matmul.default, t(4), t(4, 5)),
    op(aten.matmul.default, t(3, 4), t(4)),
    op(aten.matmul.default, t(2, 3, 4), t(4)),
    op(aten.matmul.default, t(4), t(2, 4, 5)),
    op(aten.matmul.default, t(2, 3, 4), t(4, 5)),
    op(aten.matmul.default, t(2, 3, 4), t(2, 4, 5)),
    op(aten.matmul.default, t(6, 1, 3, 4), t(2, 4, 5)),
    op(aten.matmul.default, t(3, 4), t(6, 2, 4, 5)),
    op(aten.bmm.default, t(6, 3, 4), t(6, 4, 5)),
    op(aten.inner.default, t(4), t(4)),
    op(aten.inner.default, t(3, 4), t(4)),
    op(aten.inner.default, t(3, 4), t(5, 4)),
    op(aten.inner.default, t(4, 4), t(4, 4)),
    op(aten.inner.default, t(2, 3, 4), t(5, 6, 4)),
    op(aten.inner.default, t(3, 4), t()),
    op(aten.addmm.default, t(5), t(3, 4), t(4, 5)),
    op(aten.addmm.default, t(3, 5), t(3, 4), t(4, 5), beta=0.5, alpha=2),
    op(aten.addmm.default, t(3, 1), t(3, 4), t(4, 5)),
    op(aten.addmm.default, t(), t(3, 4), t(4, 5)),
    op(aten.baddbmm.default, t(6, 3, 5), t(6, 3, 4), t(6, 4, 5)),
    op(aten.baddbmm.default, t(6, 1, 5), t(6, 3, 4), t(6, 4, 5), beta=0.5),
    op(aten.baddbmm.default, t(1, 3, 5), t(6, 3, 4), t(6, 4, 5)),
    op(aten.einsum.default, "ij,jk->ik", [t(3, 4), t(4, 5)]),
    op(aten.einsum.default, "bhqd,bhkd->bhqk", [t(2, 6, 3, 4), t(2, 6, 5, 4)]),
    op(aten.einsum.default, "i j , k -> k j", [t(3, 4), t(5)]),
    op(aten.einsum.default, "ij->ji", [t(3, 4)]),
    op(aten.einsum.default, "ij->", [t(3, 4)]),
    op(aten.einsum.default, "ij,ij->j", [t(3, 4), t(3, 4)]),
    op(aten.einsum.default, "a,b,c->bca", [t(3), t(4), t(5)]),
    op(aten.einsum.default, "ii->i", [t(4, 4)]),
    op(aten.einsum.default, "...ij,jk->...ik", [t(2, 3, 4), t(4, 5)]),
    op(aten.einsum.default, "...ij,...jk->...ik", [t(2, 1, 3, 4), t(6, 4, 5)]),
    op(aten.einsum.default, "i...,...->...i", [t(3, 2, 4), t(4)]),
    op(aten.einsum.default, "...a->a...", [t(3, 2, 4)]),
    op(aten.einsum.default, "ii->", [t(4, 4)]),
    op(aten.einsum.default, "iij,jk->ik", [t(4, 4, 3), t(3, 5)]),
    op(aten.einsum.default, "...cb,ab", [t(2, 3, 4), t(5, 4)]),
    op(aten.einsum.default, "ij,jk", [t(3, 4), t(4, 5)]),
    op(aten.einsum.default, "ij,jk->ik", [t(3, 1), t(4, 5)]),
    op(aten.embedding.default, t(9, 6), ints(9, 2, 5)),
    op(aten.embedding.default, t(9, 6), ints(9, 4), 3),
    op(aten.embedding.default, t(9, 6), ints(9)),
]

ATTENTION = [
    op(aten.scaled_dot_product_attention.default, t(2, 6, 3, 4), t(2, 6, 5, 4), t(2, 6, 5, 7)),
    op(aten.scaled_dot_product_attention.default, t(2, 6, 5, 4), t(2, 6, 5, 4), t(2, 6, 5, 4), None, 0.0, True),
    op(aten.scaled_dot_product_attention.default, t(2, 6, 3, 4), t(2, 6, 5, 4), t(2, 6, 5, 7), is_causal=True),
    op(aten.scaled_dot_product_attention.default, t(2, 6, 3, 4), t(2, 6, 5, 4), t(2, 6, 5, 4), t(2, 1, 3, 5)),
    op(aten.scaled_dot_product_attention.default, t(2, 6, 3, 4), t(2, 6, 5, 4), t(2, 6, 5, 4), t(1, 6, 3, 5)),
    op(aten.scaled_dot_product_attention.default, t(2, 6, 3, 4), t(2, 6, 5, 4), t(2, 6, 5, 4), t(2, 6, 1, 5), scale=0.3),
    op(aten.scaled_dot_product_attention.default, t(6, 3, 4), t(6, 5, 4), t(6, 5, 4)),
    op(aten.scaled_dot_product_attention.default, t(3, 4), t(5, 4), t(5, 7)),
    op(aten.scaled_dot_product_attention.default, t(2, 6, 3, 4), t(2, 2, 5, 4), t(2, 2, 5, 4), enable_gqa=True),
    op(aten.scaled_dot_product_attention.default, t(2, 8, 3, 4), t(2, 2, 5, 4), t(2, 2, 5, 6), t(2, 8, 3, 5), enable_gqa=True),
    op(aten.scaled_dot_product_attention.default, t(2, 6, 3, 4), t(2, 6, 5, 4), t(2, 6, 5, 4), enable_gqa=True),
    op(aten.scaled_dot_product_attention.default, t(2, 6, 3, 4), t(2, 1, 5, 4), t(2, 1, 5, 4), enable_gqa=True),
    op(aten.scaled_dot_product_attention.default, t(2, 8, 3, 4), t(2, 4, 5, 4), t(2, 2, 5, 4), enable_gqa=True),
    op(aten.scaled_dot_product_attention.default, t(2, 8, 3, 4), t(2, 2, 5, 4), t(2, 8, 5, 4), enable_gqa=True),
    op(aten.scaled_dot_product_attention.default, t(2, 6, 3, 4), t(1, 6, 5, 4), t(2, 1, 5, 4)),
]

CONVOLUTIONS = [
    op(aten.conv1d.default, t(2, 4, 9), t(6, 4, 3)),
    op(aten.conv1d.default, t(4, 9), t(6, 4, 3), t(6)),
    op(aten.conv1d.default, t(2, 6, 9), t(6, 1, 3), t(6), [1], [2], [1], 6),
    op(aten.conv1d.default, t(2, 6, 9), t(12, 1, 3), None, [1], [0], [1], 6),
    op(aten.conv1d.default, t(2, 6, 9), t(8, 3, 3), t(8), [2], [1], [2], 2),
    op(aten.conv1d.default, t(6, 9), t(3, 2, 1), t(3), [1], [0], [1], 3),
    op(aten.conv1d.padding, t(2, 4, 9), t(6, 4, 3), t(6), [1], "same"),
    op(aten.conv1d.padding, t(2, 4, 9), t(6, 2, 3), None, [1], "valid", [1], 2),
    op(aten.conv2d.default, t(2, 3, 7, 6), t(5, 3, 3, 2), t(5), [2, 1], [1, 0]),
    op(aten.conv2d.default, t(4, 7, 6), t(8, 2, 1, 1), t(8), [1, 1], [0, 0], [1, 1], 2),
    op(aten.conv2d.default, t(2, 4, 7, 6), t(4, 1, 3, 3), t(4), [1, 1], [1, 1], [1, 1], 4),
    op(aten.conv2d.padding, t(2, 3, 7, 6), t(5, 3, 3, 3), t(5), [1, 1], "same"),
    op(aten.conv3d.default, t(2, 3, 5, 4, 4), t(4, 3, 2, 2, 2), t(4)),
    op(aten.conv3d.padding, t(2, 4, 5, 4, 4), t(6, 2, 3, 3, 3), None, [1, 1, 1], "same", [1, 1, 1], 2),
    op(aten.convolution.default, t(2, 4, 9), t(6, 4, 3), t(6), [1], [0], [1], False, [0], 1),
    op(aten.convolution.default, t(2, 6, 7, 6), t(6, 3, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 2),
    op(aten.convolution.default, t(2, 4, 9), t(4, 6, 3), t(6), [1], [0], [1], True, [0], 1),
    op(aten.convolution.default, t(2, 4, 9), t(4, 3, 3), t(6), [2], [0], [1], True, [0], 2),
]

CREATION = [
    op(aten.zeros.default, [3, 4]),
    op(aten.ones.default, [4], dtype=torch.float64),
    op(aten.full.default, [2, 3, 4], 1.5),
    op(aten.full.default, [], 1.5),
    shape_only(aten.empty.memory_format, [3, 4]),
    op(aten.new_zeros.default, t(3, 4), [5, 2]),
    op(aten.new_ones.default, t(3, 4), [3]),
    op(aten.new_full.default, t(3), [3, 4], 2.0),
    shape_only(aten.new_empty.default, t(3), [3, 4]),
    op(aten.zeros_like.default, t(3, 4)),
    op(aten.ones_like.default, t(3, 4)),
    op(aten.full_like.default, t(3, 4), 2.0),
    shape_only(aten.empty_like.default, t(3, 4)),
    op(aten.arange.default, 5),
    op(aten.arange.start, 2, 7),
    op(aten.arange.start_step, 0, 10, 3),
    op(aten.linspace.default, 0.0, 1.0, 5),
    op(aten.linspace.Tensor_Tensor, t(), t(), 5),
    op(aten.linspace.Tensor_Scalar, t(), 1.0, 5),
    op(aten.linspace.Scalar_Tensor, 0.0, t(), 5),
    op(aten.eye.default, 4),
    op(aten.eye.m, 4, 3),
    op(aten.tril_indices.default, 3, 4),
    op(aten.triu_indices.default, 3, 4),
    op(aten.scalar_tensor.default, 2.0),
]

IDENTITIES = [
    op(aten.to.dtype, t(3, 4), torch.float32),
    op(aten.to.device, t(3, 4), torch.device("cpu"), torch.float32),
    op(aten.to.dtype_layout, t(3, 4), dtype=torch.float32),
    op(aten.to.other, t(3, 4), ints(5, 2, 6)),
    op(aten._to_copy.default, t(3, 4), dtype=torch.float32),
    op(aten.contiguous.default, t(2, 3, 4)),
    op(aten.contiguous.default, t(2, 3, 4, 5), memory_format=torch.channels_last),
    op(aten.clone.default, t(3, 4)),
    op(aten.alias.default, t(3, 4)),
    op(aten.detach.default, t(3, 4)),
    op(aten.lift_fresh_copy.default, t(3, 4)),
    op(aten.type_as.default, t(3, 4), ints(5, 2)),
    op(aten.fill.Scalar, t(3, 4), 2.0),
    op(aten.fill.Tensor, t(3, 4), t()),
    op(aten._conj.default, z(3, 4)),
    op(aten.resolve_conj.default, z(3, 4)),
    op(aten.resolve_neg.default, t(3, 4)),
    op(aten.copy.default, t(3, 4), t(3, 4)),
    op(aten.copy.default, t(3, 4), t(1, 4)),
    op(aten.copy.default, t(3, 4), t()),
    op(aten.glu.default, t(3, 8)),
    op(aten.glu.default, t(6, 3, 4), 0),
]

REDUCTIONS = [
    op(aten.sum.default, t(3, 4)),
    op(aten.sum.default, t()),
    op(aten.sum.dim_IntList, t(3, 4, 5), [1]),
    op(aten.sum.dim_IntList, t(3, 4, 5), [-1, 0], True),
    op(aten.sum.dim_IntList, t(3, 4), None),
    op(aten.sum.dim_IntList, t(3, 4), []),
    op(aten.sum.dim_IntList, t(3, 4), [0], dtype=torch.float32),
    op(aten.sum.dim_IntList, t(1, 4), [0]),
    op(aten.linalg_vector_norm.default, t(3, 4), 2, [-1], True),
    op(aten.linalg_vector_norm.default, t(3, 4)),
    op(aten.linalg_vector_norm.default, t(3, 4), 2.0, [0, 1]),
    op(aten.linalg_vector_norm.default, t(3, 4), 1, [1]),
    op(aten.linalg_vector_norm.default, t(3, 4), float("inf"), [1]),
    op(aten.linalg_vector_norm.default, t(3, 4), float("-inf"), [1]),
    op(aten.linalg_vector_norm.default, t(3, 4), 0, [1]),
    op(aten.norm.Scalar, t(3, 4)),
    op(aten.norm.Scalar, t(3, 4), 1),
    op(aten.norm.ScalarOpt_dim, t(3, 4), 2, [1], True),
    op(aten.norm.ScalarOpt_dim, t(3, 4), None, [0]),
    op(aten.norm.ScalarOpt_dim, t(3, 4), 3, [1]),
    op(aten.norm.ScalarOpt_dim_dtype, t(3, 4), 2, [1], False, dtype=torch.float64),
    op(aten.norm.ScalarOpt_dtype, t(3, 4), 2, dtype=torch.float64),
    op(aten.mean.default, t(3, 4)),
    op(aten.mean.dim, t(3, 4, 5), [1]),
    op(aten.mean.dim, t(3, 4, 5), [-1], True),
    op(aten.mean.dim, t(3, 4, 5), [0, 2], True),
    op(aten.mean.dim, t(3, 4), None),
    op(aten.var.default, t(3, 5)),
    op(aten.var.default, t(3, 5), False),
    op(aten.var.dim, t(3, 5), [1], False, True),
    op(aten.var.correction, t(6, 5), [0, 1], correction=0),
    op(aten.var.correction, t(3, 6), [-1]),
    op(aten.var.correction, t(3, 6), [1], correction=1, keepdim=True),
    op(aten.std.default, t(3, 5)),
    op(aten.std.dim, t(3, 5), [1], True),
    op(aten.std.correction, t(3, 5), [1], correction=0),
    op(aten.var_mean.default, t(3, 5)),
    op(aten.var_mean.dim, t(3, 5), [1], False, True),
    op(aten.var_mean.correction, t(3, 5, 2), [1], correction=0),
    op(aten.max.default, t(3, 4)),
    op(aten.max.other, t(3, 4), t(4)),
    op(aten.max.dim, t(3, 4), 1),
    op(aten.max.dim, t(3, 4), -2, True),
    op(aten.min.default, t(3, 4)),
    op(aten.min.other, t(3, 1), t(3, 4)),
    op(aten.min.dim, t(3, 4), 0),
    op(aten.amax.default, t(3, 4, 5), [1]),
    op(aten.amax.default, t(3, 4)),
    op(aten.amin.default, t(3, 4), [-1], True),
    op(aten.prod.default, t(3, 4)),
    op(aten.prod.dim_int, t(3, 4), 1, True),
    op(aten.any.default, bools(3, 4)),
    op(aten.any.dim, bools(3, 4), 1),
    op(aten.any.dims, bools(3, 4, 5), [0, -1], True),
    op(aten.any.dims, bools(3, 4), None),
    op(aten.any.dims, bools(3, 4), []),
    op(aten.all.default, bools(3, 4)),
    op(aten.all.dim, bools(3, 4), 0, True),
    op(aten.all.dims, bools(3, 4, 5), [1]),
    op(aten.argmax.default, t(3, 4)),
    op(aten.argmax.default, t(3, 4), None, True),
    op(aten.argmax.default, t(3, 4), 1),
    op(aten.argmin.default, t(3, 4), -2, True),
    op(aten.logsumexp.default, t(3, 4), [1]),
    op(aten.logsumexp.default, t(3, 4, 5), [0, 2], True),
]

NORMALISATIONS = [
    op(aten.softmax.int, t(3, 5), -1),
    op(aten.softmax.int, t(3, 5, 4), 1),
    op(aten.softmax.int, t(), 0),
    op(aten._softmax.default, t(3, 5), 0, False),
    op(aten.log_softmax.int, t(3, 5), 1),
    op(aten._log_softmax.default, t(2, 3, 5), -2, False),
    op(aten.layer_norm.default, t(3, 6), [6]),
    op(aten.layer_norm.default, t(2, 3, 6), [6], t(6), t(6)),
    op(aten.layer_norm.default, t(2, 3, 6), [3, 6], t(3, 6), t(3, 6), 1e-3),
    op(aten.layer_norm.default, t(3, 6), [6], None, t(6)),
    op(aten.native_layer_norm.default, t(2, 3, 6), [6], t(6), t(6), 1e-5),
    op(aten.native_layer_norm.default, t(2, 3, 6), [3, 6], None, None, 1e-5),
    op(aten.rms_norm.default, t(3, 6), [6]),
    op(aten.rms_norm.default, t(2, 3, 6), [6], t(6), 1e-6),
    op(aten.rms_norm.default, t(2, 3, 6), [3, 6], t(3, 6), 1e-6),
    op(aten._fused_rms_norm.default, t(2, 3, 6), [6], t(6), 1e-6),
    op(aten.group_norm.default, t(2, 12, 5), 3, t(12), t(12)),
    op(aten.group_norm.default, t(2, 12), 4),
    op(aten.group_norm.default, t(2, 12, 3, 2), 1, t(12)),
    op(aten.group_norm.default, t(2, 6, 4), 6, t(6), t(6)),
    op(aten.batch_norm.default, t(3, 4, 5), t(4), t(4), t(4), positive(4), False, 0.1, 1e-5, False),
    op(aten.batch_norm.default, t(3, 4), None, None, t(4), positive(4), False, 0.1, 1e-5, False),
    op(aten.batch_norm.default, t(3, 4, 5), t(4), t(4), None, None, True, 0.1, 1e-5, False),
    op(aten.batch_norm.default, t(3, 4, 2, 2), t(4), t(4), t(4), positive(4), True, 0.1, 1e-5, False),
    op(aten._native_batch_norm_legit_no_training.default, t(3, 4, 5), t(4), t(4), t(4), positive(4), 0.1, 1e-5),
]

POOLING = [
    op(aten.max_pool1d.default, t(2, 3, 8), [2]),
    op(aten.max_pool1d.default, t(3, 8), [3], [1], [1]),
    op(aten.max_pool2d.default, t(2, 3, 6, 6), [2, 2]),
    op(aten.max_pool2d.default, t(3, 6, 6), [3, 3], [2, 2], [1, 1]),
    op(aten.max_pool3d.default, t(2, 3, 4, 4, 4), [2, 2, 2]),
    op(aten.avg_pool1d.default, t(2, 3, 8), [2]),
    op(aten.avg_pool2d.default, t(2, 3, 6, 6), [2, 2], [2, 2], [1, 1], False, False),
    op(aten.avg_pool3d.default, t(2, 3, 4, 4, 4), [2, 2, 2]),
    op(aten.adaptive_avg_pool1d.default, t(2, 3, 8), [4]),
    op(aten.adaptive_avg_pool1d.default, t(3, 8), [1]),
    op(aten.adaptive_avg_pool2d.default, t(2, 3, 6, 6), [1, 1]),
    op(aten.adaptive_max_pool2d.default, t(2, 3, 6, 6), [3, 3]),
    op(aten.upsample_nearest2d.default, t(2, 3, 4, 4), [8, 6]),
    op(aten.upsample_nearest2d.vec, t(2, 3, 4, 4), None, [2.0, 2.0]),
    op(aten.upsample_bilinear2d.default, t(2, 3, 4, 4), [8, 6], False),
    op(aten.upsample_bilinear2d.vec, t(2, 3, 4, 4), [8, 6], True, None),
    op(aten.upsample_bicubic2d.default, t(2, 3, 4, 4), [8, 6], False),
    op(aten.upsample_bicubic2d.vec, t(2, 3, 4, 4), [8, 6], True, None),
]

VIEWS = [
    op(aten.view.default, t(3, 12), [3, 4, 3]),
    op(aten.view.default, t(3, 4, 5), [3, 20]),
    op(aten.view.default, t(3, 4, 5), [12, 5]),
    op(aten.view.default, t(4, 6), [3, 8]),
    op(aten.view.default, t(4, 6), [2, 12]),
    op(aten.view.default, t(6, 4), [4, 6]),
    op(aten.view.default, t(3, 12), [3, -1, 4]),
    op(aten.view.default, t(3, 12), [-1]),
    op(aten.view.default, t(3, 4), [1, 3, 1, 4, 1]),
    op(aten.view.default, t(1, 3, 1, 4), [3, 4]),
    op(aten.view.default, t(), [1, 1]),
    op(aten.view.default, t(1, 1), []),
    op(aten.view.default, t(0, 3), [3, 0]),
    op(aten.view.default, t(0, 4), [0, 2, 2]),
    op(aten.view.default, t(24), [2, 3, 4]),
    op(aten.view.default, t(2, 3, 4), [2, 3, 2, 2]),
    op(aten.view.default, t(6, 10), [2, 3, 5, 2]),
    op(aten.reshape.default, t(2, 3, 4), [6, 4]),
    op(aten.reshape.default, t(2, 12), [2, 2, -1]),
    op(aten._unsafe_view.default, t(2, 3, 4), [6, 4]),
    op(aten.flatten.using_ints, t(2, 3, 4), 1),
    op(aten.flatten.using_ints, t(2, 3, 4), 0, -2),
    op(aten.flatten.using_ints, t()),
    op(aten.ravel.default, t(2, 3)),
    op(aten.view_as.default, t(2, 12), t(2, 3, 4)),
    op(aten.view_as.default, t(2, 12), ints(5, 6, 4)),
    op(aten.reshape_as.default, t(2, 3, 4), t(6, 4)),
    op(aten.unflatten.int, t(2, 12), 1, [3, 4]),
    op(aten.unflatten.int, t(12, 2), -2, [-1, 4]),
    op(aten.unflatten.int, t(3, 12, 5), 1, [2, 3, 2]),
    op(aten.transpose.int, t(3, 4), 0, 1),
    op(aten.transpose.int, t(2, 3, 4, 5), -1, 1),
    op(aten.swapaxes.default, t(2, 3, 4), 0, -1),
    op(aten.swapdims.default, t(2, 3, 4), 1, 2),
    op(aten.t.default, t(3, 4)),
    op(aten.t.default, t(3)),
    op(aten.numpy_T.default, t(3, 4)),
    op(aten.numpy_T.default, t(2, 3, 4)),
    op(aten.numpy_T.a, t(2, 3, 4)),
    op(aten.mT.default, t(2, 3, 4)),
    op(aten.mT.a, t(2, 3, 4)),
    op(aten.adjoint.default, z(2, 3, 4)),
    op(aten.mH.default, z(2, 3, 4)),
    op(aten.mH.a, z(3, 4, 2)),
    op(aten.permute.default, t(2, 3, 4, 5), [0, 2, 1, 3]),
    op(aten.permute.default, t(2, 3, 4), [-1, 0, -2]),
    op(aten.permute.default, t(), []),
    op(aten.movedim.int, t(2, 3, 4, 5), 1, -1),
    op(aten.movedim.int, t(2, 3, 4, 5), -1, 0),
    op(aten.movedim.intlist, t(2, 3, 4, 5), [0, 1], [-1, 0]),
    op(aten.moveaxis.int, t(2, 3, 4), 0, 2),
    op(aten.moveaxis.intlist, t(2, 3, 4), [2, 0], [0, 1]),
    op(aten.unsqueeze.default, t(3, 4), 0),
    op(aten.unsqueeze.default, t(3, 4), -1),
    op(aten.unsqueeze.default, t(3, 4), -2),
    op(aten.unsqueeze.default, t(), 0),
    op(aten.squeeze.default, t(1, 3, 1, 4)),
    op(aten.squeeze.default, t(3, 4)),
    op(aten.squeeze.default, t(1, 1)),
    op(aten.squeeze.dim, t(3, 1, 4), 1),
    op(aten.squeeze.dim, t(3, 1, 4), -1),
    op(aten.squeeze.dims, t(1, 3, 1), [0, -1]),
    op(aten.squeeze.dims, t(1, 3, 4), [0, 1]),
    op(aten.squeeze.dim, t(), 0),
    op(aten.expand.default, t(1, 4), [3, 4]),
    op(aten.expand.default, t(4), [2, 3, 4]),
    op(aten.expand.default, t(3, 1, 4), [-1, 5, -1]),
    op(aten.expand.default, t(2, 1), [2, 1]),
    op(aten.expand.default, t(), [3]),
    op(aten.broadcast_to.default, t(3, 1), [2, 3, 4]),
    op(aten.expand_as.default, t(1, 4), t(3, 4)),
    op(aten.expand_as.default, t(4), t(2, 3, 4)),
    op(aten.expand_as.default, t(1), t(1, 1)),
    op(aten.repeat.default, t(3, 4), [1, 2]),
    op(aten.repeat.default, t(3, 4), [2, 3, 1]),
    op(aten.repeat.default, t(1, 4), [5, 1]),
    op(aten.repeat.default, t(), [3]),
    op(aten.repeat.default, t(3, 4), [2, 0]),
    op(aten.repeat_interleave.self_int, t(3, 4), 2, 1),
    op(aten.repeat_interleave.self_int, t(3, 4), 3, -2, output_size=9),
    op(aten.repeat_interleave.self_int, t(3, 1, 4), 3, 1),
    op(aten.repeat_interleave.self_int, t(3, 4), 2),
    op(aten.slice.Tensor, t(3, 8), 1, 2, 5),
    op(aten.slice.Tensor, t(3, 8), -1, 0, 3),
    op(aten.slice.Tensor, t(3, 8), 1, -3, 9223372036854775807),
    op(aten.slice.Tensor, t(3, 8), 1, None, -2),
    op(aten.slice.Tensor, t(3, 8), 1, -6, -2),
    op(aten.slice.Tensor, t(3, 8)),
    op(aten.slice.Tensor, t(3, 8), 1, 0, 8),
    op(aten.slice.Tensor, t(3, 8), 1, -8, 8),
    op(aten.slice.Tensor, t(3, 8), 1, 0, 100),
    op(aten.slice.Tensor, t(3, 8), 1, 4, 4),
    op(aten.slice.Tensor, t(3, 8), 1, 9, 12),
    op(aten.slice.Tensor, t(3, 8), 1, 5, 2),
    op(aten.slice.Tensor, t(8, 3), 0, 0, None, 2),
    op(aten.slice.Tensor, t(8, 3), 0, 1, 9223372036854775807, 2),
    op(aten.slice.Tensor, t(12, 3), 0, 2, 12, 4),
    op(aten.slice.Tensor, t(8, 3), 0, 2, None, 2),
    op(aten.slice.Tensor, t(8, 3), 0, 0, None, 3),
    op(aten.slice.Tensor, t(8, 3), 0, 0, 6, 2),
    op(aten.slice.Tensor, t(8, 3), 0, 0, None, 8),
    op(aten.slice_scatter.default, t(3, 8), t(3, 3), 1, 2, 5),
    op(aten.slice_scatter.default, t(3, 8), t(3, 3), -1, 0, 3),
    op(aten.slice_scatter.default, t(3, 8), t(3, 8), 1),
    op(aten.slice_scatter.default, t(8, 3), t(3, 3), 0, -3),
    op(aten.slice_scatter.default, t(8, 3), t(4, 3), 0, 1, None, 2),
    op(aten.slice_scatter.default, t(8, 3), t(3, 3), 0, 0, None, 3),
    op(aten.slice_scatter.default, t(3, 8), t(3, 0), 1, 4, 4),
    op(aten.narrow.default, t(3, 8), 1, 2, 3),
    op(aten.narrow.default, t(3, 8), -1, 0, 3),
    op(aten.narrow.default, t(8, 3), 0, -3, 3),
    op(aten.narrow.default, t(8, 3), 0, 0, 8),
    op(aten.narrow.default, t(8, 3), 0, 2, 0),
    op(aten.split.Tensor, t(3, 9), 3, 1),
    op(aten.split.Tensor, t(3, 8), 3, -1),
    op(aten.split.Tensor, t(8), 8),
    op(aten.split.sizes, t(3, 9), [2, 3, 4], 1),
    op(aten.split_with_sizes.default, t(9, 3), [4, 5], 0),
    op(aten.split_with_sizes.default, t(9, 3), [4, 0, 5], -2),
    op(aten.chunk.default, t(3, 8), 2, 1),
    op(aten.chunk.default, t(3, 7), 3, -1),
    op(aten.unsafe_split.Tensor, t(6, 3), 2),
    op(aten.tensor_split.sections, t(7, 3), 3),
    op(aten.tensor_split.sections, t(3, 2), 3, 1),
    op(aten.cat.default, [t(3, 4), t(3, 5)], 1),
    op(aten.cat.default, [t(3, 4), t(2, 4), t(1, 4)]),
    op(aten.cat.default, [t(3, 4), t(3, 4)], -1),
    op(aten.cat.default, [t(0), t(3, 4)], 1),
    op(aten.cat.default, [t(3, 0), t(3, 4)], 1),
    op(aten.cat.default, [t(3, 4)], 1),
    op(aten.concat.default, [t(3, 4), t(3, 5)], -1),
    op(aten.concatenate.default, [t(3, 4), t(2, 4)]),
    op(aten.stack.default, [t(3, 4), t(3, 4)]),
    op(aten.stack.default, [t(3, 4), t(3, 4), t(3, 4)], -1),
    op(aten.stack.default, [t(), t()], 0),
    op(aten.view_as_complex.default, t(3, 4, 2)),
    op(aten.view_as_real.default, z(3, 4)),
]

RANDOM_OFF = [
    op(aten.dropout.default, t(3, 4), 0.5, False),
    op(aten.feature_dropout.default, t(3, 4, 5), 0.5, False),
    op(aten.alpha_dropout.default, t(3, 4), 0.5, False),
    op(aten.native_dropout.default, t(3, 4), 0.5, False),
    shape_only(aten.dropout.default, t(3, 4), 0.5, True),
]

ELEMENTWISE = [
    op(aten.masked_fill.Scalar, t(3, 4), bools(3, 4), -1.0),
    op(aten.masked_fill.Tensor, t(2, 3, 4), bools(1, 4), t()),
    op(aten.where.self, bools(3, 1), t(3, 4), t(4)),
    op(aten.where.ScalarSelf, bools(3, 4), 1.0, t(3, 4)),
    op(aten.where.ScalarOther, bools(4), t(3, 4), 0.0),
    op(aten.where.Scalar, bools(3, 4), 1.0, 0.0),
    op(aten.__and__.Scalar, ints(9, 3, 4), 3),
    op(aten.__and__.Tensor, bools(3, 4), bools(4)),
    op(aten.__or__.Tensor, bools(3, 4), bools(3, 1)),
    op(aten.__or__.Scalar, ints(9, 3, 4), 3),
    op(aten.__xor__.Tensor, bools(3, 4), bools(3, 4)),
    op(aten.__xor__.Scalar, ints(9, 3, 4), 3),
    op(aten.relu6.default, t(3, 4)),
    op(aten.log_sigmoid.default, t(3, 4)),
    op(aten.hardswish.default, t(3, 4)),
    op(aten.selu.default, t(3, 4)),
    op(aten.isfinite.default, t(3, 4)),
    op(aten.square.default, t(3, 4)),
    op(aten.rsub.Tensor, t(3, 4), t(3, 1)),
    op(aten.rsub.Scalar, t(3, 4), 2.0),
    op(aten.true_divide.Tensor, t(3, 4), t(4)),
    op(aten.true_divide.Scalar, t(3, 4), 2.0),
    op(aten.floor_divide.default, t(3, 4), t(4)),
    op(aten.floor_divide.Scalar, t(3, 4), 2.0),
    op(aten.multiply.Tensor, t(3, 4), t(4)),
    op(aten.multiply.Scalar, t(3, 4), 2.0),
    op(aten.divide.Tensor, t(3, 4), t(4)),
    op(aten.divide.Scalar, t(3, 4), 2.0),
    op(aten.divide.Tensor_mode, t(3, 4), t(4), rounding_mode="floor"),
    op(aten.divide.Scalar_mode, t(3, 4), 2.0, rounding_mode="trunc"),
    op(aten.subtract.Tensor, t(3, 4), t(3, 1)),
    op(aten.subtract.Scalar, t(3, 4), 2.0),
    op(aten.absolute.default, t(3, 4)),
    op(aten.negative.default, t(3, 4)),
    *(op(getattr(aten, n).Tensor, t(3, 4), t(4)) for n in ("greater", "greater_equal", "less", "less_equal", "not_equal")),
    *(op(getattr(aten, n).Scalar, t(3, 4), 0.5) for n in ("greater", "greater_equal", "less", "less_equal", "not_equal")),
    op(aten.special_expit.default, t(3, 4)),
    op(aten.polar.default, t(3, 4), t(4)),
    op(aten.complex.default, t(3, 4), t(3, 1)),
    op(aten.real.default, z(3, 4)),
    op(aten.imag.default, z(3, 4)),
    op(aten.add.Tensor, t(2, 3, 4), t(3, 1)),
    op(aten.add.Tensor, t(), t()),
    op(aten.add.Tensor, t(1, 4), t(3, 1)),
    op(aten.mul.Tensor, t(2, 0, 4), t(4)),
    op(aten.clamp.Tensor, t(3, 4), t(4), None),
    op(aten.lerp.Tensor, t(3, 4), t(3, 4), t(3, 1)),
    op(aten.addcmul.default, t(4), t(3, 1), t(3, 4), value=2.0),
]

CASES: list[Case] = [
    *INDEXING,
    *CONTRACTIONS,
    *ATTENTION,
    *CONVOLUTIONS,
    *CREATION,
    *IDENTITIES,
    *REDUCTIONS,
    *NORMALISATIONS,
    *POOLING,
    *VIEWS,
    *RANDOM_OFF,
    *ELEMENTWISE,
]


def _elementwise_tagged() -> list[Case]:
    """A case for every functional aten overload that torch tags as pointwise: they share one rule.

    The names come from the dispatcher: ``dir(torch.ops.aten)`` holds only what has been used in this process.
    """
    made = []
    names = {n.removeprefix("aten::").partition(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")}
    for packet in (getattr(aten, name, None) for name in sorted(names)):
        for name in packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else []:
            target = getattr(packet, name)
            schema = target._schema
            tagged = torch.Tag.pointwise in target.tags and not schema.is_mutable
            if tagged and all("Tensor" in str(r.type) for r in schema.returns) and not any(a.is_out for a in schema.arguments):
                made.append(_elementwise(target))
    return made


_WHOLE = ("bitwise", "__", "gcd", "lcm", "shift")
_SCALARS = {"min": 0.1, "max": 0.8, "n": 2, "p": 1, "decimals": 1, "approximate": "none", "rounding_mode": "floor", "scale": 1.5}


def _elementwise(target: Any) -> Case:
    """Tensors of shapes (3, 4), (4,) and (3, 1) and a plain scalar for everything else that has no default."""
    shapes = [(3, 4), (4,), (3, 1)]
    whole = any(w in str(target) for w in _WHOLE)
    draw = positive if "polygamma" not in str(target) else t
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in target._schema.arguments:
        kind = str(argument.type)
        value: Any
        if "Tensor" in kind:
            shape = shapes.pop(0)
            value = bools(*shape) if argument.name in ("mask", "condition") else ints(5, *shape) if whole else draw(*shape)
        elif argument.has_default_value() and argument.name not in _SCALARS:
            continue
        else:
            value = _SCALARS.get(argument.name, 2)
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return Case(target, tuple(args), kwargs)


CASES += _elementwise_tagged()

# ---------------------------------------------------------------------------------------------------------------------
# What normalising operators compute over the kept entries alone. Arrays come by schema name; ``keep`` gives, for a tensor
# argument, one boolean vector a dimension.

Arguments = dict[str, Any]
Keep = dict[str, list[Any]]


def _kept_only(arguments: Arguments, keep: Keep, name: str) -> Any:
    """The named array with every removed entry masked out."""
    array = arguments[name]
    mask = np.ones(array.shape, dtype=bool)
    for dim, vector in enumerate(keep[name]):
        mask &= vector.reshape([-1 if i == dim else 1 for i in range(array.ndim)])
    return np.ma.array(array, mask=~mask)


def _over(x: Any, arguments: Arguments) -> dict[str, Any]:
    dim: Any = arguments.get("dim")
    everything = dim is None or dim == []
    axis = tuple(range(x.ndim)) if everything else (dim,) if isinstance(dim, int) else tuple(dim)
    return {"axis": axis, "keepdims": bool(arguments.get("keepdim"))}


def _plain(x: Any) -> Any:
    return np.ma.filled(x, 0.0)


def _mean(a: Arguments, keep: Keep) -> list[Any]:
    x = _kept_only(a, keep, "self")
    return [_plain(np.ma.mean(x, **_over(x, a)))]


def _variance(a: Arguments, keep: Keep) -> list[Any]:
    x = _kept_only(a, keep, "self")
    ddof = a["correction"] if a.get("correction") is not None else int(a.get("unbiased", True))
    return [np.ma.filled(np.ma.var(x, ddof=ddof, **_over(x, a)), np.nan)]  # no degree of freedom left: 0 / 0


def _deviation(a: Arguments, keep: Keep) -> list[Any]:
    return [np.sqrt(_variance(a, keep)[0])]


def _variance_and_mean(a: Arguments, keep: Keep) -> list[Any]:
    return [*_variance(a, keep), *_mean(a, keep)]


def _softmax(a: Arguments, keep: Keep) -> list[Any]:
    x = _kept_only(a, keep, "self")
    e = np.ma.exp(x)
    return [_plain(e / np.ma.sum(e, axis=a["dim"], keepdims=True))]


def _log_softmax(a: Arguments, keep: Keep) -> list[Any]:
    x = _kept_only(a, keep, "self")
    return [_plain(x - np.ma.log(np.ma.sum(np.ma.exp(x), axis=a["dim"], keepdims=True)))]


def _affine(x: Any, a: Arguments) -> Any:
    x = x if a.get("weight") is None else x * a["weight"]
    return x if a.get("bias") is None else x + a["bias"]


def _layer_norm(a: Arguments, keep: Keep) -> list[Any]:
    x = _kept_only(a, keep, "input")
    over: dict[str, Any] = {"axis": tuple(range(x.ndim - len(a["normalized_shape"]), x.ndim)), "keepdims": True}
    mean, scale = np.ma.mean(x, **over), 1 / np.ma.sqrt(np.ma.var(x, **over) + a["eps"])
    return [_plain(_affine((x - mean) * scale, a)), _plain(mean), _plain(scale)]


def _rms_norm(a: Arguments, keep: Keep) -> list[Any]:
    x = _kept_only(a, keep, "input")
    over: dict[str, Any] = {"axis": tuple(range(x.ndim - len(a["normalized_shape"]), x.ndim)), "keepdims": True}
    eps = np.finfo(x.dtype).eps if a["eps"] is None else a["eps"]
    scale = 1 / np.ma.sqrt(np.ma.mean(x**2, **over) + eps)
    return [_plain(_affine(x * scale, a)), _plain(scale)]


def _group_norm(a: Arguments, keep: Keep) -> list[Any]:
    x = _kept_only(a, keep, "input")
    grouped = x.reshape(x.shape[0], a["num_groups"], -1)
    mean, variance = np.ma.mean(grouped, axis=2, keepdims=True), np.ma.var(grouped, axis=2, keepdims=True)
    out = ((grouped - mean) / np.ma.sqrt(variance + a["eps"])).reshape(x.shape)
    shaped = {n: a[n].reshape(1, -1, *[1] * (x.ndim - 2)) for n in ("weight", "bias") if a.get(n) is not None}
    return [_plain(_affine(out, shaped))]


def _batch_norm(a: Arguments, keep: Keep) -> list[Any]:
    x = _kept_only(a, keep, "input")
    over: dict[str, Any] = {"axis": tuple(d for d in range(x.ndim) if d != 1), "keepdims": True}
    out = (x - np.ma.mean(x, **over)) / np.ma.sqrt(np.ma.var(x, **over) + a["eps"])
    shaped = {n: a[n].reshape(1, -1, *[1] * (x.ndim - 2)) for n in ("weight", "bias") if a.get(n) is not None}
    return [_plain(_affine(out, shaped))]


def _topk(a: Arguments, keep: Keep) -> list[Any]:
    x = _kept_only(a, keep, "self")
    order = np.argsort(-x.filled(-np.inf) if a["largest"] else x.filled(np.inf), axis=a["dim"], kind="stable")
    best = np.take(order, range(a["k"]), axis=a["dim"])
    return [np.take_along_axis(a["self"], best, a["dim"]), best]


def _argmax(a: Arguments, keep: Keep) -> list[Any]:
    return [np.argmax(_kept_only(a, keep, "self").filled(-np.inf), axis=a["dim"], keepdims=a["keepdim"])]


def _argmin(a: Arguments, keep: Keep) -> list[Any]:
    return [np.argmin(_kept_only(a, keep, "self").filled(np.inf), axis=a["dim"], keepdims=a["keepdim"])]


def _cumsum(a: Arguments, keep: Keep) -> list[Any]:
    return [np.cumsum(_kept_only(a, keep, "self").filled(0), axis=a["dim"])]


REFERENCES: dict[Any, Callable[[Arguments, Keep], list[Any]]] = {
    aten.mean: _mean,
    aten.var: _variance,
    aten.std: _deviation,
    aten.var_mean: _variance_and_mean,
    aten.softmax: _softmax,
    aten._softmax: _softmax,
    aten.log_softmax: _log_softmax,
    aten._log_softmax: _log_softmax,
    aten.layer_norm: _layer_norm,
    aten.native_layer_norm: _layer_norm,
    aten.rms_norm: _rms_norm,
    aten._fused_rms_norm: _rms_norm,
    aten.group_norm: _group_norm,
    aten.batch_norm: _batch_norm,
    aten.topk: _topk,
    aten.argmax: _argmax,
    aten.argmin: _argmin,
    aten.cumsum: _cumsum,
}
