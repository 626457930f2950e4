"""Reading models by name: what is not whole is refused, since transformers would make the rest up."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel, T5Config

import fxprune
from fxprune.checkpoint.source import load_source
from fxprune.errors import CheckpointError, UsageError

from .zoo import build, tokenizer

ADVICE = "Name a checkpoint of a causal language model; other models are pruned in Python, fxprune.prune(model, inputs=...)"


def small(cls: Any, **changes: Any) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return cls(LlamaConfig(vocab_size=97, num_key_value_heads=2, pad_token_id=0, **sizes, **changes))


@pytest.mark.parametrize("cls", [LlamaForSequenceClassification, LlamaModel])
def test_another_kind_of_model_is_refused(cls: Any, tmp_path: Path) -> None:
    small(cls, tie_word_embeddings=False).save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError) as caught:
        load_source(tmp_path / "other")
    assert str(caught.value) == (
        f"'{tmp_path / 'other'}' is no whole LlamaForCausalLM: it does not hold lm_head.weight, which would be random; its config "
        f"names {cls.__name__}. {ADVICE}"
    )


def test_a_model_that_is_no_causal_language_model(tmp_path: Path) -> None:
    T5Config(vocab_size=97).save_pretrained(tmp_path / "t5")
    with pytest.raises(UsageError) as caught:
        load_source(tmp_path / "t5")
    said = "transformers has none with a T5Config; other models are pruned in Python, fxprune.prune(model, inputs=...)"
    assert str(caught.value) == f"cannot load a causal language model from '{tmp_path / 't5'}': {said}"


def without(directory: Path, part: str, **more: torch.Tensor) -> None:
    """Take the tensors whose names have a part in them out of a checkpoint."""
    file = directory / "model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if part not in name}
    save_file({**tensors, **more}, file, metadata={"format": "pt"})


def test_a_checkpoint_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    without(tmp_path / "dense", "layers.1.mlp")
    with pytest.raises(UsageError) as caught:
        load_source(tmp_path / "dense")
    names = ", ".join(f"model.layers.1.mlp.{n}_proj.weight" for n in ("down", "gate", "up"))
    assert str(caught.value) == (
        f"'{tmp_path / 'dense'}' is no whole LlamaForCausalLM: it does not hold {names}, which would be random. {ADVICE}"
    )


@pytest.mark.parametrize("recipe", ["uniform", "per-layer"])
def test_a_pruned_checkpoint_that_lacks_a_tensor_is_refused(recipe: str, tmp_path: Path) -> None:
    result = fxprune.prune(
        build("llama"), 0.1, criterion="l2", kinds=["ffn"], widths=recipe, protect_first=int(recipe != "uniform")
    )
    assert result.form == recipe
    result.save_pretrained(tmp_path / "small")
    assert fxprune.load(tmp_path / "small") is not None
    without(tmp_path / "small", "layers.1.mlp.up")
    with pytest.raises(
        CheckpointError, match=r"cannot load the checkpoint '.*small': it does not hold model.layers.1.mlp.up_proj.weight$"
    ):
        fxprune.load(tmp_path / "small")
    with pytest.raises((CheckpointError, UsageError), match=r"does not hold model.layers.1.mlp.up_proj.weight"):
        load_source(tmp_path / "small")


def test_what_a_model_does_not_have_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build("llama").save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    without(tmp_path / "dense", "nothing", **{"score.weight": torch.ones(2, 3)})
    load_source(tmp_path / "dense")
    assert [r.getMessage() for r in caplog.records if r.name == "fxprune" and r.levelno == logging.WARNING] == [
        f"'{tmp_path / 'dense'}' holds score.weight, which a LlamaForCausalLM does not have: left out"
    ]


def test_a_checkpoint_with_widths_of_its_own_in_another_dtype(tmp_path: Path) -> None:
    result = fxprune.prune(build("llama"), 0.1, criterion="l2", kinds=["ffn"], widths="per-layer", tokenizer=tokenizer())
    result.save_pretrained(tmp_path / "small")
    assert "fxprune" in json.loads((tmp_path / "small" / "config.json").read_text())
    for dtype in ("auto", "bfloat16"):
        model, found = load_source(tmp_path / "small", dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {torch.float32 if dtype == "auto" else torch.bfloat16}
        assert found is not None
