"""The rewrite pass: a plan applied to the graph gives a smaller GraphModule."""

from __future__ import annotations

import copy
import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from .._compat import quiet_trees
from ..capture import remove_dead
from ..errors import UsageError
from ..groups import Groups
from ..plan import PrunePlan
from ..rules import Resize, rule_for
from ..rules.registry import bind, rebind
from ..rules.views import OF_ANY_STRIDE
from ..sizes import SIZES
from ..spaces import Axis, Space, kept
from .base import Pass
from .dependency import PLAN, groups_of
from .inference import tensor_list
from .modules import to_modules

aten: Any = torch.ops.aten

DENSE = "fxprune.dense"
"""Key of ``gm.meta``: a weak reference to the dense module that a pruned one came from."""


LASTING = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "custom", "partitioner_tag", "quantization_tag")
"""What of a node's ``meta`` is true of the pruned node too: where it comes from, and tags of other passes (``custom`` is what
`torch.fx.traceback.annotate` writes). Sizes, example values and whatever refers to other nodes are not."""


class RewritePass(Pass):
    """Emit the smaller module that a plan describes; the module passed in stays as it was.

    Parameters are sliced copies. Linear, embedding and convolution parameters live in real ``nn`` submodules under their
    original paths, so that PEFT can inject into them and `torch.compile` sees an ordinary module.

    Args:
        plan: What to keep; by default what a `SelectionPass` left on the graph.
    """

    def __init__(self, plan: PrunePlan | None = None) -> None:
        super().__init__()
        self.plan = plan

    def call(self, graph_module: GraphModule) -> PassResult:
        """Copy the graph, drop blocks, resize every call, slice every tensor."""
        groups = groups_of(graph_module)
        plan = self.plan or graph_module.meta.get(PLAN)
        if plan is None:
            raise UsageError("there is no plan: run a SelectionPass before the RewritePass, or give it a plan")
        plan.check(groups)
        choice = {groups[n].axis: units for n, units in plan.keep.items()}
        graph, new = _copy(graph_module)
        _resize(graph_module, groups, graph, new, choice)
        _drop(groups, new, plan)
        remove_dead(graph)
        root = _slice_tensors(graph_module, groups, graph, choice)
        to_modules(graph, root, groups.aliases)
        small = GraphModule(root, graph)
        small.meta[PLAN], small.meta[DENSE] = plan, weakref.ref(graph_module)
        if SIZES in graph_module.meta:
            graph_module.meta[SIZES].register(small)
        small.eval()
        return PassResult(small, True)


def rewrite(gm: GraphModule, plan: PrunePlan) -> GraphModule:
    """The smaller GraphModule that a plan describes.

    Args:
        gm: What `fxprune.trace` returned; it is not changed.
        plan: What to keep.

    Returns:
        A GraphModule called like ``gm``, with `nn.Linear` and `nn.Embedding` submodules under their original paths.

    Raises:
        PlanError: The plan belongs to another model or is impossible.
    """
    result = RewritePass(plan)(gm)
    assert result is not None
    small: GraphModule = result.graph_module
    return small


def _copy(gm: GraphModule) -> tuple[Graph, dict[Node, Node]]:
    graph, new = Graph(), dict[Node, Node]()
    output = graph.graph_copy(gm.graph, new)
    assert output is not None
    old_output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    new[old_output] = graph.output(output)
    with quiet_trees():
        graph.set_codegen(copy.deepcopy(gm.graph._codegen))
    for old, made in new.items():
        made.meta = {k: v for k, v in old.meta.items() if k in LASTING}
    return graph, new


def _resize(gm: GraphModule, groups: Groups, graph: Graph, new: dict[Node, Node], choice: dict[Axis, Tensor]) -> None:
    found = groups.inference

    def units(axis: Axis) -> int:
        return len(choice[axis]) if axis in choice else axis.size

    for old in gm.graph.nodes:
        call, node = found.calls.get(old.name), new[old]
        if call is None:
            continue
        node.target = OF_ANY_STRIDE.get(node.target, node.target)
        rule = rule_for(old.target)
        if rule is None or rule.resizer is None:
            continue
        resize = Resize(
            node=node,
            arguments=bind(node),
            inputs=call.arguments,
            outputs=tensor_list(found.values[old.name]),
            notes=call.notes,
            count=units,
            emit=_emitter(graph, node),
        )
        changed = rule.resizer(resize) or {}
        if unknown := [name for name in changed if name not in resize.arguments]:
            raise UsageError(f"the rule '{rule.name}' changes an argument '{unknown[0]}' that {old.target} does not have")
        rebind(node, {k: v for k, v in changed.items() if v != resize.arguments[k]})


def _emitter(graph: Graph, node: Node) -> Callable[[Node, int, int], Node]:
    def emit(old: Node, before: int, after: int) -> Node:
        with graph.inserting_before(node):
            unit = graph.call_function(operator.floordiv, (old, before))
            return graph.call_function(operator.mul, (unit, after))

    return emit


def _drop(groups: Groups, new: dict[Node, Node], plan: PrunePlan) -> None:
    by_name = {old.name: node for old, node in new.items()}
    replaced: dict[Node, Node] = {}
    for path in plan.drop:
        block = groups.blocks[path]
        source = by_name[block.source]
        while source in replaced:
            source = replaced[source]
        by_name[block.result].replace_all_uses_with(source)
        replaced[by_name[block.result]] = source


def slice_tensor(tensor: Tensor, dims: list[Space], choice: dict[Axis, Tensor]) -> Tensor:
    """A copy of a tensor with only the indices that every dimension keeps."""
    out = tensor.detach()
    for dim, space in enumerate(dims):
        index = kept(space, choice.get)
        if index is not None:
            out = out.index_select(dim, index.to(out.device))
    return out if out.data_ptr() != tensor.data_ptr() and not tensor.is_meta else out.clone()


def _slice_tensors(gm: GraphModule, groups: Groups, graph: Graph, choice: dict[Axis, Tensor]) -> nn.Module:
    root = nn.Module()
    for name in dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "get_attr"):
        owner = root
        *path, leaf = name.split(".")
        for piece in path:
            if piece not in owner._modules:
                owner.add_module(piece, nn.Module())
            owner = owner.get_submodule(piece)
        value = groups.inference.tensors.get(name)
        if value is None:  # a branch or a loop's body, which nothing is pruned in
            owner.add_module(leaf, copy.deepcopy(gm.get_submodule(name)))
            continue
        assert value.tensor is not None
        data = slice_tensor(value.tensor, value.dims, choice)
        if isinstance(value.tensor, nn.Parameter):
            owner.register_parameter(leaf, nn.Parameter(data, requires_grad=value.tensor.requires_grad))
        else:
            owner.register_buffer(leaf, data)
    return root
