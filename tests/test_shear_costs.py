"""The benchmarks of what LHSPG costs, on a tiny model: an account of memory that real tensors confirm, and shares of a step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import common, shear_memory, shear_overhead


def ran(module: Any, output: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [module.__file__, *options, "--threads", "1", "--output", str(output)])
    module.main()
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_live_counts_what_lives_once() -> None:
    held = torch.zeros(256)  # 1 KiB
    with shear_memory.Live([held]) as live:
        assert (live.now, live.peak) == (1024, 1024)
        copied = held + 1
        view = copied[::2].view(4, 32)
        assert live.now == 2048
        del copied
        assert live.now == 2048, "the view keeps it"
        del view
        assert (live.now, live.peak) == (1024, 2048)
        (torch.ones(512) * 2).sum()
    assert 1024 + 2 * 2048 <= live.peak <= 1024 + 2 * 2048 + 64


def test_memory_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = common.Shape("small", 2, 96, 6, 2, 16, 256, 500, True)
    monkeypatch.setitem(common.SHAPES, "small", shape)
    monkeypatch.setattr(shear_memory, "free", lambda _: 12_800.0)
    found = ran(shear_memory, tmp_path / "m.json", monkeypatch, "--rows", "small,float32,2x16", "llama-7b,bfloat16,1x16")
    small, large = found["rows"].values()
    weights = sum(p.nbytes for p in shape.build().parameters())
    assert small["base_weights"] == small["dense_gradients"] == round(weights / 2**20, 1)
    assert set(small["measured"]) == {"warm-up", "begin of a period", "shrinking"}
    assert max(small["measured"].values()) == pytest.approx(small["peak"], rel=0.1)
    assert small["within_limit"] == (small["over_computed"] <= 1.1)
    assert "measured" not in large
    assert large["peak"] > large["base_weights"] > 12_800


def test_a_dense_gradient_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = shear_memory.Row.build

    def thawed(self: shear_memory.Row, *arguments: Any, **options: Any) -> Any:
        model = built(self, *arguments, **options)
        next(p for n, p in model.named_parameters() if "norm" in n).grad = torch.ones(48)
        return model

    monkeypatch.setattr(shear_memory.Row, "build", thawed)
    monkeypatch.setattr(shear_memory, "computed", lambda *_: {"peak": 1.0})
    with pytest.raises(AssertionError, match="a base weight has a gradient"):
        ran(shear_memory, tmp_path / "m.json", monkeypatch, "--rows", "tiny,float32,2x16")


def test_overhead_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--shape", "tiny", "--tokens", "2x16", "--repeats", "2", "--only", "linear")
    (row,) = ran(shear_overhead, tmp_path / "o.json", monkeypatch, *options)["projections"].values()
    assert row["step"] > row["wrapped_optimizer"] + row["projection"] > 0
    assert row["share"] == pytest.approx(row["projection"] / row["step"], rel=0.01)
    assert row["within_limit"] == (row["share"] <= 0.05)
    assert row["removed"] == pytest.approx(0.2, abs=0.03)
