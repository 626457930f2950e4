"""Every criterion at every ratio on the same model, calibration tokens and parameter budget, without and with recovery.

    python -m benchmarks.paper.criteria --data DIR --ratios 0.2 0.5 --torch-pruning DIR
    python -m benchmarks.paper.criteria --data DIR --rows element1,default --recover 2000000 --tasks --limit 200

LLM-Pruner's table 1 and the methods after it. ``random`` to ``mix`` share LLM-Pruner's constraints (heads and FFN channels; the
first four and the last two layers whole; in the others the same share of units), so that they differ in nothing but the criterion;
``channel`` is its channel-wise variant; ``wanda-sp``, ``flap``, ``default`` and ``uniform`` are the recipes of fxprune of that
name; ``torch-pruning`` is described in peer.py. A run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.common import INSTALL_HINT
from benchmarks.paper import peer
from benchmarks.paper.bench import Bench, eager
from benchmarks.paper.common import TRAINING, Book, Row, parser, pick, run, show
from fxprune.errors import FxPruneError, UsageError
from fxprune.evaluation.tasks import TASKS, check_tasks
from fxprune.recipes import RECIPES
from fxprune.recovery.settings import RECIPES as RECOVERIES
from fxprune.recovery.settings import settings_of


def constrained(criterion: str, **more: Any) -> dict[str, Any]:
    """LLM-Pruner's recipe with another criterion."""
    return {**RECIPES["llm-pruner"], "criterion": criterion, **more}


PEER = "torch-pruning"
OURS = ("default", "uniform")
RECOVERED = "recovered"
ROWS: dict[str, dict[str, Any]] = {
    "random": constrained("random"),
    "l2": constrained("l2"),
    "vector": constrained("taylor_vector"),
    "element1": constrained("taylor1"),
    "element2": constrained("taylor2"),
    "mix": constrained("taylor_mixed"),
    "channel": RECIPES["channel"],
    "wanda-sp": RECIPES["wanda-sp"],
    "flap": RECIPES["flap"],
    PEER: {"importance": "taylor"},
    **{name: RECIPES[name] for name in OURS},
}


def _percent(tasks: Row) -> str:
    kept = tasks["above_chance_kept"]
    return "" if kept is None else f"{100 * kept:.1f}"


COLUMNS: dict[str, Callable[[Row], Any]] = {
    "row": lambda r: r["name"],
    "asked": lambda r: f"{r['key']['ratio']:.0%}",
    "removed": lambda r: f"{r['removed']:.2%}" if "removed" in r else r["error"][:60],
    "parameters": lambda r: f"{r['parameters']:,}",
    "form": lambda r: r["form"][:11],
    "WikiText-2": lambda r: r["perplexity"]["wikitext2"]["perplexity"],
    "PTB": lambda r: r["perplexity"]["ptb"]["perplexity"],
    "C4": lambda r: r["perplexity"]["c4"]["perplexity"],
    "kept (%)": lambda r: _percent(r["tasks"]),
    "recovered WikiText-2": lambda r: r["recovered"]["perplexity"]["wikitext2"]["perplexity"],
    "recovered PTB": lambda r: r["recovered"]["perplexity"]["ptb"]["perplexity"],
    "recovered C4": lambda r: r["recovered"]["perplexity"]["c4"]["perplexity"],
    "recovered kept (%)": lambda r: _percent(r["recovered"]["tasks"]),
    "seconds": lambda r: round(sum(r["seconds"].values())),
}


def recovery_options(made: argparse.ArgumentParser) -> None:
    """Add what says how rows are recovered."""
    made.add_argument("--recover-data", choices=sorted(TRAINING), default="alpaca", help="what to recover on (default: alpaca)")
    made.add_argument("--recover-recipe", choices=sorted(RECOVERIES), default="default", help="of fxprune.recover")
    made.add_argument(
        "--recover-set", nargs="*", default=[], type=setting, metavar="NAME=VALUE", help="other settings of the recovery"
    )


def task_options(made: argparse.ArgumentParser) -> None:
    """Add what says which zero-shot tasks are run."""
    made.add_argument("--tasks", nargs="*", default=None, metavar="TASK", help="zero-shot tasks; without a name all seven")
    made.add_argument("--limit", type=int, default=None, help="rows of each task (default: all)")
    made.add_argument(
        "--task-dtype", choices=("float32", "bfloat16"), default=None, help="what tasks are run in (default: the model's --dtype)"
    )


def setting(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"write name=value, not '{text}'")
    return name, value


def settle_tasks(arguments: argparse.Namespace) -> None:
    """Which tasks are meant; refuses others, and what is said of tasks that are not run."""
    if arguments.tasks is None:
        if arguments.limit is not None or arguments.task_dtype is not None:
            raise UsageError("--limit and --task-dtype say how tasks are run: name some, or all seven by --tasks alone")
    else:
        arguments.tasks = list(check_tasks(arguments.tasks or TASKS))


def wanted_tasks(arguments: argparse.Namespace) -> Row | None:
    """What a row depends on where tasks are run; None where they are not."""
    if not getattr(arguments, "tasks", None):
        return None
    dtype = {} if arguments.task_dtype is None else {"dtype": arguments.task_dtype}
    return {"names": arguments.tasks, "limit": arguments.limit, **dtype}


def check_recovery(arguments: argparse.Namespace) -> None:
    """Refuse settings that cannot be used before a model is loaded."""
    settings_of(arguments.recover_recipe, dict(arguments.recover_set))


def measured(bench: Bench, model: nn.Module, *, tasks: bool = True) -> Row:
    """Perplexities, and task scores if they are asked for and wanted of this model."""
    tasks = tasks and bool(getattr(bench.arguments, "tasks", None))
    return {"perplexity": bench.perplexities(model), **({"tasks": bench.tasks(model)} if tasks else {})}


def measure_row(bench: Bench, book: Book, name: str, recipe: Mapping[str, Any], ratio: float, *, recover: int | None = None) -> Row:
    """One row, out of the book if it is there.

    Args:
        bench: The model.
        book: The results.
        name: Of the row; ``dense`` is not pruned.
        recipe: Its settings.
        ratio: Share of all parameters.
        recover: Tokens to recover on afterwards; None for no recovery.
    """
    a = bench.arguments
    wanted, late = wanted_tasks(a), name != "dense" and getattr(a, "tasks_of", None) == RECOVERED
    key = {"row": name, "ratio": ratio, **bench.settings(recipe), "tasks": {**(wanted or {}), "of": RECOVERED} if late else wanted}
    training = None if recover is None else {"tokens": recover, "data": a.recover_data, "recipe": a.recover_recipe}
    training = None if training is None else {**training, "set": dict(a.recover_set)}
    row = book.find(key)
    if row is not None and (training is None or row.get("recovered", {}).get("key") == training):
        return row
    print(f"{name}, {ratio:.0%} ...", flush=True)
    try:
        model, target, facts = _pruned(bench, name, recipe, ratio)
        if row is None:
            row = {"key": key, "name": name, **facts, **measured(bench, model, tasks=not late)}
            book.add(row)
        if training is not None and recover is not None and name != "dense":
            recovered, report = bench.recover(target, a.recover_data, max_tokens=recover)
            row = {**row, "recovered": {"key": training, **report, **measured(bench, recovered)}}
            book.add(row)
    except FxPruneError as error:
        failed = {"error": f"{type(error).__name__}: {error}"}
        row = {"key": key, "name": name, **failed} if row is None else {**row, "recovered": failed}
        book.add(row)
    return row


def _pruned(bench: Bench, name: str, recipe: Mapping[str, Any], ratio: float) -> tuple[nn.Module, Any, Row]:
    """(the model to evaluate, what recovery takes, facts)."""
    if name == "dense":
        total = bench.groups.total
        return bench.model, None, {"ratio": 0.0, "removed": 0.0, "parameters": total, "form": "uniform", "seconds": {}}
    if name == PEER:
        batches, described = bench.batches()
        model, facts = peer.prune(bench.model, ratio, batches, bench.arguments.torch_pruning)
        a = bench.arguments
        return model, model, {**facts, "calibration": described, "calibration_tokens": a.samples * a.length}
    result, facts = bench.prune(recipe, ratio)
    return eager(result), result, facts


def measure_dense(bench: Bench, book: Book) -> Row:
    """The dense model's row, which the others are compared with."""
    row = measure_row(bench, book, "dense", {}, 0.0)
    bench.dense_above_chance = row["tasks"]["above_chance"] if "tasks" in row else None
    return row


def measure_rows(
    bench: Bench, book: Book, chosen: Mapping[str, Mapping[str, Any]], ratios: Sequence[float], *, recover: int | None = None
) -> list[Row]:
    """The dense row and the chosen ones at each ratio."""
    return [measure_dense(bench, book)] + [
        measure_row(bench, book, n, r, ratio, recover=recover) for n, r in chosen.items() for ratio in ratios
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "paper_criteria.json")
    made.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5], help="of all parameters (default: 0.2 0.5)")
    made.add_argument("--rows", default=None, metavar="A,B", help=f"only these of {', '.join(ROWS)}")
    made.add_argument("--ours-only", action="store_true", help=f"the rows {' and '.join(OURS)} only")
    made.add_argument("--torch-pruning", type=Path, default=None, metavar="DIR", help=INSTALL_HINT)
    made.add_argument("--recover", type=int, default=None, metavar="TOKENS", help="recover each row on so many tokens")
    recovery_options(made)
    task_options(made)
    made.add_argument(
        "--tasks-of", choices=("both", RECOVERED), default="both", help="run tasks before and after recovery, or after only"
    )
    a = made.parse_args(arguments)
    if a.ours_only and a.rows is not None:
        raise UsageError("--ours-only says which rows: leave --rows out")
    names = list(OURS) if a.ours_only else pick(a.rows, list(ROWS))
    if PEER in names and a.torch_pruning is None:
        if a.rows is not None:
            raise UsageError(f"the row {PEER} needs --torch-pruning DIR. {INSTALL_HINT}")
        print(f"without {PEER}: {INSTALL_HINT}")
        names.remove(PEER)
    check_recovery(a)
    settle_tasks(a)
    if a.tasks_of == RECOVERED and (a.tasks is None or a.recover is None):
        raise UsageError("--tasks-of recovered needs --tasks and --recover")
    bench = Bench(a)
    if a.recover is not None:
        bench.data.check([a.recover_data])
    book = Book(a.output, a, "criteria")
    found = measure_rows(bench, book, {name: ROWS[name] for name in names}, a.ratios, recover=a.recover)
    show(COLUMNS, found)
    for line in closed(found):
        print(line)


def closed(rows: Sequence[Row]) -> list[str]:
    """How much of the gap in log-perplexity between the best of the others and the dense model each of our rows closes."""
    dense = next(r for r in rows if r["name"] == "dense")["perplexity"]
    plain = {(r["name"], r["key"]["ratio"]): r["perplexity"] for r in rows if "perplexity" in r}
    recovered = {
        (r["name"], r["key"]["ratio"]): r["recovered"]["perplexity"] for r in rows if "perplexity" in r.get("recovered", {})
    }
    return [*_shares(plain, dense, ""), *_shares(recovered, dense, ", recovered,")]


def _shares(known: Mapping[tuple[str, float], Row], dense: Row, when: str) -> list[str]:
    lines = []
    for (name, ratio), ours in known.items():
        peers = [p for (other, r), p in known.items() if r == ratio and other not in OURS]
        if name not in OURS or not peers:
            continue
        for text, own in ours.items():
            best, whole = (math.log(value) for value in (min(p[text]["perplexity"] for p in peers), dense[text]["perplexity"]))
            share = (best - math.log(own["perplexity"])) / (best - whole)
            lines.append(f"{name} at {ratio:.0%}{when} closes {share:.1%} of the gap on {text}")
    return lines


if __name__ == "__main__":
    raise SystemExit(run(main))
