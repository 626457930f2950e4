"""A quantised model is refused, in words that say what is quantised and what to do; a plain one with integers in it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.checkpoint.source import load_source
from fxprune.errors import UsageError

from .masking import error, prunable, sizes, some
from .zoo import ZOO, build, tokens

INPUTS = {"input_ids": tokens(2, 7)}


class Int8Linear(nn.Module):
    """A linear layer whose weight is stored as int8, with a scale for each row."""

    weight: Tensor
    scale: Tensor

    def __init__(self, dense: nn.Linear, *, parameter: bool) -> None:
        super().__init__()
        scale = dense.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (dense.weight.detach() / scale).round().to(torch.int8)
        self.register_buffer("scale", scale)
        if parameter:
            self.weight = nn.Parameter(packed, requires_grad=False)
        else:
            self.register_buffer("weight", packed)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


def dynamic() -> nn.Module:
    """What `torch.ao.quantization` makes of the linear layers: their weights are opaque objects."""
    return torch.ao.quantization.quantize_dynamic(build("llama"), {nn.Linear}, dtype=torch.qint8)


def packed(*, parameter: bool) -> nn.Module:
    """Every linear layer but the last as int8."""
    model = build("llama")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, Int8Linear(module, parameter=parameter))
    return model


def declared(*, weights: bool) -> nn.Module:
    """The configuration says so, as it does for GPTQ and bitsandbytes; the weights may or may not show it."""
    model: Any = packed(parameter=False) if weights else build("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 8}
    return model


def float8() -> nn.Module:
    """Weights in a floating-point type that is only for storage."""
    model: Any = build("llama")
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return model


FIRST = r"model\.layers\.0\.self_attn\.q_proj"
QUANTISED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dynamic": (dynamic, rf"'{FIRST}' is a DynamicQuantizedLinear"),
    "int8 parameters": (lambda: packed(parameter=True), rf"parameter '{FIRST}\.weight' is torch\.int8"),
    "int8 buffers": (lambda: packed(parameter=False), rf"buffer '{FIRST}\.weight' is torch\.int8"),
    "float8": (float8, r"parameter 'model\.layers\.1\.mlp\.up_proj\.weight' is torch\.float8_e4m3fn"),
    "configuration": (lambda: declared(weights=False), "quantization_config of kind gptq"),
    "configuration and weights": (lambda: declared(weights=True), rf"buffer '{FIRST}\.weight' is torch\.int8"),
}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize(
    "enter",
    [lambda m: fxprune.trace(m, INPUTS), lambda m: fxprune.prune(m, 0.2, samples=2, length=8)],
    ids=["trace", "prune"],
)
def test_a_quantised_model_is_refused(name: str, enter: Callable[[nn.Module], Any]) -> None:
    make, what = QUANTISED[name]
    model = make()
    before = {n: id(t) for n, t in model.named_parameters()}
    with pytest.raises(UsageError, match=what) as refused:
        enter(model)
    message = str(refused.value)
    assert message.startswith("this LlamaForCausalLM is quantised (")
    assert "dequantise it first" in message
    assert "\n" not in message
    assert before == {n: id(t) for n, t in model.named_parameters()}


def test_a_module_that_is_no_hugging_face_model_is_refused_too() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Int8Linear(nn.Linear(16, 4), parameter=True))
    with pytest.raises(UsageError, match=r"this Sequential is quantised \(parameter '2\.weight' is torch\.int8\)"):
        fxprune.trace(model, torch.randn(3, 8))


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_a_quantised_checkpoint_is_refused(tmp_path: Path, method: str) -> None:
    """The package that would read it is not here: the message says so, and that it would not help."""
    model: Any = build("llama")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    options = {"quant_method": method, "bits": 4, "load_in_8bit": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": options}))
    with pytest.raises(UsageError, match="quantised"):
        load_source(tmp_path)


def test_a_quantised_configuration_can_be_looked_at(tmp_path: Path) -> None:
    """On the meta device there are no weights, and the groups are those of the model before it was quantised."""
    model: Any = declared(weights=False)
    model.config.save_pretrained(tmp_path)
    meta, _ = load_source(tmp_path, meta=True)
    assert sizes(fxprune.find_groups(fxprune.trace(meta, INPUTS))) == ZOO["llama"].kinds


class WithIntegers(nn.Module):
    """Integers that are no weights: positions, a mask, a table of numbers, a counter."""

    positions: Tensor
    mask: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(20, 12), nn.Embedding(16, 12)
        self.up, self.down, self.norm = nn.Linear(12, 24), nn.Linear(24, 12), nn.BatchNorm1d(12)
        self.register_buffer("positions", torch.arange(16)[None])
        self.register_buffer("mask", torch.ones(16, 16, dtype=torch.uint8).tril())
        self.register_buffer("table", torch.arange(16, dtype=torch.int32).view(4, 4))

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        x = self.embedding(input_ids) + self.place(self.positions[:, :length])
        x = x + self.down(F.gelu(self.up(x)))
        weights = self.mask[:length, :length].to(x.dtype) / self.table.sum()
        return self.norm((weights @ x).transpose(1, 2))


def test_integers_that_are_no_weights_are_welcome() -> None:
    model = WithIntegers().eval()
    gm = fxprune.trace(model, {"input_ids": torch.randint(0, 20, (2, 7))})
    groups = fxprune.find_groups(gm)
    assert {g.size for g in prunable(groups).values()} >= {24}
    inputs = {"input_ids": torch.randint(0, 20, (3, 11))}
    assert error(gm, groups, {n: some(g) for n, g in prunable(groups).items()}, inputs) < 1e-4


def test_a_dequantised_model_is_welcome() -> None:
    model = packed(parameter=True)
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8Linear):
            path, _, leaf = name.rpartition(".")
            dense = nn.Linear(module.weight.shape[1], module.weight.shape[0], bias=False)
            dense.weight.data = module.weight * module.scale
            setattr(model.get_submodule(path), leaf, dense)
    assert sizes(fxprune.find_groups(fxprune.trace(model, INPUTS))) == ZOO["llama"].kinds
