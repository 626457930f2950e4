"""Tiny random models of many families, and a tokenizer: the smallest configuration at which no sizes are equal by chance.

Sizes are chosen so that heads, groups, head width, hidden size and FFN width all differ, and every weight is random, norms and
biases included: a mistake cannot hide behind ones and zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 97
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": 8}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64}
_FALCON = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_type: As `AutoConfig.for_model` knows it.
        config: What differs from the defaults.
        kinds: Sizes of the prunable groups of each kind, sorted; an axis that is pinned in silence makes this wrong.
        untied: What is different in ``kinds`` when the output projection has a weight of its own.
        auto: The auto class that builds the model.
    """

    model_type: str
    config: dict[str, Any]
    kinds: dict[str, list[int]]
    untied: dict[str, list[int]] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"


# Sizes of the prunable groups, by kind. Heads of a grouped-query model are kv heads times query groups; head_dim falls apart
# into rotary pairs (4, shared by all layers through the frequencies), what is not rotated, and the values' own width (8).
_LLAMA = {"hidden": [48], "head_dim": [4, 8, 8], "kv_heads": [2, 2], "query_groups": [3, 3], "ffn": [64, 64]}
_PLAIN = {"hidden": [48], "head_dim": [8, 8, 8, 8], "kv_heads": [6, 6], "ffn": [64, 64]}
_MIXTURE = {**_LLAMA, "experts": [4, 4]}
_WIDE = {**_PLAIN, "ffn": [192, 192]}

ZOO = {
    "llama": Family("llama", GROUPED, _LLAMA),
    "qwen2": Family("qwen2", GROUPED, _LLAMA),
    "qwen3": Family("qwen3", GROUPED, _LLAMA),
    "gemma2": Family("gemma2", GROUPED, _LLAMA),
    "gemma3": Family(  # local and global layers rotate with frequencies of their own
        "gemma3_text",
        {**GROUPED, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
        {**_LLAMA, "head_dim": [4, 4, 8, 8]},
    ),
    "phi3": Family("phi3", {**GROUPED, "pad_token_id": 0}, _LLAMA),
    "mistral": Family("mistral", GROUPED, _LLAMA),
    "gpt2": Family("gpt2", _GPT, _WIDE),
    "gpt_neox": Family("gpt_neox", BASE, {**_PLAIN, "head_dim": [6, 6, 8, 8]}),  # a quarter of the width is rotated: one pair
    "bloom": Family(  # the slopes of its position bias are shared: so are the heads; queries and keys share a width with values
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 6},
        {"hidden": [48], "head_dim": [8, 8], "kv_heads": [6], "ffn": [192, 192]},
    ),
    "opt": Family(
        "opt", {k: v for k, v in BASE.items() if k != "intermediate_size"} | {"ffn_dim": 64, "word_embed_proj_dim": 48}, _PLAIN
    ),
    "falcon": Family(  # one key and value head, fused with the queries: they share their width
        "falcon", _FALCON, {"hidden": [48], "head_dim": [4], "kv_heads": [6, 6], "ffn": [192, 192]}
    ),
    "falcon_new": Family(
        "falcon",
        {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
        {"hidden": [48], "head_dim": [4], "kv_heads": [2, 2], "query_groups": [3, 3], "ffn": [192, 192]},
    ),
    "mpt": Family(
        "mpt",
        {"vocab_size": VOCABULARY, "d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 64},
        {**_WIDE, "kv_heads": [6]},
    ),
    "gptj": Family("gptj", {**_GPT, "rotary_dim": 4}, {**_WIDE, "head_dim": [2, 2, 4, 4, 8, 8]}),
    "cohere": Family("cohere", GROUPED, _LLAMA),
    "stablelm": Family("stablelm", {**BASE, "num_key_value_heads": 2}, {**_LLAMA, "head_dim": [6, 6, 8, 8]}),
    "mixtral": Family("mixtral", {**GROUPED, "num_local_experts": 4}, _MIXTURE),  # all experts of a layer share one width
    "gpt_oss": Family("gpt_oss", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}, _MIXTURE),
    "bert": Family("bert", BASE, _PLAIN, {"ffn": [48, 64, 64]}, auto="AutoModelForMaskedLM"),  # its head has a hidden layer
}


def build(name: str, *, tied: bool = True, attention: str | None = None, **changes: Any) -> nn.Module:
    """A model of the family with random weights everywhere, in evaluation mode.

    Args:
        name: A key of `ZOO`.
        tied: Whether the output projection shares the embedding's weight.
        attention: ``eager`` or ``sdpa``; the family's own choice by default.
        **changes: Configuration fields to change.
    """
    import transformers

    family = ZOO[name]
    config = transformers.AutoConfig.for_model(family.model_type, **{**family.config, **changes})
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    options = {} if attention is None else {"attn_implementation": attention}
    model: nn.Module = getattr(transformers, family.auto).from_config(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4)  # default initialisation is so small that an error could pass for rounding
    return model.eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Token ids of the given shape; none is a special token."""
    return torch.randint(5, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token: ``w0`` is 3; an unknown word is 0, ``<s>`` 1 and ``</s>`` 2, and neither is added to a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
