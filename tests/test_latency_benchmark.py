"""The latency benchmark at the size of a toy: every plan, both ways, the gains against numbers worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import latency
from benchmarks.common import SHAPES
from benchmarks.paper.common import run
from fxprune.evaluation import Latency

TINY = ("--ratio", "0.4", "--multiple", "8", "--prompt", "6", "--new-tokens", "3", "--repeats", "2", "--threads", "1")
TRY = ("--shape", "tiny", *TINY)


def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    path = tmp_path / "latency.json"
    words = [*TRY, "--output", str(path), *more]
    monkeypatch.setattr("sys.argv", ["benchmarks/latency.py", *words])
    latency.main(words)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_every_plan_in_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(tmp_path, monkeypatch, "--backend", "eager")
    plans = found["plans"]
    assert list(plans) == ["dense", "uniform", "rounded", "per-layer", "depth"]
    assert found["command"].startswith("python -m benchmarks.latency --shape tiny")
    assert (found["model"], found["repeats"], found["prompt"], found["new_tokens"]) == (
        "Llama, shape of tiny, random weights",
        2,
        6,
        3,
    )
    assert found["versions"]["torch"] == torch.__version__
    assert found["graphs_while_timing"] == 0
    s = SHAPES["tiny"]
    attention = 2 * s.hidden * s.heads * s.head_dim + 2 * s.hidden * s.kv_heads * s.head_dim
    read = s.vocabulary * s.hidden + s.layers * (attention + 3 * s.hidden * s.ffn + 2 * s.hidden) + s.hidden
    dense = plans["dense"]
    assert dense["parameters"] == read  # the embedding is tied, so it is read whole
    assert dense["decode_bytes"] == 4 * (read + 9 * s.layers * 2 * s.kv_heads * s.head_dim)
    for name, row in plans.items():
        for way in ("eager", "compiled"):
            check(dense, row, way)
            assert ("gain" in row[way]) is (name != "dense")
        assert row["compiled"]["graphs"] == 2
        assert row["compiled"]["same_tokens"] is True
        assert min(row["compiled"]["compile_seconds"].values()) >= 0
    assert [plans[n]["form"] for n in latency.PLANS] == ["uniform", "uniform", "per-layer", "uniform"]
    assert plans["uniform"]["removed"] == pytest.approx(0.4, abs=0.01)
    assert plans["per-layer"]["removed"] == pytest.approx(0.4, abs=0.01)
    assert [plans[n]["widths"] for n in latency.PLANS] == [[14, 14], [16, 16], [14, 15], None]
    assert [plans[n]["layers_dropped"] for n in latency.PLANS] == [0, 0, 0, 1]
    said = capsys.readouterr().out
    assert "times as fast" in said


def check(dense: dict[str, Any], row: dict[str, Any], way: str) -> None:
    for phase, work in (("prefill", "prefill_flops"), ("decode", "decode_bytes")):
        runs = row[way][f"{phase}_runs"]
        assert len(runs) == 2
        assert row[way][f"{phase}_range"] == [min(runs), max(runs)]
        assert 0 < min(runs) <= row[way][f"{phase}_ms"] <= max(runs)
        if row is not dense:
            gain = row[way]["gain"][phase]
            assert gain["speedup"] == pytest.approx(dense[way][f"{phase}_ms"] / row[way][f"{phase}_ms"], rel=0.01, abs=1e-3)
            assert gain["ideal"] == pytest.approx(dense[work] / row[work], rel=1e-3)
            assert gain["ideal"] > 1


def test_what_does_not_compile_is_said_and_eager_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", lambda model, **_: refuses)
    plans = measured(tmp_path, monkeypatch, "--only", "uniform")["plans"]
    assert list(plans) == ["dense", "uniform"]
    for row in plans.values():
        assert row["compiled"] == {"error": "RuntimeError: no compiler here"}
        assert row["eager"]["decode_ms"] > 0
    assert "compiled  prefill  dense      RuntimeError: no compiler here" in capsys.readouterr().out


def test_cases_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def turn(name: str) -> latency.Times:
        order.append(name)
        return float(len(order)), 1.0

    turns = {("a", "eager"): lambda: turn("a"), ("b", "eager"): lambda: turn("b")}
    times = latency.take_turns(turns, 3)
    assert order == ["a", "b"] * 3
    assert times["b", "eager"] == [(2.0, 1.0), (4.0, 1.0), (6.0, 1.0)]


def test_the_numbers_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = {"prefill_flops": 100, "decode_bytes": 90, "eager": latency.summary([(10.0, 4.0), (12.0, 2.0), (50.0, 3.0)])}
    pruned = {"prefill_flops": 80, "decode_bytes": 60, "eager": latency.summary([(10.0, 2.0), (8.0, 2.0), (40.0, 1.0)])}
    assert dense["eager"] == {
        "prefill_ms": 12.0,
        "prefill_range": [10.0, 50.0],
        "prefill_runs": [10.0, 12.0, 50.0],
        "decode_ms": 3.0,
        "decode_range": [2.0, 4.0],
        "decode_runs": [4.0, 2.0, 3.0],
    }
    assert latency.gains(dense, pruned, "eager") == {
        "prefill": {"speedup": 1.2, "ideal": 1.25, "share": 0.96, "saved": 0.8333, "speedup_range": [1.0, 1.5]},
        "decode": {"speedup": 1.5, "ideal": 1.5, "share": 1.0, "saved": 1.0, "speedup_range": [1.0, 3.0]},
    }
    monkeypatch.setattr(latency, "measure_latency", lambda *_, **__: Latency(7.0, 5.0, 6, 3, 1))
    assert latency.eager(None, latency._parser().parse_args([])) == (7.0, 5.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--multiple", "-8"], "--multiple must be at least 1, got -8"),
        (["--backend", "inducter"], "unknown --backend 'inducter'; did you mean 'inductor'?"),
        (["--model", "somewhere"], "--model and --shape contradict each other: leave one out"),
    ],
)
def test_what_is_refused(options: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(latency.main, [*TRY, *options, "--output", str(tmp_path / "latency.json")]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_work_that_is_not_a_llamas_is_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=32)).save_pretrained(tmp_path / "gpt2")
    capsys.readouterr()
    words = [*TINY, "--model", str(tmp_path / "gpt2"), "--output", str(tmp_path / "latency.json")]
    assert run(latency.main, words) == 1
    assert "the work of GPT2LMHeadModel cannot be counted: its products must be nn.Linear" in capsys.readouterr().err
    assert not (tmp_path / "latency.json").exists()
