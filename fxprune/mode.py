"""A model in another mode for a while: evaluation instead of training, without a KV cache, in double precision."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and afterwards every module's own mode again; traced graph modules, which refuse ``eval()``, too."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """No ``use_cache`` in any configuration of a model within; afterwards it is as it was."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching: list[Any] = []
    for config in {id(c): c for c in configs if c is not None}.values():
        parts = (config, getattr(config, "text_config", None), getattr(config, "decoder", None))
        caching += [part for part in parts if getattr(part, "use_cache", None) is True]
    for part in caching:
        part.use_cache = False
    try:
        yield
    finally:
        for part in caching:
            part.use_cache = True


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Both: evaluation mode and no KV cache, as a model is traced and compared."""
    with evaluating(model), without_cache(model):
        yield


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards every module holds the tensors that it held: what a forward keeps for the next has no numbers in a trace."""
    before = [(table, _tensors(table)) for m in model.modules() for table in (vars(m), m._buffers)]
    try:
        yield
    finally:
        for table, held in before:
            for name in _tensors(table).keys() - held.keys():
                del table[name]
            table.update(held)


def _tensors(table: MutableMapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in table.items() if isinstance(value, Tensor)}


@contextmanager
def in_double(*modules: nn.Module) -> Iterator[None]:
    """Parameters and buffers in float64 within; afterwards they have their own storage again. Needs memory for the copies."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()}
    own: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor in tensors.values():
            own.append((tensor, tensor.data))
            tensor.data = tensor.data.to(torch.float64)
        yield
    finally:
        for tensor, data in own:
            tensor.data = data
