"""Loss curves: every point against the eager model with these weights zeroed by hand."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.passes.infra.pass_manager import PassManager

from fxprune import find_groups, score, trace
from fxprune.errors import FxPruneError, UsageError
from fxprune.passes import DependencyPass, ImportancePass, SelectionPass
from fxprune.passes.batches import causal_loss
from fxprune.passes.dependency import PLAN
from fxprune.passes.importance import SCORES
from fxprune.passes.masking import measurable, without
from fxprune.passes.sensitivity import CURVES, SensitivityPass, measure_curves

from .sensing import (
    BERT,
    GPT2,
    LLAMA,
    MIXTRAL,
    Batch,
    Case,
    Edit,
    batches,
    case_of,
    check_curves,
    eager_loss,
    masked_loss,
    next_token_loss,
    untouched,
)
from .zoo import build, tokens


@pytest.fixture(scope="module")
def llama() -> Case:
    return case_of("llama")


@pytest.fixture(scope="module")
def gpt2() -> Case:
    return case_of("gpt2")


@pytest.fixture(scope="module")
def mixtral() -> Case:
    return case_of("mixtral")


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


def test_experts_are_measured_without_compensation(mixtral: Case) -> None:
    curves = measure_curves(mixtral.gm, mixtral.groups, mixtral.scores, batches(), names=list(MIXTRAL), compensated=True)
    check_curves(mixtral, curves, MIXTRAL, batches())


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
    assert error(levels=0) == "levels must be a whole number of at least 1, got 0"
    assert error(samples=0) == "samples must be a whole number of at least 1, got 0"
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
