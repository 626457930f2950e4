"""Reductions and normalisations.

A reduced dimension vanishes. Where the result depends on how many entries there are, or on entries that a zero mask does
not neutralise (mean, variance, softmax), the axis is marked ``"normalised"``: its dense reference takes statistics over the
kept units.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..spaces import mark, require, size_of
from .registry import Call, Resize, Spaces, rule

aten: Any = torch.ops.aten


def _reduced(call: Call) -> tuple[list[int], bool]:
    x = call["self"]
    dim = call.get("dim")
    whole = dim is None or dim == []
    dims = list(range(len(x))) if whole else [x.axis(d) for d in ([dim] if isinstance(dim, int) else dim)]
    return dims, bool(call.get("keepdim"))


def _collapse(call: Call) -> Spaces:
    dims, keepdim = _reduced(call)
    return [call.fresh(1) if i in dims else s for i, s in enumerate(call["self"]) if keepdim or i not in dims]


@rule(aten.sum, aten.linalg_vector_norm, aten.norm)
def total(call: Call) -> Any:
    """Sums: an entry that is zero does not count. Other norms than the 2-norm are pinned."""
    if call.get("ord", 2) not in (2, 2.0) or call.get("p", 2) not in (2, 2.0, None):
        return extreme(call)
    return _collapse(call)


@rule(aten.linalg_norm)
def norm(call: Call) -> Any:
    """The root of a sum of squares, of vectors or of whole matrices; any other norm is pinned."""
    vectors = isinstance(call.get("dim"), int) or len(call.get("dim") or ()) == 1
    return _collapse(call) if call["ord"] in (None, "fro") or (vectors and call["ord"] in (2, 2.0)) else extreme(call)


@rule(aten.mean)
def statistic(call: Call) -> Any:
    """Averages over an axis: marked normalised."""
    for d in _reduced(call)[0]:
        mark(call["self"][d], "normalised")
    out = _collapse(call)
    return out if len(call.shapes) == 1 else [out for _ in call.shapes]


@rule(aten.var, aten.std, aten.var_mean)
def variance(call: Call) -> Any:
    """The same; one entry more than its correction has to stay."""
    correction = call.get("correction")
    least = 1 + (int(bool(call.get("unbiased", True))) if correction is None else math.floor(correction))
    for d in _reduced(call)[0]:
        require(call["self"][d], least, f"the variance of fewer entries is not defined at {call.why}")
    return statistic(call)


@rule(aten.max, aten.min, aten.amax, aten.amin, aten.prod, aten.any, aten.all, aten.logsumexp)
def extreme(call: Call) -> Any:
    """Reductions that a removed entry may decide: pinned."""
    if call.get("other") is not None:
        return call.broadcast(list(call.tensors()), call.shape)
    for d in _reduced(call)[0]:
        call.pin(call["self"][d], "a removed entry could decide the result")
    out = _collapse(call)
    return out if len(call.shapes) == 1 else [out for _ in call.shapes]


@rule(aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax)
def softmax(call: Call) -> Spaces:
    """Dimensions pass; the normalised one is marked."""
    x = call["self"]
    if len(x):
        mark(x[call["dim"]], "normalised")
    return x.dims  # type: ignore[no-any-return]


@rule(aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten._fused_rms_norm)
def layer_norm(call: Call) -> Any:
    """The trailing dimensions unify with weight and bias and are marked normalised."""
    x, rank = call["input"], len(call["normalized_shape"])
    for space in x[-rank:]:
        mark(space, "normalised")
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            for mine, theirs in zip(x[-rank:], call[name], strict=True):
                call.unify(mine, theirs)
    out = x.dims
    kept_dims = [*x[:-rank], *([call.fresh(1)] * rank)]
    return out if len(call.shapes) == 1 else [out, *([kept_dims] * (len(call.shapes) - 1))]


@layer_norm.resize
def _layer_norm(call: Resize) -> dict[str, Any]:
    shape = call["normalized_shape"]
    spaces = call.inputs["input"][-len(shape) :]
    return {"normalized_shape": [call.size(n, space) for n, space in zip(shape, spaces, strict=True)]}


@rule(aten.group_norm)
def group_norm(call: Call) -> Spaces:
    """Channels are Product(groups, inner); statistics run over inner and all positions."""
    x, groups = call["input"], call["num_groups"]
    group, inner = call.split_product(x[1], [groups, size_of(x[1]) // groups])
    mark(inner, "normalised")
    call.notes["group"] = group
    for name in ("weight", "bias"):
        if call[name] is not None:
            call.unify(x[1], call[name][0])
    for space in x[2:]:
        call.pin(space, "statistics run over positions")
    return x.dims  # type: ignore[no-any-return]


@group_norm.resize
def _group_norm(call: Resize) -> dict[str, Any]:
    return {"num_groups": call.size(call["num_groups"], call.notes["group"])}


@rule(aten.batch_norm, aten._native_batch_norm_legit_no_training)
def batch_norm(call: Call) -> Any:
    """Channels pass; statistics are per channel and, in training, run over positions."""
    x = call["input"]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.get(name) is not None:
            call.unify(x[1], call[name][0])
    if call.get("training"):
        for space in (x[0], *x[2:]):
            mark(space, "normalised")
    extra = [[call.fresh(n, pin="statistics") for n in shape] for shape in call.shapes[1:]]
    return x.dims if not extra else [x.dims, *extra]


@rule(
    aten.max_pool1d,
    aten.max_pool2d,
    aten.max_pool3d,
    aten.avg_pool1d,
    aten.avg_pool2d,
    aten.avg_pool3d,
    aten.adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d,
    aten.adaptive_max_pool2d,
    aten.upsample_nearest2d,
    aten.upsample_bilinear2d,
    aten.upsample_bicubic2d,
)
def pooled(call: Call) -> Any:
    """Batch and channels pass; positions are pinned."""
    x = next(call.tensors())
    keep = len(x) - (1 if "1d" in str(call.node.target) else 3 if "3d" in str(call.node.target) else 2)
    for space in x[keep:]:
        call.pin(space, "positions of a pooling")
    outs = [[*x[:keep], *(call.fresh(n, pin="positions of a pooling") for n in s[keep:])] for s in call.shapes]
    return outs[0] if len(outs) == 1 else outs
