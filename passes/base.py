"""The common base of our passes: torch's `PassBase` with its known traps closed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from operator import attrgetter

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult

log = logging.getLogger("fxprune")

GROUPS = "fxprune.groups"

FOUND_IN = "fxprune.found_in"
"""Key of ``gm.meta``: the `stamp` of the graph that the groups there were found in."""


class Pass(PassBase):
    """A pass over a GraphModule: configuration at construction, ``call(gm) -> PassResult``.

    Works alone and inside `torch.fx.passes.infra.pass_manager.PassManager`. Unlike torch's base class, ``ensures`` is given the
    resulting module, and a modified graph is linted and recompiled. Prune groups that an earlier pass left are forgotten if
    another pass has changed the graph or its tensors since: they are found again where they are needed.
    """

    def __call__(self, graph_module: GraphModule) -> PassResult | None:
        """Run requires, call, lint, ensures; in that order."""
        if GROUPS in graph_module.meta and graph_module.meta.get(FOUND_IN) != stamp(graph_module):
            log.info("the graph has changed since its prune groups were found: they are found again")
            del graph_module.meta[GROUPS]
        self.requires(graph_module)
        result = self.call(graph_module)
        if result is not None and result.modified:
            result.graph_module.graph.lint()
            result.graph_module.recompile()
        self.ensures(result.graph_module if result is not None else graph_module)
        return result


def stamp(gm: GraphModule) -> int:
    """A number that changes with what groups are found from: nodes, their order and arguments, and which tensors they read."""

    def parts() -> Iterator[tuple[object, ...]]:
        for node in gm.graph.nodes:
            tensor = id(attrgetter(node.target)(gm)) if node.op == "get_attr" else 0
            yield node.name, node.op, str(node.target), str(node.args), str(node.kwargs), tensor

    return hash(tuple(parts()))
