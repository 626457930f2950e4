"""The same surgery on the eager model: the pruned network as ordinary modules, so that ``generate`` and Trainer work."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import spaces
from ..errors import CheckpointError
from ..groups import Groups
from ..passes.rewrite import slice_tensor
from ..plan import PrunePlan
from ..spaces import Axis
from .surgery import deepest_first, drop_entries, set_attribute, shorten_config

log = logging.getLogger("fxprune")

MAX_TRIES = 96


@dataclass
class Surgery:
    """An eager pruned model and what was done to it.

    Attributes:
        model: The pruned eager model.
        spec: What `fxprune.checkpoint.surgery.apply_surgery` needs to do it again on a dense one.
    """

    model: nn.Module
    spec: dict[str, Any] = field(default_factory=dict)


def operate(
    model: nn.Module,
    small: nn.Module,
    groups: Groups,
    plan: PrunePlan,
    same: Callable[[nn.Module], str | None],
    added: Sequence[str] = (),
) -> Surgery:
    """Prune the eager model itself: sliced tensors in a structural copy, then integer attributes that follow the new sizes.

    Which attributes follow is not tabulated: those equal to a pruned size (or a product of sizes) are candidates, and the smallest
    change that reproduces the rewritten graph's outputs is taken. Where that does not suffice, a module gets a view of the
    configuration with fields of its own (Phi-3 reads its number of heads there).

    Args:
        model: The dense eager model; it is not changed.
        small: The rewritten graph module; the result shares its parameters.
        groups: Its prune groups.
        plan: What to keep.
        same: Judges a candidate: None if its outputs equal the rewritten graph's, else what went wrong.
        added: Biases of the rewritten graph that the dense model does not have.

    Raises:
        CheckpointError: No assignment of attributes makes the eager model equal to the rewritten graph.
    """
    try:
        pruned = copy.deepcopy(model, _sliced_memo(model, small, groups, plan))
    except Exception as error:
        raise CheckpointError(f"this {type(model).__name__} cannot be copied: {str(error).partition(chr(10))[0]}") from error
    drop, renumber = _drop(pruned, plan)
    spec: dict[str, Any] = {"drop": drop, "renumber": renumber}
    spec["lengths"] = {path: len(model.get_submodule(path)._modules) for path in drop}
    spec["dense"] = shorten_config(pruned.config, spec) if hasattr(pruned, "config") else {}
    spec["added"] = {}
    for name, bias in new_biases(small, plan, added).items():
        path, _, leaf = name.rpartition(".")
        pruned.get_submodule(path)._parameters[leaf] = bias
        spec["added"][name] = list(bias.shape)
    spec["shapes"] = _changed(pruned.named_parameters(remove_duplicate=False), model, drop, "_parameters")
    spec["buffers"] = _changed(pruned.named_buffers(remove_duplicate=False), model, drop, "_buffers")
    changes = _widths(pruned, model, drop)
    settled = {(path, key) for path, module in pruned.named_modules() if "weight" in module._parameters for key in vars(module)}
    candidates, of_config = _candidates(pruned, quantities(groups, plan), set(spec["shapes"]), settled)
    every = {k: v for change in candidates for k, v in change.items()}
    # nothing or everything explains most plans; of the configuration's fields, as few as will do
    few = _subsets(candidates, (0, len(candidates), *range(1, len(candidates))))
    more = ({**every, **chosen} for chosen in _subsets(of_config, (1, len(of_config), *range(2, len(of_config)))))
    tries = itertools.chain(itertools.islice(few, MAX_TRIES), itertools.islice(more, MAX_TRIES if of_config else 0))
    problem = ""
    for attempt, chosen in enumerate(tries):
        undo = _set(pruned, {**changes, **chosen})
        failure = same(pruned)
        if failure is None:
            log.info("the eager model equals the graph, with %d attributes set beside its widths", len(chosen))
            spec["attributes"] = _by_module({**changes, **chosen})
            earlier = getattr(getattr(model, "config", None), "fxprune", None)
            return Surgery(pruned.eval(), spec if earlier is None else combined(earlier, spec))
        if attempt < 2:  # what stands in the way when everything follows says most
            problem = failure
        _set(pruned, undo)
    raise CheckpointError(
        f"the eager {type(model).__name__} cannot express this plan: its own forward computes something from a pruned size "
        f"({problem}). The rewritten graph_module is exact and can be used; or prune other kinds, or to a multiple (multiple=8)"
    )


def _sliced_memo(model: nn.Module, small: nn.Module, groups: Groups, plan: PrunePlan) -> dict[int, Any]:
    """A deepcopy memo that hands out the rewritten graph's parameters and sliced buffers: no dense copy is ever made."""
    choice = {groups[n].axis: units for n, units in plan.keep.items()}
    shared = dict(small.named_parameters())
    memo: dict[int, Any] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        value = groups.inference.tensors.get(groups.aliases.get(name, name))
        if id(tensor) in memo:
            continue
        if groups.aliases.get(name, name) in shared:
            memo[id(tensor)] = shared[groups.aliases.get(name, name)]
            continue
        data = tensor.detach().clone() if value is None else slice_tensor(tensor, value.dims, choice)
        memo[id(tensor)] = nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
    return memo


def sliced_state(
    model: nn.Module, small: nn.Module, groups: Groups, plan: PrunePlan, added: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The pruned state dict under the names after dropping; parameters are the rewritten graph's own, tied ones one tensor."""
    memo = _sliced_memo(model, small, groups, plan)
    drop = dropped_entries(plan)
    state = model.state_dict(keep_vars=True)
    kept = {new: memo[id(t)] for n, t in state.items() if (new := renamed(n, drop)) is not None}
    return {**kept, **new_biases(small, plan, added)}


def new_biases(small: nn.Module, plan: PrunePlan, added: Sequence[str]) -> dict[str, nn.Parameter]:
    """Biases that the dense model does not have, under their names after dropping."""
    drop = dropped_entries(plan)
    return {new: small.get_parameter(name) for name in added if (new := renamed(name, drop)) is not None}


def dropped_entries(plan: PrunePlan) -> dict[str, list[int]]:
    """The plan's dropped blocks as module list path -> entry numbers; what lies inside another dropped block goes with it."""
    drop: dict[str, list[int]] = {}
    for path in plan.drop:
        if any(path.startswith(f"{other}.") for other in plan.drop):
            continue
        parent, _, number = path.rpartition(".")
        drop.setdefault(parent, []).append(int(number))
    return drop


def combined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """One surgery on the dense model that does what two do one after the other (a per-layer model was pruned again)."""
    drop = {path: list(gone) for path, gone in first["drop"].items()}
    lengths = {**second["lengths"], **first["lengths"]}
    for path, gone in second["drop"].items():
        left = [i for i in range(lengths[path]) if i not in drop.get(path, ())]
        drop[path] = sorted([*drop.get(path, ()), *(left[i] for i in gone)])
    made: dict[str, Any] = {"drop": drop, "lengths": lengths, "renumber": {**second["renumber"], **first["renumber"]}}
    for key in ("shapes", "added", "buffers", "attributes"):
        kept = {new: v for n, v in first.get(key, {}).items() if (new := renamed(n, second["drop"])) is not None}
        made[key] = {n: {**kept.get(n, {}), **v} if key == "attributes" else v for n, v in {**kept, **second[key]}.items()}
    for name in made["added"].keys() & made["shapes"].keys():  # a bias that came with the first and was cut by the second
        made["added"][name] = made["shapes"].pop(name)
    return {**made, "dense": {**second.get("dense", {}), **first.get("dense", {})}}


def _drop(pruned: nn.Module, plan: PrunePlan) -> tuple[dict[str, list[int]], dict[str, list[str]]]:
    drop = dropped_entries(plan)
    renumber = {path: numbering(pruned.get_submodule(path)) for path in drop}
    for path in deepest_first(drop):
        drop_entries(pruned, path, drop[path], renumber[path])
    return drop, renumber


def numbering(entries: nn.Module) -> list[str]:
    """Names of integer attributes that hold, in every entry of a list, that entry's own number."""
    names: set[str] | None = None
    for number, entry in enumerate(m for m in entries._modules.values() if m is not None):
        own: dict[str, set[int]] = {}
        for module in entry.modules():
            for key, value in vars(module).items():
                if isinstance(value, int) and not isinstance(value, bool) and key != "training":
                    own.setdefault(key, set()).add(value)
        matching = {key for key, values in own.items() if values == {number}}
        names = matching if names is None else names & matching
    return sorted(names or ())


def renamed(name: str, drop: Mapping[str, list[int]]) -> str | None:
    """A dense parameter's name after entries were dropped and renumbered; None if it went with them."""
    for path in deepest_first(drop):
        found = re.match(rf"{re.escape(path)}\.(\d+)(\..*)?$", name)
        if found:
            number = int(found[1])
            if number in drop[path]:
                return None
            name = f"{path}.{number - sum(g < number for g in drop[path])}{found[2] or ''}"
    return name


def _changed(new: Iterator[tuple[str, Tensor]], model: nn.Module, drop: Mapping[str, list[int]], kind: str) -> dict[str, list[int]]:
    walk = model.named_parameters if kind == "_parameters" else model.named_buffers
    before = {renamed(n, drop): tuple(t.shape) for n, t in walk(remove_duplicate=False)}
    return {n: list(t.shape) for n, t in new if n in before and tuple(t.shape) != before[n]}


def _widths(pruned: nn.Module, model: nn.Module, drop: Mapping[str, list[int]]) -> dict[tuple[str, str], Any]:
    """Sizes that a layer keeps beside its weight (``in_features``, ``nf``, ``normalized_shape``): the weight decides them.

    An attribute follows a dimension if, in every dense module of the class that has a weight, it equals that dimension.
    """
    shapes: dict[type, list[tuple[str, nn.Module, tuple[int, ...], tuple[int, ...]]]] = {}
    dense = {renamed(n, drop): m for n, m in model.named_modules(remove_duplicate=False)}
    for path, module in pruned.named_modules():
        new, old = module._parameters.get("weight"), dense[path]._parameters.get("weight")
        if new is not None and old is not None:
            shapes.setdefault(type(module), []).append((path, module, tuple(old.shape), tuple(new.shape)))
    changes: dict[tuple[str, str], Any] = {}
    for kind, entries in shapes.items():
        for key, dims in _followed(kind, entries).items():
            for path, module, _, new_shape in entries:
                value = tuple(new_shape[d] for d in dims) if isinstance(getattr(module, key), tuple) else new_shape[dims[0]]
                if getattr(module, key) != value:
                    changes[path, key] = value
    return changes


_KNOWN: dict[type, dict[str, tuple[int, ...]]] = {
    nn.Linear: {"out_features": (0,), "in_features": (1,)},
    nn.Embedding: {"num_embeddings": (0,), "embedding_dim": (1,)},
}


def _followed(kind: type, entries: list[tuple[str, nn.Module, tuple[int, ...], tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """Attribute -> the weight's dimensions it repeats."""
    known = next((facts for base, facts in _KNOWN.items() if issubclass(kind, base)), None)
    if known is not None:
        return known
    followed: dict[str, tuple[int, ...]] = {}
    for key in vars(entries[0][1]):
        values = [vars(module).get(key) for _, module, _, _ in entries]
        if all(isinstance(v, tuple) and v == old for v, (_, _, old, _) in zip(values, entries, strict=True)):
            followed[key] = tuple(range(len(entries[0][2])))
        elif all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            ranks = min(len(old) for _, _, old, _ in entries)
            dims = [d for d in range(ranks) if all(v == e[2][d] for v, e in zip(values, entries, strict=True))]
            if len(dims) == 1 or (dims and all(len({e[3][d] for d in dims}) == 1 for e in entries)):
                followed[key] = (dims[0],)
    return followed


def quantities(groups: Groups, plan: PrunePlan) -> dict[str, list[tuple[int, int]]]:
    """For each parameter, the sizes that changed: (before, after) of every run of factors of its dimensions.

    ``(kv x group) x head_dim`` gives kv, group, head_dim, kv*group, group*head_dim and kv*group*head_dim, and so do the parts of a
    fused projection: what a configuration or a module could have stored as an integer.
    """
    counts = {groups[n].axis: len(u) for n, u in plan.keep.items()}

    def units(axis: Axis) -> int:
        return counts.get(axis, axis.size)

    found: dict[str, list[tuple[int, int]]] = {}
    for name, value in groups.inference.tensors.items():
        pairs: dict[tuple[int, int], None] = {}
        for space in value:
            for run in _runs(space):
                pair = (_whole(run, lambda a: a.size), _whole(run, units))
                if pair[0] != pair[1]:
                    pairs[pair] = None
        if pairs:
            found[name] = list(pairs)
    return found


def _runs(space: spaces.Space) -> Iterator[tuple[spaces.Space, ...]]:
    space = spaces.resolve(space)
    yield (space,)
    if isinstance(space, spaces.Product):
        n = len(space.factors)
        for start, end in itertools.combinations(range(n + 1), 2):
            yield space.factors[start:end]
        for factor in space.factors:
            yield from _runs(factor)
    elif isinstance(space, spaces.Concat):
        for part in space.parts:
            yield from _runs(part)


def _whole(run: tuple[spaces.Space, ...], units: Callable[[Axis], int]) -> int:
    return int(math.prod(spaces.kept_size(s, units) for s in run))


Change = dict[tuple[str, str], Any]

_NO_SIZE = re.compile(r"(^|_)(id|window)$")
"""Integers that count or name tokens, whatever they are equal to: what a change of them does shows on few inputs."""


def _candidates(
    pruned: nn.Module, sizes: Mapping[str, list[tuple[int, int]]], changed: set[str], settled: set[tuple[str, str]]
) -> tuple[list[Change], list[Change]]:
    """Integers near pruned parameters that equal a size that changed, one choice for each class and name.

    Returns:
        (attributes of modules, fields of the configurations that modules hold).
    """
    table: dict[tuple[str, str, int], Change] = {}
    numbers = {path: set(numbering(module)) for path, module in pruned.named_modules() if isinstance(module, nn.ModuleList)}
    paths = {n.rsplit(".", 1)[0] for n in changed}
    near = paths | {p.rsplit(".", 1)[0] for p in paths if "." in p}
    for path, module in pruned.named_modules():
        if path not in near:
            continue
        inside = [pairs for name, pairs in sizes.items() if name.startswith(f"{path}.") or name.rsplit(".", 1)[0] == path]
        options = {pair for pairs in inside for pair in pairs}
        own = dict(vars(module))
        if hasattr(own.get("config"), "to_dict") and not hasattr(module, "save_pretrained"):
            own |= {f"config.{field}": value for field, value in own["config"].to_dict().items()}
        for key, value in own.items():
            if not isinstance(value, int) or isinstance(value, bool) or (path, key) in settled or _NO_SIZE.search(key):
                continue
            if any(path.startswith(f"{entries}.") and key in keys for entries, keys in numbers.items()):
                continue
            for rank, (_, after) in enumerate(sorted(p for p in options if p[0] == value)):
                table.setdefault((type(module).__name__, key, rank), {})[path, key] = after
    return [c for (_, key, _), c in table.items() if "." not in key], [c for (_, key, _), c in table.items() if "." in key]


def _subsets(candidates: list[Change], sizes: Iterable[int]) -> Iterator[Change]:
    """Changes made of several candidates, by how many: in the order of ``sizes``."""
    for size in dict.fromkeys(sizes):
        for picks in itertools.combinations(candidates, size):
            yield {k: v for change in picks for k, v in change.items()}


def _set(model: nn.Module, changes: Mapping[tuple[str, str], Any]) -> Change:
    before = {}
    for (path, key), value in changes.items():
        before[path, key] = set_attribute(model.get_submodule(path), key, value)
    return before


def _by_module(changes: Mapping[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for (path, key), value in changes.items():
        table.setdefault(path, {})[key] = value
    return table
