"""What groups and blocks are worth: every number against the eager model with these weights zeroed, or that layer gone, by hand."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.passes.infra.pass_manager import PassManager

from fxprune import Knowledge, measure_knowledge, score, select
from fxprune.errors import FxPruneError, UsageError
from fxprune.knowledge import Removal
from fxprune.passes import DependencyPass, ImportancePass, KnowledgePass
from fxprune.passes.importance import SCORES
from fxprune.passes.knowledge import KNOWLEDGE

from .sensing import GPT2, LLAMA, MIXTRAL, Batch, Case, Edit, batches, case_of, eager_loss, untouched

EDITS = {"llama": LLAMA, "gpt2": GPT2, "mixtral": MIXTRAL}
STACKS = {"llama": "model.layers", "gpt2": "transformer.h", "mixtral": "model.layers"}


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {family: case_of(family) for family in EDITS}


@pytest.fixture(scope="module")
def llama(cases: dict[str, Case]) -> Case:
    return cases["llama"]


class Through(nn.Module):
    """In the place of a layer: hands on what enters it."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def without_layer(model: nn.Module, path: str) -> nn.Module:
    thin = copy.deepcopy(model)
    stack, _, number = path.rpartition(".")
    thin.get_submodule(stack)[int(number)] = Through()  # type: ignore[operator]
    return thin


def without_units(model: nn.Module, edit: Edit, units: Tensor) -> nn.Module:
    thin = copy.deepcopy(model)
    edit(thin, units)
    return thin


def expected_count(size: int, share: float) -> int:
    """At least one goes, and at least one stays."""
    return min(max(1, round(share * size)), size - 1)


@pytest.mark.parametrize("family", EDITS)
@pytest.mark.parametrize(("share", "take"), [(1.0, "least"), (0.5, "most"), (0.25, "least"), (0.001, "most")])
def test_every_loss_is_that_of_the_eager_model(family: str, share: float, take: str, cases: dict[str, Case]) -> None:
    case, edits = cases[family], EDITS[family]
    kinds = [*dict.fromkeys(case.groups[name].kind for name in edits), "layers"]
    with untouched(case.gm):
        found = measure_knowledge(case.gm, case.groups, batches(), kinds=kinds, share=share, take=take, scores=case.scores)
    rows = {row.name: row for row in found.rows}
    dense = eager_loss(case.model, batches())
    assert found.loss == pytest.approx(dense, abs=1e-5)
    changes = {}
    for name, edit in edits.items():
        row, size = rows[name], case.groups[name].size
        order = case.scores[name].argsort()
        count = expected_count(size, share)
        units = order[:count] if take == "least" else order.flip(0)[:count]
        after = eager_loss(without_units(case.model, edit, units), batches())
        assert (row.units, row.removed) == (size, count)
        assert row.loss_change == pytest.approx(after - dense, abs=2e-5), name
        assert row.perplexity_after == pytest.approx(math.exp(after), rel=1e-4)
        changes[name] = row.loss_change
    assert max(map(abs, changes.values())) > 1e-3  # far above what rounding could hide
    for layer in (0, 1):
        path = f"{STACKS[family]}.{layer}"
        after = eager_loss(without_layer(case.model, path), batches())
        row = rows[path]
        assert (row.kind, row.layer, row.units, row.removed) == ("layers", layer, 1, 1)
        assert row.loss_change == pytest.approx(after - dense, abs=2e-5), path
    assert all(row.perplexity_before == pytest.approx(math.exp(dense), rel=1e-5) for row in found.rows)
    assert all(row.divergence is None for row in found.rows)
    assert (found.share, found.take, found.by) == (share, take, "loss")


def divergence(dense: nn.Module, thin: nn.Module) -> float:
    """KL(dense || thin) of every token that is no padding, in double precision; the mean over samples."""

    def each(outputs: Any, batch: Batch) -> Tensor:
        wanted = outputs.logits.double().log_softmax(-1)
        found = thin(**batch).logits.double().log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1)[batch["attention_mask"].bool()].mean()

    return eager_loss(dense, batches(), each)


def test_divergence_is_that_of_the_eager_models_predictions_and_it_ranks(llama: Case) -> None:
    found = measure_knowledge(llama.gm, llama.groups, batches(), scores=llama.scores, by="divergence")
    wanted = {}
    for row in found.rows:
        if row.kind == "layers":
            thin = without_layer(llama.model, row.name)
        else:
            thin = without_units(llama.model, LLAMA[row.name], llama.scores[row.name].argsort()[: row.removed])
        wanted[row.name] = divergence(llama.model, thin)
        assert row.divergence == pytest.approx(wanted[row.name], rel=1e-4, abs=1e-7)
        change = eager_loss(thin, batches()) - eager_loss(llama.model, batches())
        assert row.loss_change == pytest.approx(change, abs=2e-5)
    groups = [row for row in found.ranked() if row.kind != "layers"]
    assert [row.name for row in groups] == sorted((r.name for r in groups), key=lambda name: -wanted[name])
    assert [row.rank for row in groups] == [1, 2, 3, 4]
    by_loss = measure_knowledge(llama.gm, llama.groups, batches(), scores=llama.scores)
    assert [r.name for r in by_loss.ranked()] != [r.name for r in found.ranked()]  # or nothing was tested


def test_what_is_measured_by_default(cases: dict[str, Case]) -> None:
    norm = "a norm, a softmax or a router looks at all of its units"
    for family, told in (
        ("llama", ["model.hidden"]),
        ("mixtral", ["model.hidden", *(f"model.layers.{i}.mlp.experts" for i in (0, 1))]),
    ):
        case = cases[family]
        found = measure_knowledge(case.gm, case.groups, batches()[:1], scores=case.scores)
        assert {row.kind for row in found.rows} == {"kv_heads", "ffn", "layers"}
        assert len(found.rows) == 6
        assert found.unmeasured == dict.fromkeys(told, norm)
        assert found.fingerprint == case.groups.fingerprint()


def test_a_group_that_cannot_lose_a_unit_is_listed_with_the_reason() -> None:
    case, name = case_of("llama"), "model.layers.0.mlp.ffn"
    case.groups._groups[name] = dataclasses.replace(case.groups[name], least=64)
    found = measure_knowledge(case.gm, case.groups, batches()[:1], scores=case.scores, kinds=["ffn"])
    assert [row.name for row in found.rows] == ["model.layers.1.mlp.ffn"]
    assert found.unmeasured == {name: "all of its units (64) must stay"}
    case.groups._groups[name] = dataclasses.replace(case.groups[name], least=24)
    found = measure_knowledge(case.gm, case.groups, batches()[:1], scores=case.scores, kinds=["ffn"])
    assert [(row.removed, row.units) for row in found.rows] == [(40, 64), (63, 64)]


class Convolutions(nn.Module):
    """Neither heads nor FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv1d(3, 10, 3), nn.Conv1d(10, 7, 1), nn.Conv1d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x).relu()).relu())


def test_a_model_with_neither_heads_nor_ffn_and_a_loss_of_its_own() -> None:
    from fxprune import find_groups, trace

    model, batch = Convolutions(), {"x": torch.randn(4, 3, 9), "y": torch.randn(4, 2, 7)}
    gm = trace(model, {"x": batch["x"]})
    groups = find_groups(gm)

    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs - batch["y"]).square().mean()

    found = measure_knowledge(gm, groups, [batch], criterion="l2", loss=loss, share=0.5)

    @torch.no_grad()
    def eager(model: nn.Module) -> float:
        return float(loss(model(batch["x"]), batch))

    assert [(row.kind, row.removed, row.units) for row in found.rows] == [("channels", 5, 10), ("channels", 4, 7)]
    for row, (writer, count) in zip(found.rows, ((model.one, 5), (model.two, 4)), strict=True):
        thin = copy.deepcopy(model)
        order = score(gm, groups, "l2")[row.name].argsort()
        mine = thin.one if writer is model.one else thin.two
        mine.weight.data[order[:count]] = 0
        assert mine.bias is not None
        mine.bias.data[order[:count]] = 0
        assert row.loss_change == pytest.approx(eager(thin) - eager(model), abs=1e-6)
        assert abs(row.loss_change) > 1e-4


def test_adapters_count_with_their_weights() -> None:
    """LoRAShear measures a model with adapters: the same as the model that they are merged into."""
    from peft import LoraConfig, get_peft_model

    from fxprune import find_groups, trace

    bare = case_of("llama")
    config = LoraConfig(
        r=5, lora_alpha=10, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(copy.deepcopy(bare.model), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    gm = trace(model.eval(), batches()[0])
    groups = find_groups(gm)
    prefix = "base_model.model."
    scores = {prefix + name: values for name, values in bare.scores.items()}
    found = measure_knowledge(gm, groups, batches(), scores=scores, share=0.5)
    merged = copy.deepcopy(model).merge_and_unload()
    dense = eager_loss(merged, batches())
    assert len(found.rows) == 6
    for row in found.rows:
        name = row.name.removeprefix(prefix)
        if row.kind == "layers":
            thin = without_layer(merged, name)
        else:
            thin = without_units(merged, LLAMA[name], bare.scores[name].argsort()[: row.removed])
        assert row.loss_change == pytest.approx(eager_loss(thin, batches()) - dense, abs=5e-5), name
    assert max(abs(row.loss_change) for row in found.rows) > 1e-2


def test_units_go_by_the_criterion_where_there_are_no_scores(llama: Case) -> None:
    options: dict[str, Any] = {"kinds": ["ffn"], "share": 0.25}
    found = measure_knowledge(llama.gm, llama.groups, batches(), criterion="taylor2", **options)
    same = measure_knowledge(
        llama.gm, llama.groups, batches(), scores=score(llama.gm, llama.groups, "taylor2", batches()), **options
    )
    other = measure_knowledge(llama.gm, llama.groups, batches(), scores=llama.scores, **options)
    assert found == same
    assert found.rows != other.rows


def broken(at: int) -> Callable[[Any, Batch], Tensor]:
    """A loss that is no number from one call on; the whole model takes the first three."""
    calls = 0

    def loss(outputs: Any, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        return outputs.logits.mean() * (math.nan if at <= calls < at + 3 else 1)

    return loss


def test_a_loss_that_is_no_number_is_infinite_and_matters_most(llama: Case) -> None:
    found = measure_knowledge(llama.gm, llama.groups, batches(), scores=llama.scores, loss=broken(7))
    first = next(row for row in found.rows if row.loss_change == math.inf)
    assert (first.rank, first.perplexity_after) == (1, math.inf)
    assert sum(math.isfinite(row.loss_change) for row in found.rows) == len(found.rows) - 1
    assert Knowledge.from_json(found.to_json()) == found
    with pytest.raises(
        FxPruneError, match="the loss of the whole model is nan: it or the text is damaged, and nothing was measured"
    ):
        measure_knowledge(llama.gm, llama.groups, batches(), scores=llama.scores, loss=broken(1))


def test_the_model_is_whole_again_after_an_error(llama: Case) -> None:
    calls = 0

    def loss(outputs: Any, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise RuntimeError("out of memory")
        return outputs.logits.mean()

    with untouched(llama.gm), pytest.raises(RuntimeError, match="out of memory"):
        measure_knowledge(llama.gm, llama.groups, batches(), scores=llama.scores, loss=loss)
    assert calls == 8


def test_progress_counts_what_was_taken_away(llama: Case) -> None:
    told: list[tuple[str, int, int]] = []
    measure_knowledge(
        llama.gm, llama.groups, batches(), scores=llama.scores, progress=lambda what, done, total: told.append((what, done, total))
    )
    assert told == [("knowledge", done, 6) for done in range(1, 7)]


def test_the_pass_leaves_what_the_function_returns(llama: Case) -> None:
    manager = PassManager([DependencyPass(), ImportancePass("l1"), KnowledgePass(batches(), share=0.5, kinds=["ffn", "layers"])])
    gm = manager(copy.copy(llama.gm)).graph_module
    wanted = measure_knowledge(
        llama.gm, llama.groups, batches(), share=0.5, kinds=["ffn", "layers"], scores=score(llama.gm, llama.groups, "l1")
    )
    assert gm.meta[KNOWLEDGE] == wanted
    for key in (KNOWLEDGE, SCORES):  # the pass's graph shares its annotations with the fixture's
        llama.gm.meta.pop(key, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kinds": ["heads"]}, "unknown kind 'heads'; did you mean 'kv_heads'"),
        ({"kinds": "ffn"}, "kinds are names such as kv_heads, ffn, layers, in a list, got 'ffn'"),
        ({"kinds": []}, "kinds are names such as kv_heads, ffn, layers, in a list, got \\[\\]"),
        ({"kinds": ["experts"]}, "this model has nothing of kind 'experts' that can be pruned; it has ffn, head_dim, hidden, "),
        (
            {"kinds": ["hidden"]},
            "nothing of this model can be taken away to measure it: model.hidden: a norm, a softmax or a router",
        ),
        ({"share": 0}, "the share of units to take away must be above 0 and at most 1, got 0"),
        ({"share": 1.5}, "the share of units to take away must be above 0 and at most 1, got 1.5"),
        ({"take": "last"}, "unknown take 'last'; did you mean 'least'\\? Choose from: least, most"),
        ({"by": "lost"}, "unknown measure 'lost'; did you mean 'loss'\\? Choose from: divergence, loss"),
        ({"scores": None, "criterion": "tailor1"}, "unknown criterion 'tailor1'; did you mean 'taylor1'"),
        (
            {"scores": {}},
            "there are no scores for group 'model.layers.0.self_attn.kv_heads': use another criterion, or leave kind 'kv_heads'",
        ),
    ],
    ids=str,
)
def test_refused(options: Mapping[str, Any], said: str, llama: Case) -> None:
    with pytest.raises(UsageError, match=said):
        measure_knowledge(llama.gm, llama.groups, batches(), **{"scores": llama.scores, **options})


def test_text_is_needed(llama: Case) -> None:
    with pytest.raises(UsageError, match="knowledge is measured on batches of text, and there are none"):
        measure_knowledge(llama.gm, llama.groups, [], scores=llama.scores)


@pytest.fixture(scope="module")
def measured(llama: Case) -> Knowledge:
    return measure_knowledge(llama.gm, llama.groups, batches(), scores=llama.scores)


def test_selection_keeps_what_is_protected_whole(llama: Case, measured: Knowledge) -> None:
    names = measured.protected(0.5)
    assert len(names) == 2
    options: dict[str, Any] = {"kinds": ["kv_heads", "ffn"], "units": 0.5, "widths": "per-layer"}
    plan = select(llama.groups, llama.scores, protect=names, **options)
    assert set(plan.keep) == {r.name for r in measured.rows if r.kind != "layers"} - set(names)
    assert set(select(llama.groups, llama.scores, **options).keep) > set(plan.keep)
    gone = select(llama.groups, llama.scores, protect=measured.protected(0.5, ["ffn"]), **options)
    (kept,) = measured.protected(0.5, ["ffn"])
    assert kept not in gone.keep
    assert len(gone.keep) == 3


def test_a_protected_group_contradicts_uniform_widths(llama: Case, measured: Knowledge) -> None:
    with pytest.raises(
        UsageError, match=r"widths='uniform' needs the same width in every layer, but some layers of .* are protected"
    ):
        select(llama.groups, llama.scores, units=0.5, kinds=["kv_heads", "ffn"], protect=measured.protected(0.25))


def test_a_protected_block_is_not_dropped_and_its_groups_stay_whole(llama: Case, measured: Knowledge) -> None:
    (block,) = measured.protected(0.5, ["layers"])
    plan = select(llama.groups, llama.scores, units=0.5, kinds=["layers"], protect=[block])
    assert plan.drop == tuple(p for p in llama.groups.blocks if p != block)
    plan = select(llama.groups, llama.scores, units=0.5, kinds=["ffn"], widths="per-layer", protect=[block])
    assert [name.startswith(f"{block}.") for name in plan.keep] == [False]


def test_knowledge_of_another_model(measured: Knowledge, cases: dict[str, Case]) -> None:
    measured.check(cases["llama"].groups)
    with pytest.raises(UsageError, match=r"the knowledge was measured on another model \(fingerprint [0-9a-f]{16}, this one has "):
        measured.check(cases["gpt2"].groups)


def test_a_row_says_where_it_lies(llama: Case) -> None:
    found = measure_knowledge(llama.gm, llama.groups, batches()[:1], kinds=["ffn", "head_dim"], scores=llama.scores)
    rows: dict[str, Removal] = {row.name: row for row in found.rows}
    assert rows["model.layers.1.mlp.ffn"].layer == 1
    assert rows["model.layers.head_dim"].layer is None
