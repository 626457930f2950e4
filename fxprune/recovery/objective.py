"""The loss: next-token cross-entropy, divergence from a teacher's predictions, distance from its hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from ..data.examples import IGNORED
from ..errors import UsageError
from ..passes.batches import logits_of
from .settings import Recovery

PROBE = 4
"""Tokens of the input on which two models are compared before training."""


@dataclass(frozen=True)
class Inputs:
    """Which of a batch's tensors a model takes.

    Attributes:
        names: Of those that it knows.
        counts: It counts the positions of padded rows itself; RoBERTa's begin at another number than 0.
    """

    names: frozenset[str] = frozenset({"input_ids", "position_ids", "attention_mask"})
    counts: bool = True

    def of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a batch that the model is called with."""
        own = {"position_ids"} if self.counts and "attention_mask" in batch else set()
        return {name: tensor for name, tensor in batch.items() if name in self.names - own}


def inputs_of(model: nn.Module) -> Inputs:
    """What a model takes: a graph what it was traced with, an eager model all but the labels.

    Rows are padded on the right: with causal attention no token sees the padding, so a graph without a mask loses nothing.
    """
    if not isinstance(model, GraphModule):
        return Inputs()
    return Inputs(Inputs().names & {str(n.target) for n in model.graph.nodes if n.op == "placeholder"}, counts=False)


class Objective:
    """The loss of a batch, summed over its predicted tokens.

    ``(1 - w) CE + w T^2 KL(teacher || student)`` with w ``distill_weight`` and T ``distill_temperature`` (Hinton et al.,
    arXiv 1503.02531, section 2), plus ``hidden_weight`` times the mean over layers of ``|h - h_teacher|^2 / |h_teacher|^2``, where
    h are the hidden states that transformers gives (the last one behind the final norm), at the tokens that predict.

    Args:
        student: As it is called in training.
        takes: What it takes, see `inputs_of`.
        teacher: The dense model, if the settings want one.
        settings: Weights and temperature.
    """

    def __init__(self, student: nn.Module, takes: Inputs, teacher: nn.Module | None, settings: Recovery) -> None:
        self.student, self.takes, self.teacher, self.settings = student, takes, teacher, settings
        self.teacher_takes = Inputs() if teacher is None else inputs_of(teacher)
        self.options: dict[str, Any] = {"output_hidden_states": True} if settings.hidden_weight else {}

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The sum over the predicted tokens of a batch ``[rows, tokens]``, a float32 scalar."""
        settings, labels = self.settings, batch["labels"][:, 1:]
        output = self.student(**self.takes.of(batch), **self.options)
        logits = logits_of(output)[:, :-1].float()
        loss = torch.zeros((), device=logits.device)
        if settings.distill_weight < 1:
            flat = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
            loss = loss + (1 - settings.distill_weight) * flat
        if self.teacher is None:
            return loss
        with torch.no_grad():
            known = self.teacher(**self.teacher_takes.of(batch), **self.options)
        counted = labels != IGNORED
        if settings.distill_weight:
            wanted = logits_of(known)[:, :-1].float()
            loss = loss + settings.distill_weight * divergence(logits, wanted, counted, settings.distill_temperature)
        if settings.hidden_weight:
            loss = loss + settings.hidden_weight * hidden_distance(output.hidden_states, known.hidden_states, counted)
        return loss


def divergence(logits: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(teacher || student)`` of the softened predictions, summed over the tokens that count.

    Args:
        logits: ``[rows, tokens, vocabulary]``.
        teacher: The same shape.
        counted: Bool ``[rows, tokens]``.
        temperature: T.
    """
    ours = functional.log_softmax(logits / temperature, -1)
    theirs = functional.log_softmax(teacher / temperature, -1)
    each = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (each * counted).sum()


def hidden_distance(states: tuple[Tensor, ...], teacher: tuple[Tensor, ...], counted: Tensor) -> Tensor:
    """Relative squared distance of two residual streams, meaned over the layers and summed over the tokens that count.

    Args:
        states: For the embedding and each layer ``[rows, tokens + 1, width]``.
        teacher: The same shapes.
        counted: Bool ``[rows, tokens]``.
    """
    total = torch.zeros((), device=counted.device)
    for ours, theirs in zip(states[1:], teacher[1:], strict=True):
        wanted = theirs[:, :-1].float()
        each = (ours[:, :-1].float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)
        total = total + (each * counted).sum()
    return total / (len(states) - 1)


@torch.no_grad()
def check_teacher(student: nn.Module, teacher: nn.Module, settings: Recovery) -> None:
    """See that the two can be compared.

    Raises:
        UsageError: They have another vocabulary, or hidden states were asked for and their layers or widths differ.
    """
    device = next(student.parameters()).device
    ids = torch.zeros(1, PROBE, dtype=torch.long, device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(PROBE, device=device)[None]}
    if settings.hidden_weight:
        for role, model in (("model", student), ("teacher", teacher)):
            if not hasattr(model, "config"):
                raise UsageError(f"hidden_weight compares hidden states, and this {role} gives none: it is no Hugging Face model")
    options: dict[str, Any] = {"output_hidden_states": True} if settings.hidden_weight else {}
    ours, theirs = (model(**inputs_of(model).of(batch), **options) for model in (student, teacher))
    sizes = logits_of(ours).shape[-1], logits_of(theirs).shape[-1]
    if sizes[0] != sizes[1]:
        raise UsageError(f"the teacher predicts {sizes[1]} tokens, the model {sizes[0]}: it must be the dense model")
    if settings.hidden_weight:
        layers = len(ours.hidden_states) - 1, len(theirs.hidden_states) - 1
        widths = ours.hidden_states[0].shape[-1], theirs.hidden_states[0].shape[-1]
        if layers[0] != layers[1] or widths[0] != widths[1]:
            raise UsageError(
                f"hidden_weight needs a teacher with the same layers and hidden size: it has {layers[1]} layers of {widths[1]}, "
                f"the model {layers[0]} of {widths[0]}; distill_weight needs neither"
            )
