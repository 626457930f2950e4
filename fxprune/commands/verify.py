"""``fxprune verify``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..api import example_inputs
from ..capture import trace
from ..checkpoint.eager import dropped_entries, renamed
from ..checkpoint.source import load_source
from ..errors import PlanError, UsageError, VerificationError
from ..mode import quiet
from ..names import PLAN_FILE, REPORT_FILE
from ..passes.rewrite import rewrite
from ..passes.verify import VerifyReport, verify
from ..plan import PrunePlan
from .common import dump, load_model


def run(arguments: argparse.Namespace) -> int:
    """Check a written checkpoint against its dense model; a plan that is damaged or another model's is a check that fails."""
    try:
        return _run(arguments)
    except PlanError as error:
        raise VerificationError(str(error)) from error


def _run(arguments: argparse.Namespace) -> int:
    path = Path(arguments.model)
    if not path.is_dir():
        raise UsageError(f"there is no directory '{path}'")
    if not (path / PLAN_FILE).is_file():
        raise UsageError(f"'{path}' holds no {PLAN_FILE}: it is no checkpoint that fxprune wrote")
    plan = PrunePlan.load(path / PLAN_FILE)
    slices: dict[str, Any] = {}
    written = _written(path)
    changed = _changed(written)
    pruned, _ = load_model(arguments)
    dense, _ = load_source(arguments.dense, dtype=arguments.dtype)
    dense = dense.to(arguments.device)
    inputs = example_inputs(dense)
    gm = trace(dense, inputs)
    if changed:
        small = rewrite(gm, plan)
        report = verify(gm, small, plan, inputs)
        slices = {"changed_by": changed, **_compare(pruned, small, plan, path, _made_up(written))}
    else:
        report = verify(gm, _WithoutCache(pruned), plan, inputs)
    if arguments.json:
        dump({**report.to_json(), **slices})
    elif report.ok:
        print("\n".join(_said(path, report, slices)))
    if not report.ok:
        raise VerificationError(
            f"'{path}' differs from the {report.reference} model: relative error {report.max_rel_error:.2e}, "
            f"allowed {report.tolerance:.0e}"
        )
    return 0


def _written(path: Path) -> dict[str, Any]:
    """The checkpoint's report, empty if there is none to read."""
    try:
        found = json.loads((path / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _changed(report: Mapping[str, Any]) -> list[str]:
    """What has changed the weights, so that they are not the dense model's."""
    made_up = (report.get("compensation") or {}).get("method")
    trained = [what for what in ("shearing", "recovery") if report.get(what)]
    return [*([f"compensation ({made_up})"] if made_up else []), *trained]


def _made_up(report: Mapping[str, Any]) -> Callable[[str], bool] | None:
    """Which parameters compensation may have changed, by name; None where training may have changed any."""
    if report.get("shearing") or report.get("recovery"):
        return None
    maps = set(report["compensation"].get("maps") or ())
    return maps.__contains__ if maps else lambda name: name.endswith(".bias")


def _said(path: Path, report: VerifyReport, slices: dict[str, Any]) -> list[str]:
    """What was compared, and how near it came."""
    what = f"the plan of '{path}', applied to the dense model," if slices else f"'{path}'"
    error = f"relative error {report.max_rel_error:.1e}, allowed {report.tolerance:.0e}"
    lines = [f"{what} equals its reference ({report.reference}): {error}"]
    if slices:
        lines.append(
            f"besides being cut, weights were changed by {' and '.join(slices['changed_by'])}: "
            f"{slices['slices_of_the_dense_model']} of {slices['parameters']} weight tensors are the dense model's slices"
        )
        lines.append("of the others only the shapes can be checked: their numbers are not the dense model's")
    return lines


def _compare(
    pruned: nn.Module, small: nn.Module, plan: PrunePlan, path: Path, free: Callable[[str], bool] | None
) -> dict[str, int]:
    """How many parameters are still slices of the dense model's; all must have the shapes of slices.

    Args:
        pruned: The checkpoint.
        small: What the plan makes of the dense model.
        plan: The plan.
        path: Of the checkpoint, for messages.
        free: Which parameters may differ; None for all.

    Raises:
        VerificationError: A parameter is missing, has another shape, or differs and may not.
    """
    drop, same, total = dropped_entries(plan), 0, 0
    own = dict(pruned.named_parameters(remove_duplicate=False))
    for name, slice_ in small.named_parameters():
        found = own.get(renamed(name, drop) or name)
        if found is None or found.shape != slice_.shape:
            shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
            raise VerificationError(f"in '{path}' parameter '{name}' is {shape}; the plan makes it {tuple(slice_.shape)}")
        total += 1
        equal = torch.equal(found.detach(), slice_.detach().to(found.dtype))
        if not equal and free is not None and not free(name):
            raise VerificationError(
                f"in '{path}' parameter '{name}' is not the dense model's slice, and nothing is known to have changed it"
            )
        same += int(equal)
    return {"parameters": total, "slices_of_the_dense_model": same}


class _WithoutCache(nn.Module):
    """An eager model called as it was traced: without a KV cache in its outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        with quiet(self.model):
            return self.model(**inputs)
