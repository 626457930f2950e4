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


def save_itself(model: Any, dense_config: Any, spec: Mapping[str, Any]) -> None:
    """Let a model that was operated on write this form by its own ``save_pretrained``, as a ``Trainer`` calls it.

    Its class becomes a subclass of the same name: the stock method would write sizes that its weights do not have.

    Args:
        model: An eager Hugging Face model with widths that no stock configuration expresses.
        dense_config: Of the dense model.
        spec: What `fxprune.checkpoint.surgery.apply_surgery` needs to do the same to a dense model.
    """
    model.__class__ = _saving_class(stock_class(type(model)), dense_config, spec)


def _saving_class(base: Any, dense_config: Any, spec: Mapping[str, Any]) -> type:
    config = copy.deepcopy(dense_config)

    class Saving(base):  # type: ignore[misc]
        _fxprune_per_layer = True

        def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
            write_per_layer(self, config, spec, Path(save_directory), *args, **options)

        def __reduce_ex__(self, protocol: Any) -> Any:  # this class cannot be found by its name
            _, _, *rest = super().__reduce_ex__(protocol)
            return (_revive, (base, config, spec), *rest)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Saving, name, getattr(base, name))
    return Saving


def _revive(base: type, dense_config: Any, spec: Mapping[str, Any]) -> Any:
    """An empty model of the class, for pickle and copy to fill."""
    kind: Any = _saving_class(base, dense_config, spec)
    return kind.__new__(kind)


def write_per_layer(model: Any, dense_config: Any, spec: Mapping[str, Any], directory: Path, *args: Any, **options: Any) -> None:
    """Write the model into a directory.

    Args:
        model: As for `save_itself`.
        dense_config: As for `save_itself`.
        spec: As for `save_itself`.
        directory: Where to.
        *args: As for ``save_pretrained``.
        **options: As for ``save_pretrained``.

    Raises:
        UsageError: It should be uploaded in the same call.
    """
    if options.pop("push_to_hub", False):
        raise UsageError("save_pretrained(push_to_hub=True) would upload before all files are there: call model.push_to_hub(...)")
    stock = stock_class(type(model))
    config = copy.deepcopy(dense_config)
    config.fxprune = {"format": 1, **spec}
    config.auto_map = {auto_class(stock, type(config)): f"{MODELING}.{stock.__name__}"}
    own = model.config
    options["save_original_format"] = False  # transformers does not rename parameters for code that travels with a checkpoint
    try:
        model.config = config
        with persisted(model, spec):
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


AUTO = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "AutoModel": "MODEL_MAPPING",
}


def auto_class(model: type, config: type) -> str:
    """The auto class that users load such a model with."""
    import transformers

    for name, mapping in AUTO.items():
        listed = getattr(transformers, mapping).get(config, ())
        if any(c in model.__mro__ for c in (listed if isinstance(listed, list | tuple) else [listed])):
            return name
    return "AutoModelForCausalLM"


@contextmanager
def persisted(model: nn.Module, spec: Mapping[str, Any]) -> Iterator[None]:
    """Resized buffers belong to the state within: a dense class would compute them for the dense size."""
    changed = []
    for name in spec.get("buffers", {}):
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if leaf in owner._non_persistent_buffers_set:
            owner._non_persistent_buffers_set.discard(leaf)
            changed.append((owner, leaf))
    try:
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
        for key, value in (spec or {{}}).get("dense", {{}}).items():  # a configuration that was saved again
            setattr(config, key, value)
        super().__init__(config)
        if spec is not None:  # once this class is registered, transformers may hand it stock configurations too
            apply_surgery(self, spec)
            self.config.fxprune["dense"] = shorten_config(self.config, spec)

    def _init_weights(self, module):
        if not getattr(module, "_fxprune_resized", False):
            super()._init_weights(module)

    def save_pretrained(self, save_directory, *args, save_original_format=False, **kwargs):
        os.makedirs(save_directory, exist_ok=True)
        copy = os.path.join(save_directory, "{MODELING}.py")
        if not os.path.exists(copy) or not os.path.samefile(__file__, copy):
            shutil.copyfile(__file__, copy)
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)
'''
