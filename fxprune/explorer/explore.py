"""`fxprune.explore`: from a model, or from groups, scores and a plan, to a page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..api import example_inputs
from ..calibration import BATCH, LENGTH, SAMPLES, Calibration, load_calibration
from ..capture import trace
from ..criteria import Criterion, UserCriterion, find_criterion
from ..errors import UsageError, check_whole
from ..files import write_whole
from ..groups import Groups
from ..passes.batches import Progress
from ..passes.dependency import find_groups
from ..passes.importance import score
from ..plan import PrunePlan
from .data import explorer_data
from .page import render

CRITERION = "l2"
"""What importance is where nothing is said: it needs no text."""

NO_WEIGHTS = "the model was built without weights"


@dataclass(frozen=True)
class Explorer:
    """A page about a model's prune groups.

    Attributes:
        data: What it shows: see `fxprune.explorer.data.explorer_data`.
        html: The page itself: one file, no server, no network.
    """

    data: Mapping[str, Any] = field(repr=False)
    html: str = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page in one step.

        Raises:
            UsageError: The file cannot be written.
        """
        write_whole(path, self.html, called="the explorer")


def explore(
    model: nn.Module | Groups,
    *,
    plan: PrunePlan | str | os.PathLike[str] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    criterion: str | Criterion | UserCriterion | None = None,
    calibration: Calibration = None,
    tokenizer: Any = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    batch_size: int = BATCH,
    seed: int = 0,
    inputs: Any = None,
    title: str | None = None,
    progress: Progress | None = None,
) -> Explorer:
    """Make a page that shows what can be pruned, what each unit is worth, what a plan keeps and why the rest is pinned.

    Args:
        model: A model, which is traced; or what `fxprune.find_groups` returned. Weights are needed for importance only.
        plan: What is to be kept, or the file of a plan.
        scores: Importance of units, as `fxprune.score` returns it. By default what the plan recorded; else by ``criterion``.
        criterion: See `fxprune.criteria.CRITERIA`; by default ``l2``, which reads no text.
        calibration: As for `fxprune.prune`, for criteria that read text.
        tokenizer: For text.
        samples: Calibration samples.
        length: Tokens of each.
        batch_size: Samples at a time.
        seed: Of calibration and of the criterion ``random``.
        inputs: Example inputs to trace with; by default token ids for a model with a vocabulary.
        title: The page's name for the model.
        progress: Called with (what, done, total).

    Returns:
        An `Explorer`; ``explore(model).save("model.html")``.

    Raises:
        UsageError: Arguments that contradict each other, or a criterion for a model without weights.
        CaptureError: The model cannot be traced.
        PlanError: The plan is of another model.
    """
    if not isinstance(model, nn.Module | Groups):
        raise UsageError(f"expected a torch.nn.Module or its prune groups to explore, got {type(model).__name__}")
    found = None if criterion is None else find_criterion(criterion)
    if found is not None and scores is not None:
        raise UsageError("scores= are shown as they are: leave out criterion=")
    if found is not None and isinstance(model, Groups):
        raise UsageError("criterion= needs the model; with groups, give scores=")
    for name, value in (("samples", samples), ("length", length), ("batch_size", batch_size)):
        check_whole(name, value, 1)
    if calibration is not None:
        check_reads(criterion)
    read = plan if plan is None or isinstance(plan, PrunePlan) else PrunePlan.load(plan)
    bare = isinstance(model, nn.Module) and any(p.is_meta for p in model.parameters())
    if bare and found is not None:
        raise UsageError(f"criterion= needs weights, and {NO_WEIGHTS}")

    gm: GraphModule | None = None
    if isinstance(model, Groups):
        groups = model
    else:
        gm = trace(model, inputs if inputs is not None else example_inputs(model))
        groups = find_groups(gm)
    said = {"why": NO_WEIGHTS if bare else "no scores were given"}
    if scores is not None:
        said = {"name": "as given", "formula": "", "data": ""}
    elif found is None and read is not None and read.scores:
        read.check(groups)
        scores, said = read.scores, _recorded(read)
    elif gm is not None and isinstance(model, nn.Module) and not bare:
        chosen = found or find_criterion(CRITERION)
        batches: list[Mapping[str, Tensor]] = []
        text = "no text is read"
        if not isinstance(chosen, Criterion) or chosen.calibrated:
            shape = {"samples": samples, "length": length, "batch_size": batch_size, "seed": seed}
            batches, text = load_calibration(calibration, model=model, tokenizer=tokenizer, **shape)
        scores = score(gm, groups, chosen, batches, seed=seed, progress=progress)
        said = {**_named(chosen), "data": text}
    data = explorer_data(
        groups,
        title=title or _title(model),
        architecture="" if isinstance(model, Groups) else type(model).__name__,
        scores=_checked(groups, scores),
        importance=said,
        plan=read,
    )
    return Explorer(data, render(data))


def check_reads(criterion: str | Criterion | UserCriterion | None) -> None:
    """Raise `UsageError` unless that criterion (None: the default) reads calibration text."""
    found = find_criterion(CRITERION if criterion is None else criterion)
    if isinstance(found, Criterion) and not found.calibrated:
        raise UsageError(f"criterion '{found.name}' reads no text: leave out calibration=, or name one that does, such as taylor1")


def _named(criterion: Criterion | UserCriterion) -> dict[str, str]:
    if isinstance(criterion, Criterion):
        return {"name": criterion.name, "formula": criterion.formula}
    return {"name": getattr(criterion, "__name__", "callable"), "formula": ""}


def _recorded(plan: PrunePlan) -> dict[str, str]:
    name = str(plan.recipe.get("criterion", "as recorded"))
    try:
        told = _named(find_criterion(name))
    except UsageError:
        told = {"name": name, "formula": ""}
    return {**told, "data": f"recorded in the plan; calibration: {plan.recipe.get('calibration', 'none')}"}


def _checked(groups: Groups, scores: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    """Scores as CPU tensors of the groups' sizes."""
    if scores is None:
        return None
    made = {}
    for name, own in scores.items():
        values = torch.as_tensor(own).detach().float().cpu()
        if values.shape != (groups[name].size,):
            raise UsageError(f"the scores of group '{name}' must have shape [{groups[name].size}], got {list(values.shape)}")
        made[name] = values
    return made


def _title(model: nn.Module | Groups) -> str:
    if isinstance(model, Groups):
        return "Prune groups"
    named = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    local = Path(named).is_absolute() or named.startswith(".")
    return (Path(named).name if local else named) or type(model).__name__
