"""Checkpoints side by side: only what was measured alike stands in one line."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import fxprune
from fxprune.errors import CheckpointError, UsageError
from fxprune.reporting.blocks import Chart, Charts, Page, Section, Text
from fxprune.reporting.charts import Axis
from fxprune.reporting.charts import lines as lines_of
from fxprune.reporting.page import render_html, render_markdown

from .command import Run
from .reported import Tables, evaluation, recovery, report, write

HALF = {"removed": 0.5, "parameters_after": 51_200, "macs_after": 40_000, "perplexity": None, "latency": None}
QUARTER = {"perplexity": None, "latency": None}


def lines(found: fxprune.Comparison, label: str) -> list[tuple[float | None, tuple[float | None, ...]]]:
    return [(line.dense, line.values) for line in found.lines if line.number.label == label]


def test_side_by_side(tmp_path: Path) -> None:
    one = write(tmp_path / "quarter", report(**QUARTER), evaluation(overlaps=[]))
    other = evaluation(overlaps=[])
    other["perplexities"][0]["perplexity"] = 80.0
    two = write(tmp_path / "half", report(**HALF), other)
    found = fxprune.compare(one, two)
    assert found.names == ("quarter", "half")
    assert found.notes == ()
    assert lines(found, "parameters") == [(102_400, (76_800, 51_200))]
    assert lines(found, "MACs per token") == [(96_816, (71_216, 40_000))]
    assert lines(found, "perplexity, wiki, 128 tokens") == [(40.0, (50.0, 80.0))]
    assert lines(found, "boolq, acc (%)") == [(75.0, (60.0, 60.0))]
    kept = next(line.kept for line in found.lines if line.number.label.startswith("perplexity"))
    assert kept == (1.25, 2.0)
    assert found.settings["removed"] == ("25.00%", "50.00%")
    assert found.settings["criterion"] == ("kfac", "kfac")
    assert found.settings["recovered"] == ("no", "no")
    labels = [line.number.label for line in found.lines]
    assert labels.index("perplexity, wiki, 128 tokens") < labels.index("boolq, acc (%)") < labels.index("decode (ms/token)")
    table = Tables(found.html())
    assert table.open == []
    assert table.row("parameters") == ["102,400", "76,800 (75.0%)", "51,200 (50.0%)"]
    assert table.row("perplexity, wiki, 128 tokens") == ["40.00", "50.00 (125.0%)", "80.00 (200.0%)"]
    assert "| perplexity, wiki, 128 tokens | 40.00 | 50.00 (125.0%) | 80.00 (200.0%) |" in str(found)
    assert "2 checkpoints of `org/dense`." in str(found)
    data = json.loads(json.dumps(found.to_json()))
    assert data["checkpoints"] == ["quarter", "half"]
    assert {n["label"]: (n["dense"], n["values"], n["kept"]) for n in data["numbers"]}["parameters"] == (
        102_400,
        [76_800, 51_200],
        [0.75, 0.5],
    )


def test_the_ratio_curve(tmp_path: Path) -> None:
    made = []
    for i, removed in enumerate((0.2, 0.4, 0.6)):
        measured = evaluation(overlaps=[])
        measured["perplexities"][0]["perplexity"] = 50.0 + 10 * i
        made.append(write(tmp_path / f"r{i}", report(**{**QUARTER, "removed": removed}), measured))
    other = copy.deepcopy(report(**QUARTER))
    other["recipe"]["criterion"] = "wanda"
    made.append(write(tmp_path / "wanda", other, evaluation(overlaps=[])))
    text = fxprune.compare(*made).html()
    chart = next(c for c in re.findall(r"<svg.*?</svg>", text, re.DOTALL) if "perplexity, wiki, 128 tokens by share removed" in c)
    (line,) = re.findall(r'<g class="series"[^>]*><title>[^<]*</title><polyline points="([^"]*)"', chart)
    places = [tuple(map(float, point.split(","))) for point in line.split()]
    assert len(places) == 3, "checkpoints of one recipe make a curve"
    assert [b[0] - a[0] for a, b in pairwise(places)] == pytest.approx([places[1][0] - places[0][0]] * 2, abs=0.2)
    assert places[0][1] > places[1][1] > places[2][1], "higher is worse, and higher on the page"
    assert chart.count("<circle") == 5, "three, wanda and the dense model"
    assert ">average of tasks (%)</text>" in text, "the axis has its unit"
    told = str(fxprune.compare(*made)).partition("## What is lost, by what was removed")[2]
    assert " 20.0% removed      50.00  r0\n 25.0% removed      50.00  wanda\n 40.0% removed      60.00  r1\n" in told
    assert ">dense</text>" in chart
    assert ">wanda</text>" in chart


def test_a_section_of_pictures_alone_is_not_in_markdown() -> None:
    chart = Chart(lines_of([], Axis("x"), Axis("y"), title="nothing"), "a picture")
    page = Page("x", (), (), [Section("pictures", [Charts([chart])]), Section("words", [Text("said")])])
    assert "pictures" not in render_markdown(page)
    assert "## words\n\nsaid\n" in render_markdown(page)
    assert "<h2>pictures</h2>" in render_html(page)


def test_other_protocols_have_lines_of_their_own(tmp_path: Path) -> None:
    other = evaluation(overlaps=[])
    for part in (other, other["dense"]):
        part["perplexities"][0] |= {"windows": 8, "tokens": 1016}
        part["latency"] = {**part["latency"], "new_tokens": 4}
    one = write(tmp_path / "one", report(**QUARTER), evaluation(overlaps=[]))
    two = write(tmp_path / "two", report(**QUARTER), other)
    found = fxprune.compare(one, two)
    assert lines(found, "perplexity, wiki, 128 tokens") == [(40.0, (50.0, None)), (40.0, (None, 50.0))]
    assert lines(found, "decode (ms/token)") == [(3.0, (3.0, None)), (3.0, (None, 3.0))]
    (note,) = [n for n in found.notes if n.startswith("perplexity")]
    assert note == (
        "perplexity, wiki, 128 tokens was measured in 2 ways, each in a line of its own: one: 8,128 tokens of wiki.txt, rows by "
        "protocol llm-pruner, 64 windows of 128, stride 128; two: 1,016 tokens of wiki.txt, rows by protocol llm-pruner, 8 windows "
        "of 128, stride 128"
    )
    assert "128 tokens by share removed" not in found.html(), "numbers that cannot be compared make no curve"


def test_another_dtype_or_device_is_another_protocol(tmp_path: Path) -> None:
    one = evaluation(overlaps=[])
    half, gpu = copy.deepcopy(one), copy.deepcopy(one)
    half["versions"]["dtype"] = "bfloat16"
    gpu["versions"]["device"] = "a GPU"
    places = [write(tmp_path / name, report(**QUARTER), e) for name, e in (("one", one), ("half", half), ("gpu", gpu))]
    found = fxprune.compare(*places)
    wiki, decode = (lines(found, label) for label in ("perplexity, wiki, 128 tokens", "decode (ms/token)"))
    assert [values for _, values in wiki] == [(50.0, None, 50.0), (None, 50.0, None)]
    assert [sum(v is not None for v in values) for _, values in decode] == [1, 1, 1]


def test_one_text_under_two_names(tmp_path: Path) -> None:
    other = evaluation(overlaps=[])
    for part in (other, other["dense"]):
        part["perplexities"][0]["text"] = "wikitext2"
    directories = [
        write(tmp_path / name, report(perplexity=None), made) for name, made in (("one", evaluation(overlaps=[])), ("two", other))
    ]
    (note,) = fxprune.compare(*directories).notes
    assert note == (
        "perplexity, wiki, 128 tokens and perplexity, wikitext2, 128 tokens seem to be of one text under two names: name it alike "
        "to have one line (8,128 tokens of wiki.txt, rows by protocol llm-pruner, 64 windows of 128, stride 128)"
    )
    other["dense"]["perplexities"][0]["perplexity"] = 41.0
    third = write(tmp_path / "three", report(perplexity=None), other)
    assert fxprune.compare(directories[0], third).notes == (), "another text of that name and length"
    both = evaluation(overlaps=[])
    for part in (both, both["dense"]):
        part["perplexities"].append({**part["perplexities"][0], "text": "wikitext2"})
    assert fxprune.compare(directories[0], write(tmp_path / "four", report(perplexity=None), both)).notes == ()


def test_two_protocols_that_all_have_need_no_word(tmp_path: Path) -> None:
    twice = evaluation(overlaps=[])
    for part in (twice, twice["dense"]):
        part["latency"] = {**part["latency"], "prompt": 64}
    data = report(perplexity=None)
    found = fxprune.compare(write(tmp_path / "one", data, twice), write(tmp_path / "two", data, twice))
    assert lines(found, "decode (ms/token)") == [(4.0, (0.0, 0.0)), (3.0, (3.0, 3.0))]
    assert found.notes == ()


def test_another_dense_number_is_said(tmp_path: Path) -> None:
    other = evaluation(overlaps=[])
    other["dense"]["perplexities"][0]["perplexity"] = 41.0
    one = write(tmp_path / "one", report(**QUARTER), evaluation(overlaps=[]))
    found = fxprune.compare(one, write(tmp_path / "two", report(**QUARTER), other))
    assert "perplexity, wiki, 128 tokens: the dense model's differs between the checkpoints, from 40 to 41" in found.notes


def test_each_latency_is_divided_by_the_dense_one_beside_it(tmp_path: Path) -> None:
    made = []
    for name, mine, dense in (("idle", 8.0, 10.0), ("busy", 30.0, 40.0)):
        measured = evaluation(overlaps=[])
        measured["latency"]["prefill_ms"], measured["dense"]["latency"]["prefill_ms"] = mine, dense
        measured["versions"] = {"machine": f"x86_64, 8 cores, 1 thread{'s' * (name == 'busy')}"}  # as earlier versions wrote it
        made.append(write(tmp_path / name, report(**QUARTER), measured))
    alone = evaluation(overlaps=[], dense=None, versions={"machine": "x86_64, 8 cores, 1 thread"})
    alone["latency"]["prefill_ms"] = 5.0
    found = fxprune.compare(*made, write(tmp_path / "alone", report(**QUARTER), alone))
    (line,) = [line for line in found.lines if line.number.label == "prefill of 128 tokens (ms)"]
    assert (line.denses, line.kept) == ((10.0, 40.0, None), (0.8, 0.75, 0.5))
    row = Tables(found.html()).row("prefill of 128 tokens (ms)")
    assert row == ["10.00 to 40.00", "8.00 (80.0%)", "30.00 (75.0%)", "5.00 (50.0%)"]
    assert found.html().count("in brackets: the share of the dense model") == 1
    assert found.notes == ()


def test_other_dense_models_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one", report())
    dense = {**report()["dense"], "fingerprint": "beef"}
    with pytest.raises(UsageError) as caught:
        fxprune.compare(one, write(tmp_path / "two", report(dense=dense)))
    assert str(caught.value) == (
        "'one' and 'two' were pruned from different dense models (fingerprint f00d and fingerprint beef): compare checkpoints of "
        "one"
    )
    with pytest.raises(UsageError, match=r"different dense models \(102,400 parameters and 9 parameters\)"):
        fxprune.compare(one, write(tmp_path / "three", report(parameters_before=9)))
    found = fxprune.compare(one, write(tmp_path / "four", report(dense={**report()["dense"], "name": "org/other"})))
    assert found.notes == (
        "the dense models have other names and equal shapes (org/dense, org/other): they may differ in their weights",
    )


def test_earlier_versions_are_known_by_their_plans(tmp_path: Path) -> None:
    old = {k: v for k, v in report().items() if k not in ("dense", "whole", "curves", "importance", "macs_before", "macs_after")}
    one, two = write(tmp_path / "one", report()), write(tmp_path / "two", old)
    assert fxprune.compare(one, two).notes == ("two: nothing says which dense model it was made from",)
    (two / "fxprune_plan.json").write_text(json.dumps({"fingerprint": "f00d"}))
    found = fxprune.compare(one, two)
    assert found.notes == ()
    assert lines(found, "MACs per token") == [(96_816, (71_216, None))]
    (two / "fxprune_plan.json").write_text(json.dumps({"fingerprint": "beef"}))
    with pytest.raises(UsageError, match="different dense models"):
        fxprune.compare(one, two)


def test_what_is_stale_is_left_out(tmp_path: Path) -> None:
    one = write(tmp_path / "one", report())
    two = write(tmp_path / "two", report(recovery=recovery()))
    found = fxprune.compare(one, two)
    assert lines(found, "perplexity, a text") == [(20.125, (25.5, None))]
    assert not lines(found, "perplexity, a text, before recovery")
    assert found.settings["recovered"] == ("no", "lora, 12 steps, 800 tokens")


def test_widths_of_each(tmp_path: Path) -> None:
    widths = {f"model.layers.{i}.mlp.ffn": [64, 32] for i in range(4)}
    one = write(tmp_path / "one", report())
    found = fxprune.compare(one, write(tmp_path / "two", report(widths=widths, whole={})))
    assert Tables(found.html()).row("model.layers.*.mlp.ffn") == [f"{(64 + 57 + 50 + 43) / 256:.1%}, 43 to 64", "50.0%, 32"]


def test_names_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "out", report())
    assert fxprune.compare(tmp_path / "a" / "out", tmp_path / "b" / "out").names == ("a/out", "b/out")
    assert fxprune.compare(tmp_path / "a" / "out", tmp_path / "a" / "out").names == ("out (1)", "out (2)")


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    one = write(tmp_path / "one", report())
    with pytest.raises(UsageError, match=r"given one by one: compare\('a', 'b'\)"):
        fxprune.compare([one, one])  # type: ignore[arg-type] # what a user may try
    with pytest.raises(UsageError, match=f"a comparison needs two checkpoints or more, got '{one}' alone"):
        fxprune.compare(one)
    with pytest.raises(UsageError, match="there is no directory '/no/such'"):
        fxprune.compare(one, "/no/such")
    with pytest.raises(UsageError, match=f"'{tmp_path}' holds no fxprune_report.json"):
        fxprune.compare(one, tmp_path)
    with pytest.raises(CheckpointError, match="the report of 'two' cannot be read: KeyError: 'before'"):
        fxprune.compare(one, write(tmp_path / "two", report(perplexity={"x": {}})))
    for i, key in enumerate(("widths", "removed", "recovery", "verify", "versions", "recipe", "dense")):
        with contextlib.suppress(CheckpointError):  # refused, or shown without
            assert str(fxprune.compare(one, write(tmp_path / f"bad{i}", report(**{key: "text"}))))
    with pytest.raises(CheckpointError, match="a report cannot be read: "):
        fxprune.compare(one, tmp_path / "bad0")


def test_the_command(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    ran = run("compare", "checkpoint", str(other))
    assert (ran.status, ran.err) == (0, "")
    data = json.loads((checkpoint / "fxprune_report.json").read_text())
    assert f"{data['parameters_after']:,} ({1 - data['removed']:.1%})" in ran.out
    for suffix, begins in ((".html", "<!doctype html>"), (".md", "# checkpoint, other"), (".json", '{\n "fxprune_comparison": 1')):
        file = tmp_path / f"out{suffix}"
        ran = run("compare", "checkpoint", str(other), "-o", str(file))
        assert (ran.status, ran.out) == (0, f"{file}\n")
        assert file.read_text().startswith(begins)
    ran = run("compare", "checkpoint", str(other), "-o", str(tmp_path / "out.pdf"))
    assert (ran.status, ran.out) == (2, "")
    assert f"cannot write a comparison as '{tmp_path}/out.pdf': its name must end in one of" in ran.said
    ran = run("compare", "checkpoint", str(other), "-o", "no/such/out.md")
    assert ran.said == "fxprune: there is no directory 'no/such' to write 'out.md' to"
    assert run("compare", "checkpoint").said == "fxprune: a comparison needs two checkpoints or more, got 'checkpoint' alone"


def test_hostile_names(tmp_path: Path) -> None:
    hostile: dict[str, Any] = {**report()["dense"], "name": "<script>|`x`"}
    (tmp_path / "<b>|").mkdir()
    one, two = write(tmp_path / "<b>|" / "o<i>|ne", report(dense=hostile)), write(tmp_path / "two", report(dense=hostile))
    found = fxprune.compare(one, two)
    table = Tables(found.html())
    assert table.open == []
    assert {"script", "b", "i"}.isdisjoint(table.tags)
    assert "| o\\<i\\>\\|ne |" in str(found)
