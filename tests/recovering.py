"""Text, a tokenizer and pruned models that are small enough to be trained in a test."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from fxprune.api import PruneResult
from fxprune.data import Batches, load_examples
from fxprune.recovery.result import RecoveryResult
from fxprune.recovery.run import recover

from .zoo import build, tokenizer, tokens

SMALL: dict[str, Any] = {"cutoff": 24, "length": 48, "batch_size": 6, "lr": 3e-3, "max_steps": 8, "validation_every": 3}
"""Settings of a run that takes a moment."""

SLOWLY = """
import os, sys, time
import torch
torch.set_num_threads(1)
real = os.fsync
def fsync(handle):  # a state takes its time, so that many of the kills fall into the middle of one
    time.sleep(0.02)
    real(handle)
    time.sleep(0.02)
os.fsync = fsync
from fxprune.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command, in a process to be killed."""


def write_text(path: Path, rows: int = 120, seed: int = 0, pace: int = 1) -> Path:
    """JSON lines of text with something to learn in it: arithmetic progressions of words."""
    chosen = random.Random(seed)
    lines = []
    for _ in range(rows):
        start, step = chosen.randrange(94), chosen.randrange(pace, pace + 4)
        lines.append({"text": " ".join(f"w{(start + i * step) % 94}" for i in range(chosen.randrange(6, 22)))})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def write_instructions(path: Path, rows: int = 60) -> Path:
    """JSON lines in the form of Alpaca."""
    chosen = random.Random(1)
    lines = [{"instruction": f"w{chosen.randrange(94)}", "input": "", "output": "w1 w2 w3 w4"} for _ in range(rows)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def unpacked(text: Path, **options: Any) -> Batches:
    """Batches as a recovery with these settings makes them."""
    examples = load_examples(str(text), tokenizer(), cutoff=SMALL["cutoff"], completion_only=False, seed=0, **options)
    train, _ = examples.split(len(examples) // 10, 0)
    return Batches(train, batch_size=SMALL["batch_size"], length=SMALL["cutoff"], packing=False, pad_id=2, seed=0)


@functools.cache
def pruned(family: str = "llama", **options: Any) -> PruneResult:
    """A pruned model of a family, made once: recovery must not change it."""
    changes = {k: options.pop(k) for k in ("tied", "num_hidden_layers") if k in options}
    return fxprune.prune(build(family, **changes), **({"units": {"ffn": 0.25}} | options), criterion="l1", tokenizer=tokenizer())


def uneven() -> PruneResult:
    """A pruned model whose layers have widths of their own, in the FFN and in the query groups."""
    return pruned("llama", units=None, ratio=0.2, widths="per-layer", ranking="global", tied=False)


def trained(target: Any, data: Any, **settings: Any) -> RecoveryResult:
    """A short recovery."""
    return recover(target, data, **{**SMALL, **settings})


def losses(result: RecoveryResult) -> list[float]:
    """Of each step."""
    return result.report.history["loss"]


def logits(model: nn.Module, *shape: int) -> Tensor:
    """On fixed tokens."""
    with torch.no_grad():
        output: Any = model(input_ids=tokens(*(shape or (3, 11)), seed=5))
    found: Tensor = output.logits
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}
