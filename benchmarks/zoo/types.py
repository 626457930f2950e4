"""Which model types there are for a task, in the installed transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .configs import tiny

TASKS = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "masked": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "image": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    "image-text": ("AutoModelForZeroShotImageClassification", "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    "vision-language": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    "audio": ("AutoModelForCTC", "MODEL_FOR_CTC_MAPPING_NAMES"),
    "speech": ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
}
"""For each task the auto class that builds its models, and the table of its model types."""


def types_of(task: str) -> list[str]:
    """Every model type that is registered for a task, sorted."""
    from transformers.models.auto import modeling_auto

    return sorted(getattr(modeling_auto, TASKS[task][1]))


def build(task: str, model_type: str, seed: int = 0) -> nn.Module:
    """A tiny random model in evaluation mode; nothing in it is zero or one by default.

    Args:
        task: A key of `TASKS`.
        model_type: One of `types_of`.
        seed: Of the weights.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    torch.manual_seed(seed)
    auto, table = TASKS[task]
    config = tiny(model_type, task)
    classes = getattr(modeling_auto, table)[model_type]
    if not isinstance(classes, str):  # several: the configuration says which
        config.architectures = [classes[0]]
    model: Any = getattr(transformers, auto).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * min(0.3, max(parameter[0].numel(), 1) ** -0.5))
    return model.eval()  # type: ignore[no-any-return]
