"""Knowledge distribution analysis (LoRAShear, arXiv 2310.18356): what one group, or one residual block, is worth to a model.

Each is taken away by itself and put back; only what lies behind it in the graph is run again. A group goes by zeros in its
parameters, a block by handing on what enters it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from ..blocks import Block
from ..criteria import Criterion, UserCriterion, find_criterion
from ..errors import FxPruneError, UsageError, nearest
from ..groups import KINDS, LAYERS, Groups, PruneGroup, layer_of
from ..knowledge import Knowledge, Removal, plain
from .base import Pass
from .batches import Batch, Loss, Progress, causal_loss, kl_divergence, predictions, rows_of, warn_of_padding
from .dependency import groups_of
from .importance import SCORES, score
from .masking import unfit, without
from .measuring import State, digest
from .sensitivity import MEASURES
from .stepper import Compute, Stepper

if TYPE_CHECKING:
    from .selection import Selection

KNOWLEDGE = "fxprune.knowledge"

USUAL = ("kv_heads", "ffn", LAYERS)
"""What is measured if nobody says what: what the recipes prune, and blocks."""

TAKE = ("least", "most")

DENSE = ""
"""The entry of a state that is the whole model's."""


class KnowledgePass(Pass):
    """Measure what groups and blocks are worth; see `measure_knowledge`, whose options it takes.

    Left in ``gm.meta["fxprune.knowledge"]``. Scores that an `ImportancePass` left say which units of a group go.
    """

    def __init__(self, batches: Sequence[Batch], **options: Any) -> None:
        super().__init__()
        self.batches, self.options = batches, options

    def call(self, graph_module: GraphModule) -> PassResult:
        """Measure and annotate; the graph is not modified."""
        options = {"scores": graph_module.meta.get(SCORES), **self.options}
        graph_module.meta[KNOWLEDGE] = measure_knowledge(graph_module, groups_of(graph_module), self.batches, **options)
        return PassResult(graph_module, False)


def measure_knowledge(
    gm: GraphModule,
    groups: Groups,
    batches: Sequence[Batch],
    *,
    kinds: Sequence[str] | None = None,
    share: float = 1.0,
    take: str = "least",
    by: str = "loss",
    scores: Mapping[str, Tensor] | None = None,
    criterion: str | Criterion | UserCriterion = "taylor1",
    loss: Loss | None = None,
    seed: int = 0,
    text: str = "",
    state: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Knowledge:
    """What the loss becomes without one group, or one block, after another.

    The model is the same afterwards, bit for bit, whatever happens.

    Args:
        gm: The traced model.
        groups: Its prune groups.
        batches: The text to measure on, as for `fxprune.score`; a loss is the mean over its samples.
        kinds: Kinds of groups, and ``layers`` for residual blocks. By default ``kv_heads``, ``ffn`` and ``layers``; of a model with
            neither heads nor FFN, every kind.
        share: Share of a group's units to take away, rounded, at least one; 1 takes all that may go: a group keeps one unit, or as
            many as a router takes.
        take: Which ones: the ``least`` or the ``most`` important.
        by: Rank by the rise of the ``loss``, or by ``divergence``: KL(dense || without) of the predictions, which is less noisy on
            little text. For it a logarithm of the dense predictions, ``[samples, length, vocabulary]`` in float32, is kept.
        scores: Importance of each unit, which says which go; by default by ``criterion`` on the same batches.
        criterion: See `fxprune.score`; it is not asked where there are ``scores``.
        loss: ``(outputs, batch) -> scalar``; by default next-token cross-entropy, whose exponential is the perplexity.
        seed: For criterion ``random``.
        text: What the batches are, for the record.
        state: A file that every measurement is written to at once. If it is there, what it holds is not measured again; it must be
            of the same model (every bit), batches and settings but for ``kinds``. It stays when all is done.
        progress: Called with (what, done, total).

    Returns:
        The `Knowledge`: ``.protected(0.1)`` is what ``Selection(protect=...)`` takes.

    Raises:
        UsageError: There are no batches, a kind, measure or share that cannot be used, nothing that can be taken away, or a state
            that belongs to something else.
        FxPruneError: The loss of the whole model is not finite.
    """
    if not batches:
        raise UsageError("knowledge is measured on batches of text, and there are none")
    check_options(kinds=kinds, share=share, take=take, by=by)
    find_criterion(criterion)
    chosen, blocks, unmeasured = _chosen(groups, kinds)
    warn_of_padding(gm, batches)
    settings = {"share": f"{share:g}", "take": take, "by": by, "units by": _ordered_by(scores, criterion, seed)}
    kept = None if state is None else State(state, {**_identity(gm, groups, batches, loss), **settings})
    known: dict[str, Any] = {} if kept is None else kept.entries
    if scores is None and any(group.name not in known for group in chosen):
        scores = score(gm, groups, criterion, batches, loss=loss, seed=seed, progress=progress)
    probes = [_probe(group, scores, share, take) for group in chosen if group.name not in known]
    probes += [_Probe(path, block=groups.blocks[path]) for path in blocks if path not in known]
    total = len(chosen) + len(blocks)

    def keep(name: str, value: float, divergence: float | None) -> None:
        known[name] = [plain(value), plain(divergence)]
        if kept is not None:
            kept.add(name, known[name])
        if progress is not None and name != DENSE:
            progress("knowledge", total - len(probes) + sum(p.name in known for p in probes), total)

    if probes:
        device = next(gm.parameters()).device
        moved = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
        with torch.no_grad():
            run = _Run(gm, groups, moved, loss or causal_loss, by == "divergence")
            run.measure(probes, keep, None if DENSE not in known else float(known[DENSE][0]))
    rows = [_row(g.name, g.kind, g.layer, g.size, _count(g, share), known) for g in chosen]
    rows += [_row(path, LAYERS, layer_of(path), 1, 1, known) for path in blocks]
    dense = float(known[DENSE][0])
    return Knowledge(tuple(rows), unmeasured, dense, by, float(share), take, text, groups.fingerprint())


def protecting(selection: Selection, knowledge: Knowledge, share: float, called: str = "the knowledge") -> Selection:
    """The selection with a share of what matters most left whole, out of the kinds that it prunes.

    Args:
        selection: What to remove.
        knowledge: What was measured.
        share: How much of it to protect, see `Knowledge.protected`.
        called: What to call the knowledge in messages.

    Raises:
        UsageError: The share does not lie between 0 and 1, nothing of these kinds was measured, or widths are uniform, so that
            no layer can keep a width of its own.
    """
    pruned = [kind for kind, pace in selection.pace.items() if pace > 0]
    kinds = [kind for kind in pruned if any(row.kind == kind for row in knowledge.rows)]
    if not kinds:
        raise UsageError(f"{called} has nothing of kind {', '.join(pruned)}: measure that with fxprune sensitivity --kinds")
    names = knowledge.protected(share, kinds)
    if selection.widths == "uniform" and any(row.name in names and row.kind != LAYERS for row in knowledge.rows):
        raise UsageError(
            f"{called} leaves single layers whole, and with widths='uniform' all layers have one width: use widths='per-layer'"
        )
    return replace(selection, protect=(*selection.protect, *names))


def check_options(*, kinds: Sequence[str] | None, share: float, take: str, by: str) -> None:
    """Raise `UsageError` for settings of `measure_knowledge` that no model could be measured with."""
    if isinstance(kinds, str | Mapping) or (kinds is not None and not kinds):
        raise UsageError(f"kinds are names such as {', '.join(USUAL)}, in a list, got {kinds!r}")
    for kind in kinds or ():
        if kind not in (*KINDS, LAYERS):
            raise UsageError(f"unknown kind '{kind}'; {nearest(str(kind), (*KINDS, LAYERS))}")
    if not 0 < share <= 1:
        raise UsageError(f"the share of units to take away must be above 0 and at most 1, got {share}")
    for name, value, valid in (("take", take, TAKE), ("measure", by, MEASURES)):
        if value not in valid:
            raise UsageError(f"unknown {name} '{value}'; {nearest(str(value), valid)}")


def _ordered_by(scores: Mapping[str, Tensor] | None, criterion: str | Criterion | UserCriterion, seed: int) -> str:
    if scores is not None:
        return f"scores {digest(scores)}"
    name = criterion if isinstance(criterion, str) else getattr(criterion, "name", getattr(criterion, "__name__", "callable"))
    return f"{name}, seed {seed}" if name == "random" else str(name)


def _identity(gm: GraphModule, groups: Groups, batches: Sequence[Batch], loss: Loss | None) -> dict[str, str]:
    """What a measurement depends on."""
    return {
        "model": groups.fingerprint(),
        "weights": digest(gm.state_dict()),
        "text, samples or length": digest({f"{i} {name}": t for i, batch in enumerate(batches) for name, t in batch.items()}),
        "loss": getattr(loss or causal_loss, "__qualname__", type(loss).__qualname__),
    }


def _chosen(groups: Groups, kinds: Sequence[str] | None) -> tuple[list[PruneGroup], list[str], dict[str, str]]:
    """Groups and blocks to measure, and groups that cannot be, with the reason."""
    have = {g.kind for g in groups.values() if g.prunable} | ({LAYERS} if groups.blocks else set())
    wanted = kinds if kinds is not None else (USUAL if have & set(USUAL[:2]) else tuple(have))
    for kind in kinds or ():
        if kind not in have:
            raise UsageError(
                f"this model has nothing of kind '{kind}' that can be pruned; it has {', '.join(sorted(have)) or 'nothing'}"
            )
    reasons = {g.name: _not_measured(g) for g in groups.values()}
    chosen = [g for g in groups.values() if g.kind in wanted and not reasons[g.name]]
    blocks = list(groups.blocks) if LAYERS in wanted else []
    told = [g for g in groups.values() if reasons[g.name] and (g.kind in wanted or (kinds is None and g.prunable))]
    unmeasured = {g.name: reasons[g.name] for g in told}
    if not chosen and not blocks:
        name, reason = next(iter(unmeasured.items()), ("", "it has no prunable group"))
        raise UsageError(f"nothing of this model can be taken away to measure it: {f'{name}: ' if name else ''}{reason}")
    return chosen, blocks, unmeasured


def _not_measured(group: PruneGroup) -> str:
    if reason := unfit(group):
        return reason
    return "" if group.size > group.least else f"all of its units ({group.size}) must stay"


@dataclass(frozen=True)
class _Probe:
    """What is taken away at a time: units of a group, or a block."""

    name: str
    group: PruneGroup | None = None
    units: Tensor | None = None
    block: Block | None = None


def _count(group: PruneGroup, share: float) -> int:
    return min(max(1, round(share * group.size)), group.size - group.least)


def _probe(group: PruneGroup, scores: Mapping[str, Tensor] | None, share: float, take: str) -> _Probe:
    if scores is None or group.name not in scores:
        raise UsageError(f"there are no scores for group '{group.name}': use another criterion, or leave kind '{group.kind}' out")
    order = torch.argsort(scores[group.name], stable=True)
    count = _count(group, share)
    return _Probe(group.name, group, order[:count] if take == "least" else order[-count:])


class _Run:
    """The graph on all batches, with the rest of it run again for everything that is taken away."""

    def __init__(self, gm: GraphModule, groups: Groups, batches: Sequence[Batch], loss: Loss, diverging: bool) -> None:
        self.stepper, self.groups, self.batches, self.loss = Stepper(gm), groups, batches, loss
        self.rows = [rows_of(batch) for batch in batches]
        self.named = {node.name: node for node in self.stepper.nodes}
        self.diverging, self.dense = diverging, list[Tensor]()

    def measure(self, probes: Sequence[_Probe], keep: Callable[[str, float, float | None], None], loss: float | None) -> None:
        """Loss and divergence without each, in graph order; the whole model's comes first unless its loss is known."""
        states = [self.stepper.begin(batch) for batch in self.batches]
        if loss is None or self.diverging:
            found, _ = self._behind(states, 0)
            if not math.isfinite(found):
                raise FxPruneError(f"the loss of the whole model is {found}: it or the text is damaged, and nothing was measured")
            if loss is None:
                keep(DENSE, found, None)
        now = 0
        for probe in sorted(probes, key=self._start):
            start = self._start(probe)
            for state in states:
                self.stepper.advance(state, now, start)
            now = start
            with ExitStack() as stack:
                instead: list[Mapping[Node, Compute]] = []
                if probe.block is not None:
                    source, result = self.named[probe.block.source], self.named[probe.block.result]
                    instead = [{result: _always(state[source])} for state in states]
                elif probe.group is not None and probe.units is not None:
                    stack.enter_context(without(self.groups, probe.group, probe.units))
                keep(probe.name, *self._behind(states, start, instead))

    def _start(self, probe: _Probe) -> int:
        """Place of the first node whose value changes without it (of a block: behind what enters it)."""
        place = self.stepper.place
        if probe.block is not None:
            return place[self.named[probe.block.source]] + 1
        assert probe.group is not None
        return min(self.stepper.first_use[m.name] for m in probe.group.members if m.trainable)

    def _behind(
        self, states: Sequence[dict[Node, Any]], place: int, instead: Sequence[Mapping[Node, Compute]] = ()
    ) -> tuple[float, float | None]:
        """Means over samples, from a place on; the states stay as they are. The first call keeps the dense predictions."""
        total, diverged, first = 0.0, 0.0, self.diverging and not self.dense
        for i, (state, batch) in enumerate(zip(states, self.batches, strict=True)):
            out = self.stepper.advance(dict(state), place, len(self.stepper.nodes), instead[i] if instead else None)
            total += float(self.loss(out, batch)) * self.rows[i]
            if first:
                self.dense.append(predictions(out, batch))
            elif self.diverging:
                diverged += float(kl_divergence(predictions(out, batch), self.dense[i])) * self.rows[i]
        return total / sum(self.rows), diverged / sum(self.rows) if self.diverging else None


def _always(value: Any) -> Compute:
    return lambda _: value


def _row(name: str, kind: str, layer: int | None, units: int, removed: int, known: Mapping[str, Any]) -> Removal:
    dense, (loss, divergence) = float(known[DENSE][0]), known[name]
    after, diverged = float(loss), None if divergence is None else float(divergence)
    return Removal(name, kind, layer, units, removed, after - dense, _perplexity(dense), _perplexity(after), diverged)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
