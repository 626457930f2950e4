"""Models as users name them: a hub id, a local directory, a ``.gguf`` file, or a checkpoint of ours."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import CheckpointError, UsageError, nearest
from ..wording import listed

log = logging.getLogger("fxprune")

ELSEWHERE = "other models are pruned in Python, fxprune.prune(model, inputs=...)"

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load_source(source: str | os.PathLike[str], *, dtype: str | torch.dtype = "auto", meta: bool = False) -> tuple[nn.Module, Any]:
    """Load a causal LM and its tokenizer.

    Args:
        source: A hub id, a local directory, a ``.gguf`` file, or a directory that fxprune wrote.
        dtype: ``"auto"`` (as stored), or a dtype or its name.
        meta: Build the model on the meta device from its configuration: no weights are read.

    Returns:
        (model in evaluation mode, tokenizer or None if there is none).

    Raises:
        UsageError: Nothing of that name can be loaded, which says what was looked for; or some of its weights are not there.
        CheckpointError: There is a checkpoint, and it is damaged.
    """
    name = os.fspath(source)
    path = Path(name)
    kind = _dtype(dtype)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UsageError(f"there is no file '{name}'")
        return _gguf(path, kind)
    if path.is_file():
        raise UsageError(f"'{name}' is a file; name a directory with a checkpoint in it, a hub id or a .gguf file")
    looks_local = path.is_absolute() or name.startswith(".") or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise UsageError(f"there is no directory '{name}'")
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise UsageError(f"'{name}' is a PEFT adapter: merge it into its model first (merge_and_unload), and save that")
        raise UsageError(f"'{name}' holds no config.json: it is not a Hugging Face checkpoint")
    from transformers import AutoConfig, AutoModelForCausalLM

    if path.is_dir() and is_per_layer(path):
        from .load import load

        return load(path, dtype=kind), _tokenizer(name)
    found: Mapping[str, Any] = {}
    try:
        if meta:
            config = AutoConfig.from_pretrained(name)
            with torch.device("meta"):
                model: nn.Module = AutoModelForCausalLM.from_config(config)
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=kind, output_loading_info=True)
            model, found = loaded
    except ImportError as error:  # what a quantised checkpoint needs to be read
        raise UsageError(
            f"cannot load '{name}': {str(error).strip().splitlines()[0]}; quantised weights cannot be pruned: name the "
            "checkpoint it was quantised from"
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        looked = "" if path.is_dir() else " (there is no such directory, and as a hub id it cannot be found)"
        kind_of = CheckpointError if isinstance(error, SafetensorError | RuntimeError) else UsageError
        said = str(error).strip().splitlines()[0]
        if other := re.search(r"Unrecognized configuration class .*?(\w+)'>", said):
            said = f"transformers has none with a {other[1]}; {ELSEWHERE}"
        raise kind_of(f"cannot load a causal language model from '{name}'{looked}: {said}") from error
    return (model if meta else _whole(name, model, found)).eval(), _tokenizer(name)


def _whole(name: str, model: nn.Module, found: Mapping[str, Any]) -> nn.Module:
    """Refuse a model of which transformers made some weights up; say what it left out."""
    config: Any = model.config
    kind, saved = type(model).__name__, config.architectures or []
    if missing := sorted(found["missing_keys"]):
        other = f"; its config names {', '.join(saved)}" if saved and kind not in saved else ""
        raise UsageError(
            f"'{name}' is no whole {kind}: it does not hold {listed(missing, 3)}, which would be random{other}. Name a checkpoint "
            f"of a causal language model; {ELSEWHERE}"
        )
    if more := sorted(found["unexpected_keys"]):
        log.warning("'%s' holds %s, which a %s does not have: left out", name, listed(more, 3), kind)
    return model


def is_per_layer(directory: Path) -> bool:
    """True if the directory holds a checkpoint in fxprune's per-layer form."""
    try:
        return "fxprune" in json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return False


def _dtype(dtype: str | torch.dtype) -> Any:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype '{dtype}'; {nearest(dtype, DTYPES)}")
    return getattr(torch, dtype)


def _tokenizer(name: str, **options: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(name, **options)
        # without any file, some classes come as an empty shell that reads every text as nothing
        return found if len(found) > len(found.all_special_tokens) else None
    except Exception as error:  # noqa: BLE001 - a model without tokenizer is fine, transformers raises many types
        log.info("no tokenizer at %s: %s", name, error)
        return None


def _gguf(path: Path, dtype: Any) -> tuple[nn.Module, Any]:
    """Dequantise into a fresh model: transformers' own result calls itself quantised and refuses to be saved."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UsageError("reading a .gguf file needs the gguf package: pip install 'fxprune[demo]'") from error
    from transformers import AutoModelForCausalLM

    options = {"gguf_file": path.name}
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32 if dtype == "auto" else dtype, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"cannot read '{path}': {str(error).strip().splitlines()[0]}") from error
    loaded: Any = _whole(str(path), *found)
    config = loaded.config
    config.__dict__.pop("quantization_config", None)
    config.dtype = next(loaded.parameters()).dtype
    config._name_or_path = path.stem
    with torch.device("meta"):
        fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict(), assign=True, strict=False)
    for name, buffer in loaded.named_buffers():
        owner = fresh.get_submodule(name.rpartition(".")[0])
        owner._buffers[name.rpartition(".")[2]] = buffer
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    return fresh.eval(), _tokenizer(str(path.parent), **options)
