"""What LHSPG is given, checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..errors import UsageError, check_whole, nearest
from ..groups import LAYERS, Groups
from ..passes.selection import Selection

PROJECTIONS = ("half-space", "linear")


def check_settings(warmup: int, periods: int, period_steps: int, projection: str, penalty: float, epsilon: float) -> dict[str, Any]:
    """The schedule and the projection as plain data.

    Raises:
        UsageError: A value makes no sense.
    """
    for name, value, least in (("warmup", warmup, 0), ("periods", periods, 1), ("period_steps", period_steps, 1)):
        check_whole(name, value, least)
    if projection not in PROJECTIONS:
        raise UsageError(f"unknown projection '{projection}'; {nearest(str(projection), PROJECTIONS)}")
    for name, number in (("penalty", penalty), ("epsilon", epsilon)):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise UsageError(f"{name} must be a number, got {number!r}")
    if not 0 <= penalty < math.inf:
        raise UsageError(f"penalty must be 0 or a positive number, got {penalty}")
    if not 0 <= epsilon < 1:
        raise UsageError(f"epsilon must be at least 0 and below 1, got {epsilon}")
    return {
        "warmup": warmup,
        "periods": periods,
        "period_steps": period_steps,
        "projection": projection,
        "penalty": float(penalty),
        "epsilon": float(epsilon),
    }


def check_target(ratio: float | None, selection: Selection | None, protect: Sequence[str]) -> Selection:
    """The target: as given, or a ratio of the least salient units wherever they are.

    Raises:
        UsageError: Both or neither are given, or a selection that units which go one after another cannot follow.
    """
    if (ratio is None) == (selection is None):
        raise UsageError("give either ratio= (share of the base model's parameters) or selection=, not both or neither")
    if selection is None:
        return Selection(ratio=ratio, ranking="global", widths="per-layer", protect=protect)
    if protect:
        raise UsageError("protect= goes with ratio=; a selection has protect of its own")
    if selection.pace.get(LAYERS, 0) > 0:
        raise UsageError(f"LHSPG brings units to zero, and kind '{LAYERS}' drops whole blocks: leave it out")
    if selection.ratio is not None and selection.ranking != "global":
        raise UsageError(
            f"LHSPG takes the least salient units first: a selection by ratio needs ranking='global', not '{selection.ranking}' "
            "(a selection by units may have any)"
        )
    return selection


def check_scores(scores: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Importance of the units of groups that LHSPG compares, float64 on the CPU.

    Raises:
        UsageError: A group has none, or other than one finite number of at least 0 for each unit.
    """
    found = {}
    for name, size in sizes.items():
        if name not in scores:
            raise UsageError(f"scores= has nothing of group '{name}', which may lose units: score it too, or protect it")
        own = scores[name].detach().double().cpu()
        if own.shape != (size,):
            raise UsageError(f"group '{name}' has {size} units, but its scores have shape {tuple(own.shape)}")
        if not bool((own.isfinite() & (own >= 0)).all()):
            raise UsageError(f"the scores of group '{name}' must be finite and at least 0")
        found[name] = own
    return found


def parameters_of(gm: GraphModule, groups: Groups) -> dict[str, Tensor]:
    """Every parameter of a graph by name.

    Raises:
        UsageError: The groups are another graph's, or the parameters have no values.
    """
    own = dict(gm.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for name, value in groups.parameters.items():
        tensor = own.get(name)
        if tensor is None or tensor is not value.tensor:
            raise UsageError(f"the groups were found in another graph: '{name}' is not this one's parameter")
        if tensor.is_meta:
            raise UsageError(f"parameter '{name}' is on the meta device: there are no weights to train")
        found[name] = tensor
    return found


def refuse_closures(optimizer: torch.optim.Optimizer) -> None:
    """Stop where a step evaluates the model several times: which evaluation would a unit's step belong to?

    Raises:
        UsageError: The optimizer's step needs a closure (LBFGS).
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UsageError(f"{type(optimizer).__name__} evaluates the model again within a step, which LHSPG cannot follow")


def refuse_sharded(optimizer: torch.optim.Optimizer, gm: GraphModule) -> None:
    """Stop where a process holds only a part of each parameter: a unit's rows may then lie elsewhere.

    Raises:
        UsageError: FSDP, of either kind, holds parameters of the optimizer or of the graph.
    """
    from torch.distributed.tensor import DTensor

    for parameter in (*(p for group in optimizer.param_groups for p in group["params"]), *gm.parameters()):
        if isinstance(parameter, DTensor) or getattr(parameter, "_is_flat_param", False):
            raise UsageError(
                "the parameters are sharded (FSDP), and LHSPG needs every process to hold them whole: use DistributedDataParallel, "
                "or one process"
            )


def trained_by(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the graph's parameters that an optimizer trains.

    Raises:
        UsageError: There is none.
    """
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = {name for name, tensor in tensors.items() if id(tensor) in own}
    if not found:
        raise UsageError(
            "the optimizer trains no parameter of this graph: adapters that are merged or disabled are not in it, and a copy of "
            "the model has parameters of its own"
        )
    return found
