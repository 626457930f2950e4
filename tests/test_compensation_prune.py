"""Compensation inside `fxprune.prune`: what it is for, added biases in every form of checkpoint, and replayed plans."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import fxprune

from .compensating import logits
from .zoo import build, tokens

OPTIONS: dict[str, Any] = {"criterion": "l2", "ranking": "local", "kinds": ("kv_heads", "ffn"), "compensation": "bias"}


@pytest.fixture
def calibration() -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens(8, 16, seed=4)}]


def per_layer(calibration: Any, **changes: Any) -> fxprune.PruneResult:
    options = {**OPTIONS, "ratio": 0.2, "widths": "per-layer", "ranking": "global", **changes}
    return fxprune.prune(build("llama"), calibration=calibration, **options)


def test_compensation_brings_the_output_back(calibration: Any) -> None:
    """What it is for, on the text that it was fitted to."""
    dense, errors = logits(build("llama"), calibration[0]), {}
    for method in ("none", "bias", "least-squares"):
        result = per_layer(calibration, compensation=method)
        errors[method] = float((logits(result.graph_module, calibration[0]) - dense).square().mean())
        assert (result.report.compensation is None) == (method == "none")
    assert errors["least-squares"] < errors["bias"] < errors["none"]


def test_added_biases_in_the_stock_class(tmp_path: Path, calibration: Any) -> None:
    """Llama's switches bring biases to its other projections too: they are zero."""
    model: Any = build("llama")
    result = fxprune.prune(model, units=0.25, widths="uniform", calibration=calibration, **{**OPTIONS, "kinds": ("ffn",)})
    assert result.form == "uniform"
    added = [f"model.layers.{i}.mlp.down_proj.bias" for i in (0, 1)]
    assert result.report.compensation == {"method": "bias", "maps": {}, "ridges": {}, "added": added, "tokens": 128}
    result.save_pretrained(tmp_path / "out")
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(stock) is LlamaForCausalLM
    assert (stock.config.mlp_bias, stock.config.attention_bias) == (True, False)
    ids = {"input_ids": tokens(2, 9, seed=7)}
    torch.testing.assert_close(logits(stock, ids), logits(result.graph_module, ids), rtol=1e-4, atol=1e-4)
    for i in (0, 1):
        assert not bool(stock.model.layers[i].mlp.gate_proj.bias.any())
        assert torch.equal(stock.model.layers[i].mlp.down_proj.bias, result.graph_module.get_parameter(added[i]))
        assert bool(stock.model.layers[i].mlp.down_proj.bias.any())
    assert not model.config.mlp_bias
    both = fxprune.prune(model, units={"kv_heads": 0.5, "ffn": 0.25}, widths="uniform", calibration=calibration, **{
        k: v for k, v in OPTIONS.items() if k != "kinds"
    })  # fmt: skip
    assert both.form == "uniform"
    config: Any = both.dense_config if both.model is None else both.model.config
    assert (config.mlp_bias, config.attention_bias) == (True, True)
    both.save_pretrained(tmp_path / "both")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "both"), ids), logits(both.graph_module, ids), rtol=1e-4, atol=1e-4
    )


def test_added_biases_in_the_per_layer_form(tmp_path: Path, calibration: Any) -> None:
    result = per_layer(calibration)
    assert result.form == "per-layer"
    assert result.report.compensation is not None
    added = result.report.compensation["added"]
    assert set(result.surgery["added"]) == set(added) != set()
    result.save_pretrained(tmp_path / "out")
    ids = {"input_ids": tokens(2, 9, seed=7)}
    for loaded in (
        fxprune.load(tmp_path / "out"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval(),
    ):
        torch.testing.assert_close(logits(loaded, ids), logits(result.graph_module, ids), rtol=1e-4, atol=1e-4)
        for name in added:
            assert torch.equal(loaded.get_parameter(name), result.graph_module.get_parameter(name))


@pytest.mark.parametrize("kinds", [("ffn",), ("hidden",), ("layers",)])
def test_a_model_with_added_biases_is_pruned_again(tmp_path: Path, calibration: Any, kinds: tuple[str, ...]) -> None:
    per_layer(calibration).save_pretrained(tmp_path / "one")
    once = fxprune.load(tmp_path / "one")
    ratio = 0.4 if kinds == ("layers",) else 0.1  # one of two
    again = fxprune.prune(once, ratio=ratio, calibration=calibration, **{**OPTIONS, "kinds": kinds, "widths": "per-layer"})
    assert (again.plan.drop != ()) == (kinds == ("layers",))
    assert again.form == "per-layer"
    again.save_pretrained(tmp_path / "two")
    ids = {"input_ids": tokens(2, 9, seed=7)}
    for loaded in (
        fxprune.load(tmp_path / "two"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "two", trust_remote_code=True).eval(),
    ):
        torch.testing.assert_close(logits(loaded, ids), logits(again.graph_module, ids), rtol=1e-4, atol=1e-4)


def test_a_plain_module_with_added_biases(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3, bias=False))
    x = torch.randn(40, 4)
    result = fxprune.prune(model, units=0.5, inputs={"input": x}, calibration=[{"input": x}], **{**OPTIONS, "kinds": ("ffn",)})
    assert result.form == "module"
    assert result.surgery["added"] == {"2.bias": [3]}
    result.save_pretrained(tmp_path / "out")
    assert torch.equal(fxprune.load(tmp_path / "out", model=model)(x), result.graph_module(x))
    assert model[2].bias is None


def replayed(result: fxprune.PruneResult, **options: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    again = fxprune.prune(build("llama"), plan=result.plan, **options)
    own = dict(again.graph_module.named_parameters())
    for name, parameter in result.graph_module.named_parameters():
        yield name, parameter, own[name]


def test_a_replayed_plan_is_compensated_only_if_asked(calibration: Any) -> None:
    result = per_layer(calibration, compensation="least-squares")
    assert result.report.compensation is not None
    maps = set(result.report.compensation["maps"])
    assert {n for n, a, b in replayed(result) if not torch.equal(a, b)} == maps != set()
    options = {"compensation": "least-squares", "calibration": calibration}
    assert all(torch.equal(a, b) for _, a, b in replayed(result, **options))
