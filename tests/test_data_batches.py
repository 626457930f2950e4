"""Batches: what a packed or a padded batch costs is what its examples cost alone; order, packing, weights and resuming."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fxprune.capture import trace
from fxprune.data import Batches, Examples, packs_apart
from fxprune.data.examples import _examples
from fxprune.errors import UsageError

from .zoo import VOCABULARY, ZOO, build, tokens

LENGTHS = [5, 7, 3, 9, 12, 2, 6, 4, 16, 11]


def make(lengths: list[int], *, prompts: list[int] | None = None, source: list[int] | None = None, names: str = "a") -> Examples:
    n = len(lengths)
    leading, origin = (torch.tensor(x or [0] * n) for x in (prompts, source))
    return _examples(tokens(sum(lengths)).int(), torch.tensor(lengths), leading, origin, tuple(names))


def batches(examples: Examples, *, packing: bool = True, batch_size: int = 3, length: int = 16, **options: Any) -> Batches:
    options = {"pad_id": 1, "seed": 0, **options}
    return Batches(examples, batch_size=batch_size, length=length, packing=packing, **options)


def error(*args: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as raised:
        batches(*args, **options)
    return str(raised.value)


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of all labels but -100, each predicted by the token before it."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def alone(model: nn.Module, examples: Examples) -> Tensor:
    """The same of every example, run alone in plain transformers."""
    losses = []
    for i in range(len(examples)):
        ids = examples[i][0]
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        first = max(int(examples.prompts[i]), 1)
        losses.append(cross_entropy(logits[first - 1 : -1], ids[first:], reduction="sum"))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_batch_costs_what_its_examples_cost_alone(name: str, attention: str, packing: bool) -> None:
    """Loss and gradients; stock models; several examples in most rows, several rows in a batch."""
    model = build(name, attention=attention)
    examples = make(LENGTHS, prompts=[0, 2, 1, 4, 0, 0, 3, 3, 10, 1])
    made = batches(examples, packing=packing)
    assert any(len(ids) > 3 for ids in made.epoch(0)) or not packing
    want = alone(model, examples)
    want.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros(())
    for step in range(len(made)):
        batch = made.batch(0, step)
        labels = batch["labels"]
        output = model(**batch, use_cache=False)
        torch.testing.assert_close(output.loss, summed(output.logits, labels) / (labels[:, 1:] != -100).sum())
        total = total + summed(output.logits, labels)
    torch.testing.assert_close(total, want)
    total.backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], rtol=1e-3, atol=1e-4)


def test_the_check_above_sees_a_leak() -> None:
    """With a mask, or with a KV cache, transformers does not separate the examples of a row: the loss is another."""
    model = build("llama")
    batch = batches(make(LENGTHS), batch_size=9).batch(0, 0)
    with torch.no_grad():
        apart = model(**batch, use_cache=False).loss
        for options in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones_like(batch["input_ids"])}):
            assert abs(model(**batch, **options).loss - apart) > 0.003 * apart


def test_a_traced_graph_keeps_examples_apart_if_it_knows_positions() -> None:
    model: Any = build("llama")
    model.config.use_cache = False
    gm = trace(model, {"input_ids": tokens(2, 8), "position_ids": torch.arange(8).repeat(2, 1)})
    examples = make(LENGTHS)
    made = batches(examples)
    with torch.no_grad():
        total = torch.zeros(())
        for step in range(len(made)):
            batch = made.batch(0, step)
            labels = batch.pop("labels")
            total = total + summed(gm(**batch).logits, labels)
        torch.testing.assert_close(total, alone(model, examples))
    assert packs_apart(gm, vocabulary=VOCABULARY)
    assert not packs_apart(trace(model, {"input_ids": tokens(2, 8)}), vocabulary=VOCABULARY)  # takes no position_ids


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"bert"}))
def test_which_models_keep_examples_apart(name: str) -> None:
    """`packs_apart` says so exactly of the models whose packed loss is right."""
    model = build(name)
    modes = {n: m.training for n, m in model.train().named_modules()}
    found = packs_apart(model, vocabulary=VOCABULARY, use_cache=False)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert found == (name not in {"bloom", "opt", "falcon", "falcon_new", "mpt", "gpt_oss"})
    model.eval()
    examples = make([8, 8])
    batch = batches(examples).batch(0, 0)
    assert batch["position_ids"].tolist() == [[*range(8), *range(8)]]
    with torch.no_grad():
        one, two = (float(f) for f in (summed(model(**batch, use_cache=False).logits, batch["labels"]), alone(model, examples)))
    assert (abs(one - two) < 1e-4 * two) == found
    assert not packs_apart(model, vocabulary=VOCABULARY)  # with a KV cache none does


def test_a_packed_batch() -> None:
    examples = make([4, 3, 8, 2], prompts=[2, 0, 0, 1])
    made = batches(examples, length=10)
    batch = made.batch(0, 0)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert all(t.dtype == torch.int64 and t.shape == (2, 10) for t in batch.values())
    (order,) = made.epoch(0)
    assert sorted(order) == [0, 1, 2, 3]
    ids, labels, positions = [], [], []
    for row in ([2, 3], [0, 1]):  # best fit, the longest first
        used = [examples[i] for i in row]
        pad = 10 - sum(len(x) for x, _ in used)
        ids.append([t for x, _ in used for t in x.tolist()] + [1] * pad)
        labels.append([t for _, y in used for t in y.tolist()] + [-100] * pad)
        positions.append([t for x, _ in used for t in range(len(x))] + list(range(pad)))
    rows = sorted(zip(*(batch[k].tolist() for k in ("input_ids", "labels", "position_ids")), strict=True))
    assert rows == sorted(zip(ids, labels, positions, strict=True))
    assert labels[1] == [-100, -100, *ids[1][2:4], -100, *ids[1][5:7], -100, -100, -100]
    assert made.fill == 17 / 20


def test_a_padded_batch() -> None:
    examples = make([4, 3, 8], prompts=[2, 0, 0])
    made = batches(examples, packing=False)
    batch = made.batch(0, 0)
    order = made.epoch(0)[0]
    assert sorted(order) == [0, 1, 2]
    for place, i in enumerate(order):
        ids, labels = examples[i]
        pad = 8 - len(ids)
        assert batch["input_ids"][place].tolist() == [*ids.tolist(), *[1] * pad]
        assert batch["labels"][place].tolist() == [*labels.tolist(), *[-100] * pad]
        assert batch["attention_mask"][place].tolist() == [1] * len(ids) + [0] * pad
        assert batch["position_ids"][place].tolist() == list(range(8))
    assert all(t.dtype == torch.int64 for t in batch.values())
    assert made.fill == 15 / 24


def many(count: int = 400, seed: int = 0, **options: Any) -> Examples:
    return make(np.random.default_rng(seed).integers(2, 17, count).tolist(), **options)


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_has_every_example_once_in_its_own_order(packing: bool) -> None:
    examples = many()
    made = batches(examples, packing=packing, batch_size=7)
    epochs = [made.epoch(e) for e in range(4)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(400))
        assert len(epoch) == len(made)
    assert len({str(epoch) for epoch in epochs}) == 4
    assert made.epoch(0) == epochs[0] != batches(examples, packing=packing, batch_size=7, seed=1).epoch(0)


@pytest.mark.parametrize("packing", [True, False])
def test_any_step_can_be_made_first(packing: bool) -> None:
    """A new object that is asked for one batch in the middle gives what a whole run gave there."""
    examples = many(source=[i % 2 for i in range(400)], names="ab")
    options: dict[str, Any] = {"packing": packing, "weights": {"a": 1, "b": 3}}
    whole = batches(examples, **options)
    run = {(e, i): whole.batch(e, i) for e in range(3) for i in range(len(whole))}
    for where in ((2, 5), (0, 0), (1, len(whole) - 1)):
        found = batches(examples, **options).batch(*where)
        assert all(torch.equal(found[k], run[where][k]) for k in run[where])


def test_packing_wastes_little() -> None:
    examples = make(np.random.default_rng(0).integers(10, 200, 3000).tolist())
    made = batches(examples, length=256, batch_size=64)
    assert made.fill > 0.98
    padded = batches(examples, length=256, batch_size=64, packing=False)
    assert padded.fill > 0.95
    assert examples.tokens / (3000 * int(examples.lengths.max())) < 0.6  # had batches not been grouped by length


@pytest.mark.parametrize("packing", [True, False])
def test_weights_are_shares_of_the_rows(packing: bool) -> None:
    """90 rows of a, 30 of b; half of each: b is repeated, and a goes on where it stopped."""
    source = [0] * 90 + [1] * 30
    examples = make([8 - i % 2 for i in range(120)], source=source, names="ab")
    made = batches(examples, packing=packing, length=8, weights={"a": 2, "b": 2}, batch_size=7)
    assert len(made) == 18
    seen: list[int] = []
    for number in range(9):
        epoch = list(itertools.chain(*made.epoch(number)))
        assert collections.Counter(source[i] for i in epoch) == {0: 60, 1: 60}
        assert collections.Counter(collections.Counter(i for i in epoch if source[i]).values()) == {2: 30}
        seen += [i for i in epoch if not source[i]]
        if number % 3 == 2:  # three epochs of 60 are two rounds of 90
            assert set(collections.Counter(seen).values()) == {2 * (number + 1) // 3}
    thirds = batches(examples, length=8, weights={"a": 1, "b": 2}, batch_size=7)
    assert collections.Counter(source[i] for batch in thirds.epoch(0) for i in batch) == {0: 40, 1: 80}


def test_few_rows_make_one_step() -> None:
    made = batches(make([3, 3]), batch_size=64, length=4)
    assert (len(made), made.batch(0, 0)["input_ids"].shape) == (1, (2, 4))
    for where in ((0, 1), (0, -1), (-1, 0)):
        with pytest.raises(IndexError):
            made.batch(*where)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batches need at least 1 row of 2 tokens, got batch_size=0, length=16"),
        ({"length": 1}, "batches need at least 1 row of 2 tokens, got batch_size=3, length=1"),
        ({"length": 8}, "an example has 9 tokens, more than a row of 8: raise length or lower the cutoff"),
        (
            {"weights": {"alp": 1, "beta": 1}},
            "there is a weight for 'alp', which is no source; did you mean 'alpha'? Choose from: alpha, beta",
        ),
        ({"weights": {"alpha": 1}}, "there is no weight for 'beta': give each source one"),
        ({"weights": {"alpha": 1, "beta": 0}}, "the weight of 'beta' must be a positive number, got 0"),
        ({"weights": {"alpha": float("nan"), "beta": 1}}, "the weight of 'alpha' must be a positive number, got nan"),
    ],
)
def test_what_makes_no_batches(options: dict[str, Any], text: str) -> None:
    made = make([4, 9], source=[0, 1])
    assert error(_examples(made.ids, made.lengths, made.prompts, made.source, ("alpha", "beta")), **options) == text


def test_no_examples_make_no_batches() -> None:
    assert error(make([4, 9]).select([])) == "there are no examples to make batches of"
