"""The coupling graph: why parameters must be pruned together, as a typed networkx graph.

Vertices are fx nodes and parameter dimensions through which some prune group runs. Edges are couplings, in pairs: a *forward*
edge goes with the data (an operator's input to its output, an activation to the weight that contracts it), the *backward* edge
returns. They are the triggers of LLM-Pruner (arXiv 2305.11627, section 3.1: a pruned neuron triggers the neurons that depend
on it, in Out(N_i) and in In(N_i)); a prune group is all that one trigger reaches over the group's edges.

Which input couples with which output is asked of the operator's own rule: it runs once more, on copies of the spaces that
inference found. The copies that it unified, or passed on to its output, are the ones that it couples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import networkx as nx
import torch
from torch.fx import Node

from .errors import UsageError, nearest
from .groups import Groups, PruneGroup, layer_of
from .passes.inference import axes_of
from .rules import Call, Rule, Value, rule_for
from .rules.registry import bind
from .spaces import Axis, Concat, Product, Space, concat, leaves, product, resolve


@dataclass(frozen=True)
class Step:
    """One coupling on the way from a parameter to another.

    Attributes:
        group: The prune group that the coupling belongs to.
        source: Where it starts: an fx node's name, or a parameter dimension such as ``fc.weight[0]``.
        target: Where it leads, written likewise.
        operator: Name of the fx node that couples the two; empty for a tie.
        rule: Name of the operator's rule; ``"getitem"`` where one of several outputs is taken, ``"tied"`` for tied weights.
        direction: ``"forward"`` (with the data), ``"backward"`` (against it), or empty for a tie.
        module: Path of the module that the operator is in; empty at the top.
    """

    group: str
    source: str
    target: str
    operator: str
    rule: str
    direction: str
    module: str = ""

    def __str__(self) -> str:
        if self.rule == "tied":
            return f"{self.source} is {self.target} (tied weights; group {self.group})"
        where = f" in {self.module}" if self.module else ""
        return f"{self.source} -> {self.target} ({self.direction}, rule {self.rule} at {self.operator}{where}; group {self.group})"


def coupling_graph(groups: Groups) -> nx.MultiDiGraph:
    """The coupling graph of a traced model. Every prune group is one connected part of it.

    A vertex of ``type="node"`` is an fx node, keyed by its name, with ``op`` (the operator), ``module`` (path of the module
    it is in) and ``layer`` (absent outside numbered layers). A vertex of ``type="parameter"`` is one dimension of a parameter,
    buffer or constant, keyed ``name[dim]``, with ``name``, ``dim``, ``size``, ``trainable``, ``aliases`` (other names of tied
    weights), ``module`` and ``layer``. Both list the ``groups`` that run through them, and in the same order their ``kinds``.

    An edge has ``group``, its ``kind``, ``direction`` (``"forward"`` or ``"backward"``), ``rule`` (name of the rule that made it),
    ``operator`` (name of the fx node) and ``module``. An axis that an operator passes on couples each input that has it with
    the output; one that it contracts couples the inputs with each other, forward from the activation to the weight, of two
    activations from the operator's first operand to its second. Edges that differ in group or operator are parallel.

    Args:
        groups: What `fxprune.find_groups` returned. The traced graph must not have been edited since.

    Returns:
        A new graph; its attributes are strings, numbers and tuples of strings.
    """
    graph = nx.MultiDiGraph()
    owners = {group.axis: group for group in groups.values()}
    _add_parameters(graph, groups)
    for node in _nodes(groups):
        if node.op != "get_attr":
            _add_node(graph, node, owners, groups.inference.values.get(node.name))
        for source, target, axis, rule in _couplings(groups, node):
            if (owner := owners.get(axis)) is not None:
                facts = {"group": owner.name, "kind": owner.kind, "rule": rule, "operator": node.name, "module": _module(node)}
                _couple(graph, source, target, facts)
    return graph


def member_graph(groups: Groups) -> nx.Graph:
    """Which group reaches into which parameter: a bipartite graph, for questions about ownership.

    A vertex of ``type="group"`` (``bipartite=0``), keyed by the group's name, has ``kind``, ``size`` (units), ``prunable``,
    ``reason`` and ``parameters_per_unit``. A vertex of ``type="parameter"`` (``bipartite=1``), keyed by its name, has ``shape``,
    ``numel``, ``trainable``, ``aliases`` and ``module``. Both have ``layer``, absent outside numbered layers. An edge lists the
    ``dims`` of the parameter that the group cuts; which of their indices a unit owns says `Member.indices`.

    Args:
        groups: What `fxprune.find_groups` returned.

    Returns:
        A new graph; its attributes are strings, numbers and tuples of these.
    """
    graph = nx.Graph()
    aliases = _aliases(groups)
    for group in groups.values():
        facts = {"kind": group.kind, "size": group.size, "prunable": group.prunable, "reason": group.reason}
        layer = {} if group.layer is None else {"layer": group.layer}
        graph.add_node(group.name, type="group", bipartite=0, **facts, parameters_per_unit=group.parameters_per_unit, **layer)
        for m in group.members:
            also = aliases.get(m.name, ())
            own = {"shape": m.shape, "numel": math.prod(m.shape), "trainable": m.trainable, "aliases": also}
            graph.add_node(m.name, type="parameter", bipartite=1, **own, **_place(m.name.rpartition(".")[0]))
            dims = graph.edges[group.name, m.name]["dims"] if graph.has_edge(group.name, m.name) else ()
            graph.add_edge(group.name, m.name, dims=(*dims, m.dim))
    return graph


def _nodes(groups: Groups) -> Sequence[Node]:
    call = next(iter(groups.inference.calls.values()), None)
    return list(call.node.graph.nodes) if call is not None else []


def _module(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0] if isinstance(stack[-1], tuple) else stack[-1]) if stack else ""


def _place(path: str) -> dict[str, Any]:
    layer = layer_of(path)
    return {"module": path} if layer is None else {"module": path, "layer": layer}


def _aliases(groups: Groups) -> dict[str, tuple[str, ...]]:
    """The other names of tied weights, by the first."""
    aliases: dict[str, tuple[str, ...]] = {}
    for alias, first in groups.aliases.items():
        aliases[first] = (*aliases.get(first, ()), alias)
    return aliases


def _add_parameters(graph: nx.MultiDiGraph, groups: Groups) -> None:
    aliases = _aliases(groups)
    through: dict[str, list[PruneGroup]] = {}
    for group in groups.values():
        for member in group.members:
            through.setdefault(_key(member.name, member.dim), []).append(group)
            graph.add_node(
                _key(member.name, member.dim),
                type="parameter",
                name=member.name,
                dim=member.dim,
                size=member.shape[member.dim],
                trainable=member.trainable,
                aliases=aliases.get(member.name, ()),
                **_place(member.name.rpartition(".")[0]),
            )
    nx.set_node_attributes(graph, {key: _listed(own) for key, own in through.items()})


def _listed(groups: Sequence[PruneGroup]) -> dict[str, tuple[str, ...]]:
    return {"groups": tuple(g.name for g in groups), "kinds": tuple(g.kind for g in groups)}


def _add_node(graph: nx.MultiDiGraph, node: Node, owners: Mapping[Axis, PruneGroup], value: Any) -> None:
    axes = axes_of(value)
    through = [group for axis, group in owners.items() if axis in axes] if axes else []
    if through:
        op = str(node.target) if isinstance(node.target, str | torch._ops.OpOverload) else getattr(node.target, "__name__", "")
        graph.add_node(node.name, type="node", op=op, **_listed(through), **_place(_module(node)))


def _key(name: str, dim: int) -> str:
    return f"{name}[{dim}]"


def _couple(graph: nx.MultiDiGraph, source: str, target: str, facts: Mapping[str, str]) -> None:
    for start, end, direction in ((source, target, "forward"), (target, source, "backward")):
        graph.add_edge(start, end, f"{facts['operator']}:{facts['group']}", direction=direction, **facts)


Coupling: TypeAlias = tuple[str, str, Axis, str]
"""Two vertices in forward order, the axis that flows between them, and the rule that says so."""


def _couplings(groups: Groups, node: Node) -> Iterator[Coupling]:
    """What an operator couples."""
    found = groups.inference
    call = found.calls.get(node.name)
    if call is not None:
        yield from _ask(call, axes_of(found.values.get(node.name)))
    elif node.op == "call_function":  # getitem
        for source in node.all_input_nodes:
            for axis in axes_of(found.values.get(source.name)) & axes_of(found.values.get(node.name)):
                yield source.name, node.name, axis, "getitem"


@dataclass
class _Copy:
    """The copy of one axis in one input: where it is, and which axis it stands for."""

    vertex: str
    weight: bool
    axis: Axis
    origin: Axis


def _ask(call: Call, result: Set[Axis]) -> Iterator[Coupling]:
    """Run the rule on copies of the call's spaces, and see which copies it ties or hands on.

    ``result`` holds the axes that inference gave the output: none of the input's if it had to give up on the call.
    """
    rule = rule_for(call.node.target)
    if rule is None:
        return
    copies: list[_Copy] = []
    bound = bind(call.node)
    arguments = {name: _copied(bound.get(name), value, copies) for name, value in call.arguments.items()}
    outputs = _outputs(rule, Call(call.node, arguments, call.shapes))
    reached = {leaf for dims in outputs for space in dims for leaf in leaves(space)}
    meetings: dict[tuple[Axis, Axis], dict[str, bool]] = {}
    for copy in copies:
        for leaf in leaves(copy.axis):
            meetings.setdefault((leaf, copy.origin), {})[copy.vertex] = copy.weight
    for (leaf, origin), vertices in meetings.items():
        if leaf in reached and origin in result:
            yield from ((vertex, call.node.name, origin, rule.name) for vertex in vertices)
        else:  # contracted: activations first, then weights
            yield from ((a, b, origin, rule.name) for a, b in pairwise(sorted(vertices, key=vertices.__getitem__)))


def _copied(argument: Any, value: Any, copies: list[_Copy]) -> Any:
    """A call's argument with fresh axes in the place of each; ``argument`` is the same one in terms of fx nodes."""
    if isinstance(argument, Node) and isinstance(value, Value):
        dims = []
        for dim, space in enumerate(value):
            vertex = _key(str(argument.target), dim) if argument.op == "get_attr" else argument.name
            dims.append(_copied_space(space, vertex, value.weight, copies))
        return Value(dims, weight=value.weight, tensor=value.tensor)
    if isinstance(argument, Node) and isinstance(value, list):  # a node of several tensors, passed whole
        return [_copied(argument, v, copies) for v in value]
    if isinstance(argument, list | tuple):
        return [_copied(a, v, copies) for a, v in zip(argument, value, strict=True)]
    return value


def _copied_space(space: Space, vertex: str, weight: bool, copies: list[_Copy]) -> Space:
    match resolve(space):
        case Axis() as axis:
            copies.append(_Copy(vertex, weight, Axis(axis.size), axis))
            return copies[-1].axis
        case Product(factors=inner):
            return product(*(_copied_space(s, vertex, weight, copies) for s in inner))
        case Concat(parts=inner):
            return concat(*(_copied_space(s, vertex, weight, copies) for s in inner))
        case other:
            return other


def _outputs(rule: Rule, call: Call) -> list[Sequence[Space]]:
    """What the rule returns, as one list an output; nothing if it failed (inference has then pinned the call and said so)."""
    try:
        result = rule(call)
        many = bool(result) and isinstance(result[0], list | tuple | Value)
        return [list(r) for r in result] if many else [list(result)]
    except Exception:  # noqa: BLE001 - a rule may be anybody's
        return []


def shared_groups(groups: Groups, parameter_a: str, parameter_b: str) -> list[str]:
    """Names of the prune groups that run through both parameters, prunable ones first.

    Raises:
        UsageError: A name is unknown.
    """
    through_b = _through(groups, parameter_b)
    shared = [name for name in _through(groups, parameter_a) if name in through_b]
    return sorted(shared, key=lambda name: not groups[name].prunable)


def _through(groups: Groups, parameter: str) -> list[str]:
    first = _first_name(groups, parameter)
    return [g.name for g in groups.values() if any(m.name == first for m in g.members)]


def why(groups: Groups, parameter_a: str, parameter_b: str, *, group: str | None = None) -> list[Step]:
    """Why two parameters must be pruned together: the shortest path of couplings from one to the other, within one group.

    Args:
        groups: What `fxprune.find_groups` returned.
        parameter_a: Name of a parameter or buffer; any of the names of tied weights.
        parameter_b: Name of another one.
        group: Name of the prune group to stay within. By default any that both share, prunable ones first.

    Returns:
        The steps, in order; ``str(step)`` is a line for people.

    Raises:
        UsageError: A name is unknown, both are the same, or no group (or not the given one) runs through both.
    """
    first, second = _first_name(groups, parameter_a), _first_name(groups, parameter_b)
    if parameter_a == parameter_b:
        raise UsageError(f"'{parameter_a}' is named twice: name two parameters to see what couples them")
    shared = _shared(groups, parameter_a, parameter_b, group)
    if first == second:
        dim = next(m.dim for m in groups[shared[0]].members if m.name == first)
        return [_tie(shared[0], parameter_a, parameter_b, dim)]
    graph = coupling_graph(groups)
    routes: list[tuple[bool, int, str, list[str]]] = []
    for name in shared:
        own = _within(graph, name)
        starts, ends = ([_key(m.name, m.dim) for m in groups[name].members if m.name == p] for p in (first, second))
        paths = [nx.shortest_path(own, s, e) for s in starts for e in ends if nx.has_path(own, s, e)]
        routes += [(not groups[name].prunable, len(path), name, path) for path in paths]
    if not routes:
        raise UsageError(
            f"no coupling was recorded between '{parameter_a}' and '{parameter_b}', though {shared[0]} runs through both"
        )
    _, _, name, path = min(routes, key=lambda r: r[:2])
    own = _within(graph, name)
    steps = [Step(source=a, target=b, **_facts(own.edges[a, b])) for a, b in pairwise(path)]
    if parameter_a != first:
        steps.insert(0, _tie(name, parameter_a, first, _dim(path[0])))
    if parameter_b != second:
        steps.append(_tie(name, second, parameter_b, _dim(path[-1])))
    return steps


def _first_name(groups: Groups, parameter: str) -> str:
    first = groups.aliases.get(parameter, parameter)
    if first not in groups.inference.tensors:
        raise UsageError(
            f"the traced model has no parameter '{parameter}'; {nearest(parameter, [*groups.parameters, *groups.aliases])}"
        )
    return first


def _shared(groups: Groups, a: str, b: str, wanted: str | None) -> list[str]:
    shared = shared_groups(groups, a, b)
    if wanted is not None and groups[wanted].name not in shared:
        raise UsageError(f"group '{wanted}' does not run through both '{a}' and '{b}'; {nearest(wanted, shared)}")
    if not shared:
        raise UsageError(
            f"'{a}' and '{b}' share no prune group, so neither forces the other to be pruned: "
            f"through the first run {', '.join(_through(groups, a)) or 'none'}; "
            f"through the second {', '.join(_through(groups, b)) or 'none'}"
        )
    return shared if wanted is None else [wanted]


def _tie(group: str, a: str, b: str, dim: int) -> Step:
    return Step(group=group, source=_key(a, dim), target=_key(b, dim), operator="", rule="tied", direction="")


def _dim(key: str) -> int:
    return int(key.rpartition("[")[2].removesuffix("]"))


def _facts(edge: Mapping[str, str]) -> dict[str, str]:
    return {name: edge[name] for name in ("group", "operator", "rule", "direction", "module")}


def _within(graph: nx.MultiDiGraph, group: str) -> nx.DiGraph:
    """The part of the graph that belongs to one group."""
    own = nx.DiGraph()
    own.add_nodes_from((key, data) for key, data in graph.nodes(data=True) if group in data["groups"])
    own.add_edges_from((a, b, data) for a, b, data in graph.edges(data=True) if data["group"] == group)
    return own


def triggers(groups: Groups, group_name: str, start: str | None = None) -> nx.DiGraph:
    """How pruning spreads through one group: which vertex triggers which, breadth first.

    Forward edges are LLM-Pruner's trigger into Out(N_i), backward ones its trigger into In(N_i) (arXiv 2305.11627, eq. 1 and 2).
    Its conditions on degrees (an only input, an only output) single out couplings of one neuron with one other, which is what
    an edge is here: removing a unit removes that unit's slice at both ends.

    Args:
        groups: What `fxprune.find_groups` returned.
        group_name: The prune group.
        start: Where pruning begins: a vertex of the graph (``"linear_4"``, ``"fc.weight[0]"``) or the name of a parameter. By
            default the group's first parameter.

    Returns:
        A tree that reaches every vertex of the group. Vertices carry ``order`` (0 at the start) and ``depth`` besides what
        they have in `coupling_graph`; so do edges, from what triggers to what is triggered. ``tree.graph`` holds ``group``
        and ``start``.

    Raises:
        UsageError: There is no such group, or it does not run through ``start``.
    """
    group = groups[group_name]
    own = _within(coupling_graph(groups), group.name)
    root = _start(groups, group_name, own, start)
    tree = nx.DiGraph(group=group.name, start=root)
    tree.add_node(root, **own.nodes[root], order=0, depth=0)
    for order, (a, b) in enumerate(nx.bfs_edges(own, root), 1):
        tree.add_node(b, **own.nodes[b], order=order, depth=tree.nodes[a]["depth"] + 1)
        tree.add_edge(a, b, **own.edges[a, b])
    return tree


def _start(groups: Groups, name: str, own: nx.DiGraph, start: str | None) -> str:
    members = [m for m in groups[name].members if m.trainable]
    if start is None:
        return _key(members[0].name, members[0].dim)
    if start in own:
        return start
    for member in groups[name].members:
        if member.name == groups.aliases.get(start, start):
            return _key(member.name, member.dim)
    raise UsageError(f"group '{name}' does not run through '{start}'; {nearest(start, own)}")
