"""The pruned network is the masked dense one, exactly, on tiny random models of many families.

The first half goes through `fxprune.passes.verify`; the second half uses nothing of it: the reference is the stock transformers
model whose parameters were set to zero by plain slicing, written here, and whose norms were replaced by norms over the kept units.
The last part turns it round: a pruned network that is *not* right must be found out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.capture import trace
from fxprune.groups import Groups, PruneGroup
from fxprune.passes.dependency import find_groups
from fxprune.passes.rewrite import rewrite
from fxprune.passes.verify import verify
from fxprune.plan import PrunePlan

from .zoo import VOCABULARY, ZOO, build, tokens

TRACED, RUN = (2, 7), (3, 11)
"""Batch and sequence of the example that is traced, and of the one that is checked: never the same."""


def traced(model: nn.Module, **more: Tensor) -> tuple[GraphModule, Groups]:
    """The traced model and its groups; it must do what the model does, at other sizes than it was traced with."""
    gm = trace(model, {"input_ids": tokens(*TRACED), **more})
    return gm, find_groups(gm)


def some(group: PruneGroup, n: int | None = None) -> Tensor:
    """Random units to keep: half of them by default."""
    return torch.randperm(group.size)[: max(n or group.size // 2, group.least)].sort().values


def prunable(groups: Groups) -> dict[str, PruneGroup]:
    """The groups that may be pruned."""
    return {n: g for n, g in groups.items() if g.prunable}


def error(gm: GraphModule, groups: Groups, keep: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> float:
    """What verify says of pruning down to the given units."""
    plan = PrunePlan.from_keep(groups, keep)
    report = verify(gm, rewrite(gm, plan), plan, inputs)
    assert report.outputs >= 1
    return report.max_rel_error


def sizes(groups: Groups) -> dict[str, list[int]]:
    """Sizes of the prunable groups by kind, sorted."""
    found: dict[str, list[int]] = {}
    for group in prunable(groups).values():
        found.setdefault(group.kind, []).append(group.size)
    return {kind: sorted(n) for kind, n in found.items()}


def check_every_group(model: nn.Module, kinds: Mapping[str, list[int]], **more: tuple[Tensor, Tensor]) -> None:
    """The expected groups are there; each alone, all at once and all down to one unit give the masked dense network.

    ``more`` gives further inputs, each at the traced size and at the checked one.
    """
    gm, groups = traced(model, **{n: pair[0] for n, pair in more.items()})
    inputs = {"input_ids": tokens(*RUN, seed=1), **{n: pair[1] for n, pair in more.items()}}
    with torch.no_grad():
        torch.testing.assert_close(gm(**inputs)[0], model(**inputs)[0], rtol=1e-5, atol=1e-5)
    assert sizes(groups) == kinds
    keep = {n: some(g) for n, g in prunable(groups).items()}
    wrong = {n: e for n, units in keep.items() if not (e := error(gm, groups, {n: units}, inputs)) < 1e-4}
    assert not wrong, "pruned alone, these groups do not give the masked dense network"
    assert error(gm, groups, keep, inputs) < 1e-4
    assert error(gm, groups, {n: some(g, 1) for n, g in prunable(groups).items() if g.kind != "hidden"}, inputs) < 1e-4


@pytest.mark.parametrize("name", ZOO)
def test_every_group_of_every_family(name: str) -> None:
    check_every_group(build(name, tied=True), ZOO[name].kinds)


@pytest.mark.parametrize("name", ZOO)
def test_families_with_an_output_projection_of_their_own(name: str) -> None:
    gm, groups = traced(build(name, tied=False))
    assert sizes(groups) == {**ZOO[name].kinds, **ZOO[name].untied}
    (hidden,) = (n for n, g in groups.items() if g.kind == "hidden")
    inputs = {"input_ids": tokens(*RUN, seed=1)}
    assert error(gm, groups, {hidden: some(groups[hidden])}, inputs) < 1e-4
    assert error(gm, groups, {n: some(g) for n, g in prunable(groups).items()}, inputs) < 1e-4


@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_grouped_query_attention(ratio: int, attention: str) -> None:
    model = build("llama", attention=attention, num_attention_heads=2 * ratio)
    check_every_group(model, {**ZOO["llama"].kinds, "query_groups": [ratio, ratio]})


def test_multi_query_and_multi_head_attention() -> None:
    kinds = {k: v for k, v in ZOO["llama"].kinds.items() if k not in ("kv_heads", "query_groups")}
    for kv_heads, expected in ((6, {"kv_heads": [6, 6]}), (1, {"query_groups": [6, 6]})):
        gm, groups = traced(build("llama", num_key_value_heads=kv_heads))
        found = sizes(groups)
        assert {k: v for k, v in found.items() if k in kinds} == kinds
        assert sorted(n for k, v in found.items() if k not in kinds for n in v) == next(iter(expected.values()))
        keep = {n: some(g) for n, g in prunable(groups).items()}
        assert error(gm, groups, keep, {"input_ids": tokens(*RUN)}) < 1e-4


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padded_batches(name: str) -> None:
    masks = [torch.ones(shape, dtype=torch.long) for shape in (TRACED, RUN)]
    masks[0][0, :3] = masks[1][1, :4] = 0  # padded at the left
    check_every_group(build(name), ZOO[name].kinds, attention_mask=(masks[0], masks[1]))


@pytest.mark.parametrize("name", ["gpt2", "bloom", "bert"])  # no norm that computes in float32
def test_in_double_precision_only_rounding_is_left(name: str) -> None:
    gm, groups = traced(build(name).double())
    keep = {n: some(g) for n, g in prunable(groups).items()}
    assert error(gm, groups, keep, {"input_ids": tokens(*RUN)}) < 1e-12


@pytest.mark.parametrize("tied", [True, False])
def test_a_tie_stays_a_tie(tied: bool) -> None:
    gm, groups = traced(build("llama", tied=tied))
    plan = PrunePlan.from_keep(groups, {n: some(g) for n, g in prunable(groups).items()})
    small = rewrite(gm, plan)
    embedding, head = small.get_submodule("model.embed_tokens"), small.get_submodule("lm_head")
    assert (embedding.weight is head.weight) == tied
    assert sum(p.numel() for p in small.parameters()) == groups.remaining(plan.counts())


# ---------------------------------------------------------------------------------------------------------------------
# A reference that shares nothing with fxprune: the stock model, its parameters zeroed by hand.


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=tokens(*RUN, seed=2)).logits
    return out


def _assert_same_logits(small: nn.Module, stock: nn.Module, dense: nn.Module) -> None:
    """The pruned module does what the altered stock model does, and that is not what the dense one did."""
    expected = _logits(stock)
    torch.testing.assert_close(_logits(small), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (_logits(dense) - expected).abs().max() > 1e-2 * expected.abs().max(), "the removed units did not matter: no test"


def _group(groups: Groups, kind: str, layer: int | None) -> str:
    (name,) = (n for n, g in groups.items() if g.kind == kind and g.layer == layer and g.prunable)
    return name


def _without(kept: Tensor, size: int) -> list[int]:
    return sorted(set(range(size)) - set(kept.tolist()))


def _rows(heads: list[int], width: int) -> list[int]:
    return [h * width + i for h in heads for i in range(width)]


@torch.no_grad()
def _zero(parameter: Any, rows: list[int] | None = None, columns: list[int] | None = None) -> None:
    if rows is not None:
        parameter[rows] = 0
    if columns is not None:
        parameter[:, columns] = 0


def test_llama_heads_and_ffn_against_the_stock_model() -> None:
    dense = build("llama")
    stock: Any = build("llama")
    gm, groups = traced(dense)
    kv_heads, query_groups, width = 2, 3, 8
    keep: dict[str, Tensor] = {}
    layers = [
        {"kv_heads": torch.tensor([1]), "query_groups": torch.tensor([0, 1, 2]), "ffn": torch.arange(0, 64, 3)},
        {"kv_heads": torch.tensor([0, 1]), "query_groups": torch.tensor([0, 2]), "ffn": torch.tensor([5, 6, 63])},
    ]
    for i, wanted in enumerate(layers):
        keep |= {_group(groups, kind, i): units for kind, units in wanted.items()}
        attention, mlp = stock.model.layers[i].self_attn, stock.model.layers[i].mlp
        no_kv, no_group = _without(wanted["kv_heads"], kv_heads), _without(wanted["query_groups"], query_groups)
        no_query = [kv * query_groups + g for kv in range(kv_heads) for g in range(query_groups) if kv in no_kv or g in no_group]
        _zero(attention.q_proj.weight, rows=_rows(no_query, width))
        _zero(attention.k_proj.weight, rows=_rows(no_kv, width))
        _zero(attention.v_proj.weight, rows=_rows(no_kv, width))
        _zero(attention.o_proj.weight, columns=_rows(no_query, width))
        no_ffn = _without(wanted["ffn"], 64)
        _zero(mlp.gate_proj.weight, rows=no_ffn)
        _zero(mlp.up_proj.weight, rows=no_ffn)
        _zero(mlp.down_proj.weight, columns=no_ffn)
    small = rewrite(gm, PrunePlan.from_keep(groups, keep))
    assert [small.get_parameter(f"model.layers.{i}.self_attn.q_proj.weight").shape for i in (0, 1)] == [(24, 48), (32, 48)]
    assert [small.get_parameter(f"model.layers.{i}.mlp.down_proj.weight").shape for i in (0, 1)] == [(48, 22), (48, 3)]
    _assert_same_logits(small, stock, dense)


def test_bert_heads_and_ffn_against_the_stock_model() -> None:
    dense = build("bert")
    stock: Any = build("bert")
    gm, groups = traced(dense)
    keep: dict[str, Tensor] = {}
    width = 8
    for i, (heads, ffn) in enumerate([([0, 4, 5], [1, 2, 3, 40]), ([2], list(range(10, 60)))]):
        keep |= {_group(groups, "kv_heads", i): torch.tensor(heads), _group(groups, "ffn", i): torch.tensor(ffn)}
        layer = stock.bert.encoder.layer[i]
        gone = _rows(_without(torch.tensor(heads), 6), width)
        for projection in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
            _zero(projection.weight, rows=gone)
            _zero(projection.bias, rows=gone)
        _zero(layer.attention.output.dense.weight, columns=gone)
        no_ffn = _without(torch.tensor(ffn), 64)
        _zero(layer.intermediate.dense.weight, rows=no_ffn)
        _zero(layer.intermediate.dense.bias, rows=no_ffn)
        _zero(layer.output.dense.weight, columns=no_ffn)
    small = rewrite(gm, PrunePlan.from_keep(groups, keep))
    assert small.get_parameter("bert.encoder.layer.1.attention.self.query.weight").shape == (8, 48)
    _assert_same_logits(small, stock, dense)


class KeptRMSNorm(nn.Module):
    """RMS norm whose mean square is taken over some units only; the others come out as zero."""

    def __init__(self, norm: Any, kept: Tensor) -> None:
        super().__init__()
        self.weight, self.eps, self.kept = norm.weight, norm.variance_epsilon, kept

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        y = x[..., self.kept]
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + self.eps) * self.weight[self.kept]
        return torch.zeros_like(x).index_copy(-1, self.kept, y)


class KeptLayerNorm(nn.Module):
    """Layer norm whose mean and variance are taken over some units only; the others come out as zero."""

    def __init__(self, norm: Any, kept: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.kept = norm.weight, norm.bias, norm.eps, kept

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        y = x[..., self.kept]
        y = y - y.mean(-1, keepdim=True)
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + self.eps) * self.weight[self.kept] + self.bias[self.kept]
        return torch.zeros_like(x).index_copy(-1, self.kept, y)


def _replace(root: nn.Module, old: type[nn.Module] | str, make: Callable[[nn.Module], nn.Module]) -> int:
    """Replace every submodule of a class; returns how many there were."""
    found = [(n, m) for n, m in root.named_modules() if type(m) is old or type(m).__name__ == old]
    for name, module in found:
        path, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(path), leaf, make(module))
    return len(found)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_hidden_size_against_the_stock_model(tied: bool) -> None:
    dense, stock = build("llama", tied=tied), build("llama", tied=tied)
    gm, groups = traced(dense)
    kept = torch.arange(48)[torch.arange(48) % 5 != 2]
    gone = _without(kept, 48)
    for name, parameter in stock.named_parameters():
        if any(n in name for n in ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            _zero(parameter, columns=gone)
        elif any(n in name for n in ("o_proj", "down_proj")):
            _zero(parameter, rows=gone)
    assert _replace(stock, "LlamaRMSNorm", lambda norm: KeptRMSNorm(norm, kept)) == 5
    small = rewrite(gm, PrunePlan.from_keep(groups, {_group(groups, "hidden", None): kept}))
    assert small.get_parameter("model.embed_tokens.weight").shape == (VOCABULARY, len(kept))
    _assert_same_logits(small, stock, dense)


def test_bert_hidden_size_against_the_stock_model() -> None:
    dense = build("bert")
    stock: Any = build("bert")
    gm, groups = traced(dense)
    kept = torch.tensor([i for i in range(48) if i % 4 != 1])
    gone = _without(kept, 48)
    for name, parameter in stock.named_parameters():
        if name.endswith(("_embeddings.weight", "query.weight", "key.weight", "value.weight", "intermediate.dense.weight")):
            _zero(parameter, columns=gone)
        elif "transform.dense.weight" in name:
            _zero(parameter, rows=gone, columns=gone)
        elif name.endswith(("output.dense.weight", "output.dense.bias", "transform.dense.bias")):
            _zero(parameter, rows=gone)
    assert _replace(stock, nn.LayerNorm, lambda norm: KeptLayerNorm(norm, kept)) == 6
    small = rewrite(gm, PrunePlan.from_keep(groups, {_group(groups, "hidden", None): kept}))
    _assert_same_logits(small, stock, dense)


def test_llama_rotary_pairs_against_the_stock_model() -> None:
    """A pair is unit ``i`` and ``i + 4`` of every head's eight; the scale stays the dense one's."""
    dense = build("llama")
    stock: Any = build("llama")
    gm, groups = traced(dense)
    kept = torch.tensor([0, 3])
    for layer in stock.model.layers:
        for projection, heads in ((layer.self_attn.q_proj, 6), (layer.self_attn.k_proj, 2)):
            _zero(projection.weight, rows=[h * 8 + i for h in range(heads) for i in (1, 2, 5, 6)])
    small = rewrite(gm, PrunePlan.from_keep(groups, {_group(groups, "head_dim", None): kept}))
    assert small.get_parameter("model.layers.1.self_attn.k_proj.weight").shape == (8, 48)
    assert small.get_parameter("model.layers.1.self_attn.v_proj.weight").shape == (16, 48)
    _assert_same_logits(small, stock, dense)


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong must be found out.


def _parameter(small: GraphModule, name: str) -> Tensor:
    return small.get_parameter(name).data


def _one_weight_at_zero(small: GraphModule) -> None:
    flat = _parameter(small, "model.layers.0.mlp.down_proj.weight").view(-1)
    flat[flat.abs().argmax()] = 0


def _two_rows_swapped(small: GraphModule) -> None:
    weight = _parameter(small, "model.layers.1.mlp.up_proj.weight")
    weight[[0, 1]] = weight[[1, 0]]


def _two_heads_swapped(small: GraphModule) -> None:
    weight = _parameter(small, "model.layers.0.self_attn.q_proj.weight").view(-1, 8, 24)
    weight[[0, 1]] = weight[[1, 0]]


def _a_norm_off_by_a_percent(small: GraphModule) -> None:
    _parameter(small, "model.layers.0.input_layernorm.weight")[:] *= 1 + 0.01 * torch.arange(24) / 24


def _two_tokens_swapped(small: GraphModule) -> None:
    weight = _parameter(small, "model.embed_tokens.weight")
    weight[[10, 11]] = weight[[11, 10]]


def _a_frequency_changed(small: GraphModule) -> None:
    (frequencies,) = (b for n, b in small.named_buffers() if n.endswith("inv_freq"))
    frequencies[1] *= 1.1


def _another_activation(small: GraphModule) -> None:
    node = next(n for n in small.graph.nodes if n.target is torch.ops.aten.silu.default)
    node.target = torch.ops.aten.gelu.default
    small.recompile()


CORRUPTIONS = [
    _one_weight_at_zero,
    _two_rows_swapped,
    _two_heads_swapped,
    _a_norm_off_by_a_percent,
    _two_tokens_swapped,
    _a_frequency_changed,
    _another_activation,
]


@pytest.fixture(scope="module")
def llama() -> tuple[GraphModule, Groups, PrunePlan]:
    """A traced Llama and a plan that prunes half of the FFN and of the hidden size."""
    torch.manual_seed(0)
    gm, groups = traced(build("llama"))
    keep = {n: some(g) for n, g in prunable(groups).items() if g.kind in ("ffn", "hidden")}
    return gm, groups, PrunePlan.from_keep(groups, keep)


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda c: c.__name__.strip("_"))
def test_verify_finds_a_wrong_network_out(
    llama: tuple[GraphModule, Groups, PrunePlan], corrupt: Callable[[GraphModule], None]
) -> None:
    gm, _, plan = llama
    small = rewrite(gm, plan)
    inputs = {"input_ids": torch.arange(5, VOCABULARY)[None, :60]}
    assert verify(gm, small, plan, inputs).ok
    corrupt(small)
    report = verify(gm, small, plan, inputs)
    assert not report.ok
    assert report.max_rel_error > 10 * report.tolerance


@pytest.mark.parametrize("kind", ["ffn", "hidden", "kv_heads", "query_groups", "head_dim"])
def test_verify_finds_another_plan_out(llama: tuple[GraphModule, Groups, PrunePlan], kind: str) -> None:
    """Right sizes, wrong units: one unit of one group is another one than the plan says."""
    gm, groups, _ = llama
    name, group = next((n, g) for n, g in prunable(groups).items() if g.kind == kind)
    said = PrunePlan.from_keep(groups, {name: list(range(group.size - 1))})
    done = PrunePlan.from_keep(groups, {name: [*range(group.size - 2), group.size - 1]})
    inputs = {"input_ids": tokens(*RUN)}
    assert verify(gm, rewrite(gm, said), said, inputs).ok
    report = verify(gm, rewrite(gm, done), said, inputs)
    assert not report.ok
    assert report.max_rel_error > 10 * report.tolerance


def test_verify_finds_the_dense_network_out(llama: tuple[GraphModule, Groups, PrunePlan]) -> None:
    gm, _, plan = llama
    assert verify(gm, gm, plan, {"input_ids": tokens(*RUN)}).max_rel_error > 1e-2


def test_verify_finds_a_network_that_is_no_number_out(llama: tuple[GraphModule, Groups, PrunePlan]) -> None:
    gm, _, plan = llama
    small = rewrite(gm, plan)
    _parameter(small, "model.norm.weight")[3] = float("nan")
    assert not verify(gm, small, plan, {"input_ids": tokens(*RUN)}).ok


def test_the_first_of_entries_that_are_all_alike() -> None:
    """``zeros_like(x)[..., 0]``, by which some models make token types of embeddings, depends on no unit of x."""

    class Typed(nn.Module):
        def __init__(self, at: int) -> None:
            super().__init__()
            self.at, self.a, self.b = at, nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + torch.ones_like(y)[..., self.at, None]

    for at, free in ((0, ["other"]), (1, [])):
        model = Typed(at)
        gm = trace(model, (torch.randn(2, 4, 5),))
        groups = find_groups(gm)
        assert [g.kind for g in groups.values() if g.prunable] == free
        for name in prunable(groups):
            plan = PrunePlan.from_keep(groups, {name: some(groups[name], 1)})
            assert verify(gm, rewrite(gm, plan), plan, (torch.randn(3, 7, 5),)).max_rel_error < 1e-5


@pytest.mark.parametrize(
    ("dtype", "free"), [(torch.int32, True), (torch.float32, True), (torch.bool, False), (torch.bfloat16, False)]
)
def test_numbers_of_units_survive_only_casts_that_keep_them(dtype: torch.dtype, free: bool) -> None:
    """As a bool, the number of unit 0 is told from all others: once unit 0 is gone, another one would be."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Linear(5, 6), nn.Parameter(torch.randn(6, 5))

        def forward(self, x: Tensor) -> Tensor:
            chosen = self.router(x).argmax(-1)
            return self.experts[chosen.to(dtype).to(torch.int64)]

    gm = trace(Routed(), (torch.randn(2, 4, 5),))
    groups = find_groups(gm)
    (routed,) = (g for g in groups.values() if g.size == 6 and any(m.name == "router.weight" for m in g.members))
    assert routed.prunable is free
    if free:
        plan = PrunePlan.from_keep(groups, {routed.name: [1, 3, 4]})
        assert verify(gm, rewrite(gm, plan), plan, (torch.randn(3, 7, 5),)).max_rel_error < 1e-5
