"""How much data does recovery need? One pruned model, recovered on 0, 1,000, 10,000 and 50,000 samples.

    python -m benchmarks.paper.data_amount --data DIR --recover-recipe llm-pruner --tasks --limit 200

The samples that recovery holds out to measure on are among them.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.paper.bench import Bench, eager
from benchmarks.paper.common import Book, Row, parser, pick, run, show
from benchmarks.paper.criteria import (
    COLUMNS,
    PEER,
    ROWS,
    check_recovery,
    measure_dense,
    measured,
    recovery_options,
    settle_tasks,
    task_options,
    wanted_tasks,
)
from fxprune.api import PruneResult
from fxprune.errors import UsageError

AMOUNTS = [0, 1000, 10_000, 50_000]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "paper_data_amount.json")
    made.add_argument("--ratio", type=float, default=0.2, help="of all parameters (default: 0.2)")
    made.add_argument("--row", default="element1", help="how it is pruned, a row of benchmarks.paper.criteria (default: element1)")
    made.add_argument("--amounts", nargs="+", type=int, default=AMOUNTS, help="samples (default: 0 1000 10000 50000)")
    recovery_options(made)
    task_options(made)
    a = made.parse_args(arguments)
    (name,) = pick(a.row, [row for row in ROWS if row != PEER])
    if min(a.amounts) < 0:
        raise UsageError(f"--amounts are numbers of samples, got {min(a.amounts)}")
    check_recovery(a)
    settle_tasks(a)
    bench = Bench(a)
    bench.data.check([a.recover_data])
    book, found, pruned = Book(a.output, a, "data_amount"), list[Row](), list[tuple[PruneResult, Row]]()
    found.append(measure_dense(bench, book))
    for amount in a.amounts:
        how = {"data": a.recover_data, "recipe": a.recover_recipe, "set": dict(a.recover_set)} if amount else None
        key = {
            "row": name,
            "ratio": a.ratio,
            "amount": amount,
            **bench.settings(ROWS[name]),
            "recovery": how,
            "tasks": wanted_tasks(a),
        }
        row = book.find(key)
        if row is None:
            print(f"{name}, {a.ratio:.0%}, {amount:,} samples ...", flush=True)
            pruned = pruned or [bench.prune(ROWS[name], a.ratio)]
            result, facts = pruned[0]
            model, report = bench.recover(result, a.recover_data, samples=amount) if amount else (eager(result), None)
            row = {"key": key, "name": f"{amount:,} samples", **facts, "recovery": report, **measured(bench, model)}
            book.add(row)
        found.append(row)
    more = {
        "tokens trained on": lambda r: f"{r['recovery']['tokens']:,}" if r["recovery"] else "",
        "recovery seconds": lambda r: r["recovery"]["seconds"] if r["recovery"] else "",
    }
    show({**COLUMNS, **more}, found)


if __name__ == "__main__":
    raise SystemExit(run(main))
