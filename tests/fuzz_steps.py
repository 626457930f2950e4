"""Steps of random programs that compute: projections, joins, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .fuzz_draw import (
    Shape,
    along,
    broadcasts,
    divisors,
    flat,
    grids,
    heads_first,
    heads_last,
    joinable,
    last_static,
    pair,
    reuse,
    static,
    step,
    tensor,
)

WIDTHS = (4, 6, 8, 12, 16, 24)
_EPS = 1e-3


@step(
    tensor(last_static, raw=True, out=WIDTHS, bias=(True, False)),
    make=lambda x, out, bias: nn.Linear(x.shape[-1], out, bias),
    weight=4,
)
def linear(own: Any, x: Tensor, **_: Any) -> Tensor:
    return own(x)


@step(
    tensor(flat, raw=True, outs=[(n,) * k for n in WIDTHS for k in (2, 3)] + [(12, 6, 6), (16, 8, 8)], bias=(True, False)),
    make=lambda x, outs, bias: nn.ModuleList(nn.Linear(x.shape[-1], n, bias) for n in outs),
    weight=4,
)
def fan(own: Any, x: Tensor, **_: Any) -> tuple[Tensor, ...]:
    """Several projections of one input."""
    return tuple(layer(x) for layer in own)


@step(reuse(0), weight=4)
def again(own: Any, x: Tensor, **_: Any) -> Tensor:
    """A Linear used a second time."""
    return own(x)


@step(reuse(1), weight=4)
def tied(own: Any, x: Tensor, **_: Any) -> Tensor:
    """A Linear's weight used the other way round."""
    return x @ own.weight


@step(
    tensor(flat, out=WIDTHS, width=(1, 3), groups=(1, 2, 4, 0), bias=(True, False)),
    make=lambda x, out, width, groups, bias: _conv(x.shape[-1], out, width, groups, bias),
    weight=3,
)
def conv1d(own: Any, x: Tensor, **_: Any) -> Tensor:
    """Channels are turned to the front and back; groups of 0 mean depthwise."""
    return own(x.transpose(1, 2)).transpose(1, 2)


def _conv(channels: int, out: int, width: int, groups: int, bias: bool) -> nn.Module:
    if groups == 0:
        groups, out = channels, channels * (2 if out > channels else 1)
    groups = 1 if channels % groups or out % groups else groups
    return nn.Conv1d(channels, out, width, padding=width // 2, groups=groups, bias=bias)


_EQUATIONS = {
    3: ["bsf,gf->bsg", "bsf,fg->bsg", "...f,fg->...g"],
    4: ["bshd,hdg->bshg", "bshd,hd->bsh", "bshd,hdg->bsg", "bshd,dg->bshg"],
}


def _einsum_weight(x: Tensor, equation: str, out: int) -> nn.Module:
    left, right = equation.split("->")[0].split(",")
    sizes = dict(zip(left.replace("...", "bs"), x.shape, strict=True))
    return nn.ParameterDict({"weight": torch.empty([sizes.get(c, out) for c in right])})


@step(
    tensor(lambda s: flat(s) or heads_last(s), equation=lambda s: _EQUATIONS[len(s)], out=WIDTHS[:3]),
    make=_einsum_weight,
    weight=3,
)
def einsum(own: Any, x: Tensor, *, equation: str, **_: Any) -> Tensor:
    return torch.einsum(equation, x, own["weight"])


_PAIRS = {3: ["bsf,bsf->bs", "bsf,btf->bst", "bsf,bsg->bsfg"], 4: ["bshd,bthd->bhst", "bshd,bshe->bsde", "bshd,bsgd->bshg"]}


@step(pair(lambda a, b: a == b and (flat(a) or heads_last(a)), equation=lambda a, b: _PAIRS[len(a)]), weight=2, sums=True)
def einsum_pair(_: Any, a: Tensor, b: Tensor, *, equation: str) -> Tensor:
    return torch.einsum(equation, a, b)


_DERIVED: dict[str, Callable[[Any], Tensor]] = {
    "scaled": lambda own: own["a"] * own["scale"][:, None],
    "product": lambda own: own["b"] @ own["c"],
    "joined": lambda own: torch.cat((own["a"], own["d"])),
    "cut": lambda own: own["a"][: own["a"].shape[0] // 2],
    "normed": lambda own: own["a"] / (own["a"].norm(dim=1, keepdim=True) + _EPS),
    "softmax": lambda own: own["a"].softmax(-1),
    "shifted": lambda own: own["a"] + 0.5,
    "turned": lambda own: own["a"].t().reshape(own["a"].shape),
    "pairs": lambda own: own["a"].unflatten(0, (-1, 2)).flip(1).flatten(0, 1),
}


def _parameters(x: Tensor, form: str, out: int) -> nn.Module:
    width = x.shape[-1]
    shapes = {"a": (out, width), "scale": (out,), "b": (out, 5), "c": (5, width), "d": (out, width)}
    used = {"scaled": ("a", "scale"), "product": ("b", "c"), "joined": ("a", "d")}.get(form, ("a",))
    return nn.ParameterDict({name: torch.empty(shapes[name]) for name in used})


@step(tensor(last_static, form=list(_DERIVED), out=WIDTHS), make=_parameters, weight=3, leaks=True, sums=True)
def derived(own: Any, x: Tensor, *, form: str, **_: Any) -> Tensor:
    """A projection whose weight is computed from parameters."""
    return functional.linear(x, _DERIVED[form](own))


@step(
    tensor(lambda s: flat(s) or heads_first(s), experts=(3, 2), out=WIDTHS[:4], form=("matmul", "einsum")),
    make=lambda x, experts, out, form: nn.ParameterDict(
        {"weight": torch.empty(x.shape[1] if x.dim() == 4 else experts, x.shape[-1], out)}
    ),
)
def experts(own: Any, x: Tensor, *, form: str, **_: Any) -> Tensor:
    """A stack of weights; every head its own where there are heads."""
    x = x if x.dim() == 4 else x.unsqueeze(1)
    if form == "matmul":
        return x @ own["weight"]
    return torch.einsum("bhsd,hdf->bhsf", x, own["weight"])


@step(
    tensor(
        lambda s: flat(s) or heads_last(s), out=WIDTHS, bias=(True, False), over=lambda s: ("bs", "sh", "bsh")[: len(s) * 2 - 5]
    ),
    make=lambda x, out, bias, over: nn.Linear(x.shape[-1], out, bias),
    weight=3,
    leaks=True,
)
def rows(own: Any, x: Tensor, *, over: str, **_: Any) -> Tensor:
    """A Linear on merged dimensions, symbolic ones among them."""
    merged = x.flatten(1, 2) if over == "sh" else x.flatten(0, len(over) - 1)
    return own(merged).view(*x.shape[:-1], -1)


@step(tensor(last_static), make=lambda x: nn.ParameterDict({"weight": torch.empty(x.shape[-1])}))
def vector(own: Any, x: Tensor) -> Tensor:
    """A product with one vector, put back as a factor."""
    return x * (x @ own["weight"]).unsqueeze(-1)


@step(
    tensor(lambda s: flat(s) and len(divisors(s[2])) > 2, heads=lambda s: divisors(s[2])[1:-1], bias=(True, False)),
    make=lambda x, heads, bias: nn.MultiheadAttention(x.shape[-1], heads, bias=bias, batch_first=True),
)
def multihead(own: Any, x: Tensor, **_: Any) -> Tensor:
    """As torch writes it."""
    return own(x, x, x, need_weights=False)[0]


@step(
    tensor(heads_first, out=WIDTHS[:3], groups=(1, 2)),
    make=lambda x, out, groups: nn.Conv2d(x.shape[1], out, (3, 1), padding=(1, 0), groups=groups),
    weight=2,
)
def conv2d(own: Any, x: Tensor, **_: Any) -> Tensor:
    return own(x)


# ---------------------------------------------------------------------------------------------------------------------
# Copies and joins.


@step(tensor(lambda s: len(s) < 5, n=(2, 3), dim=(-1, -2)), leaks=True)
def expand(_: Any, x: Tensor, *, n: int, dim: int) -> Tensor:
    x = x.unsqueeze(dim)
    return x.expand(*(n if i == x.dim() + dim else -1 for i in range(x.dim())))


@step(along(n=(2, 3)), leaks=True)
def repeat_interleave(_: Any, x: Tensor, *, n: int, dim: int) -> Tensor:
    return x.repeat_interleave(n, dim)


@step(along(n=(2, 3)), leaks=True)
def tile(_: Any, x: Tensor, *, n: int, dim: int) -> Tensor:
    return x.repeat([n if i == dim % x.dim() else 1 for i in range(x.dim())])


@step(pair(lambda a, b: bool(joinable(a, b)), dim=joinable), weight=4)
def cat(_: Any, a: Tensor, b: Tensor, *, dim: int) -> Tensor:
    return torch.cat((a, b), dim)


@step(pair(lambda a, b: a == b, dim=(-1, -2, 2)))
def stack(_: Any, a: Tensor, b: Tensor, *, dim: int) -> Tensor:
    return torch.stack((a, b), dim)


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "gate": lambda a, b: functional.silu(a) * b,
    "sub": torch.sub,
    "where": lambda a, b: torch.where(a > 0, a, b),
    "maximum": torch.maximum,
}


@step(pair(broadcasts, op=list(_BINARY)), weight=5, leaks=True)
def join(_: Any, a: Tensor, b: Tensor, *, op: str) -> Tensor:
    return _BINARY[op](a, b)


@step(along(lambda n: n % 2 == 0), weight=3)
def glu(_: Any, x: Tensor, *, dim: int) -> Tensor:
    return functional.glu(x, dim)


def _weight_or_buffer(x: Tensor, shape: tuple[int, ...], op: str, buffer: bool) -> nn.Module:
    made = nn.Module()
    if buffer:
        made.register_buffer("weight", torch.empty(shape))
    else:
        made.register_parameter("weight", nn.Parameter(torch.empty(shape)))
    return made


@step(tensor(shape=grids, op=("add", "mul", "mask"), buffer=(False, False, True)), make=_weight_or_buffer, weight=6, leaks=True)
def weigh(own: Any, x: Tensor, *, op: str, **_: Any) -> Tensor:
    """A parameter or buffer of a broadcast shape added or multiplied."""
    return x.masked_fill(own.weight > 0, 0.2) if op == "mask" else _BINARY[op](x, own.weight)


_EVEN: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "neg": torch.neg,
    "square": lambda x: x.pow(2),
    "half": lambda x: x * 0.5,
}


@step(tensor(fn=list(_EVEN)), weight=4)
def apply(_: Any, x: Tensor, *, fn: str) -> Tensor:
    """A function that is zero at zero."""
    return _EVEN[fn](x)


_LIFTED: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "cos": torch.cos, "plus": lambda x: x + 0.7}


@step(tensor(fn=list(_LIFTED)), weight=2, leaks=True)
def lift(_: Any, x: Tensor, *, fn: str) -> Tensor:
    """A function that is not zero at zero."""
    return _LIFTED[fn](x)


_CONSTANTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "after": lambda x, dim: torch.cat((x, torch.zeros_like(x)), dim),
    "before": lambda x, dim: torch.cat((x.new_zeros(x.shape), x), dim),
    "add": lambda x, _: x + x.new_ones(x.shape[-1]),
    "numbers": lambda x, _: x * torch.arange(x.shape[-1]),
}


@step(along(form=list(_CONSTANTS)), weight=3, leaks=True)
def constant(_: Any, x: Tensor, *, dim: int, form: str) -> Tensor:
    """Joined with a tensor that the module makes."""
    return _CONSTANTS[form](x, dim)


def _write(y: Tensor, b: Tensor, form: str) -> None:
    n = y.shape[-1] // 2
    if form == "window":
        y[..., :n] = b[..., :n]
    elif form == "scale":
        y[..., n:] *= 0.3
    elif form == "one":
        y[..., 1] = b[..., 0]
    elif form == "view":
        y.unflatten(-1, (2, -1))[..., 0, :] *= 0.5
    elif form == "list":
        y[..., [0, -1]] = b[..., [1, 0]]
    else:
        y[b > 0] = 0.4


_WRITES = ("window", "scale", "one", "list", "mask", "view")


@step(
    pair(lambda a, b: a == b and last_static(a) and a[-1] > 1, form=lambda a, _: _WRITES[: 6 - a[-1] % 2]),
    weight=3,
    leaks=True,
)
def write(_: Any, a: Tensor, b: Tensor, *, form: str) -> Tensor:
    """Entries overwritten in place."""
    y = a.clone()
    _write(y, b, form)
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Attention.


def grouped(q: Shape, k: Shape) -> bool:
    """Queries of (batch, heads, sequence, width) and fewer key-value heads."""
    return heads_first(q) and heads_first(k) and q[1] % k[1] == 0 and q[3] == k[3]


PLAIN = ("matmul", "sdpa", "causal", "bmm", "einsum")
GROUPED = ("gqa", "expand", "interleave")
SHARED = (*GROUPED, "broadcast")


@step(pair(grouped, how=lambda q, k: PLAIN if q[1] == k[1] else SHARED if k[1] == 1 else GROUPED), weight=3, leaks=True, sums=True)
def attention(_: Any, q: Tensor, k: Tensor, *v: Tensor, how: str) -> Tensor:
    """Values are the keys unless a third tensor is given."""
    value = v[0] if v else k
    copies = q.shape[1] // k.shape[1]
    if how == "gqa":
        return functional.scaled_dot_product_attention(q, k, value, enable_gqa=True)
    if how == "expand":
        k, value = (x[:, :, None].expand(-1, -1, copies, -1, -1).reshape(x.shape[0], -1, *x.shape[2:]) for x in (k, value))
    elif how == "interleave":
        k, value = (x.repeat_interleave(copies, 1) for x in (k, value))
    if how in ("sdpa", "causal", "interleave"):
        return functional.scaled_dot_product_attention(q, k, value, is_causal=how == "causal")
    scale = q.shape[-1] ** -0.5
    if how == "bmm":
        batch, heads, length, _width = q.shape
        q, k, value = (x.reshape(batch * heads, length, x.shape[-1]) for x in (q, k, value))
        mixed = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * scale, -1), value)
        return mixed.view(batch, heads, length, mixed.shape[-1])
    scores = torch.einsum("bhsd,bhtd->bhst", q, k) if how == "einsum" else q @ k.transpose(-1, -2)
    return torch.softmax(scores * scale, -1) @ value


@step(pair(lambda a, b: len(a) == len(b) > 2 and a[:-2] == b[:-2] and a[-1] == b[-1]), sums=True)
def scores(_: Any, a: Tensor, b: Tensor) -> Tensor:
    return a @ b.transpose(-1, -2)


@step(pair(lambda a, b: len(a) == len(b) > 2 and a[:-2] == b[:-2] and a[-1] == b[-2]), weight=4, sums=True)
def matmul(_: Any, a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@step(tensor(dim=lambda s: [len(s) - 1, *static(s)]), leaks=True)
def softmax(_: Any, x: Tensor, *, dim: int) -> Tensor:
    return x.softmax(dim)


@step(along(lambda n: n % 2 == 0, last=True))
def rotate_half(_: Any, x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _angles(x: Tensor, **_: Any) -> nn.Module:
    made = nn.Module()
    for name in ("cos", "sin"):
        made.register_buffer(name, torch.empty(x.shape[-1] // 2))
    return made


@step(along(lambda n: n % 2 == 0, last=True, pairs=("halves", "neighbours", "complex")), make=_angles, weight=3)
def rope(own: Any, x: Tensor, *, pairs: str) -> Tensor:
    """Rotary positions of both layouts, and in complex numbers."""
    if pairs == "complex":
        turned = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2))) * torch.polar(own.cos, own.sin)
        return torch.view_as_real(turned).flatten(-2)
    if pairs == "halves":
        cos, sin = (torch.cat((t, t), -1) for t in (own.cos, own.sin))
        return x * cos + rotate_half(None, x) * sin
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * own.cos - b * own.sin, b * own.cos + a * own.sin), -1).flatten(-2)
