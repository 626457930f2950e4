"""Selection of whole layers, and layers that stay whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxprune import find_groups, select, trace
from fxprune.errors import PlanError
from fxprune.groups import Groups

from .selecting import COARSE, WIDTHS, check_removed, few_units, random_scores


@pytest.fixture(scope="module")
def coarse() -> Groups:
    """Four layers of few units."""
    return few_units()


def test_protected_layers_stay_whole(coarse: Groups) -> None:
    scores = random_scores(coarse)

    def touched(**options: Any) -> set[int | None]:
        plan = select(coarse, scores, **{"ratio": 0.15, "widths": "per-layer", **options})
        return {coarse[n].layer for n in plan.keep}

    assert touched() == {0, 1, 2, 3}
    assert touched(protect_first=1) == {1, 2, 3}
    assert touched(protect_last=2) == {0, 1}
    assert touched(protect_first=1, protect_last=1) == {1, 2}
    assert touched(protect=["model.layers.[12].*"]) == {0, 3}
    assert touched(protect="model.layers.0") == {1, 2, 3}  # a block with all its groups
    assert touched(protect=["*.ffn", "*kv_heads", "model.layers.3.*"]) == {0, 1, 2}
    with pytest.raises(
        PlanError,
        match=r"^a ratio of 15.0% cannot be reached: with kinds=kv_heads,query_groups,ffn, protect_last=7 at most 0.0% of the "
        r"parameters can go; ask for less, or leave less whole$",
    ):
        touched(protect_last=7)


def test_layers_are_dropped_from_the_end_or_by_influence(coarse: Groups) -> None:
    scores = random_scores(coarse)
    block = sum(p.tensor.numel() for n, p in coarse.parameters.items() if n.startswith("model.layers.0.") and p.tensor is not None)
    half = 2 * block / coarse.total
    plan = select(coarse, scores, ratio=half, kinds="layers")
    assert plan.drop == ("model.layers.2", "model.layers.3")
    assert plan.keep == {}
    assert check_removed(coarse, plan, *COARSE) == pytest.approx(half)
    influence = {"model.layers.0": 0.9, "model.layers.1": 0.1, "model.layers.2": 0.5, "model.layers.3": 0.2}
    assert select(coarse, {}, ratio=half, kinds="layers", block_scores=influence).drop == ("model.layers.1", "model.layers.3")
    assert select(coarse, {}, units=0.5, kinds="layers", block_scores=influence).drop == ("model.layers.1", "model.layers.3")
    assert select(coarse, {}, units={"layers": 0.25}, protect_last=1).drop == ("model.layers.2",)
    kept = select(coarse, {}, ratio=half, kinds="layers", protect=["model.layers.3.*"], protect_first=1)
    assert kept.drop == ("model.layers.1", "model.layers.2")  # a protected group protects its block
    with pytest.raises(PlanError, match=r"at most \d+\.\d% of the parameters can go; ask for less, or leave less whole$"):
        select(coarse, {}, ratio=0.9, kinds="layers", floor=0.5)
    ranked = select(coarse, {}, units=0.5, kinds="layers", block_scores=influence)
    assert ranked.recipe["block_scores"] == influence
    assert "block_scores" not in plan.recipe
    one = select(coarse, {}, units=0.99, kinds="layers")
    assert one.drop == ("model.layers.1", "model.layers.2", "model.layers.3")
    near = select(coarse, {}, ratio=half + 0.02, kinds="layers")
    assert near.drop == plan.drop
    assert near.recipe["note"].startswith(
        f"asked for {half + 0.02:.2%} of the parameters: the nearest that the units allow is {half:.2%}"
    )


@pytest.mark.parametrize("widths", WIDTHS)
def test_layers_and_widths_together(coarse: Groups, widths: str) -> None:
    plan = select(coarse, random_scores(coarse), ratio=0.5, kinds={"layers": 1, "ffn": 1}, widths=widths)
    assert plan.drop
    assert plan.keep
    assert not any(n.startswith(f"{d}.") for n in plan.keep for d in plan.drop)
    check_removed(coarse, plan, *COARSE)


def test_every_stack_keeps_a_block() -> None:
    """An encoder and a decoder of residual blocks: neither may go as a whole, however little it matters."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    class Stacks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleList(Block() for _ in range(3))
            self.decoder = nn.ModuleList(Block() for _ in range(3))
            self.head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in (*self.encoder, *self.decoder):
                x = block(x)
            return self.head(x)

    groups = find_groups(trace(Stacks(), (torch.randn(2, 6),)))
    assert len(groups.blocks) == 6
    worthless = {path: float(path.startswith("decoder")) for path in groups.blocks}
    plan = select(groups, {}, units=0.6, kinds="layers", block_scores=worthless)
    assert len(plan.drop) == 4
    assert {path.split(".")[0] for path in set(groups.blocks) - set(plan.drop)} == {"encoder", "decoder"}
