"""What fxprune raises: one class per kind of trouble, each message a sentence a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeGuard


class FxPruneError(Exception):
    """Base class of every error that fxprune raises on purpose."""


class UsageError(FxPruneError, ValueError):
    """An argument, option or file that the user gave cannot be used as it is."""


class RecipeError(UsageError):
    """What a recipe says cannot be used; settings are named as a recipe names them."""


class CaptureError(FxPruneError, RuntimeError):
    """A model could not be traced into a graph."""


class PlanError(FxPruneError, ValueError):
    """A plan is impossible, or belongs to another model."""


class VerificationError(FxPruneError, RuntimeError):
    """The pruned network is not equal to its dense reference: nothing was written."""


class CheckpointError(FxPruneError, RuntimeError):
    """A checkpoint could not be written or read back faithfully."""


def check_whole(name: str, value: object, least: int, below: int | None = None) -> None:
    """Refuse what is no number to count with; True and False are none.

    Args:
        name: What it is called.
        value: What was given.
        least: The smallest.
        below: One more than the largest, if there is one.

    Raises:
        UsageError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if below is not None and value >= below:
        raise UsageError(f"{name} must be below {below}, got {value}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number to compute with; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_seed(seed: object) -> None:
    """Refuse what generators of random numbers do not take as a seed."""
    check_whole("seed", seed, 0, 2**63)


def nearest(typed: str, choices: Iterable[str]) -> str:
    """The tail of an error message that offers the closest valid choice, then all of them.

    Args:
        typed: What the user wrote.
        choices: Every valid spelling.

    Returns:
        For example ``"did you mean 'taylor1'? Choose from: l1, l2, taylor1"``.
    """
    known = sorted(choices)
    close = difflib.get_close_matches(typed, known, n=1, cutoff=0.5)
    if len(known) > 24:
        rest = f"there are {len(known)} to choose from, such as: {', '.join(known[:8])}, ..."
    else:
        rest = f"choose from: {', '.join(known) or '(nothing: there are none)'}"
    return f"did you mean '{close[0]}'? {rest[0].upper()}{rest[1:]}" if close else rest
