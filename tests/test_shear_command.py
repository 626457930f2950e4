"""``fxprune shear``: what it says and writes, what it refuses, and ``kill -9``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fxprune.cli import main

from .command import Run, beside_links
from .curricula import dense, write_sources
from .processes import finished, kill_again_and_again
from .recovering import SLOWLY, write_instructions
from .zoo import tokenizer

OPTIONS = [
    *("--cutoff", "60", "--length", "60", "--batch-size", "4", "--lr", "3e-3", "--rank", "4", "--periods", "2", "--rounds", "2"),
    *("--set", "knowledge_samples=4", "--set", "knowledge_length=20"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and text."""
    made = tmp_path_factory.mktemp("place")
    cast(Any, dense()).save_pretrained(made / "dense")
    tokenizer().save_pretrained(made / "dense")
    write_sources(made)
    write_instructions(made / "alpaca.jsonl")
    return made


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    yield from beside_links(place, tmp_path, monkeypatch, capsys, "shear", "dense", "-o", "out")


def made() -> list[str]:
    return sorted(p.name for p in Path().iterdir() if not p.is_symlink())


def test_all_stages_from_end_to_end(run: Run) -> None:
    sources = ["--data", "kept.jsonl=1,lost.jsonl=1", "--then", "alpaca.jsonl", "--patience", "0", "--plot", "lost.png"]
    ran = run("--ratio", "0.2", *sources, "--tokens", "6000", *OPTIONS)
    assert (ran.status, ran.out) == (0, "out\n"), ran.err
    assert made() == ["lost.png", "out"]
    assert imread("lost.png").ndim == 3
    written = json.loads(Path("out/fxprune_report.json").read_text())
    report, recovery = written["shearing"], written["recovery"]
    assert ran.said.startswith("recipe default, with rank=4, ")
    assert "periods=2, " in ran.said
    assert "projection" not in ran.said, "what is as in the recipe"
    assert f"parameters {report['parameters_before']:,} -> {report['parameters_after']:,} (-20." in ran.said
    assert f"left whole: {report['knowledge']['protected'][0]}" in ran.said
    assert "period 2 " in ran.said
    assert f"removed {report['prune']['zeros']:,} numbers, all exactly 0; relative error " in ran.said
    assert "stage 1 2 rounds (all rounds done)" in ran.said
    assert "lost.jsonl: degradation " in ran.said
    tokens = report["tokens"]
    assert f"recovery {tokens['recovery']:,}" in ran.said
    assert f"total {tokens['total']:,}" in ran.said
    assert 5000 < tokens["total"] == tokens["recovery"] + report["lhspg"]["history"]["tokens"][-1] <= 6000
    assert [list(stage) for stage in recovery["curriculum"]["stages"]] == [["kept.jsonl", "lost.jsonl"], ["alpaca.jsonl"]]
    model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
    assert sum(p.numel() for p in model.parameters()) == report["parameters_after"]


def test_what_was_sheared_is_not_what_was_only_cut(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    ran = run("--ratio", "0.1", "--data", "kept.jsonl", "--steps", "6", "--shear-share", "1", "--protect-share", "0", *OPTIONS)
    assert ran.status == 0, ran.err
    assert main(["verify", "out", "--dense", "dense"]) == 0
    assert "besides being cut, weights were changed by shearing: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: --ratio"),
        (
            ["--ratio", "0.2", "--steps", "5", "--tokens", "5"],
            "say how long to train: one of tokens (--tokens) and steps (--steps)",
        ),
        (["--ratio", "0.2"], "say how long to train: one of tokens (--tokens) and steps (--steps), not both or neither"),
        (["--ratio", "2", "--steps", "20"], "a ratio must lie between 0 and 1 (0.2 removes 20 %), got 2.0"),
        (["--ratio", "0.2", "--steps", "20", "--kinds", "fn"], "unknown kind 'fn'; did you mean 'ffn'?"),
        (
            ["--ratio", "0.2", "--steps", "20", "--set", "perods=3"],
            "there is no shearing setting 'perods'; did you mean 'periods'?",
        ),
        (["--ratio", "0.2", "--steps", "20", "--set", "perods"], "--set takes field=value, got 'perods'"),
        (["--ratio", "0.2", "--steps", "20", "--set", "periods=3"], "periods is set twice"),
        (["--ratio", "0.2", "--steps", "20", "--knowledge", "none.json"], "cannot read 'none.json': No such file or directory"),
        (
            ["--ratio", "0.2", "--steps", "20", "--plot", "x.txt"],
            "cannot write a plot as 'x.txt': its name must end in one of .pdf, .png, .svg",
        ),
        (
            ["--ratio", "0.2", "--steps", "20", "--shear-share", "1", "--plot", "x.png"],
            "--plot draws the recovery, and --shear-share is 1: there is none",
        ),
        (["--ratio", "0.2", "--steps", "20", "--device", "cuda:9"], "cannot use device 'cuda:9'"),
        (["--ratio", "0.2", "--steps", "20", "--recipe", "mine.yaml"], "there is no recipe file 'mine.yaml'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_the_command_refuses(arguments: list[str], said: str, run: Run) -> None:
    ran = run("--data", "kept.jsonl", *arguments, *OPTIONS)
    assert ran.status == 2
    assert said in ran.said
    assert ran.out == ""
    assert not made()


def test_interrupted_by_hand(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxprune.commands.shear.shear", interrupted)
    ran = run("--ratio", "0.2", "--data", "kept.jsonl", "--steps", "20", *OPTIONS)
    assert (ran.status, ran.out) == (130, "")
    assert ran.said.endswith("fxprune: interrupted; there was no state to keep yet")
    Path("out.shearing/knowledge").mkdir(parents=True)
    ran = run("--ratio", "0.2", "--data", "kept.jsonl", "--steps", "20", *OPTIONS)
    assert ran.said.endswith("fxprune: interrupted; the same command goes on from the state in 'out.shearing'")


# --- other processes --------------------------------------------------------------------------------------------------------------


def command(place: Path, out: Path) -> list[str]:
    sources = ["--data", f"{place / 'kept.jsonl'},{place / 'lost.jsonl'}", "--then", str(place / "alpaca.jsonl"), "--patience", "0"]
    sets = ["--set", "checkpoint_every=1", "--set", "dropout=0.2"]
    return ["shear", str(place / "dense"), "-o", str(out), "--ratio", "0.2", "--steps", "24", *sources, *OPTIONS, *sets]


@pytest.mark.slow
def test_kill_nine_at_any_moment(place: Path, tmp_path: Path) -> None:
    """Killed by a clock that knows nothing of stages: units, losses, shares and weights are those of a run that never was."""
    expected = finished(["-m", "fxprune.cli", *command(place, tmp_path / "expected")], tmp_path / "expected")
    out, work = tmp_path / "out", tmp_path / "out.shearing"
    arguments = ["-c", SLOWLY, *command(place, out)]
    kill_again_and_again(arguments, out, lambda: {*work.rglob("*")} - {work / "lock"}, times=4, longest=2.5)
    if out.exists() and not (work / "run.json").exists():  # killed when all was done but for the exit
        found = json.loads((out / "fxprune_report.json").read_text())
        shutil.rmtree(work, ignore_errors=True)
    else:
        found = finished(arguments, out)
    for report in (found, expected):
        assert report["shearing"]["lhspg"]["history"]["step"] == list(range(1, 8))
    assert found["shearing"]["lhspg"]["history"] == expected["shearing"]["lhspg"]["history"]
    assert found["shearing"]["lhspg"]["periods"] == expected["shearing"]["lhspg"]["periods"]
    assert found["recovery"]["history"] == expected["recovery"]["history"]
    assert found["recovery"]["curriculum"] == expected["recovery"]["curriculum"]
    a, b = (load_file(path / "model.safetensors") for path in (tmp_path / "expected", out))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(os.listdir(tmp_path)) == ["expected", "out"]
