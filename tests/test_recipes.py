"""Recipes: every named one prunes, saves and loads; files; what goes before what; and a plan says how to make it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fxprune
from fxprune import PrunePlan, Selection
from fxprune.criteria import CRITERIA
from fxprune.errors import UsageError
from fxprune.passes.batches import causal_loss
from fxprune.passes.selection import lanes_of
from fxprune.planning import Planning, settle
from fxprune.recipes import RECIPES, SETTINGS, read_recipe

from .zoo import build, tokens

SMALL: dict[str, Any] = {"samples": 6, "length": 16, "batch_size": 4}
DENSE_LAYERS = 8


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    """Deep enough that llm-pruner's six protected layers are not all."""
    return build("llama", num_hidden_layers=DENSE_LAYERS)


@pytest.fixture(scope="module")
def graph(llama: nn.Module) -> torch.fx.GraphModule:
    return fxprune.trace(llama, {"input_ids": tokens(2, 16)})


def planning(recipe: Any = None, **given: Any) -> Planning:
    return settle(recipe, given, 0.2, None, None, {}, 0)[0]


def selection(recipe: Any = None, ratio: float | None = 0.2, **options: Any) -> Selection:
    chosen = settle(recipe, {}, ratio, None, None, options, 0)[1]
    assert chosen is not None
    return chosen


def same_plan(one: PrunePlan, other: PrunePlan) -> bool:
    return not one.diff(other)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_prunes_saves_and_loads(name: str, llama: nn.Module, graph: torch.fx.GraphModule, tmp_path: Path) -> None:
    ratio = 0.05 if name == "llm-pruner" else 0.2
    result = fxprune.prune(llama, ratio, graph=graph, recipe=name, **SMALL)
    said = {**SETTINGS, **RECIPES[name], **SMALL}
    for key in ("criterion", "aggregation", "compensation", "ranking", "widths", "samples", "protect_first", "protect_last"):
        assert result.plan.recipe[key] == said[key], key
    kinds = said["kinds"] if isinstance(said["kinds"], dict) else dict.fromkeys(said["kinds"], 1.0)
    assert result.plan.recipe["kinds"] == kinds
    assert {result.groups[n].kind for n in result.plan.keep} <= set(kinds)
    calibrated = CRITERIA[said["criterion"]].calibrated or said["compensation"] != "none"
    assert ("calibration" in result.report.seconds) == calibrated
    assert any(s.startswith("sensitivity") for s in result.report.seconds) == (said["ranking"] == "measured")
    assert (result.report.compensation or {}).get("method", "none") == said["compensation"]
    assert result.report.removed == pytest.approx(ratio, abs=0.02)
    if said["widths"] == "uniform" and name != "channel":  # a Llama's hidden size must be a multiple of its heads
        assert result.form == "uniform"
    if name == "llm-pruner":
        assert {result.groups[n].layer for n in result.plan.keep} == {4, 5}
    result.save_pretrained(tmp_path / "out")
    loaded = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        if result.form == "uniform"
        else fxprune.load(tmp_path / "out")
    )
    ids = tokens(2, 9, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, result.graph_module(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


REPRODUCING = ("criterion", "aggregation", "compensation", "layers_by", "samples", "length", "batch_size", "levels", "seed")


@pytest.mark.parametrize("name", ["default", "flap", "random", "channel"])
def test_a_plan_says_enough_to_make_it_again(name: str, llama: nn.Module, graph: torch.fx.GraphModule) -> None:
    """Everything by name, no recipe: as it stands in the plan's file."""
    given = {**SMALL, "levels": 2, "seed": 3} if name == "default" else {**SMALL, "seed": 3}
    plan = fxprune.prune(llama, 0.2, graph=graph, recipe=name, **given).plan
    recipe = json.loads(json.dumps(plan.to_json()["recipe"]))
    fields = {k: v for k, v in recipe.items() if k in {**SETTINGS, "units": None, "ratio": None, "seed": None} and v is not None}
    assert set(SETTINGS) | {"ratio", "seed"} == set(fields)
    again = fxprune.prune(llama, recipe={}, graph=graph, **fields).plan
    assert same_plan(plan, again)
    assert again.recipe == plan.recipe
    other = fxprune.prune(llama, recipe={}, graph=graph, **{**fields, "seed": 4, "ratio": 0.25}).plan
    assert not same_plan(plan, other)


def test_the_default_recipe_is_called_default() -> None:
    assert read_recipe(None) == read_recipe("default") == RECIPES["default"]
    read_recipe("default")["criterion"] = "l1"
    assert RECIPES["default"]["criterion"] == "kfac"  # a copy


def test_settings_are_keywords_of_prune() -> None:
    import inspect

    known = {*inspect.signature(fxprune.prune).parameters, *(f for f in Selection.__dataclass_fields__)}
    assert set(SETTINGS) <= known
    for name, recipe in RECIPES.items():
        assert set(recipe) <= set(SETTINGS), name


def test_what_goes_before_what(tmp_path: Path) -> None:
    """What is given explicitly, then the recipe, then what holds where nobody says anything."""
    assert planning("flap").criterion == "flap"
    assert planning("flap", criterion="l2").criterion == "l2"
    assert planning("flap", criterion=None).criterion == "flap"
    assert planning({}).criterion == SETTINGS["criterion"] == "taylor2"
    assert (planning("flap").samples, planning("magnitude").samples) == (128, 32)
    assert selection("flap").widths == "per-layer"
    assert selection("flap", widths="uniform").widths == "uniform"
    assert selection("flap", widths="uniform").ranking == "standardised"
    assert selection("magnitude").widths == "uniform"
    assert selection("magnitude").kinds == ("kv_heads", "ffn")
    assert selection("magnitude", kinds="hidden").kinds == ("hidden",)
    mine = {"recipe": "flap", "ranking": "global"}
    assert (selection(mine).ranking, selection(mine).widths) == ("global", "per-layer")
    assert selection(mine, ranking="local").ranking == "local"
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: flap\nranking: global\nkinds: {ffn: 1, kv_heads: 0.5}\nprotect: [model.layers.0*]\n")
    assert selection(file) == Selection(
        ratio=0.2, ranking="global", widths="per-layer", kinds={"ffn": 1, "kv_heads": 0.5}, protect=["model.layers.0*"]
    )
    assert planning(str(file)).compensation == "bias"
    (tmp_path / "mine.json").write_text('{"criterion": "l1", "samples": 5}')
    assert read_recipe(tmp_path / "mine.json") == {"criterion": "l1", "samples": 5}


def test_a_file_named_like_a_recipe_needs_its_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flap").write_text("criterion: l1")
    assert read_recipe("flap") == RECIPES["flap"]
    assert read_recipe("./flap") == {"criterion": "l1"}


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            "lm-pruner",
            (
                "unknown recipe 'lm-pruner'; did you mean 'llm-pruner'? Choose from: channel, default, flap, llm-pruner, "
                "magnitude, random, uniform, wanda-sp, or name a .yaml file"
            ),
        ),
        ("none.yaml", "there is no recipe file 'none.yaml'"),
        ("none.json", "there is no recipe file 'none.json'"),
        ({"citerion": "l1"}, "the recipe has an unknown setting 'citerion'; did you mean 'criterion'? Choose from: aggregation, "),
        ({"recipe": "flab"}, "the recipe builds on an unknown recipe 'flab'; did you mean 'flap'? Choose from: channel, "),
        (
            {"ratio": 0.2},
            (
                "the recipe has 'ratio', and how much goes is no setting of a recipe: say it beside it "
                "(ratio= in Python, --ratio on the command line)"
            ),
        ),
        ({"recipe": ["flap"]}, "the recipe builds on an unknown recipe '['flap']'; "),
        ({"samples": "many"}, "the recipe: samples must be a whole number, got 'many'"),
        ({"levels": 2.5}, "the recipe: levels must be a whole number, got 2.5"),
        ({"rounds": True}, "the recipe: rounds must be a whole number, got True"),
        ({"kinds": None}, "the recipe: kinds must be names of kinds, or a mapping from kind to pace, got None"),
        ({"protect_first": "4"}, "the recipe: protect_first must be a whole number, got '4'"),
        ({"criterion": 3}, "a criterion is a name or a callable (name, weight, gradient) -> scores, not 3"),
        ({"compensation": None}, "unknown compensation 'None'; did you mean 'none'? Choose from: bias, least-squares, none"),
        ({"floor": "low"}, "the recipe: floor must be a number, got 'low'"),
        ({"ranking": "measurd"}, "unknown ranking 'measurd'; did you mean 'measured'? Choose from: global, local, measured, "),
    ],
    ids=str,
)
def test_recipes_that_cannot_be_used(recipe: Any, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        settle(recipe, {}, 0.2, None, None, {}, 0)
    assert str(raised.value).startswith(said)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for text, said in (
        ("criterion: [", "cannot read the recipe 'mine.yaml': while parsing a flow node"),
        ("- criterion", "the recipe 'mine.yaml' must hold settings with their values: not a list"),
        ("", "the recipe 'mine.yaml' must hold settings with their values: it is empty"),
        ("floor: 1e-1\nlevels: two", "the recipe 'mine.yaml': levels must be a whole number, got 'two'"),
        ("levels: two", "the recipe 'mine.yaml': levels must be a whole number, got 'two'"),
        ("wides: uniform", "the recipe 'mine.yaml' has an unknown setting 'wides'; did you mean 'widths'?"),
        ("recipe: flop", "the recipe 'mine.yaml' builds on an unknown recipe 'flop'; did you mean 'flap'?"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError) as raised:
            read_recipe(file)
        assert str(raised.value).startswith(said)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"^cannot read the recipe 'mine\.yaml': "):
        read_recipe(file)


def test_what_is_given_beside_a_plan_or_a_selection(llama: nn.Module) -> None:
    plan = PrunePlan({})
    how, chosen = settle(None, {}, None, None, plan, {}, 0)
    assert (how.compensation, chosen) == ("none", None)  # a plan is replayed as it is
    assert settle("flap", {"compensation": "bias"}, None, None, plan, {}, 0)[0].compensation == "bias"
    made = PrunePlan({}, recipe={"samples": 7, "length": 9, "criterion": "kfac"})
    how = settle(None, {"compensation": "bias", "length": 11}, None, None, made, {}, 0)[0]
    assert (how.samples, how.length, how.batch_size) == (7, 11, 4), "as much text as before; the rest as the default recipe has it"
    with pytest.raises(UsageError, match="chooses no units: leave out recipe=, or give compensation= with it"):
        settle("flap", {}, None, None, plan, {}, 0)
    with pytest.raises(UsageError, match=r"chooses no units: leave out levels=$"):
        settle(None, {"compensation": "bias", "levels": 3}, None, None, plan, {}, 0)
    ready = Selection(ratio=0.1)
    how, chosen = settle("flap", {}, None, ready, None, {}, 0)
    assert chosen is ready
    assert how.compensation == "bias"

    def error(ratio: Any, selection: Any, plan: Any, options: Any) -> str:
        with pytest.raises(UsageError) as raised:
            settle(None, {}, ratio, selection, plan, options, 0)
        return str(raised.value)

    assert error(0.2, None, plan, {}) == "plan= is replayed as it is: leave out ratio="
    assert error(None, ready, plan, {}) == "plan= is replayed as it is: leave out selection="
    assert error(None, ready, None, {"kinds": "ffn"}) == "selection= says what to remove: leave out kinds="
    assert error(0.2, None, None, {"rankings": 1}).startswith("unknown option 'rankings'; did you mean 'ranking'? There are ")
    assert error(None, None, None, {}).startswith("give either ratio= (share of all parameters) or units= (share of units)")


def test_whole_layers_are_ranked_among_themselves(llama: nn.Module, graph: torch.fx.GraphModule) -> None:
    assert selection("default", kinds="layers").ranking == "local"
    assert selection("default", kinds=("layers", "ffn")).ranking == "local"
    assert selection("default", kinds=("layers",), ranking="measured").ranking == "measured"  # select refuses it
    result = fxprune.prune(llama, 0.3, graph=graph, kinds="layers", **SMALL)
    assert result.plan.drop
    assert result.report.compensation == {"method": "least-squares", "maps": {}, "ridges": {}, "added": [], "tokens": 0}
    with pytest.raises(UsageError, match=r"^measured ranking compares units by what goes with them; whole layers have no such"):
        fxprune.prune(llama, 0.3, graph=graph, kinds="layers", ranking="measured", **SMALL)


def test_shares_name_their_kinds(llama: nn.Module) -> None:
    chosen = settle("llm-pruner", {}, None, None, None, {"units": {"hidden": 0.25}}, 0)[1]
    assert chosen is not None
    assert chosen.pace == {"hidden": 1.0}
    chosen = settle("llm-pruner", {}, None, None, None, {"units": 0.25}, 0)[1]
    assert chosen is not None
    assert chosen.pace == {"kv_heads": 1.0, "ffn": 1.0}


def test_measured_where_nothing_can_be_measured(llama: nn.Module, graph: torch.fx.GraphModule) -> None:
    """A norm looks at the hidden dimension: zeros are no removal, so all shrink alike, and the note says so."""
    result = fxprune.prune(llama, 0.2, graph=graph, kinds="hidden", **SMALL)
    assert result.plan.recipe["ranking"] == "local"
    said = "a norm or a router looks at the units of these kinds, so their loss was not measured: all shrink alike"
    assert said in result.report.note
    assert not any(s.startswith("sensitivity") for s in result.report.seconds)
    mixed = fxprune.prune(llama, 0.1, graph=graph, kinds=("hidden", "ffn"), **SMALL)
    assert "the loss of 1 groups, such as model.hidden, was not measured: they stay whole" in mixed.report.note
    assert mixed.plan.recipe["ranking"] == "measured"
    assert {result.groups[n].kind for n in mixed.plan.keep} == {"ffn"}


def test_units_that_no_linear_map_reads_are_scored_otherwise() -> None:
    model = build("mixtral")
    gm = fxprune.trace(model, {"input_ids": tokens(2, 16)})
    batch: list[dict[str, Tensor]] = [{"input_ids": tokens(4, 12)}]
    result = fxprune.prune(model, 0.2, graph=gm, kinds="ffn", calibration=batch)
    assert result.report.note.startswith(
        "2 groups, such as model.layers.0.mlp.experts.ffn, were scored by taylor1: no linear map contracts their units"
    )
    groups = fxprune.find_groups(gm)
    wanted = fxprune.score(gm, groups, criterion="taylor1", calibration=batch)
    for name in result.plan.keep:
        assert torch.equal(result.plan.scores[name], wanted[name])
        best = wanted[name].argsort(descending=True)[: len(result.plan.keep[name])].sort().values
        assert torch.equal(result.plan.keep[name], best)


@pytest.mark.parametrize("widths", ["per-layer", "uniform"])
@pytest.mark.parametrize("compensation", ["none", "least-squares"])
def test_rounds(llama: nn.Module, graph: torch.fx.GraphModule, widths: str, compensation: str) -> None:
    """The budget is spent in parts: the second one where the next step costs least beside what the first one took."""
    batch: list[dict[str, Tensor]] = [{"input_ids": tokens(4, 12)}]
    kinds, ratio = ("kv_heads", "ffn"), 0.3
    options: dict[str, Any] = {"kinds": kinds, "levels": 4, "sensitivity_samples": 4, "calibration": batch, "loss": causal_loss}
    options |= {"compensation": compensation, "widths": widths, "graph": graph, "check": False}
    half = fxprune.prune(llama, ratio / 2, rounds=1, **options)
    whole = fxprune.prune(llama, ratio, rounds=2, **options)
    assert [s for s in whole.report.seconds if s.startswith("sens")] == ["sensitivity, part 1", "sensitivity, part 2"]
    groups, scores = whole.groups, half.plan.scores
    lanes = lanes_of(groups, Selection(ratio=ratio, kinds=kinds, widths=widths))
    measured: dict[str, Any] = {"lanes": lanes, "levels": 4, "compensated": compensation != "none"}
    first = fxprune.measure_curves(graph, groups, scores, batch, **measured)
    second = fxprune.measure_curves(graph, groups, scores, batch, **measured, plan=half.plan, ahead=1)
    curves = {}
    for lane, points in second.items():
        (gone, _), *steps = points
        count, change = steps[0] if steps else points[0]
        before = dict(first[lane])
        curves[lane] = [*points, *((n, change + value - before[count]) for n, value in first[lane] if n > count)]
        assert gone == groups[lanes[lane][0]].size - len(half.plan.keep.get(lanes[lane][0], range(groups[lanes[lane][0]].size)))
    choice: dict[str, Any] = {"kinds": kinds, "ranking": "measured", "widths": widths}
    assert same_plan(whole.plan, fxprune.select(groups, scores, ratio=ratio, curves=curves, **choice))
    for name, units in half.plan.keep.items():  # nothing is given back
        assert set(whole.plan.keep[name].tolist()) <= set(units.tolist())


def test_parts_that_are_smaller_than_a_unit(llama: nn.Module, graph: torch.fx.GraphModule) -> None:
    """They are left to the next part."""
    batch: list[dict[str, Tensor]] = [{"input_ids": tokens(4, 12)}]
    options: dict[str, Any] = {"graph": graph, "calibration": batch, "check": False, "levels": 2, "kinds": "kv_heads"}
    groups = fxprune.prune(llama, 0.1, **options).groups
    unit = groups["model.layers.0.self_attn.kv_heads"].parameters_per_unit / groups.total
    result = fxprune.prune(llama, unit, rounds=4, **options)
    assert sum(result.plan.removed()[n].numel() for n in result.plan.keep) == 1


def test_a_protected_group_is_not_measured(llama: nn.Module, graph: torch.fx.GraphModule) -> None:
    seen: list[tuple[str, int, int]] = []
    options: dict[str, Any] = {"graph": graph, "calibration": [{"input_ids": tokens(4, 12)}], "rounds": 1, "check": False}
    options |= {"protect_first": DENSE_LAYERS - 1, "progress": lambda *what: seen.append(what)}
    fxprune.prune(llama, 0.05, kinds="ffn", **options)
    assert [what for what in seen if what[0] == "sensitivity"] == [("sensitivity", 1, 1)]


def test_a_criterion_that_needs_no_data_makes_a_prune_that_needs_none() -> None:
    how, chosen = settle(None, {"criterion": "l2"}, 0.2, None, None, {}, 0)
    assert chosen is not None
    assert (how.compensation, chosen.ranking) == ("none", "local")
    how, chosen = settle("default", {"criterion": "l2"}, 0.2, None, None, {}, 0)  # a recipe that is named is followed
    assert chosen is not None
    assert (how.compensation, chosen.ranking) == ("least-squares", "measured")
    how, _ = settle(None, {"criterion": "l2", "compensation": "bias"}, 0.2, None, None, {}, 0)
    assert how.compensation == "bias"
