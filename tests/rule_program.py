"""A traced program with its inferred spaces, run dense, masked and pruned, and how the three are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxprune import rules
from fxprune.groups import Groups
from fxprune.passes.inference import Inference, infer, tensor_list
from fxprune.passes.rewrite import _copy, _resize, _slice_tensors
from fxprune.spaces import Axis, Space, leaves

from .space_model import kept_mask

Choice = dict[Axis, Tensor]


@dataclass
class Program:
    """A graph with its inference and example inputs."""

    gm: GraphModule
    found: Inference
    inputs: list[Tensor]

    @classmethod
    def of(cls, gm: GraphModule, inputs: list[Tensor]) -> Program:
        """Infer with free inputs and outputs."""
        return cls(gm, infer(gm, pin_inputs=False), inputs)

    @property
    def input_spaces(self) -> list[list[Space]]:
        """Spaces of every input."""
        return [self.found.values[n.name].dims for n in placeholders(self.gm)]

    @property
    def output_spaces(self) -> list[list[Space]]:
        """Spaces of every output tensor."""
        output = next(n for n in self.gm.graph.nodes if n.op == "output")
        return [v.dims for n in output.all_input_nodes for v in tensor_list(self.found.values[n.name])]

    @property
    def symbols(self) -> dict[Any, int]:
        """What the symbolic sizes of the inputs are for these inputs."""
        table = {}
        for node, tensor in zip(placeholders(self.gm), self.inputs, strict=True):
            for size, actual in zip(node.meta["val"].shape, tensor.shape, strict=True):
                if isinstance(size, torch.SymInt):
                    table[size.node.expr] = actual
        return table

    def axes(self, where: list[list[Space]] | None = None) -> list[Axis]:
        """Axes of inputs and outputs with at least two units."""
        where = [*self.input_spaces, *self.output_spaces] if where is None else where
        return [a for a in dict.fromkeys(a for dims in where for s in dims for a in leaves(s)) if a.size > 1]

    def free(self) -> list[Axis]:
        """Axes that may be pruned."""
        return [a for a in self.axes() if not a.pins]

    def slice(self, tensors: list[Tensor], where: list[list[Space]], choice: Choice) -> list[Tensor]:
        """Only the entries that stay."""
        return [_cut(t, dims, choice, self.symbols) for t, dims in zip(tensors, where, strict=True)]

    def expected(self, dense: list[Tensor], choice: Choice) -> list[Tensor]:
        """Dense outputs as they should be now: only the entries that stay, and numbers of units counted anew."""
        output = next(n for n in self.gm.graph.nodes if n.op == "output")
        values = [v for n in output.all_input_nodes for v in tensor_list(self.found.values[n.name])]
        cut = self.slice(dense, self.output_spaces, choice)
        for i, value in enumerate(values):
            if value.numbers is not None:
                cut[i] = torch.from_numpy(np.cumsum(kept_mask(value.numbers, choice, self.symbols)) - 1)[cut[i].long()]
        return cut

    def zeroed(self, choice: Choice) -> list[Tensor]:
        """The dense inputs with removed entries at zero."""
        return [self._mask(t, dims, choice) for t, dims in zip(self.inputs, self.input_spaces, strict=True)]

    def _mask(self, tensor: Tensor, dims: list[Space], choice: Choice) -> Tensor:
        tensor = tensor.clone()
        for dim, space in enumerate(dims):
            gone = np.flatnonzero(~kept_mask(space, choice, self.symbols))
            tensor.index_fill_(dim, torch.from_numpy(gone), 0)
        return tensor

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """The dense graph."""
        return _tensors(self.gm(*[t.clone() for t in inputs]))

    def run_masked(self, choice: Choice) -> list[Tensor]:
        """The dense graph with removed entries at zero after every operator, as if each were the first to be pruned."""
        program = self

        class Masked(Interpreter):
            def run_node(self, n: Node) -> Any:
                out = super().run_node(n)
                value = program.found.values.get(n.name)
                return program._mask(out, value.dims, choice) if isinstance(value, rules.Value) else out

        return _tensors(Masked(self.gm).run(*[t.clone() for t in self.inputs], enable_io_processing=False))

    def run_pruned(self, choice: Choice) -> list[Tensor]:
        """The graph as the rewrite pass resizes it, on sliced inputs."""
        groups = cast(Groups, SimpleNamespace(inference=self.found))
        graph, new = _copy(self.gm)
        _resize(self.gm, groups, graph, new, choice)
        graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        graph.lint()
        small = GraphModule(_slice_tensors(self.gm, groups, graph, choice), graph)
        return _tensors(small(*self.slice(self.inputs, self.input_spaces, choice)))

    def describe(self, axis: Axis) -> str:
        """Where an axis occurs, for messages: ``self[0], out[1]``."""
        named = [(n.name, self.found.values[n.name].dims) for n in placeholders(self.gm)]
        named += [(f"out{i}", dims) for i, dims in enumerate(self.output_spaces)]
        return ", ".join(f"{name}[{d}]" for name, dims in named for d, s in enumerate(dims) if axis in leaves(s))

    def passes_through(self, axis: Axis) -> bool:
        """True if the axis reaches an output and no statistic runs over it."""
        return "normalised" not in axis.marks and any(axis in leaves(s) for dims in self.output_spaces for s in dims)


def _cut(tensor: Tensor, dims: list[Space], choice: Choice, symbols: Mapping[Any, int]) -> Tensor:
    for dim, space in enumerate(dims):
        stay = np.flatnonzero(kept_mask(space, choice, symbols))
        tensor = tensor.index_select(dim, torch.from_numpy(stay))
    return tensor


def _tensors(value: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, Tensor)]


def placeholders(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        """Call it."""
        return self.function(*inputs)


def difference(actual: list[Tensor], expected: list[Tensor], values: bool = True) -> str:
    """What is not the same, in words; empty if nothing."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=False)):
        if a.shape != e.shape:
            return f"output {i} has shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        if values and not torch.allclose(a.to(e.dtype), e, rtol=1e-7, atol=1e-9, equal_nan=True):
            return f"output {i} is off by {float((a.to(e.dtype) - e).abs().max()):.2g}"
    return ""


def choices(axes: list[Axis], generator: torch.Generator) -> Iterator[Choice]:
    """Each axis alone, cut to a random half, to one random unit; then all of them at once, twice."""

    def some(axis: Axis, n: int) -> Tensor:
        return torch.randperm(axis.size, generator=generator)[: max(n, axis.least)].sort().values

    for axis in axes:
        yield {axis: some(axis, max(1, axis.size // 2))}
        yield {axis: some(axis, 1)}
    for _ in range(2 if len(axes) > 1 else 0):
        yield {a: some(a, int(torch.randint(1, a.size + 1, (), generator=generator))) for a in axes}
