"""What a checkpoint was calibrated and trained on is written into it, and `fxprune eval` finds it out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import fxprune
from fxprune.evaluation.contamination import find_overlaps, read_seen

from .zoo import build, tokenizer


def lines(seed: int, count: int = 40) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(f"w{chosen.randrange(90)}" for _ in range(40)) for _ in range(count)]


def test_calibration_and_recovery_are_in_the_report(tmp_path: Path) -> None:
    calibrated, learnt, fresh = lines(1), lines(2), lines(3)
    (tmp_path / "learnt.txt").write_text("\n".join(learnt))
    model, words = build("llama", tied=False), tokenizer()
    result = fxprune.prune(
        model, 0.2, tokenizer=words, calibration=calibrated, samples=8, length=64, criterion="l2", recipe="uniform"
    )
    result.save_pretrained(tmp_path / "pruned")
    options: dict[str, Any] = {"max_steps": 1, "cutoff": 64, "length": 64, "validation_samples": 0, "packing": "off"}
    fxprune.recover(tmp_path / "pruned", tmp_path / "learnt.txt", tokenizer=words, output=tmp_path / "out", **options)
    seen = read_seen(tmp_path / "out")
    assert [entry["use"] for entry in seen] == ["calibration", "recovery"]
    texts = {"calibrated": calibrated, "learnt": learnt, "fresh": fresh}
    found = {(overlap["text"], overlap["use"]) for overlap in find_overlaps(texts, seen)}
    assert found == {("calibrated", "calibration"), ("learnt", "recovery")}
    report = json.loads((tmp_path / "out" / "fxprune_report.json").read_text())
    assert report["recovery"]["steps"] == 1


def test_the_models_own_samples_are_no_text_that_was_seen() -> None:
    result = fxprune.prune(build("llama", tied=False), 0.2, tokenizer=tokenizer(), samples=2, length=8, batch_size=2)
    assert result.report.data == []
