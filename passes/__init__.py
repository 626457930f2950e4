"""The passes: each a `torch.fx.passes.infra.pass_base.PassBase` over a GraphModule, importable as ``fxprune.passes``."""

from .compensation import CompensationPass
from .dependency import DependencyPass
from .importance import ImportancePass
from .knowledge import KnowledgePass
from .rewrite import RewritePass
from .selection import Selection, SelectionPass
from .sensitivity import SensitivityPass
from .verify import VerifyPass

__all__ = [
    "CompensationPass",
    "DependencyPass",
    "ImportancePass",
    "KnowledgePass",
    "RewritePass",
    "Selection",
    "SelectionPass",
    "SensitivityPass",
    "VerifyPass",
]
