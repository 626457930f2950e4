"""LHSPG on a problem with a known answer: planted units that do little have to be found and brought to zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxprune
from fxprune import LHSPG, Selection
from fxprune.groups import Groups

from .shearing import ALL, BASE, RANK, SCALE, batch, fresh, logits, named, slices, train, trained

SHORT: dict[str, Any] = {"warmup": 3, "periods": 4, "period_steps": 4}
PROJECTIONS = ("half-space", "linear")
CHANNELS = {0: [1, 2, 3, 5, 8, 13, 21, 34, 55, 63], 1: [0, 7, 9, 11, 30, 31, 32, 60]}
HEAD = 1


@torch.no_grad()
def plant(groups: Groups) -> dict[str, Tensor]:
    """Scale some channels of both layers, and one head of the second, to a twentieth; they are returned by group."""
    planted = {named(groups, "ffn", layer): torch.tensor(units) for layer, units in CHANNELS.items()}
    planted[named(groups, "kv_heads", 1)] = torch.tensor([HEAD])
    for name, units in planted.items():
        for member in groups[name].members:
            tensor = groups.parameters[member.name].tensor
            assert tensor is not None
            if "lora" not in member.name:
                tensor.index_copy_(member.dim, member.indices(units), 0.05 * tensor.index_select(member.dim, member.indices(units)))
    return planted


def bare_total(model: Any) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return {n: u.tolist() for n, u in found.items()} == {n: u.tolist() for n, u in expected.items()}


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_planted_units_are_found_and_go_while_the_rest_learns(projection: str) -> None:
    model, gm, groups = fresh()
    planted = plant(groups)
    # By hand: a channel has 3 x 48 weights, a head 8 rows of k and v and 24 rows of q and columns of o.
    share = (18 * 3 * 48 + 2 * 48 * (8 + 24)) / bare_total(model)
    optimizer = LHSPG(torch.optim.AdamW(trained(model), lr=5e-3), gm, groups, ratio=share, projection=projection, **SHORT)
    losses = train(model, optimizer, 3 + 4 * 4)
    assert optimizer.done
    assert same(optimizer.zero, planted)
    assert all(bool((values == 0).all()) for values in slices(groups, planted))
    assert [entry["step"] for entry in optimizer.history] == [3, 7, 11, 15]
    assert optimizer.history[-1]["removed"] == pytest.approx(share, abs=1e-12)
    assert optimizer.plan().recipe["removed"] == pytest.approx(share, abs=1e-6)
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    assert not [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_removal_changes_nothing(projection: str) -> None:
    model, gm, groups = fresh()
    optimizer = LHSPG(torch.optim.AdamW(trained(model), lr=5e-3), gm, groups, ratio=0.2, projection=projection, **SHORT)
    train(model, optimizer, 19)
    expected = logits(model)
    plan = optimizer.plan()
    small = fxprune.rewrite(gm, plan)
    torch.testing.assert_close(logits(small), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    (name,) = (n for n in plan.keep if n == named(groups, "ffn", 0))
    assert small.get_parameter(f"{BASE}.0.mlp.down_proj.lora_A.default.weight").shape == (RANK, len(plan.keep[name]))
    cut = {n: t for n, t in small.named_parameters() if "lora_" not in n}
    assert 1 - sum(t.numel() for t in cut.values()) / bare_total(model) == pytest.approx(plan.recipe["removed"], abs=1e-6)
    assert plan.recipe["removed"] == pytest.approx(0.2, abs=144 / 2 / bare_total(model))
    assert plan.recipe["optimizer"] == "lhspg"


def test_merged_adapters_are_zero_where_units_are() -> None:
    model, gm, groups = fresh()
    optimizer = LHSPG(torch.optim.AdamW(trained(model), lr=5e-3), gm, groups, ratio=0.2, **SHORT)
    train(model, optimizer, 19)
    expected, gone = logits(model), optimizer.zero
    model.merge_adapter()
    try:
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        for layer in (0, 1):
            units = gone[named(groups, "ffn", layer)]
            mlp = model.get_submodule(f"{BASE}.{layer}.mlp")
            assert bool((mlp.gate_proj.base_layer.weight[units] == 0).all())
            assert bool((mlp.up_proj.base_layer.weight[units] == 0).all())
            assert bool((mlp.down_proj.base_layer.weight[:, units] == 0).all())
    finally:
        model.unmerge_adapter()


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, lr=5e-3), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_zero_units_stay_zero_against_momentum(make: Any) -> None:
    model, gm, groups = fresh()
    optimizer = LHSPG(make(trained(model)), gm, groups, ratio=0.2, warmup=4, periods=2, period_steps=3)
    first: dict[str, Tensor] = {}

    def after(step: int) -> None:
        if step == 6:
            first.update(optimizer.zero)
        if step >= 6:
            assert all(bool((values == 0).all()) for values in slices(groups, optimizer.zero))

    train(model, optimizer, 14, after=after)
    assert first
    assert all(set(units.tolist()) <= set(optimizer.zero[name].tolist()) for name, units in first.items())
    assert len(optimizer.history) == 2


def test_nothing_shrinks_during_warmup() -> None:
    model, gm, groups = fresh()
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = LHSPG(torch.optim.SGD(trained(model), lr=0.1), gm, groups, ratio=0.2, **SHORT)
    train(model, optimizer, 3)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert not optimizer.redundant
    train(model, optimizer, 1)
    assert optimizer.redundant
    assert not optimizer.zero
    assert not optimizer.done


def test_the_linear_form_takes_equal_steps() -> None:
    """Base weights, rows of B and columns of A of a channel: what the wrapped optimizer does not move goes in equal steps."""
    model, gm, groups = fresh()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    optimizer = LHSPG(
        torch.optim.SGD(trained(model), lr=0.0), gm, groups, ratio=0.1, warmup=0, periods=1, period_steps=5, projection="linear"
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(5):
        train(model, optimizer, 1)
        name = named(groups, "ffn", 0)
        units, left = optimizer.redundant[name], (4 - step) / 5
        for member in groups[name].members:
            index = member.indices(units)
            now = dict(model.named_parameters())[member.name].detach().index_select(member.dim, index)
            torch.testing.assert_close(now, left * before[member.name].index_select(member.dim, index), rtol=1e-5, atol=1e-9)


def test_heads_and_query_groups_that_share_weights_go_together() -> None:
    model, gm, groups = fresh()
    kinds = ("kv_heads", "query_groups", "ffn")
    selection = Selection(units=0.5, kinds=kinds, widths="per-layer")
    optimizer = LHSPG(torch.optim.AdamW(trained(model), lr=5e-3), gm, groups, selection=selection, **SHORT)
    train(model, optimizer, 19)
    plan = optimizer.plan()
    counts = {(groups[n].kind, groups[n].layer): len(units) for n, units in plan.keep.items()}
    assert counts == {(kind, i): n for i in (0, 1) for kind, n in (("kv_heads", 1), ("query_groups", 2), ("ffn", 32))}
    assert all(bool((values == 0).all()) for values in slices(groups, optimizer.zero))
    expected = logits(model)
    torch.testing.assert_close(logits(fxprune.rewrite(gm, plan)), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_uniform_widths() -> None:
    model, gm, groups = fresh()
    selection = Selection(ratio=0.15, kinds=("ffn",), ranking="global", widths="uniform")
    optimizer = LHSPG(torch.optim.AdamW(trained(model), lr=5e-3), gm, groups, selection=selection, **SHORT)
    train(model, optimizer, 19)
    one, two = (len(units) for units in optimizer.plan().keep.values())
    assert one == two
    assert optimizer.history[-1]["removed"] == pytest.approx(0.15, abs=144 / bare_total(model))


@pytest.mark.parametrize("widths", ["per-layer", "uniform"])
def test_the_unit_of_scores_does_not_matter(widths: str) -> None:
    """Not beside units that are gone either: after three periods they are those that one selection takes."""
    found = []
    for factor in (1.0, 1e-18):
        model, gm, groups = fresh()
        drawn = torch.Generator().manual_seed(0)
        each = {n: torch.rand(g.size, generator=drawn, dtype=torch.float64) ** 4 * g.parameters_per_unit for n, g in groups.items()}
        scores = {name: own * factor for name, own in each.items()}
        chosen = Selection(ratio=0.2, kinds=("kv_heads", "ffn"), ranking="global", widths=widths)
        options: dict[str, Any] = {"warmup": 0, "periods": 3, "period_steps": 1, "scores": scores}
        optimizer = LHSPG(torch.optim.AdamW(trained(model), lr=5e-3), gm, groups, selection=chosen, **options)
        train(model, optimizer, 3)
        found.append(optimizer.zero)
        bare = fresh(targets=None)[2]
        once = fxprune.select(bare, {n.removeprefix("base_model.model."): s for n, s in scores.items()}, chosen).removed()
        assert same({n.removeprefix("base_model.model."): units for n, units in optimizer.zero.items()}, once)
    assert same(*found)


def test_given_scores_stand_in_place_of_saliency() -> None:
    """What matters least by parameter goes, least first."""
    model, gm, groups = fresh()
    channels, heads = [named(groups, "ffn", layer) for layer in (0, 1)], [named(groups, "kv_heads", layer) for layer in (0, 1)]
    scores = {name: 144.0 * (2 + torch.arange(64).double()) for name in channels}  # 3 x 48 parameters go with a channel
    scores |= {name: torch.full((2,), 1e9) for name in heads}
    scores |= {named(groups, "query_groups", layer): torch.full((3,), 1e9) for layer in (0, 1)}
    scores[channels[0]] += 1e-3
    scores[heads[1]][HEAD] = 2.5 * 48 * 64  # 8 rows of k and v, 24 rows of q and columns of o: between the first two channels
    share = (3 * 144 + 48 * 64) / bare_total(model)
    options: dict[str, Any] = {"ratio": share, "warmup": 0, "periods": 2, "period_steps": 2, "scores": scores}
    optimizer = LHSPG(torch.optim.AdamW(trained(model), lr=5e-3), gm, groups, **options)
    first: dict[str, Tensor] = {}

    def after(step: int) -> None:
        if step == 2:
            first.update(optimizer.zero)

    train(model, optimizer, 4, after=after)
    assert same(first, {channels[0]: torch.tensor([0]), channels[1]: torch.tensor([0])})
    assert same(optimizer.zero, {channels[0]: torch.tensor([0]), channels[1]: torch.tensor([0, 1]), heads[1]: torch.tensor([HEAD])})
    assert str(optimizer.plan().recipe["saliency"]).startswith("scores ")


def test_protected_groups_stay_whole() -> None:
    model, gm, groups = fresh()
    block = f"{BASE}.0"
    optimizer = LHSPG(torch.optim.AdamW(trained(model), lr=5e-3), gm, groups, ratio=0.1, protect=(block,), **SHORT)
    train(model, optimizer, 19)
    assert {groups[n].layer for n in optimizer.plan().keep} == {1}


def test_the_plan_of_a_period_that_is_not_over_has_what_is_zero() -> None:
    model, gm, groups = fresh()
    optimizer = LHSPG(torch.optim.AdamW(trained(model), lr=5e-3), gm, groups, ratio=0.2, **SHORT)
    train(model, optimizer, 8)
    assert sum(map(len, optimizer.redundant.values())) > sum(map(len, optimizer.zero.values())) > 0
    expected = logits(model)
    small = fxprune.rewrite(gm, optimizer.plan())
    torch.testing.assert_close(logits(small), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert optimizer.plan().recipe["removed"] == pytest.approx(optimizer.history[0]["removed"], abs=1e-6)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_training_without_adapters(projection: str) -> None:
    model, gm, groups = fresh(targets=None)
    optimizer = LHSPG(torch.optim.AdamW(trained(model), lr=1e-3), gm, groups, ratio=0.2, projection=projection, **SHORT)
    losses = train(model, optimizer, 25)
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    gone = optimizer.zero
    assert all(bool((values == 0).all()) for values in slices(groups, gone))
    assert optimizer.plan().recipe["removed"] == pytest.approx(0.2, abs=144 / bare_total(model))
    expected = logits(model)
    small = fxprune.rewrite(gm, optimizer.plan())
    torch.testing.assert_close(logits(small), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("family", "targets", "options"),
    [
        ("gpt2", ("c_attn", "c_proj", "c_fc"), {"fan_in_fan_out": True}),
        ("llama", ALL, {"lora_bias": True, "use_rslora": True, "changes": {"attention_bias": True, "mlp_bias": True}}),
        ("qwen2", ALL, {"lora_dropout": 0.1}),
    ],
    ids=["transposed", "biased", "dropout"],
)
def test_other_layouts(family: str, targets: tuple[str, ...], options: dict[str, Any]) -> None:
    """Weights stored the other way round in one matrix for queries, keys and values; biases of B and of the model."""
    model, gm, groups = fresh(family, targets, **options)
    inner, selection = torch.optim.AdamW(trained(model), lr=5e-3), Selection(units=0.5, widths="per-layer")
    optimizer = LHSPG(inner, gm, groups, selection=selection, **SHORT)
    model.train("lora_dropout" in options)
    train(model, optimizer, 19)
    model.eval()
    assert all(bool((values == 0).all()) for values in slices(groups, optimizer.zero))
    expected = logits(model)
    small = fxprune.rewrite(gm, optimizer.plan())
    torch.testing.assert_close(logits(small), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_half_precision_base_weights() -> None:
    """peft keeps adapters in 32 bits there; so are the sums over half-precision weights."""
    model, gm, groups = fresh(dtype=torch.bfloat16)
    optimizer = LHSPG(torch.optim.AdamW(trained(model), lr=5e-3), gm, groups, ratio=0.2, **SHORT)
    train(model, optimizer, 19)
    gone = list(slices(groups, optimizer.zero))
    assert {values.dtype for values in gone} == {torch.bfloat16, torch.float32}
    assert all(bool((values == 0).all()) for values in gone)


def test_groups_without_an_adapter_are_left_alone() -> None:
    model, gm, groups = fresh(targets=ALL[:4])
    optimizer = LHSPG(torch.optim.AdamW(trained(model), lr=5e-3), gm, groups, ratio=0.1, **SHORT)
    name = named(groups, "ffn", 0)
    assert optimizer.left_out[name] == "none of its weights is trained or has an adapter"
    train(model, optimizer, 19)
    assert {groups[n].kind for n in optimizer.plan().keep} <= {"kv_heads", "query_groups"}


def test_units_that_a_norm_looks_at_are_left_alone() -> None:
    model, gm, groups = fresh()
    optimizer = LHSPG(torch.optim.AdamW(trained(model), lr=5e-3), gm, groups, ratio=0.1, **SHORT)
    (hidden,) = (n for n, g in groups.items() if g.kind == "hidden")
    assert optimizer.left_out[hidden] == "a norm, a softmax or a router looks at all of its units"
    assert not [n for n in optimizer.left_out if groups[n].size == RANK], "a rank is no group of the base model"


def test_a_unit_that_is_zero_leaves_the_half_space_at_once() -> None:
    model, gm, groups = fresh()
    name = named(groups, "ffn", 0)
    with torch.no_grad():
        for member in groups[name].members:
            if "lora" not in member.name:
                tensor = groups.parameters[member.name].tensor
                assert tensor is not None
                tensor.index_fill_(member.dim, torch.tensor([4, 40]), 0)
    optimizer = LHSPG(torch.optim.AdamW(trained(model), lr=5e-3), gm, groups, ratio=0.1, **SHORT)
    train(model, optimizer, 4)
    assert optimizer.zero[name].tolist() == [4, 40]


def test_a_period_that_can_take_no_unit_takes_none() -> None:
    model, gm, groups = fresh()
    one = 144 / bare_total(model)
    optimizer = LHSPG(torch.optim.AdamW(trained(model), lr=5e-3), gm, groups, ratio=2 * one, **SHORT)
    train(model, optimizer, 19)
    assert sum(entry["units"] for entry in optimizer.history) == 2
    assert sum(map(len, optimizer.zero.values())) == 2


def test_a_large_penalty_brings_units_to_zero_at_once() -> None:
    model, gm, groups = fresh()
    optimizer = LHSPG(torch.optim.SGD(trained(model), lr=0.1), gm, groups, ratio=0.2, penalty=1e6, **SHORT)
    train(model, optimizer, 4)
    assert same(optimizer.zero, optimizer.redundant)


def test_epsilon_widens_what_counts_as_outside() -> None:
    """With a step of next to nothing, <x^, x> is |x|^2: below eps |x|^2 only for eps near 1 with a penalty."""
    found = {}
    for epsilon in (0.0, 0.999):
        model, gm, groups = fresh()
        optimizer = LHSPG(torch.optim.SGD(trained(model), lr=1e-3), gm, groups, ratio=0.2, penalty=2.0, epsilon=epsilon, **SHORT)
        train(model, optimizer, 4)
        found[epsilon] = sum(map(len, optimizer.zero.values()))
    assert found[0.0] == 0
    assert found[0.999] > 0


def test_batches_are_what_the_model_is_trained_on() -> None:
    """The loss falls without LHSPG too: what the other tests lean on."""
    model, _, _ = fresh()
    losses = train(model, torch.optim.AdamW(trained(model), lr=5e-3), 19)
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    assert batch()["labels"].shape == (4, 12)
    assert model.get_submodule(f"{BASE}.0.mlp.gate_proj").scaling["default"] == SCALE
