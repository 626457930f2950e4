"""How the scores of a group's members become one: LLM-Pruner's ablation (element 1, its constraints) at each ratio.

python -m benchmarks.paper.aggregation --data DIR --ratios 0.2 0.5
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.paper.bench import Bench
from benchmarks.paper.common import Book, parser, pick, run, show
from benchmarks.paper.criteria import COLUMNS, constrained, measure_rows

AGGREGATIONS = ("sum", "mean", "max", "product", "last")


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "paper_aggregation.json")
    made.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5], help="of all parameters (default: 0.2 0.5)")
    made.add_argument("--rows", default=None, metavar="A,B", help=f"only these of {', '.join(AGGREGATIONS)}")
    a = made.parse_args(arguments)
    chosen = {name: constrained("taylor1", aggregation=name) for name in pick(a.rows, AGGREGATIONS)}
    bench = Bench(a)
    show(COLUMNS, measure_rows(bench, Book(a.output, a, "aggregation"), chosen, a.ratios))


if __name__ == "__main__":
    raise SystemExit(run(main))
