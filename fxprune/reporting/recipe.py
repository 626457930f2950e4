"""How a checkpoint is made again: its settings as a recipe file, and the commands that read it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from ..names import PLAN_FILE, RECIPE_FILE
from ..recipes import SETTINGS
from ..recovery.settings import OF_LORA, RECIPES, Recovery
from .numbers import part


def recipe_yaml(report: Mapping[str, Any]) -> str:
    """The settings as a file for ``fxprune prune --recipe``, or ``fxprune shear``; empty where the report has none.

    What a recipe cannot say (how much, which text, the seed) is in `prune_command` and `shear_command`. A plan that was replayed
    has none: its file says which units go.
    """
    if shearing := part(report, "shearing"):
        return str(yaml.safe_dump(_plain(part(shearing, "settings")), sort_keys=False, allow_unicode=True))
    recipe = part(report, "recipe")
    if recipe.get("replayed"):
        return ""
    found = {name: _plain(recipe[name]) for name in SETTINGS if name in recipe}
    if not found:
        return ""
    note = ""
    if recipe.get("own_criterion"):
        note = f"# criterion: {' '.join(str(found.pop('criterion', '')).split())} was a function of your own: pass it in Python\n"
    return note + str(yaml.safe_dump(found, sort_keys=False, allow_unicode=True))


def prune_command(report: Mapping[str, Any], name: str) -> str:
    """The command that prunes the dense model so again, run beside the recipe file; empty where the report has no settings.

    Args:
        report: Of the checkpoint.
        name: What the checkpoint's directory is called.
    """
    recipe, dense = part(report, "recipe"), part(report, "dense")
    if "shearing" in report or recipe.get("replayed") or not any(setting in recipe for setting in SETTINGS):
        return ""
    words = ["fxprune", "prune", dense.get("name") or "DENSE", "--recipe", RECIPE_FILE]
    if recipe.get("ratio") is not None:
        words += ["--ratio", f"{recipe['ratio']}"]
    elif recipe.get("units") is not None:
        units = recipe["units"]
        words += ["--units", ",".join(f"{k}={v}" for k, v in units.items()) if isinstance(units, Mapping) else f"{units}"]
    else:
        words += ["--plan", PLAN_FILE]
    return _joined([*words, *_read(report), *_as(dense), "-o", pruned_name(report, name)])


def _read(report: Mapping[str, Any]) -> list[str]:
    """Which text, and the seed; of text that was given in Python, a word in its place."""
    recipe = part(report, "recipe")
    given = "TEXT" if "given" in str(recipe.get("calibration")).split() else ""
    text = calibration_text(report) or given
    return [*(["--calibration", text] if text else []), *(["--seed", str(recipe["seed"])] if recipe.get("seed") else [])]


def _as(dense: Mapping[str, Any]) -> list[str]:
    """The dtype that the dense model was loaded in, where that may not be what it is stored in."""
    said = dense.get("dtype", "float32")
    return ["--dtype", said] if said != "float32" or "stored_dtype" in dense else []


def pruned_name(report: Mapping[str, Any], name: str) -> str:
    """What the directory is called in which the pruned model is, before any recovery after it."""
    return "PRUNED" if trainings(report)[1] else name or "DIR"


def trainings(report: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """(the recovery that was a shearing's own, empty without one; every other, the first one first)."""
    found: list[Mapping[str, Any]] = []
    last = part(report, "recovery")
    while last:
        found.insert(0, last)
        last = part(last, "earlier")
    own = part(part(report, "shearing"), "tokens").get("recovery")
    return (found[0], found[1:]) if own and found else ({}, found)


def replay_command(report: Mapping[str, Any], name: str) -> str:
    """The command that removes the very same units again, whatever the text; of a replay, how it was made."""
    dense, recipe = part(report, "dense"), part(report, "recipe")
    words = ["fxprune", "prune", dense.get("name") or "DENSE", "--plan", PLAN_FILE]
    if recipe.get("replayed") and recipe.get("compensation", "none") != "none":
        for setting in ("compensation", "samples", "length", "batch_size"):
            words += [f"--{setting.replace('_', '-')}", str(recipe[setting])]
        words += _read(report)
    return _joined([*words, *_as(dense), "-o", pruned_name(report, name)])


def calibration_text(report: Mapping[str, Any]) -> str:
    """The name of the file or data set that was calibrated on; empty for the model's own text and for what Python gave."""
    described = str(part(report, "recipe").get("calibration") or "")
    found = re.fullmatch(r"\d+ x \d+ tokens of (.+), seed \d+", described)
    return "" if found is None or re.fullmatch(r"\d+ given texts?", found[1]) else found[1]


def shear_command(report: Mapping[str, Any], name: str) -> str:
    """The command that shears the dense model so again, within the same budget; empty without a shearing."""
    shearing = report.get("shearing")
    if not shearing:
        return ""
    own, _ = trainings(report)
    stages = part(own, "curriculum").get("stages") or [shearing["lhspg"].get("sources") or {}]
    texts = [_mixture(stage if i or own else list(stage)) for i, stage in enumerate(stages)]
    words = ["fxprune", "shear", part(report, "dense").get("name") or "DENSE", "--recipe", RECIPE_FILE]
    words += ["--ratio", f"{shearing['ratio']}", "--data", texts[0] or "DATA", *(w for text in texts[1:] for w in ("--then", text))]
    given = {unit: most for unit, most in part(shearing, "budget").items() if most is not None}
    unit, most = next(iter(given.items()), ("tokens", shearing["tokens"]["total"]))
    return _joined([*words, f"--{unit}", f"{most}", "-o", pruned_name(report, name)])


def recover_commands(report: Mapping[str, Any], name: str) -> list[str]:
    """The commands that train the pruned checkpoint so again, in their order; none without a recovery after it."""
    _, later = trainings(report)
    places = [pruned_name(report, name), *(f"RECOVERED-{i}" for i in range(1, len(later))), name or "DIR"]
    return [_recover(report, recovery, *places[i : i + 2]) for i, recovery in enumerate(later)]


def _recover(report: Mapping[str, Any], recovery: Mapping[str, Any], source: str, target: str) -> str:
    recipe = recovery["recipe"] if recovery["recipe"] in RECIPES else "default"
    usual, settings = RECIPES[recipe], recovery["settings"]
    words = ["fxprune", "recover", source]
    given, curriculum = part(recovery, "given"), recovery.get("curriculum")
    stages = curriculum["stages"] if curriculum else [given.get("data") or recovery["data"]["sketches"]]
    texts = [_mixture(stage) for stage in stages] or [""]
    words += ["--data", texts[0] or "DATA"]
    if curriculum:
        words += ["--curriculum", curriculum["weights"], *(word for text in texts[1:] for word in ("--then", text))]
        for option in ("rounds", "floor", "patience", "threshold"):
            words += [f"--{option}", f"{curriculum[option]:g}"]
        if curriculum.get("shares"):
            words += ["--shares", ",".join(f"{share:g}" for share in curriculum["shares"])]
    if recipe != "default":
        words += ["--recipe", recipe]
    if given.get("validation"):
        words += ["--validation", ",".join(given["validation"])]
    if recovery.get("teacher"):
        words += ["--teacher", given.get("teacher") or part(report, "dense").get("name") or "DENSE"]
    if given.get("dtype"):
        words += ["--dtype", given["dtype"]]
    default = usual.to_json()
    for field in Recovery.__dataclass_fields__:
        if field in OF_LORA and settings.get("method") == "full":
            continue
        if field in settings and settings[field] != default[field]:
            words += ["--set", f"{field}={_value(settings[field])}"]
    return _joined([*words, "-o", target])


def _mixture(stage: Any) -> str:
    if isinstance(stage, Mapping) and all(isinstance(w, int | float) for w in stage.values()) and len(set(stage.values())) > 1:
        return ",".join(f"{n}={w:g}" for n, w in stage.items()) if len(stage) > 1 else "".join(stage)
    return ",".join(stage)


def _value(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else "none" if value is None else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _joined(words: list[str]) -> str:
    """A command on as many lines as it needs."""
    lines, line = [], ""
    for word in map(shlex.quote, words):
        if line and len(line) + len(word) > 96 and word.startswith("-"):
            lines.append(line)
            line = f"    {word}"
        else:
            line = f"{line} {word}" if line else word
    return " \\\n".join([*lines, line])
