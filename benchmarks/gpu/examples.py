"""Random examples to train on, as long as those of real data: speed depends on lengths, not on words."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu.scale import Scale
from fxprune.data import Examples

ALPACA = (37, 53, 59, 64, 69, 73, 76, 81, 85, 91, 97, 105, 112, 120, 128, 137, 147, 160, 178, 213, 256)
"""Tokens of an Alpaca example at the 0th, 5th .. 100th percentile: 51,974 rows in the paper's template, cut to 256 tokens, with
SmolLM2's tokenizer (mean 110)."""

ROW = 512
"""Tokens of the rows that those lengths are packed into; with shorter rows they shrink in proportion."""


@dataclass(frozen=True)
class Setting:
    """Examples, and how many of them the plain trainer takes, so that both sides run as many tokens at a time.

    Attributes:
        name: ``full`` (every example fills a row) or ``alpaca`` (lengths of Alpaca).
        examples: What both train on.
        row: Tokens of a full row.
        cutoff: Tokens of the longest example.
        rows: Rows of an optimizer step of ours: full ones, packed where examples are shorter.
        forward_rows: Rows of a forward pass of ours.
        forward_examples: Examples of a forward pass of the plain trainer, padded to the longest of them: no more tokens than ours.
        accumulate: Forward passes of an optimizer step of the plain trainer, for about as many real tokens as ours.
    """

    name: str
    examples: Examples
    row: int
    cutoff: int
    rows: int
    forward_rows: int
    forward_examples: int
    accumulate: int


def settings(scale: Scale, forward_rows: int, steps: int, seed: int) -> list[Setting]:
    """Both settings, with examples for so many optimizer steps of either side."""
    rows = max(scale.step_rows, forward_rows)
    accumulate = -(-rows // forward_rows)
    full = np.full(steps * accumulate * forward_rows, scale.row)
    cutoff = ALPACA[-1] * scale.row // ROW
    together = forward_rows * scale.row // cutoff
    random = np.random.default_rng(seed)
    percentiles = np.linspace(0, 1, len(ALPACA))
    mean = np.trapezoid(ALPACA, percentiles) * scale.row / ROW
    turns = max(1, round(rows * scale.row / mean / together))
    drawn = np.interp(random.random(steps * turns * together), percentiles, ALPACA) * scale.row / ROW
    lengths = np.clip(drawn.round().astype(int), 2, cutoff)
    ours = {"row": scale.row, "rows": accumulate * forward_rows, "forward_rows": forward_rows}
    same = {"cutoff": scale.row, "forward_examples": forward_rows, "accumulate": accumulate}
    short = {"cutoff": cutoff, "forward_examples": together, "accumulate": turns}
    return [
        Setting("full", _random(full, scale, seed), **ours, **same),
        Setting("alpaca", _random(lengths, scale, seed), **ours, **short),
    ]


def _random(lengths: np.ndarray, scale: Scale, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, scale.shape.vocabulary, (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), torch.from_numpy(lengths).long().cumsum(0)])
    none = torch.zeros(len(lengths), dtype=torch.long)
    digest = hashlib.sha256(ids.numpy().tobytes() + starts.numpy().tobytes()).hexdigest()
    return Examples(ids, starts, none, none.clone(), ("random tokens",), digest)
