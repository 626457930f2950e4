"""From a traced model to a plan: calibrate, score, measure sensitivity, select.

`fxprune.prune` runs the steps one after the other, `fxprune.Pipeline.from_recipe` as passes.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from .calibration import Calibration, load_calibration
from .checkpoint.stock import fixed_in_stock
from .criteria import CRITERIA, Criterion, UserCriterion, check_aggregation, find_criterion
from .data.overlap import Sketch
from .errors import PlanError, UsageError, check_seed, check_whole, nearest
from .groups import LAYERS, Groups
from .passes.batches import Loss, Progress
from .passes.compensation import check_compensation
from .passes.importance import score
from .passes.influence import block_influence
from .passes.masking import unfit
from .passes.selection import Selection, lanes_of, select
from .passes.sensitivity import measure_curves
from .plan import PrunePlan
from .recipes import SETTINGS, RecipeLike, read_recipe
from .wording import listed

log = logging.getLogger("fxprune")

LAYERS_BY = ("influence", "first")

FALLBACK = "taylor1"
"""What scores the groups that an activation criterion cannot: units that no linear map contracts."""

Batches = Sequence[Mapping[str, torch.Tensor]]


def check_layers_by(layers_by: str) -> None:
    """Raise `UsageError` unless blocks can be ranked that way."""
    if layers_by not in LAYERS_BY:
        raise UsageError(f"unknown layers_by '{layers_by}'; {nearest(str(layers_by), LAYERS_BY)}")


@dataclass(frozen=True)
class Planning:
    """How units are chosen: the settings of a recipe but for the selection itself.

    Attributes:
        criterion: See `fxprune.criteria.CRITERIA`.
        aggregation: See `fxprune.criteria.AGGREGATIONS`.
        compensation: See `fxprune.passes.compensation.COMPENSATIONS`.
        layers_by: ``influence`` or ``first``.
        samples: Calibration samples.
        length: Tokens of each.
        batch_size: Samples at a time.
        levels: Steps into which a group is cut where sensitivity is measured.
        sensitivity_samples: How many of the samples sensitivity is measured on.
        rounds: Into how many equal parts the budget is cut: before each is spent, sensitivity is measured beside what is gone.
        stock: Leave whole what no stock configuration can have fewer of; see `fxprune.checkpoint.stock.fixed_in_stock`.
        seed: Of calibration and random scores.
    """

    criterion: str | Criterion | UserCriterion
    aggregation: str
    compensation: str
    layers_by: str
    samples: int
    length: int
    batch_size: int
    levels: int
    sensitivity_samples: int
    rounds: int
    stock: bool
    seed: int

    def check(self) -> None:
        """Refuse what cannot be used, before a model is touched."""
        find_criterion(self.criterion)
        check_aggregation(self.aggregation)
        check_compensation(self.compensation)
        check_layers_by(self.layers_by)
        for name in ("samples", "length", "batch_size", "levels", "sensitivity_samples", "rounds"):
            check_whole(name, getattr(self, name), 2 if name == "length" else 1)
        if not isinstance(self.stock, bool):
            raise UsageError(f"stock must be True or False, got {self.stock!r}")
        check_seed(self.seed)

    def to_json(self) -> dict[str, Any]:
        """Plain data for the plan's recipe."""
        found = find_criterion(self.criterion)
        name = found.name if isinstance(found, Criterion) else getattr(found, "__name__", "callable")
        own = {} if found in CRITERIA.values() else {"own_criterion": True}
        return {**vars(self), "criterion": name, **own}


_SETTINGS = tuple(f.name for f in dataclasses.fields(Planning))
_KEYWORDS = (*_SETTINGS, "recipe", "calibration", "tokenizer", "inputs", "loss", "progress")  # of prune and Pipeline.from_recipe


def settle(
    recipe: RecipeLike,
    given: Mapping[str, Any],
    ratio: float | None,
    selection: Selection | None,
    plan: PrunePlan | None,
    options: Mapping[str, Any],
    seed: int,
) -> tuple[Planning, Selection | None]:
    """The settings of a run, out of a recipe and what was given beside it; contradictions are refused.

    Args:
        recipe: As for `fxprune.prune`. Where it is None and the criterion that is given needs no calibration, nothing else does:
            every layer shrinks alike, without compensation.
        given: Settings but for the selection's; None where the recipe decides.
        ratio: Share of all parameters to remove.
        selection: A ready selection.
        plan: A plan to replay.
        options: Fields of a selection.
        seed: Of calibration and random scores.

    Returns:
        (how to score, what to select or None where a plan is replayed).

    Raises:
        UsageError: An unknown setting, or settings that contradict each other.
    """
    fields = [f.name for f in dataclasses.fields(Selection)]
    for name in options:
        if name not in fields:
            raise UsageError(f"unknown option '{name}'; {nearest(name, (*fields, *_KEYWORDS))}")
    typed = [*(["ratio"] if ratio is not None else []), *options]
    if plan is not None and (typed or selection is not None):
        raise UsageError(f"plan= is replayed as it is: leave out {(typed or ['selection'])[0]}=")
    if selection is not None and typed:
        raise UsageError(f"selection= says what to remove: leave out {typed[0]}=")
    if plan is not None and given.get("compensation") in (None, "none"):
        _refuse_idle(recipe, given, _CHOOSE | _READ)
    elif plan is not None:
        _refuse_idle(None, given, _CHOOSE)
    said = read_recipe(recipe)
    criterion = None if given.get("criterion") is None else find_criterion(given["criterion"])
    if recipe is None and isinstance(criterion, Criterion) and not criterion.calibrated:
        said = {}  # who asks for a criterion that needs no data gets a prune that needs none
    settings = {**SETTINGS, **said, **{k: v for k, v in given.items() if v is not None}}
    if plan is not None:
        before = {name: plan.recipe[name] for name in _READ if name in plan.recipe and recipe is None and given.get(name) is None}
        settings |= {"compensation": given.get("compensation") or "none", **before}  # as much text as it was made with
    if settings["stock"] is True and (selection.widths if selection else options.get("widths", settings["widths"])) == "per-layer":
        if given.get("stock"):
            raise UsageError("stock=True keeps to what stock classes load, and widths='per-layer' to no such thing: leave one out")
        settings["stock"] = False
    how = Planning(**{f.name: settings[f.name] for f in dataclasses.fields(Planning) if f.name in settings}, seed=seed)
    how.check()
    if plan is not None or selection is not None:
        return how, selection
    own = {name: settings[name] for name in fields if name in settings} | dict(options)
    if LAYERS in own["kinds"] and "ranking" not in options:
        own["ranking"] = "local"  # whole layers are ranked among themselves
    if isinstance(options.get("units"), Mapping) and "kinds" not in options:
        del own["kinds"]  # the shares say which
    return how, Selection(ratio=ratio, **own)


_CHOOSE = frozenset({"criterion", "aggregation", "layers_by", "levels", "sensitivity_samples", "rounds", "stock"})
"""Settings of how units are chosen."""

_READ = frozenset({"samples", "length", "batch_size"})
"""Settings of the text."""


def _refuse_idle(recipe: RecipeLike, given: Mapping[str, Any], names: Set[str]) -> None:
    """Refuse what a plan leaves nothing to do for."""
    idle = [*(["recipe"] if recipe is not None else []), *(n for n, value in given.items() if value is not None and n in names)]
    if idle:
        raise UsageError(
            f"plan= is replayed as it is, and chooses no units: leave out {idle[0]}="
            + ("" if idle[0] in _CHOOSE else ", or give compensation= with it")
        )


def run(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A clock that measures nothing."""
    return function(*args, **kwargs)


@dataclass(eq=False)
class Material(Sequence[Mapping[str, torch.Tensor]]):
    """Calibration batches, loaded when something first asks for them.

    Attributes:
        described: One line that says what they are; ``none`` if nothing asked.
    """

    source: Calibration
    model: nn.Module | None
    tokenizer: Any
    how: Planning
    clock: Callable[..., Any] = run
    described: str = "none"
    _batches: Batches | None = field(default=None, repr=False)

    def batches(self) -> Batches:
        """All batches."""
        if self._batches is None:
            if self.source is None and self.model is None:
                raise UsageError(
                    "without calibration= the text is sampled from the model itself, which a graph cannot do: "
                    "give calibration=, or model="
                )
            shape = {
                "samples": self.how.samples,
                "length": self.how.length,
                "batch_size": self.how.batch_size,
                "seed": self.how.seed,
            }
            self._batches, self.described = self.clock(
                "calibration", load_calibration, self.source, model=self.model, tokenizer=self.tokenizer, **shape
            )
        assert self._batches is not None
        return self._batches

    def __len__(self) -> int:
        return len(self.batches())

    def __getitem__(self, index: Any) -> Any:
        return self.batches()[index]

    def seen(self) -> list[dict[str, Any]]:
        """What the report says of the text: its name and a sketch of it, so that `fxprune eval` can tell if it reads it again."""
        if self._batches is None or self.source is None or self.tokenizer is None:
            return []
        samples = (row for batch in self._batches if "input_ids" in batch for row in batch["input_ids"])
        sketch = Sketch(self.tokenizer.decode(row, skip_special_tokens=True) for row in samples)
        return [{"use": "calibration", "name": self.described, "sketch": sketch.to_json()}]


@dataclass(frozen=True)
class Planner:
    """The steps from a traced model to a plan, with all that they need to know.

    Attributes:
        chosen: What to remove.
        how: How to score and measure.
        material: Calibration batches.
        loss: Instead of next-token cross-entropy.
        clock: ``(name, function, *args, **kwargs) -> result``, which may note how long that took.
        progress: Called with (what, done, total).
    """

    chosen: Selection
    how: Planning
    material: Material
    loss: Loss | None = None
    clock: Callable[..., Any] = run
    progress: Progress | None = None

    def plan(self, gm: GraphModule, groups: Groups) -> PrunePlan:
        """Every step, one after the other."""
        fixed, said = self.fixed(groups)
        planner = self.leaving(fixed)
        influence = planner.weigh_blocks(gm, groups)
        scores, notes = planner.weigh_units(gm, groups)
        return planner.choose(gm, groups, scores, influence, [*said, *notes])

    def fixed(self, groups: Groups) -> tuple[list[str], list[str]]:
        """(what no stock class can have fewer of, if that is asked for and the eager model known; what to say of it)."""
        if not self.how.stock or not isinstance(self.material.model, nn.Module):
            return [], []
        return outside_stock(self.material.model, groups, self.chosen)

    def leaving(self, patterns: Sequence[str]) -> Planner:
        """A planner that leaves more whole."""
        return dataclasses.replace(self, chosen=leaving(self.chosen, patterns)) if patterns else self

    def weigh_blocks(self, gm: GraphModule, groups: Groups) -> dict[str, float] | None:
        """The influence of each residual block, or None where blocks are not ranked by it."""
        if self.chosen.pace.get(LAYERS, 0) <= 0 or self.how.layers_by != "influence":
            return None
        found: dict[str, float] = self.clock("influence", block_influence, gm, groups, self.material.batches())
        return found

    def weigh_units(self, gm: GraphModule, groups: Groups) -> tuple[dict[str, torch.Tensor], list[str]]:
        """(scores of every group that may be pruned, what to say of them); no scores where only blocks go."""
        kinds = [kind for kind, pace in self.chosen.pace.items() if pace > 0 and kind != LAYERS]
        if not kinds:
            return {}, []
        found = find_criterion(self.how.criterion)
        options = {"aggregation": self.how.aggregation, "loss": self.loss, "seed": self.how.seed, "progress": self.progress}
        calibrated = not isinstance(found, Criterion) or found.calibrated
        batches = self.material.batches() if calibrated else ()
        scores: dict[str, torch.Tensor]
        scores = self.clock("importance", score, gm, groups, criterion=found, calibration=batches, **options)
        missing = [g.name for g in groups.values() if g.prunable and g.kind in kinds and g.name not in scores]
        if not missing:
            return scores, []
        log.info("no linear map contracts the units of %s: scored by %s", ", ".join(missing), FALLBACK)
        note = f"{len(missing)} groups, such as {missing[0]}, were scored by {FALLBACK}: no linear map contracts their units"
        others = self.clock("importance (fallback)", score, gm, groups, criterion=FALLBACK, calibration=batches, **options)
        return scores | {name: others[name] for name in missing}, [note]

    def choose(
        self,
        gm: GraphModule,
        groups: Groups,
        scores: Mapping[str, torch.Tensor],
        influence: Mapping[str, float] | None,
        notes: Sequence[str] = (),
    ) -> PrunePlan:
        """Select the units that stay; for ``measured`` ranking, measure the loss first."""
        chosen, notes = self.chosen, list(notes)
        facts = {"block_scores": influence, "recipe": {**self.how.to_json(), "calibration": self.material.described}}
        if scores and chosen.ranking == "measured" and chosen.units is None:
            lanes = {n: own for n, own in lanes_of(groups, chosen).items() if not any(unfit(groups[name]) for name in own)}
            if lanes:
                return self._search(gm, groups, scores, lanes, {**facts, "notes": notes})
            notes.append("a norm or a router looks at the units of these kinds, so their loss was not measured: all shrink alike")
            chosen = dataclasses.replace(chosen, ranking="local")
        made: PrunePlan = self.clock("selection", select, groups, scores, chosen, notes=notes, **facts)
        return made

    def _search(
        self,
        gm: GraphModule,
        groups: Groups,
        scores: Mapping[str, torch.Tensor],
        lanes: Mapping[str, Sequence[str]],
        facts: Mapping[str, Any],
    ) -> PrunePlan:
        """Spend the budget part by part, each where it costs least beside what the parts before it took.

        The first time every lane's whole curve is measured; later its next step, and what lies beyond that is taken to rise as it
        did.
        """
        how, chosen = self.how, self.chosen
        curves: dict[str, list[tuple[int, float]]] = {}
        first: dict[str, list[tuple[int, float]]] = {}
        plan: PrunePlan | None = None
        by = "divergence" if self.loss is None else "loss"
        facts = {**facts, "recipe": {**facts["recipe"], "measured": by}}
        for number in range(how.rounds):
            found = self.clock(
                f"sensitivity, part {number + 1}",
                measure_curves,
                gm,
                groups,
                scores,
                self.material.batches(),
                lanes=lanes,
                levels=how.levels,
                samples=how.sensitivity_samples,
                compensated=how.compensation == "least-squares",
                plan=plan,
                ahead=None if number == 0 else 1,
                by=by,
                loss=self.loss,
                progress=self.progress,
            )
            curves = {lane: [*points, *_beyond(points, curves.get(lane, []))] for lane, points in found.items()}
            first = first or curves
            last = number + 1 == how.rounds
            part = chosen if last else dataclasses.replace(chosen, ratio=float(chosen.ratio or 0) * (number + 1) / how.rounds)
            try:
                plan = self.clock("selection", select, groups, scores, part, curves=curves, **facts)
            except PlanError:  # a part may be smaller than a unit
                if last:
                    raise
        assert plan is not None
        return dataclasses.replace(plan, curves=first)


def check_stock(stock: bool | None, model: object) -> None:
    """Refuse ``stock=True``, where it is said and not a recipe's, of what has no configuration.

    Raises:
        UsageError: The model is a plain module, or is not known.
    """
    if stock is True and not (hasattr(model, "config") and hasattr(model, "save_pretrained")):
        what = "there is no model=" if model is None else f"a plain {type(model).__name__} has none"
        raise UsageError(f"stock=True keeps to what a Hugging Face configuration can say, and {what}: leave it out")


def leaving(chosen: Selection, patterns: Sequence[str]) -> Selection:
    """A selection that leaves more whole."""
    return dataclasses.replace(chosen, protect=(*chosen.protect, *patterns))


def outside_stock(model: nn.Module, groups: Groups, chosen: Selection) -> tuple[list[str], list[str]]:
    """(patterns of what no stock configuration can have fewer of, what to say of it).

    Raises:
        PlanError: That is all that may be pruned.
    """
    fixed = fixed_in_stock(model, groups, chosen)
    if not fixed:
        return [], []
    said = f"no stock {type(model).__name__} has fewer of {listed(fixed, 3)}"
    if not lanes_of(groups, leaving(chosen, fixed)) and not chosen.pace.get(LAYERS):
        raise PlanError(f"{said}, and nothing else may be pruned: name other kinds, or say stock=False (--no-stock)")
    return fixed, [f"{said}: they stay whole (stock=False, --no-stock, prunes them too)"]


def _beyond(points: Sequence[tuple[int, float]], earlier: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """An earlier curve's points beyond a new one's last, with the rise that they had from there on."""
    last, change = points[-1]
    known = dict(earlier)
    return [(count, change + value - known[last]) for count, value in earlier if count > last] if last in known else []
