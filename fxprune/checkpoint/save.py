"""Writing a pruned model: beside the target, read back, compared, and only then put in place."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CheckpointError, UsageError
from . import surgery
from .eager import judge

if TYPE_CHECKING:
    from ..api import PruneResult

MODELING = "modeling_fxprune"
PLAN_FILE = "fxprune_plan.json"
REPORT_FILE = "fxprune_report.json"
SPEC_FILE = "fxprune_surgery.json"


@contextmanager
def new_directory(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside ``target`` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        UsageError: The target exists (and may not be overwritten), or its parent cannot be written to.
    """
    target = Path(target)
    check_target(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise UsageError(f"cannot write beside '{target}': {error.strerror}") from error
    try:
        yield work
        work.chmod(0o755)
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            target.rename(old / "was")
        work.rename(target)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"could not write '{target}': {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_target(target: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise `UsageError` if an output directory may not be written; called early, before anything is computed."""
    path = Path(target)
    if path.exists() and not path.is_dir():
        raise UsageError(f"the output '{path}' is a file; name a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UsageError(f"the output directory '{path}' exists and is not empty; choose another, or say overwrite")


def save_pruned(result: PruneResult, directory: str | os.PathLike[str], *, overwrite: bool = False, max_shard_size: str = "5GB") -> None:
    """Write a pruned model as a Hugging Face checkpoint, reload it, compare, and put it in place.

    Args:
        result: What `fxprune.prune` returned.
        directory: Where to.
        overwrite: Replace an existing directory.
        max_shard_size: As for ``save_pretrained``.

    Raises:
        UsageError: The directory exists.
        CheckpointError: There is no eager form of the model, the disk is full, or what was read back is not what was written. Nothing is left behind.
    """
    if result.model is None:
        raise CheckpointError(f"there is no eager model to save: {result.report.note}")
    with new_directory(directory, overwrite=overwrite) as work:
        if hasattr(result.model, "save_pretrained"):
            _write_pretrained(result, work, max_shard_size)
        else:
            _write_module(result, work)
        result.plan.save(work / PLAN_FILE)
        (work / REPORT_FILE).write_text(json.dumps(result.report.to_json(), indent=1) + "\n")
        error = _reload_error(result, work)
        if error is not None:
            raise CheckpointError(f"the checkpoint read back from disk differs from the pruned model ({error}); nothing was written")


def _write_pretrained(result: PruneResult, work: Path, max_shard_size: str) -> None:
    model: Any = result.model
    try:
        if result.form == "per-layer":
            _write_per_layer(result, model, work, max_shard_size)
        else:
            model.save_pretrained(work, max_shard_size=max_shard_size)
    except OSError as error:
        raise CheckpointError(f"writing the checkpoint failed: {error.strerror or error}; nothing was left behind") from error
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(work)
    if result.tokenizer is not None:
        result.tokenizer.save_pretrained(work)


def _write_per_layer(result: PruneResult, model: Any, work: Path, max_shard_size: str) -> None:
    """The dense model's configuration, the surgery as data, and a small modelling file that does it again."""
    config = copy.deepcopy(result.dense_config)
    config.fxprune = {"format": 1, **result.surgery}
    config.auto_map = {"AutoModelForCausalLM": f"{MODELING}.{type(model).__name__}"}
    kept_config = model.config
    persistent = _persist(model, result.surgery)
    try:
        model.config = config
        # under the class's own parameter names: transformers does not rename for code that travels with a checkpoint
        model.save_pretrained(work, max_shard_size=max_shard_size, save_original_format=False)
    finally:
        model.config = kept_config
        for owner, leaf in persistent:
            owner._non_persistent_buffers_set.add(leaf)
    written = json.loads((work / "config.json").read_text())
    written |= {"fxprune": config.fxprune, "auto_map": config.auto_map}
    written["architectures"] = [type(model).__name__]
    (work / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    (work / f"{MODELING}.py").write_text(modeling_source(type(model)))


def _persist(model: nn.Module, spec: Mapping[str, Any]) -> list[tuple[nn.Module, str]]:
    """Resized buffers are stored with the weights: a stock class would compute them for the dense size."""
    changed = []
    for name in spec.get("buffers", {}):
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if leaf in owner._non_persistent_buffers_set:
            owner._non_persistent_buffers_set.discard(leaf)
            changed.append((owner, leaf))
    return changed


def modeling_source(base: type) -> str:
    """The modelling file of a per-layer checkpoint: our surgery, and a subclass of the stock class that applies it."""
    body = Path(surgery.__file__).read_text()
    return f'''{body}

from {base.__module__} import {base.__name__} as _Dense  # noqa: E402


class {base.__name__}(_Dense):
    """{base.__name__} with per-layer widths, as pruned by fxprune."""

    def __init__(self, config):
        for key, value in config.fxprune.get("dense", {{}}).items():  # a configuration that was saved again
            setattr(config, key, value)
        super().__init__(config)
        apply_surgery(self, config.fxprune)
        self.config.fxprune["dense"] = shorten_config(self.config, config.fxprune)

    def _init_weights(self, module):
        if not getattr(module, "_fxprune_resized", False):
            super()._init_weights(module)
'''


def _write_module(result: PruneResult, work: Path) -> None:
    from safetensors.torch import save_model

    save_model(result.model, str(work / "model.safetensors"))
    (work / SPEC_FILE).write_text(json.dumps({"format": 1, **result.surgery}) + "\n")


def _reload_error(result: PruneResult, work: Path) -> str | None:
    """What is wrong with what was read back, or None."""
    from .load import load

    if result.form == "module":
        reloaded = load(work, model=result.dense_model)
    elif result.form == "uniform":
        reloaded = type(result.model).from_pretrained(work, dtype="auto")  # type: ignore[attr-defined]
    else:
        reloaded = load(work)
    device = next(result.graph_module.parameters()).device
    with torch.no_grad():
        expected = result.run(result.graph_module)
    return judge(expected, result.example_inputs, result.report.verify_tolerance)(reloaded.to(device))
