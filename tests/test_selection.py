"""Selection: targets, widths and rankings, against hand-written counts and a hand-written greedy."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

from fxprune import find_groups, rewrite, select, trace
from fxprune.errors import PlanError, UsageError
from fxprune.groups import Groups
from fxprune.passes.budget import Meter
from fxprune.passes.dependency import PLAN
from fxprune.passes.importance import SCORES
from fxprune.passes.selection import Selection, SelectionPass, _lanes
from fxprune.plan import PrunePlan

from .selecting import COARSE, RANKINGS, WIDE, WIDTHS, check_removed, few_units, groups_of, left_by_hand, llama, random_scores
from .zoo import build, tokens


@pytest.fixture(scope="module")
def wide() -> Groups:
    """Three layers with enough units to meet any target within 0.1 percentage points."""
    return groups_of(llama(layers=3, hidden=36, ffn=1200, kv=4, ratio=3, dim=8))


@pytest.fixture(scope="module")
def coarse() -> Groups:
    """Four layers of few units."""
    return few_units()


@pytest.fixture(scope="module")
def four_by_four() -> GraphModule:
    """Two layers with real weights, four KV heads of four query heads each."""
    model = llama(layers=2, hidden=32, ffn=16, kv=4, ratio=4, dim=4, device="cpu")
    return trace(model, {"input_ids": torch.zeros(2, 5, dtype=torch.long)}, dynamic_shapes={})


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
                f"asked for {asked:.2%} of the parameters: the nearest that the units allow is {removed:.2%}"
            )
        assert {wide[n].kind for n in plan.keep} <= ({kinds} if isinstance(kinds, str) else set(kinds))


def test_note_says_how_near_the_units_allow(coarse: Groups) -> None:
    plan = select(coarse, random_scores(coarse), ratio=0.2, kinds=("kv_heads",))
    removed = check_removed(coarse, plan, *COARSE)
    assert {len(u) for u in plan.keep.values()} == {2}  # one of three heads in each of four layers, or none
    assert plan.recipe["note"] == f"asked for 20.00% of the parameters: the nearest that the units allow is {removed:.2%}"


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


def test_floor(wide: Groups, coarse: Groups) -> None:
    plan = select(wide, random_scores(wide), ratio=0.27, floor=0.7, kinds="ffn")
    assert all(len(u) >= 840 for u in plan.keep.values())
    with pytest.raises(PlanError) as raised:
        select(wide, random_scores(wide), ratio=0.5, floor=0.7, kinds=("ffn", "kv_heads"))
    most = 1 - (wide.total - 3 * 3 * 36 * 360 - 3 * 36 * 8 * 8) / wide.total  # 360 FFN units and one KV head of every layer
    assert f"at most {most:.1%} of the parameters can go;" in str(raised.value)
    kept = select(coarse, random_scores(coarse), units=0.9, floor=0.28, kinds="ffn")
    assert set(kept.counts().values()) == {4}  # 12 * 0.28 = 3.36


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
