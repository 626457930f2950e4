"""``fxprune sensitivity``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..api import example_inputs
from ..calibration import load_calibration, read_texts
from ..capture import trace
from ..criteria import find_criterion
from ..errors import UsageError
from ..files import check_file
from ..groups import LAYERS
from ..knowledge import Knowledge, Removal
from ..passes.dependency import find_groups
from ..passes.knowledge import check_options, measure_knowledge
from ..plotting import check_plot
from ..table import wide_console
from .common import check_share, console, dump, load_model, progress

SHOWN = 3


def run(arguments: argparse.Namespace) -> int:
    """Measure what each group and block is worth, and say which should stay whole."""
    state = _checked(arguments)
    model, tokenizer = load_model(arguments)
    if arguments.text and tokenizer is None:
        raise UsageError(f"text needs a tokenizer, and there is none beside '{arguments.model}'")
    batches, text = load_calibration(
        arguments.text,
        model=model,
        tokenizer=tokenizer,
        samples=arguments.samples,
        length=arguments.length,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    gm = trace(model, example_inputs(model))
    try:
        with progress() as advance:
            found = measure_knowledge(
                gm,
                find_groups(gm),
                batches,
                kinds=arguments.kinds,
                share=arguments.share,
                take=arguments.take,
                by=arguments.by,
                criterion=arguments.criterion,
                seed=arguments.seed,
                text=text,
                state=state,
                progress=advance,
            )
    except KeyboardInterrupt:
        kept = state is not None and state.exists()
        console.print("interrupted; " + ("the same command with --resume goes on" if kept else "nothing was written"), markup=False)
        return 130
    if arguments.output:
        found.save(arguments.output)
    if arguments.plot:
        found.plot(arguments.plot, arguments.protect_share)
    if state is not None:
        state.unlink(missing_ok=True)
    if arguments.json:
        dump(found.to_json())
        return 0
    wide_console().print(found.table(arguments.protect_share))
    for line in _said(arguments, found):
        print(line)
    return 0


def _checked(arguments: argparse.Namespace) -> Path | None:
    """The state's file, if there is an output to keep it beside; what needs no model to be refused is refused here."""
    check_options(kinds=arguments.kinds, share=arguments.share, take=arguments.take, by=arguments.by)
    find_criterion(arguments.criterion)
    check_share(arguments.protect_share)
    if arguments.text:
        read_texts(arguments.text)
    if arguments.plot:
        check_plot(arguments.plot)
    if not arguments.output:
        if arguments.resume:
            raise UsageError("--resume goes on with a measurement whose output is named with -o: name it")
        return None
    check_file(Path(arguments.output), "a measurement", (".json",))
    if Path(arguments.output).exists() and not arguments.overwrite:
        raise UsageError(f"'{arguments.output}' exists, and measuring takes its time: choose another output, or say --overwrite")
    state = Path(f"{arguments.output}.measuring")
    if state.exists() and not arguments.resume:
        raise UsageError(f"'{state}' holds a measurement that was cut short: go on with --resume, or delete it")
    return state


def _said(arguments: argparse.Namespace, found: Knowledge) -> list[str]:
    """Which layers and groups matter, and what to type to keep the first of them whole."""
    lines = []
    for what, rows in (
        ("groups", [r for r in found.ranked() if r.kind != LAYERS]),
        ("layers", [r for r in found.ranked() if r.kind == LAYERS]),
    ):
        if rows:
            most, least = rows[:SHOWN], rows[: SHOWN - 1 : -1][:SHOWN]
            lines.append(
                f"{what} that matter most: {_listed(found, most)}" + (f"; least: {_listed(found, least)}" if least else "")
            )
    names = found.protected(arguments.protect_share)
    if not names:
        return lines
    whole = all(row.kind == LAYERS for row in found.rows)
    command = [
        "fxprune",
        "prune",
        arguments.model,
        "--ratio",
        "0.2",
        *(["--kinds", LAYERS] if whole else ["--widths", "per-layer"]),
    ]
    start = "to keep what matters most whole"
    if arguments.output:
        ready = shlex.join([*command, "--knowledge", arguments.output, "--protect-share", f"{arguments.protect_share:g}"])
        lines.append(f"{start}: {ready} -o DIR")
        start = "which comes to"
    options = [word for name in names for word in ("--protect", name)]
    lines.append(f"{start}: {shlex.join([*command, *options])} -o DIR")
    return lines


def _listed(found: Knowledge, rows: Sequence[Removal]) -> str:
    return ", ".join(f"{row.name} ({found.cost(row):+.3g})" for row in rows)
