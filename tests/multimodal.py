"""Tiny random models of images and text, with inputs that have their image tokens in the right places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import vision_utils

from .zoo import BASE, GROUPED

hf: Any = transformers  # configurations take more than their signatures say

IMAGE = 96
LENGTH = 11
VISION = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "image_size": 16,
    "patch_size": 8,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

Inputs = dict[str, Tensor]


def words(images: int, seed: int, batch: int = 2, length: int = LENGTH) -> Tensor:
    """Token ids with that many image tokens from the second place on."""
    ids = torch.randint(5, 90, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 1 : 1 + images] = IMAGE
    return ids


def pixels(*shape: int, seed: int) -> Tensor:
    """Random pixel values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(model: nn.Module) -> nn.Module:
    """Random everywhere: norms, biases and gates must not hide behind ones and zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4)
    return model.eval()


def llava(tower: str, layer: int) -> nn.Module:
    """LLaVA on one of the two usual vision towers; ``layer`` says which of the tower's layers it reads."""
    vision = (hf.SiglipVisionConfig if tower == "siglip" else hf.CLIPVisionConfig)(**VISION)
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=hf.LlamaConfig(**GROUPED),
        image_token_index=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
    )
    return hf.LlavaForConditionalGeneration(config)


def paligemma() -> nn.Module:
    """A linear projector; the prompt is attended to in both directions."""
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, projection_dim=48),
        text_config=hf.GemmaConfig(**GROUPED),
        image_token_index=IMAGE,
        projection_dim=48,
        hidden_size=48,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def clip() -> nn.Module:
    """Two towers that meet in a product only."""
    text = {**BASE, "projection_dim": 24, "bos_token_id": 95, "eos_token_id": IMAGE, "pad_token_id": 1}
    config = hf.CLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 24}, projection_dim=24)
    return hf.CLIPModel(config)


def idefics() -> nn.Module:
    """As Flamingo: gated cross-attention before every layer of the decoder."""
    vision = {**{k: v for k, v in VISION.items() if k != "hidden_size"}, "embed_dim": 40}
    options = {"additional_vocab_size": 0, "cross_layer_interval": 1, "use_resampler": False, "alpha_initializer": "ones"}
    return hf.IdeficsForVisionText2Text(hf.IdeficsConfig(**BASE, **options, vision_config=vision))


def mllama() -> nn.Module:
    """Tiles of images, a gated tower, cross-attention in one of three layers."""
    vision = hf.models.mllama.configuration_mllama.MllamaVisionConfig(
        **{k: v for k, v in VISION.items() if k != "num_attention_heads"},
        attention_heads=5,
        num_global_layers=1,
        max_num_tiles=2,
        vision_output_dim=80,
        intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )
    text = hf.models.mllama.configuration_mllama.MllamaTextConfig(
        **{**BASE, **SPECIAL, "num_hidden_layers": 3},
        num_key_value_heads=2,
        cross_attention_layers=[1],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return hf.MllamaForConditionalGeneration(config)


def one_image(seed: int, batch: int = 2, length: int = LENGTH) -> Inputs:
    """An image of four patches for each row, as LLaVA takes it."""
    return {"input_ids": words(4, seed, batch, length), "pixel_values": pixels(batch, 3, 16, 16, seed=seed)}


def prefix(seed: int, batch: int = 2, length: int = LENGTH) -> Inputs:
    """The same for PaliGemma: what comes after the seventh token is the answer."""
    answer = (torch.arange(length) >= 7).long().repeat(batch, 1)
    return {**one_image(seed, batch, length), "attention_mask": torch.ones_like(answer), "token_type_ids": answer}


def caption(seed: int) -> Inputs:
    """A text that ends with the end token, and an image."""
    ids = words(0, seed)
    ids[:, -1] = IMAGE
    return {"input_ids": ids, "pixel_values": pixels(2, 3, 16, 16, seed=seed)}


def two_images(seed: int) -> Inputs:
    """Two images for each row, of which some tokens see one only."""
    seen = torch.ones(2, LENGTH, 2, dtype=torch.long)
    seen[0, :5, 1] = 0
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    return {
        "input_ids": words(0, seed),
        "attention_mask": mask,
        "pixel_values": pixels(2, 2, 3, 16, 16, seed=seed),
        "image_attention_mask": seen,
    }


def tiles(seed: int) -> Inputs:
    """Two images of two tiles for each row; one image alone would be widened to two."""
    return {
        "input_ids": words(1, seed),
        "attention_mask": torch.ones(2, LENGTH, dtype=torch.long),
        "pixel_values": pixels(2, 2, 2, 3, 16, 16, seed=seed),
        "aspect_ratio_ids": torch.full((2, 2), 2),
        "aspect_ratio_mask": torch.ones(2, 2, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, LENGTH, 2, 2, dtype=torch.long),
    }


@dataclass(frozen=True)
class Case:
    """How to make a model, what it takes, and the prefixes of its towers' names."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    towers: Sequence[str]

    def build(self) -> nn.Module:
        """The model with random weights everywhere, in evaluation mode."""
        torch.manual_seed(0)
        return randomised(self.make())


LLAVA_TOWERS = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.")
IDEFICS_TOWERS = ("model.vision_model.", "model.gated_cross_attn_layers.", "model.layers.")
CASES = {
    "llava-siglip": Case(lambda: llava("siglip", -1), one_image, LLAVA_TOWERS),
    "llava-clip": Case(lambda: llava("clip", -2), one_image, LLAVA_TOWERS),
    "paligemma": Case(paligemma, prefix, ("model.vision_tower.", "model.language_model.")),
    "clip": Case(clip, caption, ("vision_model.", "text_model.")),
    "idefics": Case(idefics, two_images, IDEFICS_TOWERS),
    "mllama": Case(mllama, tiles, ("model.vision_model.", "model.language_model.")),
}


def by_image(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> tuple[Tensor, None]:
    """Attention within each image, by a mask: transformers' own cuts the patches into a list whose lengths are data."""
    at = torch.arange(query.shape[2])
    image = (at[:, None] >= options["cu_seq_lens_q"][None]).sum(-1)
    mask = image[:, None] == image[None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=options["scaling"]).transpose(1, 2), None


class FixedGrid(nn.Module):
    """A Qwen2-VL whose image sizes are worked out beforehand: in the model they are data, on which no trace can depend."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        hf.AttentionInterface.register("flash_by_image", by_image)  # such a name gets where the images begin, not pieces
        model.model.visual.config._attn_implementation = "flash_by_image"

    def forward(self, input_ids: Tensor, position_ids: Tensor, pixel_values: Tensor, places: Tensor, starts: Tensor) -> Any:
        more = {"position_ids": places, "cu_seqlens": starts, "max_seqlen": 16}
        image = self.model.model.visual(pixel_values, grid_thw=None, **more)
        found = hf.modeling_outputs.BaseModelOutputWithPooling(pooler_output=(image.pooler_output,))
        return self.model(input_ids=input_ids, position_ids=position_ids, mm_encoder_outputs={"image": found})

    def inputs(self, usual: Inputs) -> Inputs:
        """What this takes, from what the model takes."""
        ids, grid = usual["input_ids"], usual["image_grid_thw"]
        positions, _ = self.model.model.get_rope_index(ids, usual["mm_token_type_ids"], image_grid_thw=grid)
        places, starts = vision_utils.get_vision_position_ids(grid, 2), vision_utils.get_vision_cu_seqlens(grid)
        return {
            "input_ids": ids,
            "position_ids": positions,
            "pixel_values": usual["pixel_values"],
            "places": places,
            "starts": starts,
        }


def qwen2_vl() -> nn.Module:
    """Patches of all images in one row, two-dimensional rotary positions there and three-dimensional ones in the decoder."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 40, "hidden_size": 48, "num_heads": 5, "mlp_ratio": 2, "patch_size": 4}
    config = hf.Qwen2VLConfig(
        text_config={**BASE, **SPECIAL, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3},
        image_token_id=IMAGE,
        video_token_id=95,
        vision_start_token_id=94,
        vision_end_token_id=93,
    )
    return hf.Qwen2VLForConditionalGeneration(config)


def grids(seed: int) -> Inputs:
    """An image of four by four patches for each row, which makes four tokens."""
    ids, grid = words(4, seed), torch.tensor([[1, 4, 4], [1, 4, 4]])
    patches = pixels(32, 3 * 2 * 4 * 4, seed=seed)
    return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).long()}
