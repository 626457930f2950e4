"""The per-layer form: widths that no stock configuration expresses, loaded with and without fxprune, saved and pruned again."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import fxprune
from fxprune import PrunePlan
from fxprune.api import PruneResult, prune
from fxprune.checkpoint.source import load_source
from fxprune.errors import UsageError

from .checkpoints import Stock, assert_same, check, even_less, expected_of, inputs, outputs_of, pruned, stated
from .closeness import relative
from .zoo import VOCABULARY, build, tokens


def rotary(name: str, size: int) -> list[int] | None:
    """Three of four rotary pairs, and six of the values' eight dimensions: one head width again, but not a stock one."""
    if name == "model.layers.head_dim":
        return [0, 1, 3]
    return [0, 1, 3, 4, 5, 7] if name.endswith("head_dim") else None


FOUR: dict[str, Any] = {"num_hidden_layers": 4}
GEMMA: dict[str, Any] = {**FOUR, "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}

QWEN: dict[str, Any] = {
    **FOUR,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "sliding_window": 8,
    "use_sliding_window": True,
}


@pytest.mark.parametrize(
    ("make", "note"),
    [
        pytest.param(
            lambda: pruned(build("llama"), ratio=0.25, ranking="global", widths="per-layer"),
            "no stock configuration expresses the plan: widths differ between layers",
            id="llama-global",
        ),
        pytest.param(
            lambda: pruned(build("phi3", tied=False), ratio=0.25, ranking="global", widths="per-layer"),
            "widths differ between layers",
            id="phi3-global",
        ),
        pytest.param(
            lambda: pruned(build("llama"), units={"hidden": 0.34}),
            "LlamaConfig refuses {'hidden_size': 32}: ValueError: The hidden size (32) is not a multiple of the number of",
            id="llama-hidden-refused",
        ),
        pytest.param(
            lambda: pruned(build("gemma2"), units={"hidden": 0.25}),
            "its Gemma2ForCausalLM differs from the pruned graph (relative error",  # it scales embeddings by its hidden size
            id="gemma2-hidden",
        ),
        pytest.param(
            lambda: stated("llama", rotary), "its LlamaForCausalLM differs from the pruned graph", id="llama-rotary-pairs"
        ),
        pytest.param(
            lambda: stated("llama", even_less, drop=("model.layers.0", "model.layers.2"), **FOUR), "widths differ", id="llama-drop"
        ),
        pytest.param(lambda: stated("gemma2", even_less, drop=("model.layers.1",), **FOUR), "widths differ", id="gemma2-drop"),
        pytest.param(lambda: stated("gemma3", even_less, drop=("model.layers.0",), **GEMMA), "widths differ", id="gemma3-drop"),
        pytest.param(lambda: stated("qwen3", even_less, drop=("model.layers.2",), **QWEN), "widths differ", id="qwen3-drop"),
        pytest.param(
            lambda: pruned(build("gpt2"), units={"kv_heads": 0.34, "ffn": 0.3}),
            "GPT2Config refuses {'n_embd': 32}: `embed_dim` must be divisible by num_heads",
            id="gpt2-heads",
        ),
        pytest.param(
            lambda: pruned(build("gpt_neox", tied=False), units={"kv_heads": 0.34}), "GPTNeoXConfig refuses", id="gpt_neox-heads"
        ),
        pytest.param(lambda: pruned(build("opt"), units={"kv_heads": 0.34}), "OPTConfig refuses", id="opt-heads"),
        pytest.param(lambda: pruned(build("falcon_new"), units={"kv_heads": 0.5}), "stock", id="falcon-heads"),
    ],
)
def test_per_layer_widths_load_with_and_without_fxprune(
    make: Callable[[], PruneResult], note: str, tmp_path: Path, stock: Stock
) -> None:
    result = make()
    assert result.form == "per-layer"
    assert note in result.report.note
    loaded: Any = check(result, tmp_path / "out", stock)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["auto_map"] == {"AutoModelForCausalLM": f"modeling_fxprune.{type(result.dense_model).__name__}"}
    assert {n: tuple(p.shape) for n, p in loaded.named_parameters()} == {
        n: tuple(p.shape) for n, p in cast(nn.Module, result.model).named_parameters()
    }
    layers = len(loaded.get_submodule("model.layers")) if result.plan.drop else loaded.config.num_hidden_layers
    assert loaded.config.num_hidden_layers == layers
    if result.plan.drop:
        assert [layer.self_attn.layer_idx for layer in loaded.model.layers] == list(range(layers))
        assert len(getattr(loaded.config, "layer_types", None) or range(layers)) == layers


def test_a_per_layer_model_saved_again_is_the_same(tmp_path: Path, stock: Stock) -> None:
    kinds = GEMMA["layer_types"]
    result = stated("gemma3", even_less, drop=("model.layers.1",), num_hidden_layers=4, layer_types=kinds)
    first, second, third, fourth = (tmp_path / n for n in ("first", "second", "third", "fourth"))
    result.save_pretrained(first)
    loaded: Any = fxprune.load(first)
    loaded.save_pretrained(second)
    again: Any = fxprune.load(second)
    again.save_pretrained(third)
    _, made = stock(third, inputs(), trust=True, resave=fourth)
    expected = expected_of(result)
    assert_same(expected, made)
    for directory in (second, third, fourth):
        one, other = load_file(first / "model.safetensors"), load_file(directory / "model.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(t, other[n]) for n, t in one.items())
        assert_same(expected, outputs_of(fxprune.load(directory)))
    configs = [json.loads((d / "config.json").read_text()) for d in (second, third, fourth)]
    assert configs[0]["fxprune"] == configs[1]["fxprune"] == configs[2]["fxprune"]
    assert configs[2]["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]


def test_the_class_that_travels_along_takes_stock_configurations_too(tmp_path: Path) -> None:
    """transformers registers it for the configuration's type, and then builds stock checkpoints with it."""
    result = stated("llama", even_less)
    result.save_pretrained(tmp_path / "out")
    dense = result.dense_model
    assert dense is not None
    made = type(fxprune.load(tmp_path / "out"))(result.dense_config)
    made.load_state_dict(dense.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(made(tokens(2, 5)).logits, dense(tokens(2, 5)).logits)


def test_a_per_layer_model_can_be_pruned_again(tmp_path: Path, stock: Stock) -> None:
    first = stated("llama", even_less, drop=("model.layers.1",), num_hidden_layers=4, tied=False)
    first.save_pretrained(tmp_path / "first")
    middle, _ = load_source(tmp_path / "first")
    groups = fxprune.find_groups(fxprune.trace(middle, {"input_ids": tokens(2, 16)}))
    keep: dict[str, Any] = {n: list(range(1, g.size)) for n, g in groups.items() if g.kind in ("ffn", "query_groups")}
    keep = {n: u for n, u in keep.items() if ".2." not in n}
    plan = PrunePlan.from_keep(groups, keep, drop=["model.layers.0"])
    second = prune(middle, plan=plan)
    assert second.form == "per-layer"
    assert "the model itself has the per-layer form" in second.report.note
    loaded: Any = check(second, tmp_path / "made" / "second", stock)
    assert [layer.mlp.gate_proj.out_features for layer in loaded.model.layers] == [64 - 9 - 16 - 1, 64 - 9 - 24]
    assert json.loads((tmp_path / "made" / "second" / "config.json").read_text())["fxprune"]["drop"] == {"model.layers": [0, 1]}


@pytest.mark.parametrize(
    ("name", "settings", "auto"),
    [
        (
            "BertForMaskedLM",
            {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6},
            "MaskedLM",
        ),
        ("T5ForConditionalGeneration", {"d_model": 48, "d_kv": 8, "num_heads": 6, "d_ff": 64, "num_layers": 2}, "Seq2SeqLM"),
        ("T5ForConditionalGeneration", {"d_model": 48, "d_kv": 8, "num_heads": 6, "d_ff": 64, "num_layers": 2}, "drop"),
    ],
    ids=["bert", "t5", "t5-drop"],
)
def test_models_that_are_no_causal_language_models(name: str, settings: dict[str, Any], auto: str, tmp_path: Path) -> None:
    """T5 has residual blocks inside its blocks: one may go with the other, but its eager block counts on all of its parts."""
    kind: Any = getattr(transformers, name)
    model = kind(kind.config_class(vocab_size=VOCABULARY, **settings)).eval()
    given = {"input_ids": tokens(2, 9), **({"decoder_input_ids": tokens(2, 7)} if name.startswith("T5") else {})}
    groups = fxprune.find_groups(fxprune.trace(model, given))
    keep = {n: list(range(20 + i)) for i, (n, g) in enumerate(groups.items()) if g.kind == "ffn" and g.prunable}
    drop = []
    if auto == "drop":
        alone = prune(model, plan=PrunePlan.from_keep(groups, {}, drop=["decoder.block.0.layer.2"]), inputs=given)
        assert alone.form == "graph"
        drop = ["decoder.block.1", "decoder.block.1.layer.0"]
        keep = {n: units for n, units in keep.items() if not n.startswith("decoder.block.1.")}
    result = prune(model, plan=PrunePlan.from_keep(groups, keep, drop=drop), inputs=given)
    assert result.form == "per-layer"
    result.save_pretrained(tmp_path / "out")
    loaded = fxprune.load(tmp_path / "out")
    assert relative(result.graph_module(**given).logits, loaded(**given).logits) < 1e-5
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(written["auto_map"]) == [f"AutoModelFor{'Seq2SeqLM' if auto == 'drop' else auto}"]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_pruned_model_saves_itself(family: str, tmp_path: Path, stock: Stock) -> None:
    """As a ``Trainer`` does: without the result that it came from, after its weights have changed, and after copying."""
    drop = {"drop": ("model.layers.1",), **GEMMA} if family == "gemma3" else {}
    result = stated(family, even_less, **drop)
    assert result.form == "per-layer"
    model: Any = result.model
    dense = result.dense_model
    assert type(model).__name__ == type(dense).__name__
    assert issubclass(type(model), type(dense))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    expected = outputs_of(model)
    copied, kept = copy.deepcopy(model), model.config
    through_pickle: Any = pickle.loads(pickle.dumps(model))
    for number, one in enumerate([model, copied, through_pickle]):
        assert_same(expected, outputs_of(one))
        one.save_pretrained(tmp_path / str(number))
        assert_same(expected, outputs_of(fxprune.load(tmp_path / str(number))))
    assert model.config is kept
    assert model.config.fxprune["format"] == 1
    assert not hasattr(model.config, "auto_map")
    _, made = stock(tmp_path / "0", inputs(), trust=True, resave=tmp_path / "again")
    assert_same(expected, made)
    with pytest.raises(UsageError, match=r"would upload before all files are there: call model\.push_to_hub"):
        model.save_pretrained(tmp_path / "up", push_to_hub=True)
    assert not (tmp_path / "up").exists()


def test_a_trainer_writes_it_too(tmp_path: Path) -> None:
    result = stated("llama", even_less)
    model: Any = result.model
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 8)]
    options: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path), **options), train_dataset=cast(Any, rows)).train()
    again: Any = fxprune.load(tmp_path / "checkpoint-2")
    assert_same(outputs_of(model.eval()), outputs_of(again))
    assert not torch.equal(model.lm_head.weight, cast(Any, result.dense_model).lm_head.weight)
