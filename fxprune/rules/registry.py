"""The rule registry: what each operator says about index spaces, and how it is resized.

A rule has two halves that live side by side:

- **propagate** takes a `Call` (the operator's arguments by schema name, tensors as lists of spaces) and returns the spaces
  of the output; on the way it unifies, marks or pins spaces;
- **resize** takes a `Resize` and returns the arguments that change once the spaces have shrunk. Most operators need none.

A user's rule for a custom operator is registered the same way, and tried first:

    @fxprune.rule(torch.ops.mylib.scaled_add.default)
    def scaled_add(call):
        call.unify(call["x"][-1], call["weight"][0])
        return call["x"]

An operator without a rule pins every space it touches: the result may prune less than possible, it may never be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch.fx import Node

from .. import spaces
from ..errors import UsageError
from ..spaces import Axis, Size, Space

Spaces: TypeAlias = list[Space]


class Value(Sequence[Space]):
    """The abstract value of one tensor: a space for each dimension.

    Attributes:
        dims: One space a dimension.
        weight: True if the tensor is computed from parameters, buffers and constants alone.
        tensor: The tensor itself when it is a parameter, buffer or constant, else None.
        numbers: The space whose indices the entries are, where they are the result of a top-k or an argmax: what is left of the
            space renumbers them by itself. None for every other tensor.
        tally: ``counts`` where the entries say how often each unit was numbered, ``ends`` for their running sums; a unit that is
            gone was not numbered, and so counts nothing. None for every other tensor.
        alike: True if all entries are known to be the same (of `torch.zeros_like`), so that any will do for any other.
    """

    def __init__(
        self,
        dims: Sequence[Space],
        *,
        weight: bool = False,
        tensor: torch.Tensor | None = None,
        numbers: Space | None = None,
        tally: str | None = None,
        alike: bool = False,
    ) -> None:
        self.dims = list(dims)
        self.weight = weight
        self.tensor = tensor
        self.numbers = numbers
        self.tally = tally
        self.alike = alike

    def __getitem__(self, index: Any) -> Any:
        return self.dims[index]

    def __len__(self) -> int:
        return len(self.dims)

    @property
    def shape(self) -> list[Size]:
        """The sizes: ints, or sympy expressions for symbolic dimensions."""
        return [spaces.size_of(s) for s in self.dims]

    def axis(self, dim: int) -> int:
        """A dimension number made non-negative."""
        return dim + len(self.dims) if dim < 0 else dim


Propagate: TypeAlias = "Callable[[Call], Any]"
Resizer: TypeAlias = "Callable[[Resize], dict[str, Any] | None]"


@dataclass
class Rule:
    """Both halves of an operator's rule."""

    name: str
    propagate: Propagate
    resizer: Resizer | None = None
    numbers: str = "escape"

    def resize(self, function: Resizer) -> Resizer:
        """Decorator: attach the resize half. It is not asked about calls that gave up: those stay as they are."""
        self.resizer = lambda call: None if _GIVEN_UP in call.notes else function(call)
        return function

    def __call__(self, call: Call) -> Any:
        """Run the propagate half."""
        return self.propagate(call)


_RULES: dict[Any, Rule] = {}
_GIVEN_UP = "given up"


def rule(*targets: Any, sizes: str | None = None, numbers: str = "escape") -> Callable[[Propagate], Rule]:
    """Register a rule for operators, custom ones included; a later rule for the same operator replaces an earlier one.

    Args:
        *targets: `torch.ops` overloads (``torch.ops.aten.mm.default``), packets (``torch.ops.aten.mm``: every overload), or names
            (``"mylib::scaled_add"``: every overload of an operator that another library defines when it is imported).
        sizes: Name of an argument that lists the output's sizes (as in ``view``); it is then resized by itself.
        numbers: What becomes of tensors whose entries number the units of an axis (`Value.numbers`): ``escape`` pins that axis,
            ``pass`` hands entries on unchanged, ``own`` leaves it to the rule (`Call.number`, `Call.look_up`).

    Returns:
        A decorator that turns the propagate half into a `Rule`; its ``.resize`` attaches the other half.

    Raises:
        UsageError: ``numbers`` is none of the three, or there is no target, or one that is no operator.
    """
    odd = [t for t in targets if not isinstance(t, str | torch._ops.OpOverload | torch._ops.OpOverloadPacket) and not callable(t)]
    if not targets or odd:
        got = repr(odd[0]) if odd else "none"
        raise UsageError(f"a rule names the operators that it is for, such as torch.ops.aten.mm, got {got}")
    if numbers not in ("escape", "pass", "own"):
        raise UsageError(f"numbers= says what becomes of numbered units: 'escape', 'pass' or 'own', not {numbers!r}")

    def register(function: Propagate) -> Rule:
        made = Rule(function.__name__, function, _follow_output(sizes) if sizes else None, numbers)
        for target in targets:
            _RULES[target] = made
        return made

    return register


def rule_for(target: Any) -> Rule | None:
    """The rule of an operator, or None. An overload's own rule goes before its packet's."""
    found = _RULES.get(target) or _RULES.get(getattr(target, "overloadpacket", None))
    found = found or _RULES.get(getattr(getattr(target, "_schema", None), "name", None))
    if found is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        return _RULES["pointwise"]
    return found


def registered() -> dict[Any, Rule]:
    """Every registered operator with its rule (a copy)."""
    return {k: v for k, v in _RULES.items() if not isinstance(k, str)}


@dataclass
class Call:
    """One operator call during propagation. Index it by argument name, as in the operator's schema.

    Attributes:
        node: The fx node.
        arguments: Arguments by schema name: tensors as `Value`, symbolic ints as sympy expressions, the rest as they are.
        shapes: Sizes of each output tensor.
        notes: Spaces that the propagate half leaves for the resize half, by any name.
        numbered: For outputs whose entries number the units of a space, that space.
        tally: What the output is in terms of `Value.tally`.
        alike: Whether all entries of the output are the same.
    """

    node: Node
    arguments: dict[str, Any]
    shapes: list[list[Size]]
    notes: dict[str, Space] = field(default_factory=dict)
    numbered: dict[int, Space] = field(default_factory=dict)
    tally: str | None = None
    alike: bool = False

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or a default if the operator has none of that name."""
        return self.arguments.get(name, default)

    @property
    def shape(self) -> list[Size]:
        """Sizes of the first (mostly the only) output."""
        return self.shapes[0]

    @property
    def why(self) -> str:
        """How reasons name this call."""
        return f"{self.node.name} ({_short(self.node.target)})"

    def tensors(self) -> Iterator[Value]:
        """Every tensor argument, those in (nested) lists and tables included."""
        return _values(self.arguments)

    def unify(self, a: Space, b: Space) -> Space:
        """Tie two spaces; returns the first."""
        spaces.unify(a, b, self.why)
        return a

    def pin(self, space: Space, reason: str) -> Space:
        """Forbid pruning a space: ``reason`` completes "pinned because ..."; the call is named for you."""
        spaces.pin(space, f"{reason} at {self.why}")
        return space

    def number(self, space: Space | None, output: int = 0) -> None:
        """Say that the entries of an output are indices into a space (or, given None, that they are not)."""
        if space is not None:
            self.numbered[output] = space

    def look_up(self, space: Space, numbers: Value, reason: str) -> None:
        """Entries of a dimension are looked up (or written) by number: its space is what they number, else it is pinned."""
        if numbers.numbers is not None and spaces.size_of(numbers.numbers) == spaces.size_of(space):
            self.unify(space, numbers.numbers)
        else:
            self.escape(numbers)
            self.pin(space, reason)

    def escape(self, *values: Value) -> None:
        """Numbers are used for something that a renumbering would change: what they number is pinned."""
        for value in values:
            if value.numbers is not None:
                self.pin(value.numbers, "its units are told apart by number")

    def fresh(self, size: Size, *, pin: str | None = None, mark: str | None = None) -> Space:
        """A new space for a dimension that this call creates."""
        return spaces.fresh(size, pin=f"{pin} at {self.why}" if pin else None, mark=mark)

    def split_concat(self, space: Space, sizes: Sequence[int]) -> Spaces:
        """Cut a dimension into consecutive pieces."""
        return spaces.split_concat(space, sizes, self.why)

    def split_product(self, space: Space, sizes: Sequence[Size]) -> Spaces:
        """Read a dimension as a row-major grid."""
        return spaces.split_product(space, sizes, self.why)

    def broadcast(self, operands: Sequence[Sequence[Space]], shape: Sequence[Size]) -> Spaces:
        """Unify operands aligned at the right, as broadcasting does, and return the spaces of the result."""
        out: Spaces = []
        for i, size in enumerate(shape):
            column = [dims[i - len(shape)] for dims in operands if len(dims) >= len(shape) - i]
            full = [s for s in column if spaces.size_of(s) == size] if size != 1 else []
            if size != 1 and any(spaces.size_of(s) not in (1, size) for s in column):
                for stray in column:
                    self.pin(stray, "broadcasts to a size that cannot be followed")
            for other in full[1:]:
                self.unify(full[0], other)
            out.append(full[0] if full else self.fresh(size, pin="broadcast from nothing"))
        return out

    def give_up(self, reason: str) -> list[Spaces]:
        """Pin everything this call touches and return pinned outputs: always sound."""
        for value in self.tensors():
            for space in value:
                self.pin(space, reason)
            self.escape(value)
        self.numbered.clear()
        self.tally = None
        self.alike = False
        self.notes[_GIVEN_UP] = spaces.ONE
        return [[self.fresh(n, pin=reason) for n in shape] for shape in self.shapes]


@dataclass
class Resize:
    """One operator call during the rewrite.

    Attributes:
        node: The node in the new graph; its arguments are still the old ones.
        arguments: Old arguments by schema name; tensors as fx nodes.
        inputs: Spaces of a tensor argument, by schema name (a list of them for a tensor list).
        outputs: Spaces of each output.
        notes: What the propagate half left.
        count: How many units an axis keeps.
        emit: Inserts ``old // before * after`` for a symbolic size.
    """

    node: Node
    arguments: dict[str, Any]
    inputs: dict[str, Any]
    outputs: list[Value]
    notes: dict[str, Space]
    count: Callable[[Axis], int]
    emit: Callable[[Node, int, int], Node]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def kept(self, space: Space) -> int:
        """New size of a dimension of static size."""
        return cast(int, spaces.kept_size(space, self.count))

    def size(self, old: Any, space: Space) -> Any:
        """A size argument (an int, -1, or a symbolic fx node) as it must read after pruning ``space``."""
        factors = [f for f in _factors(space) if not isinstance(f, spaces.Sym)]
        before = spaces.size_of(spaces.product(*factors))
        after = spaces.kept_size(spaces.product(*factors), self.count)
        if before == after or (isinstance(old, int) and old == -1):
            return old
        if isinstance(old, Node):  # batch * heads and the like
            return self.emit(old, before, after)
        return old // before * after


def _factors(space: Space) -> Sequence[Space]:
    space = spaces.resolve(space)
    return [spaces.resolve(f) for f in space.factors] if isinstance(space, spaces.Product) else [space]


def _values(item: Any) -> Iterator[Value]:
    if isinstance(item, Value):
        yield item
    elif isinstance(item, list | tuple):
        for inner in item:
            yield from _values(inner)
    elif isinstance(item, dict):
        yield from _values(list(item.values()))


def _follow_output(argument: str) -> Resizer:
    def resize(call: Resize) -> dict[str, Any]:
        old = call[argument]
        return {argument: [call.size(n, s) for n, s in zip(old, call.outputs[0], strict=True)]}

    return resize


def _short(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name.removesuffix(".default")
    return getattr(target, "__name__", str(target))


def bind(node: Node) -> dict[str, Any]:
    """An fx node's arguments by schema name, defaults filled in. Never by position: overloads differ."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def rebind(node: Node, changed: dict[str, Any]) -> None:
    """Write changed arguments back into an fx node, by schema name."""
    names = [a.name for a in cast(Any, node.target)._schema.arguments]
    for name, value in changed.items():
        position = names.index(name)
        if position < len(node.args):
            node.update_arg(position, value)
        else:
            node.update_kwarg(name, value)
