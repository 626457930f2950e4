"""How long a shearing trains: its tokens or steps, divided among warm-up, periods and recovery."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError, check_whole
from ..wording import counted
from .settings import Shearing


@dataclass(frozen=True)
class Budget:
    """All that a shearing may read.

    Attributes:
        tokens: About so many, padding not counted; or None.
        steps: Optimizer steps; or None. One of the two is given.

    Raises:
        UsageError: Neither or both are given, or one is no positive whole number.
    """

    tokens: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.steps is None):
            raise UsageError("say how long to train: one of tokens (--tokens) and steps (--steps), not both or neither")
        for name in ("tokens", "steps"):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value, 1)

    def left(self, tokens: int, steps: int) -> dict[str, Any]:
        """What is left for recovery, as a limit of `fxprune.recover`.

        Args:
            tokens: That shearing read.
            steps: That it took.
        """
        if self.tokens is not None:
            return {"max_tokens": max(1, self.tokens - tokens)}
        assert self.steps is not None
        return {"max_steps": max(1, self.steps - steps)}


@dataclass(frozen=True)
class Schedule:
    """The steps of LHSPG.

    Attributes:
        steps: All of them.
        warmup: Before anything shrinks.
        periods: How many.
        period_steps: Of each.
    """

    steps: int
    warmup: int
    periods: int
    period_steps: int

    def part(self, step: int) -> str:
        """What a step (from 0 on) belongs to."""
        if step < self.warmup:
            return "warm-up"
        period = (step - self.warmup) // self.period_steps
        return f"period {period + 1} of {self.periods}" if period < self.periods else "after the periods"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))


def make_schedule(budget: Budget, settings: Shearing, per_step: float, stages: int) -> Schedule:
    """The steps that shearing's share of the budget comes to.

    Args:
        budget: Of the whole run.
        settings: Say the shares and the periods.
        per_step: Mean tokens of a step.
        stages: Of recovery.

    Raises:
        UsageError: There are too few steps for the periods, or none for recovery.
    """
    whole = budget.steps if budget.steps is not None else int((budget.tokens or 0) / per_step)
    periods = 1 if settings.one_shot else settings.periods
    steps, warmup = _parts(whole, settings)
    shrinking, recovering = steps - warmup, whole - steps
    wanted = stages if settings.shear_share < 1 else 0
    if shrinking < periods or recovering < wanted:
        said = f"{budget.steps} steps" if budget.steps is not None else f"{budget.tokens:,} tokens, {per_step:,.0f} in a step,"
        least = _least(whole, lambda n: _enough(n, settings, periods, wanted))
        tokens = math.ceil(least * per_step)
        tokens += int(tokens / per_step) < least  # the product was rounded
        enough = f"{least} steps" if budget.steps is not None else f"{tokens:,} tokens"
        if shrinking < periods:
            raise UsageError(
                f"{said} leave shearing {counted(shrinking, 'step')} after its warm-up, fewer than its "
                f"{counted(periods, 'period')}: give at least {enough}, raise shear_share, or lower batch_size or periods"
            )
        raise UsageError(
            f"{said} leave recovery {counted(recovering, 'step')} for {counted(stages, 'stage')}: give at least {enough}, lower "
            "shear_share, or say shear_share=1 for no recovery"
        )
    length = 1 if settings.one_shot else shrinking // periods
    return Schedule(steps, warmup if settings.one_shot else steps - periods * length, periods, length)


def _parts(whole: int, settings: Shearing) -> tuple[int, int]:
    """Of so many steps, those of shearing, and of these its warm-up."""
    steps = whole if settings.shear_share == 1 else round(whole * settings.shear_share)
    return steps, round(steps * settings.warmup_share)


def _enough(whole: int, settings: Shearing, periods: int, stages: int) -> bool:
    steps, warmup = _parts(whole, settings)
    return steps - warmup >= periods and whole - steps >= stages


def _least(below: int, enough: Callable[[int], bool]) -> int:
    """The first number above one that is not enough; more is never less than enough."""
    above = below + 1
    while not enough(above):
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if enough(middle) else (middle, above)
    return above
