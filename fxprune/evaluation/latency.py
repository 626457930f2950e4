"""Latency of a model as people use it: reading a prompt (prefill) and writing tokens with a KV cache (decode)."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..calibration import longest_input, vocabulary_of
from ..errors import UsageError, check_seed, check_whole
from ..mode import evaluating


@dataclass(frozen=True)
class Latency:
    """Medians over repetitions.

    Attributes:
        prefill_ms: Milliseconds to read the prompt.
        decode_ms: Milliseconds for each step after it, which writes one new token.
        prompt: Prompt tokens.
        new_tokens: Tokens decoded in each repetition.
        repeats: Repetitions.
        batch: Sequences at a time.
    """

    prefill_ms: float
    decode_ms: float
    prompt: int
    new_tokens: int
    repeats: int
    batch: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure_latency(
    model: nn.Module, *, prompt: int = 128, new_tokens: int = 16, repeats: int = 3, batch: int = 1, seed: int = 0
) -> Latency:
    """Time prefill and decode, after one warm-up; on a GPU the clock is read when it has done all that it was given.

    Args:
        model: A Hugging Face causal LM.
        prompt: Prompt tokens (random ids: speed does not depend on them).
        new_tokens: Tokens to decode.
        repeats: Repetitions; the median is reported.
        batch: Sequences at a time; a decode step writes one token of each.
        seed: Of the prompt.

    Raises:
        UsageError: A number that makes no sense, more tokens than the model reads, or no vocabulary.
    """
    for name, value in (("prompt", prompt), ("new_tokens", new_tokens), ("repeats", repeats), ("batch", batch)):
        check_whole(name, value, 1)
    check_seed(seed)
    size = check_latency(model, prompt=prompt, new_tokens=new_tokens)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, size, (batch, prompt), generator=generator).to(device)
    prefill, decode = [], []
    with evaluating(model), torch.no_grad():
        for i in range(repeats + 1):
            start = _now(device)
            output = model(input_ids=ids, use_cache=True)
            middle = _now(device)
            for _ in range(new_tokens):
                step = output.logits[:, -1:].argmax(-1)
                output = model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
            end = _now(device)
            if i:
                prefill.append(middle - start)
                decode.append((end - middle) / new_tokens)
    return Latency(
        round(statistics.median(prefill) * 1e3, 2), round(statistics.median(decode) * 1e3, 2), prompt, new_tokens, repeats, batch
    )


def check_latency(model: nn.Module, *, prompt: int, new_tokens: int) -> int:
    """See that a model's latency can be measured: it runs on one token.

    Args:
        model: As for `measure_latency`.
        prompt: As there.
        new_tokens: As there.

    Returns:
        The size of its vocabulary.

    Raises:
        UsageError: It reads too few tokens, has no vocabulary, or no KV cache.
    """
    longest = longest_input(model)
    if longest is not None and max(prompt, 1) + new_tokens > longest:
        raise UsageError(
            f"the model reads at most {longest} tokens, fewer than a prompt of {max(prompt, 1)} and {new_tokens} new ones"
        )
    vocabulary = vocabulary_of(model)
    if vocabulary is None:
        raise UsageError(f"latency is measured on token ids, and {type(model).__name__} has no vocabulary")
    with evaluating(model), torch.no_grad():
        output = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device), use_cache=True)
    if getattr(output, "past_key_values", None) is None:
        raise UsageError(f"latency is that of decoding with a KV cache, and {type(model).__name__} has none: leave latency out")
    return vocabulary[0]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
