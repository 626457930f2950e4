"""Recipes: named settings of `fxprune.prune`, as mappings of its keyword arguments, and recipe files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from .errors import RecipeError, UsageError, nearest

RecipeLike: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | None"

SETTINGS: dict[str, Any] = {
    "criterion": "taylor2",
    "aggregation": "sum",
    "compensation": "none",
    "layers_by": "influence",
    "samples": 32,
    "length": 128,
    "batch_size": 8,
    "levels": 4,
    "sensitivity_samples": 8,
    "rounds": 1,
    "kinds": ("kv_heads", "query_groups", "ffn"),
    "ranking": "local",
    "widths": "uniform",
    "protect_first": 0,
    "protect_last": 0,
    "protect": (),
    "multiple": 1,
    "floor": 0.0,
    "stock": False,
}
"""Every setting of a recipe, with what it is where a recipe does not say; each is a keyword of `fxprune.prune`."""

HEADS_AND_FFN = ("kv_heads", "ffn")

SEARCHED = {
    "criterion": "kfac",
    "ranking": "measured",
    "kinds": {"kv_heads": 0.5, "ffn": 1.0},  # on the side of caution, not tuned: there are few heads
    "compensation": "least-squares",
    "samples": 128,
    "batch_size": 4,
    "rounds": 4,
}

RECIPES: dict[str, dict[str, Any]] = {
    "default": {**SEARCHED, "widths": "per-layer"},
    "uniform": {**SEARCHED, "rounds": 1, "stock": True},  # two lanes, each measured through the whole model: one part will do
    "llm-pruner": {
        "criterion": "taylor1",
        "kinds": HEADS_AND_FFN,
        "widths": "per-layer",
        "protect_first": 4,
        "protect_last": 2,
        "samples": 10,
        "length": 64,
        "batch_size": 10,
    },
    "wanda-sp": {"criterion": "wanda", "kinds": HEADS_AND_FFN, "samples": 128},
    "flap": {
        "criterion": "flap",
        "ranking": "standardised",
        "kinds": HEADS_AND_FFN,
        "widths": "per-layer",
        "compensation": "bias",
        "samples": 128,
    },
    "magnitude": {"criterion": "l2", "kinds": HEADS_AND_FFN},
    "random": {"criterion": "random", "kinds": HEADS_AND_FFN},
    "channel": {"criterion": "taylor1", "kinds": ("hidden",), "samples": 10, "length": 64, "batch_size": 10},
}
"""``default`` spreads the budget by measured divergence and compensates; ``uniform`` does so with one width for all layers, which
stock classes load. ``llm-pruner`` (blocks, the first four and last two layers whole, ten samples) and ``channel`` are LLM-Pruner's
(arXiv 2305.11627, section 4.1); ``wanda-sp`` and ``flap`` follow the FLAP paper (arXiv 2312.11983, sections 3 and 4): a head's
score is the sum over its features, where the authors' code squares and averages them.
"""

_SHEARING: dict[str, Any] = {
    "kinds": HEADS_AND_FFN,
    "widths": "per-layer",
    "protect_first": 0,
    "protect_last": 0,
    "protect": (),
    "multiple": 1,
    "floor": 0.0,
    "protect_share": 0.1,
    "knowledge_by": "loss",
    "knowledge_samples": 32,
    "knowledge_length": 128,
    "shear_share": 0.3,
    "warmup_share": 0.2,
    "periods": 4,
    "one_shot": False,
    "projection": "half-space",
    "penalty": 1e-3,
    "epsilon": 0.0,
    "saliency": ("magnitude", "average", "cosine", "taylor1", "taylor2"),
    "criterion_samples": 128,
    "curriculum": "dynamic",
    "rounds": 4,
    "source_floor": 0.05,
    "patience": 1,
    "threshold": 0.0,
    "stage_shares": None,
}

SHEARINGS: dict[str, dict[str, Any]] = {
    "default": {**_SHEARING, "criterion": "auto"},
    "lorashear": {**_SHEARING, "criterion": "saliency"},
}
"""Recipes of `fxprune.shear`, every setting with its value (but for how adapters are trained: those of `fxprune.Recovery`). The
method is that of arXiv 2310.18356; it fixes none of the numbers, see docs/lorashear.md. ``lorashear`` ranks units by the paper's
saliency, ``default`` by importance, which did better at the one budget where both were measured (docs/lorashear.md)."""


def read_recipe(
    recipe: RecipeLike, named: Mapping[str, Mapping[str, Any]] = RECIPES, settings: Mapping[str, Any] = SETTINGS
) -> dict[str, Any]:
    """The settings that a recipe says.

    Args:
        recipe: A name, a YAML or JSON file, a mapping, or None for the first name (of `RECIPES`, ``default``). A file or a mapping
            may build on a named recipe with the key ``recipe``.
        named: Recipes by name.
        settings: Every setting there is, with a value of its kind.

    Returns:
        Keyword arguments of `fxprune.prune`, or of what the named recipes are for.

    Raises:
        UsageError: An unknown name or setting, or a file that cannot be read.
    """
    if recipe is None:
        return dict(next(iter(named.values())))
    if isinstance(recipe, Mapping):
        return _checked(recipe, "the recipe", named, settings)
    name = os.fspath(recipe)
    if name in named:
        return dict(named[name])
    path = Path(name)
    if not path.is_file():
        if path.suffix in (".yaml", ".yml", ".json"):
            raise UsageError(f"there is no recipe file '{name}'")
        if name in SHEARINGS:
            raise UsageError(f"the recipe '{name}' trains while it prunes: it is one of fxprune shear")
        raise UsageError(f"unknown recipe '{name}'; {nearest(name, named)}, or name a .yaml file")
    import yaml

    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read the recipe '{path.name}': {' '.join(str(error).split())[:200]}") from error
    if not isinstance(data, Mapping):
        found = "it is empty" if data is None else f"not a {type(data).__name__}"
        raise RecipeError(f"the recipe '{path.name}' must hold settings with their values: {found}")
    return _checked(data, f"the recipe '{path.name}'", named, settings)


@cache
def _loader() -> Any:
    """YAML's safe loader, for which ``1e-3`` is a number, as in YAML 1.2; PyYAML wants a point in it."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))
    return Loader


def _checked(
    data: Mapping[str, Any], where: str, named: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    base = data.get("recipe")
    if base is not None and (not isinstance(base, str) or base not in named):
        raise RecipeError(f"{where} builds on an unknown recipe '{base}'; {nearest(str(base), named)}")
    own = {key: value for key, value in data.items() if key != "recipe"}
    command, others = ("fxprune shear", _SHEARING) if named is RECIPES else ("fxprune prune", SETTINGS)
    if foreign := [key for key in own if key in others and key not in settings]:
        raise RecipeError(f"{where} has '{foreign[0]}', a setting of {command}: it is a recipe for that")
    for key in own:
        if key in ("ratio", "units"):
            raise RecipeError(
                f"{where} has '{key}', and how much goes is no setting of a recipe: say it beside it ({key}= in Python, "
                f"--{key} on the command line)"
            )
        if key not in settings:
            raise RecipeError(f"{where} has an unknown setting '{key}'; {nearest(str(key), settings)}")
        if wrong := _misfit(key, own[key], settings[key]):
            raise RecipeError(f"{where}: {key} must be {wrong}, got {own[key]!r}")
    return {**(named[base] if base is not None else {}), **own}


def _misfit(key: str, value: Any, usual: Any) -> str:
    """What a setting should be instead of this; empty where it can be used (or is refused elsewhere, by name)."""
    if key == "kinds":
        return "" if isinstance(value, str | Sequence | Mapping) else "names of kinds, or a mapping from kind to pace"
    if key == "floor":
        return "" if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    if type(usual) is bool:
        return "" if type(value) is bool else "true or false"
    if type(usual) is int and key != "multiple":
        return "" if type(value) is int else "a whole number"
    return ""
