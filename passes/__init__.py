"""The passes: each a `torch.fx.passes.infra.pass_base.PassBase` over a GraphModule, importable as ``fxprune.passes``."""

from .dependency import DependencyPass
from .importance import ImportancePass
from .rewrite import RewritePass
from .selection import Selection, SelectionPass
from .verify import VerifyPass

__all__ = ["DependencyPass", "ImportancePass", "RewritePass", "Selection", "SelectionPass", "VerifyPass"]
