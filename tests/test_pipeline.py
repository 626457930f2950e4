"""The pipeline runner: what it prints, what it says when a pass fails, and recipes as pipelines."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import fxprune
from fxprune import Pipeline
from fxprune.errors import FxPruneError, PlanError, UsageError, VerificationError
from fxprune.passes import CompensationPass, DependencyPass, ImportancePass, KnowledgePass, RewritePass, SelectionPass, VerifyPass

from .zoo import build, tokenizer, tokens

INPUTS = {"input_ids": tokens(2, 16)}
SMALL: dict[str, Any] = {"samples": 6, "length": 16, "batch_size": 2}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("llama")


@pytest.fixture(scope="module")
def base(model: nn.Module) -> GraphModule:
    return fxprune.trace(model, INPUTS)


@pytest.fixture
def traced(base: GraphModule) -> GraphModule:
    """A trace of its own for each test, without any pass's annotations."""
    made = copy.deepcopy(base)
    made.meta = {key: value for key, value in made.meta.items() if not key.startswith("fxprune.")}
    return made


def prune_passes() -> list[Any]:
    return [DependencyPass(), ImportancePass("l1"), SelectionPass(ratio=0.2), RewritePass(), VerifyPass(inputs=INPUTS)]


def copied(gm: GraphModule) -> GraphModule:
    """Another module with an equal graph; ``gm.meta`` is lost, as in most passes that make a module."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    graph.set_codegen(gm.graph._codegen)
    return GraphModule(gm, graph)


def scale_in_place(gm: GraphModule) -> None:
    with torch.no_grad():
        gm.get_parameter("model.norm.weight").mul_(2)
        gm.get_parameter("model.norm.weight").div_(2)


def look_only(gm: GraphModule) -> None:
    assert len(gm.graph.nodes)


class Clone(PassBase):
    """A third-party pass that adds a node."""

    def call(self, graph_module: GraphModule) -> PassResult:
        node = next(n for n in graph_module.graph.nodes if n.target is torch.ops.aten.silu.default)
        with graph_module.graph.inserting_after(node):
            new = graph_module.graph.call_function(torch.ops.aten.clone.default, (node,))
        node.replace_all_uses_with(new, lambda user: user is not new)
        new.meta = dict(node.meta)
        graph_module.recompile()
        return PassResult(graph_module, True)


def test_a_row_for_each_pass(traced: GraphModule) -> None:
    before = (len(traced.graph.nodes), sum(p.numel() for p in traced.parameters()))
    result = Pipeline([look_only, scale_in_place, Clone(), copied, *prune_passes()])(traced)
    names = [row.name for row in result.rows]
    assert names[:5] == ["look_only", "scale_in_place", "Clone", "copied", "DependencyPass"]
    assert [row.modified for row in result.rows] == [False, True, True, True, False, False, False, True, False]
    added, rewritten = result.rows[2], result.rows[7]
    assert added.nodes == (before[0], before[0] + 1)
    assert rewritten.parameters == (before[1], sum(p.numel() for p in result.graph_module.parameters()))
    assert rewritten.nodes == (before[0] + 1, len(result.graph_module.graph.nodes))
    assert all(row.parameters == (before[1], before[1]) for row in result.rows[:7])
    for row, following in zip(result.rows, result.rows[1:], strict=False):
        assert (row.nodes[1], row.parameters[1]) == (following.nodes[0], following.parameters[0])
    assert result.modified
    assert result.seconds == pytest.approx(sum(row.seconds for row in result.rows))
    assert result.graph_module.meta["fxprune.verify"].ok
    with pytest.raises(AttributeError, match="cannot assign to field 'rows'"):
        result.rows = ()  # type: ignore[misc]


def test_the_table_is_numbered_and_says_what_changed(traced: GraphModule) -> None:
    result = Pipeline([DependencyPass(), Clone()])(traced)
    first, second = (line.split() for line in str(result).splitlines() if line.strip().startswith(("1 ", "2 ")))
    n, p = len(traced.graph.nodes), f"{sum(q.numel() for q in traced.parameters()):,}"
    assert [*first[:2], *first[3:]] == ["1", "DependencyPass", str(n - 1), p, "no"]
    assert [*second[:2], *second[3:]] == ["2", "Clone", str(n - 1), "->", str(n), p, "yes"]
    assert float(first[2]) >= 0


def test_it_says_which_passes_it_has() -> None:
    assert repr(Pipeline([look_only])) == "Pipeline of 1 pass:\n    1. look_only"
    assert str(Pipeline([DependencyPass(), Clone()])) == "Pipeline of 2 passes:\n    1. DependencyPass\n    2. Clone"


def test_it_prints_the_table_where_stderr_is_a_terminal(
    traced: GraphModule, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Pipeline([look_only])(traced)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    Pipeline([look_only])(traced)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "look_only" in printed.err


def test_a_pipeline_is_a_pass(traced: GraphModule) -> None:
    passes = prune_passes()
    halves: list[Any] = [Pipeline(passes[:3]), Pipeline(passes[3:])]
    manager = PassManager(halves)
    result = manager(traced)
    assert result.modified
    assert result.graph_module.meta["fxprune.verify"].ok
    outer = Pipeline([Pipeline(passes), look_only])(traced)
    assert [row.name for row in outer.rows] == ["Pipeline", "look_only"]
    assert outer.rows[0].modified


def another_module(gm: GraphModule) -> PassResult:
    return PassResult(copied(gm), True)


def collect_garbage(gm: GraphModule) -> PassResult:
    gc.collect()
    return PassResult(gm, False)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([], "a pipeline needs at least one pass"),
        ([look_only, "dce"], "pass 2 of 2 is no pass, but 'dce'"),
        ([DependencyPass], "pass 1 of 1 is no pass, but <class"),
    ],
)
def test_what_is_no_pass_is_refused_before_anything_runs(passes: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Pipeline(passes)


def test_only_graph_modules_run(model: nn.Module, traced: GraphModule) -> None:
    with pytest.raises(UsageError, match="a pipeline runs on a GraphModule, got LlamaForCausalLM: trace the model first"):
        Pipeline([look_only])(model)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"pass 1 of 1 \(<lambda>\): it gave a list, and not a GraphModule"):
        Pipeline([lambda gm: [gm]])(traced)


def broken(gm: GraphModule) -> GraphModule:
    raise KeyError("weight")


def test_a_failure_names_the_pass_and_keeps_its_class_or_its_cause(traced: GraphModule) -> None:
    with pytest.raises(UsageError, match=r"^pass 2 of 2 \(SelectionPass\): no scores on the graph: run an ImportancePass before"):
        Pipeline([DependencyPass(), SelectionPass(ratio=0.2)])(traced)
    with pytest.raises(FxPruneError, match=r"^pass 2 of 3 \(broken\) failed: KeyError: 'weight'$") as caught:
        Pipeline([look_only, broken, look_only])(traced)
    assert type(caught.value) is FxPruneError
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_bare_exception_of_a_pass_manager_is_unwrapped(traced: GraphModule) -> None:
    with pytest.raises(UsageError, match=r"^pass 1 of 1 \(PassManager: RewritePass\): there is no plan: run a SelectionPass"):
        Pipeline([PassManager([DependencyPass(), RewritePass()])])(traced)
    failing: list[Any] = [broken]
    nested = PassManager([DependencyPass(), PassManager(failing)])
    with pytest.raises(FxPruneError, match=r"\(PassManager: PassManager: broken\) failed: KeyError: 'weight'") as caught:
        Pipeline([nested])(traced)
    assert isinstance(caught.value.__cause__, KeyError)


def test_verification_fails_by_its_own_class(traced: GraphModule) -> None:
    def damage(gm: GraphModule) -> None:
        with torch.no_grad():
            gm.get_parameter("model.norm.weight").mul_(3)

    passes = prune_passes()
    with pytest.raises(VerificationError, match=r"^pass 6 of 6 \(VerifyPass\): the pruned network differs from its reference"):
        Pipeline([*passes[:4], damage, passes[4]])(traced)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes.


def same(one: Any, other: Any) -> bool:
    state, theirs = one.state_dict(), other.state_dict()
    return state.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in state.items())


FILE = """
recipe: flap
kinds: {ffn: 1, kv_heads: 0.5}
samples: 5
length: 16
"""

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "default": ("default", {"levels": 2, "rounds": 2, "sensitivity_samples": 2, **SMALL}),
    "flap-file": (FILE, {}),
    "magnitude": ("magnitude", {}),
    "wanda-fallback": (
        "wanda-sp",
        {"kinds": ["ffn", "head_dim"], "widths": "per-layer", "protect": ["model.layers.head_dim"], **SMALL},
    ),
    "layers": ("magnitude", {"kinds": ["layers"], "units": 0.5, **SMALL}),
    "normed": ("default", {"kinds": ["hidden"], **SMALL}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_as_a_pipeline_is_what_prune_does(
    case: str, model: nn.Module, base: GraphModule, traced: GraphModule, tmp_path: Path
) -> None:
    recipe, settings = CASES[case]
    if recipe is FILE:
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(FILE)
    ratio = None if "units" in settings else 0.2
    pipeline = Pipeline.from_recipe(recipe, ratio, model=model, seed=3, **settings)
    result = pipeline(traced)
    pruned = fxprune.prune(model, ratio, recipe=recipe, graph=base, seed=3, **settings)
    plan = result.graph_module.meta["fxprune.plan"]
    assert not plan.diff(pruned.plan)
    assert plan.recipe == pruned.plan.recipe
    assert plan.curves == pruned.plan.curves
    assert bool(plan.curves) == (case == "default")
    assert same(result.graph_module, pruned.graph_module)
    assert result.graph_module.meta["fxprune.verify"].max_rel_error < 1e-4
    compensated = plan.recipe["compensation"] != "none"
    names = ["DependencyPass", "RecipeImportance", "RecipeSelection", "RewritePass", "VerifyPass", "CompensationPass"]
    assert [row.name for row in result.rows] == names[: 5 + compensated]
    if case == "default":
        other = Pipeline.from_recipe(recipe, ratio, model=model, seed=4, **settings)(base)
        assert not same(other.graph_module, pruned.graph_module)


def test_text_and_tokenizer_instead_of_a_model(model: nn.Module, base: GraphModule, traced: GraphModule) -> None:
    words = [" ".join(f"w{(i * 7 + j) % 90}" for j in range(40)) for i in range(6)]
    given: dict[str, Any] = {"calibration": words, "tokenizer": tokenizer(), **SMALL}
    result = Pipeline.from_recipe("flap", 0.2, **given)(traced)
    assert result.rows[4].name == "RecipeVerification"
    assert same(result.graph_module, fxprune.prune(model, 0.2, recipe="flap", graph=base, **given).graph_module)


def test_verification_reads_of_a_batch_what_the_graph_takes(traced: GraphModule) -> None:
    batches = [{"input_ids": tokens(2, 16, seed=i), "labels": tokens(2, 16, seed=i)} for i in range(2)]
    result = Pipeline.from_recipe("magnitude", 0.2, calibration=batches)(traced)
    assert result.graph_module.meta["fxprune.verify"].ok
    assert not [row for row in result.rows[:3] if row.modified]


def test_loss_and_progress_are_handed_on(model: nn.Module, base: GraphModule, traced: GraphModule) -> None:
    told: list[tuple[str, int, int]] = []

    def squares(outputs: Any, batch: Any) -> torch.Tensor:
        return outputs.logits.square().mean()

    given: dict[str, Any] = {"criterion": "taylor1", "calibration": [INPUTS], "loss": squares}
    result = Pipeline.from_recipe("magnitude", 0.2, progress=lambda *said: told.append(said), **given)(traced)
    assert told == [("importance", 1, 1)]
    scores = result.graph_module.meta["fxprune.plan"].scores
    expected = fxprune.score(base, fxprune.find_groups(base), "taylor1", [INPUTS], loss=squares)
    assert all(torch.equal(scores[name], own) for name, own in expected.items())
    assert not result.graph_module.meta["fxprune.plan"].diff(
        fxprune.prune(model, 0.2, recipe="magnitude", graph=base, **given).plan
    )


def test_what_a_recipe_pipeline_refuses(traced: GraphModule) -> None:
    with pytest.raises(UsageError, match=r"there is nothing to verify the pruned module on: give inputs=, model= or calibration="):
        Pipeline.from_recipe("magnitude", 0.2)
    with pytest.raises(UsageError, match="unknown recipe 'magnitud'; did you mean 'magnitude'"):
        Pipeline.from_recipe("magnitud", 0.2, inputs=INPUTS)
    with pytest.raises(UsageError, match="unknown option 'crterion'"):
        Pipeline.from_recipe("magnitude", 0.2, inputs=INPUTS, crterion="l1")
    with pytest.raises(UsageError, match=r"pass 2 of 5 \(RecipeImportance\): without calibration= the text is sampled"):
        Pipeline.from_recipe("wanda-sp", 0.2, inputs=INPUTS)(traced)
    importance, selection = Pipeline.from_recipe("magnitude", 0.2, inputs=INPUTS).passes[1:3]
    with pytest.raises(UsageError, match="no scores of the recipe on the graph: run its RecipeImportance pass before"):
        Pipeline([selection])(traced)
    with pytest.raises(PlanError, match=r"pass 2 of 2 \(RecipeSelection\): "):
        Pipeline([importance, Pipeline.from_recipe("magnitude", 0.999, inputs=INPUTS).passes[2]])(traced)


def test_a_pass_between_those_of_a_recipe(model: nn.Module, traced: GraphModule) -> None:
    own = Pipeline.from_recipe("magnitude", 0.2, model=model)
    seen: list[int] = []
    result = Pipeline([*own.passes[:3], lambda gm: seen.append(len(gm.meta["fxprune.plan"].keep)), *own.passes[3:]])(traced)
    assert seen == [len(result.graph_module.meta["fxprune.plan"].keep)]
    assert result.rows[3].name == "<lambda>"


def test_passes_look_back_at_a_dense_module_that_nobody_else_holds(traced: GraphModule) -> None:
    """Another pass's module is dense here; torch's PassManager lets go of it, and the pass says so."""
    batches = [{"input_ids": tokens(4, 16)}]
    passes = [another_module, *prune_passes()[:4], collect_garbage, VerifyPass(inputs=INPUTS), CompensationPass(batches)]
    result = Pipeline(passes)(traced)
    assert result.graph_module.meta["fxprune.verify"].ok
    assert result.graph_module.meta["fxprune.compensation"].maps
    with pytest.raises(Exception, match="when running the 'VerifyPass' pass") as caught:
        PassManager(passes)(traced)
    assert "the dense module that the RewritePass read is gone: hold on to it, or give it to the VerifyPass" in str(
        caught.value.__cause__
    )


# ---------------------------------------------------------------------------------------------------------------------
# Knowledge.


def test_selection_protects_what_knowledge_says(traced: GraphModule) -> None:
    batches = [{"input_ids": tokens(2, 16, seed=i)} for i in range(2)]
    Pipeline([ImportancePass("l1"), KnowledgePass(batches, kinds=["ffn", "kv_heads"])])(traced)
    knowledge = traced.meta["fxprune.knowledge"]
    options: dict[str, Any] = {"units": {"ffn": 0.25}, "widths": "per-layer"}
    SelectionPass(protect_share=0.5, **options)(traced)
    most = min((row for row in knowledge.rows if row.kind == "ffn"), key=lambda row: row.rank).name
    ffn = {f"model.layers.{i}.mlp.ffn" for i in range(2)}
    assert len(knowledge.protected(0.5, ["ffn"])) == 1
    plan = traced.meta["fxprune.plan"]
    assert set(plan.keep) == ffn - set(knowledge.protected(0.5, ["ffn"]))
    assert most not in plan.keep
    assert plan.recipe["protect"] == list(knowledge.protected(0.5, ["ffn"]))
    SelectionPass(**options)(traced)
    assert set(traced.meta["fxprune.plan"].keep) == ffn
    chosen = fxprune.select(traced.meta["fxprune.groups"], traced.meta["fxprune.scores"], protect=plan.recipe["protect"], **options)
    assert not chosen.diff(plan)


def test_what_protecting_by_knowledge_refuses(traced: GraphModule) -> None:
    batches = [{"input_ids": tokens(2, 16)}]
    ImportancePass("l1")(traced)
    with pytest.raises(UsageError, match="no knowledge on the graph: run a KnowledgePass before the SelectionPass"):
        SelectionPass(ratio=0.2, protect_share=0.1)(traced)
    KnowledgePass(batches, kinds=["ffn"])(traced)
    with pytest.raises(UsageError, match=r"share to protect must lie between 0 and 1 \(0\.1 protects a tenth\), got 1\.5"):
        SelectionPass(ratio=0.2, widths="per-layer", protect_share=1.5)(traced)
    with pytest.raises(UsageError, match="the knowledge has nothing of kind query_groups"):
        SelectionPass(ratio=0.2, kinds=["query_groups"], widths="per-layer", protect_share=0.1)(traced)
    with pytest.raises(UsageError, match="with widths='uniform' all layers have one width"):
        SelectionPass(ratio=0.2, kinds=["ffn"], protect_share=0.1)(traced)
    other = fxprune.trace(build("gpt2"), INPUTS)
    ImportancePass("l1")(other)
    other.meta["fxprune.knowledge"] = traced.meta["fxprune.knowledge"]
    with pytest.raises(UsageError, match="the knowledge was measured on another model"):
        SelectionPass(ratio=0.2, protect_share=0.1)(other)
