"""The per-layer form: the dense configuration, the surgery as data, and a modelling file that does it again."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UsageError
from . import surgery

MODELING = "modeling_fxprune"


def save_itself(model: Any, spec: Mapping[str, Any]) -> None:
    """Let a model that was operated on write this form by its own ``save_pretrained``, as a ``Trainer`` calls it.

    Its class becomes a subclass of the same name: the stock method would write sizes that its weights do not have. Its
    configuration says what was done (``fxprune``), and its resized buffers belong to its state: a dense class would compute them
    for the dense size.

    Args:
        model: An eager Hugging Face model with widths that no stock configuration expresses.
        spec: What `fxprune.checkpoint.surgery.apply_surgery` needs to do the same to a dense model.
    """
    model.__class__ = _saving_class(stock_class(type(model)))
    model.config.fxprune = {"format": 1, **copy.deepcopy(dict(spec))}
    for owner, leaf in _resized_buffers(model, spec):
        owner._non_persistent_buffers_set.discard(leaf)


def _saving_class(base: Any) -> type:
    class Saving(base):  # type: ignore[misc]
        _fxprune_per_layer = True

        def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
            write_per_layer(self, Path(save_directory), *args, **options)

        def __reduce_ex__(self, protocol: Any) -> Any:  # this class cannot be found by its name
            _, _, *rest = super().__reduce_ex__(protocol)
            return (_revive, (base,), *rest)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Saving, name, getattr(base, name))
    return Saving


def _revive(base: type) -> Any:
    """An empty model of the class, for pickle and copy to fill."""
    kind: Any = _saving_class(base)
    return kind.__new__(kind)


def write_per_layer(model: Any, directory: Path, *args: Any, **options: Any) -> None:
    """Write the model into a directory.

    Args:
        model: What `save_itself` was called with.
        directory: Where to.
        *args: As for ``save_pretrained``.
        **options: As for ``save_pretrained``.

    Raises:
        UsageError: It should be uploaded in the same call.
    """
    if options.pop("push_to_hub", False):
        raise UsageError("save_pretrained(push_to_hub=True) would upload before all files are there: call model.push_to_hub(...)")
    stock, own = stock_class(type(model)), model.config
    surgery.note_shapes(model, own.fxprune)  # embeddings may have more rows since
    config = copy.deepcopy(own)
    config.auto_map = dict.fromkeys(auto_classes(stock, type(config)), f"{MODELING}.{stock.__name__}")
    options["save_original_format"] = False  # transformers does not rename parameters for code that travels with a checkpoint
    try:
        model.config = config
        stock.save_pretrained(model, directory, *args, **options)
    finally:
        model.config = own
    if not options.get("is_main_process", True):
        return
    written = json.loads((directory / "config.json").read_text())
    written |= {"fxprune": config.fxprune, "auto_map": config.auto_map, "architectures": [stock.__name__]}
    (directory / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    (directory / f"{MODELING}.py").write_text(modeling_source(stock), encoding="utf-8")


def stock_class(kind: type) -> Any:
    """The class that is not of this form: of a model that was pruned before, too."""
    return next(c for c in kind.__mro__ if "_fxprune_per_layer" not in vars(c))


def auto_classes(model: type, config: type) -> list[str]:
    """The auto classes that load such a model to be used."""
    from transformers.models.auto import modeling_auto

    found = []
    for name, kind in vars(modeling_auto).items():
        if not name.startswith("AutoModel") or not hasattr(kind, "_model_mapping") or name == "AutoModelForPreTraining":
            continue
        listed = kind._model_mapping.get(config, ())
        if any(c in model.__mro__ for c in (listed if isinstance(listed, list | tuple) else [listed])):
            found.append(name)
    return found or ["AutoModelForCausalLM"]


def _resized_buffers(model: nn.Module, spec: Mapping[str, Any]) -> Iterator[tuple[nn.Module, str]]:
    """Buffers of another size than the class makes them, that do not belong to the state."""
    for name in spec.get("buffers", {}):
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if leaf in owner._non_persistent_buffers_set:
            yield owner, leaf


@contextmanager
def persisted(model: nn.Module, spec: Mapping[str, Any]) -> Iterator[None]:
    """Resized buffers belong to the state within: a dense class would compute them for the dense size."""
    changed = list(_resized_buffers(model, spec))
    try:
        for owner, leaf in changed:
            owner._non_persistent_buffers_set.discard(leaf)
        yield
    finally:
        for owner, leaf in changed:
            owner._non_persistent_buffers_set.add(leaf)


def modeling_source(base: type) -> str:
    """The modelling file of a per-layer checkpoint: our surgery, and a subclass of the stock class that applies it."""
    body, base = Path(surgery.__file__).read_text(encoding="utf-8"), stock_class(base)
    return f'''{body}

import os  # noqa: E402
import shutil  # noqa: E402

from {base.__module__} import {base.__name__} as _Dense  # noqa: E402


class {base.__name__}(_Dense):
    """{base.__name__} with per-layer widths, as pruned by fxprune."""

    _fxprune_per_layer = True

    def __init__(self, config):
        spec = getattr(config, "fxprune", None)
        for key, value in (spec or {{}}).get("dense", {{}}).items():  # the dense model is built first
            part, _, field = key.rpartition(".")
            setattr(getattr(config, part) if part else config, field, value)
        super().__init__(config)
        if spec is not None:  # once this class is registered, transformers may hand it stock configurations too
            apply_surgery(self, spec)
            self.config.fxprune["dense"] = shorten_config(self.config, spec)

    def _init_weights(self, module):
        if not getattr(module, "_fxprune_resized", False):
            super()._init_weights(module)

    def save_pretrained(self, save_directory, *args, save_original_format=False, **kwargs):
        os.makedirs(save_directory, exist_ok=True)
        if getattr(self.config, "fxprune", None):
            note_shapes(self, self.config.fxprune)
        copy = os.path.join(save_directory, "{MODELING}.py")
        if not os.path.exists(copy) or not os.path.samefile(__file__, copy):
            shutil.copyfile(__file__, copy)
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)
'''
