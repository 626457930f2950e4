"""Block influence: how much a residual block changes what runs through it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from ..errors import UsageError
from ..groups import Groups
from .importance import Batch, input_names


def block_influence(gm: GraphModule, groups: Groups, calibration: Sequence[Batch]) -> dict[str, float]:
    """``1 - cos(x, block(x))``, averaged over tokens: small for a block that can go (ShortGPT, arXiv 2403.03853, eq. 1).

    Args:
        gm: The traced model.
        groups: Its prune groups; ``groups.blocks`` are measured.
        calibration: Batches as for `fxprune.score`.

    Returns:
        For each residual block (module path) a number from 0 to 2.

    Raises:
        UsageError: There is no calibration batch.
    """
    if not calibration:
        raise UsageError("block influence is measured on calibration batches, and there are none")
    names = {b.source for b in groups.blocks.values()} | {b.result for b in groups.blocks.values()}
    accepted, sums, tokens = input_names(gm), dict.fromkeys(groups.blocks, 0.0), 0
    order = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    for batch in calibration:
        run = _Recorder(gm, names)
        with torch.no_grad():
            device = next(gm.parameters()).device
            run.run(*[batch[k].to(device) for k in order if k in accepted], enable_io_processing=False)
        for path, block in groups.blocks.items():
            x, y = run.seen[block.source], run.seen[block.result]
            sums[path] += float((1 - torch.cosine_similarity(x.float(), y.float(), dim=-1)).sum())
        tokens += next(iter(run.seen.values()))[..., 0].numel()
    return {path: total / tokens for path, total in sums.items()}


class _Recorder(Interpreter):
    def __init__(self, gm: GraphModule, names: set[str]) -> None:
        super().__init__(gm)
        self.names, self.seen = names, dict[str, Tensor]()

    def run_node(self, n: torch.fx.Node) -> object:
        out: object = super().run_node(n)
        if n.name in self.names and isinstance(out, Tensor):
            self.seen[n.name] = out
        return out
