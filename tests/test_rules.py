"""Every operator rule against real execution.

For each case of `rule_cases`: the spaces are inferred for a graph of that one operator, units of its axes are removed, the inputs
are sliced as their spaces say and the node is resized by its rule; what it then computes must be what the dense operator
computes, sliced as the output's spaces say. The dense operator sees removed entries

- at zero, which is what a sum over a removed unit means;
- at their full value too, where the removed axis reaches an output and is not normalised: such an axis passes through, and what
  is removed may not be felt by what stays;
- not at all, where the axis is normalised: `rule_cases.REFERENCES` computes the statistics over the kept entries.

A rule is *wrong* if these differ, *missing* if it pins an axis though ignoring the pin would give the right result. Missing ones
are allowed one by one in `MISSING`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from fxprune import rules
from fxprune.capture import trace
from fxprune.groups import Groups
from fxprune.passes.inference import Inference, infer, tensor_list
from fxprune.passes.rewrite import _copy, _resize, _slice_tensors
from fxprune.rules import Call, Resize, registered, rule, rule_for
from fxprune.rules.registry import bind
from fxprune.spaces import Axis, Space, leaves

from .rule_cases import CASES, REFERENCES, Case, Recipe
from .space_model import kept_mask

aten: Any = torch.ops.aten
Choice = dict[Axis, Tensor]
SIGNS = ("normal", "negative", "positive")


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
        return [self.found.values[n.name].dims for n in self.gm.graph.nodes if n.op == "placeholder"]

    @property
    def output_spaces(self) -> list[list[Space]]:
        """Spaces of every output tensor."""
        output = next(n for n in self.gm.graph.nodes if n.op == "output")
        return [v.dims for n in output.all_input_nodes for v in tensor_list(self.found.values[n.name])]

    @property
    def symbols(self) -> dict[Any, int]:
        """What the symbolic sizes of the inputs are for these inputs."""
        table = {}
        placeholders = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        for node, tensor in zip(placeholders, self.inputs, strict=True):
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

    def zeroed(self, choice: Choice) -> list[Tensor]:
        """The dense inputs with removed entries at zero."""
        out = []
        for tensor, dims in zip(self.inputs, self.input_spaces, strict=True):
            tensor = tensor.clone()
            for dim, space in enumerate(dims):
                gone = np.flatnonzero(~kept_mask(space, choice, self.symbols))
                tensor.index_fill_(dim, torch.from_numpy(gone), 0)
            out.append(tensor)
        return out

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """The dense graph."""
        return _tensors(self.gm(*[t.clone() for t in inputs]))

    def run_pruned(self, choice: Choice) -> list[Tensor]:
        """The graph as the rewrite pass resizes it, on sliced inputs."""
        groups = cast(Groups, SimpleNamespace(inference=self.found))
        graph, new = _copy(self.gm)
        _resize(self.gm, groups, graph, new, choice)
        graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        graph.lint()
        small = GraphModule(_slice_tensors(groups, graph, choice), graph)
        return _tensors(small(*self.slice(self.inputs, self.input_spaces, choice)))

    def describe(self, axis: Axis) -> str:
        """Where an axis occurs, for messages: ``self[0], out[1]``."""
        named = [(n.name, self.found.values[n.name].dims) for n in self.gm.graph.nodes if n.op == "placeholder"]
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


def one_op(case: Case, seed: int = 0, sign: str = "normal") -> Program:
    """The graph of one operator call; constants become buffers, other tensors inputs named after their argument."""
    generator = torch.Generator().manual_seed(seed)
    graph, root, inputs = Graph(), nn.Module(), list[Tensor]()
    concrete: dict[Node, Tensor] = {}

    def place(item: Any) -> Any:
        if not isinstance(item, Recipe):
            return item
        tensor = item.draw(generator, sign)
        if item.constant is None:
            node = graph.placeholder(f"arg{len(inputs)}")
            inputs.append(tensor)
        else:
            name = f"constant{len(concrete)}"
            root.register_buffer(name, tensor)
            node = graph.get_attr(name)
        node.meta["val"] = tensor
        concrete[node] = tensor
        return node

    args = map_aggregate(case.args, place)
    kwargs = map_aggregate(dict(case.kwargs), place)
    node = graph.call_function(case.target, cast(Any, args), cast(Any, kwargs))
    numbers = torch.fx.node.map_arg((args, kwargs), lambda n: concrete[n].clone())
    node.meta["val"] = case.target(*numbers[0], **numbers[1])
    graph.output(node)
    return Program.of(GraphModule(root, graph), inputs)


def reference(case: Case, program: Program, choice: Choice) -> list[Tensor]:
    """What a normalising operator computes over the kept entries alone."""
    (node,) = program.found.calls.values()
    compute = REFERENCES.get(case.target.overloadpacket)
    assert compute is not None, f"{case.target} marks an axis as normalised: rule_cases.REFERENCES needs an entry for it"
    values = {n.name: t.numpy() for n, t in zip(_placeholders(program.gm), program.zeroed({}), strict=True)}
    arguments = torch.fx.node.map_arg(bind(node.node), lambda n: values[n.name])
    keep = {
        name: [kept_mask(s, choice) for s in value]
        for name, value in node.arguments.items()
        if isinstance(value, rules.Value)
    }
    return [torch.from_numpy(np.asarray(out)) for out in compute(dict(arguments), keep)]


def _placeholders(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def difference(actual: list[Tensor], expected: list[Tensor], values: bool = True) -> str:
    """What is not the same, in words; empty if nothing."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=False)):
        if a.shape != e.shape:
            return f"output {i} has shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        if values and not torch.allclose(a.to(e.dtype), e, rtol=1e-7, atol=1e-9, equal_nan=True):
            return f"output {i} is off by {float((a.to(e.dtype) - e).abs().max()):.2g}"
    return ""


def mismatch(case: Case, program: Program, choice: Choice, through: bool) -> str:
    """How the pruned operator differs from every reference that applies; empty if it does not.

    ``through`` says that what is removed may not be felt by what stays, so that its full value must give the same as zero.
    """
    try:
        actual = program.run_pruned(choice)
    except Exception as error:  # noqa: BLE001 - any failure of the resized operator is a finding
        return f"it fails: {type(error).__name__}: {str(error).splitlines()[0]}"
    where = program.output_spaces
    if any("normalised" in a.marks for a in choice):
        dense = reference(case, program, choice)[: len(where)]
        return difference(actual, program.slice(dense, where, choice))
    for inputs in [program.zeroed(choice), program.inputs][: 2 if through else 1]:
        found = difference(actual, program.slice(program.run(inputs), where, choice), case.values)
        if found:
            return found
    return ""


def choices(axes: list[Axis], generator: torch.Generator) -> Iterator[Choice]:
    """Each axis alone, cut to a random half, to one random unit; then all of them at once, twice."""

    def some(axis: Axis, n: int) -> Tensor:
        return torch.randperm(axis.size, generator=generator)[:n].sort().values

    for axis in axes:
        yield {axis: some(axis, max(1, axis.size // 2))}
        yield {axis: some(axis, 1)}
    for _ in range(2 if len(axes) > 1 else 0):
        yield {a: some(a, int(torch.randint(1, a.size + 1, (), generator=generator))) for a in axes}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")
def test_a_pruned_operator_equals_the_dense_one(case: Case) -> None:
    wrong = []
    for seed, sign in enumerate(SIGNS):
        program = one_op(case, seed, sign)
        for choice in choices(program.free(), torch.Generator().manual_seed(seed)):
            found = mismatch(case, program, choice, through=all(map(program.passes_through, choice)))
            if found:
                axes = "; ".join(f"{program.describe(a)} keeps {u.tolist()} of {a.size}" for a, u in choice.items())
                wrong.append(f"{case} with {axes}: {found}")
    assert not wrong, "wrong rule:\n" + "\n".join(list(dict.fromkeys(wrong))[:8])


def missing(case: Case) -> set[str]:
    """Pinned input axes of a case that could be pruned all the same, each with the reason for its pin.

    The rule may have given the output dimensions of their own where it gave up, so each axis is tried together with every set
    of other pinned axes of its size.
    """
    sound: dict[str, bool] = {}
    for seed in range(2):
        for sign in SIGNS:
            program = one_op(case, seed, sign)
            pinned = [a for a in program.axes() if a.pins]
            for axis in program.axes(program.input_spaces):
                if not axis.pins:
                    continue
                reason = next(iter(axis.pins)).split(" at ")[0]
                for together in _with_others(axis, pinned):
                    key = f"{case}: {'; '.join(sorted(map(program.describe, together)))} ({reason})"
                    if sound.get(key, True):
                        sound[key] = _could_be_pruned(case, program, together, torch.Generator().manual_seed(seed))
    return {key for key, good in sound.items() if good}


def _with_others(axis: Axis, pinned: list[Axis]) -> Iterator[list[Axis]]:
    alike = [a for a in pinned if a is not axis and a.size == axis.size]
    for n in range(min(len(alike), 3) + 1):
        yield from ([axis, *others] for others in combinations(alike, n))


def _could_be_pruned(case: Case, program: Program, together: list[Axis], generator: torch.Generator) -> bool:
    through = any(map(program.passes_through, together))
    for choice in choices(together[:1], generator):
        (units,) = choice.values()
        try:
            if mismatch(case, program, dict.fromkeys(together, units), through):
                return False
        except (RuntimeError, IndexError):  # an output that does not follow these axes cannot be sliced by them
            return False
    return True


MISSING: dict[str, str] = {}


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")
def test_no_rule_pins_more_than_is_known() -> None:
    found = set().union(*map(missing, CASES))
    new = sorted(found - set(MISSING))
    assert not new, "axes are pinned that could be pruned; give the rule more, or add to MISSING:\n" + "\n".join(new)
    gone = sorted(set(MISSING) - found)
    assert not gone, "these entries of MISSING are no longer missing; take them out:\n" + "\n".join(gone)
