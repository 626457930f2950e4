"""Shear a model: knowledge distribution, LHSPG, exact removal, dynamic recovery, in one call that survives a kill."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ..api import versions
from ..calibration import longest_input
from ..checkpoint.directory import check_apart, check_not_model, check_target, new_directory
from ..checkpoint.save import save_pruned
from ..checkpoint.source import load_source
from ..data import Source, Sources
from ..devices import find_device
from ..errors import CheckpointError, UsageError
from ..files import read_json, write_whole
from ..knowledge import Knowledge
from ..names import REPORT_FILE
from ..passes.batches import Progress
from ..recipes import RecipeLike
from ..recovery.curriculum import Curriculum
from ..recovery.data import NO_TOKENIZER, check_tokens, load_stages
from ..recovery.run import RecoveryRun, recover
from ..recovery.staged import tokens_per_step
from ..recovery.subject import Subject, find_subject, fingerprint
from ..recovery.world import find_world
from ..reporting.page import write_pages
from .budget import Budget, make_schedule
from .parts import Parts
from .result import ShearReport, ShearResult
from .settings import settle
from .training import ShearTraining
from .work import WorkDirectory


def shear(
    model: str | os.PathLike[str] | nn.Module,
    ratio: float,
    data: Sources,
    *,
    output: str | os.PathLike[str],
    then: Sequence[Sources] = (),
    tokens: int | None = None,
    steps: int | None = None,
    tokenizer: Any = None,
    recipe: RecipeLike = None,
    knowledge: Knowledge | str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    restart: bool = False,
    device: torch.device | str | None = None,
    dtype: str | torch.dtype = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> ShearResult:
    """LoRAShear (arXiv 2310.18356): prune a model while adapters train it, then recover it.

    Four stages: trace the model with its adapters and find the groups; measure what each group is worth and leave the share that
    matters most whole; train with LHSPG until the least salient units are exactly zero, and remove them, which changes nothing;
    recover through a curriculum against the dense model. Each is kept in ``OUTPUT.shearing`` until the output stands: the same call
    goes on after a kill, with the same result.

    Args:
        model: A directory, a hub id or an eager Hugging Face model. It is not changed.
        ratio: Share of all parameters to remove, 0.2 for 20 %.
        data: Text to shear on, and of recovery's first stage, as for `fxprune.recover`: any number of sources.
        output: Directory to write.
        then: Sources of recovery's later stages.
        tokens: To train on altogether, shearing and recovery; about so many.
        steps: Instead of tokens: optimizer steps altogether.
        tokenizer: By default the model's own.
        recipe: A name of `fxprune.recipes.SHEARINGS`, a YAML file, or a mapping.
        knowledge: What `fxprune.measure_knowledge` or ``fxprune sensitivity`` found, or the directory of a checkpoint that was
            sheared from the same model, instead of measuring.
        overwrite: Replace an existing checkpoint at the output.
        restart: Drop what an interrupted run left.
        device: Where to run; by default where the model is, for a directory the CPU.
        dtype: Of a model that is read.
        progress: Called with (what, done, total).
        **settings: Fields of `fxprune.lorashear.settings.Shearing` and of `fxprune.Recovery`; they go before the recipe.

    Returns:
        The sheared model, read back from the output, and the report.

    Raises:
        UsageError: Something that was given cannot be used; says what, and what can. All of it is found before anything is measured
            or trained.
        PlanError: The ratio cannot be reached.
        VerificationError: The pruned model differs from the trained one.
        CheckpointError: The disk is full; what was reached stays.
        FxPruneError: The loss is not finite, or memory ran out; says what to lower. What was reached stays.
    """
    chosen, budget = settle(recipe, settings), Budget(tokens, steps)
    chosen.selection(ratio)
    later = [then] if isinstance(then, str | os.PathLike | Source | Mapping) else then
    curriculum = chosen.lessons([data, *later])
    if knowledge is not None and not chosen.protect_share:
        raise UsageError("there is knowledge, and protect_share is 0: nothing is protected by it; leave one of them out")
    known = knowledge if knowledge is None or isinstance(knowledge, Knowledge) else Knowledge.load(knowledge)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("a shearing runs in one process: start it without torchrun; fxprune recover can go on with several")
    device = None if device is None else find_device(device)
    work = WorkDirectory(output, restart=restart)
    done = work.delivered and not restart
    if not done:
        check_target(output, overwrite=overwrite)
    if isinstance(model, str | os.PathLike):
        check_not_model(output, model)
    file = None if isinstance(knowledge, Knowledge) else knowledge
    settings_file = recipe if isinstance(recipe, str | os.PathLike) else None
    check_apart(output, data=[s.file for s in curriculum.sources.values()], knowledge=[file], recipe=[settings_file])
    with ExitStack() as stack:
        dense = _subject(model, tokenizer, dtype)
        home = next(dense.model.parameters()).device
        world = find_world(device or home)
        stack.callback(dense.model.to, home)
        subject = replace(dense, model=copy.deepcopy(dense.model).to(world.device))
        longest = longest_input(subject.model)
        training, notes = chosen.training.within(longest)
        if longest is not None and chosen.knowledge_length > longest:
            notes.append(f"knowledge_length {chosen.knowledge_length:,} became {longest:,}: the model reads no more tokens")
            chosen = replace(chosen, knowledge_length=longest)
        chosen = replace(chosen, training=training)
        loaded = load_stages(curriculum, None, subject.tokenizer, chosen.training, progress=progress)
        for part in loaded.parts:
            check_tokens(part, subject.model)
        # another order than recovery's, which begins with the same text; every period under the same rate
        slow = replace(chosen.training, schedule="constant", seed=chosen.training.seed + 1)
        run = RecoveryRun(slow, subject, loaded, world)
        shares = curriculum.token_shares(curriculum.named()[0], None)
        batches = run.batches(loaded.stages[0].train)
        schedule = make_schedule(budget, chosen, tokens_per_step(batches, shares), len(curriculum.stages))
        batches = batches.drawn(shares, steps=schedule.steps, epoch=0, before={})
        identity = {
            **chosen.identity(),
            "ratio": ratio,
            **vars(budget),
            "the model": fingerprint(subject.model),
            "the data": loaded.fingerprint,
            "the sources": curriculum.named(),
            "the knowledge": "measured" if known is None else hashlib.sha256(json.dumps(known.to_json()).encode()).hexdigest()[:16],
        }
        if done:  # it was killed while it cleared up
            same = work.finish(identity)
            if same:
                return ShearResult.read(output, tokenizer)
            check_target(output, overwrite=overwrite)
            work = WorkDirectory(output)
        stack.callback(work.close)
        work.open(identity, restart=restart)
        stack.enter_context(torch.random.fork_rng(devices=[world.device.index] if world.device.type == "cuda" else []))
        parts = Parts(chosen, ratio, run, dense.model, batches, schedule, work, progress, notes)
        name = "own" if not isinstance(recipe, str | None) else recipe or "default"
        shearing = _Shearing(parts, curriculum, budget, known, name)
        if not work.pruned.is_dir():
            shearing.prune()
        if chosen.shear_share < 1 and not work.recovered.is_dir():
            dense.model.to(home)  # recovery has it on the device for as long as it measures
            shearing.recover()
        return shearing.deliver(output, tokenizer, overwrite=overwrite)


def _subject(model: str | os.PathLike[str] | nn.Module, tokenizer: Any, dtype: str | torch.dtype) -> Subject:
    """The dense model, seen to be one that can be trained, traced and saved."""
    own = None
    if isinstance(model, str | os.PathLike):
        model, own = load_source(model, dtype=dtype)
    if not isinstance(model, nn.Module):
        raise UsageError(f"cannot shear a {type(model).__name__}: expected a Hugging Face model, a directory or a hub id")
    if isinstance(model, GraphModule) or not hasattr(model, "save_pretrained"):
        raise UsageError(f"cannot shear a plain {type(model).__name__}, which has no checkpoint form: use fxprune.LHSPG in a loop")
    subject = find_subject(model, tokenizer or own, device=None, dtype=dtype)
    if subject.tokenizer is None:
        raise UsageError(NO_TOKENIZER)
    return subject


@dataclass
class _Shearing:
    """The stages, each of which leaves a whole thing in the working directory."""

    parts: Parts
    curriculum: Curriculum
    budget: Budget
    knowledge: Knowledge | None
    name: str

    def prune(self) -> None:
        """Groups, knowledge, LHSPG, removal: ``OUTPUT.shearing/pruned``."""
        parts, work = self.parts, self.parts.work
        parts.notes += parts.absent()
        if "begun" not in work.stages:
            parts.rehearse(self.knowledge)
            work.record("begun", {})
        scores = parts.weigh()
        knowledge, protect, measuring = None, tuple[str, ...](), 0.0
        if parts.settings.protect_share:
            knowledge, protect, measuring = parts.measure(self.knowledge)
        training = parts.train(protect, scores)
        start = time.perf_counter()
        of = {"recipe": self.name, "criterion": parts.criterion, "protected": list(protect)}
        result, exact = parts.remove(training, of)
        report = result.report
        seconds = {
            **({} if scores is None else {"importance": float(work.stages.get("importance", {}).get("seconds", 0.0))}),
            "knowledge": measuring,
            "lhspg": round(training.position.seconds, 3),
        }
        seconds["prune"] = round(time.perf_counter() - start, 3)
        told = report.note
        for note in parts.notes:  # said once
            told = told.replace(note, "")
        told = told.strip("; ")
        found = ShearReport(
            recipe=self.name,
            settings=parts.settings.to_json(),
            ratio=parts.ratio,
            budget=dict(vars(self.budget)),
            removed=round(report.removed, 6),
            parameters_before=report.parameters_before,
            parameters_after=report.parameters_after,
            form=report.form,
            knowledge=None if knowledge is None else {**knowledge.to_json(), "protected": list(protect)},
            lhspg=_trained(parts, training),
            prune=exact,
            recovery=None,
            tokens=_tokens(training),
            seconds=seconds,
            notes=[*parts.run.notes, *parts.notes, *([told] if told else [])],
            versions=versions(),
            run=work.run,
        )
        sketches = parts.run.data.account["sketches"]
        seen = [{"use": "shearing", "name": name, "sketch": sketches[name]} for name in self.curriculum.named()[0]]
        save_pruned(result, work.pruned, more={"shearing": found.to_json(), "data": [*report.data, *seen]})
        shutil.rmtree(work.lhspg, ignore_errors=True)

    def recover(self) -> None:
        """Recovery on what is left of the budget: ``OUTPUT.shearing/recovered``."""
        parts, work = self.parts, self.parts.work
        before = ShearReport.read(work.pruned)
        recover(
            work.pruned,
            curriculum=self.curriculum,
            tokenizer=parts.run.subject.tokenizer,
            recipe=parts.settings.training,
            teacher=parts.dense,
            output=work.recovered,
            device=parts.run.world.device,
            progress=parts.progress,
            **self.budget.left(before.tokens["total"], parts.schedule.steps),
        )

    def deliver(self, output: str | os.PathLike[str], tokenizer: Any, *, overwrite: bool) -> ShearResult:
        """Put the last checkpoint in place, with a report of all stages, once it could be read; then clear up."""
        work = self.parts.work
        last = work.recovered if work.recovered.is_dir() else work.pruned
        with new_directory(output, overwrite=overwrite) as target:
            for file in last.iterdir():
                _link(file, target / file.name)
            written = read_json(target / REPORT_FILE)
            if (recovery := written.get("recovery")) is not None:
                tokens = written["shearing"]["tokens"]
                tokens |= {"recovery": recovery["tokens"], "total": tokens["total"] + recovery["tokens"]}
                written["shearing"]["seconds"]["recovery"] = recovery["seconds"]
            write_whole(target / REPORT_FILE, json.dumps(written, indent=1) + "\n", called="the report")
            write_pages(target, name=Path(os.path.abspath(output)).name)
            try:
                result = ShearResult.read(target, tokenizer)
            except CheckpointError as error:
                raise CheckpointError(f"'{work.typed}/{last.name}' is damaged: {error}; start over with --restart") from error
        work.remove()
        return replace(result, directory=Path(output))


def _link(file: Path, target: Path) -> None:
    """Weights are linked rather than copied, where the file system can."""
    if file.suffix == ".safetensors":
        try:
            os.link(file, target)
            return
        except OSError:
            pass
    shutil.copytree(file, target) if file.is_dir() else shutil.copyfile(file, target)


def _trained(parts: Parts, training: ShearTraining) -> dict[str, Any]:
    """The report's part on LHSPG."""
    position, counts = training.position, _tokens(training)
    periods = [{**entry, "tokens": n} for entry, n in zip(training.lhspg.history, counts["periods"], strict=True)]
    rows = parts.batches.taken(0)
    return {
        **parts.schedule.to_json(),
        "criterion": parts.criterion,
        "periods": periods,
        "history": position.history,
        "sources": {name: {"rows": rows[name][0], "tokens": rows[name][1]} for name in rows},
        "trained_parameters": sum(p.numel() for p in training.named.values()),
        "eligible": list(training.lhspg.eligible),
        "left_out": dict(training.lhspg.left_out),
        "rate": {"schedule": "constant", "lr": parts.run.settings.lr},
        "tokens_per_second": round(training.pace, 1),
    }


def _tokens(training: ShearTraining) -> dict[str, Any]:
    """Tokens that each part of the schedule read."""
    schedule, so_far = training.schedule, [0, *(int(n) for n in training.position.history["tokens"])]
    ends = [schedule.warmup + i * schedule.period_steps for i in range(schedule.periods + 1)]
    return {
        "warm-up": so_far[schedule.warmup],
        "periods": [so_far[b] - so_far[a] for a, b in pairwise(ends)],
        "after the periods": so_far[-1] - so_far[ends[-1]],
        "total": so_far[-1],
    }
