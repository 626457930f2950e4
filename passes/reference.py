"""What a pruned module is compared with: the dense graph, masked.

It never slices a parameter and never uses a resize rule. Removed units' parameter slices are zero; where an operator averages,
normalises or contracts over an axis that lost units, the statistic is taken over the kept units, by masks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate

from ..errors import UsageError
from ..groups import Groups
from ..plan import PrunePlan
from ..rules import Value
from ..rules.registry import bind
from ..rules.views import OF_ANY_STRIDE
from ..sizes import SIZES
from ..spaces import Axis, Space, kept, size_of

aten: Any = torch.ops.aten


def wide_of(value: Any, dtypes: Collection[torch.dtype]) -> Any:
    """Float64 in place of one of these dtypes; anything else as it is."""
    return torch.float64 if isinstance(value, torch.dtype) and value in dtypes else value


class Reference(Interpreter):
    """The dense graph with removed parameter slices at zero and reductions over the kept units.

    Args:
        wide: Dtypes that the graph casts to, in place of which it casts to float64.
    """

    def __init__(self, gm: GraphModule, groups: Groups, plan: PrunePlan, wide: Collection[torch.dtype] = ()) -> None:
        super().__init__(gm)
        self.wide = wide
        self.groups = groups
        self.choice: dict[Axis, Tensor] = {groups[n].axis: u for n, u in plan.keep.items()}
        self.masked = _masked_tensors(groups, plan)
        self.silent = {term for path in plan.drop for term in groups.blocks[path].terms}  # x + f(x) with f(x) = 0
        self.adjusted = False

    def call_like_module(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run with the module's own calling convention."""
        graph = cast(GraphModule, self.module).graph
        codegen: Any = graph._codegen
        if not hasattr(codegen, "pytree_info"):
            names = [n.target for n in graph.nodes if n.op == "placeholder"]
            flat = [*args, *(kwargs[str(n)] for n in names[len(args) :])]
            return self.run(*flat)
        places, keywords = codegen.pytree_info.in_spec.child(0), codegen.pytree_info.in_spec.child(1)
        names = list(codegen.pytree_info.orig_args)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if missing := [name for name in names if name not in given]:
            raise UsageError(f"the graph takes {', '.join(names)}, and the inputs have no '{missing[0]}'")
        wanted = list(keywords.context) if keywords.num_children else []
        first = tuple(given[name] for name in names[: places.num_children])
        if sizes := cast(GraphModule, self.module).meta.get(SIZES):
            sizes(self.module, first, {k: given[k] for k in wanted})
        flat, _ = torch.utils._pytree.tree_flatten((first, {k: given[k] for k in wanted}))
        return self.run(*flat, enable_io_processing=False)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A parameter with its removed slices at zero."""
        return self.masked[target] if target in self.masked else super().get_attr(target, args, kwargs)

    def run_node(self, n: Node) -> Any:
        """What a node gives: zero where it is what a dropped block adds."""
        out = self._run(n)
        if n.name in self.silent:
            return torch.zeros_like(out)
        if getattr(n.target, "overloadpacket", None) in _UNDEFINED_AT_ZERO and isinstance(out, Tensor):
            value = self.groups.inference.values[n.name]
            static = [d for d, space in enumerate(value) if isinstance(size_of(space), int)]
            kept_only = _joint(out, static, value, self.keep_mask)
            if kept_only is not None:  # 0 / 0 where a unit is gone must not spread
                return out.masked_fill(~kept_only & ~out.isfinite(), 0)
        return out

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        """A node's arguments, in wide dtypes."""
        return map_aggregate(super().fetch_args_kwargs_from_env(n), lambda v: wide_of(v, self.wide))

    def _run(self, n: Node) -> Any:
        call = self.groups.inference.calls.get(n.name)
        handler = _HANDLERS.get(getattr(n.target, "overloadpacket", None)) if call is not None else None
        if handler is not None and call is not None:
            arguments = map_aggregate(bind(n), lambda m: self.env[m] if isinstance(m, Node) else wide_of(m, self.wide))
            out = handler(n.target, dict(arguments), call.arguments, self.keep_mask)
            if out is not None:
                self.adjusted = True
                return out
        if n.target in OF_ANY_STRIDE:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return OF_ANY_STRIDE[n.target](*args, **kwargs)
        return super().run_node(n)

    def keep_mask(self, space: Space) -> Tensor | None:
        """A boolean mask of the indices that stay, or None if all do."""
        index = kept(space, self.choice.get)
        if index is None:
            return None
        mask = torch.zeros(size_of(space), dtype=torch.bool)
        mask[index] = True
        return mask


def _masked_tensors(groups: Groups, plan: PrunePlan) -> dict[str, Tensor]:
    masked: dict[str, Tensor] = {}
    for group, removed in ((groups[name], units) for name, units in plan.removed().items()):
        for member in group.members:
            if member.trainable:
                tensor = groups.inference.tensors[member.name].tensor
                assert tensor is not None
                copy = masked.setdefault(member.name, tensor.detach().clone())
                copy.index_fill_(member.dim, member.indices(removed).to(copy.device), 0)
    return masked


_UNDEFINED_AT_ZERO = {
    *(aten.div, aten.true_divide, aten.reciprocal, aten.rsqrt, aten.pow, aten.addcdiv, aten.remainder, aten.fmod),
    *(aten.log, aten.log2, aten.log10, aten.logit, aten.lgamma, aten.digamma, aten.xlogy, aten.float_power, aten.special_entr),
}

MaskOf = Callable[[Space], Tensor | None]


def _dims(x: Tensor, dim: Any) -> list[int]:
    listed = range(x.dim()) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return [d % x.dim() for d in listed]


def _joint(x: Tensor, dims: list[int], spaces: Any, mask_of: MaskOf) -> Tensor | None:
    """One boolean mask, broadcastable to ``x``, of what is kept along several dimensions."""
    joint: Tensor | None = None
    for d in dims:
        mask = mask_of(spaces[d])
        if mask is not None:
            shaped = mask.to(x.device).view([-1 if i == d else 1 for i in range(x.dim())])
            joint = shaped if joint is None else joint & shaped
    return joint


def _count(x: Tensor, dims: list[int], mask: Tensor) -> float:
    full = 1.0
    for d in dims:
        full *= x.shape[d]
    return full * float(mask.double().mean())


def _mean(_: Any, a: dict[str, Any], spaces: dict[str, Any], mask_of: MaskOf) -> Any:
    x = a["self"]
    dims = _dims(x, a.get("dim"))
    mask = _joint(x, dims, spaces["self"], mask_of)
    if mask is None:
        return None
    out = (x * mask).sum(dims, keepdim=bool(a.get("keepdim"))) / _count(x, dims, mask)
    return out.to(a.get("dtype") or x.dtype)


def _sum(_: Any, a: dict[str, Any], spaces: dict[str, Any], mask_of: MaskOf) -> Any:
    x = a["self"]
    dims = _dims(x, a.get("dim"))
    mask = _joint(x, dims, spaces["self"], mask_of)
    return None if mask is None else (x * mask).sum(dims, keepdim=bool(a.get("keepdim")), dtype=a.get("dtype"))


def _norm(target: Any, a: dict[str, Any], spaces: dict[str, Any], mask_of: MaskOf) -> Any:
    x = a["self"]
    dims = _dims(x, a.get("dim"))
    mask = _joint(x, dims, spaces["self"], mask_of)
    return None if mask is None else (x * mask).pow(2).sum(dims, keepdim=bool(a.get("keepdim"))).sqrt()


def _var(target: Any, a: dict[str, Any], spaces: dict[str, Any], mask_of: MaskOf) -> Any:
    x = a["self"]
    dims, keepdim = _dims(x, a.get("dim")), bool(a.get("keepdim"))
    mask = _joint(x, dims, spaces["self"], mask_of)
    if mask is None:
        return None
    n = _count(x, dims, mask)
    correction = a["correction"] if a.get("correction") is not None else 1 if a.get("unbiased", True) else 0
    mean = (x * mask).sum(dims, keepdim=True) / n
    var = ((x - mean).pow(2) * mask).sum(dims, keepdim=keepdim) / max(n - correction, 0)
    name = target.overloadpacket
    if name is aten.var_mean:
        return var, mean if keepdim else mean.squeeze(dims)
    return var.sqrt() if name is aten.std else var


def _softmax(target: Any, a: dict[str, Any], spaces: dict[str, Any], mask_of: MaskOf) -> Any:
    x = a["self"]
    mask = _joint(x, [a["dim"] % x.dim()], spaces["self"], mask_of)
    if mask is None:
        return None
    logits = x.masked_fill(~mask, float("-inf"))
    out = torch.log_softmax(logits, a["dim"]).masked_fill(~mask, 0) if "log" in str(target) else torch.softmax(logits, a["dim"])
    return out.to(a.get("dtype") or x.dtype)


def _layer_norm(target: Any, a: dict[str, Any], spaces: dict[str, Any], mask_of: MaskOf) -> Any:
    x, rank = a["input"], len(a["normalized_shape"])
    dims = list(range(x.dim() - rank, x.dim()))
    mask = _joint(x, dims, spaces["input"], mask_of)
    if mask is None:
        return None
    n, wide = _count(x, dims, mask), x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    centred = wide
    if target.overloadpacket is not aten.rms_norm:
        centred = wide - (wide * mask).sum(dims, keepdim=True) / n
    eps = a["eps"] if a["eps"] is not None else torch.finfo(x.dtype).eps
    power = (centred.pow(2) * mask).sum(dims, keepdim=True) / n
    out = centred * mask * torch.rsqrt(power + eps)
    out = out.to(x.dtype)
    out = out if a["weight"] is None else out * a["weight"]
    return out if a.get("bias") is None else out + a["bias"]


def _native_layer_norm(target: Any, a: dict[str, Any], spaces: dict[str, Any], mask_of: MaskOf) -> Any:
    """The same with the mean and the reciprocal deviation, which a decomposed graph has besides."""
    out, x = _layer_norm(target, a, spaces, mask_of), a["input"]
    if out is None:
        return None
    dims = list(range(x.dim() - len(a["normalized_shape"]), x.dim()))
    mask = _joint(x, dims, spaces["input"], mask_of)
    assert mask is not None
    n, wide = _count(x, dims, mask), x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mean = (wide * mask).sum(dims, keepdim=True) / n
    return out, mean, torch.rsqrt(((wide - mean).pow(2) * mask).sum(dims, keepdim=True) / n + a["eps"])


def _best(target: Any, a: dict[str, Any], spaces: dict[str, Any], mask_of: MaskOf) -> Any:
    """Top-k and argmax among the kept units: the removed ones are as far from the best as can be."""
    x = a["self"]
    mask = None if a["dim"] is None or not x.dim() else _joint(x, [a["dim"] % x.dim()], spaces["self"], mask_of)
    if mask is None:
        return None
    largest = a.get("largest", target.overloadpacket is not aten.argmin)
    ends = (float("-inf"), float("inf")) if x.is_floating_point() else (torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max)
    worst = ends[0] if largest else ends[1]
    return target(**{**a, "self": x.masked_fill(~mask, worst)})


def _cumsum(target: Any, a: dict[str, Any], spaces: dict[str, Any], mask_of: MaskOf) -> Any:
    x = a["self"]
    mask = _joint(x, [a["dim"] % x.dim()], spaces["self"], mask_of) if x.dim() else None
    return None if mask is None else target(**{**a, "self": x * mask})


def _group_norm(_: Any, a: dict[str, Any], spaces: dict[str, Any], mask_of: MaskOf) -> Any:
    x, groups = a["input"], a["num_groups"]
    channel = mask_of(spaces["input"][1])
    if channel is None:
        return None
    grouped = x.reshape(x.shape[0], groups, -1)
    mask = channel.to(x.device).view(1, -1, 1).expand(1, -1, x[0, 0].numel()).reshape(1, groups, -1)
    n = mask.sum(-1, keepdim=True).clamp_min(1)
    centred = grouped - (grouped * mask).sum(-1, keepdim=True) / n
    out = centred * mask * torch.rsqrt((centred.pow(2) * mask).sum(-1, keepdim=True) / n + a["eps"])
    shape = [1, -1] + [1] * (x.dim() - 2)
    out = out.reshape(x.shape)
    out = out if a["weight"] is None else out * a["weight"].view(shape)
    return out if a["bias"] is None else out + a["bias"].view(shape)


def _batch_norm(_: Any, a: dict[str, Any], spaces: dict[str, Any], mask_of: MaskOf) -> Any:
    """In training mode, as weights are standardised: statistics of each channel over what is kept of all else."""
    x = a["input"]
    dims = [d for d in range(x.dim()) if d != 1]
    mask = _joint(x, dims, spaces["input"], mask_of) if a.get("training") else None
    if mask is None:
        return None
    n = _count(x, dims, mask)
    centred = x - (x * mask).sum(dims, keepdim=True) / n
    out = centred * mask * torch.rsqrt((centred.pow(2) * mask).sum(dims, keepdim=True) / n + a["eps"])
    shape = [1, -1] + [1] * (x.dim() - 2)
    out = out if a["weight"] is None else out * a["weight"].view(shape)
    return out if a["bias"] is None else out + a["bias"].view(shape)


def _contraction(target: Any, a: dict[str, Any], spaces: dict[str, Any], mask_of: MaskOf) -> Any:
    """Contract over the kept units only: entries that a zeroed parameter does not silence must not count.

    The first factor is masked along its last dimension: ``a @ b``, ``c + a @ b``, ``linear`` and their kin. Where the other is a
    parameter, its zeros do that already.
    """
    others = (spaces.get(k) for k in ("weight", "mat2", "batch2", "other", "vec"))
    if any(isinstance(other, Value) and isinstance(other.tensor, nn.Parameter) for other in others):
        return None
    name = next(k for k in ("batch1", "mat1", "input", "self") if isinstance(a.get(k), Tensor))
    x = a[name]
    mask = _joint(x, [x.dim() - 1], spaces[name], mask_of)
    return None if mask is None else target(**{**a, name: x * mask})


def _convolution(target: Any, a: dict[str, Any], spaces: dict[str, Any], mask_of: MaskOf) -> Any:
    """The same over input channels."""
    if isinstance(spaces["weight"], Value) and isinstance(spaces["weight"].tensor, nn.Parameter):
        return None
    x = a["input"]
    mask = _joint(x, [1], spaces["input"], mask_of)
    return None if mask is None else target(**{**a, "input": x.masked_fill(~mask, 0)})


def _einsum(target: Any, a: dict[str, Any], spaces: dict[str, Any], mask_of: MaskOf) -> Any:
    """The same for ``einsum``: every operand is masked along the letters that do not reach the output."""
    left, arrow, right = a["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    kept_letters = right if arrow else {c for c in left if left.count(c) == 1}
    tensors, changed = list(a["tensors"]), False
    for i, term in enumerate(terms):
        for position, letter in _explicit(term, tensors[i].dim()):
            mask = None if letter in kept_letters else _joint(tensors[i], [position], spaces["tensors"][i], mask_of)
            if mask is not None:
                tensors[i], changed = tensors[i] * mask, True
    return target(a["equation"], tensors) if changed else None


def _explicit(term: str, rank: int) -> list[tuple[int, str]]:
    """(dimension, letter) of an einsum term, without what an ellipsis stands for."""
    before, dots, after = term.partition("...")
    return [*enumerate(before), *((rank - len(after) + i, c) for i, c in enumerate(after))] if dots else list(enumerate(term))


def _attention(target: Any, a: dict[str, Any], spaces: dict[str, Any], mask_of: MaskOf) -> Any:
    """Queries and keys contract over the kept part of their width, and the softmax runs over all keys; the scale stays."""
    query = a["query"]
    mask = _joint(query, [query.dim() - 1], spaces["query"], mask_of)
    return None if mask is None else target(**{**a, "query": query.masked_fill(~mask, 0)})


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.mean: _mean,
    aten.sum: _sum,
    aten.var: _var,
    aten.std: _var,
    aten.var_mean: _var,
    aten.linalg_vector_norm: _norm,
    aten.norm: _norm,
    aten.softmax: _softmax,
    aten._softmax: _softmax,
    aten.log_softmax: _softmax,
    aten._log_softmax: _softmax,
    aten.layer_norm: _layer_norm,
    aten.rms_norm: _layer_norm,
    aten.native_layer_norm: _native_layer_norm,
    aten.conv1d: _convolution,
    aten.conv2d: _convolution,
    aten.conv3d: _convolution,
    aten.group_norm: _group_norm,
    aten.batch_norm: _batch_norm,
    aten.topk: _best,
    aten.argmax: _best,
    aten.argmin: _best,
    aten.cumsum: _cumsum,
    aten.scaled_dot_product_attention: _attention,
    aten.linalg_norm: _norm,
    aten.matmul: _contraction,
    aten.bmm: _contraction,
    aten.baddbmm: _contraction,
    aten.addmm: _contraction,
    aten.mm: _contraction,
    aten.mv: _contraction,
    aten.dot: _contraction,
    aten.inner: _contraction,
    aten.linear: _contraction,
    aten.einsum: _einsum,
}
