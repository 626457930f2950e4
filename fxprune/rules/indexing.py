"""Operators that look up or order entries by number: the numbered dimension is pinned, the others pass.

Unless the numbers come from a top-k or an argmax over an axis: they then carry that axis (`Value.numbers`), and what they look up
unifies with it. Once units are gone, the shorter top-k numbers what is left by itself: so whole experts go, router and weights
together. Numbers that escape to anything else pin their axis.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import spaces
from ..spaces import Space, mark, size_of
from .registry import Call, Resize, Spaces, Value, rule

aten: Any = torch.ops.aten


@rule(aten.select.int, numbers="pass")
def select(call: Call) -> Spaces:
    """One entry of a pinned dimension; the first of entries that are all alike is there whatever goes."""
    x, dim = call["self"], call["self"].axis(call["dim"])
    if x.alike and call["index"] == 0:
        call.alike = True
    else:
        call.pin(x[dim], "one entry is selected by number")
    return [*x[:dim], *x[dim + 1 :]]


@rule(aten.select_scatter)
def select_scatter(call: Call) -> Spaces:
    """One entry of a pinned dimension is overwritten (what ``x[:, i] = y`` becomes)."""
    x, dim = call["self"], call["self"].axis(call["dim"])
    call.pin(x[dim], "one entry is written by number")
    for mine, theirs in zip([*x[:dim], *x[dim + 1 :]], call["src"], strict=True):
        call.unify(mine, theirs)
    return x.dims  # type: ignore[no-any-return]


@rule(aten.unbind, numbers="pass")
def unbind(call: Call) -> list[Spaces]:
    """Every entry of a pinned dimension."""
    x, dim = call["self"], call["self"].axis(call["dim"])
    call.pin(x[dim], "entries are taken apart by number")
    return [[*x[:dim], *x[dim + 1 :]] for _ in call.shapes]


@rule(aten.index_select, numbers="own")
def index_select(call: Call) -> Spaces:
    """Entries by number along one dimension."""
    x, dim = call["self"], call["self"].axis(call["dim"])
    call.look_up(x[dim], call["index"], "entries are selected by number")
    call.number(x.numbers)
    return [*x[:dim], *(call["index"] or [call.fresh(1)]), *x[dim + 1 :]]


@rule(aten.index, numbers="own")
def index(call: Call) -> Spaces:
    """Advanced indexing: indexed dimensions are pinned, index tensors broadcast, the rest pass."""
    x, indices = call["self"], list(call["indices"])
    masks = [n for n, i in enumerate(indices) if i is not None and _boolean(call, n)]
    call.number(x.numbers)
    if masks:
        if len(masks) != sum(i is not None for i in indices) or len(masks) > 1:
            return call.give_up("boolean indices together with others")[0]
        return _masked(call, x, masks[0], indices[masks[0]])
    indices += [None] * (len(x) - len(indices))
    indexed = [d for d, i in enumerate(indices) if i is not None]
    window = _constant_window(x, indices, indexed)
    if window is not None:
        dim, start, end = window
        parts = call.split_concat(x[dim], [n for n in (start, end - start, x.shape[dim] - end) if n])
        if start:
            call.notes["before"] = parts[0]
        call.notes["window"] = parts[1 if start else 0]
        return [*x[:dim], call.notes["window"], *x[dim + 1 :]]
    for d in indexed:
        call.look_up(x[d], indices[d], "entries are looked up by number")
        if x.weight and indices[d].numbers is not None:
            mark(x[d], "experts")
    rank = max(len(indices[d]) for d in indexed)
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    at = indexed[0] if adjacent else 0
    found = call.broadcast([indices[d] for d in indexed], call.shape[at : at + rank])
    rest = [s for d, s in enumerate(x) if d not in indexed]
    return [*rest[:at], *found, *rest[at:]]


@rule(aten.index_put)
def index_put(call: Call) -> Spaces:
    """Entries written by number, or by a mask (what ``x[i] = y`` becomes): those dimensions are pinned, the rest unify.

    One value for all of a mask is elementwise.
    """
    x, indices, values = call["self"], list(call["indices"]), call["values"]
    masks = [n for n, i in enumerate(indices) if i is not None and _boolean(call, n)]
    numbers = [n for n, i in enumerate(indices) if i is not None]
    if masks and len(numbers) > 1:
        return call.give_up("boolean indices together with others")[0]
    taken = [d for n in numbers for d in range(n, n + (len(indices[n]) if masks else 1))]
    rank = 1 if masks else max(len(indices[n]) for n in numbers)
    after = len(x) - taken[-1] - 1
    if masks and (len(values) <= after or size_of(values[-after - 1]) == 1):
        for d, space in zip(taken, indices[masks[0]], strict=True):
            call.unify(x[d], space)
    else:
        for space in [*(s for n in numbers for s in indices[n]), *(x[d] for d in taken)]:
            call.pin(space, "entries are written by number")
    rest: list[Space | None] = [s for d, s in enumerate(x) if d not in taken]
    at = taken[0] if taken == list(range(taken[0], taken[-1] + 1)) else 0
    for theirs, ours in zip(reversed(values.dims), reversed([*rest[:at], *[None] * rank, *rest[at:]]), strict=False):
        if ours is not None and size_of(ours) == size_of(theirs):
            call.unify(ours, theirs)
        elif size_of(theirs) != 1:
            call.pin(theirs, "entries are written by number")
    return x.dims  # type: ignore[no-any-return]


def _masked(call: Call, x: Value, at: int, mask: Value) -> Spaces:
    """One boolean index: the dimensions that it runs over become one of unknown size."""
    for space in (*mask, *x[at : at + len(mask)]):
        call.pin(space, "a boolean index")
    return [*x[:at], call.fresh(call.shape[at], pin="a boolean index"), *x[at + len(mask) :]]


def _constant_window(x: Value, indices: list[Value | None], indexed: list[int]) -> tuple[int, int, int] | None:
    """``(dim, start, end)`` if the one index is a constant list of neighbours, as in ``x[..., [-2], :]``: that is a slice."""
    index = indices[indexed[0]]
    size = x.shape[indexed[0]]
    if len(indexed) > 1 or index is None or index.tensor is None or len(index) != 1 or not isinstance(size, int):
        return None
    if isinstance(index.tensor, torch.nn.Parameter) or index.tensor.is_meta or index.tensor.numel() == 0:
        return None
    numbers = [n % size for n in index.tensor.tolist()]
    start, end = numbers[0], numbers[0] + len(numbers)
    return (indexed[0], start, end) if numbers == list(range(start, end)) else None


@index.resize
def _index(call: Resize) -> dict[str, Any]:
    if "window" not in call.notes:
        return {}
    dim = next(d for d, i in enumerate(call["indices"]) if i is not None)
    before = call.kept(call.notes["before"]) if "before" in call.notes else 0
    call.node.target = aten.slice.Tensor
    call.node.args, call.node.kwargs = (call["self"], dim, before, before + call.kept(call.notes["window"])), {}
    return {}


def _boolean(call: Call, position: int) -> bool:
    node: Any = call.node.args[1]
    value = node[position].meta.get("val")
    return value is not None and value.dtype in (torch.bool, torch.uint8)


@rule(aten.gather, numbers="own")
def gather(call: Call) -> Spaces:
    """Numbered look-up along one dimension; the index gives the result its shape."""
    x, numbers = call["self"], call["index"]
    dim = x.axis(call["dim"])
    for d, (mine, theirs) in enumerate(zip(x, numbers, strict=True)):
        if d == dim:
            call.look_up(mine, numbers, "entries are looked up by number")
        else:
            _same_or_pin(call, mine, theirs)
    call.number(x.numbers)
    return numbers.dims  # type: ignore[no-any-return]


@rule(aten.scatter, aten.scatter_add, aten.scatter_reduce, numbers="own")
def scatter(call: Call) -> Spaces:
    """Entries written by number along one dimension."""
    call.escape(*(t for t in (call["self"], call.get("src")) if isinstance(t, Value)))
    x, numbers, source = call["self"], call["index"], call.get("src")
    dim = x.axis(call["dim"])
    for d, space in enumerate(x):
        others = [t[d] for t in (numbers, source) if isinstance(t, Value)]
        for other in others:
            if d == dim:
                call.pin(other, "entries are written by number")
            else:
                _same_or_pin(call, space, other)
    call.look_up(x[dim], numbers, "entries are written by number")
    return x.dims  # type: ignore[no-any-return]


@rule(aten.index_add, aten.index_copy)
def index_add(call: Call) -> Spaces:
    """Slices written by number along one dimension."""
    x, source = call["self"], call["source"]
    dim = x.axis(call["dim"])
    for d, (mine, theirs) in enumerate(zip(x, source, strict=True)):
        if d == dim:
            call.pin(mine, "entries are written by number")
            call.pin(theirs, "entries are written by number")
        else:
            _same_or_pin(call, mine, theirs)
    call.pin(call["index"][0], "entries are written by number")
    return x.dims  # type: ignore[no-any-return]


def _same_or_pin(call: Call, mine: Space, theirs: Space) -> None:
    if size_of(mine) == size_of(theirs):
        call.unify(mine, theirs)
    else:
        call.pin(mine, "only the first entries are taken")
        call.pin(theirs, "only the first entries are taken")


@rule(aten.masked_scatter)
def masked_scatter(call: Call) -> Spaces:
    """Entries under a mask replaced by another tensor's, in order; where the mask is the same all along a row, whole rows."""
    x, mask, source = call["self"], call["mask"], call["source"]
    rows = len(mask) > 0 and len(source) > 0 and size_of(mask[-1]) == 1 and size_of(x[-1]) == size_of(source[-1])
    for space in (*x[: len(x) - rows], *source[: len(source) - rows], *mask):
        call.pin(space, "entries are replaced by number")
    if rows:
        call.unify(x[-1], source[-1])
    return x.dims  # type: ignore[no-any-return]


@rule(aten.diff)
def diff(call: Call) -> Spaces:
    """Neighbours along one dimension (pinned), with tensors put before and after."""
    x = call["self"]
    dim = x.axis(call["dim"])
    for other in (call["prepend"], call["append"]):
        for d, space in enumerate(other or ()):
            if d == dim:
                call.pin(space, "position matters")
            else:
                call.unify(x[d], space)
    return ordered(call)  # type: ignore[no-any-return]


@rule(aten.topk, numbers="own")
def topk(call: Call) -> Any:
    """The largest k along one dimension: the indices number its units, of which k must stay."""
    x, k = call["self"], call["k"]
    if not len(x) or not isinstance(k, int):
        return call.give_up("a top-k of a scalar, or of symbolic size")
    dim = x.axis(call["dim"])
    spaces.require(x[dim], k, f"all entries are taken at {call.why}")
    mark(x[dim], "normalised")
    call.number(x.numbers)
    call.number(x[dim], output=1)
    best = call.fresh(k, pin="numbers the entries taken")
    return [[*x[:dim], best, *x[dim + 1 :]]] * 2


@rule(aten.argmax, aten.argmin, numbers="own")
def argmax(call: Call) -> Spaces:
    """The number of the largest entry along one dimension."""
    x, dim = call["self"], call["dim"]
    call.escape(x)
    if dim is None or not len(x):
        for space in x:
            call.pin(space, "the largest entry of all is found by number")
        return [call.fresh(n) for n in call.shape]
    at = x.axis(dim)
    mark(x[at], "normalised")
    call.number(x[at])
    return [*x[:at], *([call.fresh(1)] if call["keepdim"] else []), *x[at + 1 :]]


@rule(aten.one_hot, numbers="own")
def one_hot(call: Call) -> Spaces:
    """A new last dimension for what the entries number."""
    x = call["self"]
    made = x.numbers if x.numbers is not None and size_of(x.numbers) == call.shape[-1] else None
    if made is None:
        call.escape(x)
    return [*x, call.fresh(call.shape[-1], pin="numbers classes") if made is None else made]


@one_hot.resize
def _one_hot(call: Resize) -> dict[str, Any]:
    classes = call["num_classes"]
    if not isinstance(classes, int) or classes == -1:  # as many as the entries turn out to need
        return {}
    return {"num_classes": call.kept(call.outputs[0][-1])}


@rule(aten.histc, numbers="own")
def histc(call: Call) -> Spaces:
    """How often each number occurs, with one bin for each: the bins are what the entries number."""
    x, bins = call["self"], call["bins"]
    if x.numbers is None or (size_of(x.numbers), call["min"], call["max"]) != (bins, 0, bins - 1):
        return call.give_up("a histogram")[0]
    call.tally = "counts"
    return [x.numbers]


@histc.resize
def _histc(call: Resize) -> dict[str, Any]:
    bins = call.kept(call.outputs[0][0])
    return {"bins": bins, "max": bins - 1}


@rule(aten.cumsum)
def cumsum(call: Call) -> Spaces:
    """Running sums: over the kept entries only."""
    x = call["self"]
    if len(x):
        mark(x[call["dim"]], "normalised")
    call.tally = "ends" if x.tally == "counts" else None
    return x.dims  # type: ignore[no-any-return]


@rule(aten.sort, aten.argsort, aten.cumprod, aten.logcumsumexp, aten.cummax, aten.cummin, numbers="own")
def ordered(call: Call) -> Any:
    """Position matters along one dimension (pinned). Renumbering keeps the order, so numbers may be sorted."""
    x = call["self"]
    if not len(x):
        return call.give_up("a scalar")[0]
    packet = getattr(call.node.target, "overloadpacket", None)
    if packet is aten.sort:
        call.number(x.numbers)
    elif packet is not aten.argsort:
        call.escape(x)
    dim = x.axis(call["dim"])
    call.pin(x[dim], "position matters")
    outs = [[*x[:dim], call.fresh(s[dim], pin="position matters"), *x[dim + 1 :]] for s in call.shapes]
    return outs[0] if len(outs) == 1 else outs


@rule(aten.flip, aten.roll, numbers="pass")
def moved(call: Call) -> Spaces:
    """Entries change places along the given dimensions (pinned)."""
    x, dims = call["self"], call["dims"]
    for d in dims or range(len(x)):
        call.pin(x[d], "entries change places")
    return x.dims  # type: ignore[no-any-return]


@rule(aten.triu, aten.tril)
def triangle(call: Call) -> Spaces:
    """Rows and columns are compared by number."""
    x = call["self"]
    for space in x[-2:]:
        call.pin(space, "rows and columns are compared by number")
    return x.dims  # type: ignore[no-any-return]


@rule(aten.pad, aten.constant_pad_nd)
def pad(call: Call) -> Spaces:
    """Padded dimensions are pinned."""
    x, widths = call["self"], call["pad"]
    padded = len(widths) // 2
    out = list(x)
    for i in range(padded):
        d = len(x) - 1 - i
        if widths[2 * i] == 0 and widths[2 * i + 1] == 0:
            continue
        call.pin(x[d], "padded")
        out[d] = call.fresh(call.shape[d], pin="padded")
    return out
