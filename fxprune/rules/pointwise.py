"""Elementwise operators, those that hand their input on unchanged, and those that create tensors."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from ..spaces import Size, Space, mark, product, size_of
from .registry import Call, Spaces, Value, rule

aten: Any = torch.ops.aten

_LINEAR = {
    aten.add,
    aten.sub,
    aten.subtract,
    aten.rsub,
    aten.neg,
    aten.negative,
    aten.where,
    aten.masked_fill,
    aten.dropout,
    aten.feature_dropout,
    aten.alpha_dropout,
    aten.native_dropout,
    aten.div,
    aten.divide,
    aten.true_divide,
    aten.floor_divide,
    aten.pow,
    aten.square,
    aten.real,
    aten.imag,
}
"""What leaves a low-rank product a low-rank product, or only measures its size."""

_COUNTING = (torch.int64, torch.int32, torch.int16, torch.float64, torch.float32)
"""Types in which numbers of units stay what they are; a bool would tell unit 0 from the rest, a half would round."""


@rule(
    "pointwise",
    aten.masked_fill,
    aten.dropout,
    aten.feature_dropout,
    aten.alpha_dropout,
    aten.native_dropout,
    aten.where.self,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.where.Scalar,
    aten.__and__,
    aten.__or__,
    aten.__xor__,
    aten.relu6,
    aten.log_sigmoid,
    aten.hardswish,
    aten.selu,
    aten.isfinite,
    aten.square,
    aten.rsub,
    aten.true_divide,
    aten.floor_divide,
    aten.multiply,
    aten.divide,
    aten.subtract,
    aten.absolute,
    aten.negative,
    aten.greater,
    aten.greater_equal,
    aten.less,
    aten.less_equal,
    aten.not_equal,
    aten.special_expit,
    aten.polar,
    aten.complex,
    aten.real,
    aten.imag,
)
def pointwise(call: Call) -> Any:
    """Broadcast-unify every operand."""
    operands = list(call.tensors())
    out = call.broadcast(operands, call.shape)
    _tell(call, operands, out)
    return out if len(call.shapes) == 1 else [out for _ in call.shapes]


def _tell(call: Call, operands: list[Value], out: Spaces) -> None:
    """Mark the axes on which the layer between two matrices is not linear: by an activation, or one activation times another."""
    packet = getattr(call.node.target, "overloadpacket", None)
    if packet in _LINEAR:
        return
    factors = [x for x in operands if not x.weight] if packet in (aten.mul, aten.multiply) else []
    for i, space in enumerate(out):
        full = [x for x in factors if len(x) >= len(out) - i and size_of(x[i - len(out)]) == size_of(space)]
        if packet not in (aten.mul, aten.multiply) or len(full) > 1:
            mark(space, "activated")


@rule(
    aten.to,
    aten._to_copy,
    aten.contiguous,
    aten.clone,
    aten.alias,
    aten.detach,
    aten.lift_fresh_copy,
    aten.type_as,
    aten._conj,
    aten.resolve_conj,
    aten.resolve_neg,
    numbers="own",
)
def identity(call: Call) -> Spaces:
    """The first tensor's dimensions and entries pass; a second one only lends its dtype."""
    x = next(call.tensors())
    if call.node.meta["val"].dtype in _COUNTING:
        call.number(x.numbers)
        call.tally = x.tally
    else:
        call.escape(x)
    return x.dims


@rule(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.fill, numbers="own")
def alike(call: Call) -> Spaces:
    """A tensor of the first one's sizes; its entries do not matter."""
    x, *value = call.tensors()
    call.escape(*value)
    call.alike = getattr(call.node.target, "overloadpacket", None) is not aten.empty_like
    return x.dims


@rule(aten.copy)
def copy(call: Call) -> Spaces:
    """``src`` broadcast to the shape of ``self``."""
    return call.broadcast([call["self"], call["src"]], call.shape)


@rule(aten.glu)
def glu(call: Call) -> Spaces:
    """First half times the sigmoid of the second: the halves unify."""
    x, dim = call["self"], call["self"].axis(call["dim"])
    half = call.shape[dim]
    if not isinstance(half, int):
        return call.give_up("glu over a symbolic dimension")[0]
    first, second = call.split_concat(x[dim], [half, half])
    return [*x[:dim], call.unify(first, second), *x[dim + 1 :]]


@rule(
    aten.zeros,
    aten.ones,
    aten.full,
    aten.empty,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.new_empty,
    sizes="size",
    numbers="own",
)
def constant(call: Call) -> Spaces:
    """One value everywhere: any size will do, and of a symbolic one (batch times heads) the number in front of it."""
    return [_of_any_size(call, n) for n in call.shape]


def _of_any_size(call: Call, size: Size) -> Space:
    if isinstance(size, int):
        return call.fresh(size)
    number, symbols = sympy.sympify(size).as_coeff_Mul()
    whole = number.is_Integer and number > 0
    return product(call.fresh(symbols), call.fresh(number)) if whole else call.fresh(size)


@rule(aten.arange, aten.linspace, aten.eye, aten.tril_indices, aten.triu_indices, aten.scalar_tensor)
def numbered(call: Call) -> Spaces:
    """Entries that differ by position: the sizes stay."""
    return [call.fresh(n, pin="numbers positions") for n in call.shape]
