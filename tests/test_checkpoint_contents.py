"""What goes into a checkpoint's directory: tied weights, dtypes, shards, and the files that travel along."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from transformers import GenerationConfig

import fxprune
from fxprune import PrunePlan
from fxprune.api import prune
from fxprune.checkpoint.source import load_source

from .checkpoints import Stock, assert_same, expected_of, inputs, pruned
from .closeness import relative
from .zoo import VOCABULARY, build, tokenizer


def names_in(directory: Path) -> list[str]:
    names = []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names += list(opened.keys())
    return names


@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_stored_once_and_stay_tied(widths: str, tied: bool, tmp_path: Path) -> None:
    result = pruned(build("llama", tied=tied), units={"hidden": 0.25 if widths == "uniform" else 0.34})
    assert result.form == widths
    result.save_pretrained(tmp_path / "out")
    loaded: Any = fxprune.load(tmp_path / "out")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in names_in(tmp_path / "out")) != tied
    assert loaded.lm_head.weight.shape == (VOCABULARY, 36 if widths == "uniform" else 32)


@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
def test_bfloat16_stays_bfloat16(widths: str, tmp_path: Path, stock: Stock) -> None:
    model = build("llama", tied=False).to(torch.bfloat16)
    result = pruned(model, ratio=0.25, widths=widths, ranking="global" if widths == "per-layer" else "local")
    assert result.form == widths
    assert result.report.verify_tolerance == 0.1
    assert result.report.bytes_after == 2 * result.report.parameters_after
    result.save_pretrained(tmp_path / "out")
    loaded = fxprune.load(tmp_path / "out")
    answer, made = stock(tmp_path / "out", inputs(), trust=True)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert answer["dtype"] == "torch.bfloat16"
    for name, logits in expected_of(result).items():
        if name != "prompt":
            assert relative(logits, made[name]) < 0.05
            assert relative(logits, loaded(input_ids=inputs()[name]).logits) < 0.05
    wide = fxprune.load(tmp_path / "out", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
def test_small_shards(widths: str, tmp_path: Path, stock: Stock) -> None:
    result = pruned(build("llama"), ratio=0.25, widths=widths, ranking="global" if widths == "per-layer" else "local")
    assert result.form == widths
    result.save_pretrained(tmp_path / "out", max_shard_size="30KB")
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    assert_same(expected_of(result), stock(tmp_path / "out", inputs(), trust=True)[1])


@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
def test_what_travels_along(widths: str, tmp_path: Path) -> None:
    """Tokenizer, generation settings (even those that transformers would not save itself), plan and report; and no pickle."""
    model: Any = build("llama")
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.5, eos_token_id=[2, 5], max_new_tokens=3)
    options: dict[str, Any] = {"widths": widths, "ranking": "global" if widths == "per-layer" else "local"}
    result = prune(model, 0.25, recipe={"criterion": "l1"}, tokenizer=tokenizer(), **options)
    out = tmp_path / "out"
    result.save_pretrained(out)
    loaded: Any = fxprune.load(out)
    assert (loaded.generation_config.temperature, loaded.generation_config.eos_token_id) == (0.5, [2, 5])
    assert model.generation_config.temperature == 0.5
    assert cast(Any, result.model).generation_config.eos_token_id == [2, 5]
    source, read = load_source(out)
    assert read("w3 w90 nonsense")["input_ids"] == [6, 93, 0]
    assert type(source).__name__ == "LlamaForCausalLM"
    plan = PrunePlan.load(out / "fxprune_plan.json")
    assert plan.counts() == result.plan.counts()
    assert plan.recipe["criterion"] == "l1"
    report = json.loads((out / "fxprune_report.json").read_text())
    assert (report["form"], report["removed"]) == (widths, round(result.report.removed, 6))
    files = {p.name: p.read_bytes() for p in out.iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "fxprune_plan.json", "fxprune_report.json"}
    wanted |= {"tokenizer.json", "tokenizer_config.json", *(["modeling_fxprune.py"] if widths == "per-layer" else [])}
    wanted |= {"report.html", "report.md", "README.md", "fxprune_recipe.yaml"}
    assert set(files) == wanted
    for name, content in files.items():
        assert not content.startswith((b"\x80", b"PK\x03\x04")), f"{name} is a pickle"
    mask = os.umask(0)
    os.umask(mask)
    assert {(p.name, p.stat().st_mode & 0o777) for p in out.iterdir()} == {(name, 0o666 & ~mask) for name in wanted}
    assert (out.stat().st_mode & 0o777) == 0o777 & ~mask
