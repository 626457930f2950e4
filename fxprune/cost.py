"""What a plan costs and saves, before anything is run: parameters, memory, multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from .groups import Groups
from .plan import PrunePlan
from .rules import Value
from .spaces import Axis, kept_size


@dataclass(frozen=True)
class Cost:
    """Size of a model.

    Attributes:
        parameters: Tied ones counted once.
        bytes: Of the parameters.
        macs: Multiply-accumulates per token of every product with a weight matrix; of routed experts, those that a token goes
            through. Attention scores, which grow with the sequence, are not counted.
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
    for name, value in groups.parameters.items():
        if name in gone:
            continue
        n = math.prod(cast(int, kept_size(s, units)) for s in value)
        parameters += n
        memory += n * cast(Tensor, value.tensor).element_size()
    products = (c for c in groups.inference.calls.values() if _name(c.node).endswith(_PRODUCTS))
    macs = sum(_macs(call.node, groups, gone, units) for call in products)
    return Cost(parameters, memory, macs)


_PRODUCTS = ("linear", ".mm", "addmm", "matmul", "bmm", "baddbmm", "einsum", "._grouped_mm", "grouped_mm_fallback")


def _name(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", ""))


def _macs(product: Node, groups: Groups, gone: set[str], units: Callable[[Axis], int]) -> int:
    """Of one product: the elements of its weight operand, transposed or sliced as it may be."""
    total = 0
    for source in product.all_input_nodes:
        value = groups.inference.values[source.name]
        if not isinstance(value, Value) or not value.weight or len(value) < 2:
            continue  # an activation, or a bias
        origins = _origins(source)
        sizes = [kept_size(s, units) for s in value]
        if origins & set(groups.parameters) and not origins & gone and all(isinstance(n, int) for n in sizes):
            elements = math.prod(cast(list[int], sizes))
            if "grouped_mm" in _name(product):  # each row meets one expert
                elements = round(elements / cast(int, sizes[0]) * _rows_per_token(product))
            total += elements
    return total


def _origins(node: Node) -> set[str]:
    """The tensors that a weight is computed from."""
    stack, found = [node], set()
    while stack:
        current = stack.pop()
        if current.op == "get_attr":
            found.add(str(current.target))
        stack += current.all_input_nodes
    return found


def _rows_per_token(product: Node) -> float:
    """How many experts a token goes through."""
    tokens = next(n for n in product.graph.nodes if n.op == "placeholder").meta["val"]
    rows = product.all_input_nodes[0].meta["val"]
    share = sympy.sympify(_expression(rows.shape[0])) / math.prod(_expression(n) for n in tokens.shape)
    return float(share) if share.is_number else 1.0


def _expression(n: Any) -> Any:
    return n.node.expr if isinstance(n, torch.SymInt) else n
