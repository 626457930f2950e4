"""What the commands share: loading, progress, printing."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import progress as bars
from rich.console import Console
from torch import nn

from ..api import PruneResult
from ..checkpoint.source import load_source
from ..devices import find_device
from ..errors import UsageError
from ..groups import family_of
from ..passes.batches import Progress
from ..wording import listed

console = Console(stderr=True, soft_wrap=not sys.stderr.isatty())

EVERY = 30.0
"""Seconds between two lines of progress in a log."""


def quiet_libraries() -> None:
    """No progress bars of other libraries between ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar on standard error with the time left; where that is no terminal, a line now and then.

    What is being done names its bar; what stands behind it in brackets may change from call to call.
    """
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            name = what.partition(" (")[0]
            if name not in tasks:
                tasks[name] = bar.add_task(what, total=total)
            bar.update(tasks[name], description=what, completed=done, total=total)

        yield advance


class _Lines:
    """Progress in a log: a line about every `EVERY` seconds, so that short work says nothing."""

    def __init__(self) -> None:
        self.said = time.monotonic()
        self.began: dict[str, tuple[float, int]] = {}
        self.last: dict[str, int] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        now, name = time.monotonic(), what.partition(" (")[0]
        if done < self.last.get(name, done):  # the same work once more, from its beginning
            del self.began[name]
        self.last[name] = done
        begin, before = self.began.setdefault(name, (now, done))
        if now - self.said < EVERY:
            return
        self.said = now
        left = f", {(now - begin) / (done - before) * (total - done):.0f} s left" if before < done < total else ""
        console.print(f"{what}: {done} of {total}{left}", markup=False, highlight=False)


def load_model(arguments: argparse.Namespace, *, meta: bool = False) -> tuple[nn.Module, Any]:
    """The model and tokenizer (or None) that the arguments name, on their device."""
    quiet_libraries()
    find_device(arguments.device)
    model, tokenizer = load_source(arguments.model, dtype=arguments.dtype, meta=meta)
    try:
        return (model if meta else model.to(arguments.device)), tokenizer
    except RuntimeError as error:
        raise UsageError(f"cannot use device '{arguments.device}': {str(error).splitlines()[0]}") from error


def check_share(share: float) -> None:
    """Raise `UsageError` unless that is a share of groups to protect."""
    if not 0 <= share <= 1:
        raise UsageError(f"--protect-share must lie between 0 and 1 (0.1 protects a tenth), got {share}")


def describe_widths(widths: Mapping[str, Sequence[int]], dropped: Any, whole: Mapping[str, int] | None = None) -> list[str]:
    """One line for each family of groups that lost units.

    Args:
        widths: Units of each before and after.
        dropped: Blocks that went.
        whole: Groups that kept all of theirs.
    """
    families: dict[str, list[tuple[int, int]]] = {}
    for name, (before, after) in widths.items():
        families.setdefault(family_of(name), []).append((before, after))
    kept: dict[str, int] = {}
    for name in whole or ():
        kept[family_of(name)] = kept.get(family_of(name), 0) + 1
    lines = [f"dropped: {', '.join(dropped)}"] if dropped else []
    for family, sizes in families.items():
        befores, afters = sorted({b for b, _ in sizes}), sorted({a for _, a in sizes})
        spread = str(afters[0]) if len(afters) == 1 else f"{afters[0]} to {afters[-1]}"
        rest = f" in {len(sizes)} of {len(sizes) + kept[family]}, the others whole" if kept.get(family) else ""
        lines.append(f"{family}: {', '.join(map(str, befores))} -> {spread}{rest}")
    return lines


def show_result(result: PruneResult) -> None:
    """A short account of a prune, on standard error."""
    report = result.report
    console.print(f"parameters  {report.parameters_before:,} -> {report.parameters_after:,}  ({-report.removed:+.2%})")
    for line in describe_widths(report.widths, report.dropped, report.whole):
        console.print(f"  {line}")
    if protect := report.recipe.get("protect"):
        console.print(f"left whole  {listed(protect, 4)}", markup=False, highlight=False)
    if report.verify is not None:
        wide = (
            "" if report.verify.rounding is None else f", in float64 ({report.verify.rounding:.1e} with the model's own rounding)"
        )
        said = f"verified    relative error {report.verify.max_rel_error:.1e} against the {report.verify.reference}{wide}"
        console.print(said + ("" if report.recipe.get("compensation", "none") == "none" else ", before compensation"))
    if report.eager_error is not None:
        console.print(f"eager model relative error {report.eager_error:.1e} against the rewritten graph; form: {report.form}")
    if report.note:
        console.print(f"note        {report.note}", markup=False)


def goes_on(state: str) -> None:
    """Say that a run finds the state of an earlier one, if it does."""
    if _holds(state):
        said = f"note        '{state}' holds a state: the same command goes on from it (--restart begins anew)"
        console.print(said, markup=False)


def interrupted(state: str) -> int:
    """Say whether the same command goes on from a state that was left on disk; returns the exit status."""
    said = f"the same command goes on from the state in '{state}'" if _holds(state) else "there was no state to keep yet"
    console.print(f"fxprune: interrupted; {said}", markup=False)
    return 130


def _holds(state: str) -> bool:
    """Whether a directory has more in it than its lock, or what was being written."""
    return Path(state).is_dir() and any(entry.name not in ("lock", ".part") for entry in Path(state).iterdir())


def dump(data: Any) -> None:
    """Print JSON on standard output."""
    print(json.dumps(data, indent=1))
