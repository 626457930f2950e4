"""The settings of a recovery, the same from Python and from the command line, and the recipes that name them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..errors import UsageError, check_seed, nearest

METHODS = ("lora", "full")
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("auto", "fp32", "bf16")
SWITCH = ("auto", "on", "off")

FREE = ("micro_batch_size", "gradient_checkpointing", "compile", "checkpoint_every")
"""Fields that change memory and speed, not what is computed: a run may be continued with others."""


@dataclass(frozen=True)
class Recovery:
    """How a pruned model is trained. The default values are the recipe ``default``.

    Attributes:
        method: ``lora`` (adapters, merged at the end) or ``full`` (every parameter that is not frozen, in 32 bits while training).
        rank: Of the adapters.
        alpha: Their scale: the update is ``alpha / rank * B A`` (LoRA, arXiv 2106.09685, section 4.1).
        dropout: On the adapters' input.
        rslora: Scale by ``alpha / sqrt(rank)`` instead (arXiv 2312.03732).
        targets: ``all`` (every linear layer but the output embedding), or patterns of module names: ``q_proj``,
            ``model.layers.*.mlp.*``.
        lr: Peak learning rate of AdamW (betas 0.9 and 0.999).
        schedule: ``cosine``, ``linear`` or ``constant`` after the warm-up, to zero at the last step; as in transformers.
        warmup: Steps of linear warm-up if 1 or more, else their share of all steps.
        epochs: Passes over the data; parts of one are allowed.
        max_steps: At most so many optimizer steps; None for no limit.
        max_tokens: At most about so many tokens, counted in mean steps; None for no limit.
        batch_size: Sequences of an optimizer step, over all processes.
        micro_batch_size: Sequences run at a time on one process; None chooses by length and device.
        samples: Examples read from the data, the held-out ones included; None for all.
        cutoff: Tokens that an example is cut to; no more than the model reads.
        length: Tokens of a packed row; the cutoff if it is larger, and no more than the model reads. Without packing rows have at
            most ``cutoff`` tokens.
        packing: Several examples in a row, each blind to the others: ``auto`` where the model keeps them apart, ``on``, ``off``.
        completion_only: Loss on answers only, where the data has prompts; ready examples know theirs.
        precision: ``fp32``, ``bf16`` (autocast), or ``auto``: bf16 on CUDA devices that have it.
        gradient_checkpointing: ``on``, ``off``, or ``auto``: where the activations would not fit otherwise.
        compile: ``torch.compile`` of the training step: ``on``, ``off``, or ``auto``: on CUDA.
        weight_decay: Of AdamW.
        max_grad_norm: Largest gradient norm; 0 for no limit.
        validation_samples: Examples held out of the data, at most a tenth of them; 0 for none. Unused if validation data is given.
        validation_every: Steps between two measurements of validation perplexity; 0 measures at the start and at the end only.
        patience: Stop after so many measurements without a better one; 0 never stops early.
        distill_weight: Share of the loss that is the divergence from the teacher's predictions; needs a teacher.
        distill_temperature: Of that divergence.
        hidden_weight: Weight of the distance between hidden states; needs a teacher with as many layers of the same width.
        checkpoint_every: Steps between two states on disk; 0 writes one at the end only.
        seed: Of data order, dropout, the adapters' start and the held-out examples.
    """

    method: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    targets: str | tuple[str, ...] = "all"
    lr: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    epochs: float = 2.0
    max_steps: int | None = None
    max_tokens: int | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    samples: int | None = None
    cutoff: int = 512
    length: int = 512
    packing: str = "auto"
    completion_only: bool = False
    precision: str = "auto"
    gradient_checkpointing: str = "auto"
    compile: str = "auto"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    validation_samples: int = 500
    validation_every: int = 50
    patience: int = 5
    distill_weight: float = 0.0
    distill_temperature: float = 1.0
    hidden_weight: float = 0.0
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        _types(self)
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        _one_of("method", self.method, METHODS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("precision", self.precision, PRECISIONS)
        for name in ("packing", "gradient_checkpointing", "compile"):
            _one_of(name, getattr(self, name), SWITCH)
        for name in ("rank", "batch_size", "micro_batch_size", "samples", "max_steps", "max_tokens"):
            _least(self, name, 1)
        for name in ("cutoff", "length"):
            _least(self, name, 2)
        for name in ("alpha", "lr", "epochs", "distill_temperature"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0, got {getattr(self, name)}")
        unsigned = (
            "warmup",
            "weight_decay",
            "max_grad_norm",
            "hidden_weight",
            "validation_samples",
            "validation_every",
            "patience",
        )
        for name in (*unsigned, "checkpoint_every"):
            _least(self, name, 0)
        check_seed(self.seed)
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not 0 <= self.distill_weight <= 1:
            raise UsageError(f"distill_weight must lie between 0 and 1, got {self.distill_weight}")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise UsageError(f"micro_batch_size {self.micro_batch_size} is more than batch_size {self.batch_size}")
        if not self.targets or not all(isinstance(t, str) and t for t in self.targets):
            raise UsageError("targets is 'all' or patterns of module names, such as q_proj,v_proj")

    @property
    def distils(self) -> bool:
        """True if a teacher is needed."""
        return self.distill_weight > 0 or self.hidden_weight > 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = asdict(self)
        return {**data, "targets": data["targets"] if isinstance(self.targets, str) else list(self.targets)}

    def within(self, longest: int | None) -> tuple[Recovery, list[str]]:
        """Settings whose rows a model can read, and what to note of it.

        Args:
            longest: Tokens that it was made for; None if it does not say.
        """
        over = {name: n for name in ("cutoff", "length") if longest is not None and (n := getattr(self, name)) > longest}
        if not over:
            return self, []
        said = " and ".join(f"{name} {n:,}" for name, n in over.items())
        return replace(self, **dict.fromkeys(over, longest)), [f"{said} became {longest:,}: the model reads no more tokens"]

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step.

        Args:
            step: Counted from 0.
            steps: Of the whole run.

        Returns:
            What the schedules of ``transformers.get_scheduler`` give at that step.
        """
        warmup = int(self.warmup if self.warmup >= 1 else self.warmup * steps)
        if step < warmup:
            return self.lr * step / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        if self.schedule == "constant":
            return self.lr
        left = 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * max(0.0, left)


def _types(settings: Recovery) -> None:
    for field in fields(settings):
        kind, value = str(field.type), getattr(settings, field.name)
        if value is None and "None" in kind:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind.startswith("int") and not (number and isinstance(value, int)):
            raise UsageError(f"{field.name} must be a whole number, got {value!r}")
        if kind == "float":
            if not number or not math.isfinite(value):
                raise UsageError(f"{field.name} must be a number, got {value!r}")
            object.__setattr__(settings, field.name, float(value))
        if kind == "bool" and not isinstance(value, bool):
            raise UsageError(f"{field.name} must be True or False, got {value!r}")
        if kind == "str" and not isinstance(value, str):
            raise UsageError(f"{field.name} must be a text, got {value!r}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"unknown {name} '{value}'; {nearest(value, choices)}")


def _least(settings: Recovery, name: str, least: int) -> None:
    value = getattr(settings, name)
    if value is not None and value < least:
        raise UsageError(f"{name} must be at least {least}, got {value}")


RECIPES: dict[str, Recovery] = {
    "default": Recovery(),
    "llm-pruner": Recovery(
        rank=8,
        alpha=16.0,
        dropout=0.05,
        lr=1e-4,
        schedule="linear",
        warmup=100,
        epochs=2.0,
        batch_size=64,
        cutoff=256,
        length=256,
        packing="off",
        completion_only=True,
        validation_samples=2000,
        validation_every=100,
        patience=0,
        checkpoint_every=200,
    ),
}
"""Recipes by name. ``llm-pruner`` is that of arXiv 2305.11627, section 4.1, and the defaults of its ``post_training.py`` for the
rest: loss on the answers only (``train_on_inputs`` is off), 2,000 examples held out, measured every 100 steps, the best kept."""


ALSO_CALLED = {
    "learning_rate": "lr",
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "use_rslora": "rslora",
    "num_train_epochs": "epochs",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "per_device_train_batch_size": "micro_batch_size",
    "max_length": "length",
    "max_seq_length": "length",
    "cutoff_len": "cutoff",
    "temperature": "distill_temperature",
    "bf16": "precision",
}
"""What transformers, peft and others call settings of ours."""


def setting_meant(typed: str, known: Iterable[str]) -> str:
    """The tail of an error message: which setting may be meant by a name that is none."""
    return f"it is called {ALSO_CALLED[typed]} here" if typed in ALSO_CALLED else nearest(typed, known)


OF_LORA = ("rank", "alpha", "dropout", "rslora", "targets")
"""Fields that say how adapters are made."""


def settings_of(recipe: str | Recovery = "default", overrides: Mapping[str, Any] | None = None) -> Recovery:
    """A recipe with some fields changed.

    Args:
        recipe: A name of `RECIPES`, or settings.
        overrides: Field -> value; texts are read as the field's type (``lr="1e-4"``, ``max_steps="none"``).

    Raises:
        UsageError: An unknown recipe or field, or a value that makes no sense.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise UsageError(f"unknown recipe '{recipe}'; {nearest(recipe, RECIPES)}")
        recipe = RECIPES[recipe]
    known = {f.name: str(f.type) for f in fields(Recovery)}
    for name in overrides or {}:
        if name not in known:
            raise UsageError(f"there is no recovery setting '{name}'; {setting_meant(name, known)}")
    values = {n: read_value(n, v) if isinstance(v, str) else v for n, v in (overrides or {}).items()}
    return replace(recipe, **values)


def read_value(name: str, text: str) -> Any:
    """A field's value from what was typed.

    Raises:
        UsageError: It cannot be read as the field's type.
    """
    kind = next(str(f.type) for f in fields(Recovery) if f.name == name)
    try:
        if "None" in kind and text.lower() == "none":
            return None
        if kind.startswith("int"):
            return int(text)
        if kind == "float":
            return float(text)
        if kind == "bool":
            return {"true": True, "false": False, "on": True, "off": False}[text.lower()]
    except (ValueError, KeyError):
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}[kind.split(" ")[0]]
        optional = " or none" if "None" in kind else ""
        raise UsageError(f"{name} must be {wanted}{optional}, got '{text}'") from None
    if name == "targets" and text != "all":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text
