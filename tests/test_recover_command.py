"""``fxprune recover``: what it prints where, what it writes, what it refuses, and how it goes on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from fxprune.recovery import loop

from .command import Ran, Run, call
from .recovering import logits, pruned, write_text
from .zoo import build

SHORT = ["--cutoff", "24", "--length", "48", "--batch-size", "6", "--lr", "3e-3", "--max-steps", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned checkpoint, its dense model, one without tokenizer, and text."""
    made = tmp_path_factory.mktemp("place")
    pruned().save_pretrained(made / "pruned")
    cast(Any, build("llama")).save_pretrained(made / "dense")
    write_text(made / "text.jsonl")
    write_text(made / "held.jsonl", rows=9, seed=9, pace=5)  # nothing in common
    return made


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command in an empty directory beside which ``../place`` has the files."""
    monkeypatch.chdir(tmp_path)
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)

    def command(*arguments: str) -> Ran:
        return call(capsys, "recover", *arguments)

    yield command
    logging.getLogger("fxprune").setLevel(logging.NOTSET)


def test_a_recovery_from_end_to_end(run: Run) -> None:
    ran = run("pruned", "-o", "out", "--data", "text.jsonl", *SHORT, "--set", "validation_every=2", "--set", "dropout=0.1")
    assert (ran.status, ran.out) == (0, "out\n")
    assert "trained 19,456 parameters" in ran.said
    assert "steps 4 (all steps done), " in ran.said
    assert "held out of text.jsonl)" in ran.said
    report = json.loads(Path("out/fxprune_report.json").read_text())["recovery"]
    assert (report["steps"], report["settings"]["dropout"], report["recipe"]) == (4, 0.1, "default")
    stock = AutoModelForCausalLM.from_pretrained("out")
    assert not torch.equal(logits(stock), logits(AutoModelForCausalLM.from_pretrained("pruned")))
    assert sorted(p.name for p in Path().iterdir() if not p.is_symlink()) == ["out"]
    again = run("pruned", "-o", "out", "--data", "text.jsonl", *SHORT)
    assert (again.status, again.said) == (
        2,
        "fxprune: the output directory 'out' exists and is not empty; choose another, or say --overwrite",
    )
    assert run("pruned", "-o", "out", "--overwrite", "--data", "text.jsonl", *SHORT, "--seed", "1").status == 0
    assert json.loads(Path("out/fxprune_report.json").read_text())["recovery"]["settings"]["seed"] == 1


def test_the_model_itself_is_not_replaced(run: Run) -> None:
    shutil.copytree("pruned", "own")
    before = {p.name: p.read_bytes() for p in Path("own").iterdir()}
    ran = run("own", "-o", "own", "--overwrite", "--data", "text.jsonl", *SHORT)
    assert (ran.status, ran.said) == (2, "fxprune: the output 'own' is the model itself; choose another directory")
    assert {p.name: p.read_bytes() for p in Path("own").iterdir()} == before


def test_the_report_names_all_that_was_typed(run: Run) -> None:
    """Weights, validation, teacher and dtype stand in the command that makes it again; a second training comes after the first."""
    typed = ["--data", "text.jsonl=3,held.jsonl=1", *SHORT, "--dtype", "bfloat16", "--teacher", "dense"]
    assert run("pruned", "-o", "out", *typed, "--set", "distill_weight=0.5").status == 0
    kept = json.loads(Path("out/fxprune_report.json").read_text())
    assert kept["bytes_after"] == sum(t.numel() * 2 for t in AutoModelForCausalLM.from_pretrained("out").parameters())
    assert run("out", "-o", "twice", "--data", "text.jsonl", "--validation", "held.jsonl", *SHORT).status == 0
    text = " ".join(Path("twice/report.md").read_text().replace("\\\n", " ").split())
    first = "fxprune recover PRUNED --data text.jsonl=3,held.jsonl=1 --teacher dense --dtype bfloat16 --set "
    assert text.index(first) < text.index("fxprune recover RECOVERED-1 --data text.jsonl --validation held.jsonl --set ")
    assert "-o RECOVERED-1" in text
    assert "-o twice" in text


def test_a_model_that_was_not_pruned(run: Run) -> None:
    shutil.copytree("pruned", "plain", ignore=shutil.ignore_patterns("fxprune_*"))
    ran = run("plain", "-o", "out", "--data", "text.jsonl", *SHORT)
    assert ran.status == 0
    assert ran.said.startswith("note 'plain' holds no plan of fxprune: it is trained as it is"), "before anything is trained"
    assert ran.said.count("holds no plan") == 1
    assert "holds no plan" not in run("pruned", "-o", "other", "--data", "text.jsonl", *SHORT).said


def test_the_papers_recipe_with_a_teacher(run: Run) -> None:
    options = ["--recipe", "llm-pruner", "--teacher", "dense", "--set", "distill_weight=0.5", *SHORT, "--samples", "60"]
    ran = run("pruned", "-o", "out", "--data", "text.jsonl=1", "--validation", "held.jsonl", *options, "--rank", "4")
    assert ran.status == 0, ran.err
    report = json.loads(Path("out/fxprune_report.json").read_text())["recovery"]
    assert (report["recipe"], report["settings"]["schedule"], report["settings"]["rank"]) == ("llm-pruner", "linear", 4)
    assert report["teacher"].startswith("LlamaForCausalLM, ")
    assert report["data"]["training"]["examples"] == 60
    assert report["data"]["validation"]["sources"] == "held.jsonl"


def test_fewer_steps_than_were_asked_for(run: Run) -> None:
    ran = run("pruned", "-o", "out", "--data", "text.jsonl", *SHORT[:-1], "900", "--epochs", "2")
    assert ran.status == 0
    steps = json.loads(Path("out/fxprune_report.json").read_text())["recovery"]["steps"]
    assert f"steps {steps} (not 900: 2 epochs of the data give no more), " in ran.said


def test_interrupted_by_hand(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["pruned", "-o", "out", "--data", "text.jsonl", *SHORT, "--set", "checkpoint_every=1"]
    real, count = loop.Training._step, [0]

    def step(self: loop.Training) -> None:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_step", step)
        ran = run(*command)
    assert ran.status == 130
    assert ran.said == "fxprune: interrupted; the same command goes on from the state in 'out.recovering'"
    ran = run(*command, "--rank", "3")
    assert ran.status == 2
    assert "'out.recovering' holds the state of another recovery: rank was 16, now 3. Repeat" in ran.said
    ran = run(*command)
    assert ran.status == 0
    assert ran.said.startswith("note 'out.recovering' holds a state: the same command goes on from it (--restart begins anew)")
    assert not Path("out.recovering").exists()
    assert json.loads(Path("out/fxprune_report.json").read_text())["recovery"]["steps"] == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pruned", "--data", "text.jsonl"], "the following arguments are required: -o/--output"),
        (["pruned", "-o", "out"], "the following arguments are required: --data"),
        (
            ["pruned", "-o", "out", "--data", "text.jsonl", "--recipe", "llmpruner"],
            "unknown recipe 'llmpruner'; did you mean 'llm-pruner'?",
        ),
        (["pruned", "-o", "out", "--data", "text.jsonl", "--lr", "fast"], "lr must be a number, got 'fast'"),
        (
            ["pruned", "-o", "out", "--data", "text.jsonl", "--set", "dropuot=1"],
            "no recovery setting 'dropuot'; did you mean 'dropout'?",
        ),
        (["pruned", "-o", "out", "--data", "text.jsonl", "--set", "dropout"], "--set takes field=value, got 'dropout'"),
        (["pruned", "-o", "out", "--data", "text.jsonl", "--lr", "1", "--set", "lr=2"], "lr is set twice"),
        (["pruned", "-o", "out", "--data", "text.json"], "there is no file 'text.json'"),
        (["nowhere", "-o", "out", "--data", "text.jsonl"], "there is no directory 'nowhere'"),
        (["text.jsonl", "-o", "out", "--data", "text.jsonl"], "there is no directory 'text.jsonl'"),
        (["dense", "-o", "out", "--data", "text.jsonl"], "text needs a tokenizer, and there is none beside the model"),
        (["pruned", "-o", "text.jsonl", "--data", "text.jsonl"], "the output 'text.jsonl' is a file; name a directory"),
        (["pruned", "-o", "out", "--data", "text.jsonl", "--device", "meta"], "cannot use device 'meta'"),
        (["pruned", "-o", "out", "--data", "text.jsonl", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["pruned", "-o", "out", "--data", "text.jsonl", "--teacher", "dense"], "there is a teacher and nothing to learn from it"),
        (["pruned", "-o", "out", "--data", "text.jsonl", "--set", "hidden_weight=1"], "hidden_weight is 1 and there is no teacher"),
    ],
    ids=lambda value: "-".join(value[1:]) if isinstance(value, list) else "",
)
def test_what_the_command_refuses(arguments: list[str], said: str, run: Run) -> None:
    ran = run(*arguments)
    assert ran.status == 2
    assert said in ran.said
    assert ran.out == ""
    assert not [p.name for p in Path().iterdir() if not p.is_symlink()]
