"""Evaluations made by hand."""

from __future__ import annotations

from typing import Any

from fxprune import Evaluation
from fxprune.cost import Cost
from fxprune.evaluation import TaskScore


def score(task: str, acc: float, acc_norm: float | None = None, **more: Any) -> TaskScore:
    """Of ten rows, with four choices."""
    metric = "acc" if acc_norm is None else "acc_norm"
    return TaskScore(task, acc, 0.01, acc_norm, acc_norm and 0.02, metric, **{"chance": 0.25, "rows": 10, "source": "x", **more})


def made(*tasks: TaskScore, dense: Evaluation | None = None, **settings: Any) -> Evaluation:
    """Of a model of ten parameters."""
    return Evaluation(Cost(10, 40, 8), (), tasks, None, settings, {}, dense=dense)
