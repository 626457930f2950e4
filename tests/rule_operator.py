"""One operator under test: its graph, what it should compute, and whether a pin of its rule is needed.

The dense operator sees removed entries

- at zero, which is what a sum over a removed unit means;
- at their full value too, where the removed axis reaches an output and is not normalised: such an axis passes through, and what
  is removed may not be felt by what stays;
- not at all, where the axis is normalised: `rule_references.REFERENCES` computes the statistics over the kept entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from fxprune import rules
from fxprune.rules.registry import bind
from fxprune.spaces import Axis

from .rule_program import Choice, Program, choices, difference, placeholders
from .rule_recipes import Case, Recipe
from .rule_references import REFERENCES
from .space_model import kept_mask

SIGNS = ("normal", "negative", "positive")


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
    assert compute is not None, f"{case.target} marks an axis as normalised: rule_references.REFERENCES needs an entry for it"
    values = {n.name: t.numpy() for n, t in zip(placeholders(program.gm), program.zeroed({}), strict=True)}
    arguments: Any = torch.fx.node.map_arg(bind(node.node), lambda n: cast(Any, values[n.name]))
    keep = {name: [kept_mask(s, choice) for s in value] for name, value in node.arguments.items() if isinstance(value, rules.Value)}
    return [torch.from_numpy(np.asarray(out)) for out in compute(dict(arguments), keep)]


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
