"""Loss curves by hand: the eager model with the weights of some units set to zero."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune import find_groups, trace
from fxprune.groups import Groups

from .zoo import build, tokens

KV, RATIO, DIM, FFN, HEADS = 2, 3, 8, 64, 6

Batch = Mapping[str, Tensor]
Edit = Callable[[nn.Module, Tensor], None]


def batches() -> list[dict[str, Tensor]]:
    """Batches of unequal size and length, with padding."""
    found = []
    for i, (rows, length) in enumerate([(3, 7), (1, 9), (2, 6)]):
        ids = tokens(rows, length, seed=i)
        mask = torch.ones_like(ids)
        mask[0, length - 2 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


@dataclass
class Case:
    model: nn.Module
    gm: GraphModule
    groups: Groups
    scores: dict[str, Tensor]


def case_of(family: str, **options: Any) -> Case:
    model = build(family, **options)
    gm = trace(model, batches()[0])
    groups = find_groups(gm)
    generator = torch.Generator().manual_seed(5)
    return Case(model, gm, groups, {n: torch.rand(g.size, generator=generator) for n, g in groups.items() if g.prunable})


def masked_loss(outputs: Any, batch: Batch) -> Tensor:
    """For masked models: cross-entropy of every token that is no padding."""
    target = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), target.flatten())


def next_token_loss(outputs: Any, batch: Batch) -> Tensor:
    target = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), target.flatten())


def eager_loss(model: nn.Module, calibration: Sequence[Batch], loss: Callable[[Any, Batch], Tensor] = next_token_loss) -> float:
    """The mean over samples."""
    with torch.no_grad():
        values = [float(loss(model(**b), b)) * len(b["input_ids"]) for b in calibration]
    return sum(values) / sum(len(b["input_ids"]) for b in calibration)


def zero(owner: nn.Module, path: str, index: Any) -> None:
    owner.get_parameter(path).data[index] = 0


def ffn_of_llama(layer: int) -> Edit:
    def edit(model: nn.Module, units: Tensor) -> None:
        for name in ("gate_proj", "up_proj"):
            zero(model, f"model.layers.{layer}.mlp.{name}.weight", units)
        zero(model, f"model.layers.{layer}.mlp.down_proj.weight", (slice(None), units))

    return edit


def heads_of_llama(layer: int) -> Edit:
    def edit(model: nn.Module, units: Tensor) -> None:
        own = (units[:, None] * RATIO * DIM + torch.arange(RATIO * DIM)).flatten()
        zero(model, f"model.layers.{layer}.self_attn.o_proj.weight", (slice(None), own))

    return edit


def query_groups_of_llama(layer: int) -> Edit:
    def edit(model: nn.Module, units: Tensor) -> None:
        columns = torch.arange(KV * RATIO * DIM).view(KV, RATIO, DIM)[:, units].flatten()
        zero(model, f"model.layers.{layer}.self_attn.o_proj.weight", (slice(None), columns))

    return edit


def rotary_of_llama(model: nn.Module, units: Tensor) -> None:
    """Pairs of every query and key head of every layer."""
    for layer in (0, 1):
        for name, heads in (("q_proj", KV * RATIO), ("k_proj", KV)):
            rows = [h * DIM + half * DIM // 2 + u for h in range(heads) for half in (0, 1) for u in units.tolist()]
            zero(model, f"model.layers.{layer}.self_attn.{name}.weight", rows)


def ffn_of_gpt2(layer: int) -> Edit:
    def edit(model: nn.Module, units: Tensor) -> None:
        zero(model, f"transformer.h.{layer}.mlp.c_proj.weight", units)

    return edit


def heads_of_gpt2(layer: int) -> Edit:
    def edit(model: nn.Module, units: Tensor) -> None:
        zero(model, f"transformer.h.{layer}.attn.c_proj.weight", (units[:, None] * DIM + torch.arange(DIM)).flatten())

    return edit


def heads_of_bert(layer: int) -> Edit:
    def edit(model: nn.Module, units: Tensor) -> None:
        own = (units[:, None] * DIM + torch.arange(DIM)).flatten()
        zero(model, f"bert.encoder.layer.{layer}.attention.output.dense.weight", (slice(None), own))

    return edit


def ffn_of_bert(layer: int) -> Edit:
    def edit(model: nn.Module, units: Tensor) -> None:
        zero(model, f"bert.encoder.layer.{layer}.output.dense.weight", (slice(None), units))

    return edit


def ffn_of_mixtral(layer: int) -> Edit:
    def edit(model: nn.Module, units: Tensor) -> None:
        zero(model, f"model.layers.{layer}.mlp.experts.down_proj", (slice(None), slice(None), units))

    return edit


LLAMA = {
    **{f"model.layers.{i}.mlp.ffn": ffn_of_llama(i) for i in (0, 1)},
    **{f"model.layers.{i}.self_attn.kv_heads": heads_of_llama(i) for i in (0, 1)},
    **{f"model.layers.{i}.self_attn.query_groups": query_groups_of_llama(i) for i in (0, 1)},
    "model.layers.head_dim": rotary_of_llama,
}
GPT2 = {
    **{f"transformer.h.{i}.mlp.ffn": ffn_of_gpt2(i) for i in (0, 1)},
    **{f"transformer.h.{i}.attn.kv_heads": heads_of_gpt2(i) for i in (0, 1)},
}
BERT = {
    **{f"bert.encoder.layer.{i}.ffn": ffn_of_bert(i) for i in (0, 1)},
    **{f"bert.encoder.layer.{i}.attention.kv_heads": heads_of_bert(i) for i in (0, 1)},
}
MIXTRAL = {f"model.layers.{i}.mlp.experts.ffn": ffn_of_mixtral(i) for i in (0, 1)}


def check_curves(
    case: Case,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    edits: Mapping[str, Edit],
    calibration: Sequence[Batch],
    loss: Callable[[Any, Batch], Tensor] = next_token_loss,
) -> None:
    dense = eager_loss(case.model, calibration, loss)
    for name, edit in edits.items():
        order = case.scores[name].argsort()
        for count, change in curves[name]:
            model = copy.deepcopy(case.model)
            edit(model, order[:count])
            assert change == pytest.approx(eager_loss(model, calibration, loss) - dense, abs=2e-5), (name, count)
        assert max(abs(change) for _, change in curves[name]) > 1e-3  # far above what rounding could hide


@contextmanager
def untouched(gm: nn.Module) -> Iterator[None]:
    before = {n: p.detach().clone() for n, p in gm.named_parameters()}
    yield
    for name, parameter in gm.named_parameters():
        assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32)), name


def gram_of(case: Case, path: str, calibration: Sequence[Batch]) -> Tensor:
    """X^T X of what a module of the eager model reads, padding left out, in double precision."""
    rows: list[Tensor] = []
    for batch in calibration:

        def keep(module: nn.Module, args: tuple[Tensor, ...], batch: Batch = batch) -> None:
            rows.append(args[0].flatten(0, -2)[batch["attention_mask"].flatten().bool()].double())

        handle = case.model.get_submodule(path).register_forward_pre_hook(keep)
        with torch.no_grad():
            case.model(**batch)
        handle.remove()
    x = torch.cat(rows)
    return x.mT @ x


def compensated(weight: Tensor, gram: Tensor, gone: Tensor, ridge: float) -> Tensor:
    """``[outputs, features]`` with the removed columns zero: W_K + W_R G_RK (G_KK + ridge diag)^-1."""
    stay = torch.tensor([i for i in range(weight.shape[1]) if i not in set(gone.tolist())])
    inner = gram[stay][:, stay]
    inner = inner + ridge * torch.diag(inner.diagonal())
    w = weight.double()
    new = torch.zeros_like(w)
    new[:, stay] = w[:, stay] + w[:, gone] @ gram[gone][:, stay] @ torch.linalg.inv(inner)
    return new.float()


def features(name: str, units: Tensor) -> tuple[str, Tensor]:
    """The module that reads a group, and the features that some of its units own."""
    layer = name.split(".")[2]
    match name.rpartition(".")[2], name.startswith("model."):
        case "ffn", True:
            return f"model.layers.{layer}.mlp.down_proj", units
        case "ffn", False:
            return f"transformer.h.{layer}.mlp.c_proj", units
        case "kv_heads", True:
            return f"model.layers.{layer}.self_attn.o_proj", (units[:, None] * RATIO * DIM + torch.arange(RATIO * DIM)).flatten()
        case "query_groups", _:
            grid = torch.arange(KV * RATIO * DIM).view(KV, RATIO, DIM)
            return f"model.layers.{layer}.self_attn.o_proj", grid[:, units].flatten()
        case _:
            return f"transformer.h.{layer}.attn.c_proj", (units[:, None] * DIM + torch.arange(DIM)).flatten()
