"""A dense model that knows two sources of text, and a pruned one that has lost more of the second: planted, so that it is known."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import fxprune
from fxprune.recovery.curriculum import Curriculum
from fxprune.recovery.result import RecoveryResult
from fxprune.recovery.run import recover

from .zoo import build, tokenizer

SHORT: dict[str, Any] = {"cutoff": 24, "length": 48, "batch_size": 6, "lr": 3e-3, "warmup": 2, "max_steps": 12}
"""Settings of a run that takes a moment."""

HALF = 47
"""Words of each source: w0 to w46, and w47 to w93."""


def write_words(path: Path, first: int, rows: int = 160, seed: int = 0) -> Path:
    """JSON lines of arithmetic progressions in the `HALF` words from ``first`` on."""
    chosen = random.Random(seed)
    lines = []
    for _ in range(rows):
        start, step = chosen.randrange(HALF), chosen.randrange(1, 4)
        lines.append({"text": " ".join(f"w{first + (start + i * step) % HALF}" for i in range(chosen.randrange(10, 22)))})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def write_sources(place: Path) -> tuple[str, str]:
    """Files of both sources."""
    return str(write_words(place / "kept.jsonl", 0)), str(write_words(place / "lost.jsonl", HALF, seed=1))


@functools.cache
def dense() -> nn.Module:
    """A model that knows both sources."""
    with tempfile.TemporaryDirectory() as place:
        sources = ",".join(write_sources(Path(place)))
        how: dict[str, Any] = {"method": "full", "lr": 1e-2, "max_steps": 60, "validation_every": 0, "batch_size": 12}
        return recover(build("llama", tied=False), sources, tokenizer=tokenizer(), **{**SHORT, **how}).model


@functools.cache
def damaged() -> nn.Module:
    """The dense model with narrower FFNs, and with the embeddings of the second source's words mixed up."""
    model = cast(Any, fxprune.prune(dense(), units={"ffn": 0.25}, criterion="l1", tokenizer=tokenizer()).model)
    words = torch.tensor(tokenizer().convert_tokens_to_ids([f"w{i}" for i in range(HALF, 2 * HALF)]))
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[words] = rows[words.roll(5)]
    return cast(nn.Module, model)


def taught(curriculum: Curriculum, *, teacher: nn.Module | None = None, **settings: Any) -> RecoveryResult:
    """A short recovery of the damaged model."""
    chosen = {**SHORT, "method": "full", **settings}
    return recover(damaged(), curriculum=curriculum, teacher=teacher or dense(), tokenizer=tokenizer(), **chosen)


def measurements(result: RecoveryResult, stage: int = 1) -> list[dict[str, Any]]:
    """The records of a stage."""
    assert result.report.curriculum is not None
    return [r for r in result.report.curriculum["measurements"] if r["stage"] == stage]
