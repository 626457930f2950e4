"""What a recovery gives back: the model, a report, and a checkpoint in the form of the one it started from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.fx import GraphModule

from ..api import example_inputs
from ..checkpoint.directory import new_directory
from ..checkpoint.save import reload_error, save_pruned, write_pretrained
from ..errors import CheckpointError
from ..names import PLAN_FILE, REPORT_FILE
from ..passes.verify import tolerance_of
from ..reporting.page import write_pages
from .subject import Subject


@dataclass(frozen=True)
class RecoveryReport:
    """A recovery in numbers.

    Attributes:
        recipe: Its name; ``own`` if settings were given whole.
        settings: All fields of `fxprune.recovery.settings.Recovery`.
        steps: Optimizer steps taken.
        best_step: The step whose weights the model has.
        stopped: Why it ended.
        history: Columns ``step``, ``loss``, ``lr`` and ``tokens`` (so far), one entry a step.
        validation: Measurements, each ``step`` and ``perplexity``; the one of step 0 is before training.
        tokens: Read in training, padding not counted.
        tokens_per_second: Of the last start, without its first steps.
        seconds: In training steps, over all starts.
        trained_parameters: How many numbers were trained.
        parameters: Of the model.
        data: What was read: sources, examples, tokens, and a sketch of each source's text to tell overlap by.
        teacher: The dense model that it learnt from or was measured against, or None.
        choices: What was chosen where the settings say ``auto``.
        notes: What else to know.
        versions: Software and machine.
        given: What the command says of a run beside its settings: ``data`` (each source's weight), ``validation`` (names of
            texts), ``teacher`` (a name) and ``dtype``, as far as they were given by name.
        curriculum: None without one, or its settings with ``dense`` (the dense model's held-out loss on each source, in nats per
            predicted token), ``measurements`` (see `fxprune.recovery.staged.StagedTraining`: losses, degradations, and the weights,
            steps and tokens of each round) and ``final`` (every source, with the weights that were kept).
            `fxprune.recovery.plot.plot_curriculum` draws it.
    """

    recipe: str
    settings: dict[str, Any]
    steps: int
    best_step: int
    stopped: str
    history: dict[str, list[float]]
    validation: list[dict[str, float]]
    tokens: int
    tokens_per_second: float
    seconds: float
    trained_parameters: int
    parameters: int
    data: dict[str, Any]
    teacher: str | None
    choices: dict[str, Any]
    notes: list[str]
    versions: dict[str, str]
    given: dict[str, Any] = field(default_factory=dict)
    curriculum: dict[str, Any] | None = None

    @property
    def perplexity(self) -> tuple[float, float] | None:
        """Validation perplexity before training and of the weights that were kept."""
        if not self.validation:
            return None
        after = next(v["perplexity"] for v in self.validation if v["step"] == self.best_step)
        return self.validation[0]["perplexity"], after

    def seen(self) -> list[dict[str, Any]]:
        """The text that was trained on, as `fxprune eval` looks for it: ``use``, ``name`` and ``sketch``."""
        return [{"use": "recovery", "name": name, "sketch": sketch} for name, sketch in self.data["sketches"].items()]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"fxprune_recovery": 1, **asdict(self)}


@dataclass
class RecoveryResult:
    """A recovered model.

    Attributes:
        model: An ordinary model in evaluation mode, what was learnt in its weights.
        report: Numbers.
        tokenizer: As given, or as found beside the checkpoint.
    """

    model: nn.Module
    report: RecoveryReport
    tokenizer: Any = None
    subject: Subject = field(repr=False, kw_only=True)

    def __repr__(self) -> str:
        both = self.report.perplexity
        change = "" if both is None else f", perplexity {both[0]:.2f} -> {both[1]:.2f}"
        return f"RecoveryResult({type(self.model).__name__}, {self.report.steps} steps, {self.report.tokens:,} tokens{change})"

    def save_pretrained(self, directory: str | os.PathLike[str], *, overwrite: bool = False, max_shard_size: str = "5GB") -> None:
        """Write a checkpoint of the same form as the one it started from, read it back and compare before it appears.

        Args:
            directory: Where to.
            overwrite: Replace an existing checkpoint.
            max_shard_size: As for ``save_pretrained``.

        Raises:
            UsageError: The directory exists.
            CheckpointError: A graph or a plain module has no checkpoint form, the disk is full, or what was read back differs.
        """
        report = self.report.to_json()
        pruned = self.subject.pruned
        if isinstance(self.model, GraphModule):
            raise CheckpointError("a GraphModule has no checkpoint form: keep its weights with safetensors.torch.save_model")
        if pruned is not None:
            recovered = cast(GraphModule, self.model)  # it takes the graph's place as what must be read back
            result = replace(pruned, model=self.model, graph_module=recovered, tokenizer=self.tokenizer)
            more = {"recovery": report, "data": [*pruned.report.data, *self.report.seen()]}
            save_pruned(result, directory, overwrite=overwrite, max_shard_size=max_shard_size, more=more)
            return
        if not hasattr(self.model, "save_pretrained"):
            raise CheckpointError(f"a plain {type(self.model).__name__} has no checkpoint form: recover fxprune.prune's result")
        with new_directory(directory, overwrite=overwrite) as work:
            self._write(work, report, max_shard_size)
            write_pages(work, name=Path(os.path.abspath(directory)).name)

    def _write(self, work: Path, report: dict[str, Any], max_shard_size: str) -> None:
        model: Any = self.model
        per_layer = hasattr(type(model), "_fxprune_per_layer")
        write_pretrained(model, self.tokenizer, work, max_shard_size)
        written: dict[str, Any] = {}
        source = self.subject.directory
        if source is not None and (source / REPORT_FILE).is_file():
            written = json.loads((source / REPORT_FILE).read_text(encoding="utf-8"))
        if source is not None and (source / PLAN_FILE).is_file():
            shutil.copyfile(source / PLAN_FILE, work / PLAN_FILE)
        if "recovery" in written:
            report = {**report, "earlier": written["recovery"]}
        if "bytes_after" in written:
            written["bytes_after"] = sum(p.numel() * p.element_size() for p in model.parameters())
        written |= {"recovery": report, "data": [*written.get("data", []), *self.report.seen()]}
        (work / REPORT_FILE).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        error = reload_error(_reader(type(model), work, per_layer), model, example_inputs(model), tolerance_of(model))
        if error is not None:
            raise CheckpointError(f"the checkpoint read back differs from the recovered model ({error}); nothing was written")


def _reader(kind: Any, work: Path, per_layer: bool) -> Callable[[], nn.Module]:
    from ..checkpoint.load import load

    return lambda: load(work) if per_layer else kind.from_pretrained(work, dtype="auto")
