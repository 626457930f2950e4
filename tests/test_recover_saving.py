"""The checkpoint of a recovered model, in every form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fxprune
from fxprune.errors import CheckpointError, UsageError

from .closeness import relative
from .recovering import SMALL, logits, losses, pruned, trained, uneven
from .zoo import build, tokenizer, tokens


def test_the_checkpoint_in_stock_transformers(text: Path, tmp_path: Path) -> None:
    result = trained(pruned(), str(text))
    before, after = result.report.perplexity or (0, 0)
    sizes = f"{SMALL['max_steps']} steps, {result.report.tokens:,} tokens, perplexity {before:.2f} -> {after:.2f}"
    assert repr(result) == f"RecoveryResult(LlamaForCausalLM, {sizes})"
    result.save_pretrained(tmp_path / "out")
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock).__module__.startswith("transformers.models.llama")
    assert torch.equal(logits(stock), logits(result.model))
    written = json.loads((tmp_path / "out" / "fxprune_report.json").read_text())
    assert written["fxprune_report"] == 1
    assert written["recovery"]["steps"] == SMALL["max_steps"]
    assert written["recovery"]["history"]["loss"] == losses(result)
    assert fxprune.PrunePlan.load(tmp_path / "out" / "fxprune_plan.json").counts() == pruned().plan.counts()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_per_layer_checkpoint_and_its_own_recovery(text: Path, tmp_path: Path) -> None:
    """From the prune's result, then from the directory: the same form each time, with the plan and every report in it."""
    first = trained(uneven(), str(text))
    first.save_pretrained(tmp_path / "one")
    second = trained(str(tmp_path / "one"), str(text), seed=3)
    second.save_pretrained(tmp_path / "two")
    for name, result in (("one", first), ("two", second)):
        loaded = fxprune.load(tmp_path / name)
        assert torch.equal(logits(loaded), logits(result.model))
        assert "fxprune" in json.loads((tmp_path / name / "config.json").read_text())
    assert (tmp_path / "one" / "fxprune_plan.json").read_text() == (tmp_path / "two" / "fxprune_plan.json").read_text()
    written = json.loads((tmp_path / "two" / "fxprune_report.json").read_text())
    assert (written["form"], written["recovery"]["settings"]["seed"]) == ("per-layer", 3)
    assert written["recovery"]["earlier"]["settings"]["seed"] == 0


def test_a_per_layer_model_takes_padding() -> None:
    """With a mask, attention repeats keys and values by an attribute that it does not read without one."""
    model: Any = uneven().model
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[1:, :6]).logits
    assert relative(alone[0], padded[1, :6]) < 1e-5


def test_a_plain_model_gets_a_report_too(text: Path, tmp_path: Path) -> None:
    result = trained(build("gpt2"), str(text), tokenizer=tokenizer(), output=tmp_path / "out")
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(stock), logits(result.model))
    assert set(json.loads((tmp_path / "out" / "fxprune_report.json").read_text())) == {"data", "recovery"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_damaged_checkpoint_never_appears(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = trained(build("gpt2"), str(text), tokenizer=tokenizer(), max_steps=1)
    kind: Any = type(result.model)
    read = kind.from_pretrained.__func__

    def wrong(cls: Any, *args: Any, **options: Any) -> Any:
        model = read(cls, *args, **options)
        model.transformer.h[0].mlp.c_fc.weight.data[0] += 1
        return model

    monkeypatch.setattr(kind, "from_pretrained", classmethod(wrong))
    with pytest.raises(
        CheckpointError, match=r"the checkpoint read back differs from the recovered model \(relative error .*\); nothing"
    ):
        result.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_graph_has_no_checkpoint(text: Path, tmp_path: Path) -> None:
    graph = pruned().graph_module
    with pytest.raises(UsageError, match=r"a GraphModule has no checkpoint form: leave output out, and keep result.model"):
        trained(graph, str(text), tokenizer=tokenizer(), output=tmp_path / "out")
    result = trained(graph, str(text), tokenizer=tokenizer(), max_steps=1)
    with pytest.raises(CheckpointError, match="a GraphModule has no checkpoint form: keep its weights with safetensors"):
        result.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())
