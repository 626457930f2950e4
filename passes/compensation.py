"""Weight compensation: what is left of a linear map makes up for the units that went.

``bias`` adds the mean of what the removed units contributed (FLAP, arXiv 2312.11983, eq. 8). ``least-squares`` gives the kept
units of each map the weights that bring its output nearest to what it would put out with all of its units: with X the features
that it reads, kept ones K and removed ones R, W_K + W_R G_RK (G_KK + ridge diag(G_KK))^-1 where G = X^T X. This is Optimal Brain
Surgeon's update for a set of units at once (arXiv 2208.11580, eq. 5, structured). Maps are solved in the order of the graph, X
being what they read in the network as compensated so far, so that later maps see what earlier ones do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from ..errors import FxPruneError, UsageError, nearest
from ..plan import PrunePlan
from ..rules.registry import bind
from ..spaces import kept
from .activations import collect_moments
from .base import Pass
from .batches import Batch, Progress, counted_rows, warn_of_padding
from .consumers import Consumer, columns, contraction, features_of, find_consumers, weight_of
from .dependency import PLAN, groups_of
from .least_squares import Gram, Solution, fit_map, sum_gram
from .rewrite import DENSE
from .stepper import Stepper

aten: Any = torch.ops.aten

_WITH_BIAS = (aten.linear.default, aten.addmm.default)

COMPENSATIONS = ("none", "bias", "least-squares")

COMPENSATION = "fxprune.compensation"


@dataclass(frozen=True)
class Compensation:
    """What was done.

    Attributes:
        method: One of `COMPENSATIONS`.
        maps: For each changed weight the squared error of its output over the output's square, before and after, on tokens that
            the weights compared were not fitted to; ``bias`` has none.
        ridges: For each changed weight the ridge that was used; infinity where nothing helped, and the weights stayed.
        added: Bias parameters that the dense model does not have.
        tokens: Calibration tokens used.
    """

    method: str
    maps: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    ridges: Mapping[str, float] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "method": self.method,
            "maps": {n: [round(a, 6), round(b, 6)] for n, (a, b) in self.maps.items()},
            "ridges": {n: round(r, 6) if math.isfinite(r) else None for n, r in self.ridges.items()},
            "added": list(self.added),
            "tokens": self.tokens,
        }


class CompensationPass(Pass):
    """Compensate the module that a `RewritePass` made, in place; see `compensate`.

    The account of it goes to ``gm.meta["fxprune.compensation"]``. It stands after a `VerifyPass`, which compares the rewritten
    module before its weights change.
    """

    def __init__(self, calibration: Sequence[Batch], *, method: str = "least-squares", ridge: float | None = None) -> None:
        super().__init__()
        check_compensation(method)
        self.calibration, self.method, self.ridge = calibration, method, ridge

    def call(self, graph_module: GraphModule) -> PassResult:
        """Change weights; the graph stays as it is."""
        plan, dense = graph_module.meta.get(PLAN), graph_module.meta.get(DENSE, lambda: None)()
        if plan is None or dense is None:
            raise UsageError("there is no pruned module to compensate: run a RewritePass first, and keep the dense module")
        graph_module.meta[COMPENSATION] = compensate(
            dense, graph_module, plan, self.calibration, method=self.method, ridge=self.ridge
        )
        return PassResult(graph_module, self.method != "none")


def check_compensation(method: str) -> None:
    """Raise `UsageError` for an unknown method."""
    if method not in COMPENSATIONS:
        raise UsageError(f"unknown compensation '{method}'; {nearest(str(method), COMPENSATIONS)}")


def compensate(
    gm: GraphModule,
    small: GraphModule,
    plan: PrunePlan,
    calibration: Sequence[Batch],
    *,
    method: str = "least-squares",
    ridge: float | None = None,
    progress: Progress | None = None,
) -> Compensation:
    """Change the weights that read pruned units, in place, so that the network's output moves back towards the dense one's.

    Args:
        gm: The dense trace.
        small: What `fxprune.rewrite` made of it; its weights are changed.
        plan: The plan between them.
        calibration: Batches as for `fxprune.score`.
        method: ``least-squares`` or ``bias`` (``none`` does nothing).
        ridge: See `fxprune.passes.least_squares`; by default each map's is chosen by tokens held back.
        progress: Called with (what, done, total).

    Returns:
        A `Compensation`.

    Raises:
        UsageError: An unknown method, or no calibration.
        FxPruneError: Activations that are not finite.
    """
    check_compensation(method)
    if ridge is not None and not ridge > 0:
        raise UsageError(f"ridge must be positive, got {ridge}")
    if method == "none":
        return Compensation(method)
    if not calibration:
        raise UsageError("compensation is fitted to calibration batches, and there are none")
    warn_of_padding(gm, calibration)
    readers = _readers(small)
    if method == "bias":
        return _bias(gm, small, plan, calibration, readers, progress)
    fitted, tokens = fit(gm, plan, calibration, ridge=ridge, progress=progress)
    with torch.no_grad():
        for found in fitted:
            consumer = found.consumer
            outputs = found.solution.weight[_outputs(plan, gm, consumer)]
            readers[consumer.weight].weight.copy_(columns(outputs, consumer.dim))
    maps = {f.consumer.weight: (f.solution.before, f.solution.after) for f in fitted}
    return Compensation(method, maps, {f.consumer.weight: f.solution.ridge for f in fitted}, tokens=tokens)


@dataclass(frozen=True)
class _Reader:
    """A consumer's counterpart in the rewritten graph."""

    weight: nn.Parameter
    module: nn.Module | None


def _readers(small: GraphModule) -> dict[str, _Reader]:
    """The maps of a rewritten graph by the name of their weight: calls of `nn.Linear`, or of the operators themselves."""
    found: dict[str, _Reader] = {}
    for node in small.graph.nodes:
        if node.op == "call_module" and isinstance(module := small.get_submodule(str(node.target)), nn.Linear):
            found[f"{node.target}.weight"] = _Reader(cast(nn.Parameter, module.weight), module)
        elif (read := contraction(node)) is not None:
            found[str(read[1].target)] = _Reader(small.get_parameter(str(read[1].target)), None)
    return found


def _outputs(plan: PrunePlan, gm: GraphModule, consumer: Consumer) -> Tensor | slice:
    """Positions of the dense map's outputs that are left."""
    groups = groups_of(gm)
    choice = {groups[n].axis: units for n, units in plan.keep.items()}
    left = kept(groups.parameters[consumer.weight][1 - consumer.dim], choice.get)
    return slice(None) if left is None else left


def _bias(
    gm: GraphModule,
    small: GraphModule,
    plan: PrunePlan,
    calibration: Sequence[Batch],
    readers: Mapping[str, _Reader],
    progress: Progress | None,
) -> Compensation:
    groups, added, gone = groups_of(gm), [], plan.removed()
    pruned = [c for c in find_consumers(gm, groups) if c.weight in readers and any(n in plan.keep for n in c.groups)]
    moments = collect_moments(gm, pruned, calibration, progress=progress)
    for consumer in pruned:
        features = features_of(groups, consumer, gone)
        lost = weight_of(groups, consumer).double().cpu()[:, features] @ moments[consumer.weight].mean[features]
        lost = lost[_outputs(plan, gm, consumer)]
        name = f"{consumer.weight.rpartition('.')[0]}.bias"
        reader = readers[consumer.weight]
        bias = dict(small.named_parameters()).get(name)
        with torch.no_grad():
            if bias is not None:
                bias.add_(lost.to(bias))
            elif reader.module is not None:
                reader.module.bias = nn.Parameter(lost.to(reader.weight), requires_grad=reader.weight.requires_grad)
                added.append(name)
            else:
                raise UsageError(f"'{consumer.weight}' has no bias and is no nn.Linear: compensation='bias' has nowhere to put it")
    tokens = max((m.tokens for m in moments.values()), default=0)
    return Compensation("bias", added=tuple(added), tokens=tokens)


@dataclass(frozen=True)
class Fitted:
    """One map in the dense graph with its compensated weights."""

    consumer: Consumer
    solution: Solution


@torch.no_grad()
def fit(
    gm: GraphModule,
    plan: PrunePlan,
    calibration: Sequence[Batch],
    *,
    ridge: float | None = None,
    progress: Progress | None = None,
) -> tuple[list[Fitted], int]:
    """Least-squares weights for every map that reads pruned units: the dense graph, map by map over all batches.

    Args:
        gm: The dense trace; it is not changed.
        plan: What is kept.
        calibration: Batches.
        ridge: As for `compensate`.
        progress: Called with (what, done, total).

    Returns:
        (the maps in graph order, number of tokens).

    Raises:
        FxPruneError: Activations that are not finite.
    """
    groups, gone = groups_of(gm), plan.removed()
    dropped = groups.parameters_of(plan.drop)
    pruned = [c for c in find_consumers(gm, groups) if c.weight not in dropped and any(n in plan.keep for n in c.groups)]
    run, made, tokens = _Compensated(gm, plan, calibration), [], 0
    for number, consumer in enumerate(pruned):
        gram = run.gram(consumer)
        weight, tokens = weight_of(groups, consumer), gram.tokens + gram.held_tokens
        stays = torch.ones(weight.shape[1], dtype=torch.bool)
        stays[features_of(groups, consumer, gone)] = False
        if not bool(torch.isfinite(gram.total).all()):
            raise FxPruneError(f"what '{consumer.weight}' reads is NaN or infinite on the calibration text: nothing was pruned")
        made.append(Fitted(consumer, fit_map(weight, gram, stays, ridge)))
        run.put_out(made[-1])
        if progress is not None:
            progress("compensation", number + 1, len(pruned))
    return made, tokens


class _Compensated:
    """The dense graph in front of a map, on all batches, with the maps before it compensated and the dropped blocks left out."""

    def __init__(self, gm: GraphModule, plan: PrunePlan, calibration: Sequence[Batch]) -> None:
        self.stepper, self.batches, self.place = Stepper(gm), calibration, 0
        self.states = [self.stepper.begin(batch) for batch in calibration]
        blocks = [groups_of(gm).blocks[path] for path in plan.drop]
        names = {node.name: node for node in self.stepper.nodes}
        self.results = {names[b.result]: names[b.source] for b in blocks}
        self.held: list[dict[Node, Any]] = [{} for _ in calibration]

    def _advance(self, stop: int) -> None:
        """Run up to a node; a dropped block hands on what entered it."""
        sources = {self.stepper.place[s] for s in self.results.values()}
        results = {self.stepper.place[r] for r in self.results}
        for end in sorted({*([stop] if stop > self.place else []), *(p + 1 for p in sources | results if self.place <= p < stop)}):
            last = self.stepper.nodes[end - 1]
            for state, held in zip(self.states, self.held, strict=True):
                self.stepper.advance(state, self.place, end)
                if last in self.results:
                    state[last] = held.pop(self.results[last])
                if end - 1 in sources:
                    held[last] = state[last]
            self.place = end

    def gram(self, consumer: Consumer) -> Gram:
        """X^T X of what a map reads."""
        self._advance(self.stepper.place[consumer.node])
        return sum_gram(counted_rows(s[consumer.operand], b) for s, b in zip(self.states, self.batches, strict=True))

    def put_out(self, fitted: Fitted) -> None:
        """Run a map with its new weights."""
        instead = {fitted.consumer.node: put_out(fitted.consumer, fitted.solution.weight, fitted.solution.left)}
        for state in self.states:
            self.stepper.advance(state, self.place, self.place + 1, instead)
        self.place += 1


def put_out(consumer: Consumer, weight: Tensor, left: Tensor) -> Callable[[Mapping[Node, Any]], Tensor]:
    """What a map puts out of a state with new weights ``[outputs, kept]`` for the features that are left."""
    bias = _bias_node(consumer.node)

    def run(state: Mapping[Node, Any]) -> Tensor:
        x: Tensor = state[consumer.operand]
        out = x.index_select(-1, left.to(x.device)) @ weight.to(x).mT
        return out if bias is None else out + state[bias]

    return run


def _bias_node(node: Node) -> Node | None:
    """The bias that a map adds."""
    arguments = bind(node)
    bias = arguments.get("bias") if "bias" in arguments else arguments.get("self")
    return bias if isinstance(bias, Node) and node.target in _WITH_BIAS else None
