"""Reading a pruned model back."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import CheckpointError, UsageError
from ..wording import listed
from .per_layer import MODELING, save_itself
from .surgery import OwnConfig, apply_surgery

DAMAGE = (OSError, KeyError, ValueError, RuntimeError, SafetensorError)
"""What reading a damaged or foreign checkpoint raises."""


def load(
    directory: str | os.PathLike[str], *, model: nn.Module | None = None, dtype: Any = "auto", device_map: Any = None
) -> nn.Module:
    """Load what ``result.save_pretrained`` wrote, whatever its form.

    Args:
        directory: The checkpoint's directory.
        model: For a plain ``nn.Module``: the dense module (its values do not matter; it is not changed).
        dtype: As for ``from_pretrained``.
        device_map: As for ``from_pretrained``.

    Returns:
        The model in evaluation mode: a stock transformers class where the form is uniform, else a subclass of one.

    Raises:
        UsageError: There is no checkpoint, or ``model`` is needed.
        CheckpointError: The checkpoint is damaged.
    """
    from ..names import SPEC_FILE

    path = Path(directory)
    if not path.is_dir():
        raise UsageError(f"there is no directory '{path}'")
    if (path / SPEC_FILE).is_file():
        return _load_module(path, model)
    if not (path / "config.json").is_file():
        raise UsageError(f"'{path}' holds no checkpoint: there is no config.json")
    options = {} if device_map is None else {"device_map": device_map}
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if "fxprune" not in config:
            import transformers

            cls = getattr(transformers, (config.get("architectures") or [""])[0], transformers.AutoModelForCausalLM)
            loaded: Any = cls.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
            return _whole(path, *loaded)
        name = f"{MODELING}_{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]}"
        spec = importlib.util.spec_from_file_location(name, path / f"{MODELING}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cls = getattr(module, next(iter(config["auto_map"].values())).rpartition(".")[2])
        model = _whole(path, *cls.from_pretrained(path, dtype=dtype, output_loading_info=True, **options))
        save_itself(model, cast(Any, model).config.fxprune)  # of classes that pickle finds
        for part in model.modules():
            if isinstance(own := getattr(part, "config", None), module.OwnConfig):
                object.__setattr__(own, "__class__", OwnConfig)
        return model
    except CheckpointError:
        raise
    except DAMAGE as error:
        raise CheckpointError(f"cannot load the checkpoint '{path}': {error}") from error


def _whole(path: Path, model: nn.Module, found: Mapping[str, Any]) -> nn.Module:
    """The model in evaluation mode, unless transformers made some of its weights up."""
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(f"cannot load the checkpoint '{path}': it does not hold {listed(missing, 3)}")
    return model.eval()


def _load_module(path: Path, model: nn.Module | None) -> nn.Module:
    from safetensors.torch import load_model

    from ..names import SPEC_FILE

    if model is None:
        raise UsageError(f"'{path}' holds a pruned plain module: pass the dense one, fxprune.load(dir, model=dense)")
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(torch.empty_like(tensor), requires_grad=tensor.requires_grad)
    small = copy.deepcopy(model, memo)
    try:
        apply_surgery(small, json.loads((path / SPEC_FILE).read_text(encoding="utf-8")))
        load_model(small, str(path / "model.safetensors"))
    except (*DAMAGE, AttributeError) as error:
        reason = str(error).strip().replace("\n\t", " ")
        raise CheckpointError(f"cannot load '{path}' into this {type(model).__name__}: {reason}") from error
    return small.eval()
