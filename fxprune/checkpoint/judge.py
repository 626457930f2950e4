"""Whether an eager model computes what the rewritten graph does: on inputs, with a mask, with a KV cache, and beyond rounding."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..mode import evaluating, in_double, quiet
from ..passes.batches import logits_of
from ..passes.verify import IN_DOUBLE, TOLERANCES, in_float64, relative_error, widened

log = logging.getLogger("fxprune")


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a module with a mapping of keyword arguments, a tuple, or one tensor."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def padded(model: nn.Module, inputs: Any) -> Any:
    """The inputs with a mask that hides the last token, None if the model takes no such inputs.

    Attention may take another path with a mask, one that reads other attributes (`repeat_kv` in place of ``enable_gqa``).
    """
    if not isinstance(inputs, Mapping) or set(inputs) != {"input_ids"}:
        return None
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, -1] = 0
    masked = {**inputs, "attention_mask": mask}
    try:
        with quiet(model), torch.no_grad():
            call(model, masked)
    except Exception:  # noqa: BLE001 - then nobody can ask it of the pruned model
        return None
    return masked


def last_by_cache(model: nn.Module, inputs: Any) -> Tensor | None:
    """Logits ``[samples, vocabulary]`` of the last token, with a KV cache of those before it; None if the model keeps none."""
    if not isinstance(inputs, Mapping) or set(inputs) != {"input_ids"} or not hasattr(model, "config"):
        return None
    ids = inputs["input_ids"]
    with evaluating(model), torch.no_grad():
        past = getattr(model(input_ids=ids[:, :-1], use_cache=True), "past_key_values", None)
        return None if past is None else logits_of(model(input_ids=ids[:, -1:], past_key_values=past, use_cache=True))[:, -1]


def caches(model: nn.Module, inputs: Any, tolerance: float) -> bool:
    """Whether a model puts out with a KV cache what it does without."""
    try:
        found = last_by_cache(model, inputs)
        if found is None:
            return False
        with quiet(model), torch.no_grad():
            return relative_error(logits_of(call(model, inputs))[:, -1], found) <= tolerance
    except Exception:  # noqa: BLE001 - then nobody can ask it of the pruned model
        return False


def judge(
    reference: Any,
    inputs: Any,
    tolerance: float,
    masked: Any = None,
    *,
    cached: bool = False,
    exact: GraphModule | None = None,
) -> Callable[[nn.Module], str | None]:
    """A judge of candidates: runs one on the inputs and compares its outputs with the reference's.

    Args:
        reference: Outputs of the rewritten graph on ``inputs``.
        inputs: A mapping of keyword arguments, a tuple, or one tensor.
        tolerance: Largest relative error.
        masked: Inputs that it must be able to run on besides, or None; see `padded`.
        cached: It must predict the last token with a KV cache too; see `caches`.
        exact: The rewritten graph. Where the outputs differ by more than rounding in float32 would explain, but not by more than
            ``tolerance`` (in bfloat16 that is loose), both are compared again in float64, if there is memory for it.
    """

    def same(model: nn.Module) -> str | None:
        allowed = tolerance
        try:
            with quiet(model), torch.no_grad():
                error = relative_error(reference, call(model, inputs))
                if masked is not None and error <= tolerance:
                    call(model, masked)
            if exact is not None and TOLERANCES[torch.float32] < error <= tolerance:
                again = _error_in_double(exact, model, inputs)
                error, allowed = (error, allowed) if again is None else (again, IN_DOUBLE)
            if cached and error <= allowed:
                found = last_by_cache(model, inputs)
                off = math.inf if found is None else relative_error(logits_of(reference)[:, -1], found)
                if not off <= tolerance:
                    return f"relative error {off:.1e} with a KV cache"
        except Exception as problem:  # noqa: BLE001 - a candidate that cannot run is simply not the one
            return f"{type(problem).__name__}: {str(problem).splitlines()[0][:200] if str(problem) else ''}"
        return None if error <= allowed else f"relative error {error:.1e}"

    return same


def _error_in_double(exact: GraphModule, model: nn.Module, inputs: Any) -> float | None:
    """The relative error in float64; None if that cannot be had.

    Where the graph casts to 16 bits (the model's dtype, written out) it casts to float64. Buffers that a class computes anew
    (rotary frequencies) and that differ from the graph's by rounding only are taken from there.
    """
    doubled, wide = torch.utils._pytree.tree_map(in_float64, inputs), widened(exact, (torch.bfloat16, torch.float16))
    precision, known = torch.finfo(next(model.parameters()).dtype).eps, dict(wide.named_buffers())
    try:
        with in_double(wide, model), quiet(model), torch.no_grad():
            for name, buffer in model.named_buffers():
                own = known.get(name)
                if own is not None and own.shape == buffer.shape and torch.allclose(buffer, own, rtol=precision, atol=0):
                    buffer.copy_(own)  # in_double puts back what was there
            return relative_error(call(wide, doubled), call(model, doubled))
    except Exception as problem:  # noqa: BLE001 - no memory for it, or an operator that insists on its dtype
        log.info("the comparison cannot be made again in float64: %s", problem)
        return None
