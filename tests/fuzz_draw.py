"""How the steps of random programs are drawn: live tensors, choices that keep every shape valid, and the table of kinds.

Shapes are found by running a step on the meta device, with a batch of `BATCH` and a sequence of `SEQUENCE`: large primes, so that
a dimension's size says whether it is symbolic. All other dimensions are *static*: they are what pruning is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from itertools import product as cartesian
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

BATCH, SEQUENCE = 97, 101

T = TypeVar("T")
Shape: TypeAlias = tuple[int, ...]


class Chooser(Protocol):
    """What draws: `random.Random`, or hypothesis behind the same method."""

    def choice(self, seq: Sequence[T], /) -> T:
        """One of the options; the first is the simplest."""


def static(shape: Sequence[int]) -> list[int]:
    """The dimensions of fixed size."""
    return [i for i, n in enumerate(shape) if n % BATCH and n % SEQUENCE]


def symbolic(shape: Shape) -> list[int]:
    """The dimensions of symbolic size, without the batch."""
    return [i for i in range(1, len(shape)) if i not in static(shape)]


def flat(shape: Shape) -> bool:
    """(batch, sequence, features)."""
    return len(shape) == 3 and static(shape) == [2]


def heads_last(shape: Shape) -> bool:
    """(batch, sequence, heads, width)."""
    return len(shape) == 4 and static(shape) == [2, 3]


def heads_first(shape: Shape) -> bool:
    """(batch, heads, sequence, width)."""
    return len(shape) == 4 and static(shape) == [1, 3]


@dataclass
class Pool:
    """The tensors that a program has made so far, on the meta device; the first is the input.

    Attributes:
        tensors: In order of creation.
        linears: For each plain `linear` step its (in, out) sizes, by the number of the tensor that it made.
    """

    tensors: list[Tensor]
    linears: dict[int, tuple[int, int]] = field(default_factory=dict)

    def shape(self, i: int) -> Shape:
        """Of tensor ``i``."""
        return tuple(self.tensors[i].shape)

    def fitting(self, ok: Callable[[Shape], bool], raw: bool = False) -> list[int]:
        """The latest four tensors that will do; the input only if ``raw``."""
        return [i for i in range(len(self.tensors) - 1, -1 if raw else 0, -1) if ok(self.shape(i))][:4]


Drawn: TypeAlias = "tuple[list[int], dict[str, Any]] | None"
Draw: TypeAlias = Callable[[Chooser, Pool], Drawn]


@dataclass(frozen=True)
class Kind:
    """One kind of step.

    Attributes:
        run: Called with the step's own module, the input tensors and the options.
        draw: Chooses inputs and options, or None where no tensor fits.
        make: Builds the module that holds the step's weights.
        weight: How often it is drawn.
        leaks: True if a unit that is zero in the inputs, or has no inputs, may be something else than zero in the output.
        sums: True if it sums over units of an activation that no parameter silences.
        picks: True if it takes the best of some units: a zero may be among them.
    """

    run: Callable[..., Any]
    draw: Draw
    make: Callable[..., nn.Module] | None
    weight: int
    leaks: bool
    sums: bool
    picks: bool


KINDS: dict[str, Kind] = {}


def step(
    draw: Draw,
    *,
    make: Callable[..., nn.Module] | None = None,
    weight: int = 2,
    leaks: bool = False,
    sums: bool = False,
    picks: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a kind of step under the function's name."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        KINDS[run.__name__.rstrip("_")] = Kind(run, draw, make, weight, leaks, sums, picks)
        return run

    return register


# ---------------------------------------------------------------------------------------------------------------------
# How inputs and options are drawn.


def tensor(ok: Callable[[Shape], bool] = lambda s: True, *, raw: bool = False, **options: Any) -> Draw:
    """One tensor; each option from a list, or from what a function of the shape gives."""

    def draw(c: Chooser, pool: Pool) -> Drawn:
        found = pool.fitting(ok, raw)
        if not found:
            return None
        i = c.choice(found)
        lists = {k: v(pool.shape(i)) if callable(v) else v for k, v in options.items()}
        return ([i], {k: c.choice(v) for k, v in lists.items()}) if all(lists.values()) else None

    return draw


def along(ok: Callable[[int], bool] = lambda n: n > 1, *, last: bool = False, **options: Any) -> Draw:
    """One tensor and one static dimension; options from lists, or from functions of the dimension's size."""

    def draw(c: Chooser, pool: Pool) -> Drawn:
        def dims(shape: Shape) -> list[int]:
            return [d for d in static(shape) if ok(shape[d]) and (not last or d == len(shape) - 1)]

        found = pool.fitting(lambda s: bool(dims(s)))
        if not found:
            return None
        i = c.choice(found)
        shape = pool.shape(i)
        dim = c.choice(dims(shape)[::-1])
        lists = {k: v(shape[dim]) if callable(v) else v for k, v in options.items()}
        if not all(lists.values()):
            return None
        drawn = {k: c.choice(v) for k, v in lists.items()}
        return [i], drawn if last else {"dim": c.choice([dim, dim - len(shape)]), **drawn}

    return draw


def pair(ok: Callable[[Shape, Shape], bool], **options: Any) -> Draw:
    """Two tensors, maybe the same one; options from lists, or from functions of both shapes."""

    def draw(c: Chooser, pool: Pool) -> Drawn:
        found = [(i, j) for i in pool.fitting(lambda s: True) for j in range(len(pool.tensors)) if ok(pool.shape(i), pool.shape(j))]
        if not found:
            return None
        i, j = c.choice(found[-12:][::-1])
        lists = {k: v(pool.shape(i), pool.shape(j)) if callable(v) else v for k, v in options.items()}
        return ([i, j], {k: c.choice(v) for k, v in lists.items()}) if all(lists.values()) else None

    return draw


def last_static(shape: Shape) -> bool:
    """The last dimension has a fixed size."""
    return len(shape) - 1 in static(shape)


def divisors(n: int) -> list[int]:
    """All of them, in rising order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def factorings(n: int, most: int = 3) -> list[tuple[int, ...]]:
    """Ways to write ``n`` as an ordered product of at most ``most`` factors above 1."""
    if most == 1 or n == 1:
        return [(n,)]
    return [(n,)] + [(d, *rest) for d in divisors(n)[1:-1] for rest in factorings(n // d, most - 1)]


def regroupings(shape: Shape) -> list[tuple[int, ...]]:
    n = 1
    for size in shape[2:]:
        n *= size
    return [f for f in (*factorings(n), (n, 1), (1, n)) if f != shape[2:]]


def cuts(n: int) -> list[tuple[int, ...]]:
    two = [(k, n - k) for k in range(1, n)]
    return two + [(a, b - a, n - b) for a, b in combinations(range(1, n), 2) if n <= 12]


def grids(shape: Shape) -> list[tuple[int, ...]]:
    """Shapes of parameters that broadcast to a tensor's: (d,), (h, 1), (1, d), (1,), .."""
    sizes = [(n, 1) if i in static(shape) and n > 1 else (1,) for i, n in enumerate(shape)]
    return [grid for k in range(1, len(shape)) for grid in cartesian(*sizes[-k:])]


def broadcasts(a: Shape, b: Shape) -> bool:
    try:
        return torch.broadcast_shapes(a, b) == a
    except RuntimeError:
        return False


def reuse(side: int) -> Draw:
    def draw(c: Chooser, pool: Pool) -> Drawn:
        options = [
            (i, name)
            for name, sizes in pool.linears.items()
            for i in pool.fitting(lambda s, n=sizes[side]: last_static(s) and s[-1] == n)  # type: ignore[misc]
        ]
        if not options:
            return None
        i, name = c.choice(options)
        return [i], {"of": f"t{name}"}

    return draw


def joinable(a: Shape, b: Shape) -> list[int]:
    return [d for d in static(a) if len(a) == len(b) and a[:d] == b[:d] and a[d + 1 :] == b[d + 1 :] and d in static(b)]


def kinds_by_weight() -> Iterator[str]:
    """Every kind as often as its weight says, the most frequent first."""
    for name, kind in sorted(KINDS.items(), key=lambda item: -item[1].weight):
        yield from [name] * kind.weight
