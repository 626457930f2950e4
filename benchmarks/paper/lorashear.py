"""LoRAShear beside LLM-Pruner's recipe at equal total training tokens, and LoRAShear without one of its parts.

    python -m benchmarks.paper.lorashear --data DIR --work DIR --tokens 20000000 --ratios 0.2 0.5 --tasks
    python -m benchmarks.paper.lorashear --data DIR --tokens 200000 --ratios 0.2 --rows llm-pruner,lorashear --set batch_size=8

``llm-pruner`` prunes by LLM-Pruner's recipe and trains on all the tokens afterwards, through the same stages of sources with fixed
weights, with the same settings of adapters. ``lorashear`` is the recipe of that name: shearing counts as training. Of the others
``no-knowledge`` protects nothing, ``one-shot`` takes all units at once after the warm-up, ``static`` recovers with fixed weights;
``kfac`` and ``taylor1`` rank units by importance measured on text before anything is trained, in place of the paper's saliency.
No stage of recovery ends early, so that all rows read the same number of tokens. A run that was cut off goes on where it was, with
``--work DIR`` also within a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import fxprune
from benchmarks.paper.bench import Bench
from benchmarks.paper.common import EVALUATION, TRAINING, Book, Row, parser, pick, run, show
from benchmarks.paper.criteria import COLUMNS, measure_dense, measured, setting, settle_tasks, task_options
from benchmarks.paper.criteria import ROWS as CRITERIA
from fxprune.errors import FxPruneError
from fxprune.lorashear.settings import settle

PEER = "llm-pruner"
ROWS: dict[str, dict[str, Any]] = {
    PEER: {},
    "lorashear": {},
    "no-knowledge": {"protect_share": 0.0},
    "one-shot": {"one_shot": True},
    "static": {"curriculum": "static"},
    "kfac": {"criterion": "kfac"},
    "taylor1": {"criterion": "taylor1"},
}
"""What each row changes in the recipe ``lorashear``."""

EQUAL = {"patience": 0}
"""What makes every row read all of its tokens."""

SHOWN: dict[str, Callable[[Row], Any]] = {
    **{name: COLUMNS[name] for name in ("row", "asked", "removed", "parameters", "form")},
    "shearing tokens": lambda r: f"{r['tokens']['shearing']:,}",
    "tokens": lambda r: f"{r['tokens']['total']:,}",
    **{name: COLUMNS[name] for name in ("WikiText-2", "PTB", "C4")},
    "books": lambda r: r["perplexity"]["books"]["perplexity"],
    **{name: COLUMNS[name] for name in ("kept (%)", "seconds")},
}


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "paper_lorashear.json")
    made.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5], help="of all parameters (default: 0.2 0.5)")
    made.add_argument("--rows", default=None, metavar="A,B", help=f"only these of {', '.join(ROWS)}")
    made.add_argument("--tokens", type=int, required=True, help="that each row trains on, shearing and recovery together")
    made.add_argument(
        "--first", default="c4,wikitext,books", metavar="A,B", help="sources of the first stage (default: %(default)s)"
    )
    made.add_argument("--second", default="alpaca", metavar="A,B", help="sources of the second stage (default: %(default)s)")
    made.add_argument(
        "--set", nargs="*", default=[], type=setting, metavar="NAME=VALUE", help="settings of fxprune.shear, for all rows"
    )
    made.add_argument("--work", type=Path, default=None, metavar="DIR", help="where checkpoints are kept (default: nowhere)")
    task_options(made)
    made.set_defaults(texts=tuple(EVALUATION))
    a = made.parse_args(arguments)
    names = pick(a.rows, list(ROWS))
    stages = [pick(typed, list(TRAINING)) for typed in (a.first, a.second)]
    for name in names:
        settle(None, {**ROWS[name], **EQUAL, **dict(a.set)})
    settle_tasks(a)
    bench = Bench(a)
    bench.data.check([name for stage in stages for name in stage])
    book = Book(a.output, a, "lorashear")
    found = [measure_dense(bench, book), *(measure(bench, book, name, ratio, stages) for name in names for ratio in a.ratios)]
    show(SHOWN, found)


def measure(bench: Bench, book: Book, name: str, ratio: float, stages: Sequence[Sequence[str]]) -> Row:
    """One row, out of the book if it is there."""
    a = bench.arguments
    settings = {**ROWS[name], **EQUAL, **dict(a.set), "seed": a.seed}
    recipe = {**settings, **({"criterion": CRITERIA["element1"]} if name == PEER else {})}
    wanted = {"names": a.tasks, "limit": a.limit} if a.tasks else None
    training = {"tokens": a.tokens, "stages": [list(stage) for stage in stages], "tasks": wanted}
    key = {"row": name, "ratio": ratio, **bench.settings(recipe), **training}
    row = book.find(key)
    if row is not None:
        return row
    print(f"{name}, {ratio:.0%} ...", flush=True)
    texts = [[str(bench.data.training(source)) for source in stage] for stage in stages]
    start = time.perf_counter()
    try:
        model, facts = (_pruned if name == PEER else _sheared)(bench, name, ratio, texts, settings)
        facts["seconds"] = {**facts["seconds"], "all but evaluation": round(time.perf_counter() - start, 1)}
        row = {"key": key, "name": name, **facts, **measured(bench, model)}
    except FxPruneError as error:
        row = {"key": key, "name": name, "error": f"{type(error).__name__}: {error}"}
    book.add(row)
    return row


def _sheared(
    bench: Bench, name: str, ratio: float, texts: Sequence[Sequence[str]], settings: Mapping[str, Any]
) -> tuple[nn.Module, Row]:
    """LoRAShear, or what is left of it."""
    a = bench.arguments
    output = (a.work or bench.data.scratch) / f"{name}-{ratio:g}"
    if output.is_dir():  # cut off while it was evaluated
        result = fxprune.ShearResult.read(output, bench.tokenizer)
    else:
        options: dict[str, Any] = {"then": texts[1:], "tokens": a.tokens, "output": output, **settings}
        result = fxprune.shear(bench.model, ratio, texts[0], tokenizer=bench.tokenizer, **options)
    report = result.report
    tokens = {"shearing": report.tokens["total"] - report.tokens["recovery"], "total": report.tokens["total"]}
    plain = report.to_json()
    return result.model.to(a.device), {
        "removed": round(report.removed, 5),
        "parameters": report.parameters_after,
        "form": report.form,
        "tokens": tokens,
        "seconds": report.seconds,
        **{part: plain[part] for part in ("settings", "knowledge", "lhspg", "prune", "notes")},
        "recovery": {name: (report.recovery or {})[name] for name in ("curriculum", "settings", "steps", "choices")},
    }


def _pruned(
    bench: Bench, _: str, ratio: float, texts: Sequence[Sequence[str]], settings: Mapping[str, Any]
) -> tuple[nn.Module, Row]:
    """LLM-Pruner: prune, then train with fixed weights."""
    result, facts = bench.prune(CRITERIA["element1"], ratio)
    chosen = settle(None, {**settings, "curriculum": "static"})
    options: dict[str, Any] = {"recipe": chosen.training, "max_tokens": bench.arguments.tokens, "tokenizer": bench.tokenizer}
    recovered = fxprune.recover(result, curriculum=chosen.lessons(texts), **options)
    report = recovered.report
    return recovered.model, {
        **facts,
        "tokens": {"shearing": 0, "total": report.tokens},
        "seconds": {**facts["seconds"], "recovery": report.seconds},
        "recovery": {n: v for n, v in report.to_json().items() if n in ("curriculum", "settings", "steps", "choices")},
    }


if __name__ == "__main__":
    raise SystemExit(run(main))
