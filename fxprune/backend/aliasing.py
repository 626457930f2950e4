"""Inputs that share memory: a graph without mutation holds only while what it writes to is no part of another input."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn


def overlap(values: Sequence[Any], written: Collection[int]) -> bool:
    """Whether a tensor that is written to may share memory with another, by the addresses between its first and last number.

    Args:
        values: Inputs of a graph, numbers among them.
        written: Positions of those that it writes to.
    """
    ranges = []
    for position, value in enumerate(values):
        if type(value) in (Tensor, nn.Parameter) and value.numel():
            start = value.data_ptr()
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            ranges.append((start, start + (last + 1) * value.itemsize, position in written))
    end = end_of_written = 0
    for start, stop, writes in sorted(ranges):
        if start < (end if writes else end_of_written):
            return True
        end = max(end, stop)
        end_of_written = max(end_of_written, stop) if writes else end_of_written
    return False
