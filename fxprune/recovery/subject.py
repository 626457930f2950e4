"""What is recovered: a prune's result, a checkpoint's directory, an eager model or a pruned graph."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..api import PruneResult
from ..checkpoint.source import load_source
from ..errors import UsageError
from ..names import PLAN_FILE, SPEC_FILE
from ..plan import PrunePlan
from ..quantised import quantised_part

VALUES = 512
"""Of each parameter that a fingerprint reads."""


@dataclass(frozen=True)
class Subject:
    """What is recovered.

    Attributes:
        model: The pruned model; never changed.
        tokenizer: Its tokenizer or None.
        pruned: Where it came from, if from `fxprune.prune`.
        directory: Where it came from, if from a checkpoint.
        plan: What was pruned, if that is known.
    """

    model: nn.Module
    tokenizer: Any = None
    pruned: PruneResult | None = None
    directory: Path | None = None
    plan: PrunePlan | None = None


def find_subject(target: Any, tokenizer: Any, *, device: torch.device | str | None, dtype: str | torch.dtype) -> Subject:
    """The subject that a user means.

    Args:
        target: A `PruneResult`, a directory, an eager model or a GraphModule.
        tokenizer: Used instead of the target's own.
        device: For a directory, where the model goes.
        dtype: For a directory, see `fxprune.checkpoint.source.load_source`.

    Raises:
        UsageError: It is something else, or cannot be trained: quantised, without weights, or with adapters already.
    """
    if isinstance(target, PruneResult):
        model: nn.Module = target.graph_module if target.model is None or target.form == "graph" else target.model
        found = Subject(model, tokenizer or target.tokenizer, pruned=target, plan=target.plan)
    elif isinstance(target, str | os.PathLike):
        found = _read(Path(target), tokenizer, device, dtype)
    elif isinstance(target, nn.Module):
        found = Subject(target, tokenizer)
    else:
        raise UsageError(
            f"cannot recover a {type(target).__name__}: expected fxprune.prune's result, a checkpoint's directory or a model"
        )
    _trainable(found.model)
    return found


def _read(path: Path, tokenizer: Any, device: torch.device | str | None, dtype: str | torch.dtype) -> Subject:
    if (path / SPEC_FILE).is_file():
        raise UsageError(f"'{path}' holds a plain module: load it with fxprune.load(dir, model=dense), and recover that in Python")
    if not path.is_dir():
        raise UsageError(f"there is no directory '{path}'")
    model, own = load_source(path, dtype=dtype)
    plan = PrunePlan.load(path / PLAN_FILE) if (path / PLAN_FILE).is_file() else None
    return Subject(model if device is None else model.to(device), tokenizer or own, directory=path, plan=plan)


def _trainable(model: nn.Module) -> None:
    kind = type(model).__name__
    if (part := quantised_part(model)) is not None:
        raise UsageError(f"this {kind} is quantised ({part}) and cannot be trained: recover it in floating point, then quantise")
    if any(p.is_meta for p in model.parameters()):
        raise UsageError(f"this {kind} is on the meta device: it has no weights to train")
    if any(hasattr(m, "lora_A") for m in model.modules()):
        raise UsageError(f"this {kind} has adapters already: merge them first (model.merge_and_unload() in peft)")
    try:
        model.train(model.training)
    except NotImplementedError as error:  # modules of torch.export refuse train() and eval(): their graph is of one mode
        raise UsageError(
            f"a traced {kind} cannot be trained: recover what fxprune.rewrite makes of it, or the eager model"
        ) from error
    if next(model.parameters(), None) is None:
        raise UsageError(f"this {kind} has no parameters to train")


def fingerprint(model: nn.Module) -> str:
    """A short name for a model's weights: names, shapes, dtypes and some values of each parameter, evenly spaced."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        values = flat[:: max(1, len(flat) // VALUES)].double().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def plan_name(plan: PrunePlan | None) -> str:
    """A short name for a plan: what it drops and keeps."""
    if plan is None:
        return "none"
    kept = sorted((name, units.tolist()) for name, units in plan.keep.items())
    return hashlib.sha256(repr((plan.fingerprint, plan.drop, kept)).encode()).hexdigest()[:16]
