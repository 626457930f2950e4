"""fxprune: structured pruning of transformers as torch.fx passes. Importing it is light; each name loads when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .api import PruneReport as PruneReport
    from .api import PruneResult as PruneResult
    from .api import prune as prune
    from .backend import Backend as Backend
    from .capture import trace as trace
    from .checkpoint.load import load as load
    from .evaluation.result import Evaluation as Evaluation
    from .evaluation.run import evaluate as evaluate
    from .explorer.explore import Explorer as Explorer
    from .explorer.explore import explore as explore
    from .groups import Groups as Groups
    from .groups import PruneGroup as PruneGroup
    from .knowledge import Knowledge as Knowledge
    from .lorashear.lhspg import LHSPG as LHSPG
    from .lorashear.result import ShearReport as ShearReport
    from .lorashear.result import ShearResult as ShearResult
    from .lorashear.run import shear as shear
    from .passes.compensation import compensate as compensate
    from .passes.dependency import find_groups as find_groups
    from .passes.importance import score as score
    from .passes.influence import block_influence as block_influence
    from .passes.knowledge import measure_knowledge as measure_knowledge
    from .passes.rewrite import rewrite as rewrite
    from .passes.selection import Selection as Selection
    from .passes.selection import select as select
    from .passes.sensitivity import measure_curves as measure_curves
    from .passes.verify import verify as verify
    from .pipeline import Pipeline as Pipeline
    from .pipeline import PipelineResult as PipelineResult
    from .plan import PrunePlan as PrunePlan
    from .recovery.curriculum import Curriculum as Curriculum
    from .recovery.result import RecoveryReport as RecoveryReport
    from .recovery.result import RecoveryResult as RecoveryResult
    from .recovery.run import recover as recover
    from .recovery.settings import Recovery as Recovery
    from .reporting.compare import Comparison as Comparison
    from .reporting.compare import compare as compare
    from .reporting.page import render_report as render_report
    from .rules import rule as rule

_WHERE = {
    "Backend": ".backend",
    "Comparison": ".reporting.compare",
    "Curriculum": ".recovery.curriculum",
    "Evaluation": ".evaluation.result",
    "Explorer": ".explorer.explore",
    "Groups": ".groups",
    "Knowledge": ".knowledge",
    "LHSPG": ".lorashear.lhspg",
    "Pipeline": ".pipeline",
    "PipelineResult": ".pipeline",
    "PruneGroup": ".groups",
    "PrunePlan": ".plan",
    "PruneReport": ".api",
    "PruneResult": ".api",
    "Recovery": ".recovery.settings",
    "RecoveryReport": ".recovery.result",
    "RecoveryResult": ".recovery.result",
    "Selection": ".passes.selection",
    "ShearReport": ".lorashear.result",
    "ShearResult": ".lorashear.result",
    "block_influence": ".passes.influence",
    "compare": ".reporting.compare",
    "compensate": ".passes.compensation",
    "evaluate": ".evaluation.run",
    "explore": ".explorer.explore",
    "find_groups": ".passes.dependency",
    "load": ".checkpoint.load",
    "measure_curves": ".passes.sensitivity",
    "measure_knowledge": ".passes.knowledge",
    "prune": ".api",
    "recover": ".recovery.run",
    "render_report": ".reporting.page",
    "rewrite": ".passes.rewrite",
    "rule": ".rules",
    "score": ".passes.importance",
    "select": ".passes.selection",
    "shear": ".lorashear.run",
    "trace": ".capture",
    "verify": ".passes.verify",
}

__all__ = ["__version__", *_WHERE]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fxprune' has no attribute '{name}'")
    value = getattr(importlib.import_module(_WHERE[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
