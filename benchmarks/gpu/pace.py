"""Tokens per second of a training run, the same clock for both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.meter import now

LORA: dict[str, Any] = {"rank": 8, "alpha": 16, "dropout": 0.05, "lr": 1e-4}
"""The paper's (arXiv 2305.11627, section 4.1)."""

WARM = 3
"""Steps that are not timed: they compile, choose kernels and allocate."""


@dataclass
class Pace:
    """Watches a run of ``WARM`` and ``timed`` optimizer steps.

    Attributes:
        device: Waited for before the clock is read.
        timed: Steps that count.
        stamps: Seconds at the end of each step, by its number from 1.
    """

    device: torch.device
    timed: int
    stamps: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begun = now(self.device)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return WARM + self.timed

    def step(self, number: int) -> None:
        """An optimizer step is over."""
        self.stamps[number] = now(self.device)

    def to_json(self, tokens: Sequence[float]) -> dict[str, Any]:
        """Tokens per second of the timed steps, and the seconds that all before them took.

        Args:
            tokens: Real tokens (no padding) read in the first step, the first two, and so on.
        """
        start, end = self.stamps[WARM], self.stamps[self.steps]
        read = int(tokens[self.steps - 1] - tokens[WARM - 1])
        return {
            "tokens_per_second": round(read / (end - start), 2),
            "tokens": read,
            "seconds": round(end - start, 3),
            "steps": self.timed,
            "warm_up_steps": WARM,
            "warm_up_seconds": round(start - self.begun, 3),
        }
