"""Weight compensation, by least squares and by biases, against plain linear algebra on the eager model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import OPTConfig, OPTForCausalLM

from fxprune import find_groups, rewrite, trace
from fxprune.errors import FxPruneError, UsageError
from fxprune.passes.compensation import COMPENSATION, Compensation, CompensationPass, compensate
from fxprune.passes.least_squares import output_error, solve
from fxprune.plan import PrunePlan

from .compensating import (
    COUNTED,
    DIM,
    GPT2_FEATURES,
    GPT2_GONE,
    KV,
    LLAMA_FEATURES,
    LLAMA_GONE,
    RATIO,
    Batch,
    batches,
    by_hand,
    check_bits,
    check_weights,
    heads,
    held_back,
    logits,
    mean_of,
    pruned,
    without,
)
from .zoo import build, tokens


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.leave(torch.tanh(self.enter(x)))
        return out


def two(gone: Sequence[int], x: Tensor) -> tuple[Two, GraphModule, GraphModule, PrunePlan]:
    model = Two().to(x.dtype)
    gm = trace(model, (x,))
    groups = find_groups(gm)
    (name,) = [n for n, g in groups.items() if g.prunable]
    plan = PrunePlan.from_keep(groups, {name: without(9, gone)})
    return model, gm, rewrite(gm, plan), plan


def test_without_a_ridge_it_is_plain_least_squares() -> None:
    x = torch.randn(200, 4)
    model, gm, small, plan = two([1, 4, 8], x)
    result = compensate(gm, small, plan, [{"x": x[:120]}, {"x": x[120:]}], ridge=1e-12)
    with torch.no_grad():
        h = torch.tanh(model.enter(x)).double()
        target = h @ model.leave.weight.double().mT
        best = torch.linalg.lstsq(h[:, without(9, [1, 4, 8])], target)
    torch.testing.assert_close(small.get_parameter("leave.weight").double(), best.solution.mT, rtol=1e-3, atol=1e-4)
    assert torch.equal(small.get_parameter("leave.bias"), model.leave.bias)
    assert torch.equal(small.get_parameter("enter.weight"), model.enter.weight[without(9, [1, 4, 8])])
    weight = model.leave.weight.detach().double()
    fit, held = held_back([h[:120], h[120:]])
    part = torch.linalg.lstsq(fit[:, without(9, [1, 4, 8])], fit @ weight.mT).solution
    left = (held[:, without(9, [1, 4, 8])] @ part - held @ weight.mT).square().sum() / (held @ weight.mT).square().sum()
    cut = (held[:, [1, 4, 8]] @ weight.mT[[1, 4, 8]]).square().sum() / (held @ weight.mT).square().sum()
    assert result.method == "least-squares"
    assert result.tokens == 200
    assert result.added == ()
    assert list(result.maps) == ["leave.weight"]
    assert result.maps["leave.weight"] == pytest.approx((float(cut), float(left)), rel=1e-3, abs=1e-6)


@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 40), st.floats(1e-6, 10), st.booleans())
def test_never_worse_than_sliced(seed: int, features: int, rows: int, ridge: float, same: bool) -> None:
    """In its own measure, for any data: fewer tokens than features, features that are zero or all alike."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator)
    x[:, 0] = 0
    x = x[:, :1].expand_as(x) + 1 if same else x
    weight = torch.randn(3, features, generator=generator, dtype=torch.float64)
    stays = torch.rand(features, generator=generator) < 0.5
    stays[features - 1], stays[features - 2] = True, False
    gram, left = x.mT @ x, stays.nonzero().flatten()
    solved = solve(weight, gram, stays, ridge)
    assert solved.shape == (3, len(left))
    assert bool(torch.isfinite(solved).all())
    before, after = (output_error(weight, gram, left, new) for new in (weight[:, left], solved))
    assert after <= before + 1e-9


def test_the_ridge_holds_back() -> None:
    """With all trust in the text the weights move most; with none they stay."""
    x, weight = torch.randn(30, 8), torch.randn(3, 8, dtype=torch.float64)
    stays = torch.arange(8) < 5
    moved = [float((solve(weight, x.mT @ x, stays, ridge) - weight[:, :5]).norm()) for ridge in (1e-6, 0.1, 1.0, 1e6)]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 0.1
    assert moved[-1] < 1e-4


def test_units_that_others_can_stand_in_for_cost_nothing() -> None:
    """FFN channels that are multiples and sums of others: the output does not change when they go."""
    model: Any = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[[3, 5, 7, 9]] = layer.mlp.gate_proj.weight[[2, 2, 4, 6]]
            up = layer.mlp.up_proj.weight
            up[3] = -2 * up[2]
            up[5] = up[2] / 2
            up[7], up[9] = 3 * up[4], up[6]
    gone = {f"model.layers.{i}.mlp.ffn": [3, 5, 7, 9] for i in (0, 1)}
    gm, small, plan = pruned(model, gone)
    batch = {"input_ids": tokens(4, 12, seed=9), "attention_mask": torch.ones(4, 12, dtype=torch.long)}  # not what it was fitted to
    dense, cut = logits(model, batch), logits(small, batch)
    assert float((dense - cut).norm() / dense.norm()) > 0.05
    result = compensate(gm, small, plan, batches(), ridge=1e-9)
    assert float((dense - logits(small, batch)).norm() / dense.norm()) < 1e-4
    assert set(result.maps) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert all(before > 1e-4 and after < 1e-6 for before, after in result.maps.values()), result.maps


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ridge", [0.03, 0.5, None])
def test_maps_are_solved_one_after_the_other(ridge: float | None, biased: bool) -> None:
    """Each reads what the network, compensated so far, gives it; existing biases stay what they are."""
    model = build("llama", attention_bias=biased, mlp_bias=biased)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gm, small, plan = pruned(model, LLAMA_GONE)
    result = compensate(gm, small, plan, batches(), ridge=ridge)
    wanted, errors = by_hand(model, LLAMA_FEATURES, ridge)
    check_weights(small, wanted, LLAMA_FEATURES)
    check_bits(model, before)
    assert list(result.maps) == list(errors)
    for name, pair in errors.items():
        assert result.maps[name] == pytest.approx(pair, rel=1e-3)
        assert ridge is not None or pair[1] <= pair[0]
    assert result.tokens == COUNTED
    assert result.added == ()
    for batch in batches():  # the rewritten network is the eager one whose removed columns are zero
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(logits(small, batch)[mask], logits(wanted, batch)[mask], rtol=1e-3, atol=1e-3)
    if biased:
        assert torch.equal(small.get_parameter("model.layers.0.mlp.down_proj.bias"), before["model.layers.0.mlp.down_proj.bias"])


def test_conv1d_of_gpt2() -> None:
    model = build("gpt2")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gm, small, plan = pruned(model, GPT2_GONE)
    result = compensate(gm, small, plan, batches())
    wanted, errors = by_hand(model, GPT2_FEATURES, dim=0)
    check_weights(small, wanted, GPT2_FEATURES, dim=0)
    check_bits(model, before)
    assert {n: pytest.approx(pair, rel=1e-3) for n, pair in errors.items()} == result.maps


@pytest.mark.parametrize("dropped", [(0,), (1, 2), (0, 1, 3), (3,)])
def test_dropped_blocks_are_left_out(dropped: tuple[int, ...]) -> None:
    model = build("llama", num_hidden_layers=4)
    gone = {f"model.layers.{i}.mlp.ffn": list(range(i, 50)) for i in range(4) if i not in dropped}
    gm, small, plan = pruned(model, gone, [f"model.layers.{i}" for i in dropped])
    result = compensate(gm, small, plan, batches())
    short: Any = copy.deepcopy(model)
    left = without(4, dropped)
    short.model.layers = nn.ModuleList(short.model.layers[i] for i in left)
    wanted, errors = by_hand(short, {f"model.layers.{j}.mlp.down_proj": list(range(i, 50)) for j, i in enumerate(left)})
    for j, i in enumerate(left):
        weight = wanted.get_parameter(f"model.layers.{j}.mlp.down_proj.weight")[:, without(64, range(i, 50))]
        name = f"model.layers.{i}.mlp.down_proj.weight"
        torch.testing.assert_close(small.get_parameter(name), weight, rtol=1e-4, atol=1e-4)
        assert result.maps[name] == pytest.approx(errors[f"model.layers.{j}.mlp.down_proj.weight"], rel=1e-3)
    assert len(result.maps) == len(left)


def test_a_dropped_block_behind_a_compensated_map() -> None:
    """OPT with a narrow embedding: the map that widens it is the first block's input."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, ffn_dim=64, max_position_embeddings=64,
        word_embed_proj_dim=20,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    gm = trace(model, batches()[0])
    groups = find_groups(gm)
    (narrow,) = [g for g in groups.values() if g.prunable and g.size == 20]
    path = "model.decoder.layers.0"
    plan = PrunePlan.from_keep(
        groups, {narrow.name: range(4, 20), "model.decoder.layers.1.ffn": range(30)}, drop=[path] if path in groups.blocks else []
    )
    small = rewrite(gm, plan)
    result = compensate(gm, small, plan, batches())
    assert plan.drop == (path,)
    assert all(after <= before for before, after in result.maps.values())
    assert {"model.decoder.project_in.weight", "model.decoder.layers.1.fc2.weight"} <= set(result.maps)


@pytest.mark.parametrize("biased", [False, True])
def test_bias_is_flaps(biased: bool) -> None:
    """Eq. 8: the mean of the removed features in the dense network, through the weights they had."""
    model = build("llama", attention_bias=biased, mlp_bias=biased)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gm, small, plan = pruned(model, LLAMA_GONE)
    sliced = {n: p.detach().clone() for n, p in small.named_parameters()}
    result = compensate(gm, small, plan, batches(), method="bias")
    names = {f"{path}.bias" for path in LLAMA_FEATURES}
    assert result == Compensation("bias", {}, {}, () if biased else tuple(f"{p}.bias" for p in LLAMA_FEATURES), COUNTED)
    check_bits(model, before)
    for path, gone in LLAMA_FEATURES.items():
        weight = before[f"{path}.weight"].double()[:, list(gone)]
        wanted = weight @ mean_of(model, path)[list(gone)] + (before[f"{path}.bias"] if biased else 0)
        torch.testing.assert_close(small.get_parameter(f"{path}.bias").double(), wanted, rtol=1e-4, atol=1e-5)
    for name, parameter in small.named_parameters():
        assert name in names or torch.equal(parameter, sliced[name])


def test_bias_of_conv1d() -> None:
    model = build("gpt2")
    gm, small, plan = pruned(model, GPT2_GONE)
    assert compensate(gm, small, plan, batches(), method="bias").added == ()
    for path, gone in GPT2_FEATURES.items():
        module: Any = model.get_submodule(path)
        wanted = module.bias.double() + mean_of(model, path)[list(gone)] @ module.weight.double()[list(gone)]
        torch.testing.assert_close(small.get_parameter(f"{path}.bias").double(), wanted, rtol=1e-4, atol=1e-5)


class Product(nn.Module):
    """A linear map that is no module and has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.out = nn.Linear(3, 5), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.enter(x)) @ self.out


def test_a_product_without_a_bias() -> None:
    x = torch.randn(30, 3)
    model = Product()
    gm = trace(model, (x,))
    groups = find_groups(gm)
    (name,) = [n for n, g in groups.items() if g.prunable]
    plan = PrunePlan.from_keep(groups, {name: [0, 2, 3]})
    small = rewrite(gm, plan)
    with pytest.raises(UsageError, match=r"^'out' has no bias and is no nn\.Linear: compensation='bias' has nowhere to put it$"):
        compensate(gm, small, plan, [{"x": x}], method="bias")
    compensate(gm, small, plan, [{"x": x}], ridge=1e-12)
    with torch.no_grad():
        h = torch.tanh(model.enter(x)).double()
        best = torch.linalg.lstsq(h[:, [0, 2, 3]], h @ model.out.double()).solution
    torch.testing.assert_close(small.get_parameter("out").double(), best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["least-squares", "bias"])
def test_bfloat16_weights(method: str) -> None:
    """The sums are wide, only the result is rounded."""
    model = build("llama").bfloat16()
    gm, small, plan = pruned(model, LLAMA_GONE)
    result = compensate(gm, small, plan, batches(), method=method)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    wide = copy.deepcopy(model).float()
    if method == "bias":
        for path, gone in LLAMA_FEATURES.items():
            lost = wide.get_parameter(f"{path}.weight").detach().double()[:, list(gone)] @ mean_of(wide, path)[list(gone)]
            actual = small.get_parameter(f"{path}.bias").double()
            torch.testing.assert_close(actual, lost, rtol=0.1, atol=0.05 * float(lost.abs().max()))
        return
    path = next(iter(LLAMA_FEATURES))
    wanted, _ = by_hand(wide, {path: LLAMA_FEATURES[path]})
    stay = without(48, LLAMA_FEATURES[path])
    expected: Any = wanted.get_parameter(f"{path}.weight")[:, stay]
    torch.testing.assert_close(small.get_parameter(f"{path}.weight").float(), expected, rtol=0.05, atol=0.02)
    assert all(after <= before for before, after in result.maps.values())
    assert any(after < before for before, after in result.maps.values())


def test_a_plan_that_prunes_the_hidden_size_too() -> None:
    """The maps that write the stream keep the rows of what is left of it."""
    model = build("llama")
    gone = {"model.hidden": [0, 9, 20, 33, 47], **LLAMA_GONE}
    gm, small, plan = pruned(model, gone)
    bare = rewrite(gm, plan)
    result = compensate(gm, small, plan, batches())
    rows = without(48, gone["model.hidden"])
    for name, parameter in small.named_parameters():
        assert parameter.shape == bare.get_parameter(name).shape
    stay = without(48, heads([1]))
    assert small.get_parameter("model.layers.0.self_attn.o_proj.weight").shape == (len(rows), len(stay))
    readers = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert set(result.maps) == {f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in readers}
    first = "model.layers.0.self_attn.q_proj"
    wanted, _ = by_hand(model, {first: gone["model.hidden"]})
    query = wanted.get_parameter(f"{first}.weight").detach()[:, rows]
    torch.testing.assert_close(small.get_parameter(f"{first}.weight"), query[: KV * RATIO * DIM][heads([0])], rtol=1e-4, atol=1e-4)


def test_bias_where_the_hidden_size_is_pruned_too() -> None:
    """Only the outputs that are left get one, here through weights that read the stream as well."""
    model = build("llama", mlp_bias=True)
    gone = {"model.hidden": [0, 9, 20], "model.layers.1.mlp.ffn": list(range(5, 30))}
    gm, small, plan = pruned(model, gone)
    result = compensate(gm, small, plan, batches(), method="bias")
    rows, path = without(48, gone["model.hidden"]), "model.layers.1.mlp.down_proj"
    lost = model.get_parameter(f"{path}.weight").detach().double()[:, gone["model.layers.1.mlp.ffn"]]
    wanted = lost @ mean_of(model, path)[gone["model.layers.1.mlp.ffn"]] + model.get_parameter(f"{path}.bias").detach()
    torch.testing.assert_close(small.get_parameter(f"{path}.bias").double(), wanted[rows], rtol=1e-4, atol=1e-5)
    assert set(result.added) == {f"model.layers.{i}.self_attn.{n}_proj.bias" for i in (0, 1) for n in "qkv"}


def test_nothing_to_do() -> None:
    model = build("llama")
    gm, small, plan = pruned(model, {"model.layers.head_dim": [1]})  # no linear map reads rotary pairs
    before = {n: p.detach().clone() for n, p in small.named_parameters()}
    for method in ("none", "bias", "least-squares"):
        result = compensate(gm, small, plan, batches(), method=method)
        assert result == Compensation(method, {}, {}, (), 0)
        assert result.to_json() == {"method": method, "maps": {}, "ridges": {}, "added": [], "tokens": 0}
        check_bits(small, before)


def test_progress() -> None:
    gm, small, plan = pruned(build("llama"), LLAMA_GONE)
    said: list[tuple[str, int, int]] = []
    compensate(gm, small, plan, batches(), progress=lambda *a: said.append(a))
    assert said == [("compensation", i, 4) for i in (1, 2, 3, 4)]


def test_errors() -> None:
    x = torch.randn(20, 4)
    _, gm, small, plan = two([1], x)

    def error(calibration: Sequence[Batch] = ({"x": x},), **options: Any) -> str:
        with pytest.raises(FxPruneError) as raised:
            compensate(gm, small, plan, calibration, **options)
        return str(raised.value)

    assert error(method="least-square") == (
        "unknown compensation 'least-square'; did you mean 'least-squares'? Choose from: bias, least-squares, none"
    )
    assert error(ridge=0.0) == "ridge must be positive, got 0.0"
    assert error([]) == "compensation is fitted to calibration batches, and there are none"
    nan = [{"x": x * float("nan")}]
    for method in ("bias", "least-squares"):
        assert error(nan, method=method) == (
            "what 'leave.weight' reads is NaN or infinite on the calibration text: nothing was pruned"
        )
    assert bool(torch.isfinite(small.get_parameter("leave.weight")).all())


def test_the_pass() -> None:
    gm, small, plan = pruned(build("llama"), LLAMA_GONE)
    again = rewrite(gm, plan)
    for method in ("bias", "least-squares"):
        result = CompensationPass(batches(), method=method, ridge=0.2)(small)
        assert result is not None
        assert result.modified
        wanted = compensate(gm, again, plan, batches(), method=method, ridge=0.2)
        assert small.meta[COMPENSATION] == wanted
        for name, parameter in again.named_parameters():
            assert torch.equal(small.get_parameter(name), parameter)
    with pytest.raises(UsageError, match=r"^unknown compensation 'biass'; did you mean 'bias'"):
        CompensationPass(batches(), method="biass")
    with pytest.raises(UsageError, match=r"^there is no pruned module to compensate: run a RewritePass first, and keep the dense"):
        CompensationPass(batches())(gm)
