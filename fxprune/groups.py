"""Prune groups: the axes of a model, each with the parameter slices that its units own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from . import spaces
from .errors import UsageError, nearest
from .names import family_of as family_of
from .names import layer_of as layer_of
from .spaces import Axis, Space

if TYPE_CHECKING:
    import networkx as nx

    from .blocks import Block
    from .passes.inference import Inference

KINDS = ("kv_heads", "query_groups", "head_dim", "ffn", "experts", "hidden", "channels", "other")
"""What an axis can be: inferred from the operators it meets, never from module names."""

LAYERS = "layers"
"""Beside the kinds of groups: whole residual blocks."""


@dataclass(frozen=True, eq=False)
class Member:
    """One parameter (or buffer) dimension that a group reaches into.

    Attributes:
        name: Name of the parameter, buffer or constant in the graph; of tied weights, the first name.
        dim: The dimension.
        shape: The tensor's shape.
        trainable: True for a parameter, False for a buffer or constant.
    """

    name: str
    dim: int
    shape: tuple[int, ...]
    trainable: bool
    space: Space = field(repr=False)
    axis: Axis = field(repr=False)

    def indices(self, units: Tensor | Sequence[int]) -> Tensor:
        """Positions along ``dim`` that the given units own.

        Args:
            units: Unit numbers, each in ``range(group.size)``.

        Returns:
            A sorted LongTensor without repeats: what is removed from this dimension when the units are.
        """
        wanted = torch.as_tensor(units, dtype=torch.long)
        owners, positions = self.incidence
        found: Tensor = torch.unique(positions[torch.isin(owners, wanted)])
        return found

    @property
    def incidence(self) -> tuple[Tensor, Tensor]:
        """(units, positions): two LongTensors, one pair for each unit that owns a position; sorted by position."""
        return spaces.incidence(self.space, self.axis)


@dataclass(frozen=True, eq=False)
class PruneGroup:
    """One axis of the model: units that can be removed one by one, everywhere at once.

    Attributes:
        name: Unique and stable: the module that holds all of its parameters, and its kind.
        kind: One of `KINDS`.
        size: Number of units.
        members: The dimensions it reaches into, in order of first use.
        prunable: False if some operator depends on the units' number or position.
        reason: Why it is not prunable; empty if it is.
        normalised: True if a mean, variance, softmax or top-k runs over the axis, so that its dense reference takes statistics
            over the kept units instead of over zeros.
        parameters_per_unit: Parameters that go when one unit of the dense model goes (the mean over units).
        least: Fewest units that must stay: a router that takes the best two of its experts needs two.
        multiple: Counts of kept units that kernels take: a grouped matmul wants rows of whole 16 bytes. A selection stops at these.
    """

    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    prunable: bool
    reason: str
    normalised: bool
    parameters_per_unit: float
    axis: Axis = field(repr=False)
    least: int = 1
    multiple: int = 1

    @property
    def layer(self) -> int | None:
        """Number of the layer that holds the group, None if it spans several."""
        return layer_of(self.name)

    @property
    def family(self) -> str:
        """The name with its layer number left out: groups of one family play one role in different layers."""
        return family_of(self.name)


class Groups(Mapping[str, PruneGroup]):
    """Every prune group of a traced model, by name, in graph order.

    Attributes:
        parameters: For each parameter (tied ones once) its spaces.
        blocks: Residual blocks that can be dropped whole, by module path.
        aliases: Other names of tied parameters, each with the first name.
    """

    def __init__(
        self, found: Inference, groups: Sequence[PruneGroup], blocks: Mapping[str, Block], aliases: Mapping[str, str]
    ) -> None:
        self.inference = found
        self.blocks = dict(blocks)
        self.aliases = dict(aliases)
        self._groups = {g.name: g for g in groups}
        self.parameters = {n: v for n, v in found.tensors.items() if isinstance(v.tensor, torch.nn.Parameter)}

    def __repr__(self) -> str:
        open_ = sum(group.prunable for group in self.values())
        return f"Groups({open_} of {len(self)} prunable, {self.total:,} parameters)"

    def __getitem__(self, name: str) -> PruneGroup:
        try:
            return self._groups[name]
        except KeyError:
            raise UsageError(f"there is no prune group '{name}'; {nearest(name, self._groups)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._groups

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __deepcopy__(self, memo: dict[int, Any]) -> Groups:
        """Themselves: a deep copy of a module takes its ``meta`` along, and groups hold nodes and example values of the trace."""
        return self

    def are_of(self, gm: GraphModule) -> bool:
        """Whether these are groups of this module's own parameters, and not of those that it was copied from."""
        name, value = next(iter(self.parameters.items()), ("", None))
        own = reduce(lambda module, piece: getattr(module, piece, None), name.split("."), cast(Any, gm))
        return value is None or own is value.tensor

    @property
    def total(self) -> int:
        """Number of parameters of the dense model, tied ones counted once."""
        return sum(cast(Tensor, v.tensor).numel() for v in self.parameters.values())

    def remaining(self, counts: Mapping[str, int], dropped: Sequence[str] = ()) -> int:
        """Parameters left when each named group keeps so many units and the dropped blocks are gone (exact)."""
        table = {self._groups[n].axis: c for n, c in counts.items()}

        def units(axis: Axis) -> int:
            return table.get(axis, axis.size)

        gone = self.parameters_of(dropped)
        return sum(
            math.prod(cast(int, spaces.kept_size(s, units)) for s in value) for n, value in self.parameters.items() if n not in gone
        )

    def parameters_of(self, dropped: Sequence[str]) -> set[str]:
        """Names of the parameters that only the given blocks use."""
        return {p for b in dropped for p in self.blocks[b].parameters}

    def fingerprint(self) -> str:
        """A hash of the parameters' names and shapes: plans of one model fit another exactly when this agrees."""
        return fingerprint_of({n: cast(Tensor, v.tensor).shape for n, v in self.parameters.items()})

    def to_networkx(self) -> nx.MultiDiGraph:
        """The coupling graph; see `fxprune.coupling.coupling_graph`."""
        from .coupling import coupling_graph

        return coupling_graph(self)


def fingerprint_of(shapes: Mapping[str, Sequence[int]]) -> str:
    """A hash of parameters' names and shapes."""
    import hashlib

    text = "\n".join(f"{n} {tuple(shape)}" for n, shape in sorted(shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build_groups(found: Inference, blocks: Mapping[str, Block], aliases: Mapping[str, str]) -> Groups:
    """Gather the axes that reach parameters into named groups."""
    members: dict[Axis, list[Member]] = {}
    late = max(found.first_use.values(), default=0) + 1
    for name in sorted(found.tensors, key=lambda n: found.first_use.get(n, late)):
        value = found.tensors[name]
        trainable = isinstance(value.tensor, torch.nn.Parameter)
        for dim, space in enumerate(value):
            for axis in dict.fromkeys(spaces.leaves(space)):
                shape = tuple(cast(Tensor, value.tensor).shape)
                members.setdefault(axis, []).append(Member(name, dim, shape, trainable, space, axis))
    taken: dict[str, int] = {}
    groups = []
    for axis, own in members.items():
        if axis.size == 0 or not any(m.trainable for m in own):
            continue
        kind = _kind(axis, own)
        scope = _scope([m.name for m in own if m.trainable])
        name = f"{scope}.{kind}" if scope else kind
        taken[name] = taken.get(name, 0) + 1
        name = name if taken[name] == 1 else f"{name}#{taken[name]}"
        groups.append(
            PruneGroup(
                name=name,
                kind=kind,
                size=axis.size,
                members=tuple(own),
                prunable=not axis.pins,
                reason=next(iter(axis.pins), ""),
                normalised="normalised" in axis.marks,
                parameters_per_unit=_per_unit(axis, own),
                axis=axis,
                least=axis.least,
                multiple=_multiple(axis, own, found),
            )
        )
    return Groups(found, groups, blocks, aliases)


def _multiple(axis: Axis, members: Sequence[Member], found: Inference) -> int:
    if "aligned" not in axis.marks:
        return 1
    width = min(cast(Tensor, found.tensors[m.name].tensor).element_size() for m in members if m.trainable)
    return max(1, 16 // width)


def _kind(axis: Axis, members: Sequence[Member]) -> str:
    marks: dict[str, Any] = {
        "experts": "experts",
        "expanded": "query_groups",
        "heads": "kv_heads",
        "embedding": "hidden",
        "residual": "hidden",
        "head_dim": "head_dim",
        "channels": "channels",
    }
    matrices = {m.name for m in members if m.trainable and len(m.shape) > 1}
    for mark, kind in marks.items():
        if mark == "expanded" and ("heads" not in axis.marks or (len(matrices) > 2 and not _among_heads(axis, members))):
            continue
        if mark in axis.marks:
            return cast(str, kind)
    return "ffn" if len(matrices) > 1 and "activated" in axis.marks else "other"


def _among_heads(axis: Axis, members: Sequence[Member]) -> bool:
    """Whether the axis shares a dimension with another one that numbers heads, as query groups do with key-value heads."""
    return any(other is not axis and "heads" in other.marks for m in members for other in spaces.leaves(m.space))


def _scope(names: Sequence[str]) -> str:
    """The deepest module that holds all the parameters."""
    paths = [n.split(".")[:-1] for n in names]
    shared: list[str] = []
    for pieces in zip(*paths, strict=False):
        if len(set(pieces)) > 1:
            break
        shared.append(pieces[0])
    return ".".join(shared)


def _per_unit(axis: Axis, members: Sequence[Member]) -> float:
    """Mean over units of the parameters that removing one unit of the dense model removes."""
    total = 0.0
    for name in {m.name for m in members if m.trainable}:
        shape = next(m.shape for m in members if m.name == name)
        left = 1.0
        for dim, n in enumerate(shape):
            owned = next((len(m.incidence[1]) for m in members if m.name == name and m.dim == dim), 0)
            left *= n - owned / axis.size
        total += math.prod(shape) - left
    return total
