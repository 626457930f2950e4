"""Training through a curriculum: measure each source, set the weights, train a round, measure again, stage after stage."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..data import Batches
from ..errors import FxPruneError
from ..wording import counted
from .curriculum import Curriculum, StagePlan
from .loop import Due, Training, room
from .objective import Inputs, inputs_of

log = logging.getLogger("fxprune")


@dataclass(frozen=True)
class StageRun:
    """A stage as it is trained.

    Attributes:
        batches: Of all its sources.
        held: To measure each source on.
        own: The sources' own weights.
        plan: Its length.
    """

    batches: Batches
    held: dict[str, Batches]
    own: dict[str, float]
    plan: StagePlan


@dataclass
class StagedTraining(Training):
    """A run through a curriculum.

    Where the run is follows from ``position.rounds``. Each record is a measurement: ``stage`` and ``round`` (from 1 on; the round
    that follows), ``step``, ``loss`` and ``degradation`` of each source and their ``mean`` (weighted by the sources' own weights;
    of the losses where there is no dense model), and for the round that follows its ``weights``, ``steps``, and the ``rows`` and
    ``tokens`` of each source. The last record of a stage has the reason in ``ended`` and no round.

    The adapters, the optimizer's moments and the learning rate's schedule go on from round to round, since only the mixture
    changes. At the end of a stage its best weights are put back; the next one has an optimizer and a schedule of its own.

    Attributes:
        curriculum: What the weights are, and when a stage ends.
        stages: In their order.
        dense: The model that degradation is measured against; None with static weights alone.
        home: Where it goes when it was measured, unless it teaches too.
    """

    curriculum: Curriculum = field(kw_only=True)
    stages: tuple[StageRun, ...] = field(kw_only=True)
    dense: nn.Module | None = field(kw_only=True)
    home: torch.device | None = field(kw_only=True)
    _open: tuple[int, int, Batches] | None = field(default=None, init=False)

    def run(self) -> None:
        """As `Training.run`.

        Raises:
            FxPruneError: As there; or a held-out loss is not finite.
            CheckpointError: A state could not be written.
        """
        if self.state is not None:
            self._resume()
        position = self.position
        if not position.rounds:
            self._measure_dense()
            self._validate()
        if self.dense is not None and self.teacher is None:
            self.dense.to(self.home)
        while not position.stopped:
            if self._within():
                with room(self.plan, position.step + 1, self.state):
                    self._step()
                self._after()
            else:
                self._turn()
        if self.state is not None:
            self._write()

    @property
    def _stage(self) -> int:
        """The stage that is measured or trained now, from 0 on."""
        rounds = self.position.rounds
        return 0 if not rounds else rounds[-1]["stage"] - 1 + bool(rounds[-1]["ended"])

    def _within(self) -> bool:
        """True inside a round."""
        rounds = self.position.rounds
        return bool(rounds) and self.position.step < rounds[-1]["step"] + rounds[-1]["steps"]

    def _due(self) -> Due:
        record = self.position.rounds[-1]
        place, plan = (record["stage"], record["round"]), self.stages[record["stage"] - 1].plan
        if self._open is None or self._open[:2] != place:
            self._open = *place, self._drawn(record["weights"], record["steps"], record["round"])
        index = self.position.step - record["step"]
        return Due(self._open[2], record["round"], index, plan.begin(record["round"] - 1) + index, plan.steps)

    def _drawn(self, weights: Mapping[str, float], steps: int, turn: int) -> Batches:
        """Batches of a round, as their epoch of its number: every source goes on where the rounds before left it."""
        number, before = self._stage, dict[str, int]()
        for record in self.position.rounds:
            if record["stage"] == number + 1 and record["round"] < turn:
                before = {name: before.get(name, 0) + rows for name, rows in record["rows"].items()}
        return self.stages[number].batches.drawn(weights, steps=steps, epoch=turn, before=before)

    def _turn(self) -> None:
        """Measure, then end the stage or open a round."""
        position, number = self.position, self._stage
        stage, earlier = self.stages[number], [r for r in position.rounds if r["stage"] == number + 1]
        record = self._measured(stage, number, len(earlier) + 1)
        if not earlier:
            self.optimizer.state.clear()
            position.best, position.waited = None, 0
        elif self.held is not None:
            self._validate()
        self._compare(record["mean"], fresh=not earlier)
        steps, record["ended"] = self._next(stage, record, earlier)
        if record["ended"]:
            position.rounds.append(record)
            self._finish(number)
            return
        taken = self._drawn(record["weights"], steps, record["round"]).taken(record["round"])
        record |= {"steps": steps, "rows": {n: t[0] for n, t in taken.items()}, "tokens": {n: t[1] for n, t in taken.items()}}
        position.rounds.append(record)
        shares = ", ".join(f"{name} {share:.1%}" for name, share in record["weights"].items())
        log.info("stage %d, round %d, from step %d: %s", number + 1, record["round"], position.step, shares)
        if self.state is not None and self.plan.settings.checkpoint_every:
            self._write()

    def _measured(self, stage: StageRun, number: int, turn: int) -> dict[str, Any]:
        """A record without its round."""
        found = self._losses(stage, f"measuring stage {number + 1}", self.model, self.takes)
        lost = {name: loss - self.position.dense[name] for name, loss in found.items()} if self.dense is not None else None
        of = found if lost is None else lost
        mean = sum(weight * of[name] for name, weight in stage.own.items()) / sum(stage.own.values())
        weights = self.curriculum.token_shares(stage.own, lost)
        place = {"stage": number + 1, "round": turn, "step": self.position.step}
        return place | {"loss": found, "degradation": lost, "mean": mean, "weights": weights, "steps": 0, "ended": ""}

    def _compare(self, mean: float, *, fresh: bool) -> None:
        """Keep the best weights, and count the measurements without a fall."""
        position = self.position
        fallen = position.best is None or mean < position.best - self.curriculum.threshold
        position.waited = 0 if fallen else position.waited + 1
        if position.best is None or mean < position.best:
            position.best = mean
            if not fresh or position.best_step is None:  # a stage begins with the best weights of the one before
                position.best_step = position.step
            self.best = {name: self.world.whole(p) for name, p in self.named.items()}

    def _next(self, stage: StageRun, record: dict[str, Any], earlier: list[dict[str, Any]]) -> tuple[int, str]:
        """Steps of the next round, and why there is none."""
        done, patience, waited = len(earlier), self.curriculum.patience, self.position.waited
        if done >= stage.plan.rounds:
            return 0, "all rounds done"
        if patience and waited >= patience:
            what = "held-out loss" if self.dense is None else "degradation"
            return 0, f"{what} has not fallen for {counted(waited, 'round')}"
        steps = stage.plan.begin(done + 1) - stage.plan.begin(done)
        if stage.plan.tokens is not None:
            left = stage.plan.tokens - sum(sum(r["tokens"].values()) for r in earlier)
            steps = min(steps, int(left // tokens_per_step(stage.batches, record["weights"])))
            if steps < 1 and earlier:
                return 0, "all tokens spent"
        return max(steps, 1), ""

    def _finish(self, number: int) -> None:
        """Put the best weights of a stage back; after the last one, measure all sources with them."""
        position = self.position
        log.info("stage %d ended at step %d: %s", number + 1, position.step, position.rounds[-1]["ended"])
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(self.world.place(self.best[name], parameter))
        if number + 1 < len(self.stages):
            return
        position.final = self._last()
        reasons = [r["ended"] for r in position.rounds if r["ended"]]
        position.stopped = reasons[0] if len(set(reasons)) == 1 else "; ".join(f"stage {i}: {r}" for i, r in enumerate(reasons, 1))

    def _last(self) -> dict[str, dict[str, Any]]:
        """Loss and degradation of every source with the weights that are kept."""
        found: dict[str, float] = {}
        for stage in self.stages:
            found |= self._losses(stage, "measuring all sources", self.model, self.takes, known=found)
        dense = self.position.dense
        return {n: {"loss": v, "degradation": v - dense[n] if self.dense is not None else None} for n, v in found.items()}

    def _measure_dense(self) -> None:
        if self.dense is None:
            return
        for stage in self.stages:
            known = self.position.dense
            known |= self._losses(stage, "measuring the dense model", self.dense, inputs_of(self.dense), known=known)

    def _losses(
        self, stage: StageRun, what: str, model: nn.Module, takes: Inputs, known: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Held-out loss of each source of a stage, nats per predicted token; without those that are known."""
        found = {}
        for done, (name, batches) in enumerate(stage.held.items()):
            if known is not None and name in known:
                continue
            if self.progress is not None and self.world.main:
                self.progress(f"{what} ({name})", done, len(stage.held))
            found[name] = loss = self.mean_loss(model, takes, batches)
            if not math.isfinite(loss):
                whose = "dense" if model is self.dense else "pruned"
                raise FxPruneError(
                    f"the {whose} model's loss on the held-out examples of '{name}' is {loss}, after {self.position.step} steps"
                )
        return found

    def _validate(self) -> None:
        """Perplexity of the validation text, for the report only."""
        if self.held is not None:
            entry = {"step": self.position.step, "perplexity": self.perplexity(self.held)}
            self.position.validation.append(entry)

    def _after(self) -> None:
        position, record = self.position, self.position.rounds[-1]
        if self.progress is not None and self.world.main:
            pace = f", {self.pace:,.0f} tokens/s" if self.pace else ""
            where = f"stage {record['stage']}, round {record['round']}"
            self.progress(f"recovery, {where} (loss {position.history['loss'][-1]:.3f}{pace})", position.step, self.plan.steps)
        every = self.plan.settings.checkpoint_every
        if self.state is not None and every and position.step % every == 0 and self._within():
            self._write()


def tokens_per_step(batches: Batches, weights: Mapping[str, float]) -> float:
    """Mean tokens of a step in which each source has its share of the tokens."""
    lengths = batches.row_tokens
    return batches.batch_size * sum(weights.values()) / sum(share / lengths[name] for name, share in weights.items())
