"""Example inputs for tiny models, two sizes of each: one to trace with, one to check on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .configs import IMAGE, VOCABULARY

TRACED, CHECKED = (2, 7), (3, 11)
"""(batch, sequence) of the two sizes."""


def _ids(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(5, VOCABULARY, shape, generator=generator)


def example(task: str, model: nn.Module, size: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a task, (batch, sequence) large.

    Args:
        task: A key of `benchmarks.zoo.types.TASKS`.
        model: The model that they are for.
        size: Batch and sequence length.
        seed: Of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    batch, length = size
    if task == "seq2seq":
        ids = {"input_ids": _ids(size, generator), "decoder_input_ids": _ids((batch, length - 1), generator)}
        masked = config.model_type in ("switch_transformers", "longt5")  # these fail without both masks
        return ids | (
            {"attention_mask": torch.ones(size), "decoder_attention_mask": torch.ones(batch, length - 1)} if masked else {}
        )
    if task == "image":
        return {"pixel_values": _pixels(batch, config, generator)}
    if task == "image-text":
        return {"input_ids": _ids(size, generator), "pixel_values": _pixels(batch, config.vision_config, generator)}
    if task == "vision-language":
        return _images_among_words(model, size, generator)
    if task in ("audio", "speech"):
        return _sound(batch, config, str(getattr(model, "main_input_name", "")), generator) | (
            {"decoder_input_ids": _ids((batch, length), generator)} if task == "speech" else {}
        )
    return {"input_ids": _ids(size, generator)}


def _pixels(batch: int, config: Any, generator: torch.Generator) -> Tensor:
    side = getattr(config, "image_size", IMAGE)
    height, width = (side, side) if isinstance(side, int) else side
    return torch.randn(batch, getattr(config, "num_channels", 3), height, width, generator=generator)


def _images_among_words(model: Any, size: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """One image a row, as many image tokens as the model makes of it, then words."""
    config = model.config
    pixels = _pixels(size[0], config.vision_config, generator)
    token = next(getattr(config, k) for k in ("image_token_id", "image_token_index") if hasattr(config, k))
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixels)
    features = getattr(found, "pooler_output", found)
    rows = torch.cat(list(features)) if isinstance(features, list | tuple) else features
    count = rows.numel() // rows.shape[-1] // size[0]
    ids = torch.cat([torch.full((size[0], count), token), _ids(size, generator)], 1)
    kinds = {"token_type_ids": torch.zeros_like(ids)} if "token_type_ids" in inspect.signature(model.forward).parameters else {}
    return {"input_ids": ids, "pixel_values": pixels, **kinds}


SAMPLES = 1600
"""Length of a waveform; spectra have a sixteenth of it, or what the model insists on."""


def _sound(batch: int, config: Any, name: str, generator: torch.Generator) -> dict[str, Tensor]:
    if name == "input_values":
        return {name: torch.randn(batch, SAMPLES, generator=generator)}
    named = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    bands = next((getattr(config, k) for k in named if hasattr(config, k)), 80)
    if hasattr(config, "max_source_positions") and not hasattr(config, "input_feat_per_channel"):  # channels first, of fixed length
        return {"input_features": torch.randn(batch, bands, 2 * config.max_source_positions, generator=generator)}
    return {"input_features": torch.randn(batch, SAMPLES // 16, bands, generator=generator)}
