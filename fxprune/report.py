"""What a prune's report says beyond what `fxprune.prune` measured on the way: sizes, the spread of the scores, the dense model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .cost import costs
from .errors import FxPruneError
from .files import read_json
from .groups import Groups
from .names import CONFIG_FILE
from .plan import PrunePlan
from .reporting.numbers import base_model, part, read_record

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Of the scores of a group's units, as the report gives them."""


def account(model: nn.Module, groups: Groups, plan: PrunePlan) -> dict[str, Any]:
    """Fields of `fxprune.PruneReport` that follow from the model and the plan.

    Returns:
        ``dense``, ``macs_before``, ``macs_after``, ``whole``, ``curves`` and ``importance``: for each group that lost units or
        could have, ``units``, ``quantiles`` of its scores at `QUANTILES`, and ``cut``, the largest score of a unit that went (None
        where none did).
    """
    before, after = costs(groups, plan)
    kinds = {groups[name].kind for name in plan.keep} | set(plan.recipe.get("kinds") or ())
    inside = tuple(f"{path}." for path in plan.drop)
    open_ = [g for g in groups.values() if g.prunable and g.kind in kinds and not g.name.startswith(inside)]
    gone = plan.removed()
    return {
        "dense": describe(model, groups),
        "macs_before": before.macs,
        "macs_after": after.macs,
        "whole": {g.name: g.size for g in open_ if g.name not in plan.keep},
        "importance": {
            g.name: _spread(plan.scores[g.name].detach().double().cpu(), gone.get(g.name)) for g in open_ if g.name in plan.scores
        },
        "curves": {lane: [[units, _short(change)] for units, change in curve] for lane, curve in plan.curves.items()},
    }


def describe(model: nn.Module, groups: Groups) -> dict[str, Any]:
    """What the dense model is called, and what it is; no path on this machine is told."""
    path = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    name, hub = source_name(path)
    found = {
        "name": name,
        "hub": hub,
        "class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "fingerprint": groups.fingerprint(),
    }
    if (stored := _stored_dtype(path)) not in ("", found["dtype"]):
        found["stored_dtype"] = stored
    told = {"base_model": None if hub else origin_of(path), "license": license_of(path)}
    return found | {key: value for key, value in told.items() if value is not None}


def _stored_dtype(path: str) -> str:
    """The dtype of the weights in a local checkpoint, as its configuration says; empty where nothing says it."""
    try:
        config = read_json(Path(path) / CONFIG_FILE) if path else {}
        return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    except (FxPruneError, AttributeError):
        return ""


def source_name(path: str) -> tuple[str, bool]:
    """What a model is called by the path or id that it was loaded from, and whether that is a hub id."""
    if cached := re.search(r"models--([^/]+)--([^/]+)/snapshots/", f"{path}/"):
        return f"{cached[1]}/{cached[2]}", True
    if path and Path(path).exists():
        return Path(path).resolve().name, False
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith("."):
        return path, True
    return Path(path).name, False


def origin_of(path: str) -> str | None:
    """The hub id that a checkpoint of ours in a directory comes from, where its report says one.

    What another directory's card calls its base model is not asked: in a copy of a hub's model that is what the copied model was
    made from, which is not the model.
    """
    try:
        return base_model(part(read_record(path).report, "dense")) if path else None
    except FxPruneError:  # no checkpoint of ours, or a damaged report
        return None


def license_of(path: str) -> str | None:
    """The licence that a model's card names, if the card is on this machine."""
    from huggingface_hub import metadata_load, try_to_load_from_cache
    from yaml import YAMLError

    if not path:
        return None
    try:
        card = Path(path) / "README.md"
        if not card.is_file():
            cached = try_to_load_from_cache(path, "README.md")
            if not isinstance(cached, str):
                return None
            card = Path(cached)
        given = (metadata_load(card) or {}).get("license")
    except (ValueError, OSError, YAMLError):  # no id, or a card that is none
        return None
    return given if isinstance(given, str) else None


def _spread(scores: Tensor, gone: Tensor | None) -> dict[str, Any]:
    points = torch.quantile(scores, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    cut = None if gone is None or not len(gone) else _short(float(scores[gone].max()))
    return {"units": len(scores), "quantiles": [_short(p) for p in points], "cut": cut}


def _short(value: float) -> float:
    """Four digits are enough to draw."""
    return float(f"{value:.4g}")
