"""Perplexity with everything stated that its value depends on: text, protocol, sequence length, stride, tokens."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import longest_input
from ..errors import FxPruneError, UsageError, check_whole
from ..mode import evaluating
from ..passes.batches import Progress, logits_of


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and its protocol.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per predicted token (natural log).
        tokens: Tokens predicted.
        windows: Sequences run.
        length: Tokens of each sequence.
        stride: Tokens between the starts of two sequences; equal to ``length`` means they do not overlap.
        text: What was read.
        seconds: Time taken.
        protocol: How the text became tokens, one of `fxprune.evaluation.text.PROTOCOLS`; empty for ready ids.
        source: File or dataset of the text.
    """

    perplexity: float
    tokens: int
    windows: int
    length: int
    stride: int
    text: str
    seconds: float
    protocol: str = ""
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    length: int = 128,
    stride: int | None = None,
    batch_size: int = 8,
    max_windows: int | None = None,
    text: str = "",
    protocol: str = "",
    source: str = "",
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a causal LM on one stream of tokens.

    With ``stride == length`` this is LLM-Pruner's protocol (128 tokens, not overlapping, the rest of the stream dropped; its
    ``PPLMetric``): each window predicts its tokens but the first, and the mean runs over all predicted tokens. With a smaller
    stride a window predicts only the tokens that the one before it has not, with more context.

    Args:
        model: Called with ``input_ids [batch, length]``; returns an object with ``logits``, or a tuple that starts with them.
        ids: LongTensor ``[tokens]``.
        length: Tokens of each window.
        stride: Tokens between window starts; by default ``length``.
        batch_size: Windows at a time.
        max_windows: Stop after so many.
        text: A label of the text, for the record.
        protocol: For the record: how the text became ``ids``.
        source: For the record: where the text is from.
        progress: Called with (what, done, total).

    Raises:
        UsageError: The text is shorter than one window, the model reads fewer tokens than a window has, or a number makes no
            sense.
        FxPruneError: The losses are NaN.
    """
    starts = window_starts(model, ids, length=length, stride=stride, batch_size=batch_size, max_windows=max_windows, text=text)
    step = length if stride is None else stride
    device = next(model.parameters()).device
    begin, total, count = time.perf_counter(), 0.0, 0
    with evaluating(model), torch.no_grad():
        for i in range(0, len(starts), batch_size):
            group = starts[i : i + batch_size]
            batch = torch.stack([ids[s : s + length] for s in group]).to(device)
            logits = logits_of(model(input_ids=batch))
            losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), batch[:, 1:], reduction="none")
            for row, start in enumerate(group):
                new = losses[row] if start == 0 or step == length else losses[row, -step:]
                total += float(new.double().sum())
                count += new.numel()
            if progress is not None:
                progress("perplexity", min(i + batch_size, len(starts)), len(starts))
    mean = total / count
    if math.isnan(mean):
        raise FxPruneError(f"the model's losses{f' on {text}' if text else ''} are NaN: it is damaged")
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, count, len(starts), length, step, text, round(time.perf_counter() - begin, 2), protocol, source)


def window_starts(
    model: nn.Module,
    ids: Tensor,
    *,
    length: int,
    stride: int | None = None,
    batch_size: int = 8,
    max_windows: int | None = None,
    text: str = "",
) -> list[int]:
    """Where the windows of `perplexity` start; its errors come from here, before the model is run."""
    step = length if stride is None else stride
    if length < 2 or not 1 <= step <= length:
        got = f"length={length}" + (f", stride={stride}" if stride is not None else "")
        raise UsageError(f"length must be at least 2 and stride between 1 and length, got {got}")
    check_whole("batch_size", batch_size, 1)
    if max_windows is not None:
        check_whole("max_windows", max_windows, 1)
    longest = longest_input(model)
    if longest is not None and length > longest:
        raise UsageError(f"the model reads at most {longest} tokens, fewer than one window of {length}")
    starts = list(range(0, len(ids) - length + 1, step))[:max_windows]
    if not starts:
        named = f"{text}: " if text else ""
        raise UsageError(f"{named}the text has {len(ids)} tokens, fewer than one window of {length}")
    return starts
