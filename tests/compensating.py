"""What compensation is to give, by plain linear algebra on the eager model; and the plans on which it is tried."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune import find_groups, rewrite, trace
from fxprune.plan import PrunePlan

from .masking import rows_of
from .zoo import tokens

KV, RATIO, DIM = 2, 3, 8  # of the zoo's llama
Batch = Mapping[str, Tensor]
Gone = Mapping[str, Sequence[int]]


def batches() -> list[dict[str, Tensor]]:
    """Two batches of different shapes, with padding."""
    first, second = tokens(6, 11, seed=1), tokens(3, 14, seed=2)
    left, right = torch.ones_like(first), torch.ones_like(second)
    left[0, :4] = left[2, :1] = 0
    right[1, 9:] = 0
    return [{"input_ids": first, "attention_mask": left}, {"input_ids": second, "attention_mask": right}]


COUNTED = 66 + 42 - 10
"""Tokens of these that are no padding."""


def without(size: int, gone: Sequence[int]) -> list[int]:
    return [u for u in range(size) if u not in set(gone)]


def heads(units: Sequence[int]) -> list[int]:
    """Features of an output projection of the zoo's llama that its key-value heads own."""
    return rows_of(units, RATIO * DIM)


def pruned(model: nn.Module, gone: Gone, drop: Sequence[str] = ()) -> tuple[GraphModule, GraphModule, PrunePlan]:
    """Its trace, what is left of it, and the plan."""
    gm = trace(model, batches()[0])
    groups = find_groups(gm)
    plan = PrunePlan.from_keep(groups, {n: without(groups[n].size, units) for n, units in gone.items()}, drop=drop)
    return gm, rewrite(gm, plan), plan


def read_by(model: nn.Module, path: str, calibration: Sequence[Batch]) -> list[Tensor]:
    """What a module of the eager model reads, batch by batch, padding left out: ``[tokens, features]`` in double precision."""
    rows: list[Tensor] = []
    for batch in calibration:

        def keep(module: nn.Module, args: tuple[Tensor, ...], batch: Batch = batch) -> None:
            rows.append(args[0].flatten(0, -2)[batch["attention_mask"].flatten().bool()].double())

        handle = model.get_submodule(path).register_forward_pre_hook(keep)
        with torch.no_grad():
            model(**batch, use_cache=False)
        handle.remove()
    return rows


def mean_of(model: nn.Module, path: str) -> Tensor:
    return torch.cat(read_by(model, path, batches())).mean(0)


def held_back(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(the tokens to fit to, the last fifth of each batch's)."""
    cuts = [len(x) - round(0.2 * len(x)) for x in rows]
    return torch.cat([x[:n] for x, n in zip(rows, cuts, strict=True)]), torch.cat([x[n:] for x, n in zip(rows, cuts, strict=True)])


def solved(x: Tensor, w: Tensor, gone: Sequence[int], ridge: float) -> Tensor:
    """W_K + W_R G_RK (G_KK + ridge diag G_KK)^-1 with G = X^T X, and zeros in the columns of R; an infinite ridge only cuts."""
    stay, new = without(w.shape[1], gone), w.clone()
    new[:, list(gone)] = 0
    if ridge < math.inf:
        gram = x.mT @ x
        inner = gram[stay][:, stay] + ridge * torch.diag(gram.diagonal()[stay])
        new[:, stay] += w[:, list(gone)] @ gram[list(gone)][:, stay] @ torch.linalg.inv(inner)
    return new


def by_hand(
    model: nn.Module, features: Mapping[str, Sequence[int]], ridge: float | None = None, dim: int = 1
) -> tuple[nn.Module, dict[str, tuple[float, float]]]:
    """Map after map, of what it reads in the network as changed so far; without a ridge the best one on what is held back.

    Returns:
        (the eager model with the removed features' columns zero, errors before and after for each map on what is held back).
    """
    model, errors = copy.deepcopy(model), {}
    for path, gone in features.items():
        rows = read_by(model, path, batches())
        fit, held = held_back(rows)
        parameter: Any = model.get_parameter(f"{path}.weight")
        w = (parameter if dim == 1 else parameter.mT).detach().double()

        def error(r: float, w: Tensor = w, fit: Tensor = fit, held: Tensor = held, gone: Sequence[int] = gone) -> float:
            return float((held @ (w - solved(fit, w, gone, r)).mT).square().sum() / (held @ w.mT).square().sum())

        best = min((0.03, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf), key=error) if ridge is None else ridge
        errors[f"{path}.weight"] = error(math.inf), error(best)
        x = torch.cat(rows)
        new = solved(x, w, gone, best if ridge is not None else best * len(fit) / len(x))
        parameter.data = (new if dim == 1 else new.mT).to(parameter.dtype)
    return model, errors


def check_weights(small: nn.Module, wanted: nn.Module, features: Mapping[str, Sequence[int]], dim: int = 1) -> None:
    for path, gone in features.items():
        weight: Any = wanted.get_parameter(f"{path}.weight").detach()
        stay = without(weight.shape[dim], gone)
        actual = small.get_parameter(f"{path}.weight").detach()
        torch.testing.assert_close(actual, weight.index_select(dim, torch.tensor(stay)), rtol=1e-4, atol=1e-4)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**batch).logits
    return out


def check_bits(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]), name


LLAMA_GONE = {
    "model.layers.0.self_attn.kv_heads": [1],
    "model.layers.0.mlp.ffn": list(range(0, 40, 2)),
    "model.layers.1.self_attn.query_groups": [0],
    "model.layers.1.mlp.ffn": list(range(5, 30)),
}

LLAMA_FEATURES = {
    "model.layers.0.self_attn.o_proj": heads([1]),
    "model.layers.0.mlp.down_proj": LLAMA_GONE["model.layers.0.mlp.ffn"],
    "model.layers.1.self_attn.o_proj": [kv * RATIO * DIM + i for kv in range(KV) for i in range(DIM)],
    "model.layers.1.mlp.down_proj": LLAMA_GONE["model.layers.1.mlp.ffn"],
}

GPT2_GONE = {
    **{f"transformer.h.{i}.attn.kv_heads": [i, 4] for i in (0, 1)},
    **{f"transformer.h.{i}.mlp.ffn": list(range(i, 192, 3)) for i in (0, 1)},
}

GPT2_FEATURES = {
    name: gone
    for i in (0, 1)
    for name, gone in (
        (f"transformer.h.{i}.attn.c_proj", [h * DIM + d for h in (i, 4) for d in range(DIM)]),
        (f"transformer.h.{i}.mlp.c_proj", list(range(i, 192, 3))),
    )
}
