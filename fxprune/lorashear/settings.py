"""The settings of a shearing, the same from Python and from the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..criteria import CRITERIA
from ..data import Sources
from ..errors import UsageError, check_whole, nearest
from ..groups import LAYERS
from ..passes.knowledge import check_options
from ..passes.selection import Selection
from ..recipes import SHEARINGS, RecipeLike, read_recipe
from ..recovery.curriculum import Curriculum
from ..recovery.settings import FREE, Recovery, setting_meant, settings_of
from .arguments import check_settings, check_target
from .saliency import check_weights

SALIENCY = "saliency"
"""The criterion that is LHSPG's own."""

AUTO = "auto"
PREFERRED, FALLBACK = "kfac", "taylor2"
"""What `AUTO` comes to where linear maps read all units that may go, and elsewhere."""

INSTEAD = {
    "max_tokens": "tokens",
    "max_steps": "steps",
    "epochs": "tokens or steps",
    "validation_every": "rounds",
}
"""Settings of a recovery that a shearing has its own word for."""

PASSES = 1e6
"""Over the data at most: what limits a shearing is its tokens or steps."""


@dataclass(frozen=True)
class Shearing:
    """How a model is sheared (LoRAShear, arXiv 2310.18356). `fxprune.recipes.SHEARINGS` has the usual values.

    Attributes:
        kinds: Kinds that may lose units, as for `fxprune.Selection`.
        widths: ``per-layer``, or ``uniform`` (stock classes load it; needs ``protect_share`` 0).
        protect_first: Layers at the start that stay whole.
        protect_last: Layers at the end that stay whole.
        protect: Names or patterns of groups and blocks that stay whole.
        multiple: Kept units are rounded to a multiple of it.
        floor: Least share of units that a group keeps.
        protect_share: The paper's gamma: of the groups that may be pruned, the share that matters most stays whole. 0 leaves the
            knowledge distribution analysis out.
        knowledge_by: What ranks groups, see `fxprune.measure_knowledge`.
        knowledge_samples: Windows of held-out text that they are measured on.
        knowledge_length: Tokens of each; no more than the model reads.
        shear_share: Of all tokens or steps that are for LHSPG; the rest is for recovery. 1 leaves recovery out.
        warmup_share: Of LHSPG's steps before anything shrinks; what does not divide by the periods is added to them.
        periods: In which units become redundant, a part in each.
        one_shot: All units are chosen and zeroed in one step after the warm-up; the steps that are left train the others.
        projection: See `fxprune.LHSPG`.
        penalty: See there.
        epsilon: See there.
        saliency: Weights of the criteria; names alone weigh 1 each. Where it is given, ``auto`` is ``saliency``.
        criterion: What ranks units: ``saliency`` (the paper's), or one of `fxprune.criteria.CRITERIA`, measured once on text of the
            first stage before anything is trained. ``auto`` is ``kfac``, or ``taylor2`` where a unit may go that no linear map
            reads.
        criterion_samples: Windows of that text, of ``knowledge_length`` tokens.
        curriculum: Weights of recovery's sources, ``dynamic`` or ``static``; see `fxprune.Curriculum`.
        rounds: Of each stage of recovery.
        source_floor: ``floor`` of the curriculum.
        patience: Of the curriculum.
        threshold: Of the curriculum.
        stage_shares: ``shares`` of the curriculum.
        training: How adapters are trained, while shearing and in recovery.
    """

    kinds: Sequence[str] | Mapping[str, float]
    widths: str
    protect_first: int
    protect_last: int
    protect: Sequence[str]
    multiple: int | Mapping[str, int]
    floor: float
    protect_share: float
    knowledge_by: str
    knowledge_samples: int
    knowledge_length: int
    shear_share: float
    warmup_share: float
    periods: int
    one_shot: bool
    projection: str
    penalty: float
    epsilon: float
    saliency: Mapping[str, float]
    criterion: str
    criterion_samples: int
    curriculum: str
    rounds: int
    source_floor: float
    patience: int
    threshold: float
    stage_shares: Sequence[float] | None
    training: Recovery

    def __post_init__(self) -> None:
        _types(self)
        object.__setattr__(self, "saliency", _weights(self.saliency))
        for name in ("protect_first", "protect_last", "knowledge_samples", "knowledge_length", "criterion_samples", "periods"):
            least = {"knowledge_length": 2}.get(name, 0 if name.startswith("protect") else 1)
            check_whole(name, getattr(self, name), least)
        for name in ("protect_share", "shear_share", "warmup_share"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UsageError(f"{name} must be a number between 0 and 1, got {value!r}")
        if not self.shear_share:
            raise UsageError("shear_share is 0, and nothing would be sheared: to recover a pruned model, use fxprune recover")
        if self.warmup_share == 1:
            raise UsageError("warmup_share is 1, and no step would be left to shear in")
        if type(self.one_shot) is not bool:
            raise UsageError(f"one_shot must be True or False, got {self.one_shot!r}")
        check_settings(0, self.periods, 1, self.projection, self.penalty, self.epsilon)
        check_weights(self.saliency)
        if self.criterion not in (AUTO, SALIENCY, *CRITERIA):
            raise UsageError(f"unknown criterion '{self.criterion}'; {nearest(str(self.criterion), (AUTO, SALIENCY, *CRITERIA))}")
        check_options(kinds=None, share=1.0, take="least", by=self.knowledge_by)
        if self.protect_share and self.widths == "uniform":
            raise UsageError(
                "protect_share leaves single layers whole, and with widths='uniform' all layers have one width: say "
                "protect_share=0 (--protect-share 0), or widths='per-layer'"
            )
        if self.training.method != "lora":
            raise UsageError(f"shearing trains adapters: method is lora, not '{self.training.method}'")
        check_target(None, self.selection(0.5), ())

    def selection(self, ratio: float, protect: Sequence[str] = ()) -> Selection:
        """What LHSPG brings to zero.

        Args:
            ratio: Share of all parameters.
            protect: Names that stay whole beside `protect`.
        """
        return Selection(
            ratio=ratio,
            kinds=self.kinds,
            ranking="global",
            widths=self.widths,
            protect_first=self.protect_first,
            protect_last=self.protect_last,
            protect=(*([self.protect] if isinstance(self.protect, str) else self.protect), *protect),
            multiple=self.multiple,
            floor=self.floor,
        )

    def lessons(self, stages: Sequence[Sources]) -> Curriculum:
        """The curriculum of recovery."""
        return Curriculum(
            stages,
            self.curriculum,
            floor=self.source_floor,
            rounds=self.rounds,
            patience=self.patience,
            threshold=self.threshold,
            shares=self.stage_shares,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data: all fields, those of ``training`` among them but for what a shearing does not read."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "training"}
        plain = {n: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v for n, v in own.items()}
        unread = (*INSTEAD, "method", "patience")
        return {**{n: v for n, v in self.training.to_json().items() if n not in unread}, **plain}

    def identity(self) -> dict[str, Any]:
        """What the result depends on."""
        return {name: value for name, value in self.to_json().items() if name not in FREE}


def _weights(saliency: Any) -> Mapping[str, float]:
    """Weights of criteria; names alone weigh 1 each."""
    if isinstance(saliency, Mapping):
        return saliency
    if not isinstance(saliency, Sequence):
        raise UsageError(f"saliency must be names, got {saliency!r}")
    return dict.fromkeys([saliency] if isinstance(saliency, str) else saliency, 1.0)


def _types(settings: Shearing) -> None:
    """Values of a wrong type, in a word; numbers within bounds, and which names there are, are looked at elsewhere."""
    for each in fields(settings):
        kind, value = str(each.type), getattr(settings, each.name)
        several = isinstance(value, Sequence | Mapping) and not isinstance(value, str)
        if kind == "str" and not isinstance(value, str):
            raise UsageError(f"{each.name} must be a text, got {value!r}")
        if kind == "float" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UsageError(f"{each.name} must be a number, got {value!r}")
        if "Sequence[str]" in kind and not (isinstance(value, str) or (several and all(isinstance(name, str) for name in value))):
            raise UsageError(f"{each.name} must be names, got {value!r}")
        if "Sequence[float]" in kind and value is not None and not several:
            raise UsageError(f"{each.name} must be numbers, one for each stage, got {value!r}")


OWN = {f.name: str(f.type) for f in fields(Shearing) if f.name != "training"}
TRAINING = tuple(f.name for f in fields(Recovery))


def settle(recipe: RecipeLike, given: Mapping[str, Any]) -> Shearing:
    """The settings of a run.

    Args:
        recipe: A name of `fxprune.recipes.SHEARINGS`, a YAML file or a mapping; what it does not say is as in ``default``.
        given: Settings that go before it; texts are read as the setting's type.

    Raises:
        UsageError: An unknown recipe or setting, a value that makes no sense, or one that another makes idle.
    """
    usual = SHEARINGS["default"]
    said = {**usual, **_as_read(read_recipe(recipe, SHEARINGS, {**Recovery().to_json(), **usual}))}
    for name, value in given.items():
        if name not in OWN and name not in TRAINING:
            raise UsageError(f"there is no shearing setting '{name}'; {setting_meant(name, (*OWN, *TRAINING))}")
        said |= _as_read({name: value})
    weighed = "saliency" in given or _weights(said["saliency"]) != _weights(usual["saliency"])
    if weighed and said["criterion"] == AUTO:
        said["criterion"] = SALIENCY
    if weighed and said["criterion"] != SALIENCY:
        raise UsageError(
            f"saliency weighs what LHSPG itself ranks by, and criterion is '{said['criterion']}': leave one of them out"
        )
    for name, instead in INSTEAD.items():
        if name in said:
            raise UsageError(f"{name} is of a recovery by itself: for a shearing set {instead} instead")
    training = settings_of("default", {n: v for n, v in said.items() if n not in OWN})
    return Shearing(training=replace(training, epochs=PASSES), **{n: v for n, v in said.items() if n in OWN})


def _as_read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Texts among the settings of a shearing's own as the settings' types; `settings_of` reads the others."""
    return {name: _read(name, value) if isinstance(value, str) and name in OWN else value for name, value in values.items()}


def _read(name: str, text: str) -> Any:
    """A setting's value from what was typed."""
    kind = OWN[name]
    if kind == "str" or "Sequence[str]" in kind or "Mapping[str, float]" in kind:
        return text if kind == "str" else _listed(name, text)
    if kind == "bool":
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{name} must be true or false, got '{text}'")
        return text.lower() == "true"
    try:
        if "Sequence[float]" in kind:
            return [float(part) for part in text.split(",")]
        if "Mapping[str, int]" in kind and "=" in text:
            return {key.strip(): int(value) for key, value in (part.split("=") for part in text.split(","))}
        return int(text) if kind.startswith("int") else _number(text)
    except ValueError:
        wanted = "numbers such as 3,1" if "Sequence" in kind else "a whole number" if kind.startswith("int") else "a number"
        raise UsageError(f"{name} must be {wanted}, got '{text}'") from None


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _listed(name: str, text: str) -> Any:
    """``a,b`` as a list, ``a=0.5,b=1`` as a mapping."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not any("=" in part for part in parts):
        return parts
    try:
        return {key.strip(): float(value) for key, _, value in (part.partition("=") for part in parts)}
    except ValueError:
        raise UsageError(f"{name} must be names, or names with numbers such as {LAYERS}=1, got '{text}'") from None
