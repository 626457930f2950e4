"""A serving engine in plain torch, as vLLM is built (``QKVParallelLinear``, ``MergedColumnParallelLinear``, ``RowParallelLinear``).

It knows ``config.json`` and the names of stock tensors, and nothing else. Queries, keys and values are one matrix, gate and up
projections another; each rank holds rows of these and columns of what follows, and the ranks' results are added up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

Weights = dict[str, Tensor]


def engine(directory: Path, ids: Tensor, ranks: int = 1) -> Tensor:
    """Logits of a Llama or Phi-3 checkpoint.

    Args:
        directory: The checkpoint.
        ids: Token ids, batch x length.
        ranks: How many processes share each matrix.

    Returns:
        Logits, batch x length x vocabulary.

    Raises:
        ValueError: A size cannot be split over so many.
    """
    config = json.loads((directory / "config.json").read_text())
    weights = load_file(directory / "model.safetensors")
    state = weights["model.embed_tokens.weight"][ids]

    def norm(name: str) -> Tensor:
        return rms_norm(state, state.shape[-1:], weights[f"{name}.weight"], config["rms_norm_eps"])

    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        own = {name.removeprefix(f"{path}."): w for name, w in weights.items() if name.startswith(f"{path}.")}
        x = norm(f"{path}.input_layernorm")
        state = state + sum(_attention(own, config, x, rank, ranks) for rank in range(ranks))
        x = norm(f"{path}.post_attention_layernorm")
        state = state + sum(_feed_forward(own, config, x, rank, ranks) for rank in range(ranks))
    return norm("model.norm") @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def share(config: dict[str, Any], name: str, ranks: int) -> int:
    """One rank's part of a size; key-value heads are repeated where there are fewer than ranks."""
    size = config[name]
    if name == "num_key_value_heads" and size < ranks and ranks % size == 0:
        return 1
    if size % ranks:
        raise ValueError(f"{name} is {size}, which cannot be split over {ranks}")
    return size // ranks


def fused(own: Weights, path: str, parts: Sequence[tuple[str, int, int, int]]) -> Tensor:
    """One rank's rows of several matrices, stacked: for each its name, its rows in all, and this rank's first and how many."""
    whole = own.get(f"{path}.{'qkv' if len(parts) == 3 else 'gate_up'}_proj.weight")
    split = (
        whole.split([rows for _, rows, _, _ in parts]) if whole is not None else [own[f"{path}.{n}_proj.weight"] for n, *_ in parts]
    )
    assert [len(part) for part in split] == [rows for _, rows, _, _ in parts]
    return torch.cat([part[first : first + count] for part, (_, _, first, count) in zip(split, parts, strict=True)])


def _attention(own: Weights, config: dict[str, Any], x: Tensor, rank: int, ranks: int) -> Tensor:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    mine, shared = (share(config, name, ranks) for name in ("num_attention_heads", "num_key_value_heads"))
    queries = ("q", heads * width, rank * mine * width, mine * width)
    first = rank * groups // ranks * width
    matrix = fused(own, "self_attn", [queries, *((n, groups * width, first, shared * width) for n in ("k", "v"))])
    parts = (x @ matrix.T).split([mine * width, shared * width, shared * width], -1)
    q, k, v = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts)
    q, k = (_rotated(part, config["rope_parameters"]["rope_theta"]) for part in (q, k))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    return out @ own["self_attn.o_proj.weight"][:, rank * mine * width : (rank + 1) * mine * width].T


def _rotated(x: Tensor, base: float) -> Tensor:
    width = x.shape[-1]
    angles = torch.outer(torch.arange(x.shape[-2]), base ** -(torch.arange(0, width, 2) / width)).repeat(1, 2)
    return x * angles.cos() + torch.cat((-x[..., width // 2 :], x[..., : width // 2]), -1) * angles.sin()


def _feed_forward(own: Weights, config: dict[str, Any], x: Tensor, rank: int, ranks: int) -> Tensor:
    inner, mine = config["intermediate_size"], share(config, "intermediate_size", ranks)
    matrix = fused(own, "mlp", [(name, inner, rank * mine, mine) for name in ("gate", "up")])
    gate, up = (x @ matrix.T).chunk(2, -1)
    return (silu(gate) * up) @ own["mlp.down_proj.weight"][:, rank * mine : (rank + 1) * mine].T
