"""The benchmark of LoRAShear, on a tiny model and made-up texts: rows at equal tokens, kept, resumed, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fxprune
from benchmarks.paper import common, lorashear
from benchmarks.paper.bench import Bench
from fxprune.lorashear import parts

from .shearing import traced_once
from .test_paper import book, call, one_trace, place

__all__ = ["one_trace", "place"]

SMALL = (
    "--tokens",
    "1500",
    "--ratios",
    "0.05",
    "--first",
    "wikitext,books",
    "--second",
    "alpaca",
    "--rows",
    "llm-pruner,lorashear,one-shot,kfac-no-knowledge",
)
SET = (
    "--set",
    *("cutoff=24", "length=24", "batch_size=3", "rank=2", "periods=2", "rounds=1", "knowledge_length=16", "knowledge_samples=2"),
)


@pytest.fixture(autouse=True)
def short_books(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last 8 of 30 paragraphs are for evaluation."""
    monkeypatch.setitem(common.HEADS, "books", 22)


def test_rows_at_equal_tokens_that_go_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parts, "trace", traced_once)
    output, work = tmp_path / "lorashear.json", tmp_path / "work"
    perplexities, cut = Bench.perplexities, list[str]()

    def cut_off(self: Bench, model: Any) -> Any:
        if str(work) in model.config._name_or_path and not cut:  # read back from a directory: a sheared one
            cut.append("lorashear")
            raise KeyboardInterrupt
        return perplexities(self, model)

    monkeypatch.setattr(Bench, "perplexities", cut_off)
    with pytest.raises(KeyboardInterrupt):
        call(lorashear.main, place, output, *SMALL, *SET, "--work", str(work))
    assert [row["name"] for row in book(output)["rows"]] == ["dense", "llm-pruner"]
    kept = next(work.glob("lorashear-0.05-????????"))
    with monkeypatch.context() as patch:
        shear, begun = fxprune.shear, list[Path]()

        def watched(*arguments: Any, **options: Any) -> Any:
            begun.append(options["output"])
            return shear(*arguments, **options)

        patch.setattr(fxprune, "shear", watched)
        assert call(lorashear.main, place, output, *SMALL, *SET, "--work", str(work)) == 0
        assert [path.name.rpartition("-")[0] for path in begun] == ["one-shot-0.05", "kfac-no-knowledge-0.05"]
    rows = book(output)["rows"]
    assert [row["name"] for row in rows] == ["dense", "llm-pruner", "lorashear", "one-shot", "kfac-no-knowledge"]
    for row in rows[1:]:
        assert "error" not in row, row
        assert row["removed"] == pytest.approx(0.05, abs=0.01)
        assert 1100 < row["tokens"]["total"] <= 1500
        assert [list(stage) for stage in row["recovery"]["curriculum"]["stages"]][1] == ["alpaca.jsonl.gz"]
        assert set(row["perplexity"]) == {"wikitext2", "ptb", "c4", "books"}
    peer, ours, once, without = rows[1:]
    assert peer["tokens"]["shearing"] == 0 < ours["tokens"]["shearing"]
    assert peer["recovery"]["curriculum"]["weights"] == "static"
    assert ours["recovery"]["curriculum"]["weights"] == "dynamic"
    assert peer["recovery"]["settings"]["rank"] == ours["recovery"]["settings"]["rank"] == 2
    assert (len(ours["lhspg"]["periods"]), len(once["lhspg"]["periods"])) == (2, 1)
    assert once["knowledge"] == ours["knowledge"], "taken over"
    assert once["seconds"]["knowledge"] == 0 < ours["seconds"]["knowledge"]
    assert (without["knowledge"], without["settings"]["criterion"]) == (None, "kfac")
    assert "| one-shot | 5% |" in capsys.readouterr().out
    assert str(place) not in output.read_text()
    assert str(tmp_path) not in output.read_text()
    assert "--work DIR" in book(output)["runs"][0]["command"]
    assert "--texts" not in book(output)["runs"][0]["command"], "no option"
    monkeypatch.setattr(fxprune, "shear", None)
    monkeypatch.setattr(fxprune, "recover", None)
    assert call(lorashear.main, place, output, *SMALL, *SET, "--work", str(work)) == 0
    assert book(output)["rows"] == rows
    assert call(lorashear.main, place, output, *SMALL, *SET, "--work", str(work), "--windows", "2") == 0
    again = book(output)["rows"][len(rows) :]
    assert [row["name"] for row in again] == [row["name"] for row in rows]
    for row, before in zip(again[1:], rows[1:], strict=True):
        assert row["perplexity"]["ptb"]["windows"] == 2
        assert (row["tokens"], row["seconds"]) == (before["tokens"], before["seconds"]), "measured again, not trained again"
    assert kept.is_dir()


def test_what_it_refuses(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "lorashear.json"
    for more, said in (
        (("--rows", "lorasheer"), "unknown row 'lorasheer'; did you mean 'lorashear'?"),
        (("--first", "c5"), "unknown row 'c5'; did you mean 'c4'?"),
        (("--set", "perods=3"), "there is no shearing setting 'perods'; did you mean 'periods'?"),
    ):
        assert call(lorashear.main, place, output, "--tokens", "1500", *more) == 1
        assert said in capsys.readouterr().err
    assert not output.exists()
