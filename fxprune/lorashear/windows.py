"""The text that knowledge and importance are measured on: windows of the first stage's sources."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..data import Examples
from ..errors import UsageError

ROWS = 8
"""Windows of a batch."""


def windows(texts: Mapping[str, Examples], *, samples: int, length: int, held: bool) -> tuple[list[dict[str, Tensor]], str]:
    """Windows of text, the sources in turn, as long as each has any.

    Args:
        texts: Examples of each source; each source's are read end to end.
        samples: Windows wanted.
        length: Tokens of each.
        held: Whether it is text that nothing trains on (for the words only).

    Returns:
        (batches of ``input_ids``, int64 ``[up to 8, length]``; what they are, in words).

    Raises:
        UsageError: No source has so many tokens.
    """
    found = {name: examples.ids.long().unfold(0, length, length) for name, examples in texts.items() if examples.tokens >= length}
    if not found:
        longest = max(examples.tokens for examples in texts.values())
        if not held:
            raise UsageError(
                f"importance is measured on windows of {length} tokens, and no source has so many (at most {longest}): lower "
                "knowledge_length, or say criterion=saliency"
            )
        raise UsageError(
            f"knowledge is measured on held-out text, and no source has {length} tokens of it (at most {longest}): lower "
            "knowledge_length, raise validation_samples, or say protect_share=0 (--protect-share 0)"
        )
    order = [(turn, name) for name, rows in found.items() for turn in range(len(rows))]
    order.sort(key=lambda place: place[0])
    rows = torch.stack([found[name][turn] for turn, name in order[:samples]])
    used = ", ".join(dict.fromkeys(name for _, name in order[:samples]))
    return [{"input_ids": part} for part in rows.split(ROWS)], f"{len(rows)} x {length} tokens {'held out ' * held}of {used}"
