"""LoRAShear beside pruning at once at equal total training tokens, and LoRAShear without one of its parts.

    python -m benchmarks.paper.lorashear --data DIR --work DIR --tokens 20000000 --ratios 0.2 0.5 --tasks
    python -m benchmarks.paper.lorashear --data DIR --tokens 200000 --ratios 0.2 --rows llm-pruner,lorashear --set batch_size=8

Rows that prune at once train on all the tokens afterwards, through the same stages of sources with fixed weights, with the same
settings of adapters: ``llm-pruner`` by LLM-Pruner's recipe, ``kfac-at-once`` by the same with ``kfac`` for a criterion,
``default-at-once`` by the recipe ``default``. ``lorashear`` is the recipe of that name: shearing counts as training. Of the others
``no-knowledge`` protects nothing, ``one-shot`` takes all units at once after the warm-up, ``static`` recovers with fixed weights;
``kfac`` and ``taylor1`` rank units by importance measured on text before anything is trained, in place of the paper's saliency, and
``kfac-no-knowledge``, ``kfac-one-shot``, ``kfac-static`` leave a part out of ``kfac``.

No stage of recovery ends early, so that all rows read the same number of tokens. Knowledge is measured for the first row that wants
it, and taken over by the others. A run that was cut off goes on where it was; ``--work DIR`` keeps the checkpoints of all rows, and
goes on within one. With it, rows can be measured again (other texts' windows, ``--tasks``) without being trained again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import fxprune
from benchmarks.paper.bench import Bench
from benchmarks.paper.common import EVALUATION, TRAINING, Book, Row, parser, pick, run, show
from benchmarks.paper.criteria import (
    COLUMNS,
    constrained,
    measure_dense,
    measured,
    setting,
    settle_tasks,
    task_options,
    wanted_tasks,
)
from benchmarks.paper.criteria import ROWS as CRITERIA
from fxprune.checkpoint.source import load_source
from fxprune.errors import FxPruneError
from fxprune.files import write_whole
from fxprune.lorashear.settings import settle

AT_ONCE: dict[str, dict[str, Any]] = {
    "llm-pruner": CRITERIA["element1"],
    "kfac-at-once": constrained("kfac"),
    "default-at-once": CRITERIA["default"],
}
"""Recipes of rows that are pruned at once and then recovered."""

WITHOUT: dict[str, dict[str, Any]] = {
    "no-knowledge": {"protect_share": 0.0},
    "one-shot": {"one_shot": True},
    "static": {"curriculum": "static"},
}
"""LoRAShear without one of its parts."""

SHEARED: dict[str, dict[str, Any]] = {
    "lorashear": {},
    **WITHOUT,
    **{name: {"criterion": name} for name in ("kfac", "taylor1")},
    **{f"kfac-{name}": {"criterion": "kfac", **change} for name, change in WITHOUT.items()},
}
"""What each of the other rows changes in the recipe ``lorashear``."""

ROWS = (*AT_ONCE, *SHEARED)

EQUAL = {"patience": 0}
"""What makes every row read all of its tokens."""

AFTER_KNOWLEDGE = {name for change in SHEARED.values() for name in change}
"""Settings that knowledge does not depend on."""

SHOWN: dict[str, Callable[[Row], Any]] = {
    **{name: COLUMNS[name] for name in ("row", "asked", "removed", "parameters", "form")},
    "shearing tokens": lambda r: f"{r['tokens']['shearing']:,}",
    "tokens": lambda r: f"{r['tokens']['total']:,}",
    **{name: COLUMNS[name] for name in ("WikiText-2", "PTB", "C4")},
    "books": lambda r: r["perplexity"]["books"]["perplexity"],
    "tasks (%)": lambda r: 100 * r["tasks"]["average"],
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
    names = pick(a.rows, ROWS)
    stages = [pick(typed, list(TRAINING)) for typed in (a.first, a.second)]
    for name in names:
        settle("lorashear", {**SHEARED.get(name, {}), **EQUAL, **dict(a.set)})
    settle_tasks(a)
    bench = Bench(a)
    bench.data.check([name for stage in stages for name in stage])
    book = Book(a.output, a, "lorashear")
    found = [measure_dense(bench, book), *(measure(bench, book, name, ratio, stages) for name in names for ratio in a.ratios)]
    show(SHOWN, found)


def measure(bench: Bench, book: Book, name: str, ratio: float, stages: Sequence[Sequence[str]]) -> Row:
    """One row, out of the book if it is there."""
    a = bench.arguments
    settings = {**SHEARED.get(name, {}), **EQUAL, **dict(a.set), "seed": a.seed}
    recipe = {**settings, **({"criterion": AT_ONCE[name]} if name in AT_ONCE else {})}
    training = {"tokens": a.tokens, "stages": [list(stage) for stage in stages]}
    key = {"row": name, "ratio": ratio, **bench.settings(recipe), **training, "tasks": wanted_tasks(a)}
    row = book.find(key)
    if row is not None:
        return row
    print(f"{name}, {ratio:.0%} ...", flush=True)
    texts = [[str(bench.data.training(source)) for source in stage] for stage in stages]
    try:
        if name in AT_ONCE:
            model, facts = _pruned(bench, AT_ONCE[name], ratio, texts, settings, _place(bench, key))
        else:
            known = _knowledge(book, key) if settle("lorashear", settings).protect_share else None
            model, facts = _sheared(bench, ratio, texts, settings, known, _place(bench, key))
        row = {"key": key, "name": name, **facts, **measured(bench, model)}
    except FxPruneError as error:
        row = {"key": key, "name": name, "error": f"{type(error).__name__}: {error}"}
    book.add(row)
    return row


def _place(bench: Bench, key: Row) -> Path:
    """Where a row's checkpoint is kept: a directory for all that it depends on, which is not how it is measured."""
    kept = {name: value for name, value in key.items() if name not in ("windows", "tasks")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return (bench.arguments.work or bench.data.scratch) / f"{key['row']}-{key['ratio']:g}-{digest[:8]}"


def _knowledge(book: Book, key: Row) -> fxprune.Knowledge | None:
    """What an earlier row found out about the same model by the same text, if there is one."""

    def of(other: Row) -> Row:
        recipe = {name: value for name, value in other.get("recipe", {}).items() if name not in AFTER_KNOWLEDGE}
        return {"recipe": recipe, **{name: other.get(name) for name in ("model", "dtype", "seed", "stages")}}

    wanted = of(json.loads(json.dumps(key)))
    found = (r["knowledge"] for r in book.rows if r.get("knowledge") and of(r["key"]) == wanted)
    return next((fxprune.Knowledge.from_json(one) for one in found if "fxprune_knowledge" in one), None)


def _sheared(
    bench: Bench,
    ratio: float,
    texts: Sequence[Sequence[str]],
    settings: Mapping[str, Any],
    known: fxprune.Knowledge | None,
    output: Path,
) -> tuple[nn.Module, Row]:
    """LoRAShear, or what is left of it."""
    a = bench.arguments
    if output.is_dir():
        result = fxprune.ShearResult.read(output, bench.tokenizer)
    else:
        options: dict[str, Any] = {
            "recipe": "lorashear",
            "then": texts[1:],
            "tokens": a.tokens,
            "knowledge": known,
            "output": output,
            **settings,
        }
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
    bench: Bench,
    criterion: Mapping[str, Any],
    ratio: float,
    texts: Sequence[Sequence[str]],
    settings: Mapping[str, Any],
    output: Path,
) -> tuple[nn.Module, Row]:
    """Prune at once, then train with fixed weights."""
    a, said = bench.arguments, output.with_name(f"{output.name}.json")
    if said.is_file():
        return load_source(output)[0].to(a.device), json.loads(said.read_text())
    result, facts = bench.prune(criterion, ratio)
    chosen = settle("lorashear", {**settings, "curriculum": "static"})
    options: dict[str, Any] = {"recipe": chosen.training, "max_tokens": a.tokens, "tokenizer": bench.tokenizer}
    recovered = fxprune.recover(result, curriculum=chosen.lessons(texts), **options)
    report = recovered.report
    row = {
        **facts,
        "tokens": {"shearing": 0, "total": report.tokens},
        "seconds": {**facts["seconds"], "recovery": report.seconds},
        "recovery": {n: v for n, v in report.to_json().items() if n in ("curriculum", "settings", "steps", "choices")},
    }
    if a.work is not None:
        recovered.save_pretrained(output, overwrite=True)
        write_whole(said, json.dumps(row))
    return recovered.model, row


if __name__ == "__main__":
    raise SystemExit(run(main))
