"""The space algebra against a brute-force model that knows only numpy's reshape and concatenate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from itertools import product as cartesian
from random import Random

import numpy as np
import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune.spaces import (
    ONE,
    Axis,
    Concat,
    Product,
    Space,
    Sym,
    concat,
    fresh,
    incidence,
    keep_from,
    kept,
    kept_size,
    leaves,
    mark,
    pin,
    product,
    resolve,
    size_of,
    split_concat,
    split_product,
    unify,
)

from .space_model import kept_mask, owners, parts

Choice = dict[Axis, Tensor]
randoms = st.randoms(use_true_random=False)


def free(*spaces: Space) -> list[Axis]:
    """Distinct axes that may be pruned."""
    return [a for a in dict.fromkeys(a for s in spaces for a in leaves(s)) if not a.pins and a.size > 0]


def positions(space: Space, choice: Choice) -> list[int]:
    """What `kept` says, as a list."""
    index = kept(space, keep_from(choice))
    return list(range(size_of(space))) if index is None else index.tolist()


def random_choice(axes: list[Axis], random: Random) -> Choice:
    """Some units of each axis, at least one."""
    return {a: torch.tensor(sorted(random.sample(range(a.size), random.randint(1, a.size)))) for a in axes}


def every_choice(axes: list[Axis]) -> Iterator[Choice]:
    """All ways to keep at least one unit of every axis."""
    ways = [[torch.tensor(c) for n in range(1, a.size + 1) for c in combinations(range(a.size), n)] for a in axes]
    for units in cartesian(*ways):
        yield dict(zip(axes, units, strict=True))


class World:
    """Dimensions made at random and tied to each other at random, with a record of everything that must stay true."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.dims: list[Space] = []
        self.sizes: list[int] = []
        self.facts: list[tuple[str, Callable[[Choice], bool]]] = []

    def add(self, space: Space, size: int) -> Space:
        """A dimension whose size must never change."""
        self.dims.append(space)
        self.sizes.append(size)
        return space

    def masks(self, dims: list[Space], choice: Choice) -> list[list[bool]]:
        """What each dimension keeps, by `kept`."""
        return [[i in set(positions(d, choice)) for i in range(size_of(d))] for d in dims]

    def step(self) -> None:
        """One random operation on random dimensions."""
        random = self.random
        kind = random.choice(["axis", "product", "concat", "view", "split", "unify", "unify", "unify", "pin"])
        pick = [random.choice(self.dims) for _ in range(random.randint(1, 3))] if self.dims else []
        if kind == "axis" or not pick:
            n = random.choice([1, 2, 3, 4, 6, 8, 12])
            self.add(fresh(n), n)
        elif kind == "product" and math.prod(map(size_of, pick)) <= 72:
            self.product(product(*pick), pick)
        elif kind == "concat" and sum(map(size_of, pick)) <= 72:
            self.concat(concat(*pick), pick)
        elif kind == "view":
            n = size_of(pick[0])
            inner = random.choice([d for d in range(1, n + 1) if n % d == 0])
            self.product(pick[0], [self.add(s, k) for s, k in zip(*self.viewed(pick[0], [n // inner, inner]), strict=True)])
        elif kind == "split" and size_of(pick[0]) > 1:
            cut = random.randrange(1, size_of(pick[0]))
            sizes = [cut, size_of(pick[0]) - cut]
            self.concat(pick[0], [self.add(s, k) for s, k in zip(split_concat(pick[0], sizes, "a split"), sizes, strict=True)])
        elif kind == "unify":
            mates = [d for d in self.dims if size_of(d) == size_of(pick[0])]
            self.unify(pick[0], random.choice(mates))
        elif kind == "pin" and random.random() < 0.2:
            pin(pick[0], "on purpose")

    def viewed(self, space: Space, sizes: list[int]) -> tuple[list[Space], list[int]]:
        """A dimension read as a grid."""
        return split_product(space, sizes, "a view"), sizes

    def product(self, whole: Space, factors: list[Space]) -> None:
        """``whole`` keeps an index exactly when every factor keeps its coordinate."""
        self.add(whole, math.prod(map(size_of, factors)))

        def holds(choice: Choice) -> bool:
            grid = np.ones([size_of(f) for f in factors], dtype=bool)
            for i, mask in enumerate(self.masks(factors, choice)):
                grid &= np.array(mask).reshape([-1 if j == i else 1 for j in range(len(factors))])
            return bool(np.flatnonzero(grid.reshape(-1)).tolist() == positions(whole, choice))

        self.facts.append((f"{whole} is the product of {factors}", holds))

    def concat(self, whole: Space, parts: list[Space]) -> None:
        """``whole`` is the parts one after another."""
        self.add(whole, sum(map(size_of, parts)))

        def holds(choice: Choice) -> bool:
            line = np.concatenate([np.array(m, dtype=bool) for m in self.masks(parts, choice)])
            return bool(np.flatnonzero(line).tolist() == positions(whole, choice))

        self.facts.append((f"{whole} is the concatenation of {parts}", holds))

    def unify(self, a: Space, b: Space) -> None:
        """Both keep the same indices."""
        before = (repr(a), repr(b))
        unify(a, b, "a test")
        self.facts.append((f"{before} are one", lambda choice: positions(a, choice) == positions(b, choice)))


@settings(max_examples=300)
@given(randoms, st.integers(2, 25))
def test_everything_ever_stated_stays_true(random: Random, steps: int) -> None:
    world = World(random)
    for _ in range(steps):
        world.step()
    assert [size_of(d) for d in world.dims] == world.sizes
    axes = free(*world.dims)
    for choice in [{}, *(random_choice(axes, random) for _ in range(4))]:
        for said, holds in world.facts:
            assert holds(choice), said


@settings(max_examples=200)
@given(randoms, st.integers(2, 20))
def test_kept_and_kept_size_and_incidence_agree_with_brute_force(random: Random, steps: int) -> None:
    world = World(random)
    for _ in range(steps):
        world.step()
    axes = free(*world.dims)
    choice = random_choice(axes, random)
    for dim in world.dims:
        mask = kept_mask(dim, choice)
        assert positions(dim, choice) == np.flatnonzero(mask).tolist()
        assert kept_size(dim, lambda a: len(choice[a]) if a in choice else a.size) == int(mask.sum())
        for axis in dict.fromkeys(leaves(dim)):
            units, where = incidence(dim, axis)
            pairs = list(zip(units.tolist(), where.tolist(), strict=True))
            assert set(pairs) == owners(dim, axis)
            assert len(pairs) == len(set(pairs))
            assert where.tolist() == sorted(where.tolist())
    stranger = Axis(3)
    assert all(len(side) == 0 for dim in world.dims for side in incidence(dim, stranger))


def _random_space(size: int, random: Random, pool: list[Axis]) -> Space:
    """A random expression of the given size over fresh axes, now and then over one that occurs elsewhere (in ``pool``)."""
    shared = [a for a in pool if a.size == size]
    if shared and random.random() < 0.3:
        return random.choice(shared)
    divisors = [d for d in range(2, size) if size % d == 0]
    kind = random.choice(["axis", "product", "concat"])
    if kind == "product" and divisors:
        inner = random.choice(divisors)
        return product(_random_space(size // inner, random, pool), _random_space(inner, random, pool))
    if kind == "concat" and size > 1:
        cut = random.randrange(1, size)
        return concat(_random_space(cut, random, pool), _random_space(size - cut, random, pool))
    made = fresh(size)
    pool += [made] if isinstance(made, Axis) else []
    return made


@settings(max_examples=400)
@given(randoms, st.sampled_from([2, 3, 4, 6, 8]))
def test_unify_is_sound_and_most_general(random: Random, size: int) -> None:
    """What both sides can keep after unify is what both could keep alike before.

    All of it, unless something was pinned or a part of a Concat would vanish: every part keeps an index.
    """
    pool: list[Axis] = []
    a, b = _random_space(size, random, pool), _random_space(size, random, pool)
    axes = free(a, b)
    assume(math.prod(2**x.size - 1 for x in axes) <= 4000)
    before = set()
    for choice in every_choice(axes):
        one, other = kept_mask(a, choice), kept_mask(b, choice)
        if (one == other).all():
            before.add(tuple(one.tolist()))
    unify(a, b, "a test")
    after = set()
    for choice in every_choice(free(a, b)):
        one, other = kept_mask(a, choice), kept_mask(b, choice)
        assert (one == other).all()
        after.add(tuple(one.tolist()))
    assert after <= before
    if not any(x.pins for s in (a, b) for x in leaves(s)):
        cells = [*parts(a), *parts(b)]
        assert after == {s for s in before if all((np.array(s) & cell).any() for cell in cells)}


@given(randoms, st.integers(1, 12), st.integers(1, 12))
def test_sizes_that_differ_pin_both_sides(random: Random, n: int, m: int) -> None:
    assume(n != m)
    a, b = _random_space(n, random, []), _random_space(m, random, [])
    unify(a, b, "add_3 (aten.add.Tensor)")
    for side in (a, b):
        assert all(x.pins == {"layouts that do not fit each other meet at add_3 (aten.add.Tensor)": None} for x in leaves(side))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: (product(Axis(3), Axis(4)), product(Axis(4), Axis(3))), "a view that does not divide"),
        (lambda: (product(Axis(2), Axis(3)), concat(Axis(2), Axis(4))), "parts that the inner factor does not divide"),
        (lambda: (product(Axis(5), Sym(sympy.Symbol("s"))), product(Sym(sympy.Symbol("s")), Axis(5))), "positions and units mixed"),
        (lambda: (Axis(4), Sym(sympy.Symbol("s"))), "a static and a symbolic dimension"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_layouts_that_do_not_fit_pin_both_sides(build: Callable[[], tuple[Space, Space]], shape: str) -> None:
    a, b = build()
    unify(a, b, "here")
    found = [x for s in (a, b) for x in leaves(s)]
    assert found, shape
    assert all(x.pins for x in found), shape


def test_a_clash_pins_only_what_does_not_fit() -> None:
    heads, other = Axis(5), Axis(5)
    unify(concat(product(Axis(2), Axis(3)), heads), concat(product(Axis(3), Axis(2)), other), "here")
    assert resolve(heads) is resolve(other)
    assert free(heads) == [heads]


def test_rotate_half_ties_both_halves() -> None:
    d = Axis(8)
    first, second = split_concat(d, [4, 4], "slice")
    unify(d, concat(second, first), "add")
    (half,) = free(d)
    assert half.size == 4
    assert positions(d, {half: torch.tensor([0, 3])}) == [0, 3, 4, 7]


def test_interleaved_rotary_gives_pairs() -> None:
    d = Axis(8)
    pairs, two = split_product(d, [4, 2], "slice")
    pin(two, "every k-th entry is taken")
    assert free(d) == [pairs]
    assert positions(d, {pairs: torch.tensor([1, 2])}) == [2, 3, 4, 5]  # type: ignore[dict-item]


def test_grouped_query_attention_gives_kv_heads_times_groups() -> None:
    kv, query = Axis(16), Axis(48)
    heads, width = split_product(kv, [2, 8], "view")
    groups = fresh(3)
    split = split_product(query, [6, 8], "view")
    unify(split[0], product(heads, groups), "matmul")
    unify(split[1], width, "matmul")
    assert [a.size for a in free(query)] == [2, 3, 8]
    keep = {heads: torch.tensor([1]), groups: torch.tensor([0, 2]), width: torch.tensor([7])}
    assert positions(query, keep) == [31, 47]  # type: ignore[arg-type]


def test_fused_gate_and_up_are_one_axis() -> None:
    fused = Axis(10)
    gate, up = split_concat(fused, [5, 5], "chunk")
    unify(gate, up, "mul")
    (ffn,) = free(fused)
    assert positions(fused, {ffn: torch.tensor([2])}) == [2, 7]


def test_pins_and_marks_go_where_the_axis_goes() -> None:
    d, inner = Axis(12), Axis(4)
    pin(d, "an input")
    mark(d, "normalised")
    unify(d, product(Axis(3), inner), "view")
    late = Axis(4)
    unify(inner, late, "add")
    assert [sorted(a.pins) for a in leaves(d)] == [["an input"]] * 2
    assert all("normalised" in a.marks for a in leaves(d))
    assert free(late) == []


def test_sizes_one_and_zero_hold_nothing() -> None:
    axis = Axis(3)
    assert product(fresh(1), axis, Axis(1)) is axis
    assert concat(Axis(0), axis) is axis
    assert product() is ONE
    assert size_of(concat()) == 0
    empty = Axis(0)
    unify(empty, product(empty, axis), "a view of nothing")
    unify(product(axis, Axis(0)), Axis(0), "a view of nothing")
    assert free(axis) == [axis]


def test_a_size_that_sympy_worked_out_is_a_number() -> None:
    s = sympy.Symbol("s")
    assert fresh(sympy.Integer(1)) is ONE
    assert size_of(fresh((2 * s) / s)) == 2
    assert isinstance(fresh(s), Sym)


def test_symbolic_dimensions_have_no_units() -> None:
    s = sympy.Symbol("s")
    batch, heads = Sym(s), Axis(4)
    both = product(batch, heads)
    assert size_of(both) == 4 * s
    assert free(both) == [heads]
    assert kept(batch, keep_from({})) is None
    assert kept_size(both, lambda _: 3) == 3 * s
    unify(both, product(Sym(s), Axis(4)), "add")
    assert free(both) == [heads]
    assert size_of(product(Sym(s), Sym(s + 1))) == s * (s + 1)


def test_an_axis_twice_in_one_dimension() -> None:
    axis = Axis(3)
    square = product(axis, axis)
    units, where = incidence(square, axis)
    assert sorted(zip(units.tolist(), where.tolist(), strict=True)) == sorted(owners(square, axis))
    assert positions(square, {axis: torch.tensor([0, 2])}) == [0, 2, 6, 8]
    assert positions(concat(axis, axis), {axis: torch.tensor([1])}) == [1, 4]


def test_what_prints_is_readable() -> None:
    heads, width = Axis(2), Axis(3, ["an input"])
    assert repr(product(heads, width)) == "(Axis(2) x Axis(3!))"
    assert repr(concat(heads, width)) == "[Axis(2) + Axis(3!)]"
    assert repr(ONE) == "One"
    whole = Axis(6)
    unify(whole, product(heads, width), "view")
    assert repr(whole) == "(Axis(2) x Axis(3!))"


def _in_a_chain(n: int) -> list[tuple[int, int]]:
    return [(i, i + 1) for i in range(n - 1)]


CHAINS: dict[str, Callable[[int], list[tuple[int, int]]]] = {
    "forwards": _in_a_chain,
    "backwards": lambda n: _in_a_chain(n)[::-1],
    "newest first": lambda n: [(j, i) for i, j in _in_a_chain(n)],
    "pairs, then pairs of pairs": lambda n: [(i, i + k) for k in (1 << b for b in range(17)) for i in range(0, n - k, 2 * k)],
}


@pytest.mark.parametrize("order", CHAINS)
def test_deep_chains_are_quick_and_do_not_overflow(order: str) -> None:
    axes = [Axis(12) for _ in range(100_000)]
    start = time.process_time()
    for i, j in CHAINS[order](len(axes)):
        unify(axes[i], axes[j], "a residual stream")
    pin(axes[-1], "a model output")
    unify(axes[len(axes) // 2], product(Axis(3), Axis(4)), "a view")
    assert {id(resolve(a)) for a in axes} == {id(resolve(axes[0]))}
    assert [a.size for a in leaves(axes[0])] == [3, 4]
    assert free(*axes) == []
    assert time.process_time() - start < 20, "near-linear: a second or two on one core"


def test_long_concatenations_are_quick_and_do_not_overflow() -> None:
    start = time.process_time()
    peeled = rest = Axis(1500)
    for n in range(1500, 2, -2):  # x, rest = rest[:2], rest[2:]; and so on
        _, rest = split_concat(rest, [2, n - 2], "slice")  # type: ignore[assignment]
    windows = Axis(600)
    for i in range(1, 299):  # x[2 * i : 2 * i + 2]
        split_concat(windows, [2 * i, 2, 600 - 2 * (i + 1)], "slice")
    assert [len(free(s)) for s in (peeled, windows)] == [750, 300]
    choice = {a: torch.tensor([1]) for a in free(peeled, windows)}
    assert positions(peeled, choice) == list(range(1, 1500, 2))
    assert kept_size(windows, lambda _: 1) == 300
    assert incidence(windows, free(windows)[-1])[1].tolist() == [598, 599]
    assert isinstance(resolve(peeled), Concat)
    assert not isinstance(resolve(peeled), Product)
    assert time.process_time() - start < 20
