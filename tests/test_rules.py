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
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate

from fxprune import rules
from fxprune.capture import trace
from fxprune.errors import UsageError
from fxprune.groups import Groups
from fxprune.passes.inference import Inference, infer, tensor_list
from fxprune.passes.rewrite import _copy, _resize, _slice_tensors
from fxprune.rules import Call, Resize, registered, rule, rule_for
from fxprune.rules.registry import bind
from fxprune.spaces import Axis, Space, leaves

from .rule_cases import CASES, REFERENCES, Case, Recipe, const, t
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
    arguments: Any = torch.fx.node.map_arg(bind(node.node), lambda n: cast(Any, values[n.name]))
    keep = {name: [kept_mask(s, choice) for s in value] for name, value in node.arguments.items() if isinstance(value, rules.Value)}
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
        return difference(actual, program.expected(dense, choice))
    for inputs in [program.zeroed(choice), program.inputs][: 2 if through else 1]:
        found = difference(actual, program.expected(program.run(inputs), choice), case.values)
        if found:
            return found
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


def missing(case: Case) -> dict[str, str]:
    """Pinned input axes of a case that could be pruned all the same, each with the reason for its pin.

    The rule may have given the output dimensions of their own where it gave up, so each axis is tried together with every set
    of other pinned axes of its size.
    """
    reasons: dict[str, str] = {}
    sound: dict[str, bool] = {}
    for seed in range(2):
        for sign in SIGNS:
            program = one_op(case, seed, sign)
            pinned = [a for a in program.axes() if a.pins]
            for axis in program.axes(program.input_spaces):
                if not axis.pins:
                    continue
                for together in _with_others(axis, pinned):
                    key = f"{case}: {'; '.join(sorted(map(program.describe, together)))}"
                    reasons[key] = next(iter(axis.pins)).split(" at ")[0]
                    if sound.get(key, True):
                        sound[key] = _could_be_pruned(case, program, together, torch.Generator().manual_seed(seed))
    return {key: reasons[key] for key, good in sound.items() if good}


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


MISSING: dict[str, list[str]] = {
    "the verify pass has no reference for these reductions over kept units": [
        "aten.any.default(bool[3, 4]): arg0[0]",
        "aten.any.default(bool[3, 4]): arg0[1]",
        "aten.any.dim(bool[3, 4], 1): arg0[1]",
        "aten.any.dims(bool[3, 4, 5], [0, -1], True): arg0[0]",
        "aten.any.dims(bool[3, 4, 5], [0, -1], True): arg0[2]",
        "aten.any.dims(bool[3, 4], None): arg0[0]",
        "aten.any.dims(bool[3, 4], None): arg0[1]",
        "aten.linalg_norm.default(float[3, 4], 1, [1]): arg0[1]",
        "aten.linalg_vector_norm.default(float[3, 4], 0, [1]): arg0[1]",
        "aten.linalg_vector_norm.default(float[3, 4], 1, [1]): arg0[1]",
        "aten.linalg_vector_norm.default(float[3, 4], inf, [1]): arg0[1]",
        "aten.norm.Scalar(float[3, 4], 1): arg0[0]",
        "aten.norm.Scalar(float[3, 4], 1): arg0[1]",
        "aten.norm.ScalarOpt_dim(float[3, 4], 3, [1]): arg0[1]",
    ],
    "nobody writes these no-ops and mixtures": [
        "aten.any.dims(bool[3, 4], []): arg0[0]; out0[0]",
        "aten.any.dims(bool[3, 4], []): arg0[1]; out0[1]",
        "aten.flip.default(float[4, 5], []): arg0[0], out0[0]",
        "aten.flip.default(float[4, 5], []): arg0[1], out0[1]",
        (
            "aten.scaled_dot_product_attention.default(float[2, 8, 3, 4], float[2, 4, 5, 4], float[2, 2, 5, 4], enable_gqa=True): "
            "arg0[1], out0[1]"
        ),
        "aten.tril.default(float[2, 3, 5, 5]): arg0[2], out0[2]; arg0[3], out0[3]",
    ],
    "positions are not pruned": [
        "aten.conv1d.default(float[6, 9], float[3, 2, 1], float[3], [1], [0], [1], 3): arg0[1]; out0[1]",
        "aten.conv2d.default(float[4, 7, 6], float[8, 2, 1, 1], float[8], [1, 1], [0, 0], [1, 1], 2): arg0[1]; out0[1]",
        "aten.conv2d.default(float[4, 7, 6], float[8, 2, 1, 1], float[8], [1, 1], [0, 0], [1, 1], 2): arg0[2]; out0[2]",
        "aten.index_add.default(float[4, 5, 3], -2, int[2], float[4, 2, 3], alpha=0.5): arg1[0]; arg2[1]",
        "aten.index_add.default(float[4, 5], 0, int[3], float[3, 5]): arg1[0]; arg2[0]",
        "aten.scatter.reduce(float[4, 5], 1, int[4, 3], float[4, 3], reduce=add): arg1[1]; arg2[1]",
        "aten.scatter_add.default(float[4, 5, 3], 0, int[6, 5, 3], float[6, 5, 3]): arg1[0]; arg2[0]",
        "aten.scatter_add.default(float[4, 5], 1, int[4, 3], float[4, 3]): arg1[1]; arg2[1]",
    ],
    "transposed convolutions have no rule yet": [
        "aten.convolution.default(float[2, 4, 9], float[4, 3, 3], float[6], [2], [0], [1], True, [0], 2): arg0[0]; out0[0]",
        "aten.convolution.default(float[2, 4, 9], float[4, 6, 3], float[6], [1], [0], [1], True, [0], 1): arg0[0]; out0[0]",
        "aten.convolution.default(float[2, 4, 9], float[4, 6, 3], float[6], [1], [0], [1], True, [0], 1): arg0[1]; arg1[0]",
        (
            "aten.convolution.default(float[2, 4, 9], float[4, 6, 3], float[6], [1], [0], [1], True, [0], 1): "
            "arg1[1]; arg2[0]; out0[1]"
        ),
    ],
}
"""Rules known to pin more than they need, by the excuse."""


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")
def test_no_rule_pins_more_than_is_known() -> None:
    found = {key: reason for case in CASES for key, reason in missing(case).items()}
    known = {key for keys in MISSING.values() for key in keys}
    new = [f"{key} ({reason})" for key, reason in found.items() if key not in known]
    assert not new, "axes are pinned that could be pruned; give the rule more, or add to MISSING:\n" + "\n".join(new)
    gone = sorted(known - set(found))
    assert not gone, "these entries of MISSING are no longer missing; take them out:\n" + "\n".join(gone)


def _concrete_overloads(target: Any) -> list[Any]:
    """The overloads of a registered target that a traced graph can hold: functional, tensors out, not TorchScript's own."""
    packet = isinstance(target, torch._ops.OpOverloadPacket)
    overloads = [getattr(target, name) for name in target.overloads()] if packet else [target]
    return [
        o
        for o in overloads
        if any("Tensor" in str(r.type) for r in o._schema.returns)
        and not any(a.is_out for a in o._schema.arguments)
        and not any("Dimname" in str(a.type) or "Dict" in str(a.type) for a in o._schema.arguments)
        and not o._overloadname.startswith("prim_")
    ]


NOT_ON_CPU = {aten.mm.dtype, aten.bmm.dtype, aten.addmm.dtype, aten.baddbmm.dtype}
NOT_CALLABLE = {aten.einsum.sublist}
ALIGNED = {aten._grouped_mm.default}  # has a test of its own: its kernel wants rows of a multiple of 16 bytes


def test_every_registered_overload_has_a_case() -> None:
    covered = {case.target for case in CASES}
    own = [
        target for target, r in registered().items() if str(r.propagate.__module__).startswith("fxprune.")
    ]  # not the other tests'
    wanted = {o for target in own for o in _concrete_overloads(target)} - NOT_ON_CPU - NOT_CALLABLE - ALIGNED
    assert sorted(map(str, wanted - covered)) == []
    covered |= ALIGNED
    packets = {o if isinstance(o, torch._ops.OpOverloadPacket) else o.overloadpacket for o in own}
    assert sorted(map(str, packets - {o.overloadpacket for o in covered})) == []


def test_a_misspelt_way_with_numbers_is_an_error() -> None:
    with pytest.raises(UsageError, match="'escape', 'pass' or 'own', not 'passes'"):
        rule("mylib::misspelt", numbers="passes")


def test_every_case_has_a_rule() -> None:
    assert [str(c) for c in CASES if rule_for(c.target) is None] == []


def test_grouped_mm_of_aligned_widths() -> None:
    ends = Recipe((3,), "const", constant=torch.tensor([2, 5, 8], dtype=torch.int32))
    case = Case(aten._grouped_mm.default, (Recipe((8, 16), "single"), Recipe((3, 16, 24), "single"), ends), {})
    program = one_op(case)
    inner, outer = program.free()
    assert (inner.size, outer.size) == (16, 24)
    for choice in ({inner: torch.arange(4, 12)}, {outer: torch.arange(1, 24, 2)}, {inner: torch.arange(8), outer: torch.arange(4)}):
        assert mismatch(case, program, choice, through=inner not in choice) == ""
    three = Case(aten._grouped_mm.default, (Recipe((3, 8, 16), "single"), Recipe((3, 16, 24), "single")), {})
    assert one_op(three).free() == [], "other forms are left alone"


def test_the_expert_matmul_that_transformers_defines() -> None:
    import transformers.integrations.moe  # noqa: F401 - registers the operator; the rule is there before it, by name

    case = Case(torch.ops.transformers.grouped_mm_fallback.default, (t(8, 4), t(3, 4, 5), const(2, 5, 8)), {})
    assert sorted(a.size for a in one_op(case).free()) == [4, 5]
    test_a_pruned_operator_equals_the_dense_one(case)
    assert missing(case) == {}


# ---------------------------------------------------------------------------------------------------------------------
# Symbolic sizes: small functions traced with a symbolic batch and sequence, run at other sizes than they were traced with.


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        """Call it."""
        return self.function(*inputs)


def _split_heads(x: Tensor) -> Tensor:
    b, s, _ = x.shape
    heads = x.view(b, s, 3, 4).transpose(1, 2)
    scores = torch.bmm(heads.reshape(b * 3, s, 4), heads.reshape(b * 3, s, 4).transpose(1, 2))
    return scores.view(b, 3, s, s)


def _zeros_of_batch_times_heads(x: Tensor) -> Tensor:
    b, s, _ = x.shape
    heads = x.view(b, s, 3, 4).transpose(1, 2).reshape(b * 3, s, 4)
    return torch.baddbmm(x.new_zeros(b * 3, s, s), heads, heads.transpose(1, 2)) + torch.zeros(3 * b, 1, 1)


def _merge_heads(x: Tensor) -> Tensor:
    b, s, _ = x.shape
    heads = x.view(b, s, 3, 4).transpose(1, 2).reshape(b * 3, s, 4)
    return (heads * 2).view(b, 3, s, 4).transpose(1, 2).reshape(b, s, 12)


def _repeat_kv(x: Tensor) -> Tensor:
    b, s, _ = x.shape
    return x.view(b, s, 3, 4)[:, :, :, None, :].expand(b, s, 3, 5, 4).reshape(b, s, 15, 4)


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x + torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _interleave(x: Tensor) -> Tensor:
    return x + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _windows(x: Tensor) -> Tensor:
    b, s, _ = x.shape
    return x.view(b, s, 2, 3, 2).permute(0, 2, 1, 3, 4).reshape(b * 2, s, 6)


SYMBOLIC: dict[str, tuple[Callable[..., Any], list[int]]] = {
    "split heads, batch times heads": (_split_heads, [3, 4]),
    "merge heads": (_merge_heads, [3, 4]),
    "repeat_kv": (_repeat_kv, [3, 4, 5]),
    "rotate_half": (_rotate_half, [6]),
    "interleaved pairs": (_interleave, [6]),
    "windows": (_windows, [2, 2, 3]),
    "flatten tokens": (lambda x: x.view(-1, 12).relu().view(x.shape[0], -1, 12), [12]),
    "flatten tokens, unknown size last": (lambda x: x.reshape(x.shape[0] * x.shape[1], -1), [12]),
    "flatten": (lambda x: x.flatten(0, 1), [12]),
    "unflatten": (lambda x: x.unflatten(-1, (3, 4)).flatten(2), [3, 4]),
    "narrow units": (lambda x: x.narrow(-1, 2, 4), [2, 4, 6]),
    "narrow tokens": (lambda x: x.narrow(1, 1, x.shape[1] - 1), [12]),
    "first token": (lambda x: x[:, 0], [12]),
    "last token": (lambda x: x[:, -1], [12]),
    "all but the first token": (lambda x: x[:, 1:], [12]),
    "all but the last token": (lambda x: x[:, : x.shape[1] - 1], [12]),
    "tokens split at a symbolic place": (lambda x: torch.split(x, [1, x.shape[1] - 1], dim=1)[1], [12]),
    "prepended zeros": (lambda x: torch.cat([x.new_zeros(x.shape[0], 1, 12), x], dim=1), [12]),
    "zeros of the input's size": (lambda x: torch.zeros(x.shape[0], x.shape[1], 12, dtype=x.dtype) + x, [12]),
    "causal mask": (lambda x: (x @ x.transpose(1, 2)).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), 0.0), [12]),
    "rows by number": (lambda x: x[torch.arange(x.shape[0]), -1], [12]),
    "repeated batch": (lambda x: x.repeat(2, 1, 3), [2, 3, 12]),
    "repeated tokens": (lambda x: x.repeat_interleave(2, dim=1), [2, 12]),
    "repeated flat": (lambda x: x[:, 0].repeat_interleave(2), [2, 12]),
    "repeated a symbolic number of times": (lambda x: x[:1, 0].repeat(x.shape[0], 1) + x[:, -1], [12]),
    "copies of a symbolic number": (lambda x: x[:1, 0].repeat_interleave(x.shape[0], dim=0), [12]),
    "repeated units": (lambda x: x.repeat_interleave(2, dim=-1), [2, 12]),
    "expanded to the batch": (lambda x: x[:1, :1].expand(x.shape[0], x.shape[1], 12) + x, [12]),
    "mean over tokens": (lambda x: x.mean(1, keepdim=True).squeeze(1), [12]),
    "transposed to channels first": (lambda x: x.permute(0, 2, 1).unsqueeze(-1).squeeze(-1), [12]),
    "divided by the length": (lambda x: x / x.shape[1], [12]),
    "tokens and units mixed": (lambda x: x.view(x.shape[0], 12, x.shape[1]), []),
    "tokens and units flattened": (lambda x: x.flatten(1), [12]),
    "halves of the batch": (lambda x: torch.cat(x.chunk(2, dim=-1), dim=0), [6]),
    "zeros of batch times heads": (_zeros_of_batch_times_heads, [3, 4]),
    "einsum": (lambda x: torch.einsum("bsd,btd->bst", x, x), [12]),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes(name: str) -> None:
    function, expected = SYMBOLIC[name]
    auto = torch.export.Dim.AUTO
    traced = trace(Function(function), torch.randn(2, 5, 12, dtype=torch.float64), dynamic_shapes=(({0: auto, 1: auto},),))
    program = Program.of(traced, [torch.randn(4, 7, 12, dtype=torch.float64)])
    assert len(program.symbols) == 2, "the batch and the sequence must stay symbolic"
    assert sorted(a.size for a in program.free()) == expected
    for choice in choices(program.free(), torch.Generator().manual_seed(0)):
        wanted = program.slice(program.run_masked(choice), program.output_spaces, choice)
        assert difference(program.run_pruned(choice), wanted) == "", choice


# ---------------------------------------------------------------------------------------------------------------------
# Random programs: chains of operators that rearrange, tie and contract, built by hypothesis.


class Builder:
    """A random graph under construction: every value is a node with its example tensor in ``meta["val"]``."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.graph = Graph()
        self.generator = torch.Generator().manual_seed(random.randrange(1 << 30))
        self.inputs: list[Tensor] = []
        self.values: list[Node] = []
        self.contracts = False

    def input(self, *shape: int) -> Node:
        """A new input of the graph."""
        last = next((n for n in reversed(self.graph.nodes) if n.op == "placeholder"), None)
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(f"arg{len(self.inputs)}")
        node.meta["val"] = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        self.inputs.append(node.meta["val"])
        return node

    def emit(self, target: Any, *args: Any) -> Node:
        """One operator call."""
        node = self.graph.call_function(target, args)
        numbers = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = target(*numbers)
        if isinstance(node.meta["val"], Tensor):
            self.values.append(node)
        return node

    def shape(self, node: Node) -> list[int]:
        """Of a value."""
        return list(node.meta["val"].shape)

    def finish(self) -> Program:
        """The graph with its last two values as outputs."""
        self.graph.output(tuple(self.values[-2:]))
        return Program.of(GraphModule(nn.Module(), self.graph), self.inputs)

    def step(self) -> None:
        """Append one random operator to a random recent value."""
        x = self.random.choice(self.values[-3:])
        arrange = [self.regroup, self.permute, self.slice, self.split, self.cat, self.expand, self.repeat, self.write]
        move = self.random.choice([*arrange, self.tie, self.weigh, self.sum])
        if len(self.shape(x)) > 0 and x.meta["val"].numel() <= 1500:
            move(x, self.shape(x))

    def regroup(self, x: Node, shape: list[int]) -> None:
        """A view as another random factorisation of the same volume."""
        primes = [p for n in shape for p in _primes(n)]
        if 0 in shape:
            return
        new: list[int] = []
        for p in primes:
            if new and self.random.random() < 0.5:
                new[-1] *= p
            else:
                new.append(p)
        self.emit(aten.reshape.default, x, new or [1])

    def permute(self, x: Node, shape: list[int]) -> None:
        """Dimensions in random order."""
        self.emit(aten.permute.default, x, self.random.sample(range(len(shape)), len(shape)))

    def slice(self, x: Node, shape: list[int]) -> None:
        """A random window, or every other entry."""
        dim = self.random.randrange(len(shape))
        start, end = sorted(self.random.randrange(shape[dim] + 1) for _ in range(2))
        if self.random.random() < 0.3:
            self.emit(aten.slice.Tensor, x, dim, self.random.randrange(2), None, 2)
        elif end > start:
            self.emit(aten.slice.Tensor, x, dim, start, end)

    def split(self, x: Node, shape: list[int]) -> None:
        """Two pieces, joined again the other way round."""
        dim = self.random.randrange(len(shape))
        if shape[dim] > 1:
            cut = self.random.randrange(1, shape[dim])
            pieces = self.emit(aten.split_with_sizes.default, x, [cut, shape[dim] - cut], dim)
            first, second = (self.emit(operator.getitem, pieces, i) for i in range(2))
            self.emit(aten.cat.default, [second, first], dim)

    def cat(self, x: Node, shape: list[int]) -> None:
        """Joined with itself or with a new input."""
        dim = self.random.randrange(len(shape))
        other = x if self.random.random() < 0.5 else self.input(*shape)
        self.emit(aten.cat.default, [x, other], dim)

    def write(self, x: Node, shape: list[int]) -> None:
        """A random window overwritten with a new input."""
        dim = self.random.randrange(len(shape))
        start, end = sorted(self.random.randrange(shape[dim] + 1) for _ in range(2))
        source = self.input(*shape[:dim], end - start, *shape[dim + 1 :])
        self.emit(aten.slice_scatter.default, x, source, dim, start, end)

    def tie(self, x: Node, shape: list[int]) -> None:
        """Added to another value of as many entries, viewed alike; this is where layouts meet."""
        mates = [v for v in self.values if v is not x and v.meta["val"].numel() == x.meta["val"].numel()]
        if mates:
            other = self.emit(aten.reshape.default, self.random.choice(mates), shape)
            self.emit(aten.add.Tensor, x, other)

    def weigh(self, x: Node, shape: list[int]) -> None:
        """A linear layer on the last dimension, or a product with a broadcast input."""
        if self.random.random() < 0.5:
            self.contracts = True
            self.emit(aten.linear.default, x, self.input(self.random.choice([2, 4, 6]), shape[-1]))
        else:
            self.emit(aten.mul.Tensor, x, self.input(*[self.random.choice([n, 1]) for n in shape]))

    def expand(self, x: Node, shape: list[int]) -> None:
        """A new broadcast dimension."""
        dim = self.random.randrange(len(shape) + 1)
        wide = self.emit(aten.unsqueeze.default, x, dim)
        self.emit(aten.expand.default, wide, [*shape[:dim], self.random.choice([2, 3]), *shape[dim:]])

    def repeat(self, x: Node, shape: list[int]) -> None:
        """Tiles, or neighbours repeated."""
        dim = self.random.randrange(len(shape))
        if self.random.random() < 0.5:
            self.emit(aten.repeat.default, x, [self.random.choice([1, 2]) for _ in shape])
        else:
            self.emit(aten.repeat_interleave.self_int, x, 2, dim)

    def sum(self, x: Node, shape: list[int]) -> None:
        """One dimension contracted."""
        self.contracts = True
        self.emit(aten.sum.dim_IntList, x, [self.random.randrange(len(shape))], self.random.random() < 0.5)


def _primes(n: int) -> list[int]:
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found


def test_random_programs() -> None:
    checked = 0

    @settings(max_examples=300)
    @given(st.randoms(use_true_random=False), st.integers(2, 9))
    def run(random: Random, steps: int) -> None:
        nonlocal checked
        builder = Builder(random)
        shape = [random.choice([2, 3, 4, 6]) for _ in range(random.randint(1, 3))]
        builder.values.append(builder.input(*shape))
        for _ in range(steps):
            builder.step()
        if len(builder.values) < 2:
            return
        program = builder.finish()
        for choice in choices(program.free(), builder.generator):
            actual = program.run_pruned(choice)
            for dense in [program.run_masked(choice), *([] if builder.contracts else [program.run(program.inputs)])]:
                wanted = program.slice(dense, program.output_spaces, choice)
                assert difference(actual, wanted) == "", f"{choice}\n{program.gm.graph}"
            checked += 1

    run()
    assert checked > 500, "most random programs ended up pinned: the test has lost its point"


# ---------------------------------------------------------------------------------------------------------------------
# Operators without a rule, and rules that users write.


@torch.library.custom_op("fxprune_test::fold", mutates_args=())
def fold(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """``x[.., n]`` times ``weight[n]``, summed over neighbours: ``[.., n / width]``. A size argument that must be resized."""
    out: Tensor = (x * weight).unflatten(-1, (x.shape[-1] // width, width)).sum(-1)
    return out


@fold.register_fake
def _(x: Tensor, weight: Tensor, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // width))


def _fold_case() -> Case:
    return Case(torch.ops.fxprune_test.fold.default, (Recipe((3, 12)), Recipe((12,)), 4), {})


@pytest.fixture
def own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A private copy of the registry: what a test registers is gone after it."""
    monkeypatch.setattr(rules.registry, "_RULES", dict(rules.registry._RULES))


def test_an_operator_without_a_rule_pins_everything() -> None:
    program = one_op(_fold_case())
    assert program.free() == []
    assert len(program.axes()) == 5
    assert all("there is no rule at fold_default (fxprune_test.fold)" in a.pins for a in program.axes())


@pytest.mark.usefixtures("own_rules")
def test_a_users_rule_works_with_both_halves() -> None:
    target = torch.ops.fxprune_test.fold.default

    @rule(target)
    def fold_rule(call: Call) -> list[Space]:
        x, weight = call["x"], call["weight"]
        outer, inner = call.split_product(call.unify(x[-1], weight[0]), [call.shape[-1], call["width"]])
        call.notes["inner"] = inner
        return [*x[:-1], outer]

    @fold_rule.resize
    def _(call: Resize) -> dict[str, Any]:
        return {"width": call.kept(call.notes["inner"])}

    assert rule_for(target) is fold_rule
    assert registered()[target] is fold_rule
    program = one_op(_fold_case())
    assert sorted(a.size for a in program.free()) == [3, 3, 4]
    for choice in choices(program.free(), torch.Generator().manual_seed(0)):
        through = all(map(program.passes_through, choice))
        assert mismatch(_fold_case(), program, choice, through) == ""


@pytest.mark.usefixtures("own_rules")
def test_a_users_rule_goes_before_the_pointwise_tag_and_the_packet() -> None:
    @rule(aten.add.Tensor)
    def mine(call: Call) -> Any:
        return call.give_up("my add is special")[0]

    assert rule_for(aten.add.Tensor) is mine
    program = one_op(Case(aten.add.Tensor, (Recipe((3, 4)), Recipe((3, 4))), {}))
    assert program.free() == []


def _raises(call: Call) -> Any:
    call.notes["group"] = call["x"][0]
    raise KeyError("forgotten")


@pytest.mark.usefixtures("own_rules")
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (_raises, "the rule failed (KeyError)"),
        (lambda call: call["x"].dims, "the rule does not cover this case"),
        (lambda call: call["x"].dims[:1], "the rule does not cover this case"),
        (lambda call: [call["x"].dims, call["x"].dims], "the rule does not cover this case"),
        (lambda call: None, "the rule failed (TypeError)"),
    ],
    ids=["raises", "wrong sizes", "wrong rank", "too many outputs", "nothing"],
)
def test_a_broken_rule_pins_and_leaves_the_call_alone(broken: Callable[[Call], Any], reason: str) -> None:
    made = rule(torch.ops.fxprune_test.fold.default)(broken)

    @made.resize
    def _(call: Resize) -> dict[str, Any]:
        raise AssertionError("a call that gave up must not be resized")

    program = one_op(_fold_case())
    assert program.free() == []
    assert all(any(p.startswith(reason) for p in a.pins) for a in program.axes())
    assert difference(program.run_pruned({}), program.run(program.inputs)) == ""


def test_an_output_that_is_no_tensor_keeps_its_place() -> None:
    x, weight = torch.randn(2, 3, 6), torch.randn(6)
    _, mean, scale = aten.native_layer_norm(x, [6], weight, weight, 1e-5)
    graph = Graph()
    given_nodes = [graph.placeholder(n) for n in ("grad", "x", "mean", "scale", "weight", "bias")]
    for node, tensor in zip(given_nodes, (x, x, mean, scale, weight, weight), strict=True):
        node.meta["val"] = tensor
    grad, values, *rest = given_nodes
    back = graph.call_function(aten.native_layer_norm_backward.default, (grad, values, [6], *rest, [True, False, True]))
    back.meta["val"] = aten.native_layer_norm_backward(x, x, [6], mean, scale, weight, weight, [True, False, True])
    assert back.meta["val"][1] is None
    bias = graph.call_function(operator.getitem, (back, 2))
    bias.meta["val"] = back.meta["val"][2]
    graph.output(bias)
    found = infer(GraphModule(nn.Module(), graph))
    assert found.values["getitem"].shape == [6]


def test_a_size_that_the_trace_has_specialised_pins_only_its_dimension() -> None:
    auto = torch.export.Dim.AUTO
    gm = trace(Function(lambda x: x.relu()), torch.randn(2, 5, 12), dynamic_shapes=(({0: auto, 1: auto},),))
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    assert isinstance(node.meta["val"].shape[1], torch.SymInt)
    node.meta["val"] = torch.empty(2, 5, 12)
    program = Program.of(gm, [torch.randn(4, 5, 12)])
    assert [a.size for a in program.free()] == [12]
    assert [a.size for a in program.axes() if a.pins] == [2, 5]
    placeholder = _placeholders(gm)[0]
    placeholder.meta["val"], node.meta["val"] = node.meta["val"], placeholder.meta["val"]
    program = Program.of(gm, [torch.randn(4, 5, 12)])
    assert [a.size for a in program.free()] == [12]
    assert [a.size for a in program.axes() if a.pins] == [2, 5]
