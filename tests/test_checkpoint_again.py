"""What people do with a pruned model before they save it: prune it again, add tokens, change its configuration, pickle it."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForSequenceClassification,
    Phi3Config,
    Phi3ForCausalLM,
)

import fxprune

from .zoo import build, tokens

IDS = tokens(2, 12)


def prune(model: Any, **options: Any) -> Any:
    return fxprune.prune(model, **{"criterion": "l2", **options})


def comes_back(model: Any, directory: Path) -> None:
    """Saved, loaded in both ways, saved again from each, and pickled: the same logits throughout."""
    with torch.no_grad():
        expected = model(IDS).logits
        model.save_pretrained(directory / "first")
        loaded: list[Any] = [AutoModelForCausalLM.from_pretrained(directory / "first", trust_remote_code=True).eval()]
        loaded.append(fxprune.load(directory / "first"))
        for number, one in enumerate(list(loaded)):
            one.save_pretrained(directory / f"again{number}")
            loaded.append(fxprune.load(directory / f"again{number}"))
        loaded += [pickle.loads(pickle.dumps(loaded[1])), copy.deepcopy(loaded[1]), pickle.loads(pickle.dumps(model))]
        for one in loaded:
            torch.testing.assert_close(one(IDS).logits, expected, rtol=0, atol=0)


FFN = {"units": {"ffn": 0.3}, "widths": "per-layer", "protect_first": 1}


@pytest.mark.parametrize(
    "steps",
    [
        (FFN, {"units": {"kv_heads": 0.5}, "widths": "per-layer", "protect_last": 1}),
        ({"units": {"head_dim": 0.5}}, FFN, {"units": {"layers": 0.5}, "kinds": ["layers"], "layers_by": "first"}),
        ({"units": {"layers": 0.34}, "kinds": ["layers"], "layers_by": "first"}, {"units": {"hidden": 0.5}}, FFN),
    ],
    ids=["ffn, heads", "head width, ffn, layers", "layers, hidden, ffn"],
)
def test_a_pruned_model_is_pruned_again_before_it_is_saved(steps: tuple[dict[str, Any], ...], tmp_path: Path) -> None:
    model: Any = build("llama", tied=False, num_hidden_layers=4)
    for number, step in enumerate(steps):
        result = prune(model, **step)
        result.save_pretrained(tmp_path / str(number))
        model = result.model
    comes_back(model, tmp_path)
    assert model.config.num_hidden_layers == len(model.model.layers)


def test_head_widths_twice(tmp_path: Path) -> None:
    first = prune(build("gpt2"), units={"head_dim": 0.5})
    second = prune(first.model, units={"kv_heads": 0.5})
    comes_back(second.model, tmp_path)


@pytest.mark.parametrize("step", [FFN, {"units": {"hidden": 0.5}}], ids=["ffn", "hidden"])
def test_more_tokens_after_pruning(step: dict[str, Any], tmp_path: Path) -> None:
    model = prune(build("llama", tied=False), **step).model
    model.resize_token_embeddings(104, mean_resizing=False)
    comes_back(model, tmp_path)
    loaded: Any = fxprune.load(tmp_path / "first")
    loaded.resize_token_embeddings(110, mean_resizing=False)
    (tmp_path / "more").mkdir()
    comes_back(loaded, tmp_path / "more")


def test_what_is_changed_in_the_configuration_is_saved(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForSequenceClassification(config).eval()
    result = prune(model, **FFN, inputs={"input_ids": IDS[:1]})
    small: Any = result.model
    small.config.pad_token_id, small.config.id2label, small.config.use_cache = 0, {0: "NO", 1: "YES"}, False
    small.save_pretrained(tmp_path / "out")
    found: Any = fxprune.load(tmp_path / "out")
    assert (found.config.pad_token_id, found.config.id2label, found.config.use_cache) == (0, {0: "NO", 1: "YES"}, False)
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, small(IDS).logits)
    assert model.config.pad_token_id is None
    assert not hasattr(model.config, "fxprune")


def test_a_state_dict_holds_resized_buffers(tmp_path: Path) -> None:
    model = prune(build("llama", tied=False), units={"head_dim": 0.5}).model
    model.save_pretrained(tmp_path / "out", state_dict=model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fxprune.load(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_every_auto_class_that_lists_a_model_loads_it(tmp_path: Path) -> None:
    sides: dict[str, Any] = {
        f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in (("layers", 2), ("ffn_dim", 48))
    }
    config = BartConfig(vocab_size=97, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, **sides)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    result = prune(BartForConditionalGeneration(config).eval(), units={"kv_heads": 0.5}, inputs=inputs)
    result.save_pretrained(tmp_path / "out")
    bound = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert {"AutoModelForSeq2SeqLM", "AutoModelForMaskedLM"} <= set(bound)
    assert "AutoModelForSeq2SeqLM.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    found = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(found(**inputs).logits, result.model(**inputs).logits)


def test_a_trace_leaves_what_a_forward_keeps() -> None:
    """Frequencies for long texts are an attribute that a forward sets: a trace's have no numbers."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 32,
    }
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = Phi3Config(
        **sizes, pad_token_id=0, max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=rope
    )
    torch.manual_seed(0)
    model: Any = Phi3ForCausalLM(config).eval()
    untouched, long = copy.deepcopy(model), tokens(1, 50)
    fxprune.trace(model, {"input_ids": long[:, :16]})  # a part of another tensor, too
    with torch.no_grad():
        torch.testing.assert_close(model(long).logits, untouched(long).logits, rtol=0, atol=0)
        small = prune(copy.deepcopy(untouched), units={"kv_heads": 0.5, "ffn": 0.5}, widths="per-layer", protect_first=1).model
        assert small(long).logits.isfinite().all()
