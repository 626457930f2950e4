"""The pages of a checkpoint: they say what the JSON says, whatever is in it, and stand whole or not at all."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fxprune
from fxprune.api import PruneResult, prune
from fxprune.calibration import load_calibration
from fxprune.cost import costs
from fxprune.errors import CheckpointError, UsageError
from fxprune.files import write_whole
from fxprune.reporting.numbers import Record
from fxprune.reporting.page import page_of, render_html, render_markdown, render_report
from fxprune.reporting.sections import BUILDERS, sections

from .command import Run
from .reported import Tables, changed, evaluation, full, report, unreadable, write
from .zoo import build, tokenizer, tokens

TEXTS = [" ".join(f"w{(7 * i + j * j) % 94}" for j in range(30)) for i in range(40)]
RECIPE = {"recipe": "default", "samples": 8, "length": 16, "rounds": 2, "levels": 2, "sensitivity_samples": 4}


@pytest.fixture(scope="module")
def result() -> PruneResult:
    return prune(build("llama", num_hidden_layers=3), 0.2, recipe=RECIPE, calibration=TEXTS, tokenizer=tokenizer())


@pytest.fixture(scope="module")
def saved(result: PruneResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "small"
    result.save_pretrained(out)
    return out


def html(record: Record) -> str:
    return render_html(page_of(record))


def markdown(record: Record) -> str:
    return render_markdown(page_of(record))


# --- what a prune writes ---------------------------------------------------------------------------------------------------------


def test_a_prune_leaves_its_pages(saved: Path, result: PruneResult) -> None:
    found = result.report
    assert unreadable(saved) == []
    for text in ((saved / "report.html").read_text(), (saved / "report.md").read_text()):
        assert "small" in text
        assert f"{found.parameters_before:,}" in text
        assert f"{found.parameters_after:,}" in text
    table = Tables((saved / "report.html").read_text())
    assert table.open == []
    assert table.row("parameters") == [
        f"{found.parameters_before:,}",
        f"{found.parameters_after:,}",
        f"{found.parameters_after / found.parameters_before - 1:+.1%}",
    ]
    assert table.row("MACs per token")[:2] == [f"{found.macs_before:,}", f"{found.macs_after:,}"]
    for name, (before, after) in found.widths.items():
        assert table.row(name) == [f"{before:,}", f"{after:,}", f"{after / before:.1%}"]
    assert table.row("calibration")[1] == "128"


def test_blocks_stand_in_the_order_in_which_they_would_go() -> None:
    table = Tables(html(Record("x", report(), None)))
    assert table.row("model.layers.9") == ["0.125", "went"]
    assert table.row("model.layers.8") == ["0.25", ""]
    (text,) = (line for line in markdown(Record("x", report(), None)).splitlines() if "| model.layers.9 |" in line)
    assert text == "| model.layers.9 | 0.125 | went |"


def test_the_json_holds_what_the_pages_show(saved: Path, result: PruneResult) -> None:
    data = json.loads((saved / "fxprune_report.json").read_text())
    groups, plan = result.groups, result.plan
    assert result.dense_model is not None
    gm = fxprune.trace(result.dense_model, {"input_ids": tokens(2, 16)})
    batches, _ = load_calibration(TEXTS, model=build("llama"), tokenizer=tokenizer(), samples=8, length=16, batch_size=4)
    names = [n for n, g in groups.items() if g.kind in ("ffn", "kv_heads")]
    curves = fxprune.measure_curves(
        gm, fxprune.find_groups(gm), plan.scores, batches, names=names, levels=2, samples=4, compensated=True, by="divergence"
    )
    assert set(data["curves"]) == set(names)
    for name in names:
        assert [units for units, _ in data["curves"][name]] == [units for units, _ in curves[name]]
        assert [c for _, c in data["curves"][name]] == pytest.approx([c for _, c in curves[name]], rel=1e-3, abs=1e-7)
    assert {**data["whole"], **{n: w[0] for n, w in data["widths"].items()}} == {n: groups[n].size for n in names}
    for name in names:
        scores, spread = plan.scores[name].numpy(), data["importance"][name]
        assert spread["quantiles"] == pytest.approx(np.quantile(scores, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]), rel=1e-3)
        kept = plan.keep.get(name)
        gone = [] if kept is None else sorted(set(range(len(scores))) - set(kept.tolist()))
        assert spread["cut"] == (pytest.approx(scores[gone].max(), rel=1e-3) if gone else None)
    assert data["recipe"]["measured"] == "divergence"
    fingerprint = groups.fingerprint()
    assert data["dense"] == {"name": "", "hub": False, "class": "LlamaForCausalLM", "dtype": "float32", "fingerprint": fingerprint}
    before, after = costs(groups, plan)
    assert (data["macs_before"], data["macs_after"]) == (before.macs, after.macs)
    again = fxprune.PrunePlan.load(saved / "fxprune_plan.json")
    assert {lane: [list(p) for p in curve] for lane, curve in again.curves.items()} == {
        lane: [list(p) for p in curve] for lane, curve in plan.curves.items()
    }


def test_the_recipe_file_makes_it_again(saved: Path, result: PruneResult) -> None:
    text = (saved / "fxprune_recipe.yaml").read_text()
    assert text in (saved / "report.md").read_text()
    again = prune(
        build("llama", num_hidden_layers=3), 0.2, recipe=saved / "fxprune_recipe.yaml", calibration=TEXTS, tokenizer=tokenizer()
    )
    assert {n: u.tolist() for n, u in again.plan.keep.items()} == {n: u.tolist() for n, u in result.plan.keep.items()}
    assert again.plan.recipe == result.plan.recipe


def test_a_criterion_of_ones_own_is_no_recipe() -> None:
    def rising(name: str, weight: Any, gradient: Any) -> Any:
        return weight.abs()

    recipe = {"criterion": "l1", "samples": 2, "length": 8, "widths": "per-layer"}
    made = prune(build("llama", num_hidden_layers=1), units={"ffn": 0.5}, recipe=recipe, criterion=rising)
    text = markdown(Record("own", json.loads(json.dumps(made.report.to_json()))))
    assert "# criterion: rising was a function of your own: pass it in Python" in text
    assert "\ncriterion: " not in text
    assert "--units ffn=0.5 -o own" in text


# --- the pages -------------------------------------------------------------------------------------------------------------------


def test_every_number_is_the_jsons() -> None:
    record = full()
    table = Tables(html(record))
    assert table.open == []
    assert table.row("parameters") == ["102,400", "76,800", "-25.0%"]
    assert table.row("parameter memory (MB)") == ["0.4", "0.3", "-25.0%"]
    assert table.row("MACs per token") == ["96,816", "71,216", "-26.4%"]
    assert table.row("perplexity, a text, before recovery") == ["20.12", "25.50", "+26.7%"]
    assert table.row("perplexity, wiki, 128 tokens") == ["40.00", "50.00", "+25.0%"]
    assert table.row("boolq, acc (%)") == ["75.0", "60.0", "-15.0 points"]
    assert table.row("average of tasks (%)") == ["75.0", "60.0", "-15.0 points"]
    assert table.row("model.layers.2.mlp.down_proj.weight") == ["0.2", "0.12"]
    assert table.row("prefill of 128 tokens (ms)") == ["10.00", "8.00", "-20.0%"]
    assert table.row("perplexity, held out") == ["40.25 before, 31.50 after"]
    assert ["tokens read", "976 in all"] in table.rows
    assert ["tokens read", "800"] in table.rows
    assert table.row("a.txt") == ["0.500", "0.125", "200"]
    assert table.row("model.layers.2.mlp.ffn") == ["64", "50", "78.1%"]
    assert table.row("calibration") == ["text.txt", "512", "16 x 32 tokens of text.txt, seed 3"]
    assert table.row("training") == [
        "a.txt (20 examples), b.jsonl (40 examples)",
        "800",
        "60 examples, 900 tokens in all; 800 were read",
    ]
    assert table.row("exactly zero before they went") == ["25,600 numbers"]
    assert table.row("torch") == ["2.13.0"]


def test_markdown_says_the_same() -> None:
    text = markdown(full())
    for row in Tables(html(full())).rows:
        for cell in row:
            assert " ".join(cell.split()).replace("*", "\\*") in text.replace("\\<", "<"), cell
    plain = re.sub(r"\\(.)", r"\1", text)
    for said in (
        "the evaluation text 'wiki' was seen in calibration (data 'text.txt'): 25.0% of the text's 13-word sequences are in",
        "a first note",
        "a second note",
        "not packed",
        "sheared with care",
        "rewritten graph against the masked dense: relative error 1.5e-07 (allowed 1e-04)",
        "what was compared are the weights before they were compensated",
        "eager model against the rewritten graph: relative error 2.5e-07",
        "Whole blocks that went: `model.layers.9`.",
        "perplexity, wiki, 128 tokens: 8,128 tokens of wiki.txt, rows by protocol llm-pruner, 64 windows of 128, stride 128",
    ):
        assert said in plain, said
    assert "  3  ################........  43/64" in text


def test_one_file_that_needs_nothing_else() -> None:
    text = html(full())
    tags = set(Tables(text).tags)
    assert tags.isdisjoint({"script", "link", "img", "iframe", "object", "base", "form"})
    assert not re.search(r"(?i)url\(|@import|https?:|\bsrc=|\bon\w+=|\bhref=", text)
    assert text.startswith("<!doctype html>\n<html lang=")
    assert "prefers-color-scheme: dark" in text
    assert text.count("<svg") == 12


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=y> {{ 7*7 }} | `code` ``` **b** [l](u)\n# h"


def test_hostile_names_stay_names() -> None:
    record = full()
    data = changed(copy.deepcopy(dict(record.report)), lambda text: text + HOSTILE)
    data["form"] = "per-layer"
    for key in ("widths", "whole", "importance", "curves"):
        data[key] = {name + HOSTILE: value for name, value in data[key].items()}
    data["perplexity"] = {HOSTILE: next(iter(data["perplexity"].values()))}
    hostile = Record("name" + HOSTILE, data, changed(evaluation(), lambda text: text + HOSTILE))
    page = html(hostile)
    parsed = Tables(page)
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert "img" not in parsed.tags
    assert "alert(1)" in page
    assert "{{ 7*7 }}" in page
    text = markdown(hostile)
    outside = re.sub(r"(?ms)^(`{3,})[^`\n]*\n.*?^\1$|`[^`\n]*`", "", text)
    assert not re.search(r"(?<!\\)<(?!/?details|/?summary)", outside)
    assert not re.search(r"(?m)^# h", outside)
    for block in re.findall(r"(?m)(?:^\|.*\n)+", outside):
        cells = {len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(cells) == 1, block


def test_knowledge_in_the_form_of_early_reports() -> None:
    record = full()
    rows = record.report["shearing"]["knowledge"].pop("rows")
    record.report["shearing"]["knowledge"]["groups"] = {row.pop("name"): row for row in rows}
    assert html(record) == html(full())


def test_what_is_not_there_is_not_shown() -> None:
    record = full()
    whole = [s.title for s in sections(record)]
    assert whole == list(BUILDERS)
    for key in record.report:
        left = {k: v for k, v in record.report.items() if k != key}
        text = html(Record("less", left))
        assert "cannot be read" not in text, key
    assert [s.title for s in sections(Record("least", {}))] == []
    assert Tables(html(Record("least", {}))).open == []
    without = {"curves": "Sensitivity", "importance": "Importance", "compensation": "Compensation", "shearing": "Shearing"}
    for key, title in {**without, "recovery": "Recovery", "samples": "Generated text"}.items():
        left = {k: v for k, v in record.report.items() if k != key}
        assert title not in [s.title for s in sections(Record("less", left))]
    assert "no recovery training has been done" in html(Record("x", report()))
    assert "no recovery training" not in html(record)
    assert "verification was switched off" in html(Record("x", report(verify=None)))


@pytest.mark.parametrize("bad", ["text", 5, [1], {"a": 1}])
def test_a_damaged_part_is_named_and_the_rest_stands(bad: Any, tmp_path: Path) -> None:
    for key in full().report:
        text = html(Record("bad", {**full().report, key: copy.deepcopy(bad)}, evaluation()))
        assert Tables(text).open == [], key
        assert render_report(write(tmp_path / key, {**full().report, key: bad}))[-1].name == "README.md"
    assert {said.partition(":")[0] for said in unreadable(tmp_path / "recovery")} == {"report.html", "report.md", "README.md"}
    text = html(Record("bad", report(curves=5)))
    assert "this part of the report cannot be read: " in text
    assert Tables(text).row("parameters") == ["102,400", "76,800", "-25.0%"]
    assert "cannot be read" in html(Record("bad", report(), {"perplexities": [{}]}))


def test_numbers_that_are_none() -> None:
    data = report(curves={"model.layers.0.mlp.ffn": [[0, 0.0], [3, float("inf")]]})
    data["importance"]["model.layers.0.mlp.ffn"]["quantiles"][6] = float("nan")
    data["perplexity"]["a text"]["after"]["perplexity"] = float("inf")
    text = html(Record("x", data))
    assert "not finite somewhere, and not drawn there: <code>model.layers.0.mlp.ffn</code>" in text
    assert Tables(text).row("perplexity, a text") == ["20.12", "inf", ""]
    assert "nan" not in re.sub(r"<style>.*</style>", "", text, flags=re.DOTALL)


def test_units_of_the_first_numbers() -> None:
    changes = {"bytes_before": 13_476_000_000, "bytes_after": 900_500, "parameters_before": 999_960, "parameters_after": 450}
    exact = {**report()["verify"], "max_rel_error": 0.0}
    page = page_of(Record("x", report(**changes, verify=exact, eager_error=0.0)))
    tiles = {tile.label: (tile.value, tile.detail) for tile in page.tiles}
    assert tiles["memory"] == ("-100.0%", "13.5 GB to 900 kB")
    assert tiles["parameters"] == ("-100.0%", "1 M to 450")
    assert tiles["error of the rewrite"] == ("0", "allowed 1e-04")
    said = markdown(Record("x", report(verify=exact, eager_error=0.0)))
    assert "rewritten graph against the masked dense: relative error 0 (allowed 1e-04)" in said
    assert "eager model against the rewritten graph: relative error 0\n" in said


@pytest.mark.parametrize(
    ("said", "row"),
    [
        ("16 x 32 tokens of batch.txt, seed 3", ["batch.txt", "512", "16 x 32 tokens of batch.txt, seed 3"]),
        ("4 x 8 tokens of 1 given text, seed 0", ["4 x 8 tokens of 1 given text, seed 0", "32", ""]),
        ("2 batches given", ["2 batches given", "", ""]),
    ],
)
def test_what_was_calibrated_on(said: str, row: list[str]) -> None:
    data = report()
    data["recipe"]["calibration"] = said
    assert Tables(html(Record("x", data))).row("calibration") == row


def test_a_report_of_an_earlier_version() -> None:
    new = ("macs_before", "macs_after", "whole", "dense", "importance", "curves")
    old = {k: v for k, v in report().items() if k not in new}
    table = Tables(html(Record("old", old)))
    assert table.row("parameters") == ["102,400", "76,800", "-25.0%"]
    assert not [row for row in table.rows if row and row[0] == "MACs per token"]
    assert "fxprune prune DENSE --recipe fxprune_recipe.yaml" in html(Record("old", old))


# --- the command, and the disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "small")
    return tmp_path / "small"


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_the_command_renders_the_same_again(run: Run, checkout: Path) -> None:
    before = contents(checkout)
    ran = run("report", str(checkout))
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.split() == [str(checkout / n) for n in ("report.html", "report.md", "fxprune_recipe.yaml", "README.md")]
    assert contents(checkout) == before
    for name in ("report.html", "report.md", "fxprune_recipe.yaml", "README.md"):
        (checkout / name).unlink()
    assert run("report", str(checkout)).status == 0
    assert contents(checkout) == before


def test_a_card_that_somebody_wrote_stays(checkout: Path) -> None:
    card = checkout / "README.md"
    mine = card.read_text().replace("## Limits", "## What I found out")
    card.write_text(mine)
    assert card not in render_report(checkout)
    assert card.read_text() == mine


def test_what_cannot_be_rendered(run: Run, checkout: Path, tmp_path: Path) -> None:
    assert run("report", "/no/such/place").said == "fxprune: there is no directory '/no/such/place'"
    ran = run("report", str(tmp_path))
    assert ran.status == 2
    assert ran.said == f"fxprune: '{tmp_path}' holds no fxprune_report.json: fxprune prune and fxprune recover write one"
    (checkout / "fxprune_report.json").write_text("[]")
    ran = run("report", str(checkout))
    assert (ran.status, ran.said) == (1, f"fxprune: '{checkout}/fxprune_report.json' is damaged: it holds no object, but []")
    (checkout / "fxprune_report.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"'{checkout}/fxprune_report.json' is not JSON"):
        render_report(checkout)


def test_a_full_disk_leaves_old_pages_whole(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "report.html").write_text("old")
    done: list[Path] = []
    before, replace = contents(checkout), Path.replace

    def some(self: Path, to: Path) -> Path:
        if done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done.append(to)
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", some)
    with pytest.raises(UsageError, match=f"cannot write '{checkout}/report.md': No space left on device"):
        render_report(checkout)
    assert done == [checkout / "report.html"]
    assert contents(checkout) == {**before, "report.html": (checkout / "report.html").read_bytes()}


def test_a_page_that_cannot_be_written_leaves_no_checkpoint(
    result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_at_the_card(path: Path, text: str) -> None:
        if path.name == "README.md":
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise UsageError("cannot write the card") from error
        write_whole(path, text)

    with monkeypatch.context() as patch:
        patch.setattr("fxprune.reporting.page.write_whole", full_at_the_card)
        with pytest.raises(CheckpointError, match=f"could not write '{tmp_path}/out': No space left on device; nothing was left"):
            result.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    result.save_pretrained(tmp_path / "out")


def test_an_evaluation_is_attached(run: Run, checkpoint: Path) -> None:
    ran = run("eval", "checkpoint", "--dense", "dense", "--texts", "mine=text.txt", "--length", "16", "--attach", "--json")
    assert ran.status == 0, ran.err
    value = json.loads(ran.out)["perplexities"][0]["perplexity"]
    assert json.loads((checkpoint / "eval.json").read_text()) == json.loads(ran.out)
    dense = json.loads(ran.out)["dense"]["perplexities"][0]["perplexity"]
    for name in ("report.html", "report.md", "README.md"):
        text = (checkpoint / name).read_text()
        assert f"{value:,.2f}" in text
        assert f"{dense:,.2f}" in text
    assert Tables((checkpoint / "report.html").read_text()).row("perplexity, mine, 16 tokens")[:2] == [
        f"{dense:,.2f}",
        f"{value:,.2f}",
    ]
    ran = run("eval", "dense", "--texts", "mine=text.txt", "--length", "16", "--attach")
    assert (ran.status, ran.out) == (2, "")
    assert ran.said == "fxprune: 'dense' holds no fxprune_report.json: fxprune prune and fxprune recover write one"


def test_a_recovery_leaves_its_pages(saved: Path, text: Path, tmp_path: Path) -> None:
    write_demo = json.loads((saved / "fxprune_report.json").read_text())
    shutil.copytree(saved, tmp_path / "small")
    (tmp_path / "small" / "fxprune_report.json").write_text(json.dumps({**write_demo, "perplexity": report()["perplexity"]}))
    (tmp_path / "small" / "eval.json").write_text(json.dumps(evaluation()))
    options: dict[str, Any] = {"max_steps": 2, "batch_size": 2, "cutoff": 32, "length": 32, "validation_samples": 2}
    made = fxprune.recover(tmp_path / "small", str(text), output=tmp_path / "out", **options)
    page = (tmp_path / "out" / "report.html").read_text()
    assert unreadable(tmp_path / "out") == []
    assert made.report.perplexity is not None
    before, after = made.report.perplexity
    table = Tables(page)
    assert table.row("perplexity, held out") == [f"{before:,.2f} before, {after:,.2f} after"]
    assert table.row("perplexity, a text, before recovery")[1] == "25.50"
    assert "wiki" not in page, "an evaluation is of the weights that were evaluated"
    assert "perplexities and texts marked as before recovery" in page
    assert write(tmp_path / "again", json.loads((tmp_path / "out" / "fxprune_report.json").read_text()))
    assert "fxprune recover PRUNED --data text.jsonl" in (tmp_path / "out" / "report.md").read_text()
