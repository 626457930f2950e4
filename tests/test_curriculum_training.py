"""A curriculum at work: what is measured, where the tokens go, when a stage ends, what is kept, and a run that was interrupted."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import fxprune
from fxprune.data import load_examples
from fxprune.errors import FxPruneError, UsageError
from fxprune.recovery.curriculum import Curriculum
from fxprune.recovery.loop import Training
from fxprune.recovery.result import RecoveryResult
from fxprune.recovery.run import recover
from fxprune.recovery.settings import Recovery

from .curricula import SHORT, damaged, dense, measurements, taught, write_sources, write_words
from .recovering import losses, weights, write_instructions
from .zoo import tokenizer, tokens


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return write_sources(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_instructions(tmp_path_factory.mktemp("alpaca") / "alpaca.jsonl"))


def same_weights(one: RecoveryResult, other: RecoveryResult) -> bool:
    ours, theirs = weights(one.model), weights(other.model)
    return all(torch.equal(ours[n], theirs[n]) for n in ours)


def plain_loss(model: Any, file: str) -> float:
    """On what is held out of a source, each example alone."""
    examples = load_examples(file, tokenizer(), cutoff=24)
    held = examples.split(len(examples) // 10, 0)[1]
    with torch.no_grad():
        each = [
            functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], labels[1:], reduction="none")
            for ids, labels in map(held.__getitem__, range(len(held)))
        ]
    return float(torch.cat(each).mean())


# --- what is measured and where the tokens go -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_degradation_is_what_plain_torch_measures(packing: str, files: tuple[str, str]) -> None:
    result = taught(Curriculum([list(files)], rounds=1), packing=packing)
    assert result.report.choices["packing"] is (packing == "auto")
    report: Any = result.report.curriculum
    before, after = measurements(result)
    for file, name in zip(files, ("kept.jsonl", "lost.jsonl"), strict=True):
        known = plain_loss(dense(), file)
        assert report["dense"][name] == pytest.approx(known, abs=1e-5)
        assert before["loss"][name] == pytest.approx(plain_loss(damaged(), file), abs=1e-5)
        assert before["degradation"][name] == pytest.approx(before["loss"][name] - known, abs=1e-5)
        assert after["loss"][name] == pytest.approx(plain_loss(result.model, file), abs=1e-5)
        assert report["final"][name] == {"loss": after["loss"][name], "degradation": after["degradation"][name]}
    assert before["mean"] == pytest.approx(sum(before["degradation"].values()) / 2)


def test_what_was_lost_is_read_more_until_it_is_recovered(files: tuple[str, str]) -> None:
    """The planted case: the embeddings of the second source's words were mixed up."""
    result = taught(Curriculum([list(files)], floor=0.1), max_steps=24)
    records = measurements(result)
    first, last = records[0], records[-1]
    assert [r["round"] for r in records] == [1, 2, 3, 4, 5]
    assert first["degradation"]["lost.jsonl"] > 5 * first["degradation"]["kept.jsonl"] > 0
    expected = 0.1 + 0.8 * first["degradation"]["lost.jsonl"] / sum(first["degradation"].values())
    assert first["weights"] == pytest.approx({"lost.jsonl": expected, "kept.jsonl": 1 - expected})
    for record in records[:-1]:
        assert 0.1 <= record["weights"]["kept.jsonl"] < record["weights"]["lost.jsonl"]
        read = record["tokens"]["lost.jsonl"] / sum(record["tokens"].values())
        assert read == pytest.approx(record["weights"]["lost.jsonl"], abs=0.03)
    assert last["degradation"]["lost.jsonl"] < 0.3 * first["degradation"]["lost.jsonl"]
    assert last["degradation"]["kept.jsonl"] < first["degradation"]["kept.jsonl"]
    assert sum(sum(r["tokens"].values()) for r in records[:-1]) == result.report.tokens


def test_static_weights_are_the_same_run_without_the_measurement(files: tuple[str, str]) -> None:
    """As many tokens and steps; what was lost gets fewer of them and is recovered less."""
    dynamic, static = (taught(Curriculum([list(files)], name), max_steps=24) for name in ("dynamic", "static"))
    assert [r["weights"] for r in measurements(static)] == 5 * [{"kept.jsonl": 0.5, "lost.jsonl": 0.5}]
    assert measurements(static)[0]["degradation"] == measurements(dynamic)[0]["degradation"]
    assert static.report.steps == dynamic.report.steps == 24
    assert static.report.tokens == pytest.approx(dynamic.report.tokens, rel=0.02)
    assert static.report.history["lr"] == dynamic.report.history["lr"]
    found = [measurements(r)[-1]["degradation"]["lost.jsonl"] for r in (dynamic, static)]
    assert found[0] < 0.8 * found[1]
    thirds = taught(Curriculum([f"{files[0]}=2,{files[1]}"], "static", rounds=2))
    assert measurements(thirds)[0]["weights"] == pytest.approx({"kept.jsonl": 2 / 3, "lost.jsonl": 1 / 3})
    assert measurements(thirds)[0]["mean"] == pytest.approx(
        (2 * measurements(thirds)[0]["degradation"]["kept.jsonl"] + measurements(thirds)[0]["degradation"]["lost.jsonl"]) / 3
    )


def test_static_weights_without_a_dense_model(files: tuple[str, str]) -> None:
    """Losses are measured alone; the run is the same."""
    made = Curriculum([list(files)], "static", rounds=2)
    alone = recover(damaged(), curriculum=made, tokenizer=tokenizer(), **{**SHORT, "method": "full"})
    beside = taught(made)
    assert same_weights(alone, beside)
    report: Any = alone.report.curriculum
    assert (alone.report.teacher, report["dense"]) == (None, {})
    assert [r["degradation"] for r in measurements(alone)] == [None, None, None]
    assert [r["loss"] for r in measurements(alone)] == [r["loss"] for r in measurements(beside)]
    assert measurements(alone)[0]["mean"] == pytest.approx(sum(measurements(alone)[0]["loss"].values()) / 2)
    assert set(report["final"]["kept.jsonl"]) == {"loss", "degradation"}
    assert report["final"]["kept.jsonl"]["degradation"] is None


def test_one_source_has_nothing_to_choose(files: tuple[str, str]) -> None:
    result = taught(Curriculum([[files[1]]], rounds=2))
    assert result.report.notes == ["stage 1 (lost.jsonl) has one source: dynamic weights have nothing to choose there"]
    assert [r["weights"] for r in measurements(result)] == 3 * [{"lost.jsonl": 1.0}]
    assert not taught(Curriculum([[files[1]]], "static", rounds=2)).report.notes
    (note,) = taught(Curriculum([[files[1]]], "static", rounds=2), warmup=1000).report.notes
    assert note.startswith("the warm-up takes 1000 steps and a stage has "), "each stage has a schedule of its own"


# --- stages, schedules and the budget ---------------------------------------------------------------------------------------------


def test_two_stages_are_two_recoveries_one_after_the_other(files: tuple[str, str], alpaca: str) -> None:
    """Optimizer, schedule, best weights: the second stage begins where a recovery of the first one's result would."""
    text, instructions = [list(files)], [alpaca]
    options: dict[str, Any] = {"cutoff": 60, "length": 60, "validation_samples": 6}
    both = taught(Curriculum([*text, instructions], rounds=3, shares=(2, 1)), max_steps=18, **options)
    first = taught(Curriculum(text, rounds=3), max_steps=12, **options)
    how: dict[str, Any] = {**SHORT, **options, "method": "full", "max_steps": 6}
    second = recover(first.model, curriculum=Curriculum([instructions], rounds=3), teacher=dense(), tokenizer=tokenizer(), **how)
    assert losses(both) == losses(first) + losses(second)
    assert same_weights(both, second)
    settings = Recovery(**both.report.settings)
    assert both.report.history["lr"] == [settings.rate(i, 12) for i in range(12)] + [settings.rate(i, 6) for i in range(6)]
    assert [r["step"] for r in measurements(both, 1)] == [0, 4, 8, 12]
    assert [r["step"] for r in measurements(both, 2)] == [12, 14, 16, 18]
    final: Any = both.report.curriculum
    assert final["final"]["alpaca.jsonl"]["loss"] == measurements(both, 2)[-1]["loss"]["alpaca.jsonl"]
    assert final["final"]["kept.jsonl"]["loss"] != measurements(both, 1)[-1]["loss"]["kept.jsonl"]


def test_a_source_of_two_stages_is_held_out_of_both(files: tuple[str, str], alpaca: str) -> None:
    result = taught(Curriculum([list(files), [alpaca, files[0]]], rounds=1), cutoff=60, length=60, max_steps=2)
    report: Any = result.report.curriculum
    assert list(report["final"]) == ["kept.jsonl", "lost.jsonl", "alpaca.jsonl"]
    assert list(measurements(result, 2)[0]["loss"]) == ["alpaca.jsonl", "kept.jsonl"]
    assert measurements(result, 2)[0]["loss"]["kept.jsonl"] == measurements(result, 1)[-1]["loss"]["kept.jsonl"]


def test_nothing_is_read_twice_before_all_of_its_source_was_read(files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the rounds, whose weights differ."""
    damaged()  # it is trained too, once
    counts, names, real = torch.zeros(288, dtype=torch.long), [""], Training._step

    def step(self: Training) -> None:
        due = self._due()
        counts[due.batches.epoch(due.epoch)[due.index]] += 1
        names[:] = [due.batches.examples.names[i] for i in due.batches.examples.source.tolist()]
        real(self)

    monkeypatch.setattr(Training, "_step", step)
    result = taught(Curriculum([list(files)], patience=0), max_steps=30, packing="off")
    assert len({r["weights"]["lost.jsonl"] for r in measurements(result)}) > 1
    for name in ("kept.jsonl", "lost.jsonl"):
        own = counts[[n == name for n in names]]
        assert (len(own), int(own.max()) - int(own.min())) == (144, 1)
    assert int(counts.sum()) == 180


@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize("budget", [1500, 4000])
def test_the_tokens_are_not_exceeded(budget: int, packing: str, tmp_path: Path) -> None:
    """Without packing, a source of short texts and one of long ones: weights that move to the long one make fewer steps."""
    long, short = write_words(tmp_path / "long.jsonl", 47), tmp_path / "short.jsonl"
    lines = [json.loads(line)["text"].split()[:5] for line in write_words(short, 0, rows=400).read_text().splitlines()]
    short.write_text("\n".join(json.dumps({"text": " ".join(words)}) for words in lines))
    result = taught(Curriculum([[str(long), str(short)]], patience=0), max_steps=None, max_tokens=budget, packing=packing)
    assert result.report.tokens == pytest.approx(budget, rel=0.15)
    assert result.report.tokens <= 1.01 * budget
    assert sum(sum(r["tokens"].values()) for r in measurements(result)[:-1]) == result.report.tokens
    assert result.report.choices["steps_planned"] >= result.report.steps


# --- when a stage ends, and what is kept ------------------------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, *measured: float) -> None:
    """Every source's loss: 1 for the dense model, then these, measurement by measurement, for two sources."""
    script: Iterator[float] = itertools.chain((1.0, 1.0), *((v, v) for v in measured))
    monkeypatch.setattr(Training, "mean_loss", lambda *_: next(script))


FLAT: dict[str, Any] = {"schedule": "constant", "warmup": 0}


def test_a_stage_ends_when_degradation_stops_falling(files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the weights of the best round are kept."""
    with monkeypatch.context() as patch:
        scripted(patch, 3.0, 2.0, 2.5, 2.0)
        result = taught(Curriculum([list(files)]), **FLAT)
    assert result.report.stopped == "degradation has not fallen for 1 round"
    assert (result.report.steps, result.report.best_step) == (6, 3)
    assert [r["mean"] for r in measurements(result)] == [2.0, 1.0, 1.5]
    assert measurements(result)[-1]["ended"] == result.report.stopped
    with monkeypatch.context() as patch:
        scripted(patch, 3.0, 2.0, 2.0)
        assert same_weights(result, taught(Curriculum([list(files)], rounds=1), **FLAT, max_steps=3))


@pytest.mark.parametrize(
    ("options", "measured", "rounds", "best", "stopped"),
    [
        ({"patience": 2}, (3, 2, 2.5, 2.5), 3, 3, "degradation has not fallen for 2 rounds"),
        ({"patience": 2}, (3, 2, 2.5, 1.5, 1.6), 4, 9, "all rounds done"),
        ({"patience": 0}, (3, 4, 5, 6, 7), 4, 0, "all rounds done"),
        ({"threshold": 0.2}, (3, 2.5, 2.4), 2, 6, "degradation has not fallen for 1 round"),
        ({"weights": "static"}, (3, 2, 2.5), 2, 3, "degradation has not fallen for 1 round"),
        ({"rounds": 2}, (0.5, 0.4, 0.3), 2, 12, "all rounds done"),
    ],
    ids=str,
)
def test_patience_and_threshold(
    options: dict[str, Any],
    measured: tuple[float, ...],
    rounds: int,
    best: int,
    stopped: str,
    files: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted(monkeypatch, *measured, 9.0)
    result = taught(Curriculum([list(files)], **options), **FLAT)
    assert (len(measurements(result)) - 1, result.report.best_step, result.report.stopped) == (rounds, best, stopped)


def test_a_stage_that_only_harms_is_undone(files: tuple[str, str], alpaca: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage begins with what the first one began with, and the report says which step that was."""
    result = taught(Curriculum([list(files)]), lr=0.5, warmup=0)
    assert (result.report.best_step, result.report.stopped) == (0, "degradation has not fallen for 1 round")
    before = weights(damaged())
    assert all(torch.equal(p, before[n]) for n, p in weights(result.model).items())
    script = iter([1.0, 1.0, 1.0, 3.0, 3.0, 4.0, 4.0, 3.0, 3.5, 8.0, 8.0, 8.0])  # dense, stage 1 twice, stage 2 twice, all
    monkeypatch.setattr(Training, "mean_loss", lambda *_: next(script))
    both = taught(Curriculum([list(files), [alpaca]]), cutoff=60, length=60)
    assert (both.report.best_step, both.report.stopped) == (0, "degradation has not fallen for 1 round")
    assert all(torch.equal(p, before[n]) for n, p in weights(both.model).items())
    assert 0 < measurements(both, 2)[0]["step"] < both.report.steps


def test_validation_text_is_for_the_report(files: tuple[str, str], alpaca: str, tmp_path: Path) -> None:
    other = load_examples(str(write_words(tmp_path / "other.jsonl", 47, rows=20, seed=8)), tokenizer(), cutoff=24)
    made = Curriculum([list(files), [alpaca]], rounds=2, patience=0)
    options: dict[str, Any] = {"cutoff": 60, "length": 60}
    result = taught(made, validation=other, **options)
    assert same_weights(result, taught(made, **options))
    ends = [r["step"] for stage in (1, 2) for r in measurements(result, stage)]
    assert [v["step"] for v in result.report.validation] == list(dict.fromkeys(ends))
    assert result.report.perplexity is not None
    assert result.report.perplexity[1] < result.report.perplexity[0]


@pytest.mark.parametrize(("bad", "who"), [(1, "dense"), (3, "pruned")])
def test_a_loss_that_is_not_finite(bad: int, who: str, files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count()
    monkeypatch.setattr(Training, "mean_loss", lambda *_: math.nan if next(count) == bad else 1.0)
    with pytest.raises(
        FxPruneError, match=f"the {who} model's loss on the held-out examples of 'lost.jsonl' is nan, after 0 steps"
    ):
        taught(Curriculum([list(files)]))


# --- what else recover promises ---------------------------------------------------------------------------------------------------


def test_the_seed_decides_everything(files: tuple[str, str]) -> None:
    made = Curriculum([list(files)], rounds=2)
    torch.manual_seed(1)
    first = taught(made, method="lora", dropout=0.2)
    torch.manual_seed(2)
    again, other = taught(made, method="lora", dropout=0.2), taught(made, method="lora", dropout=0.2, seed=1)
    assert same_weights(first, again)
    assert first.report.curriculum == again.report.curriculum
    assert losses(first) != losses(other)


def test_a_dense_model_that_cannot_be_given_packed_examples(files: tuple[str, str]) -> None:
    """A graph that takes token ids alone would see one example from the next."""
    graph = fxprune.trace(dense(), {"input_ids": tokens(2, 7)})
    result = taught(Curriculum([list(files)], rounds=1), teacher=graph, max_steps=2)
    report: Any = result.report.curriculum
    assert result.report.choices["packing"] is True
    assert report["dense"]["lost.jsonl"] == pytest.approx(plain_loss(dense(), files[1]), abs=1e-5)
    assert measurements(result)[0]["loss"]["lost.jsonl"] == pytest.approx(plain_loss(damaged(), files[1]), abs=1e-5)


def test_the_dense_model_runs_for_its_measurement_alone(files: tuple[str, str], tmp_path: Path) -> None:
    """Once: not in a training step, not when a run goes on."""
    calls: list[int] = []
    made, model = Curriculum([list(files), [files[0]]], rounds=1), copy.deepcopy(dense())
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    for steps in (2, 8):
        calls.append(0)
        taught(made, teacher=model, max_steps=steps)
    first = calls.index(0, 1)
    assert sum(calls[:first]) == sum(calls[first:]) > 1
    with pytest.raises(Killed):
        taught(made, teacher=model, output=tmp_path / "out", progress=killed_at("recovery", 2), checkpoint_every=1)
    calls.clear()
    taught(made, teacher=model, output=tmp_path / "out", checkpoint_every=1)
    handle.remove()
    assert len(calls) == 4  # to see that it predicts the same tokens, and thrice whether it keeps packed examples apart


def test_the_dense_model_may_teach_too(files: tuple[str, str]) -> None:
    made = Curriculum([list(files)], rounds=2)
    alone, both = taught(made), taught(made, distill_weight=0.5)
    assert measurements(alone)[0] == measurements(both)[0]
    assert losses(alone) != losses(both)


def test_the_report_is_json_and_says_all(files: tuple[str, str], alpaca: str) -> None:
    seen: list[str] = []
    made = Curriculum([f"{files[0]}=2,{files[1]}", [alpaca]], rounds=2, patience=0)
    result = taught(made, cutoff=60, length=60, progress=lambda what, *_: seen.append(what))
    data = json.loads(json.dumps(result.report.to_json()))
    report = data["curriculum"]
    assert report | {"measurements": 0, "dense": 0, "final": 0} == {
        **made.to_json(),
        "unit": "nats per predicted token",
        "measurements": 0,
        "dense": 0,
        "final": 0,
    }
    assert report["stages"] == [{"kept.jsonl": 2.0, "lost.jsonl": 1.0}, {"alpaca.jsonl": 1.0}]
    assert set(report["dense"]) == set(report["final"]) == {"kept.jsonl", "lost.jsonl", "alpaca.jsonl"}
    assert set(report["measurements"][0]) == {
        *("stage", "round", "step", "loss", "degradation", "mean", "weights", "steps", "rows", "tokens", "ended")
    }
    assert [r["ended"] for r in report["measurements"]] == ["", "", "all rounds done", "", "", "all rounds done"]
    assert data["data"]["training"]["sources"].startswith("kept.jsonl (144 examples), lost.jsonl (144 examples), alpaca.jsonl (")
    assert data["data"]["held_out"]["sources"].startswith("kept.jsonl (16 examples), lost.jsonl (16 examples), alpaca.jsonl (")
    assert data["data"]["validation"] is None
    assert set(data["data"]["sketches"]) == set(report["dense"])
    assert [s["name"] for s in result.report.seen()] == list(report["dense"])
    assert data["teacher"].startswith("LlamaForCausalLM, ")
    steps = [what for what in seen if what.startswith("recovery, stage ")]
    assert len(steps) == 12
    assert steps[-1].startswith("recovery, stage 2, round 2 (loss ")
    assert "measuring the dense model (kept.jsonl)" in seen
    assert "measuring stage 2 (alpaca.jsonl)" in seen
    assert "measuring all sources (kept.jsonl)" in seen


# --- a run that was interrupted ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As sudden as a signal, for the code inside."""


def killed_at(begin: str, done: int) -> Callable[[str, int, int], None]:
    """A progress callback that ends the run."""

    def progress(what: str, reached: int, total: int) -> None:
        if what.startswith(begin) and reached == done:
            raise Killed

    return progress


RUNS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "dropout": 0.3, "checkpoint_every": 1},
    "full": {"checkpoint_every": 2, "weight_decay": 0.1},
    "rare": {"checkpoint_every": 7},
    "at the end only": {"checkpoint_every": 0},
    "early": {"checkpoint_every": 1, "lr": 0.5, "warmup": 0},
}

KILLS = [
    ("measuring the dense model (lost.jsonl)", 1),
    ("recovery, stage 1, round 2", 5),
    ("measuring stage 1 (lost.jsonl)", 1),
    ("recovery, stage 2, round 1", 10),
    ("recovery, stage 2, round 2", 12),
    ("measuring all sources", 0),
]
"""Moments: the middle of the second round among them."""

EARLY = [
    ("recovery, stage 1, round 1", 2),
    ("measuring stage 1 (kept.jsonl)", 0),
    ("measuring stage 2 (kept.jsonl)", 1),
    ("recovery, stage 2, round 1", 4),
]
"""Moments of a run whose stages end after their first round."""


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_goes_on_with_the_same_result(name: str, files: tuple[str, str], alpaca: str, tmp_path: Path) -> None:
    """Losses, measurements, shares and weights are those of a run that was never ended, bit for bit."""
    made = Curriculum([list(files), [alpaca, files[0]]], rounds=3, shares=(3, 2))
    options = {"cutoff": 60, "length": 60, "max_steps": 15, **RUNS[name]}
    expected = taught(made, **options)
    out = tmp_path / "out"
    for moment in EARLY if name == "early" else KILLS:
        with pytest.raises(Killed):
            taught(made, output=out, progress=killed_at(*moment), **options)
        assert not out.exists()
    result = taught(made, output=out, **options)
    assert result.report.curriculum == expected.report.curriculum
    assert losses(result) == losses(expected)
    for field in ("steps", "best_step", "stopped", "tokens"):
        assert getattr(result.report, field) == getattr(expected.report, field)
    assert same_weights(result, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_measurements_and_shares_are_in_the_state(files: tuple[str, str], tmp_path: Path) -> None:
    made = Curriculum([list(files)], rounds=3)
    expected = taught(made)
    with pytest.raises(Killed):
        taught(made, output=tmp_path / "out", progress=killed_at("recovery, stage 1, round 2", 6), checkpoint_every=2)
    newest = max((tmp_path / "out.recovering").glob("step-*"))
    position = json.loads((newest / "state.json").read_text())["position"]
    assert position["step"] == 4
    assert position["rounds"] == measurements(expected)[:2]
    report: Any = expected.report.curriculum
    assert position["dense"] == report["dense"]


def test_a_state_of_another_curriculum_is_refused(files: tuple[str, str], tmp_path: Path) -> None:
    out, other = tmp_path / "out", str(write_words(tmp_path / "kept.jsonl", 0, seed=7))
    later = tmp_path / "later"
    later.mkdir()
    changed_later = str(write_words(later / "lost.jsonl", 0, seed=8))
    made = Curriculum([list(files), [files[1]]])
    with pytest.raises(Killed):
        taught(made, output=out, progress=killed_at("recovery", 3), checkpoint_every=1)
    cases: list[tuple[Curriculum, nn.Module | None, str]] = [
        (
            Curriculum([list(files), [files[1]]], "static"),
            None,
            r"another recovery: the curriculum's weights was dynamic, now static\. Repeat",
        ),
        (Curriculum([list(files), [files[1]]], floor=0.1), None, r"another recovery: the curriculum's floor was 0.05, now 0.1\."),
        (Curriculum([[f"{files[0]}=2", files[1]], [files[1]]]), None, r"another recovery: the curriculum's stages was .* now .*"),
        (Curriculum([[other, files[1]], [files[1]]]), None, r"another recovery: the data differs\."),
        (made, damaged(), r"another recovery: the teacher differs\."),
    ]
    for changed, teacher, said in cases:
        with pytest.raises(UsageError, match=said):
            taught(changed, teacher=teacher, output=out, checkpoint_every=1)
    out, made = tmp_path / "second", Curriculum([[files[0]], [files[1]]])
    with pytest.raises(Killed):
        taught(made, output=out, progress=killed_at("recovery", 1), checkpoint_every=1)
    with pytest.raises(UsageError, match=r"another recovery: the data differs\."):
        taught(Curriculum([[files[0]], [changed_later]]), output=out, checkpoint_every=1)
    with pytest.raises(UsageError, match=r"the curriculum's weights was dynamic, now None"):
        recover(damaged(), files[0], tokenizer=tokenizer(), output=out, **{**SHORT, "method": "full"})
