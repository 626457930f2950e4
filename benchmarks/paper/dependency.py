"""With and without dependency: what happens where coupled structures are not removed together?

    python -m benchmarks.paper.dependency --data DIR --ratios 0.2 0.5

``with``: LLM-Pruner's recipe (element 1, heads and FFN channels, first four and last two layers whole): a unit's score is the sum
over the matrices that it reaches into, and its rows and columns go from all of them. ``without``: every matrix chooses for itself:
it loses as many rows or columns as in ``with``, but the least important ones by its own scores, so that a row of one matrix stays
whose column in the next is gone. Both are simulated by zeros in the dense model (removing the units of ``with`` gives the same
network), and the same number of parameters is at zero in every matrix.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

import fxprune
from benchmarks.paper.bench import Bench
from benchmarks.paper.common import Book, Row, parser, pick, run, show
from benchmarks.paper.criteria import COLUMNS, constrained, measure_dense
from fxprune.groups import Member, PruneGroup
from fxprune.planning import settle

ROWS = ("with", "without")
RECIPE = constrained("taylor1")

Slices = list[tuple[Member, Tensor]]
"""Dimensions of parameters with the positions along them that go."""


class Scores:
    """Element 1 of every group's units, together and matrix by matrix, from one pass over the calibration."""

    def __init__(self, bench: Bench) -> None:
        start = time.perf_counter()
        self.lines: dict[tuple[str, int], Tensor] = {}
        batches, self.described = bench.batches(RECIPE["batch_size"])
        self.groups = fxprune.score(bench.gm, bench.groups, self._element, batches)
        self.seconds = round(time.perf_counter() - start, 2)

    def _element(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        found = (weight.detach() * gradient).abs()
        for dim in range(found.dim()):
            line = found.double().sum([d for d in range(found.dim()) if d != dim]) if found.dim() > 1 else found.double()
            self.lines[name, dim] = self.lines.get((name, dim), torch.zeros(())) + line.cpu()
        return found

    def own(self, member: Member, size: int) -> Tensor:
        """The scores of a group's units by one matrix alone."""
        units, positions = member.incidence
        return torch.zeros(size, dtype=torch.float64).index_add_(0, units, self.lines[member.name, member.dim][positions])


def slices(row: str, groups: Mapping[str, PruneGroup], keep: Mapping[str, Tensor], scores: Scores) -> Slices:
    """What is set to zero."""
    found: Slices = []
    for name, kept in keep.items():
        group = groups[name]
        gone = torch.tensor(sorted({*range(group.size)} - {*kept.tolist()}))
        for member in (m for m in group.members if m.trainable):
            least = scores.own(member, group.size).argsort()[: len(gone)] if row == "without" else gone
            found.append((member, member.indices(least)))
    return found


@contextmanager
def zeroed(bench: Bench, gone: Slices) -> Iterator[int]:
    """The dense model with some slices at zero, and how many parameters that are; afterwards it is as it was."""
    tensors = {m.name: bench.groups.parameters[m.name].tensor for m, _ in gone}
    before = {name: t.detach().clone() for name, t in tensors.items() if t is not None}
    masks = {name: torch.zeros_like(t, dtype=torch.bool) for name, t in before.items()}
    try:
        with torch.no_grad():
            for member, positions in gone:
                masks[member.name].index_fill_(member.dim, positions.to(before[member.name].device), True)
            for name, tensor in tensors.items():
                assert tensor is not None
                tensor.masked_fill_(masks[name], 0)
        yield sum(int(mask.sum()) for mask in masks.values())
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                assert tensor is not None
                tensor.copy_(before[name])


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "paper_dependency.json")
    made.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5], help="of all parameters (default: 0.2 0.5)")
    made.add_argument("--rows", default=None, metavar="A,B", help=f"only these of {', '.join(ROWS)}")
    a = made.parse_args(arguments)
    names = pick(a.rows, ROWS)
    bench = Bench(a)
    book = Book(a.output, a, "dependency")
    found, scores = [measure_dense(bench, book)], list[Scores]()
    for name in names:
        for ratio in a.ratios:
            key = {"row": name, "ratio": ratio, **bench.settings(RECIPE)}
            row = book.find(key)
            if row is None:
                print(f"{name} dependency, {ratio:.0%} ...", flush=True)
                scores = scores or [Scores(bench)]
                row = _row(bench, key, name, ratio, scores[0])
                book.add(row)
            found.append(row)
    show(COLUMNS, found)


def _row(bench: Bench, key: Row, name: str, ratio: float, scores: Scores) -> Row:
    _, chosen = settle(RECIPE, {}, ratio, None, None, {}, bench.arguments.seed)
    plan = fxprune.select(bench.groups, scores.groups, chosen)
    start, total = time.perf_counter(), bench.groups.total
    with zeroed(bench, slices(name, bench.groups, plan.keep, scores)) as count:
        found = bench.perplexities(bench.model)
    seconds = {"importance": scores.seconds, "evaluation": round(time.perf_counter() - start, 2)}
    size = {"removed": round(count / total, 5), "parameters": total - count, "form": "zeros"}
    tokens = bench.arguments.samples * bench.arguments.length
    text = {"calibration": scores.described, "calibration_tokens": tokens}
    return {"key": key, "name": name, "ratio": ratio, **size, **text, "perplexity": found, "seconds": seconds}


if __name__ == "__main__":
    raise SystemExit(run(main))
