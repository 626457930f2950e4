"""Writing a pruned model: beside the target, read back, compared, and only then put in place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CheckpointError, UsageError
from ..mode import quiet
from ..names import PLAN_FILE, REPORT_FILE, SPEC_FILE
from ..reporting.page import write_pages
from .directory import new_directory
from .judge import call, judge
from .per_layer import persisted

if TYPE_CHECKING:
    from ..api import PruneResult


def save_pruned(
    result: PruneResult,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write a pruned model as a Hugging Face checkpoint, reload it, compare, and put it in place.

    Args:
        result: What `fxprune.prune` returned.
        directory: Where to.
        overwrite: Replace an existing directory.
        max_shard_size: As for ``save_pretrained``.
        more: What else the report file says.

    Raises:
        UsageError: The directory exists, or holds the dense model.
        CheckpointError: There is no eager form of the model, the disk is full, or what was read back is not what was written.
            Nothing is left behind.
    """
    if result.model is None:
        raise CheckpointError(f"there is no eager model to save: {result.report.note}")
    if hasattr(result.model, "merge_and_unload"):
        raise CheckpointError(
            "a model with adapters has no checkpoint that holds its pruned weights: save result.model.merge_and_unload() instead"
        )
    origin = getattr(result.dense_config, "_name_or_path", "")  # a hub id, or where the dense model was read from
    if origin and Path(origin).is_dir() and Path(directory).is_dir() and os.path.samefile(origin, directory):
        raise UsageError(f"the output directory '{directory}' holds the dense model: it will not be replaced; choose another")
    with new_directory(directory, overwrite=overwrite) as work:
        if hasattr(result.model, "save_pretrained"):
            write_pretrained(result.model, result.tokenizer, work, max_shard_size)
        else:
            _write_module(result, work)
        result.plan.save(work / PLAN_FILE)
        (work / REPORT_FILE).write_text(json.dumps({**result.report.to_json(), **(more or {})}, indent=1) + "\n")
        write_pages(work, name=Path(os.path.abspath(directory)).name)
        error = _reload_error(result, work)
        if error is not None:
            raise CheckpointError(
                f"the checkpoint read back from disk differs from the pruned model ({error}); nothing was written"
            )


def write_pretrained(model: Any, tokenizer: Any, work: Path, max_shard_size: str) -> None:
    """Write a Hugging Face model, its generation settings as they are, and its tokenizer."""
    generation = getattr(model, "generation_config", None)
    try:
        if generation is not None:  # written as it is: transformers refuses settings that it accepted when it read them
            model.generation_config = type(generation)()
        model.save_pretrained(work, max_shard_size=max_shard_size)
    finally:
        if generation is not None:
            model.generation_config = generation
    if generation is not None:
        generation.to_json_file(work / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"])
    if tokenizer is not None:
        tokenizer.save_pretrained(work)


def _write_module(result: PruneResult, work: Path) -> None:
    from safetensors.torch import save_model

    assert result.model is not None
    with persisted(result.model, result.surgery):
        save_model(result.model, str(work / "model.safetensors"))
    (work / SPEC_FILE).write_text(json.dumps({"format": 1, **result.surgery}) + "\n")


def _reload_error(result: PruneResult, work: Path) -> str | None:
    """What is wrong with what was read back, or None."""
    from .load import load

    model: Any = result.model

    def read() -> nn.Module:
        if result.form == "module":
            return load(work, model=result.dense_model)
        if result.form == "uniform":
            return type(model).from_pretrained(work, dtype="auto")  # type: ignore[no-any-return]
        return load(work)

    return reload_error(read, result.graph_module, result.example_inputs, result.report.verify_tolerance)


def reload_error(read: Callable[[], nn.Module], reference: nn.Module, inputs: Any, tolerance: float) -> str | None:
    """What is wrong with a model that was read back, or None.

    Args:
        read: Reads it.
        reference: What was written.
        inputs: What both are run on.
        tolerance: Largest relative error.
    """
    try:
        reloaded = read()
    except Exception as error:  # noqa: BLE001 - whatever went wrong, the checkpoint is not to be trusted
        cause = error.__cause__ if isinstance(error, CheckpointError) and error.__cause__ else error
        return f"it cannot be loaded: {type(cause).__name__}: {cause}"
    device = next(reference.parameters()).device
    with quiet(reference), torch.no_grad():
        expected = call(reference, inputs)
    return judge(expected, inputs, tolerance)(reloaded.to(device))
