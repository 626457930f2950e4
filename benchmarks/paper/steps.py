"""Perplexity against the step of a recovery, on text that it does not learn from; with a plot.

    python -m benchmarks.paper.steps --data DIR --recover-recipe llm-pruner

LLM-Pruner's figure of the same name: training for too long hurts. Nothing stops early here. With ``--validation wikitext2`` or
``ptb`` the curve is that of an evaluation text, by the protocol of the other experiments and on as many ``--windows``; the model
that is kept would then be chosen by it, so it is evaluated on nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.paper.bench import Bench
from benchmarks.paper.common import TEXTS, Book, parser, pick, plot, run, show
from benchmarks.paper.criteria import PEER, ROWS, check_recovery, recovery_options

HELD_OUT = "held-out"


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "paper_steps.json")
    made.add_argument("--ratio", type=float, default=0.2, help="of all parameters (default: 0.2)")
    made.add_argument("--rows", default="element1", metavar="A,B", help="rows of benchmarks.paper.criteria (default: element1)")
    made.add_argument("--validation", choices=(HELD_OUT, *TEXTS), default=HELD_OUT, help="measured on (default: held out)")
    recovery_options(made)
    a = made.parse_args(arguments)
    names = pick(a.rows, [row for row in ROWS if row != PEER])
    check_recovery(a)
    bench = Bench(a)
    bench.data.check([a.recover_data])
    book, found = Book(a.output, a, "steps"), []
    for name in names:
        how = {"data": a.recover_data, "recipe": a.recover_recipe, "set": dict(a.recover_set), "validation": a.validation}
        key = {"row": name, "ratio": a.ratio, **bench.settings(ROWS[name]), "recovery": how}
        row = book.find(key)
        if row is None:
            print(f"{name}, {a.ratio:.0%} ...", flush=True)
            result, facts = bench.prune(ROWS[name], a.ratio)
            held = None if a.validation == HELD_OUT else bench.windows(a.validation)
            _, report = bench.recover(result, a.recover_data, validation=held, patience=0)
            row = {"key": key, "name": name, **facts, "recovery": report}
            book.add(row)
        found.append(row)
    show(
        {
            "row": lambda r: r["name"],
            "removed": lambda r: f"{r['removed']:.2%}",
            "before": lambda r: r["recovery"]["validation"][0]["perplexity"],
            "best": lambda r: min(v["perplexity"] for v in r["recovery"]["validation"]),
            "best step": lambda r: r["recovery"]["best_step"],
            "last": lambda r: r["recovery"]["validation"][-1]["perplexity"],
            "steps": lambda r: r["recovery"]["steps"],
        },
        found,
    )
    lines = {r["name"]: [(v["step"], v["perplexity"]) for v in r["recovery"]["validation"]] for r in found}
    plot(a.output, lines, x="step", y=f"perplexity, {a.validation}")


if __name__ == "__main__":
    raise SystemExit(run(main))
