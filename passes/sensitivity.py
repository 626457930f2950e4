"""Sensitivity: what the loss becomes when units of one group go and everything else stays.

Units are taken away in the running graph and put back afterwards; it is not traced or rewritten again, and only what lies behind
the group is run. Where the kept units will be compensated for the loss of the others, they are here too: what other units can
make up for is cheap to remove.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from ..errors import FxPruneError, UsageError, nearest
from ..groups import Groups, PruneGroup
from ..plan import PrunePlan
from .base import Pass
from .compensation import RIDGE, fit, put_out, solve, sum_gram
from .consumers import Consumer, columns, counted_rows, find_consumers
from .dependency import groups_of
from .importance import SCORES, Batch, Loss, causal_loss, warn_of_padding
from .inference import axes_of, tensor_list
from .stepper import Compute, Stepper

CURVES = "fxprune.curves"

Curves: TypeAlias = Mapping[str, Sequence[tuple[int, float]]]
"""For each group rising numbers of removed units, from 0 on, each with the change of the loss (nats)."""

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
    levels: int = 4,
    samples: int | None = None,
    compensated: bool = False,
    ridge: float = RIDGE,
    plan: PrunePlan | None = None,
    by: str = "loss",
    loss: Loss | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, list[tuple[int, float]]]:
    """How much the loss rises as the least important units of one group after another go.

    Args:
        gm: The traced model.
        groups: Its prune groups.
        scores: Importance of each unit; the least important ones of a group go first.
        calibration: Batches as for `fxprune.score`.
        names: Groups to measure; by default every prunable group that can be, of those that have scores.
        levels: Into how many steps a group is cut; a group of few units is measured unit by unit.
        samples: How many of the calibration samples the loss is measured on: whole batches, from the last one on; by default all.
        compensated: Give the kept units the weights that least-squares compensation will, where one linear map and nothing else
            reads the group; other groups are measured without. They are fitted to the batches that the loss is not measured on, if
            there are any: what a fit has seen tells less of it.
        ridge: As for `fxprune.compensate`.
        plan: Measure each group with all others pruned as this plan says (compensated, if asked for), and from no unit removed to
            all: what a unit is worth beside what is left of the others. By default the others are whole.
        by: ``loss``, or ``divergence``: KL(dense || pruned) of the predictions instead of the change of the loss. It is what that
            change comes to on text that the dense model predicts well on average, and on few samples it is far less noisy; a
            logarithm of the dense predictions, ``[samples, length, vocabulary]`` in float32, is kept for it.
        loss: ``(outputs, batch) -> scalar``; by default next-token cross-entropy. Not with ``divergence``.
        progress: Called with (what, done, total).

    Returns:
        For each group ``[(removed units, change of the mean loss), ...]``, from no unit to all that may go. The change is from the
        dense model's loss, or from that of the plan.

    Raises:
        UsageError: There is no calibration, or a named group cannot be taken away by zeros: a norm or a router looks at its units.
        FxPruneError: The loss of the dense model is not finite.
    """
    if not calibration:
        raise UsageError("sensitivity is measured on calibration batches, and there are none")
    for name, value in (("levels", levels), ("samples", samples)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    if by not in MEASURES:
        raise UsageError(f"unknown measure '{by}'; {nearest(str(by), MEASURES)}")
    if by == "divergence" and loss is not None:
        raise UsageError("divergence compares predictions, not losses: leave loss= out, or say by='loss'")
    warn_of_padding(gm, calibration)
    readers: dict[str, list[Consumer]] = {}
    for consumer in find_consumers(gm, groups) if compensated else ():
        for name in consumer.groups:
            if _leaves_by(gm, groups, groups[name], consumer.node):
                readers.setdefault(name, []).append(consumer)
    probes = _probes(gm, groups, scores, names, levels, {n: found[0] for n, found in readers.items() if len(found) == 1})
    device = next(gm.parameters()).device
    batches = [{k: v.to(device) for k, v in batch.items()} for batch in calibration]
    with torch.no_grad(), ExitStack() as stack:
        run = _Run(gm, groups, batches, samples, ridge, loss or causal_loss)
        if by == "divergence":
            run.compare_with_dense()
        if plan is not None:
            run.prune(plan, {n for n, found in readers.items() if len(found) == 1}, stack)
        return run.curves(probes, plan, progress)


@dataclass(frozen=True)
class _Probe:
    """A group with the numbers of units to take away, the place to run from, and the one map that reads it (if compensated)."""

    group: PruneGroup
    order: Tensor
    counts: list[int]
    start: int
    reader: Consumer | None


def _probes(
    gm: GraphModule,
    groups: Groups,
    scores: Mapping[str, Tensor],
    names: Sequence[str] | None,
    levels: int,
    readers: Mapping[str, Consumer],
) -> list[_Probe]:
    """What to measure, in the order of the graph."""
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    first_use = {
        str(node.target): min((place[u] for u in node.users), default=place[node]) for node in place if node.op == "get_attr"
    }
    chosen = [groups[n] for n in names] if names is not None else [g for g in measurable(groups) if g.name in scores]
    found = []
    for group in chosen:
        if reason := _unfit(group):
            raise UsageError(f"the sensitivity of group '{group.name}' cannot be measured: {reason}")
        if group.name not in scores:
            raise UsageError(f"there are no scores for group '{group.name}'; score the model first")
        most = group.size - group.least
        counts = sorted({round(most * (i + 1) / levels) for i in range(levels)} - {0})
        reader = readers.get(group.name)
        start = place[reader.node] if reader else min(first_use[m.name] for m in group.members if m.trainable)
        found.append(_Probe(group, torch.argsort(scores[group.name], stable=True), counts, start, reader))
    return sorted(found, key=lambda probe: probe.start)


def _leaves_by(gm: GraphModule, groups: Groups, group: PruneGroup, node: Node) -> bool:
    """Whether this is the only operator that reads a group's axis and has it no more in what it gives."""
    values = groups.inference.values
    return all(
        other is node or group.axis in axes_of(values.get(other.name)) or not tensor_list(values.get(other.name))
        for other in gm.graph.nodes
        if any(group.axis in axes_of(values.get(source.name)) for source in other.all_input_nodes)
    )


class _Run:
    """The dense graph on all batches, piece by piece, with the rest of it run again for every probe."""

    def __init__(
        self,
        gm: GraphModule,
        groups: Groups,
        batches: Sequence[Batch],
        samples: int | None,
        ridge: float,
        loss: Loss,
    ) -> None:
        self.stepper, self.groups, self.batches, self.ridge, self.loss = Stepper(gm), groups, batches, ridge, loss
        self.gm = gm
        self.instead: dict[Node, Compute] = {}
        self.zeros: dict[str, tuple[ExitStack, Mapping[str, Tensor]]] = {}
        self.end = len(self.stepper.nodes)
        sizes = [max(v.shape[0] if v.dim() else 1 for v in batch.values()) for batch in batches]
        first = 0 if samples is None else next((i for i in reversed(range(len(sizes))) if sum(sizes[i:]) >= samples), 0)
        self.rows, self.measured, self.fitted = sizes[first:], batches[first:], batches[:first] or batches

    def compare_with_dense(self) -> None:
        """From now on the loss is the divergence from the predictions that the dense graph makes."""
        known: dict[int, Tensor] = {}
        for batch in self.measured:
            known[id(batch)] = _predictions(self.stepper.advance(self.stepper.begin(batch), 0, self.end), batch)

        def divergence(output: Any, batch: Batch) -> Tensor:
            wanted = known[id(batch)]
            found = _predictions(output, batch)
            return torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True) / len(wanted)

        self.loss = divergence

    def prune(self, plan: PrunePlan, compensated: set[str], stack: ExitStack) -> None:
        """Make the graph compute what a plan leaves: with compensated maps, and with zeros where there are none."""
        if plan.drop:
            raise UsageError("sensitivity is measured beside pruned units, not beside dropped layers: the plan drops some")
        for part in _linked(self.groups, [n for n in plan.keep if n not in compensated]):
            held = stack.enter_context(ExitStack())
            gone = {n: _others(self.groups[n].size, plan.keep[n]) for n in part}
            self._zero(held, gone)
            self.zeros |= dict.fromkeys(part, (held, gone))
        others = PrunePlan.from_keep(self.groups, {n: u for n, u in plan.keep.items() if n in compensated})
        fitted, _ = fit(self.gm, others, self.fitted, ridge=self.ridge)
        self.instead = {f.consumer.node: put_out(f.consumer, f.weight, f.left) for f in fitted}

    def _zero(self, stack: ExitStack, gone: Mapping[str, Tensor]) -> None:
        for name, units in gone.items():
            stack.enter_context(without(self.groups, self.groups[name], units))

    def curves(
        self, probes: Sequence[_Probe], plan: PrunePlan | None, progress: Callable[[str, int, int], None] | None
    ) -> dict[str, list[tuple[int, float]]]:
        """Every probe's curve."""
        base = self._loss([self.stepper.begin(b) for b in self.measured], 0, self.instead)
        if not math.isfinite(base):
            raise FxPruneError(f"the calibration loss is {base}: nothing was pruned")
        states, place = [self.stepper.begin(b) for b in self.measured], 0
        # those that weights are fitted to; where both are the same, so are the states
        apart = self.fitted is not self.batches and any(p.reader for p in probes)
        others = [self.stepper.begin(b) for b in self.fitted] if apart else []
        found: dict[str, list[tuple[int, float]]] = {}
        for number, probe in enumerate(probes):
            for state in (*states, *others):
                self.stepper.advance(state, place, probe.start, self.instead)
            place = probe.start
            gram = self._gram(others or states, probe.reader) if probe.reader else None
            kept = None if plan is None else plan.keep.get(probe.group.name)
            known = {0 if kept is None else probe.group.size - len(kept): 0.0}
            for count in {0, *probe.counts} - set(known):
                known[count] = self._without(probe, count, gram, states, place, plan) - base
            found[probe.group.name] = sorted(known.items())
            if progress is not None:
                progress("sensitivity", number + 1, len(probes))
        return found

    def _without(
        self,
        probe: _Probe,
        count: int,
        gram: Tensor | None,
        states: Sequence[dict[Node, Any]],
        place: int,
        plan: PrunePlan | None,
    ) -> float:
        """The loss without the least important units of a group."""
        if probe.reader is not None and gram is not None:
            return self._loss(states, place, {**self.instead, **self._compensated(probe, probe.reader, gram, count, plan)})
        held, planned = self.zeros.get(probe.group.name, (ExitStack(), {}))
        held.close()  # the plan's zeros give way to these
        try:
            with ExitStack() as stack:
                self._zero(stack, {**planned, probe.group.name: probe.order[:count]})
                return self._loss(states, place, self.instead)
        finally:
            self._zero(held, planned)

    def _loss(self, states: Sequence[dict[Node, Any]], place: int, instead: Mapping[Node, Compute]) -> float:
        """The mean loss over samples from a place on; the states stay as they are."""
        total = 0.0
        for state, batch, rows in zip(states, self.measured, self.rows, strict=True):
            out = self.stepper.advance(dict(state), place, self.end, instead)
            total += float(self.loss(out, batch)) * rows
        return total / sum(self.rows)

    def _gram(self, states: Sequence[Mapping[Node, Any]], reader: Consumer) -> Tensor:
        return sum_gram(counted_rows(s[reader.operand], b) for s, b in zip(states, self.fitted, strict=True))[0]

    def _compensated(
        self, probe: _Probe, reader: Consumer, gram: Tensor, count: int, plan: PrunePlan | None
    ) -> dict[Node, Compute]:
        """The reader with the weights of its kept features compensated; other groups that it reads are as in the plan."""
        tensor = self.groups.parameters[reader.weight].tensor
        assert tensor is not None
        weight = columns(tensor.detach(), reader.dim)
        stays = torch.ones(weight.shape[1], dtype=torch.bool)
        gone = {} if plan is None else {n: _others(self.groups[n].size, plan.keep[n]) for n in reader.groups if n in plan.keep}
        for name, units in {**gone, probe.group.name: probe.order[:count]}.items():
            for member in self.groups[name].members:
                if (member.name, member.dim) == (reader.weight, reader.dim):
                    stays[member.indices(units)] = False
        return {reader.node: put_out(reader, solve(weight, gram, stays, self.ridge), stays.nonzero().flatten())}


def _predictions(output: Any, batch: Batch) -> Tensor:
    """Logarithms of the predicted probabilities, a row for each token that is no padding."""
    logits = getattr(output, "logits", None)
    if logits is None:
        leaves = torch.utils._pytree.tree_leaves(output)
        logits = next((t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()), None)
    if logits is None or logits.dim() < 2:
        raise UsageError("divergence compares predictions, and the model gives no logits: say by='loss' and pass loss=")
    return torch.log_softmax(counted_rows(logits, batch).float(), -1)


def _linked(groups: Groups, names: Sequence[str]) -> list[list[str]]:
    """Groups in sets that have no parameter in common: zeros in one are put back without touching those of another."""
    import networkx as nx

    graph = nx.Graph()
    graph.add_nodes_from(names)
    graph.add_edges_from((name, ("parameter", m.name)) for name in names for m in groups[name].members if m.trainable)
    return [[n for n in names if n in part] for part in nx.connected_components(graph)]


def _others(size: int, units: Tensor) -> Tensor:
    """The units of a group that are not among these."""
    left = torch.ones(size, dtype=torch.bool)
    left[units] = False
    return left.nonzero().flatten()


def measurable(groups: Groups) -> list[PruneGroup]:
    """The prunable groups whose units can be taken away by zeros."""
    return [g for g in groups.values() if not _unfit(g)]


def _unfit(group: PruneGroup) -> str:
    """Why zeros cannot stand for the removal of a group's units; empty if they can."""
    if not group.prunable:
        return f"it cannot be pruned ({group.reason})"
    if group.normalised:
        return "a norm, a softmax or a router looks at all of its units"
    return ""


@contextmanager
def without(groups: Groups, group: PruneGroup, units: Tensor) -> Iterator[None]:
    """The model with the parameter slices of some units set to zero; afterwards it is as it was, bit for bit."""
    saved: list[tuple[Tensor, int, Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for member in (m for m in group.members if m.trainable):
                parameter = cast(Tensor, groups.parameters[member.name].tensor)
                index = member.indices(units).to(parameter.device)
                saved.append((parameter, member.dim, index, parameter.index_select(member.dim, index)))
                parameter.index_fill_(member.dim, index, 0)
        yield
    finally:
        with torch.no_grad():
            for parameter, dim, index, values in reversed(saved):
                parameter.index_copy_(dim, index, values)
