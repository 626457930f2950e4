"""Names: what the path of a group or module says of its place, and what a checkpoint's files are called."""

from __future__ import annotations

import re

CONFIG_FILE = "config.json"
PLAN_FILE = "fxprune_plan.json"
REPORT_FILE = "fxprune_report.json"
RECIPE_FILE = "fxprune_recipe.yaml"
EVALUATION_FILE = "eval.json"
SPEC_FILE = "fxprune_surgery.json"
BLOCK_SCORES = "block_scores"
"""Where a plan's recipe has the importance of each residual block."""


def family_of(name: str) -> str:
    """A group's name with its layer number left out."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1)


def layer_of(path: str) -> int | None:
    """The first number in a dotted path."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found[1]) if found else None
