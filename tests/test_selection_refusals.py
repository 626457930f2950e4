"""Selection: what cannot be reached, or was asked for wrongly, is said in full."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune import find_groups, select, trace
from fxprune.errors import PlanError, UsageError
from fxprune.groups import Groups
from fxprune.passes.selection import Selection

from .selecting import few_units, random_scores


@pytest.fixture(scope="module")
def coarse() -> Groups:
    """Four layers of few units."""
    return few_units()


def test_protection_errors(coarse: Groups) -> None:
    scores = random_scores(coarse)

    def error(**options: Any) -> str:
        with pytest.raises(UsageError) as raised:
            select(coarse, scores, **{"ratio": 0.2, **options})
        return str(raised.value)

    assert error(protect_first=1) == (
        "widths='uniform' needs the same width in every layer, but some layers of model.layers.*.self_attn.kv_heads are protected: "
        "use widths='per-layer', or protect nothing"
    )
    assert error(protect="model.layers.2.mlp.ffn", kinds="ffn").startswith(
        "widths='uniform' needs the same width in every layer, but some"
    )
    assert error(protect_last=1, kinds="hidden", widths="per-layer") == (
        "'model.hidden' reaches through all layers, so protect_first and protect_last cannot keep some of them whole: "
        "leave kind 'hidden' out, or protect nothing"
    )
    assert error(protect="model.layers.9.mlp.ffn").startswith(
        "protect='model.layers.9.mlp.ffn' matches no group and no block; did you mean 'model.layers."
    )
    assert error(protect_first=-1) == "protect_first must be a whole number of at least 0, got -1"
    select(coarse, scores, ratio=0.2, protect=["model.layers.*.self_attn.*"])  # a whole family: widths stay equal


def test_layer_errors(coarse: Groups) -> None:
    def error(groups: Groups, **options: Any) -> str:
        with pytest.raises(UsageError) as raised:
            select(groups, random_scores(groups), **{"ratio": 0.2, "kinds": "layers", **options})
        return str(raised.value)

    assert error(coarse, ranking="global") == (
        "global ranking compares units by what goes with them; whole layers have no such score: use ranking='local'"
    )
    assert error(coarse, block_scores={"model.layers.0": 1.0}) == (
        "there is no score for block 'model.layers.1'; give one for each, or none"
    )
    flat = find_groups(trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.randn(2, 3),)))
    assert error(flat) == "this model has no residual block that can be dropped whole"
    assert error(flat, kinds=("hidden", "experts")) == "this model has no prunable group of kind hidden, experts; it has other"


def test_kinds_that_are_not_there_beside_some_that_are(coarse: Groups) -> None:
    plan = select(coarse, random_scores(coarse), units=0.5, kinds=("ffn", "experts", "channels"))
    assert plan.recipe["note"] == (
        "this model has nothing of kind 'experts' that can be pruned; this model has nothing of kind 'channels' that can be pruned"
    )
    usual = select(coarse, random_scores(coarse), units=0.5, kinds=("ffn", "kv_heads", "query_groups"))
    assert "note" not in usual.recipe


def test_out_of_reach(coarse: Groups) -> None:
    with pytest.raises(PlanError) as raised:
        select(coarse, random_scores(coarse), ratio=0.9, kinds="ffn")
    share = 4 * 11 * 3 * 18 / coarse.total
    assert str(raised.value) == (
        f"a ratio of 90.0% cannot be reached: with kinds=ffn at most {share:.1%} of the parameters can go; ask for less, or leave "
        "less whole"
    )
    with pytest.raises(PlanError) as raised:
        select(coarse, random_scores(coarse), ratio=0.001)
    assert str(raised.value) == (
        "nothing would be removed: the share is smaller than the smallest unit, or every group is protected (with "
        "kinds=kv_heads,query_groups,ffn)"
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "give either ratio= (share of all parameters) or units= (share of units), not both or neither"),
        (
            {"ratio": 0.2, "units": 0.2},
            "give either ratio= (share of all parameters) or units= (share of units), not both or neither",
        ),
        ({"ratio": 20}, "a ratio must lie between 0 and 1 (0.2 removes 20 %), got 20"),
        ({"ratio": 0}, "a ratio must lie between 0 and 1 (0.2 removes 20 %), got 0"),
        ({"ratio": math.nan}, "a ratio must lie between 0 and 1 (0.2 removes 20 %), got nan"),
        ({"ratio": "0.2"}, "a ratio must lie between 0 and 1 (0.2 removes 20 %), got '0.2'"),
        ({"units": {"ffn": 1.5}}, "the share of units of kind ffn must lie between 0 and 1 (0.2 removes 20 %), got 1.5"),
        ({"units": 1.5}, "the share of units must lie between 0 and 1 (0.2 removes 20 %), got 1.5"),
        (
            {"ratio": 0.2, "kinds": ["ffm"]},
            (
                "unknown kind 'ffm'; did you mean 'ffn'? "
                "Choose from: channels, experts, ffn, head_dim, hidden, kv_heads, layers, other, query_groups"
            ),
        ),
        ({"units": {"experts": 0.5}, "kinds": ("ffn",)}, "units= gives a share for kind 'experts', but kinds= leaves it out"),
        ({"ratio": 0.2, "kinds": ()}, "no kind may be pruned: name at least one"),
        ({"ratio": 0.2, "kinds": {"ffn": 0}}, "no kind may be pruned: name at least one"),
        ({"units": {}}, "no kind may be pruned: name at least one"),
        ({"ratio": 0.2, "kinds": {"ffn": -1}}, "a pace must be 0 or a positive number, got {'ffn': -1}"),
        (
            {"ratio": 0.2, "ranking": "globl"},
            "unknown ranking 'globl'; did you mean 'global'? Choose from: global, local, measured, standardised",
        ),
        ({"ratio": 0.2, "widths": "equal"}, "unknown widths 'equal'; choose from: per-layer, uniform"),
        ({"ratio": 0.2, "floor": 1.0}, "floor is a share of units from 0 up to (not including) 1, got 1.0"),
        ({"ratio": 0.2, "multiple": 0}, "multiple must be a whole number of at least 1, got 0"),
        ({"ratio": 0.2, "multiple": {"ffn": 2.5}}, "multiple of ffn must be a whole number of at least 1, got 2.5"),
        (
            {"ratio": 0.2, "rankings": "local"},
            (
                "unknown option 'rankings'; did you mean 'ranking'? Choose from: floor, kinds, multiple, "
                "protect, protect_first, protect_last, ranking, ratio, units, widths"
            ),
        ),
    ],
)
def test_usage_errors(coarse: Groups, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as raised:
        select(coarse, random_scores(coarse), **options)
    assert str(raised.value) == text


def test_unknown_kinds_in_multiples(coarse: Groups) -> None:
    with pytest.raises(UsageError, match=r"^unknown kind 'fnn'; did you mean 'ffn'\?"):
        Selection(ratio=0.2, multiple={"fnn": 8})


def test_scores_must_fit_the_groups(coarse: Groups) -> None:
    scores, name = random_scores(coarse), "model.layers.1.mlp.ffn"
    damaged = scores[name].clone()
    damaged[3] = math.nan
    for wrong, text in (
        ({n: s for n, s in scores.items() if n != name}, f"there are no scores for group '{name}'; score the model first"),
        ({**scores, name: torch.rand(5)}, f"group '{name}' has 12 units, but its scores have shape (5,)"),
        ({**scores, name: damaged}, f"the scores of group '{name}' are not finite"),
    ):
        with pytest.raises(UsageError) as raised:
            select(coarse, wrong, ratio=0.2)
        assert str(raised.value) == text


def test_selection_and_keywords_exclude_each_other(coarse: Groups) -> None:
    with pytest.raises(UsageError, match=r"^give either selection= or its fields as keywords, not both \('ratio'\)$"):
        select(coarse, random_scores(coarse), Selection(ratio=0.2), ratio=0.3)


class Uneven(nn.Module):
    """Two layers of one family, of which the last one's width is part of the model's interface."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            inner = layer["up"](x).relu()
            x = x + layer["down"](inner)
        return x, inner


def test_a_family_with_an_unprunable_member() -> None:
    groups = find_groups(trace(Uneven(), (torch.randn(2, 4),)))
    assert [(g.name, g.prunable) for g in groups.values() if g.size == 6] == [("layers.0.ffn", True), ("layers.1.ffn", False)]
    with pytest.raises(UsageError) as raised:
        select(groups, random_scores(groups), ratio=0.2)
    assert str(raised.value) == (
        "widths='uniform' needs the same width in every layer, but 'layers.1.ffn' cannot be pruned (a model output): "
        "use widths='per-layer', or leave the kind out"
    )
    assert list(select(groups, random_scores(groups), ratio=0.2, widths="per-layer").keep) == ["layers.0.ffn"]


def test_multiple_wider_than_the_group(coarse: Groups) -> None:
    with pytest.raises(PlanError) as raised:
        select(coarse, random_scores(coarse), ratio=0.2, kinds="ffn", multiple=16)
    assert str(raised.value) == (
        "a ratio of 20.0% cannot be reached: with kinds=ffn, multiple=16 at most 0.0% of the parameters can go; ask for less, or "
        "leave less whole"
    )
