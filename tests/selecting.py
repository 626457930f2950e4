"""Selection under test: models of few and of many units, random scores, and a count of what is left by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fxprune import find_groups, trace
from fxprune.groups import Groups
from fxprune.plan import PrunePlan

RANKINGS, WIDTHS = ("local", "global"), ("uniform", "per-layer")
WIDE = (3, 36, 1200, 4, 3, 8, 200)
COARSE = (4, 18, 12, 3, 2, 4, 31)
"""Layers, hidden, FFN, KV heads, query heads of each, head dimension, vocabulary."""


def llama(
    layers: int, hidden: int, ffn: int, kv: int, ratio: int, dim: int, device: str = "meta", **options: Any
) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=kv * ratio,
        num_key_value_heads=kv,
        head_dim=dim,
        **{"vocab_size": 200, "tie_word_embeddings": True, **options},
    )
    with torch.device(device):
        return LlamaForCausalLM(config)


def groups_of(model: nn.Module) -> Groups:
    device = next(model.parameters()).device
    return find_groups(trace(model, {"input_ids": torch.zeros(2, 5, dtype=torch.long, device=device)}, dynamic_shapes={}))


def random_scores(groups: Groups, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(g.size, generator=generator) for n, g in groups.items() if g.prunable}


def left_by_hand(plan: PrunePlan, layers: int, hidden: int, ffn: int, kv: int, ratio: int, dim: int, vocabulary: int) -> int:
    """Parameters of the pruned Llama, from the plan's counts alone."""

    def kept(name: str, size: int) -> int:
        return len(plan.keep[name]) if name in plan.keep else size

    hidden = kept("model.hidden", hidden)
    total = vocabulary * hidden + hidden
    for layer in range(layers):
        at = f"model.layers.{layer}"
        if at in plan.drop:
            continue
        n, m, d = (kept(f"{at}.self_attn.{k}", s) for k, s in (("kv_heads", kv), ("query_groups", ratio), ("head_dim", dim)))
        pairs = kept("model.layers.head_dim", dim // 2)
        total += 2 * hidden  # norms
        total += hidden * (n * m * 2 * pairs + n * 2 * pairs + n * d + n * m * d)  # q, k, v, o
        total += 3 * hidden * kept(f"{at}.mlp.ffn", ffn)
    return total


def check_removed(groups: Groups, plan: PrunePlan, *shape: int) -> float:
    removed = 1 - left_by_hand(plan, *shape) / groups.total
    assert plan.recipe["removed"] == round(removed, 6)
    return removed


def few_units() -> Groups:
    """Groups of four layers of few units: `COARSE`."""
    return groups_of(llama(layers=4, hidden=18, ffn=12, kv=3, ratio=2, dim=4, vocab_size=31))
