"""Perplexity against the share of parameters that goes, for fxprune's and LLM-Pruner's recipe, without recovery; with a plot.

python -m benchmarks.paper.ratios --data DIR
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.paper.bench import Bench
from benchmarks.paper.common import TEXTS, Book, parser, pick, plot, run, show
from benchmarks.paper.criteria import COLUMNS, ROWS, measure_rows

CURVES = {"default": ROWS["default"], "llm-pruner": ROWS["element1"], "uniform": ROWS["uniform"], "flap": ROWS["flap"]}
RATIOS = [round(0.05 * i, 2) for i in range(1, 13)]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "paper_ratios.json")
    made.add_argument("--ratios", nargs="+", type=float, default=RATIOS, help="of all parameters (default: 0.05 to 0.6)")
    made.add_argument("--rows", default="default,llm-pruner", metavar="A,B", help=f"of {', '.join(CURVES)} (default: %(default)s)")
    made.add_argument("--text", choices=sorted(TEXTS), default="wikitext2", help="what is plotted (default: wikitext2)")
    a = made.parse_args(arguments)
    names = pick(a.rows, list(CURVES))
    found = measure_rows(Bench(a), Book(a.output, a, "ratios"), {n: CURVES[n] for n in names}, a.ratios)
    show(COLUMNS, found)
    start = (0.0, found[0]["perplexity"][a.text]["perplexity"])
    lines = {n: [start] for n in names}
    for row in found[1:]:
        if "error" not in row:
            lines[row["name"]].append((100 * row["removed"], row["perplexity"][a.text]["perplexity"]))
    plot(a.output, lines, x="parameters removed (%)", y=f"perplexity, {a.text}", scale="log")


if __name__ == "__main__":
    raise SystemExit(run(main))
