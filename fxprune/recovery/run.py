"""Recover a pruned model: one call from data to a checkpoint."""

from __future__ import annotations

import logging
import math
import os
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ..api import versions
from ..calibration import known_tokens, longest_input
from ..checkpoint.directory import check_apart, check_not_model, check_target
from ..checkpoint.source import load_source
from ..data import Batches, Examples, Source, Sources, packs_apart
from ..devices import find_device
from ..errors import UsageError
from ..mode import quiet, without_cache
from ..passes.batches import Progress, logits_of
from ..report import source_name
from ..wording import counted
from .adapters import merged, out_of_reach, prepare, trained
from .curriculum import Curriculum, plan_stages, refuse_unused
from .data import TrainingData, check_tokens, load_data, load_stages, sources_of
from .loop import Plan, Training
from .memory import choose_sizes
from .objective import check_teacher
from .result import RecoveryReport, RecoveryResult
from .settings import FREE, OF_LORA, Recovery, settings_of
from .staged import StagedTraining, StageRun, tokens_per_step
from .state import Position, StateDirectory
from .subject import Subject, find_subject, fingerprint, plan_name
from .world import World, find_world

log = logging.getLogger("fxprune")

NO_PLAN = "holds no plan of fxprune"

REACH = 0.1
"""Share of the parameters out of the reach of adapters from above which a report says so."""


def recover(
    target: Any,
    data: Sources | Examples | None = None,
    *,
    curriculum: Curriculum | None = None,
    tokenizer: Any = None,
    recipe: str | Recovery = "default",
    teacher: str | os.PathLike[str] | nn.Module | None = None,
    validation: Sources | Examples | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    restart: bool = False,
    device: torch.device | str | None = None,
    dtype: str | torch.dtype = "auto",
    progress: Progress | None = None,
    **overrides: Any,
) -> RecoveryResult:
    """Train a pruned model until it knows again what it knew.

    Under ``torchrun`` or ``accelerate launch`` the processes share each batch (DDP, or FSDP if accelerate is told to use it); every
    one of them returns the result, the first one writes.

    Args:
        target: What `fxprune.prune` returned, a checkpoint's directory, an eager Hugging Face model, or a pruned GraphModule. It is
            not changed.
        data: Text to train on, as for `fxprune.data.parse_sources` (``"alpaca.jsonl.gz"``, ``"a.jsonl=0.7,b.txt=0.3"``, a
            ``datasets`` name), or examples that were read already (`fxprune.data.load_examples`), or are token ids
            (``fxprune.data.Examples.of_ids``).
        curriculum: Instead of data: stages of sources, and how often each source is read by what the pruned model has lost of it
            (``fxprune.Curriculum``). ``samples`` and ``validation_samples`` are then of each source, what is kept is the round
            with the least degradation, and the curriculum has a ``patience`` of its own.
        tokenizer: By default the target's.
        recipe: A name of `fxprune.recovery.settings.RECIPES`, or settings.
        teacher: The dense model (a directory, a hub id or a module) for ``distill_weight`` and ``hidden_weight``, and for a
            curriculum to measure degradation against.
        validation: Text to measure on; by default examples held out of the data. With a curriculum it is for the report only.
        output: Where to write the checkpoint. The training state is kept beside it, in ``OUTPUT.recovering``, until that is done:
            the same call goes on after a kill with the same result. Without it nothing is written.
        overwrite: Replace an existing checkpoint there.
        restart: Drop a training state that is there.
        device: Where to train; by default where the model is, for a directory the CPU.
        dtype: For a directory, the dtype of the weights.
        progress: Called with (what, done, total).
        **overrides: Fields of `fxprune.recovery.settings.Recovery`.

    Returns:
        The recovered model with its report.

    Raises:
        UsageError: Something that was given cannot be used; says what, and what can. A state that belongs to another run.
        CheckpointError: The disk is full or the checkpoint cannot be read back; the training state stays.
        FxPruneError: The loss is not finite, or memory ran out; says what to lower. The training state stays.
    """
    settings = settings_of(recipe, overrides)
    if settings.method == "full" and (idle := [name for name in OF_LORA if name in overrides]):
        raise UsageError(f"{idle[0]} is of adapters, and method=full trains every weight: leave it out, or say method=lora")
    if settings.distils and teacher is None:
        name = "distill_weight" if settings.distill_weight else "hidden_weight"
        raise UsageError(f"{name} is {getattr(settings, name):g} and there is no teacher: pass the dense model, teacher=")
    if teacher is not None and not settings.distils and curriculum is None:
        raise UsageError(
            "there is a teacher and nothing to learn from it: set distill_weight (--set distill_weight=0.5) or hidden_weight"
        )
    device = None if device is None else find_device(device)
    read = _given(data, curriculum, teacher, overrides)
    held = None if validation is None else sources_of(validation)
    if output is not None:
        check_target(output, overwrite=overwrite)
        if isinstance(target, str | os.PathLike):
            check_not_model(output, target)
        named = None if isinstance(teacher, nn.Module) else teacher
        check_apart(output, data=_files(read), validation=_files(held), teacher=[named])
    with ExitStack() as stack:
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        subject = find_subject(target, tokenizer, device=device if alone else None, dtype=dtype)
        if output is not None and not hasattr(subject.model, "save_pretrained") and (subject.pruned is None or _graph(subject)):
            raise UsageError("a GraphModule has no checkpoint form: leave output out, and keep result.model")
        longest = longest_input(subject.model)
        for given in (data, validation):
            if longest is not None and isinstance(given, Examples) and len(given) and int(given.lengths.max()) > longest:
                raise UsageError(f"the model reads at most {longest} tokens, and an example has {int(given.lengths.max())}")
        settings, notes = settings.within(longest)
        if isinstance(data, Examples) and len(data):
            settings = replace(settings, cutoff=max(settings.cutoff, int(data.lengths.max())))
        world = find_world(device or next(subject.model.parameters()).device)
        reading: dict[str, Any] = {"progress": progress if world.main else None}
        if isinstance(read, Curriculum):
            loaded = load_stages(read, held, subject.tokenizer, settings, **reading)
        else:
            loaded = load_data(read, held, subject.tokenizer, settings, **reading)
        for part in loaded.parts:
            check_tokens(part, subject.model)
        recovery = RecoveryRun(settings, subject, loaded, world, curriculum)
        recovery.name = recipe if isinstance(recipe, str) else "own"
        recovery.given = _said(read, held, teacher, dtype)
        recovery.notes += notes
        stack.enter_context(torch.random.fork_rng(devices=[world.device.index] if world.device.type == "cuda" else []))
        dense = recovery.teacher(teacher, stack)
        state = None
        if output is not None:
            state = StateDirectory(output, recovery.identity(dense), restart=restart, main=world.main)
            stack.callback(state.close)
        training = recovery.train(dense, state, progress)
        result = recovery.result(training, dense)
        if output is not None and state is not None:
            if world.main:
                result.save_pretrained(output, overwrite=overwrite)
                state.remove()
            world.wait()
        return result


def _given(
    data: Sources | Examples | None, curriculum: Curriculum | None, teacher: Any, overrides: dict[str, Any]
) -> tuple[Source, ...] | Examples | Curriculum:
    """What to read: data or a curriculum."""
    if curriculum is None:
        if data is None:
            raise UsageError("there is nothing to train on: give data, or curriculum=fxprune.Curriculum(...)")
        return sources_of(data)
    if data is not None:
        raise UsageError("data and a curriculum are given: name the data in the curriculum's stages only")
    if not isinstance(curriculum, Curriculum):
        raise UsageError(f"curriculum is a fxprune.Curriculum, not a {type(curriculum).__name__}")
    if curriculum.weights == "dynamic" and teacher is None:
        raise UsageError(
            "dynamic weights follow what the pruned model has lost against the dense one, and there is no teacher: pass the dense "
            "model, teacher=, or take static weights (weights='static', --curriculum static)"
        )
    refuse_unused(overrides)
    return curriculum


def _files(given: tuple[Source, ...] | Examples | Curriculum | None) -> list[Path | None]:
    """The local files that text is read from."""
    if given is None or isinstance(given, Examples):
        return []
    return [s.file for s in (given.sources.values() if isinstance(given, Curriculum) else given)]


def _said(
    read: tuple[Source, ...] | Examples | Curriculum, held: tuple[Source, ...] | Examples | None, teacher: Any, dtype: Any
) -> dict[str, Any]:
    """What was given by name, without folders."""
    found: dict[str, Any] = {}
    if isinstance(read, tuple):
        found["data"] = {source.label: source.weight for source in read}
    if isinstance(held, tuple):
        found["validation"] = [source.label for source in held]
    if teacher is not None:
        path = teacher if isinstance(teacher, str | os.PathLike) else getattr(getattr(teacher, "config", None), "_name_or_path", "")
        found["teacher"] = source_name(os.fspath(path or ""))[0]
    if dtype != "auto":
        found["dtype"] = str(dtype).removeprefix("torch.")
    return {name: value for name, value in found.items() if value}


def _graph(subject: Subject) -> bool:
    return isinstance(subject.model, GraphModule)


@dataclass
class RecoveryRun:
    """The parts of a run, put together."""

    settings: Recovery
    subject: Subject
    data: TrainingData
    world: World
    curriculum: Curriculum | None = None
    name: str = ""
    given: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = self.settings
        self.notes: list[str] = list(self.data.account.get("overlaps", ()))
        if (directory := self.subject.directory) is not None and self.subject.plan is None:
            self.notes.append(f"'{directory.name}' {NO_PLAN}: it was trained as it is")
        if not self.data.stages and self.data.held is None and settings.validation_samples:
            there = counted(len(self.data.train), "example")
            self.notes.append(f"nothing was held out to measure on: that would be a tenth, and there is no more than {there}")
        self.home: torch.device | None = None
        cuda = self.world.device.type == "cuda"
        self.bf16 = settings.precision == "bf16" or (settings.precision == "auto" and cuda and torch.cuda.is_bf16_supported())
        self.packing = settings.packing != "off" and self._packs(self.subject.model)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return max(self.settings.length, self.settings.cutoff) if self.packing else self.settings.cutoff

    def _packs(self, model: nn.Module, role: str = "") -> bool:
        """Whether rows of several examples will do for a model; says why they do not."""
        if self._apart(model):
            return True
        graph = isinstance(model, GraphModule)
        why = "a graph takes the inputs it was traced with" if graph else "its attention reads no position_ids"
        name = f"{role}{type(model).__name__}"
        if self.settings.packing == "on":
            raise UsageError(f"packing=on: this {name} does not keep packed examples apart ({why}); say packing=off")
        self.notes.append(f"not packed: the {name} does not keep packed examples apart ({why})")
        return False

    def _apart(self, model: nn.Module) -> bool:
        with quiet(model):
            return packs_apart(model, vocabulary=known_tokens(model) or 2)

    def teacher(self, given: Any, stack: ExitStack) -> nn.Module | None:
        """The dense model in evaluation mode, on the device."""
        if given is None:
            return None
        if isinstance(given, nn.Module):
            model = given
        else:
            model, _ = load_source(given, dtype=next(self.subject.model.parameters()).dtype)
        self.home = next(model.parameters()).device
        model = model.to(self.world.device)
        stack.enter_context(quiet(model))
        with quiet(self.subject.model):
            check_teacher(self.subject.model, model, self.settings)
        if self.settings.distils and self.packing:
            self.packing = self._packs(model, "teacher ")
        return model

    def identity(self, teacher: nn.Module | None) -> dict[str, Any]:
        """What a training state belongs to."""
        held = self.data.held
        settings = {k: v for k, v in self.settings.to_json().items() if k not in FREE}
        if self.curriculum is not None:
            settings |= {f"the curriculum's {name}": value for name, value in self.curriculum.to_json().items()}
        return {
            **settings,
            "the model": fingerprint(self.subject.model),
            "its plan": plan_name(self.subject.plan),
            "the data": self.data.fingerprint,
            "the validation data": "none" if held is None else held.fingerprint[:16],
            "the teacher": "none" if teacher is None else fingerprint(teacher),
            "bf16": self.bf16,
            "packed": self.packing,
        }

    def train(self, teacher: nn.Module | None, state: StateDirectory | None, progress: Progress | None) -> Training:
        """Run the loop."""
        settings, world = self.settings, self.world
        stages = self._stages(teacher)
        batches = stages[0].batches if stages else self.batches(self.data.train)
        held = None if self.data.held is None else self.batches(self.data.held)
        self._note_reach()
        student = prepare(self.subject.model, settings, wide=not self.bf16)
        if not world.sharded:
            student = student.to(world.device)
        schedules = [stage.plan.steps for stage in stages] or [self._steps(len(batches))]
        plan = self.fit(student, sum(schedules))
        self._note_warmup(min(schedules))
        self._note_tokens(batches.examples.tokens / len(batches))
        self.trained = sum(p.numel() for p in trained(student).values())
        wrapped = world.wrap(student)
        parts = (student, wrapped, teacher if settings.distils else None, batches, held, plan, world, state, progress)
        if self.curriculum is None:
            training = Training(*parts)
        else:
            training = StagedTraining(*parts, curriculum=self.curriculum, stages=stages, dense=teacher, home=self.home)
        with without_cache(student):
            self._try(student)
            training.run()
        return training

    def _note_reach(self) -> None:
        """Say that a large part of the model is left as pruning left it: nobody chose that."""
        model = self.subject.model
        count, name = out_of_reach(model)
        share = count / sum(p.numel() for p in model.parameters())
        if self.settings.method == "lora" and self.settings.targets == "all" and share > REACH:
            self._warn(
                f"{share:.0%} of the parameters are in no linear layer, so that no adapter trains them ('{name}'); method=full does"
            )

    def _note_warmup(self, steps: int) -> None:
        """Say that a run or a stage of so many steps is over before its warm-up."""
        settings = self.settings
        if 1 <= settings.warmup >= steps:
            of = "the run" if self.curriculum is None else "a stage"
            peak = settings.rate(steps - 1, steps) / settings.lr
            self._warn(
                f"the warm-up takes {counted(int(settings.warmup), 'step')} and {of} has {steps:,}: the learning rate gets no "
                f"further than {peak:.0%} of lr; set a shorter warmup, or a share such as 0.03"
            )

    def _note_tokens(self, per_step: float) -> None:
        """Say that one step reads more than the budget is; a curriculum divides it among its stages, a step each at least."""
        limit = self.settings.max_tokens
        if self.curriculum is None and limit is not None and limit < per_step / 2:
            self._warn(
                f"max_tokens is {limit:,} and a step reads about {per_step:,.0f}: one step is taken; for less, lower batch_size or "
                "length"
            )

    def _warn(self, said: str) -> None:
        self.notes.append(said)
        if self.world.main:
            log.warning("%s", said)

    def fit(self, student: nn.Module, steps: int) -> Plan:
        """How so many steps run on this device: rows at a time, recomputed activations, compiled or not."""
        settings, world = self.settings, self.world
        self.sizes = choose_sizes(
            student, settings, length=self.length, processes=world.size, device=world.device, width=2 if self.bf16 else 4
        )
        if self.sizes.checkpointing:
            name = "activation_checkpointing_enable"  # older transformers know the other name only
            switch = getattr(student, name if hasattr(student, name) else "gradient_checkpointing_enable")
            switch({"use_reentrant": False})
        compiled = settings.compile == "on" or (settings.compile == "auto" and world.device.type == "cuda" and not world.sharded)
        self.plan = Plan(settings, steps, self.sizes.micro, self.bf16, compiled)
        return self.plan

    def _try(self, student: nn.Module) -> None:
        """See that the model takes batches of other sizes than it was traced with."""
        if not isinstance(student, GraphModule):
            return
        try:
            with torch.no_grad():
                for shape in ((1, 7), (3, 5)):
                    logits_of(student(input_ids=torch.zeros(shape, dtype=torch.long, device=self.world.device)))
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise UsageError(
                f"the graph does not take token ids of any size ({reason}): trace it with input_ids only and symbolic sizes, or "
                "recover the eager model"
            ) from error

    def _stages(self, dense: nn.Module | None) -> tuple[StageRun, ...]:
        """The stages of the curriculum, none without one."""
        if self.curriculum is None:
            return ()
        packing = self.packing and (dense is None or self._apart(dense))
        batches = [self.batches(stage.train) for stage in self.data.stages]
        own = self.curriculum.named()
        lengths: dict[str, Any] = {
            "epochs": [len(b) for b in batches],
            "tokens": [b.examples.tokens for b in batches],
            "per_step": [tokens_per_step(b, weights) for b, weights in zip(batches, own, strict=True)],
        }
        plans = plan_stages(self.curriculum, self.settings, **lengths)
        held = [{n: self.batches(e, packing=packing) for n, e in stage.held.items()} for stage in self.data.stages]
        if self.curriculum.weights == "dynamic":
            alone = [f"{number} ({name})" for number, names in enumerate(own, 1) if len(names) == 1 for name in names]
            self.notes += [f"stage {stage} has one source: dynamic weights have nothing to choose there" for stage in alone]
        return tuple(StageRun(*parts) for parts in zip(batches, held, own, plans, strict=True))

    def batches(self, examples: Examples, *, packing: bool | None = None) -> Batches:
        """Batches of examples as they are trained on."""
        tokenizer = self.subject.tokenizer
        ids, known = [getattr(tokenizer, n, None) for n in ("pad_token_id", "eos_token_id")], known_tokens(self.subject.model)
        pad = next((i for i in ids if i is not None and (known is None or i < known)), 0)  # masked and not learned: any will do
        packing = self.packing if packing is None else packing
        options: dict[str, Any] = {"batch_size": self.settings.batch_size, "length": self.length, "packing": packing}
        return Batches(examples, pad_id=pad, seed=self.settings.seed, **options)

    def _steps(self, epoch: int) -> int:
        settings = self.settings
        limits = [math.ceil(settings.epochs * epoch - 1e-9)]
        if settings.max_steps is not None:
            limits.append(settings.max_steps)
        if settings.max_tokens is not None:
            limits.append(round(settings.max_tokens * epoch / self.data.train.tokens))
        return max(1, min(limits))

    def result(self, training: Training, teacher: nn.Module | None) -> RecoveryResult:
        """Merge and report."""
        model = merged(self.subject.model, training.result(), self.settings)
        position, world = training.position, self.world
        choices = {
            "device": str(world.device),
            "processes": world.size,
            "parallel": "none" if world.size == 1 else "fsdp" if world.sharded else "ddp",
            "precision": "bf16" if self.bf16 else "fp32",
            "packing": self.packing,
            "micro_batch_size": self.sizes.micro,
            "gradient_checkpointing": self.sizes.checkpointing,
            "compile": self.plan.compiled,
            "steps_planned": self.plan.steps,
        }
        best = position.step if position.best_step is None else position.best_step
        report = RecoveryReport(
            recipe=self.name,
            settings=self.settings.to_json(),
            steps=position.step,
            best_step=best,
            stopped=position.stopped,
            history=position.history,
            validation=position.validation,
            tokens=position.tokens,
            tokens_per_second=round(training.pace, 1),
            seconds=round(position.seconds, 3),
            trained_parameters=self.trained,
            parameters=sum(p.numel() for p in model.parameters()),
            data=self.data.account,
            teacher=None if teacher is None else _named(teacher),
            choices=choices,
            notes=self.notes,
            versions={**versions(), "peft": _version("peft"), "accelerate": _version("accelerate")},
            given=self.given,
            curriculum=None if self.curriculum is None else self._lessons(position),
        )
        return RecoveryResult(model, report, self.subject.tokenizer, subject=self.subject)

    def _lessons(self, position: Position) -> dict[str, Any]:
        """The curriculum's part of the report."""
        assert self.curriculum is not None
        measured = {"dense": position.dense, "measurements": position.rounds, "final": position.final}
        return {**self.curriculum.to_json(), "unit": "nats per predicted token", **measured}


def _named(model: nn.Module) -> str:
    return f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
