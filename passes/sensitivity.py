"""Sensitivity: what the loss becomes when units of one group go and everything else stays.

Units are taken away in the running graph and put back afterwards; it is not traced or rewritten again, and only what lies behind
the group is run. Where the kept units will be compensated for the loss of the others, they are here too: what other units can
make up for is cheap to remove.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from ..errors import FxPruneError, UsageError, check_whole, nearest
from ..groups import Groups, PruneGroup
from ..plan import PrunePlan
from .base import Pass
from .batches import Batch, Loss, Progress, causal_loss, counted_rows, kl_divergence, predictions, rows_of, warn_of_padding
from .compensation import fit, put_out
from .consumers import Consumer, features_of, sole_readers, weight_of
from .dependency import groups_of
from .importance import SCORES
from .least_squares import Gram, choose_ridge, solve, sum_gram
from .masking import linked, measurable, unfit, without
from .stepper import Compute, Stepper

CURVES = "fxprune.curves"

Curve: TypeAlias = Sequence[tuple[int, float]]
"""Rising numbers of removed units, each with the change of the loss (nats)."""

Curves: TypeAlias = Mapping[str, Curve]
"""The curve of each group, or of each lane of groups that lose units together (each the same number)."""

MEASURES = ("loss", "divergence")


class SensitivityPass(Pass):
    """Measure the loss curve of every group of some kinds; see `measure_curves`. Left in ``gm.meta["fxprune.curves"]``."""

    def __init__(
        self,
        calibration: Sequence[Batch],
        *,
        kinds: Sequence[str] | None = None,
        levels: int = 4,
        samples: int | None = None,
        compensated: bool = False,
        by: str = "loss",
        loss: Loss | None = None,
    ) -> None:
        super().__init__()
        self.calibration, self.kinds, self.levels = calibration, kinds, levels
        self.samples, self.compensated, self.by, self.loss = samples, compensated, by, loss

    def call(self, graph_module: GraphModule) -> PassResult:
        """Measure and annotate; the graph is not modified."""
        if SCORES not in graph_module.meta:
            raise UsageError("no scores on the graph: run an ImportancePass before the SensitivityPass")
        groups = groups_of(graph_module)
        graph_module.meta[CURVES] = measure_curves(
            graph_module,
            groups,
            graph_module.meta[SCORES],
            self.calibration,
            names=None if self.kinds is None else [g.name for g in measurable(groups) if g.kind in self.kinds],
            levels=self.levels,
            samples=self.samples,
            compensated=self.compensated,
            by=self.by,
            loss=self.loss,
        )
        return PassResult(graph_module, False)


def measure_curves(
    gm: GraphModule,
    groups: Groups,
    scores: Mapping[str, Tensor],
    calibration: Sequence[Batch],
    *,
    names: Sequence[str] | None = None,
    lanes: Mapping[str, Sequence[str]] | None = None,
    levels: int = 4,
    samples: int | None = None,
    compensated: bool = False,
    ridge: float | None = None,
    plan: PrunePlan | None = None,
    ahead: int | None = None,
    by: str = "loss",
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> dict[str, list[tuple[int, float]]]:
    """How much the loss rises as the least important units of one group after another go.

    Args:
        gm: The traced model.
        groups: Its prune groups.
        scores: Importance of each unit; the least important ones of a group go first.
        calibration: Batches as for `fxprune.score`.
        names: Groups to measure; by default every prunable group that can be, of those that have scores.
        lanes: Instead of ``names``: under names of their own, groups of one size that lose the same number of units at a time
            (with uniform widths, those that have the same role in every layer).
        levels: Into how many steps a group is cut; a group of few units is measured unit by unit.
        samples: How many of the calibration samples the loss is measured on: whole batches, from the last one on; by default all.
        compensated: Give the kept units the weights that least-squares compensation will, where one linear map and nothing else
            reads the group; other groups are measured without. They are fitted to the batches that the loss is not measured on, if
            there are any: what a fit has seen tells less of it.
        ridge: As for `fxprune.compensate`; where it is chosen, a group's is the one for its first number of removed units.
        plan: Measure each group with all others pruned as this plan says (compensated, if asked for): what a unit is worth beside
            what is left of the others. By default the others are whole.
        ahead: Measure only so many levels beyond what the plan takes from a group; by default every level, and none.
        by: ``loss``, or ``divergence``: KL(dense || pruned) of the predictions instead of the change of the loss. It is what that
            change comes to on text that the dense model predicts well on average, and on few samples it is far less noisy; a
            logarithm of the dense predictions, ``[samples, length, vocabulary]`` in float32, is kept for it.
        loss: ``(outputs, batch) -> scalar``; by default next-token cross-entropy. Not with ``divergence``.
        progress: Called with (what, done, total).

    Returns:
        For each group (or lane) ``[(units removed from each group, change of the mean loss), ...]``. The change is from the dense
        model's loss, or from that of the plan.

    Raises:
        UsageError: There is no calibration, a named group cannot be taken away by zeros (a norm or a router looks at its units),
            or a lane holds groups of several sizes.
        FxPruneError: The loss of the dense model is not finite.
    """
    if not calibration:
        raise UsageError("sensitivity is measured on calibration batches, and there are none")
    for name, value in (("levels", levels), ("samples", samples), ("ahead", ahead)):
        if value is not None:
            check_whole(name, value, 1)
    if by not in MEASURES:
        raise UsageError(f"unknown measure '{by}'; {nearest(str(by), MEASURES)}")
    if by == "divergence" and loss is not None:
        raise UsageError("divergence compares predictions, not losses: leave loss= out, or say by='loss'")
    if names is not None and lanes is not None:
        raise UsageError("names= and lanes= both say what to measure: give one of them")
    if plan is not None and plan.drop:
        raise UsageError("sensitivity is measured beside pruned units, not beside dropped layers: the plan drops some")
    warn_of_padding(gm, calibration)
    if lanes is None:
        chosen = [g.name for g in measurable(groups) if g.name in scores] if names is None else names
        lanes = {name: [name] for name in chosen}
    readers = sole_readers(gm, groups) if compensated else {}
    probes = [_probe(groups, scores, name, members, levels, plan, ahead) for name, members in lanes.items()]
    device = next(gm.parameters()).device
    batches = [{k: v.to(device) for k, v in batch.items()} for batch in calibration]
    with torch.no_grad():
        run = _Run(gm, groups, batches, samples, ridge, loss or causal_loss, readers)
        if by == "divergence":
            run.compare_with_dense()
        return run.curves(probes, plan, progress)


@dataclass(frozen=True)
class _Probe:
    """A lane with the units of its groups in the order in which they go, how many the plan takes, and which numbers to try."""

    lane: str
    groups: list[PruneGroup]
    orders: dict[str, Tensor]
    gone: int
    counts: list[int]

    @property
    def group(self) -> str:
        """Name of the group, of a lane that has one."""
        return self.groups[0].name

    def units(self, count: int) -> dict[str, Tensor]:
        """The units that go if so many do, by group."""
        return {name: order[:count] for name, order in self.orders.items()}


def _probe(
    groups: Groups,
    scores: Mapping[str, Tensor],
    name: str,
    members: Sequence[str],
    levels: int,
    plan: PrunePlan | None,
    ahead: int | None,
) -> _Probe:
    chosen = [groups[member] for member in members]
    for group in chosen:
        if reason := unfit(group):
            raise UsageError(f"the sensitivity of group '{group.name}' cannot be measured: {reason}")
        if group.name not in scores:
            raise UsageError(f"there are no scores for group '{group.name}'; score the model first")
    planned = {group.size - len(plan.keep[group.name]) if plan and group.name in plan.keep else 0 for group in chosen}
    if len({group.size for group in chosen}) != 1 or len(planned) != 1:
        raise UsageError(f"the groups of '{name}' must be of one size, and lose equally many units by the plan")
    gone, most = planned.pop(), min(group.size - group.least for group in chosen)
    counts = sorted({round(most * (i + 1) / levels) for i in range(levels)} | {0})
    counts = [count for count in counts if count != gone] if ahead is None else [c for c in counts if c > gone][:ahead]
    return _Probe(name, chosen, {g.name: torch.argsort(scores[g.name], stable=True) for g in chosen}, gone, counts)


class _Run:
    """The graph on all batches, piece by piece, with the rest of it run again for every probe."""

    def __init__(
        self,
        gm: GraphModule,
        groups: Groups,
        batches: Sequence[Batch],
        samples: int | None,
        ridge: float | None,
        loss: Loss,
        readers: Mapping[str, Consumer],
    ) -> None:
        self.stepper, self.groups, self.batches, self.ridge, self.loss = Stepper(gm), groups, batches, ridge, loss
        self.gm, self.readers = gm, readers
        self.ridges: dict[str, float] = {}
        self.instead: dict[Node, Compute] = {}
        self.zeros: dict[str, tuple[ExitStack, Mapping[str, Tensor]]] = {}
        self.end = len(self.stepper.nodes)
        sizes = [rows_of(batch) for batch in batches]
        first = 0 if samples is None else next((i for i in reversed(range(len(sizes))) if sum(sizes[i:]) >= samples), 0)
        self.rows, self.measured, self.fitted = sizes[first:], batches[first:], batches[:first] or batches

    def compare_with_dense(self) -> None:
        """From now on the loss is the divergence from the predictions that the dense graph makes."""
        known: dict[int, Tensor] = {}
        for batch in self.measured:
            known[id(batch)] = predictions(self.stepper.advance(self.stepper.begin(batch), 0, self.end), batch)

        def divergence(output: Any, batch: Batch) -> Tensor:
            return kl_divergence(predictions(output, batch), known[id(batch)])

        self.loss = divergence

    def curves(
        self, probes: Sequence[_Probe], plan: PrunePlan | None, progress: Progress | None
    ) -> dict[str, list[tuple[int, float]]]:
        """Every probe's curve: of one group from its place in the graph on, of several groups as plans of their own."""
        known, done = {probe.lane: {probe.gone: 0.0} for probe in probes}, 0

        def advance() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress("sensitivity", done, len(probes))

        with self._pruned(plan):
            base = self._whole()
            if not math.isfinite(base):
                raise FxPruneError(f"the calibration loss is {base}: nothing was pruned")
            for probe, place, states, gram in self._places([p for p in probes if len(p.groups) == 1]):
                for count in probe.counts:
                    known[probe.lane][count] = self._without(probe, count, gram, states, place, plan) - base
                advance()
        for probe in (p for p in probes if len(p.groups) > 1):
            for count in probe.counts:
                left = {name: order[count:] for name, order in probe.orders.items()}
                with self._pruned(PrunePlan.from_keep(self.groups, {**(plan.keep if plan else {}), **left})):
                    known[probe.lane][count] = self._whole() - base
            advance()
        return {name: sorted(points.items()) for name, points in known.items()}

    @contextmanager
    def _pruned(self, plan: PrunePlan | None) -> Iterator[None]:
        """The graph computes what a plan leaves: with compensated maps, and with zeros where there are none."""
        with ExitStack() as stack:
            if plan is not None:
                gone = plan.removed()
                for part in linked(self.groups, [n for n in gone if n not in self.readers]):
                    held, units = stack.enter_context(ExitStack()), {n: gone[n] for n in part}
                    self._zero(held, units)
                    self.zeros |= dict.fromkeys(part, (held, units))
                others = PrunePlan.from_keep(self.groups, {n: u for n, u in plan.keep.items() if n in self.readers})
                fitted, _ = fit(self.gm, others, self.fitted, ridge=self.ridge)
                self.instead = {f.consumer.node: put_out(f.consumer, f.solution.weight, f.solution.left) for f in fitted}
            try:
                yield
            finally:
                self.instead, self.zeros = {}, {}

    def _zero(self, stack: ExitStack, gone: Mapping[str, Tensor]) -> None:
        for name, units in gone.items():
            stack.enter_context(without(self.groups, self.groups[name], units))

    def _places(self, probes: Sequence[_Probe]) -> Iterator[tuple[_Probe, int, Sequence[dict[Node, Any]], Gram | None]]:
        """Each probe in graph order, with the place that it is run from, the states there, and X^T X of what its map reads."""
        place, first_use = self.stepper.place, self.stepper.first_use

        def start(probe: _Probe) -> int:
            reader = self.readers.get(probe.group)
            return place[reader.node] if reader else min(first_use[m.name] for m in probe.groups[0].members if m.trainable)

        states, now = [self.stepper.begin(b) for b in self.measured], 0
        # those that weights are fitted to; where both are the same, so are the states
        apart = self.fitted is not self.batches and any(p.group in self.readers for p in probes)
        others = [self.stepper.begin(b) for b in self.fitted] if apart else states
        for probe in sorted(probes, key=start):
            for state in (*states, *(others if apart else ())):
                self.stepper.advance(state, now, start(probe), self.instead)
            now, reader = start(probe), self.readers.get(probe.group)
            gram = None
            if reader is not None and probe.counts:
                gram = sum_gram(counted_rows(s[reader.operand], b) for s, b in zip(others, self.fitted, strict=True))
            yield probe, now, states, gram

    def _without(
        self,
        probe: _Probe,
        count: int,
        gram: Gram | None,
        states: Sequence[dict[Node, Any]],
        place: int,
        plan: PrunePlan | None,
    ) -> float:
        """The loss without the least important units of a group."""
        if gram is not None:
            return self._loss(states, place, {**self.instead, **self._compensated(probe, count, gram, plan)})
        held, planned = self.zeros.get(probe.group, (ExitStack(), {}))
        held.close()  # the plan's zeros give way to these
        try:
            with ExitStack() as stack:
                self._zero(stack, {**planned, **probe.units(count)})
                return self._loss(states, place, self.instead)
        finally:
            self._zero(held, planned)

    def _compensated(self, probe: _Probe, count: int, gram: Gram, plan: PrunePlan | None) -> dict[Node, Compute]:
        """The reader with the weights of its kept features compensated; other groups that it reads are as in the plan."""
        reader = self.readers[probe.group]
        weight = weight_of(self.groups, reader)
        stays = torch.ones(weight.shape[1], dtype=torch.bool)
        stays[features_of(self.groups, reader, {**(plan.removed() if plan else {}), **probe.units(count)})] = False
        ridge = self.ridge if self.ridge is not None else self.ridges.get(probe.group)
        if ridge is None:
            ridge = gram.for_all(choose_ridge(weight, gram, stays))
            if count:  # where nothing goes, any would do
                self.ridges[probe.group] = ridge
        solved = solve(weight, gram.total, stays, ridge)
        return {reader.node: put_out(reader, solved, stays.nonzero().flatten())}

    def _whole(self) -> float:
        """The mean loss of the whole graph."""
        return self._loss([self.stepper.begin(b) for b in self.measured], 0, self.instead)

    def _loss(self, states: Sequence[dict[Node, Any]], place: int, instead: Mapping[Node, Compute]) -> float:
        """The mean loss over samples from a place on; the states stay as they are."""
        total = 0.0
        for state, batch, rows in zip(states, self.measured, self.rows, strict=True):
            out = self.stepper.advance(dict(state), place, self.end, instead)
            total += float(self.loss(out, batch)) * rows
        return total / sum(self.rows)
