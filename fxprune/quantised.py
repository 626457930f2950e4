"""What cannot be pruned because it is quantised already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .errors import UsageError

_PACKED = ("int8", "uint8", "int4", "uint4", "float8", "float4")


def refuse_quantised(model: nn.Module) -> None:
    """Check that the weights are plain numbers: units cannot be cut out of packed or scaled ones.

    Raises:
        UsageError: Some weight is quantised, or the configuration says that the checkpoint is.
    """
    found = quantised_part(model)
    if found is not None:
        raise UsageError(
            f"this {type(model).__name__} is quantised ({found}), and quantised weights cannot be pruned: load it in floating "
            "point or dequantise it first (model.dequantize() in transformers), prune that, and quantise the result"
        )


def quantised_part(model: nn.Module) -> str | None:
    """What is quantised about a model, in words; None if nothing is."""
    return next(_quantised(model), None)


def _quantised(model: nn.Module) -> Iterator[str]:
    """What is quantised about a model, in words."""
    for path, module in model.named_modules():
        packed = getattr(module, "_packed_params", None)  # torch's own quantised layers keep their weight in an opaque object
        if packed is not None and not isinstance(packed, Tensor):
            yield f"'{path}' is a {module._get_name()}"
    for name, parameter in model.named_parameters():
        if parameter.is_quantized or _packed(parameter):
            yield f"parameter '{name}' is {parameter.dtype}"
    for name, buffer in model.named_buffers():
        if buffer.is_quantized or (_packed(buffer) and buffer.dtype is not torch.uint8):  # which may be a mask
            yield f"buffer '{name}' is {buffer.dtype}"
    if any(p.is_meta for p in model.parameters()):
        return  # built from a configuration to look at: it has no weights yet, and its groups are those of the dequantised model
    for module in model.modules():
        settings = getattr(getattr(module, "config", None), "quantization_config", None)
        if settings is not None:
            table = settings if isinstance(settings, Mapping) else vars(settings)
            method = table.get("quant_method", type(settings).__name__)
            yield f"its configuration has a quantization_config of kind {getattr(method, 'value', method)}"


def _packed(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and str(tensor.dtype).removeprefix("torch.").startswith(_PACKED)
