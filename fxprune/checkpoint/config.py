"""Solve for the configuration of a pruned model: no table of architectures, only integers that must come out right."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..groups import Groups
from ..plan import PrunePlan
from ..wording import listed
from .eager import dropped_entries, quantities, renamed
from .surgery import shorten_config

log = logging.getLogger("fxprune")

REFUSED = 1 << 30


class Unsolved(Exception):
    """No stock configuration gives the pruned shapes; the message says what came closest."""


def solve_config(model: nn.Module, groups: Groups, plan: PrunePlan, added: Mapping[str, tuple[int, ...]] | None = None) -> Any:
    """The stock configuration whose model has exactly the pruned parameter shapes.

    Integer fields that equal a size that changed are candidates; each is tried on a model built on the meta device, and the
    assignment with no mismatched parameter wins (coordinate descent, most plans need one round). Where these do not suffice,
    fields that are None are tried too: many classes derive a size unless it is said (GPT-2's ``n_inner``); then fields that a size
    is a multiple of. Biases that the dense model does not have are looked for behind the configuration's switches.

    Args:
        model: The dense Hugging Face model.
        groups: Its prune groups.
        plan: What to keep.
        added: Names (after dropping) and shapes of such biases; others that their switch brings along are allowed (they are zero).

    Returns:
        A new configuration; the model's own is not changed.

    Raises:
        Unsolved: There is none: widths differ between layers, or the class ties sizes together. Names the groups in the way.
    """
    if hasattr(model.config, "fxprune"):
        raise Unsolved("the model itself has the per-layer form")
    widths: dict[tuple[str, int], set[int]] = {}  # dense and mixture layers may differ in the dense model already
    for group in groups.values():
        if not any(group.name.startswith(f"{path}.") for path in plan.drop):
            kept = len(plan.keep[group.name]) if group.name in plan.keep else group.size
            widths.setdefault((group.family, group.size), set()).add(kept)
    uneven = [family for (family, _), sizes in widths.items() if len(sizes) > 1]
    if uneven:
        raise Unsolved(f"widths differ between layers ({', '.join(uneven)})")
    drop = dropped_entries(plan)
    wanted = {**_wanted_shapes(model, groups, plan, drop), **(added or {})}
    config = copy.deepcopy(model.config)
    shorten_config(config, {"drop": drop, "lengths": {p: len(list(model.get_submodule(p).children())) for p in drop}})
    options = dict(_options(config, groups, plan))
    chosen: dict[str, Any] = {}
    spare = bool(added)
    best, problem, wrong = _mismatches(model, config, chosen, wanted, spare)
    refusal = ""
    flat = [(key, value) for key, values in options.items() for value in values]
    moves = [dict([move]) for move in flat]  # one field at a time, then two: a class may refuse either change alone
    moves += [dict(pair) for pair in itertools.combinations(flat, 2) if pair[0][0] != pair[1][0]]
    unset = [{key: value} for key in _unset(config) for value in _dimensions(wanted, model)]
    switches = list(_switches(config)) if added else []
    for stage in (moves, switches, unset, list(_factors(config, groups, plan))):
        for _ in range(len(options) + 1):
            start = best
            for move in stage:
                if best == 0:
                    break
                count, why, names = _mismatches(model, config, {**chosen, **move}, wanted, spare)
                if count < best:
                    best, chosen, problem, wrong = count, {**chosen, **move}, why, names
                elif count == REFUSED and stage is moves:
                    refusal = refusal or why
            if best in (0, start):
                break
        if best == 0:
            return _with(config, chosen)
    guilty = {groups[n].family: None for n in plan.keep if any(renamed(m.name, drop) in wrong for m in groups[n].members)}
    raise Unsolved((refusal or problem) + (f" (in the way: {listed(list(guilty), 3)})" if guilty else ""))


def _wanted_shapes(model: nn.Module, groups: Groups, plan: PrunePlan, drop: Mapping[str, list[int]]) -> dict[str, tuple[int, ...]]:
    from .. import spaces

    counts = {groups[n].axis: len(u) for n, u in plan.keep.items()}
    wanted = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        value = groups.inference.tensors.get(groups.aliases.get(name, name))
        new = renamed(name, drop)
        if new is None:
            continue
        wanted[new] = (
            tuple(tensor.shape)
            if value is None
            else tuple(int(spaces.kept_size(s, lambda a: counts.get(a, a.size))) for s in value.dims)
        )
    return wanted


def _parts(config: Any) -> list[Any]:
    """A configuration and its nested ones."""
    nested = [v for v in vars(config).values() if hasattr(v, "to_dict") and hasattr(v, "model_type")]
    return [config, *nested]


def _options(config: Any, groups: Groups, plan: PrunePlan) -> Iterator[tuple[str, list[Any]]]:
    """Integer fields, and lists of integers, (dotted when nested) with the values they might have to take."""
    pairs = {pair for found in quantities(groups, plan).values() for pair in found}
    before = {b: sorted({a for x, a in pairs if x == b}) for b, _ in pairs}
    for index, part in enumerate(_parts(config)):
        prefix = "" if index == 0 else next(k for k, v in vars(config).items() if v is part) + "."
        for key, value in vars(part).items():
            if isinstance(value, int) and not isinstance(value, bool) and value in before:
                yield prefix + key, before[value]
            elif isinstance(value, list) and all(type(n) is int for n in value) and any(n in before for n in value):
                yield prefix + key, [[before[n][0] if n in before else n for n in value]]
        if getattr(part, "head_dim", None) is None:  # many classes derive it unless it is said
            width = _derived_head_dim(part)
            if width:
                yield f"{prefix}head_dim", [width]


def _factors(config: Any, groups: Groups, plan: PrunePlan) -> Iterator[dict[str, int]]:
    """Integer fields that a size is a multiple of (``expansion_ratio`` of an FFN), with what they might have to become."""
    pairs = sorted({pair for found in quantities(groups, plan).values() for pair in found})
    for key, value in vars(config).items():
        if type(value) is int and value > 1:
            units = ((before // value, after) for before, after in pairs if before % value == 0)
            yield from ({key: after // unit} for unit, after in units if after % unit == 0 and after // unit != value)


def _switches(config: Any) -> Iterator[dict[str, bool]]:
    """Switches that give a model biases, each alone and all together."""
    found = []
    for part in _parts(config):
        prefix = "" if part is config else next(k for k, v in vars(config).items() if v is part) + "."
        found += [prefix + key for key, value in vars(part).items() if value is False and "bias" in key]
    yield from ({key: True} for key in found)
    yield dict.fromkeys(found, True)


def _unset(config: Any) -> Iterator[str]:
    """Fields that a configuration leaves to its class, and that could be a size."""
    from transformers import PreTrainedConfig

    known = set(vars(PreTrainedConfig()))
    for key, value in vars(config).items():
        if value is None and key not in known and not key.endswith("_id"):
            yield key


def _dimensions(wanted: Mapping[str, tuple[int, ...]], model: nn.Module) -> list[int]:
    """Sizes that a whole dimension of a parameter takes by the pruning."""
    before = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    return sorted(
        {new for name, shape in wanted.items() for old, new in zip(before.get(name, shape), shape, strict=True) if old != new}
    )


def _derived_head_dim(part: Any) -> int | None:
    hidden, heads = getattr(part, "hidden_size", None), getattr(part, "num_attention_heads", None)
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _with(config: Any, chosen: Mapping[str, Any]) -> Any:
    made = copy.deepcopy(config)
    for key, value in chosen.items():
        *path, leaf = key.split(".")
        part = made
        for piece in path:
            part = getattr(part, piece)
        setattr(part, leaf, value)
    return made


def _mismatches(
    model: nn.Module, config: Any, chosen: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], spare: bool
) -> tuple[int, str, set[str]]:
    """How many parameters of a stock model of this configuration have another shape, what to say of that, and their names.

    With ``spare``, biases that nobody wants do not count.
    """
    try:
        made = _with(config, chosen)
        made = type(made).from_dict(made.to_dict())  # as from_pretrained would: validated
        with torch.device("meta"):
            built = type(model)(made)
    except Exception as error:  # noqa: BLE001 - a refused configuration is an answer
        text = str(error).strip().splitlines()
        return (
            REFUSED,
            f"{type(config).__name__} refuses {dict(chosen)}: {text[-1].strip()[:200] if text else type(error).__name__}",
            set(),
        )
    shapes = {n: tuple(p.shape) for n, p in built.named_parameters(remove_duplicate=False)}
    wrong = {n for n, s in wanted.items() if shapes.get(n) != s}
    wrong |= {n for n in set(shapes) - set(wanted) if not (spare and n.endswith(".bias"))}
    said = f"{len(wrong)} parameters would have another shape in a stock {type(model).__name__}" if wrong else ""
    return len(wrong), said, wrong
