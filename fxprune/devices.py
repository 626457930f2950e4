"""A device that a user names, tried out before anything is loaded."""

from __future__ import annotations

import torch

from .errors import UsageError


def find_device(given: torch.device | str | int) -> torch.device:
    """The device of that name.

    Args:
        given: As for `torch.device`.

    Raises:
        UsageError: There is no such device here, or it holds no numbers (``meta``).
    """
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UsageError(f"cannot use device '{given}': {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    if device.type == "meta":
        raise UsageError("cannot use device 'meta': it holds no numbers; to see groups without weights, say fxprune groups --meta")
    return device
