"""Models with adapters: base weights and LoRA factors are cut together, and the rank is an axis of its own.

Nothing in fxprune knows of peft. The reference of the second half is the eager peft model whose parameters were set to zero by
plain indexing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from fxprune.capture import trace
from fxprune.errors import CheckpointError
from fxprune.groups import Groups, PruneGroup
from fxprune.passes.dependency import find_groups
from fxprune.passes.rewrite import rewrite
from fxprune.plan import PrunePlan

from .masking import RUN, TRACED, KeptRMSNorm, assert_same_logits, error, logits_of, prunable, replace_modules, rows_of, some
from .zoo import build, tokens

RANK = 5
BASE = "base_model.model."
FUSED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """A family, what is adapted, and how; ``changes`` are of the bare model."""

    family: str
    targets: Sequence[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    transposed: bool = False

    def bare(self) -> nn.Module:
        """The model without an adapter."""
        return build(self.family, **self.changes)

    def build(self, **more: Any) -> nn.Module:
        """The peft model with a random adapter: at its start, B is zero and could hide any mistake."""
        options = {"task_type": "CAUSAL_LM", "fan_in_fan_out": self.transposed, **self.options, **more}
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(self.targets), **options)
        model: nn.Module = get_peft_model(self.bare(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
                elif "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
        return model.eval()


LLAMA = Case("llama", PROJECTIONS)
CASES = {
    "llama": LLAMA,
    "llama-biased": Case("llama", PROJECTIONS, {"lora_bias": True, "use_rslora": True}, {"attention_bias": True, "mlp_bias": True}),
    "gpt2": Case("gpt2", ("c_attn", "c_proj", "c_fc"), transposed=True),
    "bert": Case("bert", ("query", "key", "value", "dense"), {"task_type": "FEATURE_EXTRACTION"}),
    "qwen2": Case("qwen2", PROJECTIONS),
    "qwen3": Case("qwen3", PROJECTIONS),
    "gemma2": Case("gemma2", PROJECTIONS),
    "mistral": Case("mistral", PROJECTIONS),
    "phi3": Case("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "opt": Case("opt", ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    "gpt_neox": Case("gpt_neox", FUSED),
    "falcon_new": Case("falcon_new", FUSED),
    "bloom": Case("bloom", FUSED),
    "gptj": Case("gptj", ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out")),
    "stablelm": Case("stablelm", PROJECTIONS),
}


def traced(model: nn.Module) -> tuple[GraphModule, Groups]:
    """The graph and its groups; it computes what the model does, at other sizes than it was traced with."""
    gm = trace(model, {"input_ids": tokens(*TRACED)})
    inputs = {"input_ids": tokens(*RUN, seed=3)}
    with torch.no_grad():
        torch.testing.assert_close(gm(**inputs)[0], model(**inputs)[0], rtol=1e-5, atol=1e-5)
    return gm, find_groups(gm)


@functools.cache
def plain(name: str) -> tuple[nn.Module, GraphModule, Groups]:
    """A case with its graph and its groups, made once."""
    model = CASES[name].build()
    return model, *traced(model)


def reach(group: PruneGroup) -> set[tuple[str, int]]:
    """The parameter dimensions of a group."""
    return {(m.name, m.dim) for m in group.members if m.trainable}


def adapted(model: nn.Module) -> list[str]:
    """Paths of the layers that carry an adapter."""
    return [n for n, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)]


def ranks(groups: Groups, model: nn.Module) -> dict[str, PruneGroup]:
    """For each adapted layer the group that is its rank."""
    found = {}
    for path in adapted(model):
        (found[path],) = (g for g in groups.values() if (f"{path}.lora_A.default.weight", 0) in reach(g))
    return found


def with_adapter(case: Case, model: nn.Module, bare: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """What a group of the bare model becomes: A's columns go with the weight's inputs, B's rows with its outputs."""
    parameters = dict(model.named_parameters())
    expected = set()
    for name, dim in bare:
        path, _, leaf = f"{BASE}{name}".rpartition(".")
        if f"{path}.base_layer.{leaf}" not in parameters:
            expected.add((f"{BASE}{name}", dim))
            continue
        expected.add((f"{path}.base_layer.{leaf}", dim))
        if leaf == "weight" and dim == int(not case.transposed):
            expected.add((f"{path}.lora_A.default.weight", 1))
        elif leaf == "weight":
            expected |= {
                (f"{path}.lora_B.default.{p}", 0) for p in ("weight", "bias") if f"{path}.lora_B.default.{p}" in parameters
            }
    return expected


@pytest.mark.parametrize("name", CASES)
def test_groups_are_those_of_the_bare_model_with_the_adapters_in_them(name: str) -> None:
    case = CASES[name]
    model, _, groups = plain(name)
    bare = find_groups(trace(case.bare(), {"input_ids": tokens(*TRACED)}))
    left = {n: (g.kind, g.size, g.prunable, reach(g)) for n, g in groups.items()}
    for group in bare.values():
        wanted = (group.kind, group.size, group.prunable, with_adapter(case, model, reach(group)))
        (same,) = (n for n, found in left.items() if found == wanted)
        del left[same]
    assert len(left) == len(adapted(model))
    for path, group in ranks(groups, model).items():
        assert left.pop(group.name)[1:] == (
            RANK,
            True,
            {(f"{path}.lora_A.default.weight", 0), (f"{path}.lora_B.default.weight", 1)},
        )


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_loses_the_same_indices_as_its_layer(name: str) -> None:
    case = CASES[name]
    model, _, groups = plain(name)
    base = (int(not case.transposed), int(case.transposed))
    for path in adapted(model):
        for factor, dim, of_base in (("lora_A", 1, base[0]), ("lora_B", 0, base[1])):
            for group in groups.values():
                own = {(m.name, m.dim): m for m in group.members}
                theirs = own.get((f"{path}.base_layer.weight", of_base))
                if theirs is not None:
                    mine = own[f"{path}.{factor}.default.weight", dim]
                    for unit in range(group.size):
                        assert torch.equal(mine.indices([unit]), theirs.indices([unit]))


def test_a_rank_is_no_feed_forward_width() -> None:
    """Otherwise ``units={"ffn": 0.25}``, or a ratio with the default kinds, takes ranks away too."""
    model, _, groups = plain("llama")
    assert {g.kind for g in ranks(groups, model).values()} == {"other"}


def test_the_rank_of_an_embeddings_adapter_is_not_the_hidden_size() -> None:
    _, groups = traced(Case("llama", ("embed_tokens",), changes={"tied": False}).build())
    assert [g.size for g in groups.values() if g.kind == "hidden"] == [48]


def assert_exact(gm: GraphModule, groups: Groups) -> None:
    """Every group alone, the ranks together, and all at once."""
    inputs = {"input_ids": tokens(*RUN, seed=1)}
    keep = {n: some(g) for n, g in prunable(groups).items()}
    ranked = {n for n in keep if groups[n].size == RANK}
    cuts = [{n: units} for n, units in keep.items() if n not in ranked]
    cuts += [{n: keep[n] for n in ranked}, keep]
    assert not [(list(cut), e) for cut in cuts if not (e := error(gm, groups, cut, inputs)) < 1e-4]


@pytest.mark.parametrize("name", CASES)
def test_every_group(name: str) -> None:
    _, gm, groups = plain(name)
    assert_exact(gm, groups)


@pytest.mark.parametrize("saved", [["lm_head", "norm"], ["mlp"]], ids="-".join)
def test_modules_that_are_trained_whole(saved: list[str]) -> None:
    """Of the two copies that such a module has, the active one is in the graph."""
    case = Case("llama", PROJECTIONS[:4], {"modules_to_save": saved}, {"tied": False})
    gm, groups = traced(case.build())
    reached = {name for g in groups.values() if g.prunable for name, _ in reach(g)}
    assert all(any(f"{module}.modules_to_save.default" in n for n in reached) for module in saved)
    assert not any("original_module" in n for n in reached)
    assert_exact(gm, groups)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_beside_the_vocabulary(target: str) -> None:
    gm, groups = traced(Case("llama", (*PROJECTIONS, target), changes={"tied": False}).build())
    (hidden,) = (g for g in groups.values() if g.size == 48)
    factor = {"embed_tokens": ("model.embed_tokens.lora_embedding_B.default", 0), "lm_head": ("lm_head.lora_A.default.weight", 1)}
    name, dim = factor[target]
    assert (f"{BASE}{name}", dim) in reach(hidden)
    assert_exact(gm, groups)


DORA = {"use_dora": True}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decomposed_adapters_are_exact(name: str) -> None:
    gm, groups = traced(CASES[name].build(**DORA))
    assert_exact(gm, groups)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decomposed_adapters_pin_nothing(name: str) -> None:
    model, expected = CASES[name].build(**DORA), plain(name)[2]
    groups = find_groups(trace(model, {"input_ids": tokens(*TRACED)}))
    assert {n: g.size for n, g in prunable(groups).items()} == {n: g.size for n, g in prunable(expected).items()}
    for path in adapted(model):
        assert any((f"{path}.lora_magnitude_vector.default.weight", 0) in reach(g) for g in prunable(groups).values())


# ---------------------------------------------------------------------------------------------------------------------
# A reference that shares nothing with fxprune: the peft model itself, its parameters zeroed by hand.


@torch.no_grad()
def cut(layer: Any, *, outputs: Sequence[int] = (), inputs: Sequence[int] = (), rank: Sequence[int] = ()) -> None:
    """Silence outputs, inputs and ranks of an adapted layer."""
    weight = layer.base_layer.weight.t() if type(layer.base_layer).__name__ == "Conv1D" else layer.base_layer.weight
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for t in (weight, b, *(m.bias[:, None] for m in (layer.base_layer, layer.lora_B["default"]) if m.bias is not None)):
        t[list(outputs)] = 0
    for t in (weight, a):
        t[:, list(inputs)] = 0
    a[list(rank)] = 0


def _group(groups: Groups, kind: str, layer: int, size: int) -> str:
    (name,) = (n for n, g in groups.items() if (g.kind, g.layer, g.size) == (kind, layer, size))
    return name


@pytest.mark.parametrize("name", ["llama", "llama-biased"])
def test_llama_against_the_eager_model(name: str) -> None:
    (dense, gm, groups), stock = plain(name), CASES[name].build()
    keep: dict[str, Tensor] = {}
    kept_hidden = torch.arange(48)[torch.arange(48) % 5 != 2]
    hidden = sorted(set(range(48)) - set(kept_hidden.tolist()))
    keep[next(n for n, g in groups.items() if g.kind == "hidden")] = kept_hidden
    for i, (kv, ffn, rank) in enumerate([([1], [0, 5, 40, 63], [0, 3]), ([0], list(range(0, 64, 3)), [4])]):
        keep[_group(groups, "kv_heads", i, 2)] = torch.tensor([h for h in (0, 1) if h not in kv])
        keep[_group(groups, "ffn", i, 64)] = torch.tensor([j for j in range(64) if j not in ffn])
        layer: Any = stock.get_submodule(f"{BASE}model.layers.{i}")
        queries = rows_of([3 * h + g for h in kv for g in range(3)])
        cut(layer.self_attn.q_proj, outputs=queries, inputs=hidden)
        cut(layer.self_attn.k_proj, outputs=rows_of(kv), inputs=hidden, rank=rank)
        cut(layer.self_attn.v_proj, outputs=rows_of(kv), inputs=hidden)
        cut(layer.self_attn.o_proj, outputs=hidden, inputs=queries)
        cut(layer.mlp.gate_proj, outputs=ffn, inputs=hidden)
        cut(layer.mlp.up_proj, outputs=ffn, inputs=hidden)
        cut(layer.mlp.down_proj, outputs=hidden, inputs=ffn)
        of_key = ranks(groups, dense)[f"{BASE}model.layers.{i}.self_attn.k_proj"].name
        keep[of_key] = torch.tensor([r for r in range(RANK) if r not in rank])
    with torch.no_grad():
        stock.get_parameter(f"{BASE}model.embed_tokens.weight")[:, hidden] = 0
    assert replace_modules(stock, "LlamaRMSNorm", lambda norm: KeptRMSNorm(norm, kept_hidden)) == 5
    small = rewrite(gm, PrunePlan.from_keep(groups, keep))
    key = f"{BASE}model.layers.0.self_attn.k_proj"
    assert small.get_parameter(f"{key}.lora_A.default.weight").shape == (RANK - 2, len(kept_hidden))
    assert small.get_parameter(f"{key}.lora_B.default.weight").shape == (8, RANK - 2)
    assert_same_logits(small, stock, dense)


def test_gpt2_against_the_eager_model() -> None:
    """Base weights lie transposed, adapters do not; queries, keys and values share one adapter."""
    (dense, gm, groups), stock = plain("gpt2"), CASES["gpt2"].build()
    keep: dict[str, Tensor] = {}
    for i, (heads, ffn) in enumerate([([0, 4], list(range(100))), ([2], [7, 191])]):
        keep[_group(groups, "kv_heads", i, 6)] = torch.tensor([h for h in range(6) if h not in heads])
        keep[_group(groups, "ffn", i, 192)] = torch.tensor([j for j in range(192) if j not in ffn])
        layer: Any = stock.get_submodule(f"{BASE}transformer.h.{i}")
        cut(layer.attn.c_attn, outputs=[part * 48 + r for part in range(3) for r in rows_of(heads)])
        cut(layer.attn.c_proj, inputs=rows_of(heads))
        cut(layer.mlp.c_fc, outputs=ffn)
        cut(layer.mlp.c_proj, inputs=ffn)
    small = rewrite(gm, PrunePlan.from_keep(groups, keep))
    assert small.get_parameter(f"{BASE}transformer.h.0.attn.c_attn.lora_B.default.weight").shape == (3 * 4 * 8, RANK)
    assert_same_logits(small, stock, dense)


def test_decomposed_adapters_against_the_eager_model() -> None:
    """Silenced where they are read only: a row that is all zero has norm zero, and the reference would divide by it."""
    dense, stock = LLAMA.build(**DORA), LLAMA.build(**DORA)
    gm, groups = traced(dense)
    keep: dict[str, Tensor] = {}
    for i, (kv, ffn) in enumerate([(1, [0, 5, 40, 63]), (0, list(range(9)))]):
        keep[_group(groups, "kv_heads", i, 2)] = torch.tensor([1 - kv])
        keep[_group(groups, "ffn", i, 64)] = torch.tensor([j for j in range(64) if j not in ffn])
        layer: Any = stock.get_submodule(f"{BASE}model.layers.{i}")
        cut(layer.self_attn.o_proj, inputs=rows_of([3 * kv + g for g in range(3)]))
        cut(layer.mlp.down_proj, inputs=ffn)
    assert_same_logits(rewrite(gm, PrunePlan.from_keep(groups, keep)), stock, dense)


# ---------------------------------------------------------------------------------------------------------------------
# The whole way.


def test_prune_gives_an_adapted_model(tmp_path: Path) -> None:
    model = LLAMA.build()
    result = fxprune.prune(model, units={"kv_heads": 0.5}, samples=2, length=8)
    assert result.report.verify is not None
    assert result.report.verify.ok
    assert type(result.model) is type(model)
    layer = result.model.get_submodule(f"{BASE}model.layers.1.self_attn.v_proj")
    assert layer.get_parameter("lora_B.default.weight").shape == (8, RANK)
    assert layer.get_parameter("base_layer.weight").shape == (8, 48)
    torch.testing.assert_close(logits_of(result.model), logits_of(result.graph_module), rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"save result\.model\.merge_and_unload\(\) instead"):
        result.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_a_task_is_traced_with_fixed_sizes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward takes ``*args, **kwargs``, for which torch.export may find no symbolic sizes; a task type brings them back."""
    said: list[str] = []
    monkeypatch.setattr("fxprune.capture.log.warning", lambda text, *values: said.append(text % values))
    gm = fxprune.trace(LLAMA.build(task_type=None), {"input_ids": tokens(2, 7)})
    (ids,) = (node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder")
    fixed = all(isinstance(size, int) for size in ids.shape)
    assert fixed == any("traced again with fixed sizes" in text for text in said)
    assert error(gm, find_groups(gm), {}, {"input_ids": tokens(2, 7, seed=1)}) < 1e-4
