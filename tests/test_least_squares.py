"""How much a text is trusted: the ridge is chosen by tokens that the weights were not fitted to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxprune.passes.compensation import compensate
from fxprune.passes.least_squares import RIDGES, choose_ridge, fit_map, output_error, solve, sum_gram

from .compensating import LLAMA_GONE, check_bits, held_back, pruned, solved
from .zoo import build


def text(tokens: int, features: int, seed: int = 0, mixed: float = 1.0) -> Tensor:
    """Features with a common part."""
    generator = torch.Generator().manual_seed(seed)
    own, common = torch.randn(tokens, features, generator=generator), torch.randn(tokens, 3, generator=generator)
    return own + mixed * common @ torch.randn(3, features, generator=torch.Generator().manual_seed(99))


def weight_for(features: int) -> Tensor:
    return torch.randn(5, features, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@given(st.integers(0, 1000), st.lists(st.integers(1, 90), min_size=1, max_size=3), st.floats(0, 3))
def test_the_ridge_is_the_best_on_what_is_held_back(seed: int, sizes: list[int], mixed: float) -> None:
    rows = [text(n, 24, seed + i, mixed) for i, n in enumerate(sizes)]
    weight, stays = weight_for(24), torch.arange(24) >= 8
    gram = sum_gram(rows)
    fit, held = held_back([x.double() for x in rows])
    assert (gram.tokens, gram.held_tokens) == (len(fit), len(held))
    torch.testing.assert_close(gram.fitted.double(), fit.mT @ fit, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gram.total.double(), fit.mT @ fit + held.mT @ held, rtol=1e-4, atol=1e-3)
    if not len(held):
        assert choose_ridge(weight, gram, stays) == 1.0
        return

    def error(ridge: float) -> float:
        new = solved(fit, weight, range(8), ridge)
        return float((held @ (weight - new).mT).square().sum() / (held @ weight.mT).square().sum())

    assert error(choose_ridge(weight, gram, stays)) == pytest.approx(min(error(r) for r in RIDGES), rel=1e-3, abs=1e-7)


def test_little_text_is_trusted_less() -> None:
    """And what comes out is better on other text than with the ridge that suits much."""
    weight, stays = weight_for(64), torch.arange(64) >= 20
    other = sum_gram([text(20_000, 64, seed=5)]).total
    chosen, errors = [], []
    for tokens in (80, 800, 20_000):
        gram = sum_gram([text(tokens, 64, seed=tokens)])
        found = fit_map(weight, gram, stays)
        small = fit_map(weight, gram, stays, 0.001)
        chosen.append(found.ridge)
        errors.append([output_error(weight, other, found.left, s.weight) for s in (found, small)])
    assert chosen[0] > chosen[1] > chosen[2]
    assert errors[0][0] < 0.8 * errors[0][1]
    assert errors[2][0] == pytest.approx(errors[2][1], rel=0.02)
    assert [pair[0] for pair in errors] == sorted((pair[0] for pair in errors), reverse=True)


def test_all_tokens_are_fitted_to_in_the_end() -> None:
    rows, weight, stays = [text(50, 16), text(31, 16, seed=1)], weight_for(16), torch.arange(16) >= 4
    gram = sum_gram(rows)
    found = fit_map(weight, gram, stays)
    ridge = choose_ridge(weight, gram, stays)
    assert 0 < ridge < math.inf
    assert found.ridge == pytest.approx(ridge * (40 + 25) / 81)
    wanted = solved(torch.cat(rows).double(), weight, range(4), found.ridge)[:, 4:]
    torch.testing.assert_close(found.weight, wanted, rtol=1e-4, atol=1e-5)
    fit, held = held_back([x.double() for x in rows])
    for said, r in ((found.before, math.inf), (found.after, ridge)):
        new = solved(fit, weight, range(4), r)
        assert said == pytest.approx(float((held @ (weight - new).mT).square().sum() / (held @ weight.mT).square().sum()), rel=1e-4)


def test_where_nothing_helps_the_weights_stay() -> None:
    """What the removed features do before the cut says the opposite after it."""
    x = torch.randn(1000, 4)
    x[:, 0] = torch.cat([x[:800, 1], -x[800:, 1]])
    weight, stays = torch.ones(2, 4, dtype=torch.float64), torch.arange(4) >= 1
    gram = sum_gram([x])
    assert choose_ridge(weight, gram, stays) == math.inf
    found = fit_map(weight, gram, stays)
    assert torch.equal(found.weight, weight[:, 1:])
    assert found.before == found.after
    assert torch.equal(solve(weight, gram.total, stays, math.inf), weight[:, 1:])


def test_maps_that_nothing_helped_are_reported_so() -> None:
    """Text of one token each cannot be held back: the ridge is 1; an infinite one is written as null."""
    gm, small, plan = pruned(build("llama"), LLAMA_GONE)
    before = {n: p.detach().clone() for n, p in small.named_parameters()}
    ids = torch.ones(1, 2, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert set(compensate(gm, small, plan, [batch]).ridges.values()) == {1.0}
    gm, small, plan = pruned(build("llama"), LLAMA_GONE)
    result = compensate(gm, small, plan, [batch], ridge=math.inf)
    assert set(result.to_json()["ridges"].values()) == {None}
    assert set(result.ridges) == set(result.maps)
    check_bits(small, {n: before[n] for n, _ in small.named_parameters()})
