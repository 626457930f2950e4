"""What any causal LM costs, pruned or not: parameters, their memory, multiply-accumulates per token as torch counts them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..calibration import vocabulary_of
from ..cost import Cost
from ..errors import UsageError
from ..mode import evaluating

ROWS, TOKENS = 2, 16


def measure_cost(model: nn.Module) -> Cost:
    """Count the parameters, and the products with weight matrices in one forward pass over 2 x 16 random tokens.

    The meaning is that of `fxprune.cost.costs`, which needs a traced graph and no weights: attention scores, which grow with the
    sequence, are not counted, and of routed experts only those that a token goes through.

    Args:
        model: Called with ``input_ids``; it is left as it was.

    Raises:
        UsageError: The model has no vocabulary.
    """
    vocabulary = vocabulary_of(model)
    if vocabulary is None:
        raise UsageError(f"an evaluation runs on token ids, and {type(model).__name__} has no vocabulary")
    parameters = list(model.parameters())
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    ids = torch.randint(0, vocabulary[0], (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)).to(parameters[0].device)
    counter = FlopCounterMode(display=False, custom_mapping=_formulas(weights))
    with evaluating(model), torch.no_grad(), counter:
        model(input_ids=ids)
    counted = counter.get_flop_counts().get("Global", {})
    flops = sum(n for operator, n in counted.items() if str(operator).split(".")[-1] in _PRODUCTS)
    return Cost(
        sum(p.numel() for p in parameters),
        sum(p.numel() * p.element_size() for p in parameters),
        round(flops / 2 / (ROWS * TOKENS)),
    )


_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "grouped_mm_fallback")


def _formulas(weights: set[int]) -> dict[Any, Any]:
    """Of batched products only those with a weight count: the others are attention. Torch knows no formula for grouped ones."""

    def batched(*operands: Any, out_val: Any = None, **_: Any) -> int:
        left, right = (t for t in operands[-2:] if isinstance(t, Tensor))
        if not {left.untyped_storage().data_ptr(), right.untyped_storage().data_ptr()} & weights:
            return 0
        return 2 * math.prod(left.shape) * int(right.shape[-1])

    def grouped(left: Tensor, right: Tensor, *_: Any, out_val: Any = None, **__: Any) -> int:
        return 2 * math.prod(left.shape) * int(right.shape[-1])  # each row of [rows, in] meets one matrix of [experts, in, out]

    for formula in (batched, grouped):
        setattr(formula, "_get_raw", True)  # noqa: B010 - what torch's register_flop_formula sets: tensors instead of shapes
    aten, found = torch.ops.aten, {}
    for library, names, formula in (
        (aten, ("bmm", "baddbmm"), batched),
        (aten, ("_grouped_mm",), grouped),
        (getattr(torch.ops, "transformers", None), ("grouped_mm_fallback",), grouped),
    ):
        found.update({getattr(library, name): formula for name in names if hasattr(library, name)})
    return found
