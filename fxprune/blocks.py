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
        terms: Names of the nodes that it adds to its input: without the block they are zero.
    """

    path: str
    source: str
    result: str
    parameters: tuple[str, ...]
    terms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Residual:
    """A sum ``x + f(x)``.

    Attributes:
        source: ``x``, which stands in it once and with no factor.
        terms: What is added to it.
    """

    source: Node
    terms: tuple[Node, ...]


def residual_adds(gm: GraphModule) -> dict[Node, Residual]:
    """Every ``x + f(x)`` with the operand that is ``x``: the one that the others are computed from."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    found: dict[Node, Residual] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in _ADDS:
            continue
        terms = sorted(_terms(node), key=lambda term: order[term[0]])
        if not terms or terms[0][0].op == "get_attr" or terms[0][1] != 1:
            continue
        early, late = terms[0][0], [term for term, _ in terms[1:]]
        if all(term is not early and _depends(term, early, order) for term in late):
            found[node] = Residual(early, tuple(late))
    return found


def _terms(node: Node) -> list[tuple[Node, Any]]:
    """The operands of a sum with their factors, sums that serve nothing else taken apart: ``(x + attention) + mlp`` has three.

    There are none where a number is added: nothing of such a sum is ``x`` alone.
    """
    terms: list[tuple[Node, Any]] = []
    if len(node.all_input_nodes) != len(node.args):
        return []
    for operand, factor in zip(node.all_input_nodes, (1, node.kwargs.get("alpha", 1)), strict=True):
        nested = _terms(operand) if operand.target in _ADDS and len(operand.users) == 1 else []
        terms += [(term, own * factor) for term, own in nested or [(operand, 1)]]
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


def mark_residuals(adds: Mapping[Node, Residual], values: Mapping[str, object]) -> None:
    """Mark the axes of every residual stream, which tells the hidden size from an FFN's width."""
    for node, residual in adds.items():
        mine, theirs = values.get(node.name), values.get(residual.source.name)
        for space in getattr(mine, "dims", []):
            mark(space, "residual")
        for space in getattr(theirs, "dims", []):
            mark(space, "residual")


def find_blocks(gm: GraphModule, adds: Mapping[Node, Residual]) -> dict[str, Block]:
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


def _block(path: str, nodes: list[Node], adds: Mapping[Node, Residual]) -> Block | None:
    own = set(nodes)
    results = [n for n in nodes if any(u not in own for u in n.users) and not isinstance(n.meta.get("val"), int | torch.SymInt)]
    if len(results) != 1:
        return None
    current, terms = results[0], list[Node]()
    while current in own:
        while current in own and current not in adds and _passes(current):
            current = cast(Node, current.args[0])
        if current not in own:
            break
        if current not in adds or not own.issuperset(adds[current].terms):
            return None
        terms += adds[current].terms
        current = adds[current].source
    if current is results[0]:
        return None
    if not _alike(current, results[0]):
        return None
    weights = {n for node in nodes for n in node.all_input_nodes if n.op == "get_attr"}
    private = sorted(str(w.target) for w in weights if all(u in own for u in w.users))
    return Block(path, current.name, results[0].name, tuple(private), tuple(term.name for term in terms))


_CASTS = {aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.dropout, aten.view, aten.reshape}


def _passes(node: Node) -> bool:
    """True for a node that hands one tensor on: casts and views between the additions must not hide them."""
    return getattr(node.target, "overloadpacket", None) in _CASTS


def _alike(a: Node, b: Node) -> bool:
    one, other = a.meta.get("val"), b.meta.get("val")
    return one is not None and other is not None and list(one.shape) == list(other.shape) and one.dtype == other.dtype
