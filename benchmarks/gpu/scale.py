"""How large a run is: the model's shape, and the numbers of tokens that go with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import SHAPES, Shape
from fxprune.recipes import RECIPES


@dataclass(frozen=True)
class Scale:
    """A shape and what is run on it.

    Attributes:
        shape: Sizes of the model.
        row: Tokens of a training row.
        forward_rows: Rows of a forward pass in training.
        step_rows: Rows of an optimizer step.
        steps: Optimizer steps that are timed.
        prompt: Prompt tokens of a latency measurement.
        new_tokens: Tokens decoded in it.
        batches: Batch sizes of the latency measurements.
        multiple: FFN widths of the models whose latency is measured are multiples of this.
        samples: Calibration samples for our default criterion.
    """

    shape: Shape
    row: int
    forward_rows: int
    step_rows: int
    steps: int
    prompt: int
    new_tokens: int
    batches: tuple[int, ...]
    multiple: int
    samples: int

    def build(self, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
        """A random ``LlamaForCausalLM`` in evaluation mode, made on the device in that dtype: nothing is made on the CPU first."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        s = self.shape
        config = LlamaConfig(
            hidden_size=s.hidden,
            intermediate_size=s.ffn,
            num_hidden_layers=s.layers,
            num_attention_heads=s.heads,
            num_key_value_heads=s.kv_heads,
            head_dim=s.head_dim,
            vocab_size=s.vocabulary,
            tie_word_embeddings=s.tied,
        )
        torch.manual_seed(seed)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model.eval()


SCALES = {
    "7b": Scale(
        SHAPES["llama-7b"],
        row=512,
        forward_rows=8,
        step_rows=16,
        steps=10,
        prompt=512,
        new_tokens=32,
        batches=(1, 32),
        multiple=64,
        samples=RECIPES["default"]["samples"],
    ),
    "tiny": Scale(  # to try the scripts; LLM-Pruner's recipe leaves six layers whole
        Shape("tiny", 8, 48, 6, 6, 8, 64, 101, False),
        row=64,
        forward_rows=2,
        step_rows=4,
        steps=2,
        prompt=12,
        new_tokens=3,
        batches=(1, 2),
        multiple=4,
        samples=8,
    ),
}
