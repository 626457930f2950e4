"""How the budget is spread: measured curves against a search through everything, standardised scores against FLAP's formula."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fxprune import find_groups, select, trace
from fxprune.errors import UsageError
from fxprune.groups import Groups
from fxprune.passes.selection import Selection, lanes_of
from fxprune.plan import PrunePlan

LAYERS, HIDDEN, FFN, HEADS, DIM, VOCABULARY = 2, 12, 6, 4, 2, 31
COST = {"ffn": 3 * HIDDEN, "kv_heads": 4 * HIDDEN * DIM}  # parameters that go with a unit
KINDS = ("kv_heads", "ffn")

Curve = list[tuple[int, float]]


@pytest.fixture(scope="module")
def groups() -> Groups:
    """Two layers of few units; every unit of a group costs the same, whatever else goes."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return find_groups(trace(model, {"input_ids": torch.zeros(2, 5, dtype=torch.long, device="meta")}, dynamic_shapes={}))


def eligible(groups: Groups) -> list[str]:
    return [n for n, g in groups.items() if g.prunable and g.kind in KINDS]


def random_scores(groups: Groups, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(g.size, generator=generator) for n, g in groups.items() if g.prunable}


def gone(groups: Groups, plan: PrunePlan, names: Sequence[str]) -> dict[str, int]:
    return {n: groups[n].size - len(plan.keep[n]) if n in plan.keep else 0 for n in names}


def convex(points: Curve, x: int) -> float:
    """The lower convex envelope of some points at a place: the least of all lines between two of them."""
    best = math.inf
    for (a, fa), (b, fb) in itertools.product(points, points):
        if a <= x <= b:
            best = min(best, fa if a == b else fa + (fb - fa) * (x - a) / (b - a))
    return best


def loss_of(curves: Mapping[str, Curve], counts: Mapping[str, int]) -> float:
    return sum(convex(curves[n], c) for n, c in counts.items())


def cost_of(groups: Groups, counts: Mapping[str, int]) -> int:
    return sum(COST[groups[n].kind] * c for n, c in counts.items())


def draw_curves(groups: Groups, seed: int, start: float = 0.0) -> dict[str, Curve]:
    """Points at some counts, falling now and then, as measurements do."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Curve] = {}
    for name in eligible(groups):
        size = groups[name].size
        places = sorted({0, size - 1, *torch.randint(1, size, (2,), generator=generator).tolist()})
        steps = torch.rand(len(places), generator=generator) * 3 - 0.4
        found[name] = [(p, float(v) + start) for p, v in zip(places, (steps.cumsum(0) - steps[0]).tolist(), strict=True)]
    return found


@given(st.integers(0, 100_000), st.floats(0.05, 0.95))
def test_measured_is_the_best_of_all_choices(groups: Groups, seed: int, part: float) -> None:
    """No other choice that removes as many parameters costs less, by the convex envelopes of the curves."""
    curves, scores, names = draw_curves(groups, seed), random_scores(groups, seed), eligible(groups)
    most = cost_of(groups, {n: groups[n].size - 1 for n in names})
    plan = select(
        groups, scores, ratio=part * most / groups.total, kinds=KINDS, ranking="measured", widths="per-layer", curves=curves
    )
    counts = gone(groups, plan, names)
    for name, units in plan.keep.items():  # the least important units of each group
        assert set(units.tolist()) == set(scores[name].argsort()[counts[name] :].tolist())
    removed, loss = cost_of(groups, counts), loss_of(curves, counts)
    assert removed == round(plan.recipe["removed"] * groups.total)
    worth = all(y >= 0 for c in curves.values() for _, y in c)  # else to remove more than was asked for may cost less
    best = min(
        loss_of(curves, c)
        for combination in itertools.product(*(range(groups[n].size) for n in names))
        if (more := cost_of(groups, c := dict(zip(names, combination, strict=True))) - removed) == 0 or (more > 0 and worth)
    )
    # where single units do not fit the budget, others fill it: within one unit of the best
    steps = [convex(curves[n], c + 1) - convex(curves[n], c) for n in names for c in range(groups[n].size - 1)]
    slack = 0.0 if exact(groups, curves, counts) else max(map(abs, steps))
    assert loss <= best + slack + 1e-9


def exact(groups: Groups, curves: Mapping[str, Curve], counts: Mapping[str, int]) -> bool:
    """Whether every step that was taken is at most as steep as any that was not: a greedy that left nothing out."""

    def slope(name: str, count: int) -> float:
        return (convex(curves[name], count + 1) - convex(curves[name], count)) / COST[groups[name].kind]

    taken = [slope(n, c) for n in counts for c in range(counts[n])]
    left = [slope(n, counts[n]) for n in counts if counts[n] < groups[n].size - 1]
    return not taken or not left or max(taken) <= min(left) + 1e-12


def test_most_choices_leave_nothing_out(groups: Groups) -> None:
    """The test above says something: where the budget is that of a greedy, the choice is the greedy's."""
    names, checked = eligible(groups), 0
    for seed in range(20):
        curves, scores = draw_curves(groups, seed), random_scores(groups, seed)
        steps = sorted(
            ((convex(curves[n], c + 1) - convex(curves[n], c)) / COST[groups[n].kind], c, n)
            for n in names
            for c in range(groups[n].size - 1)
        )
        for number in (3, 8, 12):
            counts = dict.fromkeys(names, 0)
            for _, _, name in steps[:number]:
                counts[name] += 1
            ratio = (cost_of(groups, counts) + 0.5) / groups.total
            plan = select(groups, scores, ratio=ratio, kinds=KINDS, ranking="measured", widths="per-layer", curves=curves)
            chosen = gone(groups, plan, names)
            assert loss_of(curves, chosen) == pytest.approx(loss_of(curves, counts))
            assert cost_of(groups, chosen) == cost_of(groups, counts)
            checked += exact(groups, curves, chosen)
    assert checked == 60


def test_a_curve_may_count_from_another_point(groups: Groups) -> None:
    """Curves measured beside a plan are zero where the plan is: only their differences count."""
    names, scores = eligible(groups), random_scores(groups)
    options: dict[str, Any] = {"ratio": 0.2, "kinds": KINDS, "ranking": "measured", "widths": "per-layer"}
    for seed in range(10):
        plain = draw_curves(groups, seed)
        shifted = {n: [(x, y - 7.0 * (i + 1)) for x, y in curve] for i, (n, curve) in enumerate(plain.items())}
        one, other = (gone(groups, select(groups, scores, curves=c, **options), names) for c in (plain, shifted))
        assert one == other


def test_uniform_widths_add_the_layers_curves(groups: Groups) -> None:
    scores, names = random_scores(groups), eligible(groups)
    dear = [(0, 0.0), (3, 3.0), (5, 9.0)]
    cheap = [(0, 0.0), (3, 0.1), (5, 0.2)]
    heads = [(0, 0.0), (3, 2.0)]
    curves = {n: heads if n.endswith("kv_heads") else (dear if ".0." in n else cheap) for n in names}
    # of each FFN's units the first three cost (1 + 0.03) / 72 a parameter together, of heads each 2 * 2/3 / 192
    plan = select(groups, scores, ratio=1.01 * 2 * COST["kv_heads"] / groups.total, kinds=KINDS, ranking="measured", curves=curves)
    assert gone(groups, plan, names) == {n: 1 if n.endswith("kv_heads") else 0 for n in names}
    alone = select(
        groups, scores, ratio=3.1 * COST["ffn"] / groups.total, kinds=KINDS, ranking="measured", widths="per-layer", curves=curves
    )
    assert gone(groups, alone, names) == {n: 3 if n == "model.layers.1.mlp.ffn" else 0 for n in names}


def test_lanes_measured_together(groups: Groups) -> None:
    """Curves under the families' names count once; what lies before their first point is gone already."""
    scores, names = random_scores(groups), eligible(groups)
    curves = {"model.layers.*.self_attn.kv_heads": [(0, 0.0), (3, 60.0)], "model.layers.*.mlp.ffn": [(4, 0.0), (6, 40.0)]}
    assert list(lanes_of(groups, Selection(ratio=0.1, kinds=KINDS))) == list(curves)
    # in both layers an FFN unit beyond the fourth costs 20 / 72 a parameter, a head 20 / 96
    for units, heads in ((2, 0), (4, 0), (4, 1), (4, 2), (5, 2)):
        ratio = (1.01 * 2 * COST["ffn"] * units + 2 * COST["kv_heads"] * heads) / groups.total
        plan = select(groups, scores, ratio=ratio, kinds=KINDS, ranking="measured", curves=curves)
        assert gone(groups, plan, names) == {n: heads if n.endswith("kv_heads") else units for n in names}, (units, heads)


def test_paces_of_a_measured_ranking(groups: Groups) -> None:
    """A kind with half the pace looks twice as dear."""
    scores, names = random_scores(groups), eligible(groups)
    curves = {n: [(0, 0.0), (groups[n].size - 1, 0.01 * COST[groups[n].kind] * (groups[n].size - 1))] for n in names}
    curves = {n: [(x, y * (1.5 if n.endswith("ffn") else 1)) for x, y in c] for n, c in curves.items()}
    options: dict[str, Any] = {"ranking": "measured", "widths": "per-layer", "curves": curves}
    ratio = 2 * COST["kv_heads"] / groups.total
    for pace, kind in ((1.0, "kv_heads"), (0.5, "ffn")):
        plan = select(groups, scores, ratio=ratio, kinds={"kv_heads": pace, "ffn": 1.0}, **options)
        assert {groups[n].kind for n in plan.keep} == {kind}


def test_groups_that_were_not_measured_stay_whole(groups: Groups) -> None:
    scores = random_scores(groups)
    curves = {n: c for n, c in draw_curves(groups, 0).items() if n != "model.layers.1.mlp.ffn"}
    plan = select(groups, scores, ratio=0.2, kinds=KINDS, ranking="measured", widths="per-layer", curves=curves, notes=["before"])
    assert "model.layers.1.mlp.ffn" not in plan.keep
    note = "the loss of 1 groups, such as model.layers.1.mlp.ffn, was not measured: they stay whole"
    assert plan.recipe["note"].startswith(f"before; {note}")
    uniform = select(groups, scores, ratio=0.2, kinds=KINDS, ranking="measured", curves=curves)
    assert {groups[n].kind for n in uniform.keep} == {"kv_heads"}  # the other layer's FFN cannot go alone


def test_measured_errors(groups: Groups) -> None:
    def error(**options: Any) -> str:
        with pytest.raises(UsageError) as raised:
            select(groups, random_scores(groups), **{"ratio": 0.2, "kinds": KINDS, "ranking": "measured", **options})
        return str(raised.value)

    assert error() == "ranking='measured' needs loss curves: pass curves=fxprune.measure_curves(...)"
    layers = "ranking compares units by what goes with them; whole layers have no such score: use ranking='local'"
    assert error(curves={}, kinds=("layers", "ffn")) == f"measured {layers}"
    assert error(kinds=("layers", "ffn"), ranking="standardised") == f"standardised {layers}"
    assert error(curves={}) == (
        "ranking='measured', but no loss curve belongs to a group that may be pruned; the loss of 4 groups, such as "
        "model.layers.0.self_attn.kv_heads, was not measured: they stay whole"
    )


def test_shares_of_units_need_no_curves(groups: Groups) -> None:
    scores = random_scores(groups)
    one, other = (select(groups, scores, units=0.5, kinds=KINDS, ranking=r) for r in ("measured", "local"))
    assert one.counts() == other.counts()


def flap(groups: Groups, scores: Mapping[str, Tensor], names: Sequence[str], target: float) -> dict[str, int]:
    """Each group's scores less their mean over their standard deviation; the lowest go first, wherever they are."""
    z = [(float(v), n) for n in names for v in ((scores[n] - scores[n].mean()) / scores[n].std())]
    counts = dict.fromkeys(names, 0)
    for _, name in sorted(z):
        more = {**counts, name: counts[name] + 1}
        if cost_of(groups, more) > target:
            break
        counts = more
    return counts


@given(st.integers(0, 100_000), st.floats(0.1, 0.5))
def test_standardised_is_flaps(groups: Groups, seed: int, part: float) -> None:
    names, scores = eligible(groups), random_scores(groups, seed)
    scores = {n: s * 10 ** (i * 3) + i for i, (n, s) in enumerate(scores.items())}  # groups on scales of their own
    most = cost_of(groups, {n: groups[n].size - 1 for n in names})
    wanted = flap(groups, scores, names, part * most)
    if not any(wanted.values()) or any(c >= groups[n].size for n, c in wanted.items()):
        return  # a unit always stays here
    ratio = (cost_of(groups, wanted) + 0.5) / groups.total
    plan = select(groups, scores, ratio=ratio, kinds=KINDS, ranking="standardised", widths="per-layer")
    assert gone(groups, plan, names) == wanted


def test_standardised_groups_of_one_value(groups: Groups) -> None:
    """All units alike: no deviation to divide by, and none is chosen before the others by chance."""
    scores = {n: torch.ones_like(s) for n, s in random_scores(groups).items()}
    plan = select(groups, scores, ratio=0.2, kinds=KINDS, ranking="standardised", widths="per-layer")
    assert plan.recipe["removed"] == pytest.approx(0.2, abs=0.02)
