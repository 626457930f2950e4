"""Block influence: how much a residual block changes what runs through it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from ..errors import FxPruneError, UsageError
from ..groups import Groups
from .batches import Batch, flat_arguments, warn_of_padding


def block_influence(gm: GraphModule, groups: Groups, calibration: Sequence[Batch]) -> dict[str, float]:
    """``1 - cos(x, block(x))``, averaged over tokens: small for a block that can go (ShortGPT, arXiv 2403.03853, eq. 1).

    Args:
        gm: The traced model.
        groups: Its prune groups; ``groups.blocks`` are measured.
        calibration: Batches as for `fxprune.score`. Tokens that an ``attention_mask`` marks as padding do not count.

    Returns:
        For each residual block (module path) a number from 0 to 2.

    Raises:
        UsageError: There is no calibration batch, or one lacks an input that the model was traced with.
        FxPruneError: The influence of a block is not finite.
    """
    if not calibration:
        raise UsageError("block influence is measured on calibration batches, and there are none")
    warn_of_padding(gm, calibration)
    names = {b.source for b in groups.blocks.values()} | {b.result for b in groups.blocks.values()}
    sums, tokens = dict.fromkeys(groups.blocks, 0.0), dict.fromkeys(groups.blocks, 0.0)
    device = next(gm.parameters()).device
    for batch in calibration:
        moved = {k: v.to(device) for k, v in batch.items()}
        run = _Recorder(gm, names)
        with torch.no_grad():
            run.run(*flat_arguments(gm, moved), enable_io_processing=False)
        for path, block in groups.blocks.items():
            x, y = run.seen[block.source], run.seen[block.result]
            change = 1 - torch.cosine_similarity(x.float(), y.float(), dim=-1)
            counted = _counted(change, moved)
            sums[path] += float(change.double()[counted].sum())
            tokens[path] += int(counted.sum())
    influence = {path: total / max(tokens[path], 1) for path, total in sums.items()}
    for path, value in influence.items():
        if not math.isfinite(value):
            raise FxPruneError(f"the influence of block '{path}' is {value}: the model or the calibration data is damaged")
    return influence


def _counted(change: Tensor, batch: Batch) -> Tensor:
    """Which tokens count: all but padding."""
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and mask.shape == change.shape else torch.ones_like(change, dtype=torch.bool)


class _Recorder(Interpreter):
    def __init__(self, gm: GraphModule, names: set[str]) -> None:
        super().__init__(gm)
        self.names, self.seen = names, dict[str, Tensor]()

    def run_node(self, n: torch.fx.Node) -> object:
        out: object = super().run_node(n)
        if n.name in self.names and isinstance(out, Tensor):
            self.seen[n.name] = out
        return out
