"""Shrink a dense model's modules to recorded shapes. Pure torch: this file travels inside per-layer checkpoints.

The model is built from its dense configuration, so that every scalar computed from a size (an attention scale, an embedding
multiplier) stays what the dense model has; then parameters, buffers and integer attributes are set to the recorded ones.
"""

from __future__ import annotations

import copy
from functools import reduce
from typing import Any

import torch
from torch import nn


def apply_surgery(model: nn.Module, spec: dict[str, Any]) -> None:
    """Make a freshly built dense model match a pruned checkpoint, in place.

    Args:
        model: The dense model; its values do not matter (they are loaded afterwards), it may be on the meta device.
        spec: ``drop`` (list path -> entries that go), ``renumber`` (attribute names that hold an entry's number), ``shapes``
            (parameter name -> shape), ``added`` (the same for biases that the dense model does not have), ``buffers`` (buffer
            name -> shape), ``attributes`` (module path -> attribute -> value). All names are those after dropping.
    """
    for path in deepest_first(spec.get("drop", {})):
        drop_entries(model, path, spec["drop"][path], spec.get("renumber", {}).get(path, []))
    replaced: dict[int, nn.Parameter] = {}
    for name, shape in spec.get("shapes", {}).items():
        owner, leaf = _owner(model, name)
        old = owner._parameters[leaf]
        assert old is not None
        if id(old) not in replaced:  # tied parameters stay one object
            empty = torch.empty(shape, dtype=old.dtype, device=old.device)
            replaced[id(old)] = nn.Parameter(empty, requires_grad=old.requires_grad)
        owner._parameters[leaf] = replaced[id(old)]
    for name, shape in spec.get("added", {}).items():
        owner, leaf = _owner(model, name)
        beside = next(owner.parameters(recurse=False))
        owner._parameters[leaf] = nn.Parameter(torch.zeros(shape, dtype=beside.dtype, device=beside.device), beside.requires_grad)
    for name, shape in spec.get("buffers", {}).items():
        owner, leaf = _owner(model, name)
        old_buffer = owner._buffers[leaf]
        assert old_buffer is not None
        owner.register_buffer(leaf, torch.zeros(shape, dtype=old_buffer.dtype, device=old_buffer.device), persistent=True)
        vars(owner)["_fxprune_resized"] = True  # its values come from the checkpoint: they must not be initialised again
    for path, attributes in spec.get("attributes", {}).items():
        for key, value in attributes.items():
            set_attribute(model.get_submodule(path), key, tuple(value) if isinstance(value, list) else value)


def note_shapes(model: nn.Module, spec: dict[str, Any]) -> None:
    """Write into a record of surgery which shapes the model has by now: embeddings may have been given more rows."""
    now = {name: list(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    spec["shapes"] = {name: now.get(name, shape) for name, shape in spec.get("shapes", {}).items()}


class OwnConfig:
    """The configuration as one module sees it: some fields of its own, all others (later changes too) the model's."""

    def __init__(self, shared: Any) -> None:
        vars(self)["shared"] = shared

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(vars(self)["shared"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["shared"], name, value)


def set_attribute(module: nn.Module, key: str, value: Any) -> Any:
    """Set an attribute, or as ``config.field`` what this module alone finds in its configuration.

    Returns:
        What it was before; ``OwnConfig`` (the class) stands for a field that was the model's, and makes it so again.
    """
    head, _, field = key.partition(".")
    if not field:
        before = getattr(module, key)
        setattr(module, key, value)
        return before
    config = getattr(module, head)
    if not isinstance(config, OwnConfig):
        config = OwnConfig(config)
        setattr(module, head, config)
    before = vars(config).pop(field, OwnConfig)
    if value is not OwnConfig:
        vars(config)[field] = value
    return before


def shorten_config(config: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """Adapt what a configuration says of dropped entries: their number, and lists with one item each.

    Args:
        config: Changed in place, after the dense model was built from it.
        spec: ``lengths`` (path of the list -> entries before) and ``drop`` (path -> entries that go).

    Returns:
        The fields that changed as they were; of a nested configuration by ``name.field``.
    """
    before: dict[str, Any] = {}
    for path, gone in spec.get("drop", {}).items():
        length = spec["lengths"][path]
        nested = {k: v for k, v in vars(config).items() if hasattr(v, "to_dict") and hasattr(v, "model_type")}
        for name, part in {"": config, **nested}.items():
            for key, value in list(vars(part).items()):
                if key not in nested or name:
                    before.setdefault(f"{name}.{key}" if name else key, value)
                if isinstance(value, (list, tuple)) and len(value) == length:
                    setattr(part, key, type(value)(v for i, v in enumerate(value) if i not in set(gone)))
                elif type(value) is int and value == length and "layer" in key:
                    setattr(part, key, length - len(gone))
    return {k: v for k, v in before.items() if reduce(getattr, k.split("."), config) != v}


def deepest_first(paths: Any) -> list[str]:
    """Lists inside entries of other lists come before these: an entry's name is good until its list is renumbered."""
    return sorted(paths, key=lambda path: -path.count("."))


def drop_entries(model: nn.Module, path: str, gone: list[int], numbered: list[str]) -> None:
    """Remove entries of a module list and renumber what the rest know about their place (KV caches index by it)."""
    entries = copy.copy(model.get_submodule(path))  # a list, or a sequence that calls them
    left = [entry for i, entry in enumerate(entries._modules.values()) if entry is not None and i not in set(gone)]
    for number, entry in enumerate(left):
        for module in entry.modules():
            for key in numbered:
                if isinstance(vars(module).get(key), int):
                    setattr(module, key, number)
    entries._modules = {str(i): m for i, m in enumerate(left)}
    parent, leaf = _owner(model, path)
    parent._modules[leaf] = entries


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return root.get_submodule(path), leaf
