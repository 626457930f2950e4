"""What the commands do. Results go to standard output, progress and tables to standard error."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from os.path import samefile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from .api import PruneResult, check_layers_by, example_inputs
from .api import prune as prune_model
from .calibration import encode, read_texts
from .capture import trace
from .checkpoint.save import PLAN_FILE, check_target
from .checkpoint.source import load_source
from .cli import dump
from .cost import costs
from .criteria import check_aggregation, find_criterion
from .errors import UsageError, VerificationError
from .evaluation import longest_input, measure_latency, perplexity
from .groups import Groups, family_of
from .passes.dependency import find_groups
from .passes.importance import score
from .passes.selection import Selection, select
from .passes.verify import verify as compare
from .plan import PrunePlan

console = Console(stderr=True)


def quiet_libraries() -> None:
    """No progress bars of other libraries between ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error with the time left; silent when that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield advance


def _load(arguments: argparse.Namespace, *, meta: bool = False) -> tuple[nn.Module, Any]:
    quiet_libraries()
    _check_device(arguments.device)
    model, tokenizer = load_source(arguments.model, dtype=arguments.dtype, meta=meta)
    try:
        return (model if meta else model.to(arguments.device)), tokenizer
    except RuntimeError as error:
        raise UsageError(f"cannot use device '{arguments.device}': {str(error).splitlines()[0]}") from error


def _check_device(device: str) -> None:
    """Try a device out before a model is loaded."""
    if device.partition(":")[0] == "meta":
        raise UsageError("cannot use device 'meta': it holds no numbers; to see groups without weights, say groups --meta")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"cannot use device '{device}': {str(error).splitlines()[0]}") from error


def prune(arguments: argparse.Namespace) -> int:
    """Prune a model and write a checkpoint."""
    plan, selection = _checked(arguments)
    model, tokenizer = _load(arguments)
    if arguments.dry_run:
        return _dry_run(model, plan, selection)
    if arguments.calibration and tokenizer is None:
        raise UsageError(f"calibration text needs a tokenizer, and there is none beside '{arguments.model}'")
    with progress() as advance:
        result = prune_model(
            model,
            calibration=arguments.calibration,
            tokenizer=tokenizer,
            criterion=arguments.criterion,
            aggregation=arguments.aggregation,
            selection=selection,
            plan=plan,
            samples=arguments.samples,
            length=arguments.length,
            batch_size=arguments.batch_size,
            layers_by=arguments.layers_by,
            seed=arguments.seed,
            check=not arguments.no_verify,
            progress=advance,
        )
    result.save_pretrained(arguments.output, overwrite=arguments.overwrite)
    show_result(result)
    print(arguments.output)
    return 0


def _checked(arguments: argparse.Namespace) -> tuple[PrunePlan | None, Selection | None]:
    """What to remove; everything that can be refused without a model is refused here, before one is loaded."""
    if not arguments.dry_run:
        if not arguments.output:
            raise UsageError("name an output directory with -o (or add --dry-run)")
        check_target(arguments.output, overwrite=arguments.overwrite)
        if Path(arguments.output).exists() and Path(arguments.model).exists() and samefile(arguments.output, arguments.model):
            raise UsageError(f"the output '{arguments.output}' is the model itself; choose another directory")
    find_criterion(arguments.criterion)
    check_aggregation(arguments.aggregation)
    check_layers_by(arguments.layers_by)
    if arguments.calibration:
        read_texts(arguments.calibration)
    if not arguments.plan:
        return None, _selection(arguments)
    for name in ("ratio", "units", "kinds"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--plan replays a plan as it is: leave out --{name}")
    if not Path(arguments.plan).is_file():
        raise UsageError(f"there is no plan file '{arguments.plan}'")
    return PrunePlan.load(arguments.plan), None


def _selection(arguments: argparse.Namespace) -> Selection:
    if (arguments.ratio is None) == (arguments.units is None):
        raise UsageError(
            "say what to remove: one of --ratio (share of all parameters), --units (share of units) and --plan (a file)"
        )
    options: dict[str, Any] = {"ratio": arguments.ratio, "units": arguments.units}
    if arguments.kinds is not None:
        options["kinds"] = arguments.kinds
    for name in ("ranking", "widths", "protect_first", "protect_last", "protect", "multiple", "floor"):
        options[name] = getattr(arguments, name)
    return Selection(**options)


def _dry_run(model: nn.Module, plan: PrunePlan | None, selection: Selection | None) -> int:
    """Widths and cost from shapes; which units they are is decided by magnitude, which needs no calibration."""
    gm = trace(model, example_inputs(model))
    groups = find_groups(gm)
    if plan is None:
        assert selection is not None
        plan = select(groups, score(gm, groups, criterion="l1"), selection)
    else:
        plan.check(groups)
    before, after = costs(groups, plan)
    table = Table(title="Dry run: nothing was scored with calibration, nothing was written")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for name, unit in (("parameters", 1), ("bytes", 1), ("macs", 1)):
        b, a = getattr(before, name) / unit, getattr(after, name) / unit
        label = {"bytes": "parameter bytes", "macs": "multiply-accumulates per token"}.get(name, name)
        table.add_row(label, f"{b:,.0f}", f"{a:,.0f}", f"{a / b - 1:+.1%}")
    console.print(table)
    for line in describe_widths({n: [groups[n].size, len(u)] for n, u in plan.keep.items()}, plan.drop):
        console.print(line)
    if note := plan.recipe.get("note"):
        console.print(f"Note: {note}", markup=False)
    dump({"before": before.to_json(), "after": after.to_json(), "drop": list(plan.drop), "keep": plan.counts()})
    return 0


def describe_widths(widths: Mapping[str, list[int]], dropped: Any) -> list[str]:
    """One line for each family of groups."""
    families: dict[str, set[tuple[int, int]]] = {}
    for name, (before, after) in widths.items():
        families.setdefault(family_of(name), set()).add((before, after))
    lines = [f"dropped: {', '.join(dropped)}"] if dropped else []
    for family, sizes in families.items():
        befores, afters = sorted({b for b, _ in sizes}), sorted({a for _, a in sizes})
        spread = str(afters[0]) if len(afters) == 1 else f"{afters[0]} to {afters[-1]}"
        lines.append(f"{family}: {', '.join(map(str, befores))} -> {spread}")
    return lines


def show_result(result: PruneResult) -> None:
    """A short account of a prune, on standard error."""
    report = result.report
    console.print(f"parameters  {report.parameters_before:,} -> {report.parameters_after:,}  ({-report.removed:+.2%})")
    for line in describe_widths(report.widths, report.dropped):
        console.print(f"  {line}")
    if report.verify is not None:
        console.print(f"verified    relative error {report.verify.max_rel_error:.1e} against the {report.verify.reference}")
    if report.eager_error is not None:
        console.print(f"eager model relative error {report.eager_error:.1e} against the rewritten graph; form: {report.form}")
    if report.note:
        console.print(f"note        {report.note}", markup=False)


def groups(arguments: argparse.Namespace) -> int:
    """Show the prune groups of a model."""
    from .coupling import shared_groups, why, write_graph
    from .table import group_rows, group_table, wide_console

    model, _ = _load(arguments, meta=arguments.meta)
    found: Groups = find_groups(trace(model, example_inputs(model)))
    if arguments.why:
        why(found, *arguments.why)  # says so if they share no group
        for name in shared_groups(found, *arguments.why):
            print(f"{name}:")
            for step in why(found, *arguments.why, group=name):
                print(f"  {step}")
        return 0
    if arguments.export:
        write_graph(found.to_networkx(), arguments.export)
        console.print(f"wrote {arguments.export}")
        return 0
    if arguments.json:
        dump([asdict(row) for row in group_rows(found)])
        return 0
    wide_console().print(group_table(found, only_prunable=arguments.prunable, expand=arguments.expand))
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Check a written checkpoint against its dense model."""
    path = Path(arguments.model)
    if not path.is_dir():
        raise UsageError(f"there is no directory '{path}'")
    if not (path / PLAN_FILE).is_file():
        raise UsageError(f"'{path}' holds no {PLAN_FILE}: it is no checkpoint that fxprune wrote")
    plan = PrunePlan.load(path / PLAN_FILE)
    pruned, _ = _load(arguments)
    dense, _ = load_source(arguments.dense, dtype=arguments.dtype)
    dense = dense.to(arguments.device)
    inputs = example_inputs(dense)
    gm = trace(dense, inputs)
    report = compare(gm, _WithoutCache(pruned), plan, inputs)
    dump(report.to_json())
    if not report.ok:
        raise VerificationError(
            f"'{path}' differs from the {report.reference} model: relative error {report.max_rel_error:.2e}, "
            f"allowed {report.tolerance:.0e}"
        )
    return 0


class _WithoutCache(nn.Module):
    """An eager model called as it was traced: without a KV cache in its outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        from .capture import quiet

        with quiet(self.model):
            return self.model(**inputs)


def eval(arguments: argparse.Namespace) -> int:
    """Perplexity (and latency) of a model."""
    texts = read_texts(arguments.text)
    model, tokenizer = _load(arguments)
    if tokenizer is None:
        raise UsageError(f"there is no tokenizer beside '{arguments.model}'")
    ids = encode(tokenizer, texts)
    with progress() as advance:
        measured = perplexity(
            model,
            ids,
            length=arguments.length,
            stride=arguments.stride,
            batch_size=arguments.batch_size,
            max_windows=arguments.max_windows,
            text=Path(arguments.text).name,
            progress=advance,
        )
    room = (longest_input(model) or 144) - 16
    latency = measure_latency(model, prompt=min(128, room), new_tokens=16) if arguments.latency else None
    if arguments.json:
        dump({"perplexity": measured.to_json(), "latency": latency.to_json() if latency else None})
        return 0
    print(
        f"perplexity {measured.perplexity:.3f} on {measured.text}: {measured.tokens:,} tokens, {measured.windows} windows of "
        f"{measured.length}, stride {measured.stride}"
    )
    if latency is not None:
        print(f"prefill {latency.prefill_ms} ms for {latency.prompt} tokens, decode {latency.decode_ms} ms/token")
    return 0


def demo(arguments: argparse.Namespace) -> int:
    """Prune a real model and show everything."""
    from .demo import run

    run(Path(arguments.output), ratio=arguments.ratio)
    return 0
