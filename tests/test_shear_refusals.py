"""What `fxprune.shear` refuses, before anything is measured or trained; settings and budgets."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import fxprune
from fxprune import Recovery, Selection
from fxprune.errors import FxPruneError, PlanError, UsageError
from fxprune.lorashear import parts
from fxprune.lorashear.budget import Budget, Schedule, make_schedule
from fxprune.lorashear.run import shear
from fxprune.lorashear.settings import OWN, TRAINING, settle
from fxprune.lorashear.work import WorkDirectory
from fxprune.passes import knowledge
from fxprune.recipes import RECIPES, SHEARINGS, read_recipe

from .curricula import dense, write_sources
from .recovering import pruned
from .shearing import sheared, traced_once
from .zoo import build, tokens


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(autouse=True)
def nothing_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be measured or trained."""

    def unwanted(*_: Any, **__: Any) -> None:
        raise AssertionError("this takes hours")

    monkeypatch.setattr(parts, "trace", traced_once)
    monkeypatch.setattr(parts, "measure_knowledge", unwanted)
    monkeypatch.setattr(parts.Parts, "train", unwanted)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "nowhere.jsonl"}, "stage 1 of the curriculum: there is no file 'nowhere.jsonl'"),
        ({"then": ["nowhere.jsonl"]}, "stage 2 of the curriculum: there is no file 'nowhere.jsonl'"),
        ({"data": "{0}[words]"}, "'kept.jsonl' has no column 'words'; choose from: text"),
        ({"data": "empty.jsonl"}, "'empty.jsonl' is empty: it has no rows"),
        ({"data": "few.jsonl"}, "'few.jsonl' comes to 3 examples of at most "),
        ({"kinds": ["fn"]}, "unknown kind 'fn'; did you mean 'ffn'?"),
        ({"kinds": ["layers"]}, "LHSPG brings units to zero, and kind 'layers' drops whole blocks: leave it out"),
        ({"kinds": ["channels"]}, "this model has no prunable group of kind channels; it has "),
        ({"ratio": 1.2}, "a ratio must lie between 0 and 1 (0.2 removes 20 %), got 1.2"),
        ({"protect": ["nowhere"]}, "protect='nowhere' matches no group and no block"),
        (
            {"widths": "uniform"},
            "protect_share leaves single layers whole, and with widths='uniform' all layers have one width: say",
        ),
        ({"steps": None}, "say how long to train: one of tokens (--tokens) and steps (--steps), not both or neither"),
        ({"tokens": 1000, "steps": 20}, "say how long to train: one of tokens (--tokens) and steps (--steps), not both or neither"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        (
            {"steps": 4},
            "4 steps leave shearing 1 step after its warm-up, fewer than its 2 periods: give at least 5 steps, raise shear_share",
        ),
        ({"tokens": 400, "steps": None}, "400 tokens, "),
        (
            {"steps": 20, "shear_share": 0.99},
            "20 steps leave recovery 0 steps for 1 stage: give at least 51 steps, lower shear_share, or say",
        ),
        ({"shear_share": 0}, "shear_share is 0, and nothing would be sheared: to recover a pruned model, use fxprune recover"),
        ({"warmup_share": 1}, "warmup_share is 1, and no step would be left to shear in"),
        ({"protect_share": 1.5}, "protect_share must be a number between 0 and 1, got 1.5"),
        ({"criterion": "taylr1"}, "unknown criterion 'taylr1'; did you mean 'taylor1'?"),
        (
            {"criterion": "kfac", "saliency": ["cosine"]},
            "saliency weighs what LHSPG itself ranks by, and criterion is 'kfac': leave one of them out",
        ),
        ({"criterion_samples": 0}, "criterion_samples must be a whole number of at least 1, got 0"),
        ({"periods": 0}, "periods must be a whole number of at least 1, got 0"),
        ({"knowledge_length": 1}, "knowledge_length must be a whole number of at least 2, got 1"),
        ({"knowledge_length": 64, "knowledge_samples": 0}, "knowledge_samples must be a whole number of at least 1, got 0"),
        ({"knowledge_length": 64, "validation_samples": 1}, "knowledge is measured on held-out text, and no source has 64 tokens"),
        (
            {"data": "short.jsonl", "knowledge_length": 64, "protect_share": 0, "criterion": "taylor1", "steps": 8},
            "importance is measured on windows of 64 tokens, and no source has so many (at most ",
        ),
        ({"knowledge_by": "accuracy"}, "unknown measure 'accuracy'"),
        ({"one_shot": 1}, "one_shot must be True or False, got 1"),
        ({"projection": "halfspace"}, "unknown projection 'halfspace'; did you mean 'half-space'?"),
        ({"saliency": ["taylor3"]}, "unknown saliency criterion 'taylor3'; did you mean 'taylor2'?"),
        ({"curriculum": "statc"}, "unknown weights 'statc' of a curriculum; did you mean 'static'?"),
        ({"method": "full"}, "shearing trains adapters: method is lora, not 'full'"),
        ({"max_tokens": 5}, "max_tokens is of a recovery by itself: for a shearing set tokens instead"),
        ({"max_steps": 5}, "max_steps is of a recovery by itself: for a shearing set steps instead"),
        ({"epochs": 2}, "epochs is of a recovery by itself: for a shearing set tokens or steps instead"),
        ({"perods": 3}, "there is no shearing setting 'perods'; did you mean 'periods'?"),
        ({"lora_alpha": 3}, "there is no shearing setting 'lora_alpha'; it is called alpha here"),
        ({"recipe": "lorashea"}, "unknown recipe 'lorashea'; did you mean 'lorashear'?"),
        ({"recipe": "llm-pruner"}, "unknown recipe 'llm-pruner'; choose from: default, lorashear"),
        ({"recipe": {"perods": 3}}, "the recipe has an unknown setting 'perods'; did you mean 'periods'?"),
        ({"recipe": {"rounds": 2.5}}, "the recipe: rounds must be a whole number, got 2.5"),
        ({"recipe": {"penalty": None}}, "penalty must be a number, got None"),
        ({"recipe": {"penalty": "little"}}, "penalty must be a number, got 'little'"),
        ({"recipe": {"protect": None}}, "protect must be names, got None"),
        ({"recipe": {"projection": 3}}, "projection must be a text, got 3"),
        ({"kinds": 3}, "kinds must be names, got 3"),
        ({"saliency": None}, "saliency must be names, got None"),
        ({"stage_shares": 3}, "stage_shares must be numbers, one for each stage, got 3"),
        ({"knowledge": "nowhere.json"}, "cannot read 'nowhere.json'"),
        ({"model": "nowhere/at/all"}, "there is no directory 'nowhere/at/all'"),
        ({"model": 3}, "cannot shear a int: expected a Hugging Face model, a directory or a hub id"),
        ({"model": nn.Linear(2, 2)}, "cannot shear a plain Linear, which has no checkpoint form: use fxprune.LHSPG in a loop"),
        ({"tokenizer": None}, "text needs a tokenizer, and there is none beside the model: copy its files"),
        ({"targets": "q_prj"}, "the target 'q_prj' matches no linear layer; did you mean 'q_proj'?"),
    ],
    ids=str,
)
def test_what_is_refused(
    changes: dict[str, Any], said: str, files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "few.jsonl").write_text('{"text": "w1 w2 w3"}\n' * 3)
    (tmp_path / "short.jsonl").write_text('{"text": "w1 w2 w3"}\n' * 12)
    given = {"data": files[0], **changes}
    data = given.pop("data").format(*files)
    with pytest.raises(UsageError) as caught:
        sheared(tmp_path / "out", data, **given)
    assert said in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["empty.jsonl", "few.jsonl", "short.jsonl"]


def test_knowledge_that_protects_nothing(files: tuple[str, str], tmp_path: Path) -> None:
    gm = traced_once(dense(), {"input_ids": tokens(2, 16)})
    found = knowledge.measure_knowledge(gm, fxprune.find_groups(gm), [{"input_ids": tokens(2, 16)}], kinds=["query_groups"])
    with pytest.raises(UsageError, match="there is knowledge, and protect_share is 0: nothing is protected by it"):
        sheared(tmp_path / "out", files[0], knowledge=found, protect_share=0)
    with pytest.raises(UsageError, match="the knowledge has nothing of kind ffn, kv_heads: measure that with fxprune sensitivity"):
        sheared(tmp_path / "out", files[0], knowledge=found)


def test_a_ratio_out_of_reach(files: tuple[str, str], tmp_path: Path) -> None:
    """Also if it is the protected share that puts it there: known before anything is measured, whatever that would find."""
    with pytest.raises(PlanError, match=r"^a ratio of 90\.0% cannot be reached: with kinds="):
        sheared(tmp_path / "out", files[0], ratio=0.9)
    with pytest.raises(PlanError, match=r"with a share of 0\.9 of all groups left whole \(protect_share\), "):
        sheared(tmp_path / "out", files[0], ratio=0.2, protect_share=0.9)
    gm = traced_once(dense(), {"input_ids": tokens(2, 16)})
    found = knowledge.measure_knowledge(gm, fxprune.find_groups(gm), [{"input_ids": tokens(2, 16)}], kinds=["ffn"])
    with pytest.raises(
        PlanError, match=r"with a share of 1 of all groups left whole \(protect_share\), a ratio of 20\.0% cannot be"
    ):
        sheared(tmp_path / "out", files[0], ratio=0.2, protect_share=1, knowledge=found)
    with pytest.raises(PlanError, match=r"^a ratio of 40\.0% cannot be reached"):
        sheared(tmp_path / "out", files[0], ratio=0.4, targets="q_proj,k_proj,v_proj,o_proj")
    assert not os.listdir(tmp_path)


def test_a_criterion_that_says_nothing_of_what_may_go(files: tuple[str, str], tmp_path: Path) -> None:
    """The dimensions that queries and keys share are multiplied with each other: no linear map reads them."""
    options: dict[str, Any] = {"model": build("gpt2"), "kinds": ["head_dim"], "ratio": 0.05, "protect_share": 0}
    with pytest.raises(UsageError) as caught:
        sheared(tmp_path / "out", files[0], criterion="kfac", **options)
    assert str(caught.value) == (
        "criterion 'kfac' looks at what linear maps read, and none contracts the units of 'transformer.h.0.attn.c_attn.head_dim': "
        "leave kind 'head_dim' out, or take another criterion, such as taylor2"
    )
    assert not os.listdir(tmp_path)


def test_what_could_not_be_saved(files: tuple[str, str], tmp_path: Path) -> None:
    """Position biases that the class computes from the number of heads: no checkpoint holds the pruned ones."""
    with pytest.raises(UsageError, match="what is left could not be saved as a checkpoint: "):
        sheared(tmp_path / "out", files[0], model=build("bloom"), kinds=["kv_heads"], ratio=0.1, protect_share=0)
    assert not os.listdir(tmp_path)


def test_models_that_cannot_be_sheared(files: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is on the meta device: it has no weights to train"):
        sheared(tmp_path / "out", files[0], model=build("llama").to("meta"))
    with pytest.raises(UsageError, match="cannot shear a plain GraphModule"):
        sheared(tmp_path / "out", files[0], model=pruned().graph_module)


def test_places_that_are_taken(files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = tmp_path / "out", tmp_path / "out.shearing"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"the output directory '.*out' exists and is not empty; choose another, or say overwrite"):
        sheared(out, files[0])
    with pytest.raises(UsageError, match=r"the output directory '.*out' holds no checkpoint: it will not be replaced"):
        sheared(out, files[0], overwrite=True)
    (out / "notes.txt").unlink()
    work.mkdir()
    (work / "step-000000001").mkdir()  # of recover, say
    with pytest.raises(UsageError, match=r"'.*out\.shearing' is not the working directory of a shearing: it will not be replaced"):
        sheared(out, files[0], restart=True)
    assert (work / "step-000000001").is_dir()
    (work / "step-000000001").rmdir()
    work.rmdir()
    work.write_text("a file")
    with pytest.raises(UsageError, match=r"'.*out\.shearing' is not the working directory of a shearing"):
        sheared(out, files[0])
    (out / "config.json").write_text("{}")
    work.unlink()
    with pytest.raises(UsageError, match=r"the output '.*out' is the model itself; choose another directory"):
        shear(out, 0.2, files[0], output=out, overwrite=True, steps=20)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UsageError, match="a shearing runs in one process: start it without torchrun; fxprune recover can go on with"
    ):
        sheared(tmp_path / "other", files[0])


def test_the_state_of_another_shearing(files: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(AssertionError):
        sheared(out, files[0])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"ratio": 0.3}, r"ratio was 0\.2, now 0\.3\. Repeat the settings it was started with, or start over with --restart"),
        ({"periods": 3}, r"periods was 2, now 3\."),
        ({"lr": 1e-3}, r"lr was 0\.003, now 0\.001\."),
        ({"steps": 30}, r"steps was 20, now 30\."),
        ({"model": pruned("llama").model}, r"the model differs\."),
    ]
    begun = tmp_path / "out.shearing" / "lhspg"
    begun.mkdir()
    for changes, said in cases:
        with pytest.raises(UsageError, match=rf"'.*out\.shearing' holds the state of another shearing: {said}"):
            sheared(out, files[0], **changes)
    with pytest.raises(UsageError, match=r"the data differs; the sources was"):
        sheared(out, files[1])
    with pytest.raises(AssertionError):  # what changes neither the result nor the order of things
        sheared(out, files[0], micro_batch_size=1, checkpoint_every=3)
    begun.rmdir()
    with pytest.raises(AssertionError):  # another ratio, before anything was trained for it
        sheared(out, files[0], ratio=0.25)
    before = json.loads((tmp_path / "out.shearing" / "run.json").read_text())
    with pytest.raises(AssertionError):
        sheared(out, files[0], ratio=0.3, restart=True)
    after = json.loads((tmp_path / "out.shearing" / "run.json").read_text())
    assert (before["identity"]["ratio"], after["identity"]["ratio"]) == (0.25, 0.3)
    assert before["run"] != after["run"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    one, two = WorkDirectory(tmp_path / "out"), WorkDirectory(tmp_path / "out")
    one.open({"ratio": 0.2}, restart=False)
    with pytest.raises(UsageError, match=r"another process is working in '.*out\.shearing': wait for it, or choose another output"):
        two.open({"ratio": 0.2}, restart=False)
    one.record("begun", {})
    (one.path / ".run.json.99").write_text("half")
    one.close()
    again = WorkDirectory(tmp_path / "out")
    assert again.stages == {"begun": {}}
    (one.path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match=r"out\.shearing' is damaged: start over with --restart"):
        WorkDirectory(tmp_path / "out")
    assert WorkDirectory(tmp_path / "out", restart=True).stages == {}
    (one.path / "notes.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(UsageError, match="is not the working directory of a shearing"):
            WorkDirectory(tmp_path / "out", restart=restart)


# --- settings and budgets ---------------------------------------------------------------------------------------------------------


def test_the_recipe_says_every_setting() -> None:
    assert set(SHEARINGS["lorashear"]) == set(OWN)
    assert not set(OWN) & set(TRAINING) - {"patience"}
    settings = settle(None, {})
    assert settings == settle("default", {}) == settle({}, {}) == settle({"recipe": "default"}, {})
    assert replace(settings, criterion="saliency") == settle("lorashear", {}) == settle({"recipe": "lorashear"}, {})
    said = settings.to_json()
    assert json.loads(json.dumps(said)) == said
    assert said["patience"] == 1
    assert settle(said, {}).to_json() == said  # what a report says can be a recipe
    assert {n: v for n, v in said.items() if n not in OWN}.items() <= Recovery().to_json().items()
    assert settings.selection(0.2, ["a"]) == Selection(
        ratio=0.2, kinds=("kv_heads", "ffn"), ranking="global", widths="per-layer", protect=("a",)
    )
    assert set(SHEARINGS) & set(RECIPES) == {"default"}
    with pytest.raises(UsageError, match="the recipe 'lorashear' trains while it prunes: it is one of fxprune shear"):
        read_recipe("lorashear")


def test_settings_from_a_file_and_as_typed(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("recipe: lorashear\nperiods: 7\nrank: 3\nkinds: [ffn]\n")
    typed = {
        "rank": "4",
        "penalty": "2.5",
        "one_shot": "true",
        "kinds": "ffn=1,kv_heads=0.5",
        "protect": "a,b",
        "stage_shares": "3,1",
    }
    settings = settle(tmp_path / "mine.yaml", {**typed, "saliency": "magnitude=2,cosine=1", "projection": "linear", "rounds": "3"})
    assert (settings.periods, settings.training.rank, settings.penalty, settings.one_shot) == (7, 4, 2.5, True)
    assert (settings.kinds, settings.protect, settings.stage_shares) == ({"ffn": 1.0, "kv_heads": 0.5}, ["a", "b"], [3.0, 1.0])
    assert (settings.saliency, settings.projection, settings.rounds) == ({"magnitude": 2.0, "cosine": 1.0}, "linear", 3)
    by_saliency = settle(None, {"saliency": "taylor1"})
    assert (by_saliency.saliency, by_saliency.criterion) == ({"taylor1": 1.0}, "saliency")
    assert settle({"saliency": ["cosine"]}, {}).criterion == "saliency"
    assert settle({"recipe": "default", "saliency": {"cosine": 2.0}}, {}).criterion == "saliency"
    with pytest.raises(UsageError, match="and criterion is 'kfac': leave one of them out"):
        settle({"saliency": ["cosine"], "criterion": "kfac"}, {})
    assert settle(None, {"multiple": "ffn=16, kv_heads=2"}).multiple == {"ffn": 16, "kv_heads": 2}
    assert settle(None, {"multiple": "16"}).multiple == 16
    cases = [
        ({"rounds": "two"}, "rounds must be a whole number, got 'two'"),
        ({"penalty": "much"}, "penalty must be a number, got 'much'"),
        ({"penalty": "inf"}, "penalty must be a number, got 'inf'"),
        ({"one_shot": "yes"}, "one_shot must be true or false, got 'yes'"),
        ({"stage_shares": "a,b"}, "stage_shares must be numbers such as 3,1, got 'a,b'"),
        ({"saliency": "cosine=a"}, "saliency must be names, or names with numbers"),
        ({"rank": "four"}, "rank must be a whole number, got 'four'"),
    ]
    for given, said in cases:
        with pytest.raises(UsageError) as caught:
            settle(None, given)
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("budget", "changes", "expected"),
    [
        ({"steps": 100}, {}, (30, 6, 4, 6)),
        ({"steps": 100}, {"shear_share": 1}, (100, 20, 4, 20)),
        ({"tokens": 10_000}, {"periods": 7}, (30, 9, 7, 3)),  # what the periods do not divide is warm-up
        ({"tokens": 10_099}, {"warmup_share": 0, "periods": 5}, (30, 0, 5, 6)),
        ({"steps": 100}, {"one_shot": True}, (30, 6, 1, 1)),
        ({"steps": 100}, {"periods": 1}, (30, 6, 1, 24)),
    ],
)
def test_how_the_steps_are_divided(budget: dict[str, int], changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    found = make_schedule(Budget(**budget), settle(None, changes), 100.0, 2)
    assert (found.steps, found.warmup, found.periods, found.period_steps) == expected


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({}, 16),  # 0.3 of them are 5, one of which is warm-up
        ({"shear_share": 1}, 5),
        ({"shear_share": 0.99}, 150),
        ({"shear_share": 1e-9}, 4_500_000_001),
        ({"warmup_share": 0.999_999_9}, 116_666_665),
    ],
)
def test_the_least_budget(changes: dict[str, Any], least: int) -> None:
    """It is said at once, it is enough, and one step less is not."""
    settings = settle(None, changes)
    with pytest.raises(UsageError, match=r"give at least \d+ steps") as caught:
        make_schedule(Budget(steps=1), settings, 100.0, 2)
    (said,) = map(int, re.findall(r"give at least (\d+) steps", str(caught.value)))
    assert said == least
    make_schedule(Budget(steps=said), settings, 100.0, 2)
    with pytest.raises(UsageError):
        make_schedule(Budget(steps=said - 1), settings, 100.0, 2)


def test_the_least_budget_of_tokens() -> None:
    """Where tokens by step have no exact form."""
    settings, per_step = settle(None, {"shear_share": 1, "warmup_share": 0, "periods": 1008}), 2617.3333333333335
    with pytest.raises(UsageError, match="give at least 2,638,273 tokens"):
        make_schedule(Budget(tokens=2_638_272), settings, per_step, 1)
    assert make_schedule(Budget(tokens=2_638_273), settings, per_step, 1).periods == 1008


def test_what_a_step_is_for_and_what_is_left() -> None:
    schedule = Schedule(steps=9, warmup=2, periods=2, period_steps=3)
    assert [schedule.part(step) for step in range(9)] == [
        *["warm-up"] * 2,
        *["period 1 of 2"] * 3,
        *["period 2 of 2"] * 3,
        "after the periods",
    ]
    assert Budget(tokens=1000).left(700, 9) == {"max_tokens": 300}
    assert Budget(steps=30).left(700, 9) == {"max_steps": 21}
    with pytest.raises(FxPruneError, match=r"tokens must be a whole number of at least 1, got 2\.5"):
        Budget(tokens=2.5)  # type: ignore[arg-type]
