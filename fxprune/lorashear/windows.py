"""The text that knowledge is measured on: windows of what was held out of the first stage's sources."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..data import Examples
from ..errors import UsageError

ROWS = 8
"""Windows of a batch."""


def windows(held: Mapping[str, Examples], *, samples: int, length: int) -> tuple[list[dict[str, Tensor]], str]:
    """Windows of held-out text, the sources in turn, as long as each has any.

    Args:
        held: Held-out examples of each source; each source's are read end to end.
        samples: Windows wanted.
        length: Tokens of each.

    Returns:
        (batches of ``input_ids``, int64 ``[up to 8, length]``; what they are, in words).

    Raises:
        UsageError: No source has so many tokens.
    """
    found = {name: examples.ids.long().unfold(0, length, length) for name, examples in held.items() if examples.tokens >= length}
    if not found:
        longest = max(examples.tokens for examples in held.values())
        raise UsageError(
            f"knowledge is measured on held-out text, and no source has {length} tokens of it (at most {longest}): lower "
            "knowledge_length, raise validation_samples, or say protect_share=0 (--protect-share 0)"
        )
    order = [(turn, name) for name, rows in found.items() for turn in range(len(rows))]
    order.sort(key=lambda place: place[0])
    rows = torch.stack([found[name][turn] for turn, name in order[:samples]])
    used = ", ".join(dict.fromkeys(name for _, name in order[:samples]))
    return [{"input_ids": part} for part in rows.split(ROWS)], f"{len(rows)} x {length} tokens held out of {used}"
