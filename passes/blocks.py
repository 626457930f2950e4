"""What stays whole by its place, and which residual blocks may go: in which order, and how many of each stack."""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..groups import LAYERS, Groups, layer_of

if TYPE_CHECKING:
    from .selection import Selection


def inside(path: str, block: str) -> bool:
    """True for a block itself and for what lies in it."""
    return path == block or path.startswith(f"{block}.")


def guarded_layers(numbers: set[int], chosen: Selection) -> set[int]:
    """Which of the layers are protected by their place."""
    layers = sorted(numbers)
    return {*layers[: chosen.protect_first], *layers[max(0, len(layers) - chosen.protect_last) :]}


def least_left(size: int, floor: float) -> int:
    """Fewest units that stay."""
    return max(1, math.ceil(floor * size - 1e-9))


def open_blocks(groups: Groups, chosen: Selection) -> list[str]:
    """Residual blocks that nothing protects."""
    guarded = guarded_layers({layer_of(p) or 0 for p in groups.blocks}, chosen)
    kept = {n for pattern in chosen.protect for n in fnmatch.filter((*groups, *groups.blocks), pattern)}
    return [p for p in groups.blocks if (layer_of(p) or 0) not in guarded and not any(inside(n, p) for n in kept)]


def _stack(block: str) -> str:
    """The list that a block is an entry of."""
    return block.rpartition(".")[0]


def room_of(groups: Groups, blocks: Sequence[str], chosen: Selection) -> dict[str, int]:
    """How many blocks of each stack may go: an encoder and a decoder each keep their share, and one block at the least."""
    every, free = (Counter(map(_stack, paths)) for paths in (groups.blocks, blocks))
    return {stack: min(free[stack], n - least_left(n, chosen.floor)) for stack, n in every.items()}


def ranked_blocks(groups: Groups, chosen: Selection, block_scores: Mapping[str, float] | None) -> list[str]:
    """Blocks in the order in which they go: least important first, or from the end."""
    blocks = open_blocks(groups, chosen)
    if block_scores is not None and chosen.pace.get(LAYERS, 0) > 0:
        for path in blocks:
            if path not in block_scores:
                raise UsageError(f"there is no score for block '{path}'; give one for each, or none")
    ranked = blocks[::-1] if block_scores is None else sorted(blocks, key=lambda p: block_scores.get(p, 0.0))
    room = room_of(groups, blocks, chosen)
    first: list[str] = []
    rest: list[str] = []
    for path in ranked:  # those that their stack cannot spare come last, out of reach
        room[_stack(path)] -= 1
        (first if room[_stack(path)] >= 0 else rest).append(path)
    return first + rest
