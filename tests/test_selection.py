"""Selection: targets, constraints and rankings, against hand-written counts and a hand-written greedy."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import LlamaConfig, LlamaForCausalLM

from fxprune import find_groups, rewrite, select, trace
from fxprune.errors import PlanError, UsageError
from fxprune.groups import Groups
from fxprune.passes.budget import Meter
from fxprune.passes.dependency import PLAN
from fxprune.passes.importance import SCORES
from fxprune.passes.selection import Selection, SelectionPass, _lanes
from fxprune.plan import PrunePlan

from .zoo import build, tokens

RANKINGS, WIDTHS = ("local", "global"), ("uniform", "per-layer")


def llama(
    layers: int, hidden: int, ffn: int, kv: int, ratio: int, dim: int, device: str = "meta", **options: Any
) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=kv * ratio,
        num_key_value_heads=kv,
        head_dim=dim,
        **{"vocab_size": 200, "tie_word_embeddings": True, **options},
    )
    with torch.device(device):
        return LlamaForCausalLM(config)


def groups_of(model: nn.Module) -> Groups:
    device = next(model.parameters()).device
    return find_groups(trace(model, {"input_ids": torch.zeros(2, 5, dtype=torch.long, device=device)}, dynamic_shapes={}))


def random_scores(groups: Groups, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(g.size, generator=generator) for n, g in groups.items() if g.prunable}


@pytest.fixture(scope="module")
def wide() -> Groups:
    """Three layers with enough units to meet any target within 0.1 percentage points."""
    return groups_of(llama(layers=3, hidden=36, ffn=1200, kv=4, ratio=3, dim=8))


@pytest.fixture(scope="module")
def coarse() -> Groups:
    """Four layers of few units."""
    return groups_of(llama(layers=4, hidden=18, ffn=12, kv=3, ratio=2, dim=4, vocab_size=31))


@pytest.fixture(scope="module")
def four_by_four() -> GraphModule:
    """Two layers with real weights, four KV heads of four query heads each."""
    model = llama(layers=2, hidden=32, ffn=16, kv=4, ratio=4, dim=4, device="cpu")
    return trace(model, {"input_ids": torch.zeros(2, 5, dtype=torch.long)}, dynamic_shapes={})


def left_by_hand(plan: PrunePlan, layers: int, hidden: int, ffn: int, kv: int, ratio: int, dim: int, vocabulary: int) -> int:
    """Parameters of the pruned Llama, from the plan's counts alone."""

    def kept(name: str, size: int) -> int:
        return len(plan.keep[name]) if name in plan.keep else size

    hidden = kept("model.hidden", hidden)
    total = vocabulary * hidden + hidden
    for layer in range(layers):
        at = f"model.layers.{layer}"
        if at in plan.drop:
            continue
        n, m, d = (kept(f"{at}.self_attn.{k}", s) for k, s in (("kv_heads", kv), ("query_groups", ratio), ("head_dim", dim)))
        pairs = kept("model.layers.head_dim", dim // 2)
        total += 2 * hidden  # norms
        total += hidden * (n * m * 2 * pairs + n * 2 * pairs + n * d + n * m * d)  # q, k, v, o
        total += 3 * hidden * kept(f"{at}.mlp.ffn", ffn)
    return total


def check_removed(groups: Groups, plan: PrunePlan, *shape: int) -> float:
    removed = 1 - left_by_hand(plan, *shape) / groups.total
    assert plan.recipe["removed"] == round(removed, 6)
    return removed


WIDE = (3, 36, 1200, 4, 3, 8, 200)
COARSE = (4, 18, 12, 3, 2, 4, 31)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.35, 0.5, 0.8])
def test_targets_are_met_within_a_tenth_of_a_point(wide: Groups, widths: str, ranking: str, ratio: float) -> None:
    plan = select(wide, random_scores(wide), ratio=ratio, widths=widths, ranking=ranking)
    assert check_removed(wide, plan, *WIDE) == pytest.approx(ratio, abs=1e-3)
    assert "note" not in plan.recipe
    assert plan.recipe == {**plan.recipe, **Selection(ratio=ratio, widths=widths, ranking=ranking).to_json()}
    for name, units in plan.keep.items():
        assert wide[name].kind in ("kv_heads", "query_groups", "ffn")
        assert 1 <= len(units) < wide[name].size


@pytest.mark.parametrize("kinds", ["hidden", "head_dim", ("ffn", "hidden"), ("kv_heads", "head_dim", "ffn")])
def test_targets_with_other_kinds(wide: Groups, kinds: Any) -> None:
    for widths in WIDTHS:
        plan = (
            select(wide, random_scores(wide), ratio=0.3, kinds=kinds, widths=widths, floor=0.02)
            if kinds != "head_dim"
            else (select(wide, random_scores(wide), ratio=0.03, kinds=kinds, widths=widths))
        )
        asked = float(plan.recipe["ratio"])
        removed = check_removed(wide, plan, *WIDE)
        if abs(removed - asked) > 1e-3:
            assert plan.recipe["note"] == (
                f"asked for {asked:.2%} of the parameters; the nearest that the units allow is {removed:.2%}"
            )
        assert {wide[n].kind for n in plan.keep} <= ({kinds} if isinstance(kinds, str) else set(kinds))


def test_note_says_how_near_the_units_allow(coarse: Groups) -> None:
    plan = select(coarse, random_scores(coarse), ratio=0.2, kinds=("kv_heads",))
    removed = check_removed(coarse, plan, *COARSE)
    assert {len(u) for u in plan.keep.values()} == {2}  # one of three heads in each of four layers, or none
    assert plan.recipe["note"] == f"asked for 20.00% of the parameters; the nearest that the units allow is {removed:.2%}"


@pytest.mark.parametrize("ranking", RANKINGS)
def test_uniform_widths_are_equal_in_every_layer(wide: Groups, ranking: str) -> None:
    scores = random_scores(wide)
    plan = select(wide, scores, ratio=0.4, ranking=ranking)
    widths: dict[str, set[int]] = {}
    for group in wide.values():
        if group.prunable:
            widths.setdefault(group.family, set()).add(len(plan.keep.get(group.name, torch.empty(group.size))))
    assert all(len(w) == 1 for w in widths.values())
    for name, units in plan.keep.items():  # each layer loses its own least important units
        best = scores[name].argsort(descending=True)[: len(units)].sort().values
        assert torch.equal(units, best)


def greedy(
    groups: Groups, scores: Mapping[str, Tensor], ratio: float, kinds: set[str], shape: tuple[int, ...]
) -> dict[str, set[int]]:
    """One unit after the other, the least importance per parameter first; a group whose next unit is too much stops."""
    eligible = [g for g in groups.values() if g.prunable and g.kind in kinds]
    queue = {g.name: [u for _, u in sorted((float(s), u) for u, s in enumerate(scores[g.name]))] for g in eligible}
    gone = {g.name: 0 for g in eligible}
    stopped: set[str] = set()
    tried: list[tuple[float, dict[str, int]]] = []

    def removed(counts: Mapping[str, int]) -> int:
        plan = PrunePlan({n: torch.arange(groups[n].size - c) for n, c in counts.items()})
        return groups.total - left_by_hand(plan, *shape)

    target = ratio * groups.total
    while True:
        tried.append((abs(target - removed(gone)), dict(gone)))
        open_ = [g for g in eligible if g.name not in stopped and gone[g.name] < g.size - 1]
        if not open_:
            break
        chosen = min(open_, key=lambda g: float(scores[g.name][queue[g.name][gone[g.name]]]) / g.parameters_per_unit)
        more = {**gone, chosen.name: gone[chosen.name] + 1}
        if removed(more) <= target:
            gone = more
            continue
        tried.append((abs(target - removed(more)), more))
        if target - removed(gone) <= 5e-4 * groups.total:
            break
        stopped.add(chosen.name)
    best = min(tried, key=lambda t: t[0])[1]
    return {n: set(queue[n][c:]) for n, c in best.items() if c}


@pytest.mark.parametrize("kinds", [("ffn",), ("kv_heads", "query_groups", "ffn"), ("kv_heads", "head_dim", "hidden", "ffn")])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.27])
def test_per_layer_global_follows_a_greedy(coarse: Groups, kinds: tuple[str, ...], ratio: float) -> None:
    for seed in range(3):
        scores = random_scores(coarse, seed)
        plan = select(coarse, scores, ratio=ratio, kinds=kinds, widths="per-layer", ranking="global")
        wanted = greedy(coarse, scores, ratio, set(kinds), COARSE)
        assert {n: set(u.tolist()) for n, u in plan.keep.items()} == wanted


def test_global_ranking_spares_the_one_important_unit(coarse: Groups) -> None:
    """A unit goes by its own importance, not by the mean of all that went before it."""
    scores = {n: torch.ones(g.size) for n, g in coarse.items() if g.prunable}
    scores["model.layers.1.mlp.ffn"] = torch.tensor([0.0] * 11 + [5.0])
    scores["model.layers.2.mlp.ffn"] = torch.tensor([0.0] * 10 + [5.0, 5.0])
    ratio = 31 * 3 * 18 / coarse.total  # all the zeros and ten more
    plan = select(coarse, scores, ratio=ratio, kinds=("ffn",), widths="per-layer", ranking="global")
    assert plan.keep["model.layers.1.mlp.ffn"].tolist() == [11]
    assert plan.keep["model.layers.2.mlp.ffn"].tolist() == [10, 11]


def test_local_ranking_shrinks_all_groups_alike(wide: Groups) -> None:
    plan = select(wide, random_scores(wide), ratio=0.5, widths="per-layer", kinds=("ffn", "kv_heads"))
    shares = {n: 1 - len(u) / wide[n].size for n, u in plan.keep.items()}
    ffn = [s for n, s in shares.items() if wide[n].kind == "ffn"]
    assert max(ffn) - min(ffn) <= 1 / 1200 + 1e-12
    assert [s for n, s in shares.items() if wide[n].kind == "kv_heads"] == [0.5, 0.5, 0.5]
    assert ffn == pytest.approx([0.5] * 3, abs=0.05)


def test_paces(wide: Groups) -> None:
    scores = random_scores(wide)
    plan = select(wide, scores, ratio=0.4, kinds={"ffn": 1.0, "hidden": 0.5})
    assert 1 - len(plan.keep["model.hidden"]) / 36 == pytest.approx(
        (1 - len(plan.keep["model.layers.0.mlp.ffn"]) / 1200) / 2, abs=1 / 36
    )
    still = select(wide, scores, ratio=0.4, kinds={"ffn": 1.0, "hidden": 0})
    assert {wide[n].kind for n in still.keep} == {"ffn"}
    scores["model.hidden"] *= wide["model.hidden"].parameters_per_unit / wide["model.layers.0.mlp.ffn"].parameters_per_unit / 3
    plans = [select(wide, scores, ratio=0.4, kinds={"ffn": 1.0, "hidden": p}, ranking="global") for p in (0.25, 1, 4)]
    kept = [len(p.keep.get("model.hidden", range(36))) for p in plans]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]


def test_negative_scores_go_first_and_paces_keep_their_sense(coarse: Groups) -> None:
    scores = {n: -1 - s for n, s in random_scores(coarse).items()}
    for pace, most in ((1.0, "ffn"), (100.0, "ffn"), (0.001, "kv_heads")):
        plan = select(coarse, scores, ratio=0.1, kinds={"ffn": pace, "kv_heads": 1}, widths="per-layer", ranking="global")
        counts = {k: sum(coarse[n].size - len(u) for n, u in plan.keep.items() if coarse[n].kind == k) for k in ("ffn", "kv_heads")}
        assert max(counts, key=counts.__getitem__) == most


def test_share_of_units(wide: Groups) -> None:
    scores = random_scores(wide)
    plan = select(wide, scores, units=0.5)
    assert set(plan.counts().items()) == {
        (f"model.layers.{i}.{n}", c)
        for i in range(3)
        for n, c in (("mlp.ffn", 600), ("self_attn.kv_heads", 2), ("self_attn.query_groups", 2))  # 1.5 of 3: fewer go
    }
    assert "note" not in plan.recipe
    by_kind = select(wide, scores, units={"ffn": 0.25, "hidden": 0.5}, widths="per-layer", ranking="global")
    assert {wide[n].kind: len(u) for n, u in by_kind.keep.items()} == {"ffn": 900, "hidden": 18}
    assert by_kind.recipe["kinds"] == {"ffn": 1.0, "hidden": 1.0}
    paced = select(wide, scores, units=0.5, kinds={"ffn": 2.0, "kv_heads": 1.0})
    assert {wide[n].kind: len(u) for n, u in paced.keep.items()} == {"ffn": 600, "kv_heads": 3}
    all_but_one = select(wide, scores, units=0.99, kinds="kv_heads")
    assert set(all_but_one.counts().values()) == {1}
    rounded = select(wide, scores, units={"ffn": 0.3}, multiple=256)
    assert set(rounded.counts().values()) == {768}


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
        PlanError, match=r"^a ratio of 15.0% cannot be reached: with these kinds, .* at most 0.0% of the parameters can go$"
    ):
        touched(protect_last=7)


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
    assert error(protect_first=-1) == "protect_first and protect_last are numbers of layers, got -1 and 0"
    select(coarse, scores, ratio=0.2, protect=["model.layers.*.self_attn.*"])  # a whole family: widths stay equal


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


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("ranking", RANKINGS)
def test_multiples(wide: Groups, widths: str, ranking: str) -> None:
    scores = random_scores(wide)
    plan = select(wide, scores, ratio=0.3, multiple=16, widths=widths, ranking=ranking)
    assert all(len(u) % 16 == 0 for n, u in plan.keep.items() if wide[n].kind == "ffn")
    assert {wide[n].kind for n in plan.keep} >= {"kv_heads", "ffn"}  # heads are not rounded
    mapped = select(wide, scores, ratio=0.3, multiple={"ffn": 100, "kv_heads": 2}, widths=widths, ranking=ranking)
    for name, units in mapped.keep.items():
        assert len(units) % {"ffn": 100, "kv_heads": 2, "query_groups": 1}[wide[name].kind] == 0


def test_multiple_wider_than_the_group(coarse: Groups) -> None:
    with pytest.raises(PlanError) as raised:
        select(coarse, random_scores(coarse), ratio=0.2, kinds="ffn", multiple=16)
    assert str(raised.value) == (
        "a ratio of 20.0% cannot be reached: with these kinds, protections, floor and multiple at most 0.0% "
        "of the parameters can go"
    )


def test_floor(wide: Groups, coarse: Groups) -> None:
    plan = select(wide, random_scores(wide), ratio=0.27, floor=0.7, kinds="ffn")
    assert all(len(u) >= 840 for u in plan.keep.values())
    with pytest.raises(PlanError) as raised:
        select(wide, random_scores(wide), ratio=0.5, floor=0.7, kinds=("ffn", "kv_heads"))
    most = 1 - (wide.total - 3 * 3 * 36 * 360 - 3 * 36 * 8 * 8) / wide.total  # 360 FFN units and one KV head of every layer
    assert str(raised.value).endswith(f"at most {most:.1%} of the parameters can go")
    kept = select(coarse, random_scores(coarse), units=0.9, floor=0.28, kinds="ffn")
    assert set(kept.counts().values()) == {4}  # 12 * 0.28 = 3.36


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
    with pytest.raises(PlanError, match=r"at most \d+\.\d% of the parameters can go$"):
        select(coarse, {}, ratio=0.9, kinds="layers", floor=0.5)
    one = select(coarse, {}, units=0.99, kinds="layers")
    assert one.drop == ("model.layers.1", "model.layers.2", "model.layers.3")
    near = select(coarse, {}, ratio=half + 0.02, kinds="layers")
    assert near.drop == plan.drop
    assert near.recipe["note"].startswith(
        f"asked for {half + 0.02:.2%} of the parameters; the nearest that the units allow is {half:.2%}"
    )


@pytest.mark.parametrize("widths", WIDTHS)
def test_layers_and_widths_together(coarse: Groups, widths: str) -> None:
    plan = select(coarse, random_scores(coarse), ratio=0.5, kinds={"layers": 1, "ffn": 1}, widths=widths)
    assert plan.drop
    assert plan.keep
    assert not any(n.startswith(f"{d}.") for n in plan.keep for d in plan.drop)
    check_removed(coarse, plan, *COARSE)


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


def test_out_of_reach(coarse: Groups) -> None:
    with pytest.raises(PlanError) as raised:
        select(coarse, random_scores(coarse), ratio=0.9, kinds="ffn")
    share = 4 * 11 * 3 * 18 / coarse.total
    assert str(raised.value) == (
        "a ratio of 90.0% cannot be reached: with these kinds, protections, floor and multiple at most "
        f"{share:.1%} of the parameters can go"
    )
    with pytest.raises(PlanError) as raised:
        select(coarse, random_scores(coarse), ratio=0.001)
    assert str(raised.value) == "nothing would be removed: the ratio is smaller than the smallest unit, or every group is protected"


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
        ({"units": {"ffn": 1.5}}, "a ratio must lie between 0 and 1 (0.2 removes 20 %), got 1.5"),
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
        ({"ratio": 0.2, "multiple": 0}, "multiple must be a whole number, at least 1, got 0"),
        ({"ratio": 0.2, "multiple": {"ffn": 2.5}}, "multiple must be a whole number, at least 1, got {'ffn': 2.5}"),
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


shares = st.floats(0.01, 0.7)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    ratios=st.lists(shares, min_size=2, max_size=2),
    widths=st.sampled_from(WIDTHS),
    ranking=st.sampled_from(RANKINGS),
    multiple=st.sampled_from([1, 4]),
    kinds=st.sets(st.sampled_from(["kv_heads", "query_groups", "ffn", "hidden", "head_dim"]), min_size=1),
    skew=st.booleans(),
)
def test_any_scores(
    coarse: Groups, seed: int, ratios: list[float], widths: str, ranking: str, multiple: int, kinds: set[str], skew: bool
) -> None:
    """Never an empty group; more is removed where more is asked for; the same twice; the important units stay."""
    scores = {n: (s**20 if skew else s) for n, s in random_scores(coarse, seed).items()}
    options: dict[str, Any] = {"widths": widths, "ranking": ranking, "multiple": multiple, "kinds": sorted(kinds)}
    removed = []
    for ratio in sorted(ratios):
        try:
            plan = select(coarse, scores, ratio=ratio, **options)
        except PlanError as error:
            removed.append(0.0 if "nothing would be removed" in str(error) else 1.0)
            continue
        again = select(coarse, scores, ratio=ratio, **options)
        assert plan.diff(again) == {}
        removed.append(check_removed(coarse, plan, *COARSE))
        for name, units in plan.keep.items():
            assert 1 <= len(units) < coarse[name].size
            gone = np.setdiff1d(np.arange(coarse[name].size), units.numpy())
            assert float(scores[name][units].min()) >= float(scores[name][torch.from_numpy(gone)].max())
            assert len(units) % (1 if coarse[name].kind in ("kv_heads", "query_groups") else multiple) == 0
    assert removed == sorted(removed)


@settings(max_examples=40)
@given(data=st.data(), widths=st.sampled_from(WIDTHS))
def test_the_meter_counts_what_the_groups_count(coarse: Groups, data: st.DataObject, widths: str) -> None:
    kinds = ("kv_heads", "query_groups", "ffn", "hidden", "head_dim", "layers")
    lanes = _lanes(coarse, Selection(ratio=0.2, kinds=kinds, widths=widths))
    blocks = data.draw(st.permutations(list(coarse.blocks)))
    meter = Meter(coarse, lanes, blocks)
    taken = np.array([data.draw(st.integers(0, len(lane.stops))) for lane in lanes])
    counts: dict[str, int] = {}
    dropped = 0
    for lane, stop in zip(lanes, meter.stops(taken), strict=True):
        if lane.kind == "layers":
            dropped = 0 if stop is None else lane.size - stop
        elif stop is not None:
            counts |= dict.fromkeys(lane.names, stop)
    assert meter.left(taken) == coarse.remaining(counts, blocks[:dropped])


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("ranking", RANKINGS)
def test_kv_heads_and_query_groups_together(four_by_four: GraphModule, widths: str, ranking: str) -> None:
    """Where both shrink, heads go as their product; the count is that of the rewritten model."""
    groups = find_groups(four_by_four)
    kinds: set[str] = set()
    for ratio in (0.15, 0.3, 0.42):
        plan = select(
            groups, random_scores(groups), ratio=ratio, kinds=("kv_heads", "query_groups"), widths=widths, ranking=ranking
        )
        small = rewrite(four_by_four, plan)
        left = sum(p.numel() for p in small.parameters())
        assert plan.recipe["removed"] == round(1 - left / groups.total, 6)
        assert check_removed(groups, plan, 2, 32, 16, 4, 4, 4, 200) == pytest.approx(ratio, abs=0.06)
        kinds |= {groups[n].kind for n in plan.keep}
    assert kinds == {"kv_heads", "query_groups"}


def test_pass_reads_and_leaves_meta() -> None:
    model = llama(layers=1, hidden=16, ffn=12, kv=2, ratio=2, dim=4)
    gm = trace(model, {"input_ids": torch.zeros(2, 5, dtype=torch.long, device="meta")})
    with pytest.raises(UsageError, match=r"^no scores on the graph: run an ImportancePass before the SelectionPass$"):
        SelectionPass(ratio=0.1)(gm)
    gm.meta[SCORES] = random_scores(find_groups(gm))
    result = SelectionPass(Selection(units=0.5))(gm)
    assert result is not None
    assert not result.modified
    assert gm.meta[PLAN].diff(select(find_groups(gm), gm.meta[SCORES], units=0.5)) == {}
    with pytest.raises(UsageError, match=r"^unknown option 'ration'; did you mean 'ratio'\?"):
        SelectionPass(ration=0.1)


def test_speed_on_thirty_layers() -> None:
    """The shape of SmolLM2-135M: 46,080 FFN units, 120 groups. Each selection takes a fraction of a second."""
    groups = groups_of(llama(layers=30, hidden=576, ffn=1536, kv=3, ratio=3, dim=64, vocab_size=49152))
    scores = random_scores(groups)
    start = time.perf_counter()
    for widths in WIDTHS:
        for ranking in RANKINGS:
            plan = select(groups, scores, ratio=0.2, widths=widths, ranking=ranking)
            assert plan.recipe["removed"] == pytest.approx(0.2, abs=1e-3)
    assert time.perf_counter() - start < 8


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


def test_mixtures_stop_where_routers_and_kernels_can_follow() -> None:
    """Two experts at least for a top-2 router; rows of whole 16 bytes (4 floats) for the grouped matmul."""
    groups = find_groups(trace(build("mixtral"), {"input_ids": tokens(2, 7)}))
    (experts, *_), (ffn, *_) = ([g for g in groups.values() if g.kind == kind] for kind in ("experts", "ffn"))
    assert (experts.least, experts.multiple, ffn.least, ffn.multiple) == (2, 1, 1, 4)
    scores = random_scores(groups)
    few = select(groups, scores, units={"experts": 0.9})
    assert {len(u) for u in few.keep.values()} == {2}
    narrow = select(groups, scores, units={"ffn": 0.35})  # 41.6 of 64
    assert {len(u) for u in narrow.keep.values()} == {40}
    assert {len(u) for u in select(groups, scores, units={"ffn": 0.35}, multiple=6).keep.values()} == {36}
