"""Loss curves beside a plan, of the next levels only, and of groups that lose units together."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune import compensate, rewrite
from fxprune.errors import UsageError
from fxprune.passes.sensitivity import measure_curves
from fxprune.plan import PrunePlan

from .sensing import (
    LLAMA,
    Case,
    batches,
    case_of,
    compensated,
    eager_loss,
    features,
    gram_of,
    next_token_loss,
    untouched,
)


@pytest.fixture(scope="module")
def llama() -> Case:
    return case_of("llama")


PLANNED = {
    "model.layers.0.self_attn.kv_heads": 1,
    "model.layers.0.self_attn.query_groups": 1,
    "model.layers.0.mlp.ffn": 20,
    "model.layers.1.mlp.ffn": 33,
}


def planned(case: Case, counts: Mapping[str, int]) -> PrunePlan:
    """The least important units of some groups go."""
    return PrunePlan.from_keep(case.groups, {n: case.scores[n].argsort()[c:] for n, c in counts.items()})


def test_beside_a_plan(llama: Case) -> None:
    """All other groups are pruned as the plan says, and the change is from its loss."""
    plan = planned(llama, {**PLANNED, "model.layers.head_dim": 1})
    names = [*PLANNED, "model.layers.head_dim", "model.layers.1.self_attn.kv_heads"]
    with untouched(llama.gm):
        curves = measure_curves(llama.gm, llama.groups, llama.scores, batches(), names=names, levels=3, plan=plan)

    def loss(counts: Mapping[str, int]) -> float:
        model = copy.deepcopy(llama.model)
        for name, count in counts.items():
            LLAMA[name](model, llama.scores[name].argsort()[:count])
        return eager_loss(model, batches())

    full = {**PLANNED, "model.layers.head_dim": 1}
    base = loss(full)
    for name, curve in curves.items():
        assert {0, full.get(name, 0), llama.groups[name].size - 1} <= {n for n, _ in curve}
        assert curve == sorted(curve)
        for count, change in curve:
            assert change == pytest.approx(loss({**full, name: count}) - base, abs=2e-5), (name, count)


def test_beside_a_compensated_plan(llama: Case) -> None:
    """The others' maps keep the weights that make up for the plan; only the map that reads the group is solved again."""
    plan = planned(llama, PLANNED)
    with untouched(llama.gm):
        curves = measure_curves(
            llama.gm, llama.groups, llama.scores, batches(), names=list(PLANNED), levels=2, plan=plan, compensated=True, ridge=0.03
        )
    maps: dict[str, dict[str, int]] = {}
    for name, count in PLANNED.items():
        maps.setdefault(features(name, torch.tensor([0]))[0], {})[name] = count

    def gone(counts: Mapping[str, int]) -> Tensor:
        return torch.unique(torch.cat([features(n, llama.scores[n].argsort()[:c])[1] for n, c in counts.items()]))

    model = copy.deepcopy(llama.model)
    grams = {}
    for path, counts in maps.items():  # in the order of the network
        grams[path] = gram_of(dataclasses.replace(llama, model=model), path, batches())
        model.get_parameter(f"{path}.weight").data = compensated(
            model.get_parameter(f"{path}.weight").detach(), grams[path], gone(counts), 0.03
        )
    base = eager_loss(model, batches())
    for path, counts in maps.items():
        dense: Any = llama.model.get_parameter(f"{path}.weight").detach()
        for name in counts:
            for count, change in curves[name]:
                other = copy.deepcopy(model)
                other.get_parameter(f"{path}.weight").data = compensated(dense, grams[path], gone({**counts, name: count}), 0.03)
                assert change == pytest.approx(eager_loss(other, batches()) - base, abs=1e-4), (name, count)
            assert (PLANNED[name], 0.0) in curves[name]


def test_only_the_next_levels_beyond_a_plan(llama: Case) -> None:
    plan = planned(llama, {"model.layers.0.mlp.ffn": 20})
    names = ["model.layers.0.mlp.ffn", "model.layers.1.mlp.ffn"]
    options: dict[str, Any] = {"names": names, "levels": 7, "plan": plan}  # steps of 9 of the 63 units that may go
    with untouched(llama.gm):
        everything = measure_curves(llama.gm, llama.groups, llama.scores, batches(), **options)
        curves = measure_curves(llama.gm, llama.groups, llama.scores, batches(), **options, ahead=2)
    assert [n for n, _ in curves[names[0]]] == [20, 27, 36]
    assert [n for n, _ in curves[names[1]]] == [0, 9, 18]
    for name in names:
        assert set(curves[name]) < set(everything[name])
    emptied = planned(llama, {"model.layers.0.mlp.ffn": 63})
    assert measure_curves(llama.gm, llama.groups, llama.scores, batches(), names=names[:1], plan=emptied, ahead=1) == {
        names[0]: [(63, 0.0)]
    }


LANES = {
    "both": ["model.layers.0.mlp.ffn", "model.layers.1.mlp.ffn"],
    "heads": ["model.layers.0.self_attn.kv_heads", "model.layers.1.self_attn.kv_heads"],
    "alone": ["model.layers.1.self_attn.query_groups"],
}


@pytest.mark.parametrize("compensation", ["none", "least-squares"])
def test_groups_that_lose_units_together(llama: Case, compensation: str) -> None:
    """A lane's points are the losses of what `rewrite` and `compensate` make of the same units."""
    plan = planned(llama, dict.fromkeys(LANES["both"], 11))
    calibration = batches()
    options: dict[str, Any] = {"levels": 3, "plan": plan, "compensated": compensation != "none"}
    with untouched(llama.gm):
        curves = measure_curves(llama.gm, llama.groups, llama.scores, calibration, lanes=LANES, **options)

    def loss(counts: Mapping[str, int]) -> float:
        chosen = planned(llama, counts)
        small = rewrite(llama.gm, chosen)
        compensate(llama.gm, small, chosen, calibration, method=compensation)
        values = [float(next_token_loss(small(**b), b)) * len(b["input_ids"]) for b in calibration]
        return sum(values) / sum(len(b["input_ids"]) for b in calibration)

    base = dict.fromkeys(LANES["both"], 11)
    with torch.no_grad():
        assert [n for n, _ in curves["both"]] == [0, 11, 21, 42, 63]
        for lane, names in LANES.items():
            if compensation != "none" and lane == "alone":
                continue  # of a group alone only the map that reads it is solved again
            for count, change in curves[lane]:
                assert change == pytest.approx(loss({**base, **dict.fromkeys(names, count)}) - loss(base), abs=1e-4), (lane, count)
    assert dict(curves["both"])[63] > 1e-3


def test_lanes_that_cannot_be_measured(llama: Case) -> None:
    def refused(said: str, **options: Any) -> None:
        with pytest.raises(UsageError, match=said):
            measure_curves(llama.gm, llama.groups, llama.scores, batches(), **options)

    mixed = {"odd": ["model.layers.0.mlp.ffn", "model.layers.0.self_attn.kv_heads"]}
    refused("^the groups of 'odd' must be of one size, and lose equally many units by the plan$", lanes=mixed)
    plan = planned(llama, {"model.layers.0.mlp.ffn": 20})
    refused("^the groups of 'both' must be of one size, and lose equally many", lanes=LANES, plan=plan)
    refused("^names= and lanes= both say what to measure: give one of them$", lanes=LANES, names=["model.layers.0.mlp.ffn"])
    refused("^ahead must be a whole number of at least 1, got 0$", ahead=0)


def test_a_plan_that_drops_layers(llama: Case) -> None:
    plan = PrunePlan.from_keep(llama.groups, {}, drop=["model.layers.0"])
    with pytest.raises(
        UsageError, match=r"^sensitivity is measured beside pruned units, not beside dropped layers: the plan drops"
    ):
        measure_curves(llama.gm, llama.groups, llama.scores, batches(), plan=plan)
