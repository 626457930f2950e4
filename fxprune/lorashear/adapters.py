"""Low-rank adapters, found in the graph: products ``s B A x`` that are added to what one weight makes of the same ``x``.

Nothing here knows the names that peft gives: the two factors, their scale and the weight they adapt are read off the operators.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import UsageError
from ..groups import Groups
from ..passes.consumers import contraction

aten: Any = torch.ops.aten

_PLAIN = (  # what changes neither values nor which index is which, as far as a linear map's features go
    aten.view.default,
    aten.reshape.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
)
_TRANSPOSES = (aten.numpy_T.default, aten.t.default)


@dataclass(frozen=True)
class Adapter:
    """``W x`` became ``W x + scale * B A x``.

    Attributes:
        weight: Name of ``W``: ``[out, in]``, or ``[in, out]`` if it is ``transposed`` (``Conv1D``, and every embedding).
        a: Name of ``A``, ``[rank, in]``.
        b: Name of ``B``, ``[out, rank]``.
        bias: Name of the bias that is added to ``B A x``, None for none.
        scale: As the graph multiplies.
        transposed: How ``W`` is stored.
    """

    weight: str
    a: str
    b: str
    bias: str | None
    scale: float
    transposed: bool

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the parameters that belong to the adapter."""
        return (self.a, self.b) if self.bias is None else (self.a, self.b, self.bias)


def find_adapters(gm: GraphModule) -> dict[str, tuple[Adapter, ...]]:
    """The adapters of each adapted weight, by the weight's name, in graph order.

    Args:
        gm: What `fxprune.trace` made of a model with adapters that are neither merged nor disabled.

    Returns:
        Empty for a model without adapters. A weight has several where several are active.
    """
    found: dict[str, dict[Adapter, None]] = {}
    for node in gm.graph.nodes:
        if (sides := _sum(node)) is None:
            continue
        for whole, part in (sides, sides[::-1]):
            product, base = _product(part), _base(whole)
            if product is None or base is None:
                continue
            (x, a, b, bias, scale), (read, weight, dim) = product, base
            if x is read:
                adapter = Adapter(weight, a, b, bias, scale, transposed=dim == 0)
                found.setdefault(weight, {})[adapter] = None
    return {weight: tuple(adapters) for weight, adapters in found.items()}


def factors_of(adapters: Mapping[str, tuple[Adapter, ...]]) -> set[str]:
    """Names of every parameter that belongs to an adapter."""
    return {name for own in adapters.values() for adapter in own for name in adapter.factors}


KNOWN = (
    "LHSPG knows plain LoRA of linear maps and embeddings only (W x + s B A x), and not that of convolutions, of parameters "
    "(target_parameters) or of routers, nor DoRA (use_dora), AdaLoRA or other adapters"
)


def refuse_unknown(groups: Groups, factors: Collection[str], trained: Collection[str]) -> None:
    """Stop where trained parameters look like an adapter of a kind that `find_adapters` does not know.

    They do if an axis reaches several trained matrices and nothing else, as a rank does, while weights of the model are frozen.

    Args:
        groups: Of the model with its adapters.
        factors: Parameters of known adapters.
        trained: Parameters that the optimizer trains.

    Raises:
        UsageError: There is such an axis.
    """
    if all(name in trained or name in factors for name, value in groups.parameters.items() if len(value) > 1):
        return
    for group in groups.values():
        own = {m.name for m in group.members if m.trainable}
        matrices = [m.name for m in group.members if m.trainable and len(m.shape) > 1]
        unknown = all(name in trained and name not in factors for name in own)
        if group.kind == "other" and group.prunable and len(matrices) > 1 and unknown:
            raise UsageError(
                f"'{matrices[0]}' and '{matrices[1]}' are trained and share an axis of {group.size} with nothing else, as the "
                f"factors of an adapter do, but their product is not added to what one weight computes: {KNOWN}"
            )
    for name, value in groups.parameters.items():
        if "lora_" in name.rpartition(".weight")[0] and len(value) > 1 and name in trained and name not in factors:
            raise UsageError(f"'{name}' is trained, and its product is not added to what one linear map computes: {KNOWN}")


def update_factors(adapters: tuple[Adapter, ...], dim: int, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A weight's update ``sum s B A`` as a product whose rows are the weight's positions along a dimension.

    Args:
        adapters: Of one weight.
        dim: The dimension of the weight.
        tensors: Parameters by name.

    Returns:
        (left ``[size of dim, ranks]``, right ``[ranks, the other size]``) in float32 or better; the scale is in ``left``.
    """
    left, right = [], []
    for adapter in adapters:
        a, b = wide(tensors[adapter.a]), wide(tensors[adapter.b])
        rows_are_outputs = (dim == 0) != adapter.transposed
        left.append(adapter.scale * (b if rows_are_outputs else a.mT))
        right.append(a if rows_are_outputs else b.mT)
    return torch.cat(left, 1), torch.cat(right, 0)


def wide(tensor: Tensor) -> Tensor:
    """Detached, in float32 or better: squares of half-precision numbers would vanish."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _sum(node: Node) -> tuple[Node, Node] | None:
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return None
    first, second = node.args[:2]
    return (first, second) if isinstance(first, Node) and isinstance(second, Node) else None


def _plain(node: Node) -> Node:
    """The node whose values these are."""
    while node.target in _PLAIN and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _scaled(node: Node) -> tuple[Node, float]:
    """The node whose multiple this is, and the factor."""
    scale = 1.0
    while True:
        node = _plain(node)
        if node.target is not aten.mul.Tensor and node.target is not aten.mul.Scalar:
            return node, scale
        numbers = [v for v in node.args if isinstance(v, int | float)]
        values = [v for v in node.args if isinstance(v, Node)]
        if len(numbers) != 1 or len(values) != 1:
            return node, scale
        node, scale = values[0], scale * numbers[0]


def _map(node: Node) -> tuple[Node, Node, int] | None:
    """(what it reads, parameter node, contracted dimension) of a linear map; an embedding reads the ids as one-hot rows."""
    if node.target is not aten.embedding.default:
        return contraction(node)
    weight, ids = node.args[:2]
    dim = 0
    if isinstance(weight, Node) and weight.target in _TRANSPOSES:
        weight, dim = weight.args[0], 1
    if isinstance(weight, Node) and isinstance(ids, Node) and weight.op == "get_attr":
        return ids, weight, dim
    return None


def _product(node: Node) -> tuple[Node, str, str, str | None, float] | None:
    """(x, A, B, bias, s) of ``s (B A x + bias)``."""
    up, scale = _scaled(node)
    outer = _map(up)
    if outer is None:
        return None
    down, inner_scale = _scaled(outer[0])
    inner = _map(down)
    if inner is None or outer[2] != 1 or inner[2] != 1:
        return None
    bias = up.args[2] if up.target is aten.linear.default and len(up.args) > 2 else None
    if bias is not None and not (isinstance(bias, Node) and bias.op == "get_attr"):
        return None
    name = None if bias is None else str(bias.target)
    return _plain(inner[0]), str(inner[1].target), str(outer[1].target), name, scale * inner_scale


def _base(node: Node) -> tuple[Node, str, int] | None:
    """(x, W, contracted dimension) of ``W x``, with the products of other adapters already added to it or not."""
    node = _plain(node)
    while (sides := _sum(node)) is not None:
        rest = [whole for whole, part in (sides, sides[::-1]) if _product(part) is not None]
        if not rest:
            return None
        node = _plain(rest[0])
    found = _map(node)
    return None if found is None else (_plain(found[0]), str(found[1].target), found[2])
