"""The dependency pass: coupling rules over the graph, solved into prune groups."""

from __future__ import annotations

import logging
from typing import cast

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from ..blocks import find_blocks, mark_residuals, residual_adds
from ..errors import UsageError
from ..groups import Groups, build_groups
from .base import FOUND_IN, GROUPS, Pass, stamp
from .inference import axes_of, infer

PLAN = "fxprune.plan"

log = logging.getLogger("fxprune")


class DependencyPass(Pass):
    """Find the prune groups of a traced model and leave them in ``gm.meta["fxprune.groups"]``.

    The forward and backward rules of LLM-Pruner (arXiv 2305.11627, eq. 1 and 2: a neuron whose only input, or only output, is a
    pruned neuron must go too) are what unification computes when every operator couples one to one. Each node's
    ``meta["fxprune.groups"]`` lists the groups that run through it.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        """Infer, build groups, annotate; the graph itself is not modified."""
        if getattr(graph_module, "has_folding_been_run", True) is False:
            raise UsageError("the constants that were split off this graph are not computed yet: call run_folding() on it first")
        calls = [node for node in graph_module.graph.nodes if node.op not in ("get_attr", "output")]
        if unknown := sum("val" not in node.meta for node in calls):
            log.warning(
                "%d of %d nodes have no example value (node.meta['val']), and what they touch is pinned: "
                "run a FakeTensorProp, or trace the model again",
                unknown,
                len(calls),
            )
        found = infer(graph_module)
        adds = residual_adds(graph_module)
        mark_residuals(adds, found.values)
        groups = build_groups(found, find_blocks(graph_module, adds), graph_module.meta.get("aliases", {}))
        by_axis = {g.axis: g.name for g in groups.values()}
        for node in graph_module.graph.nodes:
            axes = axes_of(found.values.get(node.name))
            node.meta[GROUPS] = sorted(by_axis[a] for a in axes if a in by_axis)
        graph_module.meta[GROUPS], graph_module.meta[FOUND_IN] = groups, stamp(graph_module)
        return PassResult(graph_module, False)


def find_groups(gm: GraphModule) -> Groups:
    """The prune groups of a traced model.

    Args:
        gm: What `fxprune.trace` returned.

    Returns:
        A mapping from group name to `PruneGroup`.

    Raises:
        UsageError: ``gm`` is not a GraphModule.
    """
    if not isinstance(gm, GraphModule):
        raise UsageError(f"expected the GraphModule that fxprune.trace returns, got {type(gm).__name__}: trace the model first")
    DependencyPass()(gm)
    return cast(Groups, gm.meta[GROUPS])


def groups_of(gm: GraphModule) -> Groups:
    """The groups that a dependency pass left on the graph; found now if none has run, or if the module is a copy since."""
    found: Groups | None = gm.meta.get(GROUPS)
    return found if found is not None and found.are_of(gm) else find_groups(gm)
