"""Every operator rule against real execution.

For each case of `rule_cases`: the spaces are inferred for a graph of that one operator, units of its axes are removed, the inputs
are sliced as their spaces say and the node is resized by its rule; what it then computes must be what the dense operator
computes (`rule_operator` says on which entries), sliced as the output's spaces say.

A rule is *wrong* if these differ, *missing* if it pins an axis though ignoring the pin would give the right result. Missing ones
are allowed one by one in `MISSING`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxprune.rules import registered, rule_for

from .rule_cases import CASES
from .rule_operator import SIGNS, mismatch, missing, one_op
from .rule_program import choices
from .rule_recipes import Case, Recipe, const, t

aten: Any = torch.ops.aten


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")
def test_a_pruned_operator_equals_the_dense_one(case: Case) -> None:
    wrong = []
    for seed, sign in enumerate(SIGNS):
        program = one_op(case, seed, sign)
        for choice in choices(program.free(), torch.Generator().manual_seed(seed)):
            found = mismatch(case, program, choice, through=all(map(program.passes_through, choice)))
            if found:
                axes = "; ".join(f"{program.describe(a)} keeps {u.tolist()} of {a.size}" for a, u in choice.items())
                wrong.append(f"{case} with {axes}: {found}")
    assert not wrong, "wrong rule:\n" + "\n".join(list(dict.fromkeys(wrong))[:8])


MISSING: dict[str, list[str]] = {
    "the verify pass has no reference for these reductions over kept units": [
        "aten.any.default(bool[3, 4]): arg0[0]",
        "aten.any.default(bool[3, 4]): arg0[1]",
        "aten.any.dim(bool[3, 4], 1): arg0[1]",
        "aten.any.dims(bool[3, 4, 5], [0, -1], True): arg0[0]",
        "aten.any.dims(bool[3, 4, 5], [0, -1], True): arg0[2]",
        "aten.any.dims(bool[3, 4], None): arg0[0]",
        "aten.any.dims(bool[3, 4], None): arg0[1]",
        "aten.linalg_norm.default(float[3, 4], 1, [1]): arg0[1]",
        "aten.linalg_vector_norm.default(float[3, 4], 0, [1]): arg0[1]",
        "aten.linalg_vector_norm.default(float[3, 4], 1, [1]): arg0[1]",
        "aten.linalg_vector_norm.default(float[3, 4], inf, [1]): arg0[1]",
        "aten.norm.Scalar(float[3, 4], 1): arg0[0]",
        "aten.norm.Scalar(float[3, 4], 1): arg0[1]",
        "aten.norm.ScalarOpt_dim(float[3, 4], 3, [1]): arg0[1]",
    ],
    "nobody writes these no-ops and mixtures": [
        "aten.any.dims(bool[3, 4], []): arg0[0]; out0[0]",
        "aten.any.dims(bool[3, 4], []): arg0[1]; out0[1]",
        "aten.flip.default(float[4, 5], []): arg0[0], out0[0]",
        "aten.flip.default(float[4, 5], []): arg0[1], out0[1]",
        (
            "aten.scaled_dot_product_attention.default(float[2, 8, 3, 4], float[2, 4, 5, 4], float[2, 2, 5, 4], enable_gqa=True): "
            "arg0[1], out0[1]"
        ),
        "aten.tril.default(float[2, 3, 5, 5]): arg0[2], out0[2]; arg0[3], out0[3]",
    ],
    "positions are not pruned": [
        "aten.conv1d.default(float[6, 9], float[3, 2, 1], float[3], [1], [0], [1], 3): arg0[1]; out0[1]",
        "aten.conv2d.default(float[4, 7, 6], float[8, 2, 1, 1], float[8], [1, 1], [0, 0], [1, 1], 2): arg0[1]; out0[1]",
        "aten.conv2d.default(float[4, 7, 6], float[8, 2, 1, 1], float[8], [1, 1], [0, 0], [1, 1], 2): arg0[2]; out0[2]",
        "aten.index_add.default(float[4, 5, 3], -2, int[2], float[4, 2, 3], alpha=0.5): arg1[0]; arg2[1]",
        "aten.index_add.default(float[4, 5], 0, int[3], float[3, 5]): arg1[0]; arg2[0]",
        "aten.scatter.reduce(float[4, 5], 1, int[4, 3], float[4, 3], reduce=add): arg1[1]; arg2[1]",
        "aten.scatter_add.default(float[4, 5, 3], 0, int[6, 5, 3], float[6, 5, 3]): arg1[0]; arg2[0]",
        "aten.scatter_add.default(float[4, 5], 1, int[4, 3], float[4, 3]): arg1[1]; arg2[1]",
    ],
    "transposed convolutions have no rule yet": [
        "aten.convolution.default(float[2, 4, 9], float[4, 3, 3], float[6], [2], [0], [1], True, [0], 2): arg0[0]; out0[0]",
        "aten.convolution.default(float[2, 4, 9], float[4, 6, 3], float[6], [1], [0], [1], True, [0], 1): arg0[0]; out0[0]",
        "aten.convolution.default(float[2, 4, 9], float[4, 6, 3], float[6], [1], [0], [1], True, [0], 1): arg0[1]; arg1[0]",
        (
            "aten.convolution.default(float[2, 4, 9], float[4, 6, 3], float[6], [1], [0], [1], True, [0], 1): "
            "arg1[1]; arg2[0]; out0[1]"
        ),
    ],
}
"""Rules known to pin more than they need, by the excuse."""


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")
def test_no_rule_pins_more_than_is_known() -> None:
    found = {key: reason for case in CASES for key, reason in missing(case).items()}
    known = {key for keys in MISSING.values() for key in keys}
    new = [f"{key} ({reason})" for key, reason in found.items() if key not in known]
    assert not new, "axes are pinned that could be pruned; give the rule more, or add to MISSING:\n" + "\n".join(new)
    gone = sorted(known - set(found))
    assert not gone, "these entries of MISSING are no longer missing; take them out:\n" + "\n".join(gone)


def _concrete_overloads(target: Any) -> list[Any]:
    """The overloads of a registered target that a traced graph can hold: functional, tensors out, not TorchScript's own."""
    packet = isinstance(target, torch._ops.OpOverloadPacket)
    overloads = [getattr(target, name) for name in target.overloads()] if packet else [target]
    return [
        o
        for o in overloads
        if any("Tensor" in str(r.type) for r in o._schema.returns)
        and not any(a.is_out for a in o._schema.arguments)
        and not any("Dimname" in str(a.type) or "Dict" in str(a.type) for a in o._schema.arguments)
        and not o._overloadname.startswith("prim_")
    ]


NOT_ON_CPU = {aten.mm.dtype, aten.bmm.dtype, aten.addmm.dtype, aten.baddbmm.dtype}
NOT_CALLABLE = {aten.einsum.sublist}
ALIGNED = {aten._grouped_mm.default}  # has a test of its own: its kernel wants rows of a multiple of 16 bytes


def test_every_registered_overload_has_a_case() -> None:
    covered = {case.target for case in CASES}
    own = [
        target for target, r in registered().items() if str(r.propagate.__module__).startswith("fxprune.")
    ]  # not the other tests'
    wanted = {o for target in own for o in _concrete_overloads(target)} - NOT_ON_CPU - NOT_CALLABLE - ALIGNED
    assert sorted(map(str, wanted - covered)) == []
    covered |= ALIGNED
    packets = {o if isinstance(o, torch._ops.OpOverloadPacket) else o.overloadpacket for o in own}
    assert sorted(map(str, packets - {o.overloadpacket for o in covered})) == []


def test_every_case_has_a_rule() -> None:
    assert [str(c) for c in CASES if rule_for(c.target) is None] == []


def test_grouped_mm_of_aligned_widths() -> None:
    ends = Recipe((3,), "const", constant=torch.tensor([2, 5, 8], dtype=torch.int32))
    case = Case(aten._grouped_mm.default, (Recipe((8, 16), "single"), Recipe((3, 16, 24), "single"), ends), {})
    program = one_op(case)
    inner, outer = program.free()
    assert (inner.size, outer.size) == (16, 24)
    for choice in ({inner: torch.arange(4, 12)}, {outer: torch.arange(1, 24, 2)}, {inner: torch.arange(8), outer: torch.arange(4)}):
        assert mismatch(case, program, choice, through=inner not in choice) == ""
    three = Case(aten._grouped_mm.default, (Recipe((3, 8, 16), "single"), Recipe((3, 16, 24), "single")), {})
    assert one_op(three).free() == [], "other forms are left alone"


def test_the_expert_matmul_that_transformers_defines() -> None:
    import transformers.integrations.moe  # noqa: F401 - registers the operator; the rule is there before it, by name

    case = Case(torch.ops.transformers.grouped_mm_fallback.default, (t(8, 4), t(3, 4, 5), const(2, 5, 8)), {})
    assert sorted(a.size for a in one_op(case).free()) == [4, 5]
    test_a_pruned_operator_equals_the_dense_one(case)
    assert missing(case) == {}
