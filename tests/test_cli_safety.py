"""The command: files that it was not asked to touch stay, and nothing that was typed is passed over."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import pytest

import fxprune
from fxprune.api import example_inputs
from fxprune.errors import PlanError, UsageError

from .command import PLAIN, Run, everything
from .zoo import build, tokenizer


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("prune", "old/dense", "--ratio", "0.2", *PLAIN), "the output directory 'old' holds other directories ('dense'): it will"),
        (
            ("shear", "old/dense", "--ratio", "0.2", "--data", "text.txt", "--steps", "20"),
            "'old' holds other directories ('dense')",
        ),
        (("recover", "old/dense", "--data", "text.txt", "--max-steps", "1"), "'old' holds other directories ('dense')"),
    ],
)
def test_a_model_inside_the_output_stays(arguments: tuple[str, ...], said: str, run: Run, place: Path, checkpoint: Path) -> None:
    old = place / "old"
    shutil.copytree(checkpoint, old)
    shutil.copytree(place / "dense", old / "dense")
    before = everything(old)
    ran = run(*arguments, "-o", "old", "--overwrite")
    assert (ran.status, ran.out) == (2, "")
    assert said in ran.said
    assert everything(old) == before
    shutil.rmtree(old)
    shutil.rmtree(place / "old.shearing", ignore_errors=True)
    shutil.rmtree(place / "old.recovering", ignore_errors=True)


TAUGHT = ("recover", "checkpoint", "--data", "text.txt", "--set", "distill_weight=0.5")


@pytest.mark.parametrize(
    ("arguments", "option", "name"),
    [
        (("prune", "dense", "--ratio", "0.2", "--calibration", "old/text.txt"), "--calibration", "old/text.txt"),
        (("prune", "dense", "--ratio", "0.2", "--calibration", "link.txt"), "--calibration", "link.txt"),
        ((*TAUGHT, "--teacher", "old"), "--teacher", "old"),
        (("recover", "checkpoint", "--data", "text.txt=0.5,old/text.txt=0.5"), "--data", "old/text.txt"),
        (("recover", "checkpoint", "--data", "text.txt", "--validation", "old/text.txt"), "--validation", "old/text.txt"),
        (
            ("shear", "dense", "--ratio", "0.2", "--steps", "20", "--data", "text.txt", "--then", "old/text.txt"),
            "--data",
            "old/text.txt",
        ),
        (("recover", "checkpoint", "--data", "text.txt, old/text.txt[text]"), "--data", "old/text.txt"),
        (
            ("recover", "checkpoint", "--curriculum", "static", "--data", "text.txt", "--then", "old/text.txt"),
            "--data",
            "old/text.txt",
        ),
        (("prune", "dense", "--ratio", "0.2", "--recipe", "old/fxprune_recipe.yaml"), "--recipe", "old/fxprune_recipe.yaml"),
    ],
)
def test_what_is_read_is_not_replaced(
    arguments: tuple[str, ...], option: str, name: str, run: Run, place: Path, checkpoint: Path
) -> None:
    old, link = place / "old", place / "link.txt"
    shutil.copytree(checkpoint, old)
    shutil.copy(place / "text.txt", old / "text.txt")
    link.symlink_to(old / "text.txt")
    before = everything(old)
    ran = run(*arguments, "-o", "old", "--overwrite")
    assert (ran.status, ran.out) == (2, "")
    assert f"'{name}' ({option}) is in the output directory 'old', which would be replaced: choose another output" in ran.said
    assert everything(old) == before
    shutil.rmtree(old)
    link.unlink()


def test_a_file_with_the_model_is_not_replaced(run: Run, place: Path, checkpoint: Path) -> None:
    """As repositories of GGUF files are: the weights lie beside a configuration."""
    old = place / "old"
    shutil.copytree(checkpoint, old)
    (old / "model.gguf").write_bytes(b"GGUF")
    ran = run("prune", "old/model.gguf", "--ratio", "0.2", "-o", "old", "--overwrite")
    assert (ran.status, ran.out) == (2, "")
    assert "the output 'old' holds the model 'old/model.gguf'; choose another directory" in ran.said
    assert (old / "model.gguf").is_file()
    shutil.rmtree(old)


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "checkpoint", "--text", "text.txt", "--length", "16", "-o", "checkpoint/fxprune_plan.json"),
        ("compare", "checkpoint", "checkpoint", "-o", "checkpoint/config.json"),
        ("explore", "checkpoint", "-o", "checkpoint/report.html"),
    ],
)
def test_parts_of_a_checkpoint_are_not_written_over(arguments: tuple[str, ...], run: Run, checkpoint: Path) -> None:
    before = everything(checkpoint)
    ran = run(*arguments)
    assert (ran.status, ran.out) == (2, "")
    assert f"'{arguments[-1]}' is a part of the checkpoint 'checkpoint': it will not be replaced; name another file" in ran.said
    assert everything(checkpoint) == before


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("recover", "checkpoint", "-o", "out", "--data", "text.txt", "--data", "short.txt"), "--data"),
        (("prune", "dense", "-o", "out", "--units", "ffn=0.3", "--units=kv_heads=0.5"), "--units"),
        (("prune", "dense", "-o", "out", "--ratio", "0.2", "--output", "other"), "-o/--output"),
        (("eval", "dense", "--texts", "a=text.txt", "--texts", "b=short.txt"), "--texts"),
    ],
)
def test_an_option_that_is_given_twice(arguments: tuple[str, ...], option: str, run: Run) -> None:
    ran = run(*arguments)
    assert (ran.status, ran.out) == (2, "")
    assert f"fxprune {arguments[0]}: error: argument {option}: given twice; it takes one value, see --help for several" in ran.said


def test_options_that_add_up_may_be_repeated(run: Run) -> None:
    ran = run("prune", "dense", "--ratio", "0.1", "--dry-run", "--protect", "model.layers.0", "--protect", "model.layers.1", *PLAIN)
    assert ran.status == 2
    assert "with --kinds kv_heads,ffn, --protect model.layers.0,model.layers.1 at most 0.0% of the parameters can go" in ran.said


def test_numbers_of_another_dense_model_are_not_attached(run: Run, place: Path, checkpoint: Path) -> None:
    wrong = place / "wrong"
    cast(Any, build("gpt2")).save_pretrained(wrong)
    tokenizer().save_pretrained(wrong)
    before = everything(checkpoint)
    options = ("eval", "checkpoint", "--text", "text.txt", "--length", "16", "--dense", "wrong")
    ran = run(*options, "--attach")
    here = sum(p.numel() for p in fxprune.load(checkpoint).parameters())
    assert (ran.status, ran.out) == (2, "")
    assert "'checkpoint' was made from a model of " in ran.said
    assert "parameters, and 'wrong' (--dense) has " in ran.said
    assert f"{here:,}" not in ran.said
    assert everything(checkpoint) == before
    assert run(*options).status == 0  # beside whatever is asked for, where no report says so
    shutil.rmtree(wrong)


def test_recipes_of_another_command(run: Run, place: Path) -> None:
    recipe = place / "mine.yaml"
    recipe.write_text("recipe: default\nperiods: 3\n")
    ran = run("prune", "dense", "-o", "out", "--ratio", "0.2", "--recipe", "mine.yaml")
    assert ran.status == 2
    assert "the recipe 'mine.yaml' has 'periods', a setting of fxprune shear: it is a recipe for that" in ran.said
    recipe.write_text("recipe: default\nranking: local\n")
    ran = run("shear", "dense", "-o", "out", "--ratio", "0.2", "--steps", "20", "--data", "text.txt", "--recipe", "mine.yaml")
    assert ran.status == 2
    assert "the recipe 'mine.yaml' has 'ranking', a setting of fxprune prune: it is a recipe for that" in ran.said
    recipe.unlink()


def test_a_plan_by_its_path(place: Path, checkpoint: Path) -> None:
    model = cast(Any, build("llama", tied=False))
    plans = [fxprune.prune(model, plan=path).plan for path in (checkpoint, str(checkpoint / "fxprune_plan.json"))]
    assert plans[0].counts() == plans[1].counts() == fxprune.PrunePlan.load(checkpoint).counts()
    with pytest.raises(PlanError, match=r"cannot read the plan '.*nowhere': No such file"):
        fxprune.prune(model, plan=place / "nowhere")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"texts": "text.txt"}, "texts are a mapping from names to files, got 'text.txt'"),
        ({"lengths": 32}, "lengths are numbers of tokens in a list, got 32"),
        ({"dense": "dense"}, "the dense model is a module or an evaluation of it, got 'dense'"),
    ],
)
def test_arguments_of_an_evaluation(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        fxprune.evaluate(cast(Any, build("llama")), tokenizer(), tasks=(), **options)


def test_scores_are_of_batches() -> None:
    model = build("llama")
    gm = fxprune.trace(model, example_inputs(model))
    with pytest.raises(
        UsageError, match=r"calibration is a list of batches here, got 'text.txt': fxprune.calibration.load_calibration"
    ):
        fxprune.score(gm, fxprune.find_groups(gm), calibration="text.txt")  # type: ignore[arg-type]


def test_what_is_cut_or_too_little_is_told(run: Run, place: Path) -> None:
    ran = run("prune", "dense", "-o", "out", "--ratio", "0.2", *PLAIN, "--length", "10000")
    assert ran.status == 0
    assert "note length 10,000 became 64: the model reads no more tokens" in ran.said
    ran = run("recover", "out", "-o", "again", "--data", "short.txt", "--max-steps", "1")
    assert ran.status == 0
    assert "nothing was held out to measure on: that would be a tenth, and there is no more than 1 example" in ran.said
    shutil.rmtree(place / "out")
    shutil.rmtree(place / "again")
