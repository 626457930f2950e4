"""Layer sensitivity: units of one layer only are taken away; how much does the loss rise? With a plot.

    python -m benchmarks.paper.layers --data DIR

LLM-Pruner's figure of the same name. For every group of heads and of FFN channels: the least important units (element 1) at zero,
a quarter, a half, three quarters and all of those that may go, and the change of the mean next-token loss (nats) on the calibration
text. The plot has the change at the level nearest to a half of the units, and with all of them gone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import fxprune
from benchmarks.paper.bench import Bench
from benchmarks.paper.common import Book, Row, parser, pick, plot, run, show
from fxprune.errors import UsageError
from fxprune.passes.masking import measurable

KINDS = ("kv_heads", "query_groups", "ffn")


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "paper_layers.json")
    made.set_defaults(samples=32)
    made.add_argument(
        "--rows", default="kv_heads,ffn", metavar="A,B", help=f"kinds out of {', '.join(KINDS)} (default: %(default)s)"
    )
    made.add_argument("--levels", type=int, default=4, help="steps into which a group is cut (default: 4)")
    a = made.parse_args(arguments)
    kinds = pick(a.rows, KINDS)
    bench = Bench(a)
    book = Book(a.output, a, "layers")
    found = [_row(bench, book, kind, a.levels) for kind in kinds]
    show(
        {
            "kind": lambda r: r["name"],
            "groups": lambda r: len(r["groups"]),
            "worst": lambda r: max(r["groups"], key=lambda g: g["curve"][-1][1])["name"],
            "mildest": lambda r: min(r["groups"], key=lambda g: g["curve"][-1][1])["name"],
            "seconds": lambda r: round(sum(r["seconds"].values())),
        },
        found,
    )
    plot(a.output, _lines(found), x="layer", y="rise of the loss (nats)", scale="symlog")


def _row(bench: Bench, book: Book, kind: str, levels: int) -> Row:
    """The curves of one kind, out of the book if they are there."""
    key = {"row": kind, **bench.settings({"criterion": "taylor1", "levels": levels})}
    if (row := book.find(key)) is not None:
        return row
    names = [g.name for g in measurable(bench.groups) if g.kind == kind and g.layer is not None]
    if not names:
        raise UsageError(f"{bench.name} has no group of kind {kind} that can be measured")
    print(f"{kind}: {len(names)} groups ...", flush=True)
    start = time.perf_counter()
    batches, described = bench.batches()
    scores = fxprune.score(bench.gm, bench.groups, "taylor1", batches)
    scored = time.perf_counter()
    curves = fxprune.measure_curves(bench.gm, bench.groups, scores, batches, names=names, levels=levels)
    seconds = {"importance": round(scored - start, 2), "sensitivity": round(time.perf_counter() - scored, 2)}
    groups = [{"name": n, "layer": bench.groups[n].layer, "units": bench.groups[n].size, "curve": curves[n]} for n in names]
    a = bench.arguments
    calibration = {"calibration": described, "calibration_tokens": a.samples * a.length}
    row = {"key": key, "name": kind, **calibration, "groups": groups, "seconds": seconds}
    book.add(row)
    return row


def _lines(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for group in row["groups"]:
            half = min(group["curve"], key=lambda point: abs(point[0] - group["units"] / 2))
            lines.setdefault(f"{row['name']}, half of the units", []).append((group["layer"], half[1]))
            lines.setdefault(f"{row['name']}, all that may go", []).append((group["layer"], group["curve"][-1][1]))
    return lines


if __name__ == "__main__":
    raise SystemExit(run(main))
