"""Operators that rearrange a tensor: view, transpose, expand, slice, split, cat and their kin."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch

from ..spaces import ONE, Size, Space, Sym, concat, leaves, product, size_of
from .registry import Call, Resize, Spaces, Value, rule

aten: Any = torch.ops.aten

OF_ANY_STRIDE = {aten.view.default: aten.reshape.default, aten.view_as.default: aten.reshape_as.default}
"""What views become where activations may be laid out otherwise than in the dense model, which a slice of weights can do."""


def segments(old: Sequence[Size], new: Sequence[Size]) -> Iterator[tuple[slice, slice]]:
    """Cut two shapes of equal volume into the smallest runs of equal product: what a view regroups.

    Sizes may be sympy expressions. ``(b, s, 12) -> (b, s, 3, 4)`` gives ``b|b, s|s, 12|(3, 4)``. Equal sizes at the end are
    matched first, so that symbolic sizes before them need not be understood.
    """
    m, n = len(old), len(new)
    while m and n and old[m - 1] == new[n - 1]:
        m, n = m - 1, n - 1
    i = j = 0
    while i < m or j < n:
        i0, j0 = i, j
        left: Size = 1
        right: Size = 1
        if i < m:
            left, i = old[i], i + 1
        if j < n:
            right, j = new[j], j + 1
        while left != right and (i < m or j < n):
            take_new = j < n and (i >= m or _divides(right, left))
            if take_new:
                right, j = right * new[j], j + 1
            else:
                left, i = left * old[i], i + 1
            left, right = sympy.expand(left) if _sym(left) else left, sympy.expand(right) if _sym(right) else right
        yield slice(i0, i), slice(j0, j)
    yield from ((slice(k, k + 1), slice(k - m + n, k - m + n + 1)) for k in range(m, len(old)))


def _sym(size: Size) -> bool:
    return not isinstance(size, int)


def _divides(small: Size, large: Size) -> bool:
    """True if ``large`` is a multiple of ``small``, so that ``small`` is the side to grow."""
    if _sym(small) or _sym(large):
        ratio = sympy.cancel(sympy.sympify(large) / small)
        return (
            bool(ratio.is_polynomial()) and all(c.is_integer for c in sympy.Poly(ratio).coeffs())
            if ratio.free_symbols
            else (bool(ratio.is_integer))
        )
    return bool(small < large)


def regroup(call: Call, dims: Sequence[Space], shape: Sequence[Size]) -> Spaces:
    """The spaces after a view of ``dims`` as ``shape``."""
    out: Spaces = []
    for old, new in segments([size_of(d) for d in dims], shape):
        flat = product(*dims[old])
        sizes = list(shape[new])
        whole = size_of(flat)
        if not sizes:
            continue  # size-1 dimensions that went away
        if (_sym(whole) or any(map(_sym, sizes))) and len(sizes) > 1 and not any(True for _ in leaves(flat)):
            out += [call.fresh(n, pin="cut from a symbolic dimension") for n in sizes]
        elif len(sizes) == 1 and _sym(sizes[0]) != _sym(whole):
            call.pin(flat, "viewed as a dimension of another nature")
            out.append(call.fresh(sizes[0], pin="viewed as a dimension of another nature"))
        else:
            out += call.split_product(flat, sizes)
    return out


@rule(aten.view.default, aten.reshape, aten._unsafe_view, sizes="size", numbers="pass")
def view(call: Call) -> Spaces:
    """Minimal segments of equal product unify as row-major Products."""
    return regroup(call, call["self"].dims, call.shape)


@view.resize
def _view(call: Resize) -> dict[str, Any]:
    name = "shape" if "shape" in call.arguments else "size"
    return {name: [call.size(n, s) for n, s in zip(call[name], call.outputs[0], strict=True)]}


@rule(aten.flatten.using_ints, aten.ravel, numbers="pass")
def flatten(call: Call) -> Spaces:
    """A view whose sizes follow from its input."""
    return regroup(call, call["self"].dims, call.shape)


@rule(aten.view_as, aten.reshape_as, numbers="pass")
def view_as(call: Call) -> Spaces:
    """A view whose sizes follow from another tensor."""
    out = regroup(call, call["self"].dims, call.shape)
    return [call.unify(mine, theirs) for mine, theirs in zip(out, call["other"], strict=True)]


@rule(aten.unflatten.int, sizes=None, numbers="pass")
def unflatten(call: Call) -> Spaces:
    """A view of one dimension."""
    return regroup(call, call["self"].dims, call.shape)


@unflatten.resize
def _unflatten(call: Resize) -> dict[str, Any]:
    x = call.inputs["self"]
    made = call.outputs[0][x.axis(call["dim"]) :]
    return {"sizes": [call.size(n, s) for n, s in zip(call["sizes"], made, strict=False)]}


@rule(aten.transpose.int, aten.swapaxes, aten.swapdims, numbers="pass")
def transpose(call: Call) -> Spaces:
    """Two dimensions trade places."""
    x = call["self"]
    names = [n for n in ("dim0", "axis0") if call.get(n) is not None], [n for n in ("dim1", "axis1") if call.get(n) is not None]
    a, b = x.axis(call[names[0][0]]), x.axis(call[names[1][0]])
    dims = list(x)
    dims[a], dims[b] = dims[b], dims[a]
    return dims


@rule(aten.t, aten.numpy_T, aten.mT, aten.adjoint, aten.mH, numbers="pass")
def turned(call: Call) -> Spaces:
    """Reversed dimensions (``t``, ``.T``), or the last two swapped (``.mT``)."""
    x = call["self"]
    if getattr(call.node.target, "overloadpacket", None) in (aten.t, aten.numpy_T):
        return x[::-1]  # type: ignore[no-any-return]
    return [*x[:-2], x[-1], x[-2]]


@rule(aten.permute, numbers="pass")
def permute(call: Call) -> Spaces:
    """Reordered dimensions."""
    return [call["self"][d] for d in call["dims"]]


@rule(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist, numbers="pass")
def movedim(call: Call) -> Spaces:
    """Dimensions moved to other places."""
    x = call["self"]
    source, target = ([n] if isinstance(n, int) else list(n) for n in (call["source"], call["destination"]))
    moved = {x.axis(t): x.axis(s) for s, t in zip(source, target, strict=True)}
    rest = iter(d for d in range(len(x)) if d not in moved.values())
    return [x[moved[i]] if i in moved else x[next(rest)] for i in range(len(x))]


@rule(aten.unsqueeze, numbers="pass")
def unsqueeze(call: Call) -> Spaces:
    """A new dimension of size 1."""
    x, dim = call["self"], call["dim"]
    at = dim if dim >= 0 else dim + len(x) + 1
    return [*x[:at], ONE, *x[at:]]


@rule(aten.squeeze, numbers="pass")
def squeeze(call: Call) -> Spaces:
    """Dimensions of size 1 go away; which ones is fixed by the dense model."""
    x = call["self"]
    gone = _vanishing(x, call.get("dim"))
    return [s for i, s in enumerate(x) if i not in gone]


@squeeze.resize
def _squeeze(call: Resize) -> dict[str, Any]:
    """Name the dimensions: one that pruning brings down to size 1 must not vanish too."""
    gone = _vanishing(call.inputs["self"], call.arguments.get("dim"))
    call.node.target = aten.squeeze.dims
    call.node.args, call.node.kwargs = (call["self"], gone), {}
    return {}


def _vanishing(x: Value, dim: int | Sequence[int] | None) -> list[int]:
    named = range(len(x)) if dim is None else [x.axis(d) for d in ([dim] if isinstance(dim, int) else dim)]
    return [i for i, size in enumerate(x.shape) if i in named and size == 1]


@rule(aten.expand, aten.broadcast_to, sizes="size", numbers="pass")
def expand(call: Call) -> Spaces:
    """A broadcast dimension becomes a new axis: this is how the query groups of GQA appear."""
    x = call["self"]
    missing = len(call.shape) - len(x)
    out: Spaces = []
    for i, size in enumerate(call.shape):
        old = x[i - missing] if i >= missing else ONE
        out.append(old if size_of(old) == size and size != 1 else call.fresh(size, mark="expanded"))
    return out


@rule(aten.expand_as, numbers="pass")
def expand_as(call: Call) -> Spaces:
    """Broadcast to another tensor's shape, which the result follows."""
    return call.broadcast([call["self"], call["other"]], call.shape)


@rule(aten.repeat, numbers="pass")
def repeat(call: Call) -> Spaces:
    """Tiles: Product(new, old)."""
    x, times = call["self"], call["repeats"]
    dims = [ONE] * (len(times) - len(x)) + list(x)
    for i, n in enumerate(times):
        call.notes[f"tiles {i}"] = call.fresh(n, mark="expanded")
    return [product(call.notes[f"tiles {i}"], s) for i, s in enumerate(dims)]


@repeat.resize
def _repeat(call: Resize) -> dict[str, Any]:
    return {"repeats": [call.size(n, call.notes[f"tiles {i}"]) for i, n in enumerate(call["repeats"])]}


@rule(aten.repeat_interleave.self_int, numbers="pass")
def repeat_interleave(call: Call) -> Spaces:
    """Each entry several times: Product(old, new). Without a dimension, of the flattened tensor."""
    x, dim = call["self"], call["dim"]
    call.notes["copies"] = copies = call.fresh(call["repeats"], mark="expanded")
    if dim is None:
        return [product(*x, copies)]
    at = x.axis(dim)
    return [*x[:at], product(x[at], copies), *x[at + 1 :]]


@repeat_interleave.resize
def _repeat_interleave(call: Resize) -> dict[str, Any]:
    changed = {"repeats": call.size(call["repeats"], call.notes["copies"])}
    if call["output_size"] is not None:
        dim = call["dim"]
        made = call.outputs[0][0 if dim is None else call.inputs["self"].axis(dim)]
        changed["output_size"] = call.size(call["output_size"], made)
    return changed


def _window(call: Any, x: Any) -> tuple[int, int, int, int] | None:
    """Static ``(start, end, step, size)`` of a slice, clamped as Python does; None if the dimension is symbolic."""
    size = size_of(x[x.axis(call["dim"])])
    start, end, step = call["start"], call["end"], call["step"]
    start, end = 0 if start is None else start, sys.maxsize if end is None else end
    if not all(isinstance(n, int) for n in (size, start, end, step)):
        return None
    begin, stop, _ = slice(start, end).indices(size)
    return begin, max(begin, stop), step, size


@rule(aten.slice.Tensor, numbers="pass")
def slice_(call: Call) -> Spaces:
    """A window is one part of a Concat; every k-th entry is the outer factor of Product(n/k, k)."""
    x = call["self"]
    dim = x.axis(call["dim"])
    return [*x[:dim], _piece(call, call.shape[dim]), *x[dim + 1 :]]


def _piece(call: Call, taken: Size) -> Space:
    """The part of a dimension that a slice of ``taken`` entries covers."""
    x = call["self"]
    space, window = x[x.axis(call["dim"])], _window(call, x)
    if window is None:
        call.pin(space, "a slice with a symbolic bound")
        return call.fresh(taken, pin="a slice with a symbolic bound")
    start, end, step, size = window
    if (start, end, step) == (0, size, 1):
        return space  # type: ignore[no-any-return]
    if start == end:
        return call.fresh(0)
    if step == 1:
        parts = call.split_concat(space, [n for n in (start, end - start, size - end) if n])
        if start:
            call.notes["before"] = parts[0]
        return parts[1 if start else 0]
    if end == size and size % step == 0 and start < step:
        out, inner = call.split_product(space, [size // step, step])
        call.pin(inner, "every k-th entry is taken")
        return out
    call.pin(space, "an uneven strided slice")
    return call.fresh(taken, pin="an uneven strided slice")


@slice_.resize
def _slice(call: Resize) -> dict[str, Any]:
    x = call.inputs["self"]
    window = _window(call, x)
    if window is None or window[2] != 1:
        return {}
    start, end, _, size = window
    if (start, end) == (0, size):
        return {}
    if start == end:
        return {"start": 0, "end": 0}
    dim = x.axis(call["dim"])
    taken = call.inputs["src"] if "src" in call.inputs else call.outputs[0]
    before = call.kept(call.notes["before"]) if start else 0
    return {"start": before, "end": before + call.kept(taken[dim])}


@rule(aten.slice_scatter)
def slice_scatter(call: Call) -> Spaces:
    """A window is overwritten (what ``x[..., a:b] = y`` becomes)."""
    x, source = call["self"], call["src"]
    dim = x.axis(call["dim"])
    for d, space in enumerate(source):
        call.unify(_piece(call, size_of(space)) if d == dim else x[d], space)
    return x.dims  # type: ignore[no-any-return]


slice_scatter.resize(_slice)


@rule(aten.narrow.default, numbers="pass")
def narrow(call: Call) -> Spaces:
    """A window by start and length."""
    x = call["self"]
    dim, start, length = x.axis(call["dim"]), call["start"], call["length"]
    size = size_of(x[dim])
    if any(map(_sym, (size, start, length))):
        call.pin(x[dim], "a slice with a symbolic bound")
        return [*x[:dim], call.fresh(length, pin="a slice with a symbolic bound"), *x[dim + 1 :]]
    start = start + size if start < 0 else start
    parts = call.split_concat(x[dim], [n for n in (start, length, size - start - length) if n])
    if start:
        call.notes["before"] = parts[0]
    return [*x[:dim], parts[1 if start else 0] if length else call.fresh(0), *x[dim + 1 :]]


@narrow.resize
def _narrow(call: Resize) -> dict[str, Any]:
    dim = call.inputs["self"].axis(call["dim"])
    if _sym(size_of(call.outputs[0][dim])) or _sym(size_of(call.inputs["self"][dim])):
        return {}
    return {"start": call.kept(call.notes["before"]) if "before" in call.notes else 0, "length": call.kept(call.outputs[0][dim])}


@rule(
    aten.split.Tensor,
    aten.split_with_sizes,
    aten.split.sizes,
    aten.chunk,
    aten.unsafe_split.Tensor,
    aten.tensor_split.sections,
    numbers="pass",
)
def split(call: Call) -> list[Spaces]:
    """Consecutive pieces: the parts of a Concat."""
    x = call["self"]
    dim = x.axis(call["dim"])
    sizes = [shape[dim] for shape in call.shapes]
    if any(map(_sym, sizes)):
        call.pin(x[dim], "a split into symbolic sizes")
        parts = [call.fresh(n, pin="a split into symbolic sizes") for n in sizes]
    else:
        parts = call.split_concat(x[dim], sizes)
    return [[*x[:dim], part, *x[dim + 1 :]] for part in parts]


@split.resize
def _split(call: Resize) -> dict[str, Any]:
    dim = call.inputs["self"].axis(call["dim"])
    if any(_sym(size_of(out[dim])) for out in call.outputs):
        return {}
    sizes = [call.kept(out[dim]) for out in call.outputs]
    call.node.target = aten.split_with_sizes.default
    call.node.args, call.node.kwargs = (call["self"], sizes, call["dim"]), {}
    return {}


@rule(aten.cat, aten.concat.default, aten.concatenate.default, numbers="pass")
def cat(call: Call) -> Spaces:
    """One after another: a Concat; the other dimensions unify."""
    operands = [t for t in call["tensors"] if not (len(t) == 1 and len(call.shape) > 1)]
    dim = call["dim"] + len(call.shape) if call["dim"] < 0 else call["dim"]
    out: Spaces = []
    for i, size in enumerate(call.shape):
        column = [t[i] for t in operands]
        if i != dim:
            out.append(call.broadcast([[s] for s in column], [size])[0])
        elif _sym(size):
            for s in column:
                call.pin(s, "concatenated with a symbolic dimension")
            out.append(Sym(size))
        else:
            out.append(concat(*column))
    return out


@rule(aten.stack, numbers="pass")
def stack(call: Call) -> Spaces:
    """A new dimension that numbers the operands (pinned); theirs unify."""
    dim = call["dim"] + len(call.shape) if call["dim"] < 0 else call["dim"]
    rest = call.broadcast(call["tensors"], [n for i, n in enumerate(call.shape) if i != dim])
    return [*rest[:dim], call.fresh(call.shape[dim], pin="numbers stacked tensors"), *rest[dim:]]


@rule(aten.view_as_complex)
def view_as_complex(call: Call) -> Spaces:
    """The last dimension of size 2 becomes the complex number."""
    x = call["self"]
    call.pin(x[-1], "real and imaginary part")
    return x[:-1]  # type: ignore[no-any-return]


@view_as_complex.resize
def _view_as_complex(call: Resize) -> dict[str, Any]:
    """A slice of weights can leave activations with strides that this view does not take."""
    with call.node.graph.inserting_before(call.node):
        whole = call.node.graph.call_function(aten.clone.default, (call["self"],), {"memory_format": torch.contiguous_format})
    return {"self": whole}


@rule(aten.view_as_real)
def view_as_real(call: Call) -> Spaces:
    """A new last dimension of size 2."""
    return [*call["self"], call.fresh(2, pin="real and imaginary part")]
