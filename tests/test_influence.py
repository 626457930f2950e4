"""Block influence against hooks on the stock model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune import block_influence, find_groups, trace
from fxprune.errors import FxPruneError, UsageError

from .scoring import LAYERS, Stream, Traced, batches, llama, trace_llama


@pytest.fixture(scope="module")
def traced() -> Traced:
    return trace_llama()


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
