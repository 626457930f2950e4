"""What normalising operators compute over the kept entries alone, in numpy's masked arrays and nothing of fxprune.

Arrays come by schema name; ``keep`` gives, for a tensor argument, one boolean vector a dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

aten: Any = torch.ops.aten
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
