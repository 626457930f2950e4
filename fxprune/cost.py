"""What a plan costs and saves, before anything is run: parameters, memory, multiply-accumulates."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import Tensor

from .groups import Groups
from .plan import PrunePlan
from .spaces import Axis, kept_size, size_of


@dataclass(frozen=True)
class Cost:
    """Size of a model.

    Attributes:
        parameters: Tied ones counted once.
        bytes: Of the parameters.
        macs: Multiply-accumulates per token of every product with a weight matrix (attention scores, which grow with the
            sequence, are not counted).
    """

    parameters: int
    bytes: int
    macs: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def costs(groups: Groups, plan: PrunePlan) -> tuple[Cost, Cost]:
    """Cost of the dense model and of the pruned one, from shapes alone."""
    return _cost(groups, None), _cost(groups, plan)


def _cost(groups: Groups, plan: PrunePlan | None) -> Cost:
    table = {groups[n].axis: len(u) for n, u in plan.keep.items()} if plan else {}
    gone = groups.parameters_of(plan.drop) if plan else set()

    def units(axis: Axis) -> int:
        return table.get(axis, axis.size)

    parameters = memory = 0
    counts: dict[int, int] = {}
    for name, value in groups.parameters.items():
        if name in gone:
            continue
        n = math.prod(cast(int, kept_size(s, units)) for s in value)
        parameters += n
        memory += n * cast(Tensor, value.tensor).element_size()
        counts[id(value)] = n
    macs = 0
    for call in groups.inference.calls.values():
        name = str(getattr(call.node.target, "overloadpacket", ""))
        if name.endswith(("linear", ".mm", "addmm", "matmul", "bmm", "baddbmm", "einsum")):
            macs += sum(counts.get(id(t), 0) for t in call.tensors() if len(t) > 1 and isinstance(size_of(t[0]), int))
    return Cost(parameters, memory, macs)
