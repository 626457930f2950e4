"""``fxprune prune``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn
from torch.fx import GraphModule

from ..api import example_inputs
from ..api import prune as prune_model
from ..calibration import longest_input, read_texts
from ..capture import trace
from ..checkpoint.directory import check_apart, check_not_model, check_target
from ..cost import costs
from ..criteria import CRITERIA
from ..data import parse_sources
from ..errors import UsageError
from ..knowledge import Knowledge
from ..passes.dependency import groups_of
from ..passes.importance import score
from ..passes.knowledge import protecting
from ..passes.selection import Selection, select
from ..plan import PrunePlan
from ..planning import Planning, leaving, outside_stock, settle
from ..table import wide_console
from .common import check_share, console, describe_widths, dump, load_model, progress, show_result

HOW = tuple(field.name for field in fields(Planning) if field.name != "seed")
WHAT = tuple(field.name for field in fields(Selection) if field.name != "ratio")

SHARE = 0.1
"""Of what was measured, how much stays whole unless something else is said."""


def run(arguments: argparse.Namespace) -> int:
    """Prune a model and write a checkpoint."""
    plan, selection, stock = _checked(arguments)
    model, tokenizer = load_model(arguments)
    most = longest_input(model)
    if most is not None and (arguments.length or 0) > most:
        console.print(f"note        length {arguments.length:,} became {most:,}: the model reads no more tokens", markup=False)
    graph: GraphModule | None = None
    if arguments.knowledge:
        graph = trace(model, example_inputs(model))
        Knowledge.load(arguments.knowledge).check(groups_of(graph))
    if arguments.dry_run:
        return _dry_run(model, graph, plan, selection, stock=stock, as_json=arguments.json)
    if arguments.calibration and tokenizer is None:
        raise UsageError(f"calibration text needs a tokenizer, and there is none beside '{arguments.model}'")
    if tokenizer is None:
        console.print(f"note        there is no tokenizer beside '{arguments.model}', so the checkpoint has none", markup=False)
    if plan is None and arguments.recipe is None and arguments.criterion and not CRITERIA[arguments.criterion].calibrated:
        said = (
            f"recipe      none: {arguments.criterion} reads no text, so nothing is measured or compensated; --recipe says otherwise"
        )
        console.print(said, markup=False)
    with progress() as advance:
        result = prune_model(
            model,
            recipe=arguments.recipe,
            calibration=arguments.calibration,
            tokenizer=tokenizer,
            selection=selection,
            plan=plan,
            graph=graph,
            seed=arguments.seed,
            check=not arguments.no_verify,
            progress=advance,
            **_given(arguments, HOW),
        )
    result.save_pretrained(arguments.output, overwrite=arguments.overwrite)
    show_result(result)
    print(arguments.output)
    return 0


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """What was typed; for the rest the recipe decides."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _checked(arguments: argparse.Namespace) -> tuple[PrunePlan | None, Selection | None, bool]:
    """What to remove, and whether stock classes have to load what is left.

    Everything that can be refused without a model is refused here, before one is loaded.
    """
    if arguments.json and not arguments.dry_run:
        raise UsageError("--json is for --dry-run: a prune's numbers are in OUTPUT/fxprune_report.json")
    if not arguments.dry_run:
        if not arguments.output:
            raise UsageError("name an output directory with -o (or add --dry-run)")
        check_target(arguments.output, overwrite=arguments.overwrite)
        text = [source.file for source in parse_sources(arguments.calibration)] if arguments.calibration else []
        files = {name: [getattr(arguments, name)] for name in ("knowledge", "recipe")}
        check_apart(arguments.output, calibration=text, **files)
        check_not_model(arguments.output, arguments.model)
    if arguments.plan:
        for name in ("ratio", *WHAT, "knowledge"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"--plan replays a plan as it is: leave out --{name.replace('_', '-')}")
        if not Path(arguments.plan).exists():
            raise UsageError(f"there is no plan file '{arguments.plan}'")
    elif (arguments.ratio is None) == (arguments.units is None):
        raise UsageError(
            "say what to remove: just one of --ratio (share of all parameters), --units (share of units) and --plan (a file)"
            + ("" if arguments.ratio is None else "; --ratio and --units are given")
        )
    if arguments.protect_share is not None and not arguments.knowledge:
        raise UsageError("--protect-share is a share of what fxprune sensitivity measured: name its file with --knowledge")
    plan = PrunePlan.load(arguments.plan) if arguments.plan else None
    given = _given(arguments, HOW)
    how, selection = settle(arguments.recipe, given, arguments.ratio, None, plan, _given(arguments, WHAT), arguments.seed)
    if arguments.knowledge and selection is not None:
        selection = _protecting(
            selection, arguments.knowledge, SHARE if arguments.protect_share is None else arguments.protect_share
        )
    if arguments.calibration:
        read_texts(arguments.calibration)
    return plan, selection, how.stock


def _protecting(selection: Selection, file: str, share: float) -> Selection:
    """The selection with a share of what matters most left whole, out of the kinds that it prunes."""
    check_share(share)
    return protecting(selection, Knowledge.load(file), share, f"'{file}'")


def _dry_run(
    model: nn.Module,
    graph: GraphModule | None,
    plan: PrunePlan | None,
    selection: Selection | None,
    *,
    stock: bool,
    as_json: bool,
) -> int:
    """Widths and cost from shapes; which units they are is decided by magnitude, which needs no calibration."""
    guessed, wanted = plan is None, selection
    gm = graph if graph is not None else trace(model, example_inputs(model))
    groups, said = groups_of(gm), list[str]()
    if plan is None:
        assert selection is not None
        if stock:
            fixed, said = outside_stock(model, groups, selection)
            selection = leaving(selection, fixed)
        if selection.ranking == "measured":  # how the budget is spread needs the loss; what it comes to does not
            selection = replace(selection, ranking="local")
        plan = select(groups, score(gm, groups, criterion="l1"), selection)
    else:
        plan.check(groups)
    before, after = costs(groups, plan)
    notes = [*said, *([str(note)] if (note := plan.recipe.get("note")) else [])]
    if guessed:
        notes.append("scored by magnitude, without calibration; the widths of a real run may differ")
    if guessed and wanted is not None and wanted.ranking == "measured" and wanted.widths == "per-layer":
        notes.append(
            "a real run measures the loss, and every layer gets widths of its own: fxprune.load reads those, or transformers with "
            "trust_remote_code=True; --recipe uniform gives what stock classes read"
        )
    if as_json:
        dump(
            {
                "before": before.to_json(),
                "after": after.to_json(),
                "drop": list(plan.drop),
                "keep": plan.counts(),
                "note": "; ".join(notes),
            }
        )
        return 0
    table = Table(title="Dry run: nothing was written")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for name, unit in (("parameters", 1), ("bytes", 1), ("macs", 1)):
        b, a = getattr(before, name) / unit, getattr(after, name) / unit
        label = {"bytes": "parameter bytes", "macs": "multiply-accumulates per token"}.get(name, name)
        table.add_row(label, f"{b:,.0f}", f"{a:,.0f}", f"{a / b - 1:+.1%}")
    out = wide_console()
    out.print(table)
    kinds = {groups[name].kind for name in plan.keep}
    whole = {name: g.size for name, g in groups.items() if g.prunable and g.kind in kinds and name not in plan.keep}
    for line in describe_widths({n: [groups[n].size, len(u)] for n, u in plan.keep.items()}, plan.drop, whole):
        out.print(line, markup=False, highlight=False)
    for note in notes:
        out.print(f"note: {note}", markup=False, highlight=False)
    return 0
