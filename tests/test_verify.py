"""A pruned network that is not the masked dense one is found out."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.capture import trace
from fxprune.groups import Groups
from fxprune.passes.dependency import find_groups
from fxprune.passes.rewrite import rewrite
from fxprune.passes.verify import verify
from fxprune.plan import PrunePlan
from fxprune.reporting.numbers import Record
from fxprune.reporting.page import page_of, render_markdown

from .masking import RUN, prunable, some, traced
from .zoo import VOCABULARY, build, tokens


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


class Chaotic(nn.Module):
    """Rounding of its channels' sum, a ten-millionth part, becomes a thousandth of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(16, 400), nn.Linear(400, 7)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3e4 * self.leave(torch.relu(self.enter(x))))


def chaotic(dtype: torch.dtype = torch.float32) -> tuple[GraphModule, GraphModule, PrunePlan, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(64, 16, dtype=dtype)
    gm = trace(Chaotic().to(dtype), (x,))
    groups = find_groups(gm)
    (name,) = [n for n, g in groups.items() if g.prunable]
    plan = PrunePlan.from_keep(groups, {name: range(0, 400, 3)})
    return gm, rewrite(gm, plan), plan, x


def test_amplified_rounding_is_no_error() -> None:
    """It is told from a wrong network in float64; parameters keep their storage, bit for bit."""
    gm, small, plan, x = chaotic()
    before = {id(p): (p.data_ptr(), p.detach().clone()) for module in (gm, small) for p in module.parameters()}
    report = verify(gm, small, plan, x)
    assert report.ok
    assert report.rounding is not None
    assert report.rounding > 1e-4
    assert report.max_rel_error < 1e-9
    assert (report.tolerance, report.reference) == (1e-6, "masked dense")
    for module in (gm, small):
        for parameter in module.parameters():
            pointer, values = before[id(parameter)]
            assert parameter.data_ptr() == pointer
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, values)


def test_a_wrong_network_stays_wrong_in_float64() -> None:
    gm, small, plan, x = chaotic()
    with torch.no_grad():
        small.get_parameter("leave.weight")[0, 0] += 1e-3
    report = verify(gm, small, plan, x)
    assert not report.ok
    assert report.rounding is not None
    assert report.max_rel_error > 0.1


def test_float64_is_not_repeated() -> None:
    gm, small, plan, x = chaotic(torch.float64)
    report = verify(gm, small, plan, x, tolerance=1e-30)
    assert (report.ok, report.rounding, report.tolerance) == (False, None, 1e-30)


class Narrow(Chaotic):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(super().forward(x), torch.ones_like(x[:7, :2], dtype=torch.float32))


def test_where_float64_cannot_be_run_the_first_word_counts() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    gm = trace(Narrow(), (x,))
    groups = find_groups(gm)
    plan = PrunePlan.from_keep(groups, {n: range(0, 400, 3) for n, g in groups.items() if g.size == 400})
    report = verify(gm, rewrite(gm, plan), plan, x)
    assert (report.ok, report.rounding, report.tolerance) == (False, None, 1e-4)
    assert {p.dtype for p in gm.parameters()} == {torch.float32}


@pytest.mark.parametrize("off", [0.0, 0.01])
def test_what_16_bits_hide_is_looked_for(off: float) -> None:
    """An error of one per cent is within the tolerance of bfloat16, and nothing that rounding explains."""
    model = build("llama").bfloat16()
    inputs = {"input_ids": tokens(2, 8)}
    gm = trace(model, inputs)
    groups = find_groups(gm)
    name = next(n for n, g in groups.items() if g.kind == "ffn")
    plan = PrunePlan.from_keep(groups, {name: range(groups[name].size // 2)})
    small = rewrite(gm, plan)
    with torch.no_grad():
        small.get_parameter("model.norm.weight").mul_(1 + off)
    report = verify(gm, small, plan, inputs)
    assert report.ok == (off == 0)
    if off:
        assert report.rounding is not None
        assert report.rounding < 0.1
        assert report.max_rel_error == pytest.approx(off, rel=0.3)
        assert report.tolerance == 1e-4


def test_rounding_is_said() -> None:
    gm, small, plan, x = chaotic()
    found = verify(gm, small, plan, x).to_json()
    text = render_markdown(page_of(Record("small", {"verify": found})))
    assert f"(allowed 1e-06; in float64: in its own precision rounding makes {found['rounding']:.1e} of it)\n" in text
    gm, small, plan, x = chaotic(torch.float64)
    wide = Record("small", {"verify": verify(gm, small, plan, x).to_json()})
    assert "(allowed 1e-08)\n" in render_markdown(page_of(wide))


class Featured(nn.Module):
    """Random features: what is read is a buffer, whose rows are nobody's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 12), nn.Linear(6, 4)
        self.register_buffer("features", torch.randn(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.leave(torch.sigmoid(self.enter(x)) @ cast(Tensor, self.features)))


def test_a_contraction_with_a_buffer_is_over_the_kept_units() -> None:
    torch.manual_seed(0)
    model, x = Featured().eval(), torch.randn(3, 8)
    gm = trace(model, (x,))
    groups = find_groups(gm)
    (name,) = (n for n, g in groups.items() if g.prunable and g.size == 12)
    kept = torch.arange(0, 12, 2)
    plan = PrunePlan.from_keep(groups, {name: kept})
    small = rewrite(gm, plan)
    assert verify(gm, small, plan, (x,)).max_rel_error < 1e-6
    expected = model.leave(torch.sigmoid(model.enter(x))[:, kept] @ cast(Tensor, model.features)[kept])
    torch.testing.assert_close(small(x), expected)


@pytest.mark.parametrize(("correction", "least"), [(0, 1), (1, 2), (2, 3)])
def test_a_variance_keeps_as_many_as_it_needs(correction: int, least: int) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(8, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.enter(x))
            return cast(Tensor, self.leave(h / (h.std(-1, keepdim=True, correction=correction) + 1e-3)))

    gm = trace(Scaled(), (torch.randn(3, 8),))
    groups = find_groups(gm)
    (group,) = (g for g in groups.values() if g.prunable and g.size == 12)
    assert (group.least, group.normalised) == (least, True)
    plan = PrunePlan.from_keep(groups, {group.name: range(least)})
    assert verify(gm, rewrite(gm, plan), plan, (torch.randn(3, 8),)).ok
