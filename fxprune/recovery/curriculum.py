"""A curriculum: stages of sources, and how often each source is read, fixed or by how much of it the pruned model has lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..data import Examples, Source, Sources, by_name, parse_sources
from ..errors import UsageError, check_whole, is_number, nearest
from ..wording import counted
from .settings import Recovery

WEIGHTS = ("dynamic", "static")

UNUSED = ("patience", "validation_every")
"""Fields of `Recovery` that a curriculum has its own word for."""


@dataclass(frozen=True, init=False)
class Curriculum:
    """How a recovery goes through its sources (LoRAShear, arXiv 2310.18356: pretraining text, then instructions).

    A stage is trained in rounds. Before each round, and after the last one, the loss is measured on examples held out of every
    source of the stage. The *degradation* of a source is the pruned model's loss less the dense model's, in nats per predicted
    token (the logarithm of the ratio of their perplexities). See `token_shares` for the weights that follow from it.

    Attributes:
        stages: For each stage its sources, as `fxprune.data.parse_sources` takes them: ``[["wiki.txt", "books.jsonl"],
            ["alpaca.jsonl"]]``. A source's own weight (``wiki.txt=2``) multiplies its degradation, or is its fixed weight.
        weights: ``dynamic`` (by degradation; needs the dense model) or ``static`` (the sources' own).
        floor: With dynamic weights, the share of a round's tokens that every source of the stage gets at least.
        rounds: Of each stage at most; all of them are as long. A stage has no more rounds than steps.
        patience: A stage ends when its mean degradation has not fallen for so many rounds; 0 never ends it early.
        threshold: What counts as falling, in nats per token.
        shares: Of ``max_steps`` and ``max_tokens``, for each stage; by default all are passed over equally often.

    Raises:
        UsageError: A stage without sources, or a number that makes no sense.
    """

    stages: tuple[tuple[Source, ...], ...]
    weights: str = "dynamic"
    floor: float = 0.05
    rounds: int = 4
    patience: int = 1
    threshold: float = 0.0
    shares: tuple[float, ...] | None = None

    def __init__(
        self,
        stages: Sequence[Sources],
        weights: str = "dynamic",
        *,
        floor: float = 0.05,
        rounds: int = 4,
        patience: int = 1,
        threshold: float = 0.0,
        shares: Sequence[float] | None = None,
    ) -> None:
        given = {"weights": weights, "floor": floor, "rounds": rounds, "patience": patience, "threshold": threshold}
        for name, value in (given | {"stages": _stages(stages), "shares": None if shares is None else tuple(shares)}).items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if self.weights not in WEIGHTS:
            raise UsageError(f"unknown weights '{self.weights}' of a curriculum; {nearest(self.weights, WEIGHTS)}")
        for name, least in (("rounds", 1), ("patience", 0)):
            check_whole(f"{name} of a curriculum", getattr(self, name), least)
        if not _number(self.threshold) or self.threshold < 0:
            raise UsageError(f"threshold of a curriculum must be a number of at least 0, got {self.threshold!r}")
        if not _number(self.floor) or not 0 < self.floor <= 1:
            raise UsageError(f"floor of a curriculum must lie above 0 and be at most 1, got {self.floor!r}")
        most = max(map(len, self.stages))
        if self.weights == "dynamic" and self.floor * most > 1:
            raise UsageError(
                f"a floor of {self.floor:g} for each of {most} sources is more than all: it can be {1 / most:.3g} at most"
            )
        if self.shares is None:
            return
        if len(self.shares) != len(self.stages) or not all(_number(s) and s > 0 for s in self.shares):
            stages = counted(len(self.stages), "stage")
            raise UsageError(f"shares of a curriculum must be a positive number for each of its {stages}, got {list(self.shares)}")

    @property
    def sources(self) -> dict[str, Source]:
        """Every source once, by the name that reports give it: its label, or its whole name where two labels are the same."""
        found: dict[tuple[str, str | None, str], Source] = {}
        for source in (s for stage in self.stages for s in stage):
            found.setdefault(_key(source), source)
        return by_name(found.values())

    def named(self) -> list[dict[str, float]]:
        """For each stage its sources' own weights, by the names of `sources`."""
        names = {_key(source): name for name, source in self.sources.items()}
        return [{names[_key(source)]: source.weight for source in stage} for stage in self.stages]

    def to_json(self) -> dict[str, Any]:
        """Plain data: the settings, and names and own weights of the sources."""
        plain = {n: getattr(self, n) for n in ("weights", "floor", "rounds", "patience", "threshold")}
        return {**plain, "shares": None if self.shares is None else list(self.shares), "stages": self.named()}

    def token_shares(self, own: Mapping[str, float], degradation: Mapping[str, float] | None) -> dict[str, float]:
        """Shares of a round's tokens.

        ``floor + (1 - n floor) a_i max(d_i, 0) / sum_j a_j max(d_j, 0)`` for the n sources of a stage, with degradations d and the
        sources' own weights a; where no source is worse than the dense model the fraction is ``a_i / sum_j a_j``. Static weights
        are that fraction alone.

        Args:
            own: The sources' own weights a.
            degradation: d; None with static weights.

        Returns:
            Shares that add up to 1.
        """
        fixed = {name: weight / sum(own.values()) for name, weight in own.items()}
        if self.weights == "static" or degradation is None:
            return fixed
        lost = {name: weight * max(degradation[name], 0.0) for name, weight in own.items()}
        total = sum(lost.values())
        parts = {name: value / total for name, value in lost.items()} if total > 0 else fixed
        return {name: self.floor + (1 - len(own) * self.floor) * part for name, part in parts.items()}


def _stages(given: Sequence[Sources]) -> tuple[tuple[Source, ...], ...]:
    if isinstance(given, str | Mapping | Source) or not isinstance(given, Sequence):
        raise UsageError(
            'stages of a curriculum is a list with the sources of each stage: [["wiki.txt", "books.jsonl"], ["alpaca.jsonl"]]'
        )
    if not given:
        raise UsageError("a curriculum needs at least one stage of sources")
    made = []
    for number, stage in enumerate(given, start=1):
        if isinstance(stage, Examples):
            raise UsageError(f"stage {number} of a curriculum is sources of text, not examples that were read already")
        try:
            sources = parse_sources(stage)
            for source in sources:
                _ = source.kind  # a file that is not there is refused before anything is loaded
        except UsageError as error:
            raise UsageError(f"stage {number} of the curriculum: {error}") from error
        made.append(sources)
    return tuple(made)


def _number(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _key(source: Source) -> tuple[str, str | None, str]:
    return source.name, source.column, source.template


@dataclass(frozen=True)
class StagePlan:
    """The length of a stage.

    Attributes:
        steps: Planned for the stage, of which its learning rate makes one schedule.
        rounds: At most.
        tokens: That it may read, None for no limit but the steps.
    """

    steps: int
    rounds: int
    tokens: float | None

    def begin(self, number: int) -> int:
        """The planned step of the stage at which a round begins."""
        return self.steps * number // self.rounds


def plan_stages(
    curriculum: Curriculum, settings: Recovery, *, epochs: Sequence[int], tokens: Sequence[int], per_step: Sequence[float]
) -> list[StagePlan]:
    """The budget of a recovery, divided among the stages.

    ``epochs`` passes over each stage's data at most. ``max_steps`` and ``max_tokens`` are divided by the curriculum's shares, or as
    the data is.

    Args:
        curriculum: Rounds and shares.
        settings: The recovery's limits.
        epochs: For each stage the steps of a pass over its data.
        tokens: For each stage the tokens of its data.
        per_step: For each stage the mean tokens of a step with the sources' own weights.

    Raises:
        UsageError: There are fewer steps than stages, or shares of nothing.
    """
    count = len(epochs)
    if curriculum.shares is not None and settings.max_steps is None and settings.max_tokens is None:
        raise UsageError("shares of a curriculum divide max_steps or max_tokens: give one of them")
    if settings.max_steps is not None and settings.max_steps < count:
        raise UsageError(f"max_steps is {settings.max_steps} and the curriculum has {count} stages: each needs a step")
    steps = [math.ceil(settings.epochs * epoch - 1e-9) for epoch in epochs]
    limits: list[float | None] = [None] * count
    if settings.max_steps is not None:
        parts = _divided(settings.max_steps, curriculum.shares or steps)
        steps = [min(pair) for pair in zip(steps, parts, strict=True)]
    if settings.max_tokens is not None:
        shares = curriculum.shares or tokens
        limits = [settings.max_tokens * share / sum(shares) for share in shares]
        steps = [min(n, int(cast(float, t) // each)) for n, t, each in zip(steps, limits, per_step, strict=True)]
    steps = [max(1, n) for n in steps]
    return [StagePlan(n, min(curriculum.rounds, n), limit) for n, limit in zip(steps, limits, strict=True)]


def _divided(total: int, shares: Sequence[float]) -> list[int]:
    """A number in parts of at least 1, close to the shares."""
    exact = [total * share / sum(shares) for share in shares]
    parts = [max(1, int(x)) for x in exact]
    while (missing := total - sum(parts)) != 0:
        over = [x - part for x, part in zip(exact, parts, strict=True)]
        if missing > 0:
            parts[over.index(max(over))] += 1
        else:
            parts[min((i for i, part in enumerate(parts) if part > 1), key=over.__getitem__)] -= 1
    return parts


def refuse_unused(overrides: Mapping[str, Any]) -> None:
    """See that no setting is given that a curriculum does not read.

    Raises:
        UsageError: One is; says what takes its place.
    """
    for name, instead in zip(UNUSED, ("patience of the curriculum (in rounds)", "rounds of the curriculum"), strict=True):
        if name in overrides:
            raise UsageError(f"{name} is of a recovery without a curriculum: set {instead} instead")
