"""Steps of random programs that take the best few of n and use their numbers: mixtures, look-ups, and uses that must pin them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .fuzz_draw import along, flat, step, tensor

Use = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Called with the step's module, its input, the logits, the weights of the best and their numbers."""


def _mixed(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows * weights.unsqueeze(-1)).sum(-2)


def _experts(own: Any, x: Tensor, _: Tensor, weights: Tensor, best: Tensor) -> Tensor:
    every = torch.einsum("bsd,ndw->bsnw", x, own["experts"])
    return _mixed(every.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, every.shape[-1])), weights)


def _biased(own: Any, _: Tensor, logits: Tensor, _weights: Tensor, _best: Tensor) -> Tensor:
    best = (logits + own["bias"]).topk(2, -1).indices
    return _mixed(own["table"][best], logits.gather(-1, best))


def _threshold(own: Any, _: Tensor, logits: Tensor, weights: Tensor, best: Tensor) -> Tensor:
    least = logits.gather(-1, best)[..., -1:]
    return logits.masked_fill(logits < least, float("-inf")).softmax(-1) @ own["table"] + weights.sum(-1, keepdim=True)


_USES: dict[str, Use] = {
    "index": lambda own, x, logits, w, best: _mixed(own["table"][best], w),
    "embedding": lambda own, x, logits, w, best: _mixed(functional.embedding(best, own["table"]), w),
    "one_hot": lambda own, x, logits, w, best: _mixed(functional.one_hot(best, logits.shape[-1]).to(x.dtype), w) @ own["table"],
    "scatter": lambda own, x, logits, w, best: torch.zeros_like(logits).scatter(-1, best, w) @ own["table"],
    "experts": _experts,
    "biased": _biased,
    "threshold": _threshold,
    "argmax": lambda own, x, logits, w, best: own["table"][logits.argmax(-1)],
    "smallest": lambda own, x, logits, w, best: _mixed(own["table"][logits.topk(1, -1, largest=False).indices], w[..., :1]),
    "two tables": lambda own, x, logits, w, best: _mixed(own["table"][best] * own["other"][best], w),
    "sorted": lambda own, x, logits, w, best: _mixed(own["table"][best.sort(-1).values], w),
    "flat": lambda own, x, logits, w, best: _mixed(own["table"][best.flatten()].view(*best.shape, -1), w),
    "twice": lambda own, x, logits, w, best: own["table"][torch.cat((best, best.flip(-1)), -1)].prod(-2),
    "selected": lambda own, x, logits, w, best: own["table"][best[..., 0]],
    "numbers": lambda own, x, logits, w, best: best.to(x.dtype) * w,
    "next": lambda own, x, logits, w, best: _mixed(own["table"][(best + 1) % logits.shape[-1]], w),
    "from the end": lambda own, x, logits, w, best: _mixed(own["table"][best - logits.shape[-1]], w),
    "half": lambda own, x, logits, w, best: _mixed(own["table"][best // 2], w),
    "compared": lambda own, x, logits, w, best: (best == 1).to(x.dtype) * w,
    "replaced": lambda own, x, logits, w, best: _mixed(own["table"][torch.where(best > 1, best, 0)], w),
    "larger table": lambda own, x, logits, w, best: _mixed(torch.cat((own["table"], own["other"]))[best], w),
    "wide one_hot": lambda own, x, logits, w, best: _mixed(functional.one_hot(best, logits.shape[-1] + 2).to(x.dtype), w),
    "parts": lambda own, x, logits, w, best: _mixed(torch.cat((own["table"], own["other"]))[best + logits.shape[-1]], w),
}
_OWN: dict[str, tuple[str, ...]] = {
    "experts": ("router", "experts"),
    "biased": ("router", "table", "bias"),
    **dict.fromkeys(("numbers", "compared", "wide one_hot"), ("router",)),
    **dict.fromkeys(("two tables", "larger table", "parts"), ("router", "table", "other")),
}


def _make(x: Tensor, n: int, use: str, k: int, out: int) -> nn.Module:
    width = x.shape[-1]
    shapes = {"router": (n, width), "table": (n, out), "other": (n, out), "experts": (n, width, out), "bias": (n,)}
    return nn.ParameterDict({name: torch.empty(shapes[name]) for name in _OWN.get(use, ("router", "table"))})


@step(tensor(flat, n=(4, 6, 3), k=(2, 1), out=(6, 8), use=list(_USES)), make=_make, weight=6, picks=True)
def route(own: Any, x: Tensor, *, k: int, use: str, **_: Any) -> Tensor:
    """A router of its own, so that no two logits are equal: which of equals a top-k takes is not defined."""
    logits = x @ own["router"].t()
    best = logits.topk(k, -1)
    return _USES[use](own, x, logits, best.values.softmax(-1), best.indices)


@step(along(k=(1, 2)), weight=3, picks=True)
def topk(_: Any, x: Tensor, *, dim: int, k: int) -> Tensor:
    return x.topk(k, dim).values
