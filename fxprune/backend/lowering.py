"""A Dynamo graph made canonical: aten operators without mutation, parameters by name, nothing that depends on no input."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.traceback import preserve_node_meta

from .._compat import aot_export_module, guard_scalar
from ..capture import canonicalise
from .aliasing import overlap
from .owner import Owner


class CannotLowerError(Exception):
    """Why a graph has to run dense, in words."""


@dataclass(frozen=True)
class Lowered:
    """A canonical graph and how it is called in place of Dynamo's.

    Attributes:
        gm: Called with the inputs below; returns what is written to inputs, then Dynamo's outputs.
        inputs: Positions, among Dynamo's inputs, of the graph's inputs.
        held: Positions of the inputs that are the owner's tensors and now live in the graph.
        written: For each of the first outputs the number of the graph's input that it is to be copied into.
        returned: For Dynamo's outputs (by number) that are an input written to, the number of that input.
    """

    gm: GraphModule
    inputs: tuple[int, ...]
    held: tuple[int, ...]
    written: tuple[int, ...]
    returned: Mapping[int, int]


def lower(gm: GraphModule, example_inputs: Sequence[Any], owner: Owner) -> Lowered:
    """Trace a Dynamo graph to aten operators, with Dynamo's own symbolic sizes: what the trace assumes about them, Dynamo guards.

    Args:
        gm: As a Dynamo backend gets it; it is not changed.
        example_inputs: Likewise.
        owner: Names the tensors that become the graph's own.

    Raises:
        CannotLowerError: The graph does something that the canonical form does not hold.
    """
    _check(gm)
    fakes = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
    try:
        with preserve_node_meta():
            made, signature = aot_export_module(_with_plain_floats(gm), fakes, trace_joint=False, pre_dispatch=True)
    except Exception as error:  # whatever it is, the graph can run dense
        first = (str(error).strip().splitlines() or ["no message"])[0]
        said = f"{type(error).__name__}: {first[:200]}"
        raise CannotLowerError(f"the graph could not be traced to aten operators ({said})") from error
    root = nn.Module()
    inputs, held, left = [], [], []
    for position, node in enumerate([n for n in made.graph.nodes if n.op == "placeholder"]):
        tensor = example_inputs[position]
        name = owner.names.get(id(tensor))
        if name is None:
            inputs.append(position)
            left.append(node.name)
        else:
            if type(tensor) not in (Tensor, nn.Parameter):  # sharded, quantised
                raise CannotLowerError(f"'{name}' is a {type(tensor).__name__}")
            _hold(made.graph, node, root, name, tensor)
            held.append(position)
    written = _written(made, signature, left)
    if overlap(example_inputs, {inputs[number] for number in written}):
        raise CannotLowerError("the graph writes to an input that shares memory with another")
    for node in made.graph.nodes:
        if node.op == "get_attr" and hasattr(made, str(node.target)):
            setattr(root, str(node.target), getattr(made, str(node.target)))
    _name_modules(gm, made.graph, example_inputs, owner)
    canonical = GraphModule(root, made.graph)
    canonical.meta["aliases"] = dict(owner.aliases)
    canonicalise(canonical, set(owner.names.values()))
    if any(isinstance(m, GraphModule) for m in canonical.children()):
        raise CannotLowerError("the graph has a region of its own (control flow, checkpointing or another higher-order operator)")
    returned = _returned(gm, {inputs[number]: number for number in written})
    return Lowered(canonical, tuple(inputs), tuple(held), tuple(written), returned)


def _check(gm: GraphModule) -> None:
    if any(True for _ in gm.parameters()) or any(True for _ in gm.buffers()):
        # else Dynamo gives parameters as inputs (torch 2.11 to 2.13)
        raise CannotLowerError("the graph holds tensors of its own, as with torch._inductor.config.freezing")
    if any(torch.is_autocast_enabled(kind) for kind in {t.device.type for n in gm.graph.nodes for t in _tensors(n)} - {"meta"}):
        raise CannotLowerError("the graph is compiled under autocast")
    for node in gm.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "_enter_autocast" and node.args[2]:
            raise CannotLowerError("the graph has an autocast region")


def _tensors(node: Node) -> list[Tensor]:
    values = torch.utils._pytree.tree_leaves(node.meta.get("example_value"))
    return [v for v in values if isinstance(v, Tensor)]


def _with_plain_floats(gm: GraphModule) -> GraphModule:
    """Floats that Dynamo took for symbolic are made plain numbers, each with a guard: an export takes no others."""
    graph, table = Graph(), dict[Node, Node]()
    result = graph.graph_copy(gm.graph, table)
    graph.output(result)
    for old, node in table.items():
        value = old.meta.get("example_value")
        if old.op == "call_method" and old.target == "item" and isinstance(value, torch.SymFloat):
            node.replace_all_uses_with(guard_scalar(value))
            graph.erase_node(node)
    return GraphModule(gm, graph)


def _hold(graph: Graph, node: Node, root: nn.Module, name: str, tensor: Tensor) -> None:
    """Let an input be a tensor of the module tree."""
    *path, leaf = name.split(".")
    owner = root
    for piece in path:
        if piece not in owner._modules:
            owner.add_module(piece, nn.Module())
        owner = owner.get_submodule(piece)
    (owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers)[leaf] = tensor  # type: ignore[assignment]
    with graph.inserting_before(next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))):
        made = graph.create_node("get_attr", name)
    made.meta = {"val": tensor}
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _written(made: GraphModule, signature: Any, left: list[str]) -> list[int]:
    """Numbers of the inputs that the first outputs are to be copied into."""
    outputs: Any = next(n for n in reversed(made.graph.nodes) if n.op == "output").args[0]
    if len(outputs) != len(signature.user_inputs_to_mutate) + len(signature.user_outputs):
        raise CannotLowerError("the graph writes one value to several inputs")
    written = []
    for name in signature.user_inputs_to_mutate.values():
        if name not in left:
            raise CannotLowerError("the graph writes to a buffer or a parameter")
        written.append(left.index(name))
    return written


def _returned(gm: GraphModule, written: Mapping[int, int]) -> dict[int, int]:
    """Outputs that are inputs written to: the functional graph holds their new values in tensors of its own."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    changed = {number: placeholders[position].meta["example_value"] for position, number in written.items()}
    results: Any = next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0]
    returned = {}
    for position, node in enumerate(results):
        for tensor in _tensors(node) if isinstance(node, Node) else []:
            for number, other in changed.items():
                if tensor.untyped_storage()._cdata != other.untyped_storage()._cdata:
                    continue
                if _geometry(tensor) != _geometry(other):
                    raise CannotLowerError("the graph returns a view of an input that it writes to")
                returned[position] = number
    return returned


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return (*tensor.shape, *tensor.stride(), tensor.storage_offset())


def _name_modules(gm: GraphModule, graph: Graph, example_inputs: Sequence[Any], owner: Owner) -> None:
    """Give every node's ``nn_module_stack`` the owner's module paths in place of the frame's."""
    table: dict[str, str] = {}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, tensor in zip(placeholders, example_inputs, strict=True):
        name, source = owner.names.get(id(tensor)), getattr(node, "_dynamo_source", None)
        if name is None or source is None:
            continue
        there = re.sub(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", source.name).split(".")
        here = name.split(".")
        while there and here and there[-1] == here[-1]:
            there, here = there[:-1], here[:-1]
            table[".".join(there)] = ".".join(here)
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {k: (table.get(v[0], v[0]), *v[1:]) for k, v in stack.items()}
