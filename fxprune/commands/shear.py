"""``fxprune shear``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..devices import find_device
from ..errors import UsageError
from ..knowledge import Knowledge
from ..lorashear.budget import Budget
from ..lorashear.result import ShearReport
from ..lorashear.run import shear
from ..lorashear.settings import settle
from ..lorashear.work import SUFFIX
from ..plotting import check_plot
from ..recovery.plot import plot_curriculum
from .common import console, goes_on, interrupted, progress, quiet_libraries
from .recover import overrides_of, show_curriculum

FLAGS = (
    *("kinds", "widths", "protect_first", "protect_last", "protect", "multiple", "floor", "protect_share"),
    *("shear_share", "periods", "one_shot", "projection", "criterion", "curriculum", "rounds", "patience"),
    *("samples", "rank", "lr", "batch_size", "micro_batch_size", "length", "cutoff", "seed"),
)


def run(arguments: argparse.Namespace) -> int:
    """Shear a model and write the recovered checkpoint."""
    given = overrides_of(arguments, FLAGS)
    settings = settle(arguments.recipe, given)
    Budget(arguments.tokens, arguments.steps)
    if arguments.knowledge:
        Knowledge.load(arguments.knowledge)
    if arguments.plot is not None:
        check_plot(arguments.plot)
        if settings.shear_share == 1:
            raise UsageError("--plot draws the recovery, and shear_share is 1: there is none")
    state = f"{arguments.output.rstrip('/')}{SUFFIX}"
    quiet_libraries()
    find_device(arguments.device)
    own = {name: value for name, value in settings.to_json().items() if name in given}
    changes = f", with {_said(own)}" if own else ""
    console.print(f"recipe      {arguments.recipe or 'default'}{changes}", markup=False, highlight=False)
    if not arguments.restart:
        goes_on(state)
    try:
        with progress() as advance:
            result = shear(
                arguments.model,
                arguments.ratio,
                arguments.data,
                then=arguments.then or (),
                output=arguments.output,
                tokens=arguments.tokens,
                steps=arguments.steps,
                recipe=arguments.recipe,
                knowledge=arguments.knowledge,
                overwrite=arguments.overwrite,
                restart=arguments.restart,
                device=arguments.device,
                dtype=arguments.dtype,
                progress=advance,
                **given,
            )
    except KeyboardInterrupt:
        return interrupted(state)
    _show(result.report)
    if arguments.plot is not None and result.report.recovery is not None:
        plot_curriculum(result.report.recovery["curriculum"], arguments.plot)
    print(arguments.output)
    return 0


def _said(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items())


def _show(report: ShearReport) -> None:
    """A short account, on standard error."""
    console.print(
        f"parameters  {report.parameters_before:,} -> {report.parameters_after:,}  ({-report.removed:+.2%}); {report.form}"
    )
    if report.knowledge is not None:
        kept = report.knowledge["protected"]
        console.print(f"knowledge   {len(report.knowledge['rows'])} groups measured on {report.knowledge['text']}", markup=False)
        console.print(f"  left whole: {', '.join(kept)}", markup=False)
    console.print(f"ranked by   {report.lhspg['criterion']}", markup=False)
    for number, period in enumerate(report.lhspg["periods"], start=1):
        kinds = ", ".join(f"{count} of {kind}" for kind, count in period["kinds"].items()) or "none"
        console.print(f"period {number:<4} {kinds} to zero; {period['removed']:.2%} of the parameters by its end", markup=False)
    exact = report.prune["verify"]
    console.print(
        f"removed     {report.prune['zeros']:,} numbers, all exactly 0; relative error {exact['max_rel_error']:.1e} against the "
        f"model with them, {report.prune['merged_error']:.1e} against the adapters unmerged"
    )
    if report.recovery is not None:
        show_curriculum(report.recovery["curriculum"])
    parts = {**report.tokens, "periods": sum(report.tokens["periods"])}
    console.print(f"tokens      {', '.join(f'{name} {count:,}' for name, count in parts.items() if count)}")
    console.print(f"seconds     {', '.join(f'{name} {value:,.1f}' for name, value in report.seconds.items())}")
    for note in report.notes:
        console.print(f"note        {note}", markup=False)
