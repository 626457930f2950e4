"""Torch-Pruning's Taylor importance on a causal language model: heads and FFN of all layers, used as in its prune_llm.py.

``MetaPruner`` with ``TaylorImportance()``, local ranking, gradients of all calibration samples added up, whole query heads (of
grouped queries it removes as many from each group and leaves keys and values alone), output layers and the residual stream left
out. All layers lose alike, so the ratios are found on one layer of the same sizes: for each number of heads the channel ratio by
bisection on the parameters that go, and of those the pair of ratios that are nearest to each other. That one layer is also compared
with its masked dense reference; where whole heads are not exact, only FFN channels are pruned.
"""

from __future__ import annotations

import bisect
import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import TORCH_PRUNING, torch_pruning
from benchmarks.coverage import TOLERANCE
from benchmarks.coverage_torch_pruning import Mask, attentions
from benchmarks.paper.common import Row
from fxprune.errors import PlanError
from fxprune.passes.batches import causal_loss, logits_of
from fxprune.passes.verify import relative_error

STEPS = 16
"""Halvings of the interval of the channel ratio."""


def prune(model: Any, ratio: float, batches: Sequence[Mapping[str, Tensor]], directory: Path | None) -> tuple[nn.Module, Row]:
    """A pruned copy of a model, and what the row says of it.

    Args:
        model: A causal language model of transformers with query, key and value layers of their own.
        ratio: Share of all parameters to remove.
        batches: Calibration.
        directory: Where the package is installed.

    Raises:
        PlanError: Its heads and FFN channels are too few for the ratio.
    """
    tp = torch_pruning(directory)
    start = time.perf_counter()
    total = sum(p.numel() for p in model.parameters())
    pruned = _eager(copy.deepcopy(model))
    layers = pruned.config.get_text_config().num_hidden_layers
    channels, heads, note = _ratios(tp, pruned, ratio * total / layers)
    found = time.perf_counter()
    for batch in batches:
        moved = {name: tensor.to(pruned.device) for name, tensor in batch.items()}
        causal_loss(pruned(**moved), moved).backward()
    scored = time.perf_counter()
    _cut(tp, pruned, channels, heads)
    for parameter in pruned.parameters():
        parameter.grad = None
    left = sum(p.numel() for p in pruned.parameters())
    return pruned, {
        "ratio": ratio,
        "removed": round(1 - left / total, 5),
        "parameters": left,
        "form": "eager model cut by Torch-Pruning",
        "pruning_ratio": round(channels, 6),
        "query_heads_removed": heads,
        "note": f"Torch-Pruning {TORCH_PRUNING}; {note}",
        "seconds": {
            "ratios": round(found - start, 2),
            "importance": round(scored - found, 2),
            "prune": round(time.perf_counter() - scored, 2),
        },
    }


def _eager(model: Any) -> Any:
    """With repeated keys in the open, which is the only attention of grouped queries that it prunes right."""
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def _one_layer(model: Any) -> Any:
    """A model of one layer of the same sizes, random, with few words."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.vocab_size = 1, 64
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _eager(type(model)(config).float())


def _unit(attention: Any) -> int:
    """Query heads that go together: one, or one of each group."""
    return 1 if attention.kv_heads == attention.heads else int(attention.kv_heads)


def _cut(tp: Any, model: Any, channels: float, heads: int, dense: Any = None) -> None:
    """Prune a model in place, every parameter of which needs a gradient; of ``dense`` the same is set to zero."""
    layers = attentions(model)
    ignored = [m for m in model.modules() if isinstance(m, nn.Embedding)] + [model.get_output_embeddings()]
    groups = {layer: n for a in layers for layer, n in a.num_heads().items()}
    pruner = tp.pruner.MetaPruner(
        model,
        {"input_ids": torch.zeros(1, 8, dtype=torch.long, device=model.device)},
        importance=tp.importance.TaylorImportance(),
        global_pruning=False,
        pruning_ratio=channels,
        ignored_layers=ignored if heads else ignored + [layer for a in layers for layer in a.layers],
        num_heads=groups,
        prune_num_heads=heads > 0,
        prune_head_dims=False,
        head_pruning_ratio=max(0.0, (heads - 0.5) / layers[0].heads),  # it rounds up
        in_channel_groups={},
        out_channel_groups={},
        output_transform=lambda output: output.logits.sum(),
    )
    watch = None if dense is None else Mask(dense, pruner)
    for group in pruner.step(interactive=True):
        for dep, indices in group:
            if watch is not None:
                watch.remove(dep, indices, zero=True)
        group.prune()
    if heads:
        for layer in layers:
            layer.update(True)


def _removed(tp: Any, one: Any, channels: float, heads: int) -> int:
    """Parameters that go from one layer; which ones does not matter."""
    made = copy.deepcopy(one)
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    _cut(tp, made, channels, heads)
    return int(sum(p.numel() for p in one.parameters()) - sum(p.numel() for p in made.parameters()))


def _exact(tp: Any, one: Any, heads: int) -> bool:
    """Whether a pruned layer is the masked one."""
    made, dense = copy.deepcopy(one), copy.deepcopy(one)
    ids = torch.arange(24).reshape(2, 12)
    try:
        causal_loss(made(input_ids=ids), {"input_ids": ids}).backward()
        _cut(tp, made, 0.25, heads, dense)
        with torch.no_grad():
            return relative_error(logits_of(dense(input_ids=ids)), logits_of(made(input_ids=ids))) < TOLERANCE
    except Exception:  # noqa: BLE001 - a crash is a result here
        return False


def _channels(tp: Any, one: Any, target: float, heads: int) -> float:
    """The channel ratio that takes ``target`` parameters with so many heads: below 0 or above 1 if none does."""
    low, high = 0.0, 1 - 1.5 / one.config.get_text_config().intermediate_size  # it does not cut where nothing would be left
    if _removed(tp, one, low, heads) > target:
        return -1.0
    if _removed(tp, one, high, heads) < target:
        return 2.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _removed(tp, one, middle, heads) < target else (low, middle)
    nearest: float = min((low, high), key=lambda ratio: abs(_removed(tp, one, ratio, heads) - target))
    return nearest


def _ratios(tp: Any, model: Any, target: float) -> tuple[float, int, str]:
    """(channel ratio, query heads to remove, a note) that take ``target`` parameters out of each layer."""
    one = _one_layer(model)
    attention = attentions(one)[0]
    unit, grouped = _unit(attention), attention.kv_heads < attention.heads
    note = f"whole query heads and FFN channels of all layers{'; keys and values stay' if grouped else ''}"
    choices = range(0, attention.heads - grouped * unit, unit)  # as many queries as keys would pass for plain heads
    if len(choices) < 2 or not _exact(tp, one, unit):
        choices, note = range(1), "FFN channels of all layers only: with whole heads it is not equal to the masked model"
    found: dict[int, float] = {}

    def gap(heads: int) -> float:
        found[heads] = _channels(tp, one, target, heads)
        return found[heads] - heads / attention.heads

    first = bisect.bisect_left(choices, 0.0, key=lambda heads: -gap(heads))  # with more heads, fewer channels
    for heads in choices[max(0, first - 1) : first + 1]:
        gap(heads)
    fitting = [(abs(r - heads / attention.heads), r, heads) for heads, r in found.items() if 0 <= r < 1]
    if not fitting:
        raise PlanError("Torch-Pruning's heads and FFN channels are too few for this ratio")
    _, channels, heads = min(fitting)
    return channels, heads, note
