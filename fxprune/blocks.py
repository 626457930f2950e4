"""Residual structure, found in the graph: where ``x + f(x)`` is, and which modules are whole residual blocks.

Dropping a block turns ``x + f(x)`` into ``x``: depth pruning is a graph rewrite like any other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from .spaces import mark

aten: Any = torch.ops.aten
_ADDS = (aten.add.Tensor,)
_CONTRACTIONS = {
    aten.linear,
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.matmul,
    aten.einsum,
    aten.conv1d,
    aten.conv2d,
    aten.conv3d,
    aten.scaled_dot_product_attention,
}


@dataclass(frozen=True)
class Block:
    """A module of a layer list whose output is its input plus something.

    Attributes:
        path: The module's path, for example ``model.layers.3``.
        source: Name of the node that enters.
        result: Name of the node that leaves; dropping the block replaces it by ``source``.
        parameters: Parameters that only this block uses.
    """

    path: str
    source: str
    result: str
    parameters: tuple[str, ...]


def residual_adds(gm: GraphModule) -> dict[Node, Node]:
    """Every ``x + f(x)`` with the operand that is ``x``: the one that the other is computed from."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    found: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in _ADDS:
            continue
        early, *late = sorted(_terms(node), key=order.__getitem__)
        if late and early.op != "get_attr" and all(_depends(term, early, order) for term in late):
            found[node] = early
    return found


def _terms(node: Node) -> set[Node]:
    """The operands of a sum, with sums that serve nothing else taken apart: ``(x + attention) + mlp`` has three."""
    terms: set[Node] = set()
    for operand in node.args[:2]:
        if isinstance(operand, Node):
            nested = operand.target in _ADDS and len(operand.users) == 1
            terms |= _terms(operand) if nested else {operand}
    return terms


def _depends(late: Node, early: Node, order: Mapping[Node, int]) -> bool:
    """True if ``late`` is computed from ``early`` by way of some contraction (an activation's ``x + x^3`` is no residual)."""
    stack, seen, reached = [late], {late}, False
    while stack:
        for source in stack.pop().all_input_nodes:
            reached = reached or source is early
            if source not in seen and order[source] > order[early]:
                seen.add(source)
                stack.append(source)
    return reached and any(getattr(n.target, "overloadpacket", None) in _CONTRACTIONS for n in seen)


def mark_residuals(adds: Mapping[Node, Node], values: Mapping[str, object]) -> None:
    """Mark the axes of every residual stream, which tells the hidden size from an FFN's width."""
    for node, source in adds.items():
        mine, theirs = values.get(node.name), values.get(source.name)
        for space in getattr(mine, "dims", []):
            mark(space, "residual")
        for space in getattr(theirs, "dims", []):
            mark(space, "residual")


def find_blocks(gm: GraphModule, adds: Mapping[Node, Node]) -> dict[str, Block]:
    """Modules named by a number whose one result is reached from one input over residual additions."""
    inside: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        for path in _numbered(node):
            inside.setdefault(path, []).append(node)
    found = {}
    for path, nodes in inside.items():
        block = _block(path, nodes, adds)
        if block is not None:
            found[path] = block
    return found


def _numbered(node: Node) -> list[str]:
    """Paths of the modules named by a number that made this node (outermost first)."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
    return [p for p in dict.fromkeys(paths) if re.search(r"(^|\.)\d+$", p)]


def _block(path: str, nodes: list[Node], adds: Mapping[Node, Node]) -> Block | None:
    own = set(nodes)
    results = [n for n in nodes if any(u not in own for u in n.users) and not isinstance(n.meta.get("val"), int | torch.SymInt)]
    if len(results) != 1:
        return None
    current = results[0]
    while current in own:
        while current in own and current not in adds and _passes(current):
            current = cast(Node, current.args[0])
        if current not in own:
            break
        if current not in adds:
            return None
        current = adds[current]
    if current is results[0]:
        return None
    if not _alike(current, results[0]):
        return None
    weights = {n for node in nodes for n in node.all_input_nodes if n.op == "get_attr"}
    private = sorted(str(w.target) for w in weights if all(u in own for u in w.users))
    return Block(path, current.name, results[0].name, tuple(private))


_CASTS = {aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.dropout, aten.view, aten.reshape}


def _passes(node: Node) -> bool:
    """True for a node that hands one tensor on: casts and views between the additions must not hide them."""
    return getattr(node.target, "overloadpacket", None) in _CASTS


def _alike(a: Node, b: Node) -> bool:
    one, other = a.meta.get("val"), b.meta.get("val")
    return one is not None and other is not None and list(one.shape) == list(other.shape) and one.dtype == other.dtype
