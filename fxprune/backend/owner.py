"""Names of the tensors in a compiled graph: a plan speaks of parameters by name, Dynamo's graphs only hold the tensors.

What Dynamo says about where a tensor came from (``L['self']...``) is relative to the frame: behind a graph break that may be any
submodule. So the module that the plan was made for is looked up among the live ones, and tensors are told by identity.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from ..errors import PlanError
from ..groups import fingerprint_of
from ..plan import PrunePlan

_CONSTANTS = ("fxprune_constant_", "lifted_tensor_", "_tensor_constant")
"""How a trace names tensors that belong to no module."""


@dataclass(frozen=True)
class Owner:
    """The module that a plan speaks of, as names of tensors.

    Attributes:
        module: The module itself.
        names: First name of every parameter and buffer, by the tensor's ``id``.
        aliases: Other names of tied ones, each with the first name.
        parameters: Names of the parameters.
    """

    module: nn.Module
    names: Mapping[int, str]
    aliases: Mapping[str, str]
    parameters: frozenset[str]

    def known(self, tensors: Iterable[Any]) -> int:
        """How many of the tensors are this module's own."""
        return sum(id(t) in self.names for t in tensors)


def find_owner(plan: PrunePlan, tensors: Iterable[Any], known: nn.Module | None = None) -> Owner | None:
    """The live module that has what the plan cuts and drops, and owns some of the given tensors.

    Args:
        plan: Names what it cuts.
        tensors: The graph's.
        known: What was found last time: it is tried first.

    Returns:
        None where there is such a module, but the tensors are all of others.

    Raises:
        PlanError: There is no such module, or there are several of which each owns some, or names them otherwise.
    """
    given = [t for t in tensors if isinstance(t, Tensor)]
    needed = {name for members in plan.members.values() for name, _ in members if not name.startswith(_CONSTANTS)}
    parameters = [t for t in given if isinstance(t, nn.Parameter)]
    if known is not None and (last := _owner(known)).known(parameters) == len(parameters):
        return last
    modules = [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]
    fitting = [m for m in modules if all(_has(m, n) for n in needed) and all(_has(m, path) for path in plan.drop)]
    if not fitting:
        name = next((n for n in sorted(needed) if not any(_has(m, n) for m in modules)), None)
        has = f"a parameter '{name}'" if name else "all the parameters that the plan cuts"
        raise PlanError(f"the plan was made for another model: no live module has {has}")
    owners = [o for o in map(_owner, fitting) if o.known(given)]
    exact = [o for o in owners if fingerprint_of({n: p.shape for n, p in o.module.named_parameters()}) == plan.fingerprint]
    found = exact or owners
    if not found:
        return None
    best = max(found, key=lambda o: (o.known(given), not isinstance(o.module, GraphModule)))  # a trace may have old parameters
    if any(id(t) in o.names and o.names[id(t)] != best.names.get(id(t)) for o in found for t in given):
        raise PlanError(
            "one graph has parameters of several live modules that the plan fits: compile them apart, or, if they are the same "
            "under different names, delete all but one"
        )
    return best


def _owner(module: nn.Module) -> Owner:
    names: dict[int, str] = {}
    every = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in every:
        names.setdefault(id(tensor), name)
    aliases = {name: names[id(tensor)] for name, tensor in every if name != names[id(tensor)]}
    return Owner(module, names, aliases, frozenset(n for n, _ in module.named_parameters(remove_duplicate=False)))


def _has(module: nn.Module, name: str) -> bool:
    """Whether a module has a submodule, parameter or buffer of that dotted name; looks at no property."""
    *path, leaf = name.split(".")
    current: Any = module
    for piece in path:
        current = current.__dict__.get("_modules", {}).get(piece)
        if current is None:
            return False
    tables = (current.__dict__.get(t, {}) for t in ("_parameters", "_buffers", "_modules"))
    return any(table.get(leaf) is not None for table in tables)
