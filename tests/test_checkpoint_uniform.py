"""Plans that a stock configuration expresses, how it is found, and plans that no eager class expresses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fxprune
from fxprune import PrunePlan
from fxprune.api import prune
from fxprune.checkpoint import config as solver
from fxprune.errors import CheckpointError

from .checkpoints import Stock, check, pruned, stated
from .zoo import build, tokens


@pytest.mark.parametrize(
    ("name", "changes", "options", "fields"),
    [
        ("llama", {}, {"ratio": 0.3}, {}),
        ("llama", {"tied": False}, {"units": {"kv_heads": 0.5, "ffn": 0.25}}, {"num_key_value_heads": 1, "num_attention_heads": 3}),
        ("llama", {}, {"units": {"ffn": 0.3}}, {"intermediate_size": 45, "hidden_size": 48}),
        ("llama", {}, {"units": {"query_groups": 0.34}}, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}),
        ("llama", {"tied": False}, {"units": {"hidden": 0.25}}, {"hidden_size": 36, "head_dim": 8}),
        ("llama", {"num_hidden_layers": 3}, {"units": {"layers": 0.34}}, {"num_hidden_layers": 2}),
        (
            "gemma3",
            {"num_hidden_layers": 3, "layer_types": ["full_attention", *["sliding_attention"] * 2]},
            {"units": {"layers": 0.34}},
            {},
        ),
        ("gpt2", {}, {"units": {"ffn": 0.3}}, {"n_inner": 134, "n_embd": 48}),
        ("gpt_neox", {"tied": False}, {"units": {"ffn": 0.3}}, {"intermediate_size": 45}),
        ("opt", {}, {"units": {"ffn": 0.3}}, {"ffn_dim": 45}),
        ("phi3", {}, {"units": {"kv_heads": 0.5, "ffn": 0.3}}, {"num_key_value_heads": 1, "intermediate_size": 45}),
        ("falcon_new", {}, {"units": {"ffn": 0.3}}, {"ffn_hidden_size": 134}),
        ("mixtral", {}, {"units": {"experts": 0.5}}, {"num_local_experts": 2, "intermediate_size": 64}),
    ],
    ids=lambda value: "-".join(value["units"]) if isinstance(value, dict) and isinstance(value.get("units"), dict) else None,
)
def test_uniform_widths_load_in_the_stock_class(
    name: str, changes: dict[str, Any], options: dict[str, Any], fields: dict[str, int], tmp_path: Path, stock: Stock
) -> None:
    result = pruned(build(name, **changes), **options)
    assert (result.form, result.report.form) == ("uniform", "uniform")
    assert "stock configuration" not in result.report.note
    loaded: Any = check(result, tmp_path / "out", stock)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: written[k] for k in fields} == fields
    assert not {"fxprune", "auto_map"} & set(written)
    assert sum(p.numel() for p in loaded.parameters()) == result.report.parameters_after < result.report.parameters_before


def test_dropped_layers_renumber_the_cache_and_shorten_lists() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    result = stated("gemma3", lambda n, s: None, drop=("model.layers.1",), num_hidden_layers=4, layer_types=kinds)
    model: Any = result.model
    assert result.form == "uniform"
    assert model.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_heads_with_position_slopes_exist_as_a_graph_only(name: str, tmp_path: Path) -> None:
    result = pruned(build(name), units={"kv_heads": 0.34})
    assert (result.form, result.model, result.report.eager_error) == ("graph", None, None)
    kind = type(result.dense_model).__name__
    assert f"the eager {kind} cannot express this plan: its own forward computes something from a pruned size" in result.report.note
    assert result.report.verify is not None
    assert result.report.verify.ok
    with pytest.raises(CheckpointError, match=r"there is no eager model to save: .*The rewritten graph_module is exact"):
        result.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_few_models_are_built_to_solve_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = solver._mismatches

    def counted(*arguments: Any) -> Any:
        built.append(arguments[2])
        return original(*arguments)

    monkeypatch.setattr(solver, "_mismatches", counted)
    result = pruned(build("llama"), units={"kv_heads": 0.5, "ffn": 0.3})
    assert result.form == "uniform"
    assert len(built) <= 6
    built.clear()
    result = pruned(build("llama"), ratio=0.25, ranking="global", widths="per-layer")
    assert result.form == "per-layer"
    assert built == []  # no stock configuration has several widths: none is tried


def test_the_dense_configuration_is_not_changed() -> None:
    model: Any = build("gemma3", num_hidden_layers=3, layer_types=["full_attention", *["sliding_attention"] * 2])
    before = json.dumps(model.config.to_dict(), default=str)
    names = [n for n, _ in model.named_parameters()]
    groups = fxprune.find_groups(fxprune.trace(model, {"input_ids": tokens(2, 16)}))
    for keep in ({}, {"model.layers.2.mlp.ffn": list(range(9))}):
        prune(model, plan=PrunePlan.from_keep(groups, keep, drop=["model.layers.1"]))
        assert json.dumps(model.config.to_dict(), default=str) == before
        assert [n for n, _ in model.named_parameters()] == names
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
