"""Steps of random programs that rearrange, normalise, reduce, or ask for the position of an entry."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .fuzz_draw import (
    along,
    cuts,
    divisors,
    factorings,
    flat,
    heads_first,
    heads_last,
    last_static,
    pair,
    regroupings,
    static,
    step,
    symbolic,
    tensor,
)

_EPS = 1e-3


@step(along(n=(2, 3)), weight=4)
def chunk(_: Any, x: Tensor, *, n: int, dim: int) -> tuple[Tensor, ...]:
    return x.chunk(n, dim)


@step(along(sizes=cuts), weight=4)
def split(_: Any, x: Tensor, *, sizes: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
    return x.split(sizes, dim)


@step(along(lambda n: 1 < n < 5))
def unbind(_: Any, x: Tensor, *, dim: int) -> tuple[Tensor, ...]:
    return x.unbind(dim)


def _windows(n: int) -> list[tuple[int, int]]:
    forward = [(a, b) for a in range(n) for b in range(a + 1, n + 1) if b - a < n]
    return forward + [(a - n, b - n) for a, b in forward if b < n]


@step(along(last=True, window=_windows), weight=3)
def window(_: Any, x: Tensor, *, window: tuple[int, int]) -> Tensor:
    """Bounds may count from the end."""
    return x[..., window[0] : window[1]]


@step(along(last=True, by=((0, 2), (1, 2), (0, 3), (2, 3), (1, 1), (3, 2))))
def strided(_: Any, x: Tensor, *, by: tuple[int, int]) -> Tensor:
    return x[..., min(by[0], x.shape[-1] - 1) :: by[1]]


@step(along(lambda n: len(divisors(n)) > 2, sizes=lambda n: [f for f in factorings(n) if len(f) > 1]), weight=4)
def unflatten(_: Any, x: Tensor, *, sizes: tuple[int, ...], dim: int) -> Tensor:
    return x.unflatten(dim, sizes)


@step(tensor(lambda s: len(s) > 3 and {2, 3} <= set(static(s)), start=(2,), end=(-1, 3)), weight=4)
def flatten(_: Any, x: Tensor, *, start: int, end: int) -> Tensor:
    return x.flatten(start, end)


@step(tensor(lambda s: len(s) > 2 and static(s) == list(range(2, len(s))), sizes=regroupings, infer=(False, True)), weight=4)
def regroup(_: Any, x: Tensor, *, sizes: tuple[int, ...], infer: bool) -> Tensor:
    """A view of all static dimensions, whether their factors match or not."""
    return x.reshape(*x.shape[:2], *((-1, *sizes[1:]) if infer else sizes))


@step(tensor(lambda s: len(s) > 2, dims=lambda s: list(combinations(range(1, len(s)), 2))), weight=3)
def transpose(_: Any, x: Tensor, *, dims: tuple[int, int]) -> Tensor:
    return x.transpose(*dims)


@step(tensor(lambda s: len(s) > 3, dims=lambda s: [(0, *p) for p in permutations(range(1, len(s)))]))
def permute(_: Any, x: Tensor, *, dims: tuple[int, ...]) -> Tensor:
    return x.permute(dims)


@step(tensor(lambda s: len(s) < 5, dim=(-1, -2, 2)))
def unsqueeze(_: Any, x: Tensor, *, dim: int) -> Tensor:
    return x.unsqueeze(dim)


@step(along())
def squeeze(_: Any, x: Tensor, *, dim: int) -> Tensor:
    """Of a dimension that is larger than 1, too: that does nothing, also after pruning it down to 1."""
    return x.squeeze(dim)


@step(tensor(lambda s: len(static(s)) > 1 and s[-1] == s[-2], form=("einsum", "diagonal")), weight=4)
def diagonal(_: Any, x: Tensor, *, form: str) -> Tensor:
    return torch.einsum("...ii->...i", x) if form == "einsum" else x.diagonal(dim1=-2, dim2=-1)


@step(pair(lambda a, b: a != b and len(b) > 2 and a[:2] == b[:2] and math.prod(a) == math.prod(b)), weight=3)
def view_as(_: Any, a: Tensor, b: Tensor) -> Tensor:
    return a.reshape(b.shape) if not a.is_contiguous() else a.view_as(b)


@step(along(lambda n: n > 2, start=(1, 0, 2), length=(1, 2, 3)))
def narrow(_: Any, x: Tensor, *, dim: int, start: int, length: int) -> Tensor:
    return x.narrow(dim, start, length)


@step(tensor(lambda s: len(s) > 3, source=(1, 2, -1), target=(-1, 2, 1)), weight=4)
def movedim(_: Any, x: Tensor, *, source: int, target: int) -> Tensor:
    return x.movedim(source, target)


# ---------------------------------------------------------------------------------------------------------------------
# Norms and reductions.


@step(
    tensor(last_static, bias=(True, False), affine=(True, True, False), rank=lambda s: (1, 2) if heads_last(s) else (1,)),
    make=lambda x, bias, affine, rank=1: nn.LayerNorm(x.shape[-rank:], eps=_EPS, elementwise_affine=affine, bias=bias),
)
def layer_norm(own: Any, x: Tensor, **_: Any) -> Tensor:
    return own(x)


@step(tensor(last_static), make=lambda x: nn.ParameterDict({"weight": torch.empty(x.shape[-1])}), weight=3)
def rms_norm(own: Any, x: Tensor) -> Tensor:
    """Written by hand, as models do."""
    return own["weight"] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _EPS))


@step(
    tensor(lambda s: flat(s) or heads_first(s), groups=lambda s: divisors(s[2 if flat(s) else 1])),
    make=lambda x, groups: nn.GroupNorm(groups, x.shape[2 if x.dim() == 3 else 1], eps=_EPS),
)
def group_norm(own: Any, x: Tensor, **_: Any) -> Tensor:
    """Channels last of three dimensions, or heads of four."""
    return own(x) if x.dim() == 4 else own(x.transpose(1, 2)).transpose(1, 2)


@step(tensor(flat), make=lambda x: nn.BatchNorm1d(x.shape[-1]))
def batch_norm(own: Any, x: Tensor) -> Tensor:
    return own(x.transpose(1, 2)).transpose(1, 2)


@step(along(op=("sum", "mean", "amax", "var", "norm", "logsumexp", "prod", "std"), keepdim=(False, True)), weight=3, sums=True)
def reduce(_: Any, x: Tensor, *, op: str, dim: int, keepdim: bool) -> Tensor:
    if op in ("var", "std"):
        return getattr(x, op)(dim, correction=0, keepdim=keepdim)
    if op == "norm":
        return torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim)
    return getattr(x, op)(dim, keepdim=keepdim)


@step(tensor(lambda s: bool(symbolic(s)), dim=symbolic, keepdim=(True, False)))
def average(_: Any, x: Tensor, *, dim: int, keepdim: bool) -> Tensor:
    """The mean over a symbolic dimension."""
    return x.mean(dim, keepdim=keepdim)


@step(
    tensor(lambda s: len(static(s)) > 1, op=("sum", "mean", "var"), dims=lambda s: list(combinations(static(s), 2))),
    weight=3,
    sums=True,
)
def reduce_two(_: Any, x: Tensor, *, op: str, dims: tuple[int, int]) -> Tensor:
    return x.var(dims, correction=0, keepdim=True) if op == "var" else getattr(x, op)(dims, keepdim=True)


@step(along(), leaks=True, sums=True)
def spread(_: Any, x: Tensor, *, dim: int) -> Tensor:
    """Every entry gets the sum of all, so that none is zero."""
    return x + x.sum(dim, keepdim=True)


@step(along(form=("by hand", "normalize", "abs")), sums=True)
def unit(_: Any, x: Tensor, *, dim: int, form: str) -> Tensor:
    """Divided by its length."""
    if form == "normalize":
        return functional.normalize(x, dim=dim)
    return x / (x.norm(p=1 if form == "abs" else 2, dim=dim, keepdim=True) + _EPS)


# ---------------------------------------------------------------------------------------------------------------------
# Where the position of an entry matters.


@step(along(i=(0, -1, 1)), weight=3)
def select(_: Any, x: Tensor, *, dim: int, i: int) -> Tensor:
    return x.select(dim, i)


@step(along(lambda n: n > 2, last=True, entries=((0, 2), (1, 2), (2, 0, 1), (-1,))), leaks=True)
def take(_: Any, x: Tensor, *, entries: tuple[int, ...]) -> Tensor:
    """Entries by a list, whose own entries may go: units that no parameter makes."""
    return x[..., list(entries)]


@step(along(k=(1, 2)))
def gather(_: Any, x: Tensor, *, dim: int, k: int) -> Tensor:
    return x.gather(dim, x.argsort(dim).narrow(dim, 0, k))


@step(along(last=True, widths=((1, 0), (0, 2), (1, 1), (0, 0))))
def pad(_: Any, x: Tensor, *, widths: tuple[int, int]) -> Tensor:
    return functional.pad(x, widths)


@step(along())
def flip(_: Any, x: Tensor, *, dim: int) -> Tensor:
    return x.flip(dim)


@step(along(by=(1, -1)))
def roll(_: Any, x: Tensor, *, dim: int, by: int) -> Tensor:
    return x.roll(by, dim)


@step(along(), leaks=True, sums=True)
def cumsum(_: Any, x: Tensor, *, dim: int) -> Tensor:
    return x.cumsum(dim)


@step(along())
def scatter(_: Any, x: Tensor, *, dim: int) -> Tensor:
    return x.scatter(dim, x.argsort(dim), x)


@step(along())
def diff(_: Any, x: Tensor, *, dim: int) -> Tensor:
    return x.diff(dim=dim)
