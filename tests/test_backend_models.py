"""Whole language models: layers of different widths, a dropped layer, generation, and the families of the benchmark."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxprune
from benchmarks.compile import FAMILIES, fingerprint
from fxprune.backend import Backend

from .compiling import Case, case, untraced
from .zoo import build, tokens

__all__ = ["untraced"]  # a fixture

NOT_WHOLE = (
    "the block is not whole in this graph, or what it computes leaves the graph in other ways too (a KV cache: use_cache=False "
    "keeps it inside)"
)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def llama() -> Case:
    """Three layers; the second is dropped, and the others keep different shares."""
    model = build("llama", num_hidden_layers=3).eval()
    gm = fxprune.trace(model, {"input_ids": tokens(2, 7)})
    groups = fxprune.find_groups(gm)
    keep = {
        "model.layers.0.mlp.ffn": list(range(20)),
        "model.layers.2.mlp.ffn": list(range(5, 40)),
        "model.layers.2.self_attn.kv_heads": [1],
    }
    plan = fxprune.PrunePlan.from_keep(groups, keep, drop=["model.layers.1"])
    return Case(model, plan, fxprune.rewrite(gm, plan))


def greedy(small: Any, ids: Tensor, count: int) -> Tensor:
    """What a model without a cache continues with."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, small(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    """Four greedy tokens."""
    return model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, **options)


def test_widths_of_their_own_and_a_dropped_layer(llama: Case, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    before = fingerprint(llama.model)
    compiled, graphs = llama.compile()
    with torch.no_grad():
        for shape in ((2, 7), (3, 11)):
            ids = tokens(*shape, seed=1)
            close(compiled(ids, use_cache=False).logits, llama.small(input_ids=ids).logits)
    widths = {
        "model.layers.0.mlp.ffn": (64, 20),
        "model.layers.2.mlp.ffn": (64, 35),
        "model.layers.2.self_attn.kv_heads": (2, 1),
    }
    assert [(g.pruned, g.dropped, g.dense) for g in graphs] == [(widths, ("model.layers.1",), {})] * 2
    assert "fxprune" not in {r.name for r in caplog.records}
    assert fingerprint(llama.model) == before


def test_a_depth_plan_is_dense_with_a_cache_and_says_so(llama: Case, caplog: pytest.LogCaptureFixture) -> None:
    """A stock model returns a cache unless it is told otherwise."""
    made = case(llama.model, {"input_ids": tokens(2, 7)}, kinds=["none"], drop=["model.layers.1"])
    compiled, graphs = made.compile()
    ids = tokens(3, 11)
    with torch.no_grad():
        close(compiled(ids).logits, made.model(ids).logits)
        assert [(g.dropped, g.dense) for g in graphs] == [((), {"model.layers.1": NOT_WHOLE})]
        assert f"1 of the plan's groups run dense here: model.layers.1: {NOT_WHOLE}" in caplog.text
        close(compiled(ids, use_cache=False).logits, made.small(input_ids=ids).logits)
    assert graphs[1].dropped == ("model.layers.1",)


def test_a_compiled_forward_generates_what_the_pruned_model_does(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model: Any = llama.model
    backend, ids = Backend(llama.plan, inner="eager"), tokens(2, 5)
    expected = greedy(llama.small, ids, 4)
    assert generate(model, ids, use_cache=False).tolist() != expected.tolist()
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", torch.compile(model.forward, backend=backend))
        assert generate(model, ids, use_cache=False).tolist() == expected.tolist()
    assert not backend.unseen
    assert not any(g.dense for g in backend.graphs)


def test_generate_of_a_compiled_module_is_dense_and_the_plan_unseen(llama: Case) -> None:
    """Torch hands its methods on to the dense module, and the backend is never called."""
    torch._dynamo.reset()
    backend, ids = Backend(llama.plan, inner="eager"), tokens(2, 5)
    found = generate(torch.compile(llama.model, backend=backend), ids)
    assert found.tolist() == generate(llama.model, ids).tolist()
    assert backend.graphs == []
    assert backend.unseen == [*llama.plan.keep, "model.layers.1"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, for Bloom's GELU
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_of_every_family(family: str) -> None:
    """Of the benchmark, with every group halved."""
    model = build(family, num_hidden_layers=1)
    made, before = case(model, {"input_ids": tokens(2, 7)}), fingerprint(model)
    compiled, graphs = made.compile()
    ids = tokens(3, 11, seed=1)
    with torch.no_grad():
        expected = made.small(input_ids=ids).logits
        close(compiled(ids, use_cache=False).logits, expected)
        assert (model(ids, use_cache=False).logits - expected).abs().max() > 0.01
    assert [set(g.pruned) for g in graphs] == [set(made.plan.keep)]
    assert not any(g.dense for g in graphs)
    assert fingerprint(model) == before
