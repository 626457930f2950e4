"""What stock classes cannot have fewer of stays whole, so that a checkpoint of uniform widths loads in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

import fxprune
from fxprune import Groups, Pipeline, Selection
from fxprune.checkpoint.stock import fixed_in_stock
from fxprune.errors import PlanError, UsageError
from fxprune.recipes import RECIPES

from .checkpoints import Stock, check, pruned
from .zoo import build, tokens

HEADS_AND_FFN = ("kv_heads", "ffn")
QUICK: dict[str, Any] = {"recipe": "uniform", "levels": 2, "sensitivity_samples": 2, "calibration": [{"input_ids": tokens(4, 12)}]}


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        cast(Any, BertConfig)(
            vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=64, num_labels=3
        )
    ).eval()


def translator() -> nn.Module:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        cast(Any, T5Config)(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ).eval()


def groups_of(model: nn.Module, **inputs: torch.Tensor) -> Groups:
    return fxprune.find_groups(fxprune.trace(model, inputs or {"input_ids": tokens(2, 16)}))


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("llama", ""),
        ("qwen3", ""),
        ("gpt2", "transformer.h.*.attn.kv_heads"),
        ("opt", "model.decoder.layers.*.self_attn.kv_heads"),
        ("gpt_neox", "gpt_neox.layers.*.attention.kv_heads"),
    ],
)
def test_stock_classes_load_what_the_recipe_uniform_gives(name: str, heads: str, tmp_path: Path, stock: Stock) -> None:
    assert RECIPES["uniform"]["stock"] is True
    result = fxprune.prune(build(name), 0.15, **QUICK)
    assert result.form == "uniform"
    check(result, tmp_path / "out", stock)
    said = f"no stock {type(result.dense_model).__name__} has fewer of {heads}: they stay whole (stock=False, --no-stock, prunes"
    assert (said in result.report.note) == bool(heads)
    assert result.plan.recipe["stock"] is True
    assert list(result.plan.recipe["protect"]) == [heads] * bool(heads)


def test_without_it_they_go_and_the_note_names_them() -> None:
    given = {**QUICK, "ranking": "local", "kinds": HEADS_AND_FFN}
    result = fxprune.prune(build("opt"), 0.15, stock=False, **given)
    assert result.form == "per-layer"
    assert result.report.note.endswith("(in the way: model.decoder.layers.*.self_attn.kv_heads)")
    result = fxprune.prune(build("opt"), 0.15, stock=True, **{**given, "recipe": "magnitude"})
    assert result.form == "uniform"


def test_a_layer_more_of_the_same_kind_that_has_no_field_of_its_own() -> None:
    """BERT's pooler is a feed-forward layer as wide as the model."""
    model = classifier()
    found = fixed_in_stock(model, groups_of(model), Selection(ratio=0.2, kinds=HEADS_AND_FFN))
    assert found == ["bert.encoder.layer.*.attention.kv_heads", "ffn"]
    assert fixed_in_stock(model, groups_of(model), Selection(ratio=0.2, kinds="ffn")) == ["ffn"]


def test_an_encoder_and_a_decoder_of_one_field() -> None:
    model, inputs = translator(), {"input_ids": tokens(2, 12), "decoder_input_ids": tokens(2, 8)}
    groups = groups_of(model, **inputs)
    assert fixed_in_stock(model, groups, Selection(ratio=0.2, kinds="ffn")) == [], "together they can"
    alone = Selection(ratio=0.1, kinds="ffn", protect=("decoder.*",))
    assert fixed_in_stock(model, groups, alone) == ["encoder.block.*.layer.1.DenseReluDense.ffn"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: get_peft_model(build("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)),
        lambda: pruned(build("llama"), ratio=0.25, ranking="global", widths="per-layer").model,
        lambda: nn.Sequential(nn.Embedding(97, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)),
    ],
    ids=["adapters", "per-layer", "plain"],
)
def test_where_nothing_can_be_told(make: Any) -> None:
    model = make().eval()
    groups = groups_of(model, **({"input": tokens(2, 16)} if isinstance(model, nn.Sequential) else {}))
    assert fixed_in_stock(model, groups, Selection(ratio=0.2, kinds="ffn")) == []


def test_what_is_not_tried() -> None:
    model = build("gpt2")
    groups = groups_of(model)
    assert fixed_in_stock(model, groups, Selection(ratio=0.2, kinds=("kv_heads", "hidden"))) == ["transformer.h.*.attn.kv_heads"]
    assert fixed_in_stock(model, groups, Selection(ratio=0.2, kinds="kv_heads", multiple={"kv_heads": 4})) == [], "no half of 6"


def test_nothing_else_may_be_pruned() -> None:
    """Said before any text is read."""
    with pytest.raises(PlanError) as caught:
        fxprune.prune(build("bloom"), 0.1, recipe="uniform", calibration="missing.txt")
    assert str(caught.value) == (
        "no stock BloomForCausalLM has fewer of transformer.h.kv_heads, transformer.h.*.mlp.ffn, and nothing else may be pruned: "
        "name other kinds, or say stock=False (--no-stock)"
    )


def test_a_pipeline_leaves_the_same_whole() -> None:
    model = build("gpt2")
    expected = fxprune.prune(model, 0.15, **QUICK)
    graph = fxprune.trace(model, {"input_ids": tokens(2, 16)})
    settings = {k: v for k, v in QUICK.items() if k != "recipe"}
    made = Pipeline.from_recipe("uniform", 0.15, model=model, **settings)(graph)
    plan = made.graph_module.meta["fxprune.plan"]
    assert not plan.diff(expected.plan)
    assert plan.recipe == expected.plan.recipe
    unknown = Pipeline.from_recipe("uniform", 0.15, inputs={"input_ids": tokens(2, 16)}, **settings)
    plan = unknown(graph).graph_module.meta["fxprune.plan"]
    assert plan.recipe["protect"] == [], "a graph does not tell which class it was"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"recipe": "default", "stock": True},
            "stock=True keeps to what stock classes load, and widths='per-layer' to no such thing: leave one out",
        ),
        ({"criterion": "l2", "stock": "yes"}, "stock must be True or False, got 'yes'"),
        ({"recipe": {"stock": 1}}, "the recipe: stock must be true or false, got 1"),
    ],
)
def test_refusals(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        fxprune.prune(build("llama"), 0.1, **options)
    assert str(caught.value) == said


def test_what_has_no_configuration() -> None:
    said = "stock=True keeps to what a Hugging Face configuration can say, and "
    with pytest.raises(UsageError, match=f"^{said}a plain Linear has none: leave it out$"):
        fxprune.prune(nn.Linear(4, 4), 0.1, criterion="l2", stock=True, inputs=(torch.ones(2, 4),))
    with pytest.raises(UsageError, match=f"^{said}there is no model=: leave it out$"):
        Pipeline.from_recipe("uniform", 0.1, stock=True, inputs={"input_ids": tokens(2, 16)})


def test_widths_of_its_own_beside_the_recipe() -> None:
    result = fxprune.prune(build("gpt2"), 0.15, widths="per-layer", kinds="kv_heads", **{**QUICK, "ranking": "local"})
    assert result.plan.recipe["stock"] is False
    assert result.plan.keep
