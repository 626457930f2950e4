"""A spread of architectures through `benchmarks.coverage`, which does the same for every one that transformers ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import coverage, coverage_table
from benchmarks.zoo import configs, types

SPREAD: dict[tuple[str, str], dict[str, int]] = {
    # state spaces: heads with one state each, head widths, and the widths that B and C share
    ("causal", "mamba2"): {"hidden": 1, "kv_heads": 2, "query_groups": 2, "head_dim": 4},
    # low-rank attention, a router that picks groups of experts first, shared experts
    ("causal", "deepseek_v3"): {"hidden": 1, "kv_heads": 2, "head_dim": 5, "ffn": 3, "other": 4, "experts": 1},
    # differential attention: its two halves of heads go together
    ("causal", "diffllama"): {"hidden": 1, "query_groups": 2, "head_dim": 3, "ffn": 2, "other": 4},
    ("causal", "bitnet"): {"hidden": 1, "kv_heads": 2, "query_groups": 2, "head_dim": 3, "ffn": 2},
    # layers share a table of position biases, and so their heads; the encoder's state is an output
    ("seq2seq", "t5"): {"kv_heads": 3, "head_dim": 12, "ffn": 4},
    ("speech", "whisper"): {"hidden": 1, "kv_heads": 6, "head_dim": 12, "ffn": 4, "channels": 1},
    ("image", "vit"): {"hidden": 1, "kv_heads": 2, "head_dim": 4, "ffn": 2},
    ("image", "swin"): {},
    ("image", "resnet"): {},
    ("audio", "wav2vec2"): {},
}
"""(task, type) with the number of prunable groups of each kind; empty where only exactness and coverage are asked for."""


@pytest.mark.parametrize(("task", "model_type"), SPREAD, ids=str)
def test_a_spread_of_architectures(task: str, model_type: str) -> None:
    *_, row = coverage.examine(task, model_type, seeds=1, save=False)
    assert row["stage"] == "done"
    assert row["traced_error"] < 1e-4
    assert row["checks"] > 3
    assert row["wrong"] == []
    assert row["share"] > 0.9
    expected = SPREAD[task, model_type]
    if expected:
        assert row["groups"] == expected


def test_one_model_cannot_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "ROWS", tmp_path)
    coverage.measure([("causal", "no_such_model"), ("causal", "gpt2")], seeds=1, limit=120, workers=1)
    rows = coverage_table.read(tmp_path, ["causal"])
    assert [(r["type"], r["stage"], "error" in r) for r in rows] == [("gpt2", "done", False), ("no_such_model", "build", True)]
    counts = coverage_table.summary(rows)["causal"]
    assert [counts[k] for k in ("types", "instantiate", "run", "trace", "exact", "wrong")] == [2, 1, 1, 1, 1, 0]
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    coverage.measure([("causal", "gpt2")], seeds=1, limit=120, workers=1)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written, "what is there is not run again"
    header = {"command": "python -m benchmarks.coverage", "date": "today", "versions": {"torch": "2", "transformers": "5"}}
    text = coverage_table.markdown(header, rows, {"causal.gpt2": {"task": "causal", "type": "gpt2", "result": "build failed"}})
    assert "| `gpt2` | " in text
    assert "build failed" in text
    assert "**Do not instantiate** (1)" in text


def test_a_model_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "ROWS", tmp_path)
    coverage.measure([("causal", "llama")], seeds=1, limit=0.0, workers=1)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["error"] == "not finished after 0 s"


def test_every_registered_type_has_a_row_to_be() -> None:
    assert len(types.types_of("causal")) > 150
    known = {name for task in types.TASKS for name in types.types_of(task)}
    stale = [k for k in configs.CORRECTIONS if k.rpartition(".")[2] not in known]
    assert stale == [], "corrections of types that transformers does not have"
