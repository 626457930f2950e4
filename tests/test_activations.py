"""Activation criteria: moments and scores against plain hooks and autograd on the eager model, formulas written out by hand."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune import find_groups, score, trace
from fxprune.errors import FxPruneError, UsageError
from fxprune.groups import Groups
from fxprune.passes.activations import Moments, collect_moments
from fxprune.passes.batches import causal_loss
from fxprune.passes.consumers import find_consumers

from .zoo import build, tokens

KV, RATIO, DIM, FFN = 2, 3, 8, 64  # of the zoo's llama
HEADS = 6  # of its GPT-2

Batch = Mapping[str, Tensor]


def batches() -> list[dict[str, Tensor]]:
    """Two batches of different shapes, with padding on either side."""
    first, second = tokens(3, 7, seed=1), tokens(2, 9, seed=2)
    left, right = torch.ones_like(first), torch.ones_like(second)
    left[0, :3] = left[2, :1] = 0
    right[1, 5:] = 0
    return [{"input_ids": first, "attention_mask": left}, {"input_ids": second, "attention_mask": right}]


@dataclass
class Traced:
    model: nn.Module
    gm: GraphModule
    groups: Groups


def traced(family: str, **options: Any) -> Traced:
    model = build(family, attention="eager", **options)
    gm = trace(model, batches()[0])
    return Traced(model, gm, find_groups(gm))


@pytest.fixture(scope="module")
def llama() -> Traced:
    return traced("llama")


@pytest.fixture(scope="module")
def gpt2() -> Traced:
    return traced("gpt2")


@dataclass
class Read:
    """What a module read, token by token, and the gradient of the loss summed over tokens."""

    x: Tensor
    gradient: Tensor


def eager_reads(model: nn.Module, paths: Sequence[str], calibration: Sequence[Batch], *, padding: bool = False) -> dict[str, Read]:
    """With plain hooks and plain autograd, in double precision, padding left out (unless asked for)."""
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {path: ([], []) for path in paths}
    for batch in calibration:
        read: dict[str, Tensor] = {}

        def keep(path: str, read: dict[str, Tensor] = read) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                args[0].retain_grad()
                read[path] = args[0]

            return hook

        handles = [model.get_submodule(path).register_forward_pre_hook(keep(path)) for path in paths]
        logits = model(**batch).logits
        target = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), reduction="sum").backward()
        for handle in handles:
            handle.remove()
        model.zero_grad()
        counted = batch["attention_mask"].flatten().bool() | padding
        for path, value in read.items():
            assert value.grad is not None
            found[path][0].append(value.detach().flatten(0, -2)[counted].double())
            found[path][1].append(value.grad.flatten(0, -2)[counted].double())
    return {path: Read(torch.cat(x), torch.cat(g)) for path, (x, g) in found.items()}


def close(actual: Tensor, wanted: Tensor, rtol: float = 1e-4) -> None:
    """Equal but for float32 rounding."""
    wanted = wanted.double()
    torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=rtol / 10 * float(wanted.abs().max()))


def moments_of(case: Traced, calibration: Sequence[Batch], **options: Any) -> dict[str, Moments]:
    return collect_moments(case.gm, find_consumers(case.gm, case.groups), calibration, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_moments_equal_those_of_plain_hooks(family: str, request: pytest.FixtureRequest) -> None:
    case: Traced = request.getfixturevalue(family)
    moments = moments_of(case, batches(), loss=causal_loss)
    paths = [name.removesuffix(".weight") for name in moments]
    inner = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    outer = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert sorted(paths) == sorted(
        [f"model.layers.{i}.{'mlp' if n in inner[4:] else 'self_attn'}.{n}" for i in (0, 1) for n in inner]
        if family == "llama"
        else [f"transformer.h.{i}.{n}" for i in (0, 1) for n in outer]
    )
    for path, read in eager_reads(case.model, paths, batches()).items():
        found = moments[f"{path}.weight"]
        assert found.tokens == len(read.x) == 31  # of 39, 8 are padding
        close(found.mean, read.x.mean(0))
        close(found.power, read.x.square().mean(0))
        close(found.variance, read.x.var(0, unbiased=False))
        close(found.sensitivity, read.gradient.square().mean(0))


def test_without_a_loss_there_are_no_gradients(llama: Traced) -> None:
    with_loss, without = moments_of(llama, batches(), loss=causal_loss), moments_of(llama, batches())
    for name, moments in without.items():
        close(moments.power, with_loss[name].power, 1e-6)
        assert not bool(moments.gradient.any())
        assert bool(with_loss[name].gradient.any())


def test_moments_do_not_depend_on_the_batch_size(llama: Traced) -> None:
    ids = tokens(6, 8, seed=3)
    mask = torch.ones_like(ids)
    mask[1, 4:] = mask[4, 2:] = 0

    def batched(size: int) -> list[dict[str, Tensor]]:
        return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(size), mask.split(size), strict=True)]

    whole, parts = (moments_of(llama, batched(size), loss=causal_loss) for size in (6, 4))
    for name, moments in whole.items():
        assert moments.tokens == parts[name].tokens == 48 - 4 - 6
        for what in ("total", "square", "gradient"):
            close(getattr(parts[name], what), getattr(moments, what))


def test_labels_set_the_scale_of_the_gradient(llama: Traced) -> None:
    """The loss is a mean over the labels that count, so that many tokens it is multiplied by."""
    batch = {k: v[:1] for k, v in batches()[1].items()}
    labels = batch["input_ids"].clone()
    labels[0, 3:] = -100
    labels[0, 0] = -100  # nothing predicts the first token
    name = "model.layers.1.mlp.down_proj"
    found = moments_of(llama, [{**batch, "labels": labels}], loss=causal_loss)[f"{name}.weight"]
    read: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        read.append(args[0])

    handle = llama.model.get_submodule(name).register_forward_pre_hook(hook)
    logits = llama.model(**batch).logits[0]
    (-torch.log_softmax(logits, -1)[[0, 1], labels[0, 1:3]].sum()).backward()
    handle.remove()
    llama.model.zero_grad()
    assert read[0].grad is not None
    close(found.gradient, read[0].grad[0].double().square().sum(0))


def slices(case: Traced) -> dict[str, dict[str, Tensor]]:
    """For each group that output and down projections read, the features that each unit owns, ``[units, features]``."""
    found: dict[str, dict[str, Tensor]] = {}
    for layer in (0, 1):
        if "llama" in type(case.model).__name__.lower():
            at = f"model.layers.{layer}"
            columns = torch.arange(KV * RATIO * DIM).view(KV, RATIO, DIM)
            found[f"{at}.self_attn.o_proj"] = {
                f"{at}.self_attn.kv_heads": columns.flatten(1),
                f"{at}.self_attn.query_groups": columns.movedim(1, 0).flatten(1),
                f"{at}.self_attn.head_dim": columns.movedim(2, 0).flatten(1),
            }
            found[f"{at}.mlp.down_proj"] = {f"{at}.mlp.ffn": torch.arange(FFN)[:, None]}
        else:
            at = f"transformer.h.{layer}"
            columns = torch.arange(HEADS * DIM).view(HEADS, DIM)
            found[f"{at}.attn.c_proj"] = {f"{at}.attn.kv_heads": columns, f"{at}.attn.head_dim": columns.mT}
            found[f"{at}.mlp.c_proj"] = {f"{at}.mlp.ffn": torch.arange(192)[:, None]}
    return found


def by_formula(criterion: str, weight: Tensor, read: Read) -> Tensor:
    """One number a feature; the weight is ``[outputs, features]``."""
    norm = read.x.norm(dim=0) / len(read.x) ** 0.5
    match criterion:
        case "wanda":  # eq. 1, the norm as a mean over tokens; summed over outputs as in Wanda-sp
            return (weight.abs() * norm).sum(0)
        case "flap":  # eq. 5
            return read.x.var(0, unbiased=False) * weight.norm(dim=0) ** 2
        case _:
            return read.x.square().mean(0) * read.gradient.square().mean(0)


@pytest.mark.parametrize("criterion", ["wanda", "flap", "kfac"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_equal_the_formula(family: str, criterion: str, request: pytest.FixtureRequest) -> None:
    case: Traced = request.getfixturevalue(family)
    scores = score(case.gm, case.groups, criterion=criterion, calibration=batches())
    owned = slices(case)
    reads = eager_reads(case.model, list(owned), batches())
    for path, groups in owned.items():
        weight = case.model.get_parameter(f"{path}.weight").detach().double()
        features = by_formula(criterion, weight if family == "llama" else weight.mT, reads[path])
        for name, units in groups.items():
            assert scores[name].dtype == torch.float32
            close(scores[name], features[units].sum(1))
    left_out = {n for n, g in case.groups.items() if g.prunable} - set(scores)
    if family == "llama":  # rotary pairs: queries and keys meet each other, no linear map
        assert left_out == {"model.layers.head_dim"}
    else:  # the same without rotation
        assert left_out == {"transformer.h.0.attn.c_attn.head_dim", "transformer.h.1.attn.c_attn.head_dim"}


def test_a_group_that_many_maps_read_joins_their_scores(llama: Traced) -> None:
    """The hidden dimension: seven kinds of maps, of which five read it; those that write it do not count."""
    paths = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkv"]
    paths += [f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up")]
    reads = eager_reads(llama.model, paths, batches())
    each = torch.stack([by_formula("wanda", llama.model.get_parameter(f"{p}.weight").detach().double(), reads[p]) for p in paths])
    for aggregation, wanted in (("sum", each.sum(0)), ("max", each.amax(0)), ("mean", each.mean(0))):
        scores = score(llama.gm, llama.groups, criterion="wanda", calibration=batches(), aggregation=aggregation)
        close(scores["model.hidden"], wanted)


def test_a_mixture_is_scored_where_a_linear_map_reads_it() -> None:
    case = traced("mixtral")
    scores = score(case.gm, case.groups, criterion="wanda", calibration=batches())
    kinds = {case.groups[n].kind for n in scores}
    assert kinds == {"hidden", "kv_heads", "query_groups", "head_dim"}  # the experts' weights have three dimensions


def test_an_untied_output_projection_counts_and_a_tied_one_does_not(llama: Traced) -> None:
    assert "lm_head.weight" not in moments_of(llama, batches())  # it is the embedding too
    assert "lm_head.weight" in moments_of(traced("llama", tied=False), batches())


class Shared(nn.Module):
    """One layer used twice, and an output map of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.twice, self.leave = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.leave(self.twice(torch.tanh(self.twice(torch.tanh(self.enter(x))))))
        return out


def test_a_layer_that_is_used_twice_is_left_out() -> None:
    gm = trace(Shared(), (torch.randn(4, 3),))
    assert [c.weight for c in find_consumers(gm, find_groups(gm))] == ["leave.weight"]


class Matmuls(nn.Module):
    """The forms a linear map can take in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 5)
        self.plain, self.turned, self.leave = (nn.Parameter(torch.randn(s)) for s in ((5, 4), (6, 4), (6, 2)))
        self.bias = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x)) @ self.plain
        x = torch.mm(torch.tanh(x), self.turned.t())
        return torch.addmm(self.bias, torch.tanh(x), self.leave)


def test_matrix_products_are_linear_maps_too() -> None:
    model = Matmuls()
    gm = trace(model, (torch.randn(7, 3),))
    found = {c.weight: c.dim for c in find_consumers(gm, find_groups(gm))}
    assert found == {"plain": 0, "turned": 1, "leave": 0}
    x = torch.randn(7, 3)
    moments = collect_moments(gm, find_consumers(gm, find_groups(gm)), [{"x": x}])
    with torch.no_grad():
        first = torch.tanh(model.enter(x))
        second = torch.tanh(first @ model.plain)
        third = torch.tanh(second @ model.turned.mT)
    for name, value in (("plain", first), ("turned", second), ("leave", third)):
        close(moments[name].power, value.square().mean(0))


def test_half_precision_is_summed_in_float32() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).half()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(100)
    gm = trace(model, (torch.randn(2, 4).half(),))
    x = torch.randn(300, 4).half()
    (moments,) = collect_moments(gm, find_consumers(gm, find_groups(gm)), [{"input": x}]).values()
    with torch.no_grad():
        read = model[0](x).double()
    assert float(read.square().sum(0).max()) > 65504  # more than float16 holds
    close(moments.power, read.square().mean(0), 1e-3)


def test_nothing_is_changed(llama: Traced) -> None:
    parameters = dict(llama.gm.named_parameters())
    frozen = parameters["model.norm.weight"]
    frozen.requires_grad_(False)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in parameters.items()}

    def fails(outputs: Any, batch: Batch) -> Tensor:
        raise RuntimeError("stop in the middle")

    def unchanged() -> None:
        for name, parameter in parameters.items():
            assert torch.equal(parameter, before[name][0])
            assert parameter.requires_grad == before[name][1]
            assert parameter.grad is None

    try:
        score(llama.gm, llama.groups, criterion="kfac", calibration=batches())
        unchanged()
        with pytest.raises(RuntimeError, match="stop in the middle"):
            score(llama.gm, llama.groups, criterion="kfac", calibration=batches(), loss=fails)
        unchanged()
        with torch.no_grad():  # gradients are taken inside, whatever the caller does
            scores = score(llama.gm, llama.groups, criterion="kfac", calibration=batches())
        assert bool(scores["model.layers.0.mlp.ffn"].any())
        unchanged()
    finally:
        frozen.requires_grad_(True)


def test_another_loss(llama: Traced) -> None:
    def flat(outputs: Any, batch: Batch) -> Tensor:
        return outputs.logits.sum() * 0.0

    scores = score(llama.gm, llama.groups, criterion="kfac", calibration=batches(), loss=flat)
    assert all(not bool(s.any()) for s in scores.values())


def test_errors(llama: Traced, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UsageError, match=r"^criterion 'wanda' needs calibration batches, and there are none$"):
        score(llama.gm, llama.groups, criterion="wanda")
    with pytest.raises(FxPruneError, match=r"^the calibration loss is nan: nothing was pruned$"):
        score(llama.gm, llama.groups, criterion="kfac", calibration=batches(), loss=lambda out, b: out.logits.sum() * float("nan"))
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    gm = trace(conv, (torch.randn(2, 3, 8, 8),))
    with pytest.raises(
        UsageError, match=r"^criterion 'flap' looks at what linear maps read, and none here contracts a prunable group$"
    ):
        score(gm, find_groups(gm), criterion="flap", calibration=[{"input": torch.randn(2, 3, 8, 8)}])
    maskless = trace(llama.model, {"input_ids": tokens(2, 7)})
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fxprune"):
        score(maskless, find_groups(maskless), criterion="wanda", calibration=batches())
    assert caplog.messages == ["the model was traced without attention_mask: padding in the calibration batches is attended to"]


class Overflow(nn.Module):
    """Finite weights and inputs, and an activation that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.leave(torch.exp(self.enter(x) * 1000))
        return out


def test_activations_that_are_not_finite_are_an_error() -> None:
    torch.manual_seed(0)
    gm = trace(Overflow(), (torch.randn(4, 3),))
    with pytest.raises(FxPruneError, match=r"^what 'leave\.weight' reads is NaN or infinite on the calibration text: nothing was"):
        score(gm, find_groups(gm), criterion="wanda", calibration=[{"x": torch.randn(4, 3)}])
