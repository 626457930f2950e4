"""What linear maps read: moments of their inputs, and of the gradients of these, one number a feature.

Activation criteria score a unit by the output that is lost with it. Everything is summed over the calibration tokens as it goes
by: nothing of the size of an activation is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ..errors import FxPruneError
from .batches import Batch, Loss, Progress, counted_rows, flat_arguments, rows_of
from .consumers import Consumer


@dataclass
class Moments:
    """Sums over tokens, each a float64 tensor ``[features]``.

    Attributes:
        tokens: How many tokens were counted.
        total: Of the features ``x``.
        square: Of ``x^2``.
        gradient: Of ``(dL/dx)^2``, ``L`` being the loss summed over tokens; zeros where no gradient was asked for.
    """

    tokens: int
    total: Tensor
    square: Tensor
    gradient: Tensor

    @property
    def mean(self) -> Tensor:
        """E[x]."""
        return self.total / self.tokens

    @property
    def power(self) -> Tensor:
        """E[x^2]."""
        return self.square / self.tokens

    @property
    def variance(self) -> Tensor:
        """E[x^2] - E[x]^2, at least 0."""
        return (self.power - self.mean.square()).clamp_min(0)

    @property
    def sensitivity(self) -> Tensor:
        """E[(dL/dx)^2]."""
        return self.gradient / self.tokens


def collect_moments(
    gm: GraphModule,
    consumers: Sequence[Consumer],
    calibration: Sequence[Batch],
    *,
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> dict[str, Moments]:
    """Moments of what each linear map reads.

    Args:
        gm: The traced model.
        consumers: The maps, see `fxprune.passes.consumers.find_consumers`.
        calibration: Batches as for `fxprune.score`. Tokens that an ``attention_mask`` marks as padding do not count.
        loss: With it the gradients are measured too: ``(outputs, batch) -> mean loss``; it is multiplied by the number of
            tokens, so that each token's gradient is on one scale whatever the batch size. No parameter gets a gradient.
        progress: Called with (what, done, total).

    Returns:
        For each weight's name its `Moments`.

    Raises:
        FxPruneError: An activation or the loss is not finite.
    """
    found: dict[str, Moments] = {}
    device = next(gm.parameters()).device
    for number, batch in enumerate(calibration):
        moved = {k: v.to(device) for k, v in batch.items()}
        run = _Reader(gm, consumers, moved, found, gradient=loss is not None)
        flat = flat_arguments(gm, moved)
        before = {p: p.requires_grad for p in gm.parameters()}
        try:
            for parameter in before:
                parameter.requires_grad_(False)
            with torch.set_grad_enabled(loss is not None):
                output = gm.graph.process_outputs(run.run(*flat, enable_io_processing=False))
                if loss is not None:
                    value = loss(output, moved)
                    if not bool(torch.isfinite(value)):
                        raise FxPruneError(f"the calibration loss is {float(value.detach())}: nothing was pruned")
                    (value * _tokens(moved)).backward()
        finally:
            for parameter, required in before.items():
                parameter.requires_grad_(required)
        if progress is not None:
            progress("activations", number + 1, len(calibration))
    for name, moments in found.items():
        if not bool(torch.isfinite(moments.square).all() and torch.isfinite(moments.gradient).all()):
            raise FxPruneError(f"what '{name}' reads is NaN or infinite on the calibration text: nothing was pruned")
    return found


class _Reader(Interpreter):
    """Runs the graph and adds up what the consumers read."""

    def __init__(
        self, gm: GraphModule, consumers: Sequence[Consumer], batch: Batch, found: dict[str, Moments], *, gradient: bool
    ) -> None:
        super().__init__(gm)
        self.consumers = {c.node: c for c in consumers}
        self.batch, self.found, self.gradient = batch, found, gradient

    def run_node(self, n: Node) -> Any:
        consumer = self.consumers.get(n)
        if consumer is not None:
            value: Tensor = self.env[consumer.operand]
            moments = self._moments(consumer.weight, value)
            rows = counted_rows(value.detach(), self.batch)
            moments.tokens += len(rows)
            moments.total += rows.sum(0, dtype=torch.float32).double().cpu()
            moments.square += rows.float().square().sum(0).double().cpu()
            if self.gradient:
                if not value.requires_grad:  # nothing before it has a gradient: the graph of autograd begins here
                    value.requires_grad_()
                value.register_hook(partial(_add_gradient, moments, self.batch))  # no reference to self: that would be a cycle
        return super().run_node(n)

    def _moments(self, name: str, value: Tensor) -> Moments:
        if name not in self.found:
            zeros = [torch.zeros(value.shape[-1], dtype=torch.float64) for _ in range(3)]
            self.found[name] = Moments(0, *zeros)
        return self.found[name]


def _add_gradient(moments: Moments, batch: Batch, gradient: Tensor) -> None:
    moments.gradient += counted_rows(gradient, batch).float().square().sum(0).double().cpu()


def _tokens(batch: Mapping[str, Tensor]) -> int:
    """How many tokens a batch predicts (of a batch without tokens, how many samples it has)."""
    labels = batch.get("labels")
    if labels is not None and labels.dim() > 1:
        return int((labels[:, 1:] != -100).sum())
    ids = batch.get("input_ids")
    if ids is not None:
        mask = batch.get("attention_mask")
        return int(mask[:, 1:].sum()) if mask is not None and mask.shape == ids.shape else ids[:, 1:].numel()
    return rows_of(batch)
