"""``fxprune eval``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..calibration import encode, read_texts
from ..errors import UsageError
from ..evaluation import longest_input, measure_latency, perplexity
from .common import dump, load_model, progress


def run(arguments: argparse.Namespace) -> int:
    """Perplexity (and latency) of a model."""
    texts = read_texts(arguments.text)
    model, tokenizer = load_model(arguments)
    if tokenizer is None:
        raise UsageError(f"there is no tokenizer beside '{arguments.model}'")
    ids = encode(tokenizer, texts)
    with progress() as advance:
        measured = perplexity(
            model,
            ids,
            length=arguments.length,
            stride=arguments.stride,
            batch_size=arguments.batch_size,
            max_windows=arguments.max_windows,
            text=Path(arguments.text).name,
            progress=advance,
        )
    room = (longest_input(model) or 144) - 16
    latency = measure_latency(model, prompt=min(128, room), new_tokens=16) if arguments.latency else None
    if arguments.json:
        dump({"perplexity": measured.to_json(), "latency": latency.to_json() if latency else None})
        return 0
    print(
        f"perplexity {measured.perplexity:.3f} on {measured.text}: {measured.tokens:,} tokens, {measured.windows} windows of "
        f"{measured.length}, stride {measured.stride}"
    )
    if latency is not None:
        print(f"prefill {latency.prefill_ms} ms for {latency.prompt} tokens, decode {latency.decode_ms} ms/token")
    return 0
