"""The importance pass: calibration gradients reduced to one score per unit, parameter by parameter, and freed at once.

The full gradient of the model never exists: a post-accumulate hook on each parameter adds its statistic to the scores of the
units that own its elements and drops the gradient, before backward reaches the next layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from ..criteria import Criterion, ElementScore, UserCriterion, aggregate, check_aggregation, find_criterion
from ..errors import FxPruneError, UsageError, check_seed, check_whole
from ..groups import Groups, Member, PruneGroup
from .activations import collect_moments
from .base import Pass
from .batches import Batch, Loss, Progress, call_arguments, causal_loss, samples, warn_of_padding
from .consumers import columns, find_consumers
from .dependency import groups_of

SCORES = "fxprune.scores"


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
        sweeps: int = 4,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self.criterion, self.calibration, self.aggregation = criterion, calibration, aggregation
        self.loss, self.seed, self.sweeps, self.progress = loss, seed, sweeps, progress

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
            sweeps=self.sweeps,
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
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Importance of every unit of every prunable group.

    A unit's score adds up exactly the elements it owns, in each parameter dimension the group reaches (an element that it owns
    along two dimensions of one parameter counts once); the parameters' scores are then aggregated.

    Args:
        gm: The traced model.
        groups: Its prune groups.
        criterion: A name from `fxprune.criteria.CRITERIA`, or a callable ``(name, weight, gradient) -> scores``.
        calibration: Batches: mappings from the names of the model's inputs to ``[samples, length]`` tensors, and ``labels`` or
            whatever else the loss reads. Gradients are of the mean loss of each batch; several batches are averaged (after the
            absolute value for ``taylor1``, so one batch of all samples is LLM-Pruner's definition to the letter;
            ``taylor_vector`` sums before it). ``taylor2`` and ``taylor_mixed`` take each sample's own gradient.
        aggregation: One of `fxprune.criteria.AGGREGATIONS`.
        loss: ``(outputs, batch) -> scalar``; by default next-token cross-entropy on the batch's labels or input ids.
        seed: For ``random``.
        sweeps: ``taylor_mixed`` needs gradients accumulated over samples, in float32 or better; each sweep accumulates one share
            of the parameters.
        progress: Called with (what, done, total).

    Returns:
        For each prunable group a float32 CPU tensor of shape ``[group.size]``, larger is more important. Activation criteria
        leave out groups whose units no linear map contracts (the halves of a rotary pair, for example).

    Raises:
        UsageError: An unknown criterion or aggregation, an impossible seed, no calibration where it is needed, batches without the
            inputs that the model was traced with, a criterion or loss that returns something else than it should, or an activation
            criterion for a model without any linear map that contracts a prunable group.
        FxPruneError: Weights, loss or scores that are NaN or infinite.
    """
    found = find_criterion(criterion)
    check_aggregation(aggregation)
    if isinstance(calibration, str):
        raise UsageError(
            f"calibration is a list of batches here, got '{calibration}': fxprune.calibration.load_calibration reads text"
        )
    wanted = [g for g in groups.values() if g.prunable]
    _check_weights(groups)
    if isinstance(found, Criterion) and found.name == "random":
        check_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        return {g.name: torch.rand(g.size, generator=generator) for g in wanted}
    ledger = _Ledger(groups, wanted)
    if isinstance(found, Criterion) and not found.calibrated:
        assert found.element is not None
        for name in ledger.parameters:
            ledger.add(name, _statistic(found.element, ledger.weight(name), torch.empty(0)))
        return ledger.totals(aggregation, signed=found.signed)
    if not calibration:
        label = found.name if isinstance(found, Criterion) else getattr(found, "__name__", "this")
        raise UsageError(f"criterion '{label}' needs calibration batches, and there are none")
    say = progress or (lambda what, done, total: None)
    if isinstance(found, Criterion) and found.feature is not None:
        warn_of_padding(gm, calibration)
        return _by_features(gm, ledger, found, calibration, loss or causal_loss, aggregation, say)
    _collect(gm, ledger, found, calibration, loss or causal_loss, sweeps, say)
    return ledger.totals(aggregation, signed=isinstance(found, Criterion) and found.signed)


def _by_features(
    gm: GraphModule,
    ledger: _Ledger,
    criterion: Criterion,
    calibration: Sequence[Batch],
    loss: Loss,
    aggregation: str,
    progress: Progress,
) -> dict[str, Tensor]:
    """Scores out of what linear maps read: each counts for the groups that it contracts."""
    assert criterion.feature is not None
    consumers = find_consumers(gm, ledger.groups)
    if not consumers:
        raise UsageError(f"criterion '{criterion.name}' looks at what linear maps read, and none here contracts a prunable group")
    moments = collect_moments(gm, consumers, calibration, loss=loss if criterion.gradient else None, progress=progress)
    for consumer in consumers:
        weight = columns(_wide(ledger.weight(consumer.weight)).cpu(), consumer.dim)
        ledger.add_line(consumer.weight, consumer.dim, criterion.feature(weight.double(), moments[consumer.weight]))
    return ledger.totals(aggregation, partial=True)


def _check_weights(groups: Groups) -> None:
    for name, value in groups.parameters.items():
        assert value.tensor is not None
        if value.tensor.is_meta:
            raise UsageError(f"parameter '{name}' is on the meta device: there are no weights to score")
        numbers = value.tensor.detach()
        numbers = torch.view_as_real(numbers) if numbers.is_complex() else numbers
        if numbers.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(numbers)):
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
        self.touched: set[tuple[str, str, int]] = set()
        self._incidence: dict[tuple[str, int, str], tuple[Tensor, Tensor]] = {}
        self._shared: dict[tuple[str, int, int, str], tuple[Tensor, Tensor]] = {}

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
            before = earlier.setdefault(group.name, [])
            if before:
                line = _line(self._without_shared(statistic, group, member, before), member.dim)
            elif member.dim in lines:
                line = lines[member.dim]
            else:
                line = lines[member.dim] = _line(statistic, member.dim)
            self._credit(group, member, line, weight)
            before.append(member)

    def add_line(self, name: str, dim: int, line: Tensor) -> None:
        """Add a statistic ``[size of dim]`` of one dimension of a parameter to the units that own its positions."""
        for group, member in self.members[name]:
            if member.dim == dim:
                self._credit(group, member, line, 1.0)

    def _credit(self, group: PruneGroup, member: Member, line: Tensor, weight: float) -> None:
        units, positions = self._owners(group, member)
        key = (group.name, member.name, member.dim)
        self.sums[key].index_add_(0, units, line.index_select(0, positions), alpha=weight)
        self.touched.add(key)

    def _owners(self, group: PruneGroup, member: Member) -> tuple[Tensor, Tensor]:
        key = (member.name, member.dim, group.name)
        if key not in self._incidence:
            self._incidence[key] = member.incidence
        return self._incidence[key]

    def _without_shared(self, statistic: Tensor, group: PruneGroup, member: Member, before: Sequence[Member]) -> Tensor:
        """The statistic without elements that a unit already owns along an earlier dimension of the same parameter."""
        out = statistic.clone()
        for other in before:
            key = (member.name, other.dim, member.dim, group.name)
            if key not in self._shared:
                self._shared[key] = _pairs(self._owners(group, other), self._owners(group, member), group.size)
            theirs, mine = (index.to(out.device) for index in self._shared[key])
            out.movedim((other.dim, member.dim), (0, 1))[theirs, mine] = 0
        return out

    def totals(self, aggregation: str, *, signed: bool = False, partial: bool = False) -> dict[str, Tensor]:
        """One score per unit; with ``partial``, only of members and groups that anything was added to."""
        result = {}
        for group in self.wanted:
            keys = [(group.name, m.name, m.dim) for m in group.members if m.trainable]
            own = [self.sums[key] for key in keys if not partial or key in self.touched]
            if not own:
                continue
            total = aggregate([s.abs() for s in own] if signed else own, aggregation)
            if not bool(torch.isfinite(total).all()):
                raise FxPruneError(f"the scores of group '{group.name}' are not finite: check the calibration data and the loss")
            result[group.name] = total.float()
        return result


def _line(statistic: Tensor, dim: int) -> Tensor:
    """Sums over every other dimension, in float32 or better: a float64 CPU tensor ``[size of dim]``."""
    others = [d for d in range(statistic.dim()) if d != dim]
    wide = torch.promote_types(statistic.dtype, torch.float32)
    return (statistic.sum(others, dtype=wide) if others else statistic).double().cpu()


def _pairs(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Every pair (position in the first dimension, position in the second) that one unit owns."""
    (units, left), (others, right) = first, second
    right = right[torch.argsort(others, stable=True)]
    count = torch.bincount(others, minlength=size)
    start, repeats = (count.cumsum(0) - count)[units], count[units]
    within = torch.arange(int(repeats.sum())) - (repeats.cumsum(0) - repeats).repeat_interleave(repeats)
    return left.repeat_interleave(repeats), right[start.repeat_interleave(repeats) + within]


def _accumulable(gradient: Tensor) -> Tensor:
    """Half-precision sums over many samples would lose the later ones."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _statistic(element: ElementScore, weight: Tensor, gradient: Tensor) -> Tensor:
    """A criterion's element-wise statistic; of a complex number, the sum of its two parts'."""
    if weight.is_complex():
        gradient = torch.view_as_real(gradient) if gradient.is_complex() else gradient
        parts: Tensor = element(torch.view_as_real(weight), gradient).sum(-1)
        return parts
    whole: Tensor = element(_wide(weight), _wide(gradient))
    return whole


def _wide(tensor: Tensor) -> Tensor:
    """Squares of float16 gradients would vanish: they are taken in float32, one parameter at a time."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _collect(
    gm: GraphModule,
    ledger: _Ledger,
    criterion: Criterion | UserCriterion,
    calibration: Sequence[Batch],
    loss: Loss,
    sweeps: int,
    progress: Progress,
) -> None:
    warn_of_padding(gm, calibration)
    if isinstance(criterion, Criterion) and criterion.accumulate:
        _mixed(gm, ledger, calibration, loss, sweeps, progress)
        return
    steps = list(samples(calibration)) if isinstance(criterion, Criterion) and criterion.per_sample else list(calibration)

    def on_gradient(name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if isinstance(criterion, Criterion):
            assert criterion.element is not None
            statistic = _statistic(criterion.element, parameter.detach(), gradient)
        else:
            statistic = criterion(name, parameter.detach(), gradient)
            if not isinstance(statistic, Tensor) or statistic.shape != parameter.shape:
                raise UsageError(f"the criterion must return scores of the weight's shape {tuple(parameter.shape)} for '{name}'")
        ledger.add(name, statistic, 1.0 / len(steps))
        parameter.grad = None

    with _hooks(gm, ledger, ledger.parameters, on_gradient):
        for i, batch in enumerate(steps):
            _backward(gm, batch, loss)
            progress("importance", i + 1, len(steps))


def _mixed(
    gm: GraphModule,
    ledger: _Ledger,
    calibration: Sequence[Batch],
    loss: Loss,
    sweeps: int,
    progress: Progress,
) -> None:
    """``|w g - w h w / 2|`` needs g and h of all samples element by element: a share of the parameters at a time."""
    singles, chunks = list(samples(calibration)), _shares(ledger, sweeps)
    for number, chunk in enumerate(chunks):
        first: dict[str, Tensor] = {}
        second: dict[str, Tensor] = {}

        def on_gradient(name: str, parameter: Tensor, first: dict[str, Tensor] = first, second: dict[str, Tensor] = second) -> None:
            assert parameter.grad is not None
            gradient = _accumulable(parameter.grad)
            parameter.grad = None
            if name in first:
                second[name].addcmul_(gradient, gradient, value=1 / len(singles))
                first[name].add_(gradient, alpha=1 / len(singles))
            else:  # the gradient itself becomes the sum
                second[name] = gradient.square().div_(len(singles))
                first[name] = gradient.div_(len(singles))

        with _hooks(gm, ledger, chunk, on_gradient):
            for i, batch in enumerate(singles):
                _backward(gm, batch, loss)
                progress("importance", number * len(singles) + i + 1, len(chunks) * len(singles))
        for name in chunk:
            if name in first:
                w = ledger.weight(name)
                ledger.add(name, second.pop(name).mul_(w).mul_(-0.5).add_(first.pop(name)).mul_(w).abs_())  # |w (g - h w / 2)|


def _shares(ledger: _Ledger, sweeps: int) -> list[list[str]]:
    """At most ``sweeps`` runs of consecutive parameters, of about the same number of elements."""
    check_whole("sweeps", sweeps, 1)
    total, done = sum(ledger.weight(n).numel() for n in ledger.parameters), 0
    shares: dict[int, list[str]] = {}
    for name in ledger.parameters:
        size = ledger.weight(name).numel()
        shares.setdefault(min((2 * done + size) * sweeps // (2 * total), sweeps - 1), []).append(name)
        done += size
    return list(shares.values())


@contextmanager
def _hooks(gm: GraphModule, ledger: _Ledger, names: Sequence[str], on_gradient: Callable[[str, Tensor], None]) -> Iterator[None]:
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
                handles.append(parameter.register_post_accumulate_grad_hook(lambda p, name=name: on_gradient(name, p)))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, (required, gradient) in before.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _backward(gm: GraphModule, batch: Batch, loss: Loss) -> None:
    device = next(gm.parameters()).device
    moved = {k: v.to(device) for k, v in batch.items()}
    args, kwargs = call_arguments(gm, moved)
    value = loss(gm(*args, **kwargs), moved)
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"the loss must return a tensor with one element, got {what}")
    if not bool(torch.isfinite(value)):
        raise FxPruneError(f"the calibration loss is {float(value.detach())}: nothing was pruned")
    value.backward()
