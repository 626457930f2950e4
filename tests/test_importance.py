"""Importance: every criterion against plain autograd on the stock model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune import find_groups, score, trace
from fxprune.criteria import AGGREGATIONS, CRITERIA, Criterion, aggregate
from fxprune.errors import FxPruneError, UsageError
from fxprune.passes.batches import causal_loss
from fxprune.passes.importance import SCORES, ImportancePass

from .scoring import HIDDEN, VOCABULARY, Stream, Traced, batches, by_hand, doubled, expected, hand_loss, llama, rows_of, trace_llama


@pytest.fixture(scope="module")
def traced() -> Traced:
    return trace_llama()


def check(actual: Mapping[str, Tensor], wanted: Mapping[str, Tensor], rtol: float = 2e-5) -> None:
    """Equal but for float32 rounding."""
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert actual[name].dtype == torch.float32
        torch.testing.assert_close(actual[name].double(), value, rtol=rtol, atol=rtol / 10 * float(value.abs().max()))


@pytest.mark.parametrize("criterion", [*(n for n, c in CRITERIA.items() if n != "random" and c.feature is None), doubled])
def test_scores_equal_plain_autograd(traced: Traced, criterion: Any) -> None:
    actual = score(traced.gm, traced.groups, criterion=criterion, calibration=batches())
    check(actual, expected(criterion, "sum", traced.model))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("criterion", ["taylor1", "taylor_vector"])
def test_aggregations_equal_plain_autograd(traced: Traced, criterion: str, aggregation: str) -> None:
    actual = score(traced.gm, traced.groups, criterion=criterion, calibration=batches(), aggregation=aggregation)
    # A signed sum may cancel nearly to zero, and a product then shows the rounding that is left.
    check(
        actual,
        expected(criterion, aggregation, traced.model),
        1e-3 if (criterion, aggregation) == ("taylor_vector", "product") else 2e-5,
    )


def test_scores_in_double_precision_keep_it() -> None:
    """A double-precision model is summed in double precision: float32 sums would cancel here."""
    first, second = nn.Linear(2, 3, bias=False).double(), nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1e8, -1e8], [2.0, 2.0], [3.0, 3.0]], dtype=torch.float64))
        first.weight[0, 0] += 1e-3
        second.weight.zero_()
    gm = trace(nn.Sequential(first, second), (torch.randn(2, 2, dtype=torch.float64),))
    own = Criterion("signed", "sum w", lambda w, g: w, gradient=False, signed=True)
    assert score(gm, find_groups(gm), criterion=own)["other"].tolist() == pytest.approx([1e-3, 4, 6], rel=1e-4)


@pytest.mark.parametrize("sweeps", [1, 3, 1000])
def test_sweeps_of_the_mixed_criterion_change_nothing(traced: Traced, sweeps: int) -> None:
    scores = score(traced.gm, traced.groups, criterion="taylor_mixed", calibration=batches(), sweeps=sweeps)
    check(scores, expected("taylor_mixed", "sum", traced.model))


def test_random_is_seeded_and_leaves_the_global_state(traced: Traced) -> None:
    before = torch.get_rng_state()
    first, again, other = (score(traced.gm, traced.groups, criterion="random", seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert {n: len(s) for n, s in first.items()} == {n: g.size for n, g in traced.groups.items() if g.prunable}
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])
        assert bool(((value >= 0) & (value < 1)).all())


def contribution(layer: nn.Linear, i: int, j: int) -> float:
    assert layer.weight.grad is not None
    return abs(float(layer.weight.detach()[i, j] * layer.weight.grad[i, j]))


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_an_element_owned_along_two_dimensions_counts_once(copies: int) -> None:
    model = Stream(copies)
    gm = trace(model, (torch.randn(4, 3),))
    (name,) = [n for n, g in find_groups(gm).items() if g.prunable]
    x = torch.randn(4, 3)
    scores = score(gm, find_groups(gm), calibration=[{"x": x}], loss=lambda out, batch: out.square().sum())
    model(x).square().sum().backward()
    wanted = []
    for unit in range(5):
        owned: set[tuple[str, int, int]] = {("enter", unit, j) for j in range(3)} | {("leave", i, unit) for i in range(2)}
        owned |= {("square", copy * 5 + unit, j) for copy in range(copies) for j in range(5)}
        owned |= {("square", i, unit) for i in range(5 * copies)}
        layers = {n: m for n, m in model.named_children() if isinstance(m, nn.Linear)}
        wanted.append(sum(contribution(layers[n], i, j) for n, i, j in owned))
    torch.testing.assert_close(scores[name], torch.tensor(wanted))


def test_small_gradients_of_a_half_precision_model_do_not_vanish() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).half()
    gm = trace(model, (torch.randn(2, 4).half(),))
    batch = {"input": torch.randn(2, 4).half()}
    for criterion in ("taylor2", "taylor_mixed"):
        small = score(gm, find_groups(gm), criterion=criterion, calibration=[batch], loss=lambda out, b: out.float().sum() / 1024)
        large = score(gm, find_groups(gm), criterion=criterion, calibration=[batch], loss=lambda out, b: out.float().sum())
        for name in small:
            assert bool((small[name] > 0).all())
        if criterion == "taylor2":
            torch.testing.assert_close(small[name] * 1024**2, large[name], rtol=0.01, atol=0)


def test_sums_over_many_samples_of_a_half_precision_model_keep_the_later_ones() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).bfloat16()
    gm = trace(model, (torch.randn(2, 4).bfloat16(),))
    one = {"input": torch.randn(1, 4).bfloat16()}
    many = {"input": one["input"].expand(300, 4)}
    options: dict[str, Any] = {"criterion": "taylor_mixed", "loss": lambda out, batch: out.float().square().sum()}
    first, all_alike = (score(gm, find_groups(gm), calibration=[b], **options)["other"] for b in (one, many))
    torch.testing.assert_close(first, all_alike, rtol=1e-4, atol=0)


def test_product_of_many_small_scores_does_not_vanish() -> None:
    members = [torch.tensor([1e-9, 2e-9, 0.0], dtype=torch.float64)] * 300
    torch.testing.assert_close(aggregate(members, "product"), members[0])


def test_taylor1_of_one_batch_is_not_that_of_its_samples(traced: Traced) -> None:
    """Batches are averaged after the absolute value, so how samples are batched matters; for the Fisher it does not."""
    whole = batches()[1]
    rows = list(rows_of(whole))
    for criterion, same in (("taylor1", False), ("taylor2", True), ("taylor_mixed", True)):
        one, many = (score(traced.gm, traced.groups, criterion=criterion, calibration=c)["model.hidden"] for c in ([whole], rows))
        assert torch.allclose(one, many) == same


def test_tensors_shared_by_all_samples_are_kept_whole() -> None:
    """Position ids of one row belong to every sample; a sample is never lost because of them."""
    model = llama()
    batch = {"input_ids": batches()[0]["input_ids"], "position_ids": torch.arange(7)[None]}
    gm = trace(model, {"input_ids": batch["input_ids"]})
    assert len(score(gm, find_groups(gm), criterion="taylor2", calibration=[batch])["model.hidden"]) == HIDDEN
    alone = {"input_ids": batch["input_ids"]}
    with_ids, without = (score(gm, find_groups(gm), criterion="taylor2", calibration=[b])["model.hidden"] for b in (batch, alone))
    assert torch.equal(with_ids, without)


def test_everything_is_put_back(traced: Traced) -> None:
    model = llama()
    gm = trace(model, {"input_ids": batches()[0]["input_ids"]})
    frozen, held = model.model.norm.weight, model.model.layers[0].mlp.gate_proj.weight
    frozen.requires_grad_(False)
    gradient = held.grad = torch.ones_like(held)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}

    def unchanged() -> None:
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name][0])
            assert parameter.requires_grad == before[name][1]
            assert not parameter._post_accumulate_grad_hooks
            assert parameter.grad is (gradient if parameter is held else None)
        assert torch.equal(gradient, torch.ones_like(gradient))

    batch = {"input_ids": batches()[0]["input_ids"]}
    for criterion in CRITERIA:
        score(gm, find_groups(gm), criterion=criterion, calibration=[batch])
        unchanged()

    def fails(name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        if "layers.0.mlp.up_proj" in name:
            raise RuntimeError("stop in the middle")
        return weight

    with pytest.raises(RuntimeError, match="stop in the middle"):
        score(gm, find_groups(gm), criterion=fails, calibration=[batch])
    unchanged()
    with torch.no_grad():  # gradients are taken inside, whatever the caller does
        score(gm, find_groups(gm), calibration=[batch])
    unchanged()


def test_frozen_parameters_are_scored_too(traced: Traced) -> None:
    model = llama().requires_grad_(False)
    gm = trace(model, batches()[0])
    check(score(gm, find_groups(gm), calibration=batches()), expected("taylor1", "sum", traced.model))


def test_the_whole_gradient_never_exists(traced: Traced) -> None:
    parameters = list(traced.gm.parameters())
    alive = []

    def watch(name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        alive.append(sum(p.grad is not None for p in parameters))
        return gradient

    score(traced.gm, traced.groups, criterion=watch, calibration=batches())
    assert len(alive) == 2 * len({m.name for g in traced.groups.values() if g.prunable for m in g.members if m.trainable})
    assert set(alive) == {1}


def test_pass_annotates_the_graph(traced: Traced) -> None:
    steps = []
    pass_ = ImportancePass("taylor_mixed", batches(), aggregation="max", sweeps=2, progress=lambda *step: steps.append(step))
    result = pass_(traced.gm)
    assert result is not None
    assert not result.modified
    scores = traced.gm.meta[SCORES]
    direct = score(traced.gm, traced.groups, criterion="taylor_mixed", calibration=batches(), aggregation="max", sweeps=2)
    assert all(torch.equal(scores[n], direct[n]) for n in direct)
    assert steps == [("importance", i + 1, 10) for i in range(10)]
    (node,) = [n for n in traced.gm.graph.nodes if n.target == "model.layers.1.mlp.up_proj.weight"]
    assert sorted(node.meta[SCORES]) == ["model.hidden", "model.layers.1.mlp.ffn"]


def test_positional_models_are_called_as_they_were_traced() -> None:
    model = Stream(1)
    x, more = torch.randn(4, 3), {"unused": torch.randn(4)}
    found = []
    for inputs in ((x,), {"x": x}, x):
        gm = trace(model, inputs)
        found.append(score(gm, find_groups(gm), calibration=[{**more, "x": x}], loss=lambda out, b: out.sum() * b["unused"].sum()))
    assert all(torch.equal(f["hidden"], found[0]["hidden"]) for f in found)


def error(*args: Any, kind: type[Exception] = UsageError, **options: Any) -> str:
    with pytest.raises(kind) as raised:
        score(*args, **options)
    return str(raised.value)


def test_usage_errors(traced: Traced) -> None:
    model, given = (traced.gm, traced.groups), batches()
    assert error(*model, criterion="tylor1") == (
        "unknown criterion 'tylor1'; did you mean 'taylor1'? "
        "Choose from: flap, kfac, l1, l2, random, taylor1, taylor2, taylor_mixed, taylor_vector, wanda"
    )
    assert error(*model, criterion=3) == "a criterion is a name or a callable (name, weight, gradient) -> scores, not 3"
    assert error(*model, criterion="l1", aggregation="avg") == (
        "unknown aggregation 'avg'; choose from: first, last, max, mean, product, sum"
    )
    assert error(*model) == "criterion 'taylor1' needs calibration batches, and there are none"
    assert error(*model, criterion=doubled) == "criterion 'doubled' needs calibration batches, and there are none"
    swept = error(*model, criterion="taylor_mixed", calibration=given, sweeps=0)
    assert swept == "sweeps must be a whole number of at least 1, got 0"
    wrong = error(*model, criterion=lambda name, weight, gradient: weight.sum(), calibration=given)
    assert re.fullmatch(r"the criterion must return scores of the weight's shape \(\d+(,|, \d+)\) for '[\w.]+'", wrong)
    assert error(*model, calibration=[{"input_ids": given[0]["input_ids"]}]) == (
        "a calibration batch has input_ids, but the model was traced with input_ids, attention_mask: attention_mask is missing"
    )
    uneven = {"input_ids": given[0]["input_ids"], "attention_mask": given[1]["attention_mask"]}
    assert error(*model, criterion="taylor2", calibration=[uneven]) == (
        "the tensors of a calibration batch must have equally many samples: input_ids has 3, attention_mask has 2"
    )
    assert error(*model, calibration=given, loss=lambda out, batch: out.logits) == (
        f"the loss must return a tensor with one element, got shape (3, 7, {VOCABULARY})"
    )
    assert error(*model, calibration=given, loss=lambda out, batch: 1.0) == (
        "the loss must return a tensor with one element, got float"
    )


def test_nan_errors(traced: Traced) -> None:
    model, given = (traced.gm, traced.groups), batches()
    ignored = {**given[1], "labels": torch.full_like(given[1]["labels"], -100)}
    assert error(*model, kind=FxPruneError, calibration=[ignored]) == "the calibration loss is nan: nothing was pruned"
    assert error(*model, kind=FxPruneError, criterion=lambda n, w, g: w * float("inf"), calibration=given) == (
        "the scores of group 'model.hidden' are not finite: check the calibration data and the loss"
    )
    damaged = llama()
    gm = trace(damaged, {"input_ids": given[0]["input_ids"]})
    with torch.no_grad():
        damaged.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    for criterion in ("random", "l1", "taylor1"):
        assert error(gm, find_groups(gm), kind=FxPruneError, criterion=criterion, calibration=given) == (
            "parameter 'model.layers.1.mlp.up_proj.weight' holds NaN or infinite values: the model is damaged, nothing was pruned"
        )


def test_meta_models_have_no_weights_to_score() -> None:
    with torch.device("meta"):
        model = Stream(1)
    gm = trace(model, (torch.randn(4, 3, device="meta"),))
    assert error(gm, find_groups(gm), criterion="l1") == (
        "parameter 'enter.weight' is on the meta device: there are no weights to score"
    )


def test_default_loss_needs_logits_and_labels() -> None:
    gm = trace(Stream(1), (torch.randn(4, 3),))
    text = "the default loss needs logits [samples, length, vocabulary] and input_ids or labels: pass loss="
    assert error(gm, find_groups(gm), calibration=[{"x": torch.randn(4, 3)}]) == text
    logits = torch.randn(2, 5, VOCABULARY)
    ids = torch.randint(0, VOCABULARY, (2, 5))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    for batch in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids, "labels": ids, "attention_mask": mask}):
        for outputs in (logits, (logits,), {"loss": ids, "logits": logits}):
            torch.testing.assert_close(causal_loss(outputs, batch), hand_loss(logits, batch))


def test_a_criterion_of_ones_own(traced: Traced) -> None:
    """A `Criterion` object works like a built-in one; so does its sign."""
    own = Criterion("signed", "sum w", lambda w, g: w, gradient=False, signed=True)
    scores = score(traced.gm, traced.groups, criterion=own)
    weights = dict(traced.model.named_parameters())
    for name, units in by_hand().items():
        wanted = [sum(abs(float(weights[n].detach()[index].sum())) for n, index in slices) for slices in units]
        torch.testing.assert_close(scores[name], torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_padding_that_the_model_does_not_see_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    gm = trace(llama(), {"input_ids": batches()[0]["input_ids"]})
    text = "the model was traced without attention_mask: padding in the calibration batches is attended to"
    with caplog.at_level(logging.WARNING, logger="fxprune"):
        score(gm, find_groups(gm), calibration=batches()[1:])
        assert text not in caplog.messages
        score(gm, find_groups(gm), calibration=batches())
    assert caplog.messages.count(text) == 1
