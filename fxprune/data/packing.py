"""Whether a model keeps the examples of a packed row apart: found by trying, since families differ and say nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..mode import evaluating
from ..passes.batches import logits_of

_LENGTHS = (16, 8)  # tokens of what comes first in the trial row, and of what must not see it
_SEEN = 0.05
"""Change of the logits, in their standard deviations, from which on the second example has seen the first: rounding stays far
below (experts batch their tokens, so that it is not 0), and another 16 tokens of context change logits by about 1."""


def packs_apart(model: nn.Module, *, vocabulary: int, **options: Any) -> bool:
    """Whether examples in one row are computed as if each were alone, given ``position_ids`` that begin at 0 at each.

    A transformers model does if it makes its causal mask from ``position_ids``, and is called with ``use_cache=False``; one that
    counts positions from the attention mask, or knows distances only (ALiBi), does not. A traced graph does if it was traced from
    such a model with ``position_ids``.

    Args:
        model: Called with ``input_ids`` and ``position_ids``, int64 ``[1, 24]``, and ``options``; gives ``logits``, or a tuple that
            starts with them. It runs three times, in evaluation mode, without gradients, and is left as it was.
        vocabulary: Token ids are drawn below it.
        **options: ``use_cache=False`` for a transformers model.

    Returns:
        False too if the model takes no ``position_ids``.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(0, vocabulary, (n,), generator=generator) for n in (_LENGTHS[0], *_LENGTHS))
    positions = torch.cat([torch.arange(n) for n in _LENGTHS])[None].to(device)
    try:
        with evaluating(model), torch.no_grad():
            alone, one, two = (
                logits_of(
                    model(
                        input_ids=torch.cat([before, second])[None].to(device),
                        position_ids=positions[:, _LENGTHS[0] - len(before) :],
                        **options,
                    )
                )
                for before in (first[:0], first, other)
            )
    except (TypeError, ValueError):  # what modules and traced graphs raise for an argument that they do not know
        return False
    alone, one, two = (logits[0, -_LENGTHS[1] :].float() for logits in (alone, one, two))
    return max(float((packed - alone).abs().max()) for packed in (one, two)) < _SEEN * float(alone.std())
