"""Where pruned units leave the network: the linear maps that contract an axis with a parameter.

An output projection reads the attention heads, a down projection the FFN channels. What such a map reads is what activation
criteria look at, and its weight is what can make up for the units that go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..groups import Groups
from ..rules.registry import bind
from ..spaces import Axis
from .inference import axes_of, tensor_list

aten: Any = torch.ops.aten

_SECOND_OPERAND = {aten.mm.default: "mat2", aten.addmm.default: "mat2", aten.matmul.default: "other"}
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)


@dataclass(frozen=True)
class Consumer:
    """One linear map ``y = x W`` whose contracted dimension holds prunable units.

    Attributes:
        node: The fx node.
        operand: The node that gives ``x``, ``[.., features]``.
        weight: Name of the parameter ``W``.
        dim: Its contracted dimension: 1 for `nn.Linear`, 0 for a weight stored ``[in, out]`` (``Conv1D``).
        groups: Names of the prunable groups that own features.
    """

    node: Node
    operand: Node
    weight: str
    dim: int
    groups: tuple[str, ...]


def find_consumers(gm: GraphModule, groups: Groups) -> list[Consumer]:
    """Every linear map that contracts a prunable axis with a two-dimensional parameter of its own, in graph order.

    Weights that several calls share (tied layers) are left out: what one call reads says nothing about the other.
    """
    reach: dict[tuple[str, int], list[str]] = {}
    for group in groups.values():
        if group.prunable:
            for member in group.members:
                if member.trainable and len(member.shape) == 2:
                    reach.setdefault((member.name, member.dim), []).append(group.name)
    found: list[Consumer] = []
    for node in gm.graph.nodes:
        if (read := contraction(node)) is None:
            continue
        operand, weight, dim = read
        name = str(weight.target)
        if (name, dim) in reach and len(weight.users) == 1:
            found.append(Consumer(node, operand, name, dim, tuple(reach[name, dim])))
    return found


def contraction(node: Node) -> tuple[Node, Node, int] | None:
    """(operand, parameter node, contracted dimension) of ``x W``; None for any other node."""
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        arguments = bind(node)
        operand, weight, dim = arguments["input"], arguments["weight"], 1
    elif node.target in _SECOND_OPERAND:
        arguments = bind(node)
        operand = arguments.get("self") if node.target is not aten.addmm.default else arguments["mat1"]
        weight, dim = arguments[_SECOND_OPERAND[node.target]], 0
        if isinstance(weight, Node) and weight.target in _TRANSPOSES and len(weight.users) == 1:
            weight, dim = weight.args[0], 1
    else:
        return None
    if not isinstance(operand, Node) or not isinstance(weight, Node) or weight.op != "get_attr":
        return None
    return operand, weight, dim


def columns(weight: Tensor, dim: int) -> Tensor:
    """A weight with its contracted dimension last: ``[outputs, features]``."""
    return weight if dim == 1 else weight.mT


def weight_of(groups: Groups, consumer: Consumer) -> Tensor:
    """A map's weight ``[outputs, features]``, detached."""
    tensor = groups.parameters[consumer.weight].tensor
    assert tensor is not None
    return columns(tensor.detach(), consumer.dim)


def features_of(groups: Groups, consumer: Consumer, units: Mapping[str, Tensor]) -> Tensor:
    """Positions along a map's contracted dimension that some units own, rising.

    Args:
        groups: The model's groups.
        consumer: The map.
        units: For names of groups some of their units; groups that the map does not contract may be among them.
    """
    found = [torch.empty(0, dtype=torch.long)]
    for name in consumer.groups:
        if name in units:
            members = groups[name].members
            found += [m.indices(units[name]) for m in members if (m.name, m.dim) == (consumer.weight, consumer.dim)]
    positions: Tensor = torch.unique(torch.cat(found))
    return positions


def sole_readers(gm: GraphModule, groups: Groups) -> dict[str, Consumer]:
    """For each group that leaves the network by one linear map, and by no other operator, that map."""
    exits: dict[Axis, set[Node]] = {}
    values = groups.inference.values
    for node in gm.graph.nodes:
        value = values.get(node.name)
        stay = axes_of(value)
        for source in node.all_input_nodes:
            for axis in axes_of(values.get(source.name)):
                if axis not in stay and tensor_list(value):
                    exits.setdefault(axis, set()).add(node)
    readers: dict[str, list[Consumer]] = {}
    for consumer in find_consumers(gm, groups):
        for name in consumer.groups:
            if exits.get(groups[name].axis) == {consumer.node}:
                readers.setdefault(name, []).append(consumer)
    return {name: found[0] for name, found in readers.items() if len(found) == 1}
