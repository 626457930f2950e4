"""Loss curves: every point against the eager model with these weights zeroed, or compensated, by hand."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_manager import PassManager

from fxprune import compensate, find_groups, rewrite, score, trace
from fxprune.errors import FxPruneError, UsageError
from fxprune.groups import Groups
from fxprune.passes import DependencyPass, ImportancePass, SelectionPass
from fxprune.passes.batches import causal_loss
from fxprune.passes.dependency import PLAN
from fxprune.passes.importance import SCORES
from fxprune.passes.masking import measurable, without
from fxprune.passes.sensitivity import CURVES, SensitivityPass, measure_curves
from fxprune.plan import PrunePlan

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


@pytest.fixture(scope="module")
def llama() -> Case:
    return case_of("llama")


@pytest.fixture(scope="module")
def gpt2() -> Case:
    return case_of("gpt2")


@pytest.fixture(scope="module")
def mixtral() -> Case:
    return case_of("mixtral")


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


@pytest.mark.parametrize(("family", "edits"), [("llama", LLAMA), ("gpt2", GPT2), ("mixtral", MIXTRAL)])
def test_every_point_is_the_loss_of_the_eager_model(family: str, edits: Mapping[str, Edit], request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(family)
    with untouched(case.gm):
        curves = measure_curves(case.gm, case.groups, case.scores, batches())
    assert set(curves) == {n for n, g in case.groups.items() if g.prunable and not g.normalised}
    check_curves(case, curves, edits, batches())


def test_another_loss() -> None:
    case = case_of("bert")
    with untouched(case.gm):
        curves = measure_curves(case.gm, case.groups, case.scores, batches(), loss=masked_loss)
    check_curves(case, curves, BERT, batches(), masked_loss)


def test_divergence_is_that_of_the_eager_models_predictions(llama: Case) -> None:
    name, edit = next(iter(LLAMA.items()))
    curve = measure_curves(llama.gm, llama.groups, llama.scores, batches(), names=[name], levels=3, by="divergence")[name]
    assert curve[0] == (0, 0.0)
    assert len(curve) > 1
    for count, found in curve[1:]:
        thin = copy.deepcopy(llama.model)
        edit(thin, torch.argsort(llama.scores[name], stable=True)[:count])

        def divergence(outputs: Any, batch: Batch, thin: nn.Module = thin) -> Tensor:
            wanted = outputs.logits.double().log_softmax(-1)
            each = (wanted.exp() * (wanted - thin(**batch).logits.double().log_softmax(-1))).sum(-1)
            return each[batch["attention_mask"].bool()].mean()

        assert found == pytest.approx(eager_loss(llama.model, batches(), divergence), rel=1e-4, abs=1e-7)


def test_refused_measures(llama: Case) -> None:
    with pytest.raises(UsageError, match="unknown measure 'divergance'; did you mean 'divergence'"):
        measure_curves(llama.gm, llama.groups, llama.scores, batches(), by="divergance")
    with pytest.raises(UsageError, match="divergence compares predictions, not losses: leave loss= out, or say by='loss'"):
        measure_curves(llama.gm, llama.groups, llama.scores, batches(), by="divergence", loss=next_token_loss)


def test_levels(llama: Case) -> None:
    names = ["model.layers.0.mlp.ffn", "model.layers.0.self_attn.kv_heads", "model.layers.0.self_attn.query_groups"]
    for levels, wanted in (
        (1, ([0, 63], [0, 1], [0, 2])),
        (4, ([0, 16, 32, 47, 63], [0, 1], [0, 1, 2])),
        (100, (list(range(64)), [0, 1], [0, 1, 2])),
    ):
        curves = measure_curves(llama.gm, llama.groups, llama.scores, batches()[:1], names=names, levels=levels)
        assert tuple([n for n, _ in curves[name]] for name in names) == wanted
        assert list(curves) == [names[1], names[2], names[0]] or list(curves) == names  # whatever the graph's order
        assert all(curve[0] == (0, 0.0) for curve in curves.values())


def test_the_fewest_units_that_must_stay_are_respected(llama: Case) -> None:
    name = "model.layers.0.mlp.ffn"
    held = llama.groups[name]
    llama.groups._groups[name] = dataclasses.replace(held, least=24)
    try:
        curves = measure_curves(llama.gm, llama.groups, llama.scores, batches()[:1], names=[name])
        plan_of_least = [n for n, _ in curves[name]]
    finally:
        llama.groups._groups[name] = held
    assert plan_of_least == [0, 10, 20, 30, 40]


def test_samples_are_whole_batches_from_the_end_until_there_are_enough(llama: Case) -> None:
    name = "model.layers.1.mlp.ffn"
    for samples, used in ((1, 1), (2, 1), (3, 2), (4, 3), (None, 3), (99, 3)):
        curves = measure_curves(llama.gm, llama.groups, llama.scores, batches(), names=[name], samples=samples)
        check_curves(llama, curves, {name: LLAMA[name]}, batches()[-used:])


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


@pytest.mark.parametrize(("ridge", "apart"), [(0.03, True), (0.5, False)])
@pytest.mark.parametrize(("family", "edits"), [("llama", LLAMA), ("gpt2", GPT2)])
def test_compensated_points_are_the_loss_of_a_compensated_eager_model(
    family: str, edits: Mapping[str, Edit], ridge: float, apart: bool, request: pytest.FixtureRequest
) -> None:
    case: Case = request.getfixturevalue(family)
    """What the loss is measured on, the weights are not fitted to (unless there is nothing else)."""
    fitted, measured = (batches()[:2], batches()[2:]) if apart else (batches(), batches())
    options: dict[str, Any] = {"names": list(edits), "levels": 3, "samples": 2 if apart else None, "ridge": ridge}
    with untouched(case.gm):
        curves = measure_curves(case.gm, case.groups, case.scores, batches(), compensated=True, **options)
        plain = measure_curves(case.gm, case.groups, case.scores, batches(), **options)
    dense = eager_loss(case.model, measured)
    for name in (n for n in edits if n != "model.layers.head_dim"):
        order = case.scores[name].argsort()
        for count, change in curves[name][1:]:
            path, gone = features(name, order[:count])
            weight = case.model.get_parameter(f"{path}.weight").detach()
            columns = weight if family == "llama" else weight.mT
            new = compensated(columns, gram_of(case, path, fitted), gone, ridge)
            model = copy.deepcopy(case.model)
            model.get_parameter(f"{path}.weight").data = new if family == "llama" else new.mT
            assert change == pytest.approx(eager_loss(model, measured) - dense, abs=1e-4), (name, count)
        assert max(abs(a - b) for (_, a), (_, b) in zip(curves[name], plain[name], strict=True)) > 1e-3
    if family == "llama":  # no linear map reads rotary pairs: nothing can make up for them
        for (_, a), (_, b) in zip(curves["model.layers.head_dim"], plain["model.layers.head_dim"], strict=True):
            assert a == pytest.approx(b, abs=1e-6)


def test_experts_are_measured_without_compensation(mixtral: Case) -> None:
    curves = measure_curves(mixtral.gm, mixtral.groups, mixtral.scores, batches(), names=list(MIXTRAL), compensated=True)
    check_curves(mixtral, curves, MIXTRAL, batches())


class Forked(nn.Module):
    """Channels that a linear map and something else read."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 9), nn.Linear(9, 3)
        self.gains = nn.Parameter(torch.randn(9))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        out: Tensor = self.leave(h) + (h * self.gains).sum(-1, keepdim=True)
        return out


def test_units_that_reach_the_output_past_the_map() -> None:
    """What one map makes up for is not all that goes with the units: such a group is measured without compensation."""
    torch.manual_seed(0)
    model, x, y = Forked(), torch.randn(50, 4), torch.randn(50, 3)
    gm = trace(model, (x,))
    groups = find_groups(gm)
    (name,) = [n for n, g in groups.items() if g.prunable]
    scores = {name: torch.arange(9.0)}
    options: dict[str, Any] = {"loss": lambda out, batch: (out - y).square().mean(), "levels": 8}
    curve = measure_curves(gm, groups, scores, [{"x": x}], compensated=True, **options)[name]
    with torch.no_grad():
        h = torch.tanh(model.enter(x))
        for count, change in curve[1:]:
            out = (
                h[:, count:] @ model.leave.weight[:, count:].mT
                + model.leave.bias
                + (h * model.gains)[:, count:].sum(-1, keepdim=True)
            )
            wanted = (out - y).square().mean() - (model(x) - y).square().mean()
            assert change == pytest.approx(float(wanted), abs=1e-5), count


def test_everything_is_put_back_after_an_exception(llama: Case) -> None:
    for compensated in (False, True):
        for stop in (2, 7, 15):
            calls = [0]

            def fails(outputs: Any, batch: Batch, calls: list[int] = calls, stop: int = stop) -> Tensor:
                calls[0] += 1
                if calls[0] == stop:
                    raise RuntimeError("stop in the middle")
                return causal_loss(outputs, batch)

            with untouched(llama.gm), pytest.raises(RuntimeError, match="stop in the middle"):
                measure_curves(llama.gm, llama.groups, llama.scores, batches()[:1], loss=fails, compensated=compensated)


def test_without_owns_up_to_tied_and_square_parameters() -> None:
    """A unit that owns rows and columns of one matrix: both are put back, the crossing too."""
    square = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2))
    model = build("llama")  # its embedding is its output projection
    for module, inputs in ((square, (torch.randn(2, 3),)), (model, {"input_ids": tokens(2, 5)})):
        gm = trace(module, inputs)
        groups = find_groups(gm)
        for group in (g for g in groups.values() if g.prunable):
            with untouched(gm), without(groups, group, torch.tensor([0, group.size - 1])):
                for member in (m for m in group.members if m.trainable):
                    parameter = dict(gm.named_parameters())[member.name]
                    assert not bool(parameter.index_select(member.dim, member.indices([0, group.size - 1])).any())


PLANNED = {
    "model.layers.0.self_attn.kv_heads": 1,
    "model.layers.0.self_attn.query_groups": 1,
    "model.layers.0.mlp.ffn": 20,
    "model.layers.1.mlp.ffn": 33,
}


def planned(case: Case, counts: Mapping[str, int]) -> PrunePlan:
    """The least important units of some groups go."""
    return PrunePlan.from_keep(case.groups, {n: case.scores[n].argsort()[c:] for n, c in counts.items()})


def test_beside_a_plan(llama: Case) -> None:
    """All other groups are pruned as the plan says, and the change is from its loss."""
    plan = planned(llama, {**PLANNED, "model.layers.head_dim": 1})
    names = [*PLANNED, "model.layers.head_dim", "model.layers.1.self_attn.kv_heads"]
    with untouched(llama.gm):
        curves = measure_curves(llama.gm, llama.groups, llama.scores, batches(), names=names, levels=3, plan=plan)

    def loss(counts: Mapping[str, int]) -> float:
        model = copy.deepcopy(llama.model)
        for name, count in counts.items():
            LLAMA[name](model, llama.scores[name].argsort()[:count])
        return eager_loss(model, batches())

    full = {**PLANNED, "model.layers.head_dim": 1}
    base = loss(full)
    for name, curve in curves.items():
        assert {0, full.get(name, 0), llama.groups[name].size - 1} <= {n for n, _ in curve}
        assert curve == sorted(curve)
        for count, change in curve:
            assert change == pytest.approx(loss({**full, name: count}) - base, abs=2e-5), (name, count)


def test_beside_a_compensated_plan(llama: Case) -> None:
    """The others' maps keep the weights that make up for the plan; only the map that reads the group is solved again."""
    plan = planned(llama, PLANNED)
    with untouched(llama.gm):
        curves = measure_curves(
            llama.gm, llama.groups, llama.scores, batches(), names=list(PLANNED), levels=2, plan=plan, compensated=True, ridge=0.03
        )
    maps: dict[str, dict[str, int]] = {}
    for name, count in PLANNED.items():
        maps.setdefault(features(name, torch.tensor([0]))[0], {})[name] = count

    def gone(counts: Mapping[str, int]) -> Tensor:
        return torch.unique(torch.cat([features(n, llama.scores[n].argsort()[:c])[1] for n, c in counts.items()]))

    model = copy.deepcopy(llama.model)
    grams = {}
    for path, counts in maps.items():  # in the order of the network
        grams[path] = gram_of(dataclasses.replace(llama, model=model), path, batches())
        model.get_parameter(f"{path}.weight").data = compensated(
            model.get_parameter(f"{path}.weight").detach(), grams[path], gone(counts), 0.03
        )
    base = eager_loss(model, batches())
    for path, counts in maps.items():
        dense: Any = llama.model.get_parameter(f"{path}.weight").detach()
        for name in counts:
            for count, change in curves[name]:
                other = copy.deepcopy(model)
                other.get_parameter(f"{path}.weight").data = compensated(dense, grams[path], gone({**counts, name: count}), 0.03)
                assert change == pytest.approx(eager_loss(other, batches()) - base, abs=1e-4), (name, count)
            assert (PLANNED[name], 0.0) in curves[name]


def test_only_the_next_levels_beyond_a_plan(llama: Case) -> None:
    plan = planned(llama, {"model.layers.0.mlp.ffn": 20})
    names = ["model.layers.0.mlp.ffn", "model.layers.1.mlp.ffn"]
    options: dict[str, Any] = {"names": names, "levels": 7, "plan": plan}  # steps of 9 of the 63 units that may go
    with untouched(llama.gm):
        everything = measure_curves(llama.gm, llama.groups, llama.scores, batches(), **options)
        curves = measure_curves(llama.gm, llama.groups, llama.scores, batches(), **options, ahead=2)
    assert [n for n, _ in curves[names[0]]] == [20, 27, 36]
    assert [n for n, _ in curves[names[1]]] == [0, 9, 18]
    for name in names:
        assert set(curves[name]) < set(everything[name])
    emptied = planned(llama, {"model.layers.0.mlp.ffn": 63})
    assert measure_curves(llama.gm, llama.groups, llama.scores, batches(), names=names[:1], plan=emptied, ahead=1) == {
        names[0]: [(63, 0.0)]
    }


LANES = {
    "both": ["model.layers.0.mlp.ffn", "model.layers.1.mlp.ffn"],
    "heads": ["model.layers.0.self_attn.kv_heads", "model.layers.1.self_attn.kv_heads"],
    "alone": ["model.layers.1.self_attn.query_groups"],
}


@pytest.mark.parametrize("compensation", ["none", "least-squares"])
def test_groups_that_lose_units_together(llama: Case, compensation: str) -> None:
    """A lane's points are the losses of what `rewrite` and `compensate` make of the same units."""
    plan = planned(llama, dict.fromkeys(LANES["both"], 11))
    calibration = batches()
    options: dict[str, Any] = {"levels": 3, "plan": plan, "compensated": compensation != "none"}
    with untouched(llama.gm):
        curves = measure_curves(llama.gm, llama.groups, llama.scores, calibration, lanes=LANES, **options)

    def loss(counts: Mapping[str, int]) -> float:
        chosen = planned(llama, counts)
        small = rewrite(llama.gm, chosen)
        compensate(llama.gm, small, chosen, calibration, method=compensation)
        values = [float(next_token_loss(small(**b), b)) * len(b["input_ids"]) for b in calibration]
        return sum(values) / sum(len(b["input_ids"]) for b in calibration)

    base = dict.fromkeys(LANES["both"], 11)
    with torch.no_grad():
        assert [n for n, _ in curves["both"]] == [0, 11, 21, 42, 63]
        for lane, names in LANES.items():
            if compensation != "none" and lane == "alone":
                continue  # of a group alone only the map that reads it is solved again
            for count, change in curves[lane]:
                assert change == pytest.approx(loss({**base, **dict.fromkeys(names, count)}) - loss(base), abs=1e-4), (lane, count)
    assert dict(curves["both"])[63] > 1e-3


def test_lanes_that_cannot_be_measured(llama: Case) -> None:
    def refused(said: str, **options: Any) -> None:
        with pytest.raises(UsageError, match=said):
            measure_curves(llama.gm, llama.groups, llama.scores, batches(), **options)

    mixed = {"odd": ["model.layers.0.mlp.ffn", "model.layers.0.self_attn.kv_heads"]}
    refused("^the groups of 'odd' must be of one size, and lose equally many units by the plan$", lanes=mixed)
    plan = planned(llama, {"model.layers.0.mlp.ffn": 20})
    refused("^the groups of 'both' must be of one size, and lose equally many", lanes=LANES, plan=plan)
    refused("^names= and lanes= both say what to measure: give one of them$", lanes=LANES, names=["model.layers.0.mlp.ffn"])
    refused("^ahead must be at least 1, got 0$", ahead=0)


def test_a_plan_that_drops_layers(llama: Case) -> None:
    plan = PrunePlan.from_keep(llama.groups, {}, drop=["model.layers.0"])
    with pytest.raises(
        UsageError, match=r"^sensitivity is measured beside pruned units, not beside dropped layers: the plan drops"
    ):
        measure_curves(llama.gm, llama.groups, llama.scores, batches(), plan=plan)


def test_progress(llama: Case) -> None:
    said: list[tuple[str, int, int]] = []
    names = [n for n in LLAMA if n.endswith("ffn")]
    measure_curves(llama.gm, llama.groups, llama.scores, batches()[:1], names=names, progress=lambda *a: said.append(a), levels=1)
    assert said == [("sensitivity", 1, 2), ("sensitivity", 2, 2)]


def test_refusals(llama: Case) -> None:
    def error(calibration: Sequence[Batch] | None = None, scores: Mapping[str, Tensor] | None = None, **options: Any) -> str:
        with pytest.raises((UsageError, FxPruneError)) as raised:
            measure_curves(
                llama.gm,
                llama.groups,
                llama.scores if scores is None else scores,
                batches()[:1] if calibration is None else calibration,
                **options,
            )
        return str(raised.value)

    assert error([]) == "sensitivity is measured on calibration batches, and there are none"
    assert error(levels=0) == "levels must be at least 1, got 0"
    assert error(samples=0) == "samples must be at least 1, got 0"
    assert error(names=["model.hidden"]) == (
        "the sensitivity of group 'model.hidden' cannot be measured: a norm, a softmax or a router looks at all of its units"
    )
    pinned = next(g for g in llama.groups.values() if not g.prunable)
    assert error(names=[pinned.name]) == (
        f"the sensitivity of group '{pinned.name}' cannot be measured: it cannot be pruned ({pinned.reason})"
    )
    assert error(scores={}, names=["model.layers.0.mlp.ffn"]) == (
        "there are no scores for group 'model.layers.0.mlp.ffn'; score the model first"
    )
    assert error(names=["model.layers.0.mlp.fnn"]).startswith(
        "there is no prune group 'model.layers.0.mlp.fnn'; did you mean 'model.layers.0.mlp.ffn'?"
    )
    assert error(loss=lambda out, batch: out.logits.sum() * float("nan")) == "the calibration loss is nan: nothing was pruned"
    assert "model.hidden" not in {g.name for g in measurable(llama.groups)}


def test_groups_without_scores_are_left_out(llama: Case) -> None:
    name = "model.layers.0.mlp.ffn"
    assert set(measure_curves(llama.gm, llama.groups, {name: llama.scores[name]}, batches()[:1], levels=1)) == {name}


def test_the_pass_in_a_pass_manager(llama: Case) -> None:
    gm = trace(llama.model, batches()[0])
    with pytest.raises(UsageError, match=r"^no scores on the graph: run an ImportancePass before the SensitivityPass$"):
        SensitivityPass(batches())(gm)
    passes: list[Any] = [
        DependencyPass(),
        ImportancePass("kfac", batches()),
        SensitivityPass(batches(), kinds=["ffn"], levels=2, samples=1),
        SelectionPass(ratio=0.1, kinds=["ffn"], ranking="measured", widths="per-layer"),
    ]
    out = PassManager(passes)(gm).graph_module
    names = [n for n, g in llama.groups.items() if g.kind == "ffn"]
    scores = score(llama.gm, llama.groups, criterion="kfac", calibration=batches())
    assert out.meta[CURVES] == measure_curves(llama.gm, llama.groups, scores, batches(), names=names, levels=2, samples=1)
    assert set(out.meta[SCORES]) == set(scores)
    assert set(out.meta[PLAN].keep) <= set(names)
    every = SensitivityPass(batches()[:1], levels=1)(out)
    assert every is not None
    assert set(every.graph_module.meta[CURVES]) == {g.name for g in measurable(llama.groups) if g.name in scores}
