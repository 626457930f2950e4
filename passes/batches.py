"""Calibration batches: what a traced module takes out of them, what it gives for them, and the loss of that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..errors import UsageError

log = logging.getLogger("fxprune")

Batch: TypeAlias = Mapping[str, Tensor]
"""From the names of a model's inputs to tensors ``[samples, ..]``."""

Loss: TypeAlias = Callable[[Any, Batch], Tensor]
"""(what the model returned, the batch) -> a scalar, the mean loss."""

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with (what is being done, how many are done, how many there are)."""


def input_names(gm: GraphModule) -> tuple[list[str], list[str]]:
    """Names of the positional and of the keyword arguments that a traced module takes."""
    info: Any = getattr(gm.graph._codegen, "pytree_info", None)
    if info is None:
        return [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"], []
    args, kwargs = info.in_spec.child(0), info.in_spec.child(1)
    keywords = list(kwargs.context) if kwargs.num_children else []
    return [n for n in info.orig_args if n not in ("self", *keywords)][: args.num_children], keywords


def call_arguments(gm: GraphModule, batch: Batch) -> tuple[list[Any], dict[str, Any]]:
    """The positional and keyword arguments that a traced module takes, out of a batch.

    Args:
        gm: What `fxprune.trace` returned; it is called as it was traced.
        batch: Mapping from input names; what the module does not take is left out.

    Raises:
        UsageError: An input of the traced module is missing.
    """
    positional, keywords = input_names(gm)
    missing = [n for n in (*positional, *keywords) if n not in batch]
    if missing:
        raise UsageError(
            f"a calibration batch has {', '.join(batch) or 'nothing'}, but the model was traced with "
            f"{', '.join((*positional, *keywords))}: {', '.join(missing)} is missing"
        )
    return [batch[n] for n in positional], {n: batch[n] for n in keywords}


def flat_arguments(gm: GraphModule, batch: Batch) -> list[Any]:
    """The values of a traced module's placeholders, in their order, out of a batch; raises as `call_arguments`."""
    args, kwargs = call_arguments(gm, batch)
    return torch.utils._pytree.tree_leaves([*args, *kwargs.values()])


def warn_of_padding(gm: GraphModule, calibration: Sequence[Batch]) -> None:
    """Say so where padding is marked in the batches, but the traced module takes no mask."""
    positional, keywords = input_names(gm)
    masks = [b["attention_mask"] for b in calibration if "attention_mask" in b]
    if "attention_mask" not in (*positional, *keywords) and not all(bool(m.bool().all()) for m in masks):
        log.warning("the model was traced without attention_mask: padding in the calibration batches is attended to")


def rows_of(batch: Batch) -> int:
    """How many samples a batch holds."""
    return max(v.shape[0] if v.dim() else 1 for v in batch.values())


def samples(calibration: Sequence[Batch]) -> Iterator[Batch]:
    """One sample at a time; a tensor with one row where others have many belongs to every sample.

    Raises:
        UsageError: The tensors of a batch have different numbers of samples.
    """
    for batch in calibration:
        rows = rows_of(batch)
        odd = [k for k, v in batch.items() if v.dim() and v.shape[0] not in (1, rows)]
        if odd:
            sizes = ", ".join(f"{k} has {len(v)}" for k, v in batch.items() if v.dim())
            raise UsageError(f"the tensors of a calibration batch must have equally many samples: {sizes}")
        for i in range(rows):
            yield {k: v[i : i + 1] if v.dim() and v.shape[0] == rows else v for k, v in batch.items()}


def logits_of(outputs: Any, missing: str = "the model gives no logits: it is no language model") -> Tensor:
    """The logits ``[samples, length, vocabulary]`` in what a language model returns.

    Args:
        outputs: An object with ``logits``, or a tensor, sequence or mapping whose first floating-point tensor they are.
        missing: What to say where there are none.

    Raises:
        UsageError: There are none.
    """
    logits = getattr(outputs, "logits", None)
    if logits is None:
        leaves = torch.utils._pytree.tree_leaves(outputs)
        logits = next((t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()), None)
    if logits is None:
        raise UsageError(missing)
    found: Tensor = logits
    return found


def causal_loss(outputs: Any, batch: Batch) -> Tensor:
    """Next-token cross-entropy, the mean over all predicted tokens, in float32.

    Args:
        outputs: What the module returned, see `logits_of`.
        batch: Holds ``labels`` (-100 is ignored) or ``input_ids``, ``[samples, length]``; with an ``attention_mask``, padding
            is ignored.

    Raises:
        UsageError: There are no logits, or no labels to compare them with.
    """
    needed = "the default loss needs logits [samples, length, vocabulary] and input_ids or labels: pass loss="
    logits, labels = logits_of(outputs, needed), batch.get("labels", batch.get("input_ids"))
    if labels is None or logits.dim() != 3:
        raise UsageError(needed)
    target = labels[:, 1:]
    if "labels" not in batch and "attention_mask" in batch:
        target = target.masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten(), ignore_index=-100)


def counted_rows(value: Tensor, batch: Batch) -> Tensor:
    """The tokens of an activation ``[.., features]`` as rows ``[tokens, features]``, without those that are padding."""
    mask = batch.get("attention_mask")
    rows = value.reshape(-1, value.shape[-1])
    if mask is not None and mask.dim() == 2 and value.shape[:-1] in (mask.shape, (mask.numel(),)):  # or tokens flattened
        return rows[mask.to(value.device).bool().flatten()]
    return rows


def predictions(output: Any, batch: Batch) -> Tensor:
    """Logarithms of the predicted probabilities, a row for each token that is no padding.

    Raises:
        UsageError: There are no logits.
    """
    needed = "divergence compares predictions, and the model gives no logits: say by='loss' and pass loss="
    logits = logits_of(output, needed)
    if logits.dim() < 2:
        raise UsageError(needed)
    return torch.log_softmax(counted_rows(logits, batch).float(), -1)


def kl_divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted || found) of two `predictions`, the mean over rows: a scalar, in nats."""
    return nn.functional.kl_div(found, wanted, reduction="sum", log_target=True) / len(wanted)
