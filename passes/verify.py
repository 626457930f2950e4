"""The verify pass: the pruned module against the masked dense graph, computed in a different way.

The reference (`fxprune.passes.reference`) runs the *dense* graph with the removed units' parameter slices at zero, and statistics
over the kept units.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.node import map_aggregate
from torch.fx.passes.infra.pass_base import PassResult

from ..errors import UsageError, VerificationError
from ..mode import in_double
from ..plan import PrunePlan
from .base import Pass
from .dependency import PLAN, groups_of
from .reference import Reference, wide_of
from .rewrite import DENSE

log = logging.getLogger("fxprune")

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest relative error that rounding explains, by dtype."""

IN_DOUBLE = 1e-6
"""The same for a network that amplifies rounding, compared in float64; some operators of it may still compute in float32."""


IN_16_BITS = 1 << 28
"""What 16 bits hide is looked for in float64 in models of up to so many parameters, the dense one's and the pruned one's: 2 GiB."""


@dataclass(frozen=True)
class VerifyReport:
    """What verification measured.

    Attributes:
        max_rel_error: ``max |pruned - reference| / max |reference|``, the largest of all outputs; of integers the share of entries
            that differ. In float64 if there is a ``rounding``.
        tolerance: What was allowed.
        reference: What it was compared with, in words.
        outputs: Number of output tensors compared.
        seconds: Time taken.
        rounding: The error in the model's own precision, where the comparison was made again in float64: because it was above its
            tolerance (a network that amplifies rounding is not a wrong one), or because 16 bits would hide a small fault. None
            where this was not needed.
    """

    max_rel_error: float
    tolerance: float
    reference: str
    outputs: int
    seconds: float
    rounding: float | None = None

    @property
    def ok(self) -> bool:
        """True if the error is within tolerance (NaN is not)."""
        return self.max_rel_error <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "ok": self.ok}


class VerifyPass(Pass):
    """Check a pruned module against the dense one.

    The module passed in is the pruned one; the report is left in ``gm.meta["fxprune.verify"]``.

    Args:
        dense: The traced dense module; by default the one that a `RewritePass` started from.
        plan: The plan that lies between them; by default the `RewritePass`'s.
        inputs: Example inputs, a mapping or a tuple.
        tolerance: Largest relative error; by default by dtype (1e-4 in float32).
    """

    def __init__(
        self, dense: GraphModule | None = None, plan: PrunePlan | None = None, inputs: Any = None, *, tolerance: float | None = None
    ) -> None:
        super().__init__()
        self.dense, self.plan, self.inputs, self.tolerance = dense, plan, inputs, tolerance

    def call(self, graph_module: GraphModule) -> PassResult:
        """Measure, annotate, and raise `VerificationError` above tolerance."""
        known = graph_module.meta.get(DENSE)
        dense, plan = self.dense or (known() if known else None), self.plan or graph_module.meta.get(PLAN)
        if dense is None and known is not None:
            raise UsageError("the dense module that the RewritePass read is gone: hold on to it, or give it to the VerifyPass")
        if dense is None or plan is None:
            raise UsageError("give a VerifyPass the dense module and the plan, or run a RewritePass before it")
        report = verify(dense, graph_module, plan, self.inputs, tolerance=self.tolerance)
        graph_module.meta["fxprune.verify"] = report
        if not report.ok:
            raise VerificationError(
                f"the pruned network differs from its reference ({report.reference}): relative error "
                f"{report.max_rel_error:.2e}, allowed {report.tolerance:.0e}"
            )
        return PassResult(graph_module, False)


def verify(gm: GraphModule, small: nn.Module, plan: PrunePlan, inputs: Any, *, tolerance: float | None = None) -> VerifyReport:
    """Compare a pruned module with the masked dense graph.

    Args:
        gm: The traced dense module.
        small: The pruned module, called like ``gm``.
        plan: The plan that lies between them.
        inputs: Example inputs: a mapping of keyword arguments, a tuple, or one tensor.
        tolerance: Largest relative error; by default by dtype.

    Returns:
        A report; look at ``max_rel_error`` and ``ok``. Nothing is raised for a large error. Where it is above the tolerance, the
        comparison is made again in float64 (if there is memory for it, and no operator insists on its dtype), against `IN_DOUBLE`;
        in 16 bits, whose tolerance is wide, also where it is not (up to `IN_16_BITS` parameters).

    Raises:
        PlanError: The plan belongs to another model.
        UsageError: The model is on the meta device and cannot be run; or the inputs are none that the graph takes.
    """
    start = time.perf_counter()
    groups = groups_of(gm)
    plan.check(groups)
    if any(p.is_meta for p in gm.parameters()):
        raise UsageError("a model on the meta device has no numbers to verify")
    args: tuple[Any, ...] = ()
    kwargs = inputs
    if isinstance(inputs, Tensor):
        args, kwargs = (inputs,), {}
    elif isinstance(inputs, tuple | list):
        args, kwargs = tuple(inputs), {}
    elif not isinstance(inputs, Mapping):
        raise UsageError(f"inputs are a mapping of keyword arguments, a tuple or one tensor, got {inputs!r}")
    allowed, rounding = tolerance if tolerance is not None else tolerance_of(gm), None
    error, reference, outputs = _compared(gm, small, plan, args, kwargs)
    if not error <= allowed and tolerance_of(gm) > TOLERANCES[torch.float64]:
        wide = _in_double(lambda a, k: _compared(gm, small, plan, a, k)[0], gm, small, args, kwargs)
        if wide is not None:
            error, rounding, allowed = wide, error, min(allowed, IN_DOUBLE)
    elif (
        error > TOLERANCES[torch.float32]
        and allowed <= tolerance_of(gm)
        and isinstance(small, GraphModule)
        and _elements(gm, small) <= IN_16_BITS
    ):
        every = (torch.bfloat16, torch.float16, torch.float32)
        again = widened(small, every)
        wide = _in_double(lambda a, k: _compared(gm, again, plan, a, k, every)[0], gm, small, args, kwargs)
        if wide is not None:
            error, rounding, allowed = wide, error, min(allowed, TOLERANCES[torch.float32])
    return VerifyReport(error, allowed, reference, outputs, time.perf_counter() - start, rounding)


def _in_double(
    compare: Callable[..., float], gm: GraphModule, small: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> float | None:
    """The relative error in float64; None where there is no memory for it, or an operator insists on its dtype."""
    args, kwargs = torch.utils._pytree.tree_map(in_float64, (args, dict(kwargs)))
    try:
        with in_double(gm, small):
            return compare(args, kwargs)
    except RuntimeError as failure:
        log.info("the comparison cannot be made again in float64: %s", failure)
        return None


def _elements(*modules: nn.Module) -> int:
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def widened(gm: GraphModule, dtypes: Collection[torch.dtype]) -> GraphModule:
    """The same graph on the same parameters; where it casts to one of these dtypes, it casts to float64."""
    graph = copy.deepcopy(gm.graph)
    for node in graph.nodes:
        node.args, node.kwargs = (map_aggregate(part, lambda v: wide_of(v, dtypes)) for part in (node.args, node.kwargs))
    return GraphModule(gm, graph)


def _compared(
    gm: GraphModule,
    small: nn.Module,
    plan: PrunePlan,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    wide: Collection[torch.dtype] = (),
) -> tuple[float, str, int]:
    """(relative error, what the reference is, number of outputs)."""
    with torch.no_grad():
        reference = Reference(gm, groups_of(gm), plan, wide)
        expected = reference.call_like_module(args, kwargs)
        actual = small(*args, **kwargs)
    said = "masked dense, statistics over the kept units" if reference.adjusted else "masked dense"
    return relative_error(expected, actual), said, len(_tensors(expected))


def in_float64(value: Any) -> Any:
    """A floating-point tensor in float64; anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def tolerance_of(module: nn.Module) -> float:
    """The default tolerance for a module's parameters' dtype."""
    return max((TOLERANCES.get(p.dtype, 0.0) for p in module.parameters()), default=1e-4)


def relative_error(expected: Any, actual: Any) -> float:
    """``max |actual - expected| / max |expected|``, the largest over all tensors of two outputs; infinite if they differ in form.

    Equal infinities are equal, NaN anywhere gives NaN. Of integers it is the share of entries that differ.
    """
    pairs = list(zip(_tensors(expected), _tensors(actual), strict=False))
    if not pairs or len(_tensors(expected)) != len(_tensors(actual)):
        return float("inf")
    errors = [_relative(e, a) for e, a in pairs]
    return float("nan") if any(e != e for e in errors) else max(errors)


def _relative(expected: Tensor, actual: Tensor) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return float((expected != actual).double().mean())
    size = expected.abs()
    scale = size.masked_fill(size.isinf(), 0).max().clamp_min(torch.finfo(size.dtype).tiny).double()
    wide = torch.complex128 if expected.is_complex() else torch.float64
    off = (expected.to(wide) - actual.to(wide)).abs()
    return float(off.masked_fill(expected == actual, 0).max() / scale)


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]
