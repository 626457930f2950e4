"""Patterns that models are full of, as runs of steps: attention of many layouts, gated feed-forwards, residual blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .fuzz_draw import Chooser, divisors, flat

if TYPE_CHECKING:
    from .fuzz import Builder

_HEADS = ((2, 4), (3, 4), (4, 2), (2, 6), (4, 4))
_PLAIN = ("matmul", "sdpa", "causal", "bmm", "einsum")
_GROUPED = ("gqa", "expand", "interleave")
_SHARED = (*_GROUPED, "broadcast")


def _stream(c: Chooser, b: Builder) -> int:
    """A (batch, sequence, features) tensor to work on."""
    return c.choice(b.pool.fitting(flat, raw=True))


def _turn(b: Builder, *tensors: int) -> list[int]:
    return [b.one("transpose", t, dims=(1, 2)) for t in tensors]


def _back(c: Chooser, b: Builder, mixed: int) -> None:
    (mixed,) = _turn(b, mixed)
    if c.choice((True, True, False)):
        out = b.one("flatten", mixed, start=2, end=-1)
        b.one("linear", out, out=c.choice((8, 6, 12)), bias=c.choice((True, False)))


def attention(c: Chooser, b: Builder) -> None:
    """Projections of one stream, heads, maybe norms or rotary positions, maybe grouped queries."""
    (heads, width), groups = c.choice(_HEADS), c.choice((1, 2, 3))
    out = heads * width
    bias = c.choice((True, False))
    x = _stream(c, b)
    q, k, v = b.add("fan", [x], outs=(out * groups, out, out), bias=bias)
    q = b.one("unflatten", q, dim=-1, sizes=(heads * groups, width))
    k, v = (b.one("unflatten", t, dim=2, sizes=(heads, width)) for t in (k, v))
    extra = c.choice(("", "rope", "rms_norm", "layer_norm", "weigh", "spread"))
    if extra == "rope" and width % 2 == 0:
        pairs = c.choice(("halves", "neighbours", "complex"))
        q, k = (b.one("rope", t, pairs=pairs) for t in (q, k))
    elif extra == "rms_norm":
        q, k = (b.one("rms_norm", t) for t in (q, k))
    elif extra == "layer_norm":
        q = b.one("layer_norm", q, bias=True, affine=True)
    elif extra == "spread":
        q, k = (b.one("spread", t, dim=-1) for t in (q, k))
    elif extra == "weigh":
        v = b.one("weigh", v, shape=c.choice(((heads, 1), (1, width), (heads, width), (width,))), op="mul", buffer=False)
    q, k, v = _turn(b, q, k, v)
    if groups == 1 and c.choice((False, False, True)):
        scores = b.one("scores", q, k)
        if c.choice((True, False)):
            scores = b.one("weigh", scores, shape=(heads, 1, 1), op=c.choice(("mul", "add")), buffer=c.choice((False, True)))
        mixed = b.one("matmul", b.one("softmax", scores, dim=3), v)
    else:
        how: tuple[str, ...] = ("matmul", "bmm", "einsum") if groups == 1 else ("expand",)
        if extra != "spread":  # what verify cannot check: see the corpus
            how = _PLAIN if groups == 1 else _GROUPED
        mixed = b.one("attention", q, k, v, how=c.choice(how))
    _back(c, b, mixed)


def fused_attention(c: Chooser, b: Builder) -> None:
    """One projection taken apart: by chunk, split, slices or unbind of the layouts (3, h, d), (h, 3, d) and (h, d, 3)."""
    heads, width = c.choice(_HEADS)
    x, out = _stream(c, b), heads * width
    layout = c.choice(("chunk", "split", "window", "3hd", "h3d", "hd3", "h(3d)"))
    kv = 1 if layout == "split" and c.choice((True, False)) else heads
    fused = b.one("linear", x, out=out + 2 * kv * width, bias=c.choice((True, False)))
    if layout in ("3hd", "h3d", "hd3"):
        grid = {"3hd": (3, heads, width), "h3d": (heads, 3, width), "hd3": (heads, width, 3)}[layout]
        grid_ = b.one("regroup", fused, sizes=grid, infer=c.choice((False, True)))
        q, k, v = b.add("unbind", [grid_], dim=2 + layout.index("3"))
    elif layout == "h(3d)":
        grid_ = b.one("regroup", fused, sizes=(heads, 3 * width), infer=False)
        q, k, v = b.add("chunk", [grid_], n=3, dim=-1)
    else:
        if layout == "chunk":
            q, k, v = b.add("chunk", [fused], n=3, dim=-1)
        elif layout == "split":
            q, k, v = b.add("split", [fused], sizes=(out, kv * width, kv * width), dim=-1)
        else:
            q, k, v = (b.one("window", fused, window=(i * out, (i + 1) * out)) for i in range(3))
        q = b.one("unflatten", q, dim=-1, sizes=(heads, width))
        k, v = (b.one("unflatten", t, dim=-1, sizes=(kv, width)) for t in (k, v))
    q, k, v = _turn(b, q, k, v)
    _back(c, b, b.one("attention", q, k, v, how=c.choice(_PLAIN if kv == heads else _SHARED)))


def feed_forward(c: Chooser, b: Builder) -> None:
    """Gated or plain, with a residual where it fits."""
    x, width = _stream(c, b), c.choice((8, 12, 16))
    form = c.choice(("gate", "fused", "glu", "plain", "interleaved"))
    if form == "gate":
        inner = b.one("join", *b.add("fan", [x], outs=(width, width), bias=c.choice((True, False))), op="gate")
    elif form == "plain":
        inner = b.one("apply", b.one("linear", x, out=width, bias=True), fn=c.choice(("gelu", "relu", "square")))
    else:
        fused = b.one("linear", x, out=2 * width, bias=c.choice((True, False)))
        if form == "glu":
            inner = b.one("glu", fused, dim=-1)
        elif form == "fused":
            inner = b.one("join", *b.add("chunk", [fused], n=2, dim=-1), op="gate")
        else:
            halves = [b.one("strided", fused, by=(i, 2)) for i in (0, 1)]
            inner = b.one("join", *halves, op="gate")
    out = b.one("linear", inner, out=b.shape(x)[-1], bias=c.choice((True, False)))
    if c.choice((True, False)):
        b.one("join", x, out, op="add")


def embed_and_norm(c: Chooser, b: Builder) -> None:
    """A stream of its own width, normalised."""
    x = b.one("linear", _stream(c, b), out=c.choice((8, 12, 6)), bias=c.choice((True, False)))
    if c.choice((True, False)):
        b.one("rms_norm", x)
    else:
        b.one("layer_norm", x, bias=c.choice((True, False)), affine=True)


def shuffle(c: Chooser, b: Builder) -> None:
    """A stream joined with itself in another order: channels shuffled, or two pieces that trade places."""
    x = b.one("linear", _stream(c, b), out=c.choice((12, 8, 16, 6)), bias=c.choice((True, False)))
    n = b.shape(x)[-1]
    if c.choice((True, False)):
        grid = b.one("regroup", x, sizes=(c.choice(divisors(n)[1:-1]), -1), infer=False)
        turned = b.one("flatten", b.one("transpose", grid, dims=(2, 3)), start=2, end=-1)
    else:
        k = c.choice(range(1, n))
        first, second = b.add("split", [x], sizes=(k, n - k), dim=-1)
        turned = b.one("cat", second, first, dim=-1)
    b.one("join", x, turned, op=c.choice(("mul", "add", "gate")))


PATTERNS: tuple[Callable[[Chooser, Builder], None], ...] = (feed_forward, embed_and_norm, attention, fused_attention, shuffle)
