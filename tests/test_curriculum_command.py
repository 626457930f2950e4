"""``fxprune recover --curriculum``: what it says and writes, the plot, what it refuses, ``kill -9``, and two processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file

from fxprune.errors import UsageError
from fxprune.recovery.curriculum import Curriculum
from fxprune.recovery.plot import plot_curriculum

from .command import Run, beside_links
from .curricula import SHORT, damaged, dense, measurements, taught, write_sources
from .processes import LAUNCH, finished, kill_again_and_again
from .recovering import SLOWLY, write_instructions
from .zoo import tokenizer

OPTIONS = [
    *("--method", "full", "--cutoff", "60", "--length", "60", "--batch-size", "6", "--lr", "3e-3", "--max-steps", "8"),
    *("--set", "warmup=2"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The damaged model, its dense one, and text."""
    made = tmp_path_factory.mktemp("place")
    for name, model in (("pruned", damaged()), ("dense", dense())):
        cast(Any, model).save_pretrained(made / name)
        tokenizer().save_pretrained(made / name)
    write_sources(made)
    write_instructions(made / "alpaca.jsonl")
    return made


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    yield from beside_links(place, tmp_path, monkeypatch, capsys, "recover", "pruned", "-o", "out")


def reported() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("out/fxprune_report.json").read_text())["recovery"]
    return found


def test_dynamic_weights_from_end_to_end(run: Run) -> None:
    options = ["--curriculum", "dynamic", "--data", "kept.jsonl,lost.jsonl", "--then", "alpaca.jsonl", "--teacher", "dense"]
    lessons = ["--rounds", "2", "--floor", "0.1", "--patience", "2", "--threshold", "0.01", "--shares", "3,1", "--plot", "lost.png"]
    ran = run(*options, *lessons, *OPTIONS)
    assert (ran.status, ran.out) == (0, "out\n"), ran.err
    report = reported()["curriculum"]
    first = report["measurements"][0]
    assert "steps 8 (all rounds done), " in ran.said
    assert "stage 1 2 rounds (all rounds done)" in ran.said
    before, after = first["degradation"]["lost.jsonl"], report["final"]["lost.jsonl"]["degradation"]
    assert (
        f"lost.jsonl: degradation {before:.3f} -> {after:.3f} nats per token, share of tokens {first['weights']['lost.jsonl']:.0%}"
        in (ran.said)
    )
    assert "note stage 2 (alpaca.jsonl) has one source: dynamic weights have nothing to choose there" in ran.said
    chosen = {"weights": "dynamic", "rounds": 2, "floor": 0.1, "patience": 2, "threshold": 0.01, "shares": [3.0, 1.0]}
    assert {name: report[name] for name in chosen} == chosen
    assert [r["step"] for r in report["measurements"]] == [0, 3, 6, 6, 7, 8]
    assert imread("lost.png").shape == (720, 960, 4)
    assert sorted(p.name for p in Path().iterdir() if not p.is_symlink()) == ["lost.png", "out"]


def test_static_weights_without_a_teacher(run: Run) -> None:
    ran = run("--curriculum", "static", "--data", "kept.jsonl=3,lost.jsonl=1", "--rounds", "1", "--max-tokens", "900", *OPTIONS)
    assert ran.status == 0, ran.err
    report = reported()
    assert report["curriculum"]["measurements"][0]["weights"] == {"kept.jsonl": 0.75, "lost.jsonl": 0.25}
    assert report["settings"]["max_tokens"] == 900
    assert report["tokens"] <= 900
    assert "stage 1 1 round (all rounds done)" in ran.said
    assert "lost.jsonl: held-out loss " in ran.said
    assert "share of tokens 25%" in ran.said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--curriculum", "dynamic"], "dynamic weights follow what the pruned model has lost against the dense one"),
        (["--curriculum", "dynmic"], "unknown weights 'dynmic' of a curriculum; did you mean 'dynamic'?"),
        (["--then", "alpaca.jsonl"], "--then is of a curriculum: say --curriculum dynamic or --curriculum static too"),
        (["--rounds", "3"], "--rounds is of a curriculum: say --curriculum dynamic or --curriculum static too"),
        (["--patience", "3"], "--patience is of a curriculum"),
        (["--plot", "lost.png"], "--plot is of a curriculum"),
        (["--curriculum", "static", "--floor", "2"], "floor of a curriculum must lie above 0 and be at most 1, got 2.0"),
        (["--curriculum", "static", "--rounds", "two"], "argument --rounds: invalid int value: 'two'"),
        (["--curriculum", "static", "--shares", "a,b"], "argument --shares: 'a,b' is not of the form number,number"),
        (["--curriculum", "static", "--then", "none.jsonl"], "stage 2 of the curriculum: there is no file 'none.jsonl'"),
        (["--curriculum", "static", "--set", "patience=2"], "patience is of a recovery without a curriculum: set patience of the"),
        (["--curriculum", "static", "--plot", "lost.txt"], "cannot write a plot as 'lost.txt': its name must end in one of"),
        (["--curriculum", "static", "--plot", "no/x.png"], "there is no directory 'no' to write 'x.png' to"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_the_command_refuses(arguments: list[str], said: str, run: Run) -> None:
    ran = run("--data", "kept.jsonl,lost.jsonl", *arguments, *OPTIONS)
    assert ran.status == 2
    assert said in ran.said
    assert ran.out == ""
    assert not [p.name for p in Path().iterdir() if not p.is_symlink()]


def test_a_plot_shows_each_share(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the picture's own numbers: a bar for each source and round, and a line of degradation."""
    from matplotlib.axes import Axes

    result = taught(Curriculum([[str(place / "kept.jsonl"), str(place / "lost.jsonl")]], rounds=2, patience=0))
    bars: list[tuple[float, float, float]] = []
    lines: list[tuple[Any, Any]] = []
    bar, plot = Axes.bar, Axes.plot

    def drawn_bar(axes: Axes, x: float, height: float, width: float, **options: Any) -> Any:
        bars.append((x, height, width))
        return bar(axes, x, height, width, **options)

    def drawn_line(axes: Axes, x: Any, y: Any, **options: Any) -> Any:
        lines.append((x, y))
        return plot(axes, x, y, **options)

    monkeypatch.setattr(Axes, "bar", drawn_bar)
    monkeypatch.setattr(Axes, "plot", drawn_line)
    curriculum: Any = json.loads(json.dumps(result.report.to_json()))["curriculum"]
    plot_curriculum(curriculum, tmp_path / "lost.svg")
    records = measurements(result)
    assert bars == [(r["step"], share, r["steps"]) for r in records[:2] for share in r["weights"].values()]
    names = ("kept.jsonl", "lost.jsonl")
    assert lines[:2] == [((0, 6, 12), tuple(r["degradation"][name] for r in records)) for name in names]
    assert (tmp_path / "lost.svg").read_text().startswith("<?xml")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"a plot needs matplotlib \(.*\): pip install 'fxprune\[plot\]'"):
        plot_curriculum(curriculum, tmp_path / "other.png")


# --- other processes --------------------------------------------------------------------------------------------------------------


def command(place: Path, out: Path, **changes: Any) -> list[str]:
    options = {**SHORT, "max_steps": 24, "checkpoint_every": 1, "dropout": 0.2, **changes}
    sets = [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
    stages = ["--data", f"{place / 'kept.jsonl'},{place / 'lost.jsonl'}", "--then", str(place / "lost.jsonl"), "--patience", "0"]
    return [
        "recover",
        str(place / "pruned"),
        "-o",
        str(out),
        "--curriculum",
        "dynamic",
        "--teacher",
        str(place / "dense"),
        *stages,
        *sets,
    ]


@pytest.mark.slow
def test_kill_nine_at_any_moment(place: Path, tmp_path: Path) -> None:
    """Killed by a clock that knows nothing of rounds: weights, measurements and shares are those of a run that was never killed."""
    expected = finished(["-m", "fxprune.cli", *command(place, tmp_path / "expected")], tmp_path / "expected")["recovery"]
    out, state = tmp_path / "out", tmp_path / "out.recovering"
    arguments = ["-c", SLOWLY, *command(place, out)]
    kill_again_and_again(arguments, out, lambda: {*state.glob("step-*")}, times=5, longest=0.6)
    found = finished(arguments, out)["recovery"]
    assert found["history"]["loss"] == expected["history"]["loss"]
    assert found["curriculum"] == expected["curriculum"]
    a, b = (load_file(path / "model.safetensors") for path in (tmp_path / "expected", out))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_two_processes_choose_what_one_does(place: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 8, "dropout": 0.0, "batch_size": 5, "micro_batch_size": 2}
    expected = finished(["-m", "fxprune.cli", *command(place, tmp_path / "one", **changes)], tmp_path / "one")["recovery"]
    found = finished([*LAUNCH, "-m", "fxprune.cli", *command(place, tmp_path / "two", **changes)], tmp_path / "two")["recovery"]
    assert (found["choices"]["parallel"], found["choices"]["processes"]) == ("ddp", 2)
    assert found["history"]["loss"] == pytest.approx(expected["history"]["loss"], abs=1e-4)
    for one, two in zip(expected["curriculum"]["measurements"], found["curriculum"]["measurements"], strict=True):
        for name in ("loss", "degradation", "weights"):
            assert two[name] == pytest.approx(one[name], abs=1e-4)
