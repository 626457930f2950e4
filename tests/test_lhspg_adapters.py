"""Adapters as the graph shows them, against peft's own modules and the update that peft itself computes from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import fxprune
from fxprune.lorashear.adapters import factors_of, find_adapters, update_factors

from .shearing import ALL, IDS, fresh


def adapted(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}


@torch.no_grad()
def randomise(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_()


CASES: dict[str, tuple[str, Sequence[str], Mapping[str, Any]]] = {
    "llama": ("llama", ALL, {}),
    "rslora with biases": (
        "llama",
        ALL,
        {"lora_bias": True, "use_rslora": True, "changes": {"attention_bias": True, "mlp_bias": True}},
    ),
    "dropout": ("qwen2", ALL, {"lora_dropout": 0.1}),
    "transposed": ("gpt2", ("c_attn", "c_proj", "c_fc"), {"fan_in_fan_out": True}),
    "half precision": ("llama", ALL, {"dtype": torch.bfloat16}),
    "embedding": ("llama", ("embed_tokens", "up_proj"), {"changes": {"tied": False}}),
    "encoder": ("opt", ("q_proj", "fc1", "fc2"), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_adapter_is_found_with_its_update(case: str) -> None:
    family, targets, options = CASES[case]
    model, gm, _ = fresh(family, targets, **options)
    randomise(model)
    tensors: dict[str, Tensor] = dict(gm.named_parameters())
    found = find_adapters(gm)
    layers = adapted(model)
    assert len(layers) > 1
    assert set(found) == {f"{path}.base_layer.weight" for path in layers}
    for path, layer in layers.items():
        (adapter,) = found[f"{path}.base_layer.weight"]
        for dim in (0, 1):
            left, right = update_factors((adapter,), dim, tensors)
            update = left @ right if dim == 0 else (left @ right).mT
            torch.testing.assert_close(update, layer.get_delta_weight("default").float(), rtol=1e-5, atol=1e-5)
    biases = {n for n, _ in model.named_parameters() if n.endswith("lora_B.default.bias")}
    assert biases <= factors_of(found)
    assert factors_of(found) == {n for n, _ in model.named_parameters() if "lora_" in n}


def test_two_active_adapters_add_up() -> None:
    from peft import get_peft_model

    from .zoo import build

    options: dict[str, Any] = {"target_modules": ["up_proj"], "task_type": "CAUSAL_LM"}
    model: Any = get_peft_model(build("llama"), LoraConfig(r=3, lora_alpha=6, **options))
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=1, **options))
    model.base_model.set_adapter(["default", "second"])
    randomise(model)
    gm = fxprune.trace(model.eval(), IDS)
    path = "base_model.model.model.layers.1.mlp.up_proj"
    layer = model.get_submodule(path)
    own = find_adapters(gm)[f"{path}.base_layer.weight"]
    assert [adapter.scale for adapter in own] == [2.0, 0.5]
    left, right = update_factors(own, 0, dict(gm.named_parameters()))
    expected = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    torch.testing.assert_close(left @ right, expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_adapters_has_none() -> None:
    _, gm, _ = fresh(targets=None)
    assert find_adapters(gm) == {}


def test_a_branch_that_reads_something_else_is_no_adapter() -> None:
    class Branch(torch.nn.Module):
        def __init__(self, *, same: bool) -> None:
            super().__init__()
            self.base, self.down, self.up = (
                torch.nn.Linear(6, 7),
                torch.nn.Linear(6, 2, bias=False),
                torch.nn.Linear(2, 7, bias=False),
            )
            self.same = same

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.base(x) + 3 * self.up(self.down(x if self.same else x.sin()))
            return out

    example = torch.randn(2, 6)
    assert find_adapters(fxprune.trace(Branch(same=False), example)) == {}
    ((adapter,),) = find_adapters(fxprune.trace(Branch(same=True), example)).values()
    assert (adapter.weight, adapter.a, adapter.b, adapter.scale) == ("base.weight", "down.weight", "up.weight", 3)
