"""``fxprune verify``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from ..api import example_inputs
from ..capture import quiet, trace
from ..checkpoint.save import PLAN_FILE
from ..checkpoint.source import load_source
from ..errors import UsageError, VerificationError
from ..passes.verify import verify
from ..plan import PrunePlan
from .common import dump, load_model


def run(arguments: argparse.Namespace) -> int:
    """Check a written checkpoint against its dense model."""
    path = Path(arguments.model)
    if not path.is_dir():
        raise UsageError(f"there is no directory '{path}'")
    if not (path / PLAN_FILE).is_file():
        raise UsageError(f"'{path}' holds no {PLAN_FILE}: it is no checkpoint that fxprune wrote")
    plan = PrunePlan.load(path / PLAN_FILE)
    pruned, _ = load_model(arguments)
    dense, _ = load_source(arguments.dense, dtype=arguments.dtype)
    dense = dense.to(arguments.device)
    inputs = example_inputs(dense)
    gm = trace(dense, inputs)
    report = verify(gm, _WithoutCache(pruned), plan, inputs)
    dump(report.to_json())
    if not report.ok:
        raise VerificationError(
            f"'{path}' differs from the {report.reference} model: relative error {report.max_rel_error:.2e}, "
            f"allowed {report.tolerance:.0e}"
        )
    return 0


class _WithoutCache(nn.Module):
    """An eager model called as it was traced: without a KV cache in its outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        with quiet(self.model):
            return self.model(**inputs)
