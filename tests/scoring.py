"""What a criterion is to give, by plain autograd on the stock model, with each unit's slices written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fxprune import find_groups, trace
from fxprune.groups import Groups

LAYERS, HIDDEN, FFN, KV, RATIO, DIM, VOCABULARY = 2, 24, 20, 2, 3, 8, 53
Slices = list[tuple[str, Any]]
Batch = Mapping[str, Tensor]


def llama(**options: Any) -> LlamaForCausalLM:
    """A GQA Llama, three query heads to a KV head, tied, with every bias; no weight at its initial constant."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=KV * RATIO,
        num_key_value_heads=KV,
        head_dim=DIM,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        **options,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 + (1 if parameter.dim() == 1 else 0))
    return model


def batches() -> list[dict[str, Tensor]]:
    """Two batches of different sizes: one with padding, one with labels of which some are ignored."""
    generator = torch.Generator().manual_seed(2)
    first = torch.randint(0, VOCABULARY, (3, 7), generator=generator)
    mask = torch.ones_like(first)
    mask[0, 4:] = mask[2, 6:] = 0
    second = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
    labels = second.clone()
    labels[0, :5] = labels[1, 3] = -100
    return [
        {"input_ids": first, "attention_mask": mask},
        {"input_ids": second, "attention_mask": torch.ones_like(second), "labels": labels},
    ]


def hand_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Next-token cross-entropy, token by token."""
    terms = []
    for row in range(logits.shape[0]):
        for position in range(logits.shape[1] - 1):
            target = int(batch.get("labels", batch["input_ids"])[row, position + 1])
            counts = target != -100 if "labels" in batch else bool(batch["attention_mask"][row, position + 1])
            if counts:
                terms.append(-torch.log_softmax(logits[row, position].float(), -1)[target])
    return torch.stack(terms).mean()


def gradients(model: LlamaForCausalLM, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    output: Any = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    hand_loss(output.logits, batch).backward()
    found = {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def rows_of(batch: Batch) -> Iterator[dict[str, Tensor]]:
    for i in range(len(batch["input_ids"])):
        yield {k: v[i : i + 1] for k, v in batch.items()}


def doubled(name: str, weight: Tensor, gradient: Tensor) -> Tensor:
    """A user's criterion: depends on the name, the weight and the gradient."""
    return (2.0 if "norm" in name else 1.0) * gradient.abs() + weight.square()


def statistics(criterion: str | Any, model: LlamaForCausalLM) -> dict[str, Tensor]:
    """What every element contributes, from whole gradients."""
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    of_batch = [gradients(model, b) for b in batches()]
    of_sample = [gradients(model, row) for b in batches() for row in rows_of(b)]
    found = {}
    for n, w in weights.items():
        mean = torch.stack([g[n] for g in of_sample]).mean(0)
        fisher = torch.stack([g[n] ** 2 for g in of_sample]).mean(0)
        if criterion == "l1":
            found[n] = w.abs()
        elif criterion == "l2":
            found[n] = w**2
        elif criterion == "taylor_vector":
            found[n] = w * (of_batch[0][n] + of_batch[1][n]) / 2
        elif criterion == "taylor1":
            found[n] = ((w * of_batch[0][n]).abs() + (w * of_batch[1][n]).abs()) / 2
        elif criterion == "taylor2":
            found[n] = (w * fisher * w).abs()
        elif criterion == "taylor_mixed":
            found[n] = (w * mean - 0.5 * w * fisher * w).abs()
        else:
            found[n] = (doubled(n, w, of_batch[0][n]) + doubled(n, w, of_batch[1][n])) / 2
    return found


def span(start: int, length: int) -> list[int]:
    return list(range(start, start + length))


def attention(layer: int, unit: int) -> tuple[Slices, Slices, Slices]:
    """The slices of one KV head, one query group and one value channel, in the order in which the model uses them."""
    at = f"model.layers.{layer}.self_attn"
    heads = [(kv, group) for kv in range(KV) for group in range(RATIO)]
    start = {head: i * DIM for i, head in enumerate(heads)}  # query heads of one KV head lie side by side

    def slices(q: list[int], k: list[int], v: list[int], o: list[int]) -> Slices:
        found: Slices = []
        for name, rows in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            found += [(f"{at}.{name}.weight", rows), (f"{at}.{name}.bias", rows)] if rows else []
        return [*found, (f"{at}.o_proj.weight", (slice(None), o))]

    queries = [i for kv, group in heads if kv == unit for i in span(start[kv, group], DIM)]
    one_kv_head = slices(queries, span(unit * DIM, DIM), span(unit * DIM, DIM), queries) if unit < KV else []
    group_rows = [i for kv, group in heads if group == unit for i in span(start[kv, group], DIM)]
    one_query_group = slices(group_rows, [], [], group_rows) if unit < RATIO else []
    values, outputs = [kv * DIM + unit for kv in range(KV)], [start[h] + unit for h in heads]
    return one_kv_head, one_query_group, slices([], [], values, outputs)


def rotary(unit: int) -> Slices:
    """A rotary pair: two channels of every query and key head in every layer."""
    found: Slices = []
    for layer in range(LAYERS):
        for name, heads in (("q_proj", KV * RATIO), ("k_proj", KV)):
            rows = [h * DIM + half * DIM // 2 + unit for h in range(heads) for half in (0, 1)]
            found += [(f"model.layers.{layer}.self_attn.{name}.{leaf}", rows) for leaf in ("weight", "bias")]
    return found


def ffn(layer: int, unit: int) -> Slices:
    at = f"model.layers.{layer}.mlp"
    rows = [(f"{at}.{name}.{leaf}", [unit]) for name in ("gate_proj", "up_proj") for leaf in ("weight", "bias")]
    return [*rows, (f"{at}.down_proj.weight", (slice(None), unit))]


def hidden(unit: int) -> Slices:
    column = (slice(None), unit)
    found: Slices = [("model.embed_tokens.weight", column)]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        found.append((f"{at}.input_layernorm.weight", unit))
        found += [(f"{at}.self_attn.{name}.weight", column) for name in ("q_proj", "k_proj", "v_proj")]
        found += [(f"{at}.self_attn.o_proj.weight", unit), (f"{at}.self_attn.o_proj.bias", unit)]
        found.append((f"{at}.post_attention_layernorm.weight", unit))
        found += [(f"{at}.mlp.{name}.weight", column) for name in ("gate_proj", "up_proj")]
        found += [(f"{at}.mlp.down_proj.weight", unit), (f"{at}.mlp.down_proj.bias", unit)]
    return [*found, ("model.norm.weight", unit)]


def by_hand() -> dict[str, list[Slices]]:
    """For each group the slices of each of its units."""
    found = {"model.hidden": [hidden(u) for u in range(HIDDEN)], "model.layers.head_dim": [rotary(u) for u in range(DIM // 2)]}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        found[f"{at}.self_attn.kv_heads"] = [attention(layer, u)[0] for u in range(KV)]
        found[f"{at}.self_attn.query_groups"] = [attention(layer, u)[1] for u in range(RATIO)]
        found[f"{at}.self_attn.head_dim"] = [attention(layer, u)[2] for u in range(DIM)]
        found[f"{at}.mlp.ffn"] = [ffn(layer, u) for u in range(FFN)]
    return found


def expected(criterion: Any, aggregation: str, model: LlamaForCausalLM) -> dict[str, Tensor]:
    elements = statistics(criterion, model)
    combine: dict[str, Callable[[list[float]], float]] = {
        "sum": sum,
        "mean": lambda parts: sum(parts) / len(parts),
        "max": max,
        "product": lambda parts: math.prod(p ** (1 / len(parts)) for p in parts),
        "last": lambda parts: parts[-1],
        "first": lambda parts: parts[0],
    }
    found = {}
    for group, units in by_hand().items():
        values = []
        for slices in units:
            parts = [float(elements[name][index].sum()) for name, index in slices]
            values.append(combine[aggregation]([abs(p) for p in parts]))
        found[group] = torch.tensor(values, dtype=torch.float64)
    return found


@dataclass
class Traced:
    model: LlamaForCausalLM
    gm: torch.fx.GraphModule
    groups: Groups


class Stream(nn.Module):
    """A residual stream through one matrix whose rows (in one or two copies) and columns are the same axis."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 5, bias=False)
        self.square = nn.Linear(5, 5 * copies, bias=False)
        self.leave = nn.Linear(5, 2, bias=False)
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for part in self.square(x).chunk(self.copies, -1):
            x = x + part
        out: Tensor = self.leave(x)
        return out


def trace_llama() -> Traced:
    """The Llama, its graph and its groups."""
    model = llama()
    gm = trace(model, batches()[0])
    return Traced(model, gm, find_groups(gm))
