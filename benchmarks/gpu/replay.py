"""Prefill and decode as a GPU does them without waiting for Python: CUDA graphs over a static KV cache.

An eager step of a 7B model launches more than a thousand kernels; at small batches the time of the launches hides what pruning
saves. On another device the same calls are made without a graph.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.meter import now


class Decoder:
    """Greedy decoding into a static cache: every step reads and writes the same memory.

    Args:
        model: A Hugging Face causal LM in evaluation mode.
        ids: Prompts ``[batch, prompt]``.
        new_tokens: Steps that there is room for.
    """

    def __init__(self, model: Any, ids: Tensor, new_tokens: int) -> None:
        from transformers import StaticCache

        self.model, self.prompt = model, ids.shape[1]
        self.cache: Any = StaticCache(config=model.config, max_cache_len=self.prompt + new_tokens)
        self.first = self._next(ids)
        self.token = self.first.clone()

    def _next(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits[:, -1:].argmax(-1)
        return found

    def rewind(self) -> None:
        """Back to the end of the prompt."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt)
        self.token.copy_(self.first)

    def step(self) -> None:
        """One token of each sequence, in `token`."""
        self.token.copy_(self._next(self.token))


def replayed(work: Callable[[], Any], before: Callable[[], None], device: torch.device) -> Callable[[], Any]:
    """What does ``work`` again with one launch, on the same memory.

    Args:
        work: Kernels only; what it returns is of no use.
        before: Called before each warm-up and the capture.
        device: Without CUDA ``work`` is given back.
    """
    if device.type != "cuda":
        return work
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            before()
            work()
    torch.cuda.current_stream(device).wait_stream(side)
    before()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@torch.no_grad()
def measure_replayed(model: Any, ids: Tensor, *, new_tokens: int, repeats: int) -> dict[str, float]:
    """Medians: milliseconds to read prompts ``[batch, prompt]``, and for each decode step after them, one warm-up before."""
    device = ids.device
    prefill = replayed(lambda: model(input_ids=ids, use_cache=True).logits, lambda: None, device)
    found = {"prefill_ms": _median(prefill, lambda: None, device, repeats)}
    del prefill
    decoder = Decoder(model, ids, new_tokens)
    step = replayed(decoder.step, decoder.rewind, device)

    def steps() -> None:
        for _ in range(new_tokens):
            step()

    return {**found, "decode_ms": _median(steps, decoder.rewind, device, repeats) / new_tokens}


def _median(work: Callable[[], Any], before: Callable[[], None], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        before()
        start = now(device)
        work()
        times.append(now(device) - start)
    return statistics.median(times[1:]) * 1e3
