"""Evaluations that are kept: they come back from JSON, are added to, and stand for the dense model's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from fxprune import Evaluation
from fxprune.errors import UsageError
from fxprune.evaluation import Perplexity
from fxprune.evaluation.latency import Latency

from .command import Run, everything
from .reported import Tables
from .scored import made, score


def test_an_evaluation_in_parts(run: Run, place: Path, checkpoint: Path) -> None:
    def attach(*options: str) -> dict[str, Any]:
        ran = run("eval", "checkpoint", *options, "--attach")
        assert (ran.status, "replaces" in ran.said) == (0, False), ran.err
        return cast(dict[str, Any], json.loads((checkpoint / "eval.json").read_text()))

    shutil.copy(place / "text.txt", place / "more.txt")
    first = attach("--dense", "dense", "--texts", "mine=text.txt", "--length", "16")
    both = attach("--texts", "mine=text.txt,more=more.txt", "--length", "8")
    assert [(p["text"], p["length"]) for p in both["perplexities"]] == [("mine", 16), ("mine", 8), ("more", 8)]
    assert both["perplexities"][0] == first["perplexities"][0]
    assert both["dense"]["perplexities"] == first["dense"]["perplexities"]
    assert both["kept"] == {**first["kept"], "perplexity/mine/8": None, "perplexity/more/8": None}
    third = attach("--latency")
    assert third["perplexities"] == both["perplexities"]
    assert third["latency"]["prompt"] > 0
    row = Tables((checkpoint / "report.html").read_text()).row("perplexity, mine, 16 tokens")
    assert row[:2] == [f"{m['perplexities'][0]['perplexity']:,.2f}" for m in (first["dense"], first)]
    ran = run("eval", "checkpoint", "--texts", "mine=text.txt", "--length", "8", "--max-windows", "1", "--attach")
    said = (
        "note this replaces the evaluation in 'checkpoint', which was made otherwise (max_windows None, here 1): "
        "perplexity, mine, 16 tokens, perplexity, more, 8 tokens, prefill of 48 tokens (ms) and 1 more of it are not measured again"
    )
    assert ran.status == 0
    assert said in ran.said
    for path in (checkpoint / "eval.json", place / "more.txt"):
        path.unlink()


def test_a_dense_model_is_measured_once(run: Run, place: Path, checkpoint: Path) -> None:
    options = ("--length", "16", "--json")
    shutil.copy(place / "text.txt", place / "more.txt")
    assert run("eval", "dense", "--texts", "mine=text.txt,more=more.txt", *options, "-o", "dense.json").status == 0
    kept = run("eval", "checkpoint", "--dense", "dense.json", "--texts", "mine=text.txt", *options)
    anew = run("eval", "checkpoint", "--dense", "dense", "--texts", "mine=text.txt", *options)
    assert json.loads(kept.out)["kept"] == json.loads(anew.out)["kept"]
    assert [p["text"] for p in json.loads(kept.out)["dense"]["perplexities"]] == ["mine"]
    (place / "damaged.json").write_text((place / "dense.json").read_text().replace('"macs"', '"mac"'))
    (place / "other.json").write_text((place / "dense.json").read_text().replace('"parameters": ', '"parameters": 1'))
    before = everything(checkpoint)
    for file, more, said in (
        ("dense.json", ("--texts", "mine=text.txt", "--length", "8"), "not measured on the text 'mine' in windows of 8"),
        ("dense.json", ("--texts", "mine=text.txt", *options, "--stride", "8"), "measured otherwise: stride None, here 8"),
        ("dense.json", ("--texts", "mine=more.txt", *options), "measured otherwise: texts, mine, source text.txt, here more.txt"),
        ("dense.json", ("--texts", "mine=text.txt", "--latency"), "--latency is compared with the dense model's of the same run"),
        ("nowhere.json", ("--texts", "mine=text.txt"), "there is no file 'nowhere.json'"),
        ("damaged.json", ("--texts", "mine=text.txt"), "'damaged.json' (--dense): a damaged evaluation: TypeError: "),
        ("checkpoint/fxprune_report.json", ("--texts", "mine=text.txt"), "(--dense): not an evaluation: fxprune eval -o"),
        ("other.json", ("--texts", "mine=text.txt"), "'checkpoint' was made from a model of "),
    ):
        ran = run("eval", "checkpoint", "--dense", file, *more, "--attach")
        assert (ran.status, ran.out) == (2, "")
        assert said in ran.said
    assert everything(checkpoint) == before
    for name in ("dense.json", "damaged.json", "other.json", "more.txt"):
        (place / name).unlink()


def test_an_evaluation_comes_back_from_its_json() -> None:
    windows = Perplexity(9.5, 60, 4, 16, 16, "ptb", 0.1, "stream", "ptb.txt")
    seen = {"text": "ptb", "use": "calibration", "name": "c4", "of_text": 0.5, "of_data": 0.25, "words": 13}
    found = replace(
        made(score("piqa", 0.6), dense=made(score("piqa", 0.7, 0.75)), limit=3),
        perplexities=(windows,),
        latency=Latency(1.5, 2.5, 16, 4, 3),
        overlaps=(seen,),
        versions={"dtype": "float32"},
        cut=2,
    )
    assert Evaluation.from_json(json.loads(json.dumps(found.to_json()))) == found
    for data, said in (
        ([], "not an evaluation"),
        ({**found.to_json(), "fxprune_evaluation": 2}, "not an evaluation"),
        ({**found.to_json(), "latency": {"prefill_ms": 1.0}}, "a damaged evaluation: TypeError"),
        (
            {**found.to_json(), "perplexities": [{**windows.to_json(), "perplexity": "low"}]},
            "a damaged evaluation: ValueError",
        ),
    ):
        with pytest.raises(UsageError, match=said):
            Evaluation.from_json(data)


def test_what_an_earlier_evaluation_has_besides() -> None:
    piqa, boolq, arc = score("piqa", 0.6), score("boolq", 0.7), score("arc_easy", 0.4)
    both, why = made(piqa, dense=made(score("piqa", 0.7))).with_earlier(made(arc, boolq, dense=made(score("boolq", 0.8))))
    assert (both.tasks, why) == ((boolq, piqa, arc), "")
    assert both.dense is not None
    assert [t.task for t in both.dense.tasks] == ["boolq", "piqa"]
    kept = both.to_json()["kept"]
    assert kept["boolq/acc"] == pytest.approx(0.7 / 0.8)
    assert "dense" not in {line.key for line in both.measures()}
    assert (kept["average"], kept["above_chance"]) == (None, None)  # the dense model has no arc_easy
    again, _ = made(score("boolq", 0.5)).with_earlier(made(boolq, dense=made(score("boolq", 0.8))))
    assert again.to_json()["kept"]["average"] == pytest.approx(0.5 / 0.8)
    more_rows, _ = made(score("boolq", 0.5, rows=20)).with_earlier(made(boolq, dense=made(score("boolq", 0.8))))
    assert more_rows.dense is not None
    assert more_rows.dense.tasks == ()


def test_what_keeps_two_evaluations_apart() -> None:
    piqa, boolq = made(score("piqa", 0.6), limit=20), made(score("boolq", 0.7), limit=10)
    assert piqa.with_earlier(boolq) == (piqa, "limit 10, here 20")
    half = replace(boolq, settings={}, versions={"dtype": "bfloat16"})
    full = replace(piqa, versions={"dtype": "float32"})
    assert full.with_earlier(half) == (full, "dtype bfloat16, here float32")
    other = replace(boolq, settings={}, cost=replace(boolq.cost, parameters=11))
    assert piqa.with_earlier(other) == (piqa, "parameters 11, here 10")
    alone = replace(piqa, dense=full), replace(boolq, settings={}, dense=half)
    assert alone[0].with_earlier(alone[1]) == (alone[0], "the dense model: dtype bfloat16, here float32")
    cut = replace(made(score("piqa", 0.5), score("boolq", 0.7)), cut=3)
    assert [t.task for t in made(score("piqa", 0.6)).with_earlier(cut)[0].tasks] == ["piqa"]  # how many of them were boolq's?
    assert made(score("arc_easy", 0.6)).with_earlier(cut)[0].cut == 3
