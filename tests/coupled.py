"""Small models for the coupling graph: what they couple is known by heart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from fxprune.capture import trace
from fxprune.groups import Groups
from fxprune.passes.dependency import find_groups

MODELS = ("llama", "gpt2", "mlp", "conv")
L0, L1 = "model.layers.0.", "model.layers.1."


class Residual(nn.Module):
    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class ConvNet(nn.Module):
    """Plain, depthwise and grouped convolutions, two norms, a residual addition and a fused projection cut by chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 16, 3, groups=4)
        self.group_norm = nn.GroupNorm(4, 16)
        self.fused = nn.Linear(16, 20)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.point(self.depthwise(x))
        gate, up = self.fused(self.group_norm(self.grouped(x)).mean((2, 3))).chunk(2, -1)
        out: Tensor = self.head(gate.sigmoid() * up)
        return out


def llama_groups(layers: int) -> Groups:
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=101,
        tie_word_embeddings=True,
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    return find_groups(trace(model, {"input_ids": torch.randint(0, 101, (2, 7))}))


def gpt2_groups() -> Groups:
    sizes: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 67, "n_positions": 16}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    model: Any = AutoModelForCausalLM.from_config(config)
    return find_groups(trace(model, {"input_ids": torch.randint(0, 67, (2, 7))}))


def mlp_groups() -> Groups:
    blocks = [Residual(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12)), Residual(nn.Linear(12, 12), nn.Tanh())]
    return find_groups(trace(nn.Sequential(nn.Linear(6, 12), *blocks, nn.Linear(12, 3)), torch.randn(4, 6)))


def conv_groups() -> Groups:
    return find_groups(trace(ConvNet(), torch.randn(2, 3, 8, 8)))
