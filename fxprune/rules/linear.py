"""Contractions: linear, the matmul family, einsum, attention, embedding and convolution.

Contracted dimensions unify, batch dimensions broadcast-unify, free dimensions pass. Marks tell what an axis is for:
``"heads"`` and ``"head_dim"`` where two activations are contracted, ``"experts"`` where a batch dimension runs over weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..spaces import Space, mark, product, size_of
from .registry import Call, Resize, Spaces, Value, rule

aten: Any = torch.ops.aten


@rule(aten.linear)
def linear(call: Call) -> Spaces:
    """``x[.., i] W[o, i]^T + b[o]``."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    call.unify(x[-1], weight[-1])
    if len(weight) == 1:
        return x[:-1]  # type: ignore[no-any-return]
    if bias is not None:
        _add_bias(call, bias, [weight[0]])
    return [*x[:-1], weight[0]]


@rule(aten.mm, aten.mv, aten.dot, aten.matmul, aten.bmm)
def matmul(call: Call) -> Spaces:
    """``a[.., n, k] b[.., k, m]``, with the one-dimensional cases of ``torch.matmul``."""
    a, b = list(call.tensors())
    return _contract(call, a, b)


@rule(aten.inner)
def inner(call: Call) -> Spaces:
    """``a[.., k] b[.., k]``: the last dimensions contract, all others pass."""
    a, b = list(call.tensors())
    if len(a) and len(b):
        call.unify(a[-1], b[-1])
    return [*a[:-1], *b[:-1]] if len(a) and len(b) else [*a, *b]


@rule(aten.addmm, aten.baddbmm)
def addmm(call: Call) -> Spaces:
    """``c + a b`` with ``c`` broadcast."""
    c, a, b = list(call.tensors())
    out = _contract(call, a, b)
    _add_bias(call, c, out)
    return out


def _add_bias(call: Call, bias: Value, out: Sequence[Space]) -> None:
    for theirs, ours in zip(reversed(bias.dims), reversed(out), strict=False):
        if size_of(theirs) == size_of(ours):
            call.unify(theirs, ours)
        elif size_of(theirs) != 1:
            call.pin(theirs, "broadcasts to a size that cannot be followed")


def _contract(call: Call, a: Value, b: Value) -> Spaces:
    call.unify(a[-1], b[-2] if len(b) > 1 else b[-1])
    batch_rank = max(len(a), len(b)) - 2
    batch = call.broadcast([a[:-2], b[:-2]], call.shape[:batch_rank]) if batch_rank > 0 else []
    rows = [a[-2]] if len(a) > 1 else []
    columns = [b[-1]] if len(b) > 1 else []
    _tell(a, b, batch, [a[-1], *rows, *columns])
    return [*batch, *rows, *columns]


def _tell(a: Value, b: Value, batch: Sequence[Space], inner: Sequence[Space]) -> None:
    """Mark what the axes of a batched contraction are for; a product of two activations is attention."""
    if not a.weight and not b.weight:
        for space in batch:
            mark(space, "heads")
        for space in inner:
            mark(space, "head_dim")
    elif a.weight != b.weight:
        for space in batch:
            mark(space, "experts")


@rule(aten._grouped_mm, "transformers::grouped_mm_fallback")
def grouped_mm(call: Call) -> Spaces:
    """Rows ``x[s, k]``, sorted by expert, each times its expert's ``w[e, k, n]``; ``offs[e]`` says where an expert's rows end."""
    x, weight, *more = list(call.tensors())
    if len(x) != 2 or len(weight) != 3 or len(more) != 1:
        return call.give_up("a grouped matmul of another form")[0]
    (ends,) = more
    call.unify(x[1], weight[1])
    call.unify(weight[0], ends[0])
    if ends.tally != "ends":
        call.pin(weight[0], "rows are assigned to experts by number")
    call.pin(x[0], "rows are assigned to experts by number")
    mark(weight[0], "experts")
    for space in (x[1], weight[2]):
        mark(space, "aligned")
    return [x[0], weight[2]]


@rule(aten.scaled_dot_product_attention)
def attention(call: Call) -> Spaces:
    """Attention of q[.., l, e], k[.., s, e], v[.., s, f]; with ``enable_gqa`` the query heads are Product(kv, group)."""
    q, k, v, bias = call["query"], call["key"], call["value"], call["attn_mask"]
    call.unify(q[-1], k[-1])
    call.unify(k[-2], v[-2])
    call.pin(k[-2], "a softmax runs over the keys")
    if call["is_causal"]:
        call.pin(q[-2], "positions are compared by number")
    keys, values = k[:-2], v[:-2]
    if call.get("enable_gqa") and size_of(q[-3]) != size_of(k[-3]):
        group = call.fresh(size_of(q[-3]) // size_of(k[-3]), mark="expanded")
        keys, values = ([*x[:-3], product(x[-3], group)] for x in (k, v))
    batch = call.broadcast([q[:-2], keys, values], call.shape[:-2])
    out = [*batch, q[-2], v[-1]]
    if bias is not None:
        _add_bias(call, bias, [*batch, q[-2], k[-2]])
    _tell(q, k, batch, [q[-1], v[-1]])
    return out


@attention.resize
def _attention(call: Resize) -> dict[str, Any]:
    width = call.inputs["query"][-1]
    if call["scale"] is None and call.kept(width) != size_of(width):
        return {"scale": size_of(width) ** -0.5}  # the dense model's scale, not one of the new width
    return {}


@rule(aten.einsum)
def einsum(call: Call) -> Spaces:
    """Same letter, same space (a repeated one is a diagonal); letters that do not reach the output are contracted."""
    operands: list[Value] = call["tensors"]
    terms, output = _letters(call["equation"].replace(" ", ""), [len(x) for x in operands])
    columns: dict[str, list[Space]] = {}
    for term, operand in zip(terms, operands, strict=True):
        for letter, space in zip(term, operand, strict=True):
            columns.setdefault(letter, []).append(space)
    table: dict[str, Space] = {}
    for letter, column in columns.items():
        size = next((size_of(s) for s in column if size_of(s) != 1), 1)
        table[letter] = call.broadcast([[s] for s in column], [size])[0]
    if len(operands) == 2:
        shared = set(terms[0]) & set(terms[1])
        batch = [table[c] for c in output if c in shared]
        inner = [table[c] for c in table if c not in shared or c not in output]
        _tell(operands[0], operands[1], batch, inner)
    return [table[c] for c in output]


def _letters(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """A letter for every dimension of every operand, and of the output; an ellipsis becomes ``.0``, ``.1``, from the right."""
    left, arrow, right = equation.partition("->")
    written = left.split(",")
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(written, ranks, strict=True)]

    def spell(term: str, n: int) -> list[str]:
        before, dots, after = term.partition("...")
        return [*before, *(f".{i}" for i in reversed(range(n if dots else 0))), *after]

    terms = [spell(term, n) for term, n in zip(written, hidden, strict=True)]
    if arrow:
        return terms, spell(right, max(hidden))
    letters = [c for term in terms for c in term]  # no arrow: the ellipsis, then what occurs once, in alphabetical order
    return terms, [*spell("...", max(hidden)), *sorted(c for c in set(letters) if letters.count(c) == 1 and c[0] != ".")]


@rule(aten.embedding, numbers="own")
def embedding(call: Call) -> Spaces:
    """Rows are looked up by number (pinned); the columns pass."""
    weight, indices = call["weight"], call["indices"]
    call.look_up(weight[0], indices, "rows are looked up by number")
    if isinstance(weight.tensor, torch.nn.Parameter):
        mark(weight[1], "embedding")
    return [*indices, weight[1]]


@embedding.resize
def _embedding(call: Resize) -> dict[str, Any]:
    rows = call.inputs["weight"][0]
    return {} if call.kept(rows) == size_of(rows) else {"padding_idx": -1}  # the row that it names may be another now


@rule(aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution)
def convolution(call: Call) -> Spaces:
    """Channels of a grouped convolution: in = Product(g, i), out = Product(g, o), weight[g*o, i, ..]."""
    x, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"]
    if call.get("transposed"):
        return call.give_up("a transposed convolution")[0]
    channel = len(x) - (len(weight) - 2) - 1
    for space in (*weight[2:], *x[channel + 1 :]):
        call.pin(space, "positions of a convolution")
    if groups == 1:
        call.unify(x[channel], weight[1])
    else:
        group, inner = call.split_product(x[channel], [groups, size_of(x[channel]) // groups])
        call.unify(inner, weight[1])
        call.unify(weight[0], product(group, call.fresh(size_of(weight[0]) // groups)))
        call.notes["group"] = group
    if bias is not None:
        call.unify(weight[0], bias[0])
    for space in (x[channel], weight[0]):
        mark(space, "channels")
    positions = [call.fresh(n, pin="positions of a convolution") for n in call.shape[channel + 1 :]]
    return [*x[:channel], weight[0], *positions]


@convolution.resize
def _convolution(call: Resize) -> dict[str, Any]:
    return {} if call["groups"] == 1 else {"groups": call.size(call["groups"], call.notes["group"])}
