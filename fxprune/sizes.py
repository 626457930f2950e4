"""The sizes of inputs that a trace holds for, and the check of them that a rewritten graph carries.

A graph computes what `torch.export` met: where a forward branches on a length, one of its branches; where a size is fixed, that
size. On others it may well run to its end and be wrong, so it refuses them, as the graph of `torch.export` itself does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from ._compat import on_deepcopy, own_conditions, python_text
from .errors import CaptureError, UsageError

SIZES = "fxprune.sizes"
"""Where a traced or rewritten graph keeps its `InputSizes` in ``meta``."""


class InputSizes:
    """A hook before forward that refuses inputs of other sizes than a trace holds for.

    Args:
        gm: A traced graph; its placeholders have example values.

    Attributes:
        bounds: ``(leaf, dimension, least, most)`` where not every size will do; leaves are what the inputs flatten to, and ``most``
            is None where there is no limit.
        equal: ``(leaf, dimension, leaf, dimension)`` of sizes that are one.
        conditions: Of any other form, such as an even length, or one length above another.
    """

    def __init__(self, gm: GraphModule) -> None:
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self.arguments: tuple[str, ...] = tuple(cast(Any, gm.graph._codegen).pytree_info.orig_args)
        self.names = tuple(node.name for node in placeholders)
        bounds, equal = list[tuple[int, int, int, int | None]](), list[tuple[int, int, int, int]]()
        first: dict[Any, tuple[int, int]] = {}
        taken: Any = None
        for leaf, node in enumerate(placeholders):
            value = node.meta.get("val")
            shape: Any = value.shape if isinstance(value, Tensor) else ()
            for dim, size in enumerate(shape):
                least, most = _span(size)
                if least or most is not None:
                    bounds.append((leaf, dim, least, most))
                if not _fixed(size):
                    taken = size.node.shape_env
                    known = first.setdefault(size.node.expr, (leaf, dim))
                    if known != (leaf, dim):
                        equal.append((*known, leaf, dim))
        self.bounds, self.equal = tuple(bounds), tuple(equal)
        self.conditions = tuple(_conditions(own_conditions(taken), first, self.names)) if taken else ()

    def register(self, gm: GraphModule) -> None:
        """Let a graph that takes the same inputs, and its copies, refuse those of other sizes."""
        gm.meta[SIZES] = self
        _hook(gm)
        on_deepcopy(gm, _hook)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at the sizes of what a module is called with.

        Raises:
            UsageError: The graph does not hold for them; names the input, its size, and what the trace was made for.
        """
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        leaves = tree_leaves([given[name] for name in self.arguments if name in given])
        if len(leaves) != len(self.names):
            return  # forward says what is wrong with it
        for leaf, dim, least, most in self.bounds:
            size = _size(leaves[leaf], dim)
            if size is not None and (size < least or (most is not None and size > most)):
                raise UsageError(
                    f"{self.names[leaf]}.shape[{dim}] is {size}, and the graph was traced for {_interval(least, most)}: trace the "
                    "model with an example of such a size"
                )
        for here, a, there, b in self.equal:
            one, other = _size(leaves[here], a), _size(leaves[there], b)
            if one is not None and other is not None and one != other:
                raise UsageError(
                    f"{self.names[here]}.shape[{a}] is {one} and {self.names[there]}.shape[{b}] is {other}: the graph was traced "
                    "for sizes that are equal"
                )
        for condition in self.conditions:
            sizes = [_size(leaves[leaf], dim) for leaf, dim in condition.places]
            if None not in sizes and not condition.met(sizes):
                raise UsageError(
                    f"{condition.told(sizes)}, and the graph was traced for {condition.text}: trace the model with an example of "
                    "such sizes"
                )


@dataclass(frozen=True)
class _Condition:
    """A condition on sizes.

    Attributes:
        text: The condition, for people.
        places: ``(leaf, dimension)`` of its sizes.
        labels: The same for people.
        holds: Whether it does, of the sizes.
    """

    text: str
    places: tuple[tuple[int, int], ...]
    labels: tuple[str, ...]
    holds: Callable[..., bool]

    def met(self, sizes: Sequence[Any]) -> bool:
        """Whether it holds; where it cannot be told, it does not."""
        try:
            return bool(self.holds(*sizes))
        except ZeroDivisionError:
            return False

    def told(self, sizes: Sequence[Any]) -> str:
        """The sizes with what they are of."""
        return " and ".join(f"{label} is {size}" for label, size in zip(self.labels, sizes, strict=True))


def _conditions(taken: Sequence[Any], known: Mapping[Any, tuple[int, int]], names: Sequence[str]) -> Iterator[_Condition]:
    """What a trace has taken for granted, beyond the span of each size and those that are one."""
    for expression in taken:
        if expression.free_symbols and expression.free_symbols <= known.keys():
            if _spanned(expression):
                continue
            symbols = sorted(expression.free_symbols, key=known.__getitem__)
            places = tuple(known[s] for s in symbols)
            labels = tuple(f"{names[leaf]}.shape[{dim}]" for leaf, dim in places)
            variables = [f"v{i}" for i in range(len(symbols))]
            try:
                text, source = (_renamed(expression, symbols, called) for called in (labels, variables))
                holds = eval(f"lambda {', '.join(variables)}: {source}", {"math": math, "torch": torch})
            except Exception as error:  # whatever a printer that is not ours stumbles over
                raise CaptureError(
                    f"the model's forward branches on sizes by '{expression}', which a graph cannot ask for: trace it with fixed "
                    "sizes, dynamic_shapes={}"
                ) from error
            yield _Condition(text, places, labels, holds)


def _spanned(expression: Any) -> bool:
    """Whether the span of a size has a condition: a bound, but no hole (``!= 5``) above what torch takes for special."""
    numbers = [side for side in expression.args if side.is_number]
    hole = expression.is_Relational and expression.rel_op == "!=" and any(n > 1 for n in numbers)
    return bool(numbers) and any(side.is_Symbol for side in expression.args) and not hole


def _renamed(expression: Any, symbols: Sequence[Any], names: Sequence[str]) -> str:
    return python_text(expression.xreplace({s: type(s)(name, **s.assumptions0) for s, name in zip(symbols, names, strict=True)}))


def _hook(gm: GraphModule) -> None:
    sizes = gm.meta[SIZES]
    if sizes.bounds or sizes.equal or sizes.conditions:
        gm.register_forward_pre_hook(sizes, with_kwargs=True)


def _size(value: Any, dim: int) -> int | None:
    return value.shape[dim] if isinstance(value, Tensor) and dim < value.dim() else None


def _span(size: Any) -> tuple[int, int | None]:
    """Least and most of a size; 0 and None where anything will do."""
    if _fixed(size):
        return int(size), int(size)
    symbolic = size.node
    span = symbolic.shape_env.var_to_range.get(symbolic.expr)
    if span is None:
        return 0, None
    least, most = int(span.lower), int(span.upper) if span.upper.is_Integer else None
    return (least if least > 2 else 0), most  # torch.export takes 0 and 1 for special, and lets them pass


def _fixed(size: Any) -> bool:
    return isinstance(size, int) or bool(size.node.expr.is_number)


def _interval(least: int, most: int | None) -> str:
    if most is None:
        return f"{least} and more"
    if least == most:
        return f"{most}"
    return f"{least} to {most}" if least else f"at most {most}"
