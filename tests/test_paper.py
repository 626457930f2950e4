"""The benchmarks of the paper's experiments, on a tiny model and made-up texts of the same names."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import fxprune
from benchmarks.paper import aggregation, bench, criteria, data_amount, dependency, layers, ratios, steps
from benchmarks.paper.common import Data, run
from fxprune.checkpoint.source import load_source
from fxprune.errors import PlanError, UsageError

from .harness_rows import raw_rows, task_row
from .zoo import build, tokenizer

Main = Callable[[Sequence[str] | None], None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of eight layers, and the texts."""
    made = tmp_path_factory.mktemp("paper")
    torch.manual_seed(0)
    cast(PreTrainedModel, build("llama", num_hidden_layers=8)).save_pretrained(made / "tiny")
    tokenizer().save_pretrained(made / "tiny")
    data = made / "data"
    data.mkdir()
    words = random.Random(0)

    def write(name: str, rows: int, wrap: Callable[[str], Any] | None = None) -> None:
        texts = [" ".join(f"w{words.randrange(94)}" for _ in range(20)) for _ in range(rows)]
        lines = texts if wrap is None else [json.dumps(wrap(text)) for text in texts]
        with gzip.open(data / name, "wt") as file:
            file.write("".join(f"{line}\n" for line in lines))

    for name in ("wikitext2_raw_valid.txt.gz", "ptb_valid.txt.gz", "wikitext2_raw_train_first1MB.txt.gz"):
        write(name, 30)
    write("c4_sample.jsonl.gz", 1540, lambda text: {"text": text, "url": "somewhere"})
    write("books.jsonl.gz", 30, lambda text: {"text": text})
    write("alpaca.jsonl.gz", 80, lambda text: {"instruction": text[:40], "input": "", "output": text[40:]})
    rows = [task_row("piqa", raw) for raw in raw_rows("piqa", 6)]
    (data / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


_LOADED: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is loaded and traced once for all tests; nothing may change it."""
    load, trace = load_source, fxprune.trace

    def loaded(source: Any, *, dtype: Any) -> Any:
        key = f"{source} {dtype}"
        if key not in _LOADED:
            _LOADED[key] = load(source, dtype=dtype)
        return _LOADED[key]

    def traced(model: Any, inputs: Any) -> Any:
        key = f"trace {id(model)}"
        if key not in _LOADED:
            _LOADED[key] = trace(model, inputs)
        return _LOADED[key]

    monkeypatch.setattr(bench, "load_source", loaded)
    monkeypatch.setattr(fxprune, "trace", traced)


def call(script: Main, place: Path, output: Path, *more: str) -> int:
    fixed = ["--model", str(place / "tiny"), "--data", str(place / "data"), "--output", str(output), "--threads", "1"]
    return run(script, [*fixed, "--samples", "4", "--length", "16", "--windows", "4", *more])


def book(output: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(output.read_text()))


TWO = ("--rows", "element1,wanda-sp", "--ratios", "0.1")


def test_rows_are_measured_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "made" / "criteria.json"
    assert call(criteria.main, place, output, *TWO) == 0
    first = book(output)
    dense, element1, wanda = first["rows"]
    assert [r["name"] for r in first["rows"]] == ["dense", "element1", "wanda-sp"]
    assert element1["key"]["recipe"]["protect_first"] == 4
    assert element1["form"] == "per-layer"
    assert wanda["form"] == "uniform"
    for row in (element1, wanda):
        assert row["removed"] == pytest.approx(0.1, abs=0.02)
        assert row["parameters"] == pytest.approx(dense["parameters"] * (1 - row["removed"]), rel=1e-4)
        assert row["calibration"] == "4 x 16 tokens of c4_head.jsonl, seed 0"
        assert row["calibration_tokens"] == 64
        assert {"importance", "selection", "rewrite", "verify"} <= set(row["seconds"])
        for name, source in (("wikitext2", "wikitext2_raw_valid.txt.gz"), ("ptb", "ptb_valid.txt.gz"), ("c4", "c4_tail.jsonl")):
            found = row["perplexity"][name]
            assert (found["windows"], found["tokens"], found["length"]) == (4, 60, 16)
            assert (found["protocol"], found["source"]) == ("llm-pruner", source)
            assert found["perplexity"] != dense["perplexity"][name]["perplexity"]
    (header,) = first["runs"]
    assert str(place) not in output.read_text()
    assert "--data DIR" in header["command"]
    assert header["command"].startswith("python -m benchmarks.paper.criteria")
    assert "| wanda-sp | 10% |" in capsys.readouterr().out
    monkeypatch.setattr(bench.Bench, "prune", _unwanted)
    monkeypatch.setattr(bench.Bench, "perplexities", _unwanted)
    assert call(criteria.main, place, output, *TWO) == 0
    assert book(output) == first


def _unwanted(*_: Any, **__: Any) -> None:
    raise AssertionError("measured again")


def test_a_run_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "criteria.json"
    prune = bench.Bench.prune

    def cut_off(self: bench.Bench, recipe: Any, ratio: float) -> Any:
        if recipe["criterion"] == "wanda":
            raise KeyboardInterrupt
        return prune(self, recipe, ratio)

    monkeypatch.setattr(bench.Bench, "prune", cut_off)
    with pytest.raises(KeyboardInterrupt):
        call(criteria.main, place, output, *TWO)
    before = book(output)["rows"]
    assert [r["name"] for r in before] == ["dense", "element1"]
    monkeypatch.setattr(bench.Bench, "prune", prune)
    assert call(criteria.main, place, output, *TWO) == 0
    after = book(output)
    assert after["rows"][:2] == before
    assert [r["run"] for r in after["rows"]] == [0, 0, 1]


def test_stages_are_shared_by_ratios(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and curves that do not depend on the ratio are computed once, and give what a prune by itself gives."""
    calls: list[str] = []
    clock = bench._Clock.__call__

    def counted(self: Any, name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        def wrapper(*a: Any, **k: Any) -> Any:
            calls.append(name)
            return function(*a, **k)

        return clock(self, name, wrapper, *args, **kwargs)

    monkeypatch.setattr(bench._Clock, "__call__", counted)
    output = tmp_path / "out.json"
    assert call(criteria.main, place, output, "--ours-only", "--ratios", "0.1", "0.2") == 0
    rows = book(output)["rows"]
    assert [r["name"] for r in rows] == ["dense", "default", "default", "uniform", "uniform"]
    settings = {json.dumps(_planning(r)) for r in rows[1:]}
    lanes = {json.dumps([_planning(r), r["key"]["recipe"].get("widths")]) for r in rows[1:]}
    assert calls.count("importance") == len(settings) < 4
    assert calls.count("sensitivity, part 1") == len(lanes) < 4
    parts = sum(r["key"]["recipe"].get("rounds", 1) for r in rows[1:])
    assert calls.count("selection") == parts
    assert sum(c.startswith("sensitivity") for c in calls) == parts - 4 + len(lanes)
    assert rows[1]["seconds"]["importance"] == rows[2]["seconds"]["importance"] > 0
    alone = tmp_path / "alone.json"
    assert call(criteria.main, place, alone, "--rows", "default", "--ratios", "0.2") == 0
    assert book(alone)["rows"][1]["perplexity"]["ptb"]["perplexity"] == rows[2]["perplexity"]["ptb"]["perplexity"]


def test_how_much_of_the_gap_is_closed() -> None:
    """From 100 to 40, with 200 as the best of the others and 10 dense: log 2 and log 5 of log 20."""

    def row(name: str, ratio: float, **values: float) -> Any:
        return {"name": name, "key": {"ratio": ratio}, "perplexity": {text: {"perplexity": v} for text, v in values.items()}}

    rows = [row("dense", 0.0, a=10, b=10), row("l2", 0.2, a=200, b=900), row("flap", 0.2, a=300, b=200), row("l2", 0.5, a=1, b=1)]
    rows += [row("default", 0.2, a=100, b=40), {"name": "uniform", "key": {"ratio": 0.2}, "error": "none"}]
    shares = ["default at 20% closes 23.1% of the gap on a", "default at 20% closes 53.7% of the gap on b"]
    assert criteria.closed(rows) == shares
    both = [{**r, "recovered": {"perplexity": r["perplexity"]}} if r["name"] in ("flap", "default") else r for r in rows]
    more = ["default at 20%, recovered, closes 32.3% of the gap on a", "default at 20%, recovered, closes 53.7% of the gap on b"]
    assert criteria.closed(both) == [*shares, *more]


def _planning(row: Any) -> Any:
    """What of a recipe is no matter of selection."""
    return {k: v for k, v in row["key"]["recipe"].items() if k not in ("ranking", "widths", "multiple", "floor")}


def test_recovery_and_tasks(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.json"
    rows = ["--rows", "wanda-sp", "--ratios", "0.2"]
    short = ["batch_size=8", "cutoff=16", "length=16", "epochs=50", "validation_samples=8"]
    more = ["--recover", "3000", "--recover-set", *short, "--tasks", "piqa", "--limit", "4", "--task-dtype", "bfloat16"]
    used: list[torch.dtype] = []
    evaluate = fxprune.evaluate

    def noted(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        used.append(next(model.parameters()).dtype)
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr(fxprune, "evaluate", noted)
    assert call(criteria.main, place, output, *rows, *more) == 0
    assert used == 3 * [torch.bfloat16]
    dense, row = book(output)["rows"]
    assert row["tasks"]["tasks"][0]["rows"] == 4
    assert row["key"]["tasks"] == {"names": ["piqa"], "limit": 4, "dtype": "bfloat16"}
    above = dense["tasks"]["above_chance"]
    assert above == dense["tasks"]["average"] - 0.5 != 0
    assert row["tasks"]["above_chance_kept"] == (pytest.approx(row["tasks"]["above_chance"] / above))
    recovered = row["recovered"]
    assert recovered["tokens"] == pytest.approx(3000, rel=0.2)
    assert recovered["settings"]["max_tokens"] == 3000
    assert recovered["perplexity"]["ptb"]["perplexity"] != row["perplexity"]["ptb"]["perplexity"]
    assert "tasks" in recovered
    used.clear()
    assert call(criteria.main, place, output, *rows, *more, "--tasks-of", "recovered") == 0
    assert used == [torch.bfloat16]  # of the dense model they are known
    (late,) = (r for r in book(output)["rows"] if (r["key"]["tasks"] or {}).get("of") == "recovered")
    assert "tasks" not in late
    assert late["recovered"]["tasks"] == recovered["tasks"]
    monkeypatch.setattr(bench.Bench, "recover", _unwanted)
    for again in ((), ("--tasks-of", "recovered")):
        assert call(criteria.main, place, output, *rows, *more, *again) == 0


def test_in_bfloat16(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    short = [
        "--recover-set",
        "max_steps=2",
        "batch_size=8",
        "cutoff=64",
        "validation_samples=4",
        "warmup=0",
        "--recover",
        "9999999",
    ]
    options = ["--dtype", "bfloat16", "--rows", "element1,default", "--ratios", "0.1", "--recover-recipe", "llm-pruner"]
    assert call(criteria.main, place, output, *options, *short) == 0
    _, *rows = book(output)["rows"]
    assert [r["name"] for r in rows] == ["element1", "default"]
    for row in rows:
        assert row["key"]["dtype"] == "bfloat16"
        assert row["verify_error"] < 0.1
        assert row["recovered"]["steps"] == 2
        assert 1 < row["recovered"]["perplexity"]["ptb"]["perplexity"] < 1000


def test_a_row_that_fails_is_said_and_tried_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    assert call(criteria.main, place, output, "--rows", "element1", "--ratios", "0.9") == 0
    row = book(output)["rows"][1]
    assert row["error"].startswith("PlanError: a ratio of 90.0% cannot be reached")
    assert "PlanError" in capsys.readouterr().out
    tried: list[float] = []

    def again(self: bench.Bench, recipe: Any, ratio: float) -> Any:
        tried.append(ratio)
        raise PlanError("as before")

    monkeypatch.setattr(bench.Bench, "prune", again)
    assert call(criteria.main, place, output, "--rows", "element1", "--ratios", "0.9") == 0
    assert tried == [0.9]
    assert [r.get("error") for r in book(output)["rows"]] == [None, "PlanError: as before"]


@pytest.mark.parametrize("name", ["c4", "wikitext", "books"])
def test_every_calibration_text(place: Path, tmp_path: Path, name: str) -> None:
    assert call(criteria.main, place, tmp_path / "o.json", "--rows", "random", "--ratios", "0.1", "--calibration", name) == 0
    assert book(tmp_path / "o.json")["rows"][1]["key"]["calibration"] == name


def test_layers(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "layers.json"
    assert call(layers.main, place, output) == 0
    heads, ffn = book(output)["rows"]
    assert [g["layer"] for g in ffn["groups"]] == list(range(8))
    assert [n for n, _ in ffn["groups"][0]["curve"]] == [0, 16, 32, 47, 63]
    assert [n for n, _ in heads["groups"][3]["curve"]] == [0, 1]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    before = output.read_text()
    assert call(layers.main, place, output) == 0
    assert output.read_text() == before


def test_dependency(place: Path, tmp_path: Path) -> None:
    """``with`` is the network that a prune gives; ``without`` has as many zeros, elsewhere."""
    output = tmp_path / "dependency.json"
    assert call(dependency.main, place, output, "--ratios", "0.12") == 0
    dense, coupled, loose = book(output)["rows"]
    assert coupled["parameters"] == loose["parameters"] < dense["parameters"]
    ppl = [row["perplexity"]["c4"]["perplexity"] for row in (dense, coupled, loose)]
    assert len({round(p, 6) for p in ppl}) == 3
    pruned = tmp_path / "criteria.json"
    assert call(criteria.main, place, pruned, "--rows", "element1", "--ratios", "0.12") == 0
    again, row = book(pruned)["rows"]
    assert again["perplexity"]["c4"]["perplexity"] == ppl[0]
    assert row["parameters"] == coupled["parameters"]
    assert row["perplexity"]["c4"]["perplexity"] == pytest.approx(ppl[1], rel=1e-5)


def test_aggregation_and_ratios(place: Path, tmp_path: Path) -> None:
    assert call(aggregation.main, place, tmp_path / "a.json", "--rows", "max,product", "--ratios", "0.1", "--dtype", "float64") == 0
    rows = book(tmp_path / "a.json")["rows"]
    assert [r["key"].get("recipe", {}).get("aggregation") for r in rows] == [None, "max", "product"]
    assert {r["key"]["dtype"] for r in rows} == {"float64"}
    assert call(ratios.main, place, tmp_path / "r.json", "--rows", "llm-pruner", "--ratios", "0.05", "0.1", "--text", "c4") == 0
    assert [r["key"]["ratio"] for r in book(tmp_path / "r.json")["rows"]] == [0.0, 0.05, 0.1]
    assert (tmp_path / "r.png").is_file()


SHORT = ("--recover-set", "max_steps=4", "batch_size=8", "cutoff=16", "length=16", "validation_samples=4", "validation_every=2")


def test_data_amount(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "d.json"
    assert call(data_amount.main, place, output, "--ratio", "0.1", "--amounts", "0", "20", "60", *SHORT) == 0
    dense, nothing, some, more = book(output)["rows"]
    assert dense["parameters"] > nothing["parameters"]
    assert nothing["recovery"] is None
    assert (some["recovery"]["settings"]["samples"], more["recovery"]["settings"]["samples"]) == (20, 60)
    assert nothing["perplexity"]["ptb"]["perplexity"] != some["perplexity"]["ptb"]["perplexity"]
    assert nothing["parameters"] == some["parameters"] == more["parameters"]


@pytest.mark.parametrize("validation", ["held-out", "ptb"])
def test_steps(place: Path, tmp_path: Path, validation: str) -> None:
    output = tmp_path / "s.json"
    more = ("--recover-recipe", "llm-pruner", "--recover-data", "books", "--validation", validation)
    assert call(steps.main, place, output, "--ratio", "0.1", *more, *SHORT) == 0
    (row,) = book(output)["rows"]
    assert [v["step"] for v in row["recovery"]["validation"]] == [0, 2, 4]
    assert row["recovery"]["settings"]["rank"] == 8
    assert output.with_suffix(".png").is_file()
    if validation == "ptb":
        untrained = tmp_path / "d.json"
        assert call(data_amount.main, place, untrained, "--ratio", "0.1", "--amounts", "0") == 0
        expected = book(untrained)["rows"][1]["perplexity"]["ptb"]["perplexity"]
        assert row["recovery"]["validation"][0]["perplexity"] == pytest.approx(expected, rel=1e-4), "the protocol of the tables"


BAD = [
    (("--rows", "elment1"), "unknown row 'elment1'; did you mean 'element1'?"),
    (("--rows", "default", "--ours-only"), "--ours-only says which rows: leave --rows out"),
    (("--rows", "torch-pruning"), "the row torch-pruning needs --torch-pruning DIR"),
    (("--data", "/nowhere"), "there is no directory '/nowhere' (--data)"),
    (("--data", ""), "where are the texts? Pass --data DIR or set FXPRUNE_DATA"),
    (("--rows", "l2", "--limit", "9"), "--limit and --task-dtype say how tasks are run: name some, or all seven by --tasks"),
    (("--rows", "l2", "--task-dtype", "bfloat16"), "--limit and --task-dtype say how tasks are run"),
    (("--rows", "l2", "--tasks", "piqua"), "unknown task 'piqua'; did you mean 'piqa'?"),
    (("--rows", "l2", "--tasks", "--tasks-of", "recovered"), "--tasks-of recovered needs --tasks and --recover"),
    (("--rows", "l2", "--recover", "9", "--recover-set", "speed=3"), "there is no recovery setting 'speed'"),
]


@pytest.mark.parametrize(("typed", "said"), BAD)
def test_bad_input(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], typed: tuple[str, ...], said: str) -> None:
    if "--ours-only" not in typed and "--rows" not in typed:
        typed = ("--rows", "l2", *typed)
    assert call(criteria.main, place, tmp_path / "o.json", *typed) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()


def test_texts_that_lack(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing file, too few pages, a calibration text that is evaluated on, a file of something else."""
    data = tmp_path / "data"
    data.mkdir()
    for file in (place / "data").iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    more = ("--data", str(data), "--rows", "l2", "--ratios", "0.1")
    (data / "books.jsonl.gz").write_bytes(b"")
    (data / "ptb_valid.txt.gz").rename(tmp_path / "kept")
    assert call(criteria.main, place, tmp_path / "o.json", *more) == 1
    assert "(--data) holds no ptb_valid.txt.gz" in capsys.readouterr().err
    pages = gzip.decompress((data / "c4_sample.jsonl.gz").read_bytes()).decode().splitlines()
    (data / "ptb_valid.txt.gz").write_bytes(gzip.compress("\n".join(json.loads(page)["text"] for page in pages[:50]).encode()))
    assert call(criteria.main, place, tmp_path / "o.json", *more) == 1
    assert "the evaluation text 'ptb' overlaps with the training text 'c4': 100.0% of its" in capsys.readouterr().err
    (tmp_path / "o.json").write_text("[]")
    assert call(criteria.main, place, tmp_path / "o.json", *TWO) == 1
    assert "'o.json' holds no results of this kind; name another file with --output" in capsys.readouterr().err
    (data / "c4_sample.jsonl.gz").write_bytes(gzip.compress(b'{"text": "w1 w2"}\n' * 9))
    with pytest.raises(UsageError, match=r"c4_sample.jsonl.gz has 1500 rows or fewer: none is left to evaluate on"):
        _ = Data.of(str(data)).evaluation


def test_without_the_peer(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows but that one run where Torch-Pruning is not given."""
    monkeypatch.setattr(criteria, "ROWS", {n: criteria.ROWS[n] for n in ("random", "torch-pruning")})
    assert call(criteria.main, place, tmp_path / "o.json", "--ratios", "0.1") == 0
    assert [r["name"] for r in book(tmp_path / "o.json")["rows"]] == ["dense", "random"]
    assert "without torch-pruning: Torch-Pruning is measured if" in capsys.readouterr().out


def test_all_rows_have_settings_that_prune_knows() -> None:
    from fxprune.recipes import SETTINGS

    for name, recipe in criteria.ROWS.items():
        assert name == "torch-pruning" or set(recipe) <= set(SETTINGS), name
