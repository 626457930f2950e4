"""The table of operator cases that `test_rules` runs: at least one for every overload that has a rule."""

from __future__ import annotations

from typing import Any

import torch

from .rule_cases_arithmetic import ATTENTION, CONTRACTIONS, CONVOLUTIONS, NORMALISATIONS, POOLING, REDUCTIONS
from .rule_cases_layout import CREATION, IDENTITIES, INDEXING, VIEWS
from .rule_recipes import Case, bools, ints, op, positive, shape_only, t, z

aten: Any = torch.ops.aten

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
