"""Importance: every criterion against plain autograd on the stock model, with each unit's slices written out by hand."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fxprune import block_influence, find_groups, score, trace
from fxprune.criteria import AGGREGATIONS, CRITERIA, Criterion, aggregate
from fxprune.errors import FxPruneError, UsageError
from fxprune.groups import Groups
from fxprune.passes.importance import SCORES, ImportancePass, causal_loss

LAYERS, HIDDEN, FFN, KV, RATIO, DIM, VOCABULARY = 2, 24, 20, 2, 3, 8, 53
Slices = list[tuple[str, Any]]
Batch = Mapping[str, Tensor]


def llama(**options: Any) -> LlamaForCausalLM:
    """A GQA Llama, three query heads to a KV head, tied, with every bias; no weight at its initial constant."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=KV * RATIO,
        num_key_value_heads=KV,
        head_dim=DIM,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        **options,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 + (1 if parameter.dim() == 1 else 0))
    return model


def batches() -> list[dict[str, Tensor]]:
    """Two batches of different sizes: one with padding, one with labels of which some are ignored."""
    generator = torch.Generator().manual_seed(2)
    first = torch.randint(0, VOCABULARY, (3, 7), generator=generator)
    mask = torch.ones_like(first)
    mask[0, 4:] = mask[2, 6:] = 0
    second = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
    labels = second.clone()
    labels[0, :5] = labels[1, 3] = -100
    return [
        {"input_ids": first, "attention_mask": mask},
        {"input_ids": second, "attention_mask": torch.ones_like(second), "labels": labels},
    ]


def hand_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Next-token cross-entropy, token by token."""
    terms = []
    for row in range(logits.shape[0]):
        for position in range(logits.shape[1] - 1):
            target = int(batch.get("labels", batch["input_ids"])[row, position + 1])
            counts = target != -100 if "labels" in batch else bool(batch["attention_mask"][row, position + 1])
            if counts:
                terms.append(-torch.log_softmax(logits[row, position].float(), -1)[target])
    return torch.stack(terms).mean()


def gradients(model: LlamaForCausalLM, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    output: Any = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    hand_loss(output.logits, batch).backward()
    found = {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def rows_of(batch: Batch) -> Iterator[dict[str, Tensor]]:
    for i in range(len(batch["input_ids"])):
        yield {k: v[i : i + 1] for k, v in batch.items()}


def doubled(name: str, weight: Tensor, gradient: Tensor) -> Tensor:
    """A user's criterion: depends on the name, the weight and the gradient."""
    return (2.0 if "norm" in name else 1.0) * gradient.abs() + weight.square()


def statistics(criterion: str | Any, model: LlamaForCausalLM) -> dict[str, Tensor]:
    """What every element contributes, from whole gradients."""
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    of_batch = [gradients(model, b) for b in batches()]
    of_sample = [gradients(model, row) for b in batches() for row in rows_of(b)]
    found = {}
    for n, w in weights.items():
        mean = torch.stack([g[n] for g in of_sample]).mean(0)
        fisher = torch.stack([g[n] ** 2 for g in of_sample]).mean(0)
        if criterion == "l1":
            found[n] = w.abs()
        elif criterion == "l2":
            found[n] = w**2
        elif criterion == "taylor_vector":
            found[n] = w * (of_batch[0][n] + of_batch[1][n]) / 2
        elif criterion == "taylor1":
            found[n] = ((w * of_batch[0][n]).abs() + (w * of_batch[1][n]).abs()) / 2
        elif criterion == "taylor2":
            found[n] = (w * fisher * w).abs()
        elif criterion == "taylor_mixed":
            found[n] = (w * mean - 0.5 * w * fisher * w).abs()
        else:
            found[n] = (doubled(n, w, of_batch[0][n]) + doubled(n, w, of_batch[1][n])) / 2
    return found


def span(start: int, length: int) -> list[int]:
    return list(range(start, start + length))


def attention(layer: int, unit: int) -> tuple[Slices, Slices, Slices]:
    """The slices of one KV head, one query group and one value channel, in the order in which the model uses them."""
    at = f"model.layers.{layer}.self_attn"
    heads = [(kv, group) for kv in range(KV) for group in range(RATIO)]
    start = {head: i * DIM for i, head in enumerate(heads)}  # query heads of one KV head lie side by side

    def slices(q: list[int], k: list[int], v: list[int], o: list[int]) -> Slices:
        found: Slices = []
        for name, rows in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            found += [(f"{at}.{name}.weight", rows), (f"{at}.{name}.bias", rows)] if rows else []
        return [*found, (f"{at}.o_proj.weight", (slice(None), o))]

    queries = [i for kv, group in heads if kv == unit for i in span(start[kv, group], DIM)]
    one_kv_head = slices(queries, span(unit * DIM, DIM), span(unit * DIM, DIM), queries) if unit < KV else []
    group_rows = [i for kv, group in heads if group == unit for i in span(start[kv, group], DIM)]
    one_query_group = slices(group_rows, [], [], group_rows) if unit < RATIO else []
    values, outputs = [kv * DIM + unit for kv in range(KV)], [start[h] + unit for h in heads]
    return one_kv_head, one_query_group, slices([], [], values, outputs)


def rotary(unit: int) -> Slices:
    """A rotary pair: two channels of every query and key head in every layer."""
    found: Slices = []
    for layer in range(LAYERS):
        for name, heads in (("q_proj", KV * RATIO), ("k_proj", KV)):
            rows = [h * DIM + half * DIM // 2 + unit for h in range(heads) for half in (0, 1)]
            found += [(f"model.layers.{layer}.self_attn.{name}.{leaf}", rows) for leaf in ("weight", "bias")]
    return found


def ffn(layer: int, unit: int) -> Slices:
    at = f"model.layers.{layer}.mlp"
    rows = [(f"{at}.{name}.{leaf}", [unit]) for name in ("gate_proj", "up_proj") for leaf in ("weight", "bias")]
    return [*rows, (f"{at}.down_proj.weight", (slice(None), unit))]


def hidden(unit: int) -> Slices:
    column = (slice(None), unit)
    found: Slices = [("model.embed_tokens.weight", column)]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        found.append((f"{at}.input_layernorm.weight", unit))
        found += [(f"{at}.self_attn.{name}.weight", column) for name in ("q_proj", "k_proj", "v_proj")]
        found += [(f"{at}.self_attn.o_proj.weight", unit), (f"{at}.self_attn.o_proj.bias", unit)]
        found.append((f"{at}.post_attention_layernorm.weight", unit))
        found += [(f"{at}.mlp.{name}.weight", column) for name in ("gate_proj", "up_proj")]
        found += [(f"{at}.mlp.down_proj.weight", unit), (f"{at}.mlp.down_proj.bias", unit)]
    return [*found, ("model.norm.weight", unit)]


def by_hand() -> dict[str, list[Slices]]:
    """For each group the slices of each of its units."""
    found = {"model.hidden": [hidden(u) for u in range(HIDDEN)], "model.layers.head_dim": [rotary(u) for u in range(DIM // 2)]}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        found[f"{at}.self_attn.kv_heads"] = [attention(layer, u)[0] for u in range(KV)]
        found[f"{at}.self_attn.query_groups"] = [attention(layer, u)[1] for u in range(RATIO)]
        found[f"{at}.self_attn.head_dim"] = [attention(layer, u)[2] for u in range(DIM)]
        found[f"{at}.mlp.ffn"] = [ffn(layer, u) for u in range(FFN)]
    return found


def expected(criterion: Any, aggregation: str, model: LlamaForCausalLM) -> dict[str, Tensor]:
    elements = statistics(criterion, model)
    combine: dict[str, Callable[[list[float]], float]] = {
        "sum": sum,
        "mean": lambda parts: sum(parts) / len(parts),
        "max": max,
        "product": lambda parts: math.prod(p ** (1 / len(parts)) for p in parts),
        "last": lambda parts: parts[-1],
        "first": lambda parts: parts[0],
    }
    found = {}
    for group, units in by_hand().items():
        values = []
        for slices in units:
            parts = [float(elements[name][index].sum()) for name, index in slices]
            values.append(combine[aggregation]([abs(p) for p in parts]))
        found[group] = torch.tensor(values, dtype=torch.float64)
    return found


@dataclass
class Traced:
    model: LlamaForCausalLM
    gm: torch.fx.GraphModule
    groups: Groups


@pytest.fixture(scope="module")
def traced() -> Traced:
    model = llama()
    gm = trace(model, batches()[0])
    return Traced(model, gm, find_groups(gm))


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


class Stream(nn.Module):
    """A residual stream through one matrix whose rows (in one or two copies) and columns are the same axis."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 5, bias=False)
        self.square = nn.Linear(5, 5 * copies, bias=False)
        self.leave = nn.Linear(5, 2, bias=False)
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for part in self.square(x).chunk(self.copies, -1):
            x = x + part
        out: Tensor = self.leave(x)
        return out


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
        "unknown aggregation 'avg'; Choose from: first, last, max, mean, product, sum"
    )
    assert error(*model) == "criterion 'taylor1' needs calibration batches, and there are none"
    assert error(*model, criterion=doubled) == "criterion 'doubled' needs calibration batches, and there are none"
    assert error(*model, criterion="taylor_mixed", calibration=given, sweeps=0) == "sweeps must be at least 1, got 0"
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


def test_block_influence_equals_hooks_on_the_stock_model(traced: Traced) -> None:
    seen: dict[int, list[Tensor]] = {i: [] for i in range(LAYERS)}
    weights = []
    handles = []
    for i, layer in enumerate(traced.model.model.layers):

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, i: int = i) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
            seen[i].append((1 - cosine).flatten())

        handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        for batch in batches():
            traced.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            weights.append(batch["attention_mask"].flatten().float())
    for handle in handles:
        handle.remove()
    weight = torch.cat(weights)
    found = block_influence(traced.gm, traced.groups, batches())
    assert list(found) == [f"model.layers.{i}" for i in range(LAYERS)]
    for i in range(LAYERS):
        wanted = float((torch.cat(seen[i]) * weight).sum() / weight.sum())
        assert found[f"model.layers.{i}"] == pytest.approx(wanted, rel=1e-5)
        assert 0 < wanted < 2


def test_block_influence_errors(traced: Traced) -> None:
    with pytest.raises(UsageError, match=r"^block influence is measured on calibration batches, and there are none$"):
        block_influence(traced.gm, traced.groups, [])
    with pytest.raises(UsageError, match=r"attention_mask is missing$"):
        block_influence(traced.gm, traced.groups, [{"input_ids": batches()[0]["input_ids"]}])
    damaged = llama()
    gm = trace(damaged, {"input_ids": batches()[0]["input_ids"]})
    with torch.no_grad():
        damaged.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(FxPruneError) as raised:
        block_influence(gm, find_groups(gm), [{"input_ids": batches()[0]["input_ids"]}])
    assert str(raised.value) == ("the influence of block 'model.layers.0' is nan: the model or the calibration data is damaged")


def test_block_influence_of_a_model_without_blocks() -> None:
    gm = trace(Stream(1), (torch.randn(4, 3),))
    assert block_influence(gm, find_groups(gm), [{"x": torch.randn(4, 3)}]) == {}
