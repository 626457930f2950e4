"""Seconds and device memory of a piece of work."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Measured:
    """What a piece of work took.

    Attributes:
        seconds: Wall clock, until the device had done it.
        before: Bytes of device memory in use before it; None on a CPU.
        peak: The most in use during it; None on a CPU.
    """

    seconds: float
    before: int | None
    peak: int | None

    def to_json(self, weights: int | None = None) -> dict[str, Any]:
        """Plain data; with the bytes of the model's weights also how many times those the peak was."""
        found: dict[str, Any] = {"seconds": round(self.seconds, 3), "before_bytes": self.before, "peak_bytes": self.peak}
        if weights is not None:
            found["weight_bytes"] = weights
            found["peak_over_weights"] = memory_ratio(self.peak, weights)
        return found


def memory_ratio(peak: int | None, weights: int) -> float | None:
    """The peak in units of the weights; None where it was not measured."""
    return None if peak is None else round(peak / weights, 4)


def now(device: torch.device) -> float:
    """The clock (seconds) once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(device: torch.device, work: Callable[[], Any]) -> tuple[Any, Measured]:
    """Do something, and say what it took (`torch.cuda.max_memory_allocated`: tensors, not what the allocator keeps)."""
    free(device)
    before = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = now(device)
    made = work()
    seconds = now(device) - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return made, Measured(seconds, before, peak)


def free(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
