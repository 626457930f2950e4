"""The common base of our passes: torch's `PassBase` with its known traps closed."""

from __future__ import annotations

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult


class Pass(PassBase):
    """A pass over a GraphModule: configuration at construction, ``call(gm) -> PassResult``.

    Works alone and inside `torch.fx.passes.infra.pass_manager.PassManager`. Unlike torch's base class, ``ensures`` is given the
    resulting module, and a modified graph is linted and recompiled.
    """

    def __call__(self, graph_module: GraphModule) -> PassResult | None:
        """Run requires, call, lint, ensures; in that order."""
        self.requires(graph_module)
        result = self.call(graph_module)
        if result is not None and result.modified:
            result.graph_module.graph.lint()
            result.graph_module.recompile()
        self.ensures(result.graph_module if result is not None else graph_module)
        return result
