"""Index-space inference over a traced graph: runs every node's rule, in order, once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..rules import Call, Value, rule_for
from ..rules.registry import bind
from ..spaces import Size, Space, fresh, leaves, pin, size_of

aten: Any = torch.ops.aten
log = logging.getLogger("fxprune")


@dataclass
class Inference:
    """What inference found: the spaces of every tensor in the graph.

    Attributes:
        values: For each node (by name) a `Value`, a list of them, a size, or None for what is no tensor.
        calls: The `Call` of each operator node, with what its rule noted.
        tensors: The `Value` of each parameter, buffer and constant, by its name in the graph.
        first_use: Position in the graph of the first operator that reads each of them.
    """

    values: dict[str, Any] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    tensors: dict[str, Value] = field(default_factory=dict)
    first_use: dict[str, int] = field(default_factory=dict)


def infer(gm: GraphModule, *, pin_inputs: bool = True) -> Inference:
    """Infer the space of every dimension in a canonical graph.

    Args:
        gm: What `fxprune.trace` returned.
        pin_inputs: Pin the graph's inputs and outputs, as a model's interface must be. Off only to study single operators.
    """
    found = Inference()
    for position, node in enumerate(gm.graph.nodes):
        if node.op == "get_attr":
            found.values[node.name] = _attribute(found, gm, node)
        elif node.op == "placeholder":
            found.values[node.name] = _shaped(node, lambda n: fresh(n, pin="a model input" if pin_inputs else None))
        elif node.op == "output":
            if pin_inputs:
                for source in node.all_input_nodes:
                    _pin_all(found.values[source.name], "a model output")
        else:
            for source in node.all_input_nodes:
                if source.op == "get_attr":
                    found.first_use.setdefault(str(source.target), position)
            found.values[node.name] = _operator(found, node)
            if getattr(node.target, "overloadpacket", None) in _BY_STRIDES:
                for source in _of_one_storage(node):
                    _pin_all(found.values.get(source.name), "read by strides")
    return found


_BY_STRIDES = {aten.as_strided, aten.as_strided_copy, aten.as_strided_scatter, aten.sym_stride, aten.sym_storage_offset}
"""Operators whose numbers mean places in memory, where other tensors' units may lie between those of their own."""


def _of_one_storage(node: Node) -> set[Node]:
    """The operands of an operator, and all that they are views of."""
    found, stack = set(node.all_input_nodes), list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current.op == "call_function" and _may_alias(current):
            new = set(current.all_input_nodes) - found
            found |= new
            stack += new
    return found


def _may_alias(node: Node) -> bool:
    """Whether what an operator gives may lie in its operand's memory; whatever has no schema may."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or schema.name == "aten::dropout" or any(r.alias_info is not None for r in schema.returns)


def _attribute(found: Inference, gm: GraphModule, node: Node) -> Any:
    name = str(node.target)
    if name not in found.tensors:
        tensor: Any = gm
        for piece in name.split("."):
            tensor = getattr(tensor, piece)
        if not isinstance(tensor, Tensor):
            return None
        found.tensors[name] = Value([fresh(n) for n in tensor.shape], weight=True, tensor=tensor)
    return found.tensors[name]


def _size(n: Any) -> Size:
    expr = n.node.expr if isinstance(n, torch.SymInt) else n
    return int(expr) if getattr(expr, "is_Integer", False) else expr


def _form(val: Any, make: Callable[[Tensor], Value]) -> Any:
    """An example value with a `Value` for every tensor: one, or a list in which sizes and None keep their places."""
    if isinstance(val, Tensor):
        return make(val)
    if isinstance(val, list | tuple):
        return [_form(v, make) for v in val]
    return _size(val) if isinstance(val, int | torch.SymInt) and not isinstance(val, bool) else None


def _shaped(node: Node, make: Callable[[Size], Any]) -> Any:
    """A `Value` (or a list of them, or a size) in the form of the node's example value."""
    return _form(node.meta.get("val"), lambda tensor: Value([make(_size(n)) for n in tensor.shape]))


def tensor_list(value: Any) -> list[Value]:
    """Every `Value` in what inference stored for a node."""
    if isinstance(value, Value):
        return [value]
    return [v for item in value for v in tensor_list(item)] if isinstance(value, list) else []


def _pin_all(value: Any, reason: str) -> None:
    for tensor in tensor_list(value):
        for space in (*tensor, *([] if tensor.numbers is None else [tensor.numbers])):
            pin(space, reason)


def _operator(found: Inference, node: Node) -> Any:
    if getattr(node.target, "__name__", "") == "getitem":
        source, index = cast("tuple[Node, int]", node.args)
        values = found.values[source.name]
        return values[index] if isinstance(values, list) else None
    outputs = tensor_list(_shaped(node, fresh))
    arguments = torch.fx.node.map_arg(bind(node), lambda n: found.values.get(n.name))
    call = Call(node, dict(arguments), [v.shape for v in outputs])
    found.calls[node.name] = call
    if not outputs:
        return _scalar(call)
    tensors = list(call.tensors())
    weight = bool(tensors) and all(t.weight for t in tensors)
    results = iter(
        [
            Value(dims, weight=weight, numbers=call.numbered.get(i), tally=call.tally, alike=call.alike)
            for i, dims in enumerate(_apply(call))
        ]
    )
    return _form(node.meta["val"], lambda _: next(results))


def _scalar(call: Call) -> Any:
    """A size or another scalar: taken from a dimension that could shrink, it pins that dimension."""
    node = call.node
    name = str(getattr(node.target, "overloadpacket", node.target))
    for tensor in call.tensors():
        picked = [tensor[call["dim"]]] if name.endswith("sym_size") else tensor
        for space in picked:
            call.pin(space, "its size is computed with")
        if not name.endswith("sym_size"):
            call.escape(tensor)
    val = node.meta.get("val")
    return _size(val) if isinstance(val, int | torch.SymInt) else None


def _apply(call: Call) -> list[list[Any]]:
    """Run the node's rule; whatever is not covered, or does not add up, pins all that the node touches."""
    found = rule_for(call.node.target)
    if found is None:
        return call.give_up("there is no rule")
    try:
        result = found(call)
        _renumber(call, found.numbers)
        many = bool(result) and isinstance(result[0], list | tuple | Value)
        results = [list(r) for r in result] if many else [list(result)]
        if odd := [d for dims in results for d in dims if not isinstance(d, Space)]:
            raise TypeError(f"a rule returns spaces, not {odd[0]!r}")
    except Exception as error:  # noqa: BLE001 - an incomplete rule must never become a wrong one
        log.warning("the rule for %s failed: %r", call.why, error)
        return call.give_up(f"the rule failed ({type(error).__name__})")
    if len(results) == len(call.shapes):
        results = [_settle(call, dims, shape) for dims, shape in zip(results, call.shapes, strict=True)]
    if len(results) != len(call.shapes) or not all(map(_fits, results, call.shapes)):
        log.warning("the rule for %s gave %s for shapes %s", call.why, results, call.shapes)
        return call.give_up("the rule does not cover this case")
    return results


def _renumber(call: Call, way: str) -> None:
    """What becomes of tensors whose entries number the units of an axis, in a rule that does not see to it by itself."""
    tensors = list(call.tensors())
    typed = [t for t in tensors if t.numbers is not None]
    if way == "own" or not typed:
        return
    if way == "pass" and len(typed) == len(tensors):
        first = cast(Space, typed[0].numbers)
        for other in typed[1:]:
            call.unify(first, cast(Space, other.numbers))
        call.numbered = dict.fromkeys(range(len(call.shapes)), first)
    else:
        call.escape(*typed)


def _settle(call: Call, dims: list[Any], shape: list[Size]) -> list[Any]:
    """Where the trace has specialised a symbolic size, or the other way round, that one dimension is pinned."""
    reason = "viewed as a dimension of another nature"
    out = []
    for space, n in zip(dims, shape, strict=False):
        same = isinstance(size_of(space), int) == isinstance(n, int)
        out.append(space if same else call.fresh(n, pin=reason))
        if not same:
            call.pin(space, reason)
    return out + dims[len(shape) :]


def _fits(dims: list[Any], shape: list[Size]) -> bool:
    sizes = [size_of(s) for s in dims]
    return len(sizes) == len(shape) and all(a == b or not isinstance(a, int) for a, b in zip(sizes, shape, strict=True))


def axes_of(value: Any) -> set[Any]:
    """Every free axis of a node's value."""
    return {axis for tensor in tensor_list(value) for space in tensor for axis in leaves(space)}
