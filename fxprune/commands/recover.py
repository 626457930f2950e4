"""``fxprune recover``."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from typing import Any

import torch

from ..errors import UsageError
from ..recovery.result import RecoveryResult
from ..recovery.run import recover
from ..recovery.settings import settings_of
from ..recovery.state import SUFFIX
from .common import check_device, console, progress, quiet_libraries

FLAGS = ("samples", "method", "rank", "lr", "epochs", "max_steps", "batch_size", "micro_batch_size", "length", "cutoff", "seed")


def run(arguments: argparse.Namespace) -> int:
    """Train a pruned checkpoint and write the recovered one."""
    overrides = _overrides(arguments)
    settings_of(arguments.recipe, overrides)
    quiet_libraries()
    check_device(arguments.device)
    main = int(os.environ.get("RANK", "0")) == 0
    try:
        with progress() if main else nullcontext(None) as advance:
            result = recover(
                arguments.model,
                arguments.data,
                recipe=arguments.recipe,
                teacher=arguments.teacher,
                validation=arguments.validation,
                output=arguments.output,
                overwrite=arguments.overwrite,
                restart=arguments.restart,
                device=arguments.device,
                dtype=arguments.dtype,
                progress=advance,
                **overrides,
            )
    except KeyboardInterrupt:
        console.print(
            f"fxprune: interrupted; the same command goes on from the state in '{arguments.output}{SUFFIX}'", markup=False
        )
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if main:
        _show(result)
        print(arguments.output)
    return 0


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings from the flags and from ``--set``."""
    found: dict[str, Any] = {name: value for name in FLAGS if (value := getattr(arguments, name)) is not None}
    for text in arguments.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set takes field=value, got '{text}'")
        if name in found:
            raise UsageError(f"{name} is set twice")
        found[name] = value
    return found


def _show(result: RecoveryResult) -> None:
    """A short account, on standard error."""
    report = result.report
    share = report.trained_parameters / report.parameters
    console.print(f"trained     {report.trained_parameters:,} parameters ({share:.1%}), {report.settings['method']}")
    console.print(
        f"steps       {report.steps} ({report.stopped}), {report.tokens:,} tokens, {report.tokens_per_second:,.0f} tokens/s"
    )
    if report.history["loss"]:
        console.print(f"loss        {report.history['loss'][0]:.3f} -> {report.history['loss'][-1]:.3f}")
    if report.perplexity is not None:
        before, after = report.perplexity
        of = report.data["validation"]["sources"]
        console.print(f"perplexity  {before:.2f} -> {after:.2f} (step {report.best_step}; {of})", markup=False)
    for note in report.notes:
        console.print(f"note        {note}", markup=False)
