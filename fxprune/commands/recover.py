"""``fxprune recover``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..devices import find_device
from ..errors import UsageError
from ..names import PLAN_FILE
from ..plotting import check_plot
from ..recovery.curriculum import Curriculum
from ..recovery.plot import plot_curriculum
from ..recovery.result import RecoveryResult
from ..recovery.run import NO_PLAN, recover
from ..recovery.settings import settings_of
from ..recovery.state import SUFFIX
from ..wording import counted
from .common import console, goes_on, interrupted, progress, quiet_libraries

FLAGS = (
    "samples",
    "method",
    "rank",
    "lr",
    "epochs",
    "max_steps",
    "max_tokens",
    "batch_size",
    "micro_batch_size",
    "length",
    "cutoff",
    "seed",
)
LESSONS = ("rounds", "floor", "patience", "threshold", "shares")


def run(arguments: argparse.Namespace) -> int:
    """Train a pruned checkpoint and write the recovered one."""
    overrides = overrides_of(arguments, FLAGS)
    settings_of(arguments.recipe, overrides)
    curriculum = _curriculum(arguments)
    if arguments.plot is not None:
        check_plot(arguments.plot)
    state = f"{arguments.output.rstrip('/')}{SUFFIX}"
    quiet_libraries()
    find_device(arguments.device)
    main = int(os.environ.get("RANK", "0")) == 0
    if main and Path(arguments.model).is_dir() and not (Path(arguments.model) / PLAN_FILE).is_file():
        console.print(f"note        '{arguments.model}' {NO_PLAN}: it is trained as it is", markup=False)
    if main and not arguments.restart:
        goes_on(state)
    try:
        with progress() if main else nullcontext(None) as advance:
            result = recover(
                arguments.model,
                arguments.data if curriculum is None else None,
                curriculum=curriculum,
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
        return interrupted(state)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if main:
        _show(result)
        if arguments.plot is not None:
            plot_curriculum(result.report.curriculum or {}, arguments.plot)
        print(arguments.output)
    return 0


def _curriculum(arguments: argparse.Namespace) -> Curriculum | None:
    """What the options of the curriculum say."""
    given = {name: value for name in LESSONS if (value := getattr(arguments, name)) is not None}
    if arguments.curriculum is None:
        for name in (*given, *(n for n in ("then", "plot") if getattr(arguments, n) is not None)):
            raise UsageError(f"--{name} is of a curriculum: say --curriculum dynamic or --curriculum static too")
        return None
    return Curriculum([arguments.data, *(arguments.then or [])], arguments.curriculum, **given)


def overrides_of(arguments: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """Settings from the flags that were given, and from ``--set``."""
    found: dict[str, Any] = {name: value for name in flags if (value := getattr(arguments, name)) is not None}
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
    pace = f", {report.tokens_per_second:,.0f} tokens/s" if report.tokens_per_second else ""  # too few steps tell of none
    asked, why = report.settings["max_steps"] or 0, report.stopped
    if report.steps == report.choices.get("steps_planned") and report.steps < asked and report.settings["max_tokens"] is None:
        epochs = report.settings["epochs"]
        why = f"not {asked}: {epochs:g} epoch{'' if epochs == 1 else 's'} of the data give no more"
    console.print(f"steps       {report.steps} ({why}), {report.tokens:,} tokens{pace}")
    if report.history["loss"]:
        console.print(f"loss        {report.history['loss'][0]:.3f} -> {report.history['loss'][-1]:.3f}")
    if report.perplexity is not None:
        before, after = report.perplexity
        of = report.data["validation"]["sources"]
        console.print(f"perplexity  {before:.2f} -> {after:.2f} (step {report.best_step}; {of})", markup=False)
    if report.curriculum is not None:
        show_curriculum(report.curriculum)
    for note in report.notes:
        if NO_PLAN not in note:  # was said before
            console.print(f"note        {note}", markup=False)


def show_curriculum(curriculum: dict[str, Any]) -> None:
    """For each stage why it ended, and for each source its shares and what was lost of it, or its loss without a dense model."""
    for number, names in enumerate(curriculum["stages"], start=1):
        records = [r for r in curriculum["measurements"] if r["stage"] == number]
        rounds = len(records) - 1
        console.print(f"stage {number}     {counted(rounds, 'round')} ({records[-1]['ended']})", markup=False)
        for name in names:
            lost = records[0]["degradation"] is not None
            what = "degradation" if lost else "held-out loss"
            before = records[0]["degradation" if lost else "loss"][name]
            after = curriculum["final"][name]["degradation" if lost else "loss"]
            shares = ", ".join(f"{r['weights'][name]:.0%}" for r in records[:-1])
            console.print(f"  {name}: {what} {before:.3f} -> {after:.3f} nats per token, share of tokens {shares}", markup=False)
    if any((found.get("degradation") or 0) < 0 for found in curriculum["final"].values()):
        console.print("  (below 0: ahead of the dense model, which was not trained on this kind of text)", markup=False)
