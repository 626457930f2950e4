"""Index spaces: the algebra that says which indices of which tensors go together.

A *space* describes one dimension of a tensor:

    Axis(n)             an atomic set of n units that may be removed one by one
    Product(s1, .., sk) row-major flattening of k spaces       n = n1 * .. * nk
    Concat(s1, .., sk)  k spaces one after another             n = n1 + .. + nk
    Sym(expr)           a symbolic size (batch, sequence): nothing to remove

Two dimensions that an operator ties together are unified; an Axis then takes the form of what it met. All merging is
destructive union-find on the axes, driven by a work list, so deep models cannot overflow the stack. Whatever does not fit
pins both sides: a pinned axis is never pruned, and says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Any, TypeAlias

import torch
from torch import Tensor

Size: TypeAlias = Any
"""An ``int``, or a sympy expression for a symbolic dimension."""

_serial = count()


class Axis:
    """An atomic set of ``size`` removable units, compared by identity.

    Attributes:
        size: Number of units.
        pins: Reasons why no unit may be removed; empty when the axis is free.
        marks: Facts that rules leave for later passes, such as ``"normalised"``.
        least: Fewest units that must stay (a top-k takes so many).
    """

    __slots__ = ("form", "least", "marks", "pins", "serial", "size")

    def __init__(self, size: int, pins: Iterable[str] = (), marks: Iterable[str] = ()) -> None:
        self.size = size
        self.pins: dict[str, None] = dict.fromkeys(pins)
        self.marks: set[str] = set(marks)
        self.least = 1
        self.form: Space | None = None
        self.serial = next(_serial)

    def __repr__(self) -> str:
        return f"Axis({self.size}{'!' if self.pins else ''})" if self.form is None else repr(resolve(self))


@dataclass(frozen=True, eq=False)
class Product:
    """Row-major flattening: the last factor varies fastest. ``Product(())`` is the space of a size-1 dimension."""

    factors: tuple[Space, ...]
    size: Size = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", math.prod(map(size_of, self.factors)))

    def __repr__(self) -> str:
        return f"({' x '.join(map(repr, self.factors))})" if self.factors else "One"


@dataclass(frozen=True, eq=False)
class Concat:
    """Spaces one after another."""

    parts: tuple[Space, ...]
    size: Size = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", sum(map(size_of, self.parts)))

    def __repr__(self) -> str:
        return f"[{' + '.join(map(repr, self.parts))}]"


@dataclass(frozen=True, eq=False)
class Sym:
    """A dimension of symbolic size; it has no units."""

    expr: Any

    def __repr__(self) -> str:
        return f"Sym({self.expr})"


Space: TypeAlias = Axis | Product | Concat | Sym


def resolve(space: Space) -> Space:
    """The form that a space has by now: an unbound Axis, or a Product, Concat or Sym."""
    if not isinstance(space, Axis) or space.form is None:
        return space
    root: Space = space
    while isinstance(root, Axis) and root.form is not None:
        root = root.form
    while isinstance(space, Axis) and space.form is not None:  # path compression
        space.form, space = root, space.form
    return root


def size_of(space: Space) -> Size:
    """The number of indices: an ``int``, or a sympy expression. It never changes, whatever an axis is bound to."""
    return space.expr if isinstance(space, Sym) else space.size


ONE = Product(())


def _children(space: Product | Concat) -> list[Space]:
    """Factors or parts with nested ones of the same kind taken apart, so that no walk is deeper than log2 of the size."""
    flat: list[Space] = []
    stack: list[Space] = [space]
    while stack:
        inner = resolve(stack.pop())
        if isinstance(inner, Product) and isinstance(space, Product):
            stack.extend(reversed(inner.factors))
        elif isinstance(inner, Concat) and isinstance(space, Concat):
            stack.extend(reversed(inner.parts))
        else:
            flat.append(inner)
    return flat


def product(*factors: Space) -> Space:
    """The canonical Product: nested ones flattened, size-1 factors gone, symbolic neighbours merged."""
    flat: list[Space] = []
    for factor in map(resolve, factors):
        pieces = factor.factors if isinstance(factor, Product) else (factor,)
        for piece in map(resolve, pieces):
            if isinstance(piece, Axis) and piece.size == 1:
                continue
            if isinstance(piece, Sym) and flat and isinstance(flat[-1], Sym):
                flat[-1] = Sym(flat[-1].expr * piece.expr)
            else:
                flat.append(piece)
    return flat[0] if len(flat) == 1 else Product(tuple(flat)) if flat else ONE


def concat(*parts: Space) -> Space:
    """The canonical Concat: nested ones flattened, size-0 parts gone."""
    flat: list[Space] = []
    for part in map(resolve, parts):
        pieces = part.parts if isinstance(part, Concat) else (part,)
        flat += [p for p in map(resolve, pieces) if not (isinstance(p, Axis) and p.size == 0)]
    return flat[0] if len(flat) == 1 else Concat(tuple(flat)) if flat else Axis(0)


def fresh(size: Size, *, pin: str | None = None, mark: str | None = None) -> Space:
    """A new space of the given size: an Axis, or ONE / Sym where there is nothing to remove."""
    if getattr(size, "is_Integer", False):  # a symbolic size that sympy has worked out
        size = int(size)
    if not isinstance(size, int):
        return Sym(size)
    return ONE if size == 1 else Axis(size, [pin] if pin else (), [mark] if mark else ())


def leaves(space: Space) -> Iterator[Axis]:
    """The unbound axes of a space, left to right; one that occurs twice comes twice."""
    stack = [space]
    while stack:
        match resolve(stack.pop()):
            case Axis() as axis:
                yield axis
            case Product(factors=inner) | Concat(parts=inner):
                stack.extend(reversed(inner))
            case _:
                pass


def pin(space: Space, reason: str) -> None:
    """Forbid removing any unit of any axis in the space."""
    for axis in leaves(space):
        axis.pins[reason] = None


def mark(space: Space, name: str) -> None:
    """Leave a fact on every axis in the space."""
    for axis in leaves(space):
        axis.marks.add(name)


def require(space: Space, least: int, reason: str) -> None:
    """State that at least so many indices of the space must stay; ``reason`` is why, should none be left to go.

    A Product and a Concat meet it by their innermost factor and their first part, and where those are too small by the next ones.
    """
    work = [(space, least)]
    while work:
        space, least = work.pop()
        space = resolve(space)
        if isinstance(space, Sym) or least <= 1:
            continue
        if isinstance(space, Axis):
            space.least = max(space.least, least)
            if space.least >= space.size:
                pin(space, reason)
            continue
        children = _children(space)
        for child in reversed(children) if isinstance(space, Product) else children:
            size = size_of(child)
            if not isinstance(size, int) or least <= (1 if isinstance(space, Product) else 0):
                break
            work.append((child, min(size, least)))
            least = -(-least // size) if isinstance(space, Product) else least - size


def _bind(axis: Axis, form: Space) -> None:
    if isinstance(form, Axis) and form.serial > axis.serial:
        axis, form = form, axis  # the older axis stays the root: names and order are stable
    axis.form = form
    if axis.pins or axis.marks:
        for leaf in leaves(form):
            leaf.pins.update(axis.pins)
            leaf.marks |= axis.marks
    if axis.least > 1:
        require(form, axis.least, "all of it is taken")


def unify(a: Space, b: Space, why: str) -> None:
    """State that index i of ``a`` is kept exactly when index i of ``b`` is.

    Args:
        a: One dimension's space.
        b: The other's.
        why: The operator that ties them; part of the reason if they do not fit and are pinned.
    """
    work: list[tuple[Space, Space]] = [(a, b)]
    while work:
        x, y = (resolve(s) for s in work.pop())
        if x is y or (isinstance(x, Sym) and isinstance(y, Sym)):
            continue
        size = size_of(x)
        if isinstance(x, Sym) or isinstance(y, Sym) or size != size_of(y):
            _clash(x, y, why)
        elif size == 0:
            continue  # nothing to keep: and binding Axis(0) to a Product that holds it would be a circle
        elif isinstance(x, Axis):
            _bind(x, y)
        elif isinstance(y, Axis):
            _bind(y, x)
        elif isinstance(x, Product) and isinstance(y, Product):
            if x.factors or y.factors:
                work += _peel(x, y, why)
        elif isinstance(x, Concat) and isinstance(y, Concat):
            work += _cut(x, y)
        elif isinstance(x, Product) and isinstance(y, Concat):
            work += _factor(x, y, why)
        elif isinstance(x, Concat) and isinstance(y, Product):
            work += _factor(y, x, why)


def _clash(x: Space, y: Space, why: str) -> list[tuple[Space, Space]]:
    reason = f"layouts that do not fit each other meet at {why}"
    pin(x, reason)
    pin(y, reason)
    return []


def _peel(x: Product, y: Product, why: str) -> list[tuple[Space, Space]]:
    """Product against Product: match the innermost factors, splitting the larger one."""
    if not x.factors or not y.factors:
        return _clash(x, y, why)
    (*xs, xi), (*ys, yi) = x.factors, y.factors
    nx, ny = size_of(xi), size_of(yi)
    if nx == ny:
        return [(product(*xs), product(*ys)), (xi, yi)]
    if not (isinstance(nx, int) and isinstance(ny, int)):
        return _clash(x, y, why)
    if nx < ny:
        (xs, xi, nx), (ys, yi, ny) = (ys, yi, ny), (xs, xi, nx)
    if nx % ny:
        return _clash(x, y, why)
    outer = fresh(nx // ny)
    return [(product(*xs, outer), product(*ys)), (xi, product(outer, yi))]


def _cut(x: Concat, y: Concat) -> list[tuple[Space, Space]]:
    """Concat against Concat: match part by part, splitting the larger one."""
    pairs: list[tuple[Space, Space]] = []
    xs, ys = list(reversed(x.parts)), list(reversed(y.parts))
    while xs and ys:
        if size_of(xs[-1]) < size_of(ys[-1]):
            xs, ys = ys, xs
        large, small = xs.pop(), ys.pop()
        left = size_of(large) - size_of(small)
        if left:
            xs.append(fresh(left))
            small = concat(small, xs[-1])
        pairs.append((large, small))
    return pairs


def _factor(x: Product, y: Concat, why: str) -> list[tuple[Space, Space]]:
    """Product against Concat: the innermost factor must divide, and repeat in, every part."""
    *xs, inner = x.factors
    n = size_of(inner)
    sizes = [size_of(p) for p in y.parts]
    if not isinstance(n, int) or any(not isinstance(s, int) or s % n for s in sizes):
        return _clash(x, y, why)
    outers = [fresh(s // n) for s in sizes]
    return [(product(*xs), concat(*outers)), *((p, product(o, inner)) for p, o in zip(y.parts, outers, strict=True))]


def split_concat(space: Space, sizes: Sequence[int], why: str) -> list[Space]:
    """Cut a dimension into consecutive pieces (slice, split, chunk); sizes sum to the dimension's."""
    if len(sizes) == 1:
        return [resolve(space)]
    parts = [fresh(n) for n in sizes]
    unify(space, concat(*parts), why)
    return parts


def split_product(space: Space, sizes: Sequence[Size], why: str) -> list[Space]:
    """Read a dimension as a row-major grid (view, strided slice); sizes multiply to the dimension's."""
    if len(sizes) == 1:
        return [resolve(space)]
    factors = [fresh(n) for n in sizes]
    unify(space, product(*factors), why)
    return factors


Keep: TypeAlias = Callable[[Axis], Tensor | None]
"""Which units of an axis stay: a sorted LongTensor, or None for all."""


def kept(space: Space, keep: Keep) -> Tensor | None:
    """The indices of a dimension that stay when axes keep the given units.

    Returns:
        A sorted LongTensor, or None when the whole dimension stays (always so for symbolic sizes).
    """
    space = resolve(space)
    if isinstance(space, Axis):
        return keep(space)
    if isinstance(space, Sym):
        return None
    children = _children(space)
    chosen = [kept(child, keep) for child in children]
    if all(c is None for c in chosen):
        return None
    sizes = [size_of(child) for child in children]
    lists = [torch.arange(n) if c is None else c for n, c in zip(sizes, chosen, strict=True)]
    if isinstance(space, Concat):
        return torch.cat([part + start for start, part in zip(accumulate(sizes, initial=0), lists, strict=False)])
    index = lists[0]
    for n, part in zip(sizes[1:], lists[1:], strict=True):
        index = (index[:, None] * n + part).flatten()
    return index


def kept_size(space: Space, count_of: Callable[[Axis], int]) -> Size:
    """How many indices of a dimension stay, from the number of units that each axis keeps."""
    space = resolve(space)
    match space:
        case Axis():
            return count_of(space)
        case Sym():
            return space.expr
        case Product():
            return math.prod(kept_size(f, count_of) for f in _children(space))
        case Concat():
            return sum(kept_size(p, count_of) for p in _children(space))


def incidence(space: Space, axis: Axis) -> tuple[Tensor, Tensor]:
    """Which unit of ``axis`` owns which index of the dimension.

    Returns:
        Two LongTensors of equal length, (units, positions), one pair for each ownership, sorted by position.
    """
    space = resolve(space)
    if space is axis:
        return torch.arange(axis.size), torch.arange(axis.size)
    none = torch.empty(0, dtype=torch.long)
    if isinstance(space, Axis | Sym):
        return none, none
    units, positions = [none], [none]
    children = _children(space)
    sizes = [size_of(child) for child in children]
    for i, child in enumerate(children):
        if not any(leaf is axis for leaf in leaves(child)):
            continue
        u, p = incidence(child, axis)
        if isinstance(space, Concat):
            p = p + sum(sizes[:i])
        else:
            inner, outer = math.prod(sizes[i + 1 :]), math.prod(sizes[:i])
            p = (torch.arange(outer)[:, None] * sizes[i] + p).flatten()
            u = u.repeat(outer)
            p = (p[:, None] * inner + torch.arange(inner)).flatten()
            u = u.repeat_interleave(inner)
        units.append(u)
        positions.append(p)
    if len(units) == 2:  # the axis occurs once: sorted as it is
        return units[1], positions[1]
    keys = torch.unique(torch.cat(positions) * axis.size + torch.cat(units))  # one index may be owned twice over
    return keys % axis.size, keys // axis.size


def keep_from(choice: Mapping[Axis, Tensor]) -> Keep:
    """A `Keep` function from a table of axes; what is not listed stays whole."""
    return lambda axis: choice.get(axis)
