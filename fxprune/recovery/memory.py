"""How many rows to run at a time, and whether to recompute activations: an estimate, before anything has run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule

from ..errors import UsageError
from .adapters import LINEAR
from .settings import Recovery
from .world import blocks

SHARE = 0.6
"""Of the free device memory that activations may take."""

TOKENS = {"cpu": 4096, "cuda": 32768}
"""Most tokens of a forward pass that is worth it."""


@dataclass(frozen=True)
class Sizes:
    """Rows of a forward pass, and whether activations are recomputed in the backward pass."""

    micro: int
    checkpointing: bool


def token_bytes(model: nn.Module, width: int, *, checkpointing: bool) -> int:
    """Bytes of activations that a training step holds for each token, estimated.

    What linear layers read and write, half as much again for norms, activation functions and attention, and the logits with their
    softmax and gradient in 32 bits. With recomputation only one block's activations are held, and the residual stream.

    Args:
        model: Its linear layers are counted.
        width: Bytes of a number.
        checkpointing: Recompute in the backward pass.
    """
    layers = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, LINEAR)]
    inside = 1.5 * width * sum(a + b for a, b in layers)
    vocabulary = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)
    count = max(1, len(list(blocks(model))))
    if checkpointing:
        residual = max((m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding)), default=0)
        inside = inside / count + count * residual * width
    return int(inside + 16 * vocabulary)


def choose_sizes(model: nn.Module, settings: Recovery, *, length: int, processes: int, device: torch.device, width: int) -> Sizes:
    """What the settings say, or what should fit where they say ``auto``.

    Args:
        model: On its device, so that what is free is known.
        settings: The recovery's.
        length: Tokens of a row.
        processes: That share a batch.
        device: Where it runs.
        width: Bytes of an activation.

    Raises:
        UsageError: Gradient checkpointing was asked for and the model has none.
    """
    able = getattr(model, "supports_gradient_checkpointing", False) and not isinstance(model, GraphModule)
    if settings.gradient_checkpointing == "on" and not able:
        raise UsageError(
            f"gradient_checkpointing=on: this {type(model).__name__} has no gradient checkpointing; lower micro_batch_size"
        )
    rows = -(-settings.batch_size // processes)
    most = max(1, TOKENS.get(device.type, TOKENS["cpu"]) // length)
    wanted = min(settings.micro_batch_size or most, rows)
    if device.type != "cuda":
        return Sizes(wanted, settings.gradient_checkpointing == "on")
    free = SHARE * torch.cuda.mem_get_info(device)[0]
    return fitting(model, settings, wanted, able, free=free, length=length, width=width)


def fitting(model: nn.Module, settings: Recovery, wanted: int, able: bool, *, free: float, length: int, width: int) -> Sizes:
    """Rows that fit into ``free`` bytes; recomputation only if not even one row fits without it, or fewer than were asked for."""
    plain = int(free // (length * token_bytes(model, width, checkpointing=False)))
    needed = settings.micro_batch_size or 1
    checkpointing = settings.gradient_checkpointing == "on" or (
        settings.gradient_checkpointing == "auto" and able and plain < needed
    )
    if settings.micro_batch_size is not None:
        return Sizes(wanted, checkpointing)
    room = int(free // (length * token_bytes(model, width, checkpointing=True))) if checkpointing else plain
    return Sizes(max(1, min(wanted, room)), checkpointing)
