"""The pruned network is the masked dense one, exactly, on tiny random models of many families.

The first half goes through `fxprune.passes.verify`; the second half uses nothing of it: the reference is the stock transformers
model whose parameters were set to zero by plain slicing, written here, and whose norms were replaced by norms over the kept units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.groups import Groups
from fxprune.passes.rewrite import rewrite
from fxprune.plan import PrunePlan

from .masking import (
    RUN,
    TRACED,
    KeptLayerNorm,
    KeptRMSNorm,
    assert_same_logits,
    error,
    prunable,
    replace_modules,
    rows_of,
    sizes,
    some,
    traced,
)
from .zoo import VOCABULARY, ZOO, build, tokens


def check_every_group(model: nn.Module, kinds: Mapping[str, list[int]], **more: tuple[Tensor, Tensor]) -> None:
    """The expected groups are there; each alone, all at once and all down to one unit give the masked dense network.

    ``more`` gives further inputs, each at the traced size and at the checked one.
    """
    gm, groups = traced(model, **{n: pair[0] for n, pair in more.items()})
    inputs = {"input_ids": tokens(*RUN, seed=1), **{n: pair[1] for n, pair in more.items()}}
    with torch.no_grad():
        torch.testing.assert_close(gm(**inputs)[0], model(**inputs)[0], rtol=1e-5, atol=1e-5)
    assert sizes(groups) == kinds
    keep = {n: some(g) for n, g in prunable(groups).items()}
    wrong = {n: e for n, units in keep.items() if not (e := error(gm, groups, {n: units}, inputs)) < 1e-4}
    assert not wrong, "pruned alone, these groups do not give the masked dense network"
    assert error(gm, groups, keep, inputs) < 1e-4
    assert error(gm, groups, {n: some(g, 1) for n, g in prunable(groups).items() if g.kind != "hidden"}, inputs) < 1e-4


@pytest.mark.parametrize("name", ZOO)
def test_every_group_of_every_family(name: str) -> None:
    check_every_group(build(name, tied=True), ZOO[name].kinds)


@pytest.mark.parametrize("name", ZOO)
def test_families_with_an_output_projection_of_their_own(name: str) -> None:
    gm, groups = traced(build(name, tied=False))
    assert sizes(groups) == {**ZOO[name].kinds, **ZOO[name].untied}
    (hidden,) = (n for n, g in groups.items() if g.kind == "hidden")
    inputs = {"input_ids": tokens(*RUN, seed=1)}
    assert error(gm, groups, {hidden: some(groups[hidden])}, inputs) < 1e-4
    assert error(gm, groups, {n: some(g) for n, g in prunable(groups).items()}, inputs) < 1e-4


@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_grouped_query_attention(ratio: int, attention: str) -> None:
    model = build("llama", attention=attention, num_attention_heads=2 * ratio)
    check_every_group(model, {**ZOO["llama"].kinds, "query_groups": [ratio, ratio]})


def test_multi_query_and_multi_head_attention() -> None:
    kinds = {k: v for k, v in ZOO["llama"].kinds.items() if k not in ("kv_heads", "query_groups")}
    for kv_heads, expected in ((6, {"kv_heads": [6, 6]}), (1, {"query_groups": [6, 6]})):
        gm, groups = traced(build("llama", num_key_value_heads=kv_heads))
        found = sizes(groups)
        assert {k: v for k, v in found.items() if k in kinds} == kinds
        assert sorted(n for k, v in found.items() if k not in kinds for n in v) == next(iter(expected.values()))
        keep = {n: some(g) for n, g in prunable(groups).items()}
        assert error(gm, groups, keep, {"input_ids": tokens(*RUN)}) < 1e-4


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padded_batches(name: str) -> None:
    masks = [torch.ones(shape, dtype=torch.long) for shape in (TRACED, RUN)]
    masks[0][0, :3] = masks[1][1, :4] = 0  # padded at the left
    check_every_group(build(name), ZOO[name].kinds, attention_mask=(masks[0], masks[1]))


@pytest.mark.parametrize("name", ["gpt2", "bloom", "bert"])  # no norm that computes in float32
def test_in_double_precision_only_rounding_is_left(name: str) -> None:
    gm, groups = traced(build(name).double())
    keep = {n: some(g) for n, g in prunable(groups).items()}
    assert error(gm, groups, keep, {"input_ids": tokens(*RUN)}) < 1e-12


@pytest.mark.parametrize("tied", [True, False])
def test_a_tie_stays_a_tie(tied: bool) -> None:
    gm, groups = traced(build("llama", tied=tied))
    plan = PrunePlan.from_keep(groups, {n: some(g) for n, g in prunable(groups).items()})
    small = rewrite(gm, plan)
    embedding, head = small.get_submodule("model.embed_tokens"), small.get_submodule("lm_head")
    assert (embedding.weight is head.weight) == tied
    assert sum(p.numel() for p in small.parameters()) == groups.remaining(plan.counts())


def _group(groups: Groups, kind: str, layer: int | None) -> str:
    (name,) = (n for n, g in groups.items() if g.kind == kind and g.layer == layer and g.prunable)
    return name


def _without(kept: Tensor, size: int) -> list[int]:
    return sorted(set(range(size)) - set(kept.tolist()))


@torch.no_grad()
def _zero(parameter: Any, rows: list[int] | None = None, columns: list[int] | None = None) -> None:
    if rows is not None:
        parameter[rows] = 0
    if columns is not None:
        parameter[:, columns] = 0


def test_llama_heads_and_ffn_against_the_stock_model() -> None:
    dense = build("llama")
    stock: Any = build("llama")
    gm, groups = traced(dense)
    kv_heads, query_groups, width = 2, 3, 8
    keep: dict[str, Tensor] = {}
    layers = [
        {"kv_heads": torch.tensor([1]), "query_groups": torch.tensor([0, 1, 2]), "ffn": torch.arange(0, 64, 3)},
        {"kv_heads": torch.tensor([0, 1]), "query_groups": torch.tensor([0, 2]), "ffn": torch.tensor([5, 6, 63])},
    ]
    for i, wanted in enumerate(layers):
        keep |= {_group(groups, kind, i): units for kind, units in wanted.items()}
        attention, mlp = stock.model.layers[i].self_attn, stock.model.layers[i].mlp
        no_kv, no_group = _without(wanted["kv_heads"], kv_heads), _without(wanted["query_groups"], query_groups)
        no_query = [kv * query_groups + g for kv in range(kv_heads) for g in range(query_groups) if kv in no_kv or g in no_group]
        _zero(attention.q_proj.weight, rows=rows_of(no_query, width))
        _zero(attention.k_proj.weight, rows=rows_of(no_kv, width))
        _zero(attention.v_proj.weight, rows=rows_of(no_kv, width))
        _zero(attention.o_proj.weight, columns=rows_of(no_query, width))
        no_ffn = _without(wanted["ffn"], 64)
        _zero(mlp.gate_proj.weight, rows=no_ffn)
        _zero(mlp.up_proj.weight, rows=no_ffn)
        _zero(mlp.down_proj.weight, columns=no_ffn)
    small = rewrite(gm, PrunePlan.from_keep(groups, keep))
    assert [small.get_parameter(f"model.layers.{i}.self_attn.q_proj.weight").shape for i in (0, 1)] == [(24, 48), (32, 48)]
    assert [small.get_parameter(f"model.layers.{i}.mlp.down_proj.weight").shape for i in (0, 1)] == [(48, 22), (48, 3)]
    assert_same_logits(small, stock, dense)


def test_bert_heads_and_ffn_against_the_stock_model() -> None:
    dense = build("bert")
    stock: Any = build("bert")
    gm, groups = traced(dense)
    keep: dict[str, Tensor] = {}
    width = 8
    for i, (heads, ffn) in enumerate([([0, 4, 5], [1, 2, 3, 40]), ([2], list(range(10, 60)))]):
        keep |= {_group(groups, "kv_heads", i): torch.tensor(heads), _group(groups, "ffn", i): torch.tensor(ffn)}
        layer = stock.bert.encoder.layer[i]
        gone = rows_of(_without(torch.tensor(heads), 6), width)
        for projection in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
            _zero(projection.weight, rows=gone)
            _zero(projection.bias, rows=gone)
        _zero(layer.attention.output.dense.weight, columns=gone)
        no_ffn = _without(torch.tensor(ffn), 64)
        _zero(layer.intermediate.dense.weight, rows=no_ffn)
        _zero(layer.intermediate.dense.bias, rows=no_ffn)
        _zero(layer.output.dense.weight, columns=no_ffn)
    small = rewrite(gm, PrunePlan.from_keep(groups, keep))
    assert small.get_parameter("bert.encoder.layer.1.attention.self.query.weight").shape == (8, 48)
    assert_same_logits(small, stock, dense)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_hidden_size_against_the_stock_model(tied: bool) -> None:
    dense, stock = build("llama", tied=tied), build("llama", tied=tied)
    gm, groups = traced(dense)
    kept = torch.arange(48)[torch.arange(48) % 5 != 2]
    gone = _without(kept, 48)
    for name, parameter in stock.named_parameters():
        if any(n in name for n in ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            _zero(parameter, columns=gone)
        elif any(n in name for n in ("o_proj", "down_proj")):
            _zero(parameter, rows=gone)
    assert replace_modules(stock, "LlamaRMSNorm", lambda norm: KeptRMSNorm(norm, kept)) == 5
    small = rewrite(gm, PrunePlan.from_keep(groups, {_group(groups, "hidden", None): kept}))
    assert small.get_parameter("model.embed_tokens.weight").shape == (VOCABULARY, len(kept))
    assert_same_logits(small, stock, dense)


def test_bert_hidden_size_against_the_stock_model() -> None:
    dense = build("bert")
    stock: Any = build("bert")
    gm, groups = traced(dense)
    kept = torch.tensor([i for i in range(48) if i % 4 != 1])
    gone = _without(kept, 48)
    for name, parameter in stock.named_parameters():
        if name.endswith(("_embeddings.weight", "query.weight", "key.weight", "value.weight", "intermediate.dense.weight")):
            _zero(parameter, columns=gone)
        elif "transform.dense.weight" in name:
            _zero(parameter, rows=gone, columns=gone)
        elif name.endswith(("output.dense.weight", "output.dense.bias", "transform.dense.bias")):
            _zero(parameter, rows=gone)
    assert replace_modules(stock, nn.LayerNorm, lambda norm: KeptLayerNorm(norm, kept)) == 6
    small = rewrite(gm, PrunePlan.from_keep(groups, {_group(groups, "hidden", None): kept}))
    assert_same_logits(small, stock, dense)


def test_llama_rotary_pairs_against_the_stock_model() -> None:
    """A pair is unit ``i`` and ``i + 4`` of every head's eight; the scale stays the dense one's."""
    dense = build("llama")
    stock: Any = build("llama")
    gm, groups = traced(dense)
    kept = torch.tensor([0, 3])
    for layer in stock.model.layers:
        for projection, heads in ((layer.self_attn.q_proj, 6), (layer.self_attn.k_proj, 2)):
            _zero(projection.weight, rows=[h * 8 + i for h in range(heads) for i in (1, 2, 5, 6)])
    small = rewrite(gm, PrunePlan.from_keep(groups, {_group(groups, "head_dim", None): kept}))
    assert small.get_parameter("model.layers.1.self_attn.k_proj.weight").shape == (8, 48)
    assert small.get_parameter("model.layers.1.self_attn.v_proj.weight").shape == (16, 48)
    assert_same_logits(small, stock, dense)
