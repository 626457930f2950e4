"""The importance pass: calibration gradients reduced to one score per unit, parameter by parameter, and freed at once.

The full gradient of the model never exists: a post-accumulate hook on each parameter adds its statistic to the scores of the
units that own its elements and drops the gradient, before backward reaches the next layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from ..criteria import AGGREGATIONS, Criterion, UserCriterion, aggregate, find_criterion
from ..errors import FxPruneError, UsageError, nearest
from ..groups import Groups, Member, PruneGroup
from .base import Pass
from .dependency import groups_of

SCORES = "fxprune.scores"

Batch: TypeAlias = Mapping[str, Tensor]
Loss: TypeAlias = Callable[[Any, Batch], Tensor]


class ImportancePass(Pass):
    """Score every unit of every prunable group; see `score` for the arguments.

    Scores are left in ``gm.meta["fxprune.scores"]`` and, on each parameter's node, in ``node.meta["fxprune.scores"]``.
    """

    def __init__(
        self,
        criterion: str | Criterion | UserCriterion = "taylor1",
        calibration: Sequence[Batch] = (),
        *,
        aggregation: str = "sum",
        loss: Loss | None = None,
        seed: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        super().__init__()
        self.criterion, self.calibration, self.aggregation = criterion, calibration, aggregation
        self.loss, self.seed, self.progress = loss, seed, progress

    def call(self, graph_module: GraphModule) -> PassResult:
        """Score and annotate; the graph is not modified."""
        groups = groups_of(graph_module)
        scores = score(
            graph_module,
            groups,
            criterion=self.criterion,
            calibration=self.calibration,
            aggregation=self.aggregation,
            loss=self.loss,
            seed=self.seed,
            progress=self.progress,
        )
        graph_module.meta[SCORES] = scores
        reach: dict[str, dict[str, Tensor]] = {}
        for name in scores:
            for member in groups[name].members:
                reach.setdefault(member.name, {})[name] = scores[name]
        for node in graph_module.graph.nodes:
            if node.op == "get_attr" and node.target in reach:
                node.meta[SCORES] = reach[node.target]
        return PassResult(graph_module, False)


def score(
    gm: GraphModule,
    groups: Groups,
    criterion: str | Criterion | UserCriterion = "taylor1",
    calibration: Sequence[Batch] = (),
    *,
    aggregation: str = "sum",
    loss: Loss | None = None,
    seed: int = 0,
    sweeps: int = 4,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Importance of every unit of every prunable group.

    A unit's score adds up exactly the elements it owns, in each parameter dimension the group reaches (an element that it owns
    along two dimensions of one parameter counts once); the parameters' scores are then aggregated.

    Args:
        gm: The traced model.
        groups: Its prune groups.
        criterion: A name from `fxprune.criteria.CRITERIA`, or a callable ``(name, weight, gradient) -> scores``.
        calibration: Batches: mappings of ``input_ids`` and the like, with ``[samples, length]`` tensors. Gradients are of the
            mean loss of each batch; several batches are averaged (after the absolute value for ``taylor1``, so one batch of all
            samples is LLM-Pruner's definition to the letter; ``taylor_vector`` sums before it).
        aggregation: One of `fxprune.criteria.AGGREGATIONS`.
        loss: ``(outputs, batch) -> scalar``; by default next-token cross-entropy on the batch's labels or input ids.
        seed: For ``random``.
        sweeps: ``taylor_mixed`` needs gradients accumulated over samples; each sweep accumulates one share of the parameters.
        progress: Called with (what, done, total).

    Returns:
        For each prunable group a float32 CPU tensor of shape ``[group.size]``, larger is more important.

    Raises:
        UsageError: An unknown criterion or aggregation, or no calibration where it is needed.
        FxPruneError: Weights, loss or scores that are NaN or infinite.
    """
    found = find_criterion(criterion)
    if aggregation not in AGGREGATIONS:
        raise UsageError(f"unknown aggregation '{aggregation}'; {nearest(aggregation, AGGREGATIONS)}")
    wanted = [g for g in groups.values() if g.prunable]
    _check_weights(groups)
    if isinstance(found, Criterion) and found.name == "random":
        generator = torch.Generator().manual_seed(seed)
        return {g.name: torch.rand(g.size, generator=generator) for g in wanted}
    ledger = _Ledger(groups, wanted)
    if isinstance(found, Criterion) and not found.gradient:
        assert found.element is not None
        for name in ledger.parameters:
            ledger.add(name, found.element(ledger.weight(name), torch.empty(0)))
        return ledger.totals(aggregation)
    if not calibration:
        label = found.name if isinstance(found, Criterion) else getattr(found, "__name__", "this")
        raise UsageError(f"criterion '{label}' needs calibration batches, and there are none")
    _collect(gm, ledger, found, calibration, loss or causal_loss, sweeps, progress or (lambda what, done, total: None))
    return ledger.totals(aggregation, signed=isinstance(found, Criterion) and found.signed)


def _check_weights(groups: Groups) -> None:
    for name, value in groups.parameters.items():
        assert value.tensor is not None
        if value.tensor.is_meta:
            raise UsageError(f"parameter '{name}' is on the meta device: there are no weights to score")
        if not bool(torch.isfinite(value.tensor).all()):
            raise FxPruneError(f"parameter '{name}' holds NaN or infinite values: the model is damaged, nothing was pruned")


class _Ledger:
    """Running per-unit sums for every member of every group."""

    def __init__(self, groups: Groups, wanted: Sequence[PruneGroup]) -> None:
        self.groups, self.wanted = groups, wanted
        self.members: dict[str, list[tuple[PruneGroup, Member]]] = {}
        self.sums: dict[tuple[str, str, int], Tensor] = {}
        for group in wanted:
            for member in group.members:
                if member.trainable:
                    self.members.setdefault(member.name, []).append((group, member))
                    self.sums[group.name, member.name, member.dim] = torch.zeros(group.size, dtype=torch.float64)
        self._incidence: dict[tuple[str, int, str], tuple[Tensor, Tensor]] = {}

    @property
    def parameters(self) -> list[str]:
        return list(self.members)

    def weight(self, name: str) -> Tensor:
        tensor = self.groups.parameters[name].tensor
        assert tensor is not None
        return tensor.detach()

    def add(self, name: str, statistic: Tensor, weight: float = 1.0) -> None:
        """Add an element-wise statistic of one parameter to the units that own the elements."""
        earlier: dict[str, list[Member]] = {}
        lines: dict[int, Tensor] = {}
        for group, member in self.members[name]:
            own = statistic
            before = earlier.setdefault(group.name, [])
            if before:
                own = _without_shared(statistic, member, before)
            if own is not statistic or member.dim not in lines:
                others = [d for d in range(own.dim()) if d != member.dim]
                line = own.sum(others, dtype=torch.float32).double().cpu() if others else own.double().cpu()
                if own is statistic:
                    lines[member.dim] = line
            else:
                line = lines[member.dim]
            key = (name, member.dim, group.name)
            if key not in self._incidence:
                self._incidence[key] = member.incidence
            units, positions = self._incidence[key]
            self.sums[group.name, name, member.dim].index_add_(0, units, line[positions] * weight)
            before.append(member)

    def totals(self, aggregation: str, *, signed: bool = False) -> dict[str, Tensor]:
        """One score per unit."""
        result = {}
        for group in self.wanted:
            own = [self.sums[group.name, m.name, m.dim] for m in group.members if m.trainable]
            total = aggregate([s.abs() for s in own] if signed else own, aggregation)
            if not bool(torch.isfinite(total).all()):
                raise FxPruneError(f"the scores of group '{group.name}' are not finite: check the calibration data and the loss")
            result[group.name] = total.float()
        return result


def _without_shared(statistic: Tensor, member: Member, before: Sequence[Member]) -> Tensor:
    """The statistic without elements that a unit already owns along an earlier dimension of the same parameter."""
    out = statistic.clone()
    for other in before:
        size = max(member.axis.size, 1)
        mine = torch.zeros(statistic.shape[member.dim], size, dtype=torch.bool)
        mine[member.incidence[1], member.incidence[0]] = True
        theirs = torch.zeros(statistic.shape[other.dim], size, dtype=torch.bool)
        theirs[other.incidence[1], other.incidence[0]] = True
        shared = (theirs.float() @ mine.float().T) > 0  # [other.dim, member.dim]
        shape = [1] * statistic.dim()
        shape[other.dim], shape[member.dim] = shared.shape
        grid = shared if other.dim < member.dim else shared.T
        out.masked_fill_(grid.reshape(shape).to(out.device), 0)
    return out


def _collect(
    gm: GraphModule,
    ledger: _Ledger,
    criterion: Criterion | UserCriterion,
    calibration: Sequence[Batch],
    loss: Loss,
    sweeps: int,
    progress: Callable[[str, int, int], None],
) -> None:
    accepted = input_names(gm)
    if isinstance(criterion, Criterion) and criterion.accumulate:
        _mixed(gm, ledger, calibration, loss, sweeps, accepted, progress)
        return
    steps = list(_samples(calibration)) if isinstance(criterion, Criterion) and criterion.per_sample else list(calibration)

    def on_gradient(name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if isinstance(criterion, Criterion):
            assert criterion.element is not None
            statistic = criterion.element(parameter.detach(), gradient)
        else:
            statistic = criterion(name, parameter.detach(), gradient)
            if not isinstance(statistic, Tensor) or statistic.shape != parameter.shape:
                raise UsageError(f"the criterion must return scores of the weight's shape {tuple(parameter.shape)} for '{name}'")
        ledger.add(name, statistic, 1.0 / len(steps))
        parameter.grad = None

    with _hooks(gm, ledger, ledger.parameters, on_gradient):
        for i, batch in enumerate(steps):
            _backward(gm, batch, loss, accepted)
            progress("importance", i + 1, len(steps))


def _mixed(
    gm: GraphModule,
    ledger: _Ledger,
    calibration: Sequence[Batch],
    loss: Loss,
    sweeps: int,
    accepted: set[str],
    progress: Callable[[str, int, int], None],
) -> None:
    """``|w g - w h w / 2|`` needs g and h of all samples element by element: a share of the parameters at a time."""
    samples, names = list(_samples(calibration)), ledger.parameters
    share = math.ceil(len(names) / max(1, min(sweeps, len(names))))
    chunks = [names[i : i + share] for i in range(0, len(names), share)]
    for number, chunk in enumerate(chunks):
        first: dict[str, Tensor] = {}
        second: dict[str, Tensor] = {}

        def on_gradient(name: str, parameter: Tensor, first: dict[str, Tensor] = first, second: dict[str, Tensor] = second) -> None:
            gradient = parameter.grad
            assert gradient is not None
            for table, value in ((first, gradient), (second, gradient.square())):
                table[name] = value / len(samples) if name not in table else table[name].add_(value, alpha=1 / len(samples))
            parameter.grad = None

        with _hooks(gm, ledger, chunk, on_gradient):
            for i, batch in enumerate(samples):
                _backward(gm, batch, loss, accepted)
                progress("importance", number * len(samples) + i + 1, len(chunks) * len(samples))
        for name in chunk:
            if name in first:
                w = ledger.weight(name)
                ledger.add(name, (w * first.pop(name) - 0.5 * w * second.pop(name) * w).abs_())


@contextmanager
def _hooks(
    gm: GraphModule, ledger: _Ledger, names: Sequence[str], on_gradient: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Only the named parameters get gradients, each handed over and freed; afterwards everything is as before."""
    wanted = {id(ledger.groups.parameters[n].tensor): n for n in names}
    before = {p: (p.requires_grad, p.grad) for p in gm.parameters()}
    handles = []
    try:
        for parameter in before:
            name = wanted.get(id(parameter))
            parameter.grad = None
            parameter.requires_grad_(name is not None)
            if name is not None:
                handles.append(parameter.register_post_accumulate_grad_hook(lambda p, name=name: on_gradient(name, p)))  # type: ignore[misc]
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, (required, gradient) in before.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _backward(gm: nn.Module, batch: Batch, loss: Loss, accepted: set[str]) -> None:
    device = next(gm.parameters()).device
    moved = {k: v.to(device) for k, v in batch.items()}
    inputs = {k: v for k, v in moved.items() if k in accepted}
    if not inputs:
        raise UsageError(f"a calibration batch has {sorted(batch)}, but the model was traced with {sorted(accepted)}")
    value = loss(gm(**inputs), moved)
    if not bool(torch.isfinite(value)):
        raise FxPruneError(f"the calibration loss is {float(value)}: nothing was pruned")
    value.backward()


def input_names(gm: GraphModule) -> set[str]:
    """Names of the arguments that a traced module takes."""
    return {str(n.target) for n in gm.graph.nodes if n.op == "placeholder"}


def _samples(calibration: Sequence[Batch]) -> Iterator[Batch]:
    for batch in calibration:
        rows = min(v.shape[0] for v in batch.values())
        for i in range(rows):
            yield {k: v[i : i + 1] for k, v in batch.items()}


def causal_loss(outputs: Any, batch: Batch) -> Tensor:
    """Next-token cross-entropy, the mean over all predicted tokens, in float32.

    Args:
        outputs: What the module returned: an object with ``logits``, or a sequence or mapping whose first floating-point tensor
            they are; ``[samples, length, vocabulary]``.
        batch: Holds ``labels`` (-100 is ignored) or ``input_ids``, ``[samples, length]``; with an ``attention_mask``, padding
            is ignored.

    Raises:
        UsageError: There are no labels to compare with.
    """
    logits = getattr(outputs, "logits", None)
    if logits is None:
        leaves = torch.utils._pytree.tree_leaves(outputs)
        logits = next((t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()), None)
    labels = batch.get("labels", batch.get("input_ids"))
    if logits is None or labels is None or logits.dim() != 3:
        raise UsageError("the default loss needs logits [samples, length, vocabulary] and input_ids or labels: pass loss=")
    target = labels[:, 1:]
    if "labels" not in batch and "attention_mask" in batch:
        target = target.masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten(), ignore_index=-100)
